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

from experiments import programs, stages
from launch import options
from psec_jax.cli import no_arguments, run


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    env, data, members = options.env(), options.data(), options.members()
    works = {
        member.name: stages.train_critics.work(
            options.CONFIG.value,
            workdir=member.place(options.WORKDIR.value),
            library=member.place(options.LIBRARY.value),
            seed=member.seed,
            env=env,
            data=data,
            selection=options.selection(),
        )
        for member in members
    }
    results = programs.together(works, options.MESH.value, options.STREAM.value)
    for member in members:
        if member.name not in results:  # told by the first of several processes
            continue
        result = results[member.name]
        kinds, fingerprint = " and ".join(result["kinds"]), result["fingerprint"]
        folder = member.place(options.WORKDIR.value)
        print(f"critics of {kinds} ({fingerprint}) are in {folder}")


if __name__ == "__main__":
    run(main)
