"""Choices that depend on the backend alone: they change speed, never the maths."""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from psec_jax.data.paths import cache_dir


@dataclass(frozen=True)
class Platform:
    """How programs are laid out on one kind of backend.

    Attributes:
      transpose_from: examples of a batch from which the weight gradient of a layer that
        narrows is computed transposed; None never does.
      unroll_skills: skills, or policies, of one program come one after the other in
        it; False makes them one batched product.
      merge_from: examples of a batch from which gates of the noise and action levels
        are trained with each skill merged into the base; None never does.
      overlap: in roll-outs half of the environments step while the policy acts for the
        others.
      steps_per_call: updates in one compiled loop, where a job leaves the choice open.
    """

    transpose_from: int | None = None
    merge_from: int | None = None
    unroll_skills: bool = False
    overlap: bool = True
    steps_per_call: int = 64

    def transposes(self, batch_size: int) -> bool:
        """Whether weight gradients are computed transposed at this batch size."""
        return self.transpose_from is not None and batch_size >= self.transpose_from

    def merges(self, batch_size: int) -> bool:
        """Whether skills alone are merged into the base at this batch size."""
        return self.merge_from is not None and batch_size >= self.merge_from


# A CPU's product is slow where the wide operand is the transposed one, and runs the
# products of two skills side by side but not the halves of a batched one. Low-rank
# products are slow for their size: in a large batch forming W0 + A B is less. It gains
# nothing sure from a compiled loop, which a stop waits for, and its cores have no time
# that an overlap would fill. Accelerators wait for the dispatch of every call.
PLATFORMS = {
    "cpu": Platform(
        transpose_from=1024,
        merge_from=256,
        unroll_skills=True,
        overlap=False,
        steps_per_call=1,
    )
}


def current() -> Platform:
    """The choices for the backend that programs run on."""
    return PLATFORMS.get(jax.default_backend(), Platform())


def keep_programs(folder: str | Path | None = None) -> None:
    """Keep compiled programs in a directory, where later runs find them.

    JAX names each by its code, its versions and the kind of device.

    Args:
      folder: None leaves the choice to JAX's own settings, such as the variable
        JAX_COMPILATION_CACHE_DIR, and is "compiled" in `cache_dir()` without one.
    """
    if folder is None:
        if jax.config.values["jax_compilation_cache_dir"] is not None:
            return
        folder = cache_dir() / "compiled"
        # Most programs of a stage compile in less than JAX's default of a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    path = Path(folder).expanduser().absolute()
    jax.config.update("jax_compilation_cache_dir", str(path))


# Options of glibc's mallopt: never trim, no mappings of their own for large buffers.
_MALLOC = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0)}


def keep_memory() -> None:
    """Keep the memory that a step on a CPU frees for the next one; Linux with glibc.

    By default its large buffers go back to the system after every step, which has to
    clear their pages again for the next. Only the main thread's memory can grow to any
    size, so that steps run in it; this comes before anything runs on a device.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in _MALLOC.values():
            mallopt(option, value)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
