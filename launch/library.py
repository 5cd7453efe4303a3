"""Look after a skill library: what is in it, is it whole, bring in or remove something.

    python -m launch.library list --library=runs/library
    python -m launch.library show walk --library=runs/library
    python -m launch.library show base --library=runs/library
    python -m launch.library verify --library=runs/library
    python -m launch.library remove walk --library=runs/library
    python -m launch.library import lora/model50000.pickle --library=runs/authors

`verify` reads every file, compares it with its hash, and checks that every skill and
gate was made for this base. A skill that a gate needs is removed after the gate. Where
a skill and a gate share a name, write skill/NAME or gate/NAME. `import` adds what a
checkpoint of the paper authors' code holds, a base, skills or a gate, and makes the
library where there is none; --critics also writes the critics of a skills' checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from psec_jax import released
from psec_jax.cli import run
from psec_jax.errors import InputError, lookup
from psec_jax.library import SkillLibrary, table

LIBRARY = flags.DEFINE_string("library", "runs/library", "Folder of the skill library.")
NAME = flags.DEFINE_string(
    "name", None, "import: put before the names of skills and gate, as in NAME-reward."
)
LEVEL = flags.DEFINE_enum(
    "level",
    None,
    ["noise", "action"],
    "import: level of a gate that mixes predictions. The checkpoint does not say it; "
    "default noise.",
)
CRITICS = flags.DEFINE_string(
    "critics", None, "import: also write the checkpoint's critics to this folder."
)


def list_entries(library: SkillLibrary) -> None:
    """One line for the base, every skill and every gate."""
    rows = [("kind", "name", "environment", "return", "steps", "form")]
    for kind, name in library.entries():
        try:
            card = library.card(kind, name)
        except InputError:
            rows.append((kind, name, "", "", "", "damaged: see verify"))
            continue
        returns = card.get("returns") or {}
        mean = f"{returns['mean']:.1f}" if "mean" in returns else "-"
        rows.append(
            (
                kind,
                str(card["name"]),
                str(card.get("env") or "-"),
                mean,
                str(card.get("steps", "-")),
                _FORMS[kind](card),
            )
        )
    print(table(rows))


def show(library: SkillLibrary, name: str) -> None:
    """The card of one entry, and its arrays."""
    card = library.card(*_find(library, name))
    tensors = card.pop("tensors")
    print(table([(field, _brief(value)) for field, value in card.items()]))
    print()
    rows = [("tensor", "shape", "dtype")]
    rows += [
        (path, "x".join(map(str, shape)) or "scalar", dtype)
        for path, (shape, dtype) in tensors.items()
    ]
    print(table(rows))


def verify(library: SkillLibrary) -> None:
    """Check everything; problems are listed and exit code 2 is given."""
    problems = library.verify()
    if problems:
        print("\n".join(problems))
        raise InputError(f"{library.root}: {len(problems)} problems found")
    count = len(library.entries())
    print(f"{library.root}: {count} entries, every file matches its hash")


def remove(library: SkillLibrary, name: str) -> None:
    """Remove a skill or a gate."""
    kind, name = _find(library, name)
    library.remove(kind, name)
    print(f"removed {kind} {name}")


def import_file(library: SkillLibrary, path: str) -> None:
    """Add what a checkpoint of the paper authors' code holds."""
    given = {"name": NAME.value or "", "level": LEVEL.value, "critics": CRITICS.value}
    print("\n".join(released.add(path, library.root, **given)))


def _find(library: SkillLibrary, name: str) -> tuple[str, str]:
    kind, slash, rest = name.partition("/")
    found = [
        entry
        for entry in library.entries()
        if entry == (kind, rest) or (not slash and entry[1] == name)
    ]
    if not found:
        names = ", ".join(name for _, name in library.entries())
        raise InputError(f"{library.root} has no {name!r}; it has {names}")
    if len(found) > 1:
        raise InputError(
            f"{library.root} has several entries {name!r}; "
            f"write {' or '.join(f'{kind}/{name}' for kind, name in found)}"
        )
    return found[0]


def _gate_form(card: dict[str, Any]) -> str:
    form = f"{card['gate'].get('head', 'linear')} gate over {', '.join(card['skills'])}"
    support = card["gate"].get("support", "none")
    if support != "none":
        form += f", {support} support"
    return f"{form}, {card['level']} level"


_FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "base": lambda card: f"obs {card['obs_dim']}, action {card['action_dim']}",
    "skill": lambda card: (
        f"{card['adapter']} rank {card['rank']}, alpha {card['alpha']:g}"
    ),
    "gate": _gate_form,
}


def _brief(value: Any) -> str:
    """A card's field in one line; long lists are cut."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        shown = " ".join(_brief(item) for item in value[:8])
        return f"[{shown} ... {len(value)}]" if len(value) > 8 else f"[{shown}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)


COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "list": (list_entries, ()),
    "show": (show, ("NAME",)),
    "verify": (verify, ()),
    "remove": (remove, ("NAME",)),
    "import": (import_file, ("FILE",)),
}


def main(argv: Sequence[str]) -> None:
    """The sub-command named by the arguments."""
    if len(argv) < 2:
        raise InputError(f"no sub-command; choose from {', '.join(sorted(COMMANDS))}")
    command, parameters = lookup(COMMANDS, argv[1], "sub-command")
    if len(argv) - 2 != len(parameters):
        usage = " ".join([argv[1], *parameters])
        raise InputError(f"got {' '.join(argv[1:])!r}, expected {usage!r}")
    # The library that something is imported into may be a new one.
    opened = SkillLibrary if command is import_file else SkillLibrary.open
    command(opened(LIBRARY.value), *argv[2:])


if __name__ == "__main__":
    run(main)
