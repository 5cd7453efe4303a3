"""How long a grid will take: each of its trainings and evaluations, tried briefly."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from psec_jax import tree
from psec_jax.envs import make_on_device
from psec_jax.evaluation import Act, Episodes, environments, episode_fields, evaluate
from psec_jax.policy import Policy
from psec_jax.runtime.console import duration

# What a job changes for a trial: seconds of each training.
TRIAL = {"run.trial_seconds": 1.0}
STEPS = 25  # of the episodes of a trial


class _Played(NamedTuple):
    """Episodes cut short, and seconds of whole ones, with the start of simulators."""

    episodes: Episodes
    compiling: float
    seconds: float


@dataclass
class Forecast:
    """Seconds of all that is left to do in a grid.

    Without `together` one seed is tried for all of a grid cell.

    Attributes:
      trial: directory of the runs that are tried.
      root: directory of the real ones: those finished take no time, those begun less.
      stack: closes the simulators.
      together: the seeds of a grid cell are trained as one program.
      programs: seeds of each training of the grid cell at hand.
      parts: {part: [how many, seconds]}.
    """

    trial: Path
    root: Path
    stack: contextlib.ExitStack
    together: bool = False
    programs: Sequence[Sequence[int]] = ()
    parts: dict[str, list[float]] = field(default_factory=dict)
    _counted: set[Path] = field(default_factory=set)
    _started: dict[tuple[str, int], tuple[Any, float]] = field(default_factory=dict)
    _played: dict[Any, _Played] = field(default_factory=dict)

    def of(self, cell: Any) -> Any:
        """The `grid.Cell` that is tried for one with the seeds that are missing."""
        self.programs = [cell.seeds] if self.together else [(s,) for s in cell.seeds]
        root = self.trial / cell.root.relative_to(self.root)
        job = cell.job.changed(TRIAL)
        return dataclasses.replace(cell, job=job, root=root, seeds=self.programs[0])

    def real(self, path: Path) -> Path:
        """The real directory that one of the trial stands for."""
        return self.root / path.relative_to(self.trial)

    def train(
        self,
        stage: str,
        programs: Sequence[Sequence[Path]],
        summary: Mapping[str, Any] | None,
        seconds: float,
    ) -> None:
        """Count trainings like one that was tried.

        Args:
          stage: name of the part.
          programs: directories of the real runs of each training.
          summary: of the trial; None where nothing is trained.
          seconds: of the trial, with everything around the training.
        """
        for runs in programs:
            todo = [run for run in runs if not (run / "result.json").exists()]
            if not todo or todo[0] in self._counted:
                continue
            self._counted.update(todo)
            expected = seconds
            if summary is not None:
                steps = summary["steps"] + summary["left"]
                left = steps - min(_saved(run) for run in todo)
                # A trial of a single call has no other rate than that call's.
                rate = summary["steps_per_s"] or 1 / summary["first_step_seconds"]
                expected += left / rate - summary["seconds"]
                expected += summary["first_step_seconds"]
            self.add(f"{stage}{f' x {len(runs)}' * (len(runs) > 1)}", expected)

    def play(self, act: Act, env: str, episodes: int, seed: int) -> Episodes:
        """Count an evaluation of each seed; returns its episodes, cut short."""
        return self._play("evaluation", len(self.programs), act, env, episodes, seed)

    def tune(
        self,
        policies: Mapping[str, Policy],
        env: str,
        episodes: int,
        seed: int,
        *,
        shared: bool,
    ) -> dict[str, dict[str, Any]]:
        """Count evaluations that choose fixed weights; returns what
        `multirun.roll_out` does, of episodes cut short.

        Args:
          policies: by name.
          env: see `evaluate`, as what follows.
          episodes: of each policy.
          seed: of the first.
          shared: what is chosen is for all seeds, not for one each.
        """
        times, fields = 1 if shared else len(self.programs), {}
        for name, policy in policies.items():
            played = self._play("tuning", times, policy.act, env, episodes, seed)
            fields[name] = episode_fields(played, env, seed)
        return fields

    def _play(
        self, part: str, times: int, act: Act, env: str, episodes: int, seed: int
    ) -> Episodes:
        """Of policies that can act in one call the first is tried."""
        form: Any = act
        policy = getattr(act, "__self__", None)
        if isinstance(policy, Policy):
            shapes = tree.shapes(policy.params)
            form = policy.config, str(shapes)
        key = env, episodes, form
        compiling = 0.0
        if key not in self._played:
            self._played[key] = self._try(act, env, episodes, seed)
            compiling = self._played[key].compiling
        played = self._played[key]
        for _ in range(times):
            self.add(part, compiling + played.seconds)
            compiling = 0.0
        return played.episodes

    def _try(self, act: Act, env: str, episodes: int, seed: int) -> _Played:
        """Whole episodes on the device; elsewhere the first steps of all."""

        def seconds(**options: Any) -> tuple[Episodes, float]:
            began = time.perf_counter()
            made = evaluate(act, env, episodes, seed, **options)
            return made, time.perf_counter() - began

        if make_on_device(env) is not None:
            first, (made, again) = seconds()[1], seconds()
            return _Played(made, first - again, again)
        key = env, episodes
        if key not in self._started:
            began = time.perf_counter()
            simulators = self.stack.enter_context(environments(env, episodes))
            self._started[key] = simulators, time.perf_counter() - began
        simulators, start = self._started[key]
        _, first = seconds(vector_env=simulators, max_steps=1)
        _, one = seconds(vector_env=simulators, max_steps=1)
        made, several = seconds(vector_env=simulators, max_steps=1 + STEPS)
        whole = one + (several - one) / STEPS * (simulators.max_steps - 1)
        return _Played(made, first - one, start + whole)

    def add(self, part: str, seconds: float) -> None:
        """Count seconds of a part."""
        entry = self.parts.setdefault(part, [0, 0.0])
        entry[0] += 1
        entry[1] += seconds

    def __str__(self) -> str:
        """A line for each part, and one for all."""
        lines = [
            f"{part:<12} {count:>4}  {duration(seconds):>8}"
            for part, (count, seconds) in self.parts.items()
        ]
        total = sum((seconds for _, seconds in self.parts.values()), 0.0)
        return "\n".join([*lines, f"{'all':<12} {'':>4}  {duration(total):>8}"])


def _saved(run: Path) -> int:
    """The step of a run's newest save; 0 without one."""
    saves = run.glob("checkpoints/[0-9]*")
    return max((int(save.name) for save in saves if save.name.isdigit()), default=0)
