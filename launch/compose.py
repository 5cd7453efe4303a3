r"""Make a gate alpha(s) over skills of a library, train its head, and add it.

    # the paper's gate over one skill
    python -m launch.compose --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/walk_gate --library=runs/library --name=walk-psec --skills=walk

    # a support gate on fixed strengths: no training
    python -m launch.compose --workdir=runs/walk_support --library=runs/library \
        --name=walk-support --skills=walk \
        --config.gate.head=constant --config.gate.support=neighbour

    # two skills, each as far as its own demonstrations reach
    python -m launch.compose --workdir=runs/both --library=runs/library --name=both \
        --skills=run,walk --alpha=16,16 --env=dm_control:walker-run \
        --config.gate.head=constant --config.gate.support=neighbour

    # skills from rewards and costs: a gate on the best of the safe trajectories
    python -m launch.compose --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/psec --library=runs/safe --name=psec --skills=safety,reward \
        --data=best

    # the same skills, critics choosing among weights and samples at every step; how
    # much a cost weighs is chosen from the data by the cost limit
    python -m launch.compose --config=experiments/configs/dsrl.py:quick \
        --workdir=runs/select --library=runs/safe --name=select \
        --skills=safety,reward --critics=runs/critics --data=OfflineBallRun-v0 \
        --config.gate.head=select

    # a skill more: the gate that there is, trained on over it too
    python -m launch.compose --config=experiments/configs/dmc_walker.py:quick \
        --workdir=runs/grown --library=runs/library --name=grown --start=walk-psec \
        --skills=walk,run --env=dm_control:walker-run

The weights are head times support, made of config.gate:
  level    parameter (the paper's), noise or action: where skills are added up
  head     linear (the paper's), softmax, sigmoid, topk or topp are learned; constant is
           not; with select critics choose at every step. topk keeps config.gate.top_k
           skills, topp the fewest whose shares add up to config.gate.top_p; for both it
           is printed how many are active on the demonstrations' states. The logits of
           softmax, topk and topp are divided by config.gate.temperature.
           config.gate.per_layer gives every layer weights of its own
  support  none (the paper's), neighbour or learned: 1 where a skill's demonstrations
           reach, and 0, which leaves the state to the base, where they do not; nearest:
           the skills of the nearest demonstrations act in every state, with shares
           that add up to 1
  loss     auto (the paper's), diffusion or cloning; critic or selected train the head
           by --critics, which are not needed to act
Skills are in order of priority: with a support, a skill gets what those before it left
over. A learned head is trained on the first config.skill.episodes trajectories of the
target's demonstrations, --data, 0 for all of them. The same command resumes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import options
from psec_jax.cli import floats, no_arguments, run
from psec_jax.data import dsrl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary, table
from psec_jax.workflows import Job, Selection, gate

NAME = flags.DEFINE_string("name", None, "Name of the gate.", required=True)
SKILLS = flags.DEFINE_list(
    "skills", None, "Names of skills, separated by commas.", required=True
)
ALPHA = flags.DEFINE_list(
    "alpha",
    None,
    "Weights the head starts from, one for each skill; at the noise and action levels "
    "the base's first. A constant head keeps them, and needs them for several skills. "
    "Default by config.gate.start.",
)
SUPPORT_DATA = flags.DEFINE_list(
    "support_data",
    [],
    "Demonstrations of each skill, for a support; by default those of their cards are "
    "collected again.",
)
BASE_DATA = flags.DEFINE_string(
    "base_data",
    None,
    "The base's demonstrations, for --config.gate.support=learned; by default those of "
    "its card are collected again.",
)
CRITICS = flags.DEFINE_string(
    "critics",
    None,
    "Directory of a finished run whose critics choose the weights (config.gate.head="
    "select) or train them (config.gate.loss=critic or selected).",
)


START = flags.DEFINE_string(
    "start",
    None,
    "Name of a gate of the library over the first of the skills, in their order, which "
    "is trained on over all of them: a new skill's weight is 0 at first, or too small "
    "to change anything. With a support those of the first skills are kept; default "
    "starts afresh.",
)


def target_data(job: Job) -> tuple[str | None, Selection]:
    """The target's demonstrations, and which of them.

    --data=best stands for the set of the DSRL task whose simulator the skills have, and
    for the best of its safe trajectories as the config says, where no flag says so.
    """
    selection = options.selection()
    if options.DATA.value != "best":
        return options.data(), selection
    best = Selection.best_of_safe(job)
    given = {k: v for k, v in selection._asdict().items() if v is not None}
    if "cost_quantile" in given:  # instead of the limit, within which there may be none
        best = best._replace(max_cost=None)
    env = options.env()
    if env is not None:
        return options.located(dsrl.task_in(env)), best._replace(**given)
    library = SkillLibrary.open(options.seeds()[0].within(options.LIBRARY.value))
    cards = [library.card("skill", name) for name in SKILLS.value]
    file = options.located(dsrl.task_in(str(cards[0].get("env"))))
    for card in cards:
        source = card.get("data", {}).get("source")
        if source not in (None, Path(file).name):
            raise InputError(
                f"--data=best: found {file}, but the skill {card['name']!r} was "
                f"learned from {source}; give the gate's set by --data=FILE, or --env"
            )
    return file, best._replace(**given)


def load_table(load: dict[str, Any]) -> str:
    """Lines about the skills that a gate keeps active; see `gate.load_of`."""
    skills = load["skills"]
    rows = [["weight", "active", "mean"]]
    for name, one in skills.items():
        rows.append([name, f"{one['active']:.1%}", f"{one['weight']:.3g}"])
    return (
        f"active on the {load['states']} states of the demonstrations: "
        f"{load['active']:.2f} of {len(skills)} weights, on average\n{table(rows)}"
    )


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    options.start()
    job = options.job()
    data, selection = target_data(job)
    base_data = options.located(BASE_DATA.value) if BASE_DATA.value else None
    requests = [
        gate.Request(
            **options.request(seed, own={"data": data, "selection": selection}),
            name=NAME.value,
            skills=SKILLS.value,
            support_data=[options.located(name) for name in SUPPORT_DATA.value],
            base_data=base_data,
            alpha=floats("alpha", ALPHA.value),
            critics=seed.within_any(CRITICS.value),
            start=START.value,
            evaluate=options.EVALUATE.value,
        )
        for seed in options.seeds()
    ]
    for result in gate.run(job, *requests, **options.program()):
        print(options.finished(f"gate {NAME.value!r}", result))
        if "load" in result:
            print(load_table(result["load"]))


if __name__ == "__main__":
    run(main)
