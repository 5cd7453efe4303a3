"""Table 2 of the paper: S->W, S->R and S+W->R on DeepMind Control walker.

    python -m experiments.table2 --preset=standard

trains what is missing (a base, LoRA and MLP skills, scratch policies and gates for each
seed), rolls every method out, and writes to results/dmc_walker/ the raw returns of all
episodes (table2.jsonl) and table2.md, .csv and .json made from them. Finished runs and
results are kept: start it again after a stop. --tables_only makes the tables again from
the raw results.

Expected: quick minutes, standard an hour a seed on one CPU core, paper a day of a
GPU. --plan measures how long each part will take on this machine, and --minutes=50
stops after that time; the same command goes on.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import grid, results, tables
from experiments.configs import dmc_walker
from experiments.grid import Cell, Made, Method, Order, Table
from experiments.style import DOTTED, FIXED, Style
from psec_jax.cli import no_arguments
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, compose
from psec_jax.workflows import Job

ENV = "dm_control:walker-{}"
RUNS = "runs/dmc_walker"
FALL = 150.0  # an episode of the walker below this return was spent on the ground


@dataclass(frozen=True)
class Setting(grid.Setting):
    """A target task and the skills that a method may use, by priority."""

    task: str = ""
    skills: tuple[str, ...] = ()


def target(task: str, *skills: str, **fields: Any) -> Setting:
    """A setting of the walker."""
    return Setting(ENV.format(task), task=task, skills=skills, **fields)


SETTINGS = {
    "S->W": target("walk", "walk"),
    "S->R": target("run", "run"),
    "S+W->R": target("run", "run", "walk"),
}

# Weights tried for the fixed rows, in the order of the gate's weights: at the parameter
# level a multiplier for each skill, at the others the base's share and each skill's.
GRIDS = {
    ("parameter", 1): ((0.0,), (8.0,), (12.0,), (16.0,), (20.0,)),
    ("parameter", 2): (
        (0.0, 0.0),
        (12.0, 4.0),
        (16.0, 4.0),
        (8.0, 8.0),
        (4.0, 12.0),
        (16.0, 16.0),
    ),
    ("shares", 1): ((1.0, 0.0), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)),
    ("shares", 2): (
        (1.0, 0.0, 0.0),
        (0.5, 0.25, 0.25),
        (0.0, 0.5, 0.5),
        (0.25, 0.75, 0.0),
        (0.0, 1.0, 0.0),
    ),
}


@dataclass(frozen=True)
class Composition:
    """How a row composes skills.

    Attributes:
      level: at which the skills are composed.
      head: of the gate; "constant" weights are tuned by returns on tuning episodes,
        or left at the skills' strengths where `tuned` is False.
      support: of the gate.
      adapter: of the skills.
      tuned: see `head`.
      sampling: where it differs from the base's, see `policy.compose`.
    """

    level: str = "parameter"
    head: str = "linear"
    support: str = "none"
    adapter: str = "lora"
    tuned: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


def train_base(cell: Cell) -> None:
    """The base, which runs on another budget of skills share by a copy."""
    table = dataclasses.replace(cell, variant="")
    grid.train(table, "base", "base", name="stand")
    for seed in cell.seeds if cell.variant else ():
        base = SkillLibrary.open(table.library(seed)).load_base()
        SkillLibrary.create(cell.library(seed)).add_base(*base, overwrite=True)


def make_base(cell: Cell) -> list[Made]:
    """The base: the stand policy."""
    train_base(cell)
    return grid.bases(cell)


def make_scratch(cell: Cell) -> list[Made]:
    """A whole policy on the target's demonstrations alone, on a skill's budget."""
    name, env = f"scratch-{cell.setting.task}", cell.setting.env
    grid.train(cell, "base", name, library=name, name=name, section="skill", env=env)
    return grid.bases(cell, name)


def train_skill(cell: Cell, task: str, adapter: str = "lora") -> str:
    """The base and one skill; returns the skill's name in the library."""
    name = task if adapter == "lora" else f"{task}-{adapter}"
    train_base(cell)
    changes = {"skill.adapter": adapter}
    grid.train(cell, "skill", name, name=name, env=ENV.format(task), changes=changes)
    return name


def make_composition(form: Composition, cell: Cell) -> list[Made]:
    """The skills and the gate of a row."""
    skills = [train_skill(cell, task, form.adapter) for task in cell.setting.skills]
    record: dict[str, Any] = {}
    if form.tuned:  # once, with the skills of seed 0
        record = tuned_weights(form, cell.of(0))
    elif form.head == "constant":
        record = {"alpha": [cell.job.skill.alpha] * len(skills)}
    changes = level_changes(cell.job, form.level)
    changes |= {"gate.head": form.head, "gate.support": form.support}
    gate = gate_name(cell.method, cell.setting.same or cell.name)
    grid.train(
        cell,
        "gate",
        gate,
        changes=changes,
        name=gate,
        skills=skills,
        env=cell.setting.env,
        alpha=record.get("alpha"),
    )
    return grid.composed(cell, record=record, gate=gate, sampling=form.sampling)


def tuned_weights(form: Composition, cell: Cell) -> dict[str, Any]:
    """The weights of highest mean return on tuning episodes, as `grid.tune` gives."""
    skills = [train_skill(cell, task, form.adapter) for task in cell.setting.skills]
    kind = "parameter" if form.level == "parameter" else "shares"

    def fixed(cell: Cell, weights: Sequence[float]) -> Policy:
        library = cell.library(cell.seed)
        return compose(library, skills, alpha=weights, level=form.level)

    weights = GRIDS[kind, len(skills)]
    return grid.tune(cell, weights, fixed, lambda raw: raw["mean"], shared=True)


def level_changes(job: Job, level: str) -> dict[str, Any]:
    """What a gate at this level changes of a job: above the parameter level it is
    cloned through the sampler, by a budget of its own."""
    changes = {"gate.level": level}
    if level != "parameter":
        budget = dataclasses.asdict(job.table.cloning)
        changes |= {f"gate.{name}": value for name, value in budget.items()}
    return changes


def gate_name(method: str, setting: str) -> str:
    """Name of a gate in the library, such as PSEC-support_S-W-R."""
    return "_".join(
        re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-") for part in (method, setting)
    )


BASE = {"base": "base"}
SKILL = BASE | {"skill": "skill"}
GATE = SKILL | {"gate": "gate"}
CLONED = SKILL | {"gate": "table.cloning"}


def composition(style: Style, **fields: Any) -> Method:
    """A row that composes skills; fields of `Composition`."""
    form = Composition(**fields)
    stages = GATE if form.level == "parameter" else CLONED
    if form.head == "constant":
        stages = SKILL
    return Method(functools.partial(make_composition, form), stages, style)


TUNED = {"head": "constant", "tuned": True}
METHODS = {
    "Base": Method(make_base, BASE, Style("light", "X")),
    "Scratch": Method(make_scratch, {"skill": "skill"}, Style("dark", "s")),
    "ASEC": composition(Style("orange", "v"), level="action"),
    "NSEC": composition(Style("sky", "^"), level="noise"),
    "PSEC (MLP)": composition(Style("purple", "P"), adapter="mlp"),
    "PSEC": composition(Style("blue", "o")),
    "ASEC fixed": composition(Style("orange", "v", FIXED), level="action", **TUNED),
    "NSEC fixed": composition(Style("sky", "^", FIXED), level="noise", **TUNED),
    "PSEC fixed": composition(Style("blue", "o", FIXED), **TUNED),
    "Support": composition(Style("green", "D"), head="constant", support="neighbour"),
    "Support (learned)": composition(
        Style("green", "D", DOTTED), head="constant", support="learned"
    ),
    "PSEC + support": composition(Style("vermilion", "p"), support="neighbour"),
}


def score(raw: results.Raw) -> dict[str, Any]:
    """Return of each episode, and whether it was a fall."""
    returns = results.needed(raw, "returns")
    return {"return": returns, "falls": [value < FALL for value in returns]}


TABLE = Table(
    name="table2",
    settings=SETTINGS,
    methods=METHODS,
    score=score,
    columns={
        "mean": tables.number("return"),
        "IQM": tables.middle("return"),
        "falls": tables.share("falls"),
    },
    orders=[
        Order(above, below, "return")
        for above, below in (
            ("PSEC", "NSEC"),
            ("PSEC", "ASEC"),
            ("NSEC", "ASEC"),
            ("PSEC", "Scratch"),
            ("PSEC", "PSEC (MLP)"),
            ("PSEC", "PSEC fixed"),
            ("NSEC", "NSEC fixed"),
            ("ASEC", "ASEC fixed"),
            ("PSEC", "Base"),
            ("Support", "Base"),
            ("Support", "PSEC"),
            ("PSEC + support", "PSEC"),
            ("PSEC + support", "Support"),
        )
    ],
    paper=grid.paper("table2"),
)


def shown(folder: Path) -> tables.Shown:
    """The table of the raw results of a folder."""
    raws = results.read_all(TABLE.path(folder))
    note = (
        f"{tables.INTERVALS}; IQM: interquartile mean; falls: episodes below "
        f"{FALL:.0f}. 10 demonstrations a skill. Paper: 5 seeds, 10 episodes. Rows "
        f"Base, fixed and Support: see docs/methods.md.{tables.untried(raws)}"
    )
    return tables.Shown(TABLE, raws, note, tables.summarise(TABLE, raws), TABLE.name)


def write_table(folder: Path) -> str:
    """table2.md, .csv and .json from the raw results alone."""
    return tables.write(shown(folder), folder)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write the tables."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    job, root = dmc_walker.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    methods = job.table.methods
    if grid.measure(FLAGS, TABLE, job, root, folder, methods=methods):
        print(write_table(folder))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/dmc_walker", RUNS)
    run(main)
