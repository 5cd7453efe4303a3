"""The one error a user sees for input that cannot be used."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input, told in one line: what it is in, what was got, what was expected.

    The command line prints the message and exits with code 2.
    """


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`.

    Raises:
      InputError: `name` is not in the table; the message lists the choices.
    """
    if name not in table:
        choices = ", ".join(sorted(table))
        raise InputError(f"unknown {what} {name!r}; choose from {choices}")
    return table[name]
