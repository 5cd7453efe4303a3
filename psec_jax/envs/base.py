"""What every environment offers."""

import importlib.util
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from psec_jax.errors import InputError


class Step(NamedTuple):
    """One environment step, or B of them stacked.

    Attributes:
      obs: float32 [S].
      reward: float.
      cost: float, 0 where the environment has none.
      terminal: bool, the task itself ended (no bootstrap).
      timeout: bool, the episode was cut at its time limit.
    """

    obs: np.ndarray
    reward: float
    cost: float
    terminal: bool
    timeout: bool


@runtime_checkable  # the tests check annotations while they run
class Env(Protocol):
    """One environment.

    Attributes:
      spec: the name it was made by, in the form of `psec_jax.envs.shifted`.
      obs_dim: S.
      action_dim: A.
      max_steps: steps after which an episode is cut.
      step_seconds: simulated time of one control step.
    """

    spec: str
    obs_dim: int
    action_dim: int
    max_steps: int
    step_seconds: float

    def reset(self, seed: int) -> np.ndarray:
        """Start the episode of `seed`, the same one however often the environment has
        been used before; float32 [S]."""

    def step(self, action: np.ndarray) -> Step:
        """Apply an action [A] in [-1, 1] for one control step."""

    def render(self, height: int, width: int) -> np.ndarray:
        """The present state as an image, uint8 [height, width, 3].

        Raises:
          CannotDraw: no OpenGL library works here.
        """

    def close(self) -> None:
        """Free the simulator."""


class ActionBox:
    """Maps [-1, 1] onto the action bounds of an environment, and the identity exactly
    onto itself."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        """Take the bounds, [A] each."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.centre, self.half = (high + low) / 2, (high - low) / 2

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Rescale actions [..., A]; float64."""
        return self.centre + self.half * np.asarray(action, np.float64)


def check_safe_setup(spec: str, packages: tuple[str, ...]) -> None:
    """Check that a safe simulator is there, without importing it.

    Args:
      spec: the environment that was asked for.
      packages: what it imports, by import name.

    Raises:
      InputError: a package is missing; the message names the command that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{spec}: {package} is not installed; run: make setup-safe"
            )
