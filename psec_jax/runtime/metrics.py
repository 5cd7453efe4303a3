"""Scalars of a run: metrics.jsonl for programs, TensorBoard events for people."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from psec_jax.errors import InputError
from psec_jax.files import (
    opener,
    parse_json,
    read_bytes,
    reported,
    write_atomic,
)
from psec_jax.runtime.run import Run

# Protobuf makes these classes at run time.
Event, SessionLog = (vars(event_pb2)[name] for name in ("Event", "SessionLog"))
Summary = vars(summary_pb2)["Summary"]


class Writer:
    """Appends named scalars ("loss/base", "grad/norm") to a run's files.

    Both files are written at once and in this thread: tensorboardX's own SummaryWriter
    hands events to a thread that a full disk kills, and then blocks for ever.

    Args:
      run: the folder.
      step: the step training goes on from; what was written after it is dropped, so
        that a resumed run's metrics are those of a run that was never stopped.
    """

    def __init__(self, run: Run, step: int = 0) -> None:
        self._folder = run.workdir
        with reported(f"write metrics in {run.workdir}"):
            _drop_after(run, step)
            run.events.mkdir(exist_ok=True)
            # TensorBoard reads files in the order of their names; clocks may go back.
            name = f"events.out.tfevents.{time.time_ns() // 10**6}.{os.getpid()}"
            before = max((path.name for path in run.events.iterdir()), default="")
            name = max(name, f"{before}.1")
            self._file = open(run.metrics, "a", opener=opener)
            self._events = RecordWriter(str(run.events / name))
            self._event(0, file_version="brain.Event:2")
            # TensorBoard then hides later points of the run that was stopped.
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Write one line: {"step": step, name: value, ...}.

        Raises:
          InputError: the file cannot be written, as on a full disk.
        """
        line = json.dumps({"step": step, **scalars}, allow_nan=False)
        values = [Summary.Value(tag=n, simple_value=v) for n, v in scalars.items()]
        with reported(f"write metrics in {self._folder}"):
            self._file.write(line + "\n")
            self._file.flush()
            self._event(step, summary=Summary(value=values))
            self._events.flush()

    def close(self) -> None:
        """Close both files."""
        with reported(f"write metrics in {self._folder}"):
            try:
                self._file.close()
            finally:
                self._events.close()

    def _event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())


def newest(run: Run) -> dict[str, int | float]:
    """The scalars of the newest line, without its step and timings; {} if none."""
    line = (read(run) or [{}])[-1]
    return {n: v for n, v in line.items() if n != "step" and n[:5] != "time/"}


def read(run: Run) -> list[dict[str, int | float]]:
    """The lines of metrics.jsonl, oldest first; [] if there are none.

    Raises:
      InputError: a line is not an object of numbers with a step.
    """
    if not os.path.lexists(run.metrics):
        return []
    rows = []
    for number, line in enumerate(read_bytes(run.metrics).splitlines(), 1):
        row = parse_json(line, f"{run.metrics}: line {number}")
        if "step" not in row or not all(type(x) in (int, float) for x in row.values()):
            raise InputError(f"{run.metrics}: line {number} is no line of metrics")
        rows.append(row)
    return rows


def _drop_after(run: Run, step: int) -> None:
    if not run.metrics.exists():
        return
    lines = read_bytes(run.metrics).splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            # A process killed while writing leaves half a line at the end.
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputError(
                f"{run.metrics}: line {number} is damaged; remove it to go on"
            ) from error
        kept.append(line.rstrip() + b"\n")
    write_atomic(run.metrics, b"".join(kept))
