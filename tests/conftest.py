"""The environment of the tests, set before JAX or a simulator is imported."""

import ctypes.util
import os

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

# Without a choice dm_control takes the first backend that imports, which is not
# always one that can draw without a screen.
if "MUJOCO_GL" not in os.environ:
    for backend, library in {"egl": "EGL", "osmesa": "OSMesa"}.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            break
