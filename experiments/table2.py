"""Table 2 of the paper: S->W, S->R and S+W->R on DeepMind Control walker.

    python -m experiments.table2 --preset=standard

trains what is missing (a base, LoRA and MLP skills, scratch policies and gates for each
seed), rolls every method out, and writes to results/dmc_walker/ the raw returns of all
episodes (raw/*.json) and table2.md, table2.csv and table2.json made from them. Finished
runs and cells are kept: start it again after a stop. --tables_only makes the tables
again from the raw files.

Expected: quick minutes, standard an hour a seed on one CPU core, paper a day of a
GPU.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import programs, results, stages
from experiments.configs.dmc_walker import get_config
from psec_jax.cli import no_arguments, run
from psec_jax.cli import seeds as table_seeds
from psec_jax.errors import InputError
from psec_jax.evaluation import evaluate
from psec_jax.policy import Policy, load_base
from psec_jax.policy import compose as load_composition

ENV = "dm_control:walker-{}"


@dataclass(frozen=True)
class Setting:
    """One column: the target task and the skills a method may use, by priority."""

    task: str
    skills: tuple[str, ...]


SETTINGS = {
    "S->W": Setting("walk", ("walk",)),
    "S->R": Setting("run", ("run",)),
    "S+W->R": Setting("run", ("run", "walk")),
}


@dataclass(frozen=True)
class Composition:
    """One row that composes skills.

    Attributes:
      level: at which the skills are composed.
      head: of the gate; "constant" weights are tuned by returns on tuning episodes,
        or left at the skills' strengths where `tuned` is False.
      support: of the gate.
      adapter: of the skills.
      tuned: see `head`.
    """

    level: str = "parameter"
    head: str = "linear"
    support: str = "none"
    adapter: str = "lora"
    tuned: bool = False


COMPOSITIONS = {
    "ASEC": Composition(level="action"),
    "NSEC": Composition(level="noise"),
    "PSEC (MLP)": Composition(adapter="mlp"),
    "PSEC": Composition(),
    "ASEC fixed": Composition(level="action", head="constant", tuned=True),
    "NSEC fixed": Composition(level="noise", head="constant", tuned=True),
    "PSEC fixed": Composition(head="constant", tuned=True),
    "Support": Composition(head="constant", support="neighbour"),
    "Support (learned)": Composition(head="constant", support="learned"),
    "PSEC + support": Composition(support="neighbour"),
}
METHODS = ("Base", "Scratch", *COMPOSITIONS)

PAPER = {
    "S->W": {
        "Scratch": 58.9,
        "ASEC": 65.7,
        "NSEC": 320.9,
        "PSEC (MLP)": 424.1,
        "PSEC": 688,
        "ASEC fixed": 47,
        "NSEC fixed": 191,
        "PSEC fixed": 540,
    },
    "S->R": {
        "Scratch": 25.5,
        "ASEC": 24.3,
        "NSEC": 38.5,
        "PSEC (MLP)": 143.3,
        "PSEC": 221,
    },
    "S+W->R": {
        "Scratch": 25.5,
        "ASEC": 30.8,
        "NSEC": 39.4,
        "PSEC (MLP)": 194.5,
        "PSEC": 247,
    },
}

# Weights tried for the fixed rows, in the order of the gate's weights: at the parameter
# level a multiplier for each skill, at the others the base's share and each skill's.
GRIDS = {
    ("parameter", 1): ((8.0,), (12.0,), (16.0,), (20.0,)),
    ("parameter", 2): (
        (12.0, 4.0),
        (16.0, 4.0),
        (8.0, 8.0),
        (4.0, 12.0),
        (16.0, 16.0),
    ),
    ("shares", 1): ((0.5, 0.5), (0.25, 0.75), (0.0, 1.0)),
    ("shares", 2): (
        (0.5, 0.25, 0.25),
        (0.0, 0.5, 0.5),
        (0.25, 0.75, 0.0),
        (0.0, 1.0, 0.0),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where one seed's runs lie."""

    config: ConfigDict
    root: Path
    seed: int

    @property
    def library(self) -> Path:
        """The library of this seed."""
        return self.root / f"seed{self.seed}" / "library"

    def workdir(self, name: str) -> Path:
        """The folder of one run."""
        return self.root / f"seed{self.seed}" / "runs" / name

    def scratch(self, task: str) -> Path:
        """The library that holds one scratch policy."""
        return self.root / f"seed{self.seed}" / f"scratch-{task}"


def base_work(place: Place) -> programs.Work:
    """The base of one seed."""
    return stages.pretrain.work(
        place.config,
        workdir=place.workdir("base"),
        library=place.library,
        seed=place.seed,
        name="stand",
        evaluate_after=False,
    )


def scratch_work(place: Place, task: str) -> programs.Work:
    """A whole policy on the target's demonstrations alone, on a skill's budget."""
    return stages.pretrain.work(
        place.config,
        workdir=place.workdir(f"scratch-{task}"),
        library=place.scratch(task),
        seed=place.seed,
        env=ENV.format(task),
        name=f"scratch-{task}",
        section="skill",
        evaluate_after=False,
    )


def skill_work(place: Place, task: str, adapter: str) -> programs.Work:
    """One skill on the base of its seed."""
    name = skill_name(task, adapter)
    return stages.expand.work(
        changed(place.config, {"skill.adapter": adapter}),
        workdir=place.workdir(name),
        library=place.library,
        seed=place.seed,
        name=name,
        env=ENV.format(task),
        evaluate_after=False,
    )


def gate_work(
    place: Place, setting: str, method: str, alpha: Sequence[float] | None
) -> programs.Work:
    """The gate of one cell, over skills that are there."""
    form, target = COMPOSITIONS[method], SETTINGS[setting]
    name = gate_name(method, setting)
    changes = level_changes(place.config, form.level) | {
        "gate.head": form.head,
        "gate.support": form.support,
    }
    return stages.compose.work(
        changed(place.config, changes),
        workdir=place.workdir(name),
        library=place.library,
        seed=place.seed,
        name=name,
        skills=[skill_name(task, form.adapter) for task in target.skills],
        env=ENV.format(target.task),
        alpha=alpha,
        evaluate_after=False,
    )


def train_base(place: Place) -> Policy:
    """The base of one seed."""
    programs.together({"": base_work(place)})
    return load_base(place.library)


def train_scratch(place: Place, task: str) -> Policy:
    """A whole policy on the target's demonstrations alone, on a skill's budget."""
    programs.together({"": scratch_work(place, task)})
    return load_base(place.scratch(task))


def train_skill(place: Place, task: str, adapter: str) -> str:
    """One skill; returns its name in the library."""
    train_base(place)
    programs.together({"": skill_work(place, task, adapter)})
    return skill_name(task, adapter)


def train_composition(
    place: Place, setting: str, method: str, tune_place: Place
) -> Policy:
    """Skills and gate of one cell."""
    for task in SETTINGS[setting].skills:
        train_skill(place, task, COMPOSITIONS[method].adapter)
    alpha = start_weights(tune_place, setting, method)
    programs.together({"": gate_work(place, setting, method, alpha)})
    return load_composition(place.library, gate=gate_name(method, setting))


def train_together(
    places: Sequence[Place], setting: str, method: str, tune_place: Place
) -> None:
    """What a cell needs, each stage for all seeds as one program."""

    def train(work: Callable[..., programs.Work], *args: Any) -> None:
        programs.together({f"seed {p.seed}": work(p, *args) for p in places})

    target, form = SETTINGS[setting], COMPOSITIONS.get(method)
    if method == "Scratch":
        return train(scratch_work, target.task)
    train(base_work)
    if form is not None:
        for task in target.skills:
            train(skill_work, task, form.adapter)
        train(gate_work, setting, method, start_weights(tune_place, setting, method))
    return None


def start_weights(
    tune_place: Place, setting: str, method: str
) -> Sequence[float] | None:
    """The weights a cell's gate starts from, or keeps; None is the config's choice."""
    form = COMPOSITIONS[method]
    if form.tuned:
        return tuned_weights(tune_place, setting, method)
    if form.head == "constant":
        return [tune_place.config.skill.alpha] * len(SETTINGS[setting].skills)
    return None


def skill_name(task: str, adapter: str) -> str:
    """Name of a skill in the library, such as walk or walk-mlp."""
    return task if adapter == "lora" else f"{task}-{adapter}"


def gate_name(method: str, setting: str) -> str:
    """Name of a cell's gate in the library, such as PSEC-support_S-W-R."""
    return f"{_plain(method)}_{_plain(setting)}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def tuned_weights(place: Place, setting: str, method: str) -> list[float]:
    """The best fixed weights of a grid, by mean return on tuning episodes.

    Tuning episodes start from other states than the reported ones. They are rolled out
    once, with the skills of seed 0, and kept in the run's folder.
    """
    form, target = COMPOSITIONS[method], SETTINGS[setting]
    skills = [train_skill(place, task, form.adapter) for task in target.skills]
    kind = "parameter" if form.level == "parameter" else "shares"
    folder = place.root / "tuning"
    fingerprint = results.config_fingerprint(place.config.to_dict())
    tried = []
    for weights in GRIDS[kind, len(skills)]:
        label = f"{method} ({', '.join(f'{w:g}' for w in weights)})"
        path = results.raw_path(folder, setting, label, place.seed)
        raw = results.read_raw(path, fingerprint)
        if raw is None:
            policy = load_composition(
                place.library, skills, alpha=weights, level=form.level
            )
            raw = roll_out(place, policy, setting, label, tuning=True)
            results.write_raw(path, raw)
        tried.append((raw["mean"], weights))
    return list(max(tried)[1])


def roll_out(
    place: Place, policy: Policy, setting: str, method: str, tuning: bool = False
) -> dict[str, Any]:
    """The raw result of one cell and seed."""
    config = place.config
    env = ENV.format(SETTINGS[setting].task)
    count = config.table.tuning_episodes if tuning else config.evaluation.episodes
    seed = config.evaluation.seed + (1 if tuning else 0)
    episodes = evaluate(policy.act, env, count, seed)
    header = results.header(config.to_dict(), setting, method, place.seed)
    return (
        header
        | {"budget": budget(config, method)}
        | stages.episodes_json(episodes, env, seed)
    )


def budget(config: ConfigDict, method: str) -> dict[str, Any]:
    """Steps and batch of the stages that a method trains, tuned weights included."""
    name = method.partition(" (")[0] if method not in METHODS else method
    parts = {"Base": ["base"], "Scratch": ["skill"]}.get(name, ["base", "skill"])
    sizes = {part: config[part] for part in parts}
    form = COMPOSITIONS.get(name)
    if form is not None and form.head != "constant":
        cloned = form.level != "parameter"
        sizes["gate"] = config.table.cloning if cloned else config.gate
    return {
        part: {"steps": size.steps, "batch_size": size.batch_size}
        for part, size in sizes.items()
    }


def run_cells(
    config: ConfigDict,
    root: Path,
    folder: Path,
    report: Callable[[str], None],
    together: bool = False,
) -> None:
    """Fill every missing cell, seed by seed; `together` trains all seeds at once."""
    # Seeds and tasks compile the same programs; the cache makes each one once.
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    fingerprint = results.config_fingerprint(config.to_dict())
    tune_place = Place(config, root, 0)
    places = [Place(config, root, seed) for seed in config.table.seeds]
    if together:
        for setting, method in itertools.product(SETTINGS, config.table.methods):
            paths = [results.raw_path(folder, setting, method, p.seed) for p in places]
            missing = [
                place
                for place, path in zip(places, paths, strict=True)
                if results.read_raw(path, fingerprint) is None
            ]
            if missing:
                train_together(missing, setting, method, tune_place)
    for place in places:
        seed = place.seed
        for setting, target in SETTINGS.items():
            for method in config.table.methods:
                path = results.raw_path(folder, setting, method, seed)
                if results.read_raw(path, fingerprint) is not None:
                    continue
                if method == "Base":
                    policy = train_base(place)
                elif method == "Scratch":
                    policy = train_scratch(place, target.task)
                else:
                    policy = train_composition(place, setting, method, tune_place)
                raw = roll_out(place, policy, setting, method)
                results.write_raw(path, raw)
                report(f"{setting} {method} seed {seed}: mean {raw['mean']:.1f}")


def write_table(folder: Path) -> str:
    """table2.{md,csv,json} from the raw files alone."""
    raws = results.load_all(folder)
    summary = results.summarise(raws)
    summary = {s: summary[s] for s in SETTINGS if s in summary}
    measured = [m for m in METHODS if any(m in cells for cells in summary.values())]
    return results.write_tables(
        folder, "table2", summary, measured, PAPER, footnote(raws)
    )


def footnote(raws: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers were measured with."""
    return (
        f"Mean return and 95 % bootstrap interval; {results.conditions(raws)} Falls: "
        f"episodes below {results.FALL:.0f}. 10 demonstrations a skill. Paper: 5 "
        "seeds, 10 episodes. Rows Base, fixed and Support: see docs/methods.md."
    )


def level_changes(config: ConfigDict, level: str) -> dict[str, Any]:
    """What a gate at this level changes of a config: above the parameter level it is
    cloned through the sampler, by a budget of its own."""
    changes = {"gate.level": level}
    if level != "parameter":
        changes |= {f"gate.{k}": value for k, value in config.table.cloning.items()}
    return changes


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with other values under these dotted names."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(dict(changes))
    return copy


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write the tables."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    if not FLAGS["tables_only"].value:
        config = get_config(FLAGS["preset"].value)
        if FLAGS["seeds"].value:
            config.table.seeds = table_seeds(FLAGS["seeds"].value)
        methods = FLAGS["methods"].value or config.table.methods
        for method in methods:
            if method not in METHODS:
                raise InputError(
                    f"unknown method {method!r}; choose from {', '.join(METHODS)}"
                )
        config.table.methods = tuple(methods)
        root = Path(FLAGS["workdir"].value or f"runs/dmc_walker/{config.preset}")
        run_cells(config, root, folder, print, FLAGS["together"].value)
    print(write_table(folder))


if __name__ == "__main__":
    FLAGS = {
        "preset": flags.DEFINE_string(
            "preset", "standard", "quick, standard or paper."
        ),
        "results": flags.DEFINE_string(
            "results", "results/dmc_walker", "Folder of raw results and tables."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, "Folder of runs; default runs/dmc_walker/PRESET."
        ),
        "seeds": flags.DEFINE_list("seeds", [], "Seeds to run; default the preset's."),
        "methods": flags.DEFINE_list(
            "methods", [], "Rows to run; default the preset's."
        ),
        "together": flags.DEFINE_bool(
            "together",
            False,
            "Train each stage for all seeds as one program: faster on an accelerator, "
            "no faster on a CPU; its numbers are the same apart from rounding.",
        ),
        "tables_only": flags.DEFINE_bool(
            "tables_only", False, "Only make the tables again."
        ),
    }
    run(main)
