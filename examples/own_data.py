"""Your own demonstrations: arrays, one HDF5 file each, then a base and a skill.

    python examples/own_data.py runs/own

The demonstrations here are of a point in the plane: those of the base move it to the
right, those of the skill upwards. Put your own arrays into `demonstrations`; no
simulator is needed. Some 30 seconds of a CPU. Next: examples/compose_and_act.py.
"""

import sys
from pathlib import Path

import numpy as np

from psec_jax.data import d4rl
from psec_jax.types import Dataset
from psec_jax.workflows import Job, base, skill

RIGHT, UP = (1.0, 0.0), (0.0, 1.0)
STEP = 0.1  # how far an action of length 1 moves the point


def demonstrations(direction: tuple[float, float], seed: int) -> Dataset:
    """Forty trajectories of twenty steps in one direction, with a little noise."""
    rng, count, length = np.random.default_rng(seed), 40, 20
    action = 0.8 * np.array(direction) + 0.05 * rng.normal(size=(count, length, 2))
    start = rng.uniform(-1, 1, size=(count, 1, 2))
    moved = start + STEP * np.cumsum(action, axis=1)
    obs = np.concatenate([start, moved[:, :-1]], axis=1)
    rows = count * length
    return Dataset(
        obs=obs.reshape(rows, 2).astype(np.float32),
        action=action.reshape(rows, 2).astype(np.float32),  # within [-1, 1]
        reward=np.zeros(rows, np.float32),
        cost=np.zeros(rows, np.float32),
        next_obs=moved.reshape(rows, 2).astype(np.float32),
        terminal=np.zeros(rows, bool),
        timeout=np.arange(1, rows + 1) % length == 0,
    )


def main(folder: Path, steps: int = 1000) -> None:
    """Write the demonstrations, train a base and a skill, and print their losses."""
    folder.mkdir(parents=True, exist_ok=True)
    d4rl.save(folder / "right.hdf5", demonstrations(RIGHT, 0), {})
    d4rl.save(folder / "up.hdf5", demonstrations(UP, 1), {})

    budget = {"steps": steps, "batch_size": 128, "learning_rate": 1e-3, "dropout": 0.0}
    changes = {
        f"{name}.{k}": v for name in ("base", "skill") for k, v in budget.items()
    }
    job = Job().changed(
        changes
        | {
            "network.width": 64,
            "network.blocks": 1,
            "base.ema": 1e-2,
            "skill.ema": 1e-2,
        }
        | {"base.episodes": 0, "skill.episodes": 0}  # every trajectory of the file
    )
    library = folder / "library"
    [learned] = base.run(
        job, base.Request(folder / "base", library, data=str(folder / "right.hdf5"))
    )
    print(f"base   loss {learned['summary']['loss/base']:.3f}")
    [learned] = skill.run(
        job, skill.Request(folder / "up", library, "up", data=str(folder / "up.hdf5"))
    )
    print(f"skill  loss {learned['summary']['loss/skill']:.3f}, in {library}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own"))
