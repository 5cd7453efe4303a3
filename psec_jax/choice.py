"""Rules by which critics choose among candidate actions of one state."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psec_jax.networks.critics import PESSIMISM, twin_q
from psec_jax.types import Params

# The twins of each kind, leaves [2, ...], or one Q for each of W weights, [W, 1, ...].
Critics = Mapping[str, Params]
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
    critics: Critics,
    obs: Float[Array, " S"],
    actions: Float[Array, "N A"],
    own: bool = False,
) -> dict[str, Float[Array, " N"]]:
    """Q of each candidate by the kind of critic, of the more pessimistic twin.

    Args:
      critics: by kind.
      obs: one normalised observation.
      actions: the candidates.
      own: each of W weights has a Q of its own, which judges its N / W candidates.
    """

    def values(kind: str, twins: Params, actions: Array) -> Array:
        both = jax.vmap(twin_q, (None, None, 0))(twins, obs, actions)
        return PESSIMISM[kind](both, 1)

    def values_of_groups(kind: str, twins: Params) -> Array:
        count = jax.tree.leaves(twins)[0].shape[0]
        groups = actions.reshape(count, -1, actions.shape[-1])
        return jax.vmap(partial(values, kind))(twins, groups).ravel()

    return {
        kind: values_of_groups(kind, twins) if own else values(kind, twins, actions)
        for kind, twins in critics.items()
    }
