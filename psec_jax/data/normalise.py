"""Observation normalisation, fitted on the base's data and saved with the base."""

from collections.abc import Callable

import numpy as np

from psec_jax.errors import lookup
from psec_jax.types import Normaliser

STD_FLOOR = 1e-3  # a constant coordinate would otherwise be blown up


def none(obs: np.ndarray, std_floor: float = STD_FLOOR) -> Normaliser:
    """The identity."""
    size = obs.shape[-1]
    return Normaliser(np.zeros(size, np.float32), np.ones(size, np.float32))


def standard(obs: np.ndarray, std_floor: float = STD_FLOOR) -> Normaliser:
    """Zero mean and unit variance over the rows of obs [N, S].

    Args:
      obs: [N, S].
      std_floor: the least standard deviation to divide by.
    """
    mean = obs.mean(0, dtype=np.float64)
    std = np.maximum(obs.std(0, dtype=np.float64), std_floor)
    return Normaliser(mean.astype(np.float32), std.astype(np.float32))


def fit(
    obs: np.ndarray, std_floor: float = STD_FLOOR, name: str = "standard"
) -> Normaliser:
    """Fit the normaliser `name` of NORMALISERS to obs [N, S].

    Raises:
      InputError: unknown name.
    """
    return lookup(NORMALISERS, name, "normaliser")(obs, std_floor)


NORMALISERS: dict[str, Callable[[np.ndarray, float], Normaliser]] = {
    "none": none,
    "standard": standard,
}
