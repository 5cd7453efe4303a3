"""Files written whole or not at all, and JSON read with one clear line on failure."""

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psec_jax.errors import InputError

_LEFT = re.compile(
    r"\.(?P<name>.+)\.(?P<purpose>tmp|old|removed)-((?P<host>.+)-)?(?P<pid>\d+)"
)


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
        try:
            with open(temporary, "wb") as file:
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


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file is missing, unreadable, or not a JSON object.
    """
    with reported(f"read {path}"):
        data = Path(path).read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


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
    had_old = path.exists()
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
        shutil.rmtree(aside)


def remove_folder(path: Path) -> None:
    """Remove a folder; its name is gone first, so that no half of it is ever seen."""
    aside = beside(path, "removed")
    os.rename(path, aside)
    shutil.rmtree(aside)


def recover(parent: Path) -> None:
    """Undo what dead processes left behind while they wrote, replaced or removed."""
    for left in parent.iterdir():
        match = _LEFT.fullmatch(left.name)
        if match is None:
            continue
        path = parent / match["name"]
        lost = match["purpose"] == "old" and not path.exists()
        # Processes of another host cannot be asked; what they may still write stays.
        ours = match["host"] in (None, platform.node())
        if not (lost or ours) or (ours and _alive(int(match["pid"]))):
            continue
        # Another process may tidy at the same time.
        with reported(f"tidy {left}"), contextlib.suppress(FileNotFoundError):
            if lost:
                os.rename(left, path)
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _alive(pid: int) -> bool:
    # Our own number was that of an earlier process: in a container it often is.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
