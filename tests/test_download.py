"""Downloads from a server of this process, whole, cut off, resumed and wrong."""

import contextlib
import http.server
import os
import re
import socket
import threading
from pathlib import Path

import pytest

from psec_jax.data import download
from psec_jax.errors import InputError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.ThreadingHTTPServer):
    """Answers every path alike; the attributes say how.

    Attributes:
      content: of the file.
      tag: its ETag, None for none.
      ranges: whether ranges are understood.
      length: whether Content-Length is told.
      kind: Content-Type.
      status: an error to answer instead.
      cut: bytes after which the connection breaks, None for never.
      asked: (path, Range) of each request.
    """

    def __init__(self, **how):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.ranges, self.length = CONTENT, '"one"', True, True
        self.kind, self.status, self.cut, self.asked = (
            "application/x-hdf5",
            200,
            None,
            [],
        )
        vars(self).update(how)

    def url(self, name="set.hdf5"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One answer."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        same = self.headers.get("If-Range", server.tag) == server.tag
        if asked and server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        size = len(server.content)
        if start and start >= size:
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.kind)
        if server.tag:
            self.send_header("ETag", server.tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.length:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may not want it all
            self.wfile.write(server.content[start : server.cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server; all are stopped at the end."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.ExitStack() as stack:

        def start(**how):
            server = stack.enter_context(Server(**how))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "set.hdf5"


def left(target):
    """Visible files, and bytes of the partial ones."""
    names = sorted(os.listdir(target.parent))
    parts = [target.parent / name for name in names if name.endswith(".part")]
    return [n for n in names if n[0] != "."], [p.stat().st_size for p in parts]


def refused(words, urls, target, **options):
    with pytest.raises(InputError, match=words) as told:
        download.fetch(urls, target, **options)
    assert "\n" not in str(told.value)
    assert f"put {target.name} into {target.parent} by hand" in str(told.value)
    assert not target.exists()


def test_whole(serve, target):
    server, lines = serve(), []
    path = download.fetch([server.url()], target, report=lines.append)
    assert path == target and target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["set.hdf5"]
    assert lines[0] == f"downloading {server.url()}, 1.0 MB"
    assert lines[-1] == "downloaded 100 %"
    # A second time nothing is asked.
    assert download.fetch([server.url()], target) == target
    assert server.asked == [("/set.hdf5", None)]


@pytest.mark.parametrize("tag", ['"one"', 'W/"one"', None])
def test_cut_off_and_resumed(serve, target, tag):
    server, lines = serve(cut=300_000, tag=tag), []
    refused("connection broke after 300000 of 1048576", [server.url()], target)
    assert left(target) == ([], [300_000])
    server.cut = None
    download.fetch([server.url()], target, report=lines.append)
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["set.hdf5"]
    assert server.asked[-1] == ("/set.hdf5", "bytes=300000-")
    assert lines[0].endswith("from byte 300000")


def test_cut_off_twice(serve, target):
    server = serve(cut=300_000)
    refused("broke after 300000", [server.url()], target)
    server.cut = 700_000
    refused("broke after 700000", [server.url()], target)
    server.cut = None
    download.fetch([server.url()], target)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [
        None,
        "bytes=300000-",
        "bytes=700000-",
    ]


def test_server_without_ranges_starts_again(serve, target):
    server = serve(cut=300_000, ranges=False)
    refused("broke after 300000", [server.url()], target)
    server.cut = None
    download.fetch([server.url()], target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("tags", [('"one"', '"two"'), (None, None)])
@pytest.mark.parametrize("other", [CONTENT[::-1] + b"more", b"short"])
def test_changed_file_starts_again(serve, target, tags, other):
    server = serve(cut=300_000, tag=tags[0])
    refused("broke after 300000", [server.url()], target)
    server.content, server.tag, server.cut = other, tags[1], None
    download.fetch([server.url()], target)
    assert target.read_bytes() == other


def test_whole_but_not_yet_in_place(serve, target, monkeypatch):
    server, replace = serve(), os.replace

    def failing(source, to):
        if Path(to) == target:
            raise OSError(28, "No space left on device")
        replace(source, to)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match="No space left"):
        download.fetch([server.url()], target)
    monkeypatch.undo()
    download.fetch([server.url()], target)
    assert target.read_bytes() == CONTENT and len(server.asked) == 1


def test_partial_without_a_record_is_not_trusted(serve, target):
    server = serve(cut=300_000)
    refused("broke after", [server.url()], target)
    [record] = target.parent.glob(".*.json")
    record.unlink()
    server.cut = None
    download.fetch([server.url()], target)
    assert target.read_bytes() == CONTENT and server.asked[-1][1] is None


def test_mirrors_in_order(serve, target):
    gone, page, good, never = (
        serve(status=404),
        serve(kind="text/html"),
        serve(),
        serve(),
    )
    urls = [s.url() for s in (gone, page, good, never)]
    download.fetch(urls, target)
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["set.hdf5"]
    assert len(gone.asked) == len(page.asked) == 1 and not never.asked


def test_a_mirror_keeps_its_own_part(serve, target):
    broken, gone = serve(cut=300_000), serve(status=503)
    refused(
        "broke after 300000 .*; http://.*: answers 503",
        [broken.url(), gone.url()],
        target,
    )
    gone.status = 200
    broken.status = 404
    download.fetch([broken.url(), gone.url()], target)
    assert target.read_bytes() == CONTENT and gone.asked[-1][1] is None
    assert os.listdir(target.parent) == ["set.hdf5"]


@pytest.mark.parametrize(
    ("how", "size", "words"),
    [
        ({"status": 404}, None, "answers 404 Not Found"),
        ({"kind": "text/html; charset=utf-8"}, None, "answers with a web page"),
        ({}, 1000, "has a file of 1048576 bytes, expected 1000"),
        ({"length": False}, 1000, "gives more than the 1000 bytes"),
        ({"length": False}, 2_000_000, "broke after 1048576 of 2000000"),
    ],
)
def test_wrong_answers(serve, target, how, size, words):
    refused(words, [serve(**how).url()], target, size=size)


def test_unknown_length_and_right_size(serve, target):
    download.fetch([serve(length=False).url()], target, size=len(CONTENT))
    assert target.read_bytes() == CONTENT


def test_check_comes_before_the_place(serve, target):
    server, seen = serve(), []

    def check(path):
        assert not target.exists()
        seen.append(path.read_bytes())
        raise InputError(f"{path}: not HDF5")

    refused("gives something else: not HDF5", [server.url()], target, check=check)
    assert seen == [CONTENT] and left(target) == ([], [])
    download.fetch([server.url()], target, check=lambda path: None)
    assert target.read_bytes() == CONTENT


def test_nobody_answers(target, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set.hdf5"
    refused("Connection refused", [url], target)
    refused("by hand, or make it with X", [url], target, hint="make it with X")
    refused("no address is known", [], target)


def test_offline_asks_nobody(serve, target):
    server = serve()
    refused("no such file, and offline", [server.url()], target, offline=True)
    assert not server.asked and not target.parent.exists()
    download.fetch([server.url()], target)
    assert download.fetch([server.url()], target, offline=True) == target


def test_two_at_once(serve, target):
    server = serve()
    target.parent.mkdir()
    with (
        download._locked(target),
        pytest.raises(InputError, match="another process is downloading it"),
    ):
        download.fetch([server.url()], target)
    assert not server.asked


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make the folder"):
        download.fetch(["http://127.0.0.1:1/x"], tmp_path / "file" / "x")
