"""`Policy.act`: few programs for batches of many sizes, fixed weights merged once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import policy, tree
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.gating import GateConfig, init_gate
from psec_jax.lora import ADAPTERS, layers_of
from psec_jax.types import Normaliser

NORMALISER = Normaliser(jnp.zeros(tiny.OBS_DIM), jnp.ones(tiny.OBS_DIM))


def fixed(level="parameter", adapter="lora", **network):
    base_member = level != "parameter"
    config = PolicyConfig(
        dataclasses.replace(tiny.NETWORK, **network),
        tiny.PROCESS,
        tiny.ACTION_DIM,
        level=level,
        gate=GateConfig(head="constant", base_member=base_member),
    )
    alpha = jnp.asarray([0.1, 2.0, -0.5, 0.7][1 - base_member :])
    params = PolicyParams(
        tiny.base(),
        NORMALISER,
        tiny.library(adapter=adapter),
        jnp.ones(tiny.SKILLS),
        {"head": {"alpha": alpha}},
    )
    return policy.Policy(config, params, ("a", "b", "c"))


def test_batches_of_many_sizes_are_few_programs():
    acting = fixed()
    obs = np.asarray(tiny.normal(9, tiny.OBS_DIM))
    keys = tiny.keys(9)
    whole = acting.act(keys, obs)
    policy._act_batch.clear_cache()  # of what other tests have compiled
    for size in (5, 6, 7, 8):
        got = acting.act(keys[:size], obs[:size])
        assert got.shape == (size, tiny.ACTION_DIM)
        np.testing.assert_allclose(got, whole[:size], atol=1e-5)
    assert policy._act_batch._cache_size() == 1
    assert acting.act(keys[:0], obs[:0]).shape == (0, tiny.ACTION_DIM)


def test_merged_weights_outlive_the_program_that_first_needs_them():
    acting, obs, keys = fixed(), np.asarray(tiny.normal(4, tiny.OBS_DIM)), tiny.keys(4)
    inside = jax.jit(acting.act)(keys, obs)
    np.testing.assert_allclose(acting.act(keys, obs), inside, atol=1e-6)


def test_fixed_weights_are_merged():
    acting = fixed()
    config, params = acting._acting
    assert config.gate is None and params.library is None
    obs, keys = np.asarray(tiny.normal(4, tiny.OBS_DIM)), tiny.keys(4)
    fused = policy._act_batch(acting.config, acting.params, keys, obs)
    np.testing.assert_allclose(acting.act(keys, obs), fused, atol=1e-5)
    np.testing.assert_allclose(acting.alpha(obs)[0], [2.0, -0.5, 0.7])
    jitted = jax.jit(lambda keys, obs: acting.act(keys, obs))(keys, obs)
    np.testing.assert_allclose(jitted, fused, atol=1e-5)


def test_weights_of_each_layer_are_merged():
    acting = fixed()
    layers = len(layers_of(acting.params.library))
    alpha = tiny.normal(layers, tiny.SKILLS, seed=5)
    form = dataclasses.replace(acting.config.gate, layers=layers)
    acting = dataclasses.replace(
        acting,
        config=dataclasses.replace(acting.config, gate=form),
        params=acting.params._replace(gate={"head": {"alpha": alpha}}),
    )
    assert acting._acting[1].library is None
    obs, keys = np.asarray(tiny.normal(4, tiny.OBS_DIM)), tiny.keys(4)
    fused = policy._act_batch(acting.config, acting.params, keys, obs)
    np.testing.assert_allclose(acting.act(keys, obs), fused, atol=1e-5)
    assert acting.alpha(obs).shape == (4, layers, tiny.SKILLS)
    np.testing.assert_array_equal(acting.alpha(obs[0]), alpha)


def of_many(head, count, adapter="lora", searched=None, **fields):
    """A policy of several skills under a gate that sees the state."""
    gate = GateConfig(head=head, widths=(8,), **fields)
    config = PolicyConfig(tiny.NETWORK, tiny.PROCESS, tiny.ACTION_DIM, gate=gate)
    strength = jnp.ones(count)
    made = init_gate(gate, jax.random.key(1), tiny.OBS_DIM, strength, searched)
    params = PolicyParams(
        tiny.base(), NORMALISER, tiny.library(count, adapter), strength, made
    )
    return policy.Policy(config, params, tuple(map(str, range(count))))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_of_many_skills_the_active_ones_are_computed(top_k, adapter):
    acting = of_many("topk", 8, adapter, top_k=top_k)
    assert acting._acting_one[0].gathered == top_k
    assert acting._acting == (acting.config, acting.params)
    obs, keys = np.asarray(tiny.normal(6, tiny.OBS_DIM)), tiny.keys(6)
    assert len({tuple(row) for row in np.asarray(acting.alpha(obs)) != 0}) > 1
    every = acting.act(keys, obs)
    for key, one, expected in zip(keys, obs, every, strict=True):
        np.testing.assert_allclose(acting.act(key, one), expected, atol=1e-5)


@pytest.mark.parametrize("near", [True, False])
def test_of_many_supported_skills_the_active_ones_are_computed(near):
    """Few have weight, or all: then all are computed."""
    count = policy.GATHER_FROM * policy.SUPPORTED
    states = np.asarray(tiny.normal(count, 5, tiny.OBS_DIM))
    apart = 9 * near * np.arange(count)[:, None, None]
    support = {
        "demos": jnp.asarray(states + apart, jnp.float32),
        "valid": jnp.ones((count, 5), bool),
        "tau": jnp.full(count, 2.0),
        "scale": jnp.ones((count, tiny.OBS_DIM)),
    }
    acting = of_many(
        "linear", count, searched=support, support="neighbour", priority=False
    )
    assert acting._acting_one[0].gathered == policy.SUPPORTED
    obs, keys = np.asarray(support["demos"][:4, 0]), tiny.keys(4)
    active = (np.asarray(acting.alpha(obs)) != 0).sum(1)
    assert (active <= policy.SUPPORTED).all() if near else (active == count).all()
    every = acting.act(keys, obs)
    for key, one, expected in zip(keys, obs, every, strict=True):
        np.testing.assert_allclose(acting.act(key, one), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "count", "fields"),
    [
        ("topk", 7, {"top_k": 2}),
        ("topk", 8, {"top_k": 2, "layers": 6}),
        ("topp", 8, {}),
        ("linear", 8, {}),
    ],
)
def test_elsewhere_all_skills_are_computed(head, count, fields):
    acting = of_many(head, count, **fields)
    config, params = acting._acting_one
    laid_out = any(path.endswith("/down") for path in tree.flatten(params.library))
    assert config == acting.config and laid_out == ("layers" not in fields)
    obs, key = np.asarray(tiny.normal(1, tiny.OBS_DIM)), tiny.keys(1)
    np.testing.assert_allclose(
        acting.act(key[0], obs[0]), acting.act(key, obs)[0], atol=1e-5
    )


@pytest.mark.parametrize("count", [policy.INDEX_FROM - 1, policy.INDEX_FROM])
def test_a_support_of_many_skills_has_an_index(count):
    """The actions are those of a search of every skill, which exported files make."""
    states = 4 * np.arange(count)[:, None, None] + np.asarray(
        tiny.normal(count, 9, tiny.OBS_DIM)
    )
    searched = {
        "demos": jnp.asarray(states, jnp.float32),
        "valid": jnp.ones((count, 9), bool),
        "tau": jnp.full(count, 2.0),
        "scale": jnp.ones((count, tiny.OBS_DIM)),
    }
    acting = of_many("linear", count, searched=searched, support="neighbour")
    indexed = "low" in acting._indexed[1].gate["support"]
    assert indexed == (count == policy.INDEX_FROM) and "low" not in searched
    obs, keys = states[:, 0].astype(np.float32), tiny.keys(count)
    every = acting.act(keys, obs)
    np.testing.assert_allclose(acting.batched()(keys, obs), every, atol=1e-5)
    np.testing.assert_allclose(
        acting.from_noise()(acting.noise(keys), obs), every, atol=1e-5
    )
    np.testing.assert_allclose(acting.act(keys[1], obs[1]), every[1], atol=1e-5)
    assert policy.alike(acting, acting)


@pytest.mark.parametrize(
    "options",
    [
        {"level": "noise"},
        {"adapter": "mlp"},
        {"matmul_dtype": "bfloat16"},
        {"compat": "released"},
    ],
)
def test_what_cannot_be_merged_stays(options):
    acting = fixed(**options)
    assert acting._acting == (acting.config, acting.params)
