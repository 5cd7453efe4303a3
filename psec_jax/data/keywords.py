"""Keyword arguments in the name of an environment, "gymnasium:ID?key=value&key=value".

A value is a Python literal, or else a text. The canonical form sorts the keys and
writes `%`, `&`, `@`, `?`, `=` and commas of texts as `%25`, `%26` and so on, as in an
address.
"""

import ast
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from psec_jax.errors import InputError

MARK = "?"
FORM = "KEY=VALUE, several of them separated by &"
_PLAIN = " :/+;'\"()[]{}!*$~<>|^`\\#"  # unchanged in the canonical form


def split(name: str) -> tuple[str, dict[str, Any]]:
    """The name of an environment without its keyword arguments, and these.

    Raises:
      InputError: not of the form of FORM, or a key that is there twice.
    """
    plain, mark, tail = name.partition(MARK)
    keywords: dict[str, Any] = {}
    for part in tail.split("&") if mark else ():
        key, equals, text = part.partition("=")
        key = unquote(key).strip()
        if not equals or not key.isidentifier():
            raise InputError(f"environment {name!r}: got {part!r}, expected {FORM}")
        if key in keywords:
            raise InputError(f"environment {name!r}: {key} is there twice")
        keywords[key] = _value(unquote(text))
    return plain, keywords


def join(plain: str, keywords: Mapping[str, Any]) -> str:
    """The canonical name of an environment with keyword arguments."""
    parts = [f"{key}={_text(value)}" for key, value in sorted(keywords.items())]
    return f"{plain}{MARK}{'&'.join(parts)}" if parts else plain


def canonical(name: str) -> str:
    """The one form of a name with keyword arguments.

    Raises:
      InputError: see `split`.
    """
    return join(*split(name))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _text(value: Any) -> str:
    """The text that `_value` reads as the value: bare where it is a plain text."""
    bare = isinstance(value, str) and _value(value) == value
    return quote(value if bare else repr(value), safe=_PLAIN)
