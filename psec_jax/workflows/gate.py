"""A gate over skills of a library: its supports are fitted, its head is trained."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax import envs, support
from psec_jax.agents import critic_file
from psec_jax.agents import gate as agent
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.gate import GateTrainConfig
from psec_jax.choice import RULES, Critics
from psec_jax.composition import PolicyParams
from psec_jax.data import dataset
from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import box_of_card, check_box
from psec_jax.errors import InputError, lookup
from psec_jax.gating import (
    BOUNDED_HEADS,
    SEARCHED,
    SPARSE_HEADS,
    UNTRAINED_HEADS,
    GateConfig,
    gate_alpha,
    grow_head,
    init_gate,
)
from psec_jax.library import SkillLibrary, gate_config
from psec_jax.lora import layers_of
from psec_jax.policy import (
    Policy,
    check_critics,
    compose,
    load_skills,
    twins_of,
)
from psec_jax.runtime import processes
from psec_jax.runtime.batches import Drawn
from psec_jax.runtime.run import versions
from psec_jax.types import Normaliser, Params
from psec_jax.workflows import estimates, multirun
from psec_jax.workflows.config import GateSection, Job, part
from psec_jax.workflows.demonstrations import (
    FIRST,
    Demos,
    Load,
    Selection,
    Wanted,
    card_env,
    check_fit,
    demonstrations,
    loader,
)
from psec_jax.workflows.multirun import Plan, Published, Trained

LOAD_BATCH = 256  # states whose weights are computed at once
MAX_SHARED = 5  # weights, of which the default candidates are not too many: 71


@dataclass(frozen=True)
class Request:
    """A gate to be made.

    Attributes:
      workdir: the run's directory.
      library: directory of an existing library.
      name: of the gate.
      skills: names, in order of priority.
      seed: of the head, batches and noise.
      env: the target's environment; default that of skills[0].
      data: the target's demonstrations; default collects.
      selection: which of them.
      support_data: demonstrations of each skill, for a support; default collects again
        what the skill's card names.
      base_data: the base's demonstrations, shown to a learned support as states of
        other behaviour; default collects again what the base's card names.
      alpha: weights the head starts from (a constant head keeps them); default by
        `job.gate.start`.
      critics: directory of a finished run, whose critics choose or train the weights.
      start: name of a gate of the library over the first of the skills, whose head is
        trained on over all of them; its supports are kept.
      evaluate: roll the composition out.
      label: put before messages, such as "seed 3".
      decision: why no skill is learned, for the card; see `auto`.
    """

    workdir: str | Path
    library: str | Path
    name: str
    skills: Sequence[str]
    seed: int = 0
    env: str | None = None
    data: str | None = None
    selection: Selection = FIRST
    support_data: Sequence[str] = ()
    base_data: str | None = None
    alpha: Sequence[float] | None = None
    critics: str | Path | None = None
    start: str | None = None
    evaluate: bool = True
    label: str = ""
    decision: Mapping[str, Any] | None = None


def run(
    job: Job, *requests: Request, mesh: str | None = None, stream: str = "auto"
) -> list[dict[str, Any]]:
    """Make the gate of each request, as one program; returns the runs' results.

    A result has the training's "summary" (None of a constant head), the "returns" of
    the roll-out, if any, the "library", and the "load" of a head that keeps some skills
    alone, see `load_of`.

    Args:
      job: its `gate` and `support` sections are used, and `skill.episodes`.
      *requests: one or several, which differ in seeds, data or directories.
      mesh: sizes of a mesh of devices, see `sharding.make_mesh`; None is one device.
      stream: whether data stay in files, see `streaming.wanted`.

    Raises:
      InputError: bad data, unknown names, a workdir of another run, or a name that
        another run took.
    """
    with processes.first_before_others():
        load = loader(job.data)
        plans = [plan(job, request, load) for request in requests]
    trained = multirun.train(plans, job.run, mesh, stream)
    return multirun.finish(trained, publish, job.evaluation)


def plan(job: Job, request: Request, load: Load) -> Plan:
    """What a request trains; no directory is touched.

    Raises:
      InputError: skills, weights or data that do not fit.
    """
    if not request.skills:
        raise InputError("skills: got none, expected the names of one or more")
    section = job.gate
    policy, stacked, strength, cards = load_skills(request.library, request.skills)
    env = request.env or card_env(cards[0], f"skill {request.skills[0]!r}")
    if env is None and request.data is None:
        raise InputError(
            f"env: the card of skill {request.skills[0]!r} names no environment; give "
            "one"
        )
    config = _config(job, policy, stacked, len(request.skills))
    form = config.policy.gate
    assert form is not None
    older = None
    if request.start is not None:
        older = _older(request, form, section.level)
    if section.head == "select" and request.alpha is not None:
        raise InputError(
            "alpha: the head 'select' has several candidates, config.gate.alphas"
        )
    alphas = None  # of many skills there are none by default
    if section.guided or section.alphas:
        alphas = candidate_weights(strength, form.base_member, section.alphas)
    if section.head == "select":
        assert alphas is not None
        start = alphas
    else:
        start = start_weights(
            section.start,
            section.head,
            strength,
            form.base_member,
            request.alpha,
            form.layers,
        )
    if section.fallback and (
        section.support in ("none", "nearest") or section.fallback != request.skills[-1]
    ):
        raise InputError(
            f"gate.fallback: got {section.fallback!r}, expected the last of the skills "
            f"{', '.join(request.skills)}, and the support neighbour or learned"
        )
    base_card = SkillLibrary.open(request.library).card("base", "base")
    box = box_of_card(base_card.get("actions"))
    compare = request.evaluate or request.env is not None
    guide = _guide(section, request, policy)
    estimated = guide is not None and _estimated(section)
    signals = RULES[section.rule].critics if estimated else ()
    valued = section.q_of == "own" and "reward" in signals
    wanted = Wanted(compare=compare, box=box, costs="cost" in signals, rewards=valued)
    demos = load(env, job.skill.episodes, request.data, request.selection, wanted)
    check_fit(demos, policy)
    if compare and env is not None:
        check_box(base_card.get("actions"), envs.describe(env))
    skill_demos: list[Demos] = []
    background = None
    if section.support != "none":
        paths, named = request.support_data, request.env
        known = 0
        if older is not None and section.support in SEARCHED:
            known = len(older.card["skills"])  # their states are in the gate
        skill_demos = _skill_demos(load, box, cards[known:], paths, named)
    if section.support == "learned":
        path, named = request.base_data, request.env
        background = _card_demos(load, box, "base", base_card, path, "base_data", named)
        check_fit(background, policy)
    normaliser = policy.params.normaliser
    init_key, train_key = jax.random.split(jax.random.key(request.seed))
    estimate_key = jax.random.fold_in(init_key, 1)
    fixed_key = jax.random.fold_in(init_key, 2)

    params = policy.params._replace(library=stacked, strength=strength)

    @functools.cache
    def fresh() -> Fresh:
        fitted = None
        if skill_demos:
            reached = skill_demos
            if job.support.safe:
                reached = [_within(job.cost_limit, demos) for demos in skill_demos]
            count = 0 if older is None else len(cards) - len(older.card["skills"])
            fitted = fit_support(
                job.support, section.support, reached, background, normaliser, count
            )
        if fitted is not None and older is not None:
            fitted = support.append(older.params["support"], fitted)
        if fitted is not None and section.fallback:
            fitted["tau"] = fitted["tau"].at[-1].set(support.EVERYWHERE)
        gate = init_gate(form, init_key, len(normaliser.mean), start, fitted)
        if older is not None:
            states = normaliser(demos.dataset.obs)
            gate["head"] = grow_head(form, older.params["head"], start, states)
        if guide is None or alphas is None:
            return Fresh(gate, params._replace(gate=gate))
        twins: Critics = twins_of(guide.source, guide.finished, form.rule)
        critics, fitted_card = twins, {}
        if form.q_of == "own":
            fixed = estimates.value_fixed(
                job, config.policy, params, alphas, twins, demos, fixed_key
            )
            critics, fitted_card = fixed.critics, {"fixed": fixed.card}
        guided = params._replace(gate=gate | {"alphas": alphas}, critics=critics)
        chosen = estimates.choose_cost_weight(
            job, *agent.selecting(config.policy, guided), twins, demos, estimate_key
        )
        weight = jnp.asarray(chosen.cost_weight, jnp.float32)
        if section.head == "select":
            gate = gate | {"critics": critics, "cost_weight": weight}
        guided = guided._replace(cost_weight=weight)
        return Fresh(gate, guided, chosen.card | fitted_card)

    def start_training() -> tuple[Any, Any]:
        made = fresh()
        return agent.init(config, made.gate), made.frozen

    learned = section.head not in UNTRAINED_HEADS
    return Plan(
        kind="gate",
        names=(request.name,),
        workdir=Path(request.workdir),
        library=Path(request.library),
        record={
            "name": request.name,
            "seed": request.seed,
            "env": env,
            "data": demos.card(),
            "skills": list(request.skills),
            "skill_fingerprints": [card["fingerprint"] for card in cards],
            "support_data": [d.card() for d in skill_demos],
            "base_data": background.card() if background else None,
            "start_weights": None if older else np.asarray(start).tolist(),
            "gate": _recorded(section),
            "support": dataclasses.asdict(job.support),
        }
        | ({"start": older.card["fingerprint"]} if older else {})
        | ({"critics": guide.finished.brief()} if guide else {})
        | ({"fitted_q": dataclasses.asdict(job.fitted_q)} if estimated else {}),
        update=Drawn(agent.update, config, config.batch_size) if learned else None,
        rows=demonstrations(demos, normaliser, policy.config.process.horizon),
        start=start_training,
        key=train_key,
        steps=section.steps,
        stage="gate",
        env=env,
        evaluate=request.evaluate,
        label=request.label,
        content=Content(
            fresh, form, section.level, demos, cards, guide, older, request.decision
        ),
    )


class Fresh(NamedTuple):
    """A gate before training.

    Attributes:
      gate: its parameters.
      frozen: the policy around it, with critics where they guide it.
      chosen: what the card says of the cost weight.
    """

    gate: Params
    frozen: PolicyParams
    chosen: Mapping[str, Any] | None = None


class Guide(NamedTuple):
    """Critics that choose or train the weights, and the run they come from."""

    source: str | Path
    finished: Finished


class Content(NamedTuple):
    """What a trained gate is published with.

    Attributes:
      fresh: makes it before training.
      form: of the gate.
      level: at which skills are composed.
      demos: the target's demonstrations.
      cards: of the skills.
      guide: critics, if any.
      older: the gate that it started from, if any.
      decision: of `auto`, where it made the gate.
    """

    fresh: Callable[[], Fresh]
    form: GateConfig
    level: str
    demos: Demos
    cards: Sequence[Mapping[str, Any]]
    guide: Guide | None
    older: "Older | None"
    decision: Mapping[str, Any] | None = None


def publish(trained: Trained) -> Published:
    """Put the gate into its library."""
    plan, content = trained.plan, trained.plan.content
    gate = content.fresh().gate
    if trained.state is not None:
        gate = gate | {"head": trained.state.params}
    [name] = plan.names
    load, older = None, content.older
    if content.form.head in SPARSE_HEADS:
        states = content.fresh().frozen.normaliser(content.demos.dataset.obs)
        load = load_of(content.form, gate, states, plan.record["skills"])
    SkillLibrary.open(plan.library).add_gate(
        name,
        gate,
        {
            "skills": plan.record["skills"],
            "level": content.level,
            "gate": dataclasses.asdict(content.form),
            "env": plan.record["env"],
            "data": content.demos.card(),
            "critics": content.guide and content.guide.finished.brief(),
            "chosen": content.fresh().chosen,
            "start": older and {n: older.card[n] for n in ("name", "fingerprint")},
            "load": load,
            "returns": None,
            "steps": 0 if trained.state is None else plan.steps,
            "base_fingerprint": content.cards[0]["base_fingerprint"],
            "skill_fingerprints": plan.record["skill_fingerprints"],
            "config": trained.run.config,
            "versions": versions(),
        }
        | ({"decision": content.decision} if content.decision else {}),
        overwrite=True,
    )
    result = {} if load is None else {"load": load}
    return Published({name: compose(plan.library, gate=name)}, result)


def load_of(
    form: GateConfig, gate: Params, obs: jax.Array, skills: Sequence[str]
) -> dict[str, Any]:
    """How many skills a gate keeps active on states, and which.

    Args:
      form: of the gate.
      gate: its parameters.
      obs: normalised states, [N, S].
      skills: names, in the order of the weights.

    Returns:
      "states", N; "active", the mean number of weights of a state that are not 0; and
      of each skill in "skills" the share of the states in which it is "active" and its
      mean "weight". Where layers have weights of their own, also means over layers.
    """

    @jax.jit
    def weigh(gate: Params, obs: jax.Array) -> jax.Array:
        one = functools.partial(gate_alpha, form, gate)
        return jax.lax.map(one, obs, batch_size=LOAD_BATCH)

    names = (*(("base",) if form.base_member else ()), *skills)
    alpha = np.asarray(weigh(gate, obs)).reshape(-1, len(names))
    active = (alpha != 0).mean(axis=0)
    means = alpha.mean(axis=0)
    return {
        "states": len(obs),
        "active": float(active.sum()),
        "skills": {
            name: {"active": float(share), "weight": float(mean)}
            for name, share, mean in zip(names, active, means, strict=True)
        },
    }


class Older(NamedTuple):
    """A gate of the library that another one starts from."""

    params: Params
    card: Mapping[str, Any]


def _older(request: Request, form: GateConfig, level: str) -> Older:
    """The gate that a request starts from.

    Raises:
      InputError: it is not there or damaged, of other skills than the first of the
        request's, of another form or level, or has nothing to be trained on.
    """
    if form.head in UNTRAINED_HEADS:
        raise InputError(f"start: the head {form.head!r} is not trained, give none")
    if request.alpha is not None:
        raise InputError("alpha: got weights and a gate to start from, expected one")
    library = SkillLibrary.open(request.library)
    params, card = library.load_gate(str(request.start))
    what = f"start: gate {request.start!r}"
    theirs, mine = card["skills"], request.skills
    if list(mine[: len(theirs)]) != theirs or len(mine) == len(theirs):
        raise InputError(
            f"{what} weighs {', '.join(theirs)}; expected the first of the skills "
            f"{', '.join(mine)}, in their order, and one or more behind them"
        )
    newer = {"level": level} | dataclasses.asdict(form)
    older = {"level": card["level"]} | dataclasses.asdict(gate_config(card))
    for field, value in older.items():
        if field not in ("candidates", "rule") and value != newer[field]:
            raise InputError(
                f"{what} has {field} {value}, this one {newer[field]}; expected the "
                "same"
            )
    if np.any(params.get("support", {}).get("tau", 0) >= support.EVERYWHERE):
        raise InputError(f"{what} has a fallback, which leaves no state to new skills")
    return Older(params, card)


# Fields that came later are recorded where they are used, so that older runs resume.
_LATER = ("top_p", "temperature", "per_layer", "q_of")


def _recorded(section: GateSection) -> dict[str, Any]:
    """The section as a run records it."""
    usual = dataclasses.asdict(GateSection())
    return {
        name: value
        for name, value in dataclasses.asdict(section).items()
        if name not in _LATER or value != usual[name]
    }


def _config(job: Job, policy: Policy, library: Params, skills: int) -> GateTrainConfig:
    """The composed policy with the gate's form, and how its head is trained."""
    section = job.gate
    base_member = section.level != "parameter"
    count = skills + base_member
    if section.head == "topk" and section.top_k > count:
        raise InputError(
            f"gate.top_k: got {section.top_k}, expected {count} or less for {skills} "
            f"skills at the {section.level} level"
        )
    loss = section.loss
    if loss == "auto":
        loss = "diffusion" if section.level == "parameter" else "cloning"
    composed = dataclasses.replace(
        policy.config,
        level=section.level,
        gate=part(
            GateConfig,
            section,
            base_member=base_member,
            layers=len(layers_of(library)) if section.per_layer else 0,
        ),
        rule=section.rule,
        candidates=section.candidates if section.head == "select" else 1,
    )
    return GateTrainConfig(
        policy=composed,
        loss=loss,
        optimiser=section.optimiser,
        batch_size=section.batch_size,
        compat=section.compat,
    )


def candidate_weights(
    strength: jax.Array, base_member: bool, alphas: Sequence[Sequence[float]] = ()
) -> jax.Array:
    """The weights [W, K] that critics choose among.

    By default all ways to share the strength of one skill in quarters, and the base
    alone; at the noise and action levels the base takes part in the sharing.

    Args:
      strength: [K] of the skills.
      base_member: whether weight 0 is the base's.
      alphas: the candidates instead of these.

    Raises:
      InputError: a candidate of another number of weights, or so many skills that
        their shares are too many.
    """
    count = len(strength) + base_member
    for row in alphas:
        if len(row) != count:
            raise InputError(
                f"gate.alphas: got {tuple(row)}, expected {count} weights"
                f"{', the first for the base' if base_member else ''}"
            )
    if alphas:
        return jnp.asarray(alphas, jnp.float32)
    if count > MAX_SHARED:
        raise InputError(
            f"gate.alphas: got none for {count} weights, expected the candidates, of "
            f"which those of up to {MAX_SHARED} weights have a default"
        )
    shares = [s for s in itertools.product(range(5), repeat=count) if sum(s) == 4]
    scale = jnp.ones(count) if base_member else strength
    rows = jnp.asarray(sorted(shares, reverse=True)) / 4 * scale
    return rows if base_member else jnp.concatenate([rows, jnp.zeros((1, count))])


def _guide(section: GateSection, request: Request, policy: Policy) -> Guide | None:
    """The critics of a gate that critics guide.

    Raises:
      InputError: none given, given to a gate that reads none, of another base, or
        without a kind that the rule reads.
    """
    if not section.guided:
        if request.critics is not None:
            raise InputError(
                f"critics: {request.critics} was given, the head {section.head!r} with "
                f"the loss {section.loss!r} reads none"
            )
        return None
    if request.critics is None:
        what = "head 'select'" if section.head == "select" else f"loss {section.loss!r}"
        raise InputError(f"critics: got none, the gate's {what} reads those of a run")
    finished = critic_file.load(request.critics)
    check_critics(request.critics, finished, policy)
    twins_of(request.critics, finished, section.rule)
    return Guide(request.critics, finished)


def _estimated(section: GateSection) -> bool:
    """Whether anything is estimated: values of weights, or the cost weight."""
    several = section.rule == "reward_cost" and len(section.cost_weights) > 1
    return several or section.q_of == "own"


def _within(limit: float, demos: Demos) -> Demos:
    """The demonstrations of a cost within the limit."""
    chosen = dataset.select(demos.dataset, max_cost=limit, source=demos.source)
    return demos._replace(dataset=chosen)


def fit_support(
    config: support.SupportConfig,
    form: str,
    skill_demos: Sequence[Demos],
    background: Demos | None,
    normaliser: Normaliser,
    new: int = 0,
) -> Params:
    """The support of each skill from its own demonstrations; see `psec_jax.support`.

    Args:
      config: how it is fitted.
      form: a key of `support.FITS`.
      skill_demos: of each skill.
      background: of the base, for the learned form.
      normaliser: of observations.
      new: fit those of the last skills alone, this many; 0 is all. The states of the
        others are background.
    """
    obs = [np.asarray(normaliser(d.dataset.obs)) for d in skill_demos]
    trajectories = [
        [states[rows] for rows in dataset.episode_slices(d.dataset)]
        for states, d in zip(obs, skill_demos, strict=True)
    ]
    states = obs[0][:0]
    if background is not None:
        states = np.asarray(normaliser(background.dataset.obs))
    fit = lookup(support.FITS, form, "gate.support")
    others = [np.concatenate(t) for t in trajectories[:-new]] if new else []
    return fit(config, trajectories[-new:], np.concatenate([states, *others]))


def start_weights(
    start: str,
    head: str,
    strength: jax.Array,
    base_member: bool,
    alpha: Sequence[float] | None = None,
    layers: int = 0,
) -> jax.Array:
    """Weights a gate's head starts from.

    "strength": at the parameter level the first skill at its training strength, the
    others at 0; at the noise and action levels weight 1 on the first skill, 0 on the
    base and the others. "zero": all 0, at the noise and action levels 1 on the base:
    both mean the base alone. Bounded heads take their largest values instead: every
    skill's strength, or 1 for each weight at the noise and action levels. Given weights
    `alpha` may be those of each of the layers, one layer after another: [L, K].

    Raises:
      InputError: an unknown name, another number of weights, or no weights for a
        constant head over several skills, which would leave all but the first out.
    """
    count = len(strength) + base_member
    if alpha is not None:
        if len(alpha) not in {count, count * max(layers, 1)}:
            each = f", or {layers} x {count} of the layers" if layers else ""
            raise InputError(f"alpha: got {len(alpha)} weights, expected {count}{each}")
        given = jnp.asarray(alpha, jnp.float32)
        return given if len(alpha) == count else given.reshape(layers, count)
    if head in BOUNDED_HEADS:
        return jnp.ones(count) if base_member else strength
    if head == "constant" and len(strength) > 1:
        raise InputError(
            f"alpha: a constant head over {len(strength)} skills needs {count} weights"
            f"{', the first for the base' if base_member else ''}"
        )
    starts = {
        "strength": (0.0, 1.0) if base_member else (strength[0],),
        "zero": (1.0,) if base_member else (0.0,),
    }
    first = lookup(starts, start, "gate.start")
    return jnp.zeros(count).at[: len(first)].set(jnp.asarray(first))


def _skill_demos(
    load: Load,
    box: ActionBox | None,
    cards: Sequence[Mapping[str, Any]],
    paths: Sequence[str],
    named: str | None,
) -> list[Demos]:
    """Each skill's own demonstrations, checked against its card."""
    if paths and len(paths) != len(cards):
        raise InputError(
            f"support_data: got {len(paths)} files for {len(cards)} skills"
        )
    loaded = []
    for i, card in enumerate(cards):
        what, path = f"skill {card['name']!r}", paths[i] if paths else None
        demos = _card_demos(load, box, what, card, path, "support_data", named)
        trajectories = demos.card()["trajectories"]
        if trajectories < 2:
            raise InputError(
                f"{what} was learned from {trajectories} trajectory, a support needs 2 "
                "or more to find its scale"
            )
        loaded.append(demos)
    return loaded


def own_demos(
    load: Load,
    library: str | Path,
    skills: Sequence[str],
    paths: Sequence[str],
    base_path: str | None,
    named: str | None,
) -> list[Demos]:
    """The demonstrations of each skill and of the base, from files or collected again.

    Raises:
      InputError: a card that names none, or they are not those that it names.
    """
    opened = SkillLibrary.open(library)
    cards = [opened.card("skill", name) for name in skills]
    base = opened.card("base", "base")
    box = box_of_card(base.get("actions"))
    return [
        *_skill_demos(load, box, cards, paths, named),
        _card_demos(load, box, "base", base, base_path, "base_data", named),
    ]


def _card_demos(
    load: Load,
    box: ActionBox | None,
    what: str,
    card: Mapping[str, Any],
    path: str | None,
    flag: str,
    named: str | None,
) -> Demos:
    """The demonstrations a card names, from a file or collected again.

    Raises:
      InputError: the card names none, or they are not those that it names.
    """
    known = card.get("data")
    if path is None and not (known and card.get("env")):
        raise InputError(
            f"{what}: its card names no data to collect again; give --{flag}"
        )
    selection = Selection(**(known or {}).get("selection", {}))
    trajectories = known["trajectories"] if known else 0
    if selection.transitions is not None or selection.leave_out is not None:
        # The first of these are others than those that were left of more.
        section = card["config"].get("skill") or card["config"]["base"]
        trajectories = section["episodes"]
    wanted = Wanted(compare=False, box=box)
    env = card_env(card, what, named) if path is None else card.get("env")
    demos = load(env, trajectories, path, selection, wanted)
    if known and demos.card()["fingerprint"] != known["fingerprint"]:
        raise InputError(
            f"{demos.source}: not the data {what} was learned from (fingerprint "
            f"{demos.card()['fingerprint']}, expected {known['fingerprint']}); "
            f"name it with --{flag}"
        )
    return demos
