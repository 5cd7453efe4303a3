"""Gymnasium environments with a flat observation and a bounded continuous action."""

from psec_jax.errors import InputError


def make(name: str):
    raise InputError("not yet")
