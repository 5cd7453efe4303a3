"""An environment that lives in a worker process of its own."""

from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.envs.base import Env, Step
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.workers import Worker

FACTS = ("obs_dim", "action_dim", "max_steps", "step_seconds", "box", "observation")


class RemoteEnv:
    """Passes every call on to the worker."""

    obs_dim: int
    action_dim: int
    max_steps: int
    step_seconds: float
    box: ActionBox
    observation: tuple[str, ...]

    def __init__(self, spec: str, serve: str, *args: Any) -> None:
        """Start the worker.

        Args:
          spec: the environment's name.
          serve: "package.module:function" that ends in `answer`.
          args: sent to the function.

        Raises:
          InputError: the worker refused.
          WorkerDied: it has.
        """
        self.spec = spec
        self._worker = Worker(serve, *args, name=f"environment process ({spec})")
        try:
            facts = self._worker.recv()
        except BaseException:
            self.close()
            raise
        for name, value in zip(FACTS, facts, strict=True):
            setattr(self, name, value)

    def _ask(self, method: str, *args: Any) -> Any:
        self._worker.send((method, args))
        return self._worker.recv()

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        return self._ask("reset", int(seed))

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`."""
        return self._ask("step", np.asarray(action))

    def render(self, height: int, width: int) -> np.ndarray:
        """See `Env.render`."""
        return self._ask("render", height, width)

    def close(self) -> None:
        """See `Env.close`."""
        self._worker.close()


def answer(pipe: Connection, env: Env) -> None:
    """The worker's side: send the facts, then answer calls until the pipe closes."""
    calls = {"reset": env.reset, "step": env.step, "render": env.render}
    pipe.send([getattr(env, name) for name in FACTS])
    while True:
        method, args = pipe.recv()
        try:
            pipe.send(calls[method](*args))
        except CannotDraw as error:
            pipe.send(error)
