"""Episode files of DeepMind Control data: one .npz an episode."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psec_jax.data import dataset, npz
from psec_jax.errors import InputError
from psec_jax.types import Dataset

KEYS = ("observation", "action", "reward", "discount")


def load(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    first: int | None = None,
    clip_actions: bool | None = False,
) -> Dataset:
    """Episodes, in the order of the numbers in their file names.

    Each file holds observation [T + 1, S], action [T + 1, A], reward and discount
    [T + 1] or [T + 1, 1]; physics is not read. Row 0 is the reset, so transition i is
    (observation[i], action[i + 1], reward[i + 1], observation[i + 1]); a discount of 0
    in the last row is a true end, anything else a cut.

    Args:
      source: a folder, one file, or a list of files.
      first: read the first N episodes only.
      clip_actions: see `dataset.check`.

    Raises:
      InputError: no episode files, fewer than `first`, a file that cannot be read or
        lacks a key, a true end before the last row, or arrays `dataset.check` refuses.
    """
    if isinstance(source, (str, os.PathLike)):
        root = Path(source)
        files = sorted(root.glob("*.npz"), key=_order) if root.is_dir() else [root]
        if not files:
            raise InputError(f"{root}: no episode files (*.npz) in this folder")
    else:
        root, files = Path("the list of episode files"), [Path(f) for f in source]
        if not files:
            raise InputError("the list of episode files is empty")
    if first is not None:
        if first < 1:
            raise InputError(f"asked for {first} trajectories, expected 1 or more")
        if first > len(files):
            raise InputError(f"asked for {first} trajectories, {root} has {len(files)}")
        files = files[:first]
    episodes = [dataset.check(_read(f), str(f), clip_actions) for f in files]
    return dataset.concatenate(episodes)


def _order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts episode_2 before episode_10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.stem)  # not "²", which is no number
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts]


def _read(path: Path) -> Dataset:
    arrays = npz.read(path, KEYS)
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"{path}: {key} has type {array.dtype}, expected numbers")
    lengths = {key: len(np.atleast_1d(array)) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise InputError(f"{path}: arrays of different lengths: {got}")
    n = lengths["observation"] - 1
    if n < 1:
        raise InputError(f"{path}: {n + 1} rows, expected the reset and a step or more")
    scalars = {key: arrays[key].reshape(n + 1, -1) for key in ("reward", "discount")}
    for key, array in scalars.items():
        if array.shape[1] != 1:
            raise InputError(
                f"{path}: {key} has shape {arrays[key].shape}, expected ({n + 1},) or "
                f"({n + 1}, 1)"
            )
    last = np.arange(n) == n - 1
    ended = scalars["discount"][1:, 0] == 0
    if (ended & ~last).any():
        row = int(np.argmax(ended)) + 1
        raise InputError(
            f"{path}: row {row} has a discount of 0, a true end, but {n - row} rows "
            "follow it in the same episode"
        )
    return Dataset(
        obs=arrays["observation"][:-1],
        action=arrays["action"][1:],
        reward=scalars["reward"][1:, 0],
        cost=np.zeros(n),
        next_obs=arrays["observation"][1:],
        terminal=ended,
        timeout=last & ~ended,
    )
