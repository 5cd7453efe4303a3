r"""Compare the returns of MJX, on the device, with dm_control's.

    python -m experiments.tools.check_mjx --env=mjx:walker-walk --policy=expert

plays the same episodes in both: first states, noise and policy are the same, so that
the returns of an episode differ by the rounding of float32 and what grows of it. Prints
the mean of either, their paired difference with its 95 % interval and the time of both,
and ends with code 1 unless the whole interval is within --tolerance. --out keeps the
raw returns. On a CPU this takes long: an accelerator is what MJX is for.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments.intervals import interval
from psec_jax import envs
from psec_jax.cli import no_arguments, run, values_of
from psec_jax.data import dataset
from psec_jax.errors import InputError
from psec_jax.files import make_room, write_json
from psec_jax.runtime.run import versions
from psec_jax.workflows.collection import Actor, play, simulate


def main(argv: Sequence[str]) -> None:
    """Play, compare, print, save."""
    no_arguments(argv)
    given = values_of(FLAGS)
    out, tolerance = given.pop("out"), given.pop("tolerance")
    env, policy, episodes = given["env"], given["policy"], given["episodes"]
    if episodes < 1 or envs.make_on_device(env) is None:
        raise InputError(
            f"{episodes} episodes in {env}, expected 1 or more in mjx:NAME"
        )
    if out:
        make_room(out)
    other = env.replace("mjx:", "dm_control:", 1)
    players = {
        other: lambda: [
            played.dataset
            for played in play(other, [Actor(policy)] * episodes, given["seed"])
        ],
        env: lambda: simulate(env, policy, 0.0, episodes, given["seed"]),
    }
    returns = {}
    for name, player in players.items():
        began = time.perf_counter()
        returns[name] = np.array([dataset.episode_returns(p)[0] for p in player()])
        seconds = time.perf_counter() - began
        print(
            f"{name}: return mean {returns[name].mean():.2f}, standard deviation "
            f"{returns[name].std():.2f}, {seconds:.0f} s"
        )
    difference = returns[env] - returns[other]
    low, high = interval(difference[None])
    agrees = -tolerance <= low <= high <= tolerance
    print(
        f"difference {difference.mean():.2f} [{low:.2f}, {high:.2f}], "
        f"{'' if agrees else 'NOT '}within {tolerance:g}; of one episode "
        f"{np.median(np.abs(difference)):.2f} (median), {np.abs(difference).max():.2f} "
        "(most)"
    )
    if out:
        raw = {name: values.tolist() for name, values in returns.items()}
        write_json(out, given | {"returns": raw, "versions": versions()})
    if not agrees:
        sys.exit(1)


if __name__ == "__main__":
    FLAGS = {
        "env": flags.DEFINE_string("env", "mjx:walker-walk", "mjx:DOMAIN-TASK."),
        "policy": flags.DEFINE_string(
            "policy", "expert", "expert, medium, random or an expert file (.npz)."
        ),
        "episodes": flags.DEFINE_integer("episodes", 100, "Whole episodes."),
        "seed": flags.DEFINE_integer("seed", 0, "Of first states and noise."),
        "tolerance": flags.DEFINE_float(
            "tolerance", 30.0, "Bound of the difference of mean returns (of 1000)."
        ),
        "out": flags.DEFINE_string("out", None, "JSON file of the raw returns."),
    }
    run(main)
