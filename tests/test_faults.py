"""Stages that are killed, and folders that others damage or change."""

import builtins
import errno
import functools
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages

from experiments.configs.dsrl import get_config
from experiments.tools import faults
from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.files import read_json, recover
from psec_jax.library import SkillLibrary
from psec_jax.runtime import loop, metrics, streaming
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.loop import train
from psec_jax.runtime.run import open_run

ROOT = Path(__file__).parents[1]
RATES = {
    "pretrain": "base.learning_rate",
    "expand": "skill.learning_rate",
    "offline": "skill.learning_rate",
    "critics": "critics.learning_rate",
    "compose": "gate.learning_rate",
}


def test_killed_stages_leave_what_unbroken_ones_leave(tmp_path):
    harness = faults.Harness(tmp_path, np.random.default_rng(0))
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    struck, found = harness.broken("pretrain", signals)
    assert not found and struck.total() >= 1, struck


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in with data and a library of base, reward and safety."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        faults.Harness(folder, np.random.default_rng(0))  # writes the data
        go("pretrain", library="lib", workdir="base")
        go("offline", library="lib", workdir="skills")
        yield folder


def tiny(**changes):
    config = get_config("quick")
    config.update_from_flattened_dict(faults.TINY | changes)
    return config


def go(stage, library, workdir, **changes):
    """A stage in this process."""
    steps = {f"{s}.steps": 4 for s in ("base", "skill", "critics", "gate")}
    config = tiny(**steps | {"run.save_every": 2} | changes)
    options = {"library": library, "workdir": workdir, "seed": 0}
    options |= {"data": "demos.hdf5"}
    if stage == "critics":
        return stages.train_critics(config, **options)
    options["evaluate"] = False
    if stage == "pretrain":
        return stages.pretrain(config, **options)
    if stage == "compose":
        skills = ["safety", "reward"]
        options |= {"support_data": ["demos.hdf5"] * 2, "base_data": "demos.hdf5"}
        return stages.compose(config, name="gate", skills=skills, **options)
    names = "walk"
    if stage == "offline":
        config.skill.objective, names = "reward,safety", ["reward", "safety"]
    return stages.expand(config, name=names, **options)


@pytest.fixture
def library(place, request):
    """A copy of the library, and a name for a workdir."""
    folder = Path(tempfile.mkdtemp(dir=place))
    shutil.copytree("lib", folder / "lib")
    return folder / "lib"


@pytest.mark.parametrize("stage", RATES)
def test_no_stage_goes_on_with_numbers_that_are_not_finite(library, stage):
    if stage in ("pretrain", "offline"):
        shutil.rmtree(library / "skills")
    if stage == "pretrain":
        shutil.rmtree(library)
    before = sorted(library.rglob("*"))
    with pytest.raises(TrainingError, match=r"not finite (at|between) steps? \d"):
        go(stage, library, library.parent / "run", **{RATES[stage]: 1e30})
    assert sorted(library.rglob("*")) == before
    assert not (library.parent / "run" / "result.json").exists()


def test_learned_support_that_is_not_finite_is_refused(library):
    changes = {"gate.support": "learned", "support.learning_rate": 1e30}
    changes |= {"support.steps": 5, "support.queries": 32}
    with pytest.raises(TrainingError, match="support is not finite between steps 0 a"):
        go("compose", library, library.parent / "run", **changes)
    assert SkillLibrary.open(library).gates() == []


def replaced_while(monkeypatch, change):
    """Training that is followed by a change of the library by someone else."""

    def changing(*arguments, **options):
        result = train(*arguments, **options)
        change()
        return result

    monkeypatch.setattr(loop, "train", changing)


def test_base_replaced_under_a_running_expand(library, monkeypatch):
    shutil.rmtree(library / "skills")
    opened = SkillLibrary.open(library)
    params, normaliser, card = opened.load_base()
    other = normaliser._replace(mean=normaliser.mean + 1)
    replaced_while(
        monkeypatch, lambda: opened.add_base(params, other, card, overwrite=True)
    )
    with pytest.raises(InputError, match="'walk': made for base_fingerprint"):
        go("expand", library, library.parent / "run")
    assert opened.skills() == []


def test_skill_replaced_under_a_running_compose(library, monkeypatch):
    opened = SkillLibrary.open(library)
    params, card = opened.load_skill("safety")
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    replaced_while(
        monkeypatch,
        lambda: opened.add_skill("safety", other, card, overwrite=True),
    )
    with pytest.raises(InputError, match="'gate': made for skill 'safety'"):
        go("compose", library, library.parent / "run")
    assert opened.gates() == []


def read_only(patch, folder):
    """A folder as on a file system mounted so; modes of files do not hold root back."""

    def refusing(function, writes):
        def called(path, *arguments, **options):
            inside = isinstance(path, (str, Path)) and (
                Path(path).absolute().is_relative_to(folder.absolute())
            )
            if inside and writes(*arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *arguments, **options)

        return called

    def always(*_):
        return True

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, refusing(getattr(os, name), always))
    patch.setattr(
        builtins, "open", refusing(open, lambda mode="r", *_: set(mode) & set("wax+"))
    )


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_read_only_workdir_is_refused_and_left_as_it_is(place, tmp_path, monkeypatch):
    half = tmp_path / "half"
    shutil.copytree("base", half)
    (half / "result.json").unlink()
    before = contents(tmp_path)
    expected = read_json("base/result.json")
    read_only(monkeypatch, tmp_path)
    read_only(monkeypatch, place / "base")
    reason = "Read-only file system"
    with pytest.raises(InputError, match=f"cannot make workdir .*/new: {reason}$"):
        go("pretrain", "lib", tmp_path / "new")
    with pytest.raises(InputError, match=rf"cannot write .*/versions.json: {reason}$"):
        go("pretrain", "lib", half)
    assert contents(tmp_path) == before
    # Nothing is left to write of one that is finished.
    assert go("pretrain", "lib", "base") == expected


def test_read_only_library_loses_no_training(library, monkeypatch):
    shutil.rmtree(library / "skills")
    before, run = contents(library), library.parent / "run"
    with monkeypatch.context() as patch:
        read_only(patch, library)
        with pytest.raises(InputError, match="cannot write .*/walk: Read-only file sy"):
            go("expand", library, run)
    assert contents(library) == before
    summary = go("expand", library, run)["summary"]
    assert (summary["resumed_at"], summary["steps"]) == (4, 0)
    assert SkillLibrary.open(library).skills() == ["walk"]


@pytest.fixture
def coroutines_collected():
    """Orbax's coroutines of a failed save go before the next test begins.

    Some were never begun and some report to an event loop that is closed: Python warns
    of them when they are collected.
    """
    yield
    ends = time.monotonic() + 10  # TensorStore's threads hold some for a moment
    while any(map(orbax_coroutine, gc.get_objects())) and time.monotonic() < ends:
        gc.collect()
        time.sleep(0.05)


def orbax_coroutine(value):
    return isinstance(value, types.CoroutineType) and (
        "orbax" in value.cr_code.co_filename
    )


@pytest.mark.usefixtures("coroutines_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workdir_that_becomes_read_only_keeps_its_saves(library, monkeypatch):
    run = library.parent / "run"
    with monkeypatch.context() as patch:

        def remounted(step, states):
            if step == 4:
                read_only(patch, run)

        patch.setattr(loop, "train", functools.partial(train, on_save=remounted))
        # The save before may still be on its way.
        message = "cannot save step [34] .*: Read-only file system; last good save: st"
        with pytest.raises(InputError, match=message) as caught:
            go("critics", library, run, **{"run.save_every": 1})
    resumed_at = go("critics", library, run)["summary"]["resumed_at"]
    assert str(caught.value).endswith(f"last good save: step {resumed_at}")
    assert resumed_at >= 2


def stop(step, states):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # as launchers do, to the group too


def test_stage_with_nothing_left_to_train_tells_the_same(library, monkeypatch):
    expected = go("critics", library, library.parent / "whole")
    run = library.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", functools.partial(train, on_save=stop))
        with pytest.raises(Stopped, match="SIGTERM at step 2; last good save: step 2"):
            go("critics", library, run)
    for resumed_at in (2, 4):
        got = go("critics", library, run)
        assert got["summary"]["resumed_at"] == resumed_at
        assert got["fingerprint"] == expected["fingerprint"]
        for name in ("loss/critic_safety", "q/reward", "v/reward"):
            assert got["summary"][name] == expected["summary"][name]
        (run / "result.json").unlink()


def test_differences_are_found(place, tmp_path):
    left = faults.Folders(place / "base", place / "lib")
    right = faults.Folders(tmp_path / "base", tmp_path / "lib")
    for mine, copy in zip(left, right, strict=True):
        shutil.copytree(mine, copy)
    assert faults.differences(left, right) == []
    lines = (right.run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (right.run / "metrics.jsonl").write_text("".join(lines[1:]))
    base = right.library / "base" / "base.safetensors"
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    (right.run / ".config.json.tmp-here-1").write_text("{")
    found = "; ".join(faults.differences(left, right))
    for name in ("metrics.jsonl", "base/base.safetensors", ".config.json.tmp-here-1"):
        assert name in found
    assert "SHA-256" in found


def state(step=0):
    return {"a": jnp.arange(2000.0), "step": jnp.int32(step)}


def test_library_killed_at_every_file_operation(tmp_path):
    script = Path(__file__).with_name("killed_library.py")
    command = [sys.executable, "-W", "ignore", script, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20


def saves(folder, *steps):
    with closing(Checkpoints(folder)) as made:
        for step in steps:
            made.save(step, state(step))
        made.wait()
    return sorted(p for p in (folder / str(steps[-1])).rglob("*") if p.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, halve, os.remove])
def test_damaged_save_gives_way_to_the_one_before(tmp_path, capfd, damage):
    names = [p.relative_to(tmp_path / "a") for p in saves(tmp_path / "a", 1, 2)]
    # What Orbax writes last tells dates alone.
    checked = [n for n in names if n.parts[1] == "default" and n.suffix != ".txt"]
    assert len(checked) > 5
    for name in checked:
        if damage is os.remove and name.name == "sha256.json":
            continue  # told below
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        damage(tmp_path / "b" / name)
        with closing(Checkpoints(tmp_path / "b")) as found:
            assert found.last == 1, name
            assert found.restore(state())["step"] == 1
        told = capfd.readouterr().err
        assert told.count("\n") == 1, told
        if name.name != "sha256.json":
            assert f"2 is damaged: {'/'.join(name.parts[2:])} " in told
        assert told.endswith("renamed to 2.damaged, going on from step 1\n")
    with closing(Checkpoints(tmp_path / "b")) as found:
        found.save(2, state(2))
        found.wait()
        assert found.last == 2


def test_no_whole_save_is_refused_and_nothing_is_lost(tmp_path):
    saves(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(tmp_path / step / "default" / "_METADATA")
    for _ in range(2):
        with pytest.raises(
            InputError, match="no save in .* is whole .step 2: _METADATA does not "
        ):
            Checkpoints(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_save_without_checksums_is_told(tmp_path, capfd):
    saves(tmp_path, 1, 2)
    (tmp_path / "2" / "default" / "sha256.json").unlink()
    with closing(Checkpoints(tmp_path)) as found:
        assert found.restore(state())["step"] == 2
    assert "2 has no checksums; taken as it is" in capfd.readouterr().err


@pytest.mark.usefixtures("coroutines_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_save_that_cannot_be_written_keeps_the_one_before(tmp_path):
    saves(tmp_path, 1)
    large = state() | {"b": jnp.asarray(np.random.default_rng(0).normal(size=9000))}
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Checkpoints(tmp_path)) as found:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(
                InputError, match="save step 2 .*: File too large; last good save: st"
            ):
                found.save(2, large)
                found.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["1"]


def test_run_killed_before_it_had_a_config_goes_on(tmp_path):
    (tmp_path / f".config.json.tmp-{os.uname().nodename}-{2**22 + 1}").write_text('{"s')
    open_run(tmp_path, "base")
    assert not list(tmp_path.glob(".config*"))


@pytest.mark.parametrize("line", [b'{"step": 2, "lo\n', b"\xff\n", b"[1]\n", b"{}\n"])
def test_damaged_line_of_metrics_is_refused_by_number(tmp_path, line):
    run = open_run(tmp_path, "base")
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    run.metrics.write_bytes(lines[0] + line + lines[2])
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is damaged"):
        metrics.Writer(run, 3)
    run.metrics.write_bytes(b"".join(lines) + line.rstrip())
    if line != b"{}\n" and line != b"[1]\n":
        metrics.Writer(run, 3).close()
        assert run.metrics.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("stage", RATES)
def test_streamed_data_make_the_same_entries(place, stage, monkeypatch):
    # To the last bit in the programs that a user runs; those of conftest.py round
    # otherwise where the batch is drawn in the same one.
    jit, emitters = jax.jit, {"xla_cpu_use_fusion_emitters": True}

    def as_users(function, **options):
        step = "donate_argnums" in options
        more = {"compiler_options": emitters} if step else {}
        return jit(function, **options, **more)

    monkeypatch.setattr(jax, "jit", as_users)
    tables = []
    write = streaming.write_table

    def noted(rows, path):
        tables.append(path)
        return write(rows, path)

    def made(where):
        library, run = place / f"lib-{stage}-{where}", place / f"{stage}-{where}"
        if stage != "pretrain":
            others = ("skills",) if stage in ("expand", "offline") else ()
            shutil.copytree("lib", library, ignore=shutil.ignore_patterns(*others))
        summary = go(stage, library, run)["summary"]
        told = {name: value for name, value in summary.items() if "/" in name}
        cards = {p.relative_to(library): read_json(p) for p in library.rglob("*.json")}
        prints = {path: card.get("fingerprint") for path, card in cards.items()}
        return {k: v for k, v in told.items() if k != "time/steps_per_s"} | prints

    monkeypatch.setattr(streaming, "write_table", noted)
    in_memory = made("memory")
    assert tables == []
    monkeypatch.setattr(streaming, "_SHARE", 0)  # every set is larger than that
    assert made("file") == in_memory
    assert len(tables) == 1 and not tables[0].parent.exists()
    left = tables[0].parent.with_name(".rows.tmp-999999999")  # by a killed process
    left.mkdir()
    recover(left.parent)
    assert not left.exists()
