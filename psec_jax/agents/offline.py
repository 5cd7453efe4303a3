"""Skills, or a base, guided by critics: offline RL.

K skills train in one program, each on its own objective, with or without the critics
that they read. The actor is a stack of skills, leaves [K, ...], or a base (K = 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax import process
from psec_jax.agents import cloning
from psec_jax.agents import critics as critic_agent
from psec_jax.agents.cloning import CloningConfig
from psec_jax.agents.common import Metrics, Noise, Transitions, batch_noise, descend
from psec_jax.agents.common import init_state as init_actor
from psec_jax.agents.critics import CriticConfig, CriticParams, CriticState
from psec_jax.errors import InputError, lookup
from psec_jax.losses import OBJECTIVES, Sampled, Values, WeightConfig
from psec_jax.runtime import platform
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class OfflineConfig:
    """What is trained, on which objectives, and with which critics.

    Attributes:
      actor: of the skills, or of the base.
      objectives: keys of `OBJECTIVES`, one for each skill, all different.
      critics: trained in the same program; None reads the finished ones of `Frozen`.
        They learn from the actor's batch, and their own batch size is not used.
      weights: how critics guide the actor.
      finished: kinds of the finished critics, in their order, where none are trained.
    """

    actor: CloningConfig
    objectives: tuple[str, ...]
    critics: CriticConfig | None = field(default_factory=CriticConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    finished: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("objectives: got none, expected one or more")
        if len(set(self.objectives)) < len(self.objectives):
            raise InputError(
                f"objectives: got {', '.join(self.objectives)}, expected different ones"
            )
        if self.actor.skill is None and len(self.objectives) > 1:
            raise InputError(
                f"objectives: got {len(self.objectives)}, a base has one objective"
            )
        for name in self.objectives:
            objective = lookup(OBJECTIVES, name, "objective")
            for kind in objective.critics:
                if kind not in self.kinds:
                    raise InputError(
                        f"objective {name!r} needs a critic of {kind}, which is not "
                        f"among critics.kinds ({', '.join(self.kinds) or 'none'})"
                    )
            if objective.guided and self.actor.process.horizon > 1:
                raise InputError(
                    f"horizon: got {self.actor.process.horizon}, expected 1: objective "
                    f"{name!r} judges single actions"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the critics that are read."""
        return self.finished if self.critics is None else self.critics.kinds

    @property
    def batch_size(self) -> int:
        """Transitions a step."""
        return self.actor.batch_size


class Frozen(NamedTuple):
    """What training reads and never changes.

    Attributes:
      base: under the skills; None where the actor is a base.
      critics: finished ones; None where critics are trained.
    """

    base: Params | None = None
    critics: CriticParams | None = None


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
    actor = config.actor
    if actor.skill is None:
        state = cloning.init(actor, actor_key, obs_dim, action_dim, start=start)
    else:
        keys = jax.random.split(actor_key, len(config.objectives))
        make = partial(
            cloning.init_params,
            actor,
            obs_dim=obs_dim,
            action_dim=action_dim,
            base=base,
        )
        state = init_actor(actor.optimiser, jax.vmap(make)(keys))
    if config.critics is None:
        return OfflineState(state, None)
    critics = critic_agent.init(config.critics, critic_key, obs_dim, action_dim)
    return OfflineState(state, critics)


def update(
    config: OfflineConfig,
    state: OfflineState,
    batch: Transitions,
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[OfflineState, Metrics]:
    """One step on a batch that skills and critics share."""
    draw = partial(
        batch_noise,
        config.actor.process,
        batch_size=len(batch.obs),
        action_dim=batch.action.shape[-1],
    )
    noise = jax.vmap(draw)(jax.random.split(key, len(config.objectives)))
    return step(config, state, batch, frozen, noise)


def step(
    config: OfflineConfig,
    state: OfflineState,
    batch: Transitions,
    frozen: Frozen,
    noise: Noise,
) -> tuple[OfflineState, Metrics]:
    """One step with given noise.

    The actor reads the critics before their own step, as in the authors' code.

    Args:
      config: what is trained.
      state: actor and critics.
      batch: B transitions.
      frozen: base and finished critics.
      noise: of every skill, leaves [K, B, ...].
    """
    metrics: Metrics = {}
    critics, values = None, {}
    if config.critics is None:
        read = frozen.critics
        if read is not None:
            values = critic_agent.values(read, config.kinds, batch.obs, batch.action)
    else:
        assert state.critics is not None
        read = state.critics.trained
        critics, values, metrics = critic_agent.step(
            config.critics, state.critics, batch
        )
    weight = weights(config, values, len(batch.obs))

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        errors = _errors(config.actor, params, frozen.base, batch, noise)
        losses = jnp.mean(weight * errors, axis=1)
        named: Metrics = {}
        parts = _parts(config.actor, params, noise)
        for k, (name, part) in enumerate(zip(config.objectives, parts, strict=True)):
            if term := OBJECTIVES[name].term:
                said = _term(config, term, *part, frozen.base, batch, read, values)
                losses = losses.at[k].add(said)
                named[f"term/{name}"] = said
            named[f"loss/{name}"] = losses[k]
        return jnp.sum(losses), named

    actor, actor_metrics = descend(config.actor.optimiser, state.actor, loss_fn)
    for name, row in zip(config.objectives, weight, strict=True):
        metrics[f"weight/{name}"] = jnp.mean(row)
    return OfflineState(actor, critics), metrics | actor_metrics


def weights(
    config: OfflineConfig, values: Values, batch_size: int
) -> Float[Array, "K B"]:
    """The weight of every skill and transition, given what critics say of them."""

    def of(name: str) -> Array:
        one = partial(OBJECTIVES[name].weight, config.weights)
        return jax.vmap(one, axis_size=batch_size)(values)

    return jnp.stack([of(name) for name in config.objectives])


def _parts(
    config: CloningConfig, params: Params, noise: Noise
) -> list[tuple[Params, Noise]]:
    """Parameters and noise of each skill, or of the base."""

    def at(k: int, stacked: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[k], stacked)

    alone = config.skill is None
    count = len(noise.t)
    return [(params if alone else at(k, params), at(k, noise)) for k in range(count)]


def _errors(
    config: CloningConfig,
    params: Params,
    base: Params | None,
    batch: Transitions,
    noise: Noise,
) -> Float[Array, "K B"]:
    """The process's loss of every skill and transition."""

    def one(params: Params, noise: Noise) -> Array:
        return cloning.errors(config, params, base, batch.obs, batch.action, noise)

    if config.skill is None or platform.current().unroll_skills:
        return jnp.stack([one(*part) for part in _parts(config, params, noise)])
    return jax.vmap(one)(params, noise)


def _term(
    config: OfflineConfig,
    term: Callable[[WeightConfig, Sampled], Array],
    params: Params,
    noise: Noise,
    base: Params | None,
    batch: Transitions,
    critics: CriticParams | None,
    values: Values,
) -> Float[Array, ""]:
    """The mean of an objective's term over actions that the actor samples."""
    action_dim = batch.action.shape[-1]
    denoise = cloning.denoiser(config.actor, params, base, action_dim)

    def act(obs: Array, key: Array) -> Array:
        return process.sample(denoise, config.actor.process, key, obs, action_dim)

    action = jax.vmap(act)(batch.obs, noise.sample)
    said, size = {}, {}
    if critics is not None:
        said = critic_agent.values(critics, config.kinds, batch.obs, action)
        size = {kind: jnp.mean(jnp.abs(value.q)) for kind, value in values.items()}

    def one(action: Array, said: Values) -> Array:
        return term(config.weights, Sampled(action, said, size))

    return jnp.mean(jax.vmap(one)(action, said))
