"""The levels of composition, and the policy they make."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from psec_jax import tree
from psec_jax.composition import (
    DENOISERS,
    LEVELS,
    PolicyConfig,
    PolicyParams,
    act,
    members,
    weights,
)
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, init_gate
from psec_jax.lora import ADAPTERS
from psec_jax.networks.denoiser import make_denoise
from psec_jax.process import draw_noise, sample, sample_from
from psec_jax.types import Normaliser

B, K = 8, tiny.SKILLS
OBS, KEYS = tiny.normal(B, tiny.OBS_DIM), tiny.keys(B)
ONES = jnp.ones(K)
ALPHA = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.6, (B, K)), jnp.float32)
ONE_HOT = jnp.eye(K)[jnp.arange(B) % K]


def mild(params, sampler):
    """The same with small outputs: a flow adds them up unscaled and would saturate."""
    if tiny.SAMPLERS[sampler].kind != "flow":
        return params
    flat = tree.flatten(params)
    small = {"output/kernel", "output/bias", "output/b"}
    return tree.unflatten({p: x / 8 if p in small else x for p, x in flat.items()})


@functools.cache
def batched(level, sampler="ddpm", kind="mlp"):
    """(library, strength, alpha [B, K], keys [B], obs [B, S]) -> actions [B, A]."""
    process = tiny.SAMPLERS[sampler]

    def one(library, strength, alpha, key, obs):
        base, library = mild(tiny.base(kind), sampler), mild(library, sampler)
        net = tiny.net(kind)
        noise = draw_noise(process, key, tiny.ACTION_DIM)
        draw = functools.partial(sample_from, config=process, noise=noise, obs=obs)
        return LEVELS[level](net, base, library, strength, alpha, draw)

    return jax.jit(jax.vmap(one, (None, None, 0, 0, 0)))


def actions(level, alpha, library=None, strength=ONES, sampler="ddpm", kind="mlp"):
    library = library or tiny.library(kind=kind)
    run = batched(level, sampler, kind)
    got = np.asarray(run(library, strength, alpha, KEYS, OBS))
    assert got.shape == (B, tiny.ACTION_DIM)
    assert np.mean(np.abs(got) < 1) > 0.5, "saturated: the test would see little"
    return got


@functools.cache
def unmixed(sampler, kind="mlp"):
    """(library or None, alpha [1] or None) -> actions [B, A] of OBS."""
    process = tiny.SAMPLERS[sampler]

    def one(library, alpha, key, obs):
        base = mild(tiny.base(kind), sampler)
        library = None if library is None else mild(library, sampler)
        denoise = make_denoise(tiny.net(kind), base, library, alpha)
        return sample(denoise, process, key, obs, tiny.ACTION_DIM)

    run = jax.jit(jax.vmap(one, (None, None, 0, 0)))
    return lambda library, alpha: np.asarray(run(library, alpha, KEYS, OBS))


def alone(k, strength=1.0, sampler="ddpm", adapter="lora", kind="mlp"):
    """Actions of one skill by itself; of the base for k = None."""
    if k is None:
        return unmixed(sampler, kind)(None, None)
    library = tiny.stack([tiny.skill(k, adapter=adapter, kind=kind)])
    return unmixed(sampler, kind)(library, np.full(1, strength, np.float32))


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(got, expected, atol=atol)


@pytest.fixture
def unchecked():
    """Annotations are not looked at in launches."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("sampler", "adapter", "kind"),
    [(sampler, "lora", "mlp") for sampler in tiny.SAMPLERS]
    + [("ddpm", adapter, "mlp") for adapter in ADAPTERS if adapter != "lora"]
    + [(sampler, "lora", "transformer") for sampler in ("ddpm", "euler")],
)
@pytest.mark.parametrize("level", LEVELS)
def test_one_hot_alpha_is_the_skill_alone(level, sampler, adapter, kind):
    """And so all levels give the same action from the same key."""
    library = tiny.library(adapter=adapter, kind=kind)
    got = actions(level, ONE_HOT, library, sampler=sampler, kind=kind)
    for k in range(K):
        expected = alone(k, 1.0, sampler, adapter, kind)
        close(got[k::K], expected[k::K])
        assert np.abs(expected - alone(None, 1.0, sampler, kind=kind)).max() > 0.02


@pytest.mark.parametrize("level", LEVELS)
def test_skills_trained_at_another_strength(level):
    """The parameter level weighs by raw multipliers, the others by shares."""
    strength = 2.0 * ONES
    alpha = strength * ONE_HOT if level == "parameter" else ONE_HOT
    got = actions(level, alpha, strength=strength)
    for k in range(K):
        close(got[k::K], alone(k, strength=2.0)[k::K])


@pytest.mark.parametrize("level", LEVELS)
def test_order_of_the_skills_does_not_matter(level):
    order = np.array([2, 0, 1])
    strength = jnp.array([0.5, 1.0, 1.5])
    close(
        actions(
            level,
            np.asarray(ALPHA)[:, order],
            tiny.take(tiny.library(), order.tolist()),
            np.asarray(strength)[order],
        ),
        actions(level, ALPHA, strength=strength),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_a_skill_of_weight_zero_is_not_there(level):
    alpha = np.array(ALPHA)
    alpha[:, 2] = 0
    another = tiny.stack([tiny.skill(k) for k in (0, 1, 7)])
    close(actions(level, alpha, another), actions(level, alpha))
    assert np.abs(actions(level, ALPHA, another) - actions(level, ALPHA)).max() > 0.01


def test_parameter_level_without_weight_is_the_base():
    close(actions("parameter", jnp.zeros((B, K))), alone(None))


def test_noise_level_mixes_the_noise():
    inputs = (OBS, tiny.normal(B, tiny.ACTION_DIM, seed=3), jnp.arange(B) * 0.5)
    strength = jnp.array([0.5, 1.0, 1.5])

    @jax.jit
    @jax.vmap
    def mixed(alpha, *x):
        return DENOISERS["noise"](
            tiny.NET, tiny.base(), tiny.library(), strength, alpha
        )(*x)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0))
    def one(skill, weight, *x):
        return make_denoise(tiny.NET, tiny.base(), tree.stack([skill]), weight)(*x)

    expected = sum(
        ALPHA[:, k, None] * one(tiny.skill(k), strength[k, None], *inputs)
        for k in range(K)
    )
    close(mixed(ALPHA, *inputs), expected)


def test_action_level_mixes_the_actions():
    expected = sum(ALPHA[:, k, None] * alone(k) for k in range(K))
    close(actions("action", ALPHA), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_weights_of_width_one_raise(level, unchecked):
    """They would otherwise be broadcast over all skills."""
    with pytest.raises(ValueError, match="3 skills but 1 weights"):
        batched(level)(tiny.library(), ONES, ALPHA[:, :1], KEYS, OBS)


@functools.cache
def policy(level, head="linear", start=None, kind="mlp"):
    """A policy and its parameters; the gate weighs the base too where it can."""
    gate = GateConfig(head=head, widths=(8,), base_member=level != "parameter")
    horizon = tiny.HORIZON.get(kind, 1)
    process = dataclasses.replace(tiny.PROCESS, horizon=horizon, execute=horizon)
    action_dim = tiny.ACTION_DIM // horizon
    config = PolicyConfig(tiny.network(kind), process, action_dim, level, gate)
    weighed = K + gate.base_member
    start = jnp.asarray(start or (1 / weighed,) * weighed)
    init = jax.jit(functools.partial(init_gate, gate, obs_dim=tiny.OBS_DIM))
    normaliser = Normaliser(jnp.array([0.5, -1.0, 2.0]), jnp.array([2.0, 0.5, 1.0]))
    return config, PolicyParams(
        tiny.base(kind),
        normaliser,
        tiny.library(kind=kind),
        ONES,
        init(jax.random.key(0), start=start),
    )


@functools.cache
def acting(config):
    """(params, keys [B], obs [B, S]) -> actions [B, A]."""
    return jax.jit(jax.vmap(functools.partial(act, config), (None, 0, 0)))


def raw(params):
    """Observations that normalise to OBS."""
    return OBS * params.normaliser.std + params.normaliser.mean


@pytest.mark.parametrize("level", LEVELS)
def test_a_policy_is_its_gate_and_its_level(level):
    config, params = policy(level)
    alpha = jax.jit(jax.vmap(functools.partial(weights, config), (None, 0)))(
        params, raw(params)
    )
    library, strength = members(config, params)
    assert alpha.shape == (B, len(strength))
    assert np.std(alpha, axis=0).min() > 1e-3
    close(
        acting(config)(params, KEYS, raw(params)),
        actions(level, alpha, library, strength),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_the_base_is_a_member_of_every_level(level):
    config, params = policy(level)
    gate = dataclasses.replace(config.gate, head="constant")
    config = dataclasses.replace(config, gate=gate)
    base_alone = np.eye(K + 1, dtype=np.float32)[0, not gate.base_member :]
    params = params._replace(gate={"head": {"alpha": jnp.asarray(base_alone)}})
    close(acting(config)(params, KEYS, raw(params)), alone(None))


def test_a_policy_without_a_gate_is_the_base():
    config, params = policy("parameter")
    config = dataclasses.replace(config, gate=None)
    params = PolicyParams(params.base, params.normaliser)
    close(acting(config)(params, KEYS, raw(params)), alone(None))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("execute", [1, 2])
def test_the_first_actions_of_a_chunk_are_executed(kind, execute):
    config, params = policy("parameter")
    chunks = dataclasses.replace(tiny.PROCESS, horizon=2, execute=execute)
    config = PolicyConfig(tiny.network(kind), chunks, tiny.ACTION_DIM // 2)
    params = PolicyParams(tiny.base(kind), params.normaliser)
    got = acting(config)(params, KEYS, raw(params))
    expected = alone(None, kind=kind)
    close(got, expected[..., None] if execute == 2 else expected[:, :1])


@pytest.mark.parametrize("level", LEVELS)
def test_chunks_are_composed_with_one_alpha(level):
    config, params = policy(level, kind="transformer")
    alpha = jax.jit(jax.vmap(functools.partial(weights, config), (None, 0)))
    library, strength = members(config, params)
    got = acting(config)(params, KEYS, raw(params))
    assert got.shape == (B, 2, 1)
    expected = actions(
        level, alpha(params, raw(params)), library, strength, kind="transformer"
    )
    close(got.reshape(B, 2), expected)


def test_constant_weights_may_be_merged_into_the_base():
    start = (0.5, -0.3, 0.8)
    config, params = policy("parameter", "constant", start)
    base = tiny.merge(tiny.base(), tiny.library(), jnp.asarray(start))
    merged = PolicyParams(base, params.normaliser)
    close(
        acting(dataclasses.replace(config, gate=None))(merged, KEYS, raw(params)),
        acting(config)(params, KEYS, raw(params)),
        atol=1e-4,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_jit_off_and_one_example(level):
    config, params = policy(level)
    expected = acting(config)(params, KEYS, raw(params))
    with jax.disable_jit():
        got = act(config, params, KEYS[2], raw(params)[2])
    close(got, expected[2])


@pytest.mark.parametrize("level", LEVELS)
def test_batch_sharded_over_eight_devices(level):
    config, params = policy(level)
    expected = acting(config)(params, KEYS, raw(params))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    keys, obs = jax.device_put((KEYS, raw(params)), rows)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = acting(config)(params, keys, obs)
    assert got.sharding.is_equivalent_to(rows, got.ndim)
    close(got, expected)


def test_refusals():
    config, _ = policy("noise")
    with pytest.raises(InputError, match=f"choose from {', '.join(sorted(LEVELS))}"):
        dataclasses.replace(config, level="weight")
    with pytest.raises(InputError, match="the base is always part of the parameter"):
        dataclasses.replace(config, level="parameter")
    chunks = dataclasses.replace(tiny.PROCESS, horizon=2)
    with pytest.raises(InputError, match="candidates: got 4 with chunks of 2 actions"):
        dataclasses.replace(config, process=chunks, candidates=4)
