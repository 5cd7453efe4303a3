"""Child interpreters that step environments.

A worker is a fresh `python -c` process joined by a pipe: unlike a forked one it
inherits no JAX threads, and unlike a spawned one it never runs the caller's main module
again, so it works from a script, a notebook or a test alike.
"""

import os
import subprocess
import sys
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from psec_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
START = "from psec_jax.envs.workers import _child; _child()"
_in_worker = False


class WorkerDied(RuntimeError):
    """A worker's process has ended, or was ended, before its time."""


class Worker:
    """One child process running a function that answers messages.

    The function is called as `serve(connection, *args)`; it ends when the pipe closes.
    """

    def __init__(self, serve: str, *args: Any, name: str) -> None:
        """Start it.

        Args:
          serve: "package.module:function".
          args: sent to the function; plain values and arrays.
          name: how error messages call this worker.
        """
        self.name = name
        self._pipe, child = Pipe()
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
        )
        env["MUJOCO_GL"] = "disabled"  # workers never render
        # One matrix-vector product per step: threads only get in each other's way, and
        # a fixed number of them keeps the results the same on every machine size.
        env["OPENBLAS_NUM_THREADS"] = env["OMP_NUM_THREADS"] = "1"
        # MJX alone uses JAX in a worker; accelerators are the parent's.
        env["JAX_PLATFORMS"] = "cpu"
        # Large memory pages are for training; MetaDrive crashes with them.
        env.pop("GLIBC_TUNABLES", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(child.fileno())],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            env=env,
        )
        child.close()
        self.send((serve, args))

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
          WorkerDied: it has.
        """
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._death() from error

    def recv(self) -> Any:
        """Wait for one message.

        Raises:
          InputError: the worker refused its input; the message is its own.
          WorkerDied: it has.
        """
        try:
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(message, InputError):
            raise message
        return message

    def _death(self) -> WorkerDied:
        self._pipe.close()
        code = self._process.wait()
        return WorkerDied(f"{self.name} died (exit status {code})")

    def close(self) -> None:
        """Let the process end, and wait for it; safe to call twice."""
        self._pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def in_worker() -> bool:
    """Whether this process is a worker."""
    return _in_worker


def _child() -> None:
    global _in_worker
    _in_worker = True
    pipe = Connection(int(sys.argv[1]))
    try:
        try:
            serve, args = pipe.recv()
            module, function = serve.split(":")
            getattr(import_module(module), function)(pipe, *args)
        except InputError as error:
            pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has gone, or Ctrl-C went to the whole group


def default_workers(jobs: int) -> int:
    """As many processes as this process may use cores, and no more than jobs."""
    if hasattr(os, "sched_getaffinity"):  # Linux: a container may allow fewer
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(jobs, cores))
