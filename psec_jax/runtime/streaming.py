"""Data larger than a device's memory: rows in a file, read a batch at a time."""

import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.errors import InputError, lookup
from psec_jax.files import reported
from psec_jax.runtime import sharding
from psec_jax.runtime.batches import Data, Drawn

# Drawn ahead: enough to hide the reading of a batch behind the steps before it.
_AHEAD = 4
_THREADS = 2
# Steps whose rows are computed in one call.
_BLOCK = 64
_CHUNK = 1 << 16
# Of a device's memory, what data may take beside networks and their states.
_SHARE = 0.5


class Stream(NamedTuple):
    """The data of one training with its rows in a file.

    Attributes:
      table: [N, W] float32, all columns side by side: one place in the file per row.
      shapes: the pytree of the rows, each leaf the `jax.ShapeDtypeStruct` of one row's
        entry; in the order of the table.
      frozen: as of `Data`.
    """

    table: np.ndarray
    shapes: Any
    frozen: Any = None

    def batch(self, rows: jax.Array) -> Any:
        """The batch of rows [B, W] of the table: the pytree with leaves [B, ...]."""
        leaves, structure = jax.tree.flatten(self.shapes)
        widths = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
        columns = jnp.split(rows, widths[:-1], axis=1)
        return structure.unflatten(
            column.reshape(-1, *leaf.shape)
            for column, leaf in zip(columns, leaves, strict=True)
        )


def make_stream(data: Data, path: Path) -> Stream:
    """The data with its rows written to a file.

    Raises:
      InputError: the file cannot be written.
    """
    shapes = jax.tree.map(
        lambda column: jax.ShapeDtypeStruct(column.shape[1:], jnp.float32), data.rows
    )
    return Stream(write_table(jax.tree.leaves(data.rows), path), shapes, data.frozen)


def make_streams(datas: Sequence[Data], folder: Path) -> list[Stream]:
    """The data of several trainings in files of a folder; shared rows in one file."""
    made: dict[tuple[int, ...], Stream] = {}
    streams = []
    for data in datas:
        same = tuple(id(column) for column in jax.tree.leaves(data.rows))
        if same not in made:
            made[same] = make_stream(data, folder / f"{len(made)}.npy")
        streams.append(made[same]._replace(frozen=data.frozen))
    return streams


def write_table(columns: Sequence[Any], path: Path) -> np.ndarray:
    """Columns [N, ...] side by side in a file, as a memory map [N, W].

    Raises:
      InputError: the file cannot be written.
    """
    count = len(columns[0])
    widths = [math.prod(np.shape(column)[1:]) for column in columns]
    shape = (count, sum(widths))
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with reported(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not through a memory map: there a full disk ends the process.
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, _CHUNK):
                part = slice(start, min(start + _CHUNK, count))
                parts = [
                    np.asarray(column[part], "<f4").reshape(part.stop - start, -1)
                    for column in columns
                ]
                file.write(np.concatenate(parts, axis=1).data)
        return np.load(path, mmap_mode="r")


def wanted(choice: str, size: int) -> bool:
    """Whether data of this many bytes are streamed.

    Args:
      choice: "yes", "no", or "auto": where they would fill half of a device's memory.
      size: bytes.

    Raises:
      InputError: another choice, or grain, which reads them, is not installed.
    """
    choices = {"yes": True, "no": False, "auto": None}
    stream = lookup(choices, choice, "stream")
    if stream is None:
        stream = _is_large(size)
    if stream and importlib.util.find_spec("grain") is None:
        raise InputError(
            f"stream: {size} bytes of data are to be read from a file, which takes "
            "grain; pip install grain, or the extra 'stream' of psec_jax"
        )
    return stream


def check_calls(steps_per_call: int) -> None:
    """Refuse several steps in one call, which leave no time to read a batch for each.

    Raises:
      InputError: more than one.
    """
    if steps_per_call > 1:
        raise InputError(
            f"steps_per_call: got {steps_per_call}, expected 1 where data are streamed"
        )


def _is_large(size: int) -> bool:
    stats = jax.local_devices()[0].memory_stats() or {}
    # A CPU's devices use the host's memory and do not report it.
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    return size > _SHARE * memory


def batches(
    update: Drawn,
    streams: Sequence[Stream],
    keys: Sequence[jax.Array],
    layout: sharding.Layout,
    first: int,
    goal: int,
) -> Generator[jax.Array, None, None]:
    """The rows of steps `first` to `goal`, read ahead by grain.

    The rows are those that the update would draw from data on the device: in step s
    those of `update.index(fold_in(key, s), N)`.

    Args:
      update: says how a batch is drawn.
      streams: of R trainings.
      keys: of the whole trainings.
      layout: where trainings and rows of a batch are placed.
      first: the step to begin with.
      goal: the step after the last.

    Yields:
      [R, B, W] of each step; of one training [B, W].

    Raises:
      InputError: a mesh that does not divide a batch.
    """
    import grain  # takes seconds, and few runs need it

    if layout.mesh is not None:
        sharding.check_batch(layout.mesh.shape["data"], update.batch_size)
    source = _Source(update, streams, keys, layout, goal)
    ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    steps = grain.MapDataset.source(source).slice(slice(first, goal))
    iterator = iter(steps.to_iter_dataset(ahead))
    try:
        yield from iterator
    finally:
        iterator.close()


class _Source:
    """Batches by the number of their step, as grain reads them in its threads."""

    def __init__(
        self,
        update: Drawn,
        streams: Sequence[Stream],
        keys: Sequence[jax.Array],
        layout: sharding.Layout,
        goal: int,
    ) -> None:
        self._streams, self._layout, self._goal = streams, layout, goal
        # Beside the training, not in its queue; integers are the same on all devices.
        self._host = jax.local_devices(backend="cpu")[0]
        self._keys = [jax.device_put(_local(key), self._host) for key in keys]
        self._programs = [
            _index_of_block(functools.partial(update.index, count=len(stream.table)))
            for stream in streams
        ]
        self._lock = threading.Lock()
        self._block = functools.lru_cache(_AHEAD)(self._computed)

    def __len__(self) -> int:
        return self._goal

    def __getitem__(self, index: int) -> jax.Array:
        with self._lock:
            drawn = self._block(index // _BLOCK)[:, index % _BLOCK]
        width = self._streams[0].table.shape[1]
        shape = (*drawn.shape, width)

        def part(where: tuple[slice, ...]) -> np.ndarray:
            """The trainings and rows that one device needs, and no others."""
            runs = range(len(drawn))[where[0]]
            return np.stack([self._streams[r].table[drawn[r][where[1]]] for r in runs])

        return self._layout.put_batch(shape, part)

    def _computed(self, block: int) -> np.ndarray:
        """[R, _BLOCK, B] rows of the steps of a block."""
        with jax.default_device(self._host):
            return np.stack(
                [
                    np.asarray(program(key, block * _BLOCK))
                    for program, key in zip(self._programs, self._keys, strict=True)
                ]
            )


def _local(key: jax.Array) -> jax.Array:
    return key if key.is_fully_addressable else sharding.local(key)


def _index_of_block(
    index: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, int], jax.Array]:
    """(key, first step) -> [_BLOCK, B], compiled once for all blocks."""

    def rows(key: jax.Array, first: jax.Array) -> jax.Array:
        steps = first + jnp.arange(_BLOCK, dtype=jnp.int32)
        return jax.vmap(lambda step: index(jax.random.fold_in(key, step)))(steps)

    return jax.jit(rows)
