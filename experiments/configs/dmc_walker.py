r"""DeepMind Control walker: stand is the base, walk and run are skills.

    python -m launch.pretrain --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/stand --library=runs/library

Presets (any field can be changed with --config.FIELD=VALUE):
  quick     minutes on 2 CPU cores; what `make demo` runs
  standard  what the committed tables were made with, an hour a seed on one CPU core
  paper     the paper's budgets: batch 2048, 1 M / 50 k / 1 k steps; wants a GPU or TPU
Expected returns of each preset are in README.md and docs/reproducing.md.
"""

from ml_collections import ConfigDict

from psec_jax.errors import lookup

DEMO_METHODS = ("Base", "Scratch", "PSEC fixed", "PSEC", "Support", "PSEC + support")
ALL_METHODS = (
    "Base",
    "Scratch",
    "ASEC",
    "NSEC",
    "PSEC (MLP)",
    "PSEC",
    "ASEC fixed",
    "NSEC fixed",
    "PSEC fixed",
    "Support",
    "Support (learned)",
    "PSEC + support",
)

# Skills of the two small presets differ from the paper's in what trials showed to
# matter (docs/reproducing.md): no dropout, a higher rate, in standard rank 16, not 8.
QUICK = {
    "base": {"steps": 5000, "batch_size": 256, "ema": 5e-3},
    "skill": {
        "steps": 4000,
        "batch_size": 128,
        "dropout": 0.0,
        "learning_rate": 1e-3,
        "ema": 5e-3,
    },
    "gate": {"steps": 200, "batch_size": 256},
    "evaluation": {"episodes": 10},
    "table": {"seeds": (0,), "tuning_episodes": 5, "methods": DEMO_METHODS},
}
STANDARD = {
    "base": {"steps": 8000, "batch_size": 256},
    "skill": {
        "rank": 16,
        "steps": 12_000,
        "batch_size": 256,
        "dropout": 0.0,
        "learning_rate": 1e-3,
    },
    "gate": {"steps": 500, "batch_size": 256},
    "evaluation": {"episodes": 20},
    "table": {"seeds": (0, 1, 2), "tuning_episodes": 10, "methods": ALL_METHODS},
}
PAPER = {
    "base": {"episodes": 1000, "steps": 1_000_000, "batch_size": 2048},
    "skill": {"steps": 50_000, "batch_size": 2048},
    "gate": {"steps": 1000, "batch_size": 2048},
    "evaluation": {"episodes": 30},
    "table": {
        "seeds": (0, 1, 2, 3, 4),
        "tuning_episodes": 10,
        "methods": ALL_METHODS,
        "cloning": {"steps": 1000, "batch_size": 2048},
    },
}
PRESETS = {"quick": QUICK, "standard": STANDARD, "paper": PAPER}


def get_config(preset: str = "quick") -> ConfigDict:
    """The resolved config of one preset."""
    sizes = lookup(PRESETS, preset, "preset")
    config = ConfigDict(
        {
            "preset": preset,
            # Observations are scaled by the base's data; std_floor is the least scale.
            "normaliser": "standard",
            "std_floor": 0.1,
            "network": {
                "width": 256,
                "blocks": 3,
                "expansion": 4,
                "time_features": 64,
                "time_width": 128,
                "activation": "mish",
                "compat": "paper",
                "matmul_dtype": "float32",
            },
            "diffusion": {
                "steps": 5,
                "schedule": "vp",
                "sampler": "ddpm",
                "sampling_steps": 0,
                "temperature": 1.0,
                "start_scale": 1.0,
                "clip": True,
            },
            # What is collected where --data names no file.
            "data": {
                "policy": "expert",
                "action_noise": 0.0,
                "clip_actions": False,
                "seeds": {
                    "dm_control:walker-stand": 0,
                    "dm_control:walker-walk": 1,
                    "dm_control:walker-run": 2,
                },
            },
            "base": {
                "env": "dm_control:walker-stand",
                "episodes": 100,
                "dropout": 0.1,
                "steps": 0,
                "batch_size": 0,
                "learning_rate": 3e-4,
                "weight_decay": 1e-4,
                "ema": 1e-3,
            },
            "skill": {
                "env": "dm_control:walker-walk",
                "episodes": 10,
                "objective": "bc",
                "adapter": "lora",
                "rank": 8,
                "alpha": 16.0,
                "dropout": 0.1,
                "steps": 0,
                "batch_size": 0,
                "learning_rate": 3e-4,
                "weight_decay": 1e-4,
                "ema": 1e-3,
            },
            # loss "auto": diffusion at the parameter level, cloning at the others, as
            # in the paper and its code. start: weights the head starts from.
            "gate": {
                "level": "parameter",
                "head": "linear",
                "support": "none",
                "priority": True,
                "widths": (256, 256),
                "top_k": 1,
                "loss": "auto",
                "compat": "paper",
                "start": "strength",
                "steps": 0,
                "batch_size": 0,
                "learning_rate": 3e-4,
            },
            "support": {
                "quantile": 0.98,
                "max_demos": 20_000,
                "queries": 60_000,
                "steps": 3000,
                "batch_size": 512,
                "learning_rate": 1e-3,
                "expectile": 0.97,
            },
            "evaluation": {"episodes": 0, "seed": 10_000},
            "run": {"log_every": 500, "save_every": 2000, "steps_per_call": 1},
            # cloning: changes for gates trained through the sampler, which costs some
            # ten times a diffusion step.
            "table": {
                "seeds": (),
                "tuning_episodes": 0,
                "methods": (),
                "cloning": {"steps": 200, "batch_size": 64},
            },
        }
    )
    config.update(sizes)
    return config
