"""The flags of a composed policy, of the commands that take one."""

import math
from typing import Any

from absl import flags

from psec_jax.cli import floats
from psec_jax.errors import InputError, lookup
from psec_jax.policy import SAMPLING

LIBRARY = flags.DEFINE_string("library", "runs/library", "Folder of the skill library.")
SKILLS = flags.DEFINE_list("skills", [], "Names of skills; none is the base alone.")
ALPHA = flags.DEFINE_list(
    "alpha",
    None,
    "Fixed weight of each skill; at the noise and action levels the base's is first.",
)
GATE = flags.DEFINE_string("gate", None, "Name of a gate; it brings its skills.")
LEVEL = flags.DEFINE_string(
    "level", "parameter", "Of fixed weights: parameter, noise or action."
)
SAMPLING_FLAG = flags.DEFINE_list(
    "sampling",
    [],
    "How actions are sampled where that differs from the base's, such as "
    f"temperature=0,start_scale=0; fields: {', '.join(SAMPLING)}.",
)


def choice() -> dict[str, Any]:
    """What the flags choose of a library: arguments of `policy.compose`."""
    return {
        "skills": SKILLS.value,
        "alpha": floats("alpha", ALPHA.value),
        "gate": GATE.value,
        "level": LEVEL.value,
        "sampling": sampling(),
    }


def sampling() -> dict[str, Any]:
    """The fields of --sampling, each of its type.

    Raises:
      InputError: not NAME=VALUE, an unknown name, or a value of another type.
    """
    fields: dict[str, Any] = {}
    for text in SAMPLING_FLAG.value:
        name, equals, value = text.partition("=")
        kind = lookup(SAMPLING, name, "field of --sampling")
        try:
            fields[name] = kind(value)
        except ValueError as error:
            raise InputError(
                f"--sampling: got {text!r}, expected {name}={kind.__name__}"
            ) from error
        if not equals or not math.isfinite(fields[name] if kind is not str else 0):
            raise InputError(f"--sampling: got {text!r}, expected {name}=VALUE")
    return fields
