"""Several trainings of one program: where each stands, and what it keeps on disk."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from psec_jax.errors import InputError
from psec_jax.runtime import processes, sharding
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.console import Line
from psec_jax.runtime.metrics import Writer, newest
from psec_jax.runtime.run import Run


class Training(NamedTuple):
    """One of several trainings that are one program.

    Attributes:
      state: a pytree with `.step`, an int32 scalar; left untouched (copied).
      data: `batches.Data`, or a `Stream` of which each step gets its batch. Arrays that
        are one object in every training are on the device once; the others need the
        same shape in every training.
      key: typed key of the whole training.
      run: directory of its metrics and saves; None keeps nothing on disk.
      name: put before messages, such as "seed 3".
    """

    state: Any
    data: Any
    key: jax.Array
    run: Run | None = None
    name: str = ""


class RunState:
    """How far one training is, and its open files.

    Attributes:
      state: the newest state that the loop has handed back.
      step: of that state.
      saved: the step of the newest save.
      metrics: averages of the newest line.
      timing: seconds and rates of the program; see `loop.train`.
    """

    def __init__(
        self,
        training: Training,
        stack: contextlib.ExitStack,
        line: Line,
        stage: str,
        mesh: jax.sharding.Mesh | None,
    ) -> None:
        self.state, self.data, self.key = training.state, training.data, training.key
        self.run, self.name = training.run, training.name
        self.saves: Checkpoints | None = None
        self.writer: Writer | None = None
        self.step = self.resumed_at = self.saved = 0
        self.timing: dict[str, float] = {
            "compile_seconds": 0.0,
            "first_step_seconds": 0.0,
            "steps_per_s": 0.0,
        }
        self.metrics: dict[str, int | float] = {}
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
        """What a message about this training begins with."""
        return f"{self.name}: " if self.name else ""

    def resume(self) -> None:
        """Restore the newest save, and drop the metrics of later steps."""
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
            # The summary of a training that has nothing left to do.
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

    def last_good(self) -> str:
        """Words for the newest complete save."""
        if self.saves is None:
            return "nothing was saved"
        self.saves.wait()
        last = self.saves.last
        return f"last good save: {'none' if last is None else f'step {last}'}"

    def summary(self, seconds: float) -> dict[str, int | float]:
        """Of a finished training; see `loop.train`."""
        done = {"steps": self.step - self._first, "resumed_at": self.resumed_at}
        return done | {"seconds": seconds} | self.timing | self.metrics


@contextlib.contextmanager
def _closing(writer: Writer) -> Iterator[Writer]:
    """Close at the end; after an error, that error is the one to report."""
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(InputError):
            writer.close()
        raise
    writer.close()
