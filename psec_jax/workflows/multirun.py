"""One run or several as one program: plans are trained, published and rolled out.

A workflow is three functions: `plan` says what a run trains and touches no directory,
`train` here trains all plans as one program, and `publish` writes the entries of the
library.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from psec_jax import tree
from psec_jax.data.recording import say
from psec_jax.errors import InputError
from psec_jax.evaluation import (
    Episodes,
    episode_fields,
    evaluate,
    evaluate_together,
)
from psec_jax.files import beside
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, act_together, alike
from psec_jax.runtime import batches, loop, processes, sharding, streaming
from psec_jax.runtime.batches import Data, Drawn
from psec_jax.runtime.loop import LoopConfig
from psec_jax.runtime.run import Run, open_run
from psec_jax.runtime.runs import Training
from psec_jax.workflows.config import EvaluationConfig


class Plan(NamedTuple):
    """One run, checked: nothing of it is on disk yet.

    Attributes:
      kind: "base", "skill", "gate" or "critics".
      names: of the library's entries; none for critics.
      workdir: the run's directory.
      library: of the entries.
      record: everything that the entries depend on.
      update: the agent's step; None where nothing is trained.
      rows: pytree with leaves [N, ...], what training draws batches from.
      start: makes the state that training starts from, and what the update reads and
        never changes; called where there is something to train.
      key: of the whole training.
      steps: updates.
      stage: name in the progress line.
      env: of the entries; None where nobody named it.
      evaluate: roll the entries out in it.
      label: put before messages, such as "seed 3".
      content: what `publish` needs beside the trained state.
    """

    kind: str
    names: tuple[str, ...]
    workdir: Path
    library: Path
    record: Mapping[str, Any]
    update: Drawn | None
    rows: Any
    start: Callable[[], tuple[Any, Any]]
    key: jax.Array
    steps: int
    stage: str
    env: str | None = None
    evaluate: bool = False
    label: str = ""
    content: Any = None


class Trained(NamedTuple):
    """A plan whose training is over.

    Attributes:
      plan: the plan.
      run: its open directory.
      result: of a run that was finished before; None where there is one to publish.
      state: the trained state; None where nothing was trained.
      summary: of the training; see `loop.train`.
    """

    plan: Plan
    run: Run
    result: dict[str, Any] | None
    state: Any = None
    summary: dict[str, Any] | None = None


class Published(NamedTuple):
    """What `publish` wrote.

    Attributes:
      policies: of each entry by name, to be rolled out.
      result: more fields of the run's result.
    """

    policies: Mapping[str, Policy]
    result: Mapping[str, Any] = {}


@jax.enable_x64(False)  # the same numbers under JAX_ENABLE_X64
def train(
    plans: Sequence[Plan],
    options: LoopConfig,
    mesh: str | None = None,
    stream: str = "auto",
) -> list[Trained]:
    """Train the plans that are not finished, as one program.

    Args:
      plans: R of them.
      options: how often they report and save.
      mesh: sizes of a mesh of devices, see `sharding.make_mesh`; None is one device.
      stream: whether data stay in files, see `streaming.wanted`.

    Raises:
      InputError: plans that do not go into one program, a mesh or a stream that does
        not fit; nothing is written then.
    """
    devices = sharding.make_mesh(mesh, len(plans))
    learning = [plan for plan in plans if plan.update is not None]
    _check(learning, options, devices, stream)
    with processes.first_before_others():
        trained = [_open(plan) for plan in plans]
    todo = [
        i
        for i, one in enumerate(trained)
        if one.result is None and one.plan.update is not None
    ]
    if todo:
        chosen = [trained[i] for i in todo]
        for i, result in zip(
            todo, _train(chosen, options, devices, stream), strict=True
        ):
            state, summary = result
            trained[i] = trained[i]._replace(state=state, summary=summary)
    return trained


@jax.enable_x64(False)
def finish(
    trained: Sequence[Trained],
    publish: Callable[[Trained], Published],
    evaluation: EvaluationConfig,
) -> list[dict[str, Any]]:
    """Publish and roll out what was trained; of several processes the first does.

    Returns:
      The results of all runs; none in the other processes.
    """
    if not processes.first():
        return []
    published = {i: publish(one) for i, one in enumerate(trained) if one.result is None}
    for i in published:
        plan = trained[i].plan
        if plan.evaluate and plan.env is None:
            before = f"{plan.label}: " if plan.label else ""
            say(f"{before}no environment is named (--env), so nothing is rolled out")
    policies = {
        (i, name): policy
        for i, entry in published.items()
        for name, policy in entry.policies.items()
        if trained[i].plan.evaluate and trained[i].plan.env is not None
    }
    envs = {key: str(trained[key[0]].plan.env) for key in policies}
    returns = roll_out(policies, envs, evaluation.episodes, evaluation.seed)
    results = []
    for i, one in enumerate(trained):
        if one.result is not None:
            results.append(one.result)
            continue
        plan = one.plan
        mine = {name: returns.get((i, name)) for name in published[i].policies}
        result = {"summary": one.summary} | dict(published[i].result)
        if plan.names:
            several = len(plan.names) > 1
            result |= {
                "returns": mine if several else mine[plan.names[0]],
                "library": str(plan.library),
            }
        for name, card in mine.items():
            if card is not None:
                SkillLibrary.open(plan.library).set_returns(plan.kind, name, card)
        one.run.finish(result)
        results.append(result)
    return results


def roll_out(
    policies: Mapping[Any, Policy],
    envs: Mapping[Any, str],
    episodes: int,
    seed: int,
) -> dict[Any, dict[str, Any]]:
    """Raw returns of each policy; those that can act in one call play at once."""
    played: dict[Any, Episodes] = {}
    for key, policy in policies.items():
        if key in played:
            continue
        same = [
            other
            for other, its in policies.items()
            if envs[other] == envs[key] and alike(its, policy)
        ]
        if len(same) == 1:
            played[key] = evaluate(policy.act, envs[key], episodes, seed)
            continue
        act = act_together([policies[other] for other in same])
        several = evaluate_together(act, len(same), envs[key], episodes, seed)
        played |= zip(same, several, strict=True)
    return {key: episode_fields(played[key], envs[key], seed) for key in policies}


def _check(
    plans: Sequence[Plan], options: LoopConfig, mesh: Mesh | None, stream: str
) -> None:
    """Refuse what training would refuse, while no directory is made."""
    if not plans:
        return
    for plan in plans:
        if mesh is not None and plan.update is not None:
            sharding.check_batch(mesh.shape["data"], plan.update.batch_size)
        if plan.steps != plans[0].steps or plan.update != plans[0].update:
            _refuse(plan, plans[0])
    if streaming.wanted(stream, batches.size_of([Data(plan.rows) for plan in plans])):
        streaming.check_calls(options.steps_per_call)


def _refuse(plan: Plan, other: Plan) -> None:
    raise InputError(
        f"{plan.label} cannot be trained in one program with {other.label}: its "
        "network or its budget is another"
    )


def _open(plan: Plan) -> Trained:
    """The plan with its run's directory, and its result where nothing is left to do.

    A finished run whose entry the library lost, or never had, puts it there again.

    Raises:
      InputError: the directory holds another run, or the library an entry of this name
        that another run made.
    """
    library = SkillLibrary(plan.library)
    held = [library.holds(plan.kind, name, plan.record) for name in plan.names]
    run = open_run(plan.workdir, plan.kind, plan.record)
    result = run.result()
    if result is None or not all(held):
        return Trained(plan, run, None)
    return Trained(plan, run, result | {"library": str(plan.library)})


def _train(
    chosen: Sequence[Trained], options: LoopConfig, mesh: Mesh | None, stream: str
) -> list[loop.Result]:
    """State and summary of each, all in one program."""
    first = chosen[0].plan
    assert first.update is not None
    states, datas = [], []
    for one in chosen:
        state, frozen = one.plan.start()
        if states and tree.shapes(state) != tree.shapes(states[0]):
            _refuse(one.plan, first)
        data: Any = Data(one.plan.rows, frozen)
        states.append(state)
        # What is equal is on the device once.
        datas.append(batches.shared(data, datas[0]) if datas else data)
    with contextlib.ExitStack() as stack:
        if streaming.wanted(stream, batches.size_of(datas)):
            # Each process has its own; the next start removes what a killed one left.
            folder = beside(chosen[0].run.workdir / "rows", "tmp")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            datas = streaming.make_streams(datas, folder)
        else:
            datas = batches.of_one_length(datas)
        trainings = [
            Training(state, data, one.plan.key, one.run, one.plan.label)
            for one, state, data in zip(chosen, states, datas, strict=True)
        ]
        return loop.train(
            first.update,
            trainings,
            steps=first.steps,
            config=options,
            stage=first.stage,
            mesh=mesh,
        )
