r"""Many tasks, one after the other: performance, forgetting and forward transfer.

    make setup-metaworld
    python -m experiments.continual --sequence=cw10 --preset=standard

learns the tasks of a sequence (docs/continual.md lists them, or a file) in order on a
base that was pretrained on others, from demonstrations that are made on the spot, and
after every task plays all tasks so far: R[i, j] is the score after task i on task j. It
writes to results/continual/ the raw results (SEQUENCE.jsonl), tables and figures made
of them. Finished runs and results are kept: start it again after a stop.
docs/continual.md explains rows and columns; --plan prints the hours first, and
--minutes stops in time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import flags

from experiments import grid, intervals, packnet, plots, results, tables, tasks
from experiments.configs import continual
from experiments.grid import Cell, Method, Order, Table
from experiments.results import Raw, needed
from experiments.style import FIXED, Style
from experiments.table2 import level_changes
from experiments.tasks import Task, TaskData, TaskSequence
from psec_jax import envs, tree
from psec_jax.agents import cloning
from psec_jax.cli import no_arguments
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.evaluation import environments, episode_fields
from psec_jax.files import read_bytes, write_atomic
from psec_jax.gating import SEARCHED
from psec_jax.library import SkillLibrary, read_arrays
from psec_jax.policy import Policy, compose, load_base
from psec_jax.types import Params
from psec_jax.workflows import Job, auto
from psec_jax.workflows.demonstrations import demonstrations, load_demos

RUNS = "runs/continual"
# Of Continual World (Wolczyk et al. 2021), as `ewc_strength` and `packnet_retraining`.
FISHER_ROWS = 2560
FISHER_LEAST = 1e-5


@dataclass(frozen=True)
class Setting(grid.Setting):
    """A sequence as the one column of its table."""

    sequence: TaskSequence = dataclasses.field(
        default_factory=lambda: TaskSequence("", (), ())
    )


class Learned(NamedTuple):
    """What a method made of a sequence.

    Attributes:
      policy: (i, j) -> the policy after task i for task j; i may be -1, and is below j
        before task j is learned.
      seconds: of training, the base aside.
      stored: (library, kind, name) of the entries that are kept beside the base.
      numbers: that are kept besides, in no entry.
      size: their bytes.
    """

    policy: Callable[[int, int], Policy]
    seconds: float
    stored: Sequence[tuple[Path, str, str]] = ()
    numbers: int = 0
    size: int = 0


class Learner:
    """The trainings of one method on a sequence, for all seeds of a cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.sequence = cell, cell.setting.sequence
        self.tasks: tuple[Task, ...] = self.sequence.tasks
        self.data: TaskData = data_of(cell)
        self.seconds = dict.fromkeys(cell.seeds, 0.0)
        grid.train(
            cell,
            "base",
            "base",
            name="base",
            data=self.data.base,
            changes={"base.episodes": 0},
        )

    def train(self, stage: str, run: str, **request: Any) -> None:
        """`grid.train`, with its seconds counted."""
        trained = grid.train(self.cell, stage, run, **request)
        for seed, result in zip(self.cell.seeds, trained, strict=True):
            self.seconds[seed] += (result["summary"] or {}).get("seconds", 0.0)

    def train_base(self, name: str, task: Task | None, **request: Any) -> None:
        """A whole policy in a library of its own, on a skill's budget."""
        if task is not None:
            request |= {"env": task.env, "data": self.data.files[task.name]}
        self.train("base", name, library=name, name=name, section="skill", **request)

    def train_skills(self) -> None:
        """A skill of each task on the frozen base."""
        for task in self.sequence.until(len(self.tasks)):
            path = self.data.files[task.name]
            self.train("skill", task.name, name=task.name, env=task.env, data=path)

    def result(
        self,
        policy: Callable[[int, int, int], Policy],
        stored: Sequence[tuple[str, str, str]],
        numbers: int = 0,
        size: int = 0,
    ) -> list[Learned]:
        """What is learned, of each seed.

        Args:
          policy: (seed, i, j) -> the policy.
          stored: (library, kind, name).
          numbers: as of `Learned`.
          size: likewise.
        """
        return [
            Learned(
                lambda i, j, seed=seed: policy(seed, i, j),
                self.seconds[seed],
                [(self.cell.library(seed, root), *entry) for root, *entry in stored],
                numbers,
                size,
            )
            for seed in self.cell.seeds
        ]

    def known(
        self, chosen: Callable[[int, int], Policy], root: str = "library"
    ) -> Callable[[int, int, int], Policy]:
        """The policy of the last visit of a task that is known; before, the base.

        Args:
          chosen: (seed, visit) -> the policy.
          root: library of the base.
        """

        def policy(seed: int, i: int, j: int) -> Policy:
            visit = self.sequence.visit(i, j)
            if visit is None:
                return load_base(self.cell.library(seed, root))
            return chosen(seed, visit)

        return policy


def data_of(cell: Cell) -> TaskData:
    """Demonstrations of a cell's sequence."""
    return tasks.prepare(cell.setting.sequence, cell.job, cell.root / "data")


def make_joint(cell: Cell) -> list[Learned]:
    """The base, trained on with all tasks at once, on the budgets of all."""
    learner = Learner(cell)
    different = learner.sequence.until(len(learner.tasks))
    steps = cell.job.skill.steps * len(learner.tasks)
    learner.train_base(
        "joint",
        None,
        data=_merged(learner, different),
        start=cell.library,
        changes={"skill.episodes": 0, "skill.steps": steps},
    )
    return learner.result(
        learner.known(lambda seed, visit: load_base(cell.library(seed, "joint"))), []
    )


def make_scratch(cell: Cell) -> list[Learned]:
    """A policy of its own for each task."""
    learner = Learner(cell)
    different = learner.sequence.until(len(learner.tasks))
    for task in different:
        learner.train_base(f"scratch-{task.name}", task)
    spent = dict(learner.seconds)
    for task in different:  # as good as untrained: where learning starts
        start = {"skill.steps": 1}
        learner.train_base(f"untrained-{task.name}", task, changes=start)
    learner.seconds = spent

    def policy(seed: int, i: int, j: int) -> Policy:
        before = learner.sequence.visit(i, j) is None
        name = f"{'untrained' if before else 'scratch'}-{learner.tasks[j].name}"
        return load_base(cell.library(seed, name))

    entries = [(f"scratch-{task.name}", "base", "base") for task in different]
    return learner.result(policy, entries)


def make_fine_tuning(cell: Cell) -> list[Learned]:
    """The base, all of which each task trains on."""
    return _tuned(cell, "tuned", lambda seed, i: None)


def make_ewc(cell: Cell) -> list[Learned]:
    """The same, with a pull to the parameters before each task by the Fisher
    information of the tasks so far (Kirkpatrick et al. 2017)."""

    def pull(seed: int, i: int) -> Params | None:
        if i == 0:
            return None
        sums = [_fisher(cell, seed, j) for j in range(i)]
        strength = cell.job.table.ewc_strength
        return jax.tree.map(lambda *leaves: strength * np.sum(leaves, axis=0), *sums)

    learned = _tuned(cell, "ewc", pull)
    # One weight a parameter, for all tasks together.
    count = tree.size(load_base(cell.library(cell.seeds[0])).params.base)
    return [one._replace(numbers=count, size=4 * count) for one in learned]


def _tuned(
    cell: Cell, name: str, anchor: Callable[[int, int], Params | None]
) -> list[Learned]:
    """The base, trained on task by task, with an anchor of (seed, task)."""
    learner, before = Learner(cell), "library"
    for i, task in enumerate(learner.tasks):
        learner.train_base(
            f"{name}-{i}",
            task,
            start=lambda seed, before=before: cell.library(seed, before),
            anchor=lambda seed, i=i: anchor(seed, i),
        )
        before = f"{name}-{i}"

    def policy(seed: int, i: int, j: int) -> Policy:
        return load_base(cell.library(seed, "library" if i < 0 else f"{name}-{i}"))

    return learner.result(policy, [])


def _fisher(cell: Cell, seed: int, i: int) -> Params:
    """The Fisher information of task i where EWC has learned it, kept in its run."""
    path = cell.workdir(seed, f"ewc-{i}") / "fisher.safetensors"
    if not path.exists():
        task = cell.setting.sequence.tasks[i]
        policy = load_base(cell.library(seed, f"ewc-{i}"))
        network, process = policy.config.network, policy.config.process
        demos = load_demos(
            cell.job.data,
            task.env,
            cell.job.skill.episodes,
            data_of(cell).files[task.name],
        )
        rows = demonstrations(demos, policy.params.normaliser, process.horizon)
        # Beside the keys of the training, which are split(key(seed)), fold_in 0 and 1.
        own_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), i)
        draw_key, noise_key = jax.random.split(own_key)
        index = jax.random.randint(draw_key, (FISHER_ROWS,), 0, len(rows.obs))
        measured = jax.jit(cloning.fisher, static_argnums=0)(
            cloning.CloningConfig(network, process),
            policy.params.base,
            jax.tree.map(lambda column: column[index], rows),
            noise_key,
        )
        least = {
            name: np.maximum(leaf, FISHER_LEAST)
            for name, leaf in tree.flatten(measured).items()
        }
        write_atomic(path, safetensors.numpy.save(least))
    return tree.unflatten(read_arrays(path, read_bytes(path)))


def make_packnet(cell: Cell) -> list[Learned]:
    """One network, in which each task, which is known, has weights of its own.

    PackNet (Mallya and Lazebnik 2018), with the base as the first task: what a task has
    trained is pruned by magnitude to its share of the weights that were free, trained
    on for a while and never changed again. A policy uses the weights of its task and of
    those before it. Biases and norms are the base's.
    """
    learner = Learner(cell)
    different = learner.sequence.until(len(learner.tasks))
    steps = max(1, round(cell.job.table.packnet_retraining * cell.job.skill.steps))
    for i, task in enumerate([None, *different]):
        _pack(learner, i, task, 1 / (len(different) + 1 - i), steps)

    def policy(seed: int, i: int, j: int) -> Policy:
        if learner.sequence.visit(i, j) is None:
            return load_base(cell.library(seed))
        network = _packed(cell, seed, len(learner.sequence.until(i)))
        own = _packed(cell, seed, 1 + different.index(learner.tasks[j]))
        params = packnet.masked(network.params.base, packnet.used(own.params.base))
        return dataclasses.replace(network, params=network.params._replace(base=params))

    masks = packnet.used(_packed(cell, cell.seeds[0], 0).params.base)
    count = len(different) * sum(mask.size for mask in masks.values())
    return learner.result(policy, [], count, count // 8)  # a bit a weight and task


def _packed(cell: Cell, seed: int, i: int) -> Policy:
    """The network after i tasks; its weights that no task owns are 0."""
    return load_base(cell.library(seed, f"packed-{i}"))


def _pack(
    learner: Learner, i: int, task: Task | None, share: float, steps: int
) -> None:
    """Train the free weights on task i, keep a share of them, and train those on.

    Args:
      learner: whose networks.
      i: number of the task; 0 is the base's, which is trained already.
      task: the task, or None for the base's.
      share: of the free weights.
      steps: after pruning.
    """
    cell = learner.cell

    def owned(seed: int) -> packnet.Masks | None:
        return packnet.used(_packed(cell, seed, i - 1).params.base) if i else None

    def free(seed: int) -> Params:
        params = _packed(cell, seed, i - 1).params.base
        return packnet.fixed(
            params, {p: ~m for p, m in packnet.used(params).items()}, True
        )

    if task is not None:
        learner.train_base(
            f"packing-{i}",
            task,
            start=lambda seed: cell.library(seed, f"packed-{i - 1}"),
            anchor=free,
        )
    for seed in cell.seeds:
        trained = cell.library(seed, "library" if task is None else f"packing-{i}")
        params, normaliser, card = SkillLibrary.open(trained).load_base()
        SkillLibrary.create(cell.library(seed, f"pruned-{i}")).add_base(
            packnet.pruned(params, owned(seed), share),
            normaliser,
            card,
            overwrite=True,
        )

    def kept(seed: int) -> Params:
        params = load_base(cell.library(seed, f"pruned-{i}")).params.base
        masks, before = packnet.used(params), owned(seed)
        if before is not None:
            masks = {path: mask & ~before[path] for path, mask in masks.items()}
        return packnet.fixed(params, masks, before is not None)

    data = {} if task is not None else {"data": learner.data.base}
    learner.train_base(
        f"packed-{i}",
        task,
        start=lambda seed: cell.library(seed, f"pruned-{i}"),
        anchor=kept,
        changes={"skill.steps": steps} | ({"skill.episodes": 0} if data else {}),
        **data,
    )


def make_lora(cell: Cell) -> list[Learned]:
    """The skill of the task, which is known."""
    learner = Learner(cell)
    learner.train_skills()
    names = [task.name for task in learner.tasks]
    policy = learner.known(
        lambda seed, visit: compose(cell.library(seed), [names[visit]])
    )
    return learner.result(policy, _skills(learner))


def make_gates(level: str, cell: Cell) -> list[Learned]:
    """A gate of each task, which is known, over all skills so far."""
    learner = Learner(cell)
    learner.train_skills()
    names = []
    for i, task in enumerate(learner.tasks):
        others = [t.name for t in learner.sequence.until(i) if t != task]
        names.append(f"{level}-{i}")
        learner.train(
            "gate",
            names[i],
            changes=level_changes(cell.job, level),
            name=names[i],
            skills=[task.name, *others],
            env=task.env,
            data=learner.data.files[task.name],
        )
    policy = learner.known(
        lambda seed, visit: compose(cell.library(seed), gate=names[visit])
    )
    gates = [("library", "gate", name) for name in names]
    return learner.result(policy, [*_skills(learner), *gates])


def make_one_gate(form: str, cell: Cell) -> list[Learned]:
    """One gate over all skills so far, for tasks that are not known.

    Args:
      form: a support, "neighbour" or "nearest", weights by where the skills'
        demonstrations are, or "linear", the paper's head, trained on the demonstrations
        of all tasks so far.
      cell: of the table.
    """
    learner = Learner(cell)
    learner.train_skills()
    names = []
    for i in range(len(learner.tasks)):
        so_far = learner.sequence.until(i)
        names.append(f"{form}-{len(so_far)}")
        request: dict[str, Any] = {"env": so_far[0].env}
        if form in SEARCHED:
            changes = {"gate.head": "constant", "gate.support": form}
            files = [learner.data.files[task.name] for task in so_far]
            request |= {
                "data": files[0],
                "support_data": files,
                "alpha": [cell.job.skill.alpha] * len(so_far),
            }
        else:
            changes = {"skill.episodes": 0}
            request["data"] = _merged(learner, so_far)
        learner.train(
            "gate",
            names[i],
            changes=changes,
            name=names[i],
            skills=[task.name for task in so_far],
            **request,
        )

    def policy(seed: int, i: int, j: int) -> Policy:
        library = cell.library(seed)
        return load_base(library) if i < 0 else compose(library, gate=names[i])

    return learner.result(policy, [*_skills(learner), ("library", "gate", names[-1])])


def make_expand_or_compose(cell: Cell) -> list[Learned]:
    """For each task, which is known, the least that does it: `workflows.auto`."""
    learner = Learner(cell)
    added: dict[int, dict[str, str | None]] = {}
    for seed in cell.seeds:
        library = cell.library(seed, "auto")
        base = SkillLibrary.open(cell.library(seed)).load_base()
        SkillLibrary.create(library).add_base(*base, overwrite=True)
        kinds = added[seed] = {}
        for task in learner.sequence.until(len(learner.tasks)):
            known = [name for name, kind in kinds.items() if kind == "skill"]
            result = auto.run(
                cell.job,
                auto.Request(
                    workdir=cell.workdir(seed, f"auto-{task.name}"),
                    library=library,
                    name=task.name,
                    seed=seed,
                    env=task.env,
                    data=learner.data.files[task.name],
                    evaluate=False,
                    skills=known,
                    support_data=[learner.data.files[name] for name in known],
                    base_data=learner.data.base,
                ),
            )
            kinds[task.name] = result["kind"]
            learner.seconds[seed] += (result["summary"] or {}).get("seconds", 0.0)

    def chosen(seed: int, visit: int) -> Policy:
        library, name = cell.library(seed, "auto"), learner.tasks[visit].name
        entry = {"skill": {"skills": name}, "gate": {"gate": name}, None: {}}
        return compose(library, **entry[added[seed][name]])

    every = learner.result(learner.known(chosen, "auto"), [])
    return [
        learned._replace(
            stored=[
                (cell.library(seed, "auto"), kind, name)
                for name, kind in added[seed].items()
                if kind is not None
            ]
        )
        for seed, learned in zip(cell.seeds, every, strict=True)
    ]


def _skills(learner: Learner) -> list[tuple[str, str, str]]:
    different = learner.sequence.until(len(learner.tasks))
    return [("library", "skill", task.name) for task in different]


def _merged(learner: Learner, several: Sequence[Task]) -> str:
    """A file of the demonstrations of several tasks."""
    job, files = learner.cell.job, learner.data.files
    demos = [
        load_demos(job.data, task.env, job.skill.episodes, files[task.name])
        for task in several
    ]
    return tasks.merged(demos, several[0].env, learner.cell.root / "data")


BASE = {"base": "base", "skill": "skill"}
GATE = BASE | {"gate": "gate"}
CLONED = BASE | {"gate": "table.cloning"}


def _gates(level: str) -> Callable[[Cell], list[Learned]]:
    return lambda cell: make_gates(level, cell)


def _one_gate(form: str) -> Callable[[Cell], list[Learned]]:
    return lambda cell: make_one_gate(form, cell)


METHODS = {
    "Joint": Method(make_joint, BASE, Style("light", "X")),
    "Scratch": Method(make_scratch, {"skill": "skill"}, Style("dark", "s")),
    "Fine-tuning": Method(make_fine_tuning, BASE, Style("black", "x")),
    "EWC": Method(make_ewc, BASE, Style("black", "d")),
    "PackNet": Method(make_packnet, BASE, Style("dark", "h")),
    "LoRA": Method(make_lora, BASE, Style("purple", "P")),
    "ASEC": Method(_gates("action"), CLONED, Style("orange", "v")),
    "NSEC": Method(_gates("noise"), CLONED, Style("sky", "^")),
    "PSEC": Method(_gates("parameter"), GATE, Style("blue", "o")),
    "PSEC one gate": Method(_one_gate("linear"), GATE, Style("blue", "o", FIXED)),
    "Support": Method(_one_gate("neighbour"), BASE, Style("green", "D", FIXED)),
    "Nearest": Method(_one_gate("nearest"), BASE, Style("green", "D")),
    "Expand or compose": Method(make_expand_or_compose, GATE, Style("vermilion", "p")),
}


def digest(policy: Policy) -> str:
    """16 hex digits of all that decides what a policy does."""
    leaves, form = jax.tree.flatten(policy.params)
    content = hashlib.sha256(f"{policy.config} {form}".encode())
    for leaf in leaves:
        array = np.asarray(leaf)
        content.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return content.hexdigest()[:16]


class Played(NamedTuple):
    """Scores [E] of a policy on a task, the policy's digest, and seconds it took."""

    scores: list[float]
    digest: str
    seconds: float


def play(
    cell: Cell,
    policy: Policy,
    task: Task,
    vector_env: Callable[[], VectorEnv | None] = lambda: None,
) -> Played:
    """The score of each episode: success, or the share of the full return.

    A policy of equal bits is played once in a task; the episodes are kept in
    ROOT/episodes.jsonl.

    Args:
      cell: of one seed.
      policy: to be played.
      task: in which.
      vector_env: makes the environments, called where there is something to play.

    Raises:
      InputError: an environment that reports no success, without a full return.
    """
    count, start = cell.job.evaluation.episodes, cell.job.evaluation.seed
    path, bits = cell.root / "episodes.jsonl", digest(policy)
    name = f"{bits} {count} from {start}"
    raw = results.by_key(path).get((task.env, name, cell.seed))
    if raw is None:
        began = time.perf_counter()
        episodes = grid.play(cell, policy.act, task.env, vector_env)
        raw = results.header(cell.job, task.env, name, cell.seed, {})
        raw |= {"seconds": time.perf_counter() - began}
        raw |= episode_fields(episodes, task.env, start)
        results.append(path, raw)
    full = cell.setting.sequence.full_return
    if "success" in raw:
        scores = [float(value) for value in raw["success"]]
    elif full is not None:
        scores = [value / full for value in raw["returns"]]
    else:
        raise InputError(f"{task.env}: reports no success, and no full_return is given")
    return Played(scores, bits, raw["seconds"])


def measure(cell: Cell, seed: int, learned: Learned) -> dict[str, Any]:
    """Raw fields: "matrix" [i][j <= i][E], "before" [j][E], bits and costs."""
    cell, order = cell.of(seed), cell.setting.sequence.tasks
    before: list[Played] = []
    rows: list[list[Played]] = [[] for _ in order]
    for j, task in enumerate(order):  # all policies in the same simulators
        with contextlib.ExitStack() as stack:
            made = functools.cache(functools.partial(_open, stack, cell, task))
            before.append(play(cell, learned.policy(j - 1, j), task, made))
            for i in range(j, len(order)):
                rows[i].append(play(cell, learned.policy(i, j), task, made))
    numbers, size = _stored(learned.stored)
    numbers, size = numbers + learned.numbers, size + learned.size
    return {
        "tasks": [task.name for task in order],
        "matrix": [[played.scores for played in row] for row in rows],
        "before": [played.scores for played in before],
        "unchanged": [
            [played.digest == rows[j][j].digest for j, played in enumerate(row)]
            for row in rows
        ],
        "demonstrations": dict(data_of(cell).success),
        "parameters": numbers / len(order),
        "bytes": size / len(order),
        "seconds": learned.seconds / len(order),
        "evaluation_seconds": float(np.mean([p.seconds for row in rows for p in row])),
    }


def _open(stack: contextlib.ExitStack, cell: Cell, task: Task) -> VectorEnv | None:
    """Environments until the stack is closed; None where they are on the device."""
    if envs.make_on_device(task.env) is not None:
        return None
    made = environments(task.env, cell.job.evaluation.episodes)
    return stack.enter_context(made)


def _stored(entries: Sequence[tuple[Path, str, str]]) -> tuple[int, int]:
    """Numbers and bytes of library entries."""
    numbers = size = 0
    for root, kind, name in entries:
        for shape, dtype in (
            SkillLibrary.open(root).card(kind, name)["tensors"].values()
        ):
            count = int(np.prod(shape, dtype=np.int64))
            numbers += count
            size += count * np.dtype(dtype).itemsize
    return numbers, size


class Scores(NamedTuple):
    """Scores [N, E] of a raw result: before each task, after it, and at the end."""

    before: np.ndarray
    after: np.ndarray
    last: np.ndarray


def scores_of(raw: Raw) -> Scores:
    """The scores of a raw result.

    Raises:
      InputError: "matrix" and "before" are not those of N tasks and E episodes.
    """
    matrix, before = needed(raw, "matrix"), needed(raw, "before")
    episodes = {len(scores) for row in (before, *matrix) for scores in row}
    rows = [len(row) for row in matrix]
    if (
        not rows
        or rows != list(range(1, len(before) + 1))
        or len(episodes) != 1
        or 0 in episodes
    ):
        raise InputError(
            f"{results.name(raw)}: a matrix with rows of {rows} tasks, {len(before)} "
            f"tasks before, {sorted(episodes)} episodes; expected rows of 1 to N tasks "
            "and as many episodes of each"
        )
    after = [row[-1] for row in matrix]
    return Scores(*(np.array(x, float) for x in (before, after, matrix[-1])))


def score(raw: Raw) -> dict[str, np.ndarray]:
    """P, F and AUC of each episode, each a mean over the tasks."""
    _, after, last = scores_of(raw)
    return {
        "P": last.mean(0),
        "F": (after - last)[: max(len(last) - 1, 1)].mean(0),
        "AUC": areas(raw).mean(0),
    }


def areas(raw: Raw) -> np.ndarray:
    """Areas [N, E] under the learning curves, straight lines from before to after."""
    before, after, _ = scores_of(raw)
    return (before + after) / 2


def forward_transfer(raw: Raw, scratch: Raw) -> float | None:
    """FWT: mean_j (area_j - area_j of scratch) / (1 - area_j of scratch), over the
    tasks where scratch leaves something to gain; None without such a task."""
    mine, theirs = areas(raw).mean(1), areas(scratch).mean(1)
    room = theirs < 1
    if not room.any():
        return None
    return float(np.mean((mine - theirs)[room] / (1 - theirs)[room]))


def known(job: Job, name: str, setting: Setting, root: Path) -> dict[str, Any]:
    """The fingerprint of the demonstrations, which are collected here."""
    del name
    data = tasks.prepare(setting.sequence, job, root / "data")
    return {"data_fingerprint": data.fingerprint}


def make_table(sequence: TaskSequence, root: Path = Path()) -> Table:
    """The table of a sequence.

    Args:
      sequence: its one setting.
      root: directory of runs.
    """

    def column(metric: str) -> Callable[[Mapping[str, Any], str], str]:
        return lambda entries, method: (
            f"{entries[method][metric]:.3g}" if metric in entries[method] else "-"
        )

    return Table(
        name=sequence.name,
        settings={sequence.name: Setting(sequence.tasks[0].env, sequence=sequence)},
        methods=METHODS,
        score=score,
        columns={
            "P": tables.number("P", 2),
            "F": tables.number("F", 2),
            "AUC": tables.number("AUC", 2),
            "FWT": column("fwt"),
            "unchanged": column("unchanged"),
            "numbers / task": column("parameters"),
            "kB / task": column("kilobytes"),
            "s / task": column("seconds"),
        },
        orders=[
            Order("Support", "LoRA", "P"),
            Order("Nearest", "LoRA", "P"),
            Order("PSEC", "LoRA", "P"),
            Order("PSEC", "Scratch", "P"),
            Order("PSEC", "Fine-tuning", "P"),
            Order("Nearest", "Fine-tuning", "P"),
        ],
        paper=grid.paper("continual"),
        known=lambda job, name, setting: known(job, name, setting, root),
        measure=measure,
    )


NOTE = (
    f"{tables.INTERVALS}. R[i, j]: score after task i on task j. P: mean of the last "
    "row. F: mean drop since a task was learned. AUC: mean area under the learning "
    "curves, of which the ends alone are measured. FWT: transfer against Scratch "
    "(docs/continual.md). Unchanged: share of later policies whose bits are those of "
    "the one that was learned; they were not played again. Numbers and kB: kept beside "
    "the base. s: training, the base aside. Published numbers are of other data and "
    "budgets; of two the second is PSEC's paper's."
)


def shown(table: Table, folder: Path) -> tables.Shown:
    """The table of the raw results of a folder."""
    raws = results.read_all(table.path(folder))
    summary = tables.summarise(table, raws)
    [name] = table.settings
    scratch = {raw["seed"]: raw for raw in raws if raw["method"] == "Scratch"}
    for method, entry in summary.get(name, {}).items():
        mine = [raw for raw in raws if raw["method"] == method]
        for field, unit in (("parameters", 1), ("bytes", 1e3), ("seconds", 1)):
            label = "kilobytes" if field == "bytes" else field
            entry[label] = float(np.mean([needed(raw, field) for raw in mine])) / unit
        entry["unchanged"] = float(np.mean([_unchanged(raw) for raw in mine]))
        entry |= _transfer(
            [(r, scratch[r["seed"]]) for r in mine if r["seed"] in scratch]
        )
    return tables.Shown(table, raws, NOTE, summary, table.name, digits=2)


def write_table(table: Table, folder: Path) -> str:
    """NAME.md, .csv and .json, and the figures, from the raw results alone."""
    made = shown(table, folder)
    text, [name] = tables.write(made, folder), table.settings
    methods = made.summary.get(name, {})
    drawn = {m: [r for r in made.raws if r["method"] == m] for m in methods}
    draw(table, folder, drawn)
    return text


def _transfer(pairs: Sequence[tuple[Raw, Raw]]) -> dict[str, float]:
    """Entry "fwt", the mean over seeds, of results each beside that of Scratch."""
    gained = [forward_transfer(*pair) for pair in pairs if pair[0] is not pair[1]]
    known = [value for value in gained if value is not None]
    return {"fwt": float(np.mean(known))} if known else {}


def _unchanged(raw: Raw) -> float:
    """The share of later policies whose bits did not change; 1 of a single task."""
    later = [same for row in needed(raw, "unchanged") for same in row[:-1]]
    return float(np.mean(later)) if later else 1.0


def draw(table: Table, folder: Path, drawn: Mapping[str, Sequence[Raw]]) -> None:
    """Heat maps of R, and the mean over the tasks so far after each task."""
    [name] = table.settings
    matrices, curves = {}, {}
    for method, raws in drawn.items():
        size = len(raws[0]["matrix"])
        matrices[method] = np.full((size, size), np.nan)
        for i in range(size):
            scores = np.array([raw["matrix"][i] for raw in raws])  # [seeds, i + 1, E]
            matrices[method][i, : i + 1] = scores.mean((0, 2))
            stats = intervals.describe(scores.mean(1))
            stats["of_seeds"] = scores.mean((1, 2)).tolist()
            curves.setdefault(str(i + 1), {})[method] = stats
    order = next(iter(drawn.values()))[0]["tasks"]
    caption = f"{name}: {results.conditions([r for rs in drawn.values() for r in rs])}"
    title = "Score after task i (rows) on task j (columns)"
    figure = plots.heat_maps(matrices, order, title, caption)
    plots.save(figure, folder / "figures", f"{name}_matrix")
    figure = plots.lines(
        curves,
        {x: float(x) for x in curves},
        {method: METHODS[method].style for method in drawn},
        "tasks learned",
        "Mean score on the tasks so far",
        caption,
        {},
        y_label="score",
        top=1.05,
    )
    plots.save(figure, folder / "figures", f"{name}_curve")


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write table and figures."""
    no_arguments(argv)
    sequence = tasks.read(FLAGS["sequence"].value)
    folder, root = Path(FLAGS["results"].value), grid.run_root(FLAGS, RUNS)
    root = root / sequence.name
    table = make_table(sequence, root)
    job = continual.job(FLAGS["preset"].value)
    if grid.measure(FLAGS, table, job, root, folder, methods=job.table.methods):
        print(write_table(table, folder))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/continual", RUNS) | {
        "sequence": flags.DEFINE_string(
            "sequence",
            "cw10",
            f"{', '.join(sorted(tasks.PACKAGED))}, or a file ending in .json.",
        ),
    }
    run(main)
