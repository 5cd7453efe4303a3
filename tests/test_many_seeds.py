"""Several seeds or skills as one program: each is what it would be alone."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
import tiny
from shell import call
from test_training import fails_at, fresh, update
from tiny_env import SPEC

from experiments import grid, results, table2
from experiments.configs import dmc_walker, dsrl
from psec_jax import tree
from psec_jax.agents.common import Demonstrations
from psec_jax.agents.critic_file import load as load_critics
from psec_jax.data import d4rl
from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.evaluation import evaluate, evaluate_together
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy, act_together, alike, load_base
from psec_jax.runtime import batches, loop, metrics
from psec_jax.runtime.batches import Data, Drawn
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.loop import LoopConfig, train
from psec_jax.runtime.run import open_run
from psec_jax.runtime.runs import Training
from psec_jax.types import Dataset
from psec_jax.workflows import demonstrations as demonstrations_module
from psec_jax.workflows import multirun
from psec_jax.workflows.demonstrations import load_demos
from psec_jax.workflows.multirun import Plan

ROOT = Path(__file__).parents[1]
# What batched products round otherwise, after a few steps of a rate of 1e-3.
CLOSE = functools.partial(tiny.assert_trees_close, atol=2e-5, rtol=1e-4)
OPTIONS = {"config": LoopConfig(1, 2), "progress": False}
TINY = {
    "network.width": 16,
    "network.blocks": 1,
    "network.time_features": 4,
    "network.time_width": 8,
    "critics.widths": (8,),
    "gate.widths": (8,),
    "evaluation.episodes": 3,
    "run.log_every": 1,
    "run.save_every": 2,
} | {
    f"{stage}.{field}": value
    for stage in ("base", "skill", "critics", "gate")
    for field, value in {"steps": 3, "batch_size": 8, "episodes": 0}.items()
    if (stage, field) not in (("critics", "episodes"), ("gate", "episodes"))
}
FLAGS = ("--config=experiments/configs/dsrl.py:quick",)
FLAGS += tuple(f"--config.{name}={value}" for name, value in TINY.items())


def config(**changes):
    made = dsrl.get_config("quick")
    made.update_from_flattened_dict(TINY | changes)
    return made


def demonstrations(episodes, seed):
    """Episodes of 8 steps in the shapes of the tiny environment."""
    rows, generator = np.arange(8 * episodes), np.random.default_rng(seed)
    obs = generator.normal(size=(len(rows) + 1, 2)).astype(np.float32)
    return Dataset(
        obs=obs[:-1],
        action=np.tanh(generator.normal(size=(len(rows), 2))).astype(np.float32),
        reward=(rows // 8 * (rows % 8 == 3)).astype(np.float32),
        cost=(rows % 4 == 0).astype(np.float32),
        next_obs=obs[1:],
        terminal=np.zeros(len(rows), bool),
        timeout=rows % 8 == 7,
    )


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        (folder / "experiments").symlink_to(ROOT / "experiments")
        for name, episodes in {"a": 10, "b": 7}.items():
            d4rl.save(f"{name}.hdf5", demonstrations(episodes, episodes), {})
        yield folder


def done(module, *arguments):
    # The card of the base names an environment of a module, which is said each time.
    env = () if any("--env=" in a for a in arguments) else (f"--env={SPEC}",)
    answer = call(module, *FLAGS, *env, *arguments)
    assert answer.code == 0, answer.err
    return answer.out


@pytest.fixture(scope="module")
def bases(place):
    """Bases of seeds 3 and 1, rolled out."""
    flags = ("--workdir=base", "--library=lib", "--data=a.hdf5", f"--env={SPEC}")
    return done("launch.pretrain", *flags, "--seeds=3,1")


@pytest.fixture
def alone(bases):
    """A library with the base of seed 1 alone."""
    shutil.rmtree("alone", ignore_errors=True)
    shutil.copytree("lib/seed1", "alone")
    return SkillLibrary.open("alone")


def entry(library, kind, name):
    opened = SkillLibrary.open(library)
    loaded = {
        "base": opened.load_base,
        "skill": functools.partial(opened.load_skill, name),
        "gate": functools.partial(opened.load_gate, name),
    }[kind]()
    return loaded[0]


def losses(workdir, name):
    lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def data_of(seed):
    return np.random.default_rng(seed).normal(size=(50, 4)).astype(np.float32)


def trainings(folder, count=3, data=None):
    """Trainings that start from the same state, with keys and runs of their own."""
    return [
        Training(
            fresh(),
            data_of(r) if data is None else data,
            jax.random.key(r),
            folder and open_run(folder / str(r), "base"),
            f"seed {r}",
        )
        for r in range(count)
    ]


def single(training, run=None, steps=4):
    [result] = train(update, [training._replace(run=run)], steps=steps, **OPTIONS)
    return result


@pytest.mark.parametrize("shared", [True, False])
def test_trainings_are_what_they_are_alone(tmp_path, shared):
    several = trainings(tmp_path, data=data_of(0) if shared else None)
    results = train(update, several, steps=4, **OPTIONS)
    for training, (state, summary) in zip(several, results, strict=True):
        run = open_run(tmp_path / f"alone{training.name[-1]}", "base")
        expected, plain = single(training, run)
        CLOSE(state, expected)
        assert summary.keys() == plain.keys() and summary["steps"] == 4
        lines, wanted = metrics.read(training.run), metrics.read(run)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        for line, other in zip(lines, wanted, strict=True):
            assert line["loss/base"] == pytest.approx(other["loss/base"], rel=1e-4)
        with closing(Checkpoints(training.run.checkpoints)) as saves:
            assert saves.last == 4
            tiny.assert_trees_equal(saves.restore(fresh()), state)
    # Each goes on alone, where it stands.
    longer, summary = single(several[1], several[1].run, steps=6)
    assert summary["resumed_at"] == 4
    CLOSE(longer, single(several[1], steps=6)[0])


def test_trainings_that_are_behind_catch_up(tmp_path, capsys):
    several = trainings(tmp_path)
    single(several[0], several[0].run, steps=4)
    single(several[2], several[2].run, steps=2)
    results = train(update, several, steps=6, **OPTIONS | {"progress": True})
    for training, (state, summary), at in zip(several, results, (4, 0, 2), strict=True):
        CLOSE(state, single(training, steps=6)[0])
        assert (summary["resumed_at"], summary["steps"]) == (at, 6 - at)
        lines = metrics.read(training.run)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    told = capsys.readouterr().err
    assert "seed 0: base  resumed at step 4" in told
    assert "base  step 2/2" in told and "base x 3  step 6/6" in told
    again = train(update, several, steps=6, **OPTIONS)
    assert [summary["steps"] for _, summary in again] == [0, 0, 0]


def test_not_finite_training_is_named(tmp_path):
    def failing(state, data, key):
        new, scalars = update(state, data, key)
        poisoned = fails_at(3)(state, data, key)[1]["loss/base"]
        bad = jnp.any(data > 1e6)
        return new, {"loss/base": jnp.where(bad, poisoned, scalars["loss/base"])}

    several = trainings(tmp_path)
    data = np.array(several[1].data)
    data[0, 0] = 1e7
    several[1] = several[1]._replace(data=data)
    message = "seed 1: loss/base is not finite between steps 2 and 3; .* step 2"
    with pytest.raises(TrainingError, match=message):
        train(failing, several, steps=4, **OPTIONS)


def test_a_signal_saves_every_training(tmp_path):
    def stop(step, states):
        assert len(states) == 3
        os.kill(os.getpid(), signal.SIGTERM)

    several = trainings(tmp_path)
    options = OPTIONS | {"on_save": stop}
    with pytest.raises(Stopped, match="at step 2; last good save: step 2"):
        train(update, several, steps=10, **options)
    results = train(update, several, steps=4, **OPTIONS)
    for training, (state, summary) in zip(several, results, strict=True):
        assert summary["resumed_at"] == 2
        CLOSE(state, single(training)[0])


def test_trainings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="trainings: got 0"):
        train(update, [], steps=1, **OPTIONS)
    short = Training(fresh(), data_of(0)[:9], jax.random.key(0))
    with pytest.raises(InputError, match=r"data of the trainings have shapes"):
        train(update, [*trainings(None), short], steps=1, **OPTIONS)
    same = trainings(tmp_path)[:1] * 2
    with pytest.raises(InputError, match="in use by another process"):
        train(update, same, steps=1, **OPTIONS)


def test_padding_changes_no_batch():
    data = Data(Demonstrations(tiny.normal(7, 3), tiny.normal(7, 2, seed=1)))
    padded = batches.pad(data, 40)
    assert padded.rows.obs.shape == (40, 3) and not padded.rows.obs[7:].any()
    step = Drawn(lambda config, state, batch, frozen, key: (batch, {}), None, 64)
    for key in tiny.keys(5):
        tiny.assert_trees_equal(step(None, padded, key), step(None, data, key))
    assert batches.of_one_length([data, padded])[1] is not padded
    assert batches.of_one_length([data, data])[0] is data


def test_bases(bases, alone):
    assert [line.split("; ")[0] for line in bases.splitlines()] == [
        "base 'base' is in lib/seed3",
        "base 'base' is in lib/seed1",
    ]
    result = stages.pretrain(
        config(), workdir="solo_base", library="solo", seed=1, data="a.hdf5", env=SPEC
    )
    CLOSE(entry("lib/seed1", "base", ""), entry("solo", "base", ""))
    assert losses("base/seed1", "loss/base") == pytest.approx(
        losses("solo_base", "loss/base"), rel=1e-4
    )
    theirs = alone.card("base", "base")
    mine = SkillLibrary.open("solo").card("base", "base")
    assert theirs["config"] == mine["config"] and theirs["config"]["seed"] == 1
    np.testing.assert_allclose(
        theirs["returns"]["returns"], result["returns"]["returns"], rtol=1e-3
    )
    other = SkillLibrary.open("lib/seed3").card("base", "base")
    assert other["fingerprint"] != theirs["fingerprint"]


def test_a_seed_more(bases, monkeypatch):
    """Finished seeds stay as they are; the folder of one is that of a single run.

    The new one is trained on eight devices.
    """
    before = Path("base/seed1/result.json").read_text()
    flags = ("--library=lib", "--data=a.hdf5", f"--env={SPEC}", "--noevaluate")
    done("launch.pretrain", *flags, "--workdir=base", "--seeds=1,2,3", "--mesh=data:8")
    assert Path("base/seed1/result.json").read_text() == before
    assert (Path("lib/seed2") / "base" / "base.json").is_file()
    monkeypatch.setattr(loop, "train", None)
    again = ("--workdir=base/seed2", "--library=lib/seed2", "--seed=2", *flags[1:])
    done("launch.pretrain", *again)


def test_skills_of_several_seeds(bases, alone):
    flags = ("--library=lib", "--data=a.hdf5", "--noevaluate", "--name=walk")
    done("launch.expand", *flags, "--workdir=walk", "--seeds=1,3")
    stages.expand(
        config(),
        env=SPEC,
        workdir="alone_walk",
        library="alone",
        seed=1,
        name="walk",
        data="a.hdf5",
        evaluate=False,
    )
    CLOSE(entry("lib/seed1", "skill", "walk"), entry("alone", "skill", "walk"))
    # A gate over them: everything that is frozen is the seed's own.
    flags = ("--library=lib", "--data=a.hdf5", "--name=gate", f"--env={SPEC}")
    out = done(
        "launch.compose", *flags, "--skills=walk", "--workdir=gate", "--seeds=1,3"
    )
    assert out.count("(3 episodes)") == 2
    shutil.rmtree("alone/skills")
    shutil.copytree("lib/seed1/skills", "alone/skills")
    result = stages.compose(
        config(),
        workdir="alone_gate",
        library="alone",
        seed=1,
        name="gate",
        skills=["walk"],
        data="a.hdf5",
        env=SPEC,
    )
    CLOSE(entry("lib/seed1", "gate", "gate"), entry("alone", "gate", "gate"))
    returns = SkillLibrary.open("lib/seed1").card("gate", "gate")["returns"]
    np.testing.assert_allclose(
        returns["returns"], result["returns"]["returns"], rtol=1e-3
    )


def test_skills_from_data_of_different_length(alone):
    flags = ("--library=alone", "--noevaluate", "--name=long,short", "--seed=5")
    out = done("launch.expand", *flags, "--workdir=tasks", "--data=a.hdf5,b.hdf5")
    assert out == "skill 'long' is in alone\nskill 'short' is in alone\n"
    for name, data in {"long": "a.hdf5", "short": "b.hdf5"}.items():
        stages.expand(
            config(),
            env=SPEC,
            workdir=f"{name}_alone",
            library="alone",
            seed=5,
            name=f"{name}2",
            data=data,
            evaluate=False,
        )
        CLOSE(entry("alone", "skill", name), entry("alone", "skill", f"{name}2"))
        assert Path("tasks", name, "result.json").is_file()
    assert not np.array_equal(
        losses("tasks/long", "loss/skill"), losses("tasks/short", "loss/skill")
    )


@pytest.mark.parametrize("shared", [False, True])
def test_skills_and_critics_of_several_seeds(bases, alone, shared):
    name = f"safe_{shared}"
    flags = ("--library=lib", "--data=a.hdf5", "--noevaluate", "--seeds=1,3")
    more = {}
    if shared:
        out = done("launch.critics", *flags[:2], "--seeds=1,3", "--workdir=critics")
        assert "are in critics/seed3" in out
        stages.train_critics(
            config(),
            workdir="solo_critics",
            library="alone",
            seed=1,
            data="a.hdf5",
            env=SPEC,
        )
        left, right = (load_critics(f) for f in ("critics/seed1", "solo_critics"))
        CLOSE(left.params, right.params)
        flags += ("--critics=critics",)
        more = {"critics": "critics/seed1"}
    done(
        "launch.expand",
        *flags,
        f"--workdir={name}",
        f"--name={name}",
        "--objective=safety",
    )
    stages.expand(
        config(**{"skill.objective": "safety"}),
        env=SPEC,
        workdir=f"{name}_alone",
        library="alone",
        seed=1,
        name=name,
        data="a.hdf5",
        evaluate=False,
        **more,
    )
    CLOSE(entry("lib/seed1", "skill", name), entry("alone", "skill", name))
    if not shared:
        left, right = (load_critics(f) for f in (f"{name}/seed1", f"{name}_alone"))
        CLOSE(left.params, right.params)


def test_evaluation_of_several_seeds(bases):
    flags = ("--library=lib", f"--env={SPEC}", "--episodes=4", "--seed=7")
    answer = call("launch.evaluate", *flags, "--seeds=3,1", "--out=e.json")
    assert answer.code == 0, answer.err
    assert [line[:17] for line in answer.out.splitlines()] == [
        "seed 3: 4 episode",
        "seed 1: 4 episode",
    ]
    found = json.loads(Path("e.json").read_text())
    assert found.keys() == {"seed 1", "seed 3"}
    alone = evaluate(load_base("lib/seed1").act, SPEC, 4, 7, workers=1)
    got = found["seed 1"]
    np.testing.assert_allclose(got["returns"], alone.returns, rtol=1e-4)
    assert got["lengths"] == alone.lengths.tolist()


def test_policies_take_turns_where_slots_are_few(bases, monkeypatch):
    monkeypatch.setattr("psec_jax.evaluation.MAX_WIDTH", 5)
    policies = [load_base(f"lib/seed{seed}") for seed in (1, 3)]
    assert alike(*policies)
    played = evaluate_together(act_together(policies), 2, SPEC, 3, 7)
    for policy, episodes in zip(policies, played, strict=True):
        alone = evaluate(policy.act, SPEC, 3, 7, workers=1)
        np.testing.assert_allclose(episodes.returns, alone.returns, rtol=1e-4)
        np.testing.assert_array_equal(episodes.seeds, alone.seeds)

    def broken(keys, obs):
        return jnp.zeros((2, 2, 2)).at[1].set(jnp.nan)

    with pytest.raises(FloatingPointError, match="of episode 0 of policy 2 of 2"):
        evaluate_together(broken, 2, SPEC, 3, 7)
    other = Policy(policies[0].config, policies[0].params, ("x",))
    assert alike(other, policies[1])
    halved = jax.tree.map(lambda x: x[..., :1], policies[0].params)
    assert not alike(Policy(policies[0].config, halved), policies[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds=1,1",), "--seeds: 1 is there twice"),
        (("--seeds=1,01",), "--seeds: 1 is there twice"),
        (("--seeds=",), "--seeds: got none, expected one or more"),
        (("--seeds=0,-1",), "--seeds: got '-1', expected numbers from 0"),
        (("--seeds=0,x",), "--seeds: got 'x'"),
        (("--seeds=0,,1",), "--seeds: got ''"),
        (("--seeds=4294967296",), "--seeds: got '4294967296'"),
        (("--seeds=0,1", "--seed=0"), "--seed and --seeds were both given"),
    ],
)
def test_bad_seeds(place, flags, message):
    common = ("--workdir=bad", "--library=bad_lib", "--data=a.hdf5")
    answer = call("launch.pretrain", *FLAGS, *common, *flags)
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert message in answer.err
    assert not Path("bad").exists()


def test_skills_that_do_not_go_together(alone):
    flags = ("--library=alone", "--workdir=bad", "--noevaluate")
    for more, message in (
        (("--name=x,y", "--data=a.hdf5"), "got 2 for one objective"),
        (("--name=x,y,z", "--data=a.hdf5,b.hdf5"), "--data: got 2 for 3 names"),
        (("--name=x,x", "--data=a.hdf5,b.hdf5"), "expected different ones"),
    ):
        answer = call("launch.expand", *FLAGS, *flags, *more)
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert message in answer.err


def test_what_is_not_alike_is_no_program():
    def plan(label, state, steps, rank=1):
        return Plan(
            kind="critics",
            names=(),
            workdir=Path("unlike", label),
            library=Path("lib"),
            record={},
            update=Drawn(update, rank, 8),
            rows=data_of(0),
            start=lambda: (state, None),
            key=jax.random.key(0),
            steps=steps,
            stage="",
            label=label,
        )

    wide = fresh()._replace(params={"layer": {"kernel": jnp.ones((5, 5))}})
    for other in ((wide, 2), (fresh(), 3), (fresh(), 2, 2)):
        plans = [plan("seed 1", fresh(), 2), plan("seed 3", *other)]
        message = "seed 3 cannot be trained in one program with seed 1"
        with pytest.raises(InputError, match=message):
            multirun.train(plans, LoopConfig())


def test_equal_data_lies_on_the_device_once(bases, monkeypatch):
    seen = []

    def watched(update, trainings, **options):
        seen.append([training.data for training in trainings])
        return train(update, trainings, **options)

    monkeypatch.setattr(loop, "train", watched)
    reads = []
    load = load_demos
    monkeypatch.setattr(
        demonstrations_module, "load_demos", lambda *a: reads.append(a) or load(*a)
    )
    flags = ("--library=lib", "--data=a.hdf5", "--noevaluate", "--name=once")
    done("launch.expand", *flags, "--workdir=once", "--seeds=1,3")
    assert len(reads) == 1
    [(one, two)] = seen
    assert one.rows.obs is two.rows.obs and one.rows.action is two.rows.action
    leaves = zip(
        *(tree.flatten(data.frozen).values() for data in (one, two)), strict=True
    )
    assert not all(left is right for left, right in leaves)


@pytest.mark.slow
def test_a_table_of_several_seeds(place, monkeypatch):
    monkeypatch.setenv("PSEC_DATA_DIR", str(place / "data"))
    monkeypatch.setattr(table2, "ENV", SPEC)
    settings = {"S->W": table2.target("walk", "walk")}
    table = dataclasses.replace(table2.TABLE, settings=settings)
    known = {k: v for k, v in TINY.items() if not k.startswith("critics")}
    job = dmc_walker.job("quick").changed(
        known
        | {"base.env": SPEC, "base.episodes": 10, "data.policy": "random"}
        | {"skill.episodes": 10, "evaluation.episodes": 2}
    )
    lines = []
    for folder, seeds, methods, together in (
        ("all", (0, 1), ("Scratch", "PSEC"), True),
        ("one", (1,), ("PSEC",), False),
    ):
        arguments = (Path(folder, "runs"), Path(folder, "results"), lines.append)
        chosen = job.changed({"table.seeds": seeds})
        grid.run(table, chosen, *arguments, methods=methods, together=together)
    assert [line.partition(":")[0] for line in lines[:4]] == [
        f"S->W {method} seed {seed}"
        for method in ("Scratch", "PSEC")
        for seed in (0, 1)
    ]
    got, expected = (
        results.by_key(table.path(Path(folder, "results")))["S->W", "PSEC", 1]
        for folder in ("all", "one")
    )
    np.testing.assert_allclose(got["returns"], expected["returns"], rtol=1e-3)
    name = table2.gate_name("PSEC", "S->W")
    CLOSE(
        entry("all/runs/seed1/library", "gate", name),
        entry("one/runs/seed1/library", "gate", name),
    )
