"""Losses, targets and weights by hand; critics that find known values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import tree
from psec_jax.agents import critic_file, critics
from psec_jax.agents.common import Transitions, make_transitions, reward_scale
from psec_jax.agents.critics import CriticConfig
from psec_jax.errors import InputError
from psec_jax.losses import (
    OBJECTIVES,
    Values,
    WeightConfig,
    expectile_loss,
    feasibility_target,
    reversed_expectile_loss,
    td_target,
)
from psec_jax.types import Dataset, Normaliser

N, S, A = 64, 3, 2
TINY = CriticConfig(widths=(8,), batch_size=16)
IDENTITY = Normaliser(np.zeros(S, np.float32), np.ones(S, np.float32))


def scalars(*numbers):
    return [jnp.float32(x) for x in numbers]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def dataset(**changes):
    """Four trajectories of 2, 4, 2 and 4 steps; the second ends by itself."""
    ends = np.isin(np.arange(12), [1, 5, 7, 11])
    obs = np.asarray(tiny.normal(12, S))
    columns = {
        "obs": obs,
        "action": np.zeros((12, A), np.float32),
        "reward": np.repeat(np.float32([1, 2, 3, 4]), [2, 4, 2, 4]),
        "cost": np.where(np.arange(12) == 3, 0.5, 0).astype(np.float32),
        "next_obs": obs + 1,
        "terminal": np.arange(12) == 5,
        "timeout": ends & (np.arange(12) != 5),
    }
    return Dataset(**columns | changes)


def transitions(count=N, seed=0):
    x = [tiny.normal(count, *shape, seed=seed + i) for i, shape in enumerate([[S]] * 2)]
    action = jnp.tanh(tiny.normal(count, A, seed=seed + 2))
    reward = tiny.normal(count, seed=seed + 3)
    h = jnp.where(reward > 0.5, 25.0, -1.0)
    mask = (jnp.arange(count) % 4 > 0).astype(jnp.float32)
    return Transitions(x[0], action, reward, h, x[1], mask)


@functools.cache
def state(safety=True):
    config = dataclasses.replace(TINY, safety=safety)
    return critics.init(config, jax.random.key(0), S, A)


def test_losses_by_hand():
    up, down = scalars(2, -2)
    close(expectile_loss(up, 0.7), 0.7 * 4)
    close(expectile_loss(down, 0.7), 0.3 * 4)
    close(reversed_expectile_loss(up, 0.9), 0.1 * 4)
    close(reversed_expectile_loss(down, 0.9), 0.9 * 4)


def test_targets_by_hand():
    r, go, end, v = scalars(3, 1, 0, 10)
    close(td_target(r, go, v, 0.9), 3 + 0.9 * 10)
    close(td_target(r, end, v, 0.9), 3)
    bad, fine, low = scalars(25, -1, -0.5)
    close(feasibility_target(bad, go, low, 0.9), 25)
    close(feasibility_target(fine, go, low, 0.9), -0.1 - 0.9 * 0.5)
    close(feasibility_target(fine, go, v, 0.9), -0.1 + 9)
    close(feasibility_target(fine, end, v, 0.9), -1)


@pytest.mark.parametrize(
    ("objective", "values", "expected"),
    [
        ("bc", (5, 0, 5, 0), 1),
        ("reward", (1.5, 1, 9, -9), np.exp(2 * 0.5)),
        ("reward", (1, 1.5, 9, -9), np.exp(-2 * 0.5)),
        ("reward", (99, 0, 0, 0), 100),
        ("safety", (0, 0, -1, 1), np.exp(0.5 * 2)),
        ("safety", (0, 0, 1, -1), 0),
        ("safety", (0, 0, 1, 1), 0),
        ("safety", (0, 0, -99, 0), 100),
        ("fisor", (1.5, 1, -0.1, -0.5), np.exp(2 * 0.5)),
        ("fisor", (1.5, 1, 0.1, -0.5), 0),
        ("fisor", (9, 0, 1, 3), np.exp(0.5 * 2)),
        ("fisor", (9, 0, 3, 1), np.exp(-0.5 * 2)),
    ],
)
def test_weights_by_hand(objective, values, expected):
    config = WeightConfig(reward_temperature=2.0, safety_temperature=0.5)
    got = OBJECTIVES[objective].weight(config, Values(*scalars(*values)))
    close(got, expected)


def test_floor_of_fisors_released_code():
    config = WeightConfig(infeasible_floor=1.0)
    close(OBJECTIVES["fisor"].weight(config, Values(*scalars(9, 0, 3, 1))), 1)
    close(OBJECTIVES["fisor"].weight(config, Values(*scalars(0, 0, 1, -1))), 0)


def test_an_objective_reads_the_critics_it_names():
    reward_alone = Values(*scalars(1, 0))
    for name, objective in OBJECTIVES.items():
        if "safety" not in objective.critics:
            assert np.isfinite(objective.weight(WeightConfig(), reward_alone)), name


def test_transitions_of_a_dataset():
    ds = dataset()
    assert reward_scale(ds) == pytest.approx(4 / (16 - 2))
    rows = make_transitions(ds, IDENTITY, scale=2.0)
    close(rows.reward, 2 * ds.reward)
    close(rows.h, np.where(np.arange(12) == 3, 25, -1))
    close(rows.mask, np.arange(12) != 5)
    released = make_transitions(ds, IDENTITY, bootstrap_timeouts=False)
    close(released.mask, ~np.isin(np.arange(12), [1, 5, 7, 11]))
    shifted = Normaliser(np.full(S, 1, np.float32), np.full(S, 2, np.float32))
    rows = make_transitions(ds, shifted)
    close(rows.obs, (ds.obs - 1) / 2)
    close(rows.next_obs, ds.obs / 2)


def test_refusals():
    negative = dataset(cost=np.where(np.arange(12) < 2, -1, 0).astype(np.float32))
    with pytest.raises(InputError, match="x: 2 of 12 costs are negative"):
        make_transitions(negative, IDENTITY, source="x")
    free = dataset(cost=np.zeros(12, np.float32))
    with pytest.raises(InputError, match="x: no transition has a cost above 0"):
        make_transitions(free, IDENTITY, source="x")
    make_transitions(free, IDENTITY, safety=False)
    same = dataset(reward=np.zeros(12, np.float32))
    with pytest.raises(InputError, match="every trajectory has return 0"):
        reward_scale(same)
    for config, fields in (
        (CriticConfig, {"discount": 1.0}),
        (CriticConfig, {"safety_expectile": 0.0}),
        (CriticConfig, {"target_rate": 0.0}),
        (CriticConfig, {"learning_rate": 0.0}),
        (CriticConfig, {"widths": (0,)}),
        (WeightConfig, {"clip": 0.0}),
        (WeightConfig, {"reward_temperature": -1.0}),
    ):
        with pytest.raises(InputError, match=next(iter(fields))):
            config(**fields)


def test_a_step_trains_every_network_and_moves_targets_slowly():
    before = jax.tree.map(np.array, state())
    step = jax.jit(functools.partial(critics.step, TINY))
    after, values, metrics = step(state(), transitions())
    tiny.assert_trees_equal(state(), before)
    assert after.step == 1 and all(np.isfinite(x) for x in metrics.values())
    for part in ("q", "v"):
        old = tree.flatten(getattr(before, part).params)
        for path, leaf in tree.flatten(getattr(after, part).params).items():
            assert np.any(leaf != old[path]), path
    expected = jax.tree.map(
        lambda p, t: 0.005 * p + 0.995 * t, after.q.params, before.q.ema
    )
    tiny.assert_trees_close(after.q.ema, expected, atol=1e-6)
    tiny.assert_trees_equal(after.v.ema, after.v.params)
    rows = transitions()
    tiny.assert_trees_close(
        values, critics.values(state().trained, rows.obs, rows.action)
    )


def test_the_critic_of_reward_does_not_hear_of_safety():
    alone = dataclasses.replace(TINY, safety=False)
    both = state()
    first = jax.tree.map(lambda x: x[:1] if x.ndim else x, both)
    got, values, _ = jax.jit(functools.partial(critics.step, alone))(
        first, transitions()
    )
    expected, _, _ = jax.jit(functools.partial(critics.step, TINY))(both, transitions())
    expected = jax.tree.map(lambda x: x[:1] if x.ndim else x, expected)
    tiny.assert_trees_close(got, expected, atol=1e-5, rtol=1e-4)
    assert values.q_h is None and values.v_h is None


def test_known_values():
    """One step to the end: Q is the reward, Q_h is h, and V lies where they say."""
    config = CriticConfig(
        widths=(32,), learning_rate=1e-2, target_rate=0.1, batch_size=64
    )
    arm = jnp.where(jnp.arange(N) % 2, 1.0, -1.0)
    data = Transitions(
        obs=jnp.zeros((N, S)),
        action=arm[:, None] * jnp.ones(A),
        reward=arm,
        h=jnp.where(arm > 0, 25.0, -1.0),
        next_obs=jnp.zeros((N, S)),
        mask=jnp.zeros(N),
    )
    update = jax.jit(functools.partial(critics.update, config))
    trained = critics.init(config, jax.random.key(0), S, A)
    for key in tiny.keys(600):
        trained, _ = update(trained, data, key)
    got = critics.values(trained.trained, data.obs, data.action)
    np.testing.assert_allclose(got.q, data.reward, atol=0.1)
    np.testing.assert_allclose(got.q_h, data.h, atol=0.5)
    np.testing.assert_allclose(got.v, 0.7 - 0.3, atol=0.2)
    np.testing.assert_allclose(got.v_h, 0.1 * 25 - 0.9, atol=0.6)


def test_file(tmp_path):
    params = state().trained
    card = critic_file.save(tmp_path, params, IDENTITY, {"kinds": ["reward"]}).card
    got, normaliser, read = critic_file.load(tmp_path)
    tiny.assert_trees_equal(got, params)
    tiny.assert_trees_equal(normaliser, IDENTITY)
    assert read == card and len(card["fingerprint"]) == 16
    path = tmp_path / critic_file.NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="do not match its fingerprint"):
        critic_file.load(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a file of critics"):
        critic_file.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="holds no finished critics"):
        critic_file.load(tmp_path)
