"""Compose a base and a skill with weights of your own, and act.

    python examples/own_data.py runs/own
    python examples/compose_and_act.py runs/own

A policy is one call, observations in and actions out. alpha is the weight of the skill:
at 0 the base acts, at the skill's own strength the skill does, and in between the point
goes between right and up.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, compose

STEP = 0.1  # as in own_data.py


def roll_out(policy: Policy, count: int = 20, length: int = 20) -> np.ndarray:
    """Where the policy moves `count` points in `length` steps, on average: [2]."""
    obs = start = np.random.default_rng(2).uniform(-0.5, 0.5, (count, 2))
    for step in range(length):
        keys = jax.random.split(jax.random.key(step), count)
        obs = obs + STEP * np.asarray(policy.act(keys, obs.astype(np.float32)))
    return (obs - start).mean(axis=0)


def main(folder: Path) -> dict[float, np.ndarray]:
    """Print, for several weights of the skill, where the point goes; returns that."""
    library = folder / "library"
    _, card = SkillLibrary.open(library).load_skill("up")
    strength = card["alpha"]  # the weight that it was trained at
    moves = {0.0: roll_out(compose(library))}
    for part in (0.5, 1.0):
        policy = compose(library, ["up"], alpha=[part * strength])
        moves[part] = roll_out(policy)
    for part, (right, up) in moves.items():
        print(f"alpha {part * strength:4.1f}: right {right:5.2f}, up {up:5.2f}")
    return moves


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own"))
