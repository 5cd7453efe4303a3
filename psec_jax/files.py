"""Files written whole or not at all, and JSON read with one clear line on failure.

What is read may come from anybody: only regular files are opened, of a bounded size.
What is written replaces symbolic links and never goes through them.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psec_jax.errors import InputError

MAX_JSON = 2**26  # bytes of a JSON file
MAX_DEPTH = 64  # of lists and objects in one another
_LEFT = re.compile(
    r"\.(?P<name>.+)\.(?P<purpose>tmp|old|removed)-((?P<host>.+)-)?(?P<pid>\d+)",
    re.ASCII,
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_PIDS = range(1, 2**31)
# What a reader without permission to write meets when it tidies.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn an `OSError` in the body into `InputError("cannot ACTION: REASON")`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot {action}: {error.strerror or error}") from error


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write `content` beside `path`, then rename: readers never see half a file.

    Raises:
      InputError: the file cannot be written (full disk, permissions); an older file
        under that name stays as it was.
    """
    path = Path(path)
    temporary = beside(path, "tmp")
    data = content.encode() if isinstance(content, str) else content
    with reported(f"write {path}"):
        temporary.unlink(missing_ok=True)  # of a dead process that had our number
        try:
            with open(temporary, "xb", opener=opener) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def make_room(path: Path | str) -> None:
    """Make the folder of a file to come, before the work that fills it.

    Raises:
      InputError: the folder cannot be made, or `path` is a folder itself.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    with reported(f"make the folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused (`ValueError`)."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def opener(path: str, flags: int) -> int:
    """For `open`: refuses a symbolic link, and does not wait for the end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def regular_size(path: Path | str) -> int:
    """Bytes of a regular file, or of what a link to one holds.

    Raises:
      InputError: no such file, or a directory, pipe or device.
    """
    with reported(f"read {path}"):
        return _regular(path, os.stat(path))


def _regular(path: Path | str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    return status.st_size


def read_bytes(path: Path | str, limit: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
      path: the file, or a link to one.
      limit: refuse more bytes than this.

    Raises:
      InputError: the file is missing, not readable, no regular file or too large.
    """
    with reported(f"read {path}"):
        _regular(path, os.stat(path))  # opening a device may do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait
        try:
            size = _regular(path, os.fstat(handle))
        except InputError:
            os.close(handle)
            raise
        with open(handle, "rb") as file:
            if limit is not None and size > limit:
                raise InputError(f"{path}: {size} bytes, expected {limit} at most")
            return file.read(size)


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file is missing, not readable, or not a JSON object.
    """
    return parse_json(read_bytes(path, MAX_JSON), str(path))


def parse_json(data: bytes | str, source: str, finite: bool = True) -> dict[str, Any]:
    """The JSON object of a text.

    Args:
      data: the text.
      source: where it comes from, named in messages.
      finite: refuse NaN and infinity.

    Raises:
      InputError: not a JSON object, or lists and objects more than MAX_DEPTH deep.
    """
    number = _number if finite else float
    try:
        value = json.loads(data, parse_float=number, parse_constant=number)
        if _SURROGATE.search(data if isinstance(data, str) else data.decode("latin-1")):
            json.dumps(value, ensure_ascii=False).encode()  # half a character fails
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{source}: got {kind}, expected a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return value
    raise InputError(f"{source}: lists and objects more than {MAX_DEPTH} deep")


def _children(node: Any) -> list[Any]:
    inside = node.values() if isinstance(node, dict) else node
    return [child for child in inside if isinstance(child, (dict, list))]


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:32]} is no finite number")
    return number


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock file for the body; the lock dies with the process.

    Args:
      path: the lock file. It is made, but by a shared lock: without it there has been
        no writer, and nothing is held.
      shared: hold it with other readers, against writers.
      seconds: to wait for another process.

    Raises:
      InputError: the file cannot be made, or another process does not let go.
    """
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    try:
        handle = opener(str(path), flags)
    except OSError as error:
        if shared:
            yield
            return
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    end = time.monotonic() + seconds
    with open(handle):
        while True:
            try:
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise InputError(
                        f"{path.parent}: another process has been writing for "
                        f"{seconds:g} s; try again later"
                    ) from error
                time.sleep(0.01)
        yield


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, purpose: str) -> Path:
    """A hidden name beside a file or folder: ".NAME.PURPOSE-HOST-PID"."""
    return path.with_name(f".{path.name}.{purpose}-{platform.node()}-{os.getpid()}")


def replace_folder(temporary: Path, path: Path) -> None:
    """Put a finished folder in the place of `path`; an older one goes only then.

    Folders cannot be exchanged in one step portably, so the old one is renamed aside
    first; it comes back if the new one cannot take its place, and by `recover` if the
    process dies in between.
    """
    aside = beside(path, "old")
    had_old = os.path.lexists(path)
    if had_old:
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if had_old:
            os.rename(aside, path)
        raise
    sync_folder(path.parent)
    if had_old:
        _discard(aside)


def remove_folder(path: Path) -> None:
    """Remove a folder; its name is gone first, so that no half of it is ever seen.

    Of a symbolic link the link is removed, and what it names stays.
    """
    aside = beside(path, "removed")
    os.rename(path, aside)
    _discard(aside)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def left_over(parent: Path) -> list[Path]:
    """What processes that are dead now left in a folder while they wrote.

    Raises:
      InputError: the folder cannot be read.
    """
    with reported(f"read {parent}"):
        return [left for left in parent.iterdir() if _state(left) is not None]


def recover(parent: Path) -> None:
    """Undo what dead processes left behind while they wrote, replaced or removed.

    What cannot be changed without permission to write stays as it is.
    """
    for left in left_over(parent):
        lost = _state(left)
        # Another process may tidy at the same time.
        with reported(f"tidy {left}"), contextlib.suppress(FileNotFoundError):
            try:
                if lost is None:
                    continue
                if lost:
                    os.rename(left, _lost_name(left))
                else:
                    _discard(left)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise


def _lost_name(left: Path) -> Path:
    return left.with_name(_LEFT.sub(r"\g<name>", left.name))


def _state(left: Path) -> bool | None:
    """True for an entry that lost its name, False for rubbish, None for the rest."""
    match = _LEFT.fullmatch(left.name)
    if match is None or len(match["pid"]) > 10 or int(match["pid"]) not in _PIDS:
        return None
    lost = match["purpose"] == "old" and not os.path.lexists(_lost_name(left))
    # What a process of another host may still write stays.
    ours = match["host"] in (None, platform.node())
    if not (lost or ours) or (ours and _alive(int(match["pid"]))):
        return None
    return lost


def _alive(pid: int) -> bool:
    # Our own number was used by an earlier process: in a container it often is.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
