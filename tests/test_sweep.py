"""Sweeps: how they are written, what runs, what is kept; here and as SLURM sees it."""

import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import submitit  # noqa: F401  its log keeps the streams that it finds when imported
from shell import call

from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.types import Dataset

ROOT = Path(__file__).parents[1]
KEYS = {"seed", "env", "config", "skill.rank", "skill.env", "gate.widths"}
WAIT_SECONDS = 300
TINY = """
    --config.network.width=8 --config.network.blocks=1 --config.base.episodes=0
    --config.base.batch_size=4 --config.evaluation.episodes=1
    --config.run.save_every=1000000 --noevaluate --data=demos.hdf5
""".split()


@pytest.fixture(scope="module", autouse=True)
def sweep():
    """The module, without the stages' flags among those of other tests' commands."""
    from absl import flags
    from absl.testing import flagsaver

    saved = flagsaver.save_flag_values()
    from launch import sweep

    flagsaver.restore_flag_values(saved)
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        del sys.modules[name]
    assert "seed" not in flags.FLAGS
    return sweep


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with demonstrations of two tiny trajectories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    one_device = " --xla_force_host_platform_device_count=1"  # as a user has
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + one_device)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    steps, generator = 6, np.random.default_rng(0)
    ends = np.arange(steps) % 3 == 2
    demos = Dataset(
        obs=generator.normal(size=(steps, 3)).astype(np.float32),
        action=generator.uniform(-1, 1, size=(steps, 2)).astype(np.float32),
        reward=np.ones(steps, np.float32),
        cost=np.zeros(steps, np.float32),
        next_obs=generator.normal(size=(steps, 3)).astype(np.float32),
        terminal=np.zeros(steps, bool),
        timeout=ends,
    )
    d4rl.save("demos.hdf5", demos, {})
    yield tmp_path
    for pid in writers(tmp_path):  # left by a test that failed half-way
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def background(*command):
    """A process that is ended, at the latest, with the test."""
    # Where a shell started the tests in its background, SIGINT is ignored, and children
    # would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # runs it left behind hold the other end open


def until(happened, process=None):
    """Wait for something to be true."""
    end = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def holds(path, text):
    return path.exists() and text in path.read_text()


def arguments(steps, *more, stage="pretrain"):
    fixed = (f"--stage={stage}", "--workdir=sweep", *TINY)
    return (*fixed, f"--config.base.steps={steps}", *more)


def rows():
    with open("sweep/results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["seed:0..3"], {"seed": ["0", "1", "2", "3"]}),
        (["seed:-1..0"], {"seed": ["-1", "0"]}),
        (
            ["seed:0..1,skill.rank:4,8,16"],
            {"seed": ["0", "1"], "skill.rank": ["4", "8", "16"]},
        ),
        (["seed:7", "config.skill.rank:4"], {"seed": ["7"], "skill.rank": ["4"]}),
        (["seed:0..1,5"], {"seed": ["0", "1", "5"]}),
        (
            ["env:gymnasium:A-v0,dm_control:b-c,seed:1"],
            {"env": ["gymnasium:A-v0", "dm_control:b-c"], "seed": ["1"]},
        ),
        (["config:a.py:x,b/c.py:y"], {"config": ["a.py:x", "b/c.py:y"]}),
        (["gate.widths:(3,4),(5,6)"], {"gate.widths": ["(3,4)", "(5,6)"]}),
    ],
)
def test_axes(sweep, texts, expected):
    assert sweep.axes(texts, KEYS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got '', expected KEY:VALUE"),
        ("seed", "got 'seed', expected KEY:VALUE"),
        ("seed:", "seed has a value that is empty"),
        ("seed:1,,2", "seed has a value that is empty"),
        ("seed:3..1", "expected FIRST..LAST, rising"),
        ("seed:0..99999999999", "of at most 1000 values"),
        ("seed:0..2,2", "seed has a value twice: 0,1,2,2"),
        ("seed:0,seed:1", "seed is given twice"),
        ("seed:0,config.seed:1", "seed is given twice"),
        ("rank:4,8", "'rank'; did you mean skill.rank?"),
        ("seed:0,skil.rank:4", "'skil.rank'; did you mean skill.rank"),
        ("workdir:a", "neither a flag of the stage nor a field of its config"),
    ],
)
def test_axes_that_cannot_be_used(sweep, text, message):
    with pytest.raises(InputError) as caught:
        sweep.axes([text], KEYS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_dry_run_prints_the_commands_and_changes_nothing(place):
    answer = call(
        "launch.sweep",
        "--stage",
        "expand",
        "--workdir=sweep",
        "--library=lib-{seed}",
        "--name=walk,run",
        "--sweep=seed:0..1,skill.rank:4,8",
        "--config.skill.steps=7",
        "--dry_run",
    )
    assert answer.code == 0, answer.err
    commands = [shlex.split(line) for line in answer.out.splitlines()]
    assert len(commands) == 4
    assert commands[1] == [
        *(sys.executable, "-m", "launch.expand"),
        *("--library=lib-0", "--name=walk,run", "--config.skill.steps=7"),
        *("--seed=0", "--config.skill.rank=8"),
        "--name=walk-seed-0_skill.rank-8,run-seed-0_skill.rank-8",
        "--workdir=sweep/seed-0_skill.rank-8",
    ]
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    ("given", "library"),
    [
        ((), "sweep/libraries/seed-1"),
        (("--library=lib",), "lib/seed-1"),
        (("--library", "lib"), "lib/seed-1"),
        (("--library=lib-{seed}",), "lib-1"),
    ],
)
def test_every_base_has_its_own_library(place, given, library):
    fixed = ("--stage=pretrain", "--workdir=sweep", "--sweep=seed:1", "--dry_run")
    answer = call("launch.sweep", *fixed, *given)
    assert answer.code == 0, answer.err
    words = shlex.split(answer.out)
    last = [w for i, w in enumerate(words) if "--library" in (words[i - 1], w[:9])][-1]
    assert last.removeprefix("--library=") == library


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweep=seed:x"], "flag --seed=x"),
        (["--sweep=rank:4"], "'rank'; did you mean skill.rank?"),
        (["--sweep=base.steps:1,2", "--config.base.steps=3"], "base.steps is also"),
        (
            ["--sweep=std_floor:1,2", "--seeds=0,1"],
            "--seeds: every point of a sweep is",
        ),
        (["--sweep=seed:0,1", "--library=a{sed}"], "'sed'; choose from point, seed"),
        (
            ["--sweep=seed:0,std_floor:1,2", "--library=a{seed}"],
            "seed-0_std_floor-1 and seed-0_std_floor-2 would both write a0; have "
            "{point} in --library",
        ),
        (["--sweep=data:a/b,a-b"], "data-a-b: a name of a point"),
        (["--sweep=data:" + 300 * "a"], "a name of a point is too long"),
        (["--sweep=seed:0..40,std_floor:0..40"], "1681 points, expected 1000"),
        (["--sweep=seed:0", "--stage=nope"], "choose from compose, critics, expand"),
        (["--sweep=seed:0", "--backend=nope"], "choose from local, slurm"),
        (["--sweep=seed:0", "--nonsense"], "'nonsense'"),
        (["--sweep=seed:0", "word"], "unexpected argument 'word'"),
        (["--sweep=seed:0", "--jobs=0"], "--jobs=0"),
        (["--sweep=seed:0", "--library=gs://bucket/a"], "where it is mounted"),
        ([], "--sweep must have a value"),
    ],
)
def test_sweeps_that_cannot_be_run(place, more, message):
    answer = call("launch.sweep", "--stage=pretrain", "--workdir=sweep", *more)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert message in answer.err
    assert not Path("sweep").exists()


def test_other_folders_are_left_alone(place, sweep):
    other = place / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    with pytest.raises(InputError, match="holds notes.txt but no sweep.json"):
        sweep.claim(other, "expand", [])
    mine = place / "mine"
    mine.mkdir()
    sweep.claim(mine, "expand", ["--name=a", "--best"])
    sweep.claim(mine, "expand", ["--best", "--name=a"])
    sweep.claim(mine, "expand", ["--name=b"])  # nothing has run yet
    (mine / "seed-0").mkdir()
    (mine / "seed-0" / "config.json").touch()
    message = "another sweep; got --name=a where it has --name=b"
    with pytest.raises(InputError, match=message):
        sweep.claim(mine, "expand", ["--name=a"])


def test_numbers_of_a_result(sweep):
    result = {
        "library": "a",
        "summary": {"loss/skill": 0.5, "steps": 2},
        "returns": {
            "walk": {"mean": 3.0, "costs": [1.0, 2.0], "env": "e"},
            "run": None,
        },
    }
    assert dict(sweep.numbers(result)) == {
        "summary.loss/skill": 0.5,
        "summary.steps": 2,
        "returns.walk.mean": 3.0,
        "returns.walk.costs": 1.5,
    }


def test_local_sweep(place, monkeypatch):
    """A point that works, one that fails; only the failed one runs again."""
    # JAX keeps only programs that took a second to compile, which none of these does.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = arguments(2, "--sweep=std_floor:0.1,0", "--compilation_cache=kept/xla")
    first = call_apart(*command)
    assert first.returncode == 1
    assert "failed: std_floor-0: error: std_floor: got 0" in first.stdout
    assert "error: 1 of 2 runs did not finish" in first.stderr
    done, failed = rows()
    assert (done["std_floor"], done["state"]) == ("0.1", "done")
    assert float(done["summary.loss/base"]) > 0 and done["summary.steps"] == "2"
    assert (failed["std_floor"], failed["state"]) == ("0", "failed")
    assert "| 0.1 | done |" in Path("sweep/results.md").read_text()
    assert Path("sweep/libraries/std_floor-0.1/base/base.json").is_file()
    assert list(Path("kept/xla").glob("jit_*"))

    kept = Path("sweep/std_floor-0.1/result.json").stat().st_mtime_ns
    again = call("launch.sweep", *command)
    assert again.code == 1 and "2 points, 0 to run" in again.err
    retried = call_apart(*command, "--retry")
    assert retried.returncode == 1 and "2 points, 1 to run" in retried.stderr
    assert Path("sweep/logs/std_floor-0.log").read_text().count("error: ") == 2
    assert Path("sweep/std_floor-0.1/result.json").stat().st_mtime_ns == kept


def call_apart(*command):
    return subprocess.run(
        [sys.executable, "-m", "launch.sweep", *command],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_stopped_sweep_goes_on(place):
    steps = 100_000_000  # until it is stopped
    command = ("-m", "launch.sweep")
    command += arguments(steps, "--sweep=seed:0..1", "--config.run.log_every=10")
    log = Path("sweep/logs/seed-0.log")
    with background(*command) as process:
        until(lambda: holds(log, "step "), process)
        second = call("launch.sweep", *command[2:])
        assert second.code == 2 and "in use by another process" in second.err
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 130, out
    assert b"stopped by SIGINT, as were its runs; the same command goes on" in out
    assert "stopped by SIGTERM at step" in log.read_text()
    assert [row["state"] for row in rows()] == ["stopped", "waiting"]
    with background(*command) as process:
        until(lambda: holds(log, "resumed at step"), process)
        process.kill()  # its run goes on, and is known
        process.wait()
        listed = call("launch.sweep", *command[2:], "--dry_run")
        assert listed.out.startswith("# seed-0: running\n"), listed
        (run,) = writers(place / "sweep" / "logs")
        os.kill(run, signal.SIGTERM)
        until(lambda: log.read_text().count("stopped by SIGTERM") == 2)


def writers(folder):
    """Processes of this machine whose output goes to a file in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder in (process / "fd/1").resolve().parents:
                found.append(int(process.name))
    return found


JOB = """
import signal, sys
from pathlib import Path
from launch.job import Job

command = [sys.executable, "-c", sys.argv[1]]
job = Job(command, Path("run.log"), {"GONE": None, "NEW": "new"})
if sys.argv[2] == "requeue":
    signal.signal(signal.SIGUSR2, lambda *_: print(job.checkpoint().function.log))
print(job())
"""
SAVES = """
import os, signal, sys, time

def note(*_):
    print("told", flush=True)
    told.append(1)

told = []
signal.signal(signal.SIGTERM, note)
print("ready", os.environ.get("GONE"), os.environ.get("NEW"), flush=True)
while not told:
    time.sleep(0.05)
time.sleep(0.5)
print("saved")
sys.exit(143)
"""


@pytest.mark.parametrize("signals", ["local", "requeue"])
def test_a_job_tells_its_command_once(place, monkeypatch, signals):
    """Two SIGTERM are one; SLURM's SIGUSR2 is one, and does not end the command."""
    monkeypatch.setenv("GONE", "x")
    with background("-c", JOB, SAVES, signals) as process:
        until(lambda: holds(Path("run.log"), "ready"), process)
        child = child_with(process.pid)
        if signals == "requeue":
            os.kill(child, signal.SIGUSR2)
            process.send_signal(signal.SIGUSR2)
        else:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, out
    assert out.split() == ([b"run.log"] if signals == "requeue" else []) + [b"143"]
    assert Path("run.log").read_text() == "ready None new\ntold\nsaved\n"
    assert Path("run.exit").read_text() == "143\n"


def child_with(parent):
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return int(text.split()[0])


def test_exit_codes_are_those_of_a_shell(place, sweep):
    from launch.job import Job, busy

    for script, code in (("exit 3", 3), ("kill -9 $$", 137)):
        before = signal.getsignal(signal.SIGTERM)
        assert Job(["sh", "-c", script], Path("a.log"), {})() == code
        signal.signal(signal.SIGTERM, before)
        assert Path("a.exit").read_text() == f"{code}\n"
    assert not busy(Path("a.log")) and not busy(Path("b.log"))


SBATCH = """#!/bin/sh
cat "$1" >> "$HERE/submitted"
echo "Submitted batch job 12"
"""
SQUEUE = """#!/bin/sh
echo "$@" >> "$HERE/asked"
cat "$HERE/queue"
"""


@pytest.fixture
def cluster(place, monkeypatch):
    """SLURM's commands as far as submitit and a sweep need them."""
    programs = place / "bin"
    programs.mkdir()
    for name, text in {"srun": "", "sbatch": SBATCH, "squeue": SQUEUE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(place))
    (place / "queue").touch()
    return place


def test_slurm(cluster):
    command = arguments(
        2,
        "--sweep=seed:0..2",
        "--backend=slurm",
        "--slurm=partition:a,b,timeout_min:600,gpus_per_node:1,gres:gpu:h100:1",
        "--jobs=2",
    )
    answer = call("launch.sweep", *command)
    assert answer.code == 0, answer.err
    assert "3 jobs are submitted: 12_0, 12_1, 12_2" in answer.err
    text = (cluster / "submitted").read_text()
    for line in (
        "--array=0-2%2",
        "--gpus-per-node=1",
        "--gres=gpu:h100:1",
        "--job-name=sweep",
        "--partition=a,b",
        "--requeue",
        "--signal=USR2@90",
        "--time=600",
    ):
        assert f"#SBATCH {line}\n" in text
    assert f"{sys.executable} -u -m submitit.core._submit" in text
    jobs = json.loads(Path("sweep/jobs.json").read_text())
    assert jobs == {"seed-0": "12_0", "seed-1": "12_1", "seed-2": "12_2"}

    # Of three jobs two are left, one died without a word.
    (cluster / "queue").write_text("12_0\n12_2\n99\n")
    again = call("launch.sweep", *command)
    assert again.code == 0 and "3 points, 1 to run" in again.err
    assert [row["state"] for row in rows()] == ["running", "waiting", "running"]
    assert (cluster / "submitted").read_text().count("#!/bin/bash") == 2
    assert "--me --array" in (cluster / "asked").read_text()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("partition", "got 'partition', expected NAME:VALUE"),
        ("nonsense:1", "Unknown argument 'nonsense'"),
        ("nodes:2", "nodes: every point is one task"),
        ("timeout_min:soon", "timeout_min"),
    ],
)
def test_slurm_parameters_that_cannot_be_used(cluster, parameters, message):
    more = ("--sweep=seed:0", "--backend=slurm", f"--slurm={parameters}")
    answer = call("launch.sweep", *arguments(2, *more))
    assert answer.code == 2 and message in answer.err
    assert answer.err.splitlines()[-1].startswith("error: ")
    assert not (cluster / "submitted").exists()


def test_slurm_that_is_not_here_or_fails(cluster, monkeypatch):
    command = arguments(2, "--sweep=seed:0", "--backend=slurm")
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho no luck >&2; exit 1\n")
    answer = call("launch.sweep", *command)
    assert answer.code == 2 and answer.err.endswith("error: no luck\n")
    Path("sweep/jobs.json").write_text('{"seed-0": "12"}')
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\necho asleep >&2; exit 1\n")
    answer = call("launch.sweep", *command)
    assert answer.code == 2 and answer.err == "error: squeue: asleep\n"
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    answer = call("launch.sweep", *command)
    assert answer.code == 2 and "there is no sbatch on this machine" in answer.err
