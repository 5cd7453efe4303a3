"""The environment of the tests, set before JAX or a simulator is imported."""

import atexit
import contextlib
import ctypes.util
import functools
import os
import shutil
import tempfile

import pytest

# Sharding is tested on eight devices made of one CPU. XLA sizes the thread pool that
# they share by NPROC, by default the number of cores; with fewer threads than devices
# a collective waits for ever.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"
# Compilation is most of the tests' time: without optimisation, and with XLA's older
# emitters of loops, it takes a third of it.
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" runs
# them on the programs that a user runs.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
).strip()

# Processes, and commands that tests start, compile the same programs: the first one to
# need a program compiles it for all. Workers have the controller's folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="psec_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

# Without a choice dm_control takes the first backend that imports, which is not
# always one that can draw without a screen.
if "MUJOCO_GL" not in os.environ:
    for backend, library in {"egl": "EGL", "osmesa": "OSMesa"}.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            break


@pytest.fixture(scope="module")
def environments():
    """Environments by name, made once: starting a simulator takes seconds."""
    from psec_jax.envs.vector import VectorEnv

    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda spec: stack.enter_context(VectorEnv(spec, 1)))


@pytest.fixture
def quick_starts(environments, monkeypatch):
    """Evaluations use `environments` instead of starting their own."""
    from experiments import grid
    from psec_jax.evaluation import evaluate
    from psec_jax.workflows import multirun

    def quick(act, env, episodes, seed):
        return evaluate(act, env, episodes, seed, vector_env=environments(env))

    monkeypatch.setattr(multirun, "evaluate", quick)
    monkeypatch.setattr(grid, "evaluate", quick)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A library that is made once and copied for each test."""
    from fuzz import _make_library

    folder = tmp_path_factory.mktemp("made")
    _make_library(folder / "lib")
    return folder / "lib"
