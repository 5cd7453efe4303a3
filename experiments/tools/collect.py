r"""Roll a policy out in a real simulator and keep the transitions.

    python -m experiments.tools.collect --env=dm_control:walker-walk --policy=expert \
        --episodes=10 --seed=0

    python -m experiments.tools.collect --env=metaworld:push-v3 --policy=scripted \
        --action_noise=0.1 --episodes=20

writes one HDF5 file in the D4RL layout into `$PSEC_DATA_DIR` (or --out) and prints a
line with its path and the returns. The same arguments give the same content whatever
the number of processes: an episode depends on the seed and its own number only. Use
different seeds for different tasks, or their initial poses coincide.
"""

from collections.abc import Sequence

from psec_jax import envs
from psec_jax.cli import (
    define_env,
    define_shift,
    flags_of,
    no_arguments,
    run,
    values_of,
)
from psec_jax.data import d4rl
from psec_jax.evaluation import successes
from psec_jax.workflows.collection import collect


def main(argv: Sequence[str]) -> None:
    """Collect as the flags say, and print one line about the file."""
    no_arguments(argv)
    given = values_of(FLAGS)
    env = envs.shifted(given.pop("env"), *given.pop("shift"))
    path = collect(env, **given)
    _, attrs = d4rl.load(path)
    returns = attrs["returns"]
    print(
        f"{path}: {len(returns)} episode{'s' * (len(returns) != 1)}, "
        f"return mean {returns.mean():.1f} "
        f"min {returns.min():.1f} max {returns.max():.1f}"
        f"{successes(attrs.get('success'))}"
    )


if __name__ == "__main__":
    FLAGS = flags_of(
        collect,
        {"env": define_env(), "shift": define_shift()},
        policy="expert",
        episodes=10,
        seed=0,
    )
    run(main)
