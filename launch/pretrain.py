r"""Train a base policy on demonstrations and put it into a skill library.

    python -m launch.pretrain --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/stand --library=runs/library

    # your own data and environment
    python -m launch.pretrain --workdir=runs/cheetah --library=runs/cheetah_library \
        --data=cheetah.hdf5 --env=gymnasium:HalfCheetah-v5 --config.base.episodes=0

The base is a diffusion policy trained by behaviour cloning on the first
config.base.episodes trajectories of the data, with --best on those of highest return; 0
takes all of them. Stop it at any time: the same command resumes where it was. Next:
launch.expand learns a skill on top of it.
"""

from collections.abc import Sequence

from absl import flags

from experiments import stages
from launch import options
from launch.cli import no_arguments, run

NAME = flags.DEFINE_string("name", "base", "Name of the base on its card.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    result = stages.pretrain(
        options.CONFIG.value,
        workdir=options.WORKDIR.value,
        library=options.LIBRARY.value,
        seed=options.SEED.value,
        env=options.ENV.value,
        data=options.DATA.value,
        selection=options.selection(),
        name=NAME.value,
        evaluate_after=options.EVALUATE.value,
    )
    print(stages.describe(f"base {NAME.value!r}", result))


if __name__ == "__main__":
    run(main)
