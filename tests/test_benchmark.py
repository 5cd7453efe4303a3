"""The benchmark: every group at a tiny size, the table, the JSON, the targets."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from experiments.tools import benchmark
from psec_jax.errors import InputError
from psec_jax.files import read_json, write_json
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.runtime.batches import Data
from psec_jax.workflows import gate
from psec_jax.workflows.collection import simulator_versions

TINY = benchmark.Sizes(
    repeats=2,
    seconds=0,
    latency_repeats=2,
    matmul=8,
    batches=(10,),
    seeds=(1, 2),
    skills=(2,),
    active=(1,),
    acting=(1, 2),
    transitions=2000,
    start_steps=2,
    rows=8,
    loops=(1, 2),
    episodes=2,
    cell_episodes=2,
    evaluation_repeats=1,
    env="gymnasium:Pendulum-v1",
    workers=(1, 2),
    device_env="mjx:pendulum-swingup?time_limit=0.2",
    device_episodes=(2,),
    robots=(1, 2),
    replies=4,
    libraries=(1, 2),
    tasks=2,
    demonstrations=2,
    library_batch=4,
    network=NetworkConfig(
        width=8, blocks=1, expansion=1, time_features=4, time_width=8
    ),
)
VERSIONS = {"cpu": "a", "cores": 2, "device": "b", "jax": "c", "commit": "d"}


@pytest.fixture(scope="module")
def measured():
    def few(sizes, batch):
        made = make_plans(sizes, batch)
        return {name: made[name] for name in ("base", benchmark.OFFLINE)}

    make_plans, lines = benchmark.make_plans, []
    with pytest.MonkeyPatch.context() as patch:
        # Each stage takes seconds to compile; two show that training is measured.
        patch.setattr(benchmark, "make_plans", few)
        return benchmark.measure(TINY, show=lines.append), "\n".join(lines)


def without_numbers(name):
    return re.sub(r"\d+", "#", name)


@pytest.mark.slow
def test_every_group_gives_figures(measured):
    result, text = measured
    known = {"mjx": "mujoco-mjx", "support": "metaworld"}
    missing = {g for g, name in known.items() if name not in simulator_versions()}
    groups = {row["group"] for row in result["rows"]}
    assert groups == set(benchmark.GROUPS) - missing
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["value"] <= row["high"] < np.inf, row
        assert row["value"] > 0 or row["name"].endswith("largest difference"), row
        assert row["name"] in text
    assert f"commit {result['commit']}" in text


@pytest.mark.slow
def test_every_target_is_of_a_figure(measured):
    rows, _ = measured
    names = {(r["group"], without_numbers(r["name"])) for r in rows["rows"]}
    for group, name in benchmark.TARGETS:
        assert (group, without_numbers(name)) in names


@pytest.mark.slow
def test_json(measured, tmp_path):
    result, _ = measured
    write_json(tmp_path / "benchmark.json", result)
    saved = read_json(tmp_path / "benchmark.json")
    assert saved == json.loads(json.dumps(result))
    assert {"rows", "sizes", "flop", "commit", "versions", "cpu_flags"} <= set(saved)
    assert saved["versions"]["cores"] >= 1


def test_groups_run_in_their_order_and_unknown_ones_are_refused(monkeypatch):
    order = []

    def group(name):
        def measure(sizes):
            order.append(name)
            return [benchmark.make_row(name, "x", [1.0], "s")]

        return measure

    monkeypatch.setattr(
        benchmark, "GROUPS", {name: group(name) for name in ("startup", "train")}
    )
    benchmark.measure(TINY, ["train", "startup"], show=str)
    assert order == ["startup", "train"]
    with pytest.raises(InputError, match=r"unknown group 'speed'.*startup"):
        benchmark.measure(TINY, ["speed"], show=str)


@pytest.mark.parametrize("head", ["linear", "topk"])
def test_a_gate_over_many_skills_is_planned(head, tmp_path):
    """Candidates for critics, which many skills do not have, are of other gates."""
    benchmark.write_library(TINY, tmp_path, 7, benchmark.META_WORLD)
    names = [f"skill{k}" for k in range(7)]
    job = benchmark.make_job(TINY, 2).changed({"gate.head": head})
    load = functools.partial(benchmark._load, 8, robot=benchmark.META_WORLD)
    request = gate.Request("", tmp_path, "gate", names, evaluate=False)
    state, frozen = gate.plan(job, request, load).start()
    assert jax.tree.leaves(frozen.library)[0].shape[0] == 7
    assert state.step == 0
    with pytest.raises(InputError, match="gate.alphas: got .* expected 7 weights"):
        gate.plan(job.changed({"gate.alphas": ((1.0,),)}), request, load)


def test_flop_of_the_gates_by_hand():
    """Of base and one skill: products of 5 steps, and of 4 input gradients in NSEC."""
    plans = benchmark.make_plans(TINY, 4)
    state, frozen = plans["NSEC"].start()
    n = benchmark.weights_of(frozen.base)
    head = 6 * benchmark.weights_of(state.params)
    assert benchmark.flop_per_example(plans["NSEC"], 4) == 2 * 9 * 2 * n + head
    assert benchmark.flop_per_example(plans["ASEC"], 4) == 2 * 5 * 2 * n + head


def test_measurements_are_made_in_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    times = benchmark.calls_in_turns(calls, repeats=3, seconds=0)
    assert order == list("AABB") + list("AB") * 3  # compiled, calibrated, then in turns
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_rows_are_judged_by_the_median():
    name = "K = 16, batch 2048: cost over the base"
    row = benchmark.make_row("skills", name, [1.7, 1.9, 9.0], "x")
    assert (row.value, row.target, row.met) == (1.9, "<= 2", True)
    missed = benchmark.make_row("skills", name, [1.7, 2.1, 9.0], "x")
    assert not missed.met
    assert "<= 2 met" in benchmark.table([row])
    assert "<= 2 NOT MET" in benchmark.table([missed])
    text = benchmark.summary([row, missed], load=3.0, machine=VERSIONS)
    assert "1 of 2 met" in text and "not met: K = 16" in text and "busy" in text
    other = benchmark.make_row("skills", "K = 17", [1.0], "x")
    assert other.target is None and other.met is None


@pytest.mark.parametrize("flags", [(), ("avx2", "amx_bf16")])
def test_bfloat16_is_judged_with_amx_only(flags, monkeypatch):
    monkeypatch.setattr(benchmark, "cpu_flags", lambda: flags)
    name = "sampling, batch 2048: speed over f32"
    row = benchmark.make_row("bfloat16", name, [2.5], "x")
    assert row.met is (True if flags else None)
    text = benchmark.summary([row], load=0.0, machine=VERSIONS)
    assert ("not judged" in text) != bool(flags)


@pytest.mark.slow
def test_flop_count_is_that_of_the_compiled_products():
    # The paper's network: its products outweigh everything elementwise.
    sizes = dataclasses.replace(TINY, rows=64, network=NetworkConfig())
    for plan in benchmark.make_plans(sizes, 64).values():
        state, frozen = plan.start()
        data = Data(plan.rows, frozen)
        lowered = jax.jit(plan.update).lower(state, data, jax.random.key(0))
        counted = lowered.cost_analysis()["flops"] / 64
        assert benchmark.flop_per_example(plan, 64) == pytest.approx(counted, rel=0.1)
