"""The folder of one training run: config, versions, metrics, saves, result."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import psec_jax
from psec_jax.errors import InputError
from psec_jax.files import opener, read_json, recover, reported, write_json

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "dm_control",
    "mujoco",
    "mujoco-mjx",
    "gymnasium",
    "bullet-safety-gym",
    "pybullet",
    "metadrive-simulator",
    "metaworld",
    "ogbench",
    "panda3d",
)
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Run:
    """Paths of one run; made by `open_run`.

    Attributes:
      workdir: the folder.
      stage: "base", "skill", "gate", ...
      config: resolved, as JSON holds it (lists for tuples).
    """

    workdir: Path
    stage: str
    config: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Training states, one folder a step."""
        return self.workdir / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.workdir / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """TensorBoard event files."""
        return self.workdir / "events"

    def result(self) -> dict[str, Any] | None:
        """What the finished run left in result.json; None while it is unfinished."""
        path = self.workdir / "result.json"
        return read_json(path) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        write_json(self.workdir / "result.json", dict(result))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock dies with the process.

        Raises:
          InputError: another process is training in this folder.
        """
        path = self.workdir / ".lock"
        with reported(f"write {path}"):
            handle = open(path, "a", opener=opener)
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"workdir {self.workdir} is in use by another process"
                ) from error
            yield


def open_run(
    workdir: Path | str, stage: str, config: Mapping[str, Any] | None = None
) -> Run:
    """Open a run folder, new or to be resumed, and write its config and versions.

    Args:
      workdir: made if missing.
      stage: name of what is trained.
      config: nested, of JSON types; everything the result depends on.

    Raises:
      InputError: the folder holds a run of another stage or config (the differing
        fields are named), holds other files or symbolic links, or cannot be written.
    """
    workdir = Path(workdir).expanduser().absolute()
    mine = json.loads(json.dumps({"stage": stage, "config": dict(config or {})}))
    path = workdir / "config.json"
    with reported(f"make workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        recover(workdir)
        inside = sorted(workdir.iterdir())
    others = [p.name for p in inside if p.name[0] != "."]
    for file in inside:
        if file.is_symlink():
            raise InputError(
                f"{file} is a symbolic link, through which no run is written; remove it"
            )
    if path.exists():
        _refuse_other(workdir, read_json(path), mine)
    elif others:
        raise InputError(
            f"workdir {workdir} holds {others[0]} but no config.json: it is not the "
            "folder of a run; choose an empty one"
        )
    else:
        write_json(path, mine)
    run = Run(workdir, stage, mine["config"])
    if run.result() is None:  # a finished run keeps the versions that made it
        write_json(workdir / "versions.json", versions())
    return run


def _refuse_other(workdir: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    theirs, mine = _leaves(theirs), _leaves(mine)
    differing = [
        f"{name}: got {json.dumps(mine[name]) if name in mine else _ABSENT}, "
        f"the run has {json.dumps(theirs[name]) if name in theirs else _ABSENT}"
        for name in sorted(theirs.keys() | mine.keys(), key=lambda n: (n != "stage", n))
        if theirs.get(name, _ABSENT) != mine.get(name, _ABSENT)
    ]
    if differing:
        raise InputError(f"workdir {workdir} holds another run; {'; '.join(differing)}")


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted names; empty dicts stay as leaves."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat = {}
    for name, child in value.items():
        flat |= _leaves(child, f"{prefix}.{name}" if prefix else name)
    return flat


def versions() -> dict[str, Any]:
    """Python, packages, git commit and hardware, for run folders and cards."""
    device = jax.devices()[0]
    found = {"python": platform.python_version(), "psec_jax": psec_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {
        "commit": commit(),
        "platform": sys.platform,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def commit() -> str | None:
    """Commit of the checkout this package runs from, "+dirty" if it was changed.

    None for an installed package: a repository around the installation is not ours.
    """
    root = Path(psec_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+dirty"]
    try:
        answer = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor() or platform.machine()
