"""The training loop: compiled steps, metrics, saves, resume, stops."""

import collections
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from psec_jax import tree
from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.runtime import platform, processes, sharding, streaming
from psec_jax.runtime.batches import Drawn
from psec_jax.runtime.console import Line, duration
from psec_jax.runtime.runs import RunState, Training
from psec_jax.runtime.streaming import Stream

State = TypeVar("State")
Update = Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
Result = tuple[Any, dict[str, int | float]]

# Calls dispatched but not finished: enough to hide the dispatch of the next one, few
# enough that a stop is prompt and that no queue of buffers builds up.
_IN_FLIGHT = 2
_REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class LoopConfig:
    """How often a training reports and saves.

    Attributes:
      log_every: steps between two lines of metrics.
      save_every: steps between two saves; the last step is always saved.
      steps_per_call: updates in one compiled loop; 0 is the backend's own number, see
        `platform.Platform`, and 1 where data are streamed.
      trial_seconds: time after the first update in which a training ends, finished or
        not, to measure its rate; 0 does all steps.
    """

    log_every: int = 500
    save_every: int = 2000
    steps_per_call: int = 0
    trial_seconds: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "log_every": 1,
            "save_every": 1,
            "steps_per_call": 0,
            "trial_seconds": 0,
        }
        for field, bound in least.items():
            if (value := getattr(self, field)) < bound:
                raise InputError(f"{field}: got {value}, expected {bound} or more")


def train(
    update: Update | Drawn,
    trainings: Sequence[Training],
    *,
    steps: int,
    config: LoopConfig,
    stage: str = "base",
    progress: bool = True,
    on_save: Callable[[int, Sequence[Any]], None] | None = None,
    mesh: Mesh | None = None,
) -> list[Result]:
    """Update the states of R trainings until each has done `steps` steps.

    With several trainings `update` is vmapped over them: one program, in which each is
    what it would be alone, apart from the rounding of batched products. Each goes on
    from its newest save; those behind the others catch up first.

    Step s of a training uses the key fold_in(key, s), so that a resumed training draws
    what one that was never stopped draws. Metrics are averaged over the steps since the
    last line.

    Args:
      update: (state, data, key) -> (state, metrics), pure; metrics are scalars by name.
        Of streamed data a `batches.Drawn`.
      trainings: R of them.
      steps: total, those of the restored save included.
      config: how often metrics are written and states saved.
      stage: name in the progress line.
      progress: print progress to stderr.
      on_save: called with (step, states of the trainings in progress) before each save
        is written.
      mesh: of `sharding.make_mesh`, where trainings and batches are divided; None is
        one device.

    Returns:
      Of each training the state, and a summary: "steps" done in this call, "left" of a
      trial, "resumed_at", "seconds", "compile_seconds", "first_step_seconds" (from the
      call to the first update done), "steps_per_s" (without the first call and the last
      save), and the last metrics by name. Times are those of the whole program.

    Raises:
      TrainingError: a metric is not finite; the last good saves stay.
      InputError: no training or step, a full disk, a damaged save to resume from,
        trainings whose arrays differ in shape, or a mesh that does not divide the
        batch.
      Stopped: on SIGTERM, SIGHUP or Ctrl-C, after saving.
    """
    for name, value in {"trainings": len(trainings), "steps": steps}.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected 1 or more")
    streamed = [isinstance(training.data, Stream) for training in trainings]
    if any(streamed) and not all(streamed):
        raise InputError("data: some trainings are streamed, expected all or none")
    if any(streamed):
        streaming.check_calls(config.steps_per_call)
    started = time.perf_counter()
    line = Line(progress and processes.first())
    with contextlib.ExitStack() as stack:
        runs = [RunState(one, stack, line, stage, mesh) for one in trainings]
        stop = stack.enter_context(_signals())
        for run in runs:
            run.resume()
        stack.callback(line.end)
        # Those behind go on alone until they meet the next one.
        for goal in [*sorted({run.step for run in runs})[1:], steps]:
            behind = [run for run in runs if run.step < goal]
            if behind:
                loop = _Loop(update, behind, goal, config, stage, line, started, mesh)
                loop.on_save = on_save
                loop.go(stop)
        if stop:
            _stop(stop[0], runs)
        for run in runs:
            run.wait()
        seconds = time.perf_counter() - started
        return [
            (run.state, {"left": steps - run.step} | run.summary(seconds))
            for run in runs
        ]


class _Loop:
    """Trainings that are at the same step, trained to a later one."""

    def __init__(
        self,
        update: Update | Drawn,
        runs: Sequence[RunState],
        goal: int,
        config: LoopConfig,
        stage: str,
        line: Line,
        started: float,
        mesh: Mesh | None,
    ) -> None:
        self.runs, self.goal, self.config, self.line = runs, goal, config, line
        self.started, self.mesh = started, mesh
        layout = sharding.Layout(mesh, len(runs))
        self.stage = stage if len(runs) == 1 else f"{stage} x {len(runs)}"
        self.on_save: Callable[[int, Sequence[Any]], None] | None = None
        self.step = runs[0].step
        self.state = layout.put(_join([run.state for run in runs]))
        self.streams = [run.data for run in runs if isinstance(run.data, Stream)]
        own = 1 if self.streams else platform.current().steps_per_call
        self.per_call = config.steps_per_call or own
        self.update = update
        if self.streams:
            assert isinstance(update, Drawn)
            self.data, axes = _share([stream.frozen for stream in self.streams], layout)
            axes, update = (axes, 0), _streamed(update, self.streams[0])
        else:
            self.data, axes = _share([run.data for run in runs], layout)
        self.key, self.every = runs[0].key, update
        if len(runs) > 1:
            self.key = jnp.stack([run.key for run in runs])
            self.every = jax.vmap(update, (0, axes, 0), spmd_axis_name=layout.axis)
        self.key = layout.put(self.key)
        self.layout = layout
        self.one = jax.jit(_one_of, **layout.out(False))
        # Devices that a CPU is made to have wait for each other in its few threads.
        alone = mesh is None or jax.default_backend() != "cpu"
        self.in_flight = _IN_FLIGHT if alone else 0

    def go(self, stop: list[int]) -> None:
        """Run to the goal; the runs then hold the states reached."""
        with contextlib.closing(self._datas()) as datas:
            self._run(datas, stop)

    def _datas(self) -> Generator[Any, None, None]:
        """What each call of the update reads."""
        if not self.streams:
            while True:
                yield self.data
        assert isinstance(self.update, Drawn)
        keys = [run.key for run in self.runs]
        with contextlib.closing(
            streaming.batches(
                self.update, self.streams, keys, self.layout, self.step, self.goal
            )
        ) as batches:
            for batch in batches:
                yield self.data, batch

    def _run(self, datas: Iterator[Any], stop: list[int]) -> None:
        log_every, save_every = self.config.log_every, self.config.save_every
        data = next(datas)
        with sharding.using(self.mesh):
            call, zeros = _compile(
                self.every,
                self.state,
                data,
                self.key,
                looped=self.per_call > 1,
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
        shown = ended = steady[1]
        while self.step < self.goal:
            if stop or _preempted(self.step, stop):
                self._keep()
                _stop(stop[0], self.runs)
            began = time.perf_counter()
            count = min(
                self.per_call,
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
            if 0 < self.config.trial_seconds <= now - steady[1]:
                self.goal = self.step
            if self.step % log_every == 0 or self.step == self.goal:
                self._log()
                shown = now
                ended = time.perf_counter()
            elif self.line.live and now - shown > _REFRESH_SECONDS:
                self._show(self._rate(), False)
                shown = now
            if self.step % save_every == 0 or self.step == self.goal:
                self._save()
        self._keep()
        for run in self.runs:
            run.wait()
        steps, seconds = self.step - steady[0], ended - steady[1]
        for run in self.runs:
            run.timing = {
                "compile_seconds": compile_s,
                "first_step_seconds": first_s,
                "steps_per_s": steps / seconds if steps else 0.0,
            }

    def _keep(self) -> None:
        """Hand every run its own state."""
        states = self._states(copied=False)
        for run, state in zip(self.runs, states, strict=True):
            run.state, run.step = state, self.step

    def _states(self, copied: bool) -> list[Any]:
        """The state of each training, copied on request."""
        if len(self.runs) > 1:
            states = [self.one(self.state, r) for r in range(len(self.runs))]
        else:
            states = [_copy(self.state) if copied else self.state]
        return states if self.mesh is None else sharding.local(states)

    def _rate(self) -> float | None:
        """Steps per second since the last mark; None right after it."""
        steps, seconds = self.step - self.mark[0], time.perf_counter() - self.mark[1]
        return steps / seconds if steps else None

    def _log(self) -> None:
        """Average, check, write and show the metrics since the last line."""
        count = self.step - self.since
        sums = jax.device_get(self.sums)
        for r, run in enumerate(self.runs):
            run.metrics = {
                name: float(np.reshape(total, -1)[r]) / count
                for name, total in sums.items()
            }
            bad = [n for n, value in run.metrics.items() if not np.isfinite(value)]
            if bad:
                # A loss, where it is among them, rather than what follows from it.
                name = min(bad, key=lambda name: not name.startswith("loss/"))
                raise TrainingError(
                    f"{run.before}{name} is not finite between steps {self.since} "
                    f"and {self.step}; {run.last_good()}"
                )
        self.sums, self.since = self.zeros(), self.step
        rate = self._rate()
        speed = {} if rate is None else {"time/steps_per_s": rate}
        for run in self.runs:
            if run.writer is not None:
                run.writer.write(self.step, run.metrics | speed)
        self._show(rate, True)
        self.mark = (self.step, time.perf_counter())

    def _show(self, rate: float | None, final: bool) -> None:
        parts = [self.stage, f"step {self.step}/{self.goal}"]
        for name in self.runs[0].metrics:
            if name.startswith("loss/"):
                mean = np.mean([run.metrics[name] for run in self.runs])
                parts.append(f"{name} {mean:.4g}")
        if rate is not None:
            left = duration((self.goal - self.step) / rate)
            parts += [f"{rate:.1f} steps/s", f"{left} left"]
        self.line.put("  ".join(parts), final)

    def _save(self) -> None:
        if self.on_save is None and not any(run.saves for run in self.runs):
            return
        # Copies: the background write must not read buffers the next step overwrites.
        copies = self._states(copied=True)
        for run, copy in zip(self.runs, copies, strict=True):
            if not _all_finite(copy):
                raise TrainingError(
                    f"{run.before}the state is not finite at step {self.step}; "
                    f"{run.last_good()}"
                )
        if self.on_save is not None:
            self.on_save(self.step, copies)
        for run, copy in zip(self.runs, copies, strict=True):
            run.save(self.step, copy)


def _preempted(step: int, stop: list[int]) -> bool:
    """Whether any of several processes got a signal; all agree at one step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        stop.append(signal.SIGTERM)
    return bool(stop)


def _stop(signum: int, runs: Sequence[RunState]) -> None:
    """Save every training where it is, and report it.

    Raises:
      Stopped: always.
    """
    name = signal.Signals(signum).name
    bad = None
    for run in runs:
        if run.saves is not None and run.step > run.saved:
            if _all_finite(run.state):
                run.save(run.step, run.state)
            else:
                bad = bad or run
    named = bad or min(runs, key=lambda run: run.saved)
    stopped = f"{named.before}stopped by {name} at step {named.step}"
    for run in runs:
        run.wait()
    if bad:
        raise Stopped(
            f"{stopped}, where the state is not finite; {bad.last_good()}", signum
        )
    raise Stopped(
        f"{stopped}; {named.last_good()}; start again with the same workdir to go on",
        signum,
    )


def _streamed(update: Drawn, stream: Stream) -> Update:
    """The update on (frozen, batch) in place of data."""

    def on_batch(state: Any, data: Any, key: jax.Array) -> Any:
        frozen, rows = data
        return update.on_batch(state, stream.batch(rows), frozen, key)

    return on_batch


@jax.jit
def _copy(state: State) -> State:
    """Arrays of its own. An explicit dtype drops weak types, which would compile the
    step a second time."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype), state)


def _join(states: Sequence[State]) -> State:
    """The states of R trainings as one, leaves [R, ...]; of one training as it is.

    The step donates its input: copies keep the caller's arrays alive.
    """
    if any(tree.shapes(state) != tree.shapes(states[0]) for state in states):
        raise InputError("the states of the trainings differ in their shapes")
    if len(states) == 1:
        return _copy(states[0])
    return jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(x, leaves[0].dtype) for x in leaves]),
        *states,
    )


def _share(datas: Sequence[Any], layout: sharding.Layout) -> tuple[Any, Any]:
    """The data of all trainings as one tree on the device, and its vmap axes.

    An array that is the same object in every training is kept once, with axis None.
    A host array would be copied to the device at every call.
    """

    def one(*leaves: Any) -> tuple[jax.Array, int | None]:
        if all(leaf is leaves[0] for leaf in leaves):
            return layout.put(leaves[0], divided=False), None
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if len(set(shapes)) > 1:
            raise InputError(f"the data of the trainings have shapes {shapes}")
        return layout.put(jnp.stack(leaves)), 0

    columns = zip(*(jax.tree.leaves(data) for data in datas), strict=True)
    pairs = [one(*leaves) for leaves in columns]
    shape = jax.tree.structure(datas[0])
    data = jax.tree.unflatten(shape, [leaf for leaf, _ in pairs])
    return data, jax.tree.unflatten(shape, [axis for _, axis in pairs])


def _one_of(state: State, index: jax.Array) -> State:
    return jax.tree.map(lambda x: x[index], state)


def _compile(
    update: Update,
    state: Any,
    data: Any,
    key: jax.Array,
    looped: bool,
    layout: sharding.Layout,
) -> tuple[Callable[..., Any], Callable[[], dict[str, jax.Array]]]:
    """(state, sums, data, key, count) -> (state, sums, tick), and the zero sums.

    The sums ride along in the compiled step, so that averaging costs no dispatch. The
    tick is the one output that no later call donates: the loop waits on it.
    """
    update = jax.jit(update, inline=True)  # traced once for both
    _, metrics = jax.eval_shape(update, state, data, key)
    fold_in = jax.vmap(jax.random.fold_in) if key.ndim else jax.random.fold_in

    def one(carry: tuple[Any, dict], data: Any, key: jax.Array) -> tuple[Any, dict]:
        state, sums = carry
        state, metrics = update(state, data, fold_in(key, state.step))
        return state, {name: sums[name] + metrics[name] for name in sums}

    def call(
        state: Any, sums: dict, data: Any, key: jax.Array, count: jax.Array
    ) -> tuple[Any, dict, jax.Array]:
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


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGHUP and Ctrl-C in the body; a second Ctrl-C acts at once.

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

    before: dict[int, Any] = {
        s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
    }
    if (hangup := signal.getsignal(signal.SIGHUP)) is not signal.SIG_IGN:  # by nohup
        before[signal.SIGHUP] = hangup
    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
