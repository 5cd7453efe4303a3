"""Act on an analysis: retire skills that others make up for, and keep what they did."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from psec_jax.cards import is_number
from psec_jax.errors import InputError
from psec_jax.files import read_json
from psec_jax.library import SkillLibrary

Plan = dict[str, dict[str, float]]  # retired skill -> alpha of each skill in its place


def read(path: str | Path, library: SkillLibrary) -> Plan:
    """What an analysis suggests to remove, as weights of the skills in its place.

    Args:
      path: analysis.json.
      library: the library that it was made of.

    Raises:
      InputError: a damaged file, or one of another library or of skills that have
        changed since.
    """
    found = read_json(path)
    try:
        made_of, names = found["made_of"], found["skills"]
        prints = dict(zip(names, made_of["skill_fingerprints"], strict=True))
        plan = {name: dict(one["weights"]) for name, one in found["removed"].items()}
        listed = [name for weights in plan.values() for name in (*weights, *plan)]
        numbers = [w for weights in plan.values() for w in weights.values()]
        good = all(map(is_number, numbers)) and set(listed) <= set(names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not an analysis ({error!r:.80})") from error
    if not good or any(other in plan for one in plan.values() for other in one):
        raise InputError(f"{path}: not an analysis: its weights name other skills")
    for name in sorted({*listed, *plan}):
        now = library.card("skill", name)
        if now["fingerprint"] != prints[name]:
            raise InputError(
                f"{path}: skill {name!r} was {prints[name]!r:.40} then and is "
                f"{now['fingerprint']} now; analyse the library again"
            )
        if now["base_fingerprint"] != made_of.get("base_fingerprint"):
            raise InputError(f"{path}: made for another base than {library.root}'s")
    return {
        name: {
            other: weight * library.card("skill", other)["alpha"]
            for other, weight in weights.items()
        }
        for name, weights in plan.items()
    }


def check(library: SkillLibrary, plan: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a plan that cannot be carried out; arguments and errors of `prune`."""
    for name in plan:
        needed = [
            gate
            for gate in library.gates()
            if name in library.card("gate", gate)["skills"]
        ]
        if needed:
            raise InputError(
                f"skill {name!r} is needed by gate {needed[0]!r}; remove that first"
            )
        if name in library.gates():
            raise InputError(
                f"{library.root} has a gate {name!r}, which would be the one in the "
                "skill's place; remove it first"
            )
        if name in library.retired("skill"):
            raise InputError(f"a skill {name!r} was retired before; restore it first")


def prune(library: SkillLibrary, plan: Mapping[str, Mapping[str, float]]) -> None:
    """Retire skills, and add for each a constant gate of its name in its place.

    Where nothing has to be in its place, the base alone predicts the same, and no gate
    is added.

    Args:
      library: the library.
      plan: see `read`.

    Raises:
      InputError: a gate needs one of the skills, a gate has one of their names, or one
        of that name was retired before. Nothing is changed then.
    """
    check(library, plan)
    for name, weights in plan.items():
        if weights:
            alpha = np.array(list(weights.values()), np.float32)
            card = {
                "skills": list(weights),
                "level": "parameter",
                "gate": {"head": "constant", "support": "none"},
                "in_place_of": library.card("skill", name)["fingerprint"],
            }
            library.add_gate(name, {"head": {"alpha": alpha}}, card)
        library.retire("skill", name)
