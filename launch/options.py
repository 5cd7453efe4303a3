"""Flags that the stages share."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from psec_jax import data as datasets
from psec_jax import envs
from psec_jax.cli import (
    ENV_HELP,
    Seed,
    define_config,
    define_seeds,
    define_shift,
    seeds_of,
)
from psec_jax.errors import InputError
from psec_jax.evaluation import successes
from psec_jax.runtime import platform, processes
from psec_jax.workflows import Job, Selection

CONFIG = define_config(
    "experiments/configs/dmc_walker.py:quick",
    "Config file and preset, FILE:PRESET with PRESET one of quick, standard, paper; "
    "--config.FIELD=VALUE changes a field, which psec_jax/workflows/config.py lists.",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of this run: config, versions, metrics, saves. The same command with "
    "the same directory resumes.",
    required=True,
)
LIBRARY = flags.DEFINE_string(
    "library", "runs/library", "Directory of the skill library."
)
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
    "Directory where compiled programs are kept for later runs; default "
    "$JAX_COMPILATION_CACHE_DIR or ~/.cache/psec_jax/compiled.",
)
ENV = flags.DEFINE_string(
    "env",
    None,
    f"{ENV_HELP} Default that of the data where they name one, of the library's base "
    "for a skill, the config's where data are collected.",
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
ACTIONS = flags.DEFINE_enum(
    "actions",
    None,
    list(datasets.UNITS),
    "Units of the actions in --data: env, the environment's own, scaled, in [-1, 1], "
    "or auto, what the file says or the environment's box leaves; default "
    "config.data.actions.",
)
ENDS = flags.DEFINE_enum(
    "ends",
    None,
    list(datasets.ENDS),
    "What ends a trajectory of --data: flags, observations, or check, which refuses "
    "data in which the two contradict each other; default config.data.ends.",
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
DRAW = flags.DEFINE_integer(
    "draw",
    None,
    "Seed of what --filter, --share and --transitions draw; default 0.",
    lower_bound=0,
)
EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Roll the result out and record its returns."
)


def start() -> None:
    """Do what has to be done before anything runs on a device.

    Raises:
      InputError: processes that do not come together.
    """
    platform.keep_programs(COMPILATION_CACHE.value)
    cluster = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if DISTRIBUTED.value or cluster != (None, None, None):
        processes.connect(*cluster, timeout=PEER_SECONDS.value)


def job() -> Job:
    """The job of --config and its fields."""
    given = {"data.actions": ACTIONS.value, "data.ends": ENDS.value}
    changes = {name: value for name, value in given.items() if value is not None}
    return Job.from_dict(CONFIG.value.to_dict()).changed(changes)


def seeds() -> list[Seed]:
    """The runs that --seed or --seeds stands for."""
    if SEEDS.value is None:
        return [Seed(seed=SEED.value)]
    if SEED.present:
        raise InputError("--seed and --seeds were both given; choose one")
    return seeds_of(SEEDS.value)


def request(seed: Seed, own: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The fields that the requests of all stages have.

    Args:
      seed: of --seed or --seeds.
      own: fields that the command sets by itself, instead of the flags.
    """
    parse = {"env": env, "data": data, "selection": selection}
    return {
        "workdir": seed.within(WORKDIR.value),
        "library": seed.within(LIBRARY.value),
        "seed": seed.seed,
        "label": seed.name,
        **{name: value() for name, value in parse.items() if name not in own},
        **own,
    }


def program() -> dict[str, Any]:
    """How the requests are run: the mesh of devices, and where the data are."""
    return {"mesh": MESH.value, "stream": STREAM.value}


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
    """Which trajectories the flags choose."""
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
        draw=DRAW.value,
    )


def finished(what: str, result: dict[str, Any]) -> str:
    """One line about a finished stage."""
    line = f"{what} is in {result['library']}"
    if result["returns"]:
        returns = result["returns"]
        line += f"; return {returns['mean']:.1f} in {returns['env']}"
        line += f" ({count_episodes(returns['returns'])}"
        line += f"{successes(returns.get('success'))})"
    return line


def count_episodes(returns: list[float]) -> str:
    """1 episode, 2 episodes, ..."""
    return f"{len(returns)} episode{'s' * (len(returns) != 1)}"
