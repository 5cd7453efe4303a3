r"""Run one stage at every point of a grid, here or on a SLURM cluster; one table.

    python -m launch.sweep --stage=expand --workdir=runs/ranks \
        --sweep=seed:0..4,skill.rank:4,8,16 \
        --config=experiments/configs/dmc_walker.py:quick \
        --library=runs/library --name=walk --env=dm_control:walker-walk

    # on a cluster: submits what is not finished or queued, and returns
    python -m launch.sweep --backend=slurm \
        --slurm=partition:gpu,timeout_min:600,gpus_per_node:1 ...

    # a base for each seed, then a skill on each of them
    python -m launch.sweep --stage=pretrain --workdir=runs/bases --sweep=seed:0..4
    python -m launch.sweep --stage=expand --workdir=runs/walks --sweep=seed:0..4 \
        --library=runs/bases/libraries/seed-{seed} --name=walk

All other flags are the stage's own (python -m launch.expand --help), the same for all
points. A key of --sweep is a flag of the stage or a field of its config; 0..4 stands
for 0,1,2,3,4. In other flags {KEY} stands for the point's value and {point} for its
name, such as seed-0_skill.rank-4. A point's run is in WORKDIR/POINT, its output in
WORKDIR/logs/POINT.log. A skill or gate is called NAME-POINT, unless --name is swept or
has a {KEY}; a base has a library of its own, LIBRARY/POINT, default WORKDIR/libraries.

The same command continues: finished points are kept, stopped ones resume, failed ones
are listed, and run again with --retry. Ctrl-C or SIGTERM
stops the runs of --backend=local, which save first. The numbers of every point's
result.json are in WORKDIR/results.csv, the returns in results.md too. More:
docs/launching.md.
"""

import collections
import csv
import difflib
import importlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from launch import options
from launch.job import STOPPED, Job, busy, exit_file
from psec_jax.cli import given, no_arguments, parse, run
from psec_jax.errors import InputError, Stopped, TrainingError, lookup
from psec_jax.files import read_json, reported, write_atomic, write_json
from psec_jax.library import table
from psec_jax.runtime.run import Run

# Each with the flag that names its entry in the library, which points must not share.
STAGES = {
    "pretrain": "library",
    "expand": "name",
    "compose": "name",
    "critics": None,
}
# The sweep's own flags; those of the stage are `flags.FLAGS`.
OWN = flags.FlagValues()
STAGE = flags.DEFINE_string(
    "stage", None, "pretrain, expand, compose or critics.", OWN, required=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the sweep.", OWN, required=True
)
SWEEP = flags.DEFINE_multi_string(
    "sweep",
    None,
    "KEY:VALUE,VALUE,...,KEY:VALUE,... or several such flags: every combination is a "
    "point. A value with a comma goes into brackets, as in gate.widths:(64,64).",
    OWN,
    required=True,
)
BACKEND = flags.DEFINE_string("backend", "local", "local or slurm.", OWN)
JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "Runs at a time; default one, or one for each of --gpus; on slurm no limit.",
    1,
    flag_values=OWN,
)
GPUS = flags.DEFINE_list(
    "gpus",
    None,
    "Numbers of this machine's GPUs: each run of --backend=local gets one of them. "
    "Default leaves every run what this command sees.",
    OWN,
)
SLURM = flags.DEFINE_string(
    "slurm",
    "",
    "NAME:VALUE,... of submitit's parameters: partition, timeout_min, gpus_per_node, "
    "cpus_per_task, mem_gb, account, qos, constraint, ...",
    OWN,
)
RETRY = flags.DEFINE_bool("retry", False, "Run points that failed again.", OWN)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the commands and change nothing.", OWN
)

MOST_POINTS = 1000
_LONGEST_NAME = 200
# Numbers that the table shows, beside losses; results.csv has them all.
_SHOWN = (".mean", ".costs", ".success")
_KEY = re.compile(r"[A-Za-z_][\w.]*")
_TERMINAL = {signal.SIGINT, signal.SIGHUP}
_SIGNALS = {signal.SIGTERM} | _TERMINAL
# submitit's parameters that are not SLURM's alone.
_SHARED = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
_POLL_SECONDS = 0.5
_FOREVER_MINUTES = 10 * 365 * 24 * 60


class Point(NamedTuple):
    """One run of the sweep.

    Attributes:
      name: made of its values.
      values: by key.
      arguments: of the stage's command.
      workdir: the run's directory.
      log: the run's output.
    """

    name: str
    values: dict[str, str]
    arguments: list[str]
    workdir: Path
    log: Path


def axes(texts: Sequence[str], keys: set[str]) -> dict[str, list[str]]:
    """The values of every key of --sweep, in order.

    A part of the text "KEY:..." begins a new key, unless KEY is unknown and the values
    before it have colons too, as environments have.

    Args:
      texts: values of the flag.
      keys: flags of the stage and fields of its config.

    Raises:
      InputError: no key, an unknown or repeated one, or a value that is missing or
        repeated.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key = None
        # Commas in brackets belong to a value.
        for part in re.split(r",(?![^(\[]*[)\]])", text):
            head, colon, value = part.strip().partition(":")
            head = head.removeprefix("config.")
            begins = colon and _KEY.fullmatch(head)
            if begins and (head in keys or key is None or ":" not in grid[key][0]):
                if head not in keys:
                    raise InputError(f"--sweep: {_unknown(head, keys)}")
                if head in grid:
                    raise InputError(f"--sweep: {head} is given twice")
                key, grid[head] = head, []
            elif key is None:
                raise InputError(f"--sweep: got {part!r}, expected KEY:VALUE,VALUE,...")
            else:
                value = part.strip()
            grid[key] += _values(key, value)
    for key, values in grid.items():
        if len(set(values)) < len(values):
            raise InputError(f"--sweep: {key} has a value twice: {','.join(values)}")
    return grid


def _values(key: str, text: str) -> list[str]:
    if not text:
        raise InputError(f"--sweep: {key} has a value that is empty")
    ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text)
    if ends is None:
        return [text]
    first, last = int(ends[1]), int(ends[2])
    if not 0 <= last - first < MOST_POINTS:
        raise InputError(
            f"--sweep: {key}:{text}: expected FIRST..LAST, rising, of at most "
            f"{MOST_POINTS} values"
        )
    return [str(number) for number in range(first, last + 1)]


def _unknown(key: str, keys: set[str]) -> str:
    last = key.rpartition(".")[2]
    near = [k for k in sorted(keys) if k.rpartition(".")[2] == last]
    near += difflib.get_close_matches(key, sorted(keys - set(near)))
    hint = f"; did you mean {', '.join(near[:4])}?" if near else ""
    return f"neither a flag of the stage nor a field of its config is {key!r}{hint}"


def fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of a config's fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def make_points(
    stage: str,
    workdir: Path,
    grid: Mapping[str, Sequence[str]],
    common: Sequence[str],
    switches: set[str],
) -> list[Point]:
    """Every combination of the values, with the arguments of its command.

    Args:
      stage: a key of `STAGES`.
      workdir: of the sweep.
      grid: values by key.
      common: arguments of all points.
      switches: keys that are flags of the stage; the others are config fields.

    Raises:
      InputError: too many of them, points that would share an entry of the library, or
        arguments that the stage's command would refuse.
    """
    if (count := math.prod(map(len, grid.values()))) > MOST_POINTS:
        raise InputError(f"--sweep: {count} points, expected {MOST_POINTS} or fewer")
    for key in grid:
        if given(common, key if key in switches else f"config.{key}"):
            raise InputError(f"--sweep: {key} is also given as a flag")
    if "seeds" in grid or given(common, "seeds"):
        raise InputError(
            "--seeds: every point of a sweep is one run; --sweep=seed:0..4 makes a "
            "point of each seed"
        )
    points: list[Point] = []
    entries: dict[str, str] = {}
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        name = _name(values)
        arguments = [_filled(text, values | {"point": name}) for text in common]
        for key, value in values.items():
            arguments.append(f"--{key if key in switches else f'config.{key}'}={value}")
        arguments += _own_entry(STAGES[stage], workdir, name, common, arguments)
        arguments.append(f"--workdir={workdir / name}")
        check(stage, arguments)
        if len(name) > _LONGEST_NAME or name in (point.name for point in points):
            raise InputError(
                f"--sweep: {name}: a name of a point is too long, or not its own"
            )
        if flag := STAGES[stage]:
            entry = options.LIBRARY.value
            if flag == "name":
                entry = f"{given(arguments, flag)[-1]} in {entry}"
            if entry in entries:
                raise InputError(
                    f"--sweep: {entries[entry]} and {name} would both write {entry}; "
                    f"have {{point}} in --{flag}"
                )
            entries[entry] = name
        log = workdir / "logs" / f"{name}.log"
        points.append(Point(name, values, arguments, workdir / name, log))
    return points


def _name(point: Mapping[str, str]) -> str:
    """A name that a directory and an entry of a library can have."""
    text = "_".join(f"{key}-{value}" for key, value in point.items())
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _filled(text: str, values: Mapping[str, str]) -> str:
    for key in re.findall(r"\{([\w.]+)\}", text):
        text = text.replace(f"{{{key}}}", lookup(values, key, f"key in {text}:"))
    return text


def _own_entry(
    flag: str | None,
    workdir: Path,
    name: str,
    common: Sequence[str],
    arguments: Sequence[str],
) -> list[str]:
    """The flag that makes a point's entry in the library its own, where it is not."""
    if flag is None or given(common, flag) != given(arguments, flag):
        return []
    last = given(common, flag)[-1:]
    if flag == "library":
        return [f"--library={last[0] if last else workdir / 'libraries'}/{name}"]
    return [
        f"--{flag}={','.join(f'{entry}-{name}' for entry in names.split(','))}"
        for names in last
    ]


def check(stage: str, arguments: Sequence[str]) -> None:
    """Parse the arguments as the stage's command would.

    Raises:
      InputError: what the command would refuse.
    """
    # ml_collections defines a flag for each field that sys.argv sets.
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    sys.argv = [f"launch.{stage}", *arguments]
    no_arguments(parse(sys.argv))


def command(stage: str, point: Point) -> list[str]:
    """What runs a point."""
    return [sys.executable, "-m", f"launch.{stage}", *point.arguments]


def results(point: Point) -> dict[str, Path]:
    """Every result.json of a point, by name where it is several runs."""
    own = point.workdir / "result.json"
    if own.exists():
        return {"": own}
    return {p.parent.name: p for p in sorted(point.workdir.glob("*/result.json"))}


def state(point: Point, queued: set[str]) -> str:
    """done, running, failed, stopped or waiting."""
    mark, finished = exit_file(point.log), results(point)
    code = int(mark.read_text()) if mark.exists() else None
    if "" in finished or (finished and code == 0):
        return "done"
    if point.name in queued or busy(point.log):
        return "running"
    if code is None:
        return "waiting"
    return "stopped" if code in STOPPED else "failed"


def states(workdir: Path, points: Sequence[Point]) -> list[str]:
    """The state of every point."""
    in_queue = queued(workdir)
    return [state(point, in_queue) for point in points]


def last_line(log: Path) -> str:
    """The last line of a run's output that is not empty."""
    if not log.exists():
        return "(no output)"
    text = log.read_bytes()[-10_000:].decode(errors="replace")
    return next((t.strip() for t in reversed(text.splitlines()) if t.strip()), "(none)")


def queued(workdir: Path) -> set[str]:
    """Names of the points in SLURM's queue, waiting or running.

    Raises:
      InputError: squeue fails.
    """
    path = workdir / "jobs.json"
    if not path.exists() or shutil.which("squeue") is None:
        return set()
    answer = subprocess.run(
        ["squeue", "--me", "--array", "--noheader", "--format=%i"],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise InputError(f"squeue: {answer.stderr.strip() or answer.returncode}")
    jobs = set(answer.stdout.split())
    return {name for name, job in read_json(path).items() if job in jobs}


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'psec_jax[sweep]'"
        ) from error


def run_local(stage: str, workdir: Path, todo: Sequence[Point]) -> int | None:
    """Run points here, a few at a time.

    Returns:
      The signal that stopped them, after they saved and ended; None where none did.
    """
    executor = _submitit().AutoExecutor(workdir / "submitit", cluster="local")
    # Its controllers end jobs that take longer.
    executor.update_parameters(timeout_min=_FOREVER_MINUTES)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    free: list[str | None] = [*(GPUS.value or [visible] * (JOBS.value or 1))]
    del free[JOBS.value or len(free) :]
    waiting = collections.deque(todo)
    running: list[tuple[Point, Any, str | None]] = []
    stop = _signals()
    while waiting or running:
        for slot in [*running]:
            point, job, gpu = slot
            if job.done():
                running.remove(slot)
                free.append(gpu)
                say(f"{point.name}: {state(point, set())}: {last_line(point.log)}")
            elif stop:
                # The job's number is its controller's, which passes the signal on.
                os.kill(int(job.job_id), signal.SIGTERM)
        if stop:
            waiting.clear()
        while waiting and free:
            point, gpu = waiting.popleft(), free.pop(0)
            job = Job(command(stage, point), point.log, {"CUDA_VISIBLE_DEVICES": gpu})
            # Blocked signals are inherited: a Ctrl-C reaches this process alone.
            signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL)
            running.append((point, executor.submit(job), gpu))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERMINAL)
            say(f"{point.name}: started")
        time.sleep(_POLL_SECONDS)
    return stop[0] if stop else None


def _signals() -> list[int]:
    """Collects signals from now on; a second one acts at once."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, note)
    return caught


def submit(stage: str, workdir: Path, todo: Sequence[Point]) -> None:
    """Hand points to SLURM as one array of jobs, requeued when they are preempted.

    Raises:
      InputError: no SLURM here, or parameters that it or submitit refuses.
    """
    defaults = {"name": workdir.name, "timeout_min": 24 * 60}
    parameters = defaults | slurm_parameters(SLURM.value)
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise InputError(f"--backend=slurm: there is no {program} on this machine")
    submitit = _submitit()
    executor = submitit.AutoExecutor(
        workdir / "submitit", cluster="slurm", slurm_max_num_timeout=MOST_POINTS
    )
    named = {k if k in _SHARED else f"slurm_{k}": v for k, v in parameters.items()}
    try:
        executor.update_parameters(
            slurm_additional_parameters={"requeue": True},
            slurm_array_parallelism=JOBS.value or MOST_POINTS,
            **named,
        )
        submitted = executor.submit_array(
            [Job(command(stage, point), point.log, {}) for point in todo]
        )
    except (AssertionError, NameError, ValueError) as error:
        raise InputError(f"--slurm: {str(error).splitlines()[0]}") from error
    except submitit.core.utils.FailedJobError as error:
        raise InputError(str(error).strip().splitlines()[-1]) from error
    path = workdir / "jobs.json"
    known = read_json(path) if path.exists() else {}
    ids = {p.name: job.job_id for p, job in zip(todo, submitted, strict=True)}
    write_json(path, known | ids)
    say(f"{len(todo)} jobs are submitted: {', '.join(sorted(set(ids.values())))}")


def slurm_parameters(text: str) -> dict[str, str | int]:
    """NAME:VALUE,... as a dict; a part without a colon belongs to the value before it.

    Raises:
      InputError: no name.
    """
    values: dict[str, str] = {}
    name = None
    for part in text.split(",") if text else []:
        head, colon, value = part.partition(":")
        if head in ("nodes", "tasks_per_node", "ntasks_per_node"):
            raise InputError(f"--slurm: {head}: every point is one task")
        if colon:
            name, values[head] = head, value
        elif name is None:
            raise InputError(f"--slurm: got {part!r}, expected NAME:VALUE,...")
        else:
            values[name] += f",{part}"
    return {k: int(v) if v.isdecimal() else v for k, v in values.items()}


BACKENDS = {"local": run_local, "slurm": submit}


def claim(workdir: Path, stage: str, common: Sequence[str]) -> None:
    """Write the sweep's arguments into its directory, or compare them with those there.

    Raises:
      InputError: the directory has other files, or runs of another stage or with other
        flags.
    """
    path, mine = workdir / "sweep.json", {"stage": stage, "arguments": list(common)}
    theirs = read_json(path) if path.exists() else mine
    if theirs != mine and any(workdir.glob("*/config.json")):
        new = {f"--stage={stage}", *common}
        old = {f"--stage={theirs['stage']}", *theirs["arguments"]}
        raise InputError(
            f"workdir {workdir} holds another sweep; got "
            f"{shlex.join(sorted(new - old)) or 'nothing'} where it has "
            f"{shlex.join(sorted(old - new)) or 'nothing'}"
        )
    with reported(f"list workdir {workdir}"):
        others = sorted(p.name for p in workdir.iterdir() if p.name[0] != ".")
    if others and not path.exists():
        raise InputError(
            f"workdir {workdir} holds {others[0]} but no sweep.json: it is not the "
            "folder of a sweep; choose an empty one"
        )
    with reported(f"make {workdir / 'logs'}"):
        (workdir / "logs").mkdir(exist_ok=True)
    write_json(path, mine)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names and numbers of a result; of a list of numbers the mean."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from numbers(child, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        if all(isinstance(v, (int, float)) for v in value):
            yield name, sum(value) / len(value)
    elif isinstance(value, (int, float)):
        yield name, value


def write_tables(workdir: Path, points: Sequence[Point], now: Sequence[str]) -> str:
    """Write results.csv, with every number, and results.md; returns what to print."""
    rows: list[dict[str, Any]] = []
    for point, is_now in zip(points, now, strict=True):
        row = {**point.values, "state": is_now}
        if is_now != "done":
            rows.append(row)
            continue
        for name, path in results(point).items():
            own = {"run": name} if name else {}
            rows.append(row | own | dict(numbers(read_json(path))))
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(workdir / "results.csv", buffer.getvalue())
    keys = (*points[0].values, "run", "state")
    shown = [c for c in columns if c in keys or c.endswith(_SHOWN) or ".loss/" in c]
    cells = [shown] + [[_cell(row.get(column)) for column in shown] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    lines.insert(1, "|" + "---|" * len(shown))
    write_atomic(workdir / "results.md", "\n".join(lines) + "\n")
    return table(cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def own_flags(argv: list[str]) -> list[str]:
    """Parse the sweep's own flags, and the config that its points start from.

    Returns:
      The arguments of the stage.
    """
    left = parse(argv, OWN, known_only=True)
    config = [f"--config={path}" for path in given(left, "config")[-1:]]
    parse([argv[0], *config, f"--workdir={WORKDIR.value}"])
    return left


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    stage, common = STAGE.value, argv[1:]
    lookup(STAGES, stage, "--stage")
    lookup(BACKENDS, BACKEND.value, "--backend")
    workdir = Path(WORKDIR.value).expanduser()
    importlib.import_module(f"launch.{stage}")
    switches = {
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("launch.")
        for flag in defined
    }
    switches -= set(OWN)
    grid = axes(SWEEP.value, switches | set(fields(options.CONFIG.value)))
    points = make_points(stage, workdir, grid, common, switches)
    wanted = ("waiting", "stopped", "failed" if RETRY.value else "waiting")
    if DRY_RUN.value:
        for point, now in zip(points, states(workdir, points), strict=True):
            skipped = f"# {point.name}: {now}"
            print(shlex.join(command(stage, point)) if now in wanted else skipped)
        return
    with reported(f"make workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
    with Run(workdir, "sweep", {}).locked():
        claim(workdir, stage, common)
        before = states(workdir, points)
        todo = [p for p, now in zip(points, before, strict=True) if now in wanted]
        say(f"{len(points)} points, {len(todo)} to run in {workdir}")
        signum = BACKENDS[BACKEND.value](stage, workdir, todo) if todo else None
        after = states(workdir, points)
        print(write_tables(workdir, points, after))
    for point, now in zip(points, after, strict=True):
        if now == "failed":
            print(f"failed: {point.name}: {last_line(point.log)} ({point.log})")
    if signum is not None:
        raise Stopped(
            f"stopped by {signal.Signals(signum).name}, as were its runs; the same "
            "command goes on",
            signum,
        )
    if BACKEND.value == "local" and (ended := set(after) - {"done", "running"}):
        count = sum(now in ended for now in after)
        raise TrainingError(
            f"{count} of {len(points)} runs did not finish; --retry runs those that "
            "failed again"
        )


if __name__ == "__main__":
    run(main, own_flags)
