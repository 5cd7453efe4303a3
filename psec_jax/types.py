"""Array records shared by every room."""

from typing import Any, NamedTuple

import numpy as np

Params = Any  # a pytree of arrays: nested dicts keyed by layer name


class Dataset(NamedTuple):
    """N transitions in episode order, float32 and bool arrays.

    An episode ends where `terminal` or `timeout` is set; the last row always ends one.

    Attributes:
      obs: [N, S].
      action: [N, A], in [-1, 1].
      reward: [N].
      cost: [N], zeros where the source has none.
      next_obs: [N, S].
      terminal: [N] bool, the task itself ended (no bootstrap).
      timeout: [N] bool, the episode was cut.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    cost: np.ndarray
    next_obs: np.ndarray
    terminal: np.ndarray
    timeout: np.ndarray


class Normaliser(NamedTuple):
    """`(obs - mean) / std`, each [S]; saved with the base, applied at deployment."""

    mean: Any
    std: Any

    def __call__(self, obs: Any) -> Any:
        """Normalise observations [..., S]."""
        return (obs - self.mean) / self.std


class TrainState(NamedTuple):
    """Everything a stage's training needs to go on.

    Attributes:
      params: the parameters being trained.
      ema: their exponential moving average, used for sampling.
      opt_state: the optimiser's state.
      step: int32 scalar, updates done.
    """

    params: Params
    ema: Params
    opt_state: Any
    step: Any
