"""The base policy: diffusion behaviour cloning of all parameters."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax.agents.common import (
    Metrics,
    Noise,
    OptimiserConfig,
    TrainData,
    batch_noise,
    descend,
    draw,
    draw_index,
    init_state,
    row_count,
)
from psec_jax.losses import prediction_error
from psec_jax.networks.denoiser import (
    NetworkConfig,
    init_base,
    make_denoise,
    make_network,
)
from psec_jax.process import ProcessConfig
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and optimiser of a base."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch_size: int = 2048


def init(
    config: PretrainConfig,
    key: Key[Array, ""],
    obs_dim: int,
    action_dim: int,
    start: Params | None = None,
) -> TrainState:
    """A fresh base, or the one to be trained on."""
    if start is None:
        horizon = config.process.horizon
        start = init_base(config.network, key, obs_dim, action_dim, horizon)
    return init_state(config.optimiser, start)


def index(
    config: PretrainConfig, key: Key[Array, ""], count: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """The rows that a step with this key draws from `count`."""
    return draw_index(jax.random.split(key)[0], config.batch_size, count)


def update(
    config: PretrainConfig, state: TrainState, data: TrainData, key: Key[Array, ""]
) -> tuple[TrainState, Metrics]:
    """One step on the diffusion loss (PAPER: 1 M of them at batch 2048)."""
    _, loss_key = jax.random.split(key)
    batch = draw(index(config, key, row_count(data)), data)
    obs, action = batch.obs, batch.action
    noise = batch_noise(config.process, loss_key, config.batch_size, action.shape[-1])

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        loss = jnp.mean(errors(config, params, obs, action, noise))
        return loss, {"loss/base": loss}

    return descend(config.optimiser, state, loss_fn)


def errors(
    config: PretrainConfig,
    params: Params,
    obs: Float[Array, "B S"],
    action: Float[Array, "B A"],
    noise: Noise,
) -> Float[Array, " B"]:
    """The diffusion loss of every example."""
    net = make_network(config.network, action.shape[-1], config.process.horizon)
    params = _transposed_gradients(params, len(obs))

    def one(obs: Array, action: Array, noise: Noise) -> Array:
        denoise = make_denoise(net, params, dropout_key=noise.dropout)
        return prediction_error(
            denoise, config.process, obs, action, noise.t, noise.eps
        )

    return jax.vmap(one)(obs, action, noise)


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
