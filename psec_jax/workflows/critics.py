"""Critics: trained alone to be shared by skills, or beside actors that read them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from psec_jax import tree
from psec_jax.agents import critic_file
from psec_jax.agents import critics as agent
from psec_jax.agents.common import Transitions, make_transitions, reward_scale
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import CriticConfig, CriticParams
from psec_jax.data.recording import box_of_card
from psec_jax.errors import InputError, lookup
from psec_jax.library import SkillLibrary
from psec_jax.losses import OBJECTIVES
from psec_jax.policy import load_base
from psec_jax.runtime import processes
from psec_jax.runtime.batches import Drawn
from psec_jax.runtime.run import Run, versions
from psec_jax.types import Normaliser
from psec_jax.workflows import multirun
from psec_jax.workflows.config import CriticSection, Job, part
from psec_jax.workflows.demonstrations import (
    FIRST,
    Demos,
    Selection,
    Wanted,
    check_fit,
    environment_of,
    loader,
)
from psec_jax.workflows.multirun import Plan, Published, Trained


@dataclass(frozen=True)
class Request:
    """Critics to be trained alone; they stay in the run's directory.

    Attributes:
      workdir: the run's directory.
      library: an existing library, whose base says how observations are scaled.
      seed: of parameters and batches.
      env: environment; default as of a skill.
      data: transitions; default collects.
      selection: which trajectories.
      label: put before messages.
    """

    workdir: str | Path
    library: str | Path
    seed: int = 0
    env: str | None = None
    data: str | None = None
    selection: Selection = FIRST
    label: str = ""


def run(
    job: Job, *requests: Request, mesh: str | None = None, stream: str = "auto"
) -> list[dict[str, Any]]:
    """Train critics for each request, as one program; returns the runs' results.

    A result has the training's "summary", and "fingerprint" and "kinds" of the critics.

    Raises:
      InputError: bad data, or a workdir of another run.
    """
    with processes.first_before_others():
        load = loader(job.data)
        plans = [plan(job, request, load) for request in requests]
    trained = multirun.train(plans, job.run, mesh, stream)
    return multirun.finish(trained, publish, job.evaluation)


def plan(job: Job, request: Request, load: Any) -> Plan:
    """What a request trains; no directory is touched.

    Raises:
      InputError: data that critics cannot learn from.
    """
    config = part(CriticConfig, job.critics)
    _, normaliser, card = SkillLibrary.open(request.library).load_base()
    env = environment_of(request.data, request.env, job.skill.env, card.get("env"))
    wanted = Wanted(
        costs=agent.reads_costs(config.kinds),
        rewards="reward" in config.kinds,
        compare=request.env is not None,
        box=box_of_card(card.get("actions")),
    )
    demos = load(env, job.skill.episodes, request.data, request.selection, wanted)
    check_fit(demos, load_base(request.library))
    rows = transitions(job.critics, demos, normaliser, config.kinds)
    init_key, train_key = jax.random.split(jax.random.key(request.seed))
    return Plan(
        kind="critics",
        names=(),
        workdir=Path(request.workdir),
        library=Path(request.library),
        record={
            "seed": request.seed,
            "data": demos.card(),
            "normaliser": tree.fingerprint(normaliser._asdict()),
            "critics": dataclasses.asdict(job.critics),
        },
        update=Drawn(agent.update, config, config.batch_size),
        rows=rows,
        start=lambda: (agent.init(config, init_key, *dims(rows)), None),
        key=train_key,
        steps=job.critics.steps,
        stage="critics",
        label=request.label,
        content=(config, normaliser, demos),
    )


def publish(trained: Trained) -> Published:
    """Write trained critics into their run's directory."""
    config, normaliser, demos = trained.plan.content
    params, summary = trained.state.trained, trained.summary or {}
    saved = save(trained.run, config, params, normaliser, demos, summary)
    return Published({}, {k: saved.card[k] for k in ("fingerprint", "kinds")})


def save(
    run: Run,
    config: CriticConfig,
    params: CriticParams,
    normaliser: Normaliser,
    demos: Demos,
    summary: Mapping[str, Any],
) -> Finished:
    """Write critics into a run's directory; returns what `critic_file.load` gives."""
    obs_dim, action_dim = (
        demos.dataset.obs.shape[1],
        demos.dataset.action.shape[1],
    )
    card = {
        "kinds": list(config.kinds),
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "steps": summary["resumed_at"] + summary["steps"],
        "data": demos.card(),
        "summary": {
            name: value
            for name, value in summary.items()
            if name.split("/")[0] in ("loss", "q", "v")
        },
        "config": dataclasses.asdict(config),
        "versions": versions(),
    }
    return critic_file.save(run.workdir, params, normaliser, card)


def load_finished(workdir: str | Path | None, needed: Sequence[str]) -> Finished | None:
    """Critics of a finished run, which must judge what is needed.

    Raises:
      InputError: none there, damaged ones, one that is needed is missing, or none is.
    """
    if workdir is None:
        return None
    if not needed:
        raise InputError(f"critics: {workdir} was given, the objective bc reads none")
    finished = critic_file.load(workdir)
    if missing := [kind for kind in needed if kind not in finished.card["kinds"]]:
        raise InputError(
            f"{workdir}: these critics judge {' and '.join(finished.card['kinds'])}, "
            f"the objective needs {missing[0]} too"
        )
    return finished


def needed(objectives: Sequence[str]) -> list[str]:
    """The critics that objectives read, sorted.

    Raises:
      InputError: an unknown objective.
    """
    read = [lookup(OBJECTIVES, name, "objective").critics for name in objectives]
    return sorted({kind for kinds in read for kind in kinds})


def transitions(
    config: CriticSection,
    demos: Demos,
    normaliser: Normaliser,
    kinds: Sequence[str],
) -> Transitions:
    """Demonstrations as critics of these kinds read them."""
    scale = 1.0
    if kinds and config.scale_rewards:
        scale = config.reward_scale or reward_scale(demos.dataset)
    return make_transitions(
        demos.dataset,
        normaliser,
        scale=scale,
        violation=config.violation,
        bootstrap_timeouts=config.bootstrap_timeouts,
        costs=agent.reads_costs(kinds),
        source=demos.source,
    )


def dims(rows: Transitions) -> tuple[int, int]:
    """S and A."""
    return rows.obs.shape[-1], rows.action.shape[-1]
