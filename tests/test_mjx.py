"""dm_control's tasks on the device: their formulas, and roll-outs (make setup-mjx)."""

import dataclasses
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dm_control.utils import rewards

from experiments.tools import benchmark
from psec_jax import envs
from psec_jax.data import d4rl
from psec_jax.envs import experts, mjx
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.evaluation import evaluate, evaluate_together, record
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.policy import act_together, alike
from psec_jax.workflows.collection import collect

INSTALLED = {d.metadata["Name"] for d in distributions()}
needs_mjx = pytest.mark.skipif(
    "mujoco-mjx" not in INSTALLED, reason="no mujoco-mjx; run: make setup-mjx"
)
SWING = "mjx:pendulum-swingup?time_limit=0.2"  # 10 steps, without contacts or limits
WALK = "mjx:walker-walk?time_limit=0.125"  # 5 steps


def plain(spec):
    return spec.replace("mjx:", "dm_control:")


def states(suite_env, count):
    """Puts an environment of dm_control into states of random play, one by one."""
    generator = np.random.default_rng(0)
    for seed in range(count):
        suite_env.reset(seed)
        for _ in range(generator.integers(1, 30)):
            step = suite_env.step(generator.uniform(-1, 1, suite_env.action_dim))
        yield step


@pytest.mark.parametrize(
    "interval", [(0.0, 0.0), (-1.0, 2.0), (1.0, np.inf), (-np.inf, 0.5)]
)
@pytest.mark.parametrize(
    ("sigmoid", "value"),
    [("gaussian", 0.1), ("linear", 0.5), ("linear", 0.0), ("quadratic", 0.0)],
)
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_tolerance_is_dm_controls(interval, sigmoid, value, margin):
    x = np.linspace(-4, 4, 101).astype(np.float32)
    expected = rewards.tolerance(x, interval, margin, sigmoid, value)
    got = mjx.tolerance(x, *interval, margin, sigmoid, value)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", mjx.TASKS)
def test_formulas_are_dm_controls(name):
    """On the simulator's own quantities near the upright pose and far from it."""
    env, task = envs.make(f"dm_control:{name}"), mjx.TASKS[name]
    physics, model = env._env.physics, env._env.physics.model.ptr
    generator, rewarded = np.random.default_rng(0), []
    for spread in (0.01, 0.02, 0.1, 1.0):
        with physics.reset_context():
            physics.data.qpos[:] = generator.normal(model.qpos0, spread)
            physics.data.qvel[:] = generator.normal(size=model.nv) * 2
        physics.set_control(generator.uniform(-1, 1, env.action_dim))
        keys = ("qpos", "qvel", "ctrl", "xpos", "xipos", "sensordata")
        data = SimpleNamespace(
            **{k: jnp.asarray(getattr(physics.data, k)) for k in keys},
            xmat=jnp.asarray(physics.data.xmat).reshape(-1, 3, 3),
        )
        parts = env._env.task.get_observation(physics).values()
        obs = np.concatenate([np.ravel(part) for part in parts])
        rewarded.append(env._env.task.get_reward(physics))
        np.testing.assert_allclose(task.observe(model, data), obs, atol=1e-5)
        np.testing.assert_allclose(task.reward(model, data), rewarded[-1], atol=1e-5)
    assert max(rewarded) > 0
    env.close()


def test_experts_are_dm_controls():
    path = experts.expert_path("mjx:walker-walk")
    assert path == experts.expert_path("dm_control:walker-walk")
    expert = experts.load_expert(path, 6)
    obs = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(expert.__call__)(obs), expert(obs), atol=1e-5)


def test_refusals(monkeypatch):
    with pytest.raises(
        InputError, match=r"unknown task of mjx 'walker-fly'; .*walker-w"
    ):
        envs.make("mjx:walker-fly")
    mjx._mjx.cache_clear()
    monkeypatch.setitem(sys.modules, "mujoco.mjx", None)
    with pytest.raises(InputError, match="mjx:walker-walk: .*; run: make setup-mjx"):
        envs.make("mjx:walker-walk")


def test_batches_have_one_size():
    parts = envs.batches_on_device(5, 2)
    np.testing.assert_array_equal(parts, [[0, 1], [2, 3], [4, 4]])
    np.testing.assert_array_equal(envs.batches_on_device(2), [[0, 1]])


@needs_mjx
def test_an_environment_is_dm_controls_but_for_its_steps():
    env, other = envs.make(f"{WALK}@gravity:2"), envs.make(f"{plain(WALK)}@gravity:2")
    assert env.spec == f"{WALK}@gravity:2"
    for fact in ("obs_dim", "action_dim", "max_steps", "box", "observation"):
        assert getattr(env, fact) == getattr(other, fact)
    np.testing.assert_array_equal(env.reset(3), other.reset(3))
    assert env.model.opt.gravity[2] == pytest.approx(2 * -9.81)
    with pytest.raises(CannotDraw, match="dm_control:walker-walk.* does"):
        env.render(10, 10)


@jax.jit
def swing(keys, obs):
    """Chunks of three actions that depend on key and observation."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (3, 1), minval=-1.0))(keys)
    return 1.2 * noise + jnp.tanh(obs)[:, None, 1:2]


@needs_mjx
@pytest.mark.slow
def test_roll_outs_are_dm_controls(monkeypatch):
    """Chunks of 3 in 10 steps, 5 episodes in batches of 2, actions that are clipped."""
    monkeypatch.setattr("psec_jax.evaluation.MAX_ON_DEVICE", 2)
    for got, expected in zip(
        record(swing, SWING, 5, 3), record(swing, plain(SWING), 5, 3), strict=True
    ):
        if isinstance(got, list):
            assert got == expected
        else:
            chex.assert_trees_all_close(got, expected, atol=1e-5)
            chex.assert_trees_all_equal_dtypes(got, expected)


@needs_mjx
def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError, match=r"gave actions \(2, 4\), .* expects \(2, 1\)"):
        evaluate(lambda k, o: jnp.zeros((2, 4)), SWING, 2, 0)
    env = envs.make_on_device(SWING)
    played = mjx.Rollout(np.zeros((10, 2)), np.ones((10, 2), bool), None, None)
    played.finite[3:, 1] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "roll_out", lambda *_: played)
        with pytest.raises(FloatingPointError, match="in step 3 of episode 1"):
            evaluate(lambda k, o: jnp.zeros((2, 1)), SWING, 2, 0)


@needs_mjx
@pytest.mark.slow
def test_policies_that_are_alike_share_a_program():
    network = NetworkConfig(
        width=8, blocks=1, expansion=1, time_features=4, time_width=8
    )
    sizes = benchmark.Sizes(network=network)
    one = benchmark.make_policy(sizes, skills=1, obs_dim=3, action_dim=1)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, one.params)
    two = dataclasses.replace(one, params=params)
    assert alike(one, two)
    for policies in ((one, two), (two, one)):
        before = mjx._simulate._cache_size()
        together = evaluate_together(act_together(policies), 2, SWING, 3, 0)
        alone = [evaluate(policy.act, SWING, 3, 0) for policy in policies]
        assert mjx._simulate._cache_size() - before == (2 if policies[0] is one else 0)
        for got, expected in zip(together, alone, strict=True):
            chex.assert_trees_all_close(got, expected, atol=1e-4)
    expected = evaluate(one.act, plain(SWING), 3, 0)
    chex.assert_trees_all_close(evaluate(one.act, SWING, 3, 0), expected, atol=1e-4)
    wrong = benchmark.make_policy(sizes, obs_dim=4, action_dim=1)
    with pytest.raises(InputError, match="have 3 numbers, the policy's base expects 4"):
        evaluate(wrong.act, SWING, 3, 0)


@needs_mjx
@pytest.mark.slow
def test_nan_is_reported_where_it_appears():
    def until(keys, obs):
        return jnp.where(obs[:, :1] > -2, jnp.nan, 0.0)

    with pytest.raises(FloatingPointError, match="in step 0 of episode 0"):
        evaluate(until, SWING, 2, 0)
    env = envs.make(SWING)
    sound = env.advance
    env.advance = lambda m, d, a: (*sound(m, d, a)[:2], jnp.float32(jnp.inf))
    zeros = np.zeros((10, 2, 1), np.float32)
    with pytest.raises(InputError, match="not finite in step 0 of .* seed 7"):
        env.roll_out(lambda x, obs: x, zeros, [7, 8], keep=False)


@needs_mjx
@pytest.mark.slow
def test_processes_step_it_too():
    def act(keys, obs):
        return jnp.tanh(obs[:, :1])

    with VectorEnv(SWING, 2, 2) as vector:
        got = evaluate(act, SWING, 3, 0, vector_env=vector)
    chex.assert_trees_all_close(got, evaluate(act, SWING, 3, 0), atol=1e-5)


@needs_mjx
@pytest.mark.slow
def test_several_policies_play_as_each_alone():
    def act(keys, obs):
        return jnp.tanh(obs[:, :1])

    def both(keys, obs):
        return jnp.stack([act(keys[0], obs[0]), -act(keys[1], obs[1])])

    got = evaluate_together(both, 2, SWING, 3, 0)
    expected = [evaluate(act, SWING, 3, 0), evaluate(lambda *x: -act(*x), SWING, 3, 0)]
    for one, other in zip(got, expected, strict=True):
        chex.assert_trees_all_close(one, other, atol=1e-5)


@needs_mjx
@pytest.mark.slow
def test_collected_data_are_dm_controls(tmp_path):
    """Over five steps, in which rounding has not grown; the same noise, too."""
    policy = str(experts.expert_path("mjx:walker-walk"))
    mine, other = (
        d4rl.load(collect(spec, policy, 3, 1, 0.2, out=tmp_path / f"{i}.hdf5"))
        for i, spec in enumerate((WALK, plain(WALK)))
    )
    chex.assert_trees_all_close(mine[0], other[0], atol=1e-2)
    np.testing.assert_allclose(mine[0].obs[:, :15], other[0].obs[:, :15], atol=1e-4)
    assert mine[1]["policy_sha256"] == other[1]["policy_sha256"]


@needs_mjx
@pytest.mark.slow
@pytest.mark.parametrize("name", mjx.TASKS)
def test_a_step_is_dm_controls(name):
    """From 50 states of random play, with the same actions."""
    other, env = envs.make(f"dm_control:{name}"), envs.make(f"mjx:{name}")
    generator = np.random.default_rng(1)
    starts, actions, steps = [], [], []
    for _ in states(other, 50):
        data = other._env.physics.data
        starts.append((np.float32(data.qpos), np.float32(data.qvel)))
        actions.append(np.float32(generator.uniform(-1, 1, env.action_dim)))
        steps.append(other.step(actions[-1]))

    @jax.jit
    def advance(model, qpos, qvel, action):
        return jax.vmap(
            lambda q, v, a: env.advance(model, env.start(model, q, v), a)[1:]
        )(qpos, qvel, action)

    qpos, qvel = (np.stack(part) for part in zip(*starts, strict=True))
    obs, reward = advance(env.model, qpos, qvel, np.stack(actions))
    expected = np.stack([step.obs for step in steps])
    np.testing.assert_allclose(obs, expected, atol=TOLERANCE)
    np.testing.assert_allclose(reward, [step.reward for step in steps], atol=TOLERANCE)


TOLERANCE = 1e-3  # of an observation or reward after one control step
