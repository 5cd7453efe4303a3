"""Datasets of transitions: one module per source, one `Dataset` of arrays."""

import os
from pathlib import Path
from typing import Any

from psec_jax.data import d4rl, d4rl_sets, dataset, dmc, dsrl, minari
from psec_jax.errors import InputError
from psec_jax.types import Dataset

__all__ = ["CATALOGUES", "environment", "load", "locate", "read"]

# Sources of sets with names of their own: a module with `names(text)`, whether a text
# is meant as such a name, `find(name, offline)`, the file it stands for,
# `task_of(path)`, the name of a file's set if it has one, `load(path, clip_actions,
# required=)`, and `environment(path)`, the simulator of a file's set if that is known.
CATALOGUES = {"d4rl": d4rl_sets, "dsrl": dsrl, "minari": minari}


def locate(name: str | os.PathLike[str], offline: bool = False) -> Path:
    """The file or folder that a name stands for.

    Args:
      name: a path, or a name of one of CATALOGUES, such as "OfflineBallRun-v0",
        "halfcheetah-medium-v2" or "minari:mujoco/hopper/medium-v0"; its file is
        downloaded where none is there.
      offline: never use the network.

    Raises:
      InputError: an unknown name, or one whose file is neither there nor to be had.
    """
    for source in CATALOGUES.values():
        if source.names(str(name)):
            return source.find(str(name), offline).path
    return Path(name)


def environment(data: str | os.PathLike[str]) -> str | None:
    """The simulator of a set of CATALOGUES, given its name or its file; None for other
    data."""
    known = (source.environment(data) for source in CATALOGUES.values())
    return next(filter(None, known), None)


def read(
    name: str | os.PathLike[str],
    *,
    clip_actions: bool = False,
    with_costs: bool = False,
    offline: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Read a whole dataset and check it.

    Args:
      name: a folder of episode files or one of them (.npz), a HDF5 file in the layout
        of D4RL or DSRL, a folder of Minari, or a name of one of CATALOGUES.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      with_costs: refuse data without costs, which would be taken for zeros.
      offline: never use the network.

    Returns:
      The dataset and the file's attributes, none for episode files.

    Raises:
      InputError: the data cannot be had, read or used, or has negative costs.
    """
    path = locate(name, offline)
    required = ("cost",) if with_costs else ()
    for source in CATALOGUES.values():
        if source.task_of(path) is not None:
            ds, attrs = source.load(path, clip_actions, required=required)
            dataset.check_costs(ds, str(path))
            return ds, attrs
    if path.is_dir() or path.suffix == ".npz":
        if with_costs:
            raise InputError(f"{path}: episode files hold no costs")
        return dmc.load(path, clip_actions=clip_actions), {}
    ds, attrs = d4rl.load(path, clip_actions, required)
    for source in (d4rl_sets, dsrl):  # a set of ours under another name
        if attrs.get("task") in source.TASKS:
            ds, attrs = source.load(path, clip_actions, required=required)
    dataset.check_costs(ds, str(path))
    return ds, attrs


def load(
    path: str | os.PathLike[str],
    *,
    first: int | None = None,
    best: int | None = None,
    min_return: float | None = None,
    max_cost: float | None = None,
    return_quantile: float | None = None,
    cost_quantile: float | None = None,
    clip_actions: bool = False,
    with_costs: bool = False,
    offline: bool = False,
) -> Dataset:
    """Read a dataset, check it, and keep the trajectories asked for.

    Args:
      path: what `read` reads.
      first: keep the first N trajectories.
      best: keep the N trajectories of highest return.
      min_return: keep trajectories of at least this return.
      max_cost: keep trajectories of at most this cost.
      return_quantile: keep trajectories at or above this quantile of the returns of
        those that the cost bounds left.
      cost_quantile: keep trajectories at or below this quantile of all costs.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      with_costs: refuse data without costs, which would be taken for zeros; bounds on
        the cost do so too.
      offline: never use the network.

    Raises:
      InputError: the data cannot be read or used, or fewer trajectories than asked.
    """
    with_costs |= max_cost is not None or cost_quantile is not None
    ds, _ = read(
        path, clip_actions=clip_actions, with_costs=with_costs, offline=offline
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
