"""Whole-dataset checks, trajectories and their selection."""

import hashlib
from collections.abc import Sequence

import numpy as np

from psec_jax.errors import InputError
from psec_jax.types import Dataset

ACTION_SLACK = 1e-5  # float32 rounding of a tanh or of a rescaled action box


def episode_slices(ds: Dataset) -> list[slice]:
    """The rows of each of the E trajectories, in order.

    A trajectory ends where `terminal` or `timeout` is set.
    """
    ends = np.flatnonzero(ds.terminal | ds.timeout) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return [slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def _episode_sums(ds: Dataset, values: np.ndarray) -> np.ndarray:
    return np.array(
        [np.sum(values[rows], dtype=np.float64) for rows in episode_slices(ds)]
    )


def episode_returns(ds: Dataset) -> np.ndarray:
    """Undiscounted return of each trajectory, [E] float64."""
    return _episode_sums(ds, ds.reward)


def episode_costs(ds: Dataset) -> np.ndarray:
    """Undiscounted cost of each trajectory, [E] float64."""
    return _episode_sums(ds, ds.cost)


def check(ds: Dataset, source: str, clip_actions: bool = False) -> Dataset:
    """Refuse data no stage can learn from; give it back in its final types.

    Args:
      ds: arrays of any real type; see `Dataset` for their shapes.
      source: the file or folder, named in every message.
      clip_actions: clip actions into [-1, 1] instead of refusing them.

    Returns:
      The same rows as float32 and bool; the last row ends a trajectory (it is marked
      `timeout` where the source was cut in the middle of one).

    Raises:
      InputError: no rows, lengths or shapes that disagree, NaN or infinity, or
        actions outside [-1, 1] (their number is told).
    """
    _check_shapes(ds, source)
    floats = {}
    for name in ("obs", "action", "reward", "cost", "next_obs"):
        array = np.asarray(getattr(ds, name))
        if array.dtype.kind not in "biuf":
            raise InputError(
                f"{source}: {name} has type {array.dtype}, expected numbers"
            )
        with np.errstate(over="ignore"):  # told below, as infinity
            array = array.astype(np.float32)
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise InputError(
                f"{source}: {name} holds {bad} NaN or infinite of {array.size} "
                "values, expected finite numbers"
            )
        floats[name] = array
    floats["action"] = _check_actions(floats["action"], source, clip_actions)
    terminal = np.asarray(ds.terminal, dtype=bool)
    timeout = np.asarray(ds.timeout, dtype=bool) & ~terminal
    if not terminal[-1]:
        timeout[-1] = True
    return Dataset(**floats, terminal=terminal, timeout=timeout)


def _check_shapes(ds: Dataset, source: str) -> None:
    if np.ndim(ds.obs) != 2 or np.ndim(ds.action) != 2:
        raise InputError(
            f"{source}: obs {np.shape(ds.obs)} and action {np.shape(ds.action)}, "
            "expected [N, S] and [N, A]"
        )
    n = len(ds.obs)
    if n == 0:
        raise InputError(f"{source}: holds no transitions")
    if 0 in (ds.obs.shape[1], ds.action.shape[1]):
        raise InputError(
            f"{source}: obs {ds.obs.shape} and action {ds.action.shape}, expected one "
            "number or more in each"
        )
    expected = {
        "action": (n, ds.action.shape[1]),
        "reward": (n,),
        "cost": (n,),
        "next_obs": (n, ds.obs.shape[1]),
        "terminal": (n,),
        "timeout": (n,),
    }
    for name, shape in expected.items():
        got = np.shape(getattr(ds, name))
        if got != shape:
            raise InputError(
                f"{source}: {name} has shape {got}, expected {shape} as obs is "
                f"{np.shape(ds.obs)}"
            )


def _check_actions(action: np.ndarray, source: str, clip: bool) -> np.ndarray:
    outside = np.count_nonzero(np.abs(action) > 1 + ACTION_SLACK)
    if outside and not clip:
        raise InputError(
            f"{source}: {outside} of {action.size} action values lie outside [-1, 1] "
            f"(largest magnitude {np.abs(action).max():.4g}); rescale them, or ask "
            "for clipping"
        )
    return np.clip(action, -1.0, 1.0)


def select(
    ds: Dataset,
    first: int | None = None,
    best: int | None = None,
    min_return: float | None = None,
    max_cost: float | None = None,
    source: str = "the dataset",
) -> Dataset:
    """Whole trajectories of a dataset, in their original order.

    The bounds `min_return` and `max_cost` apply first, then `first` (the first N that
    are left) or `best` (the N of highest return; ties go to the earlier one).

    Raises:
      InputError: fewer trajectories than asked are left, or none, or both `first`
        and `best` are given.
    """
    if first is not None and best is not None:
        raise InputError(
            f"first={first} and best={best} trajectories asked for together, "
            "expected one of the two"
        )
    slices = episode_slices(ds)
    returns, costs = episode_returns(ds), episode_costs(ds)
    keep = np.ones(len(slices), dtype=bool)
    if min_return is not None:
        keep &= returns >= min_return
    if max_cost is not None:
        keep &= costs <= max_cost
    chosen = np.flatnonzero(keep)
    bounds = [
        f"{name} {value:g}"
        for name, value in (("return >=", min_return), ("cost <=", max_cost))
        if value is not None
    ]
    having = f" with {' and '.join(bounds)}" if bounds else ""
    asked = first if first is not None else best
    if asked is not None:
        if asked < 1:
            raise InputError(f"asked for {asked} trajectories, expected 1 or more")
        if asked > len(chosen):
            raise InputError(
                f"asked for {asked} trajectories, {source} has {len(chosen)}{having}"
            )
    if len(chosen) == 0:
        raise InputError(f"{source}: no trajectory{having} among {len(slices)}")
    if first is not None:
        chosen = chosen[:first]
    if best is not None:
        ranked = chosen[np.argsort(-returns[chosen], kind="stable")]
        chosen = np.sort(ranked[:best])
    if len(chosen) == len(slices):
        return ds
    rows = np.concatenate([np.arange(slices[i].start, slices[i].stop) for i in chosen])
    return Dataset(*(array[rows] for array in ds))


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """The rows of several datasets, one after the other.

    Raises:
      InputError: no dataset, or observation or action sizes that differ.
    """
    if not datasets:
        raise InputError("no dataset to concatenate")
    sizes = {(d.obs.shape[1], d.action.shape[1]) for d in datasets}
    if len(sizes) > 1:
        raise InputError(
            f"datasets of different (observation, action) sizes {sorted(sizes)} "
            "cannot be joined"
        )
    return Dataset(*(np.concatenate(arrays) for arrays in zip(*datasets, strict=True)))


def fingerprint(ds: Dataset) -> str:
    """16 hex digits of the SHA-256 over every array's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, array in ds._asdict().items():
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]
