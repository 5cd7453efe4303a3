"""The training loop: steps, metrics, progress, saves, resume."""

import collections
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.checkpoint import Checkpoints
from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.metrics import Writer
from psec_jax.run import Run

State = TypeVar("State")
Update = Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]

# Calls dispatched but not finished: enough to hide the dispatch of the next one, few
# enough that a stop is prompt and that no queue of buffers builds up.
_IN_FLIGHT = 2
_REFRESH_SECONDS = 1.0


def train(
    update: Update,
    state: State,
    data: Any,
    key: jax.Array,
    *,
    run: Run | None,
    steps: int,
    log_every: int,
    save_every: int,
    steps_per_call: int = 1,
    stage: str = "base",
    progress: bool = True,
    on_save: Callable[[int, State], None] | None = None,
) -> tuple[State, dict[str, int | float]]:
    """Update `state` until it has done `steps` steps, going on from the newest save.

    Step s uses the key fold_in(key, s), so that a resumed run draws what a run that was
    never stopped draws. Metrics are averaged over the steps since the last line.

    Args:
      update: (state, data, key) -> (state, metrics), pure; metrics are scalars by name.
      state: a pytree with `.step`, an int32 scalar; left untouched (copied).
      data: pytree of arrays, handed to the compiled step as an argument.
      key: typed key of the whole run.
      run: where metrics and saves go; None keeps nothing on disk.
      steps: total, those of the restored save included.
      log_every: steps between two lines of metrics.
      save_every: steps between two saves; the last step is always saved.
      steps_per_call: updates in one compiled loop; 1 is fastest on a CPU.
      stage: name in the progress line.
      progress: print progress to stderr.
      on_save: called with (step, state) before each save is written.

    Returns:
      The state, and a summary: "steps" done in this call, "resumed_at", "seconds",
      "compile_seconds", "first_step_seconds" (from the call to the first update done),
      "steps_per_s" (without the first call), and the last metrics by name.

    Raises:
      TrainingError: a metric is not finite; the last good save stays.
      InputError: a number below 1, a full disk, or a damaged save to resume from.
      Stopped: on SIGTERM or Ctrl-C, after saving.
    """
    for name, value in {
        "steps": steps,
        "log_every": log_every,
        "save_every": save_every,
        "steps_per_call": steps_per_call,
    }.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected 1 or more")
    with contextlib.ExitStack() as stack:
        saves = None
        if run is not None:
            stack.enter_context(run.locked())
            saves = stack.enter_context(
                contextlib.closing(Checkpoints(run.checkpoints))
            )
        stop = stack.enter_context(_signals())
        loop = _Loop(
            update, state, data, key, saves, steps, steps_per_call, stage, progress
        )
        loop.on_save = on_save
        if run is not None:
            loop.writer = stack.enter_context(_closing(Writer(run, loop.step)))
        stack.callback(loop.line.end)
        return loop.go(stop, log_every, save_every, steps_per_call)


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        update: Update,
        state: State,
        data: Any,
        key: jax.Array,
        saves: Checkpoints | None,
        steps: int,
        steps_per_call: int,
        stage: str,
        progress: bool,
    ) -> None:
        self.started = time.perf_counter()
        self.key, self.saves = key, saves
        self.steps, self.stage = steps, stage
        self.line = _Line(progress)
        self.writer: Writer | None = None
        self.on_save: Callable[[int, State], None] | None = None
        # A host array would be copied to the device at every call.
        self.data = jax.device_put(data)
        self.resumed_at = 0
        if saves is not None and saves.last is not None:
            state = saves.restore(state)
            self.resumed_at = int(state.step)
            self.line.put(f"{stage}  resumed at step {self.resumed_at}", True)
            self.line.end()
        # The step donates its input: copies keep the caller's arrays alive. An explicit
        # dtype drops weak types, which would compile the step a second time.
        self.state = jax.tree.map(lambda x: jnp.array(x, x.dtype), state)
        self.step = self.saved = int(self.state.step)
        self.call, self.zeros = _compile(
            update, self.state, self.data, key, looped=steps_per_call > 1
        )
        self.sums, self.since = self.zeros(), self.step
        self.metrics: dict[str, float] = {}

    def go(
        self, stop: list[int], log_every: int, save_every: int, steps_per_call: int
    ) -> tuple[State, dict[str, int | float]]:
        """Run to the end."""
        first, compile_s, first_s = self.step, 0.0, 0.0
        pending: collections.deque[jax.Array] = collections.deque()
        steady = self.mark = (self.step, time.perf_counter())
        shown = steady[1]
        while self.step < self.steps:
            if stop:
                self._stop(stop[0])
            began = time.perf_counter()
            count = min(
                steps_per_call,
                self.steps - self.step,
                log_every - self.step % log_every,
                save_every - self.step % save_every,
            )
            self.state, self.sums, tick = self.call(
                self.state, self.sums, self.data, self.key, count
            )
            self.step += count
            if self.step == first + count:
                compile_s = time.perf_counter() - began
                tick.block_until_ready()
                steady = self.mark = (self.step, time.perf_counter())
                first_s = steady[1] - self.started
            pending.append(tick)
            if len(pending) > _IN_FLIGHT:
                pending.popleft().block_until_ready()
            now = time.perf_counter()
            if self.step % log_every == 0 or self.step == self.steps:
                self._log()
                shown = now
            elif self.line.live and now - shown > _REFRESH_SECONDS:
                self._show(self._rate(), False)
                shown = now
            if self.step % save_every == 0 or self.step == self.steps:
                self._save()
        if stop:
            self._stop(stop[0])
        if self.saves is not None:
            self.saves.wait()
        now = time.perf_counter()
        summary = {
            "steps": self.step - first,
            "resumed_at": self.resumed_at,
            "seconds": now - self.started,
            "compile_seconds": compile_s,
            "first_step_seconds": first_s,
            "steps_per_s": (self.step - steady[0]) / (now - steady[1]),
        }
        return self.state, summary | self.metrics

    def _rate(self) -> float | None:
        """Steps per second since the last mark; None right after it."""
        steps, seconds = self.step - self.mark[0], time.perf_counter() - self.mark[1]
        return steps / seconds if steps else None

    def _log(self) -> None:
        """Average, check, write and show the metrics since the last line."""
        count = self.step - self.since
        sums = jax.device_get(self.sums)
        self.metrics = {name: float(total) / count for name, total in sums.items()}
        bad = [name for name, value in self.metrics.items() if not np.isfinite(value)]
        if bad:
            # A loss, where it is among them, rather than what follows from it.
            name = min(bad, key=lambda name: not name.startswith("loss/"))
            raise TrainingError(
                f"{name} is not finite between steps {self.since} and {self.step}; "
                f"{self._good()}"
            )
        self.sums, self.since = self.zeros(), self.step
        rate = self._rate()
        if self.writer is not None:
            speed = {} if rate is None else {"time/steps_per_s": rate}
            self.writer.write(self.step, self.metrics | speed)
        self._show(rate, True)
        self.mark = (self.step, time.perf_counter())

    def _show(self, rate: float | None, final: bool) -> None:
        parts = [self.stage, f"step {self.step}/{self.steps}"]
        for name, value in self.metrics.items():
            if name.startswith("loss/"):
                parts.append(f"{name} {value:.4g}")
        if rate is not None:
            left = _duration((self.steps - self.step) / rate)
            parts += [f"{rate:.1f} steps/s", f"{left} left"]
        self.line.put("  ".join(parts), final)

    def _save(self) -> None:
        if self.saves is None and self.on_save is None:
            return
        # Copies: the background write must not read buffers the next step overwrites.
        copy = jax.tree.map(jnp.copy, self.state)
        if not _all_finite(copy):
            raise TrainingError(
                f"the state is not finite at step {self.step}; {self._good()}"
            )
        if self.on_save is not None:
            self.on_save(self.step, copy)
        if self.saves is not None:
            self.saves.save(self.step, copy)
            self.saved = self.step

    def _stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        if self.saves is not None and self.step > self.saved:
            if not _all_finite(self.state):
                raise Stopped(
                    f"stopped by {name} at step {self.step}, where the state is not "
                    f"finite; {self._good()}",
                    signum,
                )
            self.saves.save(self.step, self.state)
        if self.saves is not None:
            self.saves.wait()
        raise Stopped(
            f"stopped by {name} at step {self.step}; {self._good()}; start again with "
            "the same workdir to go on",
            signum,
        )

    def _good(self) -> str:
        """Words for the newest complete save."""
        if self.saves is None:
            return "nothing was saved"
        self.saves.wait()
        last = self.saves.last
        return f"last good save: {'none' if last is None else f'step {last}'}"


def _compile(
    update: Update, state: State, data: Any, key: jax.Array, looped: bool
) -> tuple[Callable[..., Any], Callable[[], dict[str, jax.Array]]]:
    """(state, sums, data, key, count) -> (state, sums, tick), and the zero sums.

    The sums ride along in the compiled step, so that averaging costs no dispatch. The
    tick is the one output that no later call donates: the loop waits on it.
    """
    _, metrics = jax.eval_shape(update, state, data, key)

    def one(carry: tuple[State, dict], data: Any, key: jax.Array) -> tuple[State, dict]:
        state, sums = carry
        state, metrics = update(state, data, jax.random.fold_in(key, state.step))
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
        return {name: jnp.zeros((), jnp.float32) for name in metrics}

    return jax.jit(call, donate_argnums=(0, 1)), zeros


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
    """Collect SIGTERM and Ctrl-C while the body runs; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python delivers signals to the main thread only.
        return

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, before[signum])

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
