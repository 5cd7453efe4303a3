"""Flags that the stages share."""

from absl import flags

from experiments.stages import Selection
from launch.cli import define_config
from psec_jax import data as datasets

CONFIG = define_config(
    "experiments/configs/dmc_walker.py:quick",
    "Config file and preset, FILE:PRESET with PRESET one of quick, standard, paper; "
    "the file lists the fields, and --config.FIELD=VALUE changes one.",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of this run: config, versions, metrics, saves. The same command with the "
    "same folder resumes.",
    required=True,
)
LIBRARY = flags.DEFINE_string("library", "runs/library", "Folder of the skill library.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of parameters, batches and noise.", 0, 2**32 - 1
)
ENV = flags.DEFINE_string(
    "env", None, "dm_control:DOMAIN-TASK or gymnasium:ID; default from the config."
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "Demonstrations: a D4RL-layout HDF5 file, an episode .npz or a folder of them, or "
    "a DSRL task such as OfflineBallRun-v0, whose file is looked for or downloaded "
    "(launch.compose: also best, the best safe trajectories of the skills' task); "
    "default collects in --env with the policy config.data.policy.",
)
OFFLINE = flags.DEFINE_bool("offline", False, "Never download data.")
BEST = flags.DEFINE_bool(
    "best", False, "Take the trajectories of highest return, not the first ones."
)
MIN_RETURN = flags.DEFINE_float(
    "min_return", None, "Take no trajectory of a lower return."
)
MAX_COST = flags.DEFINE_float("max_cost", None, "Take no trajectory of a higher cost.")
RETURN_QUANTILE = flags.DEFINE_float(
    "return_quantile",
    None,
    "Take no trajectory below this quantile of the returns of those that bounds on the "
    "cost left: 0.8 is their best fifth.",
)
COST_QUANTILE = flags.DEFINE_float(
    "cost_quantile", None, "Take no trajectory above this quantile of all costs."
)
SPLIT = flags.DEFINE_integer(
    "split",
    None,
    "Cut trajectories into pieces of this many steps, before anything else.",
)
FILTER = flags.DEFINE_string(
    "filter",
    None,
    "Drop trajectories by their place in the plane of costs and returns, before any "
    "bound: density (thin crowded places out) or outliers (drop lonely ones).",
)
SHARE = flags.DEFINE_float(
    "share", None, "Keep this random part of the trajectories that the filter left."
)
EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Roll the result out and record its returns."
)


def data() -> str | None:
    """The file that --data stands for."""
    return None if DATA.value is None else located(DATA.value)


def located(name: str) -> str:
    """The file or folder that a path or the name of a set stands for."""
    return str(datasets.locate(name, OFFLINE.value))


def selection() -> Selection:
    """Which trajectories the flags ask for."""
    return Selection(
        best=BEST.value,
        min_return=MIN_RETURN.value,
        max_cost=MAX_COST.value,
        return_quantile=RETURN_QUANTILE.value,
        cost_quantile=COST_QUANTILE.value,
        split=SPLIT.value,
        filter=FILTER.value,
        share=SHARE.value,
    )
