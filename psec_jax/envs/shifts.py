"""Simulators with shifted physics: numbers of a MuJoCo model, multiplied.

A shift is the tail of an environment's name, its quantities in the order of their
names: "gymnasium:HalfCheetah-v5@friction:0.25,gravity:2". The numbers are those of the
model's XML text, which is read, changed in memory and compiled again, so that all that
MuJoCo derives from them follows (masses from sizes, for one). No file is written.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from psec_jax.data import keywords
from psec_jax.errors import InputError, lookup

MARK = "@"
FORM = "QUANTITY:FACTOR, such as friction:0.25, several of them separated by commas"
# In the paper's simulators the legs of these were given by their ends, and a size was a
# radius. Gymnasium gives the same legs by radius and half length; the second stays.
RADIUS_ONLY = ("hopper", "walker2d")

Numbers = tuple[Any, str, int | None]
"""An element of a model, an attribute, and how many of its numbers (None: all)."""


def split(spec: str, *texts: str) -> tuple[str, dict[str, float]]:
    """The environment's name without its shift, and the shift's factors sorted by
    quantity.

    Args:
      spec: an environment's name, which may have keyword arguments, brought into their
        canonical form, and a shift already.
      texts: more of them, such as "friction:0.25,gravity:2".

    Raises:
      InputError: an unknown quantity, one that is named twice, a factor that is not a
        finite number above 0, or malformed keyword arguments.
    """
    plain, mark, tail = spec.partition(MARK)
    shift: dict[str, float] = {}
    for text in (tail, *texts) if mark else texts:
        for part in text.split(","):
            name, colon, number = (piece.strip() for piece in part.partition(":"))
            if not colon:
                raise InputError(f"shift of {spec}: got {part!r}, expected {FORM}")
            lookup(QUANTITIES, name, "shift")
            if name in shift:
                raise InputError(f"shift of {spec}: {name} is there twice")
            shift[name] = _factor(number)
            if not 0 < shift[name] < math.inf:
                raise InputError(
                    f"shift of {spec}: {name} is {number!r}, expected a finite number "
                    "above 0"
                )
    return keywords.canonical(plain), dict(sorted(shift.items()))


def _factor(text: str) -> float:
    """The number with the digits that the environment's name has; NaN for none."""
    try:
        return float(f"{float(text):g}")
    except ValueError:
        return math.nan


def join(plain: str, shift: Mapping[str, float]) -> str:
    """The name of a shifted environment; the inverse of `split`."""
    tail = ",".join(f"{name}:{factor:g}" for name, factor in shift.items())
    return f"{plain}{MARK}{tail}" if tail else plain


def shifted(spec: str, *texts: str) -> str:
    """The one name of an environment with more shifts, factors in six digits.

    Args:
      spec: see `split`, as for the others.
      texts: more shifts.

    Raises:
      InputError: see `split`.
    """
    return join(*split(spec, *texts))


def compile_shifted(model: Any, shift: Mapping[str, float], spec: str) -> Any:
    """Multiply numbers of a model and compile it.

    Args:
      model: mujoco.MjSpec as read from the plain XML; it is changed.
      shift: factors by quantity.
      spec: the environment's name, for messages.

    Returns:
      mujoco.MjModel.

    Raises:
      InputError: a quantity of which the model has no number other than 0 (the message
        lists those it has), or numbers that MuJoCo refuses.
    """
    there = {name: list(find(model)) for name, find in QUANTITIES.items()}
    there = {name: found for name, found in there.items() if any(map(_counts, found))}
    for name, factor in shift.items():
        if name not in there:
            raise InputError(
                f"{spec}: this model has no {name}; it has {', '.join(there)}"
            )
        for numbers in there[name]:
            _multiply(numbers, factor)
    try:
        with warnings.catch_warnings():
            # The XML of HalfCheetah has it, and it is not ours to change.
            warnings.filterwarnings("ignore", "compiler attribute 'settotalmass'")
            return model.compile()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{spec}: the model cannot be compiled: {reason}") from error


def _counts(numbers: Numbers) -> bool:
    """Whether any is other than 0; what the XML leaves out is not a number."""
    element, attribute, count = numbers
    return bool(np.any(np.abs(np.atleast_1d(getattr(element, attribute))[:count]) > 0))


def _multiply(numbers: Numbers, factor: float) -> None:
    element, attribute, count = numbers
    value = getattr(element, attribute)
    if np.ndim(value):
        value[:count] *= factor
    else:
        setattr(element, attribute, value * factor)


def _actuator_strength(model: Any) -> Iterable[Numbers]:
    """Gains, biases and limits, in which the force is linear: not so for muscles and
    the like, and where a ratio (a third bias above 0) stands for the damping."""
    mujoco: Any = importlib.import_module("mujoco")
    gains = (mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtGain.mjGAIN_AFFINE)
    biases = (mujoco.mjtBias.mjBIAS_NONE, mujoco.mjtBias.mjBIAS_AFFINE)
    for actuator in model.actuators:
        linear = actuator.gaintype in gains and actuator.biastype in biases
        if not linear or actuator.biasprm[2] > 0:
            return
    for actuator in model.actuators:
        for name in ("gainprm", "biasprm", "forcerange"):
            yield actuator, name, None
    for limited in (*model.joints, *model.tendons):
        yield limited, "actfrcrange", None


def _body_mass(model: Any) -> Iterable[Numbers]:
    """Masses and, with them, inertias: shapes stay."""
    for name in ("settotalmass", "boundmass", "boundinertia"):
        if getattr(model.compiler, name) > 0:
            yield model.compiler, name, None
    for geom in model.geoms:
        yield geom, "mass", None
        yield geom, "density", None
    for body in model.bodies:
        for name in ("mass", "inertia", "fullinertia"):
            yield body, name, None


def _friction(model: Any) -> Iterable[Numbers]:
    return [(rough, "friction", None) for rough in (*model.geoms, *model.pairs)]


def _gravity(model: Any) -> Iterable[Numbers]:
    return [(model.option, "gravity", None)]


def _joint_damping(model: Any) -> Iterable[Numbers]:
    return [(joint, "damping", None) for joint in model.joints]


def _thigh_size(model: Any) -> Iterable[Numbers]:
    count = 1 if model.modelname in RADIUS_ONLY else None
    return [(geom, "size", count) for geom in model.geoms if "thigh" in geom.name]


QUANTITIES: dict[str, Callable[[Any], Iterable[Numbers]]] = {
    "actuator_strength": _actuator_strength,
    "body_mass": _body_mass,
    "friction": _friction,
    "gravity": _gravity,
    "joint_damping": _joint_damping,
    "thigh_size": _thigh_size,
}
