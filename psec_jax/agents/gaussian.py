"""A Gaussian policy, cloned or weighted by advantages: the baselines BC and IQL.

The actor of IQL (Kostrikov et al. 2022): an MLP gives the mean through tanh, the
standard deviations are parameters that do not depend on the state. With the objective
"reward" its log-likelihood is weighted by clip(exp(tau (Q - V)), 0, clip), and the
critics learn in the same program; with "bc" it is cloned, and there are none.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.agents import critics as critic_agent
from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    Transitions,
    check_batch_size,
    descend,
    init_state,
)
from psec_jax.agents.critics import CriticConfig, CriticState
from psec_jax.errors import InputError, lookup
from psec_jax.losses import OBJECTIVES, WeightConfig
from psec_jax.networks.mlp import MLP, init_net
from psec_jax.types import Params, TrainState

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianConfig:
    """Sizes, objective and optimiser.

    Attributes:
      objective: "bc", or "reward" for IQL.
      widths: hidden widths of the mean.
      optimiser: of the actor.
      critics: of IQL; "bc" has none.
      weights: how advantages become weights; IQL has a temperature of 3 for MuJoCo.
      batch_size: transitions a step.
    """

    objective: str = "reward"
    widths: tuple[int, ...] = (256, 256)
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(weight_decay=0.0, ema=1.0)
    )
    critics: CriticConfig = field(
        default_factory=lambda: CriticConfig(kinds=("reward",))
    )
    weights: WeightConfig = field(
        default_factory=lambda: WeightConfig(reward_temperature=3.0)
    )
    batch_size: int = 256

    def __post_init__(self) -> None:
        objective = lookup(OBJECTIVES, self.objective, "objective")
        if objective.term is not None or not set(objective.critics) <= {"reward"}:
            raise InputError(
                f"objective {self.objective!r}: a Gaussian policy has bc and reward"
            )
        check_batch_size(self.batch_size)


class GaussianState(NamedTuple):
    """Training state of the actor, and of the critics where it has some."""

    actor: TrainState
    critics: CriticState | None

    @property
    def step(self) -> Array:
        """Updates done."""
        return self.actor.step


def init(
    config: GaussianConfig, key: Key[Array, ""], obs_dim: int, action_dim: int
) -> GaussianState:
    """A fresh actor, and fresh critics where its objective reads them."""
    actor_key, critic_key = jax.random.split(key)
    net = MLP(config.widths, action_dim)
    params = {
        "mean": init_net(net, actor_key, (obs_dim,)),
        "log_std": jnp.zeros(action_dim),
    }
    state = init_state(config.optimiser, params)
    if not OBJECTIVES[config.objective].critics:
        return GaussianState(state, None)
    critics = critic_agent.init(config.critics, critic_key, obs_dim, action_dim)
    return GaussianState(state, critics)


def update(
    config: GaussianConfig,
    state: GaussianState,
    batch: Transitions,
    frozen: None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[GaussianState, Metrics]:
    """One step on a batch that actor and critics share; nothing else is random."""
    del frozen, key
    critics, weight, metrics = None, jnp.ones(len(batch.obs)), {}
    if state.critics is not None:
        critics, values, metrics = critic_agent.step(
            config.critics, state.critics, batch
        )
        one = partial(OBJECTIVES[config.objective].weight, config.weights)
        weight = jax.vmap(one)(values)

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        likelihood = jax.vmap(partial(log_prob, config, params))
        loss = -jnp.mean(weight * likelihood(batch.obs, batch.action))
        return loss, {f"loss/{config.objective}": loss}

    actor, actor_metrics = descend(config.optimiser, state.actor, loss_fn)
    return GaussianState(actor, critics), metrics | actor_metrics


def mean(
    config: GaussianConfig, params: Params, obs: Float[Array, "*b S"]
) -> Float[Array, "*b A"]:
    """The action that is played in evaluation; obs are normalised."""
    action_dim = params["log_std"].shape[-1]
    net = MLP(config.widths, action_dim)
    return jnp.tanh(cast(Array, net.apply({"params": params["mean"]}, obs)))


def log_prob(
    config: GaussianConfig,
    params: Params,
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
) -> Float[Array, ""]:
    """log N(action; mean(obs), exp(log_std)^2) of one example."""
    log_std = jnp.clip(params["log_std"], LOG_STD_MIN, LOG_STD_MAX)
    error = (action - mean(config, params, obs)) * jnp.exp(-log_std)
    return -jnp.sum(0.5 * error**2 + log_std + HALF_LOG_2PI)
