"""Environments behind one small seam: flat float32 observations, actions in [-1, 1].

Nothing here imports JAX but `mjx`, which is imported with its simulator: when one of
its environments is made.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from psec_jax.data import keywords
from psec_jax.data.recording import Recording
from psec_jax.envs import bullet, dm_control, gymnasium, metadrive, metaworld
from psec_jax.envs.base import Env, Simulator, Step, recorded_in
from psec_jax.envs.shifts import shifted, split
from psec_jax.errors import InputError, lookup

__all__ = [
    "ENVS",
    "MAX_ON_DEVICE",
    "FORMS",
    "Env",
    "Step",
    "batches_on_device",
    "describe",
    "make",
    "make_on_device",
    "one_per_process",
    "shifted",
]


MAX_ON_DEVICE = 4096  # episodes at once where simulators are on the device


def make(spec: str) -> Env:
    """Make one environment.

    Args:
      spec: see FORMS; keyword arguments are those of `psec_jax.data.keywords`, shifts
        those of `psec_jax.envs.shifts`.

    Raises:
      InputError: an unknown prefix, domain, task or ID, an environment without a flat
        observation or a bounded continuous action, a package that is missing, or
        keyword arguments or a shift that the environment does not take.
    """
    simulator, name, options, shift = _parsed(spec)
    return simulator.make(name, shift, options)


@functools.lru_cache(maxsize=64)
def describe(spec: str) -> Recording:
    """How data collected in an environment are recorded: its sizes, the box of its
    actions, its time limit and the order of its observations.

    Raises:
      InputError: see `make`.
    """
    simulator, name, _, _ = _parsed(spec)
    if simulator.recording is not None:
        return simulator.recording(name)
    env = make(spec)
    try:
        return recorded_in(env)
    finally:
        env.close()


@functools.lru_cache(maxsize=4)
def make_on_device(spec: str) -> Any:
    """The `envs.mjx.MjxEnv` that rolls out on the device, made and compiled once; None
    for an environment that processes step.

    Raises:
      InputError: see `make`.
    """
    return make(spec) if _parsed(spec)[0].on_device else None


def batches_on_device(episodes: int, most: int = MAX_ON_DEVICE) -> list[np.ndarray]:
    """Numbers of episodes that roll out at once on the device, [B] each; the last one
    is repeated so that all batches have one size and are one program."""
    width = min(episodes, max(most, 1))
    starts = range(0, episodes, width)
    return [np.minimum(np.arange(s, s + width), episodes - 1) for s in starts]


def one_per_process(spec: str) -> bool:
    """Whether a process can hold one environment of this kind only."""
    prefix = spec.partition(":")[0]
    return prefix in ENVS and ENVS[prefix].alone


def _parsed(spec: str) -> tuple[Simulator, str, dict, dict[str, float]]:
    """The simulator, the name behind its prefix, keyword arguments and shift."""
    plain, shift = split(spec)
    plain, options = keywords.split(plain)
    prefix, colon, name = plain.partition(":")
    if not colon:
        raise InputError(f"environment {spec!r}: expected PREFIX:NAME, {FORMS}")
    simulator = lookup(ENVS, prefix, "environment prefix")
    for what, given, flags in (
        ("shifts", shift, {p: s.shifts for p, s in ENVS.items()}),
        ("keyword arguments", options, {p: s.keywords for p, s in ENVS.items()}),
    ):
        if given and not flags[prefix]:
            having = " and ".join(p for p, has in flags.items() if has)
            raise InputError(f"{spec}: {prefix} has no {what}; {having} have")
    return simulator, name, options, shift


def _make_mjx(name: str, shift: Mapping[str, float], options: Mapping[str, Any]) -> Any:
    from psec_jax.envs import mjx  # the one module here that imports JAX

    return mjx.make(name, shift, options)


ENVS = {
    "bullet": Simulator(bullet.make, "TASK", recording=bullet.recording),
    "dm_control": Simulator(dm_control.make, "DOMAIN-TASK", shifts=True, keywords=True),
    "gymnasium": Simulator(gymnasium.make, "ID", shifts=True, keywords=True),
    "metadrive": Simulator(
        metadrive.make, "TASK", alone=True, recording=metadrive.recording
    ),
    "metaworld": Simulator(metaworld.make, "TASK", keywords=True),
    "mjx": Simulator(
        _make_mjx, "DOMAIN-TASK", shifts=True, keywords=True, on_device=True
    ),
}
# How environments are named, for help texts and messages.
FORMS = " or ".join(
    f"{prefix}:{simulator.form}"
    + "[?KEY=VALUE&...]" * simulator.keywords
    + "[@QUANTITY:FACTOR,...]" * simulator.shifts
    for prefix, simulator in ENVS.items()
)
