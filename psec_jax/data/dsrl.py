"""Sets of DSRL, with rewards and costs (Liu et al. 2023, arXiv 2306.09303).

A task's set is the official file where the cache holds it, else one that this project
made in the same simulator, else the official file downloaded.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from psec_jax.data import dataset, sets
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

# The same files under each, in the order in which they are tried.
MIRRORS = (
    "https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/",
    "https://data.offline-saferl.org/download/",
    "http://data.offline-saferl.org/download/",
)


class Task(NamedTuple):
    """One task of the benchmark.

    Attributes:
      spec: its simulator, for `envs.make`.
      file: name of the official set.
      obs_dim: S.
      action_dim: A.
      length: steps after which an episode is cut.
      min_return: of the official set's trajectories, for the normalised return.
      max_return: likewise.
      max_cost: of a trajectory of the official set.
      trajectories: in the official set.
    """

    spec: str
    file: str
    obs_dim: int
    action_dim: int
    length: int
    min_return: float
    max_return: float
    max_cost: float
    trajectories: int


# MetaDrive: the benchmark's table says 261 observations, its simulator gives 259 (9 of
# the car, 10 of the route, 240 rays) with every setting that the tasks have; see
# docs/safe.md. A file with 261 is refused, for no policy of it could be rolled out.
# One name a line and its numbers under it: exploded, this table would fill pages.
# fmt: off
TASKS = {
    "OfflineMetadrive-easysparse-v0": Task(
        "metadrive:easysparse", "SafeMetaDrive-easysparse-v0-85-1000.hdf5",
        259, 2, 1000, 20.094310760498047, 425.8006286621094, 82.424, 1000),
    "OfflineMetadrive-easymean-v0": Task(
        "metadrive:easymean", "SafeMetaDrive-easymean-v0-85-1000.hdf5",
        259, 2, 1000, 22.142553329467773, 425.82440185546875, 82.386, 1000),
    "OfflineMetadrive-easydense-v0": Task(
        "metadrive:easydense", "SafeMetaDrive-easydense-v0-85-1000.hdf5",
        259, 2, 1000, 19.71139144897461, 425.81732177734375, 80.364, 1000),
    "OfflineMetadrive-mediumsparse-v0": Task(
        "metadrive:mediumsparse", "SafeMetaDrive-mediumsparse-v0-50-1000.hdf5",
        259, 2, 1000, 17.446578979492188, 269.80084228515625, 46.465, 1000),
    "OfflineMetadrive-mediummean-v0": Task(
        "metadrive:mediummean", "SafeMetaDrive-mediummean-v0-50-1000.hdf5",
        259, 2, 1000, 17.032529830932617, 269.8221435546875, 46.462, 1000),
    "OfflineMetadrive-mediumdense-v0": Task(
        "metadrive:mediumdense", "SafeMetaDrive-mediumdense-v0-50-1000.hdf5",
        259, 2, 1000, 15.102348327636719, 269.7813415527344, 46.459, 1000),
    "OfflineMetadrive-hardsparse-v0": Task(
        "metadrive:hardsparse", "SafeMetaDrive-hardsparse-v0-85-1000.hdf5",
        259, 2, 1000, 17.247974395751953, 486.80523681640625, 85.010, 1000),
    "OfflineMetadrive-hardmean-v0": Task(
        "metadrive:hardmean", "SafeMetaDrive-hardmean-v0-85-1000.hdf5",
        259, 2, 1000, 19.387981414794922, 486.9967956542969, 84.340, 1000),
    "OfflineMetadrive-harddense-v0": Task(
        "metadrive:harddense", "SafeMetaDrive-harddense-v0-85-1000.hdf5",
        259, 2, 1000, 15.386894226074219, 486.63616943359375, 84.767, 1000),
    "OfflineAntRun-v0": Task(
        "bullet:SafetyAntRun-v0", "SafetyAntRun-v0-150-1816.hdf5",
        33, 8, 200, 0.001767391717990563, 955.4818725585938, 150, 1816),
    "OfflineBallRun-v0": Task(
        "bullet:SafetyBallRun-v0", "SafetyBallRun-v0-80-940.hdf5",
        7, 2, 100, 26.339754104614258, 1327.445556640625, 80, 940),
    "OfflineCarRun-v0": Task(
        "bullet:SafetyCarRun-v0", "SafetyCarRun-v0-40-651.hdf5",
        7, 2, 200, 204.28726196289062, 574.6533203125, 40, 651),
    "OfflineDroneRun-v0": Task(
        "bullet:SafetyDroneRun-v0", "SafetyDroneRun-v0-140-1990.hdf5",
        17, 4, 200, 10.557029724121094, 682.8330078125, 140, 1990),
    "OfflineAntCircle-v0": Task(
        "bullet:SafetyAntCircle-v0", "SafetyAntCircle-v0-200-5728.hdf5",
        34, 8, 500, 0.0177031010389328, 460.7091979980469, 200, 5728),
    "OfflineBallCircle-v0": Task(
        "bullet:SafetyBallCircle-v0", "SafetyBallCircle-v0-80-886.hdf5",
        8, 2, 200, 0.38312244415283203, 881.46337890625, 80, 886),
    "OfflineCarCircle-v0": Task(
        "bullet:SafetyCarCircle-v0", "SafetyCarCircle-v0-100-1450.hdf5",
        8, 2, 300, 3.484419822692871, 534.3060913085938, 100, 1450),
    "OfflineDroneCircle-v0": Task(
        "bullet:SafetyDroneCircle-v0", "SafetyDroneCircle-v0-100-1923.hdf5",
        18, 4, 300, 207.794189453125, 996.38916015625, 100, 1923),
}
# fmt: on


def task(name: str) -> Task:
    """The task of an id such as "OfflineBallRun-v0".

    Raises:
      InputError: unknown; the message lists the tasks.
    """
    return lookup(TASKS, name, "DSRL task")


def task_in(spec: str) -> str:
    """The id of the task that has this simulator.

    Args:
      spec: such as "bullet:SafetyBallRun-v0".

    Raises:
      InputError: no task of DSRL has it.
    """
    by_spec = {entry.spec: name for name, entry in TASKS.items()}
    return lookup(by_spec, spec, "simulator of a DSRL task")


def made_name(name: str) -> str:
    """File name of the set that this project makes for a task."""
    simulator, _, _ = task(name).file.rsplit("-", 2)
    return f"{simulator}-made.hdf5"


def _check(path: Path, name: str, ds: Dataset) -> None:
    """Refuse trajectories longer than the task's episodes."""
    longest = max(rows.stop - rows.start for rows in dataset.episode_slices(ds))
    if longest > task(name).length:
        raise InputError(
            f"{path}: a trajectory has {longest} steps, an episode of {name} at most "
            f"{task(name).length}"
        )


SETS = sets.Catalogue(
    tasks=TASKS,
    task=task,
    form=r"Offline[\w-]+",
    cache=("DSRL_DATASET_DIR", "~/.dsrl/datasets"),
    made_name=made_name,
    required=("reward", "terminal", "next_obs", "timeout", "cost"),
    mirrors=lambda: MIRRORS,
    command="python -m experiments.tools.collect_safe --task=",
    check=_check,
    costs=True,
)
names, task_of, environment = SETS.names, SETS.task_of, SETS.environment
cache_dir, find, load, save = SETS.cache_dir, SETS.find, SETS.load, SETS.save


def normalised_return(name: str, returns: np.ndarray) -> np.ndarray:
    """(R - min) / (max - min), of the official set's returns.

    Args:
      name: the task's id.
      returns: of episodes, any shape.

    Raises:
      InputError: an unknown task.
    """
    low, high = task(name).min_return, task(name).max_return
    return (np.asarray(returns, np.float64) - low) / (high - low)


def normalised_cost(costs: np.ndarray, limit: float) -> np.ndarray:
    """C / limit, and C + 1 at a limit of 0; a mean below 1 counts as safe.

    Args:
      costs: of episodes, any shape.
      limit: the most that a safe episode may cost.

    Raises:
      InputError: a limit below 0, or not finite.
    """
    if not (np.isfinite(limit) and limit >= 0):
        raise InputError(f"cost limit: got {limit:g}, expected 0 or more")
    extra = float(limit == 0)
    return (np.asarray(costs, np.float64) + extra) / (limit + extra)
