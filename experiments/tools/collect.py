r"""Roll a policy out in a real simulator and keep the transitions.

    python -m experiments.tools.collect --env=dm_control:walker-walk --policy=expert \
        --episodes=10 --seed=0

writes one HDF5 file in the D4RL layout into `$PSEC_DATA_DIR` (or --out) and prints a
line with its path and the returns. The same arguments give the same content whatever
the number of processes: an episode depends on the seed and its own number only. Use
different seeds for different tasks, or their initial poses coincide.
"""

from collections.abc import Sequence

from absl import flags

from psec_jax import envs
from psec_jax.cli import define_shift, no_arguments, run
from psec_jax.data import d4rl
from psec_jax.workflows.collection import collect


def main(argv: Sequence[str]) -> None:
    """Collect what the flags ask for, and print one line about it."""
    no_arguments(argv)
    given = {name: flag.value for name, flag in FLAGS.items()}
    env = envs.shifted(given.pop("env"), *given.pop("shift"))
    path = collect(env, **given)
    _, attrs = d4rl.load(path)
    returns = attrs["returns"]
    print(
        f"{path}: {len(returns)} episode{'s' * (len(returns) != 1)}, "
        f"return mean {returns.mean():.1f} "
        f"min {returns.min():.1f} max {returns.max():.1f}"
    )


def _define_flags() -> dict[str, flags.FlagHolder]:
    # Not at import: other commands import `collect`, and have flags of these names.
    return {
        "env": flags.DEFINE_string(
            "env", None, "dm_control:DOMAIN-TASK or gymnasium:ID.", required=True
        ),
        "shift": define_shift(),
        "policy": flags.DEFINE_string(
            "policy", "expert", "expert, medium, random, or an expert file (.npz)."
        ),
        "episodes": flags.DEFINE_integer("episodes", 10, "Whole episodes to collect."),
        "seed": flags.DEFINE_integer("seed", 0, "Sets initial states and noise."),
        "action_noise": flags.DEFINE_float(
            "action_noise", 0.0, "Standard deviation of Gaussian noise on every action."
        ),
        "workers": flags.DEFINE_integer(
            "workers", None, "Processes; by default one for every core."
        ),
        "out": flags.DEFINE_string(
            "out", None, "File to write; by default named by the arguments."
        ),
        "overwrite": flags.DEFINE_bool(
            "overwrite", False, "Collect again where the file is already there."
        ),
    }


if __name__ == "__main__":
    FLAGS = _define_flags()
    run(main)
