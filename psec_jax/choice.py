"""Rules by which critics choose among candidate actions of one state."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psec_jax.networks.critics import PESSIMISM, twin_q
from psec_jax.types import Params

Critics = Mapping[str, Params]  # the twins of each kind, leaves [2, ...]
Judged = Mapping[str, Float[Array, " N"]]  # Q of N candidates by the kind of critic


class Rule(NamedTuple):
    """How candidates are ranked.

    Attributes:
      critics: the kinds that it reads.
      score: `(Q by kind, cost weight) -> [N]`, of which the largest is chosen.
    """

    critics: tuple[str, ...]
    score: Callable[[Judged, Float[Array, ""]], Float[Array, " N"]]


def _feasible(q: Judged, cost_weight: Array) -> Array:
    """Most Q where Q_h <= 0; least Q_h where no candidate is feasible (FISOR)."""
    feasible = q["safety"] <= 0
    return jnp.where(
        jnp.any(feasible), jnp.where(feasible, q["reward"], -jnp.inf), -q["safety"]
    )


RULES = {
    "reward": Rule(("reward",), lambda q, cost_weight: q["reward"]),
    "cost": Rule(("cost",), lambda q, cost_weight: -q["cost"]),
    "safety": Rule(("safety",), lambda q, cost_weight: -q["safety"]),
    "feasible": Rule(("reward", "safety"), _feasible),
    "reward_cost": Rule(
        ("reward", "cost"), lambda q, cost_weight: q["reward"] - cost_weight * q["cost"]
    ),
}


def judge(
    critics: Critics, obs: Float[Array, " S"], actions: Float[Array, "N A"]
) -> dict[str, Float[Array, " N"]]:
    """Q of each candidate by the kind of critic, of the more pessimistic twin.

    Args:
      critics: twins by kind.
      obs: one normalised observation.
      actions: the candidates.
    """
    return {
        kind: PESSIMISM[kind](jax.vmap(twin_q, (None, None, 0))(twins, obs, actions), 1)
        for kind, twins in critics.items()
    }
