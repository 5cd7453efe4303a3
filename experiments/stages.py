"""The stages of the main job, each one call: pretrain, expand, compose, evaluate.

The commands of launch/ and the tables call these; a finished stage is not run again.
"""

import dataclasses
import functools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.configs import dmc_walker, dsrl
from experiments.programs import Load, Ready, RollOut, Stage, Train, Work, Write
from psec_jax import envs, support, tree
from psec_jax.agents import critic_file
from psec_jax.agents import critics as critic_agent
from psec_jax.agents import gate as gate_agent
from psec_jax.agents import offline as offline_agent
from psec_jax.agents import pretrain as pretrain_agent
from psec_jax.agents import skill as skill_agent
from psec_jax.agents.common import (
    OptimiserConfig,
    TrainData,
    Transitions,
    make_transitions,
    reward_scale,
)
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import CriticConfig, CriticParams
from psec_jax.agents.offline import Frozen, OfflineConfig, OfflineData
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.data import dataset, normalise
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import Episodes
from psec_jax.gating import BOUNDED_HEADS, GateConfig, init_gate
from psec_jax.library import SkillLibrary
from psec_jax.lora import ADAPTERS
from psec_jax.losses import OBJECTIVES, WeightConfig
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.policy import (
    Policy,
    check_critics,
    load_base,
    load_skills,
    network_config,
    process_config,
)
from psec_jax.policy import compose as load_composition
from psec_jax.process import ProcessConfig
from psec_jax.runtime.run import Run, open_run, versions
from psec_jax.types import Normaliser
from psec_jax.workflows.demonstrations import (
    FIRST,
    Demos,
    Selection,
    check_robot,
    known_env,
)

# Least values of what no dataclass of the core checks before training starts.
LEAST = {"steps": 1, "batch_size": 1, "episodes": 0, "rank": 1, "reward_scale": 0}


def best_of_safe(config: ConfigDict) -> Selection:
    """Of the trajectories within the cost limit those of high return: a gate's data.

    Raises:
      InputError: a config without `cost_limit` or `table.return_quantile`.
    """
    quantile = config.get("table", {}).get("return_quantile")
    if "cost_limit" not in config or quantile is None:
        raise InputError(
            "config: has no field 'cost_limit' or no 'table.return_quantile', by which "
            "the best trajectories are chosen; experiments/configs/dsrl.py has them"
        )
    return Selection(max_cost=float(config.cost_limit), return_quantile=float(quantile))


def check_config(
    config: ConfigDict,
    section: str,
    evaluate_after: bool,
    extra: Sequence[str] = (),
) -> None:
    """Refuse numbers that no run can use, before anything is written.

    Args:
      config: resolved config.
      section: of the stage.
      evaluate_after: whether `config.evaluation` will be used.
      extra: sections of experiments/configs/dsrl.py that offline RL reads.

    Raises:
      InputError: a field that is missing, or a number that is not finite or too
        small; the field is named.
    """
    used = ("normaliser", "std_floor", "network", "diffusion", "data", "skill")
    used += ("support", "evaluation", "run", section)
    file, known = "dmc_walker", dmc_walker.get_config().to_dict()
    if extra:
        file, known = "dsrl", dsrl.get_config().to_dict()
    wanted = _fields({name: known[name] for name in (*used, *extra)})
    if missing := sorted(wanted - _fields(config.to_dict())):
        raise InputError(
            f"config: has no field {missing[0]!r}; experiments/configs/{file}.py "
            "shows every field"
        )
    for name, value in _numbers(config.to_dict()):
        if not math.isfinite(value):
            raise InputError(f"{name}: got {value}, expected a finite number")
    least = {
        f"{place}.{field}": least
        for place in {section, *extra} - {"cost_limit"}
        for field, least in LEAST.items()
    }
    least |= {
        f"run.{field}": 1
        for field, value in config.run.items()
        if not isinstance(value, bool)
    }
    if evaluate_after:
        least |= {"evaluation.episodes": 1, "evaluation.seed": 0}
    for name, bound in least.items():
        place, field = name.split(".")
        value = config[place].get(field, bound)
        if value < bound:
            raise InputError(f"{name}: got {value}, expected {bound} or more")
    if config.get("cost_limit", 0) < 0:
        raise InputError(f"cost_limit: got {config.cost_limit}, expected 0 or more")
    if config.std_floor <= 0:
        raise InputError(f"std_floor: got {config.std_floor}, expected above 0")


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the numbers in a nested dict."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def _fields(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the fields of a nested dict."""
    names = set()
    for name, value in config.items():
        # The environments under data.seeds are the user's own.
        if isinstance(value, Mapping) and name != "seeds":
            names |= _fields(value, f"{prefix}{name}.")
        else:
            names.add(f"{prefix}{name}")
    return names


def check_env(env: str, demos: Demos) -> None:
    """Refuse demonstrations whose sizes are not the environment's.

    Raises:
      InputError: other sizes, or an environment that cannot be made.
    """
    made = envs.make(env)
    made.close()
    _check_sizes(demos, made.obs_dim, made.action_dim, env)


def check_fit(demos: Demos, policy: Policy) -> None:
    """Refuse demonstrations whose sizes are not the base's."""
    obs_dim = len(policy.params.normaliser.mean)
    _check_sizes(demos, obs_dim, policy.config.action_dim, "the library's base")


def _check_sizes(demos: Demos, obs_dim: int, action_dim: int, owner: str) -> None:
    for what, got, expected in (
        ("observations", demos.dataset.obs, obs_dim),
        ("actions", demos.dataset.action, action_dim),
    ):
        if got.shape[1] != expected:
            raise InputError(
                f"{demos.source}: {what} have {got.shape[1]} numbers, "
                f"{owner} expects {expected}"
            )


def open_stage(
    workdir: str | Path,
    library: str | Path,
    kind: str,
    names: str | Sequence[str],
    record: Mapping[str, Any],
) -> tuple[Run, dict[str, Any] | None]:
    """The folder of a run, and its result where nothing is left to do.

    A finished run whose entry the library lost, or never had, puts it there again.

    Args:
      workdir: the run's folder.
      library: folder of the library that gets the entry.
      kind: "base", "skill" or "gate".
      names: of the entry, or of several.
      record: everything the entries depend on.

    Raises:
      InputError: the folder holds another run, or the library an entry of this name
        that another run made.
    """
    names = [names] if isinstance(names, str) else names
    held = [SkillLibrary(library).holds(kind, name, record) for name in names]
    there = all(held)
    run = open_run(workdir, kind, record)
    done = run.result()
    if done is None or not there:
        return run, None
    return run, done | {"library": str(library)}


def train_config(config: ConfigDict, section: str) -> OptimiserConfig:
    """The optimiser of a stage: cosine decay over all of its steps."""
    stage = config[section]
    return OptimiserConfig(
        learning_rate=stage.learning_rate,
        decay_steps=stage.steps,
        weight_decay=stage.weight_decay,
        ema=stage.ema,
    )


OFFLINE_SECTIONS = ("critics", "weights", "cost_limit")


def load_critics(workdir: str | Path | None, needed: Sequence[str]) -> Finished | None:
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


def critic_config(config: ConfigDict, batch_size: int | None = None) -> CriticConfig:
    """What `config.critics` says; `batch_size` is that of skills trained with them."""
    stage = config.critics
    return CriticConfig(
        safety=stage.safety,
        widths=tuple(stage.widths),
        discount=stage.discount,
        expectile=stage.expectile,
        safety_expectile=stage.safety_expectile,
        learning_rate=stage.learning_rate,
        target_rate=stage.target_rate,
        batch_size=batch_size or stage.batch_size,
    )


def transitions(
    config: ConfigDict, demos: Demos, normaliser: Normaliser, safety: bool
) -> Transitions:
    """Demonstrations as critics read them."""
    stage = config.critics
    scale = 1.0
    if stage.scale_rewards:
        scale = stage.get("reward_scale") or reward_scale(demos.dataset)
    return make_transitions(
        demos.dataset,
        normaliser,
        scale=scale,
        violation=stage.violation,
        bootstrap_timeouts=stage.bootstrap_timeouts,
        safety=safety,
        source=demos.source,
    )


def _save_critics(
    run: Run,
    config: CriticConfig,
    params: CriticParams,
    normaliser: Normaliser,
    demos: Demos,
    summary: Mapping[str, Any],
) -> Finished:
    """Put trained critics into their run's folder."""
    card = {
        "kinds": list(config.kinds),
        "obs_dim": demos.dataset.obs.shape[1],
        "action_dim": demos.dataset.action.shape[1],
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


@Stage
def train_critics(
    config: ConfigDict,
    *,
    workdir: str | Path,
    library: str | Path,
    seed: int,
    env: str | None = None,
    data: str | None = None,
    selection: Selection = FIRST,
) -> Work:
    """Train critics alone, to be shared by skills; they stay in the run's folder.

    Args:
      config: resolved config; its `critics` section is used.
      workdir: the run's folder.
      library: folder of an existing library, whose base says how observations are
        scaled.
      seed: of parameters and batches.
      env: environment; default as in `expand`.
      data: transitions; default collects.
      selection: which trajectories.

    Returns:
      The run's result: training summary, fingerprint, kinds.

    Raises:
      InputError: bad data, or a workdir of another run.
    """
    check_config(config, "critics", False, OFFLINE_SECTIONS)
    agent = critic_config(config)
    _, normaliser, _ = SkillLibrary.open(library).load_base()
    env = env or known_env(data) or config.skill.env
    episodes = config.skill.episodes
    demos = yield Load(config, env, episodes, data, selection, agent.safety)
    check_fit(demos, load_base(library))
    rows = transitions(config, demos, normaliser, agent.safety)
    record = {
        "seed": seed,
        "data": demos.card(),
        "normaliser": tree.fingerprint(normaliser._asdict()),
        "critics": config.critics.to_dict(),
    }
    yield Ready(demos, agent.batch_size, config.run)
    run = open_run(workdir, "critics", record)
    done = run.result()
    if done is not None:
        return done
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state, summary = yield Train(
        functools.partial(critic_agent.update, agent),
        functools.partial(critic_agent.index, agent),
        critic_agent.init(agent, init_key, rows.obs.shape[1], rows.action.shape[1]),
        rows,
        train_key,
        run=run,
        steps=config.critics.steps,
        stage="critics",
        options=config.run,
    )
    yield Write()
    saved = _save_critics(run, agent, state.trained, normaliser, demos, summary)
    result = {"summary": summary}
    result |= {name: saved.card[name] for name in ("fingerprint", "kinds")}
    run.finish(result)
    return result


class Offline(NamedTuple):
    """A run of offline RL, checked and ready to be trained; see `prepare_offline`."""

    agent: OfflineConfig
    rows: Transitions
    demos: Demos
    normaliser: Normaliser
    finished: Finished | None


def prepare_offline(
    config: ConfigDict,
    actor: skill_agent.SkillConfig | pretrain_agent.PretrainConfig,
    objectives: Sequence[str],
    demos: Demos,
    normaliser: Normaliser,
    finished: Finished | None,
) -> Offline:
    """Check everything that offline RL needs, before anything is written.

    Args:
      config: resolved config; its `critics` and `weights` sections are used.
      actor: skills or a base.
      objectives: one for each skill.
      demos: transitions.
      normaliser: of observations.
      finished: critics to use as they are; None trains critics in the same program.

    Raises:
      InputError: objectives that do not go together, or data that critics cannot use.
    """
    critics = None if finished else critic_config(config, actor.batch_size)
    agent = OfflineConfig(
        actor, tuple(objectives), critics, WeightConfig(**config.weights)
    )
    if critics:
        rows = transitions(config, demos, normaliser, critics.safety)
    else:  # finished critics read states and actions alone
        rows = make_transitions(
            demos.dataset, normaliser, safety=False, source=demos.source
        )
    return Offline(agent, rows, demos, normaliser, finished)


def train_offline(
    config: ConfigDict,
    prepared: Offline,
    *,
    run: Run,
    seed: int,
    steps: int,
    base: Any = None,
    start: Any = None,
) -> Generator[Train | Write, Any, tuple[Any, dict[str, Any], Finished]]:
    """Train skills or a base on objectives of offline RL, with their critics.

    Args:
      config: resolved config.
      prepared: what is trained.
      run: open run.
      seed: of parameters, batches and noise.
      steps: updates.
      base: under the skills.
      start: parameters a base is trained on; None starts afresh.

    Returns:
      Averaged parameters of the actor (skills have leaves [K, ...]), the training
      summary, and the critics.
    """
    agent, rows, finished = prepared.agent, prepared.rows, prepared.finished
    frozen = Frozen(base, finished.params if finished else None)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state, summary = yield Train(
        functools.partial(offline_agent.update, agent),
        functools.partial(offline_agent.index, agent),
        offline_agent.init(
            agent, init_key, rows.obs.shape[1], rows.action.shape[1], base, start
        ),
        OfflineData(rows, frozen),
        train_key,
        run=run,
        steps=steps,
        stage=" ".join(agent.objectives),
        options=config.run,
    )
    yield Write()
    if finished is None:
        finished = _save_critics(
            run,
            agent.critics,
            state.critics.trained,
            prepared.normaliser,
            prepared.demos,
            summary,
        )
    return state.actor.ema, summary, finished


def _needed(objectives: Sequence[str]) -> list[str]:
    """The critics that objectives read, sorted.

    Raises:
      InputError: an unknown objective.
    """
    read = [lookup(OBJECTIVES, name, "objective").critics for name in objectives]
    return sorted({kind for kinds in read for kind in kinds})


def _critics_card(finished: Finished | None) -> dict[str, Any]:
    """What a card says of the critics, where there were some."""
    return {"critics": finished.brief()} if finished else {}


def _critics_record(config: ConfigDict, finished: Finished | None) -> dict[str, Any]:
    """What a run that reads critics depends on, beside its own section."""
    critics = finished.card["fingerprint"] if finished else config.critics.to_dict()
    return {"critics": critics, "weights": config.weights.to_dict()}


@Stage
def pretrain(
    config: ConfigDict,
    *,
    workdir: str | Path,
    library: str | Path,
    seed: int,
    env: str | None = None,
    data: str | None = None,
    selection: Selection = FIRST,
    name: str = "base",
    section: str = "base",
    objective: str = "bc",
    critics: str | Path | None = None,
    start: str | Path | None = None,
    evaluate_after: bool = True,
) -> Work:
    """Train a base on demonstrations and put it into a library.

    Args:
      config: resolved config; `config[section]` holds episodes, steps and optimiser.
      workdir: the run's folder.
      library: folder of the library, made if missing.
      seed: of parameters, batches and noise.
      env: environment; default that of `data`, where that is a known set, else
        `config.base.env`.
      data: demonstrations; default collects.
      selection: which of them.
      name: of the base in its card.
      section: "skill" trains a base on a skill's budget: the Scratch baseline.
      objective: a key of `OBJECTIVES`; "fisor" is the FISOR baseline.
      critics: folder of a finished run whose critics (and scaling of observations) are
        used; None trains critics together with a base that needs them.
      start: folder of a library whose base is trained on, with its scaling of
        observations: fine-tuning of all parameters; None starts afresh.
      evaluate_after: roll the base out and record its returns on the card.

    Returns:
      The run's result: training summary, returns, library.

    Raises:
      InputError: bad data, a workdir that holds another run, or a library whose base
        another run made.
    """
    needed = _needed([objective])
    check_config(config, section, evaluate_after, OFFLINE_SECTIONS if needed else ())
    stage = config[section]
    env = env or known_env(data) or config.base.env
    make_normaliser = lookup(normalise.NORMALISERS, config.normaliser, "normaliser")
    network = NetworkConfig(**config.network, dropout=stage.dropout)
    diffusion = ProcessConfig(**config.diffusion)
    first, more = None, {}
    if start is not None:
        first, first_normaliser, card = SkillLibrary.open(start).load_base()
        network = dataclasses.replace(network_config(card), dropout=stage.dropout)
        diffusion = process_config(card)
        more["start"] = card["fingerprint"]
    agent = pretrain_agent.PretrainConfig(
        network, diffusion, train_config(config, section), stage.batch_size
    )
    demos = yield Load(config, env, stage.episodes, data, selection, "safety" in needed)
    if data and evaluate_after:
        check_env(env, demos)
    finished = load_critics(critics, needed)
    if start is not None:
        check_fit(demos, load_base(start))
        normaliser = first_normaliser
        if finished:
            check_critics(critics, finished, load_base(start))
    elif finished:
        _check_sizes(demos, *finished.dims, str(critics))
        normaliser = finished.normaliser
    else:
        normaliser = make_normaliser(demos.dataset.obs, config.std_floor)
    offline = None
    if needed:
        offline = prepare_offline(
            config, agent, [objective], demos, normaliser, finished
        )
        more |= _critics_record(config, finished) | {"objective": objective}
    yield Ready(demos, agent.batch_size, config.run)
    run, done = open_stage(
        workdir,
        library,
        "base",
        "base",
        more
        | {
            "name": name,
            "seed": seed,
            "env": env,
            "data": demos.card(),
            "section": section,
            "normaliser": config.normaliser,
            "std_floor": config.std_floor,
            "network": config.network.to_dict(),
            "diffusion": config.diffusion.to_dict(),
            section: stage.to_dict(),
        },
    )
    if done is not None:
        return done
    opened = SkillLibrary.create(library)
    action_dim = demos.dataset.action.shape[1]
    if offline:
        params, summary, finished = yield from train_offline(
            config, offline, run=run, seed=seed, steps=stage.steps, start=first
        )
    else:
        init_key, train_key = jax.random.split(jax.random.key(seed))
        state, summary = yield Train(
            functools.partial(pretrain_agent.update, agent),
            functools.partial(pretrain_agent.index, agent),
            pretrain_agent.init(
                agent, init_key, demos.dataset.obs.shape[1], action_dim, first
            ),
            train_data(demos, normaliser),
            train_key,
            run=run,
            steps=stage.steps,
            stage="base",
            options=config.run,
        )
        params = state.ema
        yield Write()
    policy = Policy(
        PolicyConfig(network, diffusion, action_dim),
        PolicyParams(params, normaliser),
    )
    returns = None
    if evaluate_after:
        returns = yield from episodes_card(config, policy, env)
    opened.add_base(
        params,
        normaliser,
        {
            "name": name,
            "obs_dim": demos.dataset.obs.shape[1],
            "action_dim": action_dim,
            "network": dataclasses.asdict(network),
            "process": dataclasses.asdict(diffusion),
            "env": env,
            "data": demos.card(),
            "returns": returns,
            "steps": stage.steps,
            "config": run.config,
            "versions": versions(),
        }
        | ({"objective": objective} if needed else {})
        | _critics_card(finished),
        overwrite=True,
    )
    result = {"summary": summary, "returns": returns, "library": str(library)}
    run.finish(result)
    return result


def train_data(demos: Demos, normaliser: Any, frozen: Any = None) -> TrainData:
    """Demonstrations, normalised once."""
    obs = np.asarray(normaliser(demos.dataset.obs))
    return TrainData(obs, np.asarray(demos.dataset.action), frozen)


@Stage
def expand(
    config: ConfigDict,
    *,
    workdir: str | Path,
    library: str | Path,
    seed: int,
    name: str | Sequence[str],
    env: str | None = None,
    data: str | None = None,
    selection: Selection = FIRST,
    critics: str | Path | None = None,
    evaluate_after: bool = True,
) -> Work:
    """Learn skills from demonstrations, the library's base frozen, and add them.

    Args:
      config: resolved config; its `skill` section is used. `config.skill.objective`
        may name several objectives, joined by commas: a skill each, learned in one
        program.
      workdir: the run's folder.
      library: folder of an existing library.
      seed: of parameters, batches and noise.
      name: of the skill, or of each of them.
      env: environment; default that of `data`, where that is a known set, else
        `config.skill.env`.
      data: demonstrations; default collects.
      selection: which of them.
      critics: folder of a finished run whose critics are used; None trains critics
        together with skills that need them, and keeps them in `workdir`.
      evaluate_after: roll the skills out at their training strength.

    Returns:
      The run's result: training summary, library, and returns; those of several skills
      by name.

    Raises:
      InputError: bad data, an unknown objective, a workdir of another run, critics of
        another base, or a name that another run took.
    """
    check_config(config, "skill", evaluate_after)
    stage = config.skill
    objectives = str(stage.objective).split(",")
    names = [name] if isinstance(name, str) else list(name)
    needed = _needed(objectives)
    if len(names) != len(objectives) or len(set(names)) < len(names):
        raise InputError(
            f"name: got {', '.join(names)}, expected {len(objectives)} different for "
            f"the objectives {', '.join(objectives)}"
        )
    if needed:
        check_config(config, "skill", evaluate_after, OFFLINE_SECTIONS)
    env = env or known_env(data) or stage.env
    lookup(ADAPTERS, stage.adapter, "adapter")
    opened = SkillLibrary.open(library)
    base, normaliser, base_card = opened.load_base()
    agent = skill_agent.SkillConfig(
        network=dataclasses.replace(network_config(base_card), dropout=stage.dropout),
        process=process_config(base_card),
        optimiser=train_config(config, "skill"),
        batch_size=stage.batch_size,
        rank=stage.rank,
        adapter=stage.adapter,
        alpha=stage.alpha,
    )
    check_robot(env, base_card.get("env", ""), str(library))
    demos = yield Load(config, env, stage.episodes, data, selection, "safety" in needed)
    base_policy = load_base(library)
    check_fit(demos, base_policy)
    if data and evaluate_after:
        check_env(env, demos)
    finished = load_critics(critics, needed)
    if finished:
        check_critics(critics, finished, base_policy)
    record = {
        "name": names[0] if len(names) == 1 else names,
        "seed": seed,
        "env": env,
        "data": demos.card(),
        "base_fingerprint": base_card["fingerprint"],
        "skill": stage.to_dict(),
    }
    offline = None
    if needed:
        record |= _critics_record(config, finished)
        offline = prepare_offline(
            config, agent, objectives, demos, normaliser, finished
        )
    yield Ready(demos, agent.batch_size, config.run)
    run, done = open_stage(workdir, library, "skill", names, record)
    if done is not None:
        return done
    base = jax.tree.map(jnp.asarray, base)
    if offline:
        stacked, summary, finished = yield from train_offline(
            config, offline, run=run, seed=seed, steps=stage.steps, base=base
        )
    else:
        init_key, train_key = jax.random.split(jax.random.key(seed))
        state, summary = yield Train(
            functools.partial(skill_agent.update, agent),
            functools.partial(skill_agent.index, agent),
            skill_agent.init(agent, init_key, base),
            train_data(demos, normaliser, base),
            train_key,
            run=run,
            steps=stage.steps,
            stage="skill",
            options=config.run,
        )
        stacked = tree.stack([state.ema])
        yield Write()
    returns = {}
    for k, (skill, objective) in enumerate(zip(names, objectives, strict=True)):
        opened.add_skill(
            skill,
            jax.tree.map(lambda leaf, k=k: leaf[k], stacked),
            {
                "adapter": stage.adapter,
                "rank": stage.rank,
                "alpha": stage.alpha,
                "objective": objective,
                "env": env,
                "data": demos.card(),
                "returns": None,
                "steps": stage.steps,
                "base_fingerprint": base_card["fingerprint"],
                "config": run.config,
                "versions": versions(),
            }
            | _critics_card(finished),
            overwrite=True,
        )
        returns[skill] = None
        if evaluate_after:
            policy = load_composition(library, [skill])
            returns[skill] = yield from episodes_card(config, policy, env)
            opened.set_returns("skill", skill, returns[skill])
    result = {
        "summary": summary,
        "returns": returns if len(names) > 1 else returns[names[0]],
        "library": str(library),
    }
    run.finish(result)
    return result


def fit_support(
    config: support.SupportConfig,
    form: str,
    skill_demos: Sequence[Demos],
    background: Demos | None,
    normaliser: Any,
) -> dict[str, Any]:
    """The support of each skill from its own demonstrations; see `psec_jax.support`."""
    obs = [np.asarray(normaliser(d.dataset.obs)) for d in skill_demos]
    trajectories = [
        [states[rows] for rows in dataset.episode_slices(d.dataset)]
        for states, d in zip(obs, skill_demos, strict=True)
    ]
    states = obs[0][:0]
    if background is not None:
        states = np.asarray(normaliser(background.dataset.obs))
    fit = lookup(support.FITS, form, "gate.support")
    return fit(config, trajectories, states)


@Stage
def compose(
    config: ConfigDict,
    *,
    workdir: str | Path,
    library: str | Path,
    seed: int,
    name: str,
    skills: Sequence[str],
    env: str | None = None,
    data: str | None = None,
    selection: Selection = FIRST,
    support_data: Sequence[str] = (),
    base_data: str | None = None,
    alpha: Sequence[float] | None = None,
    evaluate_after: bool = True,
) -> Work:
    """Make a gate over skills of a library, train its head, and add it.

    Args:
      config: resolved config; its `gate` and `support` sections are used.
      workdir: the run's folder.
      library: folder of an existing library.
      seed: of the head, batches and noise.
      name: of the gate.
      skills: names, in order of priority.
      env: the target's environment; default the last-learned skill's, skills[0].
      data: the target's demonstrations; default collects.
      selection: which of them.
      support_data: demonstrations of each skill, for a support; default collects
        again what the skill's card names.
      base_data: the base's demonstrations, shown to a learned support as states where
        other behaviour is found; default collects again what the base's card names.
      alpha: weights the head starts from (a constant head keeps them); default
        `config.gate.start`.
      evaluate_after: roll the composition out.

    Raises:
      InputError: bad data, unknown names, a workdir of another run, or a name that
        another run took.
    """
    if not skills:
        raise InputError("skills: got none, expected the names of one or more")
    check_config(config, "gate", evaluate_after)
    stage = config.gate
    policy, stacked, strength, cards = load_skills(library, skills)
    env = env or cards[0].get("env")
    if env is None:
        raise InputError(
            f"env: the card of skill {skills[0]!r} names no environment; give one"
        )
    base_member = stage.level != "parameter"
    gate_form = GateConfig(
        head=stage.head,
        support=stage.support,
        priority=stage.priority,
        base_member=base_member,
        widths=tuple(stage.widths),
        top_k=stage.top_k,
    )
    policy_config = dataclasses.replace(
        policy.config,
        network=dataclasses.replace(policy.config.network, dropout=0.0),
        level=stage.level,
        gate=gate_form,
    )
    if stage.head == "topk" and stage.top_k > len(skills) + base_member:
        raise InputError(
            f"gate.top_k: got {stage.top_k}, expected {len(skills) + base_member} or "
            f"less for {len(skills)} skills at the {stage.level} level"
        )
    support_config = support.SupportConfig(**config.support)
    loss = stage.loss
    if loss == "auto":
        loss = "diffusion" if stage.level == "parameter" else "cloning"
    agent = gate_agent.GateTrainConfig(
        policy=policy_config,
        loss=loss,
        optimiser=OptimiserConfig(
            learning_rate=stage.learning_rate, weight_decay=0.0, ema=1.0
        ),
        batch_size=stage.batch_size,
        compat=stage.compat,
    )
    start = start_weights(stage.start, stage.head, strength, base_member, alpha)
    demos = yield Load(config, env, config.skill.episodes, data, selection)
    check_fit(demos, policy)
    if data and evaluate_after:
        check_env(env, demos)
    skill_demos: list[Demos] = []
    background = None
    if stage.support != "none":
        skill_demos = yield from _skill_demos(config, cards, support_data)
    if stage.support == "learned":
        base_card = SkillLibrary.open(library).card("base", "base")
        background = yield from _card_demos(
            config, "base", base_card, base_data, "base_data"
        )
        check_fit(background, policy)
    if stage.head != "constant":
        yield Ready(demos, agent.batch_size, config.run)
    run, done = open_stage(
        workdir,
        library,
        "gate",
        name,
        {
            "name": name,
            "seed": seed,
            "env": env,
            "data": demos.card(),
            "skills": list(skills),
            "skill_fingerprints": [card["fingerprint"] for card in cards],
            "support_data": [d.card() for d in skill_demos],
            "base_data": background.card() if background else None,
            "start_weights": np.asarray(start).tolist(),
            "gate": stage.to_dict(),
            "support": config.support.to_dict(),
        },
    )
    if done is not None:
        return done
    support_params = None
    if skill_demos:
        support_params = fit_support(
            support_config,
            stage.support,
            skill_demos,
            background,
            policy.params.normaliser,
        )
    init_key, train_key = jax.random.split(jax.random.key(seed))
    gate = init_gate(
        gate_form, init_key, demos.dataset.obs.shape[1], start, support_params
    )
    summary = None
    if stage.head != "constant":
        frozen = PolicyParams(
            policy.params.base, policy.params.normaliser, stacked, strength, gate
        )
        state, summary = yield Train(
            functools.partial(gate_agent.update, agent),
            functools.partial(gate_agent.index, agent),
            gate_agent.init(agent, gate),
            train_data(demos, policy.params.normaliser, frozen),
            train_key,
            run=run,
            steps=stage.steps,
            stage="gate",
            options=config.run,
        )
        gate = gate | {"head": state.params}
    yield Write()
    opened = SkillLibrary.open(library)
    opened.add_gate(
        name,
        gate,
        {
            "skills": list(skills),
            "level": stage.level,
            "gate": dataclasses.asdict(gate_form),
            "env": env,
            "data": demos.card(),
            "returns": None,
            "steps": stage.steps if summary else 0,
            "base_fingerprint": cards[0]["base_fingerprint"],
            "skill_fingerprints": [card["fingerprint"] for card in cards],
            "config": run.config,
            "versions": versions(),
        },
        overwrite=True,
    )
    returns = None
    if evaluate_after:
        policy = load_composition(library, gate=name)
        returns = yield from episodes_card(config, policy, env)
        opened.set_returns("gate", name, returns)
    result = {"summary": summary, "returns": returns, "library": str(library)}
    run.finish(result)
    return result


def start_weights(
    start: str,
    head: str,
    strength: jax.Array,
    base_member: bool,
    alpha: Sequence[float] | None = None,
) -> jax.Array:
    """Weights a gate's head starts from.

    "strength": at the parameter level the first skill at its training strength, the
    others at 0; at the noise and action levels weight 1 on the first skill, 0 on the
    base and the others. "zero": all 0, at the noise and action levels 1 on the base:
    both mean the base alone. Bounded heads take their largest values instead: every
    skill's strength, or 1 for every member at the noise and action levels.

    Raises:
      InputError: an unknown name, another number of weights, or no weights for a
        constant head over several skills, which would leave all but the first out.
    """
    count = len(strength) + base_member
    if alpha is not None:
        if len(alpha) != count:
            raise InputError(f"alpha: got {len(alpha)} weights, expected {count}")
        return jnp.asarray(alpha, jnp.float32)
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
    config: ConfigDict, cards: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> Generator[Load, Demos, list[Demos]]:
    """Each skill's own demonstrations, checked against its card."""
    if paths and len(paths) != len(cards):
        raise InputError(
            f"support_data: got {len(paths)} files for {len(cards)} skills"
        )
    loaded = []
    for i, card in enumerate(cards):
        what, path = f"skill {card['name']!r}", paths[i] if paths else None
        demos = yield from _card_demos(config, what, card, path, "support_data")
        trajectories = demos.card()["trajectories"]
        if trajectories < 2:
            raise InputError(
                f"{what} was learned from {trajectories} trajectory, a support needs 2 "
                "or more to find its scale"
            )
        known = card.get("data")
        if known and demos.card()["fingerprint"] != known["fingerprint"]:
            raise InputError(
                f"{demos.source}: not the data {what} was learned from (fingerprint "
                f"{demos.card()['fingerprint']}, expected {known['fingerprint']}); "
                "name it with --support_data"
            )
        loaded.append(demos)
    return loaded


def _card_demos(
    config: ConfigDict, what: str, card: Mapping[str, Any], path: str | None, flag: str
) -> Generator[Load, Demos, Demos]:
    """The demonstrations a card names, from a file or collected again."""
    known = card.get("data")
    if path is None and not (known and card.get("env")):
        raise InputError(
            f"{what}: its card names no data to collect again; give --{flag}"
        )
    trajectories = known["trajectories"] if known else 0
    selection = Selection(**(known or {}).get("selection", {}))
    return (yield Load(config, card.get("env"), trajectories, path, selection))


def episodes_card(config: ConfigDict, policy: Policy, env: str) -> Work:
    """Roll a policy out and say what it gave, for cards and results."""
    seed, count = config.evaluation.seed, config.evaluation.episodes
    episodes = yield RollOut(policy, env, count, seed)
    return episodes_json(episodes, env, seed)


def episodes_json(episodes: Episodes, env: str, seed: int) -> dict[str, Any]:
    """Raw returns, costs and lengths of every episode, and their mean."""
    return {
        "env": env,
        "evaluation_seed": seed,
        "mean": float(np.mean(episodes.returns)),
        "returns": episodes.returns.tolist(),
        "costs": episodes.costs.tolist(),
        "lengths": episodes.lengths.tolist(),
    }


@Stage
def evaluate_library(
    library: str | Path,
    env: str,
    episodes: int,
    seed: int,
    *,
    skills: Sequence[str] = (),
    alpha: Sequence[float] | None = None,
    gate: str | None = None,
    level: str = "parameter",
    matmul_dtype: str | None = None,
    candidates: int = 1,
    critics: str | Path | None = None,
) -> Work:
    """Roll out what `psec_jax.policy.compose` makes of a library.

    Raises:
      InputError: names that are not there, an environment of other sizes, or fewer
        than one episode.
    """
    policy = load_composition(
        library,
        skills,
        alpha=alpha,
        gate=gate,
        level=level,
        matmul_dtype=matmul_dtype,
        candidates=candidates,
        critics=critics,
    )
    played = yield RollOut(policy, env, episodes, seed)
    return episodes_json(played, env, seed)


def describe(what: str, result: Mapping[str, Any]) -> str:
    """One line about a finished stage."""
    line = f"{what} is in {result['library']}"
    if result["returns"]:
        returns = result["returns"]
        line += f"; return {returns['mean']:.1f} in {returns['env']}"
        line += f" ({count_episodes(returns['returns'])})"
    return line


def count_episodes(returns: Sequence[float]) -> str:
    """1 episode, 2 episodes, ..."""
    return f"{len(returns)} episode{'s' * (len(returns) != 1)}"
