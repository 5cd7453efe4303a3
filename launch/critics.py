r"""Train critics of reward and safety alone, to be shared by skills.

    python -m launch.critics --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/ball/critics --library=runs/ball/library \
        --data=OfflineBallRun-v0
    python -m launch.expand --config=experiments/configs/dsrl.py:quick \
        --objective=safety --critics=runs/ball/critics --name=safety \
        --workdir=runs/ball/safety --library=runs/ball/library \
        --data=OfflineBallRun-v0

The critics stay in the run's folder. Without --critics, launch.expand trains critics in
the same program as the skills, as the paper does. The same command resumes.
"""

from collections.abc import Sequence

from experiments import stages
from launch import options
from launch.cli import no_arguments, run


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    result = stages.train_critics(
        options.CONFIG.value,
        workdir=options.WORKDIR.value,
        library=options.LIBRARY.value,
        seed=options.SEED.value,
        env=options.ENV.value,
        data=options.data(),
        selection=options.selection(),
    )
    kinds = " and ".join(result["kinds"])
    print(
        f"critics of {kinds} ({result['fingerprint']}) are in {options.WORKDIR.value}"
    )


if __name__ == "__main__":
    run(main)
