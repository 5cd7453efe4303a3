"""One skill: the same loss, with the base frozen and only the adapters trained."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from psec_jax import tree
from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    TrainData,
    descend,
    draw,
    init_state,
)
from psec_jax.diffusion import DiffusionConfig, make_schedule
from psec_jax.errors import InputError
from psec_jax.lora import init_skill
from psec_jax.losses import diffusion_loss
from psec_jax.networks.denoiser import Denoiser, NetworkConfig, make_denoise
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class SkillConfig:
    """Form, strength and optimiser of a skill.

    Attributes:
      network: the base's.
      diffusion: the base's.
      optimiser: of the adapters.
      batch_size: transitions a step.
      rank: of every layer's pair.
      adapter: a key of `lora.ADAPTERS`.
      alpha: the strength it is trained at, a raw multiplier.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
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


def update(
    config: SkillConfig, state: TrainState, data: TrainData, key: Key[Array, ""]
) -> tuple[TrainState, Metrics]:
    """One step on the diffusion loss; `data.frozen` is the base's parameters."""
    batch_key, loss_key = jax.random.split(key)
    obs, action = draw(batch_key, data, config.batch_size)
    net = Denoiser(config.network, action.shape[-1])
    schedule = make_schedule(config.diffusion)
    alpha = jnp.full((1,), config.alpha)

    def example_loss(skill: Params, key: Array, obs: Array, action: Array) -> Array:
        dropout_key, noise_key = jax.random.split(key)
        denoise = make_denoise(
            net, data.frozen, tree.stack([skill]), alpha, dropout_key
        )
        return diffusion_loss(denoise, schedule, noise_key, obs, action)

    def loss_fn(skill: Params) -> tuple[Array, Metrics]:
        keys = jax.random.split(loss_key, config.batch_size)
        loss = jnp.mean(
            jax.vmap(example_loss, (None, 0, 0, 0))(skill, keys, obs, action)
        )
        return loss, {"loss/skill": loss}

    return descend(config.optimiser, state, loss_fn)
