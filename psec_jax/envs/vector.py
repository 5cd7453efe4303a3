"""Many environments stepped at once by several processes."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from psec_jax import envs
from psec_jax.envs.base import Step
from psec_jax.envs.workers import Worker, WorkerDied, default_workers
from psec_jax.errors import InputError

RESTARTS = 3  # of one worker, in the life of a `VectorEnv`


@dataclass
class Playing:
    """An unfinished episode, as far as it has come.

    Attributes:
      seed: of its reset.
      actions: [A] each, those taken.
      obs: [S], the last one seen.
    """

    seed: int
    actions: list[np.ndarray]
    obs: np.ndarray


@dataclass
class _Message:
    """A message to a worker, and its answer once it is there.

    Attributes:
      worker: its number.
      rows: of the call's arguments.
      content: command, the worker's own environments, values.
      answer: observations or a `Step`.
    """

    worker: int
    rows: np.ndarray
    content: tuple[str, np.ndarray, np.ndarray]
    answer: np.ndarray | Step | None = None


class VectorEnv:
    """B environments of one kind, each stepped by one of several worker processes.

    Environments do not reset themselves: the caller chooses which to reset and which
    to step. Use it as a context manager, or call `close`.

    A worker that dies is reported in one line on standard error and replaced, and its
    unfinished episodes are played again from their start with the actions they had, so
    that the caller sees no difference. A worker that dies too often is an error.

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
            every core. Where a process can hold one environment only, there is one
            process for each whatever is requested.

        Raises:
          InputError: a spec that cannot be made, or numbers below 1.
        """
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}, expected 1 or more")
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}, expected 1 or more")
        count = min(workers or default_workers(num_envs), num_envs)
        if envs.one_per_process(spec):
            count = num_envs
        self.spec, self.num_envs = spec, num_envs
        self._playing: list[Playing | None] = [None] * num_envs
        self._restarts = [0] * count
        self._waiting: list[deque[_Message]] = [deque() for _ in range(count)]
        self._workers: list[Worker] = []
        try:
            for i in range(count):
                self._workers.append(self._start(i))
            sizes = [worker.recv() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.obs_dim, self.action_dim, self.max_steps = sizes[0]

    def _start(self, i: int) -> Worker:
        count = len(self._restarts)
        share = len(range(i, self.num_envs, count))
        name = f"environment worker {i + 1} of {count} ({self.spec})"
        return Worker("psec_jax.envs.vector:serve", self.spec, share, name=name)

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
          RuntimeError: a worker has died too often.
        """
        seeds = np.asarray(seeds, dtype=np.int64)
        obs = np.empty((len(indices), self.obs_dim), np.float32)
        for sent in self._send("reset", indices, seeds):
            obs[sent.rows] = self._answer(sent)
        return obs

    def step(self, indices: Sequence[int] | np.ndarray, actions: np.ndarray) -> Step:
        """Step the environments `indices` with actions [n, A] in [-1, 1].

        Returns:
          A `Step` of arrays: obs [n, S], the others [n], in the order of `indices`.

        Raises:
          RuntimeError: a worker has died too often.
        """
        return self.start_step(indices, actions)()

    def start_step(
        self, indices: Sequence[int] | np.ndarray, actions: np.ndarray
    ) -> Callable[[], Step]:
        """Begin to `step`; the function returned waits for the result.

        Until then other environments may be stepped and reset.
        """
        actions = np.asarray(actions, dtype=np.float32)
        n = len(indices)
        if actions.shape != (n, self.action_dim):
            raise ValueError(
                f"actions have shape {actions.shape}, expected {(n, self.action_dim)}"
            )
        every = self._send("step", indices, actions)

        def result() -> Step:
            made = Step(
                np.empty((n, self.obs_dim), np.float32),
                np.empty(n),
                np.empty(n),
                np.empty(n, bool),
                np.empty(n, bool),
                np.empty(n),
            )
            for sent in every:
                for target, values in zip(made, self._answer(sent), strict=True):
                    target[sent.rows] = values
            return made

        return result

    def _send(
        self, command: str, indices: Sequence[int] | np.ndarray, values: np.ndarray
    ) -> list["_Message"]:
        """Send every worker its share."""
        if not self._workers:
            raise RuntimeError(f"the environments of {self.spec} are closed")
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_envs:
            raise IndexError(f"indices {indices}, expected 0 to {self.num_envs - 1}")
        count = len(self._workers)
        every = []
        for i, worker in enumerate(self._workers):
            rows = np.flatnonzero(indices % count == i)
            if len(rows):
                message = (command, indices[rows] // count, values[rows])
                every.append(_Message(i, rows, message))
                self._waiting[i].append(every[-1])
                with contextlib.suppress(WorkerDied):  # noticed when it should answer
                    worker.send(message)
        return every

    def _answer(self, sent: "_Message") -> np.ndarray | Step:
        """The answer to a message; a worker answers in the order of its messages."""
        waiting = self._waiting[sent.worker]
        while sent.answer is None:
            answer = self._receive(sent.worker)
            first = waiting.popleft()
            first.answer = answer
            self._note(first)
        return sent.answer

    def _receive(self, i: int) -> np.ndarray | Step:
        """Worker i's next answer, from a new worker if need be."""
        replaced = False
        while True:
            try:
                if replaced:
                    self._play_again(i)
                    for sent in self._waiting[i]:
                        self._workers[i].send(sent.content)
                return self._workers[i].recv()
            except WorkerDied as error:
                if self._restarts[i] == RESTARTS:
                    raise
                self._restarts[i] += 1
                print(
                    f"{error}; its unfinished episodes are played again (restart "
                    f"{self._restarts[i]} of at most {RESTARTS})",
                    file=sys.stderr,
                )
                self._workers[i] = self._start(i)
                replaced = True

    def _note(self, sent: "_Message") -> None:
        """Keep what is needed to play the episodes again."""
        command, own, values = sent.content
        indices, answer = own * len(self._workers) + sent.worker, sent.answer
        if isinstance(answer, Step):
            ended = answer.terminal | answer.timeout
            for row, index in enumerate(indices):
                episode = self._playing[index]
                if ended[row] or episode is None:
                    self._playing[index] = None
                else:
                    episode.actions.append(values[row])
                    episode.obs = answer.obs[row]
        else:
            assert command == "reset" and answer is not None
            for index, seed, seen in zip(indices, values, answer, strict=True):
                self._playing[index] = Playing(int(seed), [], seen)

    def _play_again(self, i: int) -> None:
        """Bring a new worker's environments to where the old one's were."""
        worker = self._workers[i]
        worker.recv()  # the sizes, which are known
        for member, episode in enumerate(self._playing[i :: len(self._workers)]):
            if episode is None:
                continue
            worker.send(("reset", [member], [episode.seed]))
            obs = worker.recv()
            for action in episode.actions:
                worker.send(("step", [member], [action]))
                obs = worker.recv().obs
            if not np.array_equal(obs[0], episode.obs):
                raise RuntimeError(
                    f"{self.spec}: after the death of a worker the episode of seed "
                    f"{episode.seed} came out otherwise when played again"
                )


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
