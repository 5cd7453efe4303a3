"""One run of a sweep, in the form that submitit takes to a node."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from psec_jax.files import write_atomic

# Exit codes of a run that saved and can go on: SIGINT, SIGTERM, as shells count them.
STOPPED = (130, 143)
# A preempted job that ends by itself counts as finished: it waits to be requeued.
_GRACE_SECONDS = 900


class Job:
    """A command, started again from its last save when the scheduler requeues the job.

    Its output is appended to a log, which is locked while the command runs; its exit
    code is written beside the log.

    Args:
      command: program and arguments.
      log: file for its output.
      environment: changes of environment variables; None removes one.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str | None]
    ) -> None:
        self.command = list(command)
        self.log = log
        self.environment = dict(environment)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = self._signalled = False

    def __call__(self) -> int:
        """Run the command; returns its exit code, 128 + N for signal N."""
        signal.signal(signal.SIGTERM, self._stop)
        changed = dict(os.environ) | self.environment
        environment = {k: v for k, v in changed.items() if v is not None}
        with open(self.log, "ab") as log:
            # Waits for another process that has this run; its result is then seen.
            fcntl.flock(log, fcntl.LOCK_EX)
            exit_file(self.log).unlink(missing_ok=True)
            # SLURM warns every process of a job by SIGUSR2, which would end the command
            # unsaved; a blocked signal stays blocked in the child.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            if not self._stopping:
                self._child = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            if self._stopping:  # meanwhile
                self._terminate()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            code = self._ended()
            write_atomic(exit_file(self.log), f"{code}\n")
        if self._stopping and _on_slurm():
            time.sleep(_GRACE_SECONDS)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues the job: let the command save."""
        from submitit.helpers import DelayedSubmission

        if not self._stopping:
            self._terminate()
        self._ended()
        return DelayedSubmission(Job(self.command, self.log, self.environment))

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """On SIGTERM: pass it on, unless SLURM has sent it to the command too."""
        self._stopping = True
        if not _on_slurm():
            self._terminate()

    def _terminate(self) -> None:
        """Send SIGTERM, once: a second one would end the command while it saves."""
        if self._child is not None and not self._signalled:
            self._signalled = True
            self._child.terminate()

    def _ended(self) -> int:
        """Wait for the command, if it was started.

        By waitid, not Popen.wait: a signal's handler may wait inside of this wait.
        """
        if self._child is None:
            return 128 + signal.SIGTERM
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        code = self._child.wait()
        return code if code >= 0 else 128 - code


def exit_file(log: Path) -> Path:
    """The file of the exit code of a run with this log."""
    return log.with_suffix(".exit")


def busy(log: Path) -> bool:
    """Whether a command with this log runs on this machine."""
    if not log.exists():
        return False
    with open(log, "rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _on_slurm() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
