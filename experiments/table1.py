"""Table 1 of the paper: rewards and costs on the tasks of DSRL.

    make setup-safe
    python -m experiments.table1 --suite=bullet --tasks=OfflineBallRun-v0

trains for each task and seed what is missing: a base on the whole set, critics, a
reward skill and a safety skill in one program, gates on the best of the safe
trajectories, and the baselines; rolls every method out in the simulator; and writes to
results/dsrl/ the raw returns and costs of all episodes (table1.jsonl) and
table1_SUITE.md, .csv and .json made from them. Finished runs and results are kept:
start it again after a stop. --tables_only makes the tables again from the raw results;
with --cost_limit=5 it reports the same episodes by another limit.

The set of a task is the official file where it is there, else one that
experiments.tools.collect_safe made; the table says which.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import grid, intervals, results, tables
from experiments.configs import dsrl as config
from experiments.grid import Cell, Made, Method, Order, Setting, Table
from experiments.results import needed
from experiments.style import DOTTED, FIXED, Style
from experiments.table2 import level_changes
from psec_jax import envs
from psec_jax.cli import no_arguments
from psec_jax.data import dataset, dsrl
from psec_jax.errors import InputError, lookup
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, compose, load_base, with_critics
from psec_jax.workflows import Job, estimates
from psec_jax.workflows.demonstrations import (
    FIRST,
    Demos,
    Selection,
    Wanted,
    load_demos,
)

RUNS = "runs/dsrl"
SKILLS = ("reward", "safety")
GATED = ("safety", "reward")  # a gate starts from the first one at full strength
SUITES = {
    suite: tuple(n for n, task in dsrl.TASKS.items() if task.spec.startswith(suite))
    for suite in ("bullet", "metadrive")
}
# Multipliers of the safety and the reward skill tried for the fixed row.
GRID = (
    (0.0, 0.0),
    (16.0, 0.0),
    (12.0, 4.0),
    (8.0, 8.0),
    (4.0, 12.0),
    (16.0, 16.0),
)


@dataclass(frozen=True)
class Composition:
    """How a row composes the two skills.

    Attributes:
      level: at which they are composed.
      head: of the gate; "constant" weights are tuned on tuning episodes, the weights of
        "softmax" add up to one skill's strength in every state.
      compat: "released" is the gate of the authors' code, with its regulariser.
    """

    level: str = "parameter"
    head: str = "linear"
    compat: str = "paper"


def data_path(task: str) -> str:
    """The set of a task, which `known` has seen to."""
    return str(dsrl.find(task, offline=True).path)


def train_base(
    cell: Cell,
    name: str = "base",
    selection: Selection = FIRST,
    **request: Any,
) -> None:
    """A whole policy on the set, or on a part of it, in a library of its own."""
    library = "library" if name == "base" else f"library-{name}"
    request |= {"name": name, "data": data_path(cell.name), "selection": selection}
    grid.train(cell, "base", name, library=library, **request)


def train_skills(cell: Cell) -> None:
    """The base, critics trained alone, and both skills in one program.

    Critics want more steps than the actors that read them.
    """
    train_base(cell)
    data = data_path(cell.name)
    grid.train(cell, "critics", "critics", data=data)
    grid.train(
        cell,
        "skill",
        "skills",
        name=SKILLS,
        objectives=SKILLS,
        data=data,
        critics=functools.partial(cell.workdir, name="critics"),
    )


def make_cloned(name: str, cell: Cell) -> list[Made]:
    """Behaviour cloning on the whole set, or on its safe trajectories."""
    safe = Selection(max_cost=cell.job.cost_limit)
    library = "library" if name == "base" else f"library-{name}"
    train_base(cell, name, FIRST if name == "base" else safe)
    return grid.bases(cell, library)


# The temperatures of FISOR's released code; its clip of the safety weight, 150, is not
# followed.
RELEASED_FISOR = {"weights.reward_temperature": 3.0, "weights.safety_temperature": 5.0}


def make_fisor(name: str, changes: Mapping[str, Any], cell: Cell) -> list[Made]:
    """FISOR: a whole policy on its own objective, the best of several actions."""
    train_base(cell)
    grid.train(cell, "critics", "critics", data=data_path(cell.name))
    critics = functools.partial(cell.workdir, name="critics")
    train_base(cell, name, objective="fisor", critics=critics, changes=changes)
    return grid.composed(
        cell,
        library=f"library-{name}",
        candidates=cell.job.table.fisor_candidates,
        critics=critics,
    )


def make_judged(rule: str, candidates: int, cell: Cell) -> list[Made]:
    """The base alone, critics choosing among actions that it samples."""
    train_skills(cell)
    made = []
    for seed in cell.seeds:
        base, critics = load_base(cell.library(seed)), cell.workdir(seed, "critics")
        policy, record = with_critics(base, critics, candidates, rule), {}
        if rule == "reward_cost":
            weight, chosen = estimates.choose_cost_weight(
                cell.job,
                policy.config,
                policy.params,
                policy.params.critics or {},
                _set(cell),
                _key(seed),
            )
            record = {"chosen": chosen}
            policy = with_critics(base, critics, candidates, rule, weight)
        made.append(Made(policy.act, record))
    return made


def make_skill(skill: str, cell: Cell) -> list[Made]:
    """One skill at its training strength."""
    train_skills(cell)
    return grid.composed(cell, [skill])


def make_fixed(cell: Cell) -> list[Made]:
    """Fixed weights, tuned on the skills of each seed itself."""
    train_skills(cell)
    made = []
    for one in map(cell.of, cell.seeds):
        record = grid.tune(one, GRID, fixed, _safest(cell))
        made.append(Made(fixed(one, record["alpha"]).act, record))
    return made


def make_fixed_offline(cell: Cell) -> list[Made]:
    """Fixed weights of most estimated reward within the estimated budget of cost.

    The estimates are those that the gate of the row "PSEC select" chooses by.
    """
    chosen = _guide(dataclasses.replace(cell, method="PSEC select"), SELECT)
    made = []
    for one, card in zip(map(cell.of, cell.seeds), chosen, strict=True):
        alpha = card["fixed"]["alpha"]
        record = {"alpha": alpha, "chosen": card["fixed"]}
        made.append(Made(fixed(one, alpha).act, record))
    return made


def _set(cell: Cell) -> Demos:
    """The whole set of a task, from which estimates are made."""
    wanted = Wanted(costs=True, rewards=True)
    return load_demos(
        cell.job.data, cell.setting.env, 0, data_path(cell.name), wanted=wanted
    )


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed)


def fixed(cell: Cell, weights: Sequence[float]) -> Policy:
    """Both skills with fixed weights."""
    return compose(cell.library(cell.seed), GATED, alpha=weights)


def _safest(cell: Cell) -> Any:
    """The highest return among safe weights, else the least cost."""

    def value(raw: results.Raw) -> tuple[float, float]:
        over = max(0.0, float(np.mean(raw["costs"])) - cell.job.cost_limit)
        return -over, float(np.mean(raw["returns"]))

    return value


def train_gate(cell: Cell, changes: Mapping[str, Any], **request: Any) -> str:
    """The gate of a row, over the skills of `train_skills`; returns its name."""
    name = _gate_name(cell)
    request |= {"env": cell.setting.env, "data": data_path(cell.name)}
    grid.train(cell, "gate", cell.method, changes=changes, name=name, **request)
    return name


def _gate_name(cell: Cell) -> str:
    return cell.method.replace(" ", "-")


def make_composition(form: Composition, cell: Cell) -> list[Made]:
    """The skills and the gate of a row."""
    train_skills(cell)
    changes = level_changes(cell.job, form.level)
    changes |= {"gate.compat": form.compat, "gate.head": form.head}
    skills, alpha = GATED, None
    if (
        form.compat == "released"
    ):  # its regulariser reads the last skill as the safe one
        skills, alpha = SKILLS, [0.0, cell.job.skill.alpha]
    best = Selection.best_of_safe(cell.job)
    gate = train_gate(cell, changes, skills=skills, alpha=alpha, selection=best)
    return grid.composed(cell, gate=gate)


# How critics choose among weights; they know what keeping each of them is worth.
SELECT = {"gate.head": "select", "gate.q_of": "own", "gate.budget_share": 0.3}


def make_guided(changes: Mapping[str, Any], cell: Cell) -> list[Made]:
    """The skills and a gate that critics guide; it learns from the whole set."""
    return [
        Made(compose(cell.library(seed), gate=_gate_name(cell)).act, {"chosen": chosen})
        for seed, chosen in zip(cell.seeds, _guide(cell, changes), strict=True)
    ]


def _guide(cell: Cell, changes: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Makes the gate of a row that critics guide; what was chosen, of each seed."""
    train_skills(cell)
    budget = dataclasses.asdict(cell.job.table.guided)
    changes = {**{f"gate.{name}": value for name, value in budget.items()}, **changes}
    critics = functools.partial(cell.workdir, name="critics")
    gate = train_gate(cell, changes, skills=GATED, critics=critics)
    libraries = [SkillLibrary.open(cell.library(seed)) for seed in cell.seeds]
    return [library.card("gate", gate)["chosen"] for library in libraries]


def make_supported(cell: Cell) -> list[Made]:
    """The reward skill where its safe demonstrations reach, else the safety skill."""
    train_skills(cell)
    strength, data = cell.job.skill.alpha, data_path(cell.name)
    changes = {
        "gate.head": "constant",
        "gate.support": "neighbour",
        "gate.fallback": "safety",
        "support.safe": True,
    }
    weights, paths = [strength, strength], [data, data]
    gate = train_gate(cell, changes, skills=SKILLS, alpha=weights, support_data=paths)
    return grid.composed(cell, gate=gate)


BASE = {"base": "base"}
CRITICS = BASE | {"critics": "critics"}
SKILL = CRITICS | {"skill": "skill"}
GATE = SKILL | {"gate": "gate"}
CLONED = SKILL | {"gate": "table.cloning"}
GUIDED = SKILL | {"gate": "table.guided"}


def composition(style: Style, **fields: Any) -> Method:
    """A row that composes the skills; fields of `Composition`."""
    form = Composition(**fields)
    stages_of = GATE if form.level == "parameter" else CLONED
    return Method(functools.partial(make_composition, form), stages_of, style)


def guided(
    style: Style, stages: Mapping[str, str], changes: Mapping[str, Any]
) -> Method:
    """A row of a gate that critics guide, with changes of the job."""
    return Method(functools.partial(make_guided, changes), stages, style)


def judged(style: Style, rule: str, candidates: int) -> Method:
    """A row of the base's actions, of which critics choose one."""
    return Method(functools.partial(make_judged, rule, candidates), CRITICS, style)


def skill_row(skill: str, style: Style) -> Method:
    """A row of one skill alone."""
    return Method(functools.partial(make_skill, skill), SKILL, style)


def fisor(name: str, style: Style, changes: Mapping[str, Any] = {}) -> Method:
    """A row of FISOR, with changes of the job."""
    return Method(functools.partial(make_fisor, name, changes), CRITICS, style)


def cloned(name: str, style: Style) -> Method:
    """A row of behaviour cloning."""
    return Method(functools.partial(make_cloned, name), BASE, style)


METHODS = {
    "BC": cloned("base", Style("black", "<")),
    "BC-Safe": cloned("bc-safe", Style("dark", "<")),
    "FISOR": fisor("fisor", Style("purple", "P")),
    "FISOR released": fisor("fisor-released", Style("purple", "X"), RELEASED_FISOR),
    "Reward skill": skill_row("reward", Style("vermilion", "D")),
    "Safety skill": skill_row("safety", Style("green", "D")),
    "ASEC": composition(Style("orange", "v"), level="action"),
    "NSEC": composition(Style("sky", "^"), level="noise"),
    "PSEC fixed": Method(make_fixed, SKILL, Style("blue", "o", FIXED)),
    "PSEC": composition(Style("blue", "o")),
    "PSEC softmax": composition(Style("blue", "o", DOTTED), head="softmax"),
    "PSEC released": composition(Style("light", "X"), compat="released"),
    "PSEC select": guided(Style("blue", "s"), SKILL, SELECT),
    "PSEC select data": guided(Style("light", "s"), SKILL, {"gate.head": "select"}),
    "PSEC distilled": guided(
        Style("blue", "s", DOTTED),
        GUIDED,
        {"gate.head": "sigmoid", "gate.loss": "critic"},
    ),
    "PSEC imitated": guided(
        Style("sky", "s", DOTTED),
        GUIDED,
        {"gate.head": "sigmoid", "gate.loss": "selected", "gate.q_of": "own"},
    ),
    "PSEC fixed offline": Method(make_fixed_offline, SKILL, Style("sky", "o", FIXED)),
    "Support or safety": Method(make_supported, SKILL, Style("green", "D", DOTTED)),
    "BC by Q_h": judged(Style("dark", "P"), "safety", 16),
    "BC by Q_c": judged(Style("dark", "X"), "cost", 16),
    "BC by Q and Q_c": judged(Style("dark", "s"), "reward_cost", 24),
}


def known(
    job: Job, task: str, setting: Setting, offline: bool = True
) -> dict[str, Any]:
    """Limit and data of a task, when all that its cells need is there.

    Raises:
      InputError: no simulator, no set, or no trajectory in it that a gate can learn
        from.
    """
    envs.make(setting.env).close()
    path = dsrl.find(task, offline).path
    best = Selection.best_of_safe(job)
    load_demos(
        job.data,
        setting.env,
        0,
        str(path),
        best,
        wanted=Wanted(costs=True, rewards=True),
    )
    return {
        "cost_limit": job.cost_limit,
        "data": "made" if path.name == dsrl.made_name(task) else "official",
        "data_fingerprint": dataset.fingerprint(
            dsrl.load(str(path), clip_actions=True)[0]
        ),
    }


def score(raw: results.Raw) -> dict[str, Any]:
    """Normalised reward and cost of each episode."""
    cost = dsrl.normalised_cost(
        np.array(needed(raw, "costs")), needed(raw, "cost_limit")
    )
    reward = dsrl.normalised_return(raw["setting"], np.array(needed(raw, "returns")))
    return {"reward": reward, "cost": cost}


def is_safe(entry: Mapping[str, Any]) -> bool:
    """Whether the whole interval of the normalised cost is below 1."""
    return entry["cost"]["high"] < 1


def show_reward(entries: Mapping[str, Any], method: str) -> str:
    """Safe results are bold, the safe one of highest reward has a star."""
    safe = [name for name, entry in entries.items() if is_safe(entry)]
    text = tables.spread(entries[method]["reward"], 2)
    if method in safe:
        text = f"**{text}**"
    best = max(safe, key=lambda name: entries[name]["reward"]["mean"], default=None)
    return text + (" *" if method == best else "") + entries[method]["mark"]


def show_cost(entries: Mapping[str, Any], method: str) -> str:
    """Normalised cost with its interval."""
    return tables.spread(entries[method]["cost"], 2)


TABLE = Table(
    name="table1",
    settings={
        name: Setting(dsrl.task(name).spec, folder=name)
        for names in SUITES.values()
        for name in names
    },
    methods=METHODS,
    score=score,
    columns={"reward": show_reward, "cost": show_cost},
    orders=[
        *(
            Order("PSEC", other, "reward")
            for other in ("FISOR", "BC-Safe", "PSEC fixed")
        ),
        *(Order(other, "PSEC", "cost") for other in ("BC", "ASEC", "NSEC")),
        Order("PSEC", "PSEC fixed", "cost"),
        *(
            Order("PSEC select", other, "reward")
            for other in ("FISOR", "BC-Safe", "PSEC fixed offline")
        ),
        Order("PSEC", "PSEC select", "cost"),
    ],
    paper=grid.paper("table1"),
    identity=("config_fingerprint", "data_fingerprint", "data", "cost_limit"),
    known=known,
)


def over_tasks(summary: Mapping[str, Any], scores: tables.Scores) -> dict[str, Any]:
    """{method: entry} over the tasks, of methods measured on all of them."""
    rows: dict[str, Any] = {}
    for method in set.intersection(*(set(cells) for cells in scores.values())):
        entries = [cells[method] for cells in summary.values()]
        rows[method] = {key: entries[0][key] for key in ("seeds", "episodes")}
        rows[method]["mark"] = "".join(sorted({m for e in entries for m in e["mark"]}))
        for metric in ("reward", "cost"):
            groups = [tables.matrix(c[method], metric) for c in scores.values()]
            low, high = intervals.interval_of_mean(groups)
            rows[method][metric] = {
                "mean": float(np.mean([entry[metric]["mean"] for entry in entries])),
                "low": low,
                "high": high,
                "iqm": float(np.mean([entry[metric]["iqm"] for entry in entries])),
            }
    return {method: rows[method] for method in METHODS if method in rows}


def shown(folder: Path, suite: str, limit: float | None = None) -> tables.Shown:
    """The table of a suite's raw results in a folder; arguments of `write_table`."""
    raws = results.read_all(TABLE.path(folder))
    raws = [raw for raw in raws if raw["setting"] in SUITES[suite]]
    if not raws:
        raise InputError(f"{folder}: no raw results of the suite {suite}")
    name = f"table1_{suite}"
    limits = ", ".join(
        f"{x:g}" for x in sorted({needed(raw, "cost_limit") for raw in raws})
    )
    if limit is not None:
        raws = [{**raw, "cost_limit": limit} for raw in raws]
        name = f"{name}_limit{limit:g}"
        limits = (
            f"{limit:g}, by which costs are reported; all was learned with {limits}"
        )
    table, summary = TABLE, tables.summarise(TABLE, raws)
    if len(summary) > 1:
        reported = [TABLE.paper[task] for task in summary]
        mean = {m: np.mean([row[m] for row in reported], axis=0) for m in reported[0]}
        table = dataclasses.replace(TABLE, paper={**TABLE.paper, "mean": mean})
        summary["mean"] = over_tasks(summary, tables.collect(TABLE, raws))
    sources = sorted({needed(raw, "data") for raw in raws})
    note = (
        f"Normalised reward and cost. {tables.INTERVALS}; safe (the whole interval of "
        "the cost below 1) bold, * the safe one of highest reward; the paper's reward "
        "/ cost. Cost limit "
        f"{limits}. Data: {' and '.join(sources)}.{tables.untried(raws)}"
    )
    return tables.Shown(table, raws, note, summary, name, digits=2)


def write_table(folder: Path, suite: str, limit: float | None = None) -> str:
    """table1_SUITE.md, .csv and .json from the raw results alone.

    With a `limit` costs are reported by it, not by the one that was learned with, and
    the files are table1_SUITE_limitX.
    """
    return tables.write(shown(folder, suite, limit), folder)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write the tables."""
    no_arguments(argv)
    suite, folder = FLAGS["suite"].value, Path(FLAGS["results"].value)
    names = lookup(SUITES, suite, "suite")
    limit = FLAGS["cost_limit"].value
    job, root = config.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    if limit is not None and not FLAGS["tables_only"].value:
        job = job.changed({"cost_limit": limit})
        dsrl.normalised_cost(np.zeros(1), limit)  # refuses a bad one
        limit = None  # the results have it
    what = f"task of the suite {suite}"
    chosen = grid.known_names(FLAGS["tasks"].value, dict.fromkeys(names), what)
    offline = functools.partial(known, offline=FLAGS["offline"].value)
    table = dataclasses.replace(TABLE, known=offline)
    if grid.measure(FLAGS, table, job, root, folder, settings=chosen or names):
        print(write_table(folder, suite, limit))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/dsrl", RUNS) | {
        "suite": flags.DEFINE_string("suite", "bullet", "bullet or metadrive."),
        "tasks": flags.DEFINE_list("tasks", [], "Tasks; default all of the suite."),
        "cost_limit": flags.DEFINE_float(
            "cost_limit",
            None,
            "Costs up to here are safe; default 10. With --tables_only only the "
            "reported costs change, in files table1_SUITE_limitX.",
        ),
        "offline": flags.DEFINE_bool("offline", False, "Never download a set."),
    }
    run(main)
