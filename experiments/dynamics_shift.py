"""The dynamics shift: a base from a changed simulator, a skill for the plain one.

    python -m experiments.dynamics_shift --preset=standard

For each robot and shift (friction, thigh, gravity) a base is cloned from the mixed set
of the changed simulator. For each of six target sets of the plain simulator, cut to
10,000 transitions, one LoRA skill is learned by advantage-weighted regression on it,
and a gate on the same transitions (PSEC). Beside them, on the same data: the base as it
is, the skill at its training strength, the base fine-tuned in all parameters, joint
training on the source and the target, and on the target alone Gaussian BC and IQL and
the diffusion policy from scratch. Every policy is rolled out in the plain simulator.
Raw returns of all episodes are in results/dynamics/raw; the table and the bars are made
from those files alone (--tables_only). Finished runs and cells are kept: start it again
after a stop.

The sets are the official ones of D4RL where they are there, else made by
experiments.tools.collect_d4rl; source sets are always made. The table says which.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict
from psec_jax.runtime.training import train

from experiments import plots, results, stages
from experiments.configs.d4rl import get_config
from experiments.table2 import Place, changed, table_seeds
from psec_jax.agents import gaussian
from psec_jax.agents.common import OptimiserConfig
from psec_jax.agents.gaussian import GaussianConfig
from psec_jax.cli import no_arguments, run
from psec_jax.data import d4rl, d4rl_sets, dataset, normalise
from psec_jax.data.sets import Found
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import Act, evaluate
from psec_jax.files import write_atomic, write_json
from psec_jax.losses import WeightConfig
from psec_jax.policy import compose as load_composition
from psec_jax.policy import load_base
from psec_jax.runtime.run import open_run
from psec_jax.workflows.demonstrations import FIRST, Demos, Selection, load_demos

ROBOTS = ("halfcheetah", "walker2d")
QUALITIES = ("medium", "medium-replay", "medium-expert")
TARGETS = tuple(f"{robot}-{quality}" for robot in ROBOTS for quality in QUALITIES)
SHIFTS = {"friction": "friction", "thigh": "thigh_size", "gravity": "gravity"}
ALONE = ("BC", "IQL", "Scratch")  # they never see the source
SHIFTED = ("Base", "Joint", "Fine-tune", "Skill", "PSEC")
METHODS = (*ALONE, *(f"{method} ({s})" for method in SHIFTED for s in SHIFTS))
# Rewards of an episode of a score of 100 add up to its 1000 steps.
REWARD_SCALES = {
    name: 1000 / (robot.max_return - robot.min_return)
    for name, robot in d4rl_sets.ROBOTS.items()
}

# Normalised scores in the paper, in the order of TARGETS.
PAPER = {
    "BC": (26.4, 14.3, 19.1, 15.8, 1.4, 21.6),
    "IQL": (29.9, 22.7, 10.5, 22.6, 10.7, 26.5),
    "Joint (friction)": (15.8, 14.8, 16.4, 8.2, 7.5, 7.4),
    "Joint (thigh)": (9.3, 9.7, 6.3, 50.5, 6.3, 54.8),
    "Joint (gravity)": (2.0, 6.8, 6.8, 39.3, 15.7, 33.3),
    "PSEC (friction)": (40.1, 31.1, 42.1, 61.7, 20.9, 75.1),
    "PSEC (thigh)": (41.4, 32.3, 43.9, 64.9, 25.5, 71.4),
    "PSEC (gravity)": (40.8, 29.2, 42.4, 57.1, 26.8, 71.8),
}


@dataclass(frozen=True)
class Cell(Place):
    """One robot, seed, target set and, but for methods that see no source, shift.

    Attributes:
      target: such as "walker2d-medium".
      shift: a name of SHIFTS, or "".
    """

    target: str
    shift: str = ""

    @property
    def robot(self) -> str:
        """The robot's name."""
        return self.target.partition("-")[0]

    @property
    def env(self) -> str:
        """The plain simulator."""
        return d4rl_sets.task(f"{self.target}-v2").spec

    @property
    def found(self) -> Found:
        """The target set, official or made."""
        return d4rl_sets.find(f"{self.target}-v2")

    @property
    def data(self) -> str:
        """Its file."""
        return str(self.found.path)

    @property
    def source(self) -> str:
        """The source set's file."""
        quantity = SHIFTS[self.shift]
        return str(d4rl_sets.find(f"{self.robot}-{quantity}-source").path)

    @property
    def part(self) -> Selection:
        """What is taken of the target set."""
        return Selection(transitions=self.config.table.transitions)

    def transitions(self) -> Demos:
        """The target's transitions, the same for every seed and method."""
        return _transitions(
            FrozenConfigDict(self.config), self.env, self.data, self.part
        )

    def at(self, name: str) -> Path:
        """The library of a policy that is a base of its own."""
        return self.library.with_name(f"library-{name}")


@functools.cache
def _transitions(
    config: FrozenConfigDict, env: str, data: str, part: Selection
) -> Demos:
    return load_demos(config, env, 0, data, part)


def place(root: Path, config: ConfigDict, seed: int, target: str, shift: str) -> Cell:
    """The cell of one target, shift and seed; shifts do not share folders."""
    robot = target.partition("-")[0]
    folder = root / (f"{robot}-{shift}" if shift else robot)
    config = changed(config, {"critics.reward_scale": REWARD_SCALES[robot]})
    return Cell(config, folder, seed, target, shift)


def train_base(cell: Cell) -> Act:
    """The base of a shift, for all of its targets."""
    stages.pretrain(
        cell.config,
        workdir=cell.workdir("base"),
        library=cell.library,
        seed=cell.seed,
        data=cell.source,
        evaluate_after=False,
    )
    return load_base(cell.library).act


def train_alone(cell: Cell) -> Act:
    """A diffusion policy on the target alone, on the skill's objective."""
    return _train_whole(cell, f"scratch-{cell.target}", cell.data, cell.part, "base")


def train_joint(cell: Cell) -> Act:
    """A base on the source and the target's transitions together."""
    source = load_demos(cell.config, cell.env, 0, cell.source)
    both = dataset.concatenate([source.dataset, cell.transitions().dataset])
    name = f"{cell.target}-{dataset.fingerprint(both)}.hdf5"
    path = cell.root / "joint" / name
    if not path.exists():
        names = {"source": Path(cell.source).name, "target": Path(cell.data).name}
        d4rl.save(path, both, names)
    return _train_whole(cell, f"joint-{cell.target}", str(path), FIRST, "base", "bc")


def train_tuned(cell: Cell) -> Act:
    """The base with all of its parameters trained on, on the skill's budget."""
    train_base(cell)
    return _train_whole(
        cell,
        f"tuned-{cell.target}",
        cell.data,
        cell.part,
        "skill",
        start=cell.library,
    )


def _train_whole(
    cell: Cell,
    name: str,
    data: str,
    selection: Selection,
    section: str,
    objective: str = "reward",
    start: Path | None = None,
) -> Act:
    stages.pretrain(
        cell.config,
        workdir=cell.workdir(name),
        library=cell.at(name),
        seed=cell.seed,
        env=cell.env,
        data=data,
        selection=selection,
        name=name,
        section=section,
        objective=objective,
        start=start,
        evaluate_after=False,
    )
    return load_base(cell.at(name)).act


def train_skill(cell: Cell) -> Act:
    """One skill on the target's transitions."""
    train_base(cell)
    stages.expand(
        cell.config,
        workdir=cell.workdir(cell.target),
        library=cell.library,
        seed=cell.seed,
        name=cell.target,
        env=cell.env,
        data=cell.data,
        selection=cell.part,
        evaluate_after=False,
    )
    return load_composition(cell.library, [cell.target]).act


def train_gate(cell: Cell) -> Act:
    """The gate over the skill, on the same transitions."""
    train_skill(cell)
    name = f"gate-{cell.target}"
    stages.compose(
        cell.config,
        workdir=cell.workdir(name),
        library=cell.library,
        seed=cell.seed,
        name=name,
        skills=[cell.target],
        env=cell.env,
        data=cell.data,
        selection=cell.part,
        evaluate_after=False,
    )
    return load_composition(cell.library, gate=name).act


def train_gaussian(cell: Cell, objective: str) -> Act:
    """BC ("bc") or IQL ("reward") with a Gaussian policy."""
    sizes = cell.config.table.gaussian
    agent = GaussianConfig(
        objective=objective,
        optimiser=OptimiserConfig(
            sizes.learning_rate, decay_steps=sizes.steps, weight_decay=0.0, ema=1.0
        ),
        critics=stages.critic_config(cell.config, sizes.batch_size),
        weights=WeightConfig(reward_temperature=sizes.reward_temperature),
        batch_size=sizes.batch_size,
    )
    demos = cell.transitions()
    normaliser = normalise.standard(demos.dataset.obs, cell.config.std_floor)
    rows = stages.transitions(cell.config, demos, normaliser, safety=False)
    record = {
        "seed": cell.seed,
        "data": demos.card(),
        "gaussian": dataclasses.asdict(agent),
        "critics": cell.config.critics.to_dict(),
        "std_floor": cell.config.std_floor,
        "steps": sizes.steps,
    }
    init_key, train_key = jax.random.split(jax.random.key(cell.seed))
    state, _ = train(
        functools.partial(gaussian.update, agent),
        gaussian.init(agent, init_key, rows.obs.shape[1], rows.action.shape[1]),
        rows,
        train_key,
        run=open_run(cell.workdir(f"{objective}-{cell.target}"), "gaussian", record),
        steps=sizes.steps,
        stage=f"gaussian {objective}",
        **cell.config.run,
    )
    params = state.actor.params
    mean = jax.jit(functools.partial(gaussian.mean, agent))
    return lambda keys, obs: mean(params, jnp.asarray(normaliser(obs)))


# The sections of the config that a row's policy was trained by.
TRAINED = {
    "BC": ("gaussian",),
    "IQL": ("gaussian",),
    "Scratch": ("base",),
    "Base": ("base",),
    "Joint": ("base",),
    "Fine-tune": ("base", "skill"),
    "Skill": ("base", "skill"),
    "PSEC": ("base", "skill", "gate"),
}
MAKE = {
    "BC": functools.partial(train_gaussian, objective="bc"),
    "IQL": functools.partial(train_gaussian, objective="reward"),
    "Scratch": train_alone,
    "Base": train_base,
    "Joint": train_joint,
    "Fine-tune": train_tuned,
    "Skill": train_skill,
    "PSEC": train_gate,
}


def run_cells(
    config: ConfigDict,
    targets: Sequence[str],
    root: Path,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Fill every missing cell, target by target and seed by seed."""
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    for target in targets:
        for seed in config.table.seeds:
            for method in config.table.methods:
                name, _, shift = method.rstrip(")").partition(" (")
                cell = place(root, config, seed, target, shift)
                fingerprint = results.config_fingerprint(cell.config.to_dict())
                path = results.raw_path(folder, target, method, seed)
                if (raw := results.read_raw(path, fingerprint)) is not None:
                    check_data(path, raw, cell)
                    continue
                raw = roll_out(cell, MAKE[name](cell), method)
                results.write_raw(path, raw)
                score = np.mean(raw["scores"])
                report(f"{target} {method} seed {seed}: score {score:.1f}")


def check_data(path: Path, raw: Mapping[str, Any], cell: Cell) -> None:
    """Refuse a finished cell of other transitions of the target.

    Raises:
      InputError: both fingerprints.
    """
    mine = dataset.fingerprint(cell.transitions().dataset)
    if raw["data"]["fingerprint"] != mine:
        raise InputError(
            f"{path}: measured on transitions {raw['data']['fingerprint']}, "
            f"{cell.data} gives {mine}; choose another --results folder"
        )


def budget(config: ConfigDict, method: str) -> dict[str, dict[str, int]]:
    """Steps and batch of each stage of a row's training."""
    sections = {**config, "gaussian": config.table.gaussian}
    return {
        stage: {k: sections[stage][k] for k in ("steps", "batch_size")}
        for stage in TRAINED[method]
    }


def roll_out(cell: Cell, act: Act, method: str) -> dict[str, Any]:
    """The raw result of one cell, in the plain simulator."""
    config, seed = cell.config, cell.config.evaluation.seed
    episodes = evaluate(act, cell.env, config.evaluation.episodes, seed)
    scores = d4rl_sets.normalised_score(cell.robot, episodes.returns)
    demos = cell.transitions()
    of_data = dataset.episode_returns(demos.dataset)
    return (
        results.header(config.to_dict(), cell.target, method, cell.seed)
        | {
            "budget": budget(config, method.partition(" (")[0]),
            "width": config.network.width,
            "data": demos.card() | {"made_or_official": cell.found.source},
            "data_scores": d4rl_sets.normalised_score(cell.robot, of_data).tolist(),
            "d4rl_environment": d4rl_sets.task(f"{cell.target}-v2").d4rl_environment,
            "scores": scores.tolist(),
        }
        | stages.episodes_json(episodes, cell.env, seed)
    )


def scored(raws: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raw files with scores for returns, for what averages and draws returns."""
    return [{**raw, "returns": raw["scores"]} for raw in raws]


def summarise(raws: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{target: {method: mean score, interval, means of the seeds}}."""
    table = results.summarise(scored(raws))
    return {
        target: {
            method: {k: v for k, v in cell.items() if k != "falls"}
            for method, cell in table[target].items()
        }
        for target in TARGETS
        if target in table
    }


def wins(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """In how many cells PSEC's mean is above that of those it is to beat."""
    rivals = ("BC", "IQL", "Joint", "Scratch", "Fine-tune")
    counts = {rival: [0, 0, 0] for rival in rivals}
    total, all_three = 0, 0
    for cells in summary.values():
        for shift in SHIFTS:
            names = {r: r if r in ALONE else f"{r} ({shift})" for r in rivals}
            if not {f"PSEC ({shift})", *names.values()} <= cells.keys():
                continue
            total += 1
            psec = cells[f"PSEC ({shift})"]
            for rival, name in names.items():
                other = cells[name]
                counts[rival][0] += psec["mean"] > other["mean"]
                counts[rival][1] += psec["low"] > other["high"]
                counts[rival][2] += psec["high"] < other["low"]
            all_three += all(
                psec["mean"] > cells[names[r]]["mean"] for r in ("BC", "IQL", "Joint")
            )
    told = ", ".join(
        f"{rival} in {mean} ({above} with its whole interval, {below} the other way)"
        for rival, (mean, above, below) in counts.items()
    )
    return (
        f"Of {total} cells PSEC's mean is above that of {told}; above BC, IQL and "
        f"Joint together in {all_three}."
    )


def markdown(
    summary: Mapping[str, Mapping[str, Any]], data_scores: Mapping[str, float]
) -> str:
    """A row a method: score and interval on every target, the paper's in brackets.

    The first row is the mean score of the trajectories that all learn from.
    """
    lines = [
        "| method | " + " | ".join(summary) + " |",
        "|" + "---|" * (1 + len(summary)),
        "| the transitions | "
        + " | ".join(f"{data_scores[target]:.1f}" for target in summary)
        + " |",
    ]
    for method in METHODS:
        if not any(method in cells for cells in summary.values()):
            continue
        cells = []
        for target in summary:
            cell, text = summary[target].get(method), "-"
            if cell:
                text = f"{cell['mean']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"
            if method in PAPER:
                text += f" ({PAPER[method][TARGETS.index(target)]:g})"
            cells.append(text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(folder: Path) -> str:
    """dynamics_shift.{md,csv,json} and the bars, from the raw files alone."""
    raws = results.load_all(folder)
    summary = summarise(raws)
    data_scores = {raw["setting"]: np.mean(raw["data_scores"]) for raw in raws}
    sources = sorted({raw["data"]["made_or_official"] for raw in raws})
    sizes = sorted({raw["data"]["transitions"] for raw in raws})
    note = (
        "D4RL normalised score, mean and 95 % bootstrap interval over training seeds "
        "and episodes (the transitions are the same for all seeds); in round brackets "
        f"the paper's, of D4RL's v2 simulators. Target sets: {' and '.join(sources)}, "
        f"{' and '.join(map(str, sizes))} transitions; source sets made here; "
        f"{' and '.join(sorted({raw['env'] for raw in raws}))}. Width of the diffusion "
        f"policies {' and '.join(str(w) for w in sorted({r['width'] for r in raws}))}."
    )
    text = f"{markdown(summary, data_scores)}\n{note} {results.conditions(raws)}\n"
    text += f"\n{wins(summary)}\n"
    write_json(folder / "dynamics_shift.json", summary)
    write_atomic(folder / "dynamics_shift.md", text)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ("mean", "low", "high")
    writer.writerow(["target", "method", *columns, "seeds", "episodes", "paper"])
    for target, cells in summary.items():
        for method in METHODS:
            if method not in cells:
                continue
            cell, reported = cells[method], PAPER.get(method)
            numbers = [f"{cell[column]:.2f}" for column in columns]
            known = [len(cell["seeds"]), cell["episodes"]]
            known += [reported[TARGETS.index(target)] if reported else ""]
            writer.writerow([target, method, *numbers, *known])
    write_atomic(folder / "dynamics_shift.csv", buffer.getvalue())
    paper = {
        target: {method: row[i] for method, row in PAPER.items()}
        for i, target in enumerate(TARGETS)
    }
    title = "Dynamics shift: normalised score in the plain simulator"
    figure = plots.table(scored(raws), METHODS, paper, title, note, "score")
    plots.save(figure, folder / "figures", "dynamics_shift")
    return text


def define_flags() -> dict[str, flags.FlagHolder]:
    """Flags of the commands that read these runs."""
    return {
        "preset": flags.DEFINE_string(
            "preset", "standard", "quick, standard or paper."
        ),
        "results": flags.DEFINE_string(
            "results", "results/dynamics", "Folder of raw results, tables and figures."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, "Folder of runs; default runs/dynamics/PRESET."
        ),
        "seeds": flags.DEFINE_list("seeds", [], "Seeds to run; default the preset's."),
    }


def chosen(given: Mapping[str, flags.FlagHolder]) -> tuple[ConfigDict, Path]:
    """The config and the folder of runs that `define_flags` stand for."""
    config = get_config(given["preset"].value)
    if given["seeds"].value:
        config.table.seeds = table_seeds(given["seeds"].value)
    return config, Path(given["workdir"].value or f"runs/dynamics/{config.preset}")


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write the table."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    if not FLAGS["tables_only"].value:
        config, root = chosen(FLAGS)
        if FLAGS["transitions"].value is not None:
            config.table.transitions = FLAGS["transitions"].value
        for method in FLAGS["methods"].value:
            lookup(dict.fromkeys(METHODS), method, "method")
        config.table.methods = tuple(FLAGS["methods"].value or METHODS)
        targets = FLAGS["targets"].value or TARGETS
        for target in targets:
            lookup(dict.fromkeys(TARGETS), target, "target")
        run_cells(config, targets, root, folder, print)
    print(write_table(folder))


if __name__ == "__main__":
    FLAGS = define_flags() | {
        "targets": flags.DEFINE_list(
            "targets", [], "Target sets, such as walker2d-medium; default all six."
        ),
        "methods": flags.DEFINE_list(
            "methods", [], "Rows to run, such as PSEC (gravity); default all."
        ),
        "transitions": flags.DEFINE_integer(
            "transitions",
            None,
            "Of a target set; default the preset's, 10,000. Wants a --results and a "
            "--workdir of its own.",
            lower_bound=1,
        ),
        "tables_only": flags.DEFINE_bool(
            "tables_only", False, "Only make the table again."
        ),
    }
    run(main)
