"""Episodes of a policy in a simulator, kept as one HDF5 file: collection of data.

The same arguments give the same content whatever the number of processes: an episode
depends on the seed and its own number only. Use different seeds for different tasks, or
their initial poses coincide.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax import envs
from psec_jax.data import d4rl, dataset
from psec_jax.data.paths import data_dir
from psec_jax.envs.experts import (
    PRESETS,
    SAMPLED,
    Policy,
    expert_path,
    find_card,
    label,
    make_policy,
    preset_or_file,
    with_noise,
)
from psec_jax.envs.workers import Worker, default_workers
from psec_jax.errors import InputError
from psec_jax.runtime.console import Progress
from psec_jax.types import Dataset

PACKAGES = (
    "numpy",
    "mujoco",
    "dm_control",
    "gymnasium",
    "bullet-safety-gym",
    "pybullet",
    "metadrive-simulator",
    "metaworld",
    "ogbench",
    "mujoco-mjx",
)


class Actor(NamedTuple):
    """Who plays an episode.

    Attributes:
      policy: "expert", "medium", "random" or the path of an expert file, see
        `make_policy`.
      action_noise: standard deviation of Gaussian noise on every action.
      then: who takes over at a random step, where not empty.
      within: the share of the longest episode in which that step falls.
    """

    policy: str
    action_noise: float = 0.0
    then: str = ""
    within: float = 1.0


class Played(NamedTuple):
    """One whole episode.

    Attributes:
      dataset: its transitions.
      success: 1 where the task's goal was reached in any step, 0 where not, nan where
        the environment does not say.
    """

    dataset: Dataset
    success: float


def collect(
    env: str,
    policy: str,
    episodes: int,
    seed: int,
    action_noise: float = 0.0,
    workers: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Collect `episodes` whole episodes into one file.

    A file that is already there with the same environment, policy, seed, noise and
    number of episodes is kept as it is.

    Args:
      env: "dm_control:walker-walk", "gymnasium:ID"; it may be shifted.
      policy: "expert", "medium", "random", "scripted" where the simulator has experts
        of its own (metaworld, ogbench), or the path of an expert file; after "sampled:"
        an expert's actions are samples of its own distribution.
      episodes: whole episodes to collect.
      seed: of initial states and noise, with the episode's number.
      action_noise: standard deviation of Gaussian noise on every action.
      workers: processes; default one for every core.
      out: file to write; default a name made of the arguments, in $PSEC_DATA_DIR.
      overwrite: collect again, and replace the file.

    Returns:
      The file's path.

    Raises:
      InputError: bad arguments, or the file holds another collection.
    """
    env = envs.shifted(env)
    check_numbers(seed, workers, episodes=episodes)
    identity = {
        "environment": env,
        "policy": label(policy),
        "policy_sha256": policy_hash(policy, env),
        "episodes": episodes,
        "seed": seed,
        "action_noise": float(action_noise),
    }
    path = Path(out) if out else data_dir() / default_name(identity)
    if path.is_dir():
        raise InputError(f"out is {path}, a folder; expected a file name")
    if path.exists() and not overwrite:
        check_same(path, d4rl.load(path)[1], identity, "give another file")
        return path
    if envs.make_on_device(env) is None:
        played = play(env, [Actor(policy, action_noise)] * episodes, seed, workers)
    else:
        simulated = simulate(env, policy, action_noise, episodes, seed)
        played = [Played(ds, np.nan) for ds in simulated]
    ds = dataset.check(dataset.concatenate([p.dataset for p in played]), str(path))
    attrs = identity | envs.describe(env).attributes()
    attrs |= {
        "versions": json.dumps(simulator_versions(), sort_keys=True),
        "returns": dataset.episode_returns(ds),
        "costs": dataset.episode_costs(ds),
    }
    success = np.array([p.success for p in played])
    if not np.isnan(success).all():
        attrs["success"] = success == 1
    return d4rl.save(path, ds, attrs)


def default_name(identity: dict[str, Any]) -> str:
    """The file name of a collection, such as dm_control_walker-walk_expert_10_seed0."""
    policy = identity["policy"]
    if policy.endswith(".npz"):
        policy = f"{Path(policy).stem}-{identity['policy_sha256'][:8]}"
    noise = identity["action_noise"]
    name = (
        f"{identity['environment']}_{policy}_{identity['episodes']}"
        f"_seed{identity['seed']}{f'_noise{noise:g}' if noise else ''}.hdf5"
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def check_numbers(seed: int, workers: int | None, **counts: int) -> None:
    """Refuse a seed below 0, and workers or another count below 1.

    Raises:
      InputError: the number is named.
    """
    counts |= {"workers": 1 if workers is None else workers}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}, expected 1 or more")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")


def policy_hash(policy: str, env: str) -> str:
    """SHA-256 of the policy's file; empty where there is none, or where a worker
    refuses it."""
    policy = policy.removeprefix(SAMPLED)
    if policy.endswith(".npz"):
        path = Path(policy)
    elif policy in PRESETS and find_card(env):
        path = expert_path(env)
    else:
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def check_same(
    path: Path, attrs: Mapping[str, Any], identity: Mapping[str, Any], advice: str
) -> None:
    """Refuse a file whose attributes say that it is not the collection asked for.

    Raises:
      InputError: what differs, and the advice.
    """
    differing = [
        f"{name} {attrs.get(name)!r} (asked for {value!r})"
        for name, value in identity.items()
        if attrs.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{path}: holds another collection, with {', '.join(differing)}; {advice}, "
            "or ask to overwrite it"
        )


def simulator_versions() -> dict[str, str]:
    """Of Python and the packages that decide what an episode is."""
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    used = [p for p in PACKAGES if p in installed]
    return {"python": platform.python_version()} | {p: installed[p] for p in used}


def play(
    env: str,
    actors: Sequence[Actor],
    seed: int,
    workers: int | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Played]:
    """Roll out one episode of every actor, in worker processes.

    Args:
      env: see `psec_jax.envs.make`.
      actors: who plays each episode; its number and the seed set everything else.
      seed: of initial states and noise.
      workers: processes; by default one for every core.
      numbers: of the episodes; by default 0, 1, ...

    Raises:
      InputError: an environment or a policy that cannot be made.
    """
    count = min(workers or default_workers(len(actors)), len(actors))
    numbers = range(len(actors)) if numbers is None else numbers
    pool, progress = [], Progress("episode", len(actors))
    try:
        for i in range(count):
            share = [(numbers[e], *actors[e]) for e in range(i, len(actors), count)]
            name = f"collection worker {i + 1} of {count}"
            target = "psec_jax.workflows.collection:serve"
            pool.append(Worker(target, env, seed, share, name=name))
        played = []
        for e in range(len(actors)):
            played.append(pool[e % count].recv())
            progress(len(played))
        return played
    finally:
        progress.end()
        for worker in pool:
            worker.close()


def simulate(
    env: str, policy: str, action_noise: float, episodes: int, seed: int
) -> list[Dataset]:
    """`play` of one actor on the device; noise and first states are the same.

    Args:
      env: one of those that simulate there, see `psec_jax.envs.make_on_device`.
      policy: "expert", "medium", "random" or the path of an expert file.
      action_noise: standard deviation of Gaussian noise on every action.
      episodes: whole episodes.
      seed: of initial states and noise.

    Raises:
      InputError: a policy that cannot be made.
    """
    made = envs.make_on_device(env)
    shape = made.max_steps, made.action_dim
    expert = preset_or_file(policy, env, made.obs_dim, shape[1], action_noise)

    def act(noise: Any, obs: Any) -> Any:
        return noise if expert is None else expert(obs, noise)

    parts = []
    for numbers in envs.batches_on_device(episodes):
        seeds, generators = zip(*(streams(seed, int(e)) for e in numbers), strict=True)
        drawn = [
            g.uniform(-1, 1, shape) if expert is None else g.standard_normal(shape)
            for g in generators
        ]
        noise = np.stack(drawn, axis=1).astype(np.float32)
        played = made.roll_out(act, noise, seeds, keep=True).datasets()
        parts += played[: episodes - len(parts)]
    return parts


def serve(
    pipe: Connection,
    spec: str,
    seed: int,
    share: list[tuple[int, str, float, str, float]],
) -> None:
    """A worker's job: roll these (episode, actor) out, one message each."""
    env = envs.make(spec)
    policies = {}

    def find(policy: str, noise: float) -> Policy:
        if (policy, noise) not in policies:
            policies[policy, noise] = _make(env, policy, noise)
        return policies[policy, noise]

    for episode, policy, noise, then, within in share:
        actor = Actor(policy, noise, then, within)
        act = find(actor.policy, actor.action_noise)
        if actor.then:
            then = find(actor.then, actor.action_noise)
            act = _handover(act, then, int(env.max_steps * actor.within))
        pipe.send(rollout(env, act, seed, episode))
    env.close()


def _make(env: envs.Env, policy: str, noise: float) -> Policy:
    """One of the simulator's own drivers, or a file's policy."""
    drivers = getattr(env, "drivers", {})
    if policy in drivers:
        return with_noise(drivers[policy], noise, env.action_dim)
    return make_policy(policy, env.spec, env.obs_dim, env.action_dim, noise)


def _handover(first: Policy, second: Policy, steps: int) -> Policy:
    """For one episode: the second policy acts from a step that the generator draws, 1
    to `steps`."""
    left: int | None = None

    def act(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        nonlocal left
        if left is None:
            left = int(generator.integers(1, steps + 1))
        left -= 1
        return (first if left >= 0 else second)(obs, generator)

    return act


def streams(seed: int, episode: int) -> tuple[int, np.random.Generator]:
    """The seed of an episode's reset, and its noise."""
    env_seed, noise_seed = np.random.SeedSequence((seed, episode)).spawn(2)
    return int(env_seed.generate_state(1)[0]), np.random.default_rng(noise_seed)


def rollout(env: envs.Env, act: Any, seed: int, episode: int) -> Played:
    """One whole episode; it depends on (seed, episode) alone."""
    env_seed, generator = streams(seed, episode)
    obs = env.reset(env_seed)
    rows: list[tuple] = []
    success, ended = np.nan, False
    while not ended:
        action = act(obs, generator)
        step = env.step(action)
        row = (obs, action, step.reward, step.cost, step.obs)
        rows.append((*row, step.terminal, step.timeout))
        obs = step.obs
        success = np.fmax(success, step.success)
        ended = step.terminal or step.timeout
    return Played(dataset.of_steps(rows), float(success))
