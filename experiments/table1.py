"""Table 1 of the paper: rewards and costs on the tasks of DSRL.

    make setup-safe
    python -m experiments.table1 --suite=bullet --tasks=OfflineBallRun-v0

trains for each task and seed what is missing: a base on the whole set, critics, a
reward skill and a safety skill in one program, gates on the best of the safe
trajectories, and the baselines; rolls every method out in the simulator; and writes to
results/dsrl/ the raw returns and costs of all episodes (raw/*.json) and
table1_SUITE.md, .csv and .json made from them. Finished runs and cells are kept: start
it again after a stop. --tables_only makes the tables again from the raw files; with
--cost_limit=5 it tells the same episodes by another limit.

The set of a task is the official file where it is there, else one that
experiments.tools.collect_safe made; the table says which.
"""

import csv
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import results, stages
from experiments.configs.dsrl import get_config
from experiments.table2 import Place, changed, level_changes, table_seeds
from psec_jax import envs
from psec_jax.cli import no_arguments, run
from psec_jax.data import dataset, dsrl
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import evaluate
from psec_jax.files import write_atomic, write_json
from psec_jax.policy import Policy, load_base
from psec_jax.policy import compose as load_composition
from psec_jax.workflows.demonstrations import FIRST, Selection, load_demos

SKILLS = ("reward", "safety")
GATED = ("safety", "reward")  # a gate starts from the first one at full strength
SUITES = {
    suite: tuple(n for n, task in dsrl.TASKS.items() if task.spec.startswith(suite))
    for suite in ("bullet", "metadrive")
}


@dataclass(frozen=True)
class Composition:
    """One row that composes the two skills.

    Attributes:
      level: at which they are composed.
      head: of the gate; "constant" weights are tuned on tuning episodes, those of
        "softmax" add up to one skill's strength in every state.
      compat: "released" is the gate of the authors' code, with its regulariser.
    """

    level: str = "parameter"
    head: str = "linear"
    compat: str = "paper"


COMPOSITIONS = {
    "ASEC": Composition("action"),
    "NSEC": Composition("noise"),
    "PSEC fixed": Composition(head="constant"),
    "PSEC": Composition(),
    "PSEC softmax": Composition(head="softmax"),
    "PSEC released": Composition(compat="released"),
}
METHODS = ("BC", "BC-Safe", "FISOR", "Reward skill", "Safety skill", *COMPOSITIONS)
PAPER_ONLY = ("CDT", "CPQ", "COptiDICE")  # other baselines, not run here
COLUMNS = (*METHODS[:2], *PAPER_ONLY, *METHODS[2:])
# Multipliers of the safety and the reward skill tried for the fixed row.
GRID = ((16.0, 0.0), (12.0, 4.0), (8.0, 8.0), (4.0, 12.0), (16.0, 16.0))

# Normalised reward and cost in the paper.
PAPER = {
    "OfflineMetadrive-easysparse-v0": {
        "BC": (0.32, 4.73),
        "CDT": (0.05, 0.1),
        "CPQ": (-0.06, 0.24),
        "COptiDICE": (0.94, 18.21),
        "FISOR": (0.38, 0.53),
        "ASEC": (0.95, 5.8),
        "NSEC": (0.55, 0.08),
        "PSEC": (0.55, 0.02),
    },
    "OfflineMetadrive-easymean-v0": {
        "BC": (0.22, 2.68),
        "CDT": (0.27, 0.24),
        "CPQ": (-0.06, 0.24),
        "COptiDICE": (0.74, 14.81),
        "FISOR": (0.38, 0.25),
        "ASEC": (0.63, 0.75),
        "NSEC": (0.39, 0.54),
        "PSEC": (0.37, 0.0),
    },
    "OfflineMetadrive-easydense-v0": {
        "BC": (0.2, 1.7),
        "CDT": (0.43, 2.31),
        "CPQ": (-0.06, 0.29),
        "COptiDICE": (0.6, 11.27),
        "FISOR": (0.36, 0.25),
        "ASEC": (0.85, 5.28),
        "NSEC": (0.76, 1.45),
        "PSEC": (0.51, 0.01),
    },
    "OfflineMetadrive-mediumsparse-v0": {
        "BC": (0.53, 1.74),
        "CDT": (0.26, 2.2),
        "CPQ": (-0.08, 0.18),
        "COptiDICE": (0.64, 7.26),
        "FISOR": (0.42, 0.22),
        "ASEC": (0.93, 2.52),
        "NSEC": (0.6, 0.08),
        "PSEC": (0.76, 0.03),
    },
    "OfflineMetadrive-mediummean-v0": {
        "BC": (0.66, 2.94),
        "CDT": (0.28, 2.13),
        "CPQ": (-0.08, 0.28),
        "COptiDICE": (0.73, 8.35),
        "FISOR": (0.39, 0.08),
        "ASEC": (0.74, 1.0),
        "NSEC": (0.82, 2.87),
        "PSEC": (0.61, 0.01),
    },
    "OfflineMetadrive-mediumdense-v0": {
        "BC": (0.65, 3.79),
        "CDT": (0.29, 0.77),
        "CPQ": (-0.08, 0.2),
        "COptiDICE": (0.91, 9.52),
        "FISOR": (0.49, 0.44),
        "ASEC": (0.81, 0.52),
        "NSEC": (0.76, 0.27),
        "PSEC": (0.66, 0.02),
    },
    "OfflineMetadrive-hardsparse-v0": {
        "BC": (0.28, 1.98),
        "CDT": (0.17, 0.47),
        "CPQ": (-0.04, 0.28),
        "COptiDICE": (0.34, 7.34),
        "FISOR": (0.3, 0.01),
        "ASEC": (0.3, 0.41),
        "NSEC": (0.34, 1.21),
        "PSEC": (0.34, 0.04),
    },
    "OfflineMetadrive-hardmean-v0": {
        "BC": (0.34, 3.76),
        "CDT": (0.28, 3.32),
        "CPQ": (-0.05, 0.24),
        "COptiDICE": (0.36, 7.51),
        "FISOR": (0.26, 0.09),
        "ASEC": (0.46, 1.05),
        "NSEC": (0.38, 0.32),
        "PSEC": (0.39, 0.07),
    },
    "OfflineMetadrive-harddense-v0": {
        "BC": (0.4, 5.57),
        "CDT": (0.24, 1.49),
        "CPQ": (-0.04, 0.24),
        "COptiDICE": (0.42, 8.11),
        "FISOR": (0.3, 0.34),
        "ASEC": (0.36, 0.82),
        "NSEC": (0.19, 0.03),
        "PSEC": (0.34, 0.07),
    },
    "OfflineAntRun-v0": {
        "BC": (0.73, 11.73),
        "CDT": (0.7, 1.88),
        "CPQ": (0.0, 0.0),
        "COptiDICE": (0.62, 3.64),
        "FISOR": (0.45, 0.03),
        "ASEC": (0.74, 4.97),
        "NSEC": (0.79, 6.81),
        "PSEC": (0.59, 0.33),
    },
    "OfflineBallRun-v0": {
        "BC": (0.67, 11.38),
        "CDT": (0.32, 0.45),
        "CPQ": (0.85, 13.67),
        "COptiDICE": (0.55, 11.32),
        "FISOR": (0.18, 0.0),
        "ASEC": (0.35, 4.35),
        "NSEC": (0.58, 7.46),
        "PSEC": (0.15, 0.95),
    },
    "OfflineCarRun-v0": {
        "BC": (0.96, 1.88),
        "CDT": (0.99, 1.1),
        "CPQ": (1.06, 10.49),
        "COptiDICE": (0.92, 0.0),
        "FISOR": (0.73, 0.14),
        "ASEC": (0.93, 0.39),
        "NSEC": (0.93, 0.66),
        "PSEC": (0.83, 0.0),
    },
    "OfflineDroneRun-v0": {
        "BC": (0.55, 5.21),
        "CDT": (0.58, 0.3),
        "CPQ": (0.02, 7.95),
        "COptiDICE": (0.72, 13.77),
        "FISOR": (0.3, 0.55),
        "ASEC": (0.57, 2.29),
        "NSEC": (0.62, 7.3),
        "PSEC": (0.47, 0.87),
    },
    "OfflineAntCircle-v0": {
        "BC": (0.65, 19.45),
        "CDT": (0.48, 7.44),
        "CPQ": (0.0, 0.0),
        "COptiDICE": (0.18, 13.41),
        "FISOR": (0.2, 0.0),
        "ASEC": (0.46, 5.55),
        "NSEC": (0.36, 2.08),
        "PSEC": (0.2, 0.0),
    },
    "OfflineBallCircle-v0": {
        "BC": (0.72, 10.02),
        "CDT": (0.68, 2.1),
        "CPQ": (0.4, 4.37),
        "COptiDICE": (0.7, 9.06),
        "FISOR": (0.34, 0.0),
        "ASEC": (0.54, 1.58),
        "NSEC": (0.58, 2.08),
        "PSEC": (0.34, 0.22),
    },
    "OfflineCarCircle-v0": {
        "BC": (0.65, 11.16),
        "CDT": (0.71, 2.19),
        "CPQ": (0.49, 4.48),
        "COptiDICE": (0.44, 7.73),
        "FISOR": (0.4, 0.11),
        "ASEC": (0.41, 2.86),
        "NSEC": (0.4, 2.62),
        "PSEC": (0.36, 0.2),
    },
    "OfflineDroneCircle-v0": {
        "BC": (0.82, 13.78),
        "CDT": (0.55, 1.29),
        "CPQ": (-0.27, 1.29),
        "COptiDICE": (0.24, 2.19),
        "FISOR": (0.48, 0.0),
        "ASEC": (0.65, 3.6),
        "NSEC": (0.71, 4.93),
        "PSEC": (0.33, 0.07),
    },
}


@dataclass(frozen=True)
class Cell(Place):
    """One task and seed, with the set that both are learned from.

    Attributes:
      task: the task's id.
      data: its file.
    """

    task: str
    data: str

    def at(self, name: str) -> Path:
        """The library of a baseline that is a whole policy."""
        return self.library.with_name(f"library-{name}")


def train_base(
    cell: Cell,
    name: str = "base",
    selection: Selection = FIRST,
    objective: str = "bc",
) -> Policy:
    """A whole policy on the set, or on a part of it, in a library of its own."""
    library = cell.library if name == "base" else cell.at(name)
    critics = None if objective == "bc" else train_critics(cell)
    stages.pretrain(
        cell.config,
        workdir=cell.workdir(name),
        library=library,
        seed=cell.seed,
        data=cell.data,
        selection=selection,
        name=name,
        objective=objective,
        critics=critics,
        evaluate_after=False,
    )
    return load_base(library)


def train_critics(cell: Cell) -> Path:
    """The folder of the critics that skills and FISOR share.

    They are trained alone, for critics want more steps than the actors that read them.
    """
    train_base(cell)
    workdir = cell.workdir("critics")
    stages.train_critics(
        cell.config,
        workdir=workdir,
        library=cell.library,
        seed=cell.seed,
        data=cell.data,
    )
    return workdir


def train_skills(cell: Cell) -> None:
    """Both skills, in one program."""
    critics = train_critics(cell)
    stages.expand(
        changed(cell.config, {"skill.objective": ",".join(SKILLS)}),
        workdir=cell.workdir("skills"),
        library=cell.library,
        seed=cell.seed,
        name=SKILLS,
        data=cell.data,
        critics=critics,
        evaluate_after=False,
    )


def train_composition(cell: Cell, method: str) -> Policy:
    """The skills and the gate of a row."""
    form = COMPOSITIONS[method]
    train_skills(cell)
    if form.head == "constant":
        return load_composition(cell.library, GATED, alpha=tuned_weights(cell, method))
    changes = level_changes(cell.config, form.level)
    changes |= {"gate.compat": form.compat, "gate.head": form.head}
    skills, alpha = GATED, None
    if form.compat == "released":  # its regulariser takes the last skill for safety
        skills, alpha = SKILLS, [0.0, cell.config.skill.alpha]
    stages.compose(
        changed(cell.config, changes),
        workdir=cell.workdir(method),
        library=cell.library,
        seed=cell.seed,
        name=method.replace(" ", "-"),
        skills=skills,
        alpha=alpha,
        env=dsrl.task(cell.task).spec,
        data=cell.data,
        selection=stages.best_of_safe(cell.config),
        evaluate_after=False,
    )
    return load_composition(cell.library, gate=method.replace(" ", "-"))


def tuned_weights(cell: Cell, method: str) -> list[float]:
    """The fixed weights of highest return among the safe ones of a grid, else those of
    least cost, by episodes of the cell's own skills from other start states.
    """
    folder = cell.root / "tuning"
    fingerprint = results.config_fingerprint(cell.config.to_dict())
    tried = []
    for weights in GRID:
        label = f"{method} ({', '.join(f'{w:g}' for w in weights)})"
        path = results.raw_path(folder, cell.task, label, cell.seed)
        raw = results.read_raw(path, fingerprint)
        if raw is None:
            train_skills(cell)
            policy = load_composition(cell.library, GATED, alpha=weights)
            raw = roll_out(cell, policy, label, tuning=True)
            results.write_raw(path, raw)
        over = max(0.0, np.mean(raw["costs"]) - cell.config.cost_limit)
        tried.append((-over, np.mean(raw["returns"]), weights))
    return list(max(tried)[-1])


def make_policy(cell: Cell, method: str) -> Policy:
    """The trained policy of one row."""
    if method in COMPOSITIONS:
        return train_composition(cell, method)
    if method.endswith(" skill"):
        train_skills(cell)
        return load_composition(cell.library, [method.split()[0].lower()])
    if method == "BC":
        return train_base(cell)
    if method == "BC-Safe":
        safe = Selection(max_cost=float(cell.config.cost_limit))
        return train_base(cell, "bc-safe", safe)
    train_base(cell, "fisor", objective="fisor")
    return load_composition(
        cell.at("fisor"),
        candidates=cell.config.table.fisor_candidates,
        critics=train_critics(cell),
    )


def roll_out(
    cell: Cell, policy: Policy, method: str, tuning: bool = False
) -> dict[str, Any]:
    """The raw result of one cell."""
    config, env = cell.config, dsrl.task(cell.task).spec
    count = config.table.tuning_episodes if tuning else config.evaluation.episodes
    seed = config.evaluation.seed + (1 if tuning else 0)
    episodes = evaluate(policy.act, env, count, seed)
    made = Path(cell.data).name == dsrl.made_name(cell.task)
    raw = results.header(config.to_dict(), cell.task, method, cell.seed) | {
        "cost_limit": config.cost_limit,
        "data": "made" if made else "official",
        "data_fingerprint": _fingerprint(cell.data),
    }
    if method in COMPOSITIONS and COMPOSITIONS[method].head == "constant":
        raw["alpha"] = tuned_weights(cell, method)
    return raw | stages.episodes_json(episodes, env, seed)


@functools.cache
def _fingerprint(data: str) -> str:
    return dataset.fingerprint(dsrl.load(data, clip_actions=True)[0])


def _usable_set(config: ConfigDict, task: str, offline: bool) -> str:
    """A task's set, when all that its cells need is there.

    Raises:
      InputError: no simulator, no set, or no trajectory in it that a gate can learn
        from.
    """
    envs.make(dsrl.task(task).spec).close()
    data = str(dsrl.find(task, offline).path)
    load_demos(
        config,
        dsrl.task(task).spec,
        0,
        data,
        stages.best_of_safe(config),
        with_costs=True,
    )
    return data


def run_cells(
    config: ConfigDict,
    tasks: Sequence[str],
    root: Path,
    folder: Path,
    offline: bool,
    report: Callable[[str], None],
) -> None:
    """Fill every missing cell, task by task and seed by seed."""
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    fingerprint = results.config_fingerprint(config.to_dict())
    sets = {task: _usable_set(config, task, offline) for task in tasks}
    for task, data in sets.items():
        for seed in config.table.seeds:
            cell = Cell(config, root / task, seed, task, data)
            for method in config.table.methods:
                path = results.raw_path(folder, task, method, seed)
                if results.read_raw(path, fingerprint) is not None:
                    continue
                raw = roll_out(cell, make_policy(cell, method), method)
                results.write_raw(path, raw)
                report(
                    f"{task} {method} seed {seed}: return {raw['mean']:.1f}, cost "
                    f"{np.mean(raw['costs']):.1f}"
                )


def summarise(raws: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{task: {method: normalised reward and cost with intervals}} of raw files.

    Raises:
      InputError: seeds of one cell that were measured under different conditions.
    """
    by_cell: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for raw in sorted(raws, key=lambda raw: raw["seed"]):
        by_cell.setdefault((raw["setting"], raw["method"]), []).append(raw)
    table: dict[str, dict[str, Any]] = {}
    for (task, method), cells in by_cell.items():
        for field in ("cost_limit", "data", "config_fingerprint", "data_fingerprint"):
            if len({raw.get(field) for raw in cells}) > 1:
                told = {f"seed {raw['seed']}": raw.get(field) for raw in cells}
                raise InputError(
                    f"{task}, {method}: results of different {field}, {told}; measure "
                    "those that are wrong anew"
                )
        limit = cells[0]["cost_limit"]
        cost = [dsrl.normalised_cost(np.array(raw["costs"]), limit) for raw in cells]
        reward = [
            dsrl.normalised_return(task, np.array(raw["returns"])) for raw in cells
        ]
        entry: dict[str, Any] = {}
        for name, groups in (("reward", reward), ("cost", cost)):
            low, high = results.interval(groups)
            mean = float(np.mean(np.concatenate(groups)))
            entry[name] = {"mean": mean, "low": low, "high": high}
        table.setdefault(task, {})[method] = entry | {
            "safe": entry["cost"]["mean"] < 1,
            "cost_limit": limit,
            "data": cells[0]["data"],
            "seeds": [raw["seed"] for raw in cells],
            "returns": [raw["returns"] for raw in cells],
            "costs": [raw["costs"] for raw in cells],
        }
    return table


def mean_row(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple]:
    """{method: (reward, cost)} over the tasks, of methods measured on all of them."""
    methods = set.intersection(*(set(cells) for cells in summary.values()))
    return {
        method: tuple(
            float(np.mean([cells[method][name]["mean"] for cells in summary.values()]))
            for name in ("reward", "cost")
        )
        for method in METHODS
        if method in methods
    }


def markdown(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a task: reward / cost of every method, the paper's beside it.

    The mean of the paper's is over the same tasks.
    """
    methods = [
        column
        for column in COLUMNS
        if column in PAPER_ONLY or any(column in cells for cells in summary.values())
    ]
    lines = [
        "| task | data | " + " | ".join(methods) + " |",
        "|" + "---|" * (2 + len(methods)),
    ]
    for task, cells in summary.items():
        pairs = {m: (c["reward"]["mean"], c["cost"]["mean"]) for m, c in cells.items()}
        sources = sorted({cell["data"] for cell in cells.values()})
        lines.append(_row(task, ", ".join(sources), methods, pairs, PAPER[task]))
    if len(summary) > 1:
        paper = {
            method: tuple(np.mean([PAPER[task][method] for task in summary], axis=0))
            for method in PAPER[next(iter(summary))]
        }
        lines.append(_row("mean", "", methods, mean_row(summary), paper))
    return "\n".join(lines) + "\n"


def _row(
    name: str,
    data: str,
    methods: Sequence[str],
    pairs: Mapping[str, tuple],
    paper: Mapping[str, tuple],
) -> str:
    """Safe results are bold, the safe one of highest reward has a star."""
    safe = {m: reward for m, (reward, cost) in pairs.items() if cost < 1}
    winner = max(safe, key=safe.get) if safe else None
    cells = []
    for method in methods:
        text = "-"
        if method in pairs:
            text = "{:.2f} / {:.2f}".format(*pairs[method])
            text = f"**{text}**" if method in safe else text
            text += " *" if method == winner else ""
        if method in paper:
            text += " ({:.2f} / {:.2f})".format(*paper[method])
        cells.append(text)
    return f"| {name} | {data} | " + " | ".join(cells) + " |"


def write_table(folder: Path, suite: str, limit: float | None = None) -> str:
    """table1_SUITE.{md,csv,json} from the raw files alone.

    With a `limit` the costs are told by it, not by the one that was learned with, and
    the files are table1_SUITE_limitX.
    """
    raws = [raw for raw in results.load_all(folder) if raw["setting"] in SUITES[suite]]
    if not raws:
        raise InputError(f"{folder}: no raw results of the suite {suite}")
    name = f"table1_{suite}"
    limits = ", ".join(f"{x:g}" for x in sorted({raw["cost_limit"] for raw in raws}))
    if limit is not None:
        raws = [{**raw, "cost_limit": limit} for raw in raws]
        name = f"{name}_limit{limit:g}"
        limits = f"{limit:g}, by which costs are told; all was learned with {limits}"
    summary = summarise(raws)
    summary = {task: summary[task] for task in SUITES[suite] if task in summary}
    note = (
        "Normalised reward / normalised cost; safe (cost below 1) bold, * the best "
        f"safe one; in brackets the paper's, - not run here. Cost limit {limits}. "
        "Data: official sets of DSRL, or made by this project. "
        f"{results.conditions(raws)}"
    )
    text = f"{markdown(summary)}\n{note}\n"
    write_json(folder / f"{name}.json", summary)
    write_atomic(folder / f"{name}.md", text)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = [f"{n}_{k}" for n in ("reward", "cost") for k in ("mean", "low", "high")]
    writer.writerow(["task", "method", "data", "cost_limit", "seeds", *columns])
    for task, cells in summary.items():
        for method, cell in cells.items():
            numbers = [
                f"{cell[n][k]:.4f}"
                for n in ("reward", "cost")
                for k in ("mean", "low", "high")
            ]
            known = (cell["data"], cell["cost_limit"], len(cell["seeds"]))
            writer.writerow([task, method, *known, *numbers])
    write_atomic(folder / f"{name}.csv", buffer.getvalue())
    return text


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write the tables."""
    no_arguments(argv)
    suite, folder = FLAGS["suite"].value, Path(FLAGS["results"].value)
    lookup(SUITES, suite, "suite")
    limit = None
    if FLAGS["tables_only"].value:
        limit = FLAGS["cost_limit"].value
    else:
        config = get_config(FLAGS["preset"].value)
        if FLAGS["seeds"].value:
            config.table.seeds = table_seeds(FLAGS["seeds"].value)
        if FLAGS["cost_limit"].value is not None:
            config.cost_limit = FLAGS["cost_limit"].value
            dsrl.normalised_cost(np.zeros(1), config.cost_limit)  # refuses a bad one
        for method in FLAGS["methods"].value:
            lookup(dict.fromkeys(METHODS), method, "method")
        config.table.methods = tuple(FLAGS["methods"].value or METHODS)
        for task in FLAGS["tasks"].value:
            lookup(dict.fromkeys(SUITES[suite]), task, f"task of the suite {suite}")
        tasks = FLAGS["tasks"].value or SUITES[suite]
        root = Path(FLAGS["workdir"].value or f"runs/dsrl/{config.preset}")
        run_cells(config, tasks, root, folder, FLAGS["offline"].value, print)
    print(write_table(folder, suite, limit))


if __name__ == "__main__":
    FLAGS = {
        "suite": flags.DEFINE_string("suite", "bullet", "bullet or metadrive."),
        "preset": flags.DEFINE_string(
            "preset", "standard", "quick, standard or paper."
        ),
        "results": flags.DEFINE_string(
            "results", "results/dsrl", "Folder of raw results and tables."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, "Folder of runs; default runs/dsrl/PRESET."
        ),
        "tasks": flags.DEFINE_list("tasks", [], "Tasks; default all of the suite."),
        "seeds": flags.DEFINE_list("seeds", [], "Seeds to run; default the preset's."),
        "methods": flags.DEFINE_list("methods", [], "Columns to run; default all."),
        "cost_limit": flags.DEFINE_float(
            "cost_limit",
            None,
            "Costs up to here are safe; default 10. With --tables_only only the told "
            "costs change, in files table1_SUITE_limitX.",
        ),
        "offline": flags.DEFINE_bool("offline", False, "Never download a set."),
        "tables_only": flags.DEFINE_bool(
            "tables_only", False, "Only make the tables again."
        ),
    }
    run(main)
