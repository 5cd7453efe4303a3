"""Reading .npz files of anybody with one clear line on failure."""

import math
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psec_jax.errors import InputError

FAILURES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,  # an encrypted file; RecursionError of a nested header
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
FREE = 2**26  # bytes that a file of any size may hold when it is read
RATIO = 100  # bytes read for a byte of the file, beyond these
_MAX_HEADER = 10_000
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


def read(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file, or only those of these names.

    Raises:
      InputError: no such file, not a whole .npz file, encrypted or packed otherwise
        than numpy packs, objects instead of numbers, more bytes than a file of this
        size can hold, or a key that is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as file:
            members = _members(file, path)
            wanted = list(members) if keys is None else keys
            arrays = {
                key: _array(file, members[key]) for key in wanted if key in members
            }
    except InputError:
        raise
    except FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable .npz file ({reason})") from error
    for key in wanted:
        if key not in arrays:
            raise InputError(
                f"{path}: no array {key!r}; the file holds "
                f"{', '.join(sorted(members)) or 'nothing'}"
            )
    return arrays


def _members(file: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays of a file by name, their sizes checked before any is unpacked."""
    infos = file.infolist()
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(members) < len(infos):
        raise InputError(f"{path}: two arrays of one name")
    size, stored = sum(info.file_size for info in infos), path.stat().st_size
    if size > FREE + RATIO * stored:
        raise InputError(f"{path}: claims {size:,} bytes, in a file of {stored:,}")
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in _PACKED:
            raise InputError(
                f"{path}: {info.filename!r:.80} is encrypted or packed otherwise than "
                "numpy packs"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(f"{path}: {info.filename!r:.80} is a link")
    return members


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with file.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if header is None:
            raise ValueError(f"{info.filename!r:.80} is of format {version}")
        shape, by_column, dtype = header(stream, max_header_size=_MAX_HEADER)
        if dtype.hasobject or dtype.kind not in "biufSU":
            raise ValueError(
                f"{info.filename!r:.80} has type {dtype}, expected numbers"
            )
        content = stream.read()  # to the end, where the checksum is compared
    size = math.prod(shape) * dtype.itemsize
    if len(content) != size or any(n < 0 for n in shape):
        raise ValueError(
            f"{info.filename!r:.80} has {len(content):,} bytes, its shape {shape} "
            f"takes {size:,}"
        )
    array = np.frombuffer(content, dtype) if size else np.zeros(0, dtype)
    if dtype.kind == "b":  # a byte may be anything
        array = array.view(np.uint8) != 0
    return array.reshape(shape, order="F" if by_column else "C").copy()
