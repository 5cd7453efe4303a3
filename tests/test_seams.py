"""Every process with every network: training, composition and sampling agree."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import tree
from psec_jax.agents import cloning
from psec_jax.agents.cloning import AdapterConfig, CloningConfig
from psec_jax.agents.common import Demonstrations, OptimiserConfig
from psec_jax.process import PROCESSES, sample

B = 32
POINT = jnp.array([0.5, -0.5])
BATCH = Demonstrations(tiny.normal(B, tiny.OBS_DIM), jnp.tile(POINT, (B, 1)))
PAIRS = pytest.mark.parametrize("kind", tiny.KINDS)
PROCESS = pytest.mark.parametrize("process", PROCESSES)


def config_of(kind, process, skill=None):
    """A chunk of the transformer is two actions of one number."""
    chosen = next(c for c in tiny.SAMPLERS.values() if c.kind == process)
    chosen = dataclasses.replace(
        chosen, schedule="vp", start_scale=1.0, horizon=tiny.HORIZON.get(kind, 1)
    )
    optimiser = OptimiserConfig(learning_rate=1e-2, weight_decay=0.0, ema=1.0)
    return CloningConfig(tiny.network(kind), chosen, optimiser, B, skill=skill)


@PAIRS
@PROCESS
def test_a_base_learns_one_action(kind, process):
    config = config_of(kind, process)
    state = cloning.init(config, jax.random.key(0), tiny.OBS_DIM, tiny.ACTION_DIM)
    update = jax.jit(functools.partial(cloning.update, config))
    for key in tiny.keys(300):
        state, _ = update(state, BATCH, None, key)
    denoise = cloning.denoiser(config, state.params, None, tiny.ACTION_DIM)

    def act(key, obs):
        return sample(denoise, config.process, key, obs, tiny.ACTION_DIM)

    got = jax.jit(jax.vmap(act))(tiny.keys(B), BATCH.obs)
    assert np.abs(got - POINT).mean() < 0.15


@PAIRS
@PROCESS
def test_a_skill_moves_and_its_base_stays(kind, process):
    skill = AdapterConfig(rank=2, alpha=2.0)
    config, base = config_of(kind, process, skill), tiny.base(kind)
    start = cloning.init(config, jax.random.key(0), tiny.OBS_DIM, tiny.ACTION_DIM, base)
    update = jax.jit(functools.partial(cloning.update, config))
    once, _ = update(start, BATCH, base, jax.random.key(1))
    twice, _ = update(once, BATCH, base, jax.random.key(2))
    for path, leaf in tree.flatten(twice.params).items():
        moved = np.abs(leaf - tree.flatten(start.params)[path]).max()
        assert moved > 0, path
    # The down matrices stay while the up matrices are zero.
    for path, leaf in tree.flatten(once.params).items():
        same = (leaf == tree.flatten(start.params)[path]).all()
        assert same == path.endswith("/a"), path


@PAIRS
@PROCESS
def test_a_sharded_batch_gives_the_same_update(kind, process):
    config = config_of(kind, process)
    start = cloning.init(config, jax.random.key(0), tiny.OBS_DIM, tiny.ACTION_DIM)
    update = jax.jit(functools.partial(cloning.update, config))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    expected, _ = update(start, BATCH, None, jax.random.key(1))
    got, _ = update(start, jax.device_put(BATCH, rows), None, jax.random.key(1))
    chex.assert_trees_all_close(got.opt_state, expected.opt_state, atol=1e-5, rtol=1e-3)
