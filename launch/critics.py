r"""Train critics of reward, safety and cost alone, to be shared by skills and gates.

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

from launch import options
from psec_jax.cli import no_arguments, run
from psec_jax.workflows import critics


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    requests = [critics.Request(**options.request(seed)) for seed in options.seeds()]
    results = critics.run(options.job(), *requests, **options.program())
    # Of several processes the first reports.
    for request, result in zip(requests, results, strict=bool(results)):
        kinds, fingerprint = " and ".join(result["kinds"]), result["fingerprint"]
        print(f"critics of {kinds} ({fingerprint}) are in {request.workdir}")


if __name__ == "__main__":
    run(main)
