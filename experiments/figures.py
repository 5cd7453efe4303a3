"""Figures of the paper's experiments on DeepMind Control walker.

    python -m experiments.figures sample_efficiency --preset=standard

measures what is missing, keeps its raw results in results/dmc_walker/NAME.jsonl and
draws results/dmc_walker/figures/NAME.png and .svg from those alone; --plot_only only
draws. NAME is one of

  table2               every method of Table 2 (of experiments.table2, which runs it)
  sample_efficiency    return against the number of demonstrations
  training_efficiency  return of one skill without a gate against training steps
  gate                 learned gate, fixed weights and support, at every level
  rank                 return against the rank of the LoRA skill, and an MLP skill
  interpolation        return against the strength alpha of one skill
  tsne                 layer outputs, predicted noises and actions of three tasks
  alpha_trace          alpha(s) along an episode

Runs are kept beside those of experiments.table2, so a base or skill is trained once.
With Table 2 there, a figure of the standard preset takes 1 to 15 minutes of 2 CPU
cores; its budgets, some smaller than the table's, are written under it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib import figure as mpl

from experiments import grid, plots, results, table2, tables
from experiments.configs import dmc_walker
from experiments.grid import Cell, Made, Method, Table
from experiments.style import Style
from experiments.table2 import ENV, METHODS, RUNS, SETTINGS, SKILL, Setting, target
from experiments.tools.rollout import make_trace
from psec_jax.composition import network_of
from psec_jax.errors import InputError, lookup
from psec_jax.policy import Policy, compose
from psec_jax.process import corrupt
from psec_jax.workflows import Job
from psec_jax.workflows.demonstrations import load_demos

Budget = Mapping[str, Any]
WALK = "S->W"
MLP_AT = 128  # where the MLP skill stands on the axis of ranks
ALPHAS = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24)
SHORT = {"skill.steps": 300, "gate.steps": 50}
# Averaged weights of a short run must not remember its start; the rank is the paper's.
BRIEF = {"skill.ema": 5e-3, "skill.rank": 8}
# Many skills on one budget: a sixth of Table 2's.
SMALL = BRIEF | {"skill.steps": 2000}

# points: what the figure varies; changes: config fields beside those of the preset;
# episodes: of every evaluation, 0 for the preset's.
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "sample_efficiency": {
        "quick": {"seeds": (0,), "episodes": 5, "points": (10, 30), "changes": SHORT},
        "standard": {"seeds": (0,), "points": (10, 30, 50, 100), "changes": SMALL},
        "paper": {"seeds": (0, 1, 2, 3, 4), "points": (10, 30, 50, 100)},
    },
    "training_efficiency": {
        "quick": {"seeds": (0,), "episodes": 5, "points": (100, 300), "changes": BRIEF},
        "standard": {
            "seeds": (0,),
            "points": (500, 1000, 2000, 4000),
            "changes": BRIEF,
        },
        "paper": {"seeds": (0, 1, 2, 3, 4), "points": (1000, 3000, 10_000, 30_000)},
    },
    # The cells of Table 2: no budget of its own.
    "gate": {
        "quick": {"seeds": (0,)},
        "standard": {"seeds": (0, 1, 2)},
        "paper": {"seeds": (0, 1, 2, 3, 4)},
    },
    "rank": {
        "quick": {"seeds": (0,), "episodes": 5, "points": (4, 8), "changes": SHORT},
        "standard": {"seeds": (0,), "points": (4, 8, 16, 32, 64), "changes": SMALL},
        "paper": {"seeds": (0, 1, 2, 3, 4), "points": (4, 8, 16, 32, 64)},
    },
    "interpolation": {
        "quick": {"seeds": (0,), "episodes": 5, "points": (0, 8, 16, 24)},
        "standard": {"seeds": (0,), "points": ALPHAS},
        "paper": {"seeds": (0, 1, 2, 3, 4), "points": ALPHAS},
    },
    "tsne": {
        "quick": {"seeds": (0,), "points": 100},
        "standard": {"seeds": (0,), "points": 400},
        "paper": {"seeds": (0,), "points": 1000},
    },
    "alpha_trace": {
        "quick": {"seeds": (0,)},
        "standard": {"seeds": (0,)},
        "paper": {"seeds": (0,)},
    },
}


def rows(*names: str) -> dict[str, Method]:
    """Rows of Table 2."""
    return {name: METHODS[name] for name in names}


def base_level() -> dict[str, Setting]:
    """The setting of a level: the base, which no number on the axis changes."""
    return {WALK: target("walk", "walk", methods=("Base",), record={"x": None})}


def points(
    label: str, field: str, values: Sequence[int], *methods: str
) -> dict[str, Setting]:
    """A setting of walking for each value of a field of the job."""
    return {
        f"{WALK}, {label.format(value)}": target(
            "walk",
            "walk",
            changes={field: value},
            record={"x": value},
            methods=methods,
            same=WALK,
        )
        for value in values
    }


def make_skill(task: str, adapter: str, cell: Cell) -> list[Made]:
    """One skill at the strength it was trained at."""
    name = table2.train_skill(cell, task, adapter)
    return grid.composed(cell, [name], alpha=[float(cell.job.skill.alpha)])


def make_interpolated(task: str, cell: Cell) -> list[Made]:
    """One skill at the strength of its setting."""
    name, alpha = table2.train_skill(cell, task), cell.setting.record["x"]
    return grid.composed(cell, [name], alpha=[float(alpha)])


def sample_efficiency(budget: Budget) -> Table:
    """Every method at every number of demonstrations."""
    names = ("PSEC", "NSEC", "ASEC", "Scratch", "Support")
    varied = points("{} trajectories", "skill.episodes", budget["points"], *names)
    return table("sample_efficiency", base_level() | varied, rows("Base", *names))


def training_efficiency(budget: Budget) -> Table:
    """One run for every number of steps and kind of skill."""
    kinds = {
        f"{label} skill": Method(
            functools.partial(make_skill, "walk", adapter), SKILL, style
        )
        for label, adapter, style in (
            ("LoRA", "lora", Style("blue", "o")),
            ("MLP", "mlp", Style("purple", "P")),
        )
    } | rows("Scratch")
    varied = points("{} steps", "skill.steps", budget["points"], *kinds)
    return table("training_efficiency", base_level() | varied, rows("Base") | kinds)


GATE_GROUPS = {
    "parameter level": ("PSEC", "PSEC fixed", "Support", "PSEC + support"),
    "noise level": ("NSEC", "NSEC fixed"),
    "action level": ("ASEC", "ASEC fixed"),
}
GATE_LABELS = {
    "PSEC": "PSEC\nlearned gate",
    "PSEC fixed": "fixed\nweights",
    "Support": "support",
    "PSEC + support": "learned\nx support",
    "NSEC": "NSEC\nlearned gate",
    "NSEC fixed": "fixed\nweights",
    "ASEC": "ASEC\nlearned gate",
    "ASEC fixed": "fixed\nweights",
}


def gate(budget: Budget) -> Table:
    """A part of Table 2, with its raw results."""
    del budget
    return dataclasses.replace(
        table2.TABLE, settings={WALK: SETTINGS[WALK]}, methods=rows(*GATE_LABELS)
    )


def rank(budget: Budget) -> Table:
    """PSEC and the support on skills of every rank, and PSEC on MLP skills."""
    varied = points("rank {}", "skill.rank", budget["points"], "PSEC", "Support")
    mlp = {"record": {"x": MLP_AT}, "methods": ("PSEC (MLP)",), "same": WALK}
    varied[f"{WALK}, MLP"] = target("walk", "walk", **mlp)
    methods = rows("Base", "PSEC", "Support", "PSEC (MLP)")
    return table("rank", base_level() | varied, methods)


def interpolation(budget: Budget) -> Table:
    """Every strength of the walk skill and of the run skill."""
    settings = {
        f"{column}, alpha {alpha}": target(
            SETTINGS[column].task,
            record={"x": alpha},
            methods=(f"{SETTINGS[column].task} skill",),
        )
        for column in budget.get("columns", (WALK, "S->R"))
        for alpha in budget["points"]
    }
    methods = {
        f"{task} skill": Method(
            functools.partial(make_interpolated, task), SKILL, Style(*look)
        )
        for task, look in (("walk", ("blue", "o")), ("run", ("vermilion", "D")))
    }
    return table("interpolation", settings, methods)


def table(name: str, settings: Any, methods: Mapping[str, Method]) -> Table:
    """A grid of returns in the walker's tasks."""
    return Table(name, settings, methods, score=table2.score)


# Space -> its place in (layer output, predicted noise, action).
SPACES = {"LoRA layer outputs": 0, "predicted noises": 1, "actions": 2}
LAYER = ("block_{}", "down")  # of the last block: [width]
NEIGHBOURS = 10


def tsne(budget: Budget) -> Table:
    """One row for each space; nothing is rolled out."""
    spaces = {space: Method(make_libraries, SKILL, Style("blue")) for space in SPACES}
    settings = {WALK: target("walk", record={"x": None})}
    measure = functools.partial(embed, budget["points"])
    return Table("tsne", settings, spaces, measure=measure)


def make_libraries(cell: Cell) -> list[Path]:
    """The libraries with both skills."""
    for task in ("walk", "run"):
        table2.train_skill(cell, task)
    return [cell.library(seed) for seed in cell.seeds]


def embed(count: int, cell: Cell, seed: int, library: Path) -> dict[str, Any]:
    """t-SNE of what three policies give in states of their own demonstrations.

    The stand policy is the base: the same network with its skill at strength 0.
    Observations and noises are drawn once for each task, the noised action belongs to
    the middle diffusion step.

    Args:
      count: states of each task.
      cell: whose method names the space.
      seed: of training; states are the same for all.
      library: with both skills.

    Returns:
      "points" {task: [[x, y], ...]}, "dimensions" of the space and "agreement": the
      share of a point's nearest neighbours, in the space itself, that are of its task.
    """
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors

    del seed
    job, strength = cell.job, cell.job.skill.alpha
    of_task = {"stand": ("walk", 0.0), "walk": ("walk", strength)}
    of_task["run"] = ("run", strength)
    spaces = []
    for number, (task, (skill, alpha)) in enumerate(of_task.items()):
        policy = compose(library, [skill], alpha=[alpha])
        stage = job.base if task == "stand" else job.skill
        demos = load_demos(job.data, ENV.format(task), stage.episodes)
        generator = np.random.default_rng(number)
        chosen = generator.choice(len(demos.dataset.obs), count, replace=False)
        keys = jax.random.split(jax.random.key(number), count)
        obs, action = demos.dataset.obs[chosen], demos.dataset.action[chosen]
        spaces.append(inside(policy, keys, obs, action)[SPACES[cell.method]])
    vectors = np.concatenate([np.asarray(space) for space in spaces])
    label = np.repeat(np.arange(len(of_task)), count)
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(vectors)
    others = near.kneighbors(return_distance=False)
    plane = TSNE(perplexity=min(30, count / 2), random_state=0).fit_transform(vectors)
    plane = plane.astype(float).round(2)
    return {
        "points": {task: plane[label == i].tolist() for i, task in enumerate(of_task)},
        "dimensions": vectors.shape[1],
        "agreement": float(np.mean(label[others] == label[:, None])),
    }


@functools.partial(jax.jit, static_argnums=0)
def _inside(config: Any, params: Any, keys: Any, obs: Any, action: Any) -> Any:
    net = network_of(config)
    t = jnp.asarray(config.process.steps // 2)
    layer = (LAYER[0].format(config.network.blocks - 1), LAYER[1])

    def one(key: Any, obs: Any, action: Any) -> Any:
        a_t = corrupt(config.process, action, t, jax.random.normal(key, action.shape))
        eps, seen = net.apply(
            {"params": params.base, "skills": params.library},
            params.normaliser(obs),
            a_t,
            t.astype(jnp.float32),
            params.gate["head"]["alpha"],
            capture_intermediates=lambda module, _: module.path == layer,
            mutable="intermediates",
        )
        return seen["intermediates"][layer[0]][layer[1]]["__call__"][0], eps

    return jax.vmap(one)(keys, obs, action)


def inside(
    policy: Policy, keys: jax.Array, obs: np.ndarray, action: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Layer outputs [N, width], predicted noises [N, A] and actions [N, A].

    Args:
      policy: one skill at a fixed strength.
      keys: [N].
      obs: [N, S], raw.
      action: [N, A], of the demonstrations; it is noised before it goes in.
    """
    layer, eps = _inside(policy.config, policy.params, keys, obs, action)
    return layer, eps, policy.act(keys, obs)


def alpha_trace(budget: Budget) -> Table:
    """The paper's gate and the support, with one skill and with two."""
    del budget
    settings = {
        name: dataclasses.replace(SETTINGS[name], record={"x": None})
        for name in (WALK, "S+W->R")
    }
    methods = rows("PSEC", "Support")
    return Table("alpha_trace", settings, methods, measure=trace)


def trace(cell: Cell, seed: int, made: Made) -> dict[str, Any]:
    """One episode: "reward" [N] and "alpha" {skill: [N]} of every step."""
    del made
    policy = compose(cell.library(seed), gate=table2.gate_name(cell.method, cell.name))
    seen = make_trace(policy, cell.setting.env, 1, cell.job.evaluation.seed)
    return {
        "reward": seen.reward.astype(float).round(3).tolist(),
        "alpha": {
            name: seen.alpha[:, k].astype(float).round(3).tolist()
            for k, name in enumerate(seen.names)
        },
    }


Draw = Callable[[Table, Sequence[results.Raw], Mapping[str, Any], str], mpl.Figure]


@dataclass(frozen=True)
class Figure:
    """What is measured for a figure, and how it is drawn.

    Attributes:
      table: budget -> grid.
      note: beginning of the caption, which goes on with what was measured.
      draw: (grid, raw results, their summary, caption) -> figure.
      measured: whether this command measures what is missing.
    """

    table: Callable[[Budget], Table]
    note: str
    draw: Draw
    measured: bool = True


def line(**look: Any) -> Draw:
    """Lines against the number "x" of the raw results."""

    def draw(grid: Table, raws: Any, summary: Any, caption: str) -> mpl.Figure:
        reported = PAPER.get(grid.name, {})
        return plots.lines(
            tables.of_metric(summary, "return"),
            {raw["setting"]: raw["x"] for raw in raws},
            styles(grid),
            caption=caption,
            paper={m: {float(x): y for x, y in v.items()} for m, v in reported.items()},
            **look,
        )

    return draw


def styles(grid: Table) -> dict[str, Style]:
    """How the methods of a grid are drawn."""
    return {name: method.style for name, method in grid.methods.items()}


PAPER = grid.paper("figures")
WITH_BASE = f"{tables.INTERVALS}; Base: the stand policy;"
FIGURES = {
    "table2": Figure(
        lambda budget: table2.TABLE,
        f"S, W, R: stand, walk, run. {tables.INTERVALS}; dots: seeds; hatched: fixed "
        "weights, dotted: learned support;",
        lambda grid, raws, summary, caption: plots.table(
            tables.of_metric(summary, "return"),
            styles(grid),
            table2.TABLE.paper,
            "Walker: composed skills from 10 demonstrations each",
            caption,
        ),
        measured=False,
    ),
    "sample_efficiency": Figure(
        sample_efficiency,
        WITH_BASE,
        line(
            x_label="demonstrations of walking (trajectories of 1000 steps)",
            title="Sample efficiency, stand to walk",
            log=True,
        ),
    ),
    "training_efficiency": Figure(
        training_efficiency,
        "Every point is a run of its own with its own decay of the learning rate; the "
        f"paper's numbers: 10 k steps of 2048. {WITH_BASE}",
        line(
            x_label="training steps of the skill or of Scratch",
            title="Training efficiency without a gate, stand to walk",
            log=True,
        ),
    ),
    "gate": Figure(
        gate,
        f"{tables.INTERVALS}; dots: seeds. Fixed weights are tuned by returns;",
        lambda grid, raws, summary, caption: plots.groups(
            tables.of_metric(summary, "return")[WALK],
            styles(grid),
            GATE_GROUPS,
            GATE_LABELS,
            table2.TABLE.paper[WALK],
            "With and without a gate that sees the state, stand to walk",
            caption,
        ),
    ),
    "rank": Figure(
        rank,
        f"MLP: adapters of rank 8 with a non-linearity. {WITH_BASE}",
        line(
            x_label="rank of the LoRA skill",
            title="Rank of the skill, stand to walk",
            log=True,
            ticks={r: str(r) for r in (4, 8, 16, 32, 64)} | {MLP_AT: "MLP"},
        ),
    ),
    "interpolation": Figure(
        interpolation,
        f"{tables.INTERVALS};",
        line(
            x_label="alpha, the strength of the skill (0: the stand policy alone)",
            title="Interpolation and extrapolation of one skill in its own task",
            mark=(16, "trained at 16"),
        ),
    ),
    "tsne": Figure(
        tsne,
        "States of each task's own demonstrations; layer: output of the last block "
        "with its skill; neighbours: the 10 nearest before the projection;",
        lambda grid, raws, summary, caption: plots.points(
            raws, tuple(SPACES), "What stand, walk and run share (t-SNE)", caption
        ),
    ),
    "alpha_trace": Figure(
        alpha_trace,
        "The first evaluation episode;",
        lambda grid, raws, summary, caption: plots.traces(
            raws,
            tuple(SETTINGS),
            "alpha(s) along one episode (grey: reward)",
            caption,
        ),
    ),
}


def variant(job: Job, changes: Mapping[str, Any]) -> str:
    """Directory of the runs of a changed job; "" where they are the table's own.

    Evaluation is no part of a run, so only changes of training need another one.
    """
    tags = []
    for name, value in sorted(changes.items()):
        section, key = name.split(".")
        if section != "evaluation" and getattr(getattr(job, section), key) != value:
            tags.append(f"{name}-{value}")
    return f"variants/{'_'.join(tags)}" if tags else ""


def measure(
    name: str,
    job: Job,
    root: Path,
    folder: Path,
    report: Callable[[str], None] = print,
    **options: Any,
) -> bool:
    """Measures every missing result of a figure; `grid.run` has the options."""
    budget = lookup(BUDGETS[name], job.preset, "preset")
    common = dict(budget.get("changes", {}))
    if budget.get("episodes"):
        common["evaluation.episodes"] = budget["episodes"]
    return grid.run(
        FIGURES[name].table(budget),
        job.changed(common | {"table.seeds": budget["seeds"]}),
        root,
        folder,
        report,
        **options,
        variant=lambda setting: variant(job, common | dict(setting.changes)),
        borrow=table2.TABLE.path(folder),
    )


def draw(name: str, folder: Path) -> Path:
    """Draws one figure from raw results alone; returns the path of its .png.

    Raises:
      InputError: there are no raw results.
    """
    figure = lookup(FIGURES, name, "figure")
    # The points that were measured need not be those of any preset.
    table = figure.table({"points": ()})
    raws = results.read_all(table.path(folder))
    if table.name != "table2":
        names = sorted({raw["setting"] for raw in raws})
        table = dataclasses.replace(table, settings=dict.fromkeys(names))
    raws = [
        raw
        for raw in raws
        if raw["setting"] in table.settings and raw["method"] in table.methods
    ]
    caption = f"{figure.note} {results.conditions(raws)}"
    drawn = figure.draw(table, raws, tables.summarise(table, raws), caption)
    return plots.save(drawn, Path(folder) / "figures", name)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then draw."""
    if len(argv) != 2:
        raise InputError(
            f"got {len(argv) - 1} names, expected one of {', '.join(FIGURES)}"
        )
    name = argv[1]
    figure = lookup(FIGURES, name, "figure")
    folder = Path(FLAGS["results"].value)
    if figure.measured and not FLAGS["plot_only"].value:
        job, root = dmc_walker.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
        if not measure(name, job, root, folder, **grid.options(FLAGS)):
            return
    print(f"figure   {draw(name, folder)}")


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags(
        "results/dmc_walker", RUNS, rows=False
    ) | {
        "plot_only": flags.DEFINE_bool(
            "plot_only", False, "Only draw again, from the raw results."
        ),
    }
    run(main)
