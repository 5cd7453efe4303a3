"""What policies will earn and cost, estimated from logged data alone.

No simulator is used: candidates are compared, and the cost weight of a gate is chosen,
by fitted Q evaluation on the transitions of the data (`agents.fitted_q`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from psec_jax.agents import fitted_q
from psec_jax.agents.common import Transitions
from psec_jax.agents.critics import CRITICS
from psec_jax.agents.fitted_q import FittedQConfig, Steps
from psec_jax.choice import RULES, Critics, judge
from psec_jax.composition import (
    PolicyConfig,
    PolicyParams,
    act_noise,
    action_noise,
    candidates,
    sampler,
)
from psec_jax.data import dataset
from psec_jax.data.recording import say
from psec_jax.errors import TrainingError
from psec_jax.types import Dataset, Normaliser, Params
from psec_jax.workflows.config import Job
from psec_jax.workflows.critics import transitions
from psec_jax.workflows.demonstrations import Demos

# P policies in one state: (key, normalised obs) -> actions.
Draw = Callable[[Key[Array, ""], Float[Array, " S"]], Float[Array, "P A"]]

CHUNK = 1024  # states in which the policies act in one call
UPDATES = 500  # updates in one call, after which a signal is heard


class Logged(NamedTuple):
    """What estimates are made from.

    Attributes:
      rows: transitions of the data, drawn at random.
      starts: [M, S], normalised states in which trajectories start.
      steps: of the longest trajectory.
    """

    rows: Transitions
    starts: np.ndarray
    steps: int


def logged(
    config: FittedQConfig,
    rows: Transitions,
    ds: Dataset,
    normaliser: Normaliser,
    seed: int,
) -> Logged:
    """The part of the data that an evaluation reads.

    Args:
      config: how much of it.
      rows: all transitions, as critics read them.
      ds: the same data, whole trajectories.
      normaliser: of observations.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    slices = dataset.episode_slices(ds)
    first = np.array([rows.start for rows in slices])
    first = rng.permutation(first)[: config.starts]
    chosen = rng.permutation(len(rows.obs))[: config.transitions]
    part = jax.tree.map(lambda column: column[np.sort(chosen)], rows)
    starts = np.asarray(normaliser(ds.obs[np.sort(first)]), np.float32)
    return Logged(part, starts, max(rows.stop - rows.start for rows in slices))


def discounted(
    config: FittedQConfig,
    data: Logged,
    draw: Draw,
    kind: str,
    q: Params,
    discount: float,
    key: Key[Array, ""],
) -> np.ndarray:
    """Mean discounted signal [P] of policies from the data's start states.

    Args:
      config: the evaluation's length.
      data: what it reads.
      draw: the policies.
      kind: of the signal, "reward" or "cost".
      q: twins of finished critics of that kind, the first of which is the start.
      discount: gamma.
      key: of actions and batches.

    Raises:
      TrainingError: the evaluation diverged.
    """
    act_key, start_key, train_key = jax.random.split(key, 3)
    actions = _act(draw, act_key, data.rows.next_obs)
    rows = Steps(
        obs=data.rows.obs,
        action=data.rows.action,
        signal=getattr(data.rows, CRITICS[kind].signal),
        next_obs=data.rows.next_obs,
        next_action=actions,
        mask=data.rows.mask,
    )
    rows = jax.device_put(rows)
    first = jax.tree.map(lambda leaf: leaf[0], q)
    state = fitted_q.init(config, first, actions.shape[1])
    while (done := int(state.step)) < config.steps:
        count = min(UPDATES, config.steps - done)
        state = fitted_q.updates(config, discount, count, state, rows, train_key)
    starts = jnp.asarray(data.starts)
    at_start = jnp.asarray(_act(draw, start_key, data.starts))
    said = np.asarray(jnp.mean(fitted_q.values(state.ema, starts, at_start), axis=1))
    if not np.isfinite(said).all():
        raise TrainingError(
            f"fitted Q evaluation of {kind}: the estimates are not finite"
        )
    return said


def _act(draw: Draw, key: Key[Array, ""], obs: np.ndarray) -> np.ndarray:
    """What the policies do in each of N states, [N, P, A]."""
    count = len(obs)
    size = min(CHUNK, count)
    batch = jax.jit(jax.vmap(draw))
    parts = []
    for first in range(0, count, size):
        # The last chunk is as long as the others, so that one program serves them all.
        rows = np.minimum(np.arange(first, first + size), count - 1)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(rows))
        parts.append(np.asarray(batch(keys, obs[rows]))[: count - first])
    return np.concatenate(parts)


def fixed_weights(
    config: PolicyConfig, params: PolicyParams, alphas: Float[Array, "P K"]
) -> Draw:
    """The policies of fixed weights, all on the same noise."""

    def draw(key: Array, obs: Array) -> Array:
        noise = action_noise(config, key)
        return jax.vmap(partial(sampler(config, params, obs), noise))(alphas)

    return draw


def priced(
    config: PolicyConfig, params: PolicyParams, cost_weights: Sequence[float]
) -> Draw:
    """The policies that choose among the same candidates by each cost weight."""
    rule = RULES[config.rule]
    prices = jnp.asarray(cost_weights, jnp.float32)
    critics: Critics = params.critics or {}

    def draw(key: Array, obs: Array) -> Array:
        noise = act_noise(config, params, key)
        _, actions = candidates(config, params, noise, obs)
        values = judge(critics, obs, actions)
        best = jax.vmap(lambda price: jnp.argmax(rule.score(values, price)))(prices)
        return actions[best]

    return draw


def budget(limit: float, steps: int, discount: float) -> float:
    """The discounted cost that a limit on whole episodes stands for.

    The same cost in each of T steps, limit / T, discounted over them.
    """
    return limit / steps * (1 - discount**steps) / (1 - discount)


class Chosen(NamedTuple):
    """A cost weight and why it was chosen.

    Attributes:
      cost_weight: lambda.
      card: what the gate's card says of it.
    """

    cost_weight: float
    card: dict[str, Any]


def smallest_within(
    cost_weights: Sequence[float], costs: Sequence[float], allowed: float
) -> Chosen:
    """The smallest cost weight whose estimated cost is within the budget.

    Where none is, the one of the least estimate; the card says so.
    """
    pairs = sorted(zip(cost_weights, map(float, costs), strict=True))
    within = [weight for weight, cost in pairs if cost <= allowed]
    chosen = within[0] if within else min(pairs, key=lambda pair: pair[1])[0]
    return Chosen(
        chosen,
        {
            "cost_weight": chosen,
            "within_budget": bool(within),
            "cost_budget": allowed,
            "estimated_costs": [list(pair) for pair in pairs],
        },
    )


def choose_cost_weight(
    job: Job,
    config: PolicyConfig,
    params: PolicyParams,
    demos: Demos,
    key: Key[Array, ""],
) -> Chosen:
    """The cost weight of a policy whose critics choose by "reward_cost".

    Args:
      job: `gate.cost_weights` are tried; one alone is taken as it is. The budget is
        that of `cost_limit`.
      config: the policy's.
      params: with critics of reward and cost.
      demos: the data that estimates are made from.
      key: of actions and batches.
    """
    weights = job.gate.cost_weights
    if len(weights) == 1:
        return Chosen(weights[0], {"cost_weight": weights[0]})
    draw = priced(config, params, weights)
    costs, allowed = _estimates(job, params, demos, draw, key)
    chosen = smallest_within(weights, costs.tolist(), allowed)
    if not chosen.card["within_budget"]:
        say(
            "gate.cost_weights: none keeps the estimated discounted cost within "
            f"{allowed:.3g}; {chosen.cost_weight:g} is nearest"
        )
    return chosen


def choose_fixed(
    job: Job,
    config: PolicyConfig,
    params: PolicyParams,
    alphas: Sequence[Sequence[float]],
    demos: Demos,
    key: Key[Array, ""],
) -> dict[str, Any]:
    """Of fixed weights those of most estimated reward within the budget of cost.

    Returns:
      "alpha", the weights chosen, "within_budget", "cost_budget", and "estimates" of
      all; where none is within the budget, those of least estimated cost.
    """
    draw = fixed_weights(config, params, jnp.asarray(alphas, jnp.float32))
    cost_key, reward_key = jax.random.split(key)
    costs, allowed = _estimates(job, params, demos, draw, cost_key)
    rewards, _ = _estimates(job, params, demos, draw, reward_key, "reward")
    within = costs <= allowed
    ranks = np.where(within, rewards, -np.inf) if within.any() else -costs
    best = int(np.argmax(ranks))
    return {
        "alpha": list(alphas[best]),
        "within_budget": bool(within[best]),
        "cost_budget": allowed,
        "estimates": [
            {"alpha": list(alpha), "cost": float(c), "reward": float(r)}
            for alpha, c, r in zip(alphas, costs, rewards, strict=True)
        ],
    }


def _estimates(
    job: Job,
    params: PolicyParams,
    demos: Demos,
    draw: Draw,
    key: Key[Array, ""],
    kind: str = "cost",
) -> tuple[np.ndarray, float]:
    """Estimates [P] of a signal, and the budget of the cost limit."""
    normaliser, discount = params.normaliser, job.critics.discount
    rows = transitions(job.critics, demos, normaliser, (kind,))
    data = logged(job.fitted_q, rows, demos.dataset, normaliser, 0)
    assert params.critics is not None
    twins = params.critics[kind]
    said = discounted(job.fitted_q, data, draw, kind, twins, discount, key)
    return said, budget(job.cost_limit, data.steps, discount)
