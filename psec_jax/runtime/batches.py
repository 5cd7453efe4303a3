"""What a training reads, and the one rule by which a step draws its batch from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from psec_jax.errors import InputError
from psec_jax.runtime import sharding

Metrics = dict[str, jax.Array]


class Data(NamedTuple):
    """The data of one training.

    Attributes:
      rows: pytree with leaves [N, ...]: a row is a transition.
      frozen: what the update reads and never changes, such as the base of a skill.
      count: rows to draw from, the others being padding; None is all N.
    """

    rows: Any
    frozen: Any = None
    count: Int[Array, ""] | None = None


@dataclass(frozen=True)
class Drawn:
    """An agent's update on batches drawn from `Data`: (state, data, key) -> (state,
    metrics).

    The key of a step is split into one for the rows, which are drawn uniformly with
    replacement, and one for the update.

    Attributes:
      update: (config, state, batch, frozen, key) -> (state, metrics), pure.
      config: the agent's, frozen.
      batch_size: B.
    """

    update: Callable[[Any, Any, Any, Any, Array], tuple[Any, Metrics]]
    config: Any
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size: got {self.batch_size}, expected 1 or more")

    def __call__(
        self, state: Any, data: Data, key: Key[Array, ""]
    ) -> tuple[Any, Metrics]:
        """One step on a batch of its own."""
        index = self.index(key, len_of(data) if data.count is None else data.count)
        batch = jax.tree.map(lambda column: column[index], data.rows)
        return self.on_batch(state, batch, data.frozen, key)

    def index(
        self, key: Key[Array, ""], count: int | Int[Array, ""]
    ) -> Int[Array, " B"]:
        """The rows that the step with this key draws from the first `count`."""
        batch_key, _ = jax.random.split(key)
        return jax.random.randint(batch_key, (self.batch_size,), 0, count)

    def on_batch(
        self, state: Any, batch: Any, frozen: Any, key: Key[Array, ""]
    ) -> tuple[Any, Metrics]:
        """The step with this key, where its batch was drawn before."""
        _, update_key = jax.random.split(key)
        batch = sharding.rows(batch)
        return self.update(self.config, state, batch, frozen, update_key)


def len_of(data: Data) -> int:
    """N."""
    return jax.tree.leaves(data.rows)[0].shape[0]


def size_of(datas: Sequence[Data]) -> int:
    """Bytes of the rows of several trainings; what they share counts once."""
    columns = [leaf for data in datas for leaf in jax.tree.leaves(data.rows)]
    return sum({id(column): column.nbytes for column in columns}.values())


def shared(data: Data, first: Data) -> Data:
    """The same data, with the arrays of `first` in place of those that equal them.

    Arrays that are one object in several trainings are on the device once.
    """

    def one(mine: Any, other: Any) -> Any:
        arrays = np if isinstance(mine, np.ndarray) else jnp
        equal = mine.shape == other.shape and bool(arrays.array_equal(mine, other))
        return other if equal else mine

    if jax.tree.structure(data) != jax.tree.structure(first):
        return data
    return jax.tree.map(one, data, first)


def of_one_length(datas: Sequence[Data]) -> list[Data]:
    """The data of several trainings, padded with rows of zeros that are never drawn."""
    lengths = [len_of(data) for data in datas]
    if len(set(lengths)) == 1:
        return list(datas)
    return [pad(data, max(lengths)) for data in datas]


def pad(data: Data, length: int) -> Data:
    """The same data with rows of zeros behind, which are never drawn."""

    def padded(column: Any) -> np.ndarray:
        extra = [(0, length - len(column))] + [(0, 0)] * (column.ndim - 1)
        return np.pad(column, extra)

    count = jnp.asarray(len_of(data), jnp.int32)
    return data._replace(rows=jax.tree.map(padded, data.rows), count=count)
