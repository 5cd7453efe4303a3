"""Observations of Gymnasium's spaces as vectors, in one order for data and simulators.

A Box is flattened row by row. The parts of a Dict follow one another in the order of
its space: Gymnasium sorts the keys of a plain dict, and keeps the order of an
OrderedDict, of a list of pairs or with `sort_keys=False`. Parts within parts are named
"outer/inner". A Discrete part becomes one-hot, as `gymnasium.spaces.flatten` has it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def order(space: Any) -> tuple[str, ...]:
    """The parts of a flattened observation in their order, "name:size" each; empty
    where the observation has one part without a name."""
    parts = _parts(space, "")
    return (
        ()
        if [name for name, _ in parts] == [""]
        else tuple(f"{name}:{size}" for name, size in parts)
    )


def _parts(space: Any, name: str) -> list[tuple[str, int]]:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        inside = list(space.spaces.items())
    elif isinstance(space, spaces.Tuple):
        inside = list(enumerate(space.spaces))
    else:
        return [(name, spaces.flatdim(space))]
    prefix = f"{name}/" if name else ""
    return [part for key, sub in inside for part in _parts(sub, f"{prefix}{key}")]


def flatten_rows(space: Any, observations: Any) -> np.ndarray:
    """Many observations of a space, stacked part by part, as vectors [T, S].

    Raises:
      KeyError, ValueError, TypeError: they are not of the space.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        if not isinstance(observations, Mapping):
            raise TypeError(f"expected the parts {', '.join(space.spaces)}")
        columns = [
            flatten_rows(sub, observations[key]) for key, sub in space.spaces.items()
        ]
    elif isinstance(space, spaces.Tuple):
        columns = [
            flatten_rows(sub, rows)
            for sub, rows in zip(space.spaces, observations, strict=True)
        ]
    elif isinstance(space, spaces.Box):
        rows = np.asarray(observations)
        if rows.shape[1:] != space.shape:
            raise ValueError(f"got shape {rows.shape[1:]}, expected {space.shape}")
        return rows.reshape(len(rows), -1)
    else:
        for row in observations:
            if not space.contains(row):
                raise ValueError(f"got {row!r}, expected one of {space}")
        return np.array([spaces.flatten(space, row) for row in observations])
    return np.concatenate(columns, 1)
