"""The stages of the main job, each one call: pretrain, expand, compose, evaluate.

The commands of launch/ and the tables call these; a finished stage is not run again.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.collect import collect
from experiments.configs.dmc_walker import get_config
from psec_jax import data as datasets
from psec_jax import envs, support
from psec_jax.agents import gate as gate_agent
from psec_jax.agents import pretrain as pretrain_agent
from psec_jax.agents import skill as skill_agent
from psec_jax.agents.common import OptimiserConfig, TrainData
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.data import dataset, normalise
from psec_jax.diffusion import DiffusionConfig
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import Episodes, evaluate
from psec_jax.gating import BOUNDED_HEADS, GateConfig, init_gate
from psec_jax.library import SkillLibrary
from psec_jax.lora import ADAPTERS
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.policy import (
    Policy,
    diffusion_config,
    load_base,
    load_skills,
    network_config,
)
from psec_jax.policy import compose as load_composition
from psec_jax.run import Run, open_run, versions
from psec_jax.training import train
from psec_jax.types import Dataset

OBJECTIVES = ("bc",)
# Least values of what no dataclass of the core checks before training starts.
LEAST = {"steps": 1, "batch_size": 1, "episodes": 0, "rank": 1}


class Selection(NamedTuple):
    """Which trajectories of the data are taken, where not all of them are.

    Attributes:
      best: those of highest return, not the first ones.
      min_return: none below this return.
    """

    best: bool = False
    min_return: float | None = None


FIRST = Selection()


class Demos(NamedTuple):
    """Demonstrations of one task.

    Attributes:
      dataset: whole trajectories.
      source: file or folder they come from.
      selection: how they were chosen there.
    """

    dataset: Dataset
    source: str
    selection: Selection = FIRST

    def card(self) -> dict[str, Any]:
        """What cards and configs record of the data."""
        returns = dataset.episode_returns(self.dataset)
        chosen = self.selection != FIRST
        return {
            "source": Path(self.source).name,
            "fingerprint": dataset.fingerprint(self.dataset),
            "transitions": len(self.dataset.obs),
            "trajectories": len(returns),
            "return_mean": float(np.mean(returns)),
        } | ({"selection": self.selection._asdict()} if chosen else {})


def load_demos(
    config: ConfigDict,
    env: str,
    episodes: int,
    path: str | None = None,
    selection: Selection = FIRST,
) -> Demos:
    """`episodes` trajectories of a file, or of a fresh collection.

    Args:
      config: its `data` section says how to collect.
      env: environment the demonstrations are of.
      episodes: trajectories; 0 takes all that a file has.
      path: an HDF5 file, an episode file or a folder of them; None collects with
        `config.data.policy` in `env`, or uses what was collected before.
      selection: by default the first ones.

    Raises:
      InputError: the data cannot be used.
    """
    if path is None:
        if episodes < 1:
            raise InputError(
                f"episodes: got {episodes}, expected 1 or more to collect in {env}"
            )
        path = str(
            collect(
                env,
                config.data.policy,
                max(episodes, 10),
                config.data.seeds.get(env, 0),
                config.data.action_noise,
            )
        )
    loaded = datasets.load(
        path,
        min_return=selection.min_return,
        clip_actions=config.data.clip_actions,
        **{"best" if selection.best else "first": episodes or None},
    )
    return Demos(loaded, path, selection)


def check_config(config: ConfigDict, section: str, evaluate_after: bool) -> None:
    """Refuse numbers that no run can use, before anything is written.

    Args:
      config: resolved config.
      section: of the stage.
      evaluate_after: whether `config.evaluation` will be used.

    Raises:
      InputError: a field that is missing, or a number that is not finite or too
        small; the field is named.
    """
    used = ("normaliser", "std_floor", "network", "diffusion", "data", "skill")
    used += ("support", "evaluation", "run", section)
    known = get_config().to_dict()
    wanted = _fields({name: known[name] for name in used})
    if missing := sorted(wanted - _fields(config.to_dict())):
        raise InputError(
            f"config: has no field {missing[0]!r}; experiments/configs/dmc_walker.py "
            "shows every field"
        )
    for name, value in _numbers(config.to_dict()):
        if not math.isfinite(value):
            raise InputError(f"{name}: got {value}, expected a finite number")
    least = {f"{section}.{field}": least for field, least in LEAST.items()}
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
    name: str,
    record: Mapping[str, Any],
) -> tuple[Run, dict[str, Any] | None]:
    """The folder of a run, and its result where nothing is left to do.

    A finished run whose entry the library lost, or never had, puts it there again.

    Args:
      workdir: the run's folder.
      library: folder of the library that gets the entry.
      kind: "base", "skill" or "gate".
      name: of the entry.
      record: everything the entry depends on.

    Raises:
      InputError: the folder holds another run, or the library an entry of this name
        that another run made.
    """
    there = SkillLibrary(library).holds(kind, name, record)
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
    evaluate_after: bool = True,
) -> dict[str, Any]:
    """Train a base on demonstrations and put it into a library.

    Args:
      config: resolved config; `config[section]` holds episodes, steps and optimiser.
      workdir: the run's folder.
      library: folder of the library, made if missing.
      seed: of parameters, batches and noise.
      env: environment; default `config.base.env`.
      data: demonstrations; default collects.
      selection: which of them.
      name: of the base in its card.
      section: "skill" trains a base on a skill's budget: the Scratch baseline.
      evaluate_after: roll the base out and record its returns on the card.

    Returns:
      The run's result: training summary, returns, library.

    Raises:
      InputError: bad data, a workdir that holds another run, or a library whose base
        another run made.
    """
    check_config(config, section, evaluate_after)
    stage = config[section]
    env = env or config.base.env
    make_normaliser = lookup(normalise.NORMALISERS, config.normaliser, "normaliser")
    network = NetworkConfig(**config.network, dropout=stage.dropout)
    diffusion = DiffusionConfig(**config.diffusion)
    agent = pretrain_agent.PretrainConfig(
        network, diffusion, train_config(config, section), stage.batch_size
    )
    demos = load_demos(config, env, stage.episodes, data, selection)
    if data and evaluate_after:
        check_env(env, demos)
    run, done = open_stage(
        workdir,
        library,
        "base",
        "base",
        {
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
    normaliser = make_normaliser(demos.dataset.obs, config.std_floor)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state = pretrain_agent.init(
        agent, init_key, demos.dataset.obs.shape[1], demos.dataset.action.shape[1]
    )
    state, summary = train(
        functools.partial(pretrain_agent.update, agent),
        state,
        train_data(demos, normaliser),
        train_key,
        run=run,
        steps=stage.steps,
        stage="base",
        **config.run,
    )
    action_dim = demos.dataset.action.shape[1]
    policy = Policy(
        PolicyConfig(network, diffusion, action_dim),
        PolicyParams(state.ema, normaliser),
    )
    returns = episodes_card(config, policy, env) if evaluate_after else None
    opened.add_base(
        state.ema,
        normaliser,
        {
            "name": name,
            "obs_dim": demos.dataset.obs.shape[1],
            "action_dim": action_dim,
            "network": dataclasses.asdict(network),
            "diffusion": dataclasses.asdict(diffusion),
            "env": env,
            "data": demos.card(),
            "returns": returns,
            "steps": stage.steps,
            "config": run.config,
            "versions": versions(),
        },
        overwrite=True,
    )
    result = {"summary": summary, "returns": returns, "library": str(library)}
    run.finish(result)
    return result


def train_data(demos: Demos, normaliser: Any, frozen: Any = None) -> TrainData:
    """Demonstrations on the device, normalised once."""
    return TrainData(
        jnp.asarray(normaliser(demos.dataset.obs)),
        jnp.asarray(demos.dataset.action),
        frozen,
    )


def expand(
    config: ConfigDict,
    *,
    workdir: str | Path,
    library: str | Path,
    seed: int,
    name: str,
    env: str | None = None,
    data: str | None = None,
    selection: Selection = FIRST,
    evaluate_after: bool = True,
) -> dict[str, Any]:
    """Learn one skill from demonstrations, the library's base frozen, and add it.

    Args:
      config: resolved config; its `skill` section is used.
      workdir: the run's folder.
      library: folder of an existing library.
      seed: of parameters, batches and noise.
      name: of the skill.
      env: environment; default `config.skill.env`.
      data: demonstrations; default collects.
      selection: which of them.
      evaluate_after: roll the skill out at its training strength.

    Raises:
      InputError: bad data, an unknown objective, a workdir of another run, or a name
        that another run took.
    """
    check_config(config, "skill", evaluate_after)
    stage = config.skill
    env = env or stage.env
    if stage.objective not in OBJECTIVES:
        raise InputError(
            f"unknown objective {stage.objective!r}; choose from "
            f"{', '.join(OBJECTIVES)}"
        )
    lookup(ADAPTERS, stage.adapter, "adapter")
    opened = SkillLibrary.open(library)
    base, normaliser, base_card = opened.load_base()
    agent = skill_agent.SkillConfig(
        network=dataclasses.replace(network_config(base_card), dropout=stage.dropout),
        diffusion=diffusion_config(base_card),
        optimiser=train_config(config, "skill"),
        batch_size=stage.batch_size,
        rank=stage.rank,
        adapter=stage.adapter,
        alpha=stage.alpha,
    )
    demos = load_demos(config, env, stage.episodes, data, selection)
    check_fit(demos, load_base(library))
    if data and evaluate_after:
        check_env(env, demos)
    run, done = open_stage(
        workdir,
        library,
        "skill",
        name,
        {
            "name": name,
            "seed": seed,
            "env": env,
            "data": demos.card(),
            "base_fingerprint": base_card["fingerprint"],
            "skill": stage.to_dict(),
        },
    )
    if done is not None:
        return done
    init_key, train_key = jax.random.split(jax.random.key(seed))
    base = jax.tree.map(jnp.asarray, base)
    state, summary = train(
        functools.partial(skill_agent.update, agent),
        skill_agent.init(agent, init_key, base),
        train_data(demos, normaliser, base),
        train_key,
        run=run,
        steps=stage.steps,
        stage="skill",
        **config.run,
    )
    opened.add_skill(
        name,
        state.ema,
        {
            "adapter": stage.adapter,
            "rank": stage.rank,
            "alpha": stage.alpha,
            "objective": stage.objective,
            "env": env,
            "data": demos.card(),
            "returns": None,
            "steps": stage.steps,
            "config": run.config,
            "versions": versions(),
        },
        overwrite=True,
    )
    returns = None
    if evaluate_after:
        returns = episodes_card(config, load_composition(library, [name]), env)
        opened.set_returns("skill", name, returns)
    result = {"summary": summary, "returns": returns, "library": str(library)}
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
) -> dict[str, Any]:
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
    demos = load_demos(config, env, config.skill.episodes, data, selection)
    check_fit(demos, policy)
    if data and evaluate_after:
        check_env(env, demos)
    skill_demos: list[Demos] = []
    background = None
    if stage.support != "none":
        skill_demos = _skill_demos(config, cards, support_data)
    if stage.support == "learned":
        base_card = SkillLibrary.open(library).card("base", "base")
        background = _card_demos(config, "base", base_card, base_data, "base_data")
        check_fit(background, policy)
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
        state, summary = train(
            functools.partial(gate_agent.update, agent),
            gate_agent.init(agent, gate),
            train_data(demos, policy.params.normaliser, frozen),
            train_key,
            run=run,
            steps=stage.steps,
            stage="gate",
            **config.run,
        )
        gate = gate | {"head": state.params}
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
            "config": run.config,
            "versions": versions(),
        },
        overwrite=True,
    )
    returns = None
    if evaluate_after:
        returns = episodes_card(config, load_composition(library, gate=name), env)
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
) -> list[Demos]:
    """Each skill's own demonstrations, checked against its card."""
    if paths and len(paths) != len(cards):
        raise InputError(
            f"support_data: got {len(paths)} files for {len(cards)} skills"
        )
    loaded = []
    for i, card in enumerate(cards):
        what, path = f"skill {card['name']!r}", paths[i] if paths else None
        demos = _card_demos(config, what, card, path, "support_data")
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
) -> Demos:
    """The demonstrations a card names, from a file or collected again."""
    known = card.get("data")
    if path is None and not (known and card.get("env")):
        raise InputError(
            f"{what}: its card names no data to collect again; give --{flag}"
        )
    trajectories = known["trajectories"] if known else 0
    selection = Selection(**(known or {}).get("selection", {}))
    return load_demos(config, card.get("env"), trajectories, path, selection)


def episodes_card(config: ConfigDict, policy: Policy, env: str) -> dict[str, Any]:
    """Roll a policy out and say what it gave, for cards and results."""
    seed, count = config.evaluation.seed, config.evaluation.episodes
    episodes = evaluate(policy.act, env, count, seed)
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
) -> dict[str, Any]:
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
    )
    return episodes_json(evaluate(policy.act, env, episodes, seed), env, seed)


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
