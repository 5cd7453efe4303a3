"""Sets with names of their own: what a source offers, and benchmarks of files.

A task's set is the official file where the cache holds it, else one that this project
made, else the official file downloaded.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from psec_jax.data import d4rl, dataset, download
from psec_jax.data.actions import ActionBox
from psec_jax.data.paths import data_dir
from psec_jax.data.recording import Recording, say
from psec_jax.errors import InputError
from psec_jax.types import Dataset

MAKER = "psec_jax"


@runtime_checkable  # the tests check annotations while they run
class Task(Protocol):
    """One task of a benchmark: its simulator and sizes."""

    @property
    def spec(self) -> str:
        """The simulator, for `envs.make`."""
        ...

    @property
    def file(self) -> str:
        """Name of the official set; empty where there is none."""
        ...

    @property
    def obs_dim(self) -> int:
        """S."""
        ...

    @property
    def action_dim(self) -> int:
        """A."""
        ...


class Found(NamedTuple):
    """A task's set on disk.

    Attributes:
      path: the file.
      source: "official", or "made" by this project.
    """

    path: Path
    source: str


@runtime_checkable
class Source(Protocol):
    """A source of sets with names of their own; the values of `data.CATALOGUES`."""

    def names(self, text: str) -> bool:
        """Whether a text can only be meant as a set's name, known or mistyped."""
        ...

    def find(self, name: str, offline: bool = False) -> Found:
        """The file or folder of a set, downloaded if it is not there."""
        ...

    def task_of(self, path: str | os.PathLike[str]) -> str | None:
        """The name of the set that a file or folder holds; None for anything else."""
        ...

    def environment(self, data: str | os.PathLike[str]) -> str | None:
        """The simulator of a set, given its name or its file; None for other data."""
        ...

    def read(
        self, path: Path, required: Collection[str] = ()
    ) -> tuple[Dataset, dict[str, Any]]:
        """The arrays of a set as stored, and its attributes."""
        ...

    def verify(self, path: Path, ds: Dataset, attrs: Mapping[str, Any]) -> None:
        """Refuse a checked set that is not what its name or attributes say."""
        ...


@dataclass(frozen=True)
class Catalogue:
    """The sets of one benchmark, a HDF5 file for each task.

    Attributes:
      tasks: by the name of their set.
      task: the task of a name; raises InputError for an unknown one.
      form: a regular expression of what can only be meant as a name.
      cache: the environment variable of the folder of official files, and its default.
      made_name: file name of the set that this project makes for a task.
      required: fields that a file of a set may not lack.
      mirrors: addresses of the folder of official files.
      command: makes a set, when its name is added.
      check: (path, name, dataset) raises InputError where the set is not of its task.
      costs: whether files are written with costs.
    """

    tasks: Mapping[str, Task]
    task: Callable[[str], Any]
    form: str
    cache: tuple[str, str]
    made_name: Callable[[str], str]
    required: tuple[str, ...]
    mirrors: Callable[[], Sequence[str]]
    command: str
    check: Callable[[Path, str, Dataset], None]
    costs: bool = False

    def names(self, text: str) -> bool:
        """See `Source.names`."""
        return text in self.tasks or (
            re.fullmatch(self.form, text) is not None and not Path(text).exists()
        )

    def task_of(self, path: str | os.PathLike[str]) -> str | None:
        """See `Source.task_of`; by the name of the official or the made file."""
        file = Path(path).name
        for name, task in self.tasks.items():
            if file and file in (task.file, self.made_name(name)):
                return name
        return None

    def environment(self, data: str | os.PathLike[str]) -> str | None:
        """See `Source.environment`."""
        name = str(data) if data in self.tasks else self.task_of(data)
        return self.tasks[name].spec if name is not None else None

    def cache_dir(self) -> Path:
        """The folder of official files; not created here."""
        variable, default = self.cache
        return Path(os.environ.get(variable) or default).expanduser()

    def find(self, name: str, offline: bool = False) -> Found:
        """The file of a task's set, downloaded if no other is there.

        Args:
          name: of the set.
          offline: never use the network.

        Raises:
          InputError: an unknown name, or no file; the message says where to put one and
            what makes one.
        """
        file = self.task(name).file
        official, made = self.cache_dir() / file, data_dir() / self.made_name(name)
        if made.is_file() and not (file and official.is_file()):
            return Found(made, "made")
        hint = f"make a set with: {self.command}{name}"
        if not file:
            raise InputError(
                f"{made}: no such file, and there is no official one; {hint}"
            )
        download.fetch(
            [mirror + file for mirror in self.mirrors()],
            official,
            check=lambda path: self._check_layout(path, name),
            offline=offline,
            hint=hint,
            report=say,
        )
        return Found(official, "official")

    def read(
        self, path: Path, required: Collection[str] = ()
    ) -> tuple[Dataset, dict[str, Any]]:
        """See `Source.read`.

        Raises:
          InputError: what `d4rl.read` refuses, or a set of this project under the
            official name, or the other way round.
        """
        ds, attrs = self._read(path, required)
        name = self.task_of(path) or attrs.get("task")
        if name is not None and name in self.tasks:
            entry = self.tasks[name]
            unit = ActionBox.unit(entry.action_dim)
            known = Recording(entry.spec, units="scaled", box=unit)
            attrs = known.attributes() | attrs
        return ds, attrs

    def _read(
        self, path: Path, required: Collection[str]
    ) -> tuple[Dataset, dict[str, Any]]:
        ds, attrs = d4rl.read(path, (*self.required, *required))
        named = self.task_of(path)
        if named is not None:
            check_maker(path, self.made_name(named), attrs)
            _check_sizes(path, named, self.task(named), ds.obs.shape, ds.action.shape)
        return ds, attrs

    def verify(self, path: Path, ds: Dataset, attrs: Mapping[str, Any]) -> None:
        """See `Source.verify`."""
        name = self.task_of(path) or attrs.get("task")
        if name is None:
            return
        entry = self.task(name)
        _check_sizes(path, name, entry, ds.obs.shape, ds.action.shape)
        if attrs.get("task", name) != name:
            raise InputError(f"{path}: is a set of {attrs['task']}, expected {name}")
        self.check(path, name, ds)

    def load(
        self,
        source: str | os.PathLike[str],
        clip_actions: bool = False,
        offline: bool = False,
        required: Collection[str] = (),
    ) -> tuple[Dataset, dict[str, Any]]:
        """The checked dataset of one set, and the file's attributes.

        Args:
          source: a set's name, or the path of a file. One that says by its name or its
            attribute `task` which set it is has to be so.
          clip_actions: clip actions into [-1, 1] instead of refusing them.
          offline: never use the network.
          required: further fields that the file may not lack.

        Raises:
          InputError: what `find`, `read` and `verify` refuse, or negative costs.
        """
        if self.names(str(source)):
            source = self.find(str(source), offline).path
        path = Path(source)
        ds, attrs = self._read(path, required)
        ds = dataset.check(ds, str(path), clip_actions)
        dataset.check_costs(ds, str(path))
        self.verify(path, ds, attrs)
        return ds, attrs

    def save(self, name: str, ds: Dataset, attrs: Mapping[str, Any]) -> Path:
        """Write the set made for a task where `find` looks for it, whole or not at all.

        Args:
          name: of the set.
          ds: whole trajectories.
          attrs: how it was made; the task, its simulator and the maker are added.

        Raises:
          InputError: what `load` would refuse, or a file that cannot be written.
        """
        path = data_dir() / self.made_name(name)
        known = {"made_by": MAKER, "task": name, "environment": self.task(name).spec}
        attrs = dict(attrs) | known
        ds = dataset.check(ds, str(path))
        dataset.check_costs(ds, str(path))
        self.verify(path, ds, attrs)
        return d4rl.save(path, ds, attrs, self.costs)

    def _check_layout(self, path: Path, name: str) -> None:
        """Refuse a file whose keys or sizes are not the task's; values are not read."""
        shapes, _ = d4rl.layout(path, self.required)
        _check_sizes(path, name, self.task(name), shapes["obs"], shapes["action"])


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
