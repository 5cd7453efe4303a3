"""Grids: settings x methods x seeds, one raw result each.

A table is a file of data: its settings (columns), its methods (rows), each with how it
is trained and drawn, and a score. `run` measures what is missing; `experiments.tables`
makes Markdown, CSV and JSON of the raw results, `experiments.plots` figures.
"""

import contextlib
import dataclasses
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import results
from experiments.forecast import Forecast
from experiments.results import Raw
from experiments.style import Style
from psec_jax.cli import seeds as table_seeds
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError, Stopped, lookup
from psec_jax.evaluation import Act, Episodes, episode_fields, evaluate
from psec_jax.files import read_json
from psec_jax.policy import Policy, compose, load_base
from psec_jax.workflows import Job, base, critics, gate, multirun, skill

STAGES = {"base": base, "skill": skill, "gate": gate, "critics": critics}


class Made(NamedTuple):
    """A trained policy, and fields that its raw result gets beside the episodes."""

    act: Act
    record: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Setting:
    """One column of a table.

    Attributes:
      env: simulator of the roll-outs.
      changes: fields of the job that differ here, by dotted name.
      record: fields of its raw results, such as the "x" of a figure.
      methods: those measured here; None is all of the table's.
      same: the setting of Table 2 that holds the same results where the job is equal.
      folder: of its runs, in the directory of the table's.
    """

    env: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    methods: Sequence[str] | None = None
    same: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Cell:
    """One setting and method, with the seeds that are trained as one program.

    Attributes:
      job: everything that is trained and rolled out.
      root: directory of runs.
      name: of the setting.
      setting: column.
      method: row.
      seeds: of training.
      variant: of the runs of a changed job, their directory below each seed's.
      forecast: counts what is only tried, see `run`; None where everything is done.
    """

    job: Job
    root: Path
    name: str
    setting: Any
    method: str
    seeds: tuple[int, ...]
    variant: str = ""
    forecast: Forecast | None = None

    def within(self, name: str) -> "Cell":
        """The cell with its runs in a subdirectory."""
        return dataclasses.replace(self, root=self.root / name)

    @property
    def seed(self) -> int:
        """The seed of a cell with one alone."""
        [seed] = self.seeds
        return seed

    def of(self, seed: int) -> "Cell":
        """The cell with one seed alone."""
        return dataclasses.replace(self, seeds=(seed,))

    def library(self, seed: int, name: str = "library") -> Path:
        """A library of one seed."""
        return self.root / f"seed{seed}" / self.variant / name

    def workdir(self, seed: int, name: str) -> Path:
        """Directory of one run."""
        return self.root / f"seed{seed}" / self.variant / "runs" / name


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
      make: cell -> a trained policy for each of its seeds (`Made`), or whatever the
        table's `measure` reads.
      stages: trained on the way, each with the section of the job that is its budget.
      style: in figures.
    """

    make: Callable[[Cell], Sequence[Any]]
    stages: Mapping[str, str]
    style: Style


class Order(NamedTuple):
    """A claim: the mean of a metric is larger for `above` than for `below`."""

    above: str
    below: str
    metric: str


def roll_out(cell: Cell, seed: int, made: Made) -> dict[str, Any]:
    """Raw fields of the episodes of the policy of one seed."""
    del seed
    episodes = play(cell, made.act, cell.setting.env)
    start = cell.job.evaluation.seed
    return {**made.record, **episode_fields(episodes, cell.setting.env, start)}


def play(
    cell: Cell,
    act: Act,
    env: str,
    vector_env: Callable[[], VectorEnv | None] | None = None,
) -> Episodes:
    """Rolls a policy out as the cell's job says.

    Args:
      cell: of the table.
      act: see `evaluate`.
      env: simulator.
      vector_env: makes the environments; by default they are made anew.
    """
    count, start = cell.job.evaluation.episodes, cell.job.evaluation.seed
    if cell.forecast is not None:
        return cell.forecast.play(act, env, count, start)
    if vector_env is None:
        return evaluate(act, env, count, start)
    return evaluate(act, env, count, start, vector_env=vector_env())


@dataclass(frozen=True)
class Table:
    """A grid: what is measured, and what the results say.

    Attributes:
      name: of its files.
      settings: columns by name.
      methods: rows by name.
      score: raw result -> a number for each episode, by metric.
      columns: under every setting, by heading: (summary of the setting, method) ->
        text. The first heading is replaced by the setting's name.
      orders: claims, checked by paired differences.
      paper: {setting: {method: the paper's number or numbers}}.
      identity: raw fields that the seeds of a grid cell, and a finished result and the
        job at hand, have in common.
      known: (job, setting's name, setting) -> raw fields known before training; raises
        InputError for what cannot be measured.
      measure: (cell, seed, what `Method.make` gave) -> raw fields.
    """

    name: str
    settings: Mapping[str, Any]
    methods: Mapping[str, Method]
    score: Callable[[Raw], Mapping[str, Sequence[float]]] = lambda raw: {}
    columns: Mapping[str, Callable[[Mapping[str, Any], str], str]] = field(
        default_factory=dict
    )
    orders: Sequence[Order] = ()
    paper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    identity: Sequence[str] = ("config_fingerprint", "data_fingerprint")
    known: Callable[[Job, str, Any], dict[str, Any]] = lambda *_: {}
    measure: Callable[[Cell, int, Any], dict[str, Any]] = roll_out

    def path(self, folder: Path) -> Path:
        """File of its raw results in a folder of results."""
        return folder / f"{self.name}.jsonl"


def paper(name: str) -> dict[str, Any]:
    """The paper's numbers in experiments/paper/NAME.json."""
    return read_json(Path(__file__).parent / "paper" / f"{name}.json")


def train(
    cell: Cell,
    stage: str,
    run: str,
    *,
    library: str = "library",
    changes: Mapping[str, Any] | None = None,
    **request: Any,
) -> list[dict[str, Any]]:
    """Trains a stage for all seeds of a cell as one program; finished runs are kept.

    Returns the results of the runs.

    Args:
      cell: whose seeds are trained.
      stage: a key of `STAGES`.
      run: name of the run's directory.
      library: that the stage reads or writes.
      changes: of the job, by dotted name.
      **request: of the stage; functions are called with the seed.
    """
    workflow: Any = STAGES[stage]
    requests = [
        workflow.Request(
            workdir=cell.workdir(seed, run),
            library=cell.library(seed, library),
            seed=seed,
            label=f"seed {seed}" if len(cell.seeds) > 1 else "",
            **_for_seed(request, seed),
            **({} if stage == "critics" else {"evaluate": False}),
        )
        for seed in cell.seeds
    ]
    began = time.perf_counter()
    trained = workflow.run(cell.job.changed(changes or {}), *requests)
    count(cell, stage, run, trained[0].get("summary"), time.perf_counter() - began)
    return trained


def count(
    cell: Cell,
    stage: str,
    run: str,
    summary: Mapping[str, Any] | None,
    seconds: float,
) -> None:
    """Counts a training in the cell's forecast, where it has one.

    Args:
      cell: whose seeds were trained.
      stage: name of the part.
      run: name of the run's directory.
      summary: of the training.
      seconds: that it took with everything around it.
    """
    if (forecast := cell.forecast) is not None:
        real = dataclasses.replace(cell, root=forecast.real(cell.root))
        runs = [[real.workdir(s, run) for s in seeds] for seeds in forecast.programs]
        forecast.train(stage, runs, summary, seconds)


def bases(cell: Cell, library: str = "library") -> list[Made]:
    """The base of each seed's library."""
    return [Made(load_base(cell.library(seed, library)).act) for seed in cell.seeds]


def composed(
    cell: Cell,
    skills: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    library: str = "library",
    **composition: Any,
) -> list[Made]:
    """What `psec_jax.policy.compose` makes of each seed's library.

    Args:
      cell: whose seeds.
      skills: names.
      record: fields of the raw results.
      library: name.
      **composition: of `compose`; functions are called with the seed.
    """
    return [
        Made(
            compose(
                cell.library(seed, library), skills, **_for_seed(composition, seed)
            ).act,
            record or {},
        )
        for seed in cell.seeds
    ]


def _for_seed(fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {k: v(seed) if callable(v) else v for k, v in fields.items()}


def run(
    table: Table,
    job: Job,
    root: Path,
    folder: Path,
    report: Callable[[str], None] = print,
    *,
    settings: Sequence[str] = (),
    methods: Sequence[str] = (),
    together: bool = False,
    plan: bool = False,
    minutes: float | None = None,
    variant: Callable[[Setting], str] = lambda setting: "",
    borrow: Path | None = None,
) -> bool:
    """Measures every missing result; finished ones are kept.

    Args:
      table: the grid.
      job: of the preset; its `table.seeds` are measured.
      root: directory of runs.
      folder: of results.
      report: receives a line for each new result.
      settings: of the table; none are all.
      methods: of the table; none are all.
      together: train all seeds of a grid cell as one program.
      plan: only report how long it will take. Trainings and evaluations are tried
        briefly, in a temporary directory.
      minutes: after which to stop, see `stop_after`.
      variant: directory of the runs of a setting, see `Cell`.
      borrow: raw results of Table 2, for settings with `same`.

    Returns:
      Whether it measured; False of a plan.

    Raises:
      InputError: a setting that cannot be measured, or a finished result of another
        job or of other data.
      Stopped: the minutes are over.
    """
    with contextlib.ExitStack() as stack:
        if minutes is not None:
            stack.enter_context(stop_after(minutes))
        forecast = None
        if plan:
            trial = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            forecast = Forecast(trial, root, stack, together)
        jobs, known = {}, {}
        for name in settings or table.settings:
            setting = table.settings[name]
            jobs[name] = job.changed(setting.changes)
            known[name] = table.known(jobs[name], name, setting)
        seeds, done = tuple(job.table.seeds), {}
        for name in jobs:
            setting = table.settings[name]
            here = table.methods if setting.methods is None else setting.methods
            for group in [seeds] if together or plan else [(seed,) for seed in seeds]:
                for method in [m for m in methods or table.methods if m in here]:
                    cell = Cell(
                        jobs[name],
                        root / setting.folder,
                        name,
                        setting,
                        method,
                        group,
                        variant(setting),
                        forecast,
                    )
                    for raw in _missing(table, cell, known[name], folder, borrow, done):
                        if results.append(table.path(folder), raw):
                            report(_line(table, raw))
        if forecast is not None:
            report(str(forecast))
    return not plan


@contextlib.contextmanager
def stop_after(minutes: float) -> Iterator[None]:
    """Stops the body after so many minutes, as Ctrl-C does: a training saves first.

    Raises:
      Stopped: they are over.
    """
    over = []

    def stop(signum: int, frame: FrameType | None) -> None:
        over.append(signum)
        interrupt = signal.getsignal(signal.SIGINT)  # a training notes it
        if not callable(interrupt):  # ignored, as in the background of a script
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except KeyboardInterrupt as error:
        if not over:
            raise
        where = str(error) or "start again with the same command to go on"
        raise Stopped(
            f"{minutes:g} minutes are over: {where}", signal.SIGALRM
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _missing(
    table: Table,
    cell: Cell,
    known: Raw,
    folder: Path,
    borrow: Path | None,
    done: dict[tuple[str, str, int], Raw],
) -> Iterator[dict[str, Any]]:
    """The results of a cell that are not in the file yet, measured or borrowed.

    `done` is what was read of the file so far.
    """
    expected = {**known, "config_fingerprint": results.fingerprint(cell.job)}
    if not all((cell.name, cell.method, seed) in done for seed in cell.seeds):
        done.update(results.by_key(table.path(folder)))
    others = results.by_key(borrow) if borrow and cell.setting.same else {}
    record, missing = {**cell.setting.record, **known}, []
    for seed in cell.seeds:
        if raw := done.get((cell.name, cell.method, seed)):
            check(table.path(folder), raw, expected, table.identity)
            continue
        raw = others.get((cell.setting.same, cell.method, seed))
        if raw and raw["config_fingerprint"] == expected["config_fingerprint"]:
            yield {**raw, "setting": cell.name, **record}
        else:
            missing.append(seed)
    if not missing:
        return
    method = table.methods[cell.method]
    if cell.forecast is not None:
        cell = cell.forecast.of(dataclasses.replace(cell, seeds=tuple(missing)))
        for seed, made in zip(cell.seeds, method.make(cell), strict=True):
            table.measure(cell, seed, made)
        return
    cell = dataclasses.replace(cell, seeds=tuple(missing))
    for seed, made in zip(missing, method.make(cell), strict=True):
        head = results.header(cell.job, cell.name, cell.method, seed, method.stages)
        yield {**head, **record, **table.measure(cell, seed, made)}


def check(path: Path, raw: Raw, expected: Raw, identity: Sequence[str]) -> None:
    """Refuse a finished result of another job or of other data.

    Raises:
      InputError: the field that differs, with both values.
    """
    for name in identity:
        if name in raw and name in expected and raw[name] != expected[name]:
            raise InputError(
                f"{path}: {results.name(raw)} was measured with {name} {raw[name]}, "
                f"this is {expected[name]}; choose another --results folder, or delete "
                "the line"
            )


def _line(table: Table, raw: Raw) -> str:
    """One line about a new result: the mean of every metric."""
    means = [f"{k} {np.mean(values):.2f}" for k, values in table.score(raw).items()]
    return f"{results.name(raw)}: {', '.join(means) or 'measured'}"


def tune(
    cell: Cell,
    grid: Sequence[Sequence[float]],
    make: Callable[[Cell, Sequence[float]], Policy],
    value: Callable[[Raw], Any],
    *,
    shared: bool = False,
) -> dict[str, Any]:
    """The best fixed weights of a grid, by episodes from other start states.

    The episodes are rolled out once, those of all weights at once where their policies
    can act in one call, and kept in ROOT/tuning.jsonl.

    Args:
      cell: of one seed.
      grid: weights; the row of zeros, the base alone, is among them.
      make: policy of a cell with given weights.
      value: of a raw result; the weights of the largest are chosen.
      shared: they are chosen for all seeds.

    Returns:
      Fields of raw results: "alpha", the weights chosen, and "tried", all with their
      mean return.
    """
    start = {
        "evaluation.episodes": cell.job.table.tuning_episodes,
        "evaluation.seed": cell.job.evaluation.seed + 1,
    }
    cell = dataclasses.replace(cell, job=cell.job.changed(start))
    path = cell.root / "tuning.jsonl"
    labels = {
        f"{cell.method} ({', '.join(f'{w:g}' for w in weights)})": tuple(weights)
        for weights in grid
    }
    done = results.by_key(path if cell.forecast is None else cell.forecast.real(path))
    missing = {
        label: make(cell, weights)
        for label, weights in labels.items()
        if (cell.name, label, cell.seed) not in done
    }
    envs = dict.fromkeys(missing, cell.setting.env)
    evaluation = cell.job.evaluation
    size = evaluation.episodes, evaluation.seed
    if cell.forecast is None:
        played = multirun.roll_out(missing, envs, *size)
    else:
        played = cell.forecast.tune(missing, cell.setting.env, *size, shared=shared)
    raws = []
    for label, weights in labels.items():
        raw = done.get((cell.name, label, cell.seed))
        if raw is None:
            raw = results.header(cell.job, cell.name, label, cell.seed, {})
            raw |= {"alpha": list(weights)} | played[label]
            results.append(path, raw)
        expected = {"config_fingerprint": results.fingerprint(cell.job)}
        check(path, raw, expected, tuple(expected))
        raws.append(raw)
    best = max(raws, key=lambda raw: (value(raw), raw["alpha"]))
    tried = [{"alpha": raw["alpha"], "mean": raw["mean"]} for raw in raws]
    return {"alpha": best["alpha"], "tried": tried}


def define_flags(
    results_folder: str | None, runs: str, rows: bool = True
) -> dict[str, flags.FlagHolder]:
    """The flags of every table's command; `rows` also those of methods and seeds."""
    given = {
        "preset": flags.DEFINE_string(
            "preset", "standard", "quick, standard or paper."
        ),
        "results": flags.DEFINE_string(
            "results", results_folder, "Folder of raw results, tables and figures."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, f"Folder of runs; default {runs}/PRESET."
        ),
        "together": flags.DEFINE_bool(
            "together",
            False,
            "Train each stage for all seeds as one program: faster on an accelerator, "
            "no faster on a CPU; its numbers are the same apart from rounding.",
        ),
        "plan": flags.DEFINE_bool(
            "plan",
            False,
            "Only print how long each part of what is not finished will take on this "
            "machine: a second of each training and the first steps of an evaluation "
            "of each form of policy are measured, which takes minutes.",
        ),
        "minutes": flags.DEFINE_float(
            "minutes",
            None,
            "Stop after so many minutes, having saved, with exit code "
            f"{128 + signal.SIGALRM}; the same command then goes on.",
            lower_bound=0.01,
        ),
    }
    if rows:
        given |= {
            "seeds": flags.DEFINE_list(
                "seeds", [], "Seeds to run; default the preset's."
            ),
            "methods": flags.DEFINE_list("methods", [], "Rows to run; default all."),
            "tables_only": flags.DEFINE_bool(
                "tables_only", False, "Only make the tables again."
            ),
        }
    return given


def options(given: Mapping[str, flags.FlagHolder]) -> dict[str, Any]:
    """The arguments of `run` that are flags of every table's command."""
    return {name: given[name].value for name in ("together", "plan", "minutes")}


def measure(
    given: Mapping[str, flags.FlagHolder],
    table: Table,
    job: Job,
    root: Path,
    folder: Path,
    *,
    methods: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> bool:
    """`run` by the flags of a table's command, unless --tables_only was given.

    Args:
      given: flags that `define_flags` made, with those of rows.
      table: the grid.
      job: of the preset; --seeds replaces its seeds.
      root: directory of runs.
      folder: of results.
      methods: where --methods names none; none are all.
      settings: of the table; none are all.

    Returns:
      Whether tables are to be written now: they are not after a plan.

    Raises:
      InputError: an unknown method, or as `run`.
    """
    named = known_names(given["methods"].value, table.methods, "method")
    if given["tables_only"].value:
        return True
    job = set_seeds(job, given)
    chosen = {"settings": settings, "methods": named or methods}
    return run(table, job, root, folder, **chosen, **options(given))


def run_root(given: Mapping[str, flags.FlagHolder], runs: str) -> Path:
    """The directory of runs that the flags name."""
    return Path(given["workdir"].value or f"{runs}/{given['preset'].value}")


def set_seeds(job: Job, given: Mapping[str, flags.FlagHolder]) -> Job:
    """The job with the seeds that the flags name."""
    chosen = given["seeds"].value
    return job.changed({"table.seeds": table_seeds(chosen)}) if chosen else job


def known_names(names: Sequence[str], table: Mapping[str, Any], what: str) -> list[str]:
    """Names given by flag, all of which are in a table.

    Raises:
      InputError: a name that is not; the message lists the choices.
    """
    for name in names:
        lookup(table, name, what)
    return list(names)
