"""Stages side by side: what they train is one program, and so are their roll-outs."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psec_jax import tree
from psec_jax.agents.common import DRAWN, TrainData, Transitions, pad_rows, rows_of
from psec_jax.agents.offline import OfflineData
from psec_jax.errors import InputError
from psec_jax.evaluation import evaluate, evaluate_together
from psec_jax.files import beside
from psec_jax.policy import Policy, act_together, alike
from psec_jax.runtime import processes, sharding, streaming
from psec_jax.runtime.run import Run
from psec_jax.runtime.streaming import Stream
from psec_jax.runtime.training import Member, train_together
from psec_jax.workflows.demonstrations import FIRST, Demos, Selection, load_demos


class Load(NamedTuple):
    """What a stage asks for: demonstrations; see `load_demos`."""

    config: ConfigDict
    env: str
    episodes: int
    path: str | None = None
    selection: Selection = FIRST
    with_costs: bool = False


class Ready(NamedTuple):
    """What a stage says before it opens its folder: what it would train."""

    demos: Demos
    batch_size: int
    options: ConfigDict


class Train(NamedTuple):
    """What a stage asks for: the state and summary of a training; see `train`.

    `index` says which rows a step draws: (key, their number) -> Int[B].
    """

    update: functools.partial
    index: functools.partial
    state: Any
    data: Any
    key: jax.Array
    run: Run
    steps: int
    stage: str
    options: ConfigDict


class RollOut(NamedTuple):
    """What a stage asks for: episodes of a policy; see `evaluate`."""

    policy: Policy
    env: str
    episodes: int
    seed: int


class Write(NamedTuple):
    """What a stage says before it writes: of several processes the first goes on."""


Work = Generator[Load | Ready | Train | RollOut | Write, Any, dict[str, Any]]
P = ParamSpec("P")


class Stage(Generic[P]):
    """A stage: called, it runs alone; `work` is what `together` runs side by side.

    Attributes:
      work: the stage as a generator, which asks for what takes long (`Load`, `Train`,
        `RollOut`), is sent it, and returns the result.
    """

    def __init__(self, work: Callable[P, Work]) -> None:
        self.work = work
        functools.update_wrapper(self, work)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The result of the stage run alone."""
        return together({"": self.work(*args, **kwargs)})[""]


def together(
    works: Mapping[str, Work], mesh: str | None = None, stream: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Run stages side by side: what they train is one program, and so are roll-outs.

    Args:
      works: by a name for messages, such as "seed 3".
      mesh: sizes of a mesh of devices, see `sharding.make_mesh`; None is one device.
      stream: whether data stay in files, see `streaming.wanted`.

    Returns:
      Their results by name.

    Raises:
      InputError: what they train does not go into one program, or a mesh that does not
        fit.
    """
    devices = sharding.make_mesh(mesh, len(works))
    results: dict[str, dict[str, Any]] = {}
    loaded: list[tuple[Load, Demos]] = []
    answers: dict[str, Any] = dict.fromkeys(works)
    writing = False
    while answers:
        loads, ready, trains, rolls, writes = {}, {}, {}, {}, {}
        # What the first process puts into its folders, the others find there.
        with contextlib.nullcontext() if writing else processes.first_before_others():
            for name, answer in answers.items():
                try:
                    asked = works[name].send(answer)
                except StopIteration as end:
                    results[name] = end.value
                    continue
                if isinstance(asked, Load):
                    loads[name] = _loaded(asked, loaded)
                elif isinstance(asked, Ready):
                    ready[name] = asked
                elif isinstance(asked, Train):
                    # Freed here, what is equal never lies on the device R times.
                    first = next(iter(trains.values()), asked)
                    trains[name] = asked._replace(data=_shared(asked.data, first.data))
                elif isinstance(asked, RollOut):
                    rolls[name] = asked
                else:
                    writes[name] = None
        if writes and not processes.first():
            break
        writing = writing or bool(writes)
        _check(list(ready.values()), devices, stream)
        trained = _train_all(trains, devices, stream)
        waited = dict.fromkeys(ready) | writes
        answers = loads | trained | _roll_out_all(rolls) | waited
    return {name: results[name] for name in works if name in results}


def _loaded(asked: Load, loaded: list[tuple[Load, Demos]]) -> Demos:
    """Demonstrations, read once for all that ask for the same."""
    for known, demos in loaded:
        if known == asked:
            return demos
    loaded.append((asked, load_demos(*asked)))
    return loaded[-1][1]


def _check(asked: Sequence[Ready], mesh: Mesh | None, stream: str) -> None:
    """Refuse what training would refuse, while no folder is made.

    Raises:
      InputError: a mesh that does not divide a batch, or data that are to be streamed
        without grain or with several steps in one call.
    """
    if not asked:
        return
    for one in asked:
        if mesh is not None:
            sharding.check_batch(mesh.shape["data"], one.batch_size)
    # Critics read more columns than these; what that makes of "auto" training finds.
    columns = {
        id(column): column.nbytes
        for one in asked
        for column in (one.demos.dataset.obs, one.demos.dataset.action)
    }
    if streaming.wanted(stream, sum(columns.values())):
        for one in asked:
            streaming.check_calls(one.options.steps_per_call)


def _shared(data: Any, first: Any) -> Any:
    """The same data, where it equals `first` by the very arrays of that."""

    def one(mine: Any, other: Any) -> Any:
        arrays = np if isinstance(mine, np.ndarray) else jnp
        equal = mine.shape == other.shape and bool(arrays.array_equal(mine, other))
        return other if equal else mine

    if jax.tree.structure(data) != jax.tree.structure(first):
        return data
    return jax.tree.map(one, data, first)


def _train_all(
    asked: Mapping[str, Train], mesh: Mesh | None, stream: str
) -> dict[str, Any]:
    """State and summary of each training, all in one program."""
    if not asked:
        return {}
    first_name, first = next(iter(asked.items()))
    for name, one in asked.items():
        if _program(one) != _program(first):
            raise InputError(
                f"{name} cannot be trained in one program with {first_name}: its "
                "network or its budget is another"
            )
    with contextlib.ExitStack() as stack:
        datas = [one.data for one in asked.values()]
        rows = {id(x): x for data in datas for x in rows_of(_drawn_from(data)).values()}
        if streaming.wanted(stream, sum(x.nbytes for x in rows.values())):
            datas = _streams(list(asked.values()), stack)
        else:
            datas = _lengthened(datas)
        members = [
            Member(one.state, data, one.key, one.run, name)
            for (name, one), data in zip(asked.items(), datas, strict=True)
        ]
        options = {**first.options, "steps": first.steps, "stage": first.stage}
        results = train_together(first.update, members, mesh=mesh, **options)
    return dict(zip(asked, results, strict=True))


def _streams(asked: Sequence[Train], stack: contextlib.ExitStack) -> list[Stream]:
    """The data as files, in the first one's folder until the stack ends."""
    tables: dict[tuple[int, ...], np.ndarray] = {}
    # Each process has its own; what a killed one leaves, the next start removes.
    folder = beside(asked[0].run.workdir / "rows", "tmp")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    streams = []
    for one in asked:
        rows = rows_of(_drawn_from(one.data))
        same = tuple(id(column) for column in rows.values())
        if same not in tables:
            path = folder / f"{len(tables)}.npy"
            tables[same] = streaming.write_table(rows, path)
        streams.append(make_stream(one.data, one.index, tables[same]))
    return streams


def make_stream(
    data: TrainData | Transitions | OfflineData,
    index: Callable[..., jax.Array],
    table: np.ndarray,
) -> Stream:
    """Data with rows in a table of `streaming.write_table`; `index` as of `Train`."""
    rows = rows_of(_drawn_from(data))
    return Stream(
        table,
        {name: column.shape[1:] for name, column in rows.items()},
        functools.partial(index, count=len(table)),
        _rest(data),
        functools.partial(_filled, type(data)),
    )


def _program(asked: Train) -> tuple[Any, ...]:
    """What trainings of one program have in common."""
    update, steps = asked.update, (asked.steps, asked.options)
    return update.func, update.args, steps, tree.shapes(asked.state)


def _drawn_from(
    data: TrainData | Transitions | OfflineData,
) -> TrainData | Transitions:
    """The part of the data that has rows."""
    return data.transitions if isinstance(data, OfflineData) else data


def _with(data: Any, part: TrainData | Transitions) -> Any:
    """The data with another part that has rows."""
    is_offline = isinstance(data, OfflineData)
    return data._replace(transitions=part) if is_offline else part


def _rest(data: TrainData | Transitions | OfflineData) -> Any:
    """What the data hold beside rows."""
    return None if isinstance(data, Transitions) else data.frozen


def _filled(kind: type, rest: Any, rows: Mapping[str, jax.Array]) -> Any:
    """Data of one kind whose rows are a batch."""
    if kind is TrainData:
        return TrainData(**rows, frozen=rest, count=DRAWN)
    batch = Transitions(**rows, count=DRAWN)
    return OfflineData(batch, rest) if kind is OfflineData else batch


def _lengthened(datas: Sequence[Any]) -> list[Any]:
    """Data of one length, where they differ."""
    lengths = [len(_drawn_from(data).obs) for data in datas]
    if len(set(lengths)) == 1:
        return list(datas)
    longest = max(lengths)
    return [_with(data, pad_rows(_drawn_from(data), longest)) for data in datas]


def _roll_out_all(asked: Mapping[str, RollOut]) -> dict[str, Any]:
    """Episodes of each policy; those that can act in one call play together."""
    episodes: dict[str, Any] = {}
    for name, one in asked.items():
        if name in episodes:
            continue
        same = [
            other
            for other, two in asked.items()
            if two[1:] == one[1:] and alike(two.policy, one.policy)
        ]
        if len(same) == 1:
            episodes[name] = evaluate(one.policy.act, *one[1:])
            continue
        act = act_together([asked[other].policy for other in same])
        played = evaluate_together(act, len(same), *one[1:])
        episodes |= zip(same, played, strict=True)
    return episodes
