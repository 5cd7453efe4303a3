"""Cloning of demonstrations: a base with all its parameters, or a skill over a base."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax import tree
from psec_jax.agents.common import (
    Demonstrations,
    Metrics,
    Noise,
    OptimiserConfig,
    batch_noise,
    check_batch_size,
    descend,
    init_state,
)
from psec_jax.errors import InputError, lookup
from psec_jax.lora import ADAPTERS, init_skill
from psec_jax.losses import prediction_error
from psec_jax.networks.denoiser import (
    Denoise,
    NetworkConfig,
    init_base,
    make_denoise,
    make_network,
)
from psec_jax.process import ProcessConfig
from psec_jax.runtime import platform
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class AdapterConfig:
    """Form and strength of a skill.

    Attributes:
      rank: of every layer's pair.
      adapter: a key of `lora.ADAPTERS`.
      alpha: the strength it is trained at, a raw multiplier.
    """

    rank: int = 8
    adapter: str = "lora"
    alpha: float = 16.0

    def __post_init__(self) -> None:
        lookup(ADAPTERS, self.adapter, "adapter")
        if self.rank < 1:
            raise InputError(f"rank: got {self.rank}, expected 1 or more")
        if self.alpha == 0:
            raise InputError("alpha: got 0, which would train nothing")


@dataclass(frozen=True)
class CloningConfig:
    """Network, process and optimiser of a base or of a skill.

    Attributes:
      network: the base's.
      process: the base's.
      optimiser: of what is trained.
      batch_size: transitions a step.
      dropout: rate of the network while training.
      skill: form of the skill that is trained over a frozen base; None trains the base.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch_size: int = 2048
    dropout: float = 0.0
    skill: AdapterConfig | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: got {self.dropout}, expected 0 <= rate < 1")


class Anchor(NamedTuple):
    """What ties a base that is trained on to the parameters it starts from.

    Attributes:
      params: those.
      weight: of the same shapes: the loss has the sum of weight * change^2 as a term.
        Where it is infinite the parameter stays as it is, bit for bit.
    """

    params: Params
    weight: Params


def init(
    config: CloningConfig,
    key: Key[Array, ""],
    obs_dim: int,
    action_dim: int,
    base: Params | None = None,
    start: Params | None = None,
) -> TrainState:
    """A fresh base, or a skill that still acts as its base does.

    Args:
      config: what is trained.
      key: of all parameters.
      obs_dim: S.
      action_dim: numbers of an action in a batch: A, or H * A with chunks.
      base: under the skill; not used for a base.
      start: parameters to train on; None starts afresh.
    """
    if start is None:
        start = init_params(config, key, obs_dim, action_dim, base)
    return init_state(config.optimiser, start)


def init_params(
    config: CloningConfig,
    key: Key[Array, ""],
    obs_dim: int,
    action_dim: int,
    base: Params | None = None,
) -> Params:
    """Fresh parameters of the base or of the skill."""
    if config.skill is None:
        horizon = config.process.horizon
        return init_base(config.network, key, obs_dim, action_dim, horizon)
    return init_skill(key, base, config.skill.rank, config.skill.adapter)


def update(
    config: CloningConfig,
    state: TrainState,
    batch: Demonstrations,
    frozen: Params | Anchor | None,
    key: Key[Array, ""],
) -> tuple[TrainState, Metrics]:
    """One step on the process's loss (PAPER: 1 M for a base, 50 k for a skill).

    Args:
      config: what is trained.
      state: its training state.
      batch: B demonstrations.
      frozen: the base under a skill; of a base its anchor, or None.
      key: of noise and dropout.
    """
    obs, action = batch.obs, batch.action
    noise = batch_noise(config.process, key, len(obs), action.shape[-1])
    name = "base" if config.skill is None else "skill"
    anchor = frozen if config.skill is None else None

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        loss = jnp.mean(errors(config, params, frozen, obs, action, noise))
        if anchor is None:
            return loss, {f"loss/{name}": loss}
        pull = anchor_term(anchor, params)
        return loss + pull, {f"loss/{name}": loss, "loss/anchor": pull}

    state, metrics = descend(config.optimiser, state, loss_fn)
    if anchor is not None:
        # The average too: of equal numbers it may differ in the last bit.
        kept = partial(_kept, anchor)
        state = state._replace(params=kept(state.params), ema=kept(state.ema))
    return state, metrics


def anchor_term(anchor: Anchor, params: Params) -> Float[Array, ""]:
    """The sum of weight * change^2 over the parameters of finite weight."""

    def one(start: Array, weight: Array, now: Array) -> Array:
        return jnp.sum(jnp.where(jnp.isinf(weight), 0, weight) * (now - start) ** 2)

    return jax.tree.reduce(jnp.add, jax.tree.map(one, *anchor, params))


def _kept(anchor: Anchor, params: Params) -> Params:
    """The parameters, with the anchor's where its weight is infinite."""

    def one(start: Array, weight: Array, now: Array) -> Array:
        return jnp.where(jnp.isinf(weight), start, now)

    return jax.tree.map(one, *anchor, params)


def fisher(
    config: CloningConfig, params: Params, batch: Demonstrations, key: Key[Array, ""]
) -> Params:
    """The mean over examples of the squared gradient of each one's loss.

    The diagonal of the empirical Fisher information of a base, at one time and noise of
    the process for each example.
    """
    noise = batch_noise(config.process, key, len(batch.obs), batch.action.shape[-1])

    def loss_fn(params: Params, *example: Any) -> Array:
        rows = jax.tree.map(lambda x: x[None], example)
        return errors(config, params, None, *rows)[0]

    def add(total: Params, example: tuple) -> tuple[Params, None]:
        grads = jax.grad(loss_fn)(params, *example)
        return jax.tree.map(lambda s, g: s + g**2, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, (*batch, noise))
    return jax.tree.map(lambda s: s / len(batch.obs), total)


def errors(
    config: CloningConfig,
    params: Params,
    frozen: Params | Anchor | None,
    obs: Float[Array, "B S"],
    action: Float[Array, "B A"],
    noise: Noise,
) -> Float[Array, " B"]:
    """The process's loss of every example."""
    if config.skill is None and platform.current().transposes(len(obs)):
        params = _transposed_gradients(params)

    def one(obs: Array, action: Array, noise: Noise) -> Array:
        denoise = denoiser(config, params, frozen, action.shape[-1], noise.dropout)
        return prediction_error(
            denoise, config.process, obs, action, noise.t, noise.eps
        )

    return jax.vmap(one)(obs, action, noise)


def denoiser(
    config: CloningConfig,
    params: Params,
    frozen: Params | Anchor | None,
    action_dim: int,
    dropout_key: Key[Array, ""] | None = None,
) -> Denoise:
    """The denoiser that is trained: the base, or the base with the one skill."""
    make = partial(
        make_network,
        config.network,
        action_dim,
        config.process.horizon,
        dropout=config.dropout,
    )
    if config.skill is None:
        return make_denoise(make(), params, dropout_key=dropout_key)
    # In bfloat16 the merged sum would lose what a small skill adds.
    merged = config.skill.adapter == "lora" and config.network.matmul_dtype == "float32"
    net = make(merged=merged)
    alpha = jnp.full((1,), config.skill.alpha)
    return make_denoise(net, frozen, tree.stack([params]), alpha, dropout_key)


def _transposed_gradients(params: Params) -> Params:
    """The same parameters, with the gradients of narrowing layers computed transposed.

    The barrier keeps XLA from undoing it; see `platform.Platform.transpose_from`.
    """

    def turned(x: Array) -> Array:
        narrows = x.ndim == 2 and x.shape[0] > x.shape[1]
        return jax.lax.optimization_barrier(x.T).T if narrows else x

    return jax.tree.map(turned, params)
