"""Kill stages at random moments, start them again, compare: what `make faults` runs.

    python -m experiments.tools.faults --kills=100 --seed=0
    python -m experiments.tools.faults --kills=20 --stages=expand,compose --signal=TERM

Each stage runs once unbroken. Then it runs in fresh directories, is stopped by the
signal, started again, stopped again, ..., and finally left to finish. The result must
equal that of the unbroken run: every array of library and critics bit for bit, cards,
metrics and results but for dates and timings, and no half-written file.

A process is stopped when its files say that it has reached the drawn moment: while it
starts, during steps, during a save, while an entry is being added, after that. The
table counts where the signals struck, judged by the directories afterwards. Training is
tiny, on a file made here; no simulator is needed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from absl import flags

from psec_jax.data import d4rl
from psec_jax.errors import InputError, TrainingError, lookup
from psec_jax.files import read_json
from psec_jax.library import SkillLibrary, table
from psec_jax.types import Dataset

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 12, 3
TINY = {
    "network.width": 16,
    "network.blocks": 1,
    "critics.widths": (8,),
    "gate.widths": (8,),
    # A line of metrics that a stop cut short has fewer steps to average.
    "run.log_every": 1,
    "run.save_every": SAVE_EVERY,
} | {
    f"{section}.{field}": value
    for section in ("base", "skill", "critics", "gate")
    for field, value in (("steps", STEPS), ("batch_size", 8))
}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}
# Where a signal can strike, and the share of those aimed there.
PHASES = {"starting": 0.15, "steps": 0.25, "saving": 0.3, "adding": 0.2, "ending": 0.1}
_AFTER_TRAINING = ("starting", "adding", "ending")
_STOPS_A_RUN = 9
_POLL_S, _SLOW_POLL_S, _PATIENCE_S = 1e-3, 0.02, 600.0


class Stage(NamedTuple):
    """One command of launch/.

    Attributes:
      module: of the command.
      flags: its own.
      needs: the stage whose library it goes on with.
    """

    module: str
    flags: tuple[str, ...] = ()
    needs: str | None = None


STAGES = {
    "pretrain": Stage("launch.pretrain"),
    "expand": Stage("launch.expand", ("--name=walk",), "pretrain"),
    "offline": Stage(
        "launch.expand",
        ("--objective=reward,safety", "--name=reward,safety"),
        "pretrain",
    ),
    "critics": Stage("launch.critics", (), "pretrain"),
    "compose": Stage(
        "launch.compose", ("--name=gate", "--skills=safety,reward")
    )._replace(needs="offline"),
}


class Spans(NamedTuple):
    """Seconds to the first step, of a save, of adding: of an unbroken run."""

    starting: float
    saving: float
    adding: float


class Folders(NamedTuple):
    """The directories of one run."""

    run: Path
    library: Path

    def saving(self) -> set[str]:
        """Temporary folders of saves."""
        return {name for name in _names(self.run / "checkpoints") if "-tmp" in name}

    def adding(self) -> set[str]:
        """Temporary files and folders of entries of the library, or of critics."""
        folders = (self.library, self.library / "skills", self.library / "gates")
        names = {name for folder in folders for name in _names(folder)}
        names |= {name for name in _names(self.run) if "safetensors" in name}
        return {n for n in names if n.startswith(".") and n != ".lock"}

    def saved(self) -> int:
        """Step of the newest save."""
        steps = [int(n) for n in _names(self.run / "checkpoints") if n.isdecimal()]
        return max(steps, default=0)

    def logged(self) -> int:
        """Step of the newest line of metrics."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def lives(self) -> int:
        """Processes that have trained here: each has a file of events."""
        return len(_names(self.run / "events"))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


class Harness:
    """Runs stages in a folder, whole and broken.

    Args:
      root: an empty folder.
      rng: draws the moments.
    """

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self._root, self._rng = root, rng
        self._spans: dict[str, Spans] = {}
        self._data = root / "demos.hdf5"
        d4rl.save(self._data, _demos(), {})

    def unbroken(self, name: str) -> Folders:
        """The folders of a stage that ran whole, run now if it did not yet."""
        folders = Folders(self._root / name / "run", self._root / name / "library")
        if name not in self._spans:
            self._prepare(name, folders)
            process = self._start(name, folders)
            spent: defaultdict[str, float] = defaultdict(float)
            clock = [time.monotonic()]

            def watch() -> bool:
                clock.append(time.monotonic())
                now = {"starting": not folders.logged(), "saving": folders.saving()}
                for what, busy in (now | {"adding": folders.adding()}).items():
                    spent[what] += bool(busy) * (clock[-1] - clock[-2])
                return False

            _wait(process, watch)
            self._check_code(name, process, folders, 0)
            spent["saving"] /= STEPS / SAVE_EVERY
            self._spans[name] = Spans(*(spent[what] for what in Spans._fields))
        return folders

    def broken(
        self, name: str, signals: Sequence[signal.Signals]
    ) -> tuple[Counter[str], list[str]]:
        """Run a stage in fresh folders, stopped by each signal in turn, to its end.

        Returns:
          Where the signals struck (fewer of them if it ended before the moment drawn),
          and every difference from the unbroken run.
        """
        whole = self.unbroken(name)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._root))
        folders = Folders(folder / "run", folder / "library")
        self._prepare(name, folders)
        struck: Counter[str] = Counter()
        for signum in signals:
            phase = self._strike(name, folders, signum)
            if phase is None:
                break
            struck[phase] += 1
        process = self._start(name, folders)
        _wait(process, lambda: False)
        self._check_code(name, process, folders, 0)
        return struck, differences(whole, folders)

    def _prepare(self, name: str, folders: Folders) -> None:
        folders.run.parent.mkdir(exist_ok=True)
        needs = STAGES[name].needs
        if needs is not None:
            shutil.copytree(self.unbroken(needs).library, folders.library)

    def _start(self, name: str, folders: Folders) -> subprocess.Popen[bytes]:
        stage = STAGES[name]
        command = [sys.executable, "-m", stage.module, *stage.flags]
        command += ["--config=experiments/configs/dsrl.py:quick", "--noevaluate"]
        command += [f"--config.{field}={value}" for field, value in TINY.items()]
        command += [f"--workdir={folders.run}", f"--library={folders.library}"]
        # Compiled once, a program costs the many starts no more time.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self._root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        with open(folders.run.parent / "log", "ab") as log:
            return subprocess.Popen(
                [*command, f"--data={self._data}"],
                cwd=ROOT,
                env=os.environ | cache,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _strike(
        self, name: str, folders: Folders, signum: signal.Signals
    ) -> str | None:
        """Start a stage and stop it; what it was at, or None if it ended before."""
        trained = folders.saved() == STEPS
        aims = _AFTER_TRAINING if trained else tuple(PHASES)
        shares = np.array([PHASES[aim] for aim in aims])
        aim = self._rng.choice(aims, p=shares / shares.sum())
        lives, spans = folders.lives(), self._spans[name]
        process = self._start(name, folders)
        moments: dict[str, tuple[Callable[[], bool], float]] = {
            "starting": (self._after(spans.starting), 0.0),
            "steps": (self._step_reached(folders), 0.01),
            "saving": (self._save_reached(folders), spans.saving),
            "adding": (self._added(folders, process, whole=False), spans.adding / 2),
            "ending": (self._added(folders, process, whole=True), 0.02),
        }
        reached, span = moments[aim]
        if aim != "starting":
            _wait(process, lambda: folders.lives() > lives, _SLOW_POLL_S)
        if _wait(process, reached):
            _wait(process, self._after(span))
        process.send_signal(signum)
        process.wait()
        if process.returncode == 0:
            return None
        self._check_code(name, process, folders, -signum, 128 + signum)
        if folders.saving():
            return "saving"
        if folders.adding():
            return "adding"
        if folders.saved() == STEPS and folders.lives() > lives:
            return "ending"
        return "steps" if folders.lives() > lives else "starting"

    def _step_reached(self, folders: Folders) -> Callable[[], bool]:
        step = min(folders.saved() + int(self._rng.integers(1, STEPS)), STEPS)
        return lambda: folders.logged() >= step

    def _save_reached(self, folders: Folders) -> Callable[[], bool]:
        seen: set[str] = set()
        left = max(1, (STEPS - folders.saved()) // SAVE_EVERY)
        wanted = int(self._rng.integers(1, left + 1))

        def reached() -> bool:
            seen.update(folders.saving())
            return len(seen) >= wanted

        return reached

    def _added(
        self, folders: Folders, process: subprocess.Popen[bytes], whole: bool
    ) -> Callable[[], bool]:
        seen = []

        def reached() -> bool:
            mine = [n for n in folders.adding() if n.endswith(f"-{process.pid}")]
            seen.extend(mine)
            return bool(seen) and not (whole and mine)

        return reached

    def _after(self, seconds: float) -> Callable[[], bool]:
        until = time.monotonic() + seconds * self._rng.uniform()
        return lambda: time.monotonic() >= until

    def _check_code(
        self, name: str, process: subprocess.Popen[bytes], folders: Folders, *codes: int
    ) -> None:
        if process.returncode not in codes:
            *_, last = (folders.run.parent / "log").read_text().splitlines() or [""]
            raise TrainingError(
                f"{name} in {folders.run} ended with {process.returncode}: {last}"
            )


def _wait(
    process: subprocess.Popen[bytes],
    reached: Callable[[], bool],
    poll_s: float = _POLL_S,
) -> bool:
    """Whether the condition came true; False once the process has ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while process.poll() is None:
        if reached():
            return True
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise TrainingError(f"{process.args} hung for {_PATIENCE_S:g} seconds")
        time.sleep(poll_s)
    return False


def _demos() -> Dataset:
    """Six trajectories of random numbers, with rewards and costs."""
    rng, length = np.random.default_rng(0), 20
    rows = 6 * length
    obs = rng.normal(size=(rows, 3)).astype(np.float32)
    return Dataset(
        obs=obs,
        action=rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        reward=rng.uniform(size=rows).astype(np.float32),
        cost=(rng.uniform(size=rows) < 0.2).astype(np.float32),
        next_obs=np.roll(obs, -1, 0),
        terminal=np.zeros(rows, bool),
        timeout=np.arange(rows) % length == length - 1,
    )


def differences(whole: Folders, broken: Folders) -> list[str]:
    """Files in which two finished runs of a stage differ, dates and timings aside."""
    differing = []
    for left, right in zip(whole, broken, strict=True):
        expected, got = _facts(left), _facts(right)
        differing += [
            f"{right / name}"
            for name in sorted(expected.keys() | got.keys())
            if expected.get(name) != got.get(name)
        ]
    if broken.library.exists():
        differing += SkillLibrary.open(broken.library).verify()
    return differing


def _facts(folder: Path) -> dict[str, Any]:
    """What must be equal, by file."""
    facts: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.split("/")[0] == "events" or path.name == ".lock" or path.is_dir():
            continue
        if name.startswith("checkpoints/"):  # as good as what came of them
            if not (save := name.split("/")[1]).isdecimal():
                facts[f"checkpoints/{save}"] = True
        elif path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
            facts[name] = {
                key: (str(x.dtype), x.shape, x.tobytes()) for key, x in arrays.items()
            }
        elif path.name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            facts[name] = [_steady(json.loads(line)) for line in lines]
        elif path.suffix == ".json" and path.name != "versions.json":
            facts[name] = _steady(read_json(path))
        else:
            facts[name] = True
    return facts


# Dates, timings, versions, and names of directories.
_UNSTEADY = ("created", "versions", "card_sha256", "library", "seconds", "steps_per_s")
_UNSTEADY += ("compile_seconds", "first_step_seconds", "time/steps_per_s")


def _steady(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {n: _steady(v) for n, v in value.items() if n not in _UNSTEADY}
    if "resumed_at" in kept:  # a summary: what one process did of the steps
        kept["steps"] += kept.pop("resumed_at")
    return kept


def torment(
    root: Path,
    stages: Sequence[str],
    kills: int,
    seed: int,
    signum: signal.Signals = signal.SIGKILL,
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Stop stages `kills` times in all, an equal share each.

    Returns:
      For each stage where the signals struck, with "runs" compared; all differences.
    """
    rng = np.random.default_rng(seed)
    harness = Harness(root, rng)
    counts, found = {}, []
    for i, name in enumerate(stages):
        counts[name] = count = Counter()
        share = (kills * (i + 1)) // len(stages) - (kills * i) // len(stages)
        while (left := share - sum(count[phase] for phase in PHASES)) > 0:
            stops = min(left, int(rng.integers(1, _STOPS_A_RUN + 1)))
            struck, differing = harness.broken(name, [signum] * stops)
            count.update(struck)
            count["runs"] += 1
            count["differing"] += bool(differing)
            found += differing
            how = ", ".join(struck.elements()) or "nothing"
            print(f"{name}: stopped at {how}; {differing or 'equal'}", file=sys.stderr)
    return counts, found


def as_table(counts: Mapping[str, Counter[str]]) -> str:
    """The counts as aligned text."""
    columns = [*PHASES, "runs", "differing"]
    rows = [
        [name, str(sum(count[p] for p in PHASES)), *(str(count[c]) for c in columns)]
        for name, count in counts.items()
    ]
    total = [str(sum(int(row[i]) for row in rows)) for i in range(1, len(columns) + 2)]
    return table([["stage", "stops", *columns], *rows, ["all", *total]])


def main(argv: Sequence[str]) -> None:
    """Stop, compare, print the table; exit code 1 if anything differs."""
    no_arguments(argv)
    values = {name: flag.value for name, flag in FLAGS.items()}
    for name in values["stages"]:
        lookup(STAGES, name, "stage")
    signum = lookup(SIGNALS, values["signal"], "signal")
    if values["kills"] < 1:
        raise InputError(f"--kills: got {values['kills']}, expected 1 or more")
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="psec_jax_faults_"))
    counts, found = torment(
        root, values["stages"], values["kills"], values["seed"], signum
    )
    print(as_table(counts))
    print(f"seed {values['seed']}, {time.monotonic() - began:.0f} s")
    if found:
        raise TrainingError(f"{root} differs: {', '.join(found)}")
    shutil.rmtree(root)


if __name__ == "__main__":
    from psec_jax.cli import no_arguments, run

    FLAGS = {
        "kills": flags.DEFINE_integer("kills", 100, "Stops over all stages."),
        "seed": flags.DEFINE_integer("seed", 0, "Of the moments.", 0),
        "stages": flags.DEFINE_list("stages", list(STAGES), "Which stages."),
        "signal": flags.DEFINE_string("signal", "KILL", "KILL or TERM."),
    }
    run(main)
