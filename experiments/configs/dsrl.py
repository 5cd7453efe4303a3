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

from ml_collections import ConfigDict

from experiments.configs import dmc_walker
from psec_jax.errors import lookup

# Slower than the paper's rate: a gate that is fitted closely to few good trajectories
# is unsafe off them (docs/safe.md).
GATE_RATE = 1e-4
QUICK = {
    "base": {"steps": 4000, "batch_size": 256, "ema": 5e-3},
    "skill": {"steps": 2000, "batch_size": 256, "dropout": 0.0, "ema": 5e-3},
    "critics": {"steps": 4000, "batch_size": 256},
    "gate": {"steps": 200, "batch_size": 256, "learning_rate": GATE_RATE},
    "evaluation": {"episodes": 10},
    "table": {"seeds": (0,), "tuning_episodes": 5},
}
STANDARD = {
    "base": {"steps": 6000, "batch_size": 128, "ema": 5e-3},
    "skill": {"steps": 4000, "batch_size": 128, "dropout": 0.0, "ema": 5e-3},
    "critics": {"steps": 15_000, "batch_size": 256},
    "gate": {"steps": 500, "batch_size": 256, "learning_rate": GATE_RATE},
    "evaluation": {"episodes": 20},
    "table": {"seeds": (0, 1, 2), "tuning_episodes": 10},
}
PAPER = {
    "base": {"steps": 1_000_000, "batch_size": 2048},
    "skill": {"steps": 50_000, "batch_size": 2048},
    "critics": {"steps": 50_000, "batch_size": 2048},
    "gate": {"steps": 1000, "batch_size": 2048},
    "evaluation": {"episodes": 20},
    "table": {"seeds": (0, 1, 2, 3), "tuning_episodes": 20},
}
PRESETS = {"quick": QUICK, "standard": STANDARD, "paper": PAPER}
TASK = "bullet:SafetyBallRun-v0"


def get_config(preset: str = "quick") -> ConfigDict:
    """The resolved config of one preset."""
    sizes = lookup(PRESETS, preset, "preset")
    config = dmc_walker.get_config(preset)
    table = config.table
    del config.table
    config.update(
        {
            # The whole set is used; the gate takes those that flags of launch.compose
            # select of it.
            "base": {"env": TASK, "episodes": 0, "ema": 1e-3},
            "skill": {
                "env": TASK,
                "episodes": 0,
                "rank": 8,
                "dropout": 0.1,
                "learning_rate": 3e-4,
                "ema": 1e-3,
            },
            # Sets hold actions that rounding left just outside the bounds.
            "data": {"clip_actions": True},
            # Costs of a trajectory up to here are safe; recorded with every result.
            "cost_limit": 10.0,
            # Trained with the skills, or alone (steps and batch_size) to be shared.
            # violation: h where the cost is above 0, elsewhere h is -1.
            "critics": {
                "safety": True,
                "widths": (256, 256),
                "discount": 0.99,
                "expectile": 0.7,
                "safety_expectile": 0.9,
                "learning_rate": 3e-4,
                "target_rate": 0.005,
                "steps": 0,
                "batch_size": 0,
                "scale_rewards": True,
                "violation": 25.0,
                "bootstrap_timeouts": True,
            },
            "weights": {
                "reward_temperature": 1.0,
                "safety_temperature": 1.0,
                "clip": 100.0,
                "infeasible_floor": 0.0,
            },
            # Of experiments.table1. return_quantile: gates learn from the trajectories
            # above it, among those within the cost limit. cloning: see dmc_walker.py.
            "table": {
                "seeds": (),
                "tuning_episodes": 0,
                "methods": (),
                "return_quantile": 0.5,
                "fisor_candidates": 16,
                "cloning": table.cloning.to_dict(),
            },
        }
    )
    config.update(sizes)
    return config
