"""Units of actions: a policy's lie in [-1, 1], an environment's in its own box."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from psec_jax.errors import InputError, lookup

UNITS = {
    "auto": "what the file says, else what the environment's box shows",
    "env": "stored in the environment's own units",
    "scaled": "stored in [-1, 1], the box of the environment scaled",
}
SLACK = 1e-5  # float32 rounding of a tanh or of a rescaled box
FEW = 0.03  # of the rows; clipping more of them would change what the data show


@dataclass(frozen=True)
class ActionBox:
    """Bounds of an environment's actions; maps [-1, 1] onto them.

    Attributes:
      low: A numbers.
      high: A numbers.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, low: Any, high: Any) -> "ActionBox":
        """The box of two arrays of A numbers each, of any shape."""
        arrays = (np.asarray(bound, np.float64).ravel() for bound in (low, high))
        return cls(*(tuple(bound.tolist()) for bound in arrays))

    @classmethod
    def unit(cls, size: int) -> "ActionBox":
        """The box [-1, 1] of A actions."""
        return cls((-1.0,) * size, (1.0,) * size)

    @functools.cached_property
    def centre(self) -> np.ndarray:
        """The middle, [A] float64."""
        return (np.asarray(self.high) + np.asarray(self.low)) / 2

    @functools.cached_property
    def half(self) -> np.ndarray:
        """Half the width, [A] float64."""
        return (np.asarray(self.high) - np.asarray(self.low)) / 2

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Scaled actions [..., A] in the environment's units; float64.

        The box [-1, 1] gives them unchanged.
        """
        return self.centre + self.half * np.asarray(action, np.float64)

    def to_scaled(self, action: np.ndarray) -> np.ndarray:
        """Actions [..., A] in the environment's units as scaled ones; float64.

        A number that the box does not let vary becomes 0.
        """
        offset = np.asarray(action, np.float64) - self.centre
        half = self.half
        return np.divide(offset, half, out=np.zeros_like(offset), where=half > 0)

    def outside(self, action: np.ndarray) -> np.ndarray:
        """Which rows of actions [N, A] leave the box, but for rounding, [N] bool."""
        excess = np.abs(np.asarray(action, np.float64) - self.centre) - self.half
        slack = SLACK * np.maximum(self.half, np.abs(self.centre))
        return np.asarray((excess > slack).any(-1))

    def same(self, other: "ActionBox") -> bool:
        """Whether two boxes are equal but for float32 rounding."""
        if len(self.low) != len(other.low):
            return False
        mine, theirs = (np.array([box.low, box.high]) for box in (self, other))
        return bool(np.allclose(mine, theirs, rtol=1e-6, atol=1e-9))

    def __str__(self) -> str:
        sides = [
            f"[{a:.4g}, {b:.4g}]" for a, b in zip(self.low, self.high, strict=True)
        ]
        if len(set(sides)) == 1:
            return sides[0]
        more = f" and {len(sides) - 4} more" if len(sides) > 4 else ""
        return " x ".join(sides[:4]) + more


@dataclass(frozen=True)
class Units:
    """What is known of the units of stored actions before they are read.

    Attributes:
      requested: a key of UNITS.
      stored: "env" or "scaled" where the file says so.
      recorded: the box of the environment that the data were recorded in.
      target: the box that the policy's [-1, 1] stands for; by default `recorded`.
    """

    requested: str = "auto"
    stored: str | None = None
    recorded: ActionBox | None = None
    target: ActionBox | None = None


def share(rows: np.ndarray) -> str:
    """A count of rows in words, "12 of 800 rows (1.5 %)"."""
    count = int(np.count_nonzero(rows))
    return f"{count} of {len(rows)} rows ({100 * count / len(rows):.2g} %)"


def advice(rows: np.ndarray) -> str:
    """What to do about rows outside their box; clipping only where it changes few."""
    if np.mean(rows) <= FEW:
        return "clipping on request (data.clip_actions) would change only these"
    return "clipping would change what the data show"


def scale(
    action: np.ndarray,
    units: Units,
    source: str,
    clip: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """Actions scaled to the target box, [N, A].

    Stored actions stand for physical ones in the units of the environment, and these
    are scaled to the box that the policy's [-1, 1] stands for. Values are not checked
    against [-1, 1] here.

    Args:
      action: [N, A], finite, as stored.
      units: what is known of them.
      source: the file, named in every message.
      clip: whether the caller clips, so that rows outside a box are no contradiction.
      say: called with one line where the values decide, or actions are converted.

    Raises:
      InputError: units that contradict the file or the values, or that nothing shows.
    """
    lookup(UNITS, units.requested, "units of actions")
    stored, recorded = units.stored, units.recorded
    target = units.target or recorded
    for what, box in (("the recorded", recorded), ("the environment's", target)):
        if box is not None and len(box.low) != action.shape[1]:
            raise InputError(
                f"{source}: actions have {action.shape[1]} numbers, {what} box has "
                f"{len(box.low)}"
            )
    if units.requested != "auto":
        if stored not in (None, units.requested):
            raise InputError(
                f"{source}: actions={units.requested} contradicts the file, which says "
                f"that its actions are {stored}"
            )
        stored = units.requested
    elif stored is None:
        stored = _guess(action, recorded or target, source, say)
    if stored == "env":
        box = recorded or target
        if box is None:
            raise InputError(
                f"{source}: actions in the environment's units need its box; name the "
                "environment, or write the attributes action_low and action_high"
            )
        _refuse_outside(action, box, source, clip)
        if recorded and target and not recorded.same(target):
            say(
                f"{source}: recorded with the action box {recorded}, the environment's "
                f"is {target}: actions are scaled to the second"
            )
            _refuse_outside(action, target, source, clip)
        return (target or box).to_scaled(action)
    if recorded is None or target is None or recorded.same(target):
        return action
    physical = recorded.to_env(action)
    say(
        f"{source}: recorded with the action box {recorded}, the environment's is "
        f"{target}: actions are scaled to the second"
    )
    _refuse_outside(physical, target, source, clip)
    return target.to_scaled(physical)


def _guess(
    action: np.ndarray,
    box: ActionBox | None,
    source: str,
    say: Callable[[str], None],
) -> str:
    """The units that the values show, "env" or "scaled".

    Raises:
      InputError: both are possible, or neither.
    """
    beyond = np.asarray((np.abs(action) > 1 + SLACK).any(-1))
    if box is None or box.same(ActionBox.unit(len(box.low))):
        return "scaled"  # what is outside [-1, 1] is refused with the other checks
    outside = box.outside(action)
    say_which = "say which units they have: --actions=env or --actions=scaled"
    if not beyond.any() and not outside.any():
        raise InputError(
            f"{source}: actions fit both [-1, 1] and the environment's box {box}; "
            f"{say_which}"
        )
    if beyond.any() and outside.any():
        raise InputError(
            f"{source}: {share(beyond)} have actions outside [-1, 1] and "
            f"{share(outside)} outside the environment's box {box}; {say_which}"
        )
    if beyond.any():
        say(f"{source}: actions are in the environment's units: {box} becomes [-1, 1]")
        return "env"
    say(
        f"{source}: actions are scaled already: all in [-1, 1], {share(outside)} "
        f"outside the environment's box {box}"
    )
    return "scaled"


def _refuse_outside(
    action: np.ndarray, box: ActionBox, source: str, clip: bool
) -> None:
    outside = box.outside(action)
    unit = box.same(ActionBox.unit(len(box.low)))  # refused with the other checks
    if outside.any() and not clip and not unit:
        raise InputError(
            f"{source}: {share(outside)} have actions outside the environment's box "
            f"{box} (largest magnitude {np.abs(action).max():.4g}); {advice(outside)}"
        )
