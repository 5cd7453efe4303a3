r"""DSRL: a base on a mixed set with costs, a reward skill and a safety skill, a gate.

    python -m launch.pretrain --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/ball/base --library=runs/ball/library --data=OfflineBallRun-v0
    python -m launch.expand --config=experiments/configs/dsrl.py:quick \
        --objective=reward,safety --name=reward,safety \
        --workdir=runs/ball/skills --library=runs/ball/library --data=OfflineBallRun-v0
    python -m launch.compose --config=experiments/configs/dsrl.py:quick \
        --name=psec --skills=safety,reward --data=best \
        --workdir=runs/ball/gate --library=runs/ball/library

Presets (any field can be changed with --config.FIELD=VALUE):
  quick     minutes on 2 CPU cores: a try
  standard  a quarter of an hour a seed and task on one CPU core
  paper     the paper's budgets: batch 2048, 1 M / 50 k / 1 k steps; wants a GPU or TPU
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from psec_jax.errors import lookup
from psec_jax.workflows import Job

# The whole set is used; the gate reads what flags of launch.compose select of it. Sets
# hold actions that rounding left just outside the bounds.
COMMON = {
    "base.env": "bullet:SafetyBallRun-v0",
    "base.episodes": 0,
    "skill.env": "bullet:SafetyBallRun-v0",
    "skill.episodes": 0,
    "data.clip_actions": True,
}
# The gate is slower than the paper's: one that is fitted closely to few good
# trajectories is unsafe off them (docs/safe.md).
SMALL = COMMON | {
    "base.ema": 5e-3,
    "skill.dropout": 0.0,
    "skill.ema": 5e-3,
    "critics.batch_size": 256,
    "gate.learning_rate": 1e-4,
    "gate.batch_size": 256,
    "table.cloning": {"steps": 200, "batch_size": 64},
}
PRESETS = {
    "quick": SMALL
    | {
        "base.steps": 4000,
        "base.batch_size": 256,
        "skill.steps": 2000,
        "skill.batch_size": 256,
        "critics.steps": 4000,
        "gate.steps": 200,
        "evaluation.episodes": 10,
        "table.seeds": (0,),
        "table.tuning_episodes": 5,
    },
    "standard": SMALL
    | {
        "base.steps": 6000,
        "base.batch_size": 128,
        "skill.steps": 4000,
        "skill.batch_size": 128,
        "critics.steps": 15_000,
        "gate.steps": 500,
        "evaluation.episodes": 20,
        "table.seeds": (0, 1, 2),
    },
    "paper": COMMON
    | {
        "evaluation.episodes": 20,
        "table.seeds": (0, 1, 2, 3),
        "table.tuning_episodes": 20,
    },
}


def job(preset: str = "quick") -> Job:
    """The job of one preset."""
    return Job().changed({"preset": preset} | lookup(PRESETS, preset, "preset"))


def get_config(preset: str = "quick") -> ConfigDict:
    """The same as a command's config."""
    return ConfigDict(asdict(job(preset)))
