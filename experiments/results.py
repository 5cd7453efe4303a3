"""Raw results: one JSONL file a table, one line a setting, method and seed.

A line holds the returns and costs of every episode beside what they were made with: the
budget of each stage, fingerprints of config and data, versions, hardware and commit.
Tables and figures are made from these lines alone.
"""

import dataclasses
import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psec_jax.cards import (
    is_number,
    is_object,
    is_text,
    list_of,
    none_or,
    shortened,
    whole,
)
from psec_jax.errors import InputError
from psec_jax.files import parse_json, read_bytes, reported, write_atomic
from psec_jax.runtime.run import versions
from psec_jax.workflows import Job

Raw = Mapping[str, Any]
HEADER = (
    "setting",
    "method",
    "seed",
    "preset",
    "budget",
    "config_fingerprint",
    "versions",
)
STAGES = ("base", "critics", "skill", "gate", "gaussian")


def read(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a file of raw results; none where there is no file.

    Raises:
      InputError: a line that is damaged or no raw result, or two of one grid cell and
        seed; file and line are named.
    """
    if not Path(path).exists():
        return []
    lines = read_bytes(path).splitlines()
    raws, first = [], {}
    for number, line in enumerate(lines, 1):
        raw = parse_json(line, f"{path}, line {number}")
        _check(f"{path}, line {number}", raw)
        if first.setdefault(key(raw), number) != number:
            raise InputError(
                f"{path}, line {number}: {name(raw)} is also on line {first[key(raw)]}"
            )
        raws.append(raw)
    return raws


def _is_flag(x: Any) -> bool:
    """Whether it is true or false."""
    return isinstance(x, bool)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "setting": (is_text, "a text"),
    "method": (is_text, "a text"),
    "seed": (whole(0, 2**32), "a number of 0 or more"),
    "preset": (is_text, "a text"),
    "budget": (is_object, "steps and batch_size by stage"),
    "config_fingerprint": (is_text, "a text"),
    "versions": (is_object, "an object"),
    "env": (is_text, "a text"),
    "evaluation_seed": (whole(0, 2**32), "a number of 0 or more"),
    "mean": (is_number, "a number"),
    "returns": (list_of(is_number), "a number for each episode"),
    "costs": (list_of(is_number), "a number for each episode"),
    "lengths": (list_of(whole(0, 2**40)), "a number for each episode"),
    "success": (list_of(whole(0, 1)), "0 or 1 for each episode"),
    "data_fingerprint": (is_text, "a text"),
    "cost_limit": (is_number, "a number"),
    "scores": (list_of(is_number), "numbers"),
    "data_scores": (list_of(is_number), "numbers"),
    "drawn": (whole(1, 2**40), "a number of 1 or more"),
    "x": (none_or(is_number), "a number"),
    "tasks": (list_of(is_text), "names"),
    "matrix": (list_of(list_of(list_of(is_number))), "scores by task and episode"),
    "before": (list_of(list_of(is_number)), "scores by task and episode"),
    "unchanged": (list_of(list_of(_is_flag)), "true or false by task"),
    "parameters": (is_number, "a number"),
    "bytes": (is_number, "a number"),
    "seconds": (is_number, "a number"),
    "evaluation_seconds": (is_number, "a number"),
    "target": (is_text, "a text"),
}
_SIZES = {"steps": whole(0, 2**62), "batch_size": whole(1, 2**62)}
_MACHINE = {"cores": whole(1, 2**20), "cpu": is_text, "jax": is_text}


def _check(source: str, raw: dict[str, Any]) -> None:
    """Refuse what is no raw result, field by field.

    Raises:
      InputError: a field that is missing or is not what it has to be.
    """
    if missing := [name for name in HEADER if name not in raw]:
        raise InputError(f"{source}: no raw result, it has no {', '.join(missing)}")
    for name, (check, expected) in _FIELDS.items():
        if name in raw and not check(raw[name]):
            raise InputError(
                f"{source}: {name} is {shortened(raw[name])}, expected {expected}"
            )
    columns = ("returns", "costs", "lengths", "success")
    lengths = {name: len(raw[name]) for name in columns if name in raw}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise InputError(f"{source}: {lengths} episodes, expected as many of each")
    parts = [(f"budget.{stage}", part) for stage, part in raw["budget"].items()]
    for name, part in [*parts, ("versions", raw["versions"])]:
        checks = _MACHINE if name == "versions" else _SIZES
        if not isinstance(part, dict) or not all(
            check(part.get(field)) for field, check in checks.items()
        ):
            raise InputError(
                f"{source}: {name} is {shortened(part)}, expected {', '.join(checks)}"
            )


def needed(raw: Raw, field: str) -> Any:
    """A field that a table reads of a raw result.

    Raises:
      InputError: it has none.
    """
    if field not in raw:
        raise InputError(f"{name(raw)}: the raw result has no {field!r}")
    return raw[field]


def read_all(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a file of raw results.

    Raises:
      InputError: there are none, or see `read`.
    """
    raws = read(path)
    if not raws:
        raise InputError(f"{path}: no raw results; measure something first")
    return raws


def append(path: Path | str, raw: Raw) -> bool:
    """Add a line; False where another process added the same cell and seed before.

    The file is written anew under a lock, so no reader sees half a line and processes
    that measure other seeds lose nothing.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with reported(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "a")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if any(key(other) == key(raw) for other in read(path)):
            return False
        before = path.read_text() if path.exists() else ""
        if before and not before.endswith("\n"):  # an editor's doing
            before += "\n"
        write_atomic(path, before + json.dumps(raw, allow_nan=False) + "\n")
    return True


def key(raw: Raw) -> tuple[str, str, int]:
    """Setting, method and seed."""
    return raw["setting"], raw["method"], raw["seed"]


def by_key(path: Path | str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The lines of a file of raw results by setting, method and seed."""
    return {key(raw): raw for raw in read(path)}


def name(raw: Raw) -> str:
    """A grid cell and seed in words, such as "S->W PSEC seed 0"."""
    return f"{raw['setting']} {raw['method']} seed {raw['seed']}"


def fingerprint(job: Job) -> str:
    """12 hex digits of the fields that differ from the defaults of a `Job`.

    The table's rows and seeds do not count: more of them leave the lines that are there
    as they are. Nor do the seconds of a trial, of which no line is kept. Nor does a
    field that a later version adds, while it has its default.
    """
    fields = differing(job, Job())
    for name in ("methods", "seeds"):
        fields.get("table", {}).pop(name, None)
    fields.get("run", {}).pop("trial_seconds", None)
    text = json.dumps({k: v for k, v in fields.items() if v != {}}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing(config: Any, default: Any) -> dict[str, Any]:
    """The fields of a tree of dataclasses that differ from the default's, nested."""
    fields = {}
    for name in (field.name for field in dataclasses.fields(config)):
        value, usual = getattr(config, name), getattr(default, name)
        if value == usual:
            continue
        nested = dataclasses.is_dataclass(value)
        fields[name] = differing(value, usual) if nested else value
    return fields


def header(
    job: Job, setting: str, method: str, seed: int, stages: Mapping[str, str]
) -> dict[str, Any]:
    """What every line begins with: whose result it is and what it was made with.

    Args:
      job: everything that the result depends on.
      setting: column of the table.
      method: row of the table.
      seed: of training.
      stages: that were trained, with the section of the job that holds their budget.
    """
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "preset": job.preset,
        "budget": {stage: _budget(job, section) for stage, section in stages.items()},
        "config_fingerprint": fingerprint(job),
        "versions": versions(),
    }


def _budget(job: Job, section: str) -> dict[str, int]:
    sizes: Any = job
    for part in section.split("."):
        sizes = getattr(sizes, part)
    return {"steps": sizes.steps, "batch_size": sizes.batch_size}


def conditions(raws: Sequence[Raw]) -> str:
    """What raw results were measured with: seeds, episodes, budgets and machine."""
    seeds = Counter(key(raw)[:2] for raw in raws).values()
    measured = f"{_range(seeds)} training seed{'s' * (max(seeds) > 1)}"
    if episodes := [len(raw["returns"]) for raw in raws if "returns" in raw]:
        measured += f", {_range(episodes)} episodes a seed"
    budget = []
    for stage in STAGES:
        if methods := _methods_by_size(raws, stage):
            budget.append(f"{stage} {_sizes(methods)}")
    presets = " and ".join(sorted({raw["preset"] for raw in raws}))
    machines = sorted(
        {
            f"{made['cores']} core{'s' * (made['cores'] > 1)} of {made['cpu']}, jax "
            f"{made['jax']}"
            for made in (raw["versions"] for raw in raws)
        }
    )
    return f"{measured}. Preset {presets}: {', '.join(budget)}; {'; '.join(machines)}."


def _methods_by_size(
    raws: Sequence[Raw], stage: str
) -> dict[tuple[int, int], list[str]]:
    """{(steps, batch size): methods}, the size of most methods first."""
    methods: dict[tuple[int, int], set[str]] = {}
    for raw in raws:
        if size := raw["budget"].get(stage):
            sizes = size["steps"], size["batch_size"]
            methods.setdefault(sizes, set()).add(raw["method"])
    ordered = sorted(methods, key=lambda size: (-len(methods[size]), -size[0]))
    return {size: sorted(methods[size]) for size in ordered}


def _sizes(methods: Mapping[tuple[int, int], Sequence[str]]) -> str:
    """A budget in words; two of them with the methods of the second."""
    steps, batches = zip(*methods, strict=True)
    if len(methods) == 2:
        rest = list(methods.values())[1]
        return (
            f"{steps[0]} steps of {batches[0]} ({', '.join(rest)}: {steps[1]} of "
            f"{batches[1]})"
        )
    return f"{_range(steps)} steps of {_range(batches)}"


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first} to {last}"
