r"""Many tasks, one after the other: budgets of `experiments.continual`.

    python -m experiments.continual --sequence=cw10 --preset=standard

Presets:
  quick     a try of minutes a task on one CPU core
  standard  what committed tables are made with
  paper     the paper's budgets; wants a GPU or TPU
docs/continual.md says how to plan the hours.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from psec_jax.errors import lookup
from psec_jax.workflows import Job

# The departures from the paper that the walker has too (configs/dmc_walker.py).
SMALL = {
    "base.batch_size": 256,
    "base.ema": 5e-3,
    "skill.dropout": 0.0,
    "skill.learning_rate": 1e-3,
    "skill.rank": 16,
    "skill.batch_size": 256,
    "skill.ema": 5e-3,
    "gate.batch_size": 256,
    "table.cloning": {"steps": 200, "batch_size": 64},
    "base.episodes": 20,
    "skill.episodes": 20,
    "evaluation.episodes": 20,
}
PRESETS = {
    "quick": SMALL
    | {
        "base.steps": 4000,
        "skill.steps": 2000,
        "gate.steps": 200,
        "base.episodes": 10,
        "evaluation.episodes": 10,
        "table.seeds": (0,),
        "table.methods": ("Scratch", "Fine-tuning", "LoRA", "PSEC", "Nearest"),
    },
    "standard": SMALL
    | {
        "base.steps": 6000,
        "skill.steps": 3000,
        "gate.steps": 300,
        "table.seeds": (0, 1, 2),
    },
    "paper": {"base.episodes": 100, "skill.episodes": 50},
}


def job(preset: str = "quick") -> Job:
    """The job of one preset."""
    return Job().changed({"preset": preset} | lookup(PRESETS, preset, "preset"))


def get_config(preset: str = "quick") -> ConfigDict:
    """The same as a command's config."""
    return ConfigDict(asdict(job(preset)))
