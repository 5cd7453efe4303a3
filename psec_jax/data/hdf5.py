"""HDF5 files of anybody, read with one clear line on failure.

A file holds its numbers itself: links out of it, external storage and virtual sets,
which name other files, are refused. Sizes are checked before anything is read, for
a file of 3 kB may claim 150 million rows.
"""

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psec_jax.errors import InputError

# What h5py raises for a file with flipped bits.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
FREE = 2**26  # bytes that a file of any size may hold when it is read
RATIO = 100  # bytes read for a byte of the file, beyond these
MAX_ATTRIBUTES = 1000
_DEFLATED = 1032  # the most that a byte of a deflated stream can stand for


class Reader:
    """An open file; made by `opened`.

    Attributes:
      path: the file, named in every message.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        """Use `opened`."""
        self.path = path
        self._file = file
        self._left = FREE + RATIO * os.stat(path).st_size

    def names(self, group: str = "/") -> list[str]:
        """What a group holds, sorted; [] where it is no group.

        Raises:
          InputError: the group is behind a link.
        """
        node = self._node(group)
        return sorted(node) if isinstance(node, h5py.Group) else []

    def attributes(self) -> dict[str, Any]:
        """The file's attributes: texts, numbers, truth values and arrays of them.

        Raises:
          InputError: an attribute of another type.
        """
        if len(self._file.attrs) > MAX_ATTRIBUTES:
            raise InputError(f"{self.path}: more than {MAX_ATTRIBUTES} attributes")
        return {name: self._attribute(name) for name in self._file.attrs}

    def _attribute(self, name: str) -> Any:
        kind = self._file.attrs.get_id(name)
        text = h5py.check_string_dtype(kind.dtype) is not None
        if not text and kind.dtype.kind not in "biufSU":
            raise InputError(
                f"{self.path}: attribute {name!r:.80} has type {kind.dtype}, expected "
                "texts or numbers"
            )
        self._claim(f"attribute {name!r:.80}", kind.shape, kind.dtype)
        value = self._file.attrs[name]
        if isinstance(value, h5py.Empty):
            raise InputError(f"{self.path}: attribute {name!r:.80} is empty")
        if isinstance(value, bytes):
            return value.decode()
        return value.item() if isinstance(value, np.generic) else value

    def has(self, name: str) -> bool:
        """Whether there is an array under a name, "/" between groups."""
        return isinstance(self._node(name), h5py.Dataset)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array; its values are not read.

        Raises:
          InputError: there is none, or one that is not stored in this file.
        """
        return tuple(self._array(name).shape)

    def read(self, name: str) -> np.ndarray:
        """The values of an array.

        Raises:
          InputError: there is none, one that is not stored in this file, no numbers, or
            more of them than a file of this size can hold.
        """
        array = self._array(name)
        if array.dtype.kind not in "biuf":
            raise InputError(
                f"{self.path}: {name} has type {array.dtype}, expected numbers"
            )
        self._claim(name, array.shape, array.dtype)
        self._check_chunks(array, name)
        return np.asarray(array[()])

    def _array(self, name: str) -> h5py.Dataset:
        array = self._node(name)
        if not isinstance(array, h5py.Dataset):
            raise InputError(f"{self.path}: no dataset {name!r}")
        if array.external or array.is_virtual:
            raise InputError(f"{self.path}: {name} is stored in another file")
        if array.shape is None:
            raise InputError(f"{self.path}: {name} is empty")
        return array

    def _node(self, name: str) -> Any:
        """The group or array under a name; None where there is none."""
        node = self._file
        for part in filter(None, name.split("/")):
            if not isinstance(node, h5py.Group):
                return None
            link = node.get(part, getlink=True)
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                raise InputError(
                    f"{self.path}: {name} is a link to elsewhere, expected the values "
                    "themselves"
                )
            node = node.get(part)
        return node

    def _claim(self, name: str, shape: tuple[int, ...] | None, dtype: Any) -> None:
        """Count the bytes of what is to be read; refuse too many of them."""
        size = int(np.prod(shape or (1,), dtype=object)) * dtype.itemsize
        self._left -= size
        if self._left < 0:
            raise InputError(
                f"{self.path}: {name} claims {size:,} bytes, in a file of "
                f"{os.stat(self.path).st_size:,}"
            )
        if size > _available():
            raise InputError(
                f"{self.path}: {name} needs {size:,} bytes of memory, "
                f"{_available():,} are free"
            )

    def _check_chunks(self, array: h5py.Dataset, name: str) -> None:
        """Refuse chunks that take more memory than their values: HDF5 allocates a whole
        chunk, and unpacks a deflated one however much comes out."""
        if array.chunks is None:
            return
        size = int(np.prod(array.chunks, dtype=object)) * array.dtype.itemsize
        if size > FREE + array.size * array.dtype.itemsize:
            raise InputError(f"{self.path}: {name} has chunks of {size:,} bytes")
        if array.compression != "gzip":
            return
        for i in range(array.id.get_num_chunks()):
            info = array.id.get_chunk_info(i)
            if info.size * _DEFLATED > FREE + size:
                _, packed = array.id.read_direct_chunk(info.chunk_offset)
                # A checksum behind the values is 4 bytes.
                if len(zlib.decompressobj().decompress(packed, size + 5)) > size + 4:
                    raise InputError(
                        f"{self.path}: {name} unpacks to more than its {size:,} bytes"
                    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a file for reading.

    Raises:
      InputError: no such file, a pipe or directory, or a file that is damaged; also for
        what goes wrong in the body.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        regular = False
    if not regular:
        raise InputError(f"{path}: no such file")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield Reader(path, file)
    except InputError:
        raise
    except (*FAILURES, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: not a readable HDF5 file, or a truncated one ({reason})"
        ) from error


def texts(attrs: Mapping[str, Any], names: tuple[str, ...], source: str) -> None:
    """Refuse attributes that are not the texts they have to be.

    Raises:
      InputError: one of them is something else.
    """
    for name in names:
        if not isinstance(attrs.get(name, ""), str):
            raise InputError(f"{source}: attribute {name!r} is no text")


def _available() -> int:
    """Bytes of memory that are free, as far as that is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    known = {line.partition(":")[0]: line.split()[1] for line in lines}
    return 1024 * int(known.get("MemAvailable", 2**52))
