"""OGBench, really run (make setup-ogbench)."""

import importlib.util
import json

import numpy as np
import pytest
from shell import call

from psec_jax import data, envs
from psec_jax.errors import InputError

needs_ogbench = pytest.mark.skipif(
    importlib.util.find_spec("ogbench") is None,
    reason="no ogbench; run: make setup-ogbench",
)
CUBE = "gymnasium:ogbench:cube-single-singletask-task{}-v0"


def play(env, seed):
    """Observations and success of the expert's episode."""
    act, generator = env.drivers["scripted"], np.random.default_rng(seed)
    result = [envs.Step(env.reset(seed), 0.0, 0.0, False, False, 0.0)]
    while not (result[-1].terminal or result[-1].timeout):
        result.append(env.step(act(result[-1].obs, generator)))
    return np.array([step.obs for step in result]), result[-1].success


@needs_ogbench
def test_the_expert_succeeds_and_its_episode_repeats():
    drawn = np.random.get_state()[1]
    used = envs.make(CUBE.format(1))
    assert (used.obs_dim, used.action_dim, used.max_steps) == (28, 5, 200)
    first, success = play(used, 5)
    other, other_success = play(used, 6)
    assert success == other_success == 1 and len(first) < 100
    for env in (used, envs.make(CUBE.format(1))):
        np.testing.assert_array_equal(play(env, 5)[0], first)
    assert not np.array_equal(other[0], first[0])
    # The global generator is the caller's.
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)


@needs_ogbench
def test_collect(tmp_path):
    out, spec = tmp_path / "cube.hdf5", CUBE.format(4)
    answer = call(
        "experiments.tools.collect",
        f"--env={spec}",
        "--policy=scripted",
        "--action_noise=0.1",
        "--episodes=2",
        f"--out={out}",
    )
    assert answer.code == 0 and "2 of 2 succeeded" in answer.out
    ds, attrs = data.read(str(out))
    assert ds.obs.shape[1] == 28 and list(attrs["success"]) == [True, True]
    assert "ogbench" in json.loads(attrs["versions"])


@needs_ogbench
def test_other_tasks_have_no_expert():
    for task in ("cube-double-singletask-task1-v0", "scene-singletask-task1-v0"):
        assert envs.make(f"gymnasium:ogbench:{task}").drivers == {}


def test_missing_package_names_the_make_target(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ogbench" else name
    )
    message = "task1-v0: ogbench is not installed; run: make setup-ogbench"
    with pytest.raises(InputError, match=message):
        envs.make(CUBE.format(1))
