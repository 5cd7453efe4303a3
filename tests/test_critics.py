"""Losses, targets and weights by hand; critics that learn known values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import tree
from psec_jax.agents import critics
from psec_jax.agents.common import Transitions, make_transitions, reward_scale
from psec_jax.agents.critics import CRITICS, CriticConfig
from psec_jax.errors import InputError
from psec_jax.losses import (
    OBJECTIVES,
    Sampled,
    Value,
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
    return Transitions(x[0], action, reward, jnp.abs(reward), h, x[1], mask)


@functools.cache
def state():
    return critics.init(TINY, jax.random.key(0), S, A)


def values_of(q, v, q_h, v_h):
    """What critics of reward and safety say of one transition."""
    q, v, q_h, v_h = scalars(q, v, q_h, v_h)
    return {"reward": Value(q, v), "safety": Value(q_h, v_h)}


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
    got = OBJECTIVES[objective].weight(config, values_of(*values))
    close(got, expected)


def test_floor_of_fisors_released_code():
    config = WeightConfig(infeasible_floor=1.0)
    close(OBJECTIVES["fisor"].weight(config, values_of(9, 0, 3, 1)), 1)
    close(OBJECTIVES["fisor"].weight(config, values_of(0, 0, 1, -1)), 0)


def test_an_objective_reads_the_critics_it_names():
    for objective in OBJECTIVES.values():
        values = {kind: Value(*scalars(1, 0)) for kind in objective.critics}
        assert np.isfinite(objective.weight(WeightConfig(), values))
        if objective.term is not None:
            size = dict.fromkeys(values, jnp.float32(2))
            sampled = Sampled(jnp.zeros(A), values, size)
            assert np.isfinite(objective.term(WeightConfig(), sampled))


def test_term_of_dql_by_hand():
    values = {"reward": Value(*scalars(3, 0))}
    sampled = Sampled(jnp.zeros(A), values, {"reward": jnp.float32(6)})
    got = OBJECTIVES["dql"].term(WeightConfig(eta=0.5), sampled)
    close(got, -0.5 * 3 / 6)
    assert OBJECTIVES["dql"].weight(WeightConfig(), values) == 1


def test_transitions_of_a_dataset():
    ds = dataset()
    assert reward_scale(ds) == pytest.approx(4 / (16 - 2))
    rows = make_transitions(ds, IDENTITY, scale=2.0)
    close(rows.reward, 2 * ds.reward)
    close(rows.h, np.where(np.arange(12) == 3, 25, -1))
    close(rows.cost, np.where(np.arange(12) == 3, 0.5, 0))
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
    make_transitions(free, IDENTITY, costs=critics.reads_costs(("reward",)))
    assert critics.reads_costs(("reward", "safety")) and critics.reads_costs(("cost",))
    same = dataset(reward=np.zeros(12, np.float32))
    with pytest.raises(InputError, match="every trajectory has return 0"):
        reward_scale(same)
    for config, fields in (
        (CriticConfig, {"discount": 1.0}),
        (CriticConfig, {"safety_expectile": 0.0}),
        (CriticConfig, {"cost_expectile": 1.0}),
        (CriticConfig, {"kinds": ()}),
        (CriticConfig, {"kinds": ("cost", "cost")}),
        (CriticConfig, {"target_rate": 0.0}),
        (CriticConfig, {"learning_rate": 0.0}),
        (CriticConfig, {"widths": (0,)}),
        (WeightConfig, {"clip": 0.0}),
        (WeightConfig, {"reward_temperature": -1.0}),
        (WeightConfig, {"eta": -1.0}),
    ):
        with pytest.raises(InputError, match=f"^{next(iter(fields))}: got"):
            config(**fields)
    with pytest.raises(InputError, match="critic 'risk'; choose from cost, reward"):
        CriticConfig(kinds=("reward", "risk"))
    with pytest.raises(InputError, match="critics of reward and safety: none of cost"):
        critics.of_kind(state().trained, ("reward", "safety"), "cost")


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
        values, critics.values(state().trained, TINY.kinds, rows.obs, rows.action)
    )


@pytest.mark.parametrize("kind", CRITICS)
def test_a_critic_learns_the_same_beside_others(kind):
    kinds = ("cost", "reward", "safety")
    config = dataclasses.replace(TINY, kinds=kinds)
    together = critics.init(config, jax.random.key(0), S, A)

    def only(state):
        k = kinds.index(kind)
        return jax.tree.map(lambda x: x[k : k + 1] if x.ndim else x, state)

    alone = dataclasses.replace(TINY, kinds=(kind,))
    got, values, _ = jax.jit(functools.partial(critics.step, alone))(
        only(together), transitions()
    )
    expected, _, _ = jax.jit(functools.partial(critics.step, config))(
        together, transitions()
    )
    tiny.assert_trees_close(got, only(expected), atol=1e-5, rtol=1e-4)
    assert set(values) == {kind}
    one = critics.of_kind(expected.trained, kinds, kind)
    expected = jax.tree.map(lambda x: x[0], only(expected).trained)
    tiny.assert_trees_equal(one, expected)


def test_known_values():
    """One step to the end: Q is the signal, and V is its expectile over the actions."""
    config = CriticConfig(
        ("reward", "safety", "cost"),
        widths=(32,),
        learning_rate=1e-2,
        target_rate=0.1,
        cost_expectile=0.5,
    )
    arm = jnp.where(jnp.arange(N) % 2, 1.0, -1.0)
    data = Transitions(
        obs=jnp.zeros((N, S)),
        action=arm[:, None] * jnp.ones(A),
        reward=arm,
        cost=jnp.where(arm > 0, 3.0, 0.0),
        h=jnp.where(arm > 0, 25.0, -1.0),
        next_obs=jnp.zeros((N, S)),
        mask=jnp.zeros(N),
    )
    update = jax.jit(functools.partial(critics.update, config))
    trained = critics.init(config, jax.random.key(0), S, A)
    for _ in range(600):
        trained, _ = update(trained, data)
    got = critics.values(trained.trained, config.kinds, data.obs, data.action)
    np.testing.assert_allclose(got["reward"].q, data.reward, atol=0.1)
    np.testing.assert_allclose(got["safety"].q, data.h, atol=0.5)
    np.testing.assert_allclose(got["cost"].q, data.cost, atol=0.1)
    np.testing.assert_allclose(got["reward"].v, 0.7 - 0.3, atol=0.2)
    np.testing.assert_allclose(got["safety"].v, 0.1 * 25 - 0.9, atol=0.6)
    np.testing.assert_allclose(got["cost"].v, 1.5, atol=0.2)


def test_a_sum_of_costs():
    """A cost of 1 a step for ever: 1 / (1 - gamma)."""
    config = CriticConfig(
        ("cost",), widths=(), discount=0.8, learning_rate=1e-2, target_rate=0.1
    )
    ones = jnp.ones(N)
    zeros = jnp.zeros((N, S))
    data = Transitions(zeros, jnp.zeros((N, A)), 0 * ones, ones, ones, zeros, ones)
    update = jax.jit(functools.partial(critics.update, config))
    trained = critics.init(config, jax.random.key(0), S, A)
    for _ in range(1500):
        trained, _ = update(trained, data)
    got = critics.values(trained.trained, config.kinds, data.obs, data.action)
    np.testing.assert_allclose(got["cost"].q, 5, atol=0.05)
    np.testing.assert_allclose(got["cost"].v, 5, atol=0.05)
