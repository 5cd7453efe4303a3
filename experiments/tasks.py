"""Sequences of tasks as data: environments, demonstrations, tasks of the base."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from psec_jax import envs
from psec_jax.cards import NAME, is_number, is_object, is_text, list_of, shortened
from psec_jax.data import d4rl, dataset
from psec_jax.data.recording import Recording
from psec_jax.errors import InputError, lookup
from psec_jax.files import read_json
from psec_jax.workflows import Job
from psec_jax.workflows.collection import collect
from psec_jax.workflows.demonstrations import Demos, load_demos

PACKAGED = {p.stem: p for p in (Path(__file__).parent / "sequences").glob("*.json")}
# Fields of a file: (check, what is expected); the last two are needed.
_FIELDS = {
    "about": (is_text, "a text"),
    "policy": (is_text, "a text"),
    "action_noise": (is_number, "a number"),
    "full_return": (is_number, "a number"),
    "base": (list_of(is_object), "a list of tasks"),
    "tasks": (list_of(is_object), "a list of tasks"),
}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: of its skill.
      env: see `psec_jax.envs.make`.
      data: file of demonstrations; empty collects them.
    """

    name: str
    env: str
    data: str = ""


@dataclass(frozen=True)
class TaskSequence:
    """N tasks in the order in which they are learned.

    A task that is there again is visited again: its skill is in the library already.

    Attributes:
      name: of its results.
      tasks: [N].
      base: tasks of the base.
      policy: who demonstrates, see `workflows.collection.collect`.
      action_noise: on the demonstrator's actions.
      full_return: the return that scores 1, where environments do not report success.
    """

    name: str
    tasks: tuple[Task, ...]
    base: tuple[Task, ...]
    policy: str = "expert"
    action_noise: float = 0.0
    full_return: float | None = None

    def until(self, i: int) -> list[Task]:
        """The different tasks among the first i + 1, in order of their first visit."""
        return list({task.name: task for task in self.tasks[: i + 1]}.values())

    def visit(self, i: int, j: int) -> int | None:
        """The last visit, up to i, of the task at j; None before the first."""
        same = [v for v in range(i + 1) if self.tasks[v].name == self.tasks[j].name]
        return same[-1] if same else None


def read(name: str) -> TaskSequence:
    """A packaged sequence, or that of a file ending in .json.

    Raises:
      InputError: neither, a field that is missing, unknown or of another type, or one
        task under two names or two under one.
    """
    path = Path(name) if name.endswith(".json") else None
    if path is None:
        path = lookup(PACKAGED, name, "sequence (or a path ending in .json)")
    fields = read_json(path)
    for field in fields:
        check, expected = lookup(_FIELDS, field, f"field of {path}")
        if not check(fields[field]):
            raise InputError(
                f"{path}: {field} is {shortened(fields[field])}, expected {expected}"
            )
    groups = {}
    for field in ("base", "tasks"):
        groups[field] = tuple(
            _task(f"{path}: {field}[{i}]", entry)
            for i, entry in enumerate(fields.get(field, ()))
        )
        if not groups[field]:
            raise InputError(f"{path}: {field} is missing or empty, expected tasks")
    _check_names(str(path), groups["tasks"])
    rest = {k: v for k, v in fields.items() if k not in ("about", *groups)}
    return TaskSequence(path.stem, **groups, **rest)


def _task(source: str, entry: Mapping[str, Any]) -> Task:
    names = [field.name for field in dataclasses.fields(Task)]
    for field in entry:
        lookup(dict.fromkeys(names), field, f"field of {source}")
    for field in names:
        if not is_text(entry.get(field, "" if field == "data" else None)):
            raise InputError(
                f"{source}: {field} is {shortened(entry.get(field))}, expected a text"
            )
    if not NAME.fullmatch(entry["name"]):
        raise InputError(
            f"{source}: name is {shortened(entry['name'])}, expected letters, digits, "
            "dots, dashes and underscores"
        )
    return Task(entry["name"], envs.shifted(entry["env"]), entry.get("data", ""))


def _check_names(source: str, tasks: Sequence[Task]) -> None:
    first: dict[str, Task] = {}
    names: dict[tuple[str, str], str] = {}
    for i, task in enumerate(tasks):
        if first.setdefault(task.name, task) != task:
            raise InputError(
                f"{source}: tasks[{i}]: {task.name!r} is another task than before; a "
                "task that is visited again has the same env and data"
            )
        name = names.setdefault((task.env, task.data), task.name)
        if name != task.name:
            raise InputError(
                f"{source}: tasks[{i}]: {task.name!r} is the task {name!r} under "
                "another name; a task that is visited again keeps its name"
            )


class TaskData(NamedTuple):
    """Demonstrations of a sequence.

    Attributes:
      files: of each task, by its name.
      base: of all tasks of the base, in one file.
      success: the share of each task's demonstrations that reach the goal, by name;
        None where it is not known.
      fingerprint: 16 hex digits of everything.
    """

    files: Mapping[str, str]
    base: str
    success: Mapping[str, float | None]
    fingerprint: str


def prepare(sequence: TaskSequence, job: Job, folder: Path) -> TaskData:
    """The demonstrations of a sequence, collected where no file is named.

    Args:
      sequence: tasks and base.
      job: `base.episodes` and `skill.episodes` are taken of each task.
      folder: of the files that hold several tasks.

    Raises:
      InputError: an environment that cannot be made or whose observations or actions
        are others than the first one's, or demonstrations without success.
    """
    _check_layout((*sequence.base, *sequence.tasks))
    different = sequence.until(len(sequence.tasks))
    demos: list[Demos] = []
    for seed, task in enumerate((*sequence.base, *different), 1):
        section = job.base if seed <= len(sequence.base) else job.skill
        path = task.data or str(
            collect(
                task.env,
                sequence.policy,
                section.episodes,
                seed,
                sequence.action_noise,
            )
        )
        demos.append(load_demos(job.data, task.env, section.episodes, path))
        _check_success(sequence, demos[-1])
    base, mine = demos[: len(sequence.base)], demos[len(sequence.base) :]
    names = [task.name for task in different]
    prints = [dataset.fingerprint(one.dataset) for one in demos]
    return TaskData(
        {n: one.source for n, one in zip(names, mine, strict=True)},
        merged(base, sequence.base[0].env, folder),
        {n: one.success for n, one in zip(names, mine, strict=True)},
        hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16],
    )


def _check_layout(tasks: Sequence[Task]) -> None:
    def layout(task: Task) -> tuple:
        about = envs.describe(task.env)
        return about.sizes, about.observation

    for task in tasks:
        if layout(task) != layout(tasks[0]):
            (mine, parts), (first, others) = layout(task), layout(tasks[0])
            raise InputError(
                f"{task.env}: {_words(mine)}{', '.join(parts)}; expected those of the "
                f"base, {tasks[0].env}: {_words(first)}{', '.join(others)}"
            )


def _words(sizes: tuple[int, int]) -> str:
    return f"observations of {sizes[0]} numbers, actions of {sizes[1]} "


def _check_success(sequence: TaskSequence, demos: Demos) -> None:
    if demos.success == 0:
        raise InputError(
            f"{demos.source}: demonstrations without success: none reaches the goal"
        )
    if demos.success is None and sequence.full_return is None:
        raise InputError(
            f"{demos.source}: demonstrations without success: they do not say whether "
            "the goal is reached, and the sequence has no full_return"
        )


def merged(demos: Sequence[Demos], env: str, folder: Path) -> str:
    """A file of several tasks' demonstrations, kept under its fingerprint."""
    ds = dataset.concatenate([one.dataset for one in demos])
    path = folder / f"{dataset.fingerprint(ds)}.hdf5"
    if not path.exists():
        about = envs.describe(env)
        path.parent.mkdir(parents=True, exist_ok=True)
        d4rl.save(path, ds, Recording(units="scaled", box=about.box).attributes())
    return str(path)
