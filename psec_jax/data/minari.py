"""Datasets of Minari (Farama Foundation), by name or by folder.

Minari's own sets of MuJoCo robots are new data from Gymnasium's v5 simulators: they are
not D4RL v2 and have no reference scores.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from psec_jax import files
from psec_jax.data import dataset, keywords, spaces
from psec_jax.data.actions import ActionBox, Units, scale
from psec_jax.data.recording import Recording, say
from psec_jax.data.sets import Found
from psec_jax.errors import InputError
from psec_jax.types import Dataset

PREFIX = "minari:"
# What Minari raises for a dataset that it cannot read or write.
FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError)


def names(text: str) -> bool:
    """Whether a text is meant as the name of a Minari dataset, "minari:ID"."""
    return text.startswith(PREFIX)


def task_of(path: str | os.PathLike[str]) -> str | None:
    """The name of the Minari dataset in a folder; None for anything else."""
    if not _metadata(path).is_file():
        return None
    named = files.read_json(_metadata(path)).get("dataset_id", Path(path).name)
    return f"{PREFIX}{named}"


def environment(data: str | os.PathLike[str]) -> str | None:
    """The simulator of the dataset in a folder, where its metadata name it."""
    return _recording(Path(data)).environment if _metadata(data).is_file() else None


def _recording(folder: Path) -> Recording:
    """What the metadata of a dataset know of its simulator.

    Keyword arguments and a time limit are part of the simulator's name where they are
    not those of the registered environment.
    """
    with _reported(f"{_metadata(folder)}: not of a Minari dataset"):
        text = files.read_json(_metadata(folder)).get("env_spec")
        if not text:
            return Recording()
        spec = json.loads(text)
        name, options = spec["id"], dict(spec.get("kwargs") or {})
        limit = spec.get("max_episode_steps")
        options.pop("render_mode", None)
        registered = _registered(name)
        if registered is not None:
            same = registered.kwargs.items()
            options = {k: v for k, v in options.items() if (k, v) not in same}
            if limit not in (None, registered.max_episode_steps):
                options["max_episode_steps"] = limit
        elif isinstance(spec.get("entry_point"), str):
            name = f"{spec['entry_point'].partition(':')[0]}:{name}"
        named = keywords.join(f"gymnasium:{name}", options)
        return Recording(named, max_steps=limit)


def _registered(name: str) -> Any:
    """Gymnasium's entry of an environment; None where it has none."""
    _package()
    import gymnasium

    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error:
        return None


def _metadata(path: str | os.PathLike[str]) -> Path:
    return Path(path) / "data" / "metadata.json"


def find(name: str, offline: bool = False) -> Found:
    """The folder of a dataset, downloaded by Minari if it is not there.

    Args:
      name: "minari:ID", such as minari:mujoco/halfcheetah/medium-v0.
      offline: never use the network.

    Raises:
      InputError: a malformed name, no such dataset, half of one, or Minari or what it
        downloads with is not installed.
    """
    dataset_id = _checked_id(name)
    folder = _folder(dataset_id)
    if not folder.exists():
        if offline:
            raise InputError(f"{name}: not in {folder}, and offline")
        _download(dataset_id)
    if task_of(folder) is None:
        raise InputError(
            f"{name}: {folder} holds no data/metadata.json: half a dataset? Remove it"
        )
    return Found(folder, "official")


def read(path: Path, required: Collection[str] = ()) -> tuple[Dataset, dict[str, Any]]:
    """The arrays of one dataset as stored, and what is known of them.

    Actions have to be a bounded box, and stay in its units. Observations are flattened
    as `gymnasium.spaces.flatten` does it, the parts of a Dict in the order of its
    space, which the attribute `observation_order` lists. Costs are those of
    `infos["cost"]`. The end of an episode that is not a true one is a timeout.

    Args:
      path: the folder of a dataset.
      required: "cost" refuses a dataset without costs.

    Raises:
      InputError: other spaces, an end inside an episode, or a folder that Minari cannot
        read.
    """
    folder = Path(path)
    name = task_of(folder)
    if name is None:
        raise InputError(f"{folder}: no data/metadata.json, as Minari's datasets have")
    package = _package()
    if name.startswith(f"{PREFIX}mujoco/"):
        say(
            f"{name}: Minari's mujoco sets are not D4RL v2: new data from Gymnasium's "
            "v5 simulators, without reference scores"
        )
    with _reported(f"{folder}: not a readable Minari dataset"):
        opened = package.MinariDataset(folder / "data")
        observation, action = opened.observation_space, opened.action_space
        version = opened.spec.minari_version
        episodes = list(opened.iterate_episodes())
    _check_spaces(folder, observation, action)
    if not episodes:
        raise InputError(f"{folder}: holds no episodes")
    if "cost" in required and "cost" not in (episodes[0].infos or {}):
        raise InputError(f"{folder}: holds no costs (infos/cost)")
    parts = [_dataset(e, folder, observation) for e in episodes]
    known = dataclasses.replace(
        _recording(folder),
        units="env",
        box=ActionBox.of(action.low, action.high),
        observation=spaces.order(observation),
    )
    attrs = {"dataset_id": name.removeprefix(PREFIX), "minari_version": version}
    return dataset.concatenate(parts), attrs | known.attributes()


def verify(path: Path, ds: Dataset, attrs: Mapping[str, Any]) -> None:
    """Nothing: a dataset says itself what it is."""


def load(
    source: str | os.PathLike[str],
    clip_actions: bool = False,
    offline: bool = False,
    required: Collection[str] = (),
) -> tuple[Dataset, dict[str, Any]]:
    """The checked dataset of "minari:ID" or of a folder, and what is known of it.

    Actions are scaled from the box of the dataset to [-1, 1].

    Args:
      source: "minari:ID", or the folder of a dataset.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      offline: never use the network.
      required: "cost" refuses a dataset without costs.

    Raises:
      InputError: what `find`, `read` and `dataset.check` refuse.
    """
    folder = find(str(source), offline).path if names(str(source)) else Path(source)
    ds, attrs = read(folder, required)
    units = Units(stored="env", recorded=Recording.of(attrs).box)

    def scaled(action: np.ndarray) -> np.ndarray:
        return scale(action, units, str(folder), clip_actions)

    return dataset.check(ds, str(folder), clip_actions, scaled), attrs


def save(dataset_id: str, ds: Dataset, env: str | None = None) -> Path:
    """Write a local Minari dataset, whole or not at all.

    Args:
      dataset_id: such as "mine/walker-v0".
      ds: whole trajectories; costs that are not all zero go to `infos["cost"]`.
      env: a Gymnasium ID, recorded with the data, whose actions are in [-1, 1].

    Returns:
      The dataset's folder.

    Raises:
      InputError: a malformed id, one that is there already, an observation that is not
        its predecessor's next one, an unknown environment, or files that cannot be
        written.
    """
    name = f"{PREFIX}{_checked_id(PREFIX + dataset_id)}"
    folder = _folder(dataset_id)
    if folder.exists():
        raise InputError(f"{name}: is there already, in {folder}; give another name")
    inside = ~(ds.terminal | ds.timeout)[:-1]
    broken = np.flatnonzero(inside & (ds.next_obs[:-1] != ds.obs[1:]).any(1))
    if len(broken):
        raise InputError(
            f"{name}: row {broken[0]} leads to another observation than the next row "
            "has: Minari holds whole trajectories only"
        )
    import gymnasium
    from minari import data_collector
    from minari.dataset.minari_storage import MinariStorage

    make_buffer: Any = data_collector.EpisodeBuffer
    observation, action = (
        gymnasium.spaces.Box(low, -low, (size,), np.float32)
        for low, size in ((-np.inf, ds.obs.shape[1]), (-1.0, ds.action.shape[1]))
    )
    spec = None
    if env is not None:
        try:
            spec = gymnasium.spec(env)
        except gymnasium.error.Error as error:
            raise InputError(f"environment {env!r}: {error}") from error
    buffers = [
        make_buffer(
            observations=np.concatenate([ds.obs[rows], ds.next_obs[rows][-1:]]),
            actions=ds.action[rows],
            rewards=ds.reward[rows],
            terminations=ds.terminal[rows],
            truncations=ds.timeout[rows],
            infos={"cost": np.concatenate([[0], ds.cost[rows]])}
            if ds.cost.any()
            else None,
        )
        for rows in dataset.episode_slices(ds)
    ]
    temporary = files.beside(folder, "tmp")
    try:
        with _reported(f"{name}: cannot be written"):
            (temporary / "data").mkdir(parents=True)
            storage = MinariStorage.new(temporary / "data", observation, action, spec)
            storage.update_metadata(
                {"dataset_id": dataset_id, "minari_version": _package().__version__}
            )
            storage.update_episodes(buffers)
            files.replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _download(dataset_id: str) -> None:
    """Let Minari fetch a dataset, in a process of its own: what it downloads with
    prints what it likes and raises errors of many packages."""
    say(f"downloading {PREFIX}{dataset_id}")
    code = "import sys, minari; minari.download_dataset(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, dataset_id], capture_output=True, text=True
    )
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1:] or [f"code {run.returncode}"]
        raise InputError(f"{PREFIX}{dataset_id} cannot be downloaded ({reason[0]})")


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what Minari raises in the body into one line."""
    try:
        yield
    except FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({reason})") from error


def _package() -> ModuleType:
    try:
        import minari
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'psec_jax[minari]'"
        ) from error
    return minari


def _checked_id(name: str) -> str:
    dataset_id = name.removeprefix(PREFIX)
    if re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id) is None:
        raise InputError(
            f"{name}: expected {PREFIX}(NAMESPACE/)NAME-vNUMBER, such as "
            f"{PREFIX}mujoco/halfcheetah/medium-v0"
        )
    return dataset_id


def _folder(dataset_id: str) -> Path:
    """Where Minari keeps a dataset: under `$MINARI_DATASETS_PATH` or ~/.minari."""
    _package()
    from minari.storage import get_dataset_path

    with _reported(f"{PREFIX}{dataset_id}: no folder for it"):
        return get_dataset_path(dataset_id)


def _check_spaces(folder: Path, observation: Any, action: Any) -> None:
    from gymnasium.spaces import Box

    if not isinstance(action, Box) or not action.is_bounded():
        raise InputError(f"{folder}: actions are {action}, expected a bounded Box")
    if not observation.is_np_flattenable:
        raise InputError(
            f"{folder}: observations are {observation}, expected a space that flattens "
            "into one vector"
        )


def _dataset(episode: Any, folder: Path, observation_space: Any) -> Dataset:
    """One episode, whose observations are one more than its steps."""
    n = len(episode.rewards)
    action = np.asarray(episode.actions)
    with _reported(
        f"{folder}: observations of episode {episode.id} are not {observation_space}"
    ):
        obs = spaces.flatten_rows(observation_space, episode.observations)
    if n == 0 or len(obs) != n + 1 or action.shape[:1] != (n,):
        raise InputError(
            f"{folder}: episode {episode.id} has {obs.shape[:1]} observations, "
            f"{action.shape[:1]} actions and {n} rewards, expected T + 1, T and T"
        )
    cost = np.asarray((episode.infos or {}).get("cost", np.zeros(n)), np.float32)
    last = np.arange(n) == n - 1
    ended = np.asarray(episode.terminations, bool)
    for what, flags in (
        ("a true end", ended),
        ("a cut", np.asarray(episode.truncations, bool)),
    ):
        early = np.flatnonzero(flags & ~last)
        if len(early):
            raise InputError(
                f"{folder}: episode {episode.id} has {what} in row {early[0]}, but "
                f"{n - 1 - early[0]} rows follow it"
            )
    return Dataset(
        obs=obs[:-1],
        action=action.reshape(n, -1),
        reward=episode.rewards,
        cost=cost[-n:],  # Minari's infos may begin with the reset's
        next_obs=obs[1:],
        terminal=ended & last,
        timeout=last & ~ended,
    )
