"""Datasets of transitions: one module per source, one `Dataset` of arrays."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psec_jax.data import d4rl, d4rl_sets, dataset, dmc, dsrl, minari, recording
from psec_jax.data.actions import UNITS, ActionBox, Units, scale
from psec_jax.data.dataset import ENDS
from psec_jax.data.recording import Recording, box_of_card, check_box, say
from psec_jax.data.sets import Source
from psec_jax.errors import InputError
from psec_jax.types import Dataset

__all__ = [
    "CATALOGUES",
    "ENDS",
    "UNITS",
    "ActionBox",
    "Recording",
    "box_of_card",
    "check_box",
    "environment",
    "load",
    "locate",
    "read",
]

# Sources of sets with names of their own.
CATALOGUES: dict[str, Source] = {
    "d4rl": d4rl_sets.SETS,
    "dsrl": dsrl.SETS,
    "minari": minari,
}


def locate(name: str | os.PathLike[str], offline: bool = False) -> Path:
    """The file or folder that a name stands for.

    Args:
      name: a path, which may begin with `~`, or a name of one of CATALOGUES, such as
        "OfflineBallRun-v0", "halfcheetah-medium-v2" or
        "minari:mujoco/hopper/medium-v0"; its file is downloaded where none is there.
      offline: never use the network.

    Raises:
      InputError: an unknown name, or one whose file is neither there nor to be had.
    """
    for source in CATALOGUES.values():
        if source.names(str(name)):
            return source.find(str(name), offline).path
    return Path(name).expanduser()


def environment(data: str | os.PathLike[str]) -> str | None:
    """The simulator that data were recorded in, where their name or file says it."""
    for source in CATALOGUES.values():
        if (known := source.environment(data)) is not None:
            return known
    path = Path(data).expanduser()
    if not path.is_file() or path.suffix == ".npz":
        return None
    return Recording.of(d4rl.attributes(path), str(path)).environment


def read(
    name: str | os.PathLike[str],
    *,
    actions: str = "auto",
    ends: str = "check",
    env: Recording | None = None,
    box: ActionBox | None = None,
    clip_actions: bool = False,
    with_costs: bool = False,
    with_rewards: bool = False,
    offline: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Read a whole dataset and check it.

    Args:
      name: a folder of episode files or one of them (.npz), a HDF5 file in the layout
        of D4RL or DSRL, a folder of Minari, or a name of one of CATALOGUES.
      actions: units of stored actions, a key of UNITS.
      ends: what ends a trajectory, a key of ENDS.
      env: the environment that the data are used for, from `envs.describe`.
      box: what the policy's actions in [-1, 1] stand for; by default the environment's
        box, else the one that the data were recorded with.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      with_costs: refuse data without costs, which would be read as zeros.
      with_rewards: refuse data without rewards, which would be read as zeros.
      offline: never use the network.

    Returns:
      The dataset and the file's attributes, to which those of `Recording` are added:
      the actions are scaled, `missing` lists fields that the file lacks.

    Raises:
      InputError: the data cannot be had, read or used, contradict themselves or the
        environment, or have negative costs.
    """
    path = locate(name, offline)
    required = ("cost",) * with_costs + ("reward",) * with_rewards
    source, ds, attrs = _stored(path, required)
    known = Recording.of(attrs, str(path))
    if env is not None:
        recording.check_sizes(ds, env, str(path))
    units = Units(actions, known.units, known.box, box or (env and env.box))

    notes: list[str] = []  # said once nothing is refused

    def scaled(action: np.ndarray) -> np.ndarray:
        return scale(action, units, str(path), clip_actions, notes.append)

    ds = dataset.check(ds, str(path), clip_actions, scaled)
    dataset.check_costs(ds, str(path))
    if source is not None and ends == "check":  # known sets are not refused for it
        source.verify(path, ds, attrs)
        if line := dataset.contradiction(ds, str(path)):
            notes.append(line)
    else:
        ds = dataset.check_ends(ds, str(path), ends, notes.append)
    recording.check_lengths(ds, known, str(path))
    if env is not None:
        recording.compare(ds, known, env, str(path), notes.append)
        ds = recording.arrange(ds, known, env, str(path), notes.append)
    for line in notes:
        say(line)
    now = known.now(units.target or units.recorded, env)
    return ds, dict(attrs) | now.attributes() | {"missing": known.missing}


def _stored(
    path: Path, required: Collection[str]
) -> tuple[Source | None, Dataset, Mapping[str, Any]]:
    """The source of a file, if it has one, its arrays as stored and its attributes."""
    for source in CATALOGUES.values():
        if source.task_of(path) is not None:
            return source, *source.read(path, required)
    if path.is_dir() or path.suffix == ".npz":
        if "cost" in required:
            raise InputError(f"{path}: episode files hold no costs")
        return None, dmc.load(path, clip_actions=None), {}
    ds, attrs = d4rl.read(path, required)
    for source in (d4rl_sets.SETS, dsrl.SETS):  # a set of ours under another name
        if attrs.get("task") in source.tasks:
            return source, *source.read(path, required)
    return None, ds, attrs


def load(
    path: str | os.PathLike[str],
    *,
    first: int | None = None,
    best: int | None = None,
    min_return: float | None = None,
    max_cost: float | None = None,
    return_quantile: float | None = None,
    cost_quantile: float | None = None,
    actions: str = "auto",
    ends: str = "check",
    env: Recording | None = None,
    clip_actions: bool = False,
    with_costs: bool = False,
    offline: bool = False,
) -> Dataset:
    """Read a dataset, check it, and keep some of its trajectories.

    Args:
      path: what `read` reads.
      first: keep the first N trajectories.
      best: keep the N trajectories of highest return.
      min_return: keep trajectories of at least this return.
      max_cost: keep trajectories of at most this cost.
      return_quantile: keep trajectories at or above this quantile of the returns of
        those that the cost bounds left.
      cost_quantile: keep trajectories at or below this quantile of all costs.
      actions: see `read`, as for those that follow.
      ends: what ends a trajectory.
      env: the environment that the data are used for.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      with_costs: refuse data without costs, which would be read as zeros; bounds on
        the cost do so too, and bounds on the return data without rewards.
      offline: never use the network.

    Raises:
      InputError: the data cannot be read or used, or have fewer trajectories.
    """
    ds, _ = read(
        path,
        actions=actions,
        ends=ends,
        env=env,
        clip_actions=clip_actions,
        with_costs=with_costs or max_cost is not None or cost_quantile is not None,
        with_rewards=any(v is not None for v in (best, min_return, return_quantile)),
        offline=offline,
    )
    return dataset.select(
        ds,
        first,
        best,
        min_return,
        max_cost,
        source=str(path),
        return_quantile=return_quantile,
        cost_quantile=cost_quantile,
    )
