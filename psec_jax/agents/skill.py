"""One skill: the same loss, with the base frozen and only the adapters trained."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax import tree
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
from psec_jax.errors import InputError
from psec_jax.lora import init_skill
from psec_jax.losses import prediction_error
from psec_jax.networks.denoiser import NetworkConfig, make_denoise, make_network
from psec_jax.process import ProcessConfig
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class SkillConfig:
    """Form, strength and optimiser of a skill.

    Attributes:
      network: the base's.
      process: the base's.
      optimiser: of the adapters.
      batch_size: transitions a step.
      rank: of every layer's pair.
      adapter: a key of `lora.ADAPTERS`.
      alpha: the strength it is trained at, a raw multiplier.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch_size: int = 2048
    rank: int = 8
    adapter: str = "lora"
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise InputError("skill.alpha: got 0, which would train nothing")


def init(config: SkillConfig, key: Key[Array, ""], base: Params) -> TrainState:
    """A skill that is still the base itself."""
    params = init_skill(key, base, config.rank, config.adapter)
    return init_state(config.optimiser, params)


def index(
    config: SkillConfig, key: Key[Array, ""], count: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """The rows that a step with this key draws from `count`."""
    return draw_index(jax.random.split(key)[0], config.batch_size, count)


def update(
    config: SkillConfig, state: TrainState, data: TrainData, key: Key[Array, ""]
) -> tuple[TrainState, Metrics]:
    """One step on the diffusion loss; `data.frozen` is the base's parameters."""
    _, loss_key = jax.random.split(key)
    batch = draw(index(config, key, row_count(data)), data)
    obs, action = batch.obs, batch.action
    noise = batch_noise(config.process, loss_key, config.batch_size, action.shape[-1])

    def loss_fn(skill: Params) -> tuple[Array, Metrics]:
        loss = jnp.mean(errors(config, skill, data.frozen, obs, action, noise))
        return loss, {"loss/skill": loss}

    return descend(config.optimiser, state, loss_fn)


def errors(
    config: SkillConfig,
    skill: Params,
    base: Params,
    obs: Float[Array, "B S"],
    action: Float[Array, "B A"],
    noise: Noise,
) -> Float[Array, " B"]:
    """The diffusion loss of every example."""
    merged = config.adapter == "lora" and config.network.matmul_dtype == "float32"
    horizon = config.process.horizon
    net = make_network(config.network, action.shape[-1], horizon, merged)
    alpha = jnp.full((1,), config.alpha)

    def one(obs: Array, action: Array, noise: Noise) -> Array:
        library = tree.stack([skill])
        denoise = make_denoise(net, base, library, alpha, noise.dropout)
        return prediction_error(
            denoise, config.process, obs, action, noise.t, noise.eps
        )

    return jax.vmap(one)(obs, action, noise)
