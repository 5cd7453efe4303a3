"""Flags that the stages share."""

from absl import flags

from experiments.stages import Selection
from launch.cli import define_config

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
    "Demonstrations: a D4RL-layout HDF5 file, an episode .npz or a folder of them; "
    "default collects in --env with the policy config.data.policy.",
)
BEST = flags.DEFINE_bool(
    "best", False, "Take the trajectories of highest return, not the first ones."
)
MIN_RETURN = flags.DEFINE_float(
    "min_return", None, "Take no trajectory of a lower return."
)
EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Roll the result out and record its returns."
)


def selection() -> Selection:
    """Which trajectories the flags ask for."""
    return Selection(BEST.value, MIN_RETURN.value)
