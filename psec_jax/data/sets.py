"""What benchmarks with sets of their own share: `dsrl` and `d4rl_sets`.

A task's set is the official file where the cache holds it, else one that this project
made, else the official file downloaded.
"""

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from psec_jax.data import d4rl, download
from psec_jax.errors import InputError
from psec_jax.types import Dataset

MAKER = "psec_jax"


@runtime_checkable
class Task(Protocol):
    """What every benchmark tells of a task: its simulator and sizes."""

    @property
    def spec(self) -> str:
        """The simulator, for `envs.make`."""

    @property
    def obs_dim(self) -> int:
        """S."""

    @property
    def action_dim(self) -> int:
        """A."""


class Found(NamedTuple):
    """Where a task's set lies.

    Attributes:
      path: the file.
      source: "official", or "made" by this project.
    """

    path: Path
    source: str


def cache_dir(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the default."""
    return Path(os.environ.get(variable) or default).expanduser()


def find(
    official: Path | None,
    made: Path,
    *,
    urls: Sequence[str],
    check: Callable[[Path], object],
    command: str,
    offline: bool,
) -> Found:
    """The file of a task's set, downloaded if no other is there.

    Args:
      official: its place in the cache; None where there is no official set.
      made: the place of the one this project makes.
      urls: addresses of the official file.
      check: raises InputError for a downloaded file that is not the set.
      command: makes a set.
      offline: never use the network.

    Raises:
      InputError: no file; the message says where to put one and what makes one.
    """
    if made.is_file() and not (official and official.is_file()):
        return Found(made, "made")
    hint = f"make a set with: {command}"
    if official is None:
        raise InputError(f"{made}: no such file, and there is no official one; {hint}")
    download.fetch(
        urls,
        official,
        check=check,
        offline=offline,
        hint=hint,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return Found(official, "official")


def check_maker(path: Path, made: str, attrs: Mapping[str, Any]) -> None:
    """Refuse a set of this project under the official name, and the other way round.

    Args:
      path: a file that has the name of an official or a made set.
      made: name of the made one.
      attrs: the file's attributes.

    Raises:
      InputError: it is not what its name says.
    """
    ours = attrs.get("made_by") == MAKER
    if ours != (path.name == made):
        raise InputError(
            f"{path}: has the name of {'an official' if ours else 'a made'} set, "
            f"but is {'' if ours else 'not '}made by {MAKER}"
        )


def made_attributes(name: str, task: Task, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a set that this project makes for a task."""
    known = {"made_by": MAKER, "task": name, "environment": task.spec}
    return dict(attrs) | known


def check(
    path: Path, name: str, task: Task, ds: Dataset, attrs: Mapping[str, Any]
) -> None:
    """Refuse a set that has other sizes than its task, or is told to be of another.

    Raises:
      InputError: what differs.
    """
    _check_sizes(path, name, task, ds.obs.shape, ds.action.shape)
    if attrs.get("task", name) != name:
        raise InputError(f"{path}: is a set of {attrs['task']}, expected {name}")


def check_layout(path: Path, name: str, task: Task, required: Collection[str]) -> None:
    """Refuse a file whose keys or sizes are not the task's, without reading it all.

    Raises:
      InputError: what is missing or differs.
    """
    shapes, _ = d4rl.layout(path, required)
    _check_sizes(path, name, task, shapes["obs"], shapes["action"])


def _check_sizes(
    path: Path, name: str, task: Task, obs: tuple[int, ...], action: tuple[int, ...]
) -> None:
    for what, shape, size in (
        ("observations", obs, task.obs_dim),
        ("actions", action, task.action_dim),
    ):
        if len(shape) != 2 or shape[1] != size:
            raise InputError(
                f"{path}: {what} have the shape {shape}, those of {name} [N, {size}]"
            )
