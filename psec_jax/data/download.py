"""Download of one file: resumed, checked, put in place whole or not at all."""

import contextlib
import fcntl
import hashlib
import http
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from psec_jax.errors import InputError
from psec_jax.files import opener, read_json, reported, write_json

TIMEOUT = 30.0  # seconds without an answer or a byte
CHUNK = 1 << 20
FAILURES = (OSError, http.client.HTTPException)

Report = Callable[[str], None]


class _Failed(Exception):
    """This address did not give the file; another may."""


class _Version(NamedTuple):
    """One version of the file at an address.

    Attributes:
      mark: the server's own name for it; empty without one.
      size: its bytes, None where the server does not say.
    """

    mark: str = ""
    size: int | None = None


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    size: int | None = None,
    check: Callable[[Path], object] | None = None,
    offline: bool = False,
    hint: str = "",
    report: Report | None = None,
) -> Path:
    """The file at `target`, downloaded if it is not there.

    Addresses are tried in order. What arrives goes to a hidden file beside the target,
    one for each address, which is kept when the connection breaks: the next call goes
    on where it ended, if the server can and still has the same version.

    Args:
      urls: the addresses of one and the same file.
      target: where it belongs; its folder is made.
      size: its bytes, where known.
      check: called with the downloaded file before it takes its place; it raises
        InputError for one that is not what it should be, which is then deleted.
      offline: never use the network.
      hint: what else the user can do, added to every refusal.
      report: called with a line when a download begins and with each tenth of it.

    Raises:
      InputError: no address gives the file, it cannot be written, another process is
        downloading it, or it is missing and `offline`.
    """
    if target.is_file():
        return target
    ways = f"put {target.name} into {target.parent} by hand"
    ways += f", or {hint}" if hint else ""
    if offline:
        raise InputError(f"{target}: no such file, and offline; {ways}")
    with reported(f"make the folder {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    with _locked(target) as lock:
        if target.is_file():  # by a process that held the lock until now
            return target
        for url in urls:
            partial = _partial(target, url)
            try:
                _complete(url, partial, size, report)
                _check(partial, check)
            except _Failed as error:
                problems.append(f"{url}: {' '.join(str(error).split())}")
                continue
            with reported(f"write {target}"):
                os.replace(partial, target)
            for other in urls:
                _forget(_partial(target, other))
            lock.unlink(missing_ok=True)
            return target
    told = "; ".join(problems) or "no address is known"
    raise InputError(f"{target.name} cannot be downloaded ({told}); {ways}")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """Keep other processes from the same download; the lock dies with the process."""
    path = target.with_name(f".{target.name}.lock")
    with reported(f"write {path}"):
        handle = open(path, "a", opener=opener)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{target}: another process is downloading it") from error
        yield path


def _partial(target: Path, url: str) -> Path:
    """The hidden file for what comes from one address."""
    mark = hashlib.sha256(url.encode()).hexdigest()[:8]
    return target.with_name(f".{target.name}.{mark}.part")


def _record(partial: Path) -> Path:
    """The file beside a partial one that says of what it is a part."""
    return partial.with_suffix(".json")


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _record(partial).unlink(missing_ok=True)


def _kept(partial: Path) -> tuple[int, _Version]:
    """How many bytes are there, and of what; none where that cannot be told."""
    if not partial.is_file() or not _record(partial).is_file():
        _forget(partial)
        return 0, _Version()
    record = read_json(_record(partial))
    mark, whole = record.get("mark"), record.get("size")
    if not isinstance(mark, str) or not (whole is None or type(whole) is int):
        _forget(partial)
        return 0, _Version()
    version = _Version(mark, whole)
    have = partial.stat().st_size
    if version.size is not None and have > version.size:
        _forget(partial)
        return 0, _Version()
    return have, version


def _check(partial: Path, check: Callable[[Path], object] | None) -> None:
    if check is None:
        return
    try:
        check(partial)
    except InputError as error:
        _forget(partial)
        reason = str(error).removeprefix(f"{partial}: ")
        raise _Failed(f"gives something else: {reason}") from error


def _complete(url: str, partial: Path, size: int | None, report: Report | None) -> None:
    """Make `partial` the whole file of an address, from where it is now.

    Raises:
      _Failed: it is not whole yet.
      InputError: it cannot be written.
    """
    have, before = _kept(partial)
    if have and have == before.size:
        return  # the process ended before it was put in place
    answer = _ask(url, have, before.mark)
    if answer is None:
        _forget(partial)
        return _complete(url, partial, size, report)
    with answer:
        start, version = _described(answer, have)
        if start and version.size != before.size:
            _forget(partial)
            return _complete(url, partial, size, report)
        if size is not None and version.size not in (None, size):
            raise _Failed(f"has a file of {version.size} bytes, expected {size}")
        _check_space(partial, url, version.size, start)
        write_json(_record(partial), version._asdict())
        whole = version.size if version.size is not None else size
        have = _receive(answer, partial, start, _tenths(url, start, whole, report))
    if whole is not None and have > whole:
        _forget(partial)
        raise _Failed(f"gives more than the {whole} bytes expected")
    if whole is not None and have < whole:
        raise _Failed(
            f"the connection broke after {have} of {whole} bytes, which are kept: the "
            "same command goes on from there"
        )


def _check_space(partial: Path, url: str, size: int | None, have: int) -> None:
    """Refuse a file that the disk has no room for, before it is fetched."""
    free = shutil.disk_usage(partial.parent).free
    if size is not None and size - have > free:
        raise InputError(
            f"cannot write {partial}: {url} has {size - have:,} bytes more, {free:,} "
            "are free"
        )


def _ask(url: str, have: int, mark: str) -> http.client.HTTPResponse | None:
    """The answer to a request for byte `have` and on; None where there is no such."""
    request = urllib.request.Request(url, headers={"User-Agent": "psec_jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if mark:  # another version is sent whole
            request.add_header("If-Range", mark)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise _Failed(f"answers {error.code} {error.reason}") from error
    except FAILURES as error:
        raise _Failed(_reason(error)) from error


def _described(answer: http.client.HTTPResponse, have: int) -> tuple[int, _Version]:
    """The byte at which an answer begins, and of what version of the file it is."""
    if answer.headers.get_content_type() == "text/html":
        raise _Failed("answers with a web page, not with a file")
    mark = answer.headers.get("ETag", "")
    if not mark or mark.startswith("W/"):  # a weak one may not ask for a range
        mark = answer.headers.get("Last-Modified", "")
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, _Version(mark, answer.length)
    told = answer.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told)
    if match is None or int(match[1]) != have:
        raise _Failed(f"gives the range {told!r}, asked for byte {have} and on")
    return have, _Version(mark, int(match[2]))


def _receive(
    answer: http.client.HTTPResponse,
    partial: Path,
    start: int,
    progress: Callable[[int], None],
) -> int:
    """Write what arrives to the partial file from byte `start`; its bytes then."""
    have = start
    with reported(f"write {partial}"):
        file = open(partial, "ab" if start else "wb", opener=opener)
    with file:
        while chunk := _read(answer):
            with reported(f"write {partial}"):
                file.write(chunk)
                file.flush()
            have += len(chunk)
            progress(have)
        with reported(f"write {partial}"):
            os.fsync(file.fileno())
    return have


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(CHUNK)
    except FAILURES as error:
        raise _Failed(
            f"the connection broke ({_reason(error)}); what came is kept: the same "
            "command goes on from there"
        ) from error


def _tenths(
    url: str, start: int, whole: int | None, report: Report | None
) -> Callable[[int], None]:
    """What to call with the bytes that are there, to report each tenth of all."""
    if report is None:
        return lambda have: None
    size = "of unknown size" if whole is None else f"{whole / 1e6:.1f} MB"
    report(f"downloading {url}, {size}{f', from byte {start}' if start else ''}")
    told = 10 * start // whole if whole else 0

    def progress(have: int) -> None:
        nonlocal told
        if whole and (now := 10 * have // whole) > told:
            told = now
            report(f"downloaded {10 * now} %")

    return progress


def _reason(error: BaseException) -> str:
    """What a network error says, without its wrapping."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
