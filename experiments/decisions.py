"""Three new tasks for `launch.expand --auto`, of which two need no new skill.

    make demo
    python -m experiments.decisions --library=runs/demo/seed0/library

Decides, for the walker's library of stand, walk and run, on demonstrations of other
start states than the skills': of walk, which a skill knows; of walk and run in turn,
which a gate over both knows; and of run by the skill walk alone. Nothing is added to
the library. The decisions are written to results/auto/decisions.json, and as a table to
decisions.md beside it; trials are kept in --workdir.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import results
from experiments.configs import dmc_walker
from experiments.table2 import ENV
from psec_jax.cli import no_arguments
from psec_jax.data import d4rl, dataset
from psec_jax.files import make_room, read_json, write_atomic, write_json
from psec_jax.workflows import auto
from psec_jax.workflows.collection import collect

EPISODES, SEED = 10, 7
# What the demonstrations show, one episode after the other, and the skills at hand.
TASKS = {
    "walk": (("walk",), ("walk", "run")),
    "walk and run in turn": (("walk", "run"), ("walk", "run")),
    "run, by walk alone": (("run",), ("walk",)),
}


def demonstrations(shown: Sequence[str], folder: Path) -> str:
    """A file of `EPISODES` episodes of these tasks in turn."""
    paths = [collect(ENV.format(t), "expert", EPISODES, SEED) for t in shown]
    sets = [d4rl.load(path)[0] for path in paths]
    each = EPISODES // len(sets)
    parts = [dataset.take(sets[i], [e]) for e in range(each) for i in range(len(sets))]
    path = folder / f"{'-'.join(shown)}.hdf5"
    size = sets[0].action.shape[1]
    box = {"action_low": -np.ones(size), "action_high": np.ones(size)}
    return str(d4rl.save(path, dataset.concatenate(parts), box))


def decide(preset: str, library: str, workdir: Path) -> dict[str, Any]:
    """The decision on each task, and what it was made with."""
    job = dmc_walker.job(preset)
    made = results.header(job, "decisions", "auto", 0, {"base": "base"})
    tasks = {}
    for i, (name, (shown, skills)) in enumerate(TASKS.items()):
        request = auto.Request(
            workdir=workdir / str(i),
            library=library,
            name="new",
            data=demonstrations(shown, workdir),
            skills=skills,
            evaluate=False,
        )
        tasks[name] = auto.decide(job, request)
        print(f"{name}\n{auto.table_of(tasks[name])}\n")
    return made | {"tasks": tasks}


def markdown(tasks: Mapping[str, Any]) -> str:
    """One table of all candidates of all tasks; the chosen ones are bold."""
    lines = [
        "| demonstrations | candidate | loss | coverage | new numbers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, decision in tasks.items():
        for row in decision["candidates"]:
            text = auto.describe(row)
            chosen = f"**{text}**" if row == decision["chosen"] else text
            known = "-" if row["coverage"] is None else f"{row['coverage']:.2f}"
            lines.append(
                f"| {name} | {chosen} | {row['loss']:.3f} | {known} | "
                f"{row['added']:,} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Decide what is missing, then write the table."""
    no_arguments(argv)
    path = Path(FLAGS["results"].value) / "decisions.json"
    if not FLAGS["tables_only"].value:
        made = decide(
            FLAGS["preset"].value, FLAGS["library"].value, Path(FLAGS["workdir"].value)
        )
        make_room(path)
        write_json(path, made)
    text = markdown(read_json(path)["tasks"])
    write_atomic(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = {
        "preset": flags.DEFINE_string("preset", "quick", "quick, standard or paper."),
        "library": flags.DEFINE_string(
            "library", "runs/demo/seed0/library", "The walker's library."
        ),
        "workdir": flags.DEFINE_string("workdir", "runs/decisions", "Folder of runs."),
        "results": flags.DEFINE_string("results", "results/auto", "Folder of results."),
        "tables_only": flags.DEFINE_bool(
            "tables_only", False, "Only make the table again."
        ),
    }
    run(main)
