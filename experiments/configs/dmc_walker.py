r"""DeepMind Control walker: stand is the base, walk and run are skills.

    python -m launch.pretrain --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/stand --library=runs/library

Presets (any field can be changed with --config.FIELD=VALUE):
  quick     minutes on 2 CPU cores; what `make demo` runs
  standard  what the committed tables were made with, an hour a seed on one CPU core
  paper     the paper's budgets: batch 2048, 1 M / 50 k / 1 k steps; wants a GPU or TPU
Expected returns of each preset are in README.md and docs/reproducing.md.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from psec_jax.errors import lookup
from psec_jax.workflows import Job

DEMO_METHODS = ("Base", "Scratch", "PSEC fixed", "PSEC", "Support", "PSEC + support")

# Skills of the two small presets differ from the paper's in what trials showed to
# matter (docs/reproducing.md): no dropout, a higher rate, in standard rank 16, not 8.
SMALL = {
    "skill.dropout": 0.0,
    "skill.learning_rate": 1e-3,
    "base.batch_size": 256,
    "gate.batch_size": 256,
    "table.cloning": {"steps": 200, "batch_size": 64},
}
PRESETS = {
    "quick": SMALL
    | {
        "base.steps": 5000,
        "base.ema": 5e-3,
        "skill.steps": 4000,
        "skill.batch_size": 128,
        "skill.ema": 5e-3,
        "gate.steps": 200,
        "evaluation.episodes": 10,
        "table.seeds": (0,),
        "table.tuning_episodes": 5,
        "table.methods": DEMO_METHODS,
    },
    "standard": SMALL
    | {
        "base.steps": 8000,
        "skill.rank": 16,
        "skill.steps": 12_000,
        "skill.batch_size": 256,
        "gate.steps": 500,
        "evaluation.episodes": 20,
        "table.seeds": (0, 1, 2),
    },
    "paper": {"base.episodes": 1000},
}


def job(preset: str = "quick") -> Job:
    """The job of one preset."""
    return Job().changed({"preset": preset} | lookup(PRESETS, preset, "preset"))


def get_config(preset: str = "quick") -> ConfigDict:
    """The same as a command's config."""
    return ConfigDict(asdict(job(preset)))
