"""Skills, bases and gates from rewards and costs, by the commands and stages."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import stages
import tiny
from shell import call

from experiments.configs import dsrl
from psec_jax.agents import critic_file
from psec_jax.agents.critics import of_kind
from psec_jax.choice import RULES
from psec_jax.data import d4rl, dataset
from psec_jax.errors import InputError, Stopped
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose, load_base
from psec_jax.runtime import loop
from psec_jax.runtime.loop import train
from psec_jax.types import Dataset
from psec_jax.workflows.demonstrations import FIRST, Selection

ROOT = Path(__file__).parents[1]
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
        assert card["critics"]["kinds"] == ["reward", "safety", "cost"]
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
    command += ("--skills=gate_s",)
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


GUIDED = {
    "gate.cost_weights": (0.0, 1.0, 100.0),
    "gate.candidates": 2,
    "fitted_q.steps": 3,
    "fitted_q.transitions": 32,
    "fitted_q.batch_size": 8,
}


def guided(name, critics="critics", skills=("gate_a", "gate_b"), **changes):
    return stages.compose(
        tiny_config(**(GUIDED | changes)),
        workdir=name,
        library="lib",
        name=name,
        skills=skills,
        data="mixed.hdf5",
        critics=critics,
        **OPTIONS,
    )


def two_skills():
    shared()
    for name in ("gate_a", "gate_b"):
        expand(name, name, "bc")


def test_a_gate_whose_critics_choose():
    two_skills()
    guided("select", **{"gate.head": "select", "gate.budget_share": 0.5})
    card = SkillLibrary.open("lib").card("gate", "select")
    chosen = card["chosen"]
    assert [weight for weight, _ in chosen["estimated_costs"]] == [0, 1, 100]
    # Half of ten costs over eight steps, each discounted by 0.99.
    assert chosen["cost_budget"] == pytest.approx(
        0.5 * 10 / 8 * sum(0.99**t for t in range(8))
    )
    assert card["critics"]["kinds"] == ["reward", "safety", "cost"]
    policy = compose("lib", gate="select")
    assert policy.config.candidates == 2 and policy.config.rule == "reward_cost"
    keys, obs = tiny.keys(3), tiny.normal(3, 3)
    choice = policy.choice(keys, obs)
    # Six weights of two skills, two samples each.
    assert choice.values["cost"].shape == (3, 12) and choice.alpha.shape == (3, 2)
    np.testing.assert_array_equal(policy.act(keys, obs), choice.action)
    with pytest.raises(InputError, match="the head 'select' depend on the sampled"):
        policy.alpha(obs)
    with pytest.raises(InputError, match="the gate 'select' has its own, give none"):
        compose("lib", gate="select", candidates=2, critics="critics")
    for given in ({"rule": "cost"}, {"cost_weight": 2.0}):
        [name] = given
        with pytest.raises(
            InputError, match=f"^{name}: critics choose by it, and none"
        ):
            compose("lib", gate="select", **given)
    with pytest.raises(InputError, match="samples one action: it chooses among none"):
        compose("lib").choice(keys, obs)
    # The library is whole without the critics' run, and a damaged one is refused.
    assert not SkillLibrary.open("lib").verify()


@pytest.mark.parametrize("loss", ["critic", "selected"])
def test_a_gate_that_critics_train(loss):
    two_skills()
    form = {"gate.head": "sigmoid", "gate.loss": loss, "gate.cost_weights": (2.0,)}
    assert guided(loss, **form)["summary"]["steps"] == 2
    card = SkillLibrary.open("lib").card("gate", loss)
    assert card["chosen"] == {"cost_weight": 2.0}
    policy = compose("lib", gate=loss)
    assert not policy.config.chooses, "no critic is needed to act"
    alpha = policy.alpha(tiny.normal(4, 3))
    assert ((0 <= alpha) & (alpha <= 16)).all()


@pytest.mark.parametrize(
    "rule, kinds", [("reward_cost", 2), ("reward", 1), ("cost", 1)]
)
def test_a_gate_that_knows_what_keeping_each_of_its_weights_is_worth(rule, kinds):
    two_skills()
    form = {"gate.head": "select", "gate.rule": rule, "gate.q_of": "own"}
    guided(f"own-{rule}", **form)
    library = SkillLibrary.open("lib")
    gate, card = library.load_gate(f"own-{rule}")
    fixed = card["chosen"]["fixed"]
    tried = [one["alpha"] for one in fixed["estimates"]]
    np.testing.assert_array_equal(tried, gate["head"]["alphas"])
    allowed = fixed.get("cost_budget", 0)
    within = [one for one in fixed["estimates"] if one.get("cost", 0) <= allowed]
    assert fixed.get("within_budget", True) == bool(within)
    if within:
        best = max(within, key=lambda one: one.get("reward", -one.get("cost", 0)))
    else:
        best = min(fixed["estimates"], key=lambda one: one["cost"])
    assert fixed["alpha"] == best["alpha"]
    # One Q of each kind for each of six weights, fitted from the first twin on.
    assert len(gate["critics"]) == kinds
    before = critic_file.load("critics")
    for kind, q in gate["critics"].items():
        twins = of_kind(before.params, before.card["kinds"], kind).q
        leaves = zip(jax.tree.leaves(q), jax.tree.leaves(twins), strict=True)
        for mine, theirs in leaves:
            assert mine.shape == (6, 1, *theirs.shape[1:])
            assert 0 < np.abs(mine[:, 0] - theirs[0]).max() < 0.01, "three small steps"
    policy = compose("lib", gate=f"own-{rule}")
    choice = policy.choice(tiny.keys(3), tiny.normal(3, 3))
    assert {values.shape for values in choice.values.values()} == {(3, 12)}
    assert not library.verify()


def test_rules_among_the_bases_own_actions():
    shared()
    obs, keys = tiny.normal(2, 3), tiny.keys(2)
    options = {"candidates": 3, "critics": "critics"}
    for rule in RULES:
        assert compose("lib", rule=rule, **options).choice(keys, obs).chosen.shape == (
            2,
        )
    cheap = compose("lib", rule="cost", **options).choice(keys, obs)
    assert (cheap.chosen == cheap.values["cost"].argmin(1)).all()
    dear = compose("lib", rule="reward_cost", cost_weight=1e6, **options)
    assert (dear.choice(keys, obs).chosen == cheap.chosen).all()


def test_bad_input_of_gates_that_critics_guide():
    two_skills()
    select = {"gate.head": "select"}
    for critics, changes, message in (
        (None, select, "critics: got none, the gate's head 'select' reads those of"),
        ("critics", {}, "critics: critics was given, the head 'linear' .* reads none"),
        ("nowhere", select, "holds no finished critics"),
        ("critics", select | {"gate.cost_weights": (-1.0,)}, "cost_weights: got"),
        ("critics", select | {"gate.alphas": ((1.0,),)}, "expected 2 weights"),
        ("critics", select | {"gate.budget_share": 0.0}, "budget_share: got 0.0, exp"),
        ("critics", select | {"gate.rule": "luck"}, "unknown rule 'luck'"),
        ("critics", select | {"gate.candidates": 0}, "candidates: got 0"),
        ("critics", select | {"gate.q_of": "hers"}, "unknown q_of 'hers'"),
        ("critics", {"gate.q_of": "own"}, "only the head 'select' and the loss"),
        (
            "critics",
            select | {"gate.q_of": "own", "gate.rule": "feasible"},
            "the rule 'feasible', expected 'data': the values of weights are of cost",
        ),
        (
            "critics",
            select | {"gate.loss": "critic"},
            "gate.loss: got 'critic' with",
        ),
        (None, {"gate.fallback": "gate_b"}, "gate.fallback: got 'gate_b', expected"),
        (
            None,
            {"gate.fallback": "gate_b", "gate.support": "nearest"},
            "gate.fallback: got .*, and the support neighbour or learned",
        ),
    ):
        with pytest.raises(InputError, match=message):
            guided("bad", critics, **changes)
    stages.train_critics(
        tiny_config(**{"critics.kinds": ("reward", "safety")}),
        workdir="costless",
        library="lib",
        seed=0,
        data="mixed.hdf5",
    )
    with pytest.raises(InputError, match="by reward_cost needs cost"):
        guided("bad", "costless", **select)
    with pytest.raises(InputError, match="cost_weight: got -1.0, expected"):
        compose(
            "lib", rule="reward_cost", candidates=2, critics="critics", cost_weight=-1.0
        )
    with pytest.raises(InputError, match="unknown rule 'luck'"):
        compose("lib", rule="luck", candidates=2, critics="critics")
    assert not Path("bad").exists()
    flags = ("--library=lib", "--data=mixed.hdf5", "--workdir=bad", "--name=bad")
    answer = call(
        "launch.compose",
        *FLAGS,
        *flags,
        "--skills=gate_a,gate_b",
        "--config.gate.head=select",
    )
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "critics: got none" in answer.err


def test_a_skill_that_acts_where_no_other_has_support():
    two_skills()
    form = {
        "gate.head": "constant",
        "gate.support": "neighbour",
        "gate.fallback": "gate_b",
        "support.safe": True,
    }
    stages.compose(
        tiny_config(**form),
        workdir="fallback",
        library="lib",
        name="fallback",
        skills=("gate_a", "gate_b"),
        alpha=(16.0, 16.0),
        data="mixed.hdf5",
        support_data=("mixed.hdf5", "mixed.hdf5"),
        **OPTIONS,
    )
    policy = compose("lib", gate="fallback")
    np.testing.assert_allclose(policy.alpha(np.full(3, 1e3)), [0, 16], atol=1e-4)
    near = policy.alpha(mixed().obs[0])
    assert near[0] > 0 and near.sum() == pytest.approx(16, abs=1e-3)


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
    with pytest.raises(InputError, match="among candidates by safety needs safety"):
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
    with pytest.raises(InputError, match=r"mean is \(3,\), expected \(4,\)"):
        expand("bad", "bad", "reward", critics="wide")
    assert not Path("bad").exists()
