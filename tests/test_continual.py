"""Tasks in sequence: what is learned, kept and reported, and what is refused."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import continual, grid, packnet, results, tasks
from experiments.configs.continual import job
from psec_jax import tree
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.policy import load_base
from psec_jax.workflows import base
from psec_jax.workflows.collection import collect

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
REACH = "gymnasium:tiny_env:Reach-v0"
ENVS = [REACH, f"{REACH}?max_episode_steps=5", f"{REACH}?max_episode_steps=4"]
SMALL = {
    "network.width": 8,
    "network.blocks": 1,
    "base.steps": 2,
    "skill.steps": 2,
    "skill.rank": 2,
    "gate.steps": 2,
    "auto.steps": 2,
    "auto.ranks": (2,),
    "table.cloning": {"steps": 2, "batch_size": 8},
    "base.batch_size": 8,
    "skill.batch_size": 8,
    "gate.batch_size": 8,
    "base.episodes": 10,
    "skill.episodes": 10,
    "evaluation.episodes": 3,
    "table.methods": (),
}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "data"))


def sequence_file(folder, **changes):
    """A file of two tasks, the first of which is visited again."""
    first, second = ({"name": n, "env": e} for n, e in zip("ab", ENVS, strict=False))
    fields = {
        "policy": "random",
        "base": [{"name": "base", "env": ENVS[2]}],
        "tasks": [first, second, first],
    }
    path = folder / "mine.json"
    path.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v}))
    return str(path)


def measured(folder, sequence, **changes):
    """Raw results by method of a run of two steps."""
    small = job("quick").changed(SMALL | changes)
    table = continual.make_table(sequence, folder / "runs")
    runs, chosen = folder / "runs", small.table.methods
    grid.run(table, small, runs, folder, lambda line: None, methods=chosen)
    raws = results.read_all(table.path(folder))
    return table, {raw["method"]: raw for raw in raws}


FAST = ("Fine-tuning", "LoRA", "PSEC", "Nearest", "Expand or compose")


def test_a_sequence_is_learned_and_kept(tmp_path):
    sequence = tasks.read(sequence_file(tmp_path))
    chosen = {"table.methods": FAST}
    table, raws = measured(tmp_path, sequence, **chosen)
    assert raws.keys() == set(FAST)
    assert continual._unchanged(raws["LoRA"]) == 1
    assert not continual.score(raws["LoRA"])["F"].any()
    assert continual._unchanged(raws["Fine-tuning"]) == 0
    # A gate of another visit is another gate; the second task's stays.
    assert raws["PSEC"]["unchanged"] == [[True], [True, True], [False, True, True]]
    # The second visit adds no skill, and so no other support.
    assert raws["Nearest"]["unchanged"][2] == [False, True, True]
    assert "| Nearest |" in continual.write_table(table, tmp_path)
    episodes = (tmp_path / "runs" / "episodes.jsonl").read_bytes()
    measured(tmp_path, sequence, **chosen)
    assert (tmp_path / "runs" / "episodes.jsonl").read_bytes() == episodes
    with pytest.raises(InputError, match="config_fingerprint .*choose another"):
        measured(tmp_path, sequence, **chosen, **{"skill.steps": 3})


def test_ewc_pulls_and_packnet_keeps(tmp_path):
    """Bits, costs by hand, and a start after a stop that learns nothing again."""
    sequence = tasks.read(sequence_file(tmp_path))
    chosen = {"table.methods": ("EWC", "PackNet")}
    table, raws = measured(tmp_path, sequence, **chosen)
    params = load_base(tmp_path / "runs/seed0/library").params.base
    kernels = sum(mask.size for mask in packnet.used(params).values())
    # A Fisher weight for every parameter; a bit for every kernel weight of two tasks.
    expected = {"EWC": (tree.size(params), 4 * tree.size(params), 0)}
    expected["PackNet"] = (2 * kernels, 2 * kernels // 8, 1)
    for method, (numbers, size, unchanged) in expected.items():
        raw = raws[method]
        assert (raw["parameters"], raw["bytes"]) == (numbers / 3, size / 3)
        assert continual._unchanged(raw) == unchanged
    shares = [
        np.mean(np.concatenate([mask.ravel() for mask in masks.values()]))
        for i in range(3)
        if (masks := packnet.used(_packed(tmp_path, i)))
    ]
    np.testing.assert_allclose(shares, [1 / 3, 2 / 3, 1], atol=0.02)
    lines = table.path(tmp_path).read_text().splitlines()
    before = {
        m: json.loads(line)["matrix"] for m, line in zip(raws, lines, strict=True)
    }
    table.path(tmp_path).unlink()
    _, again = measured(tmp_path, sequence, **chosen)
    assert {m: raw["matrix"] for m, raw in again.items()} == before


def _packed(folder, i):
    return load_base(folder / f"runs/seed0/packed-{i}").params.base


@pytest.mark.slow
def test_every_method(tmp_path):
    sequence = tasks.read(sequence_file(tmp_path))
    assert [task.name for task in sequence.until(2)] == ["a", "b"]
    assert [sequence.visit(i, 0) for i in (-1, 0, 1, 2)] == [None, 0, 0, 2]
    table, raws = measured(tmp_path, sequence)
    assert raws.keys() == continual.METHODS.keys()
    for raw in raws.values():
        assert [np.shape(row) for row in raw["matrix"]] == [(1, 3), (2, 3), (3, 3)]
        assert np.shape(raw["before"]) == (3, 3) and raw["tasks"] == ["a", "b", "a"]
        assert set(np.ravel(raw["before"])) <= {0.0, 1.0}
    for method in ("Joint", "Scratch", "LoRA"):
        assert continual._unchanged(raws[method]) == 1, method
        assert not continual.score(raws[method])["F"].any()
    kept = {method: raw["parameters"] for method, raw in raws.items()}
    assert kept["Joint"] == kept["Fine-tuning"] == 0
    assert kept["EWC"] > 0 and kept["PackNet"] > 0
    assert kept["LoRA"] < kept["PSEC"] and kept["LoRA"] < kept["Scratch"]
    demonstrations = raws["LoRA"]["demonstrations"]
    assert demonstrations.keys() == {"a", "b"} and min(demonstrations.values()) > 0

    text = continual.write_table(table, tmp_path)
    assert "| PSEC one gate |" in text and "numbers / task" in text
    for name in ("mine_matrix.png", "mine_curve.svg"):
        assert (tmp_path / "figures" / name).stat().st_size > 1000


def test_packnet_masks_by_hand():
    """A dense layer of six weights and a norm: two shares, then what moves."""
    kernel = np.float32([[1, -4, 0.5], [3, 2, -6]])
    norm = {"scale": np.float32([7])}
    params = {"dense": {"kernel": kernel, "bias": np.float32([1] * 3)}, "norm": norm}
    first = packnet.pruned(params, None, 1 / 3)
    np.testing.assert_array_equal(first["dense"]["kernel"], [[0, -4, 0], [0, 0, -6]])
    assert first["norm"] == norm and (first["dense"]["bias"] == 1).all()
    owned = packnet.used(first)
    np.testing.assert_array_equal(
        owned["dense/kernel"], [[False, True, False], [False, False, True]]
    )
    # Of the four that are free the two largest stay, whatever the owned ones are.
    second = packnet.pruned(params, owned, 1 / 2)
    np.testing.assert_array_equal(second["dense"]["kernel"], [[0, -4, 0], [3, 2, -6]])
    last = packnet.pruned(params, owned, 1.0)
    np.testing.assert_array_equal(last["dense"]["kernel"], kernel)
    anchor = packnet.fixed(params, owned, rest=True)
    np.testing.assert_array_equal(
        anchor["dense"]["kernel"], [[np.inf, 0, np.inf], [np.inf, np.inf, 0]]
    )
    assert np.isinf(anchor["norm"]["scale"]) and np.isinf(anchor["dense"]["bias"]).all()
    assert not packnet.fixed(params, owned, rest=False)["norm"]["scale"]
    seen = packnet.masked(second, owned)
    np.testing.assert_array_equal(seen["dense"]["kernel"], first["dense"]["kernel"])


def test_an_anchor_that_does_not_fit(tmp_path):
    sequence = tasks.read(sequence_file(tmp_path))
    small = job("quick").changed(SMALL)
    data = tasks.prepare(sequence, small, tmp_path).base
    make = functools.partial(base.Request, tmp_path / "run", data=data, evaluate=False)
    base.run(small, make(tmp_path / "one"))
    start, layer = tmp_path / "one", np.zeros((2, 8), np.float32)
    for message, changes in (
        (
            "objective bc and no start, expected bc and a start",
            {"anchor": {"x": layer}},
        ),
        ("anchor: .* has the shape None", {"anchor": {"x": layer}, "start": start}),
    ):
        with pytest.raises(InputError, match=message):
            base.run(small, make(tmp_path / "two", **changes))


def raw_of(before, matrix):
    return {
        "before": before,
        "matrix": matrix,
        "method": "x",
        "setting": "s",
        "seed": 0,
    }


def test_metrics_by_hand():
    """Two tasks, two episodes; the first is half forgotten."""
    raw = raw_of([[0, 0], [0, 1]], [[[1, 1]], [[0, 1], [1, 1]]])
    got = continual.score(raw)
    np.testing.assert_array_equal(got["P"], [0.5, 1])
    np.testing.assert_array_equal(got["F"], [1, 0])
    np.testing.assert_array_equal(continual.areas(raw), [[0.5, 0.5], [0.5, 1]])
    np.testing.assert_array_equal(got["AUC"], [0.5, 0.75])
    scratch = raw_of([[0, 0], [0, 0]], [[[1, 1]], [[1, 1], [0, 1]]])
    # Areas 0.5 and 0.75 against 0.5 and 0.25: (0 + 0.5 / 0.75) / 2.
    assert continual.forward_transfer(raw, scratch) == pytest.approx(1 / 3)
    # Where scratch has area 1 there is nothing to gain.
    full = raw_of([[1, 1], [0, 0]], [[[1, 1]], [[1, 1], [0, 1]]])
    assert continual.forward_transfer(raw, full) == pytest.approx(0.5 / 0.75)
    assert continual.forward_transfer(full, raw_of([[1]], [[[1]]])) is None


@pytest.mark.parametrize(
    ("before", "matrix"),
    [
        ([[0, 0]], [[[1, 1]], [[0, 1], [1, 1]]]),
        ([[0, 0], [0]], [[[1, 1]], [[0, 1], [1, 1]]]),
        ([[0], [0]], [[[1]], [[0]]]),
        ([], []),
    ],
)
def test_a_matrix_of_another_form(before, matrix):
    with pytest.raises(InputError, match="s x seed 0: a matrix with rows of"):
        continual.score(raw_of(before, matrix))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": None}, "mine.json: tasks is missing or empty, expected tasks"),
        ({"taks": [1]}, "unknown field of .*mine.json 'taks'; choose from about, act"),
        ({"tasks": "a"}, "tasks is 'a', expected a list of tasks"),
        ({"tasks": [{"name": "a"}]}, r"tasks\[0\]: env is None, expected a text"),
        ({"tasks": [{"name": "a/b", "env": REACH}]}, "name is 'a/b', expected letters"),
        (
            {"tasks": [{"name": "a", "env": e} for e in ENVS]},
            r"tasks\[1\]: 'a' is another task than before",
        ),
        (
            {"tasks": [{"name": n, "env": REACH} for n in "ab"]},
            r"tasks\[1\]: 'b' is the task 'a' under another name",
        ),
    ],
)
def test_files_that_are_no_sequence(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tasks.read(sequence_file(tmp_path, **changes))


def test_demonstrations_and_environments_that_do_not_fit(tmp_path):
    small = job("quick").changed(SMALL)

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            sequence = tasks.read(sequence_file(tmp_path, **changes))
            tasks.prepare(sequence, small, tmp_path)

    swimmer = [{"name": "swim", "env": "gymnasium:Swimmer-v5"}]
    refused(
        "Swimmer-v5: observations of 8 numbers, actions of 2 ; expected those of the "
        "base, .*Reach-v0.*: observations of 2 numbers",
        tasks=swimmer,
    )
    ds, attrs = d4rl.load(collect(REACH, "random", 10, 0))
    for name, success in (("never", {"success": np.zeros(10, bool)}), ("silent", {})):
        known = {k: v for k, v in attrs.items() if k != "success"} | success
        d4rl.save(tmp_path / f"{name}.hdf5", ds, known)

    def given(name):
        return [{"name": "a", "env": REACH, "data": str(tmp_path / f"{name}.hdf5")}]

    refused("never.hdf5: demonstrations without success: none r", base=given("never"))
    refused(
        "silent.hdf5: .* do not say whether the goal is reached", base=given("silent")
    )


def test_packaged_sequences():
    ten = tasks.read("cw10")
    assert len(ten.tasks) == 10 and len(ten.until(9)) == 10
    twenty = tasks.read("cw20")
    assert twenty.tasks == ten.tasks * 2 and twenty.base == ten.base
    assert not {t.env for t in ten.tasks} & {t.env for t in ten.base}
    assert tasks.read("cw3").tasks == ten.tasks[:3]
    unseen = tasks.read("unseen12")
    assert (len(unseen.base), len(unseen.tasks)) == (18, 12)
    assert tasks.read("walker").full_return == 1000
    cube = tasks.read("cube")
    assert not {t.env for t in cube.tasks} & {t.env for t in cube.base}
    walking, mixed = tasks.read("walker12"), tasks.read("walker12_mixed")
    assert len(walking.until(11)) == 12 and walking.tasks != mixed.tasks
    assert set(walking.tasks) == set(mixed.tasks) and walking.base == mixed.base


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="no metaworld; run: make setup-metaworld",
)
def test_two_steps_in_meta_world(tmp_path):
    end = "?terminate_on_success=True&max_episode_steps=60"
    names = ("handle-press", "handle-press-side", "plate-slide-side")
    entries = [{"name": n, "env": f"metaworld:{n}-v3{end}"} for n in names]
    fields = {"policy": "scripted", "action_noise": 0.1}
    path = sequence_file(tmp_path, base=entries[2:], tasks=entries[:2], **fields)
    methods = ("EWC", "PackNet", "LoRA", "Support")
    changes = {"table.methods": methods, "evaluation.episodes": 2}
    changes |= {"base.episodes": 2, "skill.episodes": 2}
    _, raws = measured(tmp_path, tasks.read(path), **changes)
    assert raws.keys() == set(methods)
    for method, expected in (("EWC", 0), ("PackNet", 1), ("LoRA", 1)):
        assert continual._unchanged(raws[method]) == expected
    assert np.shape(raws["Support"]["matrix"][1]) == (2, 2)
    assert raws["LoRA"]["demonstrations"] == dict.fromkeys(names[:2], 1.0)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (
            "cw11",
            "unknown sequence (or a path ending in .json) 'cw11'; choose from cube, cw",
        ),
        ("none.json", "cannot read none.json: No such file"),
    ],
)
def test_command_refuses_in_one_line(sequence, message):
    line = [sys.executable, "-m", "experiments.continual", f"--sequence={sequence}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_a_missing_simulator_and_an_unknown_task(tmp_path, monkeypatch):
    for env, message in (
        ("metaworld:push-v3", "metaworld is not installed; run: make setup-metaworld"),
        ("dm_control:walker-fly", "unknown task 'fly' of walker; choose from"),
    ):
        path = sequence_file(tmp_path, tasks=[{"name": "a", "env": env}])
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            tasks.prepare(tasks.read(path), job("quick").changed(SMALL), tmp_path)
