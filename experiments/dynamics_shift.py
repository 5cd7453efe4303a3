"""The dynamics shift: a base from a changed simulator, a skill for the plain one.

    python -m experiments.dynamics_shift --preset=standard

For each robot and shift (friction, thigh, gravity) a base is cloned from the mixed set
of the changed simulator. For each of six target sets of the plain simulator, cut to
10,000 transitions that each seed draws for itself, one LoRA skill is learned by
advantage-weighted regression on it, and on the same transitions gates: the paper's
(PSEC), one with a support, and one by which critics choose base, skill or a mixture.
Beside them, on the same data: the base as it is, the skill at its training strength,
the base fine-tuned in all parameters, joint training on the source and the target, and
on the target alone Gaussian BC and IQL and the diffusion policy from scratch. Every
policy is rolled out in the plain simulator.

Raw returns of all episodes are in results/dynamics/dynamics_shift.jsonl; the table and
the bars are made from those alone (--tables_only). Finished runs and results are kept:
start it again after a stop.

The sets are the official ones of D4RL where they are there, else made by
experiments.tools.collect_d4rl; source sets are always made. The table says which.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import grid, plots, results, tables
from experiments.configs import d4rl as config
from experiments.grid import Cell, Made, Method, Order, Table
from experiments.style import DOTTED, FIXED, Style
from psec_jax import envs
from psec_jax.agents import gaussian
from psec_jax.agents.common import OptimiserConfig
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.gaussian import GaussianConfig
from psec_jax.cli import no_arguments
from psec_jax.data import d4rl, d4rl_sets, dataset, normalise
from psec_jax.losses import WeightConfig
from psec_jax.runtime.batches import Drawn
from psec_jax.workflows import Job, critics, multirun
from psec_jax.workflows.config import part
from psec_jax.workflows.demonstrations import FIRST, Demos, Selection, load_demos
from psec_jax.workflows.multirun import Plan

RUNS = "runs/dynamics"
ROBOTS = ("halfcheetah", "walker2d")
QUALITIES = ("medium", "medium-replay", "medium-expert")
TARGETS = tuple(f"{robot}-{quality}" for robot in ROBOTS for quality in QUALITIES)
SHIFTS = {"friction": "friction", "thigh": "thigh_size", "gravity": "gravity"}
HATCHES = {"": "", "friction": "", "thigh": FIXED, "gravity": DOTTED}
# Rewards of an episode of a score of 100 add up to its 1000 steps.
REWARD_SCALES = {
    name: 1000 / (robot.max_return - robot.min_return)
    for name, robot in d4rl_sets.ROBOTS.items()
}


def robot_of(target: str) -> str:
    """The robot's name of a target set such as "walker2d-medium"."""
    return target.partition("-")[0]


@dataclass(frozen=True)
class Setting(grid.Setting):
    """A simulator, and the target set, of the plain one, that is learned from."""

    target: str = ""

    @property
    def plain(self) -> str:
        """The plain simulator."""
        return d4rl_sets.task(f"{self.target}-v2").spec


def setting(target: str, factor: float = 1.0, **fields: Any) -> Setting:
    """A simulator with `factor` times the plain one's gravity; rewards are scaled by
    the robot."""
    env = d4rl_sets.task(f"{target}-v2").spec
    if factor != 1:
        env = envs.shifted(env, f"gravity:{factor:g}")
    scale = {"critics.reward_scale": REWARD_SCALES[robot_of(target)]}
    return Setting(env, scale, target=target, **fields)


def data_path(target: str) -> str:
    """The file of a target set, official or made."""
    return str(d4rl_sets.find(f"{target}-v2").path)


def drawn(job: Job, seed: int) -> Selection:
    """The transitions of a seed, the same for every method."""
    return Selection(transitions=job.table.transitions, draw=seed)


def transitions(job: Job, target: str, selection: Selection) -> Demos:
    """Those of a target set."""
    spec = d4rl_sets.task(f"{target}-v2").spec
    return load_demos(job.data, spec, 0, data_path(target), selection)


def target_request(cell: Cell) -> dict[str, Any]:
    """Data and simulator of what is trained on the target's transitions."""
    return {
        "env": cell.setting.plain,
        "data": data_path(cell.setting.target),
        "selection": functools.partial(drawn, cell.job),
    }


def source_path(shift: str, cell: Cell) -> str:
    """The file of the source set of a shift."""
    return str(
        d4rl_sets.find(f"{robot_of(cell.setting.target)}-{SHIFTS[shift]}-source").path
    )


def of_shift(make: Callable[..., list[Made]], shift: str, cell: Cell) -> list[Made]:
    """What `make` gives in the runs of a shift, which all targets of a robot share."""
    robot = robot_of(cell.setting.target)
    if not shift:
        return make(cell.within(robot))
    return make(shift, cell.within(f"{robot}-{shift}"))


def train_base(shift: str, cell: Cell) -> None:
    """The base of a shift, for all of its targets."""
    grid.train(cell, "base", "base", data=source_path(shift, cell))


def make_base(shift: str, cell: Cell) -> list[Made]:
    """The base as it is."""
    train_base(shift, cell)
    return grid.bases(cell)


def make_whole(name: str, cell: Cell, **request: Any) -> list[Made]:
    """A whole policy in a library of its own."""
    library = f"library-{name}"
    grid.train(cell, "base", name, library=library, name=name, **request)
    return grid.bases(cell, library)


def make_scratch(cell: Cell) -> list[Made]:
    """A diffusion policy on the target alone, on the skill's objective."""
    name, request = f"scratch-{cell.setting.target}", target_request(cell)
    return make_whole(name, cell, objective="reward", **request)


def make_joint(shift: str, cell: Cell) -> list[Made]:
    """A base on the source and the target's transitions as one set."""
    source = source_path(shift, cell)
    whole = load_demos(cell.job.data, None, 0, source)

    def merged(seed: int) -> str:
        chosen = drawn(cell.job, seed)
        target = transitions(cell.job, cell.setting.target, chosen)
        both = dataset.concatenate([whole.dataset, target.dataset])
        file = f"{cell.setting.target}-{dataset.fingerprint(both)}.hdf5"
        path = cell.root / "joint" / file
        if not path.exists():
            names = {"source": Path(source).name, "target": Path(target.source).name}
            d4rl.save(path, both, names)
        return str(path)

    request = {"env": cell.setting.plain, "data": merged, "selection": FIRST}
    return make_whole(f"joint-{cell.setting.target}", cell, **request)


def make_tuned(shift: str, cell: Cell) -> list[Made]:
    """The base with all of its parameters trained on, on the skill's budget."""
    train_base(shift, cell)
    return make_whole(
        f"tuned-{cell.setting.target}",
        cell,
        section="skill",
        objective="reward",
        start=cell.library,
        **target_request(cell),
    )


def train_skill(shift: str, cell: Cell) -> None:
    """The base and one skill on the target's transitions."""
    train_base(shift, cell)
    grid.train(
        cell,
        "skill",
        cell.setting.target,
        name=cell.setting.target,
        **target_request(cell),
    )


def make_skill(shift: str, cell: Cell) -> list[Made]:
    """The skill at its training strength."""
    train_skill(shift, cell)
    return grid.composed(cell, [cell.setting.target])


def make_gate(
    form: str, changes: Mapping[str, Any], shift: str, cell: Cell, **request: Any
) -> list[Made]:
    """A gate over the skill, on the same transitions.

    Args:
      form: what the gate's name begins with.
      changes: of the job.
      shift: of the base.
      cell: of the table.
      **request: of the stage.
    """
    train_skill(shift, cell)
    name, request = f"{form}-{cell.setting.target}", target_request(cell) | request
    skills = [cell.setting.target]
    grid.train(cell, "gate", name, changes=changes, name=name, skills=skills, **request)
    return grid.composed(cell, gate=name)


def make_supported(shift: str, cell: Cell) -> list[Made]:
    """The same, the base where the target's transitions do not reach."""
    paths = [data_path(cell.setting.target)]
    changes = {"gate.support": "neighbour"}
    return make_gate("support", changes, shift, cell, support_data=paths)


def make_guided(shift: str, cell: Cell) -> list[Made]:
    """Base, skill or a mixture in every state, by what keeping to each would earn.

    One action is sampled with each, so that none has a choice among samples.
    """
    train_base(shift, cell)
    name = f"critics-{cell.setting.target}"
    grid.train(cell, "critics", name, **target_request(cell))
    strength = cell.job.skill.alpha
    changes = {
        "gate.head": "select",
        "gate.rule": "reward",
        "gate.q_of": "own",
        "gate.candidates": 1,
        "gate.alphas": tuple((strength * part / 4,) for part in range(4, -1, -1)),
    }
    critics = functools.partial(cell.workdir, name=name)
    return make_gate("critic", changes, shift, cell, critics=critics)


def make_gaussian(objective: str, cell: Cell) -> list[Made]:
    """BC ("bc") or IQL ("reward") with a Gaussian policy."""
    sizes, target = cell.job.table.gaussian, cell.setting.target
    agent = GaussianConfig(
        objective=objective,
        optimiser=part(
            OptimiserConfig, sizes, decay_steps=sizes.steps, weight_decay=0.0, ema=1.0
        ),
        critics=part(CriticConfig, cell.job.critics, batch_size=sizes.batch_size),
        weights=WeightConfig(reward_temperature=sizes.reward_temperature),
        batch_size=sizes.batch_size,
    )
    plans, normalisers = [], []
    for seed in cell.seeds:
        demos = transitions(cell.job, target, drawn(cell.job, seed))
        normaliser = normalise.standard(demos.dataset.obs, cell.job.std_floor)
        normalisers.append(normaliser)
        rows = critics.transitions(cell.job.critics, demos, normaliser, ("reward",))
        dims = rows.obs.shape[1], rows.action.shape[1]
        init_key, train_key = jax.random.split(jax.random.key(seed))
        record = {
            "seed": seed,
            "data": demos.card(),
            "gaussian": dataclasses.asdict(agent),
            "critics": dataclasses.asdict(cell.job.critics),
            "std_floor": cell.job.std_floor,
            "steps": sizes.steps,
        }
        plans.append(
            Plan(
                kind="gaussian",
                names=(),
                workdir=cell.workdir(seed, f"{objective}-{target}"),
                library=cell.library(seed),
                record=record,
                update=Drawn(gaussian.update, agent, sizes.batch_size),
                rows=rows,
                start=functools.partial(_fresh, agent, init_key, dims),
                key=train_key,
                steps=sizes.steps,
                stage=f"gaussian {objective}",
                label=f"seed {seed}",
            )
        )
    mean = jax.jit(functools.partial(gaussian.mean, agent))

    def act(normaliser: Any, params: Any, keys: Any, obs: Any) -> Any:
        return mean(params, jnp.asarray(normaliser(obs)))

    began = time.perf_counter()
    trained = multirun.train(plans, cell.job.run)
    seconds = time.perf_counter() - began
    grid.count(cell, "gaussian", f"{objective}-{target}", trained[0].summary, seconds)
    return [
        Made(functools.partial(act, normaliser, one.state.actor.params))
        for normaliser, one in zip(normalisers, trained, strict=True)
    ]


def _fresh(agent: GaussianConfig, key: Any, dims: tuple[int, int]) -> tuple[Any, None]:
    return gaussian.init(agent, key, *dims), None


BASE = {"base": "base"}
SKILL = BASE | {"skill": "skill"}
GATE = SKILL | {"gate": "gate"}
GUIDED = SKILL | {"critics": "critics"}
GAUSSIAN = {"gaussian": "table.gaussian"}


def row(make: Any, trained: Mapping[str, str], style: Style, shift: str = "") -> Method:
    """A row of one shift, or of none."""
    style = style._replace(hatch=HATCHES[shift])
    return Method(functools.partial(of_shift, make, shift), trained, style)


# These never see the source.
ALONE = {
    "BC": row(functools.partial(make_gaussian, "bc"), GAUSSIAN, Style("black", "<")),
    "IQL": row(
        functools.partial(make_gaussian, "reward"), GAUSSIAN, Style("orange", ">")
    ),
    "Scratch": row(make_scratch, BASE, Style("dark", "s")),
}
# These have a row for every shift.
SHIFTED = {
    "Base": (make_base, BASE, Style("light", "X")),
    "Joint": (make_joint, BASE, Style("sky", "v")),
    "Fine-tune": (make_tuned, SKILL, Style("purple", "P")),
    "Skill": (make_skill, SKILL, Style("green", "D")),
    "PSEC": (functools.partial(make_gate, "gate", {}), GATE, Style("blue", "o")),
    "PSEC + support": (make_supported, GATE, Style("light", "o")),
    "PSEC critic": (make_guided, GUIDED, Style("blue", "s")),
}
METHODS = ALONE | {
    f"{name} ({shift})": row(*declared, shift)
    for name, declared in SHIFTED.items()
    for shift in SHIFTS
}
RIVALS = ("BC", "IQL", "Joint", "Scratch", "Fine-tune")


def known(job: Job, target: str, setting: Setting) -> dict[str, Any]:
    """The set that everything of a target draws its transitions from.

    Raises:
      InputError: the set is not there, or smaller than the cut.
    """
    del setting
    transitions(job, target, drawn(job, 0))
    demos = transitions(job, target, FIRST)
    source = d4rl_sets.find(f"{target}-v2").source
    returns = dataset.episode_returns(demos.dataset)
    scores = np.asarray(d4rl_sets.normalised_score(robot_of(target), returns))
    return {
        "width": job.network.width,
        "data": demos.card() | {"made_or_official": source},
        "data_fingerprint": dataset.fingerprint(demos.dataset),
        "data_scores": scores.tolist(),
        "drawn": job.table.transitions,
        "d4rl_environment": d4rl_sets.task(f"{target}-v2").d4rl_environment,
    }


def score(raw: results.Raw) -> dict[str, Any]:
    """Normalised score of each episode."""
    robot = robot_of(raw["setting"])
    return {
        "score": d4rl_sets.normalised_score(
            robot, np.array(results.needed(raw, "returns"))
        )
    }


def rival(name: str, shift: str) -> str:
    """The row that PSEC of a shift is compared with."""
    return name if name in ALONE else f"{name} ({shift})"


TABLE = Table(
    name="dynamics_shift",
    settings={target: setting(target) for target in TARGETS},
    methods=METHODS,
    score=score,
    columns={"score": tables.number("score", 1), "IQM": tables.middle("score", 1)},
    orders=[
        Order(f"PSEC ({shift})", rival(name, shift), "score")
        for name in RIVALS
        for shift in SHIFTS
    ],
    paper=grid.paper("dynamics_shift"),
    known=known,
)


def wins(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many cells PSEC is above its rivals, by paired differences."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name = row["below"].partition(" (")[0]
        cells.setdefault((row["setting"], row["above"]), {})[name] = row
    whole = [by_name for by_name in cells.values() if len(by_name) == len(RIVALS)]
    counts = []
    for name in RIVALS:
        mine = [by_name[name] for by_name in whole]
        counts.append(
            f"{name} in {sum(row['mean'] > 0 for row in mine)} "
            f"({sum(row['low'] > 0 for row in mine)} separated, "
            f"{sum(row['high'] < 0 for row in mine)} separated the other way)"
        )
    all_three = sum(
        all(by_name[name]["mean"] > 0 for name in RIVALS[:3]) for by_name in whole
    )
    return (
        f"Of {len(whole)} cells PSEC's mean is above the mean of {', '.join(counts)}; "
        f"above {', '.join(RIVALS[:3])} in all three in {all_three}."
    )


def _note(raws: Sequence[results.Raw], summary: Mapping[str, Any]) -> str:
    data = {raw["setting"]: np.mean(results.needed(raw, "data_scores")) for raw in raws}
    learned = ", ".join(f"{name} {data[name]:.1f}" for name in summary)
    sources = sorted({raw["data"]["made_or_official"] for raw in raws})
    # Results without "drawn" are of one cut, the same for all seeds.
    sizes = sorted({raw.get("drawn", raw["data"]["transitions"]) for raw in raws})
    drawn_by = {
        "drawn by each seed from the set"
        if "drawn" in raw
        else "the same for all seeds"
        for raw in raws
    }
    return (
        f"D4RL normalised score. {tables.INTERVALS}; the transitions are "
        f"{' in some results, in others '.join(sorted(drawn_by))}. The paper's scores "
        f"are of D4RL's v2 simulators. Mean score of the trajectories: {learned}. "
        "Target sets: "
        f"{' and '.join(sources)}, {' and '.join(map(str, sizes))} transitions; source "
        f"sets made here; {' and '.join(sorted({raw['env'] for raw in raws}))}. Width "
        "of the diffusion policies "
        f"{' and '.join(str(width) for width in sorted({r['width'] for r in raws}))}. "
    )


def shown(folder: Path) -> tables.Shown:
    """The table of the raw results of a folder."""
    raws = results.read_all(TABLE.path(folder))
    summary = tables.summarise(TABLE, raws)
    note = _note(raws, summary) + wins(tables.differences(TABLE, raws))
    return tables.Shown(TABLE, raws, note, summary, TABLE.name, digits=1)


def write_table(folder: Path) -> str:
    """dynamics_shift.md, .csv and .json and the bars, from the raw results alone."""
    table = shown(folder)
    text = tables.write(table, folder)
    figure = plots.table(
        tables.of_metric(table.summary, "score"),
        {name: method.style for name, method in METHODS.items()},
        TABLE.paper,
        "Dynamics shift: normalised score in the plain simulator",
        _note(table.raws, table.summary) + results.conditions(table.raws),
        "score",
    )
    plots.save(figure, folder / "figures", "dynamics_shift")
    return text


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write the table."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    job, root = config.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    if FLAGS["transitions"].value is not None:
        job = job.changed({"table.transitions": FLAGS["transitions"].value})
    targets = grid.known_names(FLAGS["targets"].value, TABLE.settings, "target")
    if grid.measure(FLAGS, TABLE, job, root, folder, settings=targets):
        print(write_table(folder))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/dynamics", RUNS) | {
        "targets": flags.DEFINE_list(
            "targets", [], "Target sets, such as walker2d-medium; default all six."
        ),
        "transitions": flags.DEFINE_integer(
            "transitions",
            None,
            "Of a target set; default the preset's, 10,000. Wants a --results and a "
            "--workdir of its own.",
            lower_bound=1,
        ),
    }
    run(main)
