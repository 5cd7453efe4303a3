"""Options that change which trajectories a set has, or where they end.

Filters look at the plane of costs and returns alone, one point for each trajectory.
Everything is a pure function; what is random depends on the seed alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from psec_jax.data import dataset
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

ROUNDING = 1e-5  # relative, of sums of float32


def split(ds: Dataset, length: int) -> Dataset:
    """Cut every trajectory into pieces of `length` rows; the last may be shorter.

    Raises:
      InputError: a length below 1.
    """
    if length < 1:
        raise InputError(f"pieces of {length} steps asked for, expected 1 or more")
    timeout = ds.timeout.copy()
    for rows in dataset.episode_slices(ds):
        timeout[rows.start + length - 1 : rows.stop : length] = True
    return ds._replace(timeout=timeout & ~ds.terminal)


def share(ds: Dataset, part: float, seed: int = 0) -> Dataset:
    """A random part of the trajectories, one or more, in their original order.

    With one seed, a smaller part is contained in a larger one.

    Raises:
      InputError: a part outside (0, 1].
    """
    if not 0 < part <= 1:
        raise InputError(f"share of trajectories: got {part:g}, expected 0 to 1")
    count = len(dataset.episode_slices(ds))
    order = np.random.default_rng(seed).permutation(count)
    return dataset.take(ds, np.sort(order[: max(1, round(part * count))]))


def cut(ds: Dataset, transitions: int, seed: int = 0) -> Dataset:
    """Exactly N transitions: whole trajectories in an order drawn at random, the last
    one cut off.

    With one seed, a smaller cut is the beginning of a larger one.

    Args:
      ds: the dataset.
      transitions: N.
      seed: of the order.

    Raises:
      InputError: fewer transitions than asked for.
    """
    if transitions > len(ds.obs):
        raise InputError(
            f"a cut to {transitions} transitions asked for, the set has {len(ds.obs)}"
        )
    count = len(dataset.episode_slices(ds))
    order = np.random.default_rng(seed).permutation(count)
    return head(dataset.take(ds, order), transitions)


def head(ds: Dataset, transitions: int) -> Dataset:
    """The first N transitions; the last of them ends its trajectory, as a timeout
    unless it is a true end.

    Raises:
      InputError: N below 1.
    """
    if transitions < 1:
        raise InputError(f"{transitions} transitions asked for, expected 1 or more")
    ds = Dataset(*(array[:transitions].copy() for array in ds))
    ds.timeout[-1] = not ds.terminal[-1]
    return ds


def apply_filter(ds: Dataset, name: str, seed: int = 0, **options: Any) -> Dataset:
    """The trajectories that the filter `name` of FILTERS keeps, in their order.

    Args:
      ds: the dataset.
      name: of the filter.
      seed: of what it draws.
      **options: of the filter, in place of its defaults.

    Raises:
      InputError: an unknown filter, an option's value, or nothing is left.
    """
    keep = lookup(FILTERS, name, "filter")
    costs, returns = dataset.episode_costs(ds), dataset.episode_returns(ds)
    kept = keep(costs, returns, np.random.default_rng(seed), **options)
    if not kept.any():
        raise InputError(f"filter {name}: leaves none of {len(costs)} trajectories")
    return dataset.take(ds, np.flatnonzero(kept))


def density(
    costs: np.ndarray,
    returns: np.ndarray,
    generator: np.random.Generator,
    *,
    cost_cells: int = 10,
    return_cells: int = 50,
    most: int = 5,
    least: int = 3,
) -> np.ndarray:
    """Thin a crowded plane out: at most `most` trajectories a cell, chosen at random.

    The cells are a grid of equal rectangles over the range of the costs and of the
    returns. A cell with fewer than `least` trajectories loses them all. The defaults
    are those of DSRL's own density option.

    Args:
      costs: [E].
      returns: [E].
      generator: chooses among the trajectories of a full cell.
      cost_cells: of the grid.
      return_cells: of the grid.
      most: trajectories kept in one cell.
      least: trajectories that a cell needs.

    Returns:
      Which trajectories are kept, [E] bool.
    """
    for option, value in (
        ("cost_cells", cost_cells),
        ("return_cells", return_cells),
        ("most", most),
    ):
        if value < 1:
            raise InputError(f"filter density: {option} is {value}, expected 1 or more")
    cell = _cells(costs, cost_cells) * return_cells + _cells(returns, return_cells)
    kept = np.zeros(len(costs), dtype=bool)
    for members in (np.flatnonzero(cell == c) for c in np.unique(cell)):
        if len(members) >= least:
            kept[generator.permutation(members)[:most]] = True
    return kept


def _cells(values: np.ndarray, count: int) -> np.ndarray:
    """Numbers 0 to count - 1 of equal cells over the range of the values; the highest
    value belongs to the last one."""
    width = np.ptp(values) / count
    if width == 0:
        return np.zeros(len(values), dtype=int)
    return np.minimum(((values - values.min()) / width).astype(int), count - 1)


def outliers(
    costs: np.ndarray,
    returns: np.ndarray,
    generator: np.random.Generator,
    *,
    neighbours: int = 5,
    spread: float = 10.0,
) -> np.ndarray:
    """Drop lonely trajectories.

    The distance to the `neighbours`-th nearest other trajectory, in a plane where costs
    and returns have standard deviation 1, may exceed its median over the set by
    `spread` median absolute deviations.

    Args:
      costs: [E].
      returns: [E].
      generator: not used.
      neighbours: which neighbour's distance counts.
      spread: how far it may lie above the median.

    Returns:
      Which trajectories are kept, [E] bool; all where there are too few to tell, or
      most distances are the same.
    """
    if neighbours < 1:
        raise InputError(
            f"filter outliers: neighbours is {neighbours}, expected 1 or more"
        )
    if len(costs) <= neighbours:
        return np.ones(len(costs), dtype=bool)
    points = np.stack([_scaled(costs), _scaled(returns)], 1)
    distances = np.array(
        [
            np.partition(np.hypot(*(points - point).T), neighbours)[neighbours]
            for point in points
        ]
    )
    middle = np.median(distances)
    above = distances - middle
    deviation = np.median(np.abs(above))
    # Equal distances differ by rounding alone.
    return (above <= spread * deviation) | (deviation <= ROUNDING * middle)


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / (values.std() or 1.0)


# Each: (costs [E], returns [E], generator, options by name) -> kept [E] bool.
FILTERS: dict[str, Callable[..., np.ndarray]] = {
    "density": density,
    "outliers": outliers,
}
