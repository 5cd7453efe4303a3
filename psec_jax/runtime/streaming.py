"""Data larger than a device's memory: in a file, of which every step gets its batch."""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from psec_jax.errors import InputError, lookup
from psec_jax.files import reported
from psec_jax.runtime import sharding

# Drawn ahead: enough to hide the reading of a batch behind the steps before it.
_AHEAD = 4
_THREADS = 2
# Steps whose rows are computed in one call.
_BLOCK = 64
_CHUNK = 1 << 16
# Of a device's memory, what data may take beside networks and their states.
_SHARE = 0.5


class Stream(NamedTuple):
    """Rows in a file, and what a training needs to draw batches from them.

    Attributes:
      table: [N, W] float32, all columns side by side: one place in the file per row.
      shapes: of one row's entry in each column, by name, in the table's order.
      index: (key) -> Int[B], the rows of a step with this key; pure.
      rest: what is not rows.
      fill: (rest, {name: [B, ...]}) -> the data that the update reads; pure.
    """

    table: np.ndarray
    shapes: Mapping[str, tuple[int, ...]]
    index: Callable[[jax.Array], jax.Array]
    rest: Any
    fill: Callable[[Any, Mapping[str, jax.Array]], Any]

    def data(self, rest: Any, batch: jax.Array) -> Any:
        """The data of one step, from rows [B, W] of the table."""
        columns, first = {}, 0
        for name, shape in self.shapes.items():
            last = first + int(np.prod(shape))
            columns[name] = batch[:, first:last].reshape(-1, *shape)
            first = last
        return self.fill(rest, columns)


def write_table(rows: Mapping[str, np.ndarray | jax.Array], path: Path) -> np.ndarray:
    """Columns [N, ...] side by side in a file, as a memory map [N, W].

    Raises:
      InputError: the file cannot be written.
    """
    count = len(next(iter(rows.values())))
    widths = [int(np.prod(np.shape(column)[1:])) for column in rows.values()]
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
                    for column in rows.values()
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
    asked = {"yes": True, "no": False, "auto": None}
    answer = lookup(asked, choice, "stream")
    if answer is None:
        answer = _is_large(size)
    if answer and importlib.util.find_spec("grain") is None:
        raise InputError(
            f"stream: {size} bytes of data are to be read from a file, which takes "
            "grain; pip install grain, or the extra 'stream' of psec_jax"
        )
    return answer


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
    # A CPU's devices have the host's memory and do not tell of it.
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    return size > _SHARE * memory


def batches(
    streams: Sequence[Stream],
    keys: Sequence[jax.Array],
    layout: sharding.Layout,
    first: int,
    goal: int,
) -> Generator[jax.Array, None, None]:
    """The rows of steps `first` to `goal`, read ahead by grain.

    The rows are those that the update would draw from data on the device: of step s
    those of `index(fold_in(key, s))`.

    Args:
      streams: of R members.
      keys: of the members' whole runs.
      layout: where members and rows of a batch lie.
      first: the step to begin with.
      goal: the step after the last.

    Yields:
      [R, B, W] of each step; of one member [B, W].

    Raises:
      InputError: a mesh that does not divide a batch.
    """
    import grain  # takes seconds, and few runs need it

    if layout.mesh is not None:
        size = jax.eval_shape(streams[0].index, keys[0]).shape[0]
        sharding.check_batch(layout.mesh.shape["data"], size)
    source = _Source(streams, keys, layout, goal)
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
        streams: Sequence[Stream],
        keys: Sequence[jax.Array],
        layout: sharding.Layout,
        goal: int,
    ) -> None:
        self._streams, self._layout, self._goal = streams, layout, goal
        # Beside the training, not in its queue; integers are the same on all devices.
        self._host = jax.local_devices(backend="cpu")[0]
        self._keys = [jax.device_put(_local(key), self._host) for key in keys]
        self._programs = [_index_of_block(stream.index) for stream in streams]
        self._lock = threading.Lock()
        self._block = functools.lru_cache(_AHEAD)(self._computed)

    def __len__(self) -> int:
        return self._goal

    def __getitem__(self, step: int) -> jax.Array:
        with self._lock:
            index = self._block(step // _BLOCK)[:, step % _BLOCK]
        width = self._streams[0].table.shape[1]
        shape = (*index.shape, width)

        def part(where: tuple[slice, ...]) -> np.ndarray:
            """The members and rows that one device asks for, and no others."""
            members = range(len(index))[where[0]]
            return np.stack(
                [self._streams[r].table[index[r][where[1]]] for r in members]
            )

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
        steps = first + jax.numpy.arange(_BLOCK, dtype=jax.numpy.int32)
        return jax.vmap(lambda step: index(jax.random.fold_in(key, step)))(steps)

    return jax.jit(rows)
