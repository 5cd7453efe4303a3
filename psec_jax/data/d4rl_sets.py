"""Sets of D4RL v2 for three MuJoCo robots (Fu et al. 2020, arXiv 2004.07219).

A set is the official file where the cache holds it, else one that this project made in
Gymnasium's simulator, else the official file downloaded. Source sets, collected under
shifted dynamics, are only made. docs/d4rl_data.md says how the simulators differ.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax.data import d4rl, dataset, sets
from psec_jax.data.paths import data_dir
from psec_jax.data.sets import Found
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

MIRRORS = ("http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/",)
REQUIRED = ("next_obs", "timeout")  # beyond those every file needs


class Robot(NamedTuple):
    """A robot, its sizes and the returns that scores are told by.

    Attributes:
      name: of the simulator, without its version.
      obs_dim: S.
      action_dim: A.
      min_return: of a random policy, which scores 0.
      max_return: of D4RL's expert, which scores 100.
      height: least and greatest plausible median of the first observation, the height
        of the torso, which tells one robot from another of the same sizes.
    """

    name: str
    obs_dim: int
    action_dim: int
    min_return: float
    max_return: float
    height: tuple[float, float]


class Task(NamedTuple):
    """One set.

    Attributes:
      spec: the simulator in which this project makes it, for `envs.make`.
      file: name of the official set; empty where there is none.
      obs_dim: S.
      action_dim: A.
      robot: a key of ROBOTS.
      quality: what it holds, "medium" or "source".
      d4rl_environment: the simulator of the official set and of published scores.
    """

    spec: str
    file: str
    obs_dim: int
    action_dim: int
    robot: str
    quality: str
    d4rl_environment: str


ROBOTS = {
    # HalfCheetah's height counts from where it stands; the others fall below theirs.
    "halfcheetah": Robot("HalfCheetah", 17, 6, -280.178953, 12135.0, (-0.75, 0.75)),
    "hopper": Robot("Hopper", 11, 3, -20.272305, 3234.3, (0.7, 3.0)),
    "walker2d": Robot("Walker2d", 17, 6, 1.629008, 4592.3, (0.8, 2.0)),
}
QUALITIES = (
    "random",
    "medium",
    "medium-replay",
    "medium-expert",
    "expert",
    "full-replay",
)
# The factors by which the paper's source simulators differ from the plain ones.
SHIFTS = {
    "halfcheetah": {"friction": 0.25, "gravity": 2.0, "thigh_size": 2.0},
    "walker2d": {"friction": 0.5, "gravity": 2.0, "thigh_size": 2.0},
}


def _task(robot: str, quality: str, shift: str = "") -> Task:
    name, obs_dim, action_dim, *_ = ROBOTS[robot]
    spec = f"gymnasium:{name}-v5"
    file = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
    if shift:
        spec, file = f"{spec}@{shift}:{SHIFTS[robot][shift]:g}", ""
    return Task(spec, file, obs_dim, action_dim, robot, quality, f"{name}-v2")


TASKS = {
    f"{robot}-{quality}-v2": _task(robot, quality)
    for robot in ROBOTS
    for quality in QUALITIES
} | {
    f"{robot}-{shift}-source": _task(robot, "source", shift)
    for robot, shifts in SHIFTS.items()
    for shift in shifts
}


def task(name: str) -> Task:
    """The set of a name such as "halfcheetah-medium-v2" or "walker2d-gravity-source".

    Raises:
      InputError: unknown; the message lists the names.
    """
    if match := re.fullmatch(r"(.+)-v[01]", name):
        if f"{match[1]}-v2" in TASKS:
            raise InputError(
                f"{name}: D4RL's first versions are other data, with faults that v2 "
                f"mends; expected {match[1]}-v2"
            )
    return lookup(TASKS, name, "D4RL set")


def names(text: str) -> bool:
    """Whether a text can only be meant as a set's name, known or mistyped."""
    form = rf"[a-z][\w-]*-(v\d+|source)|({'|'.join(ROBOTS)})-[\w-]+"
    return text in TASKS or (
        re.fullmatch(form, text) is not None and not Path(text).exists()
    )


def task_of(path: str | os.PathLike[str]) -> str | None:
    """The name of the set whose official or made file has this file's name."""
    file = Path(path).name
    for name, entry in TASKS.items():
        if file and file in (entry.file, made_name(name)):
            return name
    return None


def environment(data: str | os.PathLike[str]) -> str | None:
    """The simulator of a set, given its name or its file; None for anything else."""
    name = data if data in TASKS else task_of(data)
    return TASKS[name].spec if name is not None else None


def robot_in(spec: str) -> str | None:
    """The robot of a simulator such as "gymnasium:Walker2d-v5@gravity:2": "Walker2d".

    None for simulators of none of ROBOTS. HalfCheetah and Walker2d have the same sizes,
    so that these do not tell whether data fit.
    """
    match = re.fullmatch(r"gymnasium:(\w+)-v\d+(@.*)?", spec)
    known = {robot.name for robot in ROBOTS.values()}
    return match[1] if match and match[1] in known else None


def cache_dir() -> Path:
    """`$D4RL_DATASET_DIR`, or `~/.d4rl/datasets`; not created here."""
    return sets.cache_dir("D4RL_DATASET_DIR", "~/.d4rl/datasets")


def made_name(name: str) -> str:
    """File name of a set that this project makes, halfcheetah-medium-made.hdf5."""
    return f"{name.removesuffix('-v2')}-made.hdf5"


def find(name: str, offline: bool = False) -> Found:
    """The file of a set, downloaded if no other is there.

    Args:
      name: the set's name.
      offline: never use the network.

    Raises:
      InputError: an unknown name, or no file; the message says where to put one and
        what makes one.
    """
    file = task(name).file
    return sets.find(
        cache_dir() / file if file else None,
        data_dir() / made_name(name),
        urls=[mirror + file for mirror in MIRRORS],
        check=lambda path: sets.check_layout(path, name, task(name), REQUIRED),
        command=f"python -m experiments.tools.collect_d4rl --set={name}",
        offline=offline,
    )


def load(
    source: str | os.PathLike[str],
    clip_actions: bool = False,
    offline: bool = False,
    required: Collection[str] = (),
) -> tuple[Dataset, dict[str, Any]]:
    """Read one set.

    Args:
      source: a set's name, or the path of a file in D4RL's layout. One that says by its
        name or its attribute `task` which set it is has to be so.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      offline: never use the network.
      required: further fields that the file may not lack.

    Returns:
      The checked dataset and the file's attributes.

    Raises:
      InputError: what `find` and `d4rl.load` refuse, a file of D4RL's first versions,
        or one that is not what it says: other sizes, another robot, another attribute
        `task`, a set of this project under the official name.
    """
    if names(str(source)):
        source = find(str(source), offline).path
    path = Path(source)
    named = task_of(path)
    of_set = REQUIRED if named is not None else ()
    ds, attrs = d4rl.load(path, clip_actions, (*of_set, *required))
    if named is not None:
        sets.check_maker(path, made_name(named), attrs)
    name = named or attrs.get("task")
    if name is not None:
        _check(path, name, ds, attrs)
    return ds, attrs


def save(name: str, ds: Dataset, attrs: Mapping[str, Any]) -> Path:
    """Write a made set where `find` looks for it, whole or not at all.

    Args:
      name: the set's name.
      ds: whole trajectories.
      attrs: how it was made; the set's name, both simulators and the maker are added.

    Raises:
      InputError: what `load` would refuse, or a file that cannot be written.
    """
    path = data_dir() / made_name(name)
    attrs = sets.made_attributes(name, task(name), attrs)
    attrs["d4rl_environment"] = task(name).d4rl_environment
    ds = dataset.check(ds, str(path))
    _check(path, name, ds, attrs)
    return d4rl.save(path, ds, attrs)


def _check(path: Path, name: str, ds: Dataset, attrs: Mapping[str, Any]) -> None:
    """Refuse a set that is not what it says."""
    sets.check(path, name, task(name), ds, attrs)
    robot = task(name).robot
    low, high = ROBOTS[robot].height
    median = float(np.median(ds.obs[:, 0]))
    if not low <= median <= high:
        raise InputError(
            f"{path}: the torso's height, the first observation, has the median "
            f"{median:.3g}, a {robot}'s is {low:g} to {high:g}: a set of another robot?"
        )


def normalised_score(name: str, returns: np.ndarray | float) -> np.ndarray | float:
    """D4RL's score 100 (R - min) / (max - min), of the plain robot's references.

    Args:
      name: of a set or of a robot.
      returns: of episodes, any shape.

    Raises:
      InputError: an unknown name.
    """
    robot = ROBOTS.get(name) or ROBOTS[task(name).robot]
    low, high = robot.min_return, robot.max_return
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)
