"""Datasets of transitions: one module per source, one `Dataset` of arrays."""

import os
from pathlib import Path

from psec_jax.data import d4rl, dataset, dmc
from psec_jax.types import Dataset

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    first: int | None = None,
    best: int | None = None,
    min_return: float | None = None,
    max_cost: float | None = None,
    clip_actions: bool = False,
) -> Dataset:
    """Read a dataset, check it, and keep the trajectories asked for.

    Args:
      path: a folder of episode files or one of them (.npz), else a D4RL-layout HDF5.
      first: keep the first N trajectories.
      best: keep the N trajectories of highest return.
      min_return: keep trajectories of at least this return.
      max_cost: keep trajectories of at most this cost.
      clip_actions: clip actions into [-1, 1] instead of refusing them.

    Raises:
      InputError: the data cannot be read or used, or fewer trajectories than asked.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".npz":
        ds = dmc.load(path, clip_actions=clip_actions)
    else:
        ds, _ = d4rl.load(path, clip_actions)
    return dataset.select(ds, first, best, min_return, max_cost, source=str(path))
