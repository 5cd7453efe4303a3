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

    # two skills, each from its own demonstrations, in one program: runs/both/walk ...
    python -m launch.expand --workdir=runs/both --library=runs/library \
        --name=walk,run --env=dm_control:walker-walk,dm_control:walker-run

A skill is a small LoRA pytree, learned from the first config.skill.episodes
trajectories of the data, with --best from those of highest return; 0 takes all of them.
The objective says what a transition weighs: bc (all the same), reward (its advantage),
safety (its advantage in keeping costs away) or fisor (both). The same command resumes.
Next: launch.compose makes a gate that says when the skill acts.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from experiments import programs, stages
from launch import options
from psec_jax.cli import no_arguments, run
from psec_jax.errors import InputError

NAME = flags.DEFINE_list(
    "name",
    None,
    "Name of the skill; of several objectives one each. Several names with one "
    "objective: a skill from each of as many --data or --env, separated by commas, its "
    "run in the folder of its name in --workdir.",
    required=True,
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


class Task(NamedTuple):
    """What one run of the command learns.

    Attributes:
      names: of its skills.
      env: their simulator.
      data: their demonstrations.
      folder: in the run's folder; "" where there is one run.
    """

    names: list[str]
    env: str | None
    data: str | None
    folder: str = ""


def tasks(objectives: Sequence[str]) -> list[Task]:
    """One task, or one for every name where each has its own data or simulator."""
    names, envs, data = NAME.value, options.ENV.value, options.DATA.value
    if len(names) == 1 or len(objectives) > 1:
        return [Task(names, options.env(), options.data())]
    parts = {"env": envs and envs.split(","), "data": data and data.split(",")}
    for flag, values in parts.items():
        if values and len(values) not in (1, len(names)):
            raise InputError(
                f"--{flag}: got {len(values)} for {len(names)} names, expected one for "
                "each"
            )
    if max(len(values or ()) for values in parts.values()) < 2:
        raise InputError(
            f"--name: got {len(names)} for one objective, expected as many --data or "
            "--env"
        )
    if len(set(names)) < len(names):
        raise InputError(f"--name: got {','.join(names)}, expected different ones")
    each = {flag: _each(values, len(names)) for flag, values in parts.items()}
    return [
        Task([name], options.shifted(env), data and options.located(data), name)
        for name, env, data in zip(names, each["env"], each["data"], strict=True)
    ]


def _each(values: list[str] | None, count: int) -> list[str | None]:
    """As many values as names."""
    values = values or [None]
    return values if len(values) == count else values * count


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    config = options.CONFIG.value
    stages.check_config(config, "skill", options.EVALUATE.value)
    if OBJECTIVE.value is not None:
        config.skill.objective = ",".join(OBJECTIVE.value)
    found = tasks(str(config.skill.objective).split(","))
    works, names = {}, {}
    for member, task in itertools.product(options.members(), found):
        label = " ".join(filter(None, (member.name, task.folder)))
        names[label] = task.names
        works[label] = stages.expand.work(
            config,
            workdir=member.place(options.WORKDIR.value) / task.folder,
            library=member.place(options.LIBRARY.value),
            seed=member.seed,
            name=task.names,
            env=task.env,
            data=task.data,
            selection=options.selection(),
            critics=member.place(CRITICS.value),
            evaluate_after=options.EVALUATE.value,
        )
    for label, result in programs.together(
        works, options.MESH.value, options.STREAM.value
    ).items():
        several = len(names[label]) > 1
        for name in names[label]:
            one = result | {"returns": result["returns"][name]} if several else result
            print(stages.describe(f"skill {name!r}", one))


if __name__ == "__main__":
    run(main)
