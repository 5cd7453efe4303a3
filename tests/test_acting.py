"""`Policy.act`: few programs for batches of many sizes, fixed weights merged once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import policy
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.gating import GateConfig
from psec_jax.types import Normaliser

NORMALISER = Normaliser(jnp.zeros(tiny.OBS_DIM), jnp.ones(tiny.OBS_DIM))


def fixed(level="parameter", adapter="lora", **network):
    import dataclasses

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
