"""Environments behind one small seam: flat float32 observations, actions in [-1, 1].

Nothing here imports JAX, and a simulator is imported only when one of its environments
is made.
"""

from psec_jax.envs import bullet, dm_control, gymnasium, metadrive
from psec_jax.envs.base import Env, Step
from psec_jax.envs.shifts import shifted, split
from psec_jax.errors import InputError, lookup

__all__ = ["ENVS", "Env", "Step", "make", "one_per_process", "shifted"]


def make(spec: str) -> Env:
    """Make one environment.

    Args:
      spec: "dm_control:DOMAIN-TASK", "gymnasium:ID", "bullet:TASK" or "metadrive:TASK";
        the first two may have a shift (see `psec_jax.envs.shifts`).

    Raises:
      InputError: an unknown prefix, domain, task or ID, an environment without a flat
        observation or a bounded continuous action, a package that is missing, or a
        shift that cannot be made.
    """
    plain, shift = split(spec)
    prefix, colon, name = plain.partition(":")
    if not colon:
        raise InputError(
            f"environment {spec!r}: expected PREFIX:NAME, such as "
            f"dm_control:walker-walk; prefixes are {', '.join(sorted(ENVS))}"
        )
    make_env = lookup(ENVS, prefix, "environment prefix")
    if not shift:
        return make_env(name)
    if prefix not in SHIFTABLE:
        raise InputError(
            f"{spec}: {prefix} has no shifts; {' and '.join(SHIFTABLE)} have"
        )
    return make_env(name, shift)


def one_per_process(spec: str) -> bool:
    """Whether a process can hold one environment of this kind only."""
    return spec.partition(":")[0] in ONE_PER_PROCESS


ENVS = {
    "bullet": bullet.make,
    "dm_control": dm_control.make,
    "gymnasium": gymnasium.make,
    "metadrive": metadrive.make,
}
SHIFTABLE = ("dm_control", "gymnasium")
ONE_PER_PROCESS = frozenset({"metadrive"})
