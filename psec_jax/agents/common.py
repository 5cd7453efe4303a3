"""What the three agents share: data on the device, optimiser, averaged weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from psec_jax.errors import InputError
from psec_jax.types import Params, TrainState

Metrics = dict[str, Array]


class TrainData(NamedTuple):
    """Demonstrations on the device, and what stays frozen while training.

    Attributes:
      obs: [N, S], normalised.
      action: [N, A].
      frozen: parameters the update reads and never changes.
    """

    obs: Float[Array, "N S"]
    action: Float[Array, "N A"]
    frozen: Any = None


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


def draw(
    key: Key[Array, ""], data: TrainData, batch_size: int
) -> tuple[Float[Array, "B S"], Float[Array, "B A"]]:
    """A batch of transitions, uniformly with replacement.

    Raises:
      InputError: a batch below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, expected 1 or more")
    index = jax.random.randint(key, (batch_size,), 0, data.obs.shape[0])
    return data.obs[index], data.action[index]
