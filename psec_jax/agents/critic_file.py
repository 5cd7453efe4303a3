"""Finished critics as one file of the run that trained them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import safe_open

from psec_jax import tree
from psec_jax.agents.critics import CriticParams
from psec_jax.errors import InputError
from psec_jax.files import reported, write_atomic
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
    if not path.is_file():
        raise InputError(
            f"{workdir} holds no finished critics ({NAME}); python -m launch.critics "
            "trains some"
        )
    try:
        with reported(f"read {path}"), safe_open(path, "numpy") as file:
            card = json.loads((file.metadata() or {}).get("card", "{}"))
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a file of critics: {error}") from error
    arrays = tree.unflatten(flat)
    if card.get("fingerprint") != tree.fingerprint(arrays):
        raise InputError(f"{path}: its numbers do not match its fingerprint")
    normaliser = Normaliser(**arrays["normaliser"])
    return Finished(CriticParams(arrays["q"], arrays["v"]), normaliser, card)


def _arrays(params: CriticParams, normaliser: Normaliser) -> dict[str, Any]:
    arrays = params._asdict() | {"normaliser": normaliser._asdict()}
    return jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), arrays)
