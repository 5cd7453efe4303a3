r"""Learn one new skill from a few demonstrations; the library's base stays frozen.

    python -m launch.expand --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/walk --library=runs/library --name=walk \
        --env=dm_control:walker-walk

    # from your own file, with 20 of its trajectories and rank 16
    python -m launch.expand --workdir=runs/kick --library=runs/library --name=kick \
        --data=kick.hdf5 --env=dm_control:walker-walk \
        --config.skill.episodes=20 --config.skill.rank=16

    # from rewards and costs: two skills and their critics in one program
    python -m launch.expand --config=experiments/configs/dsrl.py:quick \
        --objective=reward,safety --name=reward,safety \
        --workdir=runs/skills --library=runs/library --data=OfflineBallRun-v0

A skill is a small LoRA pytree, learned from the first config.skill.episodes
trajectories of the data, with --best from those of highest return; 0 takes all of them.
The objective says what a transition weighs: bc (all the same), reward (its advantage),
safety (its advantage in keeping costs away) or fisor (both). The same command resumes.
Next: launch.compose makes a gate that says when the skill acts.
"""

from collections.abc import Sequence

from absl import flags

from experiments import stages
from launch import options
from launch.cli import no_arguments, run

NAME = flags.DEFINE_list(
    "name", None, "Name of the skill; of several objectives one each.", required=True
)
OBJECTIVE = flags.DEFINE_list(
    "objective",
    None,
    "bc, reward, safety or fisor, or several, separated by commas: a skill each; "
    "default config.skill.objective.",
)
CRITICS = flags.DEFINE_string(
    "critics",
    None,
    "Folder of a finished run whose critics are used as they are; default trains "
    "critics in the same program where the objective needs them.",
)


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    config = options.CONFIG.value
    if OBJECTIVE.value is not None:
        stages.check_config(config, "skill", options.EVALUATE.value)
        config.skill.objective = ",".join(OBJECTIVE.value)
    result = stages.expand(
        config,
        workdir=options.WORKDIR.value,
        library=options.LIBRARY.value,
        seed=options.SEED.value,
        name=NAME.value,
        env=options.ENV.value,
        data=options.data(),
        selection=options.selection(),
        critics=CRITICS.value,
        evaluate_after=options.EVALUATE.value,
    )
    several = len(NAME.value) > 1
    for name in NAME.value:
        one = result | {"returns": result["returns"][name]} if several else result
        print(stages.describe(f"skill {name!r}", one))


if __name__ == "__main__":
    run(main)
