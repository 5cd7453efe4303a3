"""Skills, or a whole policy, cloned with weights that critics give: offline RL.

K skills are trained together, each on its own objective, with or without the critics
they read. The actor is a stack of skills, leaves [K, ...], or a base (K = 1).
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax.agents import critics as critic_agent
from psec_jax.agents import pretrain as pretrain_agent
from psec_jax.agents import skill as skill_agent
from psec_jax.agents.common import (
    Metrics,
    Noise,
    Transitions,
    batch_noise,
    descend,
    draw,
    draw_index,
    init_state,
    row_count,
)
from psec_jax.agents.critics import CriticConfig, CriticParams, CriticState
from psec_jax.agents.pretrain import PretrainConfig
from psec_jax.agents.skill import SkillConfig
from psec_jax.errors import InputError, lookup
from psec_jax.lora import init_skill
from psec_jax.losses import OBJECTIVES, Values, WeightConfig
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class OfflineConfig:
    """What is trained, on which objectives, and with which critics.

    Attributes:
      actor: of the skills, or of the base.
      objectives: keys of `OBJECTIVES`, one for each skill, all different.
      critics: trained in the same program; None reads those of `data.frozen`. They
        learn from the actor's batch, and their own batch size is not used.
      weights: how advantages become weights.
    """

    actor: SkillConfig | PretrainConfig
    objectives: tuple[str, ...]
    critics: CriticConfig | None = field(default_factory=CriticConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("objectives: got none, expected one or more")
        if len(set(self.objectives)) < len(self.objectives):
            raise InputError(
                f"objectives: got {', '.join(self.objectives)}, expected different ones"
            )
        if isinstance(self.actor, PretrainConfig) and len(self.objectives) > 1:
            raise InputError(
                f"objectives: got {len(self.objectives)}, a base has one objective"
            )
        for name in self.objectives:
            needed = lookup(OBJECTIVES, name, "objective").critics
            if "safety" in needed and self.critics and not self.critics.safety:
                raise InputError(
                    f"objective {name!r} needs a critic of safety; set critics.safety"
                )


class Frozen(NamedTuple):
    """What stays as it is.

    Attributes:
      base: under the skills; None where the actor is a base.
      critics: finished ones; None where critics are trained.
    """

    base: Params | None = None
    critics: CriticParams | None = None


class OfflineData(NamedTuple):
    """Transitions on the device, and what stays frozen."""

    transitions: Transitions
    frozen: Frozen


class OfflineState(NamedTuple):
    """Training state of the actor, and of the critics where they are trained."""

    actor: TrainState
    critics: CriticState | None

    @property
    def step(self) -> Array:
        """Updates done."""
        return self.actor.step


def init(
    config: OfflineConfig,
    key: Key[Array, ""],
    obs_dim: int,
    action_dim: int,
    base: Params | None = None,
    start: Params | None = None,
) -> OfflineState:
    """A fresh actor, and fresh critics where they are trained.

    Args:
      config: what is trained.
      key: of all parameters.
      obs_dim: S.
      action_dim: A.
      base: under the skills.
      start: of a base that is trained on; None starts afresh.
    """
    actor_key, critic_key = jax.random.split(key)
    actor: Any = config.actor
    if isinstance(actor, PretrainConfig):
        state = pretrain_agent.init(actor, actor_key, obs_dim, action_dim, start)
    else:
        keys = jax.random.split(actor_key, len(config.objectives))
        make = functools.partial(
            init_skill, base=base, rank=actor.rank, adapter=actor.adapter
        )
        state = init_state(actor.optimiser, jax.vmap(make)(keys))
    if config.critics is None:
        return OfflineState(state, None)
    critics = critic_agent.init(config.critics, critic_key, obs_dim, action_dim)
    return OfflineState(state, critics)


def index(
    config: OfflineConfig, key: Key[Array, ""], count: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """The rows that a step with this key draws from `count`."""
    return draw_index(jax.random.split(key)[0], config.actor.batch_size, count)


def update(
    config: OfflineConfig, state: OfflineState, data: OfflineData, key: Key[Array, ""]
) -> tuple[OfflineState, Metrics]:
    """One step on a fresh batch, shared by skills and critics."""
    _, noise_key = jax.random.split(key)
    rows = data.transitions
    batch = draw(index(config, key, row_count(rows)), rows)
    draw_noise = functools.partial(
        batch_noise,
        config.actor.process,
        batch_size=config.actor.batch_size,
        action_dim=batch.action.shape[-1],
    )
    noise = jax.vmap(draw_noise)(jax.random.split(noise_key, len(config.objectives)))
    return step(config, state, data.frozen, batch, noise)


def step(
    config: OfflineConfig,
    state: OfflineState,
    frozen: Frozen,
    batch: Transitions,
    noise: Noise,
) -> tuple[OfflineState, Metrics]:
    """One step on a given batch.

    The weights are those of the critics before their own step, as in the authors' code.

    Args:
      config: what is trained.
      state: actor and critics.
      frozen: base and finished critics.
      batch: B transitions.
      noise: of every skill, leaves [K, B, ...].
    """
    metrics: Metrics = {}
    if config.critics is None:
        critics = None
        values = critic_agent.values(frozen.critics, batch.obs, batch.action)
    else:
        critics, values, metrics = critic_agent.step(
            config.critics, state.critics, batch
        )
    weight = weights(config, values)

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        errors = _errors(config.actor, params, frozen.base, batch, noise)
        losses = jnp.mean(weight * errors, axis=1)
        named = dict(zip(config.objectives, losses, strict=True))
        return jnp.sum(losses), {f"loss/{name}": x for name, x in named.items()}

    actor, actor_metrics = descend(config.actor.optimiser, state.actor, loss_fn)
    for name, row in zip(config.objectives, weight, strict=True):
        metrics[f"weight/{name}"] = jnp.mean(row)
    return OfflineState(actor, critics), metrics | actor_metrics


def weights(config: OfflineConfig, values: Values) -> Float[Array, "K B"]:
    """Of every skill and transition."""

    def of(name: str) -> Array:
        weight = functools.partial(OBJECTIVES[name].weight, config.weights)
        return jax.vmap(weight)(values)

    return jnp.stack([of(name) for name in config.objectives])


def _errors(
    config: SkillConfig | PretrainConfig,
    params: Params,
    base: Params | None,
    batch: Transitions,
    noise: Noise,
) -> Float[Array, "K B"]:
    """The diffusion loss of every skill and transition."""
    if isinstance(config, PretrainConfig):
        alone = jax.tree.map(lambda leaf: leaf[0], noise)
        error = pretrain_agent.errors(config, params, batch.obs, batch.action, alone)
        return error[None]

    def one(k: int) -> Array:
        skill, own = jax.tree.map(lambda leaf: leaf[k], (params, noise))
        return skill_agent.errors(config, skill, base, batch.obs, batch.action, own)

    # One after the other in the program, not vmapped: a CPU runs the products of two
    # skills side by side, and not the halves of a batched one.
    return jnp.stack([one(k) for k in range(len(noise.t))])
