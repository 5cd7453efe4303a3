"""The errors that a command reports in one line."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def printable(text: str) -> str:
    """The text with every control character but newlines escaped.

    Names and values from files would otherwise drive the terminal they are printed on.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in text
    )


class InputError(ValueError):
    """Bad input, reported in one line: what it is in, what was got, what was expected.

    The command line prints the message and exits with code 2. Where it is shown,
    control characters are escaped, and one of more than 4,000 characters is cut.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= 4000 else f"{text[:4000]} ...")


class TrainingError(RuntimeError):
    """Training cannot go on: a metric or the state is not finite."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop by a signal; the state was saved if it was finite.

    Attributes:
      signum: the signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`.

    Raises:
      InputError: `name` is not in the table; the message lists the choices.
    """
    if name not in table:
        choices = ", ".join(sorted(table))
        raise InputError(f"unknown {what} {name!r}; choose from {choices}")
    return table[name]


def at_least(config: object, bound: int | float, *fields: str) -> None:
    """Refuse a config whose fields are below a bound.

    Raises:
      InputError: the first such field.
    """
    for field in fields:
        if getattr(config, field) < bound:
            raise InputError(
                f"{field}: got {getattr(config, field)}, expected {bound:g} or more"
            )
