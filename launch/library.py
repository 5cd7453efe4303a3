"""Look after a skill library: what is in it, is it whole, bring in or remove something.

    python -m launch.library list --library=runs/library
    python -m launch.library show walk --library=runs/library
    python -m launch.library show base --library=runs/library
    python -m launch.library verify --library=runs/library
    python -m launch.library remove walk --library=runs/library
    python -m launch.library import lora/model50000.pickle --library=runs/authors
    python -m launch.library export walk --library=runs/library --out=runs/walk-peft
    python -m launch.library import runs/walk-peft --library=runs/library --name=walk-2
    python -m launch.library analyse --library=runs/library --data=walk.hdf5 \
        --out=runs/analysis
    python -m launch.library prune --library=runs/library --out=runs/analysis
    python -m launch.library restore run --library=runs/library
    python -m launch.library push --library=runs/library --to=hf:OWNER/NAME
    python -m launch.library pull walk --library=runs/library --from=hf:OWNER/NAME
    python -m launch.library merge both --skills=walk,run --alpha=8,8 --data=walk.hdf5

`verify` reads every file, compares it with its hash, and checks that every skill and
gate was made for this base. A skill that a gate needs is removed after the gate. Where
a skill and a gate share a name, write skill/NAME or gate/NAME. `import` adds what a
checkpoint of the paper authors' code holds, a base, skills or a gate, and makes the
library where there is none; --critics also writes the critics of a skills' checkpoint.
Of a folder in the format of PEFT, as `export` writes it, it adds the skill as --name.
`merge` makes one skill of several at fixed weights, or with --method=fold a new library
--out whose base is what they make of this one's; it prints how far the result is from
the exact sum, for each layer and on the states of --data, and saves nothing where an
error is above --bound.

`push` adds the library, or one entry with what it needs, to a repository of the Hugging
Face Hub or to another folder, with a README.md; `pull` adds what such a place holds to
the library. Everything is verified before it is added; another base, or another entry
of the same name, is refused. The Hub needs the extra hub; its token comes from HF_TOKEN
or of `hf auth login`.

`analyse` compares every two skills, in weights and in predictions on the states of
--data, says which ones the others make up for, and writes analysis.json and
heatmaps.png to --out. `prune` reads that, retires the skills that it suggests to
remove, and adds for each a gate of its name over those that stay; with --env it shows
the returns before and after. `restore` brings back what was retired.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch import heatmaps
from psec_jax import analysis, peft, pruning, released, sharing
from psec_jax import data as datasets
from psec_jax.analysis import AnalysisConfig
from psec_jax.cards import form_text
from psec_jax.cli import ENV_HELP, floats, run
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import evaluate
from psec_jax.files import make_room, write_json
from psec_jax.library import SkillLibrary, find_entry, table
from psec_jax.merging import FOLD, METHODS, MergeConfig, Merged, merge_of_library
from psec_jax.policy import Policy, compose

ANALYSIS, HEATMAPS = "analysis.json", "heatmaps.png"
LIBRARY = flags.DEFINE_string("library", "runs/library", "Folder of the skill library.")
NAME = flags.DEFINE_string(
    "name",
    None,
    "import: put before the names of skills and gate, as in NAME-reward; of a "
    "folder of PEFT the skill's name.",
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

SKILLS = flags.DEFINE_list("skills", None, "merge, analyse: names of the skills.")
ALPHA = flags.DEFINE_list("alpha", None, "merge: the weight of each skill.")
METHOD = flags.DEFINE_enum(
    "method",
    MergeConfig.method,
    [FOLD, *METHODS],
    "merge: concatenate, exact, of the sum of the ranks; svd, the nearest of --rank; "
    "ties, trimmed and with elected signs; dare, thinned at random; fold, exact, into "
    "the base.",
)
RANK = flags.DEFINE_integer(
    "rank", MergeConfig.rank, "merge: rank of the result; 0 is the sum of the ranks.", 0
)
DENSITY = flags.DEFINE_float(
    "density",
    MergeConfig.density,
    "merge: share of the numbers that ties and dare keep of each skill.",
)
BOUND = flags.DEFINE_float(
    "bound",
    MergeConfig.bound,
    "merge: the largest relative error, of a layer or on data, that is saved.",
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "export, analyse: folder to be written; prune: that of the analysis. "
    "merge --method=fold: the new library.",
)
DATA = flags.DEFINE_string(
    "data", None, "merge, analyse: data whose states predictions are compared on."
)
GATES = flags.DEFINE_list(
    "gates", [], "analyse: gates with supports, to compare where the skills apply."
)
REDUNDANT = flags.DEFINE_float(
    "redundant",
    AnalysisConfig.redundant,
    "analyse: suggest to remove a skill where the rest predicts what it does with at "
    "most this relative error.",
)
CONFLICT = flags.DEFINE_float(
    "conflict",
    AnalysisConfig.conflict,
    "analyse: suggest to keep two skills apart from this conflict on.",
)
ENV = flags.DEFINE_string(
    "env", None, f"prune: show returns before and after. {ENV_HELP}"
)
EPISODES = flags.DEFINE_integer("episodes", 10, "prune: how many of each.", 1)
STATES = flags.DEFINE_integer("states", 256, "merge, analyse: how many of them.", 1)
PLACE = "hf:OWNER/NAME, a repository of the Hugging Face Hub, or a folder"
TO = flags.DEFINE_string("to", None, f"push: {PLACE}.")
FROM = flags.DEFINE_string("from", None, f"pull: {PLACE}.")
REVISION = flags.DEFINE_string(
    "revision", None, "pull: branch, tag or commit of a repository; default main."
)
PUBLIC = flags.DEFINE_bool(
    "public", False, "push: everybody may see a repository that is made."
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Of what is drawn at random.",
    0,
    2**32 - 1,
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
                form_text(card),
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
    """Add what a checkpoint of the authors' code, or a folder of PEFT, holds."""
    if os.path.isdir(path):
        if not NAME.value:
            raise InputError(f"--name: not given, expected a name for the skill {path}")
        library = SkillLibrary.open(library.root)
        library.add_skill(NAME.value, *peft.read(path))
        print(f"added skill {NAME.value}")
        return
    given = {"name": NAME.value or "", "level": LEVEL.value, "critics": CRITICS.value}
    print("\n".join(released.add(path, library.root, **given)))


def export(library: SkillLibrary, name: str) -> None:
    """Write a skill as PEFT reads it."""
    if not OUT.value:
        raise InputError("--out: not given, expected a folder")
    peft.export(OUT.value, *library.load_skill(name))
    print(f"{OUT.value} holds {peft.CONFIG} and {peft.ARRAYS}")


def merge(library: SkillLibrary, name: str) -> None:
    """Make one skill of several at fixed weights, or fold them into a new base."""
    config = MergeConfig(
        METHOD.value, RANK.value, DENSITY.value, SEED.value, BOUND.value
    )
    if (OUT.value is not None) != (config.method == FOLD):
        raise InputError(f"--out: --method={FOLD} needs it, and no other method has it")
    save = _saver(library, name, OUT.value)
    obs = _states()
    alpha = floats("alpha", ALPHA.value) or []
    made = merge_of_library(
        library.root, SKILLS.value or [], alpha, config, obs, STATES.value
    )
    made.card["merged"]["data"] = DATA.value
    print(_report(made))
    made.errors.check(config.bound)
    print(save(made))


def analyse(library: SkillLibrary) -> None:
    """Compare the skills, and write what was found to --out."""
    out = _out()
    config = AnalysisConfig(STATES.value, SEED.value, REDUNDANT.value, CONFLICT.value)
    found, record = analysis.analyse(
        library.root, SKILLS.value or [], config, _states(), GATES.value or []
    )
    record["data"] = DATA.value
    make_room(out / ANALYSIS)
    write_json(out / ANALYSIS, found._asdict() | {"made_of": record})
    heatmaps.draw(found, out / HEATMAPS)
    rows = [("skill", "error without it", "largest conflict", "suggestion")]
    rows += [
        (name, f"{found.left[k]:.3g}", f"{max(found.conflict[k]):.2f}", suggestion)
        for k, (name, suggestion) in enumerate(found.suggestions.items())
    ]
    print(table(rows))
    print(f"{out / ANALYSIS} and {out / HEATMAPS} have the matrices")


def prune(library: SkillLibrary) -> None:
    """Retire the skills that an analysis suggests to remove."""
    path = _out() / ANALYSIS
    plan = pruning.read(path, library)
    if not plan:
        print(f"{path} suggests to remove no skill")
        return
    pruning.check(library, plan)
    rows = [("retired", "in its place", "return before", "after")]
    for name, weights in plan.items():
        others = " + ".join(f"{w:.3g} {other}" for other, w in weights.items())
        before = compose(library.root, name)
        after = compose(library.root, list(weights), alpha=list(weights.values()))
        rows.append((name, others or "the base", _return(before), _return(after)))
    pruning.prune(library, plan)
    print(table(rows))


def _return(policy: Policy) -> str:
    """Mean return of a policy in --env."""
    if ENV.value is None:
        return "-"
    episodes = evaluate(policy.act, ENV.value, EPISODES.value, SEED.value)
    return f"{float(np.mean(episodes.returns)):.1f}"


def push(library: SkillLibrary, name: str | None = None) -> None:
    """Add the library, or one entry, to a place."""
    if not TO.value:
        raise InputError(f"--to: not given, expected {PLACE}")
    added = sharing.push(library.root, TO.value, name, private=not PUBLIC.value)
    print(_shared(added, TO.value))


def pull(library: SkillLibrary, name: str | None = None) -> None:
    """Add what a place holds, or one entry of it, to the library."""
    if not FROM.value:
        raise InputError(f"--from: not given, expected {PLACE}")
    added = sharing.pull(library.root, FROM.value, name, REVISION.value)
    print(_shared(added, str(library.root)))


def _shared(added: list[tuple[str, str]], where: str) -> str:
    if not added:
        return f"{where} has it all already"
    return "\n".join(f"added {kind} {name} to {where}" for kind, name in added)


def restore(library: SkillLibrary, name: str) -> None:
    """Bring back a skill that was retired."""
    library.restore("skill", name)
    print(f"restored skill {name}")


def _out() -> Path:
    if not OUT.value:
        raise InputError("--out: not given, expected a folder")
    return Path(OUT.value)


def _saver(
    library: SkillLibrary, name: str, out: str | None
) -> Callable[[Merged], str]:
    """What saves a merge; a name that is in use is refused before anything is done."""
    if out is None:
        if name in library.skills():
            raise InputError(f"{library.root} has a skill {name!r} already")

        def save(made: Merged) -> str:
            library.add_skill(name, made.params, made.card)
            return f"added skill {name}"

        return save
    new = SkillLibrary(out)
    if os.path.lexists(new.root / "base"):
        raise InputError(f"{out} has a base already; choose another --out")
    _, normaliser, card = library.load_base()
    kept = ("obs_dim", "action_dim", "network", "process", "diffusion", "env", "data")
    fields = {field: card[field] for field in (*kept, "actions") if field in card}

    def save_base(made: Merged) -> str:
        own = {"name": name, "merged": made.card["merged"]}
        SkillLibrary.create(out).add_base(made.params, normaliser, fields | own)
        return f"{out} is a library with the base {name}"

    return save_base


def _states() -> np.ndarray:
    """Raw observations of --data."""
    if not DATA.value:
        raise InputError("--data: not given, expected data whose states are looked at")
    return datasets.read(DATA.value)[0].obs


def _report(made: Merged) -> str:
    errors = made.errors
    rows = [("error against the exact sum", "")]
    rows += [(f"layer {layer}", f"{e:.3g}") for layer, e in errors.layers.items()]
    rows += [
        ("predictions on data", f"{errors.prediction:.3g}"),
        ("sampled actions, root mean square", f"{errors.action:.3g}"),
    ]
    return table(rows)


def _find(library: SkillLibrary, name: str) -> tuple[str, str]:
    return find_entry(library.entries(), name, str(library.root))


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
    "merge": (merge, ("NAME",)),
    "export": (export, ("NAME",)),
    "analyse": (analyse, ()),
    "prune": (prune, ()),
    "restore": (restore, ("NAME",)),
    "push": (push, ("[NAME]",)),
    "pull": (pull, ("[NAME]",)),
}


def main(argv: Sequence[str]) -> None:
    """The sub-command named by the arguments."""
    if len(argv) < 2:
        raise InputError(f"no sub-command; choose from {', '.join(sorted(COMMANDS))}")
    command, parameters = lookup(COMMANDS, argv[1], "sub-command")
    optional = sum(parameter.startswith("[") for parameter in parameters)
    if not len(parameters) - optional <= len(argv) - 2 <= len(parameters):
        usage = " ".join([argv[1], *parameters])
        raise InputError(f"got {' '.join(argv[1:])!r}, expected {usage!r}")
    # The library that something is brought into may be a new one.
    opened = SkillLibrary if command in (import_file, pull) else SkillLibrary.open
    command(opened(LIBRARY.value), *argv[2:])


if __name__ == "__main__":
    run(main)
