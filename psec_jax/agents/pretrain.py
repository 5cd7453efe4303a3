"""The base policy: diffusion behaviour cloning of all parameters."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    TrainData,
    descend,
    draw,
    init_state,
)
from psec_jax.diffusion import DiffusionConfig, make_schedule
from psec_jax.losses import diffusion_loss
from psec_jax.networks.denoiser import (
    Denoiser,
    NetworkConfig,
    init_base,
    make_denoise,
)
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and optimiser of a base."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch_size: int = 2048


def init(
    config: PretrainConfig, key: Key[Array, ""], obs_dim: int, action_dim: int
) -> TrainState:
    """A fresh base."""
    params = init_base(config.network, key, obs_dim, action_dim)
    return init_state(config.optimiser, params)


def update(
    config: PretrainConfig, state: TrainState, data: TrainData, key: Key[Array, ""]
) -> tuple[TrainState, Metrics]:
    """One step on the diffusion loss (PAPER: 1 M of them at batch 2048)."""
    batch_key, loss_key = jax.random.split(key)
    obs, action = draw(batch_key, data, config.batch_size)
    net = Denoiser(config.network, action.shape[-1])
    schedule = make_schedule(config.diffusion)

    def example_loss(params: Params, key: Array, obs: Array, action: Array) -> Array:
        dropout_key, noise_key = jax.random.split(key)
        denoise = make_denoise(net, params, dropout_key=dropout_key)
        return diffusion_loss(denoise, schedule, noise_key, obs, action)

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        keys = jax.random.split(loss_key, config.batch_size)
        params = _transposed_gradients(params, config.batch_size)
        loss = jnp.mean(
            jax.vmap(example_loss, (None, 0, 0, 0))(params, keys, obs, action)
        )
        return loss, {"loss/base": loss}

    return descend(config.optimiser, state, loss_fn)


def _transposed_gradients(params: Params, batch_size: int) -> Params:
    """The same parameters, for a faster backward pass with large batches.

    XLA's CPU product is slow where the wide operand is the transposed one, as in the
    weight gradient of a layer that narrows. The barrier makes it compute the gradient
    of the transposed kernel. Small batches would lose more than they gain.
    """
    if batch_size < 1024:
        return params

    def turned(x: Array) -> Array:
        narrows = x.ndim == 2 and x.shape[0] > x.shape[1]
        return jax.lax.optimization_barrier(x.T).T if narrows else x

    return jax.tree.map(turned, params)
