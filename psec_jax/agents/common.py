"""What the agents share: data, drawing of batches, optimiser, averaged weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Real

from psec_jax.data import dataset
from psec_jax.errors import InputError
from psec_jax.process import ProcessConfig
from psec_jax.process import draw as draw_noise
from psec_jax.runtime import sharding
from psec_jax.types import Dataset, Normaliser, Params, TrainState

Metrics = dict[str, Array]
Rows = Array | np.ndarray  # on the host, until training puts them on a device
# The `count` of data whose rows are one batch already: a pytree without leaves, so that
# compiled updates tell it from a number.
DRAWN = ()
_NO_ROWS = ("frozen", "count")


class TrainData(NamedTuple):
    """Demonstrations, and what stays frozen while training.

    Attributes:
      obs: [N, S], normalised.
      action: [N, A].
      frozen: parameters the update reads and never changes.
      count: rows to draw from, the others being padding; None is all of them, `DRAWN`
        says that the rows are the batch.
    """

    obs: Float[Rows, "N S"]
    action: Float[Rows, "N A"]
    frozen: Any = None
    count: Int[Array, ""] | tuple[()] | None = None


class Transitions(NamedTuple):
    """Transitions, for critics.

    Attributes:
      obs: [*B, S], normalised.
      action: [*B, A].
      reward: [*B], scaled.
      h: [*B], above 0 where the constraint is violated; see `make_transitions`.
      next_obs: [*B, S], normalised.
      mask: [*B], 0 where nothing is bootstrapped.
      count: as of `TrainData`.
    """

    obs: Float[Rows, "*B S"]
    action: Float[Rows, "*B A"]
    reward: Float[Rows, "*B"]
    h: Float[Rows, "*B"]
    next_obs: Float[Rows, "*B S"]
    mask: Float[Rows, "*B"]
    count: Int[Array, ""] | tuple[()] | None = None


class Noise(NamedTuple):
    """The random numbers of one step on the diffusion loss.

    Attributes:
      t: [*B] times of the process.
      eps: [*B, A].
      dropout: [*B] keys.
    """

    t: Real[Array, "*B"]
    eps: Float[Array, "*B A"]
    dropout: Key[Array, "*B"]


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
        if self.learning_rate <= 0:
            raise InputError(
                f"optimiser.learning_rate: got {self.learning_rate}, expected above 0"
            )
        if not 0 < self.ema <= 1:
            raise InputError(f"optimiser.ema: got {self.ema}, expected 0 < rate <= 1")
        for field in ("decay_steps", "weight_decay"):
            if getattr(self, field) < 0:
                raise InputError(
                    f"optimiser.{field}: got {getattr(self, field)}, expected 0 or more"
                )


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """The optimiser of one stage."""
    rate = config.learning_rate
    if config.decay_steps:
        rate = optax.cosine_decay_schedule(rate, config.decay_steps)
    return optax.adamw(rate, weight_decay=config.weight_decay)


def init_state(config: OptimiserConfig, params: Params) -> TrainState:
    """Step 0; the average starts as a copy, so that both may be donated."""
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
    metrics["grad/norm"] = optax.tree.norm(grads)
    return TrainState(params, ema, opt_state, state.step + 1), metrics


def rows_of(data: TrainData | Transitions) -> dict[str, Rows]:
    """The arrays with a row for each transition, by name."""
    return {k: x for k, x in data._asdict().items() if k not in _NO_ROWS}


def pad_rows(data: TrainData | Transitions, length: int) -> TrainData | Transitions:
    """The same data with rows of zeros behind, which are never drawn."""

    def padded(rows: Rows) -> np.ndarray:
        return np.pad(rows, [(0, length - len(rows))] + [(0, 0)] * (rows.ndim - 1))

    rows = {name: padded(x) for name, x in rows_of(data).items()}
    return data._replace(count=jnp.asarray(len(data.obs), jnp.int32), **rows)


def row_count(data: TrainData | Transitions) -> int | Int[Array, ""]:
    """How many rows batches are drawn from."""
    if data.count is None or isinstance(data.count, tuple):
        return data.obs.shape[0]
    return data.count


def draw_index(
    key: Key[Array, ""], batch_size: int, count: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """Rows of a batch, uniformly with replacement.

    Raises:
      InputError: a batch below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, expected 1 or more")
    return jax.random.randint(key, (batch_size,), 0, count)


def draw(
    index: Int[Array, " B"], data: TrainData | Transitions
) -> TrainData | Transitions:
    """The batch of these rows, without `frozen`; `DRAWN` data are one already."""
    rows = rows_of(data)
    if not isinstance(data.count, tuple):
        rows = {name: x[index] for name, x in rows.items()}
    return type(data)(**sharding.rows(rows))


def batch_noise(
    process: ProcessConfig, key: Key[Array, ""], batch_size: int, action_dim: int
) -> Noise:
    """Step, noise and dropout key of every example of a batch."""

    def one(key: Array) -> Noise:
        dropout_key, noise_key = jax.random.split(key)
        t, eps = draw_noise(process, noise_key, action_dim)
        return Noise(t, eps, dropout_key)

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
    safety: bool = True,
    source: str = "the dataset",
) -> Transitions:
    """A dataset as critics read it.

    Args:
      ds: whole trajectories.
      normaliser: of observations.
      scale: of rewards; see `reward_scale`.
      violation: h where the cost is above 0; elsewhere h is -1.
      bootstrap_timeouts: a cut episode went on unseen; False ends it there, as the
        authors' code does.
      safety: whether costs will be learned from.
      source: named in messages.

    Raises:
      InputError: a negative cost, or no cost at all where safety is to be learned.
    """
    dataset.check_costs(ds, source)
    if safety and not np.any(ds.cost):
        raise InputError(
            f"{source}: no transition has a cost above 0, a critic of safety has "
            "nothing to learn from; critics.safety=False leaves it out"
        )
    ended = ds.terminal if bootstrap_timeouts else ds.terminal | ds.timeout
    columns = (
        normaliser(ds.obs),
        ds.action,
        scale * ds.reward,
        np.where(ds.cost > 0, violation, -1.0),
        normaliser(ds.next_obs),
        ~ended,
    )
    return Transitions(*(np.asarray(column, np.float32) for column in columns))
