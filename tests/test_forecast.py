"""--plan and --minutes of the tables' commands."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_env
from shell import call
from test_commands import TINY

from experiments import forecast, grid, results
from experiments.configs import dmc_walker
from experiments.grid import Method, Setting, Table
from experiments.style import Style
from psec_jax.data import d4rl
from psec_jax.errors import InputError, Stopped
from psec_jax.library import SkillLibrary
from psec_jax.policy import load_base
from psec_jax.types import Dataset


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny_env.__file__).parent))
    monkeypatch.setattr(forecast, "TRIAL", {"run.trial_seconds": 0.05})
    monkeypatch.setattr(forecast, "STEPS", 2)
    rows, ends = np.random.default_rng(0), np.arange(1, 13) % 6 == 0
    obs, action = rows.random((13, 2), np.float32), rows.random((12, 2), np.float32)
    zeros = np.zeros(12, np.float32)
    ds = Dataset(obs[:-1], action, zeros, zeros, obs[1:], np.zeros(12, bool), ends)
    monkeypatch.chdir(tmp_path)
    d4rl.save("demos.hdf5", ds, {})


def make(cell):
    request = {"data": "demos.hdf5", "env": tiny_env.SPEC}
    grid.train(cell, "base", "base", **request)
    if cell.method == "Base":
        return grid.bases(cell)
    grid.train(cell, "skill", "one", name="one", **request)
    return grid.composed(cell, ["one"])


METHODS = {name: Method(make, {}, Style("blue", "o")) for name in ("Base", "Skill")}
PLAYED = Table("table", {"tiny": Setting(tiny_env.SPEC)}, METHODS)


def job(**changes):
    return dmc_walker.job("quick").changed(
        TINY | {"data.actions": "scaled", "table.seeds": (0, 1)} | changes
    )


def plan(**options):
    lines = []
    arguments = PLAYED, job(**{"base.steps": 10**8}), Path("runs"), Path("results")
    assert not grid.run(*arguments, lines.append, plan=True, **options)
    return {line.split("  ")[0]: line.split()[-2:] for line in lines[0].splitlines()}


def test_a_plan_counts_what_is_left():
    parts = plan()
    assert not Path("runs").exists() and not Path("results").exists()
    assert list(parts) == ["base", "evaluation", "skill", "all"]
    assert [parts[part][0] for part in parts] == ["2", "4", "2", "all"]
    assert "h" in parts["base"][1], "a hundred million steps take hours"
    assert parts["all"][1] >= parts["base"][1]
    assert plan(together=True)["base x 2"][0] == "1"
    # Of a seed that has begun the rest is left, of one that is finished nothing.
    checkpoints = Path("runs/seed0/runs/base/checkpoints")
    (checkpoints / str(10**8 - 1)).mkdir(parents=True)
    rest = forecast.Forecast(Path("trial"), Path("runs"), None, programs=[(0,)])
    of = {"steps": 1, "left": 10**8 - 1, "steps_per_s": 0.1}
    of |= {"seconds": 2.0, "first_step_seconds": 1.0}
    rest.train("base", [[checkpoints.parent]], of, 3.0)
    # A step of ten seconds, the first one's second, and one around the training.
    assert rest.parts == {"base": [1, 12.0]}
    (checkpoints.parent / "result.json").write_text("{}")
    assert plan()["base"][0] == "1"


@pytest.mark.parametrize("shared", [True, False])
def test_a_plan_counts_tuned_weights(shared):
    def tuned(cell):
        grid.train(cell, "base", "base", data="demos.hdf5", env=tiny_env.SPEC)

        def fixed(cell, weights):
            return load_base(cell.library(cell.seed))

        def value(raw):
            return raw["mean"]

        for one in [cell.of(0)] if shared else map(cell.of, cell.seeds):
            grid.tune(one, [(0.0,), (1.0,)], fixed, value, shared=shared)
        return grid.bases(cell)

    methods = {"Fixed": Method(tuned, {}, Style("blue", "o"))}
    table = Table("table", PLAYED.settings, methods)
    for together in (False, True):
        lines = []
        arguments = table, job(), Path("runs"), Path("results"), lines.append
        assert not grid.run(*arguments, plan=True, together=together)
        [line] = [one for one in lines[0].splitlines() if one.startswith("tuning")]
        assert line.split()[1] == ("2" if shared else "4"), "weights, of both seeds"


def test_a_plan_of_a_finished_table():
    arguments = PLAYED, job(), Path("runs"), Path("results"), print
    assert grid.run(*arguments, methods=("Base",))
    lines = []
    grid.run(*arguments[:-1], lines.append, methods=("Base",), plan=True)
    assert lines[0].split() == ["all", "0s"]
    changed = PLAYED, job(**{"base.steps": 3}), *arguments[2:]
    with pytest.raises(InputError, match="measured with config_fingerprint"):
        grid.run(*changed, methods=("Base",), plan=True)


def test_stopped_by_the_clock_and_resumed():
    def measure(cell, seed, made):
        card = SkillLibrary.open(cell.library(seed)).card("skill", "one")
        return {"skill": card["fingerprint"]}

    table = Table("table", PLAYED.settings, METHODS, measure=measure)
    long = {"base.steps": 50, "skill.steps": 50, "table.seeds": (0,)}
    long |= {"run.log_every": 1000, "run.save_every": 1000}

    def run(folder, **options):
        arguments = table, job(**long), Path(folder), Path(folder, "results"), print
        assert grid.run(*arguments, methods=("Skill",), **options)
        return results.by_key(Path(folder, "results", "table.jsonl"))

    stops, minutes = [], 0.005
    while True:
        try:
            [got] = run("parts", minutes=minutes).values()
            break
        except Stopped as stopped:
            stops.append(stopped)
            minutes *= 2
    assert stops, "compilation alone takes longer than a third of a second"
    for stopped in stops:
        assert stopped.signum == signal.SIGALRM
        assert "minutes are over: " in str(stopped) and "to go on" in str(stopped)
    [expected] = run("whole").values()
    assert got["skill"] == expected["skill"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_the_clock_stops_what_is_no_training(handler):
    """In the background of a script Ctrl-C is ignored, the clock is not."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(Stopped, match="^0.001 minutes are over: start again"):
            with grid.stop_after(0.001):
                time.sleep(5)
        with grid.stop_after(0.001):
            pass
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_says_it():
    answer = call("experiments.table2", "--help")
    assert "--[no]plan" in answer.out and "exit code 142" in answer.out
    answer = call("experiments.table2", "--minutes=0")
    assert answer.code == 2 and "--minutes" in answer.err
