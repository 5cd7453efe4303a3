"""Losses and weights of one example: pure, scalar, vmapped by the caller.

Critics are learned offline from transitions (s, a, r, c, h, s'): reward by IQL
(Kostrikov et al. 2022), safety by feasibility in the sense of Hamilton-Jacobi
reachability (Zheng et al. 2024, FISOR), cost as a discounted sum. `OBJECTIVES` says how
they guide a policy: by the weight of a transition's error, or by what they say of an
action that the policy samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Real

from psec_jax import process
from psec_jax.errors import InputError
from psec_jax.networks.denoiser import Denoise
from psec_jax.process import ProcessConfig


def prediction_error(
    denoise: Denoise,
    config: ProcessConfig,
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
    t: Real[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, ""]:
    """||denoise(s, a_t, t) - target||^2 at a given time and noise."""
    a_t = process.corrupt(config, action, t, eps)
    predicted = denoise(obs, a_t, t.astype(jnp.float32))
    return jnp.sum((predicted - process.target(config, action, eps)) ** 2)


def diffusion_loss(
    denoise: Denoise,
    config: ProcessConfig,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
) -> Float[Array, ""]:
    """`prediction_error` at a random time (Ho et al. 2020, eq. 14).

    The sum, not the mean, over action dimensions.
    """
    t, eps = process.draw(config, key, action.shape[-1])
    return prediction_error(denoise, config, obs, action, t, eps)


def cloning_loss(
    sampled: Float[Array, " A"], action: Float[Array, " A"]
) -> Float[Array, ""]:
    """||a_sampled - a||^2: behaviour cloning through the sampler."""
    return jnp.sum((sampled - action) ** 2)


def released_regulariser(
    alpha: Float[Array, "B K"], strength: float
) -> Float[Array, ""]:
    """(mean alpha - strength / 2)^2 + (mean alpha of the last skill - strength)^2.

    Of a batch, from the authors' code (strength 16, the last skill is the safety
    skill); not in the paper, and larger than the diffusion loss it is added to.
    """
    return (jnp.mean(alpha) - strength / 2) ** 2 + (
        jnp.mean(alpha[:, -1]) - strength
    ) ** 2


def expectile_loss(diff: Float[Array, ""], expectile: float) -> Float[Array, ""]:
    """|expectile - 1[diff <= 0]| diff^2 (Kostrikov et al. 2022, eq. 5).

    With diff = Q - V and an expectile above 1/2, V leans to the larger Q.
    """
    return jnp.where(diff > 0, expectile, 1 - expectile) * diff**2


def reversed_expectile_loss(
    diff: Float[Array, ""], expectile: float
) -> Float[Array, ""]:
    """The same with the sign turned: V leans to the smaller Q, of harm (FISOR)."""
    return expectile_loss(-diff, expectile)


def td_target(
    signal: Float[Array, ""],
    mask: Float[Array, ""],
    next_v: Float[Array, ""],
    discount: float | Float[Array, ""],
) -> Float[Array, ""]:
    """r + gamma mask V(s'), of rewards or costs; the mask is 0 where the task ended."""
    return signal + discount * mask * next_v


def feasibility_target(
    h: Float[Array, ""],
    mask: Float[Array, ""],
    next_v_h: Float[Array, ""],
    discount: float,
) -> Float[Array, ""]:
    """(1 - gamma) h + gamma max(h, V_h(s')), and h where the task ended (FISOR).

    Above 0 a violation is unavoidable from here, the sooner the larger.
    """
    ongoing = (1 - discount) * h + discount * jnp.maximum(h, next_v_h)
    return mask * ongoing + (1 - mask) * h


class Value(NamedTuple):
    """What a critic of one kind says of (s, a); fields may have batch axes.

    Attributes:
      q: Q(s, a), the more pessimistic of the twins.
      v: V(s).
    """

    q: Float[Array, "*B"]
    v: Float[Array, "*B"]


Values = Mapping[str, Value]  # by the kind of critic


class Sampled(NamedTuple):
    """An action of the policy in training, and what critics say of it.

    Attributes:
      action: [A], sampled in the state of the example.
      values: at that action.
      size: mean |Q| over the batch of data by the kind of critic; a constant.
    """

    action: Float[Array, " A"]
    values: Values
    size: Mapping[str, Float[Array, ""]]


@dataclass(frozen=True)
class WeightConfig:
    """How critics guide the policy: weights of errors, and terms on sampled actions.

    Attributes:
      reward_temperature: tau_r, a factor of the reward advantage.
      safety_temperature: tau_h, a factor of the safety advantage.
      clip: the largest weight.
      infeasible_floor: the least weight of "fisor" in infeasible states; FISOR's
        formula has 0, its released code 1.
      eta: the strength of the term of "dql".
    """

    reward_temperature: float = 1.0
    safety_temperature: float = 1.0
    clip: float = 100.0
    infeasible_floor: float = 0.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        for field in (
            "reward_temperature",
            "safety_temperature",
            "infeasible_floor",
            "eta",
        ):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 0 or more"
                )
        if not self.clip > self.infeasible_floor:
            raise InputError(
                f"clip: got {self.clip}, expected above {self.infeasible_floor:g}"
            )


def advantage_weight(
    advantage: Float[Array, ""], temperature: float, clip: float, floor: float = 0.0
) -> Float[Array, ""]:
    """clip(exp(temperature * advantage), floor, clip)."""
    return jnp.clip(jnp.exp(temperature * advantage), floor, clip)


def bc_weight(config: WeightConfig, values: Values) -> Float[Array, ""]:
    """1: plain cloning."""
    return jnp.ones(())


def reward_weight(config: WeightConfig, values: Values) -> Float[Array, ""]:
    """clip(exp(tau_r (Q - V)), 0, c)."""
    q, v = values["reward"]
    return advantage_weight(q - v, config.reward_temperature, config.clip)


def safety_weight(config: WeightConfig, values: Values) -> Float[Array, ""]:
    """1[Q_h < V_h] clip(exp(tau_h (V_h - Q_h)), 0, c)."""
    q_h, v_h = values["safety"]
    advantage = v_h - q_h
    weight = advantage_weight(advantage, config.safety_temperature, config.clip)
    return jnp.where(advantage > 0, weight, 0.0)


def fisor_weight(config: WeightConfig, values: Values) -> Float[Array, ""]:
    """FISOR's weights, of reward where safety can be kept and of safety elsewhere.

    In the feasible region V_h <= 0: 1[Q_h <= 0] clip(exp(tau_r (Q - V)), 0, c);
    outside it: clip(exp(tau_h (V_h - Q_h)), floor, c) (Zheng et al. 2024).
    """
    q_h, v_h = values["safety"]
    feasible = jnp.where(q_h <= 0, reward_weight(config, values), 0.0)
    infeasible = advantage_weight(
        v_h - q_h, config.safety_temperature, config.clip, config.infeasible_floor
    )
    return jnp.where(v_h <= 0, feasible, infeasible)


def dql_term(config: WeightConfig, sampled: Sampled) -> Float[Array, ""]:
    """-eta Q(s, pi(s)) / mean |Q| (Wang et al. 2023, eq. 3), of the smaller twin."""
    return -config.eta * sampled.values["reward"].q / sampled.size["reward"]


class Objective(NamedTuple):
    """What a policy is trained on: weighted errors, and a term on its own actions.

    Attributes:
      weight: `(config, values) -> scalar`, the weight of a transition's error.
      critics: kinds of critics that it reads, keys of `agents.critics.CRITICS`.
      term: `(config, sampled) -> scalar`, added to the weighted error of every example;
        its gradient goes through the sampler. None samples no action.
    """

    weight: Callable[[WeightConfig, Values], Array]
    critics: tuple[str, ...]
    term: Callable[[WeightConfig, Sampled], Array] | None = None

    @property
    def guided(self) -> bool:
        """Whether it is more than cloning."""
        return bool(self.critics) or self.term is not None


OBJECTIVES = {
    "bc": Objective(bc_weight, ()),
    "reward": Objective(reward_weight, ("reward",)),
    "safety": Objective(safety_weight, ("safety",)),
    "fisor": Objective(fisor_weight, ("reward", "safety")),
    "dql": Objective(bc_weight, ("reward",), dql_term),
}
