"""The flags of a composed policy, of the commands that take one."""

from typing import Any

from absl import flags

from psec_jax.cli import floats

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


def choice() -> dict[str, Any]:
    """What the flags choose of a library: arguments of `policy.compose`."""
    return {
        "skills": SKILLS.value,
        "alpha": floats("alpha", ALPHA.value),
        "gate": GATE.value,
        "level": LEVEL.value,
    }
