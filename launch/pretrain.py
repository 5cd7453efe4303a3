r"""Train a base policy on demonstrations and put it into a skill library.

    python -m launch.pretrain --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/stand --library=runs/library

    # your own data and environment
    python -m launch.pretrain --workdir=runs/cheetah --library=runs/cheetah_library \
        --data=cheetah.hdf5 --env=gymnasium:HalfCheetah-v5 --config.base.episodes=0

    # baselines on a set with costs: BC-Safe, and FISOR with its critics
    python -m launch.pretrain --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/safe --library=runs/safe_library --data=OfflineBallRun-v0 \
        --max_cost=10
    python -m launch.pretrain --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/fisor --library=runs/fisor_library --data=OfflineBallRun-v0 \
        --objective=fisor

    # fine-tuning of another library's base
    python -m launch.pretrain --workdir=runs/tuned --library=runs/tuned_library \
        --start=runs/library --data=more.hdf5 --env=gymnasium:HalfCheetah-v5 \
        --config.base.episodes=0

    # five seeds as one program: runs/stand/seed0 ..., runs/library/seed0 ...
    python -m launch.pretrain --seeds=0,1,2,3,4 --workdir=runs/stand \
        --library=runs/library

The base is a diffusion policy trained by behaviour cloning on the first
config.base.episodes trajectories of the data, with --best on those of highest return; 0
takes all of them. Stop it at any time: the same command resumes where it was. Next:
launch.expand learns a skill on top of it.
"""

from collections.abc import Sequence

from absl import flags

from launch import options
from psec_jax.cli import no_arguments, run
from psec_jax.losses import OBJECTIVES
from psec_jax.workflows import base

OBJECTIVE = flags.DEFINE_string(
    "objective",
    "bc",
    f"One of {', '.join(OBJECTIVES)}: what transitions weigh; all but bc read critics.",
)
NAME = flags.DEFINE_string("name", "base", "Name of the base on its card.")
CRITICS = flags.DEFINE_string(
    "critics",
    None,
    "Folder of a finished run whose critics are used as they are; default trains "
    "critics in the same program where the objective needs them.",
)
START = flags.DEFINE_string(
    "start",
    None,
    "Folder of a library whose base is trained on, in all of its parameters, into a "
    "library of its own; default starts afresh.",
)


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    requests = [
        base.Request(
            **options.request(seed),
            name=NAME.value,
            objective=OBJECTIVE.value,
            critics=seed.within_any(CRITICS.value),
            start=seed.within_any(START.value),
            evaluate=options.EVALUATE.value,
        )
        for seed in options.seeds()
    ]
    for result in base.run(options.job(), *requests, **options.program()):
        print(options.finished(f"base {NAME.value!r}", result))


if __name__ == "__main__":
    run(main)
