"""Whole-dataset checks, trajectories and their selection."""

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from psec_jax.data import actions
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

ENDS = {
    "check": "as the flags say, refused where next observations contradict them",
    "flags": "as the flags say",
    "observations": "where next observations do not lead on, and at true ends",
}
LEADS_ON = 1e-3  # of a column's standard deviation: the same observation, rounded


def episode_slices(ds: Dataset) -> list[slice]:
    """The rows of each of the E trajectories, in order.

    A trajectory ends where `terminal` or `timeout` is set.
    """
    ends = np.flatnonzero(ds.terminal | ds.timeout) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return [slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def of_steps(rows: Sequence[tuple]) -> Dataset:
    """The transitions of one episode, each a tuple of a dataset's columns."""
    types = (np.float32,) * 5 + (bool,) * 2
    columns = zip(*rows, strict=True)
    return Dataset(*(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)))


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


def check(
    ds: Dataset,
    source: str,
    clip_actions: bool | None = False,
    scale: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Dataset:
    """The same data in their final types; refused where no stage can learn from them.

    Args:
      ds: arrays of any real type; see `Dataset` for their shapes.
      source: the file or folder, named in every message.
      clip_actions: clip actions into [-1, 1] instead of refusing them; None leaves them
        as they are.
      scale: actions as stored -> scaled ones, [N, A] each, before they are checked.

    Returns:
      The same rows as float32 and bool; the last row ends a trajectory (it is marked
      `timeout` where the source was cut in the middle of one).

    Raises:
      InputError: no rows, lengths or shapes that disagree, NaN or infinity, or
        actions outside [-1, 1] (with their number).
    """
    _check_shapes(ds, source)
    floats = {}
    for name in ("obs", "action", "reward", "cost", "next_obs"):
        array = np.asarray(getattr(ds, name))
        if array.dtype.kind not in "biuf":
            raise InputError(
                f"{source}: {name} has type {array.dtype}, expected numbers"
            )
        if name == "action" and scale is not None and np.isfinite(array).all():
            array = scale(array)
        with np.errstate(over="ignore"):  # reported below, as infinity
            array = array.astype(np.float32)
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise InputError(
                f"{source}: {name} holds {bad} NaN or infinite of {array.size} "
                "values, expected finite numbers"
            )
        floats[name] = array
    if clip_actions is not None:
        floats["action"] = _check_actions(floats["action"], source, clip_actions)
    terminal = np.asarray(ds.terminal, dtype=bool)
    timeout = np.asarray(ds.timeout, dtype=bool) & ~terminal
    if not terminal[-1]:
        timeout[-1] = True
    return Dataset(**floats, terminal=terminal, timeout=timeout)


def check_costs(ds: Dataset, source: str) -> None:
    """Refuse negative costs.

    Raises:
      InputError: there are some.
    """
    negative = np.count_nonzero(ds.cost < 0)
    if negative:
        raise InputError(
            f"{source}: {negative} of {len(ds.cost)} costs are negative (least "
            f"{ds.cost.min():.4g}), expected 0 or more"
        )


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
    outside = np.abs(action) > 1 + actions.SLACK
    rows = np.asarray(outside.any(1))
    if outside.any() and not clip:
        raise InputError(
            f"{source}: {np.count_nonzero(outside)} of {action.size} action values lie "
            f"outside [-1, 1] (largest magnitude {np.abs(action).max():.4g}), in "
            f"{actions.share(rows)}: units of the environment? Name the "
            "environment, or write attributes action_low and action_high; "
            f"{actions.advice(rows)}"
        )
    return np.clip(action, -1.0, 1.0)


def check_ends(
    ds: Dataset,
    source: str,
    ends: str = "check",
    say: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The dataset with its trajectories ended as `ends` says.

    A row leads on where its next observation is the observation of the next row. Within
    a trajectory every row does. Data of which no row does (transitions in an order
    drawn at random) have nothing that could contradict the flags.

    Args:
      ds: a checked dataset.
      source: the file, named in every message.
      ends: a key of ENDS.
      say: called with one line where the flags are replaced, or contradicted by more
        than half of the rows.

    Raises:
      InputError: an unknown key, or rows that do not lead on inside a trajectory.
    """
    lookup(ENDS, ends, "ends")
    if ends == "flags":
        return ds
    if ends == "observations":
        timeout = jumps(ds.obs, ds.next_obs) & ~ds.terminal
        timeout[-1] = not ds.terminal[-1]
        say(
            f"{source}: {np.count_nonzero(timeout | ds.terminal)} trajectories, ended "
            f"where next observations do not lead on; the flags had "
            f"{len(episode_slices(ds))}"
        )
        return ds._replace(timeout=timeout)
    wrong, inside = _broken(ds)
    if len(wrong) == inside:
        return ds  # rows in no order, or none to compare
    if 2 * len(wrong) > inside:
        say(
            f"{source}: next observations are not those of the next rows, in "
            f"{len(wrong)} of {inside} rows that end no trajectory: ends are those of "
            "the flags"
        )
    elif len(wrong):
        raise InputError(
            f"{contradiction(ds, source)}; mend the flags, or choose "
            "--ends=observations or --ends=flags"
        )
    return ds


def contradiction(ds: Dataset, source: str) -> str | None:
    """A line on the first row whose next observation contradicts the flags, if any."""
    wrong, _ = _broken(ds)
    if len(wrong) == 0:
        return None
    return (
        f"{source}: row {wrong[0]} ends no trajectory, but its next observation is not "
        f"the observation of row {wrong[0] + 1} ({len(wrong)} such rows of "
        f"{len(ds.obs)}, in {len(episode_slices(ds))} trajectories by the flags)"
    )


def _broken(ds: Dataset) -> tuple[np.ndarray, int]:
    """Rows that end no trajectory and do not lead on, and how many end none."""
    inside = ~(ds.terminal | ds.timeout)
    broken = np.flatnonzero(jumps(ds.obs, ds.next_obs) & inside)
    return broken, int(np.count_nonzero(inside))


def jumps(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Which rows have another next observation than the observation of the next row,
    [N] bool; the last row has none to compare with.

    Rounding is no difference, and arrays that are not alike are not compared.
    """
    result = np.zeros(len(obs), bool)
    alike = np.shape(obs) == np.shape(next_obs) and np.ndim(obs) == 2
    if not alike or obs.dtype.kind not in "biuf" or next_obs.dtype.kind not in "biuf":
        return result
    with np.errstate(invalid="ignore", over="ignore"):  # infinity is refused elsewhere
        tolerance = LEADS_ON * obs.std(0) + 1e-6 * np.abs(obs).max(0)
        apart = np.abs(next_obs[:-1] - obs[1:].astype(float)) > tolerance
    result[:-1] = apart.any(1)
    return result


def whole(what: str, value: Any) -> int:
    """A whole number, also one of NumPy.

    Raises:
      InputError: anything else.
    """
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{what}: got {value!r}, expected a whole number")


def real(what: str, value: Any) -> float:
    """A number, also one of NumPy, that is not NaN.

    Raises:
      InputError: anything else.
    """
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iuf" or np.isnan(array):
        raise InputError(f"{what}: got {value!r}, expected a number")
    return float(array)


def take(ds: Dataset, chosen: Sequence[int] | np.ndarray) -> Dataset:
    """The trajectories of these numbers, in the order given.

    Raises:
      InputError: none are asked for.
    """
    slices = episode_slices(ds)
    if len(chosen) == 0:
        raise InputError(f"no trajectory left of {len(slices)}")
    rows = np.concatenate([np.arange(slices[i].start, slices[i].stop) for i in chosen])
    return Dataset(*(array[rows] for array in ds))


def select(
    ds: Dataset,
    first: int | None = None,
    best: int | None = None,
    min_return: float | None = None,
    max_cost: float | None = None,
    source: str = "the dataset",
    return_quantile: float | None = None,
    cost_quantile: float | None = None,
) -> Dataset:
    """Whole trajectories of a dataset, in their original order.

    Bounds apply in this order: on the cost, on the return, then `first` (the first N
    that are left) or `best` (the N of highest return; ties go to the earlier one). So
    `max_cost=10, return_quantile=0.8` keeps the best fifth of the safe trajectories.

    Args:
      ds: the dataset.
      first: how many of the first ones.
      best: how many of the best ones.
      min_return: the least return.
      max_cost: the highest cost.
      source: the file, named in every message.
      return_quantile: in [0, 1]; the least return is this quantile of the returns of
        the trajectories that the cost bounds left.
      cost_quantile: in [0, 1]; the highest cost is this quantile of all costs.

    Raises:
      InputError: fewer trajectories than asked are left, or none, a quantile outside
        [0, 1], or both `first` and `best` are given.
    """
    if first is not None and best is not None:
        raise InputError(
            f"first={first} and best={best} trajectories asked for together, "
            "expected one of the two"
        )
    returns, costs = episode_returns(ds), episode_costs(ds)
    chosen, having = _within(
        returns, costs, min_return, max_cost, return_quantile, cost_quantile
    )
    asked = first if first is not None else best
    if asked is not None:
        if whole("trajectories", asked) < 1:
            raise InputError(f"asked for {asked} trajectories, expected 1 or more")
        if asked > len(chosen):
            raise InputError(
                f"asked for {asked} trajectories, {source} has {len(chosen)}{having}"
                f"{_unsafe(costs, max_cost)}"
            )
    if len(chosen) == 0:
        raise InputError(
            f"{source}: no trajectory{having} among {len(costs)}"
            f"{_unsafe(costs, max_cost)}"
        )
    if first is not None:
        chosen = chosen[:first]
    if best is not None:
        ranked = chosen[np.argsort(-returns[chosen], kind="stable")]
        chosen = np.sort(ranked[:best])
    return ds if len(chosen) == len(costs) else take(ds, chosen)


def _within(
    returns: np.ndarray,
    costs: np.ndarray,
    min_return: float | None,
    max_cost: float | None,
    return_quantile: float | None,
    cost_quantile: float | None,
) -> tuple[np.ndarray, str]:
    """Numbers of the trajectories within the bounds, and the bounds in words."""
    for name, value in (("min_return", min_return), ("max_cost", max_cost)):
        if value is not None:
            real(name, value)
    for name, value in (
        ("return_quantile", return_quantile),
        ("cost_quantile", cost_quantile),
    ):
        if value is not None and not 0 <= real(name, value) <= 1:
            raise InputError(f"{name}: got {value:g}, expected 0 to 1")
    keep = np.ones(len(costs), dtype=bool)
    bounds = []
    if max_cost is not None:
        keep &= costs <= max_cost
        bounds.append(f"cost <= {max_cost:g}")
    if cost_quantile is not None:
        highest = np.quantile(costs, cost_quantile)
        keep &= costs <= highest
        bounds.append(f"cost <= {highest:g} (quantile {cost_quantile:g})")
    least = [] if min_return is None else [(min_return, "")]
    if return_quantile is not None and keep.any():
        quantile = np.quantile(returns[keep], return_quantile)
        least.append((quantile, f" (quantile {return_quantile:g})"))
    for value, note in least:
        keep &= returns >= value
        bounds.append(f"return >= {value:g}{note}")
    having = f" with {' and '.join(bounds)}" if bounds else ""
    return np.flatnonzero(keep), having


def _unsafe(costs: np.ndarray, max_cost: float | None) -> str:
    """What to say where no trajectory at all is within the cost limit."""
    if max_cost is None or (costs <= max_cost).any():
        return ""
    return (
        f"; the least cost is {costs.min():g}: without the limit a gate would imitate "
        "trajectories that break it, so raise the limit, or take the least costly ones "
        "with a cost quantile"
    )


def windows(ds: Dataset, horizon: int) -> np.ndarray:
    """The chunks of H actions that start at each row, [N, H * A].

    They stay within their trajectory: its last action is repeated behind its end. With
    H = 1 these are the actions themselves.
    """
    chunks = []
    for rows in episode_slices(ds):
        start = np.arange(rows.start, rows.stop)
        index = np.minimum(start[:, None] + np.arange(horizon), rows.stop - 1)
        chunks.append(ds.action[index].reshape(len(start), -1))
    return np.concatenate(chunks)


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
