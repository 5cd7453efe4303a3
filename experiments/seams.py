"""The seams at work: networks, processes and chunks on DeepMind Control walker.

    python -m experiments.seams --preset=quick

trains with each choice a base that stands and a skill that walks, from the same
demonstrations and on the same budget, and rolls them out: the base in its own task, the
skill at its training strength in walk. Raw results are in results/seams/seams.jsonl;
the table is made from those alone (--tables_only).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import grid, results, tables
from experiments.configs import dmc_walker
from experiments.grid import Cell, Made, Method, Setting, Table
from experiments.style import Style
from experiments.table2 import BASE, ENV, SKILL, make_base, score, train_skill
from psec_jax.cli import no_arguments

RUNS = "runs/seams"
CHOICES: dict[str, dict[str, Any]] = {
    "mlp, ddpm": {},
    "transformer, ddpm": {"network.kind": "transformer", "network.width": 128},
    "mlp, flow (euler)": {"process.kind": "flow", "process.sampler": "euler"},
    "mlp, ddpm, chunks of 4, 2 executed": {"process.horizon": 4, "process.execute": 2},
}


def make_skill(cell: Cell) -> list[Made]:
    """The walk skill alone."""
    name = train_skill(cell, "walk")
    return grid.composed(cell, [name])


METHODS = {
    "Base": Method(make_base, BASE, Style("light", "X")),
    "Skill": Method(make_skill, SKILL, Style("blue", "o")),
}
TABLE = Table(
    name="seams",
    settings={
        f"{choice}: {task}": Setting(
            ENV.format(task),
            changes=changes,
            methods=(method,),
            folder="".join(c if c.isalnum() else "-" for c in choice),
        )
        for choice, changes in CHOICES.items()
        for task, method in (("stand", "Base"), ("walk", "Skill"))
    },
    methods=METHODS,
    score=score,
    columns={"mean": tables.number("return"), "falls": tables.share("falls")},
)


def shown(folder: Path) -> tables.Shown:
    """The table of the raw results of a folder."""
    raws = results.read_all(TABLE.path(folder))
    note = f"{tables.INTERVALS}; falls: episodes below 150. 10 demonstrations a skill."
    return tables.Shown(TABLE, raws, note, tables.summarise(TABLE, raws), TABLE.name)


def write_table(folder: Path) -> str:
    """seams.md, .csv and .json from the raw results alone."""
    return tables.write(shown(folder), folder)


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write the table."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    job, root = dmc_walker.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    if grid.measure(FLAGS, TABLE, job, root, folder):
        print(write_table(folder))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/seams", RUNS)
    run(main)
