"""What every environment offers."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import Recording
from psec_jax.errors import InputError


class Step(NamedTuple):
    """One environment step, or B of them stacked.

    Attributes:
      obs: float32 [S].
      reward: float; an array [B] where steps are stacked, as for those that follow.
      cost: float, 0 where the environment has none.
      terminal: bool, the task itself ended (no bootstrap).
      timeout: bool, the episode was cut at its time limit.
      success: 1 where the task's goal is reached, 0 where not, nan where the
        environment does not say.
    """

    obs: np.ndarray
    reward: Any
    cost: Any
    terminal: Any
    timeout: Any
    success: Any = math.nan


@runtime_checkable  # the tests check annotations while they run
class Env(Protocol):
    """One environment.

    Attributes:
      spec: the name it was made by, in the form of `psec_jax.envs.shifted`.
      obs_dim: S.
      action_dim: A.
      max_steps: steps after which an episode is cut.
      step_seconds: simulated time of one control step.
      box: what actions in [-1, 1] stand for in the simulator.
      observation: the parts of an observation in their order, "name:size" each; empty
        where it has one part, or where data know no parts.
    """

    spec: str
    obs_dim: int
    action_dim: int
    max_steps: int
    step_seconds: float
    box: ActionBox
    observation: tuple[str, ...]

    def reset(self, seed: int) -> np.ndarray:
        """Start the episode of `seed`, the same one however often the environment has
        been used before; float32 [S]."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Apply an action [A] in [-1, 1] for one control step."""
        ...

    def render(self, height: int, width: int) -> np.ndarray:
        """The present state as an image, uint8 [height, width, 3].

        Raises:
          CannotDraw: no OpenGL library works here.
        """
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


class Simulator(NamedTuple):
    """One entry of `envs.ENVS`.

    Attributes:
      make: `(name, shift, keywords) -> Env`, of the name behind the prefix, factors by
        quantity and keyword arguments; the latter two are empty where the simulator has
        none.
      form: how names behind the prefix look, for help texts.
      shifts: whether its physics may be shifted, see `envs.shifts`.
      keywords: whether it takes keyword arguments, see `data.keywords`.
      alone: whether a process can hold one environment only.
      recording: `name -> Recording` without the simulator; None: one is made.
      on_device: whether whole roll-outs run on the device, see `envs.mjx`.
    """

    make: Callable[[str, Mapping[str, float], Mapping[str, Any]], Any]
    form: str
    shifts: bool = False
    keywords: bool = False
    alone: bool = False
    recording: Callable[[str], Recording] | None = None
    on_device: bool = False


def recorded_in(env: Env) -> Recording:
    """How data collected in an environment are recorded."""
    return Recording(
        environment=env.spec,
        sizes=(env.obs_dim, env.action_dim),
        units="scaled",
        box=env.box,
        max_steps=env.max_steps,
        observation=env.observation,
    )


def number(value: Any, what: str, spec: str) -> float:
    """A reward or cost of one step as a number, also from an array of one element.

    Raises:
      InputError: no number, several, or one that is not finite.
    """
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise InputError(f"{spec}: {what} is {value!r}, expected one number")
    if not math.isfinite(result := float(array.item())):
        raise InputError(f"{spec}: {what} is {result}, expected a finite number")
    return result


def check_setup(spec: str, packages: tuple[str, ...], target: str) -> None:
    """Check that a simulator is there, without importing it.

    Args:
      spec: the environment's name.
      packages: what it imports, by import name.
      target: of make, which installs it.

    Raises:
      InputError: a package is missing; the message names the command that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{spec}: {package} is not installed; run: make {target}")
