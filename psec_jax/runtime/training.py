"""The training loop: steps, metrics, progress, saves, resume."""

import collections
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from psec_jax import tree
from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.runtime import processes, sharding, streaming
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.metrics import Writer, newest
from psec_jax.runtime.run import Run
from psec_jax.runtime.streaming import Stream

State = TypeVar("State")
Update = Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]
Result = tuple[Any, dict[str, int | float]]

# Calls dispatched but not finished: enough to hide the dispatch of the next one, few
# enough that a stop is prompt and that no queue of buffers builds up.
_IN_FLIGHT = 2
_REFRESH_SECONDS = 1.0


class Member(NamedTuple):
    """One of several trainings that are one program.

    Attributes:
      state: a pytree with `.step`, an int32 scalar; left untouched (copied).
      data: pytree of arrays, or a `Stream` of which each step gets its batch. Arrays
        that are the same object in every member lie on the device once; the others need
        the same shape in every member.
      key: typed key of the member's whole run.
      run: where its metrics and saves go; None keeps nothing on disk.
      name: put before messages, such as "seed 3".
    """

    state: Any
    data: Any
    key: jax.Array
    run: Run | None = None
    name: str = ""


def train(
    update: Update,
    state: State,
    data: Any,
    key: jax.Array,
    *,
    run: Run | None,
    on_save: Callable[[int, State], None] | None = None,
    **options: Any,
) -> tuple[State, dict[str, int | float]]:
    """`train_together` of one member: its state and summary.

    Args:
      update: (state, data, key) -> (state, metrics), pure; metrics are scalars by name.
      state: see `Member`.
      data: see `Member`.
      key: see `Member`.
      run: see `Member`.
      on_save: called with (step, state) before each save is written.
      **options: of `train_together`.

    Raises:
      As `train_together`.
    """

    def told(step: int, states: Sequence[State]) -> None:
        if on_save is not None:
            on_save(step, states[0])

    [result] = train_together(
        update, [Member(state, data, key, run)], on_save=told, **options
    )
    return result


def train_together(
    update: Update,
    members: Sequence[Member],
    *,
    steps: int,
    log_every: int,
    save_every: int,
    steps_per_call: int = 1,
    stage: str = "base",
    progress: bool = True,
    on_save: Callable[[int, Sequence[Any]], None] | None = None,
    mesh: Mesh | None = None,
) -> list[Result]:
    """Update the states of R members until each has done `steps` steps.

    With several members `update` is vmapped over them: one program, in which each is
    what it would be alone, apart from the rounding of batched products. Each goes on
    from its newest save; those that stand behind others catch up first.

    Step s of a member uses the key fold_in(key, s), so that a resumed run draws what a
    run that was never stopped draws. Metrics are averaged over the steps since the last
    line.

    Args:
      update: (state, data, key) -> (state, metrics), pure; metrics are scalars by name.
      members: R of them.
      steps: total, those of the restored save included.
      log_every: steps between two lines of metrics.
      save_every: steps between two saves; the last step is always saved.
      steps_per_call: updates in one compiled loop; on a CPU worth it for large batches.
      stage: name in the progress line.
      progress: print progress to stderr.
      on_save: called with (step, states of the members in training) before each save
        is written.
      mesh: of `sharding.make_mesh`, where members and batches are divided; None is one
        device.

    Returns:
      Of each member the state, and a summary: "steps" done in this call, "resumed_at",
      "seconds", "compile_seconds", "first_step_seconds" (from the call to the first
      update done), "steps_per_s" (without the first call), and the last metrics by
      name. Times are those of the whole program.

    Raises:
      TrainingError: a metric is not finite; the last good saves stay.
      InputError: a number below 1, a full disk, a damaged save to resume from, members
        whose arrays differ in shape, or a mesh that does not divide the batch.
      Stopped: on SIGTERM or Ctrl-C, after saving.
    """
    for name, value in {
        "members": len(members),
        "steps": steps,
        "log_every": log_every,
        "save_every": save_every,
        "steps_per_call": steps_per_call,
    }.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected 1 or more")
    streamed = [isinstance(member.data, Stream) for member in members]
    if any(streamed) and not all(streamed):
        raise InputError("data: some members are streamed, expected all or none")
    if any(streamed):
        streaming.check_calls(steps_per_call)
    started = time.perf_counter()
    line = _Line(progress and processes.first())
    with contextlib.ExitStack() as stack:
        courses = [_Course(member, stack, line, stage, mesh) for member in members]
        stop = stack.enter_context(_signals())
        for course in courses:
            course.resume()
        stack.callback(line.end)
        # Those behind go on alone until they meet the next one.
        for goal in [*sorted({course.step for course in courses})[1:], steps]:
            behind = [course for course in courses if course.step < goal]
            if behind:
                loop = _Loop(update, behind, goal, stage, line, started, mesh)
                loop.on_save = on_save
                loop.go(stop, log_every, save_every, steps_per_call)
        if stop:
            _stop(stop[0], courses)
        for course in courses:
            course.wait()
        seconds = time.perf_counter() - started
        return [(course.state, course.summary(seconds)) for course in courses]


class _Course:
    """One member on its way: how far it is, and where its metrics and saves go."""

    def __init__(
        self,
        member: Member,
        stack: contextlib.ExitStack,
        line: "_Line",
        stage: str,
        mesh: Mesh | None,
    ) -> None:
        self.state, self.data, self.key = member.state, member.data, member.key
        self.run, self.name = member.run, member.name
        self.saves: Checkpoints | None = None
        self.writer: Writer | None = None
        self.resumed_at, self.saved = 0, 0
        self.timing: dict[str, float] = {
            "compile_seconds": 0.0,
            "first_step_seconds": 0.0,
            "steps_per_s": 0.0,
        }
        self.metrics: dict[str, float] = {}
        self._stack, self._line, self._stage = stack, line, stage
        # Orbax wants arrays that all processes have.
        self._layout = sharding.Layout(mesh if jax.process_count() > 1 else None, 1)
        if self.run is not None:
            if processes.first():
                stack.enter_context(self.run.locked())
            self.saves = stack.enter_context(
                contextlib.closing(Checkpoints(self.run.checkpoints))
            )

    @property
    def before(self) -> str:
        """What a message about this member begins with."""
        return f"{self.name}: " if self.name else ""

    def resume(self) -> None:
        """Take up the newest save, and drop the metrics of later steps."""
        if self.saves is not None and self.saves.last is not None:
            self.state = self.saves.restore(self._layout.put(self.state))
            if jax.process_count() > 1:
                self.state = sharding.local(self.state)
            self.resumed_at = int(self.state.step)
            text = f"{self._stage}  resumed at step {self.resumed_at}"
            self._line.put(f"{self.before}{text}", True)
            self._line.end()
        self.step = self.saved = int(self.state.step)
        self._first = self.step
        if self.run is not None and processes.first():
            self.writer = self._stack.enter_context(
                _closing(Writer(self.run, self.step))
            )
            # What is told of a run that has nothing left to do.
            self.metrics = newest(self.run)

    def save(self, step: int, state: Any) -> None:
        """Start to save a state, which must be finite."""
        if self.saves is not None:
            self.saves.save(step, self._layout.put(state))
        self.saved = step

    def wait(self) -> None:
        """Block until the save in progress is complete."""
        if self.saves is not None:
            self.saves.wait()

    def good(self) -> str:
        """Words for the newest complete save."""
        if self.saves is None:
            return "nothing was saved"
        self.saves.wait()
        last = self.saves.last
        return f"last good save: {'none' if last is None else f'step {last}'}"

    def summary(self, seconds: float) -> dict[str, int | float]:
        """Of a finished member; see `train_together`."""
        done = {"steps": self.step - self._first, "resumed_at": self.resumed_at}
        return done | {"seconds": seconds} | self.timing | self.metrics


class _Loop:
    """Members that stand at the same step, trained to a later one."""

    def __init__(
        self,
        update: Update,
        courses: Sequence[_Course],
        goal: int,
        stage: str,
        line: "_Line",
        started: float,
        mesh: Mesh | None,
    ) -> None:
        self.courses, self.goal, self.line = courses, goal, line
        self.started, self.mesh = started, mesh
        layout = sharding.Layout(mesh, len(courses))
        self.stage = stage if len(courses) == 1 else f"{stage} x {len(courses)}"
        self.on_save: Callable[[int, Sequence[Any]], None] | None = None
        self.step = courses[0].step
        self.state = layout.put(_join([course.state for course in courses]))
        self.streams = [c.data for c in courses if isinstance(c.data, Stream)]
        if self.streams:
            self.data, axes = _share([stream.rest for stream in self.streams], layout)
            axes, update = (axes, 0), _streamed(update, self.streams[0])
        else:
            self.data, axes = _share([course.data for course in courses], layout)
        self.key, self.every = courses[0].key, update
        if len(courses) > 1:
            self.key = jnp.stack([course.key for course in courses])
            self.every = jax.vmap(update, (0, axes, 0), spmd_axis_name=layout.axis)
        self.key = layout.put(self.key)
        self.layout = layout
        self.member = jax.jit(_member, **layout.out(False))
        # Devices that a CPU is made to have wait for each other in its few threads.
        alone = mesh is None or jax.default_backend() != "cpu"
        self.in_flight = _IN_FLIGHT if alone else 0

    def go(
        self, stop: list[int], log_every: int, save_every: int, steps_per_call: int
    ) -> None:
        """Run to the goal; the members then hold the states reached."""
        with contextlib.closing(self._datas()) as datas:
            self._run(datas, stop, log_every, save_every, steps_per_call)

    def _datas(self) -> Iterator[Any]:
        """What each call of the update reads."""
        if not self.streams:
            while True:
                yield self.data
        keys = [course.key for course in self.courses]
        with contextlib.closing(
            streaming.batches(self.streams, keys, self.layout, self.step, self.goal)
        ) as batches:
            for batch in batches:
                yield self.data, batch

    def _run(
        self,
        datas: Iterator[Any],
        stop: list[int],
        log_every: int,
        save_every: int,
        steps_per_call: int,
    ) -> None:
        data = next(datas)
        with sharding.using(self.mesh):
            call, zeros = _compile(
                self.every,
                self.state,
                data,
                self.key,
                looped=steps_per_call > 1,
                layout=self.layout,
            )
            self.zeros = zeros
            self.sums, self.since = self.zeros(), self.step
            if jax.process_count() > 1:
                # They compile at their own speeds, and then wait little for each other.
                call = call.lower(self.state, self.sums, data, self.key, 1).compile()
                processes.meet()
        first, compile_s, first_s = self.step, 0.0, 0.0
        pending: collections.deque[jax.Array] = collections.deque()
        steady = self.mark = (self.step, time.perf_counter())
        shown = steady[1]
        while self.step < self.goal:
            if stop or _preempted(self.step, stop):
                self._keep()
                _stop(stop[0], self.courses)
            began = time.perf_counter()
            count = min(
                steps_per_call,
                self.goal - self.step,
                log_every - self.step % log_every,
                save_every - self.step % save_every,
            )
            with sharding.using(self.mesh):
                self.state, self.sums, tick = call(
                    self.state, self.sums, data, self.key, count
                )
            self.step += count
            data = next(datas) if self.step < self.goal else None
            if self.step == first + count:
                compile_s = time.perf_counter() - began
                tick.block_until_ready()
                steady = self.mark = (self.step, time.perf_counter())
                first_s = steady[1] - self.started
            pending.append(tick)
            if len(pending) > self.in_flight:
                pending.popleft().block_until_ready()
            now = time.perf_counter()
            if self.step % log_every == 0 or self.step == self.goal:
                self._log()
                shown = now
            elif self.line.live and now - shown > _REFRESH_SECONDS:
                self._show(self._rate(), False)
                shown = now
            if self.step % save_every == 0 or self.step == self.goal:
                self._save()
        self._keep()
        for course in self.courses:
            course.wait()
        now = time.perf_counter()
        for course in self.courses:
            course.timing = {
                "compile_seconds": compile_s,
                "first_step_seconds": first_s,
                "steps_per_s": (self.step - steady[0]) / (now - steady[1]),
            }

    def _keep(self) -> None:
        """Hand every member its own state."""
        states = self._states(copied=False)
        for course, state in zip(self.courses, states, strict=True):
            course.state, course.step = state, self.step

    def _states(self, copied: bool) -> list[Any]:
        """The state of each member, in arrays of its own where asked for."""
        if len(self.courses) > 1:
            states = [self.member(self.state, r) for r in range(len(self.courses))]
        else:
            states = [jax.tree.map(jnp.copy, self.state) if copied else self.state]
        return states if self.mesh is None else sharding.local(states)

    def _rate(self) -> float | None:
        """Steps per second since the last mark; None right after it."""
        steps, seconds = self.step - self.mark[0], time.perf_counter() - self.mark[1]
        return steps / seconds if steps else None

    def _log(self) -> None:
        """Average, check, write and show the metrics since the last line."""
        count = self.step - self.since
        sums = jax.device_get(self.sums)
        for r, course in enumerate(self.courses):
            course.metrics = {
                name: float(np.reshape(total, -1)[r]) / count
                for name, total in sums.items()
            }
            bad = [n for n, value in course.metrics.items() if not np.isfinite(value)]
            if bad:
                # A loss, where it is among them, rather than what follows from it.
                name = min(bad, key=lambda name: not name.startswith("loss/"))
                raise TrainingError(
                    f"{course.before}{name} is not finite between steps {self.since} "
                    f"and {self.step}; {course.good()}"
                )
        self.sums, self.since = self.zeros(), self.step
        rate = self._rate()
        speed = {} if rate is None else {"time/steps_per_s": rate}
        for course in self.courses:
            if course.writer is not None:
                course.writer.write(self.step, course.metrics | speed)
        self._show(rate, True)
        self.mark = (self.step, time.perf_counter())

    def _show(self, rate: float | None, final: bool) -> None:
        parts = [self.stage, f"step {self.step}/{self.goal}"]
        for name in self.courses[0].metrics:
            if name.startswith("loss/"):
                mean = np.mean([course.metrics[name] for course in self.courses])
                parts.append(f"{name} {mean:.4g}")
        if rate is not None:
            left = _duration((self.goal - self.step) / rate)
            parts += [f"{rate:.1f} steps/s", f"{left} left"]
        self.line.put("  ".join(parts), final)

    def _save(self) -> None:
        if self.on_save is None and not any(course.saves for course in self.courses):
            return
        # Copies: the background write must not read buffers the next step overwrites.
        copies = self._states(copied=True)
        for course, copy in zip(self.courses, copies, strict=True):
            if not _all_finite(copy):
                raise TrainingError(
                    f"{course.before}the state is not finite at step {self.step}; "
                    f"{course.good()}"
                )
        if self.on_save is not None:
            self.on_save(self.step, copies)
        for course, copy in zip(self.courses, copies, strict=True):
            course.save(self.step, copy)


def _preempted(step: int, stop: list[int]) -> bool:
    """Whether any of several processes was told to stop; all learn it at one step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        stop.append(signal.SIGTERM)
    return bool(stop)


def _stop(signum: int, courses: Sequence[_Course]) -> None:
    """Save every member where it is, and say so.

    Raises:
      Stopped: always.
    """
    name = signal.Signals(signum).name
    bad = None
    for course in courses:
        if course.saves is not None and course.step > course.saved:
            if _all_finite(course.state):
                course.save(course.step, course.state)
            else:
                bad = bad or course
    told = bad or min(courses, key=lambda course: course.saved)
    stopped = f"{told.before}stopped by {name} at step {told.step}"
    for course in courses:
        course.wait()
    if bad:
        raise Stopped(f"{stopped}, where the state is not finite; {bad.good()}", signum)
    raise Stopped(
        f"{stopped}; {told.good()}; start again with the same workdir to go on", signum
    )


def _streamed(update: Update, stream: Stream) -> Update:
    """The update on (rest, batch) in place of data."""

    def on_batch(state: State, data: Any, key: jax.Array) -> Any:
        return update(state, stream.data(*data), key)

    return on_batch


def _join(states: Sequence[State]) -> State:
    """The states of R members as one, leaves [R, ...]; of one member as it is.

    The step donates its input: copies keep the caller's arrays alive. An explicit dtype
    drops weak types, which would compile the step a second time.
    """
    if any(tree.shapes(state) != tree.shapes(states[0]) for state in states):
        raise InputError("the states of the members differ in their shapes")
    if len(states) == 1:
        return jax.tree.map(lambda x: jnp.array(x, x.dtype), states[0])
    return jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(x, leaves[0].dtype) for x in leaves]),
        *states,
    )


def _share(datas: Sequence[Any], layout: sharding.Layout) -> tuple[Any, Any]:
    """The data of all members as one tree on the device, and its axes of members.

    An array that is the same object in every member is kept once, with axis None. A
    host array would be copied to the device at every call.
    """

    def one(*leaves: Any) -> tuple[jax.Array, int | None]:
        if all(leaf is leaves[0] for leaf in leaves):
            return layout.put(leaves[0], divided=False), None
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if len(set(shapes)) > 1:
            raise InputError(f"the data of the members have shapes {shapes}")
        return layout.put(jnp.stack(leaves)), 0

    columns = zip(*(jax.tree.leaves(data) for data in datas), strict=True)
    pairs = [one(*leaves) for leaves in columns]
    shape = jax.tree.structure(datas[0])
    data = jax.tree.unflatten(shape, [leaf for leaf, _ in pairs])
    return data, jax.tree.unflatten(shape, [axis for _, axis in pairs])


def _member(state: State, index: jax.Array) -> State:
    return jax.tree.map(lambda x: x[index], state)


def _compile(
    update: Update,
    state: State,
    data: Any,
    key: jax.Array,
    looped: bool,
    layout: sharding.Layout,
) -> tuple[Callable[..., Any], Callable[[], dict[str, jax.Array]]]:
    """(state, sums, data, key, count) -> (state, sums, tick), and the zero sums.

    The sums ride along in the compiled step, so that averaging costs no dispatch. The
    tick is the one output that no later call donates: the loop waits on it.
    """
    _, metrics = jax.eval_shape(update, state, data, key)
    fold_in = jax.vmap(jax.random.fold_in) if key.ndim else jax.random.fold_in

    def one(carry: tuple[State, dict], data: Any, key: jax.Array) -> tuple[State, dict]:
        state, sums = carry
        state, metrics = update(state, data, fold_in(key, state.step))
        return state, {name: sums[name] + metrics[name] for name in sums}

    def call(
        state: State, sums: dict, data: Any, key: jax.Array, count: jax.Array
    ) -> tuple[State, dict, jax.Array]:
        if looped:
            # A count known only at run time: a shorter call compiles nothing anew.
            state, sums = jax.lax.fori_loop(
                0, count, lambda _, carry: one(carry, data, key), (state, sums)
            )
        else:
            state, sums = one((state, sums), data, key)
        return state, sums, jnp.copy(state.step)

    def zeros() -> dict[str, jax.Array]:
        made = {name: jnp.zeros(x.shape, jnp.float32) for name, x in metrics.items()}
        return layout.put(made, divided=False)

    shardings = layout.out((True, False, False))
    return jax.jit(call, donate_argnums=(0, 1), **shardings), zeros


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


class _Line:
    """Progress on stderr: one line that is rewritten on a terminal, else one a log."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.live = enabled and sys.stderr.isatty()
        self._open = False

    def put(self, text: str, final: bool) -> None:
        """Print; `final` marks a text that a log file should have too."""
        if self.live:
            # Erase to the end of the line: the text before may have been longer.
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif self._enabled and final:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False


def _duration(seconds: float) -> str:
    """1h02m, 1m45s, 45s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


@contextlib.contextmanager
def _closing(writer: Writer) -> Iterator[Writer]:
    """Close at the end; after an error, that error is the one to tell."""
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(InputError):
            writer.close()
        raise
    writer.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C while the body runs; a second Ctrl-C acts at once.

    A second SIGTERM does not: launchers send it to a process and again to its group.
    """
    caught: list[int] = []
    several = jax.process_count() > 1  # JAX collects their signals; see `_preempted`
    if several or threading.current_thread() is not threading.main_thread():
        yield caught  # Python delivers signals to the main thread only.
        return

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, before[signum])

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
