"""Flags that the stages share."""

from pathlib import Path

import jax
from absl import flags

from psec_jax import data as datasets
from psec_jax import envs
from psec_jax.cli import Member, define_config, define_seeds, define_shift
from psec_jax.cli import members as members_of
from psec_jax.errors import InputError
from psec_jax.runtime import processes
from psec_jax.workflows.demonstrations import Selection

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
SEEDS = define_seeds()
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Several devices, as seed:4,data:2: the runs of --seeds are divided by the first "
    "number, each batch by the second. Default one device; with several processes "
    "all of theirs.",
)
STREAM = flags.DEFINE_enum(
    "stream",
    "auto",
    ["auto", "yes", "no"],
    "Keep the data in a file of --workdir and read each batch from there, not all of "
    "it in a device's memory; the numbers are the same. auto: where it would fill half "
    "of that memory. Takes grain (the extra stream).",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes of a cluster that JAX knows (TPU pods, SLURM); "
    "each runs this command.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT where the first of --processes=N processes listens, elsewhere than on a "
    "cluster that JAX knows; --process=I says which one this is.",
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
PROCESS = flags.DEFINE_integer("process", None, "Which process this is, from 0.")
PEER_SECONDS = flags.DEFINE_integer(
    "peer_seconds", 300, "How long to wait for the other processes.", 1
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder where compiled programs are kept for later runs. Default none.",
)
ENV = flags.DEFINE_string(
    "env",
    None,
    "dm_control:DOMAIN-TASK or gymnasium:ID; default that of a named set of --data, "
    "else the config's.",
)
SHIFT = define_shift()
DATA = flags.DEFINE_string(
    "data",
    None,
    "Demonstrations: a D4RL-layout HDF5 file, an episode .npz or a folder of them, or "
    "the name of a set, which is looked for or downloaded: OfflineBallRun-v0 (DSRL), "
    "halfcheetah-medium-v2 (D4RL), minari:ID (launch.compose: also best, the best safe "
    "trajectories of the skills' task); "
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
TRANSITIONS = flags.DEFINE_integer(
    "transitions",
    None,
    "Of all that is left, draw trajectories at random until there are this many "
    "transitions; the last one is cut.",
)
EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Roll the result out and record its returns."
)


def start() -> None:
    """What has to be done before anything runs on a device.

    Raises:
      InputError: processes that do not come together.
    """
    if COMPILATION_CACHE.value is not None:
        folder = Path(COMPILATION_CACHE.value).expanduser().absolute()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    told = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if DISTRIBUTED.value or told != (None, None, None):
        processes.connect(*told, timeout=PEER_SECONDS.value)


def members() -> list[Member]:
    """The runs that --seed or --seeds stands for."""
    if SEEDS.value is None:
        return [Member(seed=SEED.value)]
    if SEED.present:
        raise InputError("--seed and --seeds were both given; choose one")
    return members_of(SEEDS.value)


def env() -> str | None:
    """The environment that --env and --shift stand for."""
    return shifted(ENV.value)


def shifted(env: str | None) -> str | None:
    """An environment of --env as --shift changes it."""
    if env is None and SHIFT.value:
        raise InputError("--shift: changes the simulator of --env, which is not given")
    return None if env is None else envs.shifted(env, *SHIFT.value)


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
        transitions=TRANSITIONS.value,
    )
