"""Environments behind one small seam: flat float32 observations, actions in [-1, 1].

Nothing here imports JAX, and a simulator is imported only when one of its environments
is made.
"""

from psec_jax.envs import bullet, dm_control, gymnasium, metadrive
from psec_jax.envs.base import Env, Step
from psec_jax.errors import InputError, lookup

__all__ = ["ENVS", "Env", "Step", "make", "one_per_process"]


def make(spec: str) -> Env:
    """Make one environment.

    Args:
      spec: "dm_control:DOMAIN-TASK", "gymnasium:ID", "bullet:TASK" or "metadrive:TASK".

    Raises:
      InputError: an unknown prefix, domain, task or ID, an environment without a flat
        observation or a bounded continuous action, or a package that is missing.
    """
    prefix, colon, name = spec.partition(":")
    if not colon:
        raise InputError(
            f"environment {spec!r}: expected PREFIX:NAME, such as "
            f"dm_control:walker-walk; prefixes are {', '.join(sorted(ENVS))}"
        )
    return lookup(ENVS, prefix, "environment prefix")(name)


def one_per_process(spec: str) -> bool:
    """Whether a process can hold one environment of this kind only."""
    return spec.partition(":")[0] in ONE_PER_PROCESS


ENVS = {
    "bullet": bullet.make,
    "dm_control": dm_control.make,
    "gymnasium": gymnasium.make,
    "metadrive": metadrive.make,
}
ONE_PER_PROCESS = frozenset({"metadrive"})
