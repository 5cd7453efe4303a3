"""Many environments stepped at once by several processes."""

from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np

from psec_jax import envs
from psec_jax.envs.base import Step
from psec_jax.envs.workers import Worker, default_workers
from psec_jax.errors import InputError


class VectorEnv:
    """B environments of one kind, each stepped by one of several worker processes.

    Environments do not reset themselves: the caller chooses which to reset and which
    to step. Use it as a context manager, or call `close`.

    Attributes:
      spec: the environments' name.
      num_envs: B.
      obs_dim: S.
      action_dim: A.
      max_steps: steps after which an episode is cut.
    """

    def __init__(self, spec: str, num_envs: int, workers: int | None = None) -> None:
        """Start the workers.

        Args:
          spec: see `psec_jax.envs.make`.
          num_envs: B.
          workers: processes, at most one for each environment; by default one for
            every core.

        Raises:
          InputError: a spec that cannot be made, or numbers below 1.
        """
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}, expected 1 or more")
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}, expected 1 or more")
        count = min(workers or default_workers(num_envs), num_envs)
        self.spec, self.num_envs = spec, num_envs
        self._workers: list[Worker] = []
        try:
            for i in range(count):
                share = len(range(i, num_envs, count))
                name = f"environment worker {i + 1} of {count} ({spec})"
                target = "psec_jax.envs.vector:serve"
                self._workers.append(Worker(target, spec, share, name=name))
            sizes = [worker.recv() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.obs_dim, self.action_dim, self.max_steps = sizes[0]

    def __enter__(self) -> "VectorEnv":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; safe to call twice."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def reset(
        self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Start the episodes of `seeds` in the environments `indices`.

        Returns:
          Observations [n, S] in the order of `indices`.

        Raises:
          RuntimeError: a worker has died.
        """
        seeds = np.asarray(seeds, dtype=np.int64)
        obs = np.empty((len(indices), self.obs_dim), np.float32)
        for rows, answer in self._ask("reset", indices, seeds):
            obs[rows] = answer
        return obs

    def step(self, indices: Sequence[int] | np.ndarray, actions: np.ndarray) -> Step:
        """Step the environments `indices` with actions [n, A] in [-1, 1].

        Returns:
          A `Step` of arrays: obs [n, S], the others [n], in the order of `indices`.

        Raises:
          RuntimeError: a worker has died.
        """
        actions = np.asarray(actions, dtype=np.float32)
        n = len(indices)
        if actions.shape != (n, self.action_dim):
            raise ValueError(
                f"actions have shape {actions.shape}, expected {(n, self.action_dim)}"
            )
        result = Step(
            np.empty((n, self.obs_dim), np.float32),
            np.empty(n),
            np.empty(n),
            np.empty(n, bool),
            np.empty(n, bool),
        )
        for rows, answer in self._ask("step", indices, actions):
            for target, values in zip(result, answer, strict=True):
                target[rows] = values
        return result

    def _ask(
        self, command: str, indices: Sequence[int] | np.ndarray, values: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray | Step]]:
        """Send every worker its share, then gather the answers with their rows."""
        if not self._workers:
            raise RuntimeError(f"the environments of {self.spec} are closed")
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_envs:
            raise IndexError(f"indices {indices}, expected 0 to {self.num_envs - 1}")
        count = len(self._workers)
        asked = []
        for i, worker in enumerate(self._workers):
            rows = np.flatnonzero(indices % count == i)
            if len(rows):
                worker.send((command, indices[rows] // count, values[rows]))
                asked.append((rows, worker))
        return [(rows, worker.recv()) for rows, worker in asked]


def serve(pipe: Connection, spec: str, share: int) -> None:
    """A worker's job: hold `share` environments and answer reset and step messages."""
    members = [envs.make(spec) for _ in range(share)]
    pipe.send((members[0].obs_dim, members[0].action_dim, members[0].max_steps))
    while True:
        command, indices, values = pipe.recv()
        chosen = [members[i] for i in indices]
        if command == "reset":
            pairs = zip(chosen, values, strict=True)
            pipe.send(np.stack([env.reset(int(seed)) for env, seed in pairs]))
        else:
            pairs = zip(chosen, values, strict=True)
            steps = zip(*[env.step(action) for env, action in pairs], strict=True)
            pipe.send(Step(*map(np.asarray, steps)))
