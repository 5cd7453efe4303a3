"""Datasets of Minari (Farama Foundation), by name or by folder.

Minari's own sets of MuJoCo robots are new data from Gymnasium's v5 simulators: they are
not D4RL v2 and have no reference scores.

Metadata and episodes are read here and not by Minari's package, which makes the
environment that the metadata name, and so runs its code, where they lack a space.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from psec_jax import files
from psec_jax.data import dataset, hdf5, keywords, spaces
from psec_jax.data.actions import ActionBox, Units, scale
from psec_jax.data.recording import Recording, say
from psec_jax.data.sets import Found
from psec_jax.errors import InputError
from psec_jax.types import Dataset

PREFIX = "minari:"
VERSIONS = re.compile(r"0\.[45]\.[0-9]+")
MAX_SIZE = 2**20  # numbers of an observation or an action
# What Minari raises for a dataset that it cannot read or write.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def names(text: str) -> bool:
    """Whether a text is meant as the name of a Minari dataset, "minari:ID"."""
    return text.startswith(PREFIX)


def task_of(path: str | os.PathLike[str]) -> str | None:
    """The name of the Minari dataset in a folder; None for anything else.

    Raises:
      InputError: its metadata are damaged.
    """
    if not _metadata(path).is_file():
        return None
    named = _field(Path(path), files.read_json(_metadata(path)), "dataset_id", str)
    return f"{PREFIX}{_checked_id(named)}"


def environment(data: str | os.PathLike[str]) -> str | None:
    """The simulator of the dataset in a folder, where its metadata name it."""
    return _recording(Path(data)).environment if _metadata(data).is_file() else None


def _recording(folder: Path) -> Recording:
    """What the metadata of a dataset know of its simulator, which is not made.

    Keyword arguments and a time limit are part of the simulator's name where they are
    not those of the registered environment.
    """
    text = files.read_json(_metadata(folder)).get("env_spec")
    if not text:
        return Recording()
    if not isinstance(text, str):
        raise InputError(f"{_metadata(folder)}: not of a Minari dataset (env_spec)")
    spec = files.parse_json(text, f"{_metadata(folder)}: env_spec", finite=False)
    name: Any = spec.get("id")
    options: Any = spec.get("kwargs") or {}
    limit: Any = spec.get("max_episode_steps")
    entry: Any = spec.get("entry_point")
    for what, right in (
        ("id", isinstance(name, str) and re.fullmatch(r"[\w./:-]{1,200}", name)),
        ("kwargs", isinstance(options, dict) and all(map(str.isidentifier, options))),
        ("max_episode_steps", limit is None or (type(limit) is int and limit > 0)),
        ("entry_point", entry is None or isinstance(entry, str)),
    ):
        if not right:
            raise InputError(
                f"{_metadata(folder)}: not of a Minari dataset (env_spec has no usable "
                f"{what})"
            )
    options = {key: value for key, value in options.items() if key != "render_mode"}
    registered = None if ":" in name else _registered(name)
    if registered is not None:
        same = registered.kwargs.items()
        options = {k: v for k, v in options.items() if (k, v) not in same}
        if limit not in (None, registered.max_episode_steps):
            options["max_episode_steps"] = limit
    elif entry and ":" not in name:
        name = f"{entry.partition(':')[0]}:{name}"
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
    _package()
    if name.startswith(f"{PREFIX}mujoco/"):
        say(
            f"{name}: Minari's mujoco sets are not D4RL v2: new data from Gymnasium's "
            "v5 simulators, without reference scores"
        )
    metadata = files.read_json(_metadata(folder))
    version = _field(folder, metadata, "minari_version", str)
    storage = metadata.get("data_format", "hdf5")
    if not VERSIONS.fullmatch(version) or storage != "hdf5":
        raise InputError(
            f"{folder}: not a readable Minari dataset (of version {version!r:.40} in "
            f"{storage!r:.40}, expected 0.4 or 0.5 in hdf5)"
        )
    observation, action = (
        _space(folder, _field(folder, metadata, name, str), name)
        for name in ("observation_space", "action_space")
    )
    _check_spaces(folder, observation, action)
    count = _field(folder, metadata, "total_episodes", int)
    if count < 1:
        raise InputError(f"{folder}: holds no episodes")
    with hdf5.opened(folder / "data" / "main_data.hdf5") as file:
        if "cost" in required and not file.has("episode_0/infos/cost"):
            raise InputError(f"{folder}: holds no costs (infos/cost)")
        parts = [
            _dataset(_episode(file, i, observation, action), folder, observation)
            for i in range(count)
        ]
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
    except InputError:
        raise
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


def _field(folder: Path, metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of the metadata.

    Raises:
      InputError: it is missing or of another type.
    """
    if type(metadata.get(name)) is not kind:
        raise InputError(
            f"{folder}: not a readable Minari dataset ({name} in its metadata is "
            f"{metadata.get(name, 'missing')!r:.40})"
        )
    return metadata[name]


def _space(folder: Path, text: str, name: str) -> Any:
    """The space that a text of the metadata describes."""
    source = f"{folder}: {name}"
    with _reported(f"{source} is not one of Minari's"):
        return _parsed_space(files.parse_json(text, source, finite=False))


def _parsed_space(fields: Mapping[str, Any]) -> Any:
    """A Box, a Discrete, or a Dict or Tuple of spaces.

    Raises:
      KeyError, TypeError, ValueError: something else, or a Box of too many numbers.
    """
    from gymnasium import spaces as gym

    kind = fields["type"]
    if kind == "Dict":
        parts = fields["subspaces"].items()
        return gym.Dict({str(key): _parsed_space(part) for key, part in parts})
    if kind == "Tuple":
        return gym.Tuple([_parsed_space(part) for part in fields["subspaces"]])
    if kind == "Discrete":
        n, start = fields["n"], fields.get("start", 0)
        if type(n) is not int or type(start) is not int or not 0 < n <= MAX_SIZE:
            raise ValueError(f"a Discrete of {n!r:.40}")
        return gym.Discrete(n, start=start)
    if kind != "Box":
        raise ValueError(f"a space of type {kind!r:.40}, expected Box or Dict")
    shape, dtype = tuple(fields["shape"]), np.dtype(str(fields["dtype"]))
    whole = all(type(size) is int and size >= 0 for size in shape)
    if not whole or math.prod(shape) > MAX_SIZE or dtype.kind not in "iuf":
        raise ValueError(f"a Box of shape {shape!r:.40} and type {dtype}")
    low, high = (np.array(fields[bound], dtype) for bound in ("low", "high"))
    if low.shape != shape or high.shape != shape or not (low <= high).all():
        raise ValueError(f"a Box of shape {shape} with bounds of other shapes")
    return gym.Box(low, high, shape, dtype.type)


class _Episode(NamedTuple):
    """One episode of n steps as stored; observations in the form of their space."""

    id: int
    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    cost: np.ndarray | None


def _episode(file: hdf5.Reader, index: int, observation: Any, action: Any) -> _Episode:
    group = f"episode_{index}"
    cost = f"{group}/infos/cost"
    return _Episode(
        index,
        _values(file, f"{group}/observations", observation),
        _values(file, f"{group}/actions", action),
        file.read(f"{group}/rewards"),
        file.read(f"{group}/terminations"),
        file.read(f"{group}/truncations"),
        file.read(cost) if file.has(cost) else None,
    )


def _values(file: hdf5.Reader, name: str, space: Any) -> Any:
    from gymnasium import spaces as gym

    if isinstance(space, gym.Dict):
        parts = space.spaces.items()
        return {key: _values(file, f"{name}/{key}", part) for key, part in parts}
    if isinstance(space, gym.Tuple):
        parts = enumerate(space.spaces)
        return tuple(_values(file, f"{name}/_index_{i}", part) for i, part in parts)
    return file.read(name)


def _dataset(episode: _Episode, folder: Path, observation_space: Any) -> Dataset:
    """One episode, whose observations are one more than its steps."""
    n, action = episode.rewards.size, episode.actions
    for name in ("rewards", "terminations", "truncations"):
        if (shape := getattr(episode, name).shape) != (n,):
            raise InputError(
                f"{folder}: episode {episode.id} has {name} of shape {shape} and "
                f"rewards of shape {episode.rewards.shape}, expected T of each"
            )
    with _reported(
        f"{folder}: observations of episode {episode.id} are not {observation_space}"
    ):
        obs = spaces.flatten_rows(observation_space, episode.observations)
    if n == 0 or len(obs) != n + 1 or action.shape[:1] != (n,):
        raise InputError(
            f"{folder}: episode {episode.id} has {obs.shape[:1]} observations, "
            f"{action.shape[:1]} actions and {n} rewards, expected T + 1, T and T"
        )
    cost = np.zeros(n) if episode.cost is None else episode.cost
    if cost.shape not in ((n,), (n + 1,)):
        raise InputError(
            f"{folder}: episode {episode.id} has costs of shape {cost.shape}, expected "
            f"{n} or {n + 1}"
        )
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
