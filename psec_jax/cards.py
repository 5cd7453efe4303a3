"""The schema of a library's cards: what every field is, and what it has to be.

A card's own hash shows accidents. This is for cards that somebody wrote: nothing below
the library sees a field of another type, range or length.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from psec_jax.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # of a skill or gate
DTYPES = ("float32", "float64", "float16", "int32", "int64", "uint32", "bool")
_PRINT = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**20  # of an observation, an action, a rank

T = TypeVar("T")


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """A check: a whole number within bounds."""
    return lambda x: type(x) is int and low <= x <= high


def is_number(x: Any) -> bool:
    """Whether it is a finite number of a size that can be."""
    return type(x) in (int, float) and abs(x) < 1e30


def is_text(x: Any) -> bool:
    """Whether it is a text that is not a book."""
    return isinstance(x, str) and len(x) < 10_000


def _form(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, str) and pattern.fullmatch(x) is not None


def list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check: a list of which every element passes another."""
    return lambda x: isinstance(x, list) and all(map(check, x))


def none_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check: None, or what passes another."""
    return lambda x: x is None or check(x)


def is_object(x: Any) -> bool:
    """Whether it is an object of JSON."""
    return isinstance(x, dict)


def _returns(x: Any) -> bool:
    return isinstance(x, dict) and is_number(x.get("mean", 0.0))


def _data(x: Any) -> bool:
    return (
        isinstance(x, dict)
        and is_text(x.get("source", ""))
        and _form(_PRINT)(x.get("fingerprint"))
        and all(whole(1, 2**62)(x.get(n)) for n in ("transitions", "trajectories"))
        and isinstance(x.get("selection", {}), dict)
        and is_number(x.get("success", 0.0))
    )


def _actions(x: Any) -> bool:
    def bound(value: Any) -> bool:
        return value is None or (isinstance(value, list) and all(map(is_number, value)))

    if not isinstance(x, dict):
        return False
    low, high = x.get("low"), x.get("high")
    if low is None or high is None:
        return low is high
    return (
        bound(low)
        and bound(high)
        and all(a <= b for a, b in zip(low, high, strict=False))
    )


def _tensors(x: Any) -> bool:
    def entry(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and list_of(whole(0, 2**40))(value[0])
            and value[1] in DTYPES
        )

    return isinstance(x, dict) and all(map(entry, x.values()))


_SIZE = (whole(1, _MAX_SIZE), "a number of 1 or more")
_FINGERPRINT = (_form(_PRINT), "16 hex digits")
# What every card, and that of a kind, has to hold: field -> (check, what is expected).
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (is_text, "a text"),
    "created": (is_text, "a date"),
    "sha256": (_form(_SHA256), "64 hex digits"),
    "fingerprint": _FINGERPRINT,
    "tensors": (_tensors, "shape and type of every array"),
    "obs_dim": _SIZE,
    "action_dim": _SIZE,
}
_KINDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "base": {
        "network": (is_object, "an object"),
    },
    "skill": {
        "base_fingerprint": _FINGERPRINT,
        "alpha": (is_number, "a finite number"),
        "adapter": (is_text, "a text"),
        "rank": _SIZE,
    },
    "gate": {
        "base_fingerprint": _FINGERPRINT,
        "skills": (list_of(_form(NAME)), "a list of names"),
        "skill_fingerprints": (list_of(_form(_PRINT)), "a list of fingerprints"),
        "level": (is_text, "a text"),
        "gate": (is_object, "an object"),
    },
}
# What a card may hold, and then has to be.
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "env": (none_or(is_text), "a text"),
    "objective": (none_or(is_text), "a text"),
    "steps": (none_or(whole(0, 2**62)), "a number of 0 or more"),
    "returns": (none_or(_returns), "an object with a finite mean"),
    "data": (none_or(_data), "source, fingerprint, transitions and trajectories"),
    "actions": (none_or(_actions), "an object with the bounds low and high"),
    "start": (none_or(is_object), "an object"),
    "load": (none_or(is_object), "an object"),
    "config": (none_or(is_object), "an object"),
    "versions": (none_or(is_object), "an object"),
}


def check_card(source: str, kind: str, name: str, card: Mapping[str, Any]) -> None:
    """Refuse a card that is not one of this kind and name, field by field.

    Args:
      source: the card's file, named in messages.
      kind: "base", "skill" or "gate".
      name: of the entry's folder.
      card: what the file holds.

    Raises:
      InputError: a field that is missing or is not what it has to be.
    """
    needed = _FIELDS | _KINDS[kind]
    for field in needed:
        if field not in card:
            raise InputError(f"{source}: the card has no {field!r}")
    for field, (check, expected) in (needed | _OPTIONAL).items():
        if field in card and not check(card[field]):
            raise InputError(
                f"{source}: {field} is {shortened(card[field])}, expected {expected}"
            )
    if card.get("kind") != kind:
        raise InputError(
            f"{source}: is the card of a {shortened(card.get('kind'))}, expected a "
            f"{kind}"
        )
    if kind != "base" and card["name"] != name:
        raise InputError(f"{source}: is the card of {card['name']!r}, not of {name!r}")
    for bound in ("low", "high"):
        numbers = (card.get("actions") or {}).get(bound)
        if numbers is not None and len(numbers) != card["action_dim"]:
            raise InputError(
                f"{source}: actions have {len(numbers)} bounds {bound}, expected "
                f"{card['action_dim']}"
            )
    if kind == "gate" and not 0 < len(card["skills"]) == len(
        card["skill_fingerprints"]
    ):
        raise InputError(
            f"{source}: {len(card['skills'])} skills and "
            f"{len(card['skill_fingerprints'])} fingerprints of skills, expected one "
            "for each"
        )


def form_text(card: Mapping[str, Any]) -> str:
    """The form of a checked card's base, skill or gate in a few words."""
    if card["kind"] == "base":
        return f"obs {card['obs_dim']}, action {card['action_dim']}"
    if card["kind"] == "skill":
        return f"{card['adapter']} rank {card['rank']}, alpha {card['alpha']:g}"
    form = f"{card['gate'].get('head', 'linear')} gate over {', '.join(card['skills'])}"
    support = card["gate"].get("support", "none")
    if support != "none":
        form += f", {support} support"
    return f"{form}, {card['level']} level"


def shortened(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def form_of(kind: type[T], fields: object, source: str) -> T:
    """The frozen config of a card: a dataclass whose fields all have defaults.

    Args:
      kind: the dataclass.
      fields: of the card; lists for tuples.
      source: the card and its field, named in messages.

    Raises:
      InputError: an unknown field, or a value of another type or range.
    """
    known = {field.name: field.default for field in dataclasses.fields(cast(Any, kind))}
    if not isinstance(fields, dict):
        raise InputError(f"{source} is {shortened(fields)}, expected an object")
    plain = {}
    for name, value in fields.items():
        if name not in known or not _like(value, known[name]):
            raise InputError(f"{source} has no {shortened(name)} of {shortened(value)}")
        plain[name] = tuple(value) if isinstance(value, list | tuple) else value
    try:
        return kind(**plain)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _like(value: object, default: object) -> bool:
    """Whether a value has the type of a field's default, and a size that can be."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_like(x, 0) for x in value)
    if isinstance(default, float):
        return is_number(value)
    if type(value) is not type(default):
        return False
    return not isinstance(value, int) or abs(value) <= _MAX_SIZE
