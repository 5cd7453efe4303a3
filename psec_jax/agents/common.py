"""What the agents share: batches, noise, optimiser, averaged weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, Real

from psec_jax import process
from psec_jax.data import dataset
from psec_jax.errors import InputError
from psec_jax.process import ProcessConfig
from psec_jax.types import Dataset, Normaliser, Params, TrainState

Metrics = dict[str, Array]
Rows = Any  # NumPy arrays on the host, until training puts them on a device


class Demonstrations(NamedTuple):
    """What is cloned: a dataset of N rows, or a batch of B of them.

    Attributes:
      obs: [N, S], normalised.
      action: [N, A], or [N, H * A] with chunks of H actions.
    """

    obs: Float[Rows, "N S"]
    action: Float[Rows, "N A"]


class Transitions(NamedTuple):
    """What critics learn from: a dataset of N rows, or a batch of B of them.

    Attributes:
      obs: [N, S], normalised.
      action: [N, A].
      reward: [N], scaled.
      cost: [N], 0 or more.
      h: [N], above 0 where the constraint is violated; see `make_transitions`.
      next_obs: [N, S], normalised.
      mask: [N], 0 where nothing is bootstrapped.
    """

    obs: Float[Rows, "N S"]
    action: Float[Rows, "N A"]
    reward: Float[Rows, " N"]
    cost: Float[Rows, " N"]
    h: Float[Rows, " N"]
    next_obs: Float[Rows, "N S"]
    mask: Float[Rows, " N"]


class Noise(NamedTuple):
    """The random numbers of one step.

    Attributes:
      t: [*B] times of the process.
      eps: [*B, A].
      dropout: [*B] keys.
      sample: [*B] keys of the sampler, for objectives that read the sampled action.
    """

    t: Real[Array, "*B"]
    eps: Float[Array, "*B A"]
    dropout: Key[Array, "*B"]
    sample: Key[Array, "*B"]


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch of nothing.

    Raises:
      InputError: below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, expected 1 or more")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with cosine decay and an exponential moving average.

    Attributes:
      learning_rate: at the start.
      decay_steps: of the cosine to zero; 0 keeps the rate constant.
      weight_decay: decoupled, on all trained parameters; 0 is plain Adam.
      ema: rate of the moving average; 1 makes it the parameters themselves.
    """

    learning_rate: float = 3e-4
    decay_steps: int = 0
    weight_decay: float = 1e-4
    ema: float = 1e-3

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(
                f"learning_rate: got {self.learning_rate}, expected above 0"
            )
        if not 0 < self.ema <= 1:
            raise InputError(f"ema: got {self.ema}, expected 0 < rate <= 1")
        for field in ("decay_steps", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 0 or more"
                )


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """The optimiser of one training."""
    rate: float | optax.Schedule = config.learning_rate
    if config.decay_steps:
        rate = optax.cosine_decay_schedule(config.learning_rate, config.decay_steps)
    return optax.adamw(rate, weight_decay=config.weight_decay)


@partial(jax.jit, static_argnums=0)
def init_state(config: OptimiserConfig, params: Params) -> TrainState:
    """Step 0; the average starts as a copy, so that both may be donated.

    Weak types, which would compile the step a second time, are dropped.
    """
    params = jax.tree.map(lambda x: jnp.array(x, x.dtype), params)
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimiser(config).init(params),
        step=jnp.zeros((), jnp.int32),
    )


def descend(
    config: OptimiserConfig,
    state: TrainState,
    loss_fn: Callable[[Params], tuple[Array, Metrics]],
) -> tuple[TrainState, Metrics]:
    """One optimiser step on `loss_fn(params) -> (loss, metrics)`."""
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = make_optimiser(config).update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, config.ema)
    # Without the barrier XLA writes the squares to memory, for the second moments too.
    metrics["grad/norm"] = optax.tree.norm(jax.lax.optimization_barrier(grads))
    return TrainState(params, ema, opt_state, state.step + 1), metrics


def batch_noise(
    config: ProcessConfig, key: Key[Array, ""], batch_size: int, action_dim: int
) -> Noise:
    """Time, noise and keys of every example of a batch."""

    def one(key: Array) -> Noise:
        dropout_key, noise_key = jax.random.split(key)
        t, eps = process.draw(config, noise_key, action_dim)
        return Noise(t, eps, dropout_key, jax.random.fold_in(key, 2))

    return jax.vmap(one)(jax.random.split(key, batch_size))


def reward_scale(ds: Dataset) -> float:
    """Longest episode / (highest return - lowest return): the factor of rewards.

    Raises:
      InputError: all returns are the same.
    """
    returns = dataset.episode_returns(ds)
    spread = float(returns.max() - returns.min())
    if spread == 0:
        raise InputError(
            f"every trajectory has return {returns[0]:g}: rewards cannot be scaled by "
            "their spread"
        )
    longest = max(rows.stop - rows.start for rows in dataset.episode_slices(ds))
    return longest / spread


def make_transitions(
    ds: Dataset,
    normaliser: Normaliser,
    *,
    scale: float = 1.0,
    violation: float = 25.0,
    bootstrap_timeouts: bool = True,
    costs: bool = True,
    source: str = "the dataset",
) -> Transitions:
    """The transitions of a dataset, as critics read them.

    Args:
      ds: whole trajectories.
      normaliser: of observations.
      scale: of rewards; see `reward_scale`.
      violation: h where the cost is above 0; elsewhere h is -1.
      bootstrap_timeouts: a cut episode went on unseen; False ends it there, as the
        authors' code does.
      costs: whether a critic learns from costs; see `critics.reads_costs`.
      source: named in messages.

    Raises:
      InputError: a negative cost, or no cost at all where a critic learns from costs.
    """
    dataset.check_costs(ds, source)
    if costs and not np.any(ds.cost):
        raise InputError(
            f"{source}: no transition has a cost above 0, critics of safety and cost "
            "have nothing to learn from; critics.kinds=('reward',) leaves them out"
        )
    ended = ds.terminal if bootstrap_timeouts else ds.terminal | ds.timeout
    columns = (
        normaliser(ds.obs),
        ds.action,
        scale * ds.reward,
        ds.cost,
        np.where(ds.cost > 0, violation, -1.0),
        normaliser(ds.next_obs),
        ~ended,
    )
    return Transitions(*(np.asarray(column, np.float32) for column in columns))
