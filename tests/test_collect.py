"""Collecting data: the file, its independence of the processes, and the command."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny_env import SPEC

from psec_jax import data, envs
from psec_jax.data import d4rl, dataset
from psec_jax.errors import InputError
from psec_jax.runtime import console
from psec_jax.workflows.collection import collect
from psec_jax.workflows.config import DataConfig
from psec_jax.workflows.demonstrations import load_demos

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "data"))


def command(*flags):
    """Run the command line."""
    line = [sys.executable, "-m", "experiments.tools.collect", *flags]
    path = f"{ROOT}{os.pathsep}{TESTS}"
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)


def test_same_content_whatever_the_number_of_processes(tmp_path):
    files = [
        collect(SPEC, "random", 5, 7, workers=n, out=tmp_path / f"{n}.hdf5")
        for n in (1, 3)
    ]
    assert len({path.read_bytes() for path in files}) == 1
    other = collect(SPEC, "random", 5, 8, workers=1, out=tmp_path / "other.hdf5")
    assert dataset.fingerprint(data.load(other)) != dataset.fingerprint(
        data.load(files[0])
    )


def test_file_holds_what_its_attributes_say(tmp_path):
    path = collect(SPEC, "random", 4, 0)
    assert path == tmp_path / "data" / "gymnasium_tiny_env_Tiny-v0_random_4_seed0.hdf5"
    assert os.listdir(path.parent) == [path.name]
    ds, attrs = d4rl.load(path)
    with h5py.File(path) as file:
        assert set(file) == {*d4rl.KEYS.values()}
    assert (attrs["environment"], attrs["policy"]) == (SPEC, "random")
    assert (attrs["episodes"], attrs["seed"], attrs["action_noise"]) == (4, 0, 0.0)
    assert {"python", "numpy", "gymnasium"} <= json.loads(attrs["versions"]).keys()
    np.testing.assert_array_equal(attrs["returns"], dataset.episode_returns(ds))
    np.testing.assert_array_equal(attrs["costs"], dataset.episode_costs(ds))
    assert len(attrs["returns"]) == 4
    assert ds.terminal.any() and ds.timeout.any()


def test_successes_are_kept_and_on_the_card(tmp_path):
    reach = "gymnasium:tiny_env:Reach-v0"
    path = collect(reach, "random", 12, 0, out=tmp_path / "reach.hdf5")
    ds, attrs = d4rl.load(path)
    ends = [rows.start + 2 for rows in dataset.episode_slices(ds)]
    expected = ds.action[ends, 0] > 0  # raw actions above 2
    assert 0 < expected.sum() < 12
    np.testing.assert_array_equal(attrs["success"], expected)
    card = load_demos(DataConfig(), None, 3, str(path)).card()
    assert card["success"] == expected.mean()
    assert "success" not in d4rl.load(collect(SPEC, "random", 2, 0))[1]
    damaged = Path(d4rl.save(tmp_path / "x.hdf5", ds, {"success": np.ones(12)}))
    with pytest.raises(InputError, match="attribute success is float64 of shape"):
        load_demos(DataConfig(), None, 3, str(damaged))


def test_fewer_episodes_are_the_first_of_more(tmp_path):
    few = data.load(collect(SPEC, "random", 2, 3))
    more = data.load(collect(SPEC, "random", 4, 3), first=2)
    assert dataset.fingerprint(few) == dataset.fingerprint(more)


def test_expert_episode_can_be_played_again():
    spec = "dm_control:walker-stand"
    path = collect(spec, "expert", 1, 0, action_noise=0.1)
    assert path.name == "dm_control_walker-stand_expert_1_seed0_noise0.1.hdf5"
    ds, attrs = d4rl.load(path)
    assert len(ds.obs) == 1000 and ds.timeout[-1] and ds.timeout.sum() == 1
    assert attrs["returns"][0] > 800
    assert np.abs(ds.action).max() <= 1
    env_seed, _ = np.random.SeedSequence((0, 0)).spawn(2)
    env = envs.make(spec)
    np.testing.assert_array_equal(
        env.reset(int(env_seed.generate_state(1)[0])), ds.obs[0]
    )
    for i in range(50):
        np.testing.assert_array_equal(env.step(ds.action[i]).obs, ds.next_obs[i])


def test_a_file_is_kept_refused_or_replaced(tmp_path):
    out = tmp_path / "x.hdf5"
    collect(SPEC, "random", 2, 0, out=out)
    before = out.stat().st_mtime_ns
    assert collect(SPEC, "random", 2, 0, out=out) == out
    assert out.stat().st_mtime_ns == before
    told = "x.hdf5: holds another collection, with seed 0 \\(asked for 1\\)"
    with pytest.raises(InputError, match=told):
        collect(SPEC, "random", 2, 1, out=out)
    collect(SPEC, "random", 2, 1, out=out, overwrite=True)
    assert d4rl.load(out)[1]["seed"] == 1
    out.write_text("damaged")
    with pytest.raises(InputError, match="not a readable HDF5"):
        collect(SPEC, "random", 2, 1, out=out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"env": "dm_control:walker-fly"}, "unknown task 'fly'"),
        ({"policy": "expert"}, "no packaged expert for gymnasium"),
        ({"policy": "brilliant"}, "unknown policy 'brilliant'"),
        ({"policy": "none.npz"}, "none.npz: no such file"),
        ({"action_noise": 0.5}, "takes no action noise"),
        ({"out": "/"}, "out is /, a folder"),
    ],
)
def test_refusals(changes, message, tmp_path):
    arguments = {"env": SPEC, "policy": "random", "episodes": 1, "seed": 0} | changes
    with pytest.raises(InputError, match=message):
        collect(**arguments)
    assert not (tmp_path / "data").exists()


def test_command(tmp_path):
    out = tmp_path / "x.hdf5"
    options = ["--policy=random", "--episodes=3", "--seed=1", f"--out={out}"]
    run = command(f"--env={SPEC}", *options)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{out}: 3 episodes, return mean ")
    assert run.stdout.count("\n") == 1
    returns = d4rl.load(out)[1]["returns"]
    assert f"min {returns.min():.1f} max {returns.max():.1f}" in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"--env={SPEC}", "--policy=random", "--episodes=0"], "episodes is 0"),
        (["--env=dm_control:nothing-at_all"], "unknown domain 'nothing'"),
        ([f"--env={SPEC}", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_command_refuses_in_one_line(flags, message):
    run = command(*flags)
    assert run.returncode == 2
    assert message in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_a_long_collection_says_how_far_it_is(monkeypatch, capsys):
    clock = iter([0.0, 30.0, 61.0, 90.0])
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(console, "time", fake)
    progress = console.Progress("episode", 10)
    for done in (1, 2, 3):
        progress(done)
    progress.end()
    assert capsys.readouterr().err == "episode 2/10  4m04s left\n"
