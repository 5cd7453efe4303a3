"""Figures of the paper's experiments on DeepMind Control walker.

    python -m experiments.figures sample_efficiency --preset=standard

runs what is missing, keeps its raw results in results/dmc_walker/raw_figures/NAME/ and
draws results/dmc_walker/figures/NAME.png and .svg from those files alone; --plot_only
only draws. NAME is one of

  table2               every method of Table 2 (of experiments.table2, which runs it)
  sample_efficiency    return against the number of demonstrations
  training_efficiency  return of one skill without a gate against training steps
  gate                 learned gate, fixed weights and support, at every level
  rank                 return against the rank of the LoRA skill, and an MLP skill
  interpolation        return against the strength alpha of one skill
  tsne                 layer outputs, predicted noises and actions of three tasks
  alpha_trace          alpha(s) along an episode

Runs lie beside those of experiments.table2, so a base or skill is trained once. With
Table 2 there, a figure of the standard preset takes 1 to 15 minutes of 2 CPU cores; its
budgets, some smaller than the table's, stand under it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import plots, results, table2
from experiments.configs.dmc_walker import get_config
from experiments.table2 import ENV, SETTINGS, Place
from experiments.tools.rollout import make_trace
from psec_jax.composition import network_of
from psec_jax.errors import InputError, lookup
from psec_jax.files import read_json
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, load_base
from psec_jax.policy import compose as load_composition
from psec_jax.process import corrupt
from psec_jax.workflows.demonstrations import load_demos

WALK = "S->W"
SKILL_ONLY = ("base", "skill")  # trained where no gate is
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

MLP_AT = 128  # where the MLP skill stands on the axis of ranks
PAPER = {
    "sample_efficiency": {
        "PSEC": {10: 688, 30: 862, 50: 936, 100: 974},
        "NSEC": {10: 321, 30: 748, 50: 906, 100: 974},
        "ASEC": {10: 66, 30: 447, 50: 721, 100: 818},
        "Scratch": {10: 59, 30: 407, 50: 850, 100: 911},
    },
    "training_efficiency": {
        "LoRA skill": {10_000: 495},
        "MLP skill": {10_000: 303},
        "Scratch": {10_000: 87},
    },
    "rank": {
        "PSEC": {4: 510, 8: 680, 16: 478, 32: 476, 64: 537},
        "PSEC (MLP)": {MLP_AT: 424},
    },
}


@dataclass(frozen=True)
class Variant(Place):
    """Runs on another budget than the table's, in a library of their own.

    Attributes:
      tag: what differs.
    """

    tag: str = ""

    @property
    def folder(self) -> Path:
        """Of everything but the base."""
        return self.root / f"seed{self.seed}" / "variants" / self.tag

    @property
    def library(self) -> Path:
        """The library, with a copy of the table's base."""
        return self.folder / "library"

    def workdir(self, name: str) -> Path:
        """The folder of one run; the base's is the table's."""
        if name == "base":
            return super().workdir(name)
        return self.folder / "runs" / name

    def scratch(self, task: str) -> Path:
        """The library that holds one scratch policy."""
        return self.folder / f"scratch-{task}"


@dataclass(frozen=True)
class Cell:
    """One point of a figure.

    Attributes:
      setting: what was varied, with its value.
      method: the series.
      measure: place -> raw result.
      x: place on the figure's axis; None where it has none.
      changes: config fields beside the figure's own.
      table: key of `table2.SETTINGS` where Table 2 may hold the same cell.
      trained: the stages whose budget counts.
    """

    setting: str
    method: str
    measure: Callable[[Place], dict[str, Any]]
    x: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None
    trained: tuple[str, ...] = results.STAGES


def make_place(
    config: ConfigDict, root: Path, seed: int, changes: Mapping[str, Any]
) -> Place:
    """Where the runs of a config with some changes lie: the table's place if it can be.

    Evaluation is no part of a run, so only changes of training need another place.
    """
    changed = {}
    for name, value in changes.items():
        section, key = name.split(".")
        if config[section][key] != value:
            changed[name] = value
    mine = ConfigDict(config.to_dict())
    mine.update_from_flattened_dict(changed)
    trained = {n: v for n, v in changed.items() if not n.startswith("evaluation.")}
    if not trained:
        return Place(mine, root, seed)
    tag = "_".join(f"{name}-{value}" for name, value in sorted(trained.items()))
    return Variant(mine, root, seed, tag)


def prepare(place: Place) -> None:
    """Train the base, and copy it into the library of a variant."""
    if not isinstance(place, Variant):
        table2.train_base(place)
        return
    original = Place(place.config, place.root, place.seed)
    table2.train_base(original)
    params, normaliser, card = SkillLibrary.open(original.library).load_base()
    SkillLibrary.create(place.library).add_base(
        params, normaliser, card, overwrite=True
    )


def roll_out(
    make: Callable[[Place], Policy], column: str, method: str, place: Place
) -> dict[str, Any]:
    """The raw result of a policy in the task of one column of Table 2."""
    return table2.roll_out(place, make(place), column, method)


def row(column: str, method: str, place: Place) -> Policy:
    """The policy of one cell of Table 2."""
    if method == "Base":
        return load_base(place.library)
    if method == "Scratch":
        return table2.train_scratch(place, SETTINGS[column].task)
    first = Place(place.config, place.root, 0)
    return table2.train_composition(place, column, method, first)


def alone(task: str, adapter: str, alpha: float | None, place: Place) -> Policy:
    """One skill at a fixed strength, by default the one it was trained at."""
    name = table2.train_skill(place, task, adapter)
    alpha = place.config.skill.alpha if alpha is None else alpha
    return load_composition(place.library, [name], alpha=[float(alpha)])


def _row_cell(
    setting: str,
    method: str,
    x: float | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Cell:
    make = functools.partial(row, WALK, method)
    measure = functools.partial(roll_out, make, WALK, method)
    return Cell(setting, method, measure, x, changes or {}, WALK)


def sample_efficiency_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """Every method at every number of demonstrations."""
    cells = [
        _row_cell(f"{WALK}, {n} trajectories", method, n, {"skill.episodes": n})
        for n in budget["points"]
        for method in ("PSEC", "NSEC", "ASEC", "Scratch", "Support")
    ]
    return [_row_cell(WALK, "Base"), *cells]


def training_efficiency_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """One run for every number of steps and kind of skill."""
    kinds = {
        "LoRA skill": functools.partial(alone, "walk", "lora", None),
        "MLP skill": functools.partial(alone, "walk", "mlp", None),
        "Scratch": functools.partial(row, WALK, "Scratch"),
    }
    cells = [_row_cell(WALK, "Base")]
    for steps in budget["points"]:
        for method, make in kinds.items():
            measure = functools.partial(roll_out, make, WALK, method)
            setting, changes = f"{WALK}, {steps} steps", {"skill.steps": steps}
            cells.append(
                Cell(setting, method, measure, steps, changes, trained=SKILL_ONLY)
            )
    return cells


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


def gate_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """Cells of Table 2."""
    del budget
    methods = [method for group in GATE_GROUPS.values() for method in group]
    return [_row_cell(WALK, method) for method in methods]


def rank_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """PSEC and the support on skills of every rank."""
    cells = [
        _row_cell(f"{WALK}, rank {rank}", method, rank, {"skill.rank": rank})
        for rank in budget["points"]
        for method in ("PSEC", "Support")
    ]
    mlp = _row_cell(f"{WALK}, MLP", "PSEC (MLP)", MLP_AT)
    return [_row_cell(WALK, "Base"), *cells, mlp]


def interpolation_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """Every strength of the walk skill and of the run skill."""
    cells = []
    for column in budget.get("columns", (WALK, "S->R")):
        task = SETTINGS[column].task
        method = f"{task} skill"
        for alpha in budget["points"]:
            make = functools.partial(alone, task, "lora", alpha)
            measure = functools.partial(roll_out, make, column, method)
            setting = f"{column}, alpha {alpha}"
            cells.append(Cell(setting, method, measure, alpha, trained=SKILL_ONLY))
    return cells


# Space -> what is taken of (layer output, predicted noise, action).
SPACES = {"LoRA layer outputs": 0, "predicted noises": 1, "actions": 2}
LAYER = ("block_{}", "down")  # of the last block: [width]
NEIGHBOURS = 10


def tsne_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """One cell for each space."""
    cells = []
    for space in SPACES:
        measure = functools.partial(embed, budget["points"], space)
        cells.append(Cell(WALK, space, measure, trained=SKILL_ONLY))
    return cells


def embed(count: int, space: str, place: Place) -> dict[str, Any]:
    """t-SNE of what three policies give in states of their own demonstrations.

    The stand policy is the base: the same network with its skill at strength 0.
    Observations and noises are drawn once for each task, the noised action is that of
    the middle diffusion step.

    Args:
      count: states of each task.
      space: a key of `SPACES`.
      place: of the skills.

    Returns:
      Raw result with "points" {task: [[x, y], ...]}, "dimensions" of the space and
      "agreement": the share of a point's nearest neighbours, in the space itself, that
      are of its own task.
    """
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors

    skills = {task: table2.train_skill(place, task, "lora") for task in ("walk", "run")}
    strength = place.config.skill.alpha
    of_task = {
        "stand": (skills["walk"], 0.0),
        "walk": (skills["walk"], strength),
        "run": (skills["run"], strength),
    }
    found = []
    for number, (task, (skill, alpha)) in enumerate(of_task.items()):
        policy = load_composition(place.library, [skill], alpha=[alpha])
        stage = place.config.base if task == "stand" else place.config.skill
        demos = load_demos(place.config, ENV.format(task), stage.episodes)
        generator = np.random.default_rng(number)
        rows = generator.choice(len(demos.dataset.obs), count, replace=False)
        keys = jax.random.split(jax.random.key(number), count)
        found.append(
            inside(policy, keys, demos.dataset.obs[rows], demos.dataset.action[rows])
        )
    vectors = np.concatenate([np.asarray(f[SPACES[space]]) for f in found])
    label = np.repeat(np.arange(len(of_task)), count)
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(vectors)
    others = near.kneighbors(return_distance=False)
    plane = TSNE(perplexity=min(30, count / 2), random_state=0).fit_transform(vectors)
    plane = plane.astype(float).round(2)
    return results.header(place.config.to_dict(), WALK, space, place.seed) | {
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


def alpha_trace_cells(budget: Mapping[str, Any]) -> list[Cell]:
    """The paper's gate and the support, with one skill and with two."""
    del budget
    return [
        Cell(column, method, functools.partial(trace, column, method))
        for column in (WALK, "S+W->R")
        for method in ("PSEC", "Support")
    ]


def trace(column: str, method: str, place: Place) -> dict[str, Any]:
    """One episode: "reward" [N] and "alpha" {skill: [N]} of every step."""
    policy = row(column, method, place)
    env = ENV.format(SETTINGS[column].task)
    seen = make_trace(policy, env, 1, place.config.evaluation.seed)
    return results.header(place.config.to_dict(), column, method, place.seed) | {
        "reward": seen.reward.astype(float).round(3).tolist(),
        "alpha": {
            name: seen.alpha[:, k].astype(float).round(3).tolist()
            for k, name in enumerate(seen.names)
        },
    }


@dataclass(frozen=True)
class Spec:
    """What is measured for a figure, and how it is drawn.

    Attributes:
      cells: budget -> cells; None where experiments.table2 measures.
      draw: raw files -> figure.
    """

    cells: Callable[[Mapping[str, Any]], list[Cell]] | None
    draw: Callable[[plots.Raws], Figure]


INTERVALS = "Mean and 95 % bootstrap interval (over seeds, then episodes)"
WITH_BASE = f"{INTERVALS}; Base: the stand policy;"
FIGURES = {
    "table2": Spec(
        None,
        functools.partial(
            plots.table,
            methods=table2.METHODS,
            paper=table2.PAPER,
            title="Walker: composed skills from 10 demonstrations each",
            note=f"S, W, R: stand, walk, run. {INTERVALS}; dots: seeds; hatched: fixed "
            "weights, dotted: learned support;",
        ),
    ),
    "sample_efficiency": Spec(
        sample_efficiency_cells,
        functools.partial(
            plots.lines,
            x_label="demonstrations of walking (trajectories of 1000 steps)",
            title="Sample efficiency, stand to walk",
            note=WITH_BASE,
            paper=PAPER["sample_efficiency"],
            log=True,
        ),
    ),
    "training_efficiency": Spec(
        training_efficiency_cells,
        functools.partial(
            plots.lines,
            x_label="training steps of the skill or of Scratch",
            title="Training efficiency without a gate, stand to walk",
            note="Every point is a run of its own with its own decay of the learning "
            f"rate; the paper's numbers: 10 k steps of 2048. {WITH_BASE}",
            paper=PAPER["training_efficiency"],
            log=True,
        ),
    ),
    "gate": Spec(
        gate_cells,
        functools.partial(
            plots.groups,
            members=GATE_GROUPS,
            labels=GATE_LABELS,
            paper=table2.PAPER[WALK],
            title="With and without a gate that sees the state, stand to walk",
            note=f"{INTERVALS}; dots: seeds. Fixed weights are tuned by returns;",
        ),
    ),
    "rank": Spec(
        rank_cells,
        functools.partial(
            plots.lines,
            x_label="rank of the LoRA skill",
            title="Rank of the skill, stand to walk",
            note=f"MLP: adapters of rank 8 with a non-linearity. {WITH_BASE}",
            paper=PAPER["rank"],
            log=True,
            ticks={r: str(r) for r in (4, 8, 16, 32, 64)} | {MLP_AT: "MLP"},
        ),
    ),
    "interpolation": Spec(
        interpolation_cells,
        functools.partial(
            plots.lines,
            x_label="alpha, the strength of the skill (0: the stand policy alone)",
            title="Interpolation and extrapolation of one skill in its own task",
            note=f"{INTERVALS};",
            paper={},
            mark=(16, "trained at 16"),
        ),
    ),
    "tsne": Spec(
        tsne_cells,
        functools.partial(
            plots.points,
            order=tuple(SPACES),
            title="What stand, walk and run share (t-SNE)",
            note="States of each task's own demonstrations; layer: output of the last "
            "block with its skill; neighbours: the 10 nearest before the projection;",
        ),
    ),
    "alpha_trace": Spec(
        alpha_trace_cells,
        functools.partial(
            plots.traces,
            order=tuple(SETTINGS),
            title="alpha(s) along one episode (grey: reward)",
            note="The first evaluation episode;",
        ),
    ),
}


def raw_kind(name: str) -> str:
    """The subfolder of a results folder that holds a figure's raw files."""
    return "raw" if FIGURES[name].cells is None else f"raw_figures/{name}"


def run_cells(
    name: str,
    config: ConfigDict,
    root: Path,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Measure every missing cell of a figure, seed by seed."""
    budget = lookup(BUDGETS[name], config.preset, "preset")
    common = dict(budget.get("changes", {}))
    if budget.get("episodes"):
        common["evaluation.episodes"] = budget["episodes"]
    for seed in budget["seeds"]:
        for cell in FIGURES[name].cells(budget):
            changes = common | dict(cell.changes)
            place = make_place(config, root, seed, changes)
            identity = (cell.setting, cell.method, seed)
            path = results.raw_path(folder, *identity, raw_kind(name))
            fingerprint = results.config_fingerprint(place.config.to_dict())
            if results.read_raw(path, fingerprint) is not None:
                continue
            raw = _from_table(folder, cell, seed, fingerprint)
            if raw is None:
                prepare(place)
                raw = cell.measure(place)
            budgets = {
                s: size for s, size in raw["budget"].items() if s in cell.trained
            }
            here = {"setting": cell.setting, "x": cell.x, "budget": budgets}
            results.write_raw(path, raw | here)
            mean = f": mean {raw['mean']:.1f}" if "mean" in raw else ""
            report(f"{cell.setting} {cell.method} seed {seed}{mean}")


def _from_table(
    folder: Path, cell: Cell, seed: int, fingerprint: str
) -> dict[str, Any] | None:
    """The same cell of Table 2, if it was measured with the same config."""
    if cell.table is None:
        return None
    path = results.raw_path(folder, cell.table, cell.method, seed)
    if not path.exists():
        return None
    raw = read_json(path)
    return raw if raw["config_fingerprint"] == fingerprint else None


def draw(name: str, folder: Path) -> Path:
    """Draw one figure from raw files alone; returns the path of its .png.

    Raises:
      InputError: there are no raw files.
    """
    spec = lookup(FIGURES, name, "figure")
    figure = spec.draw(results.load_all(folder, raw_kind(name)))
    return plots.save(figure, Path(folder) / "figures", name)


def draw_table2(folder: Path) -> Path:
    """The bars of Table 2 in a results folder; returns the path of its .png."""
    return draw("table2", folder)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then draw."""
    if len(argv) != 2:
        raise InputError(
            f"got {len(argv) - 1} names, expected one of {', '.join(FIGURES)}"
        )
    name = argv[1]
    spec = lookup(FIGURES, name, "figure")
    folder = Path(FLAGS["results"].value)
    if spec.cells is not None and not FLAGS["plot_only"].value:
        config = get_config(FLAGS["preset"].value)
        root = Path(FLAGS["workdir"].value or f"runs/dmc_walker/{config.preset}")
        cache = str(root.absolute() / "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
        run_cells(name, config, root, folder, print)
    print(f"figure   {draw(name, folder)}")


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS = {
        "preset": flags.DEFINE_string(
            "preset", "standard", "quick, standard or paper."
        ),
        "results": flags.DEFINE_string(
            "results", "results/dmc_walker", "Folder of raw results and figures."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, "Folder of runs; default runs/dmc_walker/PRESET."
        ),
        "plot_only": flags.DEFINE_bool(
            "plot_only", False, "Only draw again, from the raw files."
        ),
    }
    run(main)
