"""A served policy: robots of their own, bad messages, tokens, the end by a signal."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from shell import call

from psec_jax.errors import InputError
from psec_jax.policy import compose

msgpack = pytest.importorskip("msgpack", reason="needs the extra serve")
pytest.importorskip("websockets", reason="needs the extra serve")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from psec_jax import serving  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKEN = "a token of tests only"
S, A = tiny.OBS_DIM, tiny.ACTION_DIM
OBS = np.random.default_rng(0).standard_normal((5, S)).astype(np.float32)


def start(library, *flags, **environment):
    """The command in a process of its own, and where it listens."""
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "launch.serve"]
        + [f"--library={library}", "--gate=linear", "--port=0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=EXAMPLES.parent,
        env=os.environ | environment,
    )
    line = server.stdout.readline()
    if not line:
        pytest.fail(server.communicate()[1])
    return server, re.search(r"ws://\S+", line)[0]


def end(server, signum):
    server.send_signal(signum)
    _, err = server.communicate(timeout=30)
    return server.returncode, err


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(f"{TOKEN}\n")
    server, url = start(made, f"--token_file={path}", "--max_batch=4")
    yield url
    code, err = end(server, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert err == "stopped by SIGTERM; every connection was closed\n"


def shown(token):
    return {"Authorization": f"Bearer {token}"}


@contextlib.contextmanager
def robot(url, token=TOKEN):
    with connect(url, additional_headers=shown(token)) as connection:
        connection.about = msgpack.unpackb(connection.recv())
        yield connection


def said(connection, message):
    connection.send(message if isinstance(message, bytes | str) else pack(message))
    return msgpack.unpackb(connection.recv())


pack = msgpack.packb


def action(connection, obs):
    reply = said(connection, {"obs": serving.encode(obs)})
    assert "error" not in reply, reply
    return serving.decode(reply["action"], "action"), reply["step"]


def actions(connection, seed):
    assert said(connection, {"seed": seed}) == {"seed": seed}
    found = [action(connection, obs) for obs in OBS]
    assert [step for _, step in found] == list(range(len(OBS)))
    return np.stack([numbers for numbers, _ in found])


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_actions_are_the_policys(made, served, seed):
    acting = compose(made, gate="linear")
    with robot(served) as connection:
        got = actions(connection, seed)
    key = jax.random.key(seed)
    for step, obs in enumerate(OBS):
        expected = acting.act(jax.random.fold_in(key, step), obs)
        np.testing.assert_allclose(got[step], expected, atol=1e-6)


def test_a_connection_depends_on_its_own_messages_alone(served):
    with robot(served) as first:
        expected = {seed: actions(first, seed) for seed in (0, 1)}
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    found = {}

    def play(number):
        with robot(served) as mine:
            found[number] = [actions(mine, number % 2) for _ in range(3)]

    threads = [threading.Thread(target=play, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    with robot(served) as rude:
        rude.send(b"\xc1")
        rude.send(pack({"obs": serving.encode(OBS[0])}))
        rude.socket.close()  # in the middle
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(6))
    for number, repeats in found.items():
        for got in repeats:  # batches of other sizes round differently
            np.testing.assert_allclose(got, expected[number % 2], atol=1e-5)


def array(**changes):
    return {"obs": serving.encode(OBS[0]) | changes}


BAD = {
    "text": ("hello", "message: got text, expected msgpack"),
    "nothing": (b"", "message: not msgpack"),
    "garbage": (b"\xc1\xff\x00", "message: not msgpack"),
    "more behind it": (pack({"seed": 1}) + b"\x00", "message: not msgpack"),
    "huge list": (b"\xdd\xff\xff\xff\xff", "message: not msgpack"),
    "deep": (b"\x91" * 10_000 + b"\x00", "message: not msgpack"),
    "extension": (pack(msgpack.ExtType(1, b"x")), "an extension of type 1"),
    "a list": (pack([1]), "message: got a list, expected a map"),
    "empty": ({}, "message: got nothing, expected obs or seed"),
    "unknown": ({"act\x1b": 1}, r"message: got act\x1b, expected obs or seed"),
    "seed": ({"seed": -1}, "seed: got -1, expected a number from 0"),
    "true": ({"seed": True}, "seed: got a bool, expected a number"),
    "no array": ({"obs": [0.0, 1.0]}, "obs: expected an array, {dtype, shape, data}"),
    "more": (array(more=1), "obs: expected an array, {dtype, shape, data}"),
    "object": (array(dtype="O"), "of float32, float64, int32, int64, got a str"),
    "no type": (array(dtype=["float32"]), "of float32, float64, int32, int64"),
    "negative": (array(shape=[-1]), "got shape a list"),
    "dimensions": (array(shape=[1] * 33), "of at most 4 dimensions"),
    "size": (array(shape=[2**20] * 4), "got 12 bytes"),
    "short": (array(data=b"1234"), "of 12 bytes, got 4 bytes"),
    "not bytes": (array(data="1234"), "of 12 bytes, got a str"),
    "batch": ({"obs": serving.encode(OBS)}, "obs: got 2 dimensions, expected one"),
    "other robot": ({"obs": serving.encode(OBS[0, :2])}, "observations have 2 numbers"),
    "NaN": ({"obs": serving.encode(OBS[0] * np.nan)}, "hold 3 NaN or infinite of 3"),
    "too large": ({"obs": serving.encode(OBS[0] * 1e38)}, "too large for the policy"),
}


def test_bad_messages_are_replied_to(served):
    with robot(served) as connection:
        before = actions(connection, 3)
        assert said(connection, {"seed": 3}) == {"seed": 3}
        for message, expected in BAD.values():
            reply = said(connection, message)
            assert reply.keys() == {"error"} and expected in reply["error"]
            assert "\n" not in reply["error"] and reply["error"].isprintable()
        got = [action(connection, obs)[0] for obs in OBS]
    np.testing.assert_allclose(got, before, atol=1e-6)  # they used no noise


def test_a_message_that_is_too_large_ends_its_connection_alone(served):
    with robot(served) as other:
        before = actions(other, 1)
        with robot(served) as connection, pytest.raises(ConnectionClosed, match="1009"):
            connection.send(b"\x00" * (serving.MAX_BYTES + 1))
            connection.recv()
        host, port = served.removeprefix("ws://").split(":")
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(b"\xff\x00garbage\r\n\r\n" * 100)
        np.testing.assert_allclose(actions(other, 1), before, atol=1e-6)


def test_a_token_is_needed(served):
    for token in ("", "another token", TOKEN + "x"):
        with pytest.raises(InvalidStatus, match="401"), robot(served, token):
            pass
    with pytest.raises(InvalidStatus, match="401"), connect(served):
        pass
    page = {"additional_headers": shown(TOKEN), "origin": "http://127.0.0.1"}
    with pytest.raises(InvalidStatus, match="403"), connect(served, **page):
        pass


def test_health(served):
    with urllib.request.urlopen(f"{served.replace('ws', 'http')}/health") as reply:
        assert reply.status == 200
        about = json.load(reply)
    assert about["base"]["name"] == "stand" and about["gate"]["name"] == "linear"
    with robot(served) as connection:
        assert connection.about == about
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served.replace('ws', 'http')}/other")


def test_the_example_and_ctrl_c_with_a_robot_connected(made):
    server, url = start(made)
    example = [sys.executable, "-W", "error", EXAMPLES / "client.py", url]
    ran = subprocess.run(example, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 3
    with robot(url) as connection:
        actions(connection, 0)
        code, err = end(server, signal.SIGINT)
        with pytest.raises(ConnectionClosed, match="1001"):
            connection.recv()
    assert code == 128 + signal.SIGINT and err.startswith("stopped by SIGINT")
    numbers = re.findall(r"[-\d.e]+", ran.stdout)
    assert len(numbers) == 3 * A and all(abs(float(x)) <= 1 for x in numbers)


REFUSED = {
    "open host": (["--host=0.0.0.0"], "may be reached from other machines"),
    "name": (["--host=example.org"], "may be reached from other machines"),
    "empty token": (["--token_file=empty"], "got 0 characters"),
    "short token": (["--token_file=short"], "16 or more printable ASCII characters"),
    "no token file": (["--token_file=none"], "cannot read none"),
    "no weights": (["--skills=walk,run"], "one alpha for each of them"),
    "port": (["--port=70000"], "port"),
    "batch": (["--max_batch=0"], "max_batch"),
    "library": (["--library=none"], "none is not a skill library"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(made, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSEC_TOKEN", raising=False)
    Path("empty").touch()
    Path("short").write_text("secret\n")
    flags, message = REFUSED[case]
    answer = call("launch.serve", f"--library={made}", *flags)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert "secret" not in answer.err


def test_a_port_in_use(made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call("launch.serve", f"--library={made}", f"--port={port}")
    assert answer.code == 2
    assert f"error: cannot listen at 127.0.0.1:{port}: " in answer.err


@pytest.mark.parametrize("dtype", serving.DTYPES)
def test_arrays_there_and_back(dtype):
    for shape in ((), (0,), (3,), (2, 1, 4)):
        array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        got = serving.decode(serving.encode(array.T), "x")
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, array.T)
    with pytest.raises(InputError, match="type object, expected float32"):
        serving.encode([None])
