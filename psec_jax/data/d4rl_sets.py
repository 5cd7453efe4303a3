"""Sets of D4RL v2 for three MuJoCo robots (Fu et al. 2020, arXiv 2004.07219).

A set is the official file where the cache holds it, else one that this project made in
Gymnasium's simulator, else the official file downloaded. Source sets, collected under
shifted dynamics, are only made. docs/d4rl_data.md says how the simulators differ.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax.data import sets
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

# The same server; plain http is tried where it does not answer otherwise.
MIRRORS = tuple(
    f"{scheme}://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
    for scheme in ("https", "http")
)


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


def robot_in(spec: str) -> str | None:
    """The robot of a simulator such as "gymnasium:Walker2d-v5@gravity:2": "Walker2d".

    None for simulators of none of ROBOTS. HalfCheetah and Walker2d have the same sizes,
    so that these do not tell whether data fit.
    """
    match = re.fullmatch(r"gymnasium:(\w+)-v\d+(@.*)?", spec)
    known = {robot.name for robot in ROBOTS.values()}
    return match[1] if match and match[1] in known else None


def made_name(name: str) -> str:
    """File name of a set that this project makes, halfcheetah-medium-made.hdf5."""
    return f"{name.removesuffix('-v2')}-made.hdf5"


def _check(path: Path, name: str, ds: Dataset) -> None:
    """Refuse a set of another robot of the same sizes."""
    robot = task(name).robot
    low, high = ROBOTS[robot].height
    median = float(np.median(ds.obs[:, 0]))
    if not low <= median <= high:
        raise InputError(
            f"{path}: the torso's height, the first observation, has the median "
            f"{median:.3g}, a {robot}'s is {low:g} to {high:g}: a set of another robot?"
        )


SETS = sets.Catalogue(
    tasks=TASKS,
    task=task,
    form=rf"[a-z][\w-]*-(v\d+|source)|({'|'.join(ROBOTS)})-[\w-]+",
    cache=("D4RL_DATASET_DIR", "~/.d4rl/datasets"),
    made_name=made_name,
    required=("reward", "terminal", "next_obs", "timeout"),
    mirrors=lambda: MIRRORS,
    command="python -m experiments.tools.collect_d4rl --set=",
    check=_check,
)
names, task_of, environment = SETS.names, SETS.task_of, SETS.environment
cache_dir, find, load = SETS.cache_dir, SETS.find, SETS.load


def save(name: str, ds: Dataset, attrs: Mapping[str, Any]) -> Path:
    """See `Catalogue.save`; the simulator of the official set is recorded too."""
    theirs = {"d4rl_environment": task(name).d4rl_environment}
    return SETS.save(name, ds, dict(attrs) | theirs)


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
