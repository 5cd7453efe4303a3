"""The loop: resume bit by bit, stops, refusals, full disks."""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

from psec_jax.errors import InputError, Stopped, TrainingError
from psec_jax.files import read_json
from psec_jax.runtime import loop, metrics, platform
from psec_jax.runtime.checkpoint import Checkpoints
from psec_jax.runtime.loop import LoopConfig, train
from psec_jax.runtime.run import open_run
from psec_jax.runtime.runs import Training

OPTIMISER = optax.adamw(1e-2)
CONFIG = {"batch_size": 8, "network": {"depth": 2}}


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any


def fresh() -> State:
    params = {"layer": {"kernel": jnp.ones((4, 4))}}
    return State(params, OPTIMISER.init(params), jnp.zeros((), jnp.int32))


def update(state, data, key):
    x = data[jax.random.randint(key, (8,), 0, data.shape[0])]

    def loss_fn(params):
        return jnp.mean((x @ params["layer"]["kernel"] - x) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = OPTIMISER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1), {"loss/base": loss}


def fails_at(step):
    """`update`, whose loss is not a number in that update."""

    def failing(state, data, key):
        new, scalars = update(state, data, key)
        loss = jnp.where(state.step == step - 1, jnp.nan, scalars["loss/base"])
        return new, {"loss/base": loss}

    return failing


@pytest.fixture
def data():
    return np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def go(
    run, data, update=update, steps=4, log_every=1, save_every=1, calls=1, **options
):
    config = LoopConfig(log_every, save_every, calls)
    training = Training(fresh(), data, jax.random.key(1), run)
    options = {"progress": False, "steps": steps, "config": config} | options
    [result] = train(update, [training], **options)
    return result


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_resumed_run_equals_unbroken_run(tmp_path, data, steps_per_call):
    whole, parts = open_run(tmp_path / "a", "base"), open_run(tmp_path / "b", "base")
    options = {"calls": steps_per_call}
    expected, _ = go(whole, data, **options)
    go(parts, data, steps=2, **options)
    state, summary = go(parts, data, **options)
    assert summary["resumed_at"] == 2 and summary["steps"] == 2
    assert int(state.step) == 4
    assert_same(state, expected)

    def lines(run):
        return [(line["step"], line["loss/base"]) for line in metrics.read(run)]

    assert lines(parts) == lines(whole)
    assert [step for step, _ in lines(whole)] == [1, 2, 3, 4]


@pytest.mark.parametrize("years", [1, 40])
def test_a_clock_that_goes_back_does_no_harm(tmp_path, data, monkeypatch, years):
    """TensorBoard reads files in the order of their names; saves go by their steps."""
    run = open_run(tmp_path, "base")
    go(run, data, steps=2)
    first = {path.name for path in run.events.iterdir()}
    now, back = time.time_ns(), years * 365 * 24 * 3600
    monkeypatch.setattr(time, "time_ns", lambda: now - back * 10**9)
    monkeypatch.setattr(time, "time", lambda: now / 1e9 - back)
    state, summary = go(run, data)
    assert summary["resumed_at"] == 2
    assert_same(state, go(None, data)[0])
    *older, newest = sorted(path.name for path in run.events.iterdir())
    assert set(older) == first
    assert [line["step"] for line in metrics.read(run)] == [1, 2, 3, 4]
    # A third one sorts behind both, whatever its clock says.
    metrics.Writer(run, 4).close()
    assert sorted(path.name for path in run.events.iterdir())[:-1] == [*older, newest]


def test_saving_and_logging_change_nothing(tmp_path, data):
    state, _ = go(open_run(tmp_path, "base"), data)
    rare, summary = go(None, data, log_every=100, save_every=100)
    assert_same(state, rare)
    assert summary["steps"] == 4 and summary["steps_per_s"] > 0
    assert 0 < summary["compile_seconds"] <= summary["first_step_seconds"]


def test_callers_state_survives_donation(data):
    start = fresh()
    training = Training(start, data, jax.random.key(0))
    train(update, [training], steps=2, config=LoopConfig(1, 1), progress=False)
    np.testing.assert_array_equal(start.params["layer"]["kernel"], np.ones((4, 4)))


def test_finished_run_is_left_as_it_is(tmp_path, data):
    run = open_run(tmp_path, "base")
    expected, _ = go(run, data)
    state, summary = go(run, data)
    assert summary["steps"] == 0 and summary["resumed_at"] == 4
    assert_same(state, expected)
    assert run.result() is None
    run.finish({"loss": 1.0})
    assert run.result() == {"loss": 1.0}


def test_metrics_after_the_restored_step_are_dropped(tmp_path, data):
    run = open_run(tmp_path, "base")
    go(run, data, steps=2)
    with open(run.metrics, "a") as file:
        file.write('{"step": 3, "loss/base": 7.0}\n{"step": 4, "lo')
    go(run, data)
    lines = metrics.read(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["loss/base"] != 7.0
    assert [e.step for e in events(run) if e.HasField("summary")] == [1, 2, 3, 4]


def events(run):
    """TensorBoard's records: length, its checksum, the event, its checksum."""
    found = []
    for file in sorted(run.events.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_not_finite_loss_stops_and_keeps_the_last_good_save(tmp_path, data):
    run = open_run(tmp_path, "base")
    with pytest.raises(
        TrainingError,
        match="loss/base is not finite between steps 4 and 6; last good save: step 4",
    ):
        go(run, data, fails_at(5), steps=8, log_every=2, save_every=4)
    expected, _ = go(None, data, steps=4)
    with closing(Checkpoints(run.checkpoints)) as saves:
        assert saves.last == 4
        assert_same(saves.restore(fresh()), expected)


def test_not_finite_state_is_never_saved(tmp_path, data):
    def failing(state, data, key):
        new, scalars = update(state, data, key)
        poisoned = jax.tree.map(lambda x: x / (3 - new.step), new.params)
        return new._replace(params=poisoned), {"loss/base": jnp.zeros(())}

    run = open_run(tmp_path, "base")
    with pytest.raises(TrainingError, match="state is not finite at step 3; .* step 2"):
        go(run, data, failing, steps=8, log_every=8)
    with closing(Checkpoints(run.checkpoints)) as saves:
        assert saves.last == 2


def test_another_config_is_refused_naming_the_fields(tmp_path):
    open_run(tmp_path, "base", CONFIG)
    assert open_run(tmp_path, "base", CONFIG).config == CONFIG
    other = {"batch_size": 16, "network": {"depth": 2, "width": 3}}
    with pytest.raises(InputError) as caught:
        open_run(tmp_path, "base", other)
    message = str(caught.value)
    assert "config.batch_size: got 16, the run has 8" in message
    assert "config.network.width: got 3, the run has (absent)" in message
    assert "depth" not in message and "\n" not in message
    with pytest.raises(InputError, match='stage: got "skill", the run has "base"'):
        open_run(tmp_path, "skill", CONFIG)
    assert read_json(tmp_path / "config.json")["config"] == CONFIG


def test_run_folder_records_versions(tmp_path):
    open_run(tmp_path, "base", {"widths": (1, 2)})
    found = read_json(tmp_path / "versions.json")
    assert found["jax"] == jax.__version__ and found["cores"] >= 1
    safe = importlib.util.find_spec("pybullet") is not None
    assert ("pybullet" in found) == ("bullet-safety-gym" in found) == safe
    open_run(tmp_path, "base", {"widths": [1, 2]})


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex but no config\.json"):
        open_run(tmp_path, "base")
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(InputError, match=r"config\.json is not a JSON file"):
        open_run(tmp_path, "base")


def test_workdir_in_use_is_refused(tmp_path, data):
    run = open_run(tmp_path, "base")
    with run.locked(), pytest.raises(InputError, match="in use by another process"):
        go(run, data)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_saves_and_stops(tmp_path, data, signum, request):
    run = open_run(tmp_path, "base")
    if signum == signal.SIGHUP:  # ignored where the tests run under nohup
        request.addfinalizer(
            functools.partial(signal.signal, signum, signal.getsignal(signum))
        )
        signal.signal(signum, signal.SIG_DFL)
    before = signal.getsignal(signum)

    def stop(step, states):
        if step == 3:
            os.kill(os.getpid(), signum)

    with pytest.raises(
        Stopped, match=f"{signal.Signals(signum).name} at step 3"
    ) as caught:
        go(run, data, steps=1000, log_every=100, save_every=3, on_save=stop)
    assert caught.value.signum == signum
    assert signal.getsignal(signum) is before
    expected, _ = go(None, data, steps=5)
    state, summary = go(run, data, steps=5)
    assert summary["resumed_at"] == 3
    assert_same(state, expected)


def test_signal_during_the_last_save_is_not_lost(tmp_path, data):
    def stop(step, states):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="at step 4; last good save: step 4"):
        go(open_run(tmp_path, "base"), data, save_every=4, on_save=stop)


def test_stop_between_saves_saves(tmp_path, data):
    run = open_run(tmp_path, "base")
    calls = []

    def stopping(state, data, key):
        def host(step):
            calls.append(int(step))
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        jax.debug.callback(host, state.step)
        return update(state, data, key)

    with pytest.raises(Stopped) as caught:
        go(run, data, stopping, steps=10**6, log_every=10**6, save_every=10**6)
    with closing(Checkpoints(run.checkpoints)) as saves:
        assert saves.last is not None and saves.last >= 1
        assert f"last good save: step {saves.last};" in str(caught.value)


def test_failed_save_keeps_the_last_good_one(tmp_path, data, monkeypatch):
    run = open_run(tmp_path, "base")
    go(run, data, steps=2)
    import orbax.checkpoint as ocp

    def full(self):
        raise ValueError(
            "RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"
        )

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "check_for_errors", full)
        with pytest.raises(
            InputError,
            match="cannot save step 3 .*: No space left on device; "
            "last good save: step 2",
        ):
            go(run, data)
    expected, _ = go(None, data)
    assert_same(go(run, data)[0], expected)


def test_full_disk_is_told_before_a_save_is_begun(tmp_path, data, monkeypatch):
    run = open_run(tmp_path, "base")
    go(run, data, steps=2)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"step 3 .*No space left .* step 2$"):
        go(run, data)


def test_unreadable_save_is_refused_by_name(tmp_path, data):
    run = open_run(tmp_path, "base")
    go(run, data)
    (run.checkpoints / "4" / "default" / "sha256.json").unlink()
    (run.checkpoints / "4" / "default" / "_METADATA").write_text("{")
    with pytest.raises(InputError, match="cannot read the save .*/4: .* an older save"):
        go(run, data)
    shutil.rmtree(run.checkpoints / "4")
    assert go(run, data)[1]["resumed_at"] == 3


def test_save_of_another_state_is_refused(tmp_path):
    with closing(Checkpoints(tmp_path)) as saves:
        assert saves.last is None
        saves.save(1, fresh())
        saves.wait()
        other = fresh()._replace(params={"layer": {"kernel": jnp.ones((4, 5))}})
        with pytest.raises(InputError, match=r"holds another state: .*\[4, 5\]"):
            saves.restore(other)


def test_only_the_newest_saves_are_kept(tmp_path, data):
    run = open_run(tmp_path, "base")
    go(run, data)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["3", "4"]


def test_progress_names_loss_rate_and_time_left(data, capsys):
    go(None, data, progress=True, stage="skill")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("skill  step 1/4  loss/base ")
    assert lines[2].endswith("left") and "steps/s" in lines[2]


def test_resume_is_announced(tmp_path, data, capsys):
    run = open_run(tmp_path, "base")
    go(run, data, steps=2)
    go(run, data, progress=True)
    assert "base  resumed at step 2" in capsys.readouterr().err


def test_steps_compile_once(data):
    chex.clear_trace_counter()
    once = chex.assert_max_traces(update, n=2)  # for the metrics' names, and to compile
    go(None, data, once, steps=20, log_every=7, save_every=5, calls=4)


def test_no_steps_are_refused(data):
    with pytest.raises(InputError, match="steps: got 0"):
        go(None, data, steps=0)


def test_a_loop_of_no_length_is_refused():
    for field in ("log_every", "save_every"):
        with pytest.raises(InputError, match=f"^{field}: got 0, expected 1 or more"):
            LoopConfig(**{field: 0})
    with pytest.raises(InputError, match="^steps_per_call: got -1, expected 0 or more"):
        LoopConfig(steps_per_call=-1)


def test_the_backend_chooses_the_length_of_a_loop(data, monkeypatch):
    """A loop of any length gives the states, metrics and saves of single steps."""
    counts = []

    def counting(*args, **options):
        call, zeros = compiled(*args, **options)
        return lambda *inputs: counts.append(inputs[-1]) or call(*inputs), zeros

    compiled = loop._compile
    monkeypatch.setattr(loop, "_compile", counting)
    single, _ = go(None, data, steps=10, log_every=4, save_every=7, calls=0)
    assert counts == [1] * 10  # on a CPU
    counts.clear()
    monkeypatch.setitem(platform.PLATFORMS, "cpu", platform.Platform(steps_per_call=3))
    looped, _ = go(None, data, steps=10, log_every=4, save_every=7, calls=0)
    assert counts == [3, 1, 3, 1, 2]
    assert_same(looped, single)


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_memory_of_a_step_is_kept_for_the_next():
    """The large buffers of a step come back without a page fault."""
    code = """if True:
        import resource
        import jax, jax.numpy as jnp
        from psec_jax.runtime import platform

        platform.keep_memory()
        step = jax.jit(lambda x: jnp.sum(jnp.sort(jnp.sin(x))))
        x = jnp.ones((500_000, 16))
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step(x).block_until_ready()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    first, *_, last = map(int, done.stdout.split())
    assert last < 100 < first


def test_compiled_programs_are_kept_for_later_runs(tmp_path, monkeypatch):
    options = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in options}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        platform.keep_programs()
        assert before == {name: getattr(jax.config, name) for name in options}
        jax.config.update("jax_compilation_cache_dir", None)
        platform.keep_programs()
        default = str(tmp_path / "psec_jax" / "compiled")
        assert jax.config.jax_compilation_cache_dir == default
        platform.keep_programs(tmp_path / "named")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
