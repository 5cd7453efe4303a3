"""HDF5 files in the layout of D4RL and DSRL (Fu et al. 2020; Liu et al. 2023).

The customary Q-learning view of D4RL, its `qlearning_dataset`, takes every next
observation from the next row, so that it has to leave out the rows at a timeout and the
last one. `load` gives the same rows where a file has no `next_observations`, but for a
true end in the last row, which it keeps. Where a file has them, as v2 has, it also
keeps the rows at a timeout: each is a transition like any other, and no true end. A row
marked both is a true end; the customary view leaves it out.
"""

import hashlib
import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psec_jax import files
from psec_jax.data import dataset, hdf5
from psec_jax.data.recording import say
from psec_jax.errors import InputError
from psec_jax.types import Dataset

# The name that is written for each field; others that are read are in ALIASES.
KEYS = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "terminal": "terminals",
    "timeout": "timeouts",
    "cost": "costs",
}
ALIASES = {
    "obs": ("observation", "obs"),
    "action": ("action",),
    "reward": ("reward",),
    "next_obs": ("next_observation", "next_obs"),
    "terminal": ("terminations", "termination", "terminated", "terminal"),
    "timeout": ("truncations", "truncation", "truncated", "timeout"),
    "cost": ("cost",),
}
# Ends of trajectories of either kind; read where terminals or timeouts are missing.
DONES = ("dones", "done")
CHECKSUM = "content_sha256"  # attribute of the files of this project
TEXTS = ("action_units", "environment", "made_by", "observation_order", "task")
OPTIONAL = ("reward", "next_obs", "terminal", "timeout", "cost")


def load(
    path: str | os.PathLike[str],
    clip_actions: bool = False,
    required: Collection[str] = (),
    ends: str = "check",
) -> tuple[Dataset, dict[str, Any]]:
    """The checked dataset of one file of scaled actions, and the file's attributes.

    Args:
      path: the file.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      required: fields of OPTIONAL that this file may not lack.
      ends: a key of `dataset.ENDS`.

    Raises:
      InputError: what `read`, `dataset.check` and `dataset.check_ends` refuse.
    """
    ds, attrs = read(path, required)
    ds = dataset.check(ds, str(path), clip_actions)
    return dataset.check_ends(ds, str(path), ends, say), attrs


def read(
    path: str | os.PathLike[str], required: Collection[str] = ()
) -> tuple[Dataset, dict[str, Any]]:
    """The arrays of one file as stored, and its attributes.

    `next_observations` may be missing (the older D4RL files): each is then the next
    row's observation, and the last row of an episode that was cut, whose successor the
    file does not hold, is dropped. `timeouts` may be missing: episodes then end at
    `terminals` and at the last row. Both cannot be missing, for a row before a cut
    would be joined with another episode; where next observations do not lead on, a
    trajectory without `timeouts` is cut. `dones`, the ends of episodes of either kind,
    may stand for one of the flags, or for both: then no true end is known, and
    "terminal" is among the attribute `missing`. `rewards` may be missing, which cloning
    does not need: zeros, and "reward" among `missing`. `costs` may be missing. A line
    on stderr says each of these but the last. Rewards, costs and flags may have shape
    [N] or [N, 1]. Other names of keys are in ALIASES.

    Args:
      path: the file.
      required: fields of OPTIONAL that this file may not lack.

    Raises:
      InputError: the file is missing, truncated or not HDF5, lacks a key, has one under
        two names, arrays of different lengths, or another checksum than it says; see
        also `hdf5`.
    """
    path = Path(path)
    with hdf5.opened(path) as file:
        attrs = _attributes(file)
        keys = _keys(file, path, required)
        arrays = {name: file.read(key) for name, key in keys.items()}
    _check_sum({keys[name]: array for name, array in arrays.items()}, attrs, path)
    missing = tuple(
        name
        for name in ("reward", "terminal")
        if name not in arrays and (name == "reward" or "timeout" not in arrays)
    )
    return _assemble(arrays, path), attrs | ({"missing": missing} if missing else {})


def attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The attributes of a file.

    Raises:
      InputError: the file is missing, truncated or not HDF5.
    """
    with hdf5.opened(Path(path)) as file:
        return {n: v for n, v in _attributes(file).items() if n != CHECKSUM}


def layout(
    path: str | os.PathLike[str], required: Collection[str] = ()
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a file's arrays by field, and its attributes; no values are read.

    Raises:
      InputError: the file is missing, truncated or not HDF5, or lacks a key.
    """
    path = Path(path)
    with hdf5.opened(path) as file:
        keys = _keys(file, path, required)
        shapes = {name: file.shape(key) for name, key in keys.items()}
        return shapes, _attributes(file)


def _attributes(file: hdf5.Reader) -> dict[str, Any]:
    attrs = file.attributes()
    hdf5.texts(attrs, TEXTS, str(file.path))
    return attrs


def _check_sum(
    arrays: Mapping[str, np.ndarray], attrs: dict[str, Any], path: Path
) -> None:
    """Take the checksum out of the attributes, and compare it where there is one."""
    told = attrs.pop(CHECKSUM, None)
    if told is not None and told != _checksum(arrays, attrs):
        raise InputError(
            f"{path}: its arrays or attributes do not match its checksum: it is damaged"
        )


def _checksum(arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> str:
    """The SHA-256 over names, types, shapes and bytes of arrays, and attributes."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    plain = {name: np.asarray(value).tolist() for name, value in attrs.items()}
    text = json.dumps(plain, sort_keys=True, default=bytes.decode)
    return hashlib.sha256(digest.digest() + text.encode()).hexdigest()


def _keys(file: hdf5.Reader, path: Path, required: Collection[str]) -> dict[str, str]:
    """The name of each field's array in the file; those of DONES are "done"."""
    names = {name: (key, *ALIASES[name]) for name, key in KEYS.items()}
    found = {}
    for name, keys in (names | {"done": DONES}).items():
        there = [key for key in keys if file.has(key)]
        if len(there) > 1:
            raise InputError(
                f"{path}: {' and '.join(map(repr, there))} are names of one field; "
                "remove all but one"
            )
        if there:
            found[name] = there[0]
    for name, key in KEYS.items():
        optional = name in OPTIONAL and name not in required
        if name == "terminal":
            optional &= "done" in found
        if name not in found and not optional:
            held = ", ".join(file.names()) or "nothing"
            older = ", as in D4RL v0" if name in ("next_obs", "timeout") else ""
            raise InputError(
                f"{path}: no dataset {key!r}{older}; the file holds {held}"
            )
    return found


def _assemble(arrays: Mapping[str, np.ndarray], path: Path) -> Dataset:
    arrays = dict(arrays)
    for name in ("reward", "terminal", "timeout", "cost", "done"):
        if name in arrays and arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
            arrays[name] = arrays[name][:, 0]
    n = len(arrays["obs"]) if np.ndim(arrays["obs"]) else 0
    if n == 0:
        raise InputError(f"{path}: holds no transitions")
    for name, array in arrays.items():
        if np.ndim(array) == 0 or len(array) != n:
            raise InputError(
                f"{path}: {KEYS.get(name, DONES[0])} has shape {np.shape(array)} but "
                f"observations has {n} rows"
            )
    for name in ("terminal", "timeout", "done"):
        if name in arrays:
            arrays[name] = _flags(arrays[name], KEYS.get(name, DONES[0]), path)
    _place_dones(arrays, path)
    untimed = "timeout" not in arrays
    if untimed and "next_obs" not in arrays:
        raise InputError(
            f"{path}: neither timeouts nor next_observations, as in D4RL v0: where "
            "episodes were cut is not known; expected one of them"
        )
    if "reward" not in arrays:
        say(f"{path}: no rewards: fit for cloning only")
    for name in ("reward", "cost"):
        arrays.setdefault(name, np.zeros(n))
    if untimed:
        cuts = dataset.jumps(arrays["obs"], arrays["next_obs"])
        if 2 * np.count_nonzero(cuts) > n:  # rows in no order
            cuts = np.zeros(n, bool)
        arrays["timeout"] = cuts & ~arrays["terminal"]
        say(
            f"{path}: no timeouts: episodes end at {int(arrays['terminal'].sum())} "
            f"terminals, at {int(arrays['timeout'].sum())} rows whose next observation "
            "does not lead on, and at the last row"
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
    say(
        f"{path}: no next_observations, as in D4RL v0: each is the next row's "
        f"observation; {int(cut.sum())} rows at a cut are dropped"
    )
    return Dataset(**{name: array[~cut] for name, array in arrays.items()})


def _flags(array: np.ndarray, key: str, path: Path) -> np.ndarray:
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise InputError(f"{path}: {key} holds other values than 0 and 1")
    return array.astype(bool)


def _place_dones(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Put `done`, an end of either kind, in place of the flag that is missing.

    Raises:
      InputError: an end by a flag that is none by `done`.
    """
    done = arrays.pop("done", None)
    if done is None:
        return
    given = [name for name in ("terminal", "timeout") if name in arrays]
    for name in given:
        stray = np.flatnonzero(arrays[name] & ~done)
        if len(stray):
            raise InputError(
                f"{path}: row {stray[0]} ends a trajectory by {KEYS[name]} but not by "
                f"{DONES[0]}"
            )
    if "terminal" not in arrays:
        arrays["terminal"] = done & ~arrays.get("timeout", done)
    arrays["timeout"] = done & ~arrays["terminal"]
    if not given:
        say(
            f"{path}: {DONES[0]} alone: true ends are not known, all {done.sum()} ends "
            "count as cuts"
        )


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
      attrs: file attributes: numbers, strings, arrays. CHECKSUM is added.
      costs: write costs even where all of them are zero.

    Raises:
      InputError: the file cannot be written (a full disk, no permission).
    """
    path = Path(path)
    content = io.BytesIO()
    # The format of HDF5 1.10 holds attributes longer than 64 kB.
    arrays = {
        key: np.asarray(getattr(ds, name))
        for name, key in KEYS.items()
        if name != "cost" or costs or np.any(ds.cost)
    }
    with h5py.File(content, "w", libver=("v110", "v110")) as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array)
        for name, value in attrs.items():
            file.attrs[name] = value
        file.attrs[CHECKSUM] = _checksum(arrays, attrs)
    with files.reported(f"make the folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, content.getvalue())
    return path
