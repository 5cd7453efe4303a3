"""Expand or compose: whether new demonstrations need a new skill at all.

Candidates in order of what they add: the base, each skill alone, a gate over all of
them, a new skill of each rank. Gate and new skills are trained for a short while on a
part of the demonstrations; all are compared on the rest, by the loss of the base's
process at the same times and noise. What adds no skill has to know the states: the
demonstrations of what it uses reach a share `coverage` of them. Of those that do, and
the new skills, the first one is chosen whose loss is at most 1 + tolerance times the
least of theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from psec_jax import tree
from psec_jax.agents.common import Demonstrations
from psec_jax.agents.gate import GATE_LOSSES
from psec_jax.composition import PolicyConfig, PolicyParams, network_of
from psec_jax.data import dataset
from psec_jax.errors import InputError
from psec_jax.gating import SUPPORTS, UNTRAINED_HEADS, GateConfig, gate_alpha
from psec_jax.library import SkillLibrary, table
from psec_jax.losses import diffusion_loss
from psec_jax.networks.denoiser import make_denoise
from psec_jax.policy import compose, load_base
from psec_jax.types import Dataset
from psec_jax.workflows import actor, gate, multirun, skill
from psec_jax.workflows.config import AutoSection, GateSection, Job, part
from psec_jax.workflows.demonstrations import Demos, Load, loader
from psec_jax.workflows.multirun import Plan, Trained

MOST = 20  # trajectories of one entry whose reach is measured


@dataclass(frozen=True)
class Request(skill.Request):
    """A skill to be learned, if one is needed.

    Attributes:
      skills: names of those that are tried before a new one; None are all of the
        library.
      support_data: demonstrations of each of them; default collects again what their
        cards name.
      base_data: the base's demonstrations; default as of the skills.
    """

    skills: Sequence[str] | None = None
    support_data: Sequence[str] = ()
    base_data: str | None = None


class Candidate(NamedTuple):
    """One way to do what the demonstrations show.

    Attributes:
      kind: "base", "skill", "gate" or "new skill".
      config: of its policy.
      params: of its policy.
      skills: those it uses.
      rank: of a new skill.
      added: how many numbers it adds to the library.
    """

    kind: str
    config: PolicyConfig
    params: PolicyParams
    skills: tuple[str, ...] = ()
    rank: int | None = None
    added: int = 0


def run(job: Job, request: Request) -> dict[str, Any]:
    """Decide, and add what was decided on: a skill, a gate, or nothing.

    Args:
      job: its section `auto` is for the decision; what is added then is trained on all
        demonstrations with the whole budget of `skill` or `gate`.
      request: what to learn.

    Returns:
      The result of the run that made the new entry, its "kind", None where the base
      will do, and the "decision" as its card has it.

    Raises:
      InputError: as `decide`, `skill.run` and `gate.run`.
    """
    decision = decide(job, request)
    chosen = decision["chosen"]
    if chosen["kind"] == "base":
        result = {"summary": None, "returns": None, "library": str(request.library)}
        return result | {"kind": None, "decision": decision}
    fields = {"workdir": Path(request.workdir) / "run", "decision": decision}
    if chosen["kind"] == "new skill":
        job = job.changed({"skill.rank": chosen["rank"]})
        [result] = skill.run(job, part(skill.Request, request, **fields))
        return result | {"kind": "skill", "decision": decision}
    if chosen["kind"] == "skill":
        job = dataclasses.replace(job, gate=GateSection(head="constant"))
    fields |= {"skills": chosen["skills"], "env": decision["env"]}
    fields["support_data"] = _of_chosen(request, chosen["skills"])
    [result] = gate.run(job, part(gate.Request, request, **fields))
    return result | {"kind": "gate", "decision": decision}


@jax.enable_x64(False)  # the same numbers under JAX_ENABLE_X64
def decide(job: Job, request: Request) -> dict[str, Any]:
    """What is chosen, and why: "chosen", all "candidates", and the rule's numbers.

    The trials are runs in `request.workdir` / "trials", kept and resumed as others are.

    Raises:
      InputError: more than one name, an objective other than bc, critics, a gate that
        the diffusion loss does not train, fewer than 2 demonstrations, or
        demonstrations of the base or a skill that are not to be had.
    """
    _check(job, request)
    load = loader(job.data)
    names = _names(request)
    paths = request.support_data
    if paths and len(paths) != len(names):
        raise InputError(
            f"support_data: got {len(paths)} files for {len(names)} skills"
        )
    whole = skill.plan(job, part(skill.Request, request), load)
    demos = whole.content[0].demos
    held_out, rows = _split(job, demos)
    # Trials learn from the same rows: the trajectories before those held out.
    fields = {"selection": request.selection._replace(leave_out=held_out)}
    steps = job.auto.steps
    trial = job.changed(
        {"skill.steps": steps, "gate.steps": steps, "gate.fallback": ""}
    )
    learned = jax.tree.map(lambda leaf: leaf[:rows], whole.rows)
    unseen = jax.tree.map(lambda leaf: leaf[rows:], whole.rows)
    # 0 and 1 are the keys of trainings, which split the seed's key in two.
    key = jax.random.fold_in(jax.random.key(request.seed), 2)
    order_key, compare_key = jax.random.split(key)
    base = load_base(request.library)
    candidates = [Candidate("base", base.config, base.params)]
    if names:
        alone = [_alone(request.library, name) for name in names]
        fit = _losses(job.auto, request.seed, order_key, alone, learned)
        order = np.argsort(fit, kind="stable")
        candidates += [alone[i] for i in order]
        ordered = [paths[i] for i in order] if paths else []
        own = {"skills": [names[i] for i in order], "support_data": ordered}
        gated = part(gate.Request, request, **fields, **own, env=whole.env)
        candidates.append(_gated(gate.plan(trial, gated, load), request, job))
    for rank in sorted(job.auto.ranks):
        new = part(skill.Request, request, **fields)
        ranked = trial.changed({"skill.rank": rank})
        candidates.append(_new(skill.plan(ranked, new, load), request, job, rank))
    reached = _reached(job, request, names, demos, load)
    losses = _losses(job.auto, request.seed, compare_key, candidates, unseen)
    shown = [
        {
            "kind": one.kind,
            "skills": list(one.skills),
            "rank": one.rank,
            "loss": loss,
            "coverage": None if one.rank else reached(one.skills),
            "added": one.added,
        }
        for one, loss in zip(candidates, losses, strict=True)
    ]
    return {
        "chosen": choose(job.auto, shown),
        "candidates": shown,
        "held_out": held_out,
        "env": whole.env,
        "auto": dataclasses.asdict(job.auto),
    }


def choose(rule: AutoSection, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first candidate near the least loss, of those that know the states.

    Args:
      rule: its coverage and tolerance.
      candidates: "loss" and "coverage" of each, None of a new skill, in order of what
        they add.
    """
    known = [
        one
        for one in candidates
        if one["coverage"] is None or one["coverage"] >= rule.coverage
    ]
    bound = (1 + rule.tolerance) * min(one["loss"] for one in known)
    return next(one for one in known if one["loss"] <= bound)


def describe(row: dict[str, Any]) -> str:
    """A candidate in words, such as "new skill of rank 4" or "gate walk run"."""
    if row["rank"]:
        return f"{row['kind']} of rank {row['rank']}"
    return " ".join([row["kind"], *row["skills"]])


def table_of(decision: dict[str, Any]) -> str:
    """The candidates as text, the chosen one marked."""
    rows = [("", "candidate", "loss", "coverage", "new numbers")]
    for row in decision["candidates"]:
        known = row["coverage"]
        rows.append(
            (
                "*" if row == decision["chosen"] else "",
                describe(row),
                f"{row['loss']:.4g}",
                "-" if known is None else f"{known:.2f}",
                str(row["added"]),
            )
        )
    return table(rows)


def _check(job: Job, request: Request) -> None:
    if not isinstance(request.name, str):
        raise InputError(
            f"name: got {', '.join(request.name)}, expected one name to decide on"
        )
    objectives = ",".join(request.objectives) or job.skill.objective
    if objectives != "bc" or request.critics is not None:
        raise InputError(
            f"objective: got {objectives}, expected bc without critics: what is "
            "compared is how well demonstrations are cloned"
        )
    section = job.gate
    if section.head in UNTRAINED_HEADS or section.loss not in ("auto", "diffusion"):
        raise InputError(
            f"gate.head, gate.loss: got {section.head!r} and {section.loss!r}, "
            "expected a head that the diffusion loss trains"
        )
    if section.level != "parameter":
        raise InputError(
            f"gate.level: got {section.level!r}, expected 'parameter', where a gate "
            "and a new skill are compared by one loss"
        )


def _split(job: Job, demos: Demos) -> tuple[int, int]:
    """How many trajectories, the last ones, are held out; the rows before them."""
    slices = dataset.episode_slices(demos.dataset)
    held_out = max(1, round(job.auto.held_out * len(slices)))
    if held_out >= len(slices):
        raise InputError(
            f"{demos.source}: {len(slices)} trajectory to decide on, expected 2 or more"
        )
    return held_out, slices[-held_out].start


def _train(plan: Plan, request: Request, job: Job, name: str) -> Trained:
    """The plan trained, not published."""
    folder = Path(request.workdir) / "trials" / name
    trial = plan._replace(names=(), workdir=folder, stage=f"trial {name}")
    [trained] = multirun.train([trial], job.run)
    return trained


def _alone(library: str | Path, name: str) -> Candidate:
    """A skill at the strength it was trained at."""
    policy = compose(library, [name])
    return Candidate("skill", policy.config, policy.params, (name,))


def _gated(plan: Plan, request: Request, job: Job) -> Candidate:
    trained = _train(plan, request, job, "gate")
    fresh = plan.content.fresh()
    made = fresh.gate | {"head": trained.state.params}
    skills, size = tuple(plan.record["skills"]), tree.size(made["head"])
    assert plan.update is not None
    config = plan.update.config.policy
    params = fresh.frozen._replace(gate=made)
    return Candidate("gate", config, params, skills, added=size)


def _new(plan: Plan, request: Request, job: Job, rank: int) -> Candidate:
    trained = _train(plan, request, job, f"rank{rank}")
    learner, *_ = plan.content
    stacked, _ = actor.trained_params(trained, learner)
    base = load_base(request.library)
    strength = jnp.asarray([plan.record["skill"]["alpha"]], jnp.float32)
    head = {"head": {"alpha": strength}}
    config = dataclasses.replace(base.config, gate=GateConfig(head="constant"))
    params = base.params._replace(library=stacked, strength=strength, gate=head)
    added = tree.size(stacked)
    return Candidate("new skill", config, params, rank=rank, added=added)


def _losses(
    rule: AutoSection,
    seed: int,
    key: Key[Array, ""],
    candidates: Sequence[Candidate],
    rows: Demonstrations,
) -> list[float]:
    """Mean loss of each candidate on the same rows, times and noise."""
    drawn = np.random.default_rng(seed).permutation(len(rows.obs))[: rule.rows]
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[np.sort(drawn)]), rows)
    keys = jax.random.split(key, (len(drawn), rule.draws))
    return [float(_mean_loss(c.config, c.params, keys, rows)) for c in candidates]


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(config: PolicyConfig, params: PolicyParams, keys, rows) -> jax.Array:
    def one(example: tuple) -> jax.Array:
        keys, (obs, action) = example
        return jnp.mean(
            jax.vmap(lambda key: _loss(config, params, key, obs, action))(keys)
        )

    return jnp.mean(jax.lax.map(one, (keys, rows), batch_size=256))


def _loss(config: PolicyConfig, params: PolicyParams, key, obs, action) -> jax.Array:
    if config.gate is None:
        denoise = make_denoise(network_of(config), params.base)
        return diffusion_loss(denoise, config.process, key, obs, action)
    assert params.gate is not None
    alpha = gate_alpha(config.gate, params.gate, obs)
    return GATE_LOSSES["diffusion"].loss(config, params, alpha, key, obs, action)


def _reached(
    job: Job, request: Request, names: Sequence[str], demos: Demos, load: Load
) -> Callable[[Sequence[str]], float]:
    """skills -> share of the demonstrations' states that those of the skills reach, or
    with none those of the base: where a support is one half or more."""
    normaliser = load_base(request.library).params.normaliser
    sources = request.support_data, request.base_data, request.env
    known = gate.own_demos(load, request.library, names, *sources)
    thin = [one._replace(dataset=_some(one.dataset)) for one in known]
    fitted = gate.fit_support(job.support, "neighbour", thin, None, normaliser)
    obs = np.asarray(normaliser(demos.dataset.obs))
    obs = jnp.asarray(obs[:: max(1, len(obs) // job.auto.rows)])
    support = SUPPORTS["neighbour"]
    assert support is not None
    near = jax.lax.map(lambda x: support(fitted, x) >= 0.5, obs)
    of = dict(zip((*names, ""), np.asarray(near).T, strict=True))

    def share(skills: Sequence[str]) -> float:
        return float(np.mean(np.any([of[name] for name in skills or [""]], axis=0)))

    return share


def _some(ds: Dataset) -> Dataset:
    """At most `MOST` trajectories: each state is compared with all others."""
    count = len(dataset.episode_slices(ds))
    spaced = np.linspace(0, count - 1, min(count, MOST)).astype(int)
    return dataset.take(ds, spaced)


def _names(request: Request) -> tuple[str, ...]:
    if request.skills is not None:
        return tuple(request.skills)
    return tuple(SkillLibrary.open(request.library).skills())


def _of_chosen(request: Request, skills: Sequence[str]) -> list[str]:
    """The support data of these skills, in their order."""
    if not request.support_data:
        return []
    paths = dict(zip(_names(request), request.support_data, strict=True))
    return [paths[name] for name in skills]
