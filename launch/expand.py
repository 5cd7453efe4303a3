r"""Learn one new skill from a few demonstrations; the library's base stays frozen.

    python -m launch.expand --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/walk --library=runs/library --name=walk \
        --env=dm_control:walker-walk

    # from your own file, with 20 of its trajectories and rank 16
    python -m launch.expand --workdir=runs/kick --library=runs/library --name=kick \
        --data=kick.hdf5 --env=dm_control:walker-walk \
        --config.skill.episodes=20 --config.skill.rank=16

A skill is a small LoRA pytree, learned from the first config.skill.episodes
trajectories of the data, with --best from those of highest return; 0 takes all of them.
The same command resumes. Next: launch.compose makes a gate that says when the skill
acts.
"""

from collections.abc import Sequence

from absl import flags

from experiments import stages
from launch import options
from launch.cli import no_arguments, run

NAME = flags.DEFINE_string("name", None, "Name of the skill.", required=True)


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    result = stages.expand(
        options.CONFIG.value,
        workdir=options.WORKDIR.value,
        library=options.LIBRARY.value,
        seed=options.SEED.value,
        name=NAME.value,
        env=options.ENV.value,
        data=options.DATA.value,
        selection=options.selection(),
        evaluate_after=options.EVALUATE.value,
    )
    print(stages.describe(f"skill {NAME.value!r}", result))


if __name__ == "__main__":
    run(main)
