"""Several processes of one program, each of which runs the whole command.

The first one writes what is not a save: config, metrics, library.
"""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterable, Iterator

import jax
from orbax.checkpoint import multihost

from psec_jax.errors import InputError

_DAY = 86400
_HELLO, _WELCOME = "psec_jax", "all are here"
_MEETINGS = itertools.count()
_LEAVING = 10  # seconds that processes which fail alike may lie apart


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the processes of one program, before anything runs on a device.

    Args:
      coordinator: HOST:PORT where the first process listens; None for this and the
        next two asks the cluster that JAX finds itself in (TPU pods, SLURM).
      processes: their number.
      process: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      InputError: numbers that do not fit, no cluster, or processes that were told
        something else or did not come in time.
    """
    given = (coordinator, processes, process)
    if given != (None, None, None):
        if coordinator is None or processes is None or process is None:
            raise InputError(
                "coordinator, processes, process: not all were given; they go together"
            )
        host, _, port = coordinator.rpartition(":")
        number = int(port) if port.isascii() and port.isdecimal() else 0
        if not host or not 0 < number < 2**16:
            raise InputError(f"coordinator: got {coordinator!r}, expected HOST:PORT")
        if processes < 1:
            raise InputError(f"processes: got {processes}, expected 1 or more")
        if not 0 <= process < processes:
            raise InputError(
                f"process: got {process}, expected 0 to {processes - 1}, the last of "
                f"{processes} processes"
            )
        # JAX ends a process that waited in vain, with a stack and without a reason.
        meeting = _gather if process == 0 else _join
        meeting(host, number, processes, process, time.monotonic() + timeout)
    try:
        jax.distributed.initialize(
            *given, initialization_timeout=timeout, shutdown_timeout_seconds=_DAY
        )
    except (RuntimeError, ValueError) as error:
        what = "the processes did not come together"
        if coordinator is None:
            what = "no cluster was found; give coordinator, processes and process"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what} ({reason})") from error


def _gather(
    host: str, port: int, processes: int, process: int, deadline: float
) -> None:
    """Listen until every other process has called, and let them go on together."""
    here = f"coordinator {host}:{port}"
    callers: dict[str, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise InputError(f"{here}: cannot listen there: {error}") from error
        while len(callers) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(10)
                hello, count, index = caller.recv(64).decode().split()
            except (OSError, ValueError) as error:
                if time.monotonic() < deadline:
                    continue
                raise InputError(
                    f"{here}: {len(callers) + 1} of {processes} processes came in time"
                ) from error
            if hello != _HELLO:
                continue
            problem = None
            if count != str(processes):
                problem = f"processes: one was told {count}, the first {processes}"
            elif index in callers:
                problem = f"process: two were told {index}"
            if problem:
                _tell((caller, *callers.values()), problem)
                raise InputError(problem)
            callers[index] = caller
        _tell(callers.values(), _WELCOME)


def _tell(callers: Iterable[socket.socket], text: str) -> None:
    for caller in callers:
        with contextlib.suppress(OSError):  # one that has gone is missed later
            caller.sendall(text.encode())


def _join(host: str, port: int, processes: int, process: int, deadline: float) -> None:
    """Call the first process until it answers that all have called."""
    here = f"coordinator {host}:{port}"
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as call:
                call.sendall(f"{_HELLO} {processes} {process}".encode())
                call.settimeout(max(deadline - time.monotonic(), 0.01))
                answer = call.recv(256).decode()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(f"{here}: cannot be reached: {error}") from error
            time.sleep(0.2)
    if answer != _WELCOME:
        raise InputError(f"{here}: {answer or 'the first process gave up waiting'}")


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs the body before the others do, or fails in it as they
    will."""
    if not first():
        meet()
    try:
        yield
    finally:
        if first():
            meet()
        meet()


def meet() -> None:
    """Wait until every process is here.

    Not by a collective: on CPUs those give up after 30 seconds.
    """
    if jax.process_count() > 1:
        client = multihost.get_jax_distributed_client()
        client.wait_at_barrier(f"psec_jax/{next(_MEETINGS)}", 1000 * _DAY)


def all_leave() -> bool:
    """Whether all processes come here within seconds; one alone is all."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return True
    client = multihost.get_jax_distributed_client()
    try:
        client.wait_at_barrier("psec_jax/leave", 1000 * _LEAVING)
    except RuntimeError:  # the barrier's time is over, or another process is dead
        return False
    return True
