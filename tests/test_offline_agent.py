"""Skills from rewards and costs: what is trained, and problems of known answer.

Two arms, +SIDE and -SIDE, are in the data equally often. The first is rewarded and has
a cost, the second neither: the reward skill must take the first, the safety skill the
second. Then rewards that are best off the data.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import losses, tree
from psec_jax.agents import cloning, critics, offline
from psec_jax.agents.cloning import AdapterConfig, CloningConfig
from psec_jax.agents.common import OptimiserConfig, Transitions, batch_noise
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.offline import Frozen, OfflineConfig
from psec_jax.composition import PolicyConfig, PolicyParams, act
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig
from psec_jax.losses import OBJECTIVES, Objective, WeightConfig
from psec_jax.process import ProcessConfig
from psec_jax.runtime import platform
from psec_jax.types import Normaliser

N, BATCH, SIDE = 256, 64, 0.6
S, A = tiny.OBS_DIM, tiny.ACTION_DIM
ACTOR = CloningConfig(
    tiny.NETWORK,
    optimiser=OptimiserConfig(learning_rate=1e-2, weight_decay=0.0, ema=1.0),
    batch_size=BATCH,
    skill=AdapterConfig(rank=4, alpha=2.0),
)
BASE = dataclasses.replace(ACTOR, skill=None)
CRITICS = CriticConfig(
    widths=(16,), learning_rate=1e-2, target_rate=0.1, batch_size=BATCH
)
BOTH = OfflineConfig(ACTOR, ("reward", "safety"), CRITICS)


@functools.cache
def arms():
    arm = np.where(np.arange(N) % 2, 1.0, -1.0).astype(np.float32)
    noise = 0.05 * tiny.normal(N, A, seed=1)
    return Transitions(
        obs=tiny.normal(N, S),
        action=SIDE * arm[:, None] + noise,
        reward=jnp.asarray(10 * (arm > 0), jnp.float32),
        cost=jnp.asarray(arm > 0, jnp.float32),
        h=jnp.asarray(np.where(arm > 0, 25, -1), jnp.float32),
        next_obs=tiny.normal(N, S, seed=2),
        mask=jnp.zeros(N),
    )


@functools.cache
def compiled(config):
    update = functools.partial(offline.update, config)
    return jax.jit(tiny.drawing(update, config.batch_size))


def init(config, base=None):
    return offline.init(config, jax.random.key(0), S, A, base)


def run(config, state, frozen, steps, data=None):
    data = arms() if data is None else data
    for key in tiny.keys(steps):
        state, metrics = compiled(config)(state, data, frozen, key)
    return state, metrics


@functools.cache
def one_step():
    """Noise of every skill, and where one step on all rows leads from `init`."""
    noise = noise_of(jax.random.key(1), 2)
    step = jax.jit(functools.partial(offline.step, BOTH))
    got, _ = step(init(BOTH, tiny.base()), arms(), Frozen(tiny.base()), noise)
    return noise, got


@functools.cache
def trained():
    return run(BOTH, init(BOTH, tiny.base()), Frozen(tiny.base()), 800)[0]


def noise_of(key, count):
    draw = functools.partial(batch_noise, ACTOR.process, batch_size=N, action_dim=A)
    return jax.vmap(draw)(jax.random.split(key, count))


def test_each_skill_takes_its_arm():
    gate = GateConfig(head="constant")
    config = PolicyConfig(tiny.NETWORK, ACTOR.process, A, "parameter", gate)
    policy = jax.jit(jax.vmap(functools.partial(act, config), (None, 0, 0)))
    for k, side in enumerate((SIDE, -SIDE)):
        params = PolicyParams(
            tiny.base(),
            Normaliser(jnp.zeros(S), jnp.ones(S)),
            trained().actor.params,
            jnp.full(2, ACTOR.skill.alpha),
            {"head": {"alpha": ACTOR.skill.alpha * jnp.eye(2)[k]}},
        )
        got = policy(params, tiny.keys(N), arms().obs)
        assert np.mean(np.sign(side) * got > 0.2) > 0.9, BOTH.objectives[k]


def test_training_reaches_skills_and_critics_and_nothing_else():
    frozen, state = Frozen(tiny.base()), init(BOTH, tiny.base())
    before = jax.tree.map(np.array, (state, arms(), frozen))
    got, metrics = run(BOTH, state, frozen, 3)
    tiny.assert_trees_equal((state, arms(), frozen), before)
    assert got.step == 3 and got.critics.step == 3
    for old, new in (
        (state.actor.params, got.actor.params),
        (state.critics.q.params, got.critics.q.params),
        (state.critics.v.params, got.critics.v.params),
    ):
        old = tree.flatten(old)
        for path, leaf in tree.flatten(new).items():
            # Every entry of a stack, not only the first.
            changed = np.any(
                np.asarray(leaf != old[path]), axis=tuple(range(1, leaf.ndim))
            )
            assert changed.all(), path
    assert all(np.isfinite(value) for value in metrics.values())
    assert {"loss/reward", "loss/safety", "weight/reward", "weight/safety"} <= set(
        metrics
    )


def test_critics_beside_skills_are_critics_alone():
    """No gradient of a skill's loss reaches them."""
    state, (_, got) = init(BOTH, tiny.base()), one_step()
    alone = jax.jit(functools.partial(critics.step, CRITICS))
    expected, _, _ = alone(state.critics, arms())
    tiny.assert_trees_close(got.critics, expected, atol=1e-5, rtol=1e-4)


def test_skills_together_are_skills_alone_with_finished_critics():
    state, (noise, both) = init(BOTH, tiny.base()), one_step()
    frozen = Frozen(tiny.base(), state.critics.trained)
    for k, name in enumerate(BOTH.objectives):
        config = OfflineConfig(ACTOR, (name,), None, finished=CRITICS.kinds)
        one = functools.partial(
            jax.tree.map, lambda x, k=k: x[k : k + 1] if x.ndim else x
        )
        single, _ = jax.jit(functools.partial(offline.step, config))(
            offline.OfflineState(one(state.actor), None), arms(), frozen, one(noise)
        )
        expected = one(both.actor.params)
        tiny.assert_trees_close(single.actor.params, expected, atol=1e-4)
        assert single.critics is None


def test_weight_one_is_the_cloning_skill():
    config = OfflineConfig(ACTOR, ("bc",), None)
    state = init(config, tiny.base())
    noise = noise_of(jax.random.key(1), 1)
    _, metrics = jax.jit(functools.partial(offline.step, config))(
        state, arms(), Frozen(tiny.base()), noise
    )
    one = jax.tree.map(lambda x: x[0], (state.actor.params, noise))
    given = (one[0], tiny.base(), arms().obs, arms().action, one[1])
    errors = jax.jit(functools.partial(cloning.errors, ACTOR))(*given)
    np.testing.assert_allclose(metrics["loss/bc"], jnp.mean(errors), rtol=1e-4)
    assert metrics["weight/bc"] == 1


def test_a_whole_policy_with_weights():
    config = OfflineConfig(BASE, ("fisor",), CRITICS)
    state, metrics = run(config, init(config), Frozen(), 2)
    assert state.step == 2 and np.isfinite(metrics["loss/fisor"])
    assert jax.tree.structure(state.actor.params) == jax.tree.structure(tiny.base())


def test_batched_skills_are_unrolled_ones(monkeypatch):
    """What a backend prefers changes no number but for rounding."""
    noise, expected = one_step()
    batched = {"cpu": platform.Platform(unroll_skills=False)}
    monkeypatch.setattr(platform, "PLATFORMS", batched)
    step = jax.jit(lambda *given: offline.step(BOTH, *given))
    got, _ = step(init(BOTH, tiny.base()), arms(), Frozen(tiny.base()), noise)
    tiny.assert_trees_close(got.actor.params, expected.actor.params, atol=1e-4)


BEST = 0.6


@functools.cache
def off_the_data():
    """Demonstrations around 0, and a reward critic of -||a - BEST||^2."""
    action = jnp.clip(0.8 * tiny.normal(N, A, seed=3), -1, 1)
    zeros = jnp.zeros(N)
    wide = Transitions(
        obs=tiny.normal(N, S),
        action=action,
        reward=-jnp.sum((action - BEST) ** 2, axis=1),
        cost=zeros,
        h=zeros,
        next_obs=tiny.normal(N, S),
        mask=zeros,
    )
    config = CriticConfig(
        ("reward",), widths=(32,), learning_rate=1e-2, target_rate=1.0
    )
    update = jax.jit(functools.partial(critics.update, config))
    state = critics.init(config, jax.random.key(0), S, A)
    for _ in range(400):
        state, _ = update(state, wide)
    narrow = wide._replace(action=0.05 * tiny.normal(N, A, seed=4))
    return narrow, state.trained


def policy_after(objective, eta, actor, steps=200):
    """Mean action of a policy trained on the narrow data with the finished critic."""
    weights = WeightConfig(eta=eta)
    config = OfflineConfig(actor, (objective,), None, weights, finished=("reward",))
    data, finished = off_the_data()
    base = tiny.base() if actor.skill else None
    state = init(config, base)
    before = jax.tree.map(np.array, finished)
    state, metrics = run(config, state, Frozen(base, finished), steps, data)
    tiny.assert_trees_equal(finished, before)
    params = PolicyParams(state.actor.params, Normaliser(jnp.zeros(S), jnp.ones(S)))
    gate = None
    if actor.skill:
        strength = jnp.full(1, actor.skill.alpha)
        gate = GateConfig(head="constant")
        params = params._replace(
            base=base,
            library=state.actor.params,
            strength=strength,
            gate={"head": {"alpha": strength}},
        )
    config = PolicyConfig(tiny.NETWORK, actor.process, A, gate=gate)
    policy = jax.jit(jax.vmap(functools.partial(act, config, params)))
    return np.asarray(policy(tiny.keys(N), data.obs)).mean(0), metrics


@pytest.mark.parametrize("actor", [ACTOR, BASE], ids=["skill", "base"])
def test_a_term_on_the_sampled_action_moves_the_policy_off_the_data(actor):
    """Cloning stays at 0; -Q draws it to BEST, the further the larger eta."""
    cloned, _ = policy_after("bc", 1.0, actor)
    np.testing.assert_allclose(cloned, 0, atol=0.1)
    little, _ = policy_after("dql", 0.3, actor)
    far, metrics = policy_after("dql", 30.0, actor)
    assert np.all(little > cloned + 0.02) and np.all(far > little + 0.1)
    np.testing.assert_allclose(far, BEST, atol=0.2)
    assert metrics["term/dql"] < 0.5 * 30  # where cloning stays, it is 30


def test_an_objective_is_one_function_and_one_line(monkeypatch):
    """Here: the sampled action itself is drawn to the corner, without any critic."""

    def corner(config, sampled):
        return 10 * jnp.sum((sampled.action - 1) ** 2)

    objective = Objective(losses.bc_weight, (), corner)
    monkeypatch.setitem(OBJECTIVES, "corner", objective)
    got, _ = policy_after("corner", 1.0, ACTOR)
    assert np.all(got > 0.6)


def test_config_refusals():
    with pytest.raises(
        InputError, match=f"choose from {', '.join(sorted(OBJECTIVES))}"
    ):
        OfflineConfig(ACTOR, ("magic",))
    with pytest.raises(InputError, match="expected different ones"):
        OfflineConfig(ACTOR, ("reward", "reward"))
    with pytest.raises(InputError, match="got none"):
        OfflineConfig(ACTOR, ())
    reward = CriticConfig(("reward",))
    with pytest.raises(InputError, match="'safety' needs a critic of safety.*(reward)"):
        OfflineConfig(ACTOR, ("safety",), reward)
    with pytest.raises(InputError, match="'dql' needs a critic of reward.*(none)"):
        OfflineConfig(ACTOR, ("dql",), None)
    with pytest.raises(InputError, match="a base has one objective"):
        OfflineConfig(BASE, ("reward", "safety"))
    chunks = dataclasses.replace(ACTOR, process=ProcessConfig(horizon=4))
    with pytest.raises(InputError, match="^horizon: got 4, .* 'dql' judges"):
        OfflineConfig(chunks, ("bc", "dql"))
