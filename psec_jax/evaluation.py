"""Batched rollouts of a policy: raw returns, costs and lengths of every episode."""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.tree_util import Partial

from psec_jax.data import dataset
from psec_jax.envs import (
    MAX_ON_DEVICE,
    batches_on_device,
    make_on_device,
    one_per_process,
)
from psec_jax.envs.base import Step
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.policy import Policy
from psec_jax.runtime import platform
from psec_jax.types import Dataset

Act = Callable[[jax.Array, np.ndarray], Any]

MAX_WIDTH = 64  # environments at once; more episodes take turns
# The same for simulators that need a process each. Not the number of cores: the policy
# sees the same batch on every machine.
MAX_PROCESSES = 8


class Episodes(NamedTuple):
    """Results of E episodes.

    Attributes:
      returns: [E] float64, undiscounted.
      costs: [E] float64.
      lengths: [E] int64, steps.
      seeds: [E] int64, the environment seed of each.
      success: [E] bool, whether the goal was reached in any step; None where the
        environment does not say.
    """

    returns: np.ndarray
    costs: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray
    success: np.ndarray | None = None


def episode_fields(episodes: Episodes, env: str, seed: int) -> dict[str, Any]:
    """Raw returns, costs and lengths of every episode, and the mean return, for JSON;
    also successes, 0 or 1, where the environment reports them."""
    fields = {
        "env": env,
        "evaluation_seed": seed,
        "mean": float(np.mean(episodes.returns)),
        "returns": episodes.returns.tolist(),
        "costs": episodes.costs.tolist(),
        "lengths": episodes.lengths.tolist(),
    }
    if episodes.success is not None:
        fields["success"] = episodes.success.astype(int).tolist()
    return fields


def successes(success: Any) -> str:
    """ ", 18 of 20 succeeded" for successes [E]; empty for None."""
    if success is None:
        return ""
    return f", {np.count_nonzero(success)} of {len(success)} succeeded"


def episode_seeds(seed: int, episodes: int) -> np.ndarray:
    """Environment seeds [E] int64: episode e's depends on (seed, e) alone."""
    states = [
        np.random.SeedSequence((seed, e)).generate_state(1)[0] for e in range(episodes)
    ]
    return np.array(states, dtype=np.int64)


@jax.jit
def policy_keys(seed: Any, episode: Any, step: Any) -> jax.Array:
    """The key [B] that the policy gets in step [B] of episode [B], see `evaluate`."""

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
    max_steps: int | None = None,
) -> Episodes:
    """Roll a policy out for whole episodes, many at once.

    Episode e starts from the state of SeedSequence((seed, e)), and its step s gives the
    policy the key fold_in(fold_in(key(seed), e), s), so the results depend neither on
    how many run at once nor on the number of processes, apart from the rounding of
    batched products. The policy always sees the same batch size B, also where half of
    the environments step while it acts for the others (`platform.Platform.overlap`). A
    worker process that dies is replaced, see `VectorEnv`.

    A policy that gives chunks of h actions is called where a chunk is used up or an
    episode starts, and the h actions are executed without looking.

    Environments that simulate on the device (`envs.mjx`) roll out there, policy and
    simulators as one compiled program: min(E, 4096) episodes at once and no processes.
    It is compiled once for all policies that are `policy.alike`, and for every other
    `act`, which has to be pure, anew.

    Args:
      act: jitted `(keys [B], obs [B, S]) -> actions [B, A]` or chunks [B, h, A];
        actions are clipped to [-1, 1] here.
      env_spec: see `psec_jax.envs.make`.
      episodes: E.
      seed: of initial states and policy.
      workers: processes; by default one for every core.
      vector_env: environments to use again, of `env_spec`; by default min(E, 64), or
        min(E, 8) with a process each, are made, and closed at the end.
      max_steps: after which every episode is cut; by default the environment's own.
        Not of environments on the device.

    Raises:
      InputError: `episodes` below 1, a spec that cannot be made, or environments of
        another spec.
      FloatingPointError: the policy gave NaN or infinity.
      RuntimeError: a worker process has died too often.
    """
    [result] = _roll_out(
        act, 1, env_spec, episodes, seed, workers, vector_env, max_steps=max_steps
    )
    return result


def evaluate_together(
    act: Act, count: int, env_spec: str, episodes: int, seed: int
) -> list[Episodes]:
    """`evaluate` of R policies at once, in the same environments.

    Each plays the same episodes from the same states and keys as it would alone.

    Args:
      act: jitted `(keys [R, B], obs [R, B, S]) -> actions [R, B, A]`, or chunks
        [R, B, h, A], of all policies, such as `policy.act_together`; B is
        min(E, 64 / R), or min(E, 8 / R) with a process for each environment, or
        min(E, 4096 / R) on the device, and at least 1.
      count: R.
      env_spec: see `psec_jax.envs.make`.
      episodes: E of each policy.
      seed: of initial states and policies.

    Returns:
      The episodes of each policy.

    Raises:
      As `evaluate`.
    """
    flat = Partial(_flat(count), _as_tree(act))
    return _roll_out(flat, count, env_spec, episodes, seed, None, None)


@functools.cache  # the same function each time: a program is compiled for it once
def _flat(count: int) -> Callable[..., Any]:
    def flat(act: Partial, keys: jax.Array, obs: Any) -> Any:
        rows = obs.reshape(count, -1, obs.shape[-1])
        action = act(keys.reshape(rows.shape[:2]), rows)
        return action.reshape(len(obs), *action.shape[2:])

    return flat


def _as_tree(act: Act) -> Partial:
    """A policy as a pytree of its arrays; none of a function that is not known."""
    policy = getattr(act, "__self__", None)
    if isinstance(policy, Policy) and act == policy.act:
        return policy.batched()
    return act if isinstance(act, Partial) else Partial(act)


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
    parts: list[Dataset] = []
    [result] = _roll_out(act, 1, env_spec, episodes, seed, None, vector_env, parts)
    ds = dataset.concatenate(parts)
    return result, ds, dataset.episode_slices(ds)


def _roll_out(
    act: Act,
    count: int,
    env_spec: str,
    episodes: int,
    seed: int,
    workers: int | None,
    vector_env: VectorEnv | None,
    parts: list[Dataset] | None = None,
    max_steps: int | None = None,
) -> list[Episodes]:
    """The episodes of `count` policies; `parts` gets the transitions of each one."""
    if dataset.whole("episodes", episodes) < 1:
        raise InputError(f"episodes is {episodes}, expected 1 or more")
    if not 0 <= dataset.whole("seed", seed) < 2**32:
        raise InputError(f"seed is {seed}, expected 0 to {2**32 - 1}")
    if vector_env is None and (env := make_on_device(env_spec)) is not None:
        return _simulate(act, count, env, episodes, seed, parts)
    if vector_env is None:
        with environments(env_spec, episodes, count, workers) as made:
            return _play(act, count, made, episodes, seed, parts, max_steps)
    if vector_env.spec != env_spec:
        raise InputError(
            f"the environments given are {vector_env.spec}, expected {env_spec}"
        )
    return _play(act, count, vector_env, episodes, seed, parts, max_steps)


def environments(
    spec: str, episodes: int, count: int = 1, workers: int | None = None
) -> VectorEnv:
    """As many environments as `evaluate` makes for the episodes of `count` policies."""
    width = MAX_PROCESSES if one_per_process(spec) else MAX_WIDTH
    return VectorEnv(spec, count * min(episodes, max(width // count, 1)), workers)


def _simulate(
    act: Act,
    count: int,
    env: Any,
    episodes: int,
    seed: int,
    parts: list[Dataset] | None,
) -> list[Episodes]:
    """`_play` on the device, in an `envs.mjx.MjxEnv`."""
    tree, seeds = _as_tree(act), episode_seeds(seed, episodes)
    returns = np.zeros((count, episodes))
    for numbers in batches_on_device(episodes, MAX_ON_DEVICE // count):
        batch = np.tile(numbers, count)
        horizon = _horizon(_shape(act, batch, env.obs_dim), env, len(batch))
        calls = np.arange(0, env.max_steps, horizon)
        episode, step = np.broadcast_arrays(batch, calls[:, None])
        keys = policy_keys(np.uint32(seed), episode.ravel(), step.ravel())
        played = env.roll_out(
            tree, keys.reshape(step.shape), seeds[batch], parts is not None
        )
        for step, b in np.argwhere(~played.finite)[:1]:
            _not_finite(int(step), int(batch[b]), int(b) // len(numbers), count)
        sums = played.reward.sum(0, dtype=np.float64)
        returns[:, numbers] = sums.reshape(count, -1)
        if parts is not None:
            parts += played.datasets()[: episodes - len(parts)]
    lengths = np.full(episodes, env.max_steps)
    return [Episodes(mine, np.zeros(episodes), lengths, seeds) for mine in returns]


def _shape(act: Act, batch: np.ndarray, obs_dim: int) -> tuple[int, ...]:
    """Of the policy's actions; it checks its arguments here."""
    keys = jax.eval_shape(policy_keys, np.uint32(0), batch, batch)
    obs = jax.ShapeDtypeStruct((len(batch), obs_dim), np.float32)
    return jax.eval_shape(act, keys, obs).shape


def _not_finite(step: int, episode: int, policy: int, count: int) -> NoReturn:
    which = f" of policy {policy + 1} of {count}" if count > 1 else ""
    raise FloatingPointError(
        f"the policy's action is not finite in step {step} of episode {episode}{which}"
    )


def _horizon(shape: tuple[int, ...], env: Any, width: int) -> int:
    """h of a policy's actions [B, h, A]; 1 where they are [B, A]."""
    if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (width, env.action_dim):
        raise InputError(
            f"the policy gave actions {shape}, {env.spec} expects "
            f"{(width, env.action_dim)}"
        )
    return shape[1] if len(shape) == 3 else 1


def _chunks(actions: Any, env: VectorEnv, width: int) -> np.ndarray:
    """The policy's actions as chunks [B, h, A]; single ones are chunks of one."""
    try:
        actions = np.asarray(actions, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"the policy gave no array of numbers ({error})") from error
    horizon = _horizon(actions.shape, env, width)
    return actions.reshape(width, horizon, env.action_dim)


def _begin(
    env: VectorEnv, slots: np.ndarray, action: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Callable[[], Step]]:
    """Slots, actions, and the function that waits for their step."""
    return slots, action, env.start_step(slots, action)


def _play(
    act: Act,
    count: int,
    env: VectorEnv,
    episodes: int,
    seed: int,
    parts: list[Dataset] | None,
    max_steps: int | None,
) -> list[Episodes]:
    rows: list[list[tuple]] = [[] for _ in range(count * episodes)]
    width, total = env.num_envs, count * episodes
    seeds = np.tile(episode_seeds(seed, episodes), count)
    returns, costs = np.zeros(total), np.zeros(total)
    success = np.full(total, np.nan)
    lengths = np.zeros(total, dtype=np.int64)
    # Policy p has the slots of row p, and plays the episodes from p * E on. Slot b
    # plays episode running[b]; idle slots keep stale observations, so that the batch
    # never changes its shape.
    share = width // count
    owner = np.arange(width) // share
    slots = np.flatnonzero(np.arange(width) % share < episodes)
    running = np.zeros(width, dtype=np.int64)
    running[slots] = owner[slots] * episodes + slots % share
    waiting = np.arange(count) * episodes + min(share, episodes)
    last = np.arange(1, count + 1) * episodes
    obs = np.zeros((width, env.obs_dim), np.float32)
    obs[slots] = env.reset(slots, seeds[running[slots]])
    # Slot b executes chunk[b, used[b]] next; chunk[b] is used up where used[b] = h.
    chunk = np.zeros((width, 1, env.action_dim), np.float32)
    used = np.ones(width, dtype=np.int64)

    def choose(slots: np.ndarray) -> np.ndarray:
        """The next actions; the policy is called where a chunk is used up."""
        nonlocal chunk
        fresh = slots[used[slots] == chunk.shape[1]]
        if len(fresh):
            keys = policy_keys(np.uint32(seed), running % episodes, lengths[running])
            drawn = _chunks(act(keys, obs), env, width)
            if drawn.shape != chunk.shape:  # the first call
                chunk = np.zeros_like(drawn)
                used[:] = chunk.shape[1]
            chunk[fresh], used[fresh] = drawn[fresh], 0
        action, current = np.clip(chunk[slots, used[slots]], -1, 1), running[slots]
        used[slots] += 1
        if not np.isfinite(action).all():
            bad = current[~np.isfinite(action).all(1)][0]
            policy, episode = divmod(int(bad), episodes)
            _not_finite(int(lengths[bad]), episode, policy, count)
        return action

    def record(slots: np.ndarray, action: np.ndarray, step: Step) -> np.ndarray:
        """The slots that play on, with new episodes where others have ended."""
        current = running[slots]
        if parts is not None:
            columns = (obs[slots], action, step.reward, step.cost, step.obs)
            for e, *row in zip(
                current, *columns, step.terminal, step.timeout, strict=True
            ):
                rows[e].append(tuple(row))
        returns[current] += step.reward
        costs[current] += step.cost
        success[current] = np.fmax(success[current], step.success)
        lengths[current] += 1
        obs[slots] = step.obs
        ended = step.terminal | step.timeout
        if max_steps is not None:
            ended |= lengths[current] >= max_steps
        used[slots[ended]] = chunk.shape[1]
        refilled = []
        for slot in slots[ended]:
            policy = owner[slot]
            if waiting[policy] < last[policy]:
                running[slot] = waiting[policy]
                waiting[policy] += 1
                refilled.append(slot)
        free = np.array(refilled, dtype=np.int64)
        if len(free):
            obs[free] = env.reset(free, seeds[running[free]])
        return slots[~ended | np.isin(slots, free)]

    # The policy acts for one group while the others step: with one, nothing overlaps.
    groups = np.array_split(slots, 2 if platform.current().overlap else 1)
    begun = deque(_begin(env, group, choose(group)) for group in groups if len(group))
    while begun:
        group, action, result = begun.popleft()
        group = record(group, action, result())
        if len(group):
            begun.append(_begin(env, group, choose(group)))
    if parts is not None:
        parts += map(dataset.of_steps, rows)
    columns = [returns, costs, lengths, seeds]
    if not np.isnan(success).all():
        columns.append(success == 1)
    return [
        Episodes(*(column[e : e + episodes] for column in columns))
        for e in range(0, total, episodes)
    ]
