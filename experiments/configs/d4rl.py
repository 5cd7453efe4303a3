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

from ml_collections import ConfigDict

from experiments.configs import dsrl
from psec_jax.errors import lookup

QUICK = {
    "base": {"steps": 3000, "batch_size": 128},
    "skill": {"steps": 1000, "batch_size": 128},
    "gate": {"steps": 200, "batch_size": 128},
    "evaluation": {"episodes": 5},
    "table": {"seeds": (0,), "gaussian": {"steps": 3000}},
}
STANDARD = {
    "network": {"width": 128},
    "base": {"steps": 6000, "batch_size": 128},
    "skill": {"steps": 3000, "batch_size": 128},
    "gate": {"steps": 300, "batch_size": 128},
    "evaluation": {"episodes": 10},
    "table": {"seeds": (0, 1, 2), "gaussian": {"steps": 20_000}},
}
PAPER = {
    "base": {"steps": 1_000_000, "batch_size": 2048, "ema": 1e-3},
    "skill": {"steps": 50_000, "batch_size": 2048, "dropout": 0.1, "ema": 1e-3},
    "gate": {"steps": 1000, "batch_size": 2048},
    "evaluation": {"episodes": 10},
    "table": {"seeds": (0, 1, 2, 3, 4), "gaussian": {"steps": 1_000_000}},
}
PRESETS = {"quick": QUICK, "standard": STANDARD, "paper": PAPER}
ENV = "gymnasium:HalfCheetah-v5"


def get_config(preset: str = "quick") -> ConfigDict:
    """The resolved config of one preset."""
    sizes = lookup(PRESETS, preset, "preset")
    config = dsrl.get_config(preset)
    del config.table
    config.update(
        {
            "base": {"env": ENV, "ema": 5e-3},
            "skill": {"env": ENV, "objective": "reward", "dropout": 0.0, "ema": 5e-3},
            "gate": {"learning_rate": 3e-4},
            # Costs are not learned from: there are none. reward_scale: factor of
            # rewards, 0 for longest episode / (highest - lowest return) of the
            # transitions given. Of a small target set that is a matter of luck, so
            # dynamics_shift sets it by the returns that scores are told by.
            "critics": {"safety": False, "reward_scale": 0.0},
            # Of experiments.dynamics_shift. transitions: of a target set, the paper's.
            # gaussian: the actors and critics of BC and IQL, which are small.
            "table": {
                "seeds": (),
                "transitions": 10_000,
                "gaussian": {
                    "steps": 0,
                    "batch_size": 256,
                    "learning_rate": 3e-4,
                    "reward_temperature": 3.0,
                },
            },
        }
    )
    config.update(sizes)
    return config
