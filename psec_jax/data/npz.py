"""Reading .npz files with one clear line on failure."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psec_jax.errors import InputError

FAILURES = (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile)


def read(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file, or only those of these names.

    Raises:
      InputError: no such file, not a whole .npz file, objects instead of numbers, or a
        key that is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        # Opened here: numpy leaves its own handle open where the file is truncated.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = file.files
            wanted = found if keys is None else keys
            arrays = {key: file[key] for key in wanted if key in found}
    except FAILURES as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error
    for key in wanted:
        if key not in arrays:
            raise InputError(
                f"{path}: no array {key!r}; the file holds "
                f"{', '.join(sorted(found)) or 'nothing'}"
            )
    return arrays
