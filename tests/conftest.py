"""The environment of the tests, set before JAX or a simulator is imported."""

import atexit
import ctypes.util
import os
import shutil
import tempfile

# Sharding is tested on eight devices made of one CPU. XLA sizes the thread pool that
# they share by NPROC, by default the number of cores; with fewer threads than devices
# a collective waits for ever.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"
# Compilation is most of the tests' time: without optimisation it takes a third less.
# XLA_FLAGS=--xla_backend_optimization_level=3 runs them on optimised programs.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8 "
    + os.environ.get("XLA_FLAGS", "")
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
