"""What policies will earn and cost, estimated from logged data alone.

No simulator is used: fixed weights get their values, and the cost weight of a gate is
chosen, by fitted Q evaluation on the transitions of the data (`agents.fitted_q`).
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
    judges_own,
    sampler,
)
from psec_jax.data import dataset
from psec_jax.data.recording import say
from psec_jax.errors import TrainingError
from psec_jax.runtime import loop
from psec_jax.runtime.batches import Data, Drawn
from psec_jax.runtime.console import Progress
from psec_jax.runtime.loop import LoopConfig
from psec_jax.runtime.runs import Training
from psec_jax.types import Dataset, Normaliser, Params
from psec_jax.workflows.config import Job
from psec_jax.workflows.critics import transitions
from psec_jax.workflows.demonstrations import Demos

# P policies in one state: (key, normalised obs) -> actions.
Draw = Callable[[Key[Array, ""], Float[Array, " S"]], Float[Array, "P A"]]

CHUNK = 1024  # states in which the policies act in one call


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


class Evaluated(NamedTuple):
    """What P policies will earn or cost.

    Attributes:
      means: [P], the discounted signal from the data's start states.
      q: Q of each policy, leaves [P, ...].
    """

    means: np.ndarray
    q: Params


def discounted(
    config: FittedQConfig,
    data: Logged,
    draw: Draw,
    kind: str,
    q: Params,
    discount: float,
    key: Key[Array, ""],
) -> Evaluated:
    """The discounted signal of policies, by fitted Q evaluation.

    Args:
      config: the evaluation's length.
      data: what it reads.
      draw: the policies.
      kind: of the signal, "reward" or "cost".
      q: twins of finished critics of that kind, the first of which is the start.
      discount: gamma.
      key: of actions and batches.

    Raises:
      TrainingError: a loss or an estimate is not finite.
      Stopped: by a signal; nothing of an evaluation is kept.
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
    summed = fitted_q.sum_of(np.asarray(rows.signal), discount)
    first = jax.tree.map(lambda leaf: leaf[0], q)
    training = Training(
        fitted_q.init(config, first, actions.shape[1]), Data(rows, summed), train_key
    )
    [(state, _)] = loop.train(
        Drawn(fitted_q.update, config, config.batch_size),
        [training],
        steps=config.steps,
        config=LoopConfig(),
        stage=f"{kind} by fitted Q",
    )
    starts = jnp.asarray(data.starts)
    at_start = jnp.asarray(_act(draw, start_key, data.starts))
    said = fitted_q.values(state.ema, starts, at_start)
    said = jnp.clip(said, summed.low, summed.high)
    means = np.asarray(jnp.mean(said, axis=1))
    if not np.isfinite(means).all():  # by the last update, whose loss none follows
        raise TrainingError(f"{kind} by fitted Q: the estimates are not finite")
    return Evaluated(means, state.ema)


def _act(draw: Draw, key: Key[Array, ""], obs: np.ndarray) -> np.ndarray:
    """What the policies do in each of N states, [N, P, A]."""
    count = len(obs)
    size = min(CHUNK, count)
    batch = jax.jit(jax.vmap(draw))
    parts, progress = [], Progress("state", count)
    for first in range(0, count, size):
        # The last chunk is as long as the others, so that one program serves them all.
        rows = np.minimum(np.arange(first, first + size), count - 1)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(rows))
        parts.append(np.asarray(batch(keys, obs[rows]))[: count - first])
        progress(min(first + size, count))
    progress.end()
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
        values = judge(critics, obs, actions, judges_own(config))
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
    twins: Critics,
    demos: Demos,
    key: Key[Array, ""],
) -> Chosen:
    """The cost weight of a policy whose critics choose.

    Args:
      job: `gate.cost_weights` are tried; one alone is taken as it is. The budget is
        `gate.budget_share` of that of `cost_limit`.
      config: the policy's.
      params: with the critics that choose.
      twins: finished critics, from which the evaluation starts.
      demos: the data that estimates are made from.
      key: of actions and batches.
    """
    weights = job.gate.cost_weights
    if config.rule != "reward_cost":
        return Chosen(0.0, {})  # no other rule reads one
    if len(weights) == 1:
        return Chosen(weights[0], {"cost_weight": weights[0]})
    draw = priced(config, params, weights)
    costs, allowed = _estimates(job, params.normaliser, twins, demos, draw, key)
    chosen = smallest_within(weights, costs.means.tolist(), allowed)
    if not chosen.card["within_budget"]:
        say(
            "gate.cost_weights: none keeps the estimated discounted cost within "
            f"{allowed:.3g}; {chosen.cost_weight:g} is nearest"
        )
    return chosen


class Fixed(NamedTuple):
    """What fixed weights are worth in every state, and the best of them.

    Attributes:
      card: what results and a gate's card say: "alpha", the weights of most estimated
        reward within the budget of cost, or of the least estimated cost where none is
        within; "within_budget" and "cost_budget" where costs count; "estimates" of all.
      critics: of each of W weights one Q of each kind, leaves [W, 1, ...].
    """

    card: dict[str, Any]
    critics: dict[str, Params]


def value_fixed(
    job: Job,
    config: PolicyConfig,
    params: PolicyParams,
    alphas: Float[Array, "W K"],
    twins: Critics,
    demos: Demos,
    key: Key[Array, ""],
) -> Fixed:
    """The values of fixed weights.

    Args:
      job: its `fitted_q`, `cost_limit`, `gate.budget_share` and discount are read.
      config: of the composed policy.
      params: the policy's.
      alphas: the weights.
      twins: finished critics, from which the evaluation starts; their kinds are
        evaluated.
      demos: the data that values are made from.
      key: of actions and batches.
    """
    draw = fixed_weights(config, params, alphas)
    values, means, allowed = {}, {}, None
    for i, kind in enumerate(sorted(twins)):
        its_key = jax.random.fold_in(key, i)
        values[kind], its_budget = _estimates(
            job, params.normaliser, twins, demos, draw, its_key, kind
        )
        means[kind] = values[kind].means
        allowed = its_budget if kind == "cost" else allowed
    within = np.ones(len(alphas), bool) if allowed is None else means["cost"] <= allowed
    worth = means["reward"] if "reward" in means else -means["cost"]
    ranks = np.where(within, worth, -np.inf)
    best = int(np.argmax(ranks if within.any() else -means["cost"]))
    card: dict[str, Any] = {"alpha": np.asarray(alphas[best]).tolist()}
    if allowed is not None:
        card |= {"within_budget": bool(within[best]), "cost_budget": allowed}
    card["estimates"] = [
        {"alpha": np.asarray(alpha).tolist()}
        | {kind: float(means[kind][i]) for kind in means}
        for i, alpha in enumerate(alphas)
    ]
    return Fixed(
        card,
        {k: jax.tree.map(lambda leaf: leaf[:, None], v.q) for k, v in values.items()},
    )


def _estimates(
    job: Job,
    normaliser: Normaliser,
    twins: Critics,
    demos: Demos,
    draw: Draw,
    key: Key[Array, ""],
    kind: str = "cost",
) -> tuple[Evaluated, float]:
    """Estimates of a signal, and the part of the limit's budget that they may use."""
    discount = job.critics.discount
    rows = transitions(job.critics, demos, normaliser, (kind,))
    data = logged(job.fitted_q, rows, demos.dataset, normaliser, 0)
    q = twins[kind]
    evaluated = discounted(job.fitted_q, data, draw, kind, q, discount, key)
    whole = budget(job.cost_limit, data.steps, discount)
    return evaluated, job.gate.budget_share * whole
