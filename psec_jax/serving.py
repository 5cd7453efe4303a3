"""A composed policy behind a websocket: one connection is one robot.

Messages are msgpack. An array is {"dtype": "float32", "shape": [3], "data": bytes} in C
order, little endian; nothing else than maps, lists, numbers, texts and bytes is read.

    server, at once     what the policy is, as `policy.describe` has it
    robot {"obs": [S]}  server {"action": [A] or [h, A], "step": n}, its n-th action
    robot {"seed": s}   server {"seed": s}: the connection's noise starts anew
    anything else       server {"error": one line}; the connection goes on

Action n of a connection has the key fold_in(key(s), n), s = 0 at first, so that it
depends on the connection's own messages alone. Actions are in the units of the
environment, or in [-1, 1] where the base does not know them. GET /health says what is
served.
"""

import asyncio
import dataclasses
import hmac
import ipaddress
import json
import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import jax
import msgpack
import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from psec_jax.errors import InputError, Stopped
from psec_jax.policy import Policy

DTYPES = ("float32", "float64", "int32", "int64")
MAX_BYTES = 2**20  # of a message
MAX_DIMS = 4  # of an array
MIN_TOKEN = 16  # characters
# What is no websocket is refused, and no news.
_LOGGER = logging.getLogger(__name__)
_LOGGER.addFilter(lambda record: record.getMessage() != "opening handshake failed")


def encode(array: Any) -> dict[str, Any]:
    """An array as messages hold it.

    Raises:
      InputError: a type that is not one of `DTYPES`.
    """
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise InputError(f"array: type {array.dtype}, expected {', '.join(DTYPES)}")
    data = array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def decode(value: Any, name: str) -> np.ndarray:
    """The array that a message holds.

    Args:
      value: of the message.
      name: of the field, for messages.

    Raises:
      InputError: no array, a type that is not one of `DTYPES`, more than `MAX_DIMS`
        dimensions, or another number of bytes than they stand for.
    """
    form = f"{name}: expected an array, {{dtype, shape, data}}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data"}:
        raise InputError(f"{form}, got {_brief(value)}")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if dtype not in DTYPES:
        raise InputError(f"{form} of {', '.join(DTYPES)}, got {_brief(dtype)}")
    whole = isinstance(shape, list) and len(shape) <= MAX_DIMS
    if not whole or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in shape):
        raise InputError(
            f"{form} of at most {MAX_DIMS} dimensions, got shape {_brief(shape)}"
        )
    kind, size = np.dtype(dtype).newbyteorder("<"), 1
    for n in shape:
        size *= n
    if not isinstance(data, bytes) or len(data) != size * kind.itemsize:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else _brief(data)
        raise InputError(f"{form} of {size * kind.itemsize} bytes, got {got}")
    return np.frombuffer(data, kind).reshape(shape)


def pack(value: dict[str, Any]) -> bytes:
    """The message of a map."""
    content = msgpack.packb(value)
    assert content is not None  # it is only for streams
    return content


def read(message: str | bytes) -> dict[str, Any]:
    """The map that a message is.

    Raises:
      InputError: anything else.
    """
    if isinstance(message, str):
        raise InputError("message: got text, expected msgpack")
    try:
        value = msgpack.unpackb(message, ext_hook=_no_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise InputError(
            f"message: not msgpack ({error or 'it ends early'})"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"message: got {_brief(value)}, expected a map")
    return value


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"an extension of type {code}")


def _brief(value: Any) -> str:
    kind = type(value).__name__
    return repr(value) if kind in ("int", "float") else f"a {kind}"


def check_address(host: str, token: str | None) -> None:
    """Refuse a host that other machines may reach, without a token.

    Raises:
      InputError: no token there, or one that is too short or has odd characters.
    """
    if token is not None:
        if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()):
            raise InputError(
                f"token: expected {MIN_TOKEN} or more printable ASCII characters, got "
                f"{len(token)} characters"
            )
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise InputError(
            f"host: {host} may be reached from other machines, which needs a token; "
            "127.0.0.1 needs none"
        )


@dataclasses.dataclass
class _Waiting:
    """An observation whose action is awaited."""

    key: np.ndarray
    obs: np.ndarray
    action: asyncio.Future

    def end(self, result: np.ndarray | BaseException) -> None:
        """Hand the action or the error over, unless the connection has gone."""
        if self.action.done():
            return
        if isinstance(result, BaseException):
            self.action.set_exception(result)
        else:
            self.action.set_result(result)


class Acting:
    """Acts for all connections, one call of the policy at a time.

    Args:
      policy: the policy.
      batch: how many waiting observations are acted on in one call. With 1 an action
        is the same bit for bit whatever other connections do; with more it may differ
        by the rounding of batched products.
    """

    def __init__(self, policy: Policy, batch: int = 1) -> None:
        self.policy, self.batch = policy, batch
        self.queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1)

    def warm(self) -> None:
        """Compile everything that `run` may call."""
        obs = np.asarray(self.policy.params.normaliser.mean, np.float32)
        key, count = _key(0, 0), 1
        while count < 2 * self.batch:
            size = min(count, self.batch)
            self._act(np.stack([key] * size), np.stack([obs] * size))
            count *= 2

    def _act(self, keys: np.ndarray, obs: np.ndarray) -> np.ndarray:
        if len(obs) == 1:
            action = np.asarray(self.policy.act(keys[0], obs[0]))[None]
        else:
            action = np.asarray(self.policy.act(keys, obs))
        if self.policy.box is not None:
            action = self.policy.to_env(action).astype(np.float32)
        return action

    async def act(self, key: np.ndarray, obs: np.ndarray) -> np.ndarray:
        """The action of one observation, which `Policy.observations` has checked.

        Raises:
          InputError: an observation that is too large for the policy.
        """
        waiting = _Waiting(key, obs, asyncio.get_running_loop().create_future())
        self.queue.put_nowait(waiting)
        return await waiting.action

    async def run(self) -> None:
        """Act on what waits, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            rows = [await self.queue.get()]
            while len(rows) < self.batch and not self.queue.empty():
                rows.append(self.queue.get_nowait())
            groups = [rows]
            while groups:
                group = groups.pop()
                keys = np.stack([row.key for row in group])
                obs = np.stack([row.obs for row in group])
                call = loop.run_in_executor(self.thread, self._act, keys, obs)
                (result,) = await asyncio.gather(call, return_exceptions=True)
                if isinstance(result, InputError) and len(group) > 1:
                    groups += [[row] for row in group]  # it is about one of them
                elif isinstance(result, BaseException):
                    for row in group:
                        row.end(result)
                else:
                    for row, action in zip(group, result, strict=True):
                        row.end(action)


@jax.jit
def _fold(seed: Any, step: Any) -> Any:
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), step))


def _key(seed: int, step: int) -> np.ndarray:
    """The key of an action, fold_in(key(seed), step), as [2] numbers."""
    return np.asarray(_fold(np.uint32(seed), np.uint32(step % 2**32)))


class Connection:
    """One robot: its own noise, and answers to its messages."""

    def __init__(self, acting: Acting) -> None:
        self.acting = acting
        self.seed, self.step = 0, 0

    async def answer(self, message: str | bytes) -> dict[str, Any]:
        """The reply to a message; bad ones are replied to with an error."""
        try:
            value = read(message)
            if value.keys() == {"obs"}:
                return await self._action(decode(value["obs"], "obs"))
            if value.keys() == {"seed"}:
                return self._seeded(value["seed"])
            names = ", ".join(sorted(map(str, value))) or "nothing"
            raise InputError(f"message: got {names:.80}, expected obs or seed")
        except InputError as error:
            return {"error": " ".join(str(error).split())}

    async def _action(self, obs: np.ndarray) -> dict[str, Any]:
        if obs.ndim != 1:
            raise InputError(
                f"obs: got {obs.ndim} dimensions, expected one observation"
            )
        obs = self.acting.policy.observations(obs)
        step = self.step
        action = await self.acting.act(_key(self.seed, step), obs)
        self.step += 1  # a refused observation uses no noise
        return {"action": encode(action), "step": step}

    def _seeded(self, seed: Any) -> dict[str, Any]:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise InputError(
                f"seed: got {_brief(seed)}, expected a number from 0 to {2**32 - 1}"
            )
        self.seed, self.step = seed, 0
        return {"seed": seed}


async def run(
    policy: Policy,
    about: dict[str, Any],
    host: str,
    port: int,
    token: str | None = None,
    batch: int = 1,
    started: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until a signal.

    Args:
      policy: what acts.
      about: what is said of it, to every connection and at /health.
      host: address to listen at.
      port: 0 takes a free one.
      token: that a connection has to show, as "Authorization: Bearer TOKEN".
      batch: see `Acting`.
      started: called with the listening server.

    Raises:
      InputError: a host that needs a token, or one that cannot be listened at.
      Stopped: by SIGTERM, SIGINT or SIGHUP.
    """
    check_address(host, token)
    acting = Acting(policy, batch)
    acting.warm()

    async def talk(connection: ServerConnection) -> None:
        robot = Connection(acting)
        try:
            await connection.send(pack(about))
            async for message in connection:
                await connection.send(pack(await robot.answer(message)))
        except ConnectionClosed:
            return  # in the middle of something; nobody else is concerned

    def receive(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/health":
            return connection.respond(HTTPStatus.OK, json.dumps(about) + "\n")
        if request.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "expected / or /health\n")
        if token is not None and not _same(request, token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "expected the token\n")
        return None

    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()
    try:
        server = await serve(
            talk,
            host,
            port,
            process_request=receive,
            origins=[None],  # no page of a browser that happens to run here
            max_size=MAX_BYTES,
            compression=None,
            logger=_LOGGER,
        )
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port}: {error.strerror or error}"
        ) from error
    working = asyncio.ensure_future(acting.run())
    async with server:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signum, _set, stopped, signum)
        started(server)
        await stopped
    working.cancel()  # not before: a connection that is being closed may wait for it
    name = signal.Signals(stopped.result()).name
    raise Stopped(f"stopped by {name}; every connection was closed", stopped.result())


def _set(stopped: asyncio.Future, signum: int) -> None:
    if not stopped.done():
        stopped.set_result(signum)


def _same(request: Request, token: str) -> bool:
    """Whether the request shows the token; how long this takes says nothing of it."""
    shown = request.headers.get_all("Authorization")
    expected = f"Bearer {token}".encode()
    return len(shown) == 1 and hmac.compare_digest(
        shown[0].encode(errors="surrogateescape"), expected
    )


def addresses(server: Server) -> Iterator[str]:
    """Where it listens, "ws://HOST:PORT" each."""
    for socket in server.sockets:
        host, port = socket.getsockname()[:2]
        yield f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
