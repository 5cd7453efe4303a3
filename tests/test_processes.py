"""Several processes of one program: the numbers of one, and clear ends of meetings."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import stages
import tiny
from shell import call
from test_many_seeds import FLAGS, ROOT, config, demonstrations
from tiny_env import SPEC

from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.files import read_json
from psec_jax.library import SkillLibrary
from psec_jax.runtime import processes

ONE_DEVICE = " --xla_force_host_platform_device_count=1"
SECONDS = 400  # at most, for what takes some twenty


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(folder, port, *arguments, own=((), ())):
    """Two processes of launch.pretrain, one device each; `own` arguments of each."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + ONE_DEVICE,
    }
    command = [sys.executable, "-m", "launch.pretrain", *FLAGS, *arguments]
    command += [f"--coordinator=localhost:{port}", "--processes=2"]
    return [
        subprocess.Popen(
            [*command, f"--process={i}", *own[i]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ends(processes):
    """What they printed, and their exit codes."""
    try:
        texts = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()  # JAX keeps SIGTERM to itself
    return texts, [process.returncode for process in processes]


def test_two_processes_are_one_program(tmp_path, monkeypatch, port):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    d4rl.save("a.hdf5", demonstrations(10, 0), {})
    flags = ("--workdir=w", "--library=l", "--data=a.hdf5", f"--env={SPEC}", "--seed=4")
    # A batch is drawn in parts, from a file; the one process has all in memory.
    texts, codes = ends(start(tmp_path, port, *flags, "--stream=yes"))
    assert codes == [0, 0], texts
    told = [text.splitlines()[-1] for text, _ in texts]  # Gloo prints before
    assert told[0].startswith("base 'base' is in l; return ")
    assert "base" not in told[1], "the first one tells"
    stages.pretrain(
        config(),
        workdir="one_w",
        library="one_l",
        seed=4,
        data="a.hdf5",
        env=SPEC,
        evaluate=False,
    )
    left, right = (SkillLibrary.open(name).load_base()[0] for name in ("l", "one_l"))
    tiny.assert_trees_close(left, right, atol=2e-5, rtol=1e-4)
    assert sorted(p.name for p in Path("w/checkpoints").iterdir()) == ["2", "3"]
    assert np.isfinite(read_json("w/result.json")["returns"]["mean"])
    # What two began, one can go on with.
    Path("w/result.json").unlink()
    result = stages.pretrain(
        config(),
        workdir="w",
        library="l",
        seed=4,
        data="a.hdf5",
        env=SPEC,
        evaluate=False,
    )
    assert result["summary"]["resumed_at"] == 3


def meet(*told):
    """What each of some processes, told (count, index), is refused with."""
    refused = [None] * len(told)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]

    def go(i, count, index):
        try:
            processes.connect(f"localhost:{port}", count, index, timeout=2)
        except InputError as error:
            refused[i] = str(error)

    threads = [
        threading.Thread(target=go, args=(i, *numbers))
        for i, numbers in enumerate(told)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


def test_meetings_that_fail():
    """All end before JAX is asked to connect anything."""
    assert "2 of 3 processes came in time" in meet((3, 0), (3, 1))[0]
    assert "cannot be reached" in meet((2, 1))[0]
    with socket.create_server(("", 0)) as server:
        taken = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"{taken}: cannot listen there: "):
            processes.connect(taken, 2, 0, timeout=1)
    for refused in meet((2, 0), (3, 1)):
        assert "processes: one was told 3, the first 2" in refused
    for refused in meet((3, 0), (3, 1), (3, 1)):
        assert "process: two were told 1" in refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here:1", 2, None), "not all were given"),
        ((None, 2, 0), "not all were given"),
        (("here", 2, 0), "got 'here', expected HOST:PORT"),
        (("here:x", 2, 0), "got 'here:x', expected HOST:PORT"),
        (("here:1", 2, 2), "process: got 2, expected 0 to 1"),
        (("here:1", 2, -1), "process: got -1, expected 0 to 1"),
        (("here:1", 0, 0), "processes: got 0, expected 1 or more"),
        (("here:65536", 2, 0), "got 'here:65536', expected HOST:PORT"),
        ((":1", 2, 0), "got ':1', expected HOST:PORT"),
    ],
)
def test_bad_numbers(given, message):
    with pytest.raises(InputError) as caught:
        processes.connect(*given, timeout=1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "not all were given; they go together"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=1"],
            "coordinator localhost:1: cannot be reached: ",
        ),
    ],
)
def test_a_command_that_meets_nobody_ends_in_one_line(
    tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    more = ("--workdir=w", "--library=l", "--peer_seconds=1", *flags)
    answer = call("launch.pretrain", *FLAGS, *more)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert message in answer.err
    assert not (tmp_path / "w").exists()


def test_a_signal_to_one_stops_and_saves_both(tmp_path, monkeypatch, port):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    d4rl.save("a.hdf5", demonstrations(10, 0), {})
    flags = ("--workdir=w", "--library=l", "--data=a.hdf5", "--noevaluate")
    processes = start(tmp_path, port, *flags, "--config.base.steps=1000000")
    metrics, waited = Path("w/metrics.jsonl"), time.monotonic()
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() - waited < SECONDS
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    texts, codes = ends(processes)
    assert codes == [143, 143], texts
    stopped = texts[1][1].splitlines()[-1]
    step = re.search(
        r"stopped by SIGTERM at step (\d+); last good save: step \1;", stopped
    )
    assert step, stopped
    assert Path("w/checkpoints", step[1]).is_dir() and stopped in texts[0][1]


def test_one_that_fails_alone_does_not_wait_for_the_others(tmp_path, port):
    """The other one waits for it; JAX ends that one some 100 seconds later."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    d4rl.save(tmp_path / "a.hdf5", demonstrations(10, 0), {})
    flags = ("--workdir=w", "--library=l", "--noevaluate")
    own = (("--data=a.hdf5",), ("--data=missing.hdf5",))
    first, second = start(tmp_path, port, *flags, own=own)
    try:
        _, told = second.communicate(timeout=SECONDS)
        assert first.poll() is None, "it waits for the second one"
    finally:
        first.kill()
        second.kill()
        first.communicate()
    assert second.returncode == 2
    assert told.splitlines()[-1].startswith("error: ") and "missing.hdf5" in told


def test_processes_that_fail_alike_end_alike(tmp_path, port):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    flags = ("--workdir=w", "--library=l", "--data=missing.hdf5")
    texts, codes = ends(start(tmp_path, port, *flags))
    assert codes == [2, 2], texts
    for _, told in texts:
        assert told.splitlines()[-1].startswith("error: "), told
