"""Bullet-Safety-Gym and MetaDrive, really run (make setup-safe)."""

import importlib.util
import os
import signal
import sys

import numpy as np
import pytest

from psec_jax import envs
from psec_jax.envs import bullet, metadrive
from psec_jax.envs.vector import VectorEnv
from psec_jax.envs.workers import Worker
from psec_jax.errors import InputError


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"no {package}; run: make setup-safe")


needs_bullet, needs_metadrive = needs("bullet_safety_gym"), needs("metadrive")
METADRIVE = "metadrive:easysparse"


def play(env, seed, steps, action=None):
    """Steps of an episode, of random actions or always the same, until it ends."""
    generator = np.random.default_rng(0)
    result = [envs.Step(env.reset(seed), 0.0, 0.0, False, False)]
    for _ in range(steps):
        random = generator.uniform(-1, 1, env.action_dim)
        result.append(env.step(random if action is None else np.array(action)))
        if result[-1].terminal or result[-1].timeout:
            break
    return envs.Step(*map(np.array, zip(*result, strict=True)))


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_bullet
@pytest.mark.parametrize("name", sorted(bullet.TASKS))
def test_bullet_repeats_the_episode_of_a_fresh_environment(name):
    used = envs.make(f"bullet:{name}")
    assert isinstance(used, envs.Env) and used.spec == f"bullet:{name}"
    assert (used.obs_dim, used.action_dim, used.max_steps) == bullet.TASKS[name]
    drawn = np.random.get_state()[1]
    first, other = play(used, 5, 40), play(used, 6, 25)
    fresh = envs.make(f"bullet:{name}")
    assert first.obs.dtype == np.float32 and (first.cost >= 0).all()
    assert_same(play(used, 5, 40), first)
    assert_same(play(fresh, 6, 25), other)
    assert not np.array_equal(first.obs[0], other.obs[0])
    # The global generator is the caller's.
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)
    used.close()
    fresh.close()


@needs_bullet
def test_bullet_costs_and_time_limit():
    env = envs.make("bullet:SafetyBallRun-v0")
    fast = play(env, 0, 1000, (1.0, 0.0))
    assert len(fast.cost) == 1 + 100
    assert set(fast.cost) == {0.0, 1.0}  # free while slow, then too fast
    assert fast.timeout[-1] and not fast.timeout[:-1].any()
    assert not fast.terminal.any()
    assert play(env, 0, 1000, (0.0, 0.0)).cost.sum() == 0
    ant = envs.make("bullet:SafetyAntCircle-v0")
    falls = play(ant, 0, 1000)
    assert falls.terminal[-1] and not falls.timeout.any() and len(falls.cost) < 500


@needs_bullet
def test_bullet_draws():
    env = envs.make("bullet:SafetyDroneCircle-v0")
    env.reset(0)
    image = env.render(30, 40)
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8
    assert image.std() > 10
    assert_same(play(env, 1, 5), play(envs.make(env.spec), 1, 5))


@pytest.fixture(scope="module")
def car():
    env = envs.make(METADRIVE)
    yield env
    env.close()


@needs_metadrive
@pytest.mark.parametrize("name", ["easysparse", "harddense"])
def test_metadrive_repeats_the_episode_of_a_fresh_environment(name):
    used = envs.make(f"metadrive:{name}")
    assert isinstance(used, envs.Env) and used.spec == f"metadrive:{name}"
    assert (used.obs_dim, used.action_dim, used.max_steps) == (259, 2, 1000)
    assert used.step_seconds == pytest.approx(0.1)
    first = play(used, 5, 130, (0.0, 0.6))
    other = play(used, 6, 130, (0.0, 0.6))
    fresh = envs.make(f"metadrive:{name}")
    assert first.obs.dtype == np.float32 and (first.cost >= 0).all()
    assert_same(play(used, 5, 130, (0.0, 0.6)), first)
    assert_same(play(fresh, 6, 130, (0.0, 0.6)), other)
    assert first.obs.shape != other.obs.shape or (first.obs != other.obs).any()
    used.close()
    fresh.close()


def test_metadrive_cost_by_hand():
    rays = np.ones(240)
    assert metadrive.step_cost(0.0, 10.0, rays) == 0
    assert metadrive.step_cost(0.0, 30.0, rays) == pytest.approx(0.2)
    assert metadrive.step_cost(1.0, 5.0, rays) == 1
    rays[7] = 0.04
    assert metadrive.step_cost(1.0, 20.0, rays) == pytest.approx(1.1 + 0.01 * 0.06**2)


@needs_metadrive
def test_metadrive_charges_for_speed_and_for_leaving_the_road(car):
    steps = play(car, 0, 1000, (0.05, 1.0))
    # Coordinate 3 is (speed + 1) / 81, of km/h.
    speed = 81 * steps.obs[1:, 3] - 1
    expected = 0.01 * np.maximum(speed - 10, 0)
    assert expected.max() > 0.05
    assert steps.terminal[-1] and not steps.terminal[:-1].any()
    expected[-1] += 1
    np.testing.assert_allclose(steps.cost[1:], expected, atol=1e-5)
    assert steps.reward[-1] == -5 and not steps.timeout.any()


@needs_metadrive
def test_metadrive_is_cut_at_its_horizon(car):
    standing = play(car, 0, 1001, (0.0, -1.0))
    assert len(standing.cost) == 1 + 1000
    assert standing.timeout[-1] and not standing.timeout[:-1].any()
    assert standing.cost.sum() == 0


@needs_metadrive
def test_metadrive_draws_without_changing_the_episode(car):
    plain = play(car, 3, 10, (0.0, 0.5))
    car.reset(3)
    for _ in range(10):
        step = car.step(np.array((0.0, 0.5)))
        image = car.render(60, 80)
    assert image.shape == (60, 80, 3) and image.dtype == np.uint8
    assert image.std() > 10
    np.testing.assert_array_equal(step.obs, plain.obs[-1])


def drive(pipe, name):
    """A worker's job: the returns of the simulator's own drivers over 40 steps."""
    env = metadrive.MetaDriveEnv(name)
    for driver in ("expert", "idm", "idm-9"):
        obs, total, generator = env.reset(1), 0.0, np.random.default_rng(0)
        for _ in range(40):
            action = env.drivers[driver](obs, generator)
            assert action.dtype == np.float32 and np.abs(action).max() <= 1
            step = env.step(action)
            obs, total = step.obs, total + step.reward
        pipe.send((total, env.info["velocity"]))


@needs_metadrive
def test_drivers_of_metadrive(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    worker = Worker("test_safe_envs:drive", "easysparse", name="driving worker")
    try:
        results = [worker.recv() for _ in range(3)]
    finally:
        worker.close()
    (expert, _), (idm, speed), (slow, slow_speed) = results
    assert expert > 5 and idm > slow > 0
    assert 15 < speed < 35 and slow_speed < 12


@needs_metadrive
def test_each_metadrive_environment_has_a_process(car, capfd):
    expected = play(car, 8, 20, (0.0, 0.5))
    with VectorEnv(METADRIVE, 2, workers=1) as vector:
        assert len(vector._workers) == 2
        vector.reset([0, 1], [9, 8])
        for t in range(20):
            if t == 10:
                os.kill(vector._workers[1]._process.pid, signal.SIGKILL)
            step = vector.step([0, 1], np.array([(0.0, 0.2), (0.0, 0.5)]))
            np.testing.assert_array_equal(step.obs[1], expected.obs[t + 1])
            assert step.cost[1] == expected.cost[t + 1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "environment worker 2 of 2" in lines[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bullet:SafetyBallReach-v0", "unknown bullet task .*; choose from SafetyAntC"),
        (
            "metadrive:easy",
            "unknown metadrive task 'easy'; choose from easydense, easym",
        ),
    ],
)
def test_unknown_tasks(spec, message):
    with pytest.raises(InputError, match=message):
        envs.make(spec)


@pytest.mark.parametrize(
    ("spec", "package"),
    [("bullet:SafetyCarRun-v0", "pybullet"), (METADRIVE, "metadrive")],
)
def test_missing_simulator_names_the_make_target(spec, package, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else name
    )
    with pytest.raises(InputError, match=f"{package} is not .*; run: make setup-safe"):
        envs.make(spec)


@needs_metadrive
def test_the_callers_process_is_left_alone(car):
    car.reset(0)
    assert not {"metadrive", "gym", "seaborn", "panda3d"} & sys.modules.keys()
    assert not hasattr(np, "float")
