"""HDF5 files of anybody, read with one clear line on failure.

A file holds its numbers itself: links out of it, external storage and virtual sets,
which name other files, are refused. Sizes are checked before anything is read, for
a file of 3 kB may claim 150 million rows.

The HDF5 library itself runs for ever, or is killed, on some files with a flipped bit.
It therefore reads in a process of its own, one for all files, whose memory and time are
bounded; numbers come back as bytes, texts as JSON.
"""

import atexit
import contextlib
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
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
_SPARE = 2**28  # bytes of memory for the library itself
_SECONDS = 2.0  # of processor time for one request, and for so many bytes:
_SPEED = 2e7
_START = "from psec_jax.data.hdf5 import _serve; _serve()"
_ROOT = Path(__file__).resolve().parents[2]


class Reader:
    """An open file; made by `opened`.

    Attributes:
      path: the file, named in every message.
    """

    def __init__(self, path: Path) -> None:
        """Use `opened`."""
        self.path = path

    def names(self, group: str = "/") -> list[str]:
        """What a group holds, sorted; [] where it is no group.

        Raises:
          InputError: the group is behind a link.
        """
        return self._ask("names", group)

    def has(self, name: str) -> bool:
        """Whether there is an array under a name, "/" between groups."""
        return self._ask("has", name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array; its values are not read.

        Raises:
          InputError: there is none, or one that is not stored in this file.
        """
        return tuple(self._ask("shape", name))

    def attributes(self) -> dict[str, Any]:
        """The file's attributes: texts, numbers, truth values and arrays of them.

        Raises:
          InputError: an attribute of another type.
        """
        return {
            name: np.array(value["array"], value["dtype"])
            if isinstance(value, dict)
            else value
            for name, value in self._ask("attributes").items()
        }

    def read(self, name: str) -> np.ndarray:
        """The values of an array.

        Raises:
          InputError: there is none, one that is not stored in this file, no numbers, or
            more of them than a file of this size can hold.
        """
        kind, shape = self._ask("read", name)
        array = np.empty(shape, np.uint8 if kind == "|b1" else np.dtype(kind))
        if array.nbytes:
            _child().receive(array, self.path)
        return array != 0 if kind == "|b1" else array  # a byte may be anything

    def _ask(self, *request: str) -> Any:
        return _child().ask([*request], self.path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a file for reading; one at a time.

    Raises:
      InputError: no such file, a pipe or directory, or a file that is damaged; also
        where that shows in the body only.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        regular = False
    if not regular:
        raise InputError(f"{path}: no such file")
    with _turn:
        reader = Reader(path)
        reader._ask("open", os.path.abspath(path))
        try:
            yield reader
        finally:
            if _children:
                reader._ask("close")


def texts(attrs: Mapping[str, Any], names: tuple[str, ...], source: str) -> None:
    """Refuse attributes that are not the texts they have to be.

    Raises:
      InputError: one of them is something else.
    """
    for name in names:
        if not isinstance(attrs.get(name, ""), str):
            raise InputError(f"{source}: attribute {name!r} is no text")


class _Child:
    """The process that reads."""

    def __init__(self) -> None:
        self._pipe, other = Pipe()
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1"},
            )

    def ask(self, request: list[str], path: Path) -> Any:
        """What the process answers.

        Raises:
          InputError: it refuses, or dies.
        """
        with self._alive(path):
            self._pipe.send_bytes(json.dumps(request).encode())
            answer = json.loads(self._pipe.recv_bytes())
        if "refused" in answer:
            raise InputError(f"{path}: {answer['refused']}")
        return answer["value"]

    def receive(self, array: np.ndarray, path: Path) -> None:
        """Fill an array with bytes that the process sends."""
        with self._alive(path):
            self._pipe.recv_bytes_into(array.reshape(-1).view(np.uint8))

    @contextlib.contextmanager
    def _alive(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            _children.clear()
            self.close()
            late = self._process.returncode == -signal.SIGPROF
            what = "does not come to an end with it" if late else "is killed by it"
            raise InputError(
                f"{path}: not a readable HDF5 file (the HDF5 library {what})"
            ) from error
        except BaseException:  # interrupted in the middle of an answer
            _children.clear()
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()


_turn = threading.RLock()
_children: list[_Child] = []


def _child() -> _Child:
    if not _children:
        _children.append(_Child())
        atexit.register(_children[0].close)
    return _children[0]


# --- in the process of its own --------------------------------------------------------


def _serve() -> None:
    """Answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pipe = Connection(int(sys.argv[1]))
    server: _Server | None = None
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        values = None
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            if request[0] in ("open", "close") and server is not None:
                server.close()
                server = None
            if request[0] == "open":
                server = _Server(request[1])
            value = None
            if server is not None and request[0] != "open":
                value = getattr(server, request[0])(*request[1:])
            if isinstance(value, np.ndarray):
                values, value = value, [value.dtype.str, value.shape]
            answer = {"value": value}
        except InputError as error:
            answer = {"refused": str(error)}
        except FAILURES as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            answer = {
                "refused": "not a readable HDF5 file, or a truncated one "
                f"({reason:.200})"
            }
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(json.dumps(answer).encode())
        if values is not None and values.nbytes:
            pipe.send_bytes(values.reshape(-1).view(np.uint8).data)


class _Server:
    """One open file."""

    def __init__(self, path: str) -> None:
        size = os.stat(path).st_size
        self._size, self._left = size, FREE + RATIO * size
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + self._left + _SPARE
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        self._file = h5py.File(path, "r", locking=False)

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        with contextlib.suppress(*FAILURES):
            self._file.close()

    def names(self, group: str) -> list[str]:
        """See `Reader`."""
        node = self._node(group)
        return sorted(node) if isinstance(node, h5py.Group) else []

    def has(self, name: str) -> bool:
        """See `Reader`."""
        return isinstance(self._node(name), h5py.Dataset)

    def shape(self, name: str) -> list[int]:
        """See `Reader`."""
        return list(self._array(name).shape)

    def attributes(self) -> dict[str, Any]:
        """See `Reader`."""
        if len(self._file.attrs) > MAX_ATTRIBUTES:
            raise InputError(f"more than {MAX_ATTRIBUTES} attributes")
        return {name: self._attribute(name) for name in self._file.attrs}

    def _attribute(self, name: str) -> Any:
        kind = self._file.attrs.get_id(name)
        text = h5py.check_string_dtype(kind.dtype) is not None
        if not text and kind.dtype.kind not in "biufSU":
            raise InputError(
                f"attribute {name!r:.80} has type {kind.dtype}, expected texts or "
                "numbers"
            )
        self._claim(f"attribute {name!r:.80}", kind.shape or (), kind.dtype)
        value = self._file.attrs[name]
        if isinstance(value, h5py.Empty):
            raise InputError(f"attribute {name!r:.80} is empty")
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            return value
        array = np.asarray(value)
        if array.dtype.kind in "OSU":
            plain = [x.decode() if isinstance(x, bytes) else str(x) for x in array.flat]
            array = np.array(plain, dtype=str).reshape(array.shape)
        if array.ndim == 0:
            return array.item()
        kept = "O" if array.dtype.kind == "U" else array.dtype.str
        return {"array": array.tolist(), "dtype": kept}

    def read(self, name: str) -> np.ndarray:
        """See `Reader`."""
        array = self._array(name)
        if array.dtype.kind not in "biuf":
            raise InputError(f"{name} has type {array.dtype}, expected numbers")
        size = self._claim(name, array.shape, array.dtype)
        signal.setitimer(signal.ITIMER_PROF, _SECONDS + size / _SPEED)
        return np.asarray(array[()], order="C")

    def _array(self, name: str) -> h5py.Dataset:
        array = self._node(name)
        if not isinstance(array, h5py.Dataset):
            raise InputError(f"no dataset {name!r}")
        if array.external or array.is_virtual:
            raise InputError(f"{name} is stored in another file")
        if array.shape is None:
            raise InputError(f"{name} is empty")
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
                    f"{name} is a link to elsewhere, expected the values themselves"
                )
            node = node.get(part)
        return node

    def _claim(self, name: str, shape: tuple[int, ...], dtype: Any) -> int:
        """Count the bytes of what is to be read; refuse too many of them."""
        size = math.prod(shape) * dtype.itemsize
        self._left -= size
        if self._left < 0:
            raise InputError(
                f"{name} claims {size:,} bytes, in a file of {self._size:,}"
            )
        if size > (free := _available()):
            raise InputError(
                f"{name} needs {size:,} bytes of memory, {free:,} are free"
            )
        return size


def _available() -> int:
    """Bytes of memory that are free, as far as that is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    known = {line.partition(":")[0]: line.split()[1] for line in lines}
    return 1024 * int(known.get("MemAvailable", 2**52))
