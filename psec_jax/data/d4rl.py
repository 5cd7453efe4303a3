"""HDF5 files in the layout of D4RL and DSRL (Fu et al. 2020; Liu et al. 2023).

The customary Q-learning view of D4RL, its `qlearning_dataset`, takes every next
observation from the next row, so that it has to leave out the rows at a timeout and the
last one. `load` gives the same rows where a file has no `next_observations`, but for a
true end in the last row, which it keeps. Where a file has them, as v2 has, it also
keeps the rows at a timeout: each is a transition like any other, and no true end. A row
marked both is a true end; the customary view leaves it out.
"""

import contextlib
import io
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psec_jax import files
from psec_jax.data import dataset
from psec_jax.errors import InputError
from psec_jax.types import Dataset

KEYS = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "terminal": "terminals",
    "timeout": "timeouts",
    "cost": "costs",
}
OPTIONAL = ("next_obs", "timeout", "cost")


def load(
    path: str | os.PathLike[str],
    clip_actions: bool = False,
    required: Collection[str] = (),
) -> tuple[Dataset, dict[str, Any]]:
    """Read one file.

    `next_observations` may be missing (the older D4RL files): each is then the next
    row's observation, and the last row of an episode that was cut, whose successor the
    file does not hold, is dropped. `timeouts` may be missing: episodes then end at
    `terminals` and at the last row. A line on stderr tells either; both cannot be
    missing, for a row before a cut would be joined with another episode. `costs` may be
    missing; rewards, costs and flags may have shape [N] or [N, 1].

    Args:
      path: the file.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      required: fields of OPTIONAL that this file may not lack.

    Returns:
      The checked dataset and the file's attributes.

    Raises:
      InputError: the file is missing, truncated or not HDF5, lacks a key, or holds
        arrays `dataset.check` refuses.
    """
    path = Path(path)
    with _opened(path) as file:
        attrs = _attributes(file)
        arrays = _read(file, path, required)
    return dataset.check(_assemble(arrays, path), str(path), clip_actions), attrs


def layout(
    path: str | os.PathLike[str], required: Collection[str] = ()
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a file's arrays by field, and its attributes; no values are read.

    Raises:
      InputError: the file is missing, truncated or not HDF5, or lacks a key.
    """
    path = Path(path)
    with _opened(path) as file:
        shapes = {
            name: array.shape for name, array in _arrays(file, path, required).items()
        }
        return shapes, _attributes(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a readable HDF5 file, or a truncated one ({reason})"
        ) from error


def _attributes(file: h5py.File) -> dict[str, Any]:
    return {name: _plain(value) for name, value in file.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    return value


def _arrays(
    file: h5py.File, path: Path, required: Collection[str]
) -> dict[str, h5py.Dataset]:
    arrays = {}
    for name, key in KEYS.items():
        if isinstance(file.get(key), h5py.Dataset):
            arrays[name] = file[key]
        elif name not in OPTIONAL or name in required:
            found = ", ".join(sorted(file)) or "nothing"
            older = ", as in D4RL v0" if name in ("next_obs", "timeout") else ""
            raise InputError(
                f"{path}: no dataset {key!r}{older}; the file holds {found}"
            )
    return arrays


def _read(
    file: h5py.File, path: Path, required: Collection[str]
) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(array[()])
        for name, array in _arrays(file, path, required).items()
    }


def _assemble(arrays: Mapping[str, np.ndarray], path: Path) -> Dataset:
    arrays = dict(arrays)
    for name in ("reward", "terminal", "timeout", "cost"):
        if name in arrays and arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
            arrays[name] = arrays[name][:, 0]
    n = len(arrays["obs"]) if np.ndim(arrays["obs"]) else 0
    if n == 0:
        raise InputError(f"{path}: holds no transitions")
    untimed = "timeout" not in arrays
    if untimed and "next_obs" not in arrays:
        raise InputError(
            f"{path}: neither timeouts nor next_observations, as in D4RL v0: where "
            "episodes were cut cannot be told; expected one of them"
        )
    for name in OPTIONAL[1:]:
        arrays.setdefault(name, np.zeros(n))
    for name in arrays:
        if np.ndim(arrays[name]) == 0 or len(arrays[name]) != n:
            raise InputError(
                f"{path}: {KEYS[name]} has shape {np.shape(arrays[name])} but "
                f"observations has {n} rows"
            )
    for name in ("terminal", "timeout"):
        array = arrays[name]
        if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
            raise InputError(f"{path}: {KEYS[name]} holds other values than 0 and 1")
        arrays[name] = array.astype(bool)
    if untimed:
        _tell(
            f"{path}: no timeouts: episodes end at {int(arrays['terminal'].sum())} "
            "terminals and at the last row"
        )
    if "next_obs" in arrays:
        return Dataset(**arrays)
    cut = arrays["timeout"] & ~arrays["terminal"]
    cut[-1] |= not arrays["terminal"][-1]
    last = arrays["obs"][-1:]  # after a true end the value is never used
    arrays["next_obs"] = np.concatenate([arrays["obs"][1:], last])
    ended = arrays["terminal"]
    arrays["next_obs"][ended] = arrays["obs"][ended]
    # The row before a dropped one becomes the last of its episode.
    before = np.flatnonzero(cut) - 1
    before = before[before >= 0]
    before = before[~(arrays["terminal"][before] | arrays["timeout"][before])]
    arrays["timeout"][before] = True
    if cut.all():
        raise InputError(
            f"{path}: no next_observations, and no episode of two rows or more"
        )
    _tell(
        f"{path}: no next_observations, as in D4RL v0: each is the next row's "
        f"observation; {int(cut.sum())} rows at a cut are dropped"
    )
    return Dataset(**{name: array[~cut] for name, array in arrays.items()})


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def save(
    path: str | os.PathLike[str],
    ds: Dataset,
    attrs: Mapping[str, Any],
    costs: bool = False,
) -> Path:
    """Write one file, whole or not at all.

    Args:
      path: the file; its folder is made.
      ds: what to write.
      attrs: file attributes: numbers, strings, arrays.
      costs: write costs even where all of them are zero.

    Raises:
      InputError: the file cannot be written (a full disk, no permission).
    """
    path = Path(path)
    content = io.BytesIO()
    # The format of HDF5 1.10 holds attributes longer than 64 kB.
    with h5py.File(content, "w", libver=("v110", "v110")) as file:
        for name, key in KEYS.items():
            if name != "cost" or costs or np.any(ds.cost):
                file.create_dataset(key, data=getattr(ds, name))
        for name, value in attrs.items():
            file.attrs[name] = value
    with files.reported(f"make the folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, content.getvalue())
    return path
