"""Skills from rewards and costs: what is trained, and a two-armed problem.

Both arms, +SIDE and -SIDE, are in the data equally often. The first is rewarded and has
a cost, the second neither: the reward skill must take the first, the safety skill the
second.
"""

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
import tiny
from psec_jax.agents.pretrain import PretrainConfig
from psec_jax.agents.skill import SkillConfig
from shell import call

from experiments.configs import dsrl
from psec_jax import tree
from psec_jax.agents import critic_file, critics, offline, skill
from psec_jax.agents.common import (
    OptimiserConfig,
    Transitions,
    batch_noise,
)
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.offline import Frozen, OfflineConfig, OfflineData
from psec_jax.composition import PolicyConfig, PolicyParams, act, safest
from psec_jax.data import d4rl, dataset
from psec_jax.errors import InputError, Stopped
from psec_jax.gating import GateConfig
from psec_jax.library import SkillLibrary
from psec_jax.losses import OBJECTIVES
from psec_jax.networks.critics import init_q, q_value
from psec_jax.policy import compose, load_base
from psec_jax.runtime import loop
from psec_jax.runtime.loop import train
from psec_jax.types import Dataset, Normaliser
from psec_jax.workflows.demonstrations import FIRST, Selection

N, BATCH, SIDE = 256, 64, 0.6
S, A = tiny.OBS_DIM, tiny.ACTION_DIM
ROOT = Path(__file__).parents[1]
ACTOR = SkillConfig(
    tiny.NETWORK,
    optimiser=OptimiserConfig(learning_rate=1e-2, weight_decay=0.0, ema=1.0),
    batch_size=BATCH,
    rank=4,
    alpha=2.0,
)
CRITICS = CriticConfig(
    widths=(16,), learning_rate=1e-2, target_rate=0.1, batch_size=BATCH
)
BOTH = OfflineConfig(ACTOR, ("reward", "safety"), CRITICS)


@functools.cache
def arms():
    arm = np.where(np.arange(N) % 2, 1.0, -1.0).astype(np.float32)
    noise = 0.05 * tiny.normal(N, A, seed=1)
    return Transitions(
        obs=tiny.normal(N, S),
        action=SIDE * arm[:, None] + noise,
        reward=jnp.asarray(10 * (arm > 0), jnp.float32),
        h=jnp.asarray(np.where(arm > 0, 25, -1), jnp.float32),
        next_obs=tiny.normal(N, S, seed=2),
        mask=jnp.zeros(N),
    )


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(offline.update, config))


def init(config, base=None):
    return offline.init(config, jax.random.key(0), S, A, base)


def run(config, state, data, steps):
    for key in tiny.keys(steps):
        state, metrics = compiled(config)(state, data, key)
    return state, metrics


@functools.cache
def one_step():
    """Noise of every skill, and where one step on all rows leads from `init`."""
    noise = noise_of(jax.random.key(1), 2)
    step = jax.jit(functools.partial(offline.step, BOTH))
    got, _ = step(init(BOTH, tiny.base()), Frozen(tiny.base()), arms(), noise)
    return noise, got


@functools.cache
def trained():
    data = OfflineData(arms(), Frozen(tiny.base()))
    return run(BOTH, init(BOTH, tiny.base()), data, 800)[0]


def noise_of(key, count):
    draw = functools.partial(batch_noise, ACTOR.process, batch_size=N, action_dim=A)
    return jax.vmap(draw)(jax.random.split(key, count))


def test_each_skill_takes_its_arm():
    gate = GateConfig(head="constant")
    config = PolicyConfig(tiny.NETWORK, ACTOR.process, A, "parameter", gate)
    policy = jax.jit(jax.vmap(functools.partial(act, config), (None, 0, 0)))
    for k, side in enumerate((SIDE, -SIDE)):
        params = PolicyParams(
            tiny.base(),
            Normaliser(jnp.zeros(S), jnp.ones(S)),
            trained().actor.params,
            jnp.full(2, ACTOR.alpha),
            {"head": {"alpha": ACTOR.alpha * jnp.eye(2)[k]}},
        )
        got = policy(params, tiny.keys(N), arms().obs)
        assert np.mean(np.sign(side) * got > 0.2) > 0.9, BOTH.objectives[k]


def test_training_reaches_skills_and_critics_and_nothing_else():
    data = OfflineData(arms(), Frozen(tiny.base()))
    state = init(BOTH, tiny.base())
    before = jax.tree.map(np.array, (state, data))
    got, metrics = run(BOTH, state, data, 3)
    tiny.assert_trees_equal((state, data), before)
    assert got.step == 3 and got.critics.step == 3
    for old, new in (
        (state.actor.params, got.actor.params),
        (state.critics.q.params, got.critics.q.params),
        (state.critics.v.params, got.critics.v.params),
    ):
        old = tree.flatten(old)
        for path, leaf in tree.flatten(new).items():
            # Every member of a stack, not only the first.
            changed = np.any(
                np.asarray(leaf != old[path]), axis=tuple(range(1, leaf.ndim))
            )
            assert changed.all(), path
    assert all(np.isfinite(value) for value in metrics.values())
    assert {"loss/reward", "loss/safety", "weight/reward", "weight/safety"} <= set(
        metrics
    )


def test_critics_beside_skills_are_critics_alone():
    """No gradient of a skill's loss reaches them."""
    state, (_, got) = init(BOTH, tiny.base()), one_step()
    alone = jax.jit(functools.partial(critics.step, CRITICS))
    expected, _, _ = alone(state.critics, arms())
    tiny.assert_trees_close(got.critics, expected, atol=1e-5, rtol=1e-4)


def test_skills_together_are_skills_alone_with_finished_critics():
    state, (noise, together) = init(BOTH, tiny.base()), one_step()
    frozen = Frozen(tiny.base(), state.critics.trained)
    for k, name in enumerate(BOTH.objectives):
        config = OfflineConfig(ACTOR, (name,), None)
        one = functools.partial(
            jax.tree.map, lambda x, k=k: x[k : k + 1] if x.ndim else x
        )
        single, _ = jax.jit(functools.partial(offline.step, config))(
            offline.OfflineState(one(state.actor), None), frozen, arms(), one(noise)
        )
        expected = one(together.actor.params)
        tiny.assert_trees_close(single.actor.params, expected, atol=1e-4)
        assert single.critics is None


def test_weight_one_is_the_cloning_skill():
    config = OfflineConfig(ACTOR, ("bc",), None)
    state = init(config, tiny.base())
    noise = noise_of(jax.random.key(1), 1)
    frozen = Frozen(tiny.base(), critics.init(CRITICS, jax.random.key(0), S, A).trained)
    _, metrics = jax.jit(functools.partial(offline.step, config))(
        state, frozen, arms(), noise
    )
    one = jax.tree.map(lambda x: x[0], (state.actor.params, noise))
    given = (one[0], tiny.base(), arms().obs, arms().action, one[1])
    errors = jax.jit(functools.partial(skill.errors, ACTOR))(*given)
    np.testing.assert_allclose(metrics["loss/bc"], jnp.mean(errors), rtol=1e-4)
    assert metrics["weight/bc"] == 1


def test_a_whole_policy_with_weights():
    config = OfflineConfig(
        PretrainConfig(tiny.NETWORK, optimiser=ACTOR.optimiser, batch_size=BATCH),
        ("fisor",),
        CRITICS,
    )
    data = OfflineData(arms(), Frozen())
    state, metrics = run(config, init(config), data, 2)
    assert state.step == 2 and np.isfinite(metrics["loss/fisor"])
    assert jax.tree.structure(state.actor.params) == jax.tree.structure(tiny.base())


def test_config_refusals():
    with pytest.raises(
        InputError, match=f"choose from {', '.join(sorted(OBJECTIVES))}"
    ):
        OfflineConfig(ACTOR, ("magic",))
    with pytest.raises(InputError, match="expected different ones"):
        OfflineConfig(ACTOR, ("reward", "reward"))
    with pytest.raises(InputError, match="got none"):
        OfflineConfig(ACTOR, ())
    with pytest.raises(InputError, match="'safety' needs a critic of safety"):
        OfflineConfig(ACTOR, ("safety",), CriticConfig(safety=False))
    with pytest.raises(InputError, match="a base has one objective"):
        OfflineConfig(PretrainConfig(), ("reward", "safety"))


def test_the_safest_of_several_candidates():
    make = functools.partial(init_q, (16,), obs_dim=S, action_dim=A)
    q_h = tiny.randomised(lambda: jax.vmap(make)(tiny.keys(2)), 5)
    normaliser = Normaliser(jnp.ones(S), jnp.full(S, 2.0))
    params = PolicyParams(tiny.base(), normaliser, q_h=q_h)
    config = PolicyConfig(tiny.NETWORK, tiny.PROCESS, A)
    several = dataclasses.replace(config, candidates=8)
    obs, key = tiny.normal(S), jax.random.key(3)
    one = jax.jit(functools.partial(act, config, params))
    drawn = jnp.stack([one(k, obs) for k in jax.random.split(key, 8)])
    got = jax.jit(functools.partial(act, several, params))(key, obs)
    judged = jax.vmap(
        lambda q: jax.vmap(lambda a: q_value(q, normaliser(obs), a))(drawn)
    )(q_h)
    best = int(np.argmin(np.max(judged, axis=0)))
    np.testing.assert_allclose(got, drawn[best], atol=1e-5)
    assert safest(q_h, normaliser(obs), drawn) == best
    with pytest.raises(InputError, match="8 candidates need a critic"):
        act(several, params._replace(q_h=None), key, obs)
    with pytest.raises(InputError, match="candidates: got 0"):
        dataclasses.replace(config, candidates=0)


TINY = {
    "network.width": 16,
    "network.blocks": 1,
    "base.steps": 2,
    "base.batch_size": 8,
    "skill.steps": 4,
    "skill.batch_size": 8,
    "critics.steps": 4,
    "critics.batch_size": 8,
    "critics.widths": (8,),
    "gate.steps": 2,
    "gate.batch_size": 8,
    "gate.widths": (8,),
    "evaluation.episodes": 1,
    "run.log_every": 1,
    "run.save_every": 2,
}
FLAGS = ("--config=experiments/configs/dsrl.py:quick", "--noevaluate")
FLAGS += tuple(f"--config.{name}={value}" for name, value in TINY.items())


def tiny_config(**changes):
    config = dsrl.get_config("quick")
    config.update_from_flattened_dict(TINY | changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with a mixed set, and a library whose base is trained on it."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "experiments").symlink_to(ROOT / "experiments")
        d4rl.save("mixed.hdf5", mixed(), {})
        free = mixed()._replace(cost=np.zeros(80, np.float32))
        d4rl.save("free.hdf5", free, {}, costs=True)
        d4rl.save("none.hdf5", free, {})
        stages.pretrain(
            tiny_config(), workdir="base", library="lib", data="mixed.hdf5", **OPTIONS
        )
        yield folder


OPTIONS = {"seed": 0, "evaluate": False}


def mixed():
    """Ten trajectories of eight steps, with returns 0 .. 9 and costs 0 .. 9."""
    generator = np.random.default_rng(0)
    obs = generator.normal(size=(81, 3)).astype(np.float32)
    rows = np.arange(80)
    return Dataset(
        obs=obs[:-1],
        action=generator.uniform(-1, 1, (80, 2)).astype(np.float32),
        reward=(rows // 8 / 8).astype(np.float32),
        cost=(rows // 8 * (rows % 8 == 3)).astype(np.float32),
        next_obs=obs[1:],
        terminal=np.zeros(80, bool),
        timeout=rows % 8 == 7,
    )


def expand(workdir, name, objective, critics=None, config=None):
    config = config or tiny_config()
    config.skill.objective = objective
    return stages.expand(
        config,
        workdir=workdir,
        library="lib",
        name=name,
        data="mixed.hdf5",
        critics=critics,
        **OPTIONS,
    )


def shared(workdir="critics"):
    return stages.train_critics(
        tiny_config(), workdir=workdir, library="lib", seed=0, data="mixed.hdf5"
    )


def test_skills_and_critics_in_one_program(capsys):
    together = ("--library=lib", "--data=mixed.hdf5", "--workdir=both")
    answer = call(
        "launch.expand", *FLAGS, *together, "--objective=reward,safety", "--name=r,s"
    )
    assert answer.code == 0, answer.err
    assert answer.out == "skill 'r' is in lib\nskill 's' is in lib\n"
    for name, objective in (("r", "reward"), ("s", "safety")):
        card = SkillLibrary.open("lib").card("skill", name)
        assert card["objective"] == objective
        assert card["critics"]["kinds"] == ["reward", "safety"]
        assert card["critics"]["steps"] == 4
        assert "loss/critic_safety" in card["critics"]["summary"]
    lines = Path("both/metrics.jsonl").read_text().splitlines()
    assert {"loss/reward", "loss/safety", "v/safety"} <= set(json.loads(lines[0]))
    # The run's critics can be shared, and choose among candidates.
    expand("again", "again", "safety", critics="both")
    policy = compose("lib", ["again"], candidates=3, critics="both")
    assert policy.act(tiny.keys(2), tiny.normal(2, 3)).shape == (2, 2)
    assert call("launch.expand", *FLAGS, *together, "--name=r").code == 2


def test_critics_are_trained_once_and_shared():
    command = ("--library=lib", "--data=mixed.hdf5", "--workdir=critics")
    answer = call("launch.critics", *FLAGS, *command)
    assert answer.code == 0, answer.err
    result = shared()
    assert result["fingerprint"] in answer.out
    for objective in ("reward", "safety"):
        expand(f"one_{objective}", f"one_{objective}", objective, critics="critics")
        card = SkillLibrary.open("lib").card("skill", f"one_{objective}")
        assert card["critics"]["fingerprint"] == result["fingerprint"]
        assert card["config"]["critics"] == result["fingerprint"]
    with pytest.raises(InputError, match="config.skill.rank: got 4, the run has 8"):
        config = tiny_config(**{"skill.rank": 4})
        expand("one_reward", "another", "reward", "critics", config)


def test_the_baselines():
    options = {"data": "mixed.hdf5", **OPTIONS}
    stages.pretrain(
        tiny_config(), workdir="fisor", library="fisor", objective="fisor", **options
    )
    card = SkillLibrary.open("fisor").card("base", "base")
    assert card["objective"] == "fisor" and card["critics"]["steps"] == 2
    shared()
    stages.pretrain(
        tiny_config(),
        workdir="fisor2",
        library="fisor2",
        objective="fisor",
        critics="critics",
        **options,
    )
    theirs, mine = load_base("fisor2"), load_base("lib")
    tiny.assert_trees_equal(theirs.params.normaliser, mine.params.normaliser)
    stages.pretrain(
        tiny_config(),
        workdir="safe",
        library="safe",
        selection=Selection(max_cost=4.0),
        **options,
    )
    card = SkillLibrary.open("safe").card("base", "base")
    assert card["data"]["trajectories"] == 5
    assert card["data"]["selection"]["max_cost"] == 4


def test_a_gate_on_the_best_trajectories():
    expand("gate_s", "gate_s", "bc")
    command = ("--library=lib", "--data=mixed.hdf5", "--workdir=gate", "--name=gate")
    command += ("--skills=gate_s", "--env=bullet:SafetyBallRun-v0")
    bounds = ("--max_cost=6", "--return_quantile=0.5", "--share=1")
    answer = call("launch.compose", *FLAGS, *command, *bounds)
    assert answer.code == 0, answer.err
    data = SkillLibrary.open("lib").card("gate", "gate")["data"]
    assert data["trajectories"] == 4 and data["return_mean"] == pytest.approx(4.5)
    assert data["selection"] == {
        "best": False,
        "min_return": None,
        "max_cost": 6.0,
        "return_quantile": 0.5,
        "share": 1.0,
    }


def test_selections():
    def chosen(episodes=0, **options):
        selection = Selection(**options)
        assert Selection(**selection.card()) == selection
        ds = selection.of(mixed(), episodes, "x")
        return list(dataset.episode_returns(ds))

    assert chosen(3) == [0, 1, 2] and chosen(2, best=True) == [8, 9]
    assert chosen(max_cost=6.0, return_quantile=0.5) == [3, 4, 5, 6]
    assert len(chosen(share=0.3)) == 3 and set(chosen(share=0.3)) < set(chosen())
    assert chosen(4, split=4) == [0, 0, 0.5, 0.5]
    with pytest.raises(InputError, match="filter density: leaves none of 10"):
        chosen(filter="density")


@pytest.mark.parametrize("stage", ["critics", "skills", "shared"])
def test_a_stopped_run_goes_on_to_the_same_numbers(stage, monkeypatch):
    """Bit for bit: critics alone, skills with critics, skills on finished critics."""

    def go(workdir, name):
        if stage == "critics":
            return shared(workdir)
        given = "critics" if stage == "shared" else None
        return expand(workdir, name, "safety", given)

    def stopped_at_2(*arguments, **options):
        def stop(step, states):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(*arguments, **options, on_save=stop)

    shared()
    whole, halves = f"{stage}_whole", f"{stage}_halves"
    go(whole, whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopped_at_2)
        with pytest.raises(Stopped):
            go(halves, halves)
    assert go(halves, halves)["summary"]["resumed_at"] == 2
    if stage != "shared":
        left, right = (critic_file.load(run) for run in (whole, halves))
        assert left[2]["fingerprint"] == right[2]["fingerprint"]
    if stage != "critics":
        opened = SkillLibrary.open("lib")
        left, right = (opened.card("skill", run) for run in (whole, halves))
        assert left["fingerprint"] == right["fingerprint"]


def test_bad_input():
    with pytest.raises(InputError, match="unknown objective 'magic'"):
        expand("bad", "bad", "magic")
    with pytest.raises(InputError, match="expected 2 different"):
        expand("bad", ["a", "a"], "reward,safety")
    with pytest.raises(InputError, match="holds no finished critics"):
        expand("bad", "bad", "safety", critics="nowhere")
    with pytest.raises(InputError, match="cost_limit: got -1"):
        expand("bad", "bad", "safety", config=tiny_config(cost_limit=-1.0))
    with pytest.raises(InputError, match="critics.steps: got 0"):
        expand("bad", "bad", "safety", config=tiny_config(**{"critics.steps": 0}))
    config = tiny_config()
    config.skill.objective = "safety"
    for data, message in (
        ("free.hdf5", "free.hdf5: no transition has a cost above 0"),
        ("none.hdf5", "none.hdf5: no dataset 'costs'"),
    ):
        with pytest.raises(InputError, match=message):
            stages.expand(
                config, workdir="bad", library="lib", name="x", data=data, **OPTIONS
            )
    d4rl.save("risky.hdf5", mixed()._replace(cost=mixed().cost + 1), {})
    same = mixed()._replace(reward=np.zeros(80, np.float32))
    d4rl.save("same.hdf5", same, {})
    config.skill.objective = "reward"
    safe = Selection(max_cost=2.0)
    for data, selection, message in (
        ("same.hdf5", FIRST, "every trajectory has return 0"),
        ("risky.hdf5", safe, "no trajectory with cost <= 2 among 10; the least cost"),
    ):
        with pytest.raises(InputError, match=message):
            stages.expand(
                config,
                workdir="bad",
                library="lib",
                name="x",
                data=data,
                selection=selection,
                **OPTIONS,
            )
    with pytest.raises(InputError, match="the objective bc reads none"):
        expand("bad", "bad", "bc", critics="nowhere")
    stages.train_critics(
        tiny_config(**{"critics.safety": False}),
        workdir="reward_alone",
        library="lib",
        seed=0,
        data="free.hdf5",
    )
    assert not Path("bad").exists(), "refused before anything is written"
    with pytest.raises(InputError, match="judge reward, the objective needs safety"):
        expand("bad", "bad", "safety", critics="reward_alone")
    with pytest.raises(InputError, match="the choice among candidates needs safety"):
        compose("lib", candidates=2, critics="reward_alone")
    with pytest.raises(InputError, match="more than 1 need critics"):
        compose("lib", candidates=2)
    stages.pretrain(
        tiny_config(std_floor=2.0),
        workdir="other",
        library="other",
        data="mixed.hdf5",
        **OPTIONS,
    )
    with pytest.raises(InputError, match="scaled by another std than the base's"):
        compose("other", candidates=2, critics="reward_alone")
    with pytest.raises(InputError, match="scaled by another std than the base's"):
        stages.expand(
            config,
            workdir="bad",
            library="other",
            name="x",
            data="mixed.hdf5",
            critics="reward_alone",
            **OPTIONS,
        )
    made = critic_file.load("reward_alone")
    Path("wide").mkdir()
    critic_file.save("wide", *made[:2], made.card | {"obs_dim": 4})
    with pytest.raises(InputError, match="read observations of 4 numbers, those of"):
        expand("bad", "bad", "reward", critics="wide")
    assert not Path("bad").exists()
