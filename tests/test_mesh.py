"""A mesh of eight devices, made of one CPU, gives the numbers of one device."""

import dataclasses
import functools
import importlib.util
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
import tiny
from jax.sharding import PartitionSpec
from shell import call
from test_critics import transitions
from test_many_seeds import FLAGS, ROOT, config, demonstrations

from psec_jax import lora
from psec_jax.agents import cloning, offline
from psec_jax.agents.cloning import AdapterConfig, CloningConfig
from psec_jax.agents.common import Demonstrations, OptimiserConfig
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.offline import Frozen, OfflineConfig
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.networks.denoiser import init_base
from psec_jax.runtime import metrics, sharding
from psec_jax.runtime.batches import Data, Drawn
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.loop import LoopConfig, train
from psec_jax.runtime.run import open_run
from psec_jax.runtime.runs import Training
from psec_jax.types import Normaliser
from psec_jax.workflows import base, critics, gate, skill

BATCH = 8
SECTIONS = ("base", "skill", "critics", "gate")
AGENT = CloningConfig(
    tiny.NETWORK,
    tiny.PROCESS,
    OptimiserConfig(learning_rate=1e-3, ema=0.1),
    batch_size=BATCH,
)
UPDATE = Drawn(cloning.update, AGENT, BATCH)
DATA = Data(
    Demonstrations(tiny.normal(50, tiny.OBS_DIM), tiny.normal(50, tiny.ACTION_DIM))
)
CLOSE = functools.partial(tiny.assert_trees_close, atol=2e-5, rtol=1e-4)


@functools.cache
def start(seed):
    return cloning.init(AGENT, jax.random.key(seed), tiny.OBS_DIM, tiny.ACTION_DIM)


def go(count, mesh, steps=3, folder=None, data=DATA, **options):
    trainings = [
        Training(
            start(seed),
            data,
            jax.random.key(seed),
            folder and open_run(folder / str(seed), "base"),
            f"seed {seed}",
        )
        for seed in range(count)
    ]
    results = train(
        UPDATE,
        trainings,
        steps=steps,
        config=LoopConfig(1, 2, **options),
        progress=False,
        mesh=sharding.make_mesh(mesh, count),
    )
    return results, trainings


@functools.cache
def on_one_device(count):
    return [state for state, _ in go(count, None)[0]]


@pytest.mark.parametrize(
    ("count", "mesh", "options"),
    [
        (4, "seed:4,data:2", {}),
        (4, "seed:2,data:4", {"steps_per_call": 3}),
        (1, "data:8", {}),
    ],
)
def test_a_mesh_gives_the_numbers_of_one_device(tmp_path, count, mesh, options):
    results, trainings = go(count, mesh, folder=tmp_path, **options)
    expected = on_one_device(4)[:count]
    for (state, summary), plain, training in zip(
        results, expected, trainings, strict=True
    ):
        CLOSE(state, plain)
        assert summary["steps"] == 3
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {1}
        assert [line["step"] for line in metrics.read(training.run)] == [1, 2, 3]
        with closing(Checkpoints(training.run.checkpoints)) as saves:
            tiny.assert_trees_equal(saves.restore(start(0)), state)


def test_a_skill_and_its_critics_on_a_mesh_are_those_of_one_device():
    """One program of both, whose base is whole on every device."""
    skill = CloningConfig(
        tiny.NETWORK,
        tiny.PROCESS,
        OptimiserConfig(learning_rate=1e-3, ema=0.1),
        batch_size=BATCH,
        skill=AdapterConfig(rank=2),
    )
    critics = CriticConfig(widths=(8,), learning_rate=1e-3, batch_size=BATCH)
    agent = OfflineConfig(skill, ("safety",), critics)
    data = Data(transitions(50), Frozen(tiny.base()))
    sizes = (tiny.OBS_DIM, tiny.ACTION_DIM, tiny.base())

    def trained(mesh):
        key = jax.random.key(0)
        [(state, _)] = train(
            Drawn(offline.update, agent, BATCH),
            [Training(offline.init(agent, key, *sizes), data, key)],
            steps=3,
            config=LoopConfig(3, 3),
            progress=False,
            mesh=sharding.make_mesh(mesh),
        )
        return state

    CLOSE(trained("data:8"), trained(None))


def test_a_run_goes_on_on_other_devices(tmp_path):
    """From one device to a mesh and back; one run alone is behind the others."""
    go(1, None, steps=2, folder=tmp_path)
    go(2, "seed:2,data:4", steps=2, folder=tmp_path)
    results, _ = go(2, None, steps=3, folder=tmp_path)
    for (state, summary), expected in zip(results, on_one_device(4), strict=False):
        CLOSE(state, expected)
        assert (summary["resumed_at"], summary["steps"]) == (2, 1)


def test_what_lies_where():
    mesh = sharding.make_mesh("seed:4,data:2", 4)
    with sharding.using(mesh):
        got = jax.jit(sharding.rows)({"x": jnp.ones((8, 3))})
    assert got["x"].sharding.spec == PartitionSpec("data")
    for count, spec in ((4, PartitionSpec("seed")), (8, PartitionSpec("seed"))):
        placed = sharding.Layout(mesh, count).put(jnp.ones((count, 3)))
        assert placed.sharding.spec == spec
        assert placed.addressable_shards[0].data.shape == (count // 4, 3)
    # Some may be finished: what is left is whole on every device.
    for count in (1, 3):
        layout = sharding.Layout(mesh, count)
        assert layout.axis is None
        assert layout.put(jnp.ones((count, 3))).is_fully_replicated
    keys = jax.random.split(jax.random.key(0), 4)
    placed = sharding.Layout(mesh, 4).put(keys)
    np.testing.assert_array_equal(
        jax.random.key_data(placed), jax.random.key_data(keys)
    )
    assert jax.jit(sharding.rows)(jnp.ones((7, 3))).shape == (7, 3)  # no mesh in use


@pytest.mark.parametrize(
    ("text", "members", "message"),
    [
        ("seed:4", 4, "takes 4 devices, there are 8"),
        ("data:16", 1, "takes 16 devices, there are 8"),
        ("seed:4,data:2", 6, "cannot divide 6 runs by 4"),
        ("seed:8", 1, "cannot divide 1 runs by 8"),
        ("", 1, "got '', expected sizes such as seed:4,data:2"),
        ("8", 8, "got '8'"),
        ("data:0", 1, "got 'data:0'"),
        ("data:-8", 1, "got 'data:-8'"),
        ("data:٨", 1, "got 'data:٨'"),
        ("model:8", 1, "got 'model:8'"),
        ("data:2,data:4", 1, "got 'data:2,data:4'"),
    ],
)
def test_bad_meshes(text, members, message):
    with pytest.raises(InputError) as caught:
        sharding.make_mesh(text, members)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_that_a_mesh_does_not_divide(tmp_path):
    training = Training(start(0), DATA, jax.random.key(0), open_run(tmp_path, "base"))
    with pytest.raises(InputError, match="data:8 does not divide a batch of 6"):
        train(
            Drawn(cloning.update, AGENT, 6),
            [training],
            steps=1,
            config=LoopConfig(1, 1),
            mesh=sharding.make_mesh("data:8"),
        )


def test_a_command_on_a_mesh_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    d4rl.save("x.hdf5", demonstrations(2, 0), {})
    flags = (*FLAGS, "--workdir=w", "--library=l", "--data=x.hdf5", "--noevaluate")
    for mesh, seeds, batch, message in (
        ("seed:3", "0,1,2", 8, "takes 3 devices, there are 8"),
        ("seed:8", "0,1,2", 8, "cannot divide 3 runs by 8"),
        ("seeds:8", "0", 8, "got 'seeds:8'"),
        ("data:8", "0", 6, "data:8 does not divide a batch of 6"),
        ("seed:2,data:4", "0,1", 6, "data:4 does not divide a batch of 6"),
    ):
        more = (f"--config.base.batch_size={batch}", f"--mesh={mesh}")
        answer = call("launch.pretrain", *flags, *more, f"--seeds={seeds}")
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert message in answer.err
    assert not (tmp_path / "w").exists() and not (tmp_path / "l").exists()


@pytest.mark.parametrize("stage", ["pretrain", "expand", "critics", "compose"])
def test_no_folder_is_made_for_what_cannot_be_trained(tmp_path, monkeypatch, stage):
    """A corrected command then finds no other run there."""
    monkeypatch.chdir(tmp_path)
    d4rl.save("x.hdf5", demonstrations(4, 0), {})
    library = SkillLibrary.create("l")
    frozen = tiny.randomised(
        lambda: init_base(tiny.NETWORK, jax.random.key(0), 2, 2), 0
    )
    card = {"obs_dim": 2, "action_dim": 2, "name": "base", "env": "gymnasium:None-v0"}
    card["network"] = dataclasses.asdict(tiny.NETWORK)
    card["process"] = dataclasses.asdict(tiny.PROCESS)
    library.add_base(frozen, Normaliser(np.zeros(2), np.ones(2)), card)
    walk = tiny.randomised(lambda: lora.init_skill(jax.random.key(0), frozen, 2), 1)
    library.add_skill("walk", walk, {"alpha": 1.0, "env": "gymnasium:None-v0"})

    def run(changes=(), **program):
        sixes = {f"{name}.batch_size": 6 for name in SECTIONS}
        job = stages.job(config(**sixes | dict(changes)))
        common = {"workdir": "w", "seed": 0, "data": "x.hdf5", "library": "l"}
        if stage == "critics":
            return critics.run(job, critics.Request(**common), **program)
        common["evaluate"] = False
        if stage == "pretrain":
            request = base.Request(**common | {"library": "new"})
            return base.run(job, request, **program)
        if stage == "expand":
            return skill.run(job, skill.Request(name="run", **common), **program)
        common |= {"support_data": ["x.hdf5"], "name": "gate", "skills": ["walk"]}
        return gate.run(job, gate.Request(**common), **program)

    with pytest.raises(InputError, match="data:8 does not divide a batch of 6"):
        run(mesh="data:8")
    looped = {"run.steps_per_call": 2}
    with pytest.raises(InputError, match="steps_per_call: got 2, expected 1 where"):
        run(looped, stream="yes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="which takes grain"):
        run(stream="yes")
    assert not (tmp_path / "w").exists() and not (tmp_path / "new").exists()
