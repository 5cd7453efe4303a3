"""Tiny policies for the tests: random arrays in the shapes of trained ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax import lora, tree
from psec_jax.networks.denoiser import (
    NETWORKS,
    NetworkConfig,
    init_base,
    make_network,
)
from psec_jax.process import PROCESSES, ProcessConfig

OBS_DIM, ACTION_DIM, SKILLS, RANK = 3, 2, 3, 2
NETWORK = NetworkConfig(width=16, blocks=1, expansion=2, time_features=4, time_width=8)
# A chunk of two actions of one number is as wide as one action of two numbers.
HORIZON = {"transformer": 2}


def network(kind="mlp", **changes):
    changes = {"heads": 2} | changes
    return dataclasses.replace(NETWORK, kind=kind, **changes)


def net(kind="mlp", merged=False, dropout=0.0, **changes):
    horizon = HORIZON.get(kind, 1)
    return make_network(network(kind, **changes), ACTION_DIM, horizon, merged, dropout)


KINDS = list(NETWORKS)
NET = net()
# A mild schedule: an untrained network would drive a steep one to the bounds.
PROCESS = ProcessConfig(schedule="linear", start_scale=0.4)
# One process for each sampler of every kind.
SAMPLERS = {
    sampler: dataclasses.replace(PROCESS, kind=kind, sampler=sampler)
    for kind, process in PROCESSES.items()
    for sampler in process.samplers
}


def randomised(make, seed):
    """A tree in the shape of `make()`, filled with normal numbers scaled by fan-in."""
    generator = np.random.default_rng(seed)

    def leaf(shape):
        scale = 1 / np.sqrt(shape.shape[-2]) if len(shape.shape) > 1 else 0.3
        return jnp.asarray(scale * generator.normal(size=shape.shape), jnp.float32)

    shapes = jax.eval_shape(make)
    # Never a tracer, even where a cached tree is first asked for while tracing.
    with jax.ensure_compile_time_eval():
        return jax.tree.map(leaf, shapes)


@functools.cache
def base(kind="mlp"):
    config, horizon = network(kind), HORIZON.get(kind, 1)
    return randomised(
        lambda: init_base(config, jax.random.key(0), OBS_DIM, ACTION_DIM, horizon), 0
    )


@functools.cache
def skill(seed, rank=RANK, adapter="lora", kind="mlp"):
    frozen = base(kind)
    return randomised(
        lambda: lora.init_skill(jax.random.key(0), frozen, rank, adapter), 100 + seed
    )


# Compiled as one program each, which is faster than operation by operation.
stack = jax.jit(lora.stack_skills)
pad = jax.jit(lora.pad, static_argnums=1)
add, drop = jax.jit(tree.add), jax.jit(tree.drop, static_argnums=1)
merge = jax.jit(lora.merge)


def take(stacked, indices):
    return jax.jit(lambda stacked: tree.take(stacked, indices))(stacked)


@functools.cache
def library(count=SKILLS, adapter="lora", kind="mlp"):
    return stack([skill(k, adapter=adapter, kind=kind) for k in range(count)])


def normal(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=shape), jnp.float32)


def keys(count):
    return jax.random.split(jax.random.key(1), count)


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_trees_close(got, expected, atol=1e-5, rtol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=atol, rtol=rtol),
        got,
        expected,
    )


def drawing(update, batch_size):
    """`update` on rows that are drawn first: (state, data, frozen, key) -> the same."""

    def one(state, data, frozen, key):
        batch_key, key = jax.random.split(key)
        rows = jax.random.randint(batch_key, (batch_size,), 0, len(data.obs))
        return update(state, jax.tree.map(lambda x: x[rows], data), frozen, key)

    return one
