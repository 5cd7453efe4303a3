"""Scalars of a run: metrics.jsonl for programs, TensorBoard events for people."""

import json
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from psec_jax.errors import InputError
from psec_jax.files import reported, write_atomic
from psec_jax.run import Run


class Writer:
    """Appends named scalars ("loss/base", "grad/norm") to a run's files.

    Args:
      run: the folder.
      step: the step training goes on from; what was written after it is dropped, so
        that a resumed run's metrics are those of a run that was never stopped.
    """

    def __init__(self, run: Run, step: int = 0) -> None:
        self._path = run.metrics
        with reported(f"write {run.metrics}"):
            _drop_after(run, step)
            self._file = open(run.metrics, "a")
            self._events = SummaryWriter(str(run.events), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one line: {"step": step, name: value, ...}.

        Raises:
          InputError: the file cannot be written, as on a full disk.
        """
        line = json.dumps({"step": step, **scalars}, allow_nan=False)
        with reported(f"write {self._path}"):
            self._file.write(line + "\n")
            self._file.flush()
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        with reported(f"write {self._path}"):
            self._file.close()
            self._events.close()


def read(run: Run) -> list[dict[str, int | float]]:
    """The lines of metrics.jsonl, oldest first; [] if there are none.

    Raises:
      InputError: a line is not JSON.
    """
    with reported(f"read {run.metrics}"):
        if not run.metrics.exists():
            return []
        lines = run.metrics.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{run.metrics} holds a line that is not JSON") from error


def _drop_after(run: Run, step: int) -> None:
    if not run.metrics.exists():
        return
    kept = []
    for line in run.metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            # A process killed while writing leaves half a line, and nothing after it.
            break
        kept.append(line + "\n")
    write_atomic(run.metrics, "".join(kept))
