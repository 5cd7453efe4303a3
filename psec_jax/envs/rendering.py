"""Frames of recorded episodes, drawn by a process of its own.

MuJoCo settles how it draws once, when it is imported: a process that has trained or
evaluated has often settled on not drawing at all. A fresh one can still choose.
"""

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np

from psec_jax import envs
from psec_jax.envs.workers import Worker
from psec_jax.errors import InputError


class Renderer:
    """Plays recorded episodes again and draws them.

    Use it as a context manager, or call `close`.

    Attributes:
      spec: the environment's name.
      step_seconds: simulated time of one control step.
    """

    def __init__(self, spec: str, height: int, width: int) -> None:
        """Start the process.

        Args:
          spec: see `psec_jax.envs.make`.
          height: of the frames, pixels.
          width: of the frames, pixels.

        Raises:
          gl.CannotDraw: no OpenGL library works here.
          InputError: a spec that cannot be made.
        """
        self.spec = spec
        args = (os.environ.get("MUJOCO_GL"), spec, height, width)
        self._worker = Worker(
            "psec_jax.envs.rendering:serve", *args, name=f"drawing process ({spec})"
        )
        try:
            self.step_seconds: float = self._worker.recv()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._worker.close()

    def frames(
        self, seed: int, obs: np.ndarray, action: np.ndarray, every: int = 1
    ) -> Iterator[np.ndarray]:
        """Draw the states at steps 0, every, 2 every, ... of one episode.

        Args:
          seed: of the environment's reset.
          obs: [T, S], what was observed before each action.
          action: [T, A].
          every: steps from one frame to the next.

        Yields:
          uint8 [height, width, 3].

        Raises:
          InputError: the episode came out otherwise than recorded.
        """
        self._worker.send((seed, obs, action, every))
        for _ in range(0, len(action), every):
            yield self._worker.recv()


def serve(
    pipe: Connection, backend: str | None, spec: str, height: int, width: int
) -> None:
    """The process's job: play episodes again, and send a frame every so many steps."""
    if backend is None:
        # Nothing is shown on a screen, so one that is there, or is said to be, is
        # not needed.
        for name in ("MUJOCO_GL", "DISPLAY"):
            os.environ.pop(name, None)
    else:
        os.environ["MUJOCO_GL"] = backend
    env = envs.make(spec)
    env.reset(0)
    env.render(height, width)
    pipe.send(env.step_seconds)
    while True:
        seed, obs, action, every = pipe.recv()
        seen = env.reset(seed)
        for t in range(len(action)):
            if not np.array_equal(seen, obs[t]):
                raise InputError(
                    f"{spec}: step {t} of the episode of seed {seed} came out "
                    "otherwise when played again, so it cannot be drawn"
                )
            if t % every == 0:
                pipe.send(env.render(height, width))
            seen = env.step(action[t]).obs
