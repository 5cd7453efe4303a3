"""Critics of reward and safety, learned offline from transitions: no policy is needed.

With C = 1 (reward) or C = 2 (reward, then safety) critics, every Q lies in one tree,
leaves [C, 2, ...], and every V in one, leaves [C, ...].
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    Transitions,
    descend,
    draw,
    draw_index,
    init_state,
    row_count,
)
from psec_jax.errors import InputError
from psec_jax.losses import (
    CRITICS,
    Values,
    expectile_loss,
    feasibility_target,
    reversed_expectile_loss,
    td_target,
)
from psec_jax.networks.critics import init_q, init_v, twin_q, v_value
from psec_jax.types import Params, TrainState


@dataclass(frozen=True)
class CriticConfig:
    """Sizes, targets and optimiser of the critics.

    Attributes:
      safety: learn Q_h and V_h beside Q and V.
      widths: hidden widths of every network.
      discount: gamma.
      expectile: of V.
      safety_expectile: of V_h, reversed.
      learning_rate: of Adam, constant.
      target_rate: of the target networks' moving average.
      batch_size: transitions a step.
    """

    safety: bool = True
    widths: tuple[int, ...] = (256, 256)
    discount: float = 0.99
    expectile: float = 0.7
    safety_expectile: float = 0.9
    learning_rate: float = 3e-4
    target_rate: float = 0.005
    batch_size: int = 2048

    def __post_init__(self) -> None:
        for field in ("discount", "expectile", "safety_expectile"):
            if not 0 < getattr(self, field) < 1:
                raise InputError(
                    f"critics.{field}: got {getattr(self, field)}, expected between 0 "
                    "and 1"
                )
        if not 0 < self.target_rate <= 1:
            raise InputError(
                f"critics.target_rate: got {self.target_rate}, expected 0 < rate <= 1"
            )
        if self.learning_rate <= 0:
            raise InputError(
                f"critics.learning_rate: got {self.learning_rate}, expected above 0"
            )
        if min(self.widths, default=1) < 1:
            raise InputError(f"critics.widths: got {self.widths}, expected 1 or more")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each of the C critics judges."""
        return CRITICS if self.safety else CRITICS[:1]

    @property
    def q_optimiser(self) -> OptimiserConfig:
        """Of every Q; the moving average is the target network."""
        return OptimiserConfig(
            self.learning_rate, weight_decay=0.0, ema=self.target_rate
        )

    @property
    def v_optimiser(self) -> OptimiserConfig:
        """Of every V, which has no target network."""
        return OptimiserConfig(self.learning_rate, weight_decay=0.0, ema=1.0)


class CriticParams(NamedTuple):
    """What is left of the critics when their training is over.

    Attributes:
      q: target networks, leaves [C, 2, ...].
      v: leaves [C, ...].
    """

    q: Params
    v: Params


class CriticState(NamedTuple):
    """Training state of every Q (the average is the target) and of every V."""

    q: TrainState
    v: TrainState

    @property
    def step(self) -> Array:
        """Updates done."""
        return self.q.step

    @property
    def trained(self) -> CriticParams:
        """The networks that are read."""
        return CriticParams(self.q.ema, self.v.params)


def init(
    config: CriticConfig, key: Key[Array, ""], obs_dim: int, action_dim: int
) -> CriticState:
    """Fresh critics; target networks start as copies."""
    count = len(config.kinds)
    keys = jax.random.split(key, (count, 3))
    make_q = jax.vmap(jax.vmap(lambda k: init_q(config.widths, k, obs_dim, action_dim)))
    make_v = jax.vmap(lambda k: init_v(config.widths, k, obs_dim))
    return CriticState(
        init_state(config.q_optimiser, make_q(keys[:, :2])),
        init_state(config.v_optimiser, make_v(keys[:, 2])),
    )


def values(
    params: CriticParams, obs: Float[Array, "B S"], action: Float[Array, "B A"]
) -> Values:
    """What the critics say of a batch."""
    return _values(_chosen(params.q, obs, action), v_values(params.v, obs))


def _values(q: Float[Array, "C B"], v: Float[Array, "C B"]) -> Values:
    pairs = [x for pair in zip(q, v, strict=True) for x in pair]
    return Values(*pairs)


def v_values(params: Params, obs: Float[Array, "B S"]) -> Float[Array, "C B"]:
    """V of every critic."""
    return jax.vmap(v_value, (0, None))(params, obs)


def twins(
    params: Params, obs: Float[Array, "B S"], action: Float[Array, "B A"]
) -> Float[Array, "C 2 B"]:
    """Both Q of every critic, all in one call."""
    return jax.vmap(twin_q, (0, None, None))(params, obs, action)


def _chosen(
    params: Params, obs: Float[Array, "B S"], action: Float[Array, "B A"]
) -> Float[Array, "C B"]:
    """The cautious one of each pair: the smaller Q, the larger Q_h."""
    q = twins(params, obs, action)
    return jnp.stack([jnp.min(q[0], 0), *jnp.max(q[1:], 1)])


def index(
    config: CriticConfig, key: Key[Array, ""], count: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """The rows that a step with this key draws from `count`."""
    return draw_index(key, config.batch_size, count)


def update(
    config: CriticConfig, state: CriticState, data: Transitions, key: Key[Array, ""]
) -> tuple[CriticState, Metrics]:
    """One step on a fresh batch."""
    batch = draw(index(config, key, row_count(data)), data)
    state, _, metrics = step(config, state, batch)
    return state, metrics


def step(
    config: CriticConfig, state: CriticState, batch: Transitions
) -> tuple[CriticState, Values, Metrics]:
    """V towards the target networks' Q, then Q towards the new V, then the targets.

    Returns:
      The state, what the critics said of the batch before the step, and metrics.
    """
    q = _chosen(state.q.ema, batch.obs, batch.action)

    def v_loss(params: Params) -> tuple[Array, Metrics]:
        v = v_values(params, batch.obs)
        losses = jnp.mean(_expectiles(config, q - v), axis=1)
        return jnp.sum(losses), {"v": v} | _named(config, "loss/value_", losses)

    v_state, metrics = descend(config.v_optimiser, state.v, v_loss)
    v = metrics.pop("v")
    metrics["grad/value"] = metrics.pop("grad/norm")
    target = targets(config, batch, v_values(v_state.params, batch.next_obs))

    def q_loss(params: Params) -> tuple[Array, Metrics]:
        errors = twins(params, batch.obs, batch.action) - target[:, None]
        losses = jnp.mean(errors**2, axis=(1, 2))
        return jnp.sum(losses), _named(config, "loss/critic_", losses)

    q_state, q_metrics = descend(config.q_optimiser, state.q, q_loss)
    metrics |= q_metrics
    metrics["grad/critic"] = metrics.pop("grad/norm")
    metrics |= _named(config, "q/", jnp.mean(q, axis=1))
    metrics |= _named(config, "v/", jnp.mean(v, axis=1))
    return CriticState(q_state, v_state), _values(q, v), metrics


def _expectiles(config: CriticConfig, diff: Float[Array, "C B"]) -> Float[Array, "C B"]:
    """The loss of every V, given d = Q' - V."""
    losses = {
        "reward": (expectile_loss, config.expectile),
        "safety": (reversed_expectile_loss, config.safety_expectile),
    }
    rows = []
    for kind, row in zip(config.kinds, diff, strict=True):
        loss, expectile = losses[kind]
        rows.append(jax.vmap(functools.partial(loss, expectile=expectile))(row))
    return jnp.stack(rows)


def targets(
    config: CriticConfig, batch: Transitions, next_v: Float[Array, "C B"]
) -> Float[Array, "C B"]:
    """What every Q is drawn to, given V at the next states."""
    signals = {
        "reward": (td_target, batch.reward),
        "safety": (feasibility_target, batch.h),
    }
    rows = []
    for kind, row in zip(config.kinds, next_v, strict=True):
        target, signal = signals[kind]
        of = functools.partial(target, discount=config.discount)
        rows.append(jax.vmap(of)(signal, batch.mask, row))
    return jnp.stack(rows)


def _named(config: CriticConfig, name: str, numbers: Float[Array, " C"]) -> Metrics:
    """One metric for each kind of critic, by a name that begins as given."""
    return {f"{name}{k}": x for k, x in zip(config.kinds, numbers, strict=True)}
