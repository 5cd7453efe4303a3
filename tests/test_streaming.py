"""Data in a file give the numbers of data in a device's memory."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax.agents import cloning
from psec_jax.agents.cloning import CloningConfig
from psec_jax.agents.common import Demonstrations, OptimiserConfig
from psec_jax.errors import InputError
from psec_jax.runtime import batches, loop, sharding, streaming
from psec_jax.runtime.batches import Data, Drawn
from psec_jax.runtime.loop import LoopConfig
from psec_jax.runtime.run import open_run
from psec_jax.runtime.runs import Training

AGENT = CloningConfig(
    tiny.NETWORK,
    tiny.PROCESS,
    OptimiserConfig(learning_rate=1e-3, ema=0.1),
    batch_size=8,
)
UPDATE = Drawn(cloning.update, AGENT, 8)
SHAPES = {"obs": (tiny.OBS_DIM,), "action": (tiny.ACTION_DIM,)}
CLOSE = functools.partial(tiny.assert_trees_close, atol=2e-5, rtol=1e-4)


def columns(seed):
    """Of another length for every seed."""
    rows = 50 + 20 * seed
    return {
        name: np.asarray(tiny.normal(rows, *shape, seed=seed + 10))
        for name, shape in SHAPES.items()
    }


def data_of(seed):
    return Data(Demonstrations(**columns(seed)))


def stream(folder, seed):
    return streaming.make_stream(data_of(seed), folder / f"{seed}.npy")


def train(datas, mesh=None, steps=5, folder=None, update=UPDATE, calls=1):
    trainings = [
        Training(
            cloning.init(AGENT, jax.random.key(s), tiny.OBS_DIM, tiny.ACTION_DIM),
            data,
            jax.random.key(s),
            folder and open_run(folder / str(s), "base"),
        )
        for s, data in enumerate(datas)
    ]
    results = loop.train(
        update,
        trainings,
        steps=steps,
        config=LoopConfig(1, 2, calls),
        progress=False,
        mesh=sharding.make_mesh(mesh, len(trainings)),
    )
    return [state for state, _ in results]


@functools.cache
def resident(count):
    return train(batches.of_one_length([data_of(seed) for seed in range(count)]))


def test_one_run_is_the_same_bits_also_after_a_stop(tmp_path):
    data = stream(tmp_path, 0)
    assert isinstance(data.table, np.memmap)
    tiny.assert_trees_equal(train([data]), resident(1))
    train([data], steps=3, folder=tmp_path)
    tiny.assert_trees_equal(train([data], folder=tmp_path), resident(1))


@pytest.mark.parametrize("mesh", [None, "seed:2,data:4", "seed:1,data:8"])
def test_several_runs_on_data_of_their_own(tmp_path, mesh):
    datas = [stream(tmp_path, seed) for seed in range(2)]
    CLOSE(train(datas, mesh), resident(2))


def test_one_run_on_a_mesh(tmp_path):
    CLOSE(train([stream(tmp_path, 0)], "data:8"), resident(1))


def test_each_device_reads_its_own_rows_alone():
    """So that a process reads no part of a batch that others need."""
    layout = sharding.Layout(sharding.make_mesh("seed:2,data:4", 2), 2)
    asked = []

    def part(where):
        asked.append([list(range(n))[s] for n, s in zip((2, 8), where, strict=False)])
        return np.zeros((len(asked[-1][0]), len(asked[-1][1]), 3))

    batch = layout.put_batch((2, 8, 3), part)
    assert batch.shape == (2, 8, 3)
    expected = [[[r], [b, b + 1]] for r in range(2) for b in range(0, 8, 2)]
    assert sorted(asked) == expected


def test_columns_keep_their_shapes(tmp_path):
    rows = {
        "a": np.arange(12.0).reshape(4, 3),
        "b": np.arange(4.0),
        "c": np.arange(16.0).reshape(4, 2, 2),
    }
    made = streaming.make_stream(Data(rows), tmp_path / "new" / "t.npy")
    assert made.table.shape == (4, 8) and made.table.dtype == np.float32
    got = made.batch(jnp.asarray(made.table[[2, 0]]))
    for name, column in rows.items():
        np.testing.assert_array_equal(got[name], column[[2, 0]])


def test_when_it_is_wanted(monkeypatch):
    assert streaming.wanted("yes", 0) and not streaming.wanted("no", 10**18)
    assert streaming.wanted("auto", 10**18) and not streaming.wanted("auto", 10**6)
    with pytest.raises(InputError, match=r"unknown stream 'always'; .*auto"):
        streaming.wanted("always", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not streaming.wanted("auto", 10**6)
    with pytest.raises(InputError, match="stream: 7 bytes .* takes grain; pip inst"):
        streaming.wanted("yes", 7)


def test_refusals(tmp_path):
    data = stream(tmp_path, 0)
    with pytest.raises(InputError, match="steps_per_call: got 3, expected 1 where"):
        train([data], calls=3)
    with pytest.raises(InputError, match="some trainings are streamed"):
        train([data, data_of(0)])
    with pytest.raises(InputError, match="data:8 does not divide a batch of 6"):
        train([data], "data:8", update=Drawn(cloning.update, AGENT, 6))
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/t\.npy: "):
        streaming.make_stream(data_of(0), taken / "t.npy")
    if Path("/dev/full").exists():
        with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
            streaming.make_stream(data_of(0), Path("/dev/full"))
