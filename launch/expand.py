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

    # a new skill only if the library's cannot do it: else a gate over them, or nothing
    python -m launch.expand --auto --workdir=runs/jog --library=runs/library \
        --name=jog --data=jog.hdf5

A skill is a small LoRA pytree, learned from the first config.skill.episodes
trajectories of the data, with --best from those of highest return; 0 takes all of them.
The objective says what a transition weighs: bc (all the same), reward (its advantage),
safety (its advantage in keeping costs away) or fisor (both); dql adds a term that moves
the policy to actions of high Q. The same command resumes.

--auto first compares, on demonstrations held out, the base, each skill, a gate over all
of them and new skills of the ranks config.auto.ranks, each trained for
config.auto.steps. It prints the table and adds what does it with the fewest new
numbers, by the rule in docs/library.md; the entry's card has the table.
Next: launch.compose makes a gate that says when the skill acts.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import options
from psec_jax.cli import no_arguments, run
from psec_jax.errors import InputError
from psec_jax.losses import OBJECTIVES
from psec_jax.workflows import Job, auto, skill

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
    f"One of {', '.join(OBJECTIVES)}, or several, separated by commas: a skill each; "
    "default config.skill.objective.",
)
CRITICS = flags.DEFINE_string(
    "critics",
    None,
    "Folder of a finished run whose critics are used as they are; default trains "
    "critics in the same program where the objective needs them.",
)
AUTO = flags.DEFINE_bool(
    "auto", False, "Add a skill only if those in the library cannot do it."
)
SKILLS = flags.DEFINE_list(
    "skills",
    None,
    "auto: the skills that are tried before a new one; default all of the library.",
)
SUPPORT_DATA = flags.DEFINE_list(
    "support_data",
    [],
    "auto: demonstrations of each of these skills; by default those of their cards are "
    "collected again.",
)
BASE_DATA = flags.DEFINE_string(
    "base_data", None, "auto: the base's demonstrations; default as of the skills."
)


def tasks(objectives: int) -> list[dict[str, Any]]:
    """What each run learns: one, or one for every name that has data of its own.

    Returns:
      Of each run the fields of its request that differ from the others'.
    """
    names = NAME.value
    if len(names) == 1 or objectives > 1:
        return [{"name": names}]
    parts = {
        flag.name: flag.value.split(",")
        for flag in (options.ENV, options.DATA)
        if flag.value
    }
    for flag, values in parts.items():
        if len(values) not in (1, len(names)):
            raise InputError(
                f"--{flag}: got {len(values)} for {len(names)} names, expected one for "
                "each"
            )
    if all(len(values) == 1 for values in parts.values()):
        raise InputError(
            f"--name: got {len(names)} for one objective, expected as many --data or "
            "--env"
        )
    if len(set(names)) < len(names):
        raise InputError(f"--name: got {','.join(names)}, expected different ones")
    parse = {"env": options.shifted, "data": options.located}
    each = {
        flag: [parse[flag](value) for value in values] * (len(names) // len(values))
        for flag, values in parts.items()
    }
    return [
        {"name": name} | {flag: values[i] for flag, values in each.items()}
        for i, name in enumerate(names)
    ]


def decide(job: Job) -> None:
    """Of each seed: add what does it, and say why."""
    for seed in options.seeds():
        result = auto.run(
            job,
            auto.Request(
                **options.request(seed),
                name=NAME.value[0] if len(NAME.value) == 1 else NAME.value,
                objectives=OBJECTIVE.value or (),
                critics=seed.within_any(CRITICS.value),
                evaluate=options.EVALUATE.value,
                skills=SKILLS.value,
                support_data=[options.located(name) for name in SUPPORT_DATA.value],
                base_data=options.located(BASE_DATA.value) if BASE_DATA.value else None,
            ),
        )
        print(auto.table_of(result["decision"]))
        if result["kind"] is None:
            print(f"{seed.name} the base does it: nothing was added".strip())
        else:
            print(options.finished(f"{result['kind']} {NAME.value[0]!r}", result))


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    job = options.job()
    if AUTO.value:
        decide(job)
        return
    only = {"skills": SKILLS, "support_data": SUPPORT_DATA, "base_data": BASE_DATA}
    for name, flag in only.items():
        if flag.value:
            raise InputError(f"--{name}: got {flag.value}, which --auto alone reads")
    objectives = OBJECTIVE.value or job.skill.objective.split(",")
    found = tasks(len(objectives))
    requests = []
    for seed, task in itertools.product(options.seeds(), found):
        fields = options.request(seed, own=task)
        if len(found) > 1:
            fields["workdir"] /= task["name"]
            fields["label"] = f"{seed.name} {task['name']}".strip()
        requests.append(
            skill.Request(
                **fields,
                objectives=objectives,
                critics=seed.within_any(CRITICS.value),
                evaluate=options.EVALUATE.value,
            )
        )
    results = skill.run(job, *requests, **options.program())
    # Of several processes the first reports.
    for request, result in zip(requests, results, strict=bool(results)):
        names = [request.name] if isinstance(request.name, str) else request.name
        several = len(names) > 1
        for name in names:
            one = result | {"returns": result["returns"][name]} if several else result
            print(options.finished(f"skill {name!r}", one))


if __name__ == "__main__":
    run(main)
