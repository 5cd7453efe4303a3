"""Critics learned offline from transitions: no policy is needed.

`CRITICS` says what each kind learns. C critics of different kinds train in one program:
every Q is in one tree, leaves [C, 2, ...], and every V in one, leaves [C, ...], in the
order of `CriticConfig.kinds`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.agents.common import (
    Metrics,
    OptimiserConfig,
    Transitions,
    check_batch_size,
    descend,
    init_state,
)
from psec_jax.errors import InputError, lookup
from psec_jax.losses import (
    Value,
    expectile_loss,
    feasibility_target,
    reversed_expectile_loss,
    td_target,
)
from psec_jax.networks.critics import PESSIMISM, init_q, init_v, twin_q, v_value
from psec_jax.types import Params, TrainState


class Critic(NamedTuple):
    """What a critic of one kind learns.

    Attributes:
      signal: the column of `Transitions` that it predicts.
      target: `(signal, mask, next_v, discount) -> scalar`, what Q is drawn to.
      loss: `(Q' - V, expectile) -> scalar`, of V.
      expectile: the field of `CriticConfig` that holds the expectile.
    """

    signal: str
    target: Callable[..., Array]
    loss: Callable[..., Array]
    expectile: str


# reward: IQL. safety: feasibility (Hamilton-Jacobi). cost: the discounted sum of costs,
# called qc in the authors' code.
CRITICS = {
    "reward": Critic("reward", td_target, expectile_loss, "expectile"),
    "safety": Critic(
        "h", feasibility_target, reversed_expectile_loss, "safety_expectile"
    ),
    "cost": Critic("cost", td_target, reversed_expectile_loss, "cost_expectile"),
}


def reads_costs(kinds: Sequence[str]) -> bool:
    """Whether a critic of these kinds learns from the costs of transitions."""
    return any(CRITICS[kind].signal in ("cost", "h") for kind in kinds)


@dataclass(frozen=True)
class CriticConfig:
    """Kinds, sizes, targets and optimiser of the critics.

    Attributes:
      kinds: keys of `CRITICS`, all different.
      widths: hidden widths of every network.
      discount: gamma.
      expectile: of the reward's V.
      safety_expectile: of V_h, reversed.
      cost_expectile: of the cost's V, reversed; 0.5 is the mean over the actions of the
        data. The authors' code has that of V_h, for a critic that nothing reads.
      learning_rate: of Adam, constant.
      target_rate: of the target networks' moving average.
      batch_size: transitions a step.
    """

    kinds: tuple[str, ...] = ("reward", "safety", "cost")
    widths: tuple[int, ...] = (256, 256)
    discount: float = 0.99
    expectile: float = 0.7
    safety_expectile: float = 0.9
    cost_expectile: float = 0.5
    learning_rate: float = 3e-4
    target_rate: float = 0.005
    batch_size: int = 2048

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        for field in ("discount", "expectile", "safety_expectile", "cost_expectile"):
            if not 0 < getattr(self, field) < 1:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected between 0 and 1"
                )
        if not 0 < self.target_rate <= 1:
            raise InputError(
                f"target_rate: got {self.target_rate}, expected 0 < rate <= 1"
            )
        if not self.learning_rate > 0:
            raise InputError(
                f"learning_rate: got {self.learning_rate}, expected above 0"
            )
        if min(self.widths, default=1) < 1:
            raise InputError(f"widths: got {self.widths}, expected 1 or more")
        check_batch_size(self.batch_size)

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


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Refuse kinds of critics that cannot be trained.

    Raises:
      InputError: none, an unknown one, or one twice.
    """
    if not kinds:
        raise InputError(f"kinds: got none, expected some of {', '.join(CRITICS)}")
    for kind in kinds:
        lookup(CRITICS, kind, "kind of critic")
    if len(set(kinds)) < len(kinds):
        raise InputError(f"kinds: got {', '.join(kinds)}, expected different ones")


class CriticParams(NamedTuple):
    """The networks of finished critics.

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


def of_kind(params: CriticParams, kinds: Sequence[str], kind: str) -> CriticParams:
    """The critic of one kind among critics of `kinds`: leaves q [2, ...] and v [...].

    Raises:
      InputError: no critic of that kind.
    """
    if kind not in kinds:
        raise InputError(f"critics of {' and '.join(kinds)}: none of {kind}")
    index = list(kinds).index(kind)
    return jax.tree.map(lambda leaf: leaf[index], params)


def values(
    params: CriticParams,
    kinds: Sequence[str],
    obs: Float[Array, "B S"],
    action: Float[Array, "B A"],
) -> dict[str, Value]:
    """What critics of these kinds say of a batch, by kind."""
    q = _pessimistic(kinds, twins(params.q, obs, action))
    return _by_kind(kinds, q, v_values(params.v, obs))


def _by_kind(
    kinds: Sequence[str], q: Float[Array, "C B"], v: Float[Array, "C B"]
) -> dict[str, Value]:
    return {kind: Value(*pair) for kind, *pair in zip(kinds, q, v, strict=True)}


def v_values(params: Params, obs: Float[Array, "B S"]) -> Float[Array, "C B"]:
    """V of every critic."""
    return jax.vmap(v_value, (0, None))(params, obs)


def twins(
    params: Params, obs: Float[Array, "B S"], action: Float[Array, "B A"]
) -> Float[Array, "C 2 B"]:
    """Both Q of every critic, all in one call."""
    return jax.vmap(twin_q, (0, None, None))(params, obs, action)


def _pessimistic(kinds: Sequence[str], q: Float[Array, "C 2 B"]) -> Float[Array, "C B"]:
    """Of each pair the Q that counts."""
    rows = [PESSIMISM[kind](x, axis=0) for kind, x in zip(kinds, q, strict=True)]
    return jnp.stack(rows)


def update(
    config: CriticConfig,
    state: CriticState,
    batch: Transitions,
    frozen: None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[CriticState, Metrics]:
    """One step; nothing is frozen, and nothing random but the batch."""
    del frozen, key
    state, _, metrics = step(config, state, batch)
    return state, metrics


def step(
    config: CriticConfig, state: CriticState, batch: Transitions
) -> tuple[CriticState, dict[str, Value], Metrics]:
    """V towards the target networks' Q, then Q towards the new V, then the targets.

    Returns:
      The state, what the critics said of the batch before the step, and metrics.
    """
    q = _pessimistic(config.kinds, twins(state.q.ema, batch.obs, batch.action))

    def v_loss(params: Params) -> tuple[Array, Metrics]:
        v = v_values(params, batch.obs)
        losses = jnp.mean(_value_losses(config, q - v), axis=1)
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
    return CriticState(q_state, v_state), _by_kind(config.kinds, q, v), metrics


def _value_losses(
    config: CriticConfig, diff: Float[Array, "C B"]
) -> Float[Array, "C B"]:
    """The loss of every V, given d = Q' - V."""
    rows = []
    for kind, row in zip(config.kinds, diff, strict=True):
        critic = CRITICS[kind]
        expectile = getattr(config, critic.expectile)
        rows.append(jax.vmap(partial(critic.loss, expectile=expectile))(row))
    return jnp.stack(rows)


def targets(
    config: CriticConfig, batch: Transitions, next_v: Float[Array, "C B"]
) -> Float[Array, "C B"]:
    """What every Q is drawn to, given V at the next states."""
    rows = []
    for kind, row in zip(config.kinds, next_v, strict=True):
        critic = CRITICS[kind]
        one = partial(critic.target, discount=config.discount)
        rows.append(jax.vmap(one)(getattr(batch, critic.signal), batch.mask, row))
    return jnp.stack(rows)


def _named(config: CriticConfig, name: str, numbers: Float[Array, " C"]) -> Metrics:
    """One metric for each kind of critic, by a name that begins as given."""
    return {f"{name}{k}": x for k, x in zip(config.kinds, numbers, strict=True)}
