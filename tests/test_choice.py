"""Critics that choose among candidate weights and samples, and estimates of costs."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax.agents import fitted_q
from psec_jax.agents import gate as agent
from psec_jax.agents.common import Demonstrations, OptimiserConfig, Transitions
from psec_jax.agents.fitted_q import FittedQConfig
from psec_jax.agents.gate import GateTrainConfig
from psec_jax.choice import RULES, judge
from psec_jax.composition import (
    PolicyConfig,
    PolicyParams,
    act,
    action_noise,
    choose,
    sampler,
)
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, gate_alpha, init_gate
from psec_jax.lora import layers_of
from psec_jax.networks.critics import init_q, q_value, twin_q
from psec_jax.types import Normaliser
from psec_jax.workflows import estimates
from psec_jax.workflows.gate import candidate_weights

S, A, K = tiny.OBS_DIM, tiny.ACTION_DIM, tiny.SKILLS
ALPHAS = jnp.array([[2.0, 0, 0], [0, 2.0, 0], [0, 1, 1], [0, 0, 0]])
SELECT = GateConfig(head="select", candidates=3)
CONFIG = PolicyConfig(
    tiny.NETWORK, tiny.PROCESS, A, gate=SELECT, candidates=3, rule="reward_cost"
)


def twins(seed):
    make = functools.partial(init_q, (16,), obs_dim=S, action_dim=A)
    return tiny.randomised(lambda: jax.vmap(make)(tiny.keys(2)), seed)


@functools.cache
def params():
    return PolicyParams(
        tiny.base(),
        Normaliser(jnp.ones(S), jnp.full(S, 2.0)),
        tiny.library(),
        jnp.full(K, 2.0),
        {"head": {"alphas": ALPHAS}},
        {kind: twins(seed) for seed, kind in enumerate(("reward", "cost", "safety"))},
        jnp.float32(0.5),
    )


def by_hand(key, obs):
    """Weights, actions and values of all candidates, one after the other."""
    config = dataclasses.replace(CONFIG, gate=GateConfig(head="constant"))
    obs = params().normaliser(obs)
    draw = jax.jit(sampler(config, params(), obs))
    rows = jnp.repeat(ALPHAS, 3, axis=0)
    noise = [action_noise(config, k) for k in jax.random.split(key, 12)]
    actions = [draw(z, w) for z, w in zip(noise, rows, strict=True)]
    said = {
        kind: np.transpose([twin_q(q, obs, action) for action in actions])
        for kind, q in (params().critics or {}).items()
    }
    q = np.min(said["reward"], axis=0)
    q_c, q_h = np.max(said["cost"], axis=0), np.max(said["safety"], axis=0)
    return rows, actions, q, q_c, q_h


@pytest.mark.parametrize("rule", RULES)
def test_the_chosen_one_is_the_best_by_hand(rule):
    obs, key = tiny.normal(S), jax.random.key(3)
    rows, actions, q, q_c, q_h = by_hand(key, obs)
    feasible = np.where(q_h <= 0, q, -np.inf) if (q_h <= 0).any() else -q_h
    best = np.argmax(
        {
            "reward": q,
            "cost": -q_c,
            "safety": -q_h,
            "feasible": feasible,
            "reward_cost": q - 0.5 * q_c,
        }[rule]
    )
    config = dataclasses.replace(CONFIG, rule=rule)
    got = jax.jit(functools.partial(choose, config, params()))(key, obs)
    assert got.chosen == best
    np.testing.assert_array_equal(got.alpha, rows[best])
    np.testing.assert_allclose(got.action, actions[best], atol=1e-5)
    np.testing.assert_allclose(got.values["cost"], q_c, atol=1e-5)
    action = jax.jit(functools.partial(act, config, params()))(key, obs)
    np.testing.assert_array_equal(action, got.action)


def test_critics_choose_among_samples_with_weights_of_each_layer():
    layers = len(layers_of(tiny.library()))
    alpha = tiny.normal(layers, K, seed=7)
    form = GateConfig(head="constant", layers=layers)
    config = dataclasses.replace(CONFIG, gate=form)
    gated = params()._replace(gate={"head": {"alpha": alpha}})
    obs, key = tiny.normal(S), jax.random.key(3)
    got = jax.jit(functools.partial(choose, config, gated))(key, obs)
    np.testing.assert_array_equal(got.alpha, alpha)
    assert len(got.values["cost"]) == 3
    draw = jax.jit(sampler(config, gated, gated.normaliser(obs)))
    one = draw(action_noise(config, jax.random.split(key, 3)[got.chosen]), alpha)
    np.testing.assert_allclose(got.action, one, atol=1e-5)


def test_no_feasible_candidate_is_the_least_harm():
    score = RULES["feasible"].score
    q, zero = jnp.array([1.0, 9.0, 5.0]), jnp.zeros(())
    harm = jnp.array([2.0, 3.0, 4.0])
    assert jnp.argmax(score({"reward": q, "safety": harm}, zero)) == 0
    mixed = jnp.array([-2.0, 3.0, -4.0])
    assert jnp.argmax(score({"reward": q, "safety": mixed}, zero)) == 2


def test_the_order_of_candidates_does_not_matter_and_support_withholds():
    obs = tiny.normal(S)
    demos = obs[None, None] + jnp.zeros((K, 1, 1))
    support = {
        "demos": jnp.repeat(demos, 2, axis=1) + jnp.array([0.0, 1e3])[None, :, None],
        "valid": jnp.ones((K, 2), bool),
        "tau": jnp.array([1.0, 1e-3, 1.0]),
        "scale": jnp.ones((K, S)),
    }
    form = dataclasses.replace(SELECT, support="neighbour", priority=False)
    gate = init_gate(form, jax.random.key(0), S, ALPHAS, support)
    np.testing.assert_allclose(gate_alpha(form, gate, obs), ALPHAS)
    far = gate_alpha(form, gate, obs + 0.5)
    np.testing.assert_allclose(far[1], [0, 0, 0], atol=1e-6)
    assert 0 < far[0, 0] < 2 and far[2, 1] == 0 and far[2, 2] > 0


def test_refusals():
    with pytest.raises(InputError, match="unknown rule 'magic'; choose from cost"):
        dataclasses.replace(CONFIG, rule="magic")
    with pytest.raises(InputError, match="candidates: got 0"):
        dataclasses.replace(SELECT, candidates=0)
    without = params()._replace(critics={"reward": twins(0)})
    with pytest.raises(InputError, match="by reward_cost needs a critic of cost"):
        choose(CONFIG, without, jax.random.key(0), tiny.normal(S))
    chunks = dataclasses.replace(tiny.PROCESS, horizon=2)
    with pytest.raises(InputError, match="chunks of 2 actions, expected 1: critics"):
        dataclasses.replace(CONFIG, process=chunks)


def test_candidates_of_the_weights():
    strength = jnp.array([16.0, 8.0])
    got = candidate_weights(strength, False).tolist()
    expected = [[16, 0], [12, 2], [8, 4], [4, 6], [0, 8], [0, 0]]
    assert got == expected
    shares = candidate_weights(strength, True)
    assert len(shares) == 15 and np.allclose(shares.sum(1), 1)
    np.testing.assert_array_equal(
        candidate_weights(strength, False, ((1.0, 2.0),)), [[1.0, 2.0]]
    )
    with pytest.raises(InputError, match=r"alphas: got \(1.0,\), expected 2 weights"):
        candidate_weights(strength, False, ((1.0,),))
    with pytest.raises(InputError, match="alphas: got none for 6 weights"):
        candidate_weights(jnp.ones(6), False)


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        ("critic", {"head": "sigmoid"}),
        ("selected", {"head": "sigmoid"}),
        ("selected", {"head": "softmax", "temperature": 2.0, "layers": 6}),
    ],
)
def test_a_gate_that_critics_train(loss, fields):
    """Through the sampler the score rises; by imitation the weights become the chosen
    ones of a state that always has the same best candidate."""
    form = GateConfig(widths=(16,), candidates=3, **fields)
    config = GateTrainConfig(
        dataclasses.replace(CONFIG, gate=form, candidates=1),
        loss,
        OptimiserConfig(1e-2, weight_decay=0.0, ema=1.0),
        batch_size=32,
    )
    gate = init_gate(form, jax.random.key(0), S, jnp.full(K, 2.0))
    frozen = params()._replace(gate=gate | {"alphas": ALPHAS})
    rows = Demonstrations(tiny.normal(32, S), jnp.zeros((32, A)))
    update = jax.jit(functools.partial(agent.update, config))
    state = agent.init(config, gate)
    losses = []
    for step in range(60):
        key = jax.random.fold_in(jax.random.key(1), step)
        state, metrics = update(state, rows, frozen, key)
        losses.append(float(metrics["loss/gate"]))
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    head = state.params
    np.testing.assert_array_equal(head["strength"], gate["head"]["strength"])
    assert not np.allclose(
        head["mlp"]["output"]["bias"], gate["head"]["mlp"]["output"]["bias"]
    )


def chain():
    """Right of 0 every step costs 1; an action moves there (+1) or away (-1)."""
    generator = np.random.default_rng(0)
    obs = generator.uniform(-1, 1, (4000, 1)).astype(np.float32)
    action = generator.uniform(-1, 1, (4000, 1)).astype(np.float32)
    cost = (action[:, 0] > 0).astype(np.float32)
    zero = np.zeros(4000, np.float32)
    mask = np.ones(4000, np.float32)
    return Transitions(obs, action, 2 * cost, cost, zero, -obs, mask)


def test_estimates_of_policies_whose_cost_is_known():
    """Always at +0.9: 1 / (1 - gamma); always at -0.9: 0; half of the time: half."""
    discount = 0.8
    data = estimates.Logged(chain(), np.zeros((50, 1), np.float32), 100)
    config = FittedQConfig(steps=3000, batch_size=256, learning_rate=1e-3)
    make = functools.partial(init_q, (32,), obs_dim=1, action_dim=1)
    q = jax.vmap(make)(tiny.keys(2))

    def draw(key, obs):
        coin = jnp.where(jax.random.bernoulli(key), 0.9, -0.9)
        return jnp.stack([jnp.array([0.9]), jnp.array([-0.9]), coin[None]])

    key = jax.random.key(0)
    cost = estimates.discounted(config, data, draw, "cost", q, discount, key).means
    np.testing.assert_allclose(cost, [5, 0, 2.5], atol=0.3)
    reward = estimates.discounted(config, data, draw, "reward", q, discount, key).means
    np.testing.assert_allclose(reward, [10, 0, 5], atol=0.5)


def test_no_estimate_is_beyond_what_any_policy_can_have():
    assert fitted_q.sum_of(np.array([0.0, 2.0]), 0.75) == (0.75, 0, 8)
    assert fitted_q.sum_of(np.array([-1.0, -0.5]), 0.75) == (0.75, -4, 0)
    # Targets from a Q far below 0, as one that is extrapolated may be, are costs alone.
    config = FittedQConfig(batch_size=8, learning_rate=1e-2, target_rate=1.0)
    q = init_q((4,), jax.random.key(0), 1, 1)
    q["output"]["bias"] = q["output"]["bias"] - 100
    state = fitted_q.init(config, q, 1)
    zero = jnp.zeros((8, 1))
    batch = fitted_q.Steps(zero, zero, jnp.ones(8), zero, zero[:, None], jnp.ones(8))
    now = q_value(q, zero[0], zero[0])
    summed = fitted_q.Sum(0.9, 0.0, 10.0)
    _, metrics = fitted_q.update(config, state, batch, summed, jax.random.key(1))
    np.testing.assert_allclose(metrics["loss/fitted_q"], (now - 1) ** 2, rtol=1e-5)


def test_each_weight_is_judged_by_its_own_q():
    make = functools.partial(init_q, (8,), obs_dim=S, action_dim=A)
    each = jax.vmap(jax.vmap(make))(tiny.keys(3)[:, None])
    obs, actions = tiny.normal(S), tiny.normal(6, A)
    got = judge({"cost": each}, obs, actions, own=True)["cost"]
    first, second = actions[::2], actions[1::2]  # two candidates of each weight
    every = jax.vmap(jax.vmap(q_value, (0, None, None)), (0, None, 0))
    by_hand = [every(each, obs, some)[:, 0] for some in (first, second)]
    np.testing.assert_allclose(got, np.transpose(by_hand).ravel(), rtol=1e-5)


def test_policies_train_as_they_would_alone():
    config = FittedQConfig(steps=3, batch_size=8)
    data = estimates.Logged(chain(), np.zeros((2, 1), np.float32), 10)
    make = functools.partial(init_q, (8,), obs_dim=1, action_dim=1)
    q, key = jax.vmap(make)(tiny.keys(2)), jax.random.key(0)

    def both(key, obs):
        return jnp.array([[0.5], [-0.5]])

    def second(key, obs):
        return jnp.array([[-0.5]])

    together = estimates.discounted(config, data, both, "cost", q, 0.9, key).means
    alone = estimates.discounted(config, data, second, "cost", q, 0.9, key).means
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5)


def test_the_smallest_cost_weight_within_the_budget():
    assert estimates.budget(10.0, 100, 0.99) == pytest.approx(
        sum(0.1 * 0.99**t for t in range(100))
    )
    got = estimates.smallest_within([2.0, 0.5, 1.0], [1.0, 9.0, 3.0], 4.0)
    assert got.cost_weight == 1.0 and got.card["within_budget"]
    assert got.card["estimated_costs"] == [[0.5, 9.0], [1.0, 3.0], [2.0, 1.0]]
    none = estimates.smallest_within([2.0, 0.5], [8.0, 9.0], 4.0)
    assert none.cost_weight == 2.0 and not none.card["within_budget"]


def test_each_cost_weight_chooses_among_the_same_candidates():
    weights = [0.0, 0.5, 50.0]
    draw = jax.jit(estimates.priced(CONFIG, params(), weights))
    obs, key = tiny.normal(S), jax.random.key(3)
    got = draw(key, params().normaliser(obs))
    for weight, action in itertools.zip_longest(weights, got):
        one = params()._replace(cost_weight=jnp.float32(weight))
        np.testing.assert_allclose(act(CONFIG, one, key, obs), action, atol=1e-5)


def test_every_field_of_the_evaluation_is_checked():
    with pytest.raises(InputError, match="steps: got 0"):
        FittedQConfig(steps=0)
    with pytest.raises(InputError, match="target_rate: got 2"):
        FittedQConfig(target_rate=2.0)
    assert fitted_q.FittedQConfig().optimiser.ema == 0.05
