"""Batched rollouts of a policy: raw returns, costs and lengths of every episode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from psec_jax.data import dataset
from psec_jax.envs import one_per_process
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.types import Dataset

Act = Callable[[jax.Array, np.ndarray], Any]

MAX_WIDTH = 64  # environments at once; more episodes take turns
# The same for simulators that need a process each. Not the number of cores: the policy
# sees the same batch on every machine.
MAX_PROCESSES = 8


class Episodes(NamedTuple):
    """What E episodes gave.

    Attributes:
      returns: [E] float64, undiscounted.
      costs: [E] float64.
      lengths: [E] int64, steps.
      seeds: [E] int64, the environment seed of each.
    """

    returns: np.ndarray
    costs: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray


def episode_seeds(seed: int, episodes: int) -> np.ndarray:
    """Environment seeds [E] int64: episode e's depends on (seed, e) alone."""
    states = [
        np.random.SeedSequence((seed, e)).generate_state(1)[0] for e in range(episodes)
    ]
    return np.array(states, dtype=np.int64)


@jax.jit
def _policy_keys(seed: jax.Array, episode: jax.Array, step: jax.Array) -> jax.Array:
    def one(e: jax.Array, s: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), e), s)

    return jax.vmap(one)(episode, step)


def evaluate(
    act: Act,
    env_spec: str,
    episodes: int,
    seed: int,
    workers: int | None = None,
    vector_env: VectorEnv | None = None,
) -> Episodes:
    """Roll a policy out for whole episodes, many at once.

    Episode e starts from the state of SeedSequence((seed, e)), and its step s gives the
    policy the key fold_in(fold_in(key(seed), e), s), so the results depend neither on
    how many run at once nor on the number of processes, apart from the rounding of
    batched products. The policy always sees the same batch size B. A worker process
    that dies is replaced, see `VectorEnv`.

    Args:
      act: jitted `(keys [B], obs [B, S]) -> actions [B, A]`; actions are clipped to
        [-1, 1] here.
      env_spec: see `psec_jax.envs.make`.
      episodes: E.
      seed: of initial states and policy.
      workers: processes; by default one for every core.
      vector_env: environments to use again, of `env_spec`; by default min(E, 64), or
        min(E, 8) with a process each, are made, and closed at the end.

    Raises:
      InputError: `episodes` below 1, a spec that cannot be made, or environments of
        another spec.
      FloatingPointError: the policy gave NaN or infinity.
      RuntimeError: a worker process has died too often.
    """
    return _roll_out(act, env_spec, episodes, seed, workers, vector_env)


def record(
    act: Act,
    env_spec: str,
    episodes: int,
    seed: int,
    vector_env: VectorEnv | None = None,
) -> tuple[Episodes, Dataset, list[slice]]:
    """`evaluate` that also gives every transition.

    Returns:
      The episodes, their transitions in episode order, and the rows of each episode.

    Raises:
      As `evaluate`.
    """
    rows: list[list[tuple]] = []
    result = _roll_out(act, env_spec, episodes, seed, None, vector_env, rows)
    types = (np.float32,) * 5 + (bool,) * 2
    columns = zip(*[row for episode in rows for row in episode], strict=True)
    ds = Dataset(*(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)))
    return result, ds, dataset.episode_slices(ds)


def _roll_out(
    act: Act,
    env_spec: str,
    episodes: int,
    seed: int,
    workers: int | None,
    vector_env: VectorEnv | None,
    rows: list[list[tuple]] | None = None,
) -> Episodes:
    """`evaluate`; `rows` gets the transitions of each episode."""
    if episodes < 1:
        raise InputError(f"episodes is {episodes}, expected 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, expected 0 to {2**32 - 1}")
    if rows is not None:
        rows += [[] for _ in range(episodes)]
    if vector_env is None:
        width = MAX_PROCESSES if one_per_process(env_spec) else MAX_WIDTH
        with VectorEnv(env_spec, min(episodes, width), workers) as made:
            return _play(act, made, episodes, seed, rows)
    if vector_env.spec != env_spec:
        raise InputError(
            f"the environments given are {vector_env.spec}, expected {env_spec}"
        )
    return _play(act, vector_env, episodes, seed, rows)


def _play(
    act: Act,
    env: VectorEnv,
    episodes: int,
    seed: int,
    rows: list[list[tuple]] | None,
) -> Episodes:
    width = env.num_envs
    seeds = episode_seeds(seed, episodes)
    returns, costs = np.zeros(episodes), np.zeros(episodes)
    lengths = np.zeros(episodes, dtype=np.int64)
    # Slot b plays episode running[b]; idle slots keep stale observations, so that the
    # batch never changes its shape.
    slots = np.arange(min(width, episodes))
    running = np.zeros(width, dtype=np.int64)
    running[slots] = slots
    waiting = len(slots)
    obs = np.zeros((width, env.obs_dim), np.float32)
    obs[slots] = env.reset(slots, seeds[slots])
    while len(slots):
        keys = _policy_keys(np.uint32(seed), running, lengths[running])
        action = np.asarray(act(keys, obs), dtype=np.float32)
        if action.shape != (width, env.action_dim):
            raise InputError(
                f"the policy gave actions {action.shape}, {env.spec} expects "
                f"{(width, env.action_dim)}"
            )
        action, current = np.clip(action[slots], -1, 1), running[slots]
        if not np.isfinite(action).all():
            bad = current[~np.isfinite(action).all(1)][0]
            raise FloatingPointError(
                f"the policy's action is not finite in step {lengths[bad]} of episode "
                f"{bad}"
            )
        step = env.step(slots, action)
        if rows is not None:
            columns = (obs[slots], action, step.reward, step.cost, step.obs)
            for e, *row in zip(
                current, *columns, step.terminal, step.timeout, strict=True
            ):
                rows[e].append(tuple(row))
        returns[current] += step.reward
        costs[current] += step.cost
        lengths[current] += 1
        obs[slots] = step.obs
        ended = step.terminal | step.timeout
        free = slots[ended][: episodes - waiting]
        if len(free):
            fresh = np.arange(waiting, waiting + len(free))
            running[free] = fresh
            obs[free] = env.reset(free, seeds[fresh])
            waiting += len(free)
        slots = slots[~ended | np.isin(slots, free)]
    return Episodes(returns, costs, lengths, seeds)
