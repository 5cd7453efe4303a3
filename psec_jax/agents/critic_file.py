"""Finished critics as one file of the run that trained them.

The file may come from anybody: every field that is read of its card, and the shape of
every array, is checked.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from psec_jax import tree
from psec_jax.agents.critics import CriticParams
from psec_jax.errors import InputError
from psec_jax.files import parse_json, read_bytes, write_atomic
from psec_jax.library import check_finite, read_arrays
from psec_jax.networks.mlp import mlp_shapes, mlp_widths
from psec_jax.types import Normaliser

NAME = "critics.safetensors"


class Finished(NamedTuple):
    """Critics whose training is over.

    Attributes:
      params: the networks.
      normaliser: of the observations they read.
      card: what is worth knowing of them; "obs_dim" and "action_dim", "kinds" (what
        they judge), "fingerprint" of every number, ...
    """

    params: CriticParams
    normaliser: Normaliser
    card: dict[str, Any]

    @property
    def dims(self) -> tuple[int, int]:
        """S and A."""
        return self.card["obs_dim"], self.card["action_dim"]

    def brief(self) -> dict[str, Any]:
        """What the card of a skill says of its critics."""
        fields = ("fingerprint", "kinds", "steps", "data", "summary")
        return {name: self.card[name] for name in fields}


def save(
    workdir: str | Path,
    params: CriticParams,
    normaliser: Normaliser,
    card: Mapping[str, Any],
) -> Finished:
    """Write the critics into a run's folder.

    Args:
      workdir: the run's folder.
      params: the critics.
      normaliser: of the observations they read.
      card: what is worth knowing of them, as JSON holds it.

    Returns:
      What `load` will give; the card has the "fingerprint" of every number.

    Raises:
      InputError: the file cannot be written.
    """
    arrays = _arrays(params, normaliser)
    card = dict(card) | {"fingerprint": tree.fingerprint(arrays)}
    content = safetensors.numpy.save(tree.flatten(arrays), {"card": json.dumps(card)})
    write_atomic(Path(workdir) / NAME, content)
    return Finished(params, normaliser, card)


def load(workdir: str | Path) -> Finished:
    """The critics of a run's folder.

    Raises:
      InputError: no finished critics there, or a damaged file.
    """
    path = Path(workdir) / NAME
    if not os.path.lexists(path):
        raise InputError(
            f"{workdir} holds no finished critics ({NAME}); python -m launch.critics "
            "trains some"
        )
    content = read_bytes(path)
    flat = read_arrays(path, content)
    card = _card(path, content)
    arrays = tree.unflatten(flat)
    if card["fingerprint"] != tree.fingerprint(arrays):
        raise InputError(f"{path}: its numbers do not match its fingerprint")
    _check(path, flat, card)
    normaliser = Normaliser(**arrays["normaliser"])
    return Finished(CriticParams(arrays["q"], arrays["v"]), normaliser, card)


def _card(path: Path, content: bytes) -> dict[str, Any]:
    """The card in the head of a file whose arrays could be read."""
    length = int.from_bytes(content[:8], "little")
    head = parse_json(content[8 : 8 + length], str(path))
    text = (head.get("__metadata__") or {}).get("card", "{}")
    card = parse_json(text, f"{path}: the card")
    for field, (kind, expected) in _FIELDS.items():
        value: Any = card.get(field)
        if type(value) is not kind or (kind is int and not 1 <= value <= 2**62):
            raise InputError(f"{path}: {field} is {value!r:.60}, expected {expected}")
    kinds = card["kinds"]
    if not kinds or not all(isinstance(k, str) for k in kinds):
        raise InputError(f"{path}: kinds is {kinds!r:.60}, expected names")
    return card


_FIELDS = {
    "fingerprint": (str, "16 hex digits"),
    "kinds": (list, "a list of names"),
    "obs_dim": (int, "a number of 1 or more"),
    "action_dim": (int, "a number of 1 or more"),
    "steps": (int, "a number of 1 or more"),
    "data": (dict, "an object"),
    "summary": (dict, "an object"),
}


def _check(path: Path, flat: Mapping[str, np.ndarray], card: dict[str, Any]) -> None:
    """Refuse arrays that are not those of C critics of these sizes, or not finite."""
    count, obs_dim, action_dim = (
        len(card["kinds"]),
        card["obs_dim"],
        card["action_dim"],
    )
    expected: dict[str, tuple[int, ...]] = {
        "normaliser/mean": (obs_dim,),
        "normaliser/std": (obs_dim,),
        "v/norm/scale": (count, obs_dim),
        "v/norm/bias": (count, obs_dim),
    }
    got = {name: array.shape for name, array in flat.items()}
    for prefix, axes, inputs in (
        ("q", (count, 2), obs_dim + action_dim),
        ("v/mlp", (count,), obs_dim),
    ):
        for name, shape in mlp_shapes(mlp_widths(got, prefix), inputs, 1).items():
            expected[f"{prefix}/{name}"] = (*axes, *shape)
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name) or flat[name].dtype.kind != "f":
            raise InputError(
                f"{path}: {name} is {got.get(name, 'missing')}, expected "
                f"{expected.get(name, 'nothing')}, of floats"
            )
    check_finite(str(path), flat)
    if not (flat["normaliser/std"] > 0).all():
        raise InputError(f"{path}: the normaliser's std is not above 0")


def _arrays(params: CriticParams, normaliser: Normaliser) -> dict[str, Any]:
    arrays = params._asdict() | {"normaliser": normaliser._asdict()}
    return jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), arrays)
