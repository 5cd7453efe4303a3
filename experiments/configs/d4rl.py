r"""Config of the dynamics shift on D4RL: HalfCheetah and Walker2d.

    python -m launch.pretrain --config=experiments/configs/d4rl.py:quick \
        --workdir=runs/shift/base --library=runs/shift/library \
        --data=halfcheetah-gravity-source
    python -m launch.expand --config=experiments/configs/d4rl.py:quick \
        --config.critics.reward_scale=0.0805 \
        --objective=reward --name=plain --transitions=10000 \
        --workdir=runs/shift/skill --library=runs/shift/library \
        --data=halfcheetah-medium-v2 --env=gymnasium:HalfCheetah-v5
    python -m launch.compose --config=experiments/configs/d4rl.py:quick \
        --name=psec --skills=plain --transitions=10000 \
        --workdir=runs/shift/gate --library=runs/shift/library \
        --data=halfcheetah-medium-v2 --env=gymnasium:HalfCheetah-v5

Presets (any field can be changed with --config.FIELD=VALUE):
  quick     minutes on 2 CPU cores: a try
  standard  a network of half the width (a quarter of the weights), and two minutes a
            cell and seed on one CPU core
  paper     the paper's network, batch and steps where it says them; wants a GPU or TPU
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from psec_jax.errors import lookup
from psec_jax.workflows import Job

# There are no costs to learn from. reward_scale 0 is longest episode / (highest -
# lowest return) of the transitions given; of a small target set that is a matter of
# luck, so dynamics_shift sets it by the returns that scores are measured by.
COMMON = {
    "base.env": "gymnasium:HalfCheetah-v5",
    "base.episodes": 0,
    "skill.env": "gymnasium:HalfCheetah-v5",
    "skill.episodes": 0,
    "skill.objective": "reward",
    "data.clip_actions": True,
    "critics.kinds": ("reward",),
    "evaluation.episodes": 10,
}
SMALL = COMMON | {
    "base.batch_size": 128,
    "base.ema": 5e-3,
    "skill.batch_size": 128,
    "skill.dropout": 0.0,
    "skill.ema": 5e-3,
    "gate.batch_size": 128,
    "table.cloning": {"steps": 200, "batch_size": 64},
}
PRESETS = {
    "quick": SMALL
    | {
        "base.steps": 3000,
        "skill.steps": 1000,
        "critics.steps": 4000,
        "critics.batch_size": 256,
        "gate.steps": 200,
        "evaluation.episodes": 5,
        "table.seeds": (0,),
        "table.gaussian.steps": 3000,
    },
    "standard": SMALL
    | {
        "network.width": 128,
        "base.steps": 6000,
        "skill.steps": 3000,
        "critics.steps": 15_000,
        "critics.batch_size": 256,
        "gate.steps": 300,
        "table.seeds": (0, 1, 2),
        "table.gaussian.steps": 20_000,
    },
    "paper": COMMON,
}


def job(preset: str = "quick") -> Job:
    """The job of one preset."""
    return Job().changed({"preset": preset} | lookup(PRESETS, preset, "preset"))


def get_config(preset: str = "quick") -> ConfigDict:
    """The same as a command's config."""
    return ConfigDict(asdict(job(preset)))
