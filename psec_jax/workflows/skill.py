"""Skills: learned from demonstrations with the library's base frozen."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from psec_jax import envs
from psec_jax.agents.cloning import AdapterConfig, CloningConfig
from psec_jax.agents.critics import reads_costs
from psec_jax.data.recording import box_of_card, check_box
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.policy import (
    check_critics,
    compose,
    load_base,
    network_config,
    process_config,
)
from psec_jax.runtime import processes
from psec_jax.runtime.run import versions
from psec_jax.workflows import actor, critics, multirun
from psec_jax.workflows.config import Job, part
from psec_jax.workflows.demonstrations import (
    FIRST,
    Load,
    Selection,
    Wanted,
    check_fit,
    check_robot,
    environment_of,
    loader,
)
from psec_jax.workflows.multirun import Plan, Published, Trained


@dataclass(frozen=True)
class Request:
    """A skill to be learned, or one for each of several objectives.

    Attributes:
      workdir: the run's directory.
      library: directory of an existing library.
      name: of the skill, or of each of them.
      seed: of parameters, batches and noise.
      env: environment; default that of `data`, where it is known, else the base's;
        `job.skill.env` where nothing is given to learn from.
      data: demonstrations; default collects.
      selection: which of them.
      objectives: keys of `OBJECTIVES`, a skill each, learned in one program; default
        `job.skill.objective`.
      critics: directory of a finished run whose critics are used; None trains critics
        together with skills that need them, and keeps them in `workdir`.
      evaluate: roll the skills out at their training strength.
      label: put before messages, such as "seed 3".
      decision: why a skill is learned at all, for its card; see `auto`.
    """

    workdir: str | Path
    library: str | Path
    name: str | Sequence[str]
    seed: int = 0
    env: str | None = None
    data: str | None = None
    selection: Selection = FIRST
    objectives: Sequence[str] = ()
    critics: str | Path | None = None
    evaluate: bool = True
    label: str = ""
    decision: Mapping[str, Any] | None = None


def run(
    job: Job, *requests: Request, mesh: str | None = None, stream: str = "auto"
) -> list[dict[str, Any]]:
    """Learn the skills of each request, as one program; returns the runs' results.

    A result has the training's "summary", the "library", and the "returns" of the
    roll-out, those of several skills by name.

    Args:
      job: sizes and budgets; its `skill` section.
      *requests: one or several, which differ in seeds, data or directories.
      mesh: sizes of a mesh of devices, see `sharding.make_mesh`; None is one device.
      stream: whether data stay in files, see `streaming.wanted`.

    Raises:
      InputError: bad data, an unknown objective, a workdir of another run, critics of
        another base, or a name that another run took.
    """
    with processes.first_before_others():
        load = loader(job.data)
        plans = [plan(job, request, load) for request in requests]
    trained = multirun.train(plans, job.run, mesh, stream)
    return multirun.finish(trained, publish, job.evaluation)


def plan(job: Job, request: Request, load: Load) -> Plan:
    """What a request trains; no directory is touched.

    Raises:
      InputError: names, data or critics that do not fit.
    """
    section, library = job.skill, SkillLibrary.open(request.library)
    names = (request.name,) if isinstance(request.name, str) else tuple(request.name)
    objectives = tuple(request.objectives) or tuple(section.objective.split(","))
    needed = critics.needed(objectives)
    if len(names) != len(objectives) or len(set(names)) < len(names):
        raise InputError(
            f"name: got {', '.join(names)}, expected {len(objectives)} different for "
            f"the objectives {', '.join(objectives)}"
        )
    base, normaliser, card = library.load_base()
    policy = load_base(request.library)
    env = environment_of(request.data, request.env, section.env, card.get("env"))
    if env is not None:
        check_robot(env, card.get("env") or "", str(request.library))
    wanted = Wanted(
        costs=reads_costs(needed),
        rewards="reward" in needed,
        compare=request.evaluate or request.env is not None,
        box=box_of_card(card.get("actions")),
    )
    demos = load(env, section.episodes, request.data, request.selection, wanted)
    check_fit(demos, policy)
    if wanted.compare and env is not None:
        check_box(card.get("actions"), envs.describe(env))
    finished = critics.load_finished(request.critics, needed)
    if finished:
        check_critics(str(request.critics), finished, policy)
    learner = actor.make(
        job,
        CloningConfig(
            network_config(card),
            process_config(card),
            section.optimiser,
            section.batch_size,
            section.dropout,
            part(AdapterConfig, section),
        ),
        objectives,
        demos,
        normaliser,
        request.seed,
        finished,
        base,
    )
    return Plan(
        kind="skill",
        names=names,
        workdir=Path(request.workdir),
        library=Path(request.library),
        record=learner.record
        | {
            "name": names[0] if len(names) == 1 else list(names),
            "seed": request.seed,
            "env": env,
            "data": demos.card(),
            "base_fingerprint": card["fingerprint"],
            "skill": dataclasses.asdict(section)
            | {"env": env, "objective": ",".join(objectives)},
        },
        update=learner.update,
        rows=learner.rows,
        start=learner.start,
        key=learner.key,
        steps=section.steps,
        stage=learner.stage,
        env=env,
        evaluate=request.evaluate,
        label=request.label,
        content=(learner, objectives, request.decision),
    )


def publish(trained: Trained) -> Published:
    """Put the trained skills into their library."""
    plan, (learner, objectives, decision) = trained.plan, trained.plan.content
    stacked, finished = actor.trained_params(trained, learner)
    library, policies = SkillLibrary.open(plan.library), {}
    form = plan.record["skill"]
    for k, (name, objective) in enumerate(zip(plan.names, objectives, strict=True)):
        library.add_skill(
            name,
            jax.tree.map(lambda leaf, k=k: leaf[k], stacked),
            {
                "adapter": form["adapter"],
                "rank": form["rank"],
                "alpha": form["alpha"],
                "objective": objective,
                "env": plan.record["env"],
                "data": learner.demos.card(),
                "returns": None,
                "steps": plan.steps,
                "base_fingerprint": plan.record["base_fingerprint"],
                "config": trained.run.config,
                "versions": versions(),
            }
            | actor.critics_card(finished)
            | ({"decision": decision} if decision else {}),
            overwrite=True,
        )
        policies[name] = compose(plan.library, [name])
    return Published(policies)
