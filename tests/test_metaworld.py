"""Meta-World, really run (make setup-metaworld)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psec_jax import envs
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.workflows.collection import collect

ROOT = Path(__file__).parents[1]
needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="no metaworld; run: make setup-metaworld",
)
NAME = "push-v3"
PUSH = f"metaworld:{NAME}"


def play(env, seed, steps=30):
    """Steps of random actions."""
    generator = np.random.default_rng(0)
    result = [envs.Step(env.reset(seed), 0.0, 0.0, False, False)]
    for _ in range(steps):
        result.append(env.step(generator.uniform(-1, 1, 4).astype(np.float32)))
    return envs.Step(*map(np.array, zip(*result, strict=True)))


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_metaworld
@pytest.mark.parametrize("task", ["push", "hammer", "door-open"])
def test_reset_repeats_the_episode_of_a_fresh_environment(task):
    spec = f"metaworld:{task}-v3"
    used = envs.make(spec)
    assert isinstance(used, envs.Env) and used.spec == spec
    assert (used.obs_dim, used.action_dim, used.max_steps) == (39, 4, 500)
    assert used.box.same(envs.describe(spec).box)
    drawn = np.random.get_state()[1]
    first, other = play(used, 5), play(used, 6)
    assert first.obs.dtype == np.float32
    assert_same(play(used, 5), first)
    assert_same(play(envs.make(spec), 6), other)
    assert not np.array_equal(first.obs[0], other.obs[0])
    # The global generator is the caller's; the goal is seen.
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)
    assert first.obs[:, -3:].any() and set(first.success[1:]) <= {0.0, 1.0}


@needs_metaworld
def test_steps_are_those_of_the_package(monkeypatch):
    from metaworld import env_dict, sawyer_xyz_env

    env, random = envs.make(PUSH), np.random.default_rng(1)
    start, mine = env.reset(3), env._env.unwrapped
    weld = type(mine).reset_mocap_welds  # without it the package's own fails
    monkeypatch.setattr(sawyer_xyz_env.SawyerMocapBase, "reset_mocap_welds", weld)
    raw = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{NAME}-goal-observable"]()
    raw._last_rand_vec = mine._last_rand_vec
    np.testing.assert_array_equal(raw.reset()[0].astype(np.float32), start)
    for _ in range(20):
        action = random.uniform(-1, 1, 4).astype(np.float32)
        obs, reward, *_, info = raw.step(action)
        step = env.step(action)
        np.testing.assert_array_equal(obs.astype(np.float32), step.obs)
        assert (step.reward, step.success) == (reward, info["success"])


@needs_metaworld
def test_goals_and_ends_of_episodes():
    fixed = envs.make(f"{PUSH}?goal=fixed")
    np.testing.assert_array_equal(fixed.reset(1), fixed.reset(2))
    short = envs.make(f"{PUSH}?max_episode_steps=7")
    short.reset(0)
    steps = [short.step(np.zeros(4)) for _ in range(7)]
    assert [s.timeout for s in steps] == [False] * 6 + [True]
    assert not any(s.terminal for s in steps)
    ends = envs.make("metaworld:handle-press-v3?terminate_on_success=True")
    obs, length = ends.reset(1), 0
    act, generator = ends.drivers["scripted"], np.random.default_rng(0)
    while not (step := ends.step(act(obs, generator))).terminal:
        obs, length = step.obs, length + 1
        assert step.success == 0 and length < 100
    assert step.success == 1 and not step.timeout


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("metaworld:push", "unknown metaworld task 'push'; choose from assembly-v3, b"),
        (f"{PUSH}?goal=none", r"goal=none: goal 'none'; choose from fixed, random"),
        (f"{PUSH}?max_episode_steps=501", "max_episode_steps is 501, expected 1 to"),
        (f"{PUSH}?terminate_on_success=1", "is 1, expected True or False"),
        (f"{PUSH}?seed=1", "unknown keyword argument 'seed'; choose from goal, max"),
        (f"{PUSH}@friction:2", "metaworld has no shifts"),
    ],
)
@needs_metaworld
def test_refusals(spec, message):
    with pytest.raises(InputError, match=message) as refused:
        envs.make(spec)
    assert "\n" not in str(refused.value)


def test_missing_simulator_names_the_make_target(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "metaworld" else name
    )
    message = "push-v3: metaworld is not installed; run: make setup-metaworld"
    with pytest.raises(InputError, match=message):
        envs.make(PUSH)


@needs_metaworld
def test_draws():
    from psec_jax.envs.gl import CannotDraw

    env = envs.make(PUSH)
    env.reset(0)
    try:
        image = env.render(60, 80)
    except CannotDraw as error:
        pytest.skip(str(error))
    assert image.shape == (60, 80, 3) and image.std() > 10


@needs_metaworld
def test_scripted_experts_and_their_noise(tmp_path):
    env = "metaworld:handle-press-v3?terminate_on_success=True"
    path = collect(env, "scripted", 2, 0, workers=1, out=tmp_path / "x.hdf5")
    ds, attrs = d4rl.load(path)
    assert attrs["policy"] == "scripted" and attrs["success"].all()
    assert ds.terminal.sum() == 2 and "metaworld" in json.loads(attrs["versions"])
    again = collect(env, "scripted", 2, 0, workers=2, out=tmp_path / "y.hdf5")
    assert path.read_bytes() == again.read_bytes()
    noisy = collect(env, "scripted", 1, 0, 0.1, workers=1, out=tmp_path / "z.hdf5")
    difference = d4rl.load(noisy)[0].action[0] - ds.action[0]
    assert 0 < np.abs(difference).max() < 0.5


@needs_metaworld
def test_command(tmp_path):
    out = tmp_path / "x.hdf5"
    env = "metaworld:handle-press-v3?terminate_on_success=True"
    line = [sys.executable, "-m", "experiments.tools.collect", f"--env={env}"]
    line += ["--policy=scripted", "--episodes=2", "--seed=1", f"--out={out}"]
    run = subprocess.run(line, cwd=ROOT, env=dict(os.environ), capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().rstrip().endswith(", 2 of 2 succeeded")
    line[3], line[-1] = "--env=dm_control:walker-walk", "--out=other.hdf5"
    refused = subprocess.run(line, cwd=ROOT, env=dict(os.environ), capture_output=True)
    assert refused.returncode == 2
    assert b"unknown policy 'scripted'; choose from" in refused.stderr
