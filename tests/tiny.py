"""Tiny policies for the tests: random arrays in the shapes of trained ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.diffusion import DiffusionConfig
from psec_jax.lora import init_skill, stack_skills
from psec_jax.networks.denoiser import Denoiser, NetworkConfig, init_base

OBS_DIM, ACTION_DIM, SKILLS, RANK = 3, 2, 3, 2
NETWORK = NetworkConfig(
    width=16, blocks=1, expansion=2, time_features=4, time_width=8, dropout=0.0
)
NET = Denoiser(NETWORK, ACTION_DIM)
DIFFUSION = DiffusionConfig(start_scale=0.1, temperature=0.1)


def randomised(make, seed):
    """A tree in the shape of `make()`, filled with normal numbers scaled by fan-in.

    The output layer is small, so that actions sampled with `DIFFUSION` are not all at
    the bounds.
    """
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        scale = 1 / np.sqrt(shape.shape[-2]) if len(shape.shape) > 1 else 0.3
        if "output" in jax.tree_util.keystr(path):
            scale *= 0.1
        return jnp.asarray(scale * generator.normal(size=shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make))


@functools.cache
def base():
    key = jax.random.key(0)
    return randomised(lambda: init_base(NETWORK, key, OBS_DIM, ACTION_DIM), 0)


@functools.cache
def skill(seed, rank=RANK, adapter="lora"):
    key = jax.random.key(0)
    return randomised(lambda: init_skill(key, base(), rank, adapter), 100 + seed)


@functools.cache
def library(count=SKILLS, adapter="lora"):
    return stack_skills([skill(k, adapter=adapter) for k in range(count)])


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
