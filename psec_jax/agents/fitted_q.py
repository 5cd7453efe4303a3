"""Fitted Q evaluation: what fixed policies will earn or cost, from logged data alone.

Q of a policy pi is drawn to c + gamma mask Q(s', pi(s')) on the transitions of the data
(Le et al. 2019), with Q(s', pi(s')) kept within what any policy can have, `Sum`; P
policies train in one program, leaves [P, ...].
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    Rows,
    check_batch_size,
    descend,
    init_state,
)
from psec_jax.errors import InputError, at_least
from psec_jax.losses import td_target
from psec_jax.networks.critics import q_value
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class FittedQConfig:
    """Length and optimiser of one evaluation.

    Attributes:
      transitions: of the data, drawn at random; the policies act in each of them once.
      starts: states that trajectories of the data start from, over which is averaged.
      steps: updates.
      batch_size: transitions an update.
      learning_rate: of Adam, constant.
      target_rate: of the target network's moving average; errors of the level shrink by
        exp(-rate (1 - gamma)) an update, so that the rate of critics is too slow here.
    """

    transitions: int = 50_000
    starts: int = 1000
    steps: int = 8000
    batch_size: int = 256
    learning_rate: float = 3e-4
    target_rate: float = 0.05

    def __post_init__(self) -> None:
        at_least(self, 1, "transitions", "starts", "steps")
        check_batch_size(self.batch_size)
        if not 0 < self.target_rate <= 1:
            raise InputError(
                f"target_rate: got {self.target_rate}, expected 0 < rate <= 1"
            )
        self.optimiser  # noqa: B018 (its own checks)

    @property
    def optimiser(self) -> OptimiserConfig:
        """Of every Q; the moving average is the target network."""
        return OptimiserConfig(
            self.learning_rate, weight_decay=0.0, ema=self.target_rate
        )


class Sum(NamedTuple):
    """How a signal is summed.

    Attributes:
      discount: gamma.
      low: the least discounted sum that any policy can have.
      high: the largest.
    """

    discount: float | Float[Array, ""]
    low: float | Float[Array, ""]
    high: float | Float[Array, ""]


class Steps(NamedTuple):
    """What is learned from: N rows, or a batch of B of them.

    Attributes:
      obs: [N, S], normalised.
      action: [N, A].
      signal: [N], reward or cost.
      next_obs: [N, S], normalised.
      next_action: [N, P, A], what each policy does there.
      mask: [N], 0 where nothing is bootstrapped.
    """

    obs: Float[Rows, "N S"]
    action: Float[Rows, "N A"]
    signal: Float[Rows, " N"]
    next_obs: Float[Rows, "N S"]
    next_action: Float[Rows, "N P A"]
    mask: Float[Rows, " N"]


def sum_of(signal: Float[np.ndarray, " N"], discount: float) -> Sum:
    """The discounted sum of a signal, of which data have these values.

    A policy that ends at once has 0. Costs are never below it, but a Q that is
    extrapolated to actions of another policy soon is, and its errors add up.
    """
    low, high = min(float(signal.min()), 0.0), max(float(signal.max()), 0.0)
    return Sum(discount, low / (1 - discount), high / (1 - discount))


def init(config: FittedQConfig, q: Params, policies: int) -> TrainState:
    """Every policy's Q starts from that of finished critics, leaves [...]."""
    copies = jax.tree.map(
        lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], policies, axis=0), q
    )
    return init_state(config.optimiser, copies)


def values(
    params: Params, obs: Float[Array, "B S"], action: Float[Array, "B P A"]
) -> Float[Array, "P B"]:
    """Q of each policy, at its own action."""
    return jax.vmap(q_value, (0, None, 1))(params, obs, action)


def update(
    config: FittedQConfig,
    state: TrainState,
    batch: Steps,
    frozen: Sum,
    key: Key[Array, ""],
) -> tuple[TrainState, Metrics]:
    """One step of every Q towards its target; nothing in it is drawn by the key."""
    next_q = values(state.ema, batch.next_obs, batch.next_action)
    next_q = jnp.clip(next_q, frozen.low, frozen.high)
    of_rows = jax.vmap(td_target, (0, 0, 0, None))
    of_policies = jax.vmap(of_rows, (None, None, 0, None))
    target = of_policies(batch.signal, batch.mask, next_q, frozen.discount)

    def loss_fn(params: Params) -> tuple[Array, Metrics]:
        q = jax.vmap(q_value, (0, None, None))(params, batch.obs, batch.action)
        losses = jnp.mean((q - target) ** 2, axis=1)
        return jnp.sum(losses), {"loss/fitted_q": jnp.mean(losses)}

    return descend(config.optimiser, state, loss_fn)
