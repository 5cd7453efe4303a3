"""A base policy: trained on demonstrations, put into a library."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psec_jax.agents.cloning import CloningConfig
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import reads_costs
from psec_jax.data.normalise import NORMALISERS
from psec_jax.errors import lookup
from psec_jax.library import SkillLibrary
from psec_jax.policy import (
    check_critics,
    load_base,
    network_config,
    process_config,
)
from psec_jax.runtime import processes
from psec_jax.runtime.run import versions
from psec_jax.types import Normaliser, Params
from psec_jax.workflows import actor, critics, multirun
from psec_jax.workflows.config import Job
from psec_jax.workflows.demonstrations import (
    FIRST,
    Demos,
    Load,
    Selection,
    Wanted,
    check_fit,
    check_sizes,
    environment_of,
    loader,
)
from psec_jax.workflows.multirun import Plan, Published, Trained


@dataclass(frozen=True)
class Request:
    """A base to be trained.

    Attributes:
      workdir: the run's directory.
      library: directory of the library, made if missing.
      seed: of parameters, batches and noise.
      env: environment; default the one that `data` were recorded in, where that is
        known, and `job.base.env` where nothing is given to learn from.
      data: demonstrations; default collects.
      selection: which of them.
      name: of the base on its card.
      section: "skill" trains a base on a skill's budget: the Scratch baseline.
      objective: a key of `OBJECTIVES`; "fisor" is the FISOR baseline.
      critics: directory of a finished run whose critics (and scaling of observations)
        are used; None trains critics in the same program where they are needed.
      start: directory of a library whose base is trained on, with its scaling of
        observations: fine-tuning of all parameters; None starts afresh.
      anchor: weights that tie the parameters to the start's, or fix them there; see
        `agents.cloning.Anchor`.
      evaluate: roll the base out and record its returns on the card.
      label: put before messages, such as "seed 3".
    """

    workdir: str | Path
    library: str | Path
    seed: int = 0
    env: str | None = None
    data: str | None = None
    selection: Selection = FIRST
    name: str = "base"
    section: str = "base"
    objective: str = "bc"
    critics: str | Path | None = None
    start: str | Path | None = None
    anchor: Params | None = None
    evaluate: bool = True
    label: str = ""


def run(
    job: Job, *requests: Request, mesh: str | None = None, stream: str = "auto"
) -> list[dict[str, Any]]:
    """Pretrain a base for each request, as one program; returns the runs' results.

    A result has the training's "summary", the "returns" of the roll-out, if any, and
    the "library".

    Args:
      job: sizes and budgets.
      *requests: one or several, which differ in seeds, data or directories.
      mesh: sizes of a mesh of devices, see `sharding.make_mesh`; None is one device.
      stream: whether data stay in files, see `streaming.wanted`.

    Raises:
      InputError: bad data, a workdir that holds another run, or a library whose base
        another run made.
    """
    with processes.first_before_others():
        load = loader(job.data)
        plans = [plan(job, request, load) for request in requests]
    trained = multirun.train(plans, job.run, mesh, stream)
    return multirun.finish(trained, publish, job.evaluation)


def plan(job: Job, request: Request, load: Load) -> Plan:
    """What a request trains; no directory is touched.

    Raises:
      InputError: data, critics or a start that do not fit.
    """
    section = {"base": job.base, "skill": job.skill}[request.section]
    env = environment_of(request.data, request.env, job.base.env)
    network, process, start, record = job.network, job.process, None, {}
    if request.start is not None:
        start, _, card = SkillLibrary.open(request.start).load_base()
        network, process = network_config(card), process_config(card)
        record["start"] = card["fingerprint"]
    needed = critics.needed([request.objective])
    wanted = Wanted(
        costs=reads_costs(needed),
        rewards="reward" in needed,
        compare=request.evaluate or request.env is not None,
    )
    demos = load(env, section.episodes, request.data, request.selection, wanted)
    finished = critics.load_finished(request.critics, needed)
    learner = actor.make(
        job,
        CloningConfig(
            network, process, section.optimiser, section.batch_size, section.dropout
        ),
        [request.objective],
        demos,
        _normaliser(job, request, demos, finished),
        request.seed,
        finished,
        start=start,
        anchor=request.anchor,
    )
    record |= learner.record
    if request.objective != "bc":
        record["objective"] = request.objective
    return Plan(
        kind="base",
        names=("base",),
        workdir=Path(request.workdir),
        library=Path(request.library),
        record=record
        | {
            "name": request.name,
            "seed": request.seed,
            "env": env,
            "data": demos.card(),
            "section": request.section,
            "normaliser": job.normaliser,
            "std_floor": job.std_floor,
            "network": dataclasses.asdict(network),
            "process": dataclasses.asdict(process),
            request.section: dataclasses.asdict(section) | {"env": env},
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
        content=learner,
    )


def _normaliser(
    job: Job, request: Request, demos: Demos, finished: Finished | None
) -> Normaliser:
    """How observations are scaled: as the start's, as the critics', or by the data."""
    if request.start is not None:
        policy = load_base(request.start)
        check_fit(demos, policy)
        if finished:
            check_critics(str(request.critics), finished, policy)
        return SkillLibrary.open(request.start).load_base()[1]
    if finished:
        check_sizes(demos, *finished.dims, str(request.critics))
        return finished.normaliser
    make = lookup(NORMALISERS, job.normaliser, "normaliser")
    return make(demos.dataset.obs, job.std_floor)


def publish(trained: Trained) -> Published:
    """Put the trained base into its library."""
    plan, learner = trained.plan, trained.plan.content
    params, finished = actor.trained_params(trained, learner)
    config = learner.config
    if not isinstance(config, CloningConfig):
        config = config.actor
    record, data = plan.record, learner.demos.dataset
    action_dim = data.action.shape[1]
    SkillLibrary.create(plan.library).add_base(
        params,
        learner.normaliser,
        {
            "name": record["name"],
            "obs_dim": data.obs.shape[1],
            "action_dim": action_dim,
            "network": dataclasses.asdict(config.network),
            "process": dataclasses.asdict(config.process),
            "env": record["env"],
            "actions": learner.demos.recording.card(),
            "data": learner.demos.card(),
            "returns": None,
            "steps": plan.steps,
            "config": trained.run.config,
            "versions": versions(),
        }
        | {name: record[name] for name in ("objective",) if name in record}
        | actor.critics_card(finished),
        overwrite=True,
    )
    return Published({"base": load_base(plan.library)})
