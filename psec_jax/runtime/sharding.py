"""Device meshes: the members of a program on one axis, rows of a batch on the other.

Parameters are replicated over the data axis. The dataset lies on every device; each
takes its rows of a batch from its copy.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psec_jax.errors import InputError

AXES = ("seed", "data")
_FORM = "sizes such as seed:4,data:2"


def make_mesh(text: str | None, members: int = 1) -> Mesh | None:
    """The mesh that a text such as "seed:4,data:2" describes.

    Args:
      text: sizes of the axes; one that is not named has size 1. None is no mesh, or
        with several processes all their devices, the seed axis as long as it may be.
      members: runs that the seed axis is to divide.

    Raises:
      InputError: another form, sizes whose product is not the number of devices, or a
        seed axis that does not divide the members.
    """
    if text is None:
        if jax.process_count() == 1:
            return None
        runs = math.gcd(members, jax.device_count())
        text = f"seed:{runs},data:{jax.device_count() // runs}"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(seed|data):([1-9][0-9]{0,8})", part.strip(), re.ASCII)
        if match is None or match[1] in sizes:
            raise InputError(f"mesh: got {text!r}, expected {_FORM}")
        sizes[match[1]] = int(match[2])
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != jax.device_count():
        raise InputError(
            f"mesh: {text} takes {math.prod(shape)} devices, there are "
            f"{jax.device_count()}"
        )
    if members % shape[0]:
        raise InputError(
            f"mesh: {text} cannot divide {members} runs by {shape[0]}; seed has to "
            "divide their number"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """In the body, `rows` divides batches over this mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def rows(batch: Any) -> Any:
    """A batch, leaves [B, ...], divided over the data axis of the mesh in use, if any.

    Raises:
      InputError: the axis does not divide B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape.get("data", 1) if mesh is not None else 1
    if parts == 1:
        return batch
    check_batch(parts, len(jax.tree.leaves(batch)[0]))
    spec = PartitionSpec("data")
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), batch)


def check_batch(parts: int, size: int) -> None:
    """Refuse a batch that the data axis does not divide.

    Raises:
      InputError: that.
    """
    if size % parts:
        raise InputError(f"mesh: data:{parts} does not divide a batch of {size}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of R members lie.

    Attributes:
      mesh: None is the default device.
      count: R.
    """

    mesh: Mesh | None
    count: int

    @property
    def axis(self) -> str | None:
        """The axis of the mesh that divides the members.

        None where it does not divide R, for some members may be finished before
        others, or catch up alone: then each device holds all of them.
        """
        if self.mesh is None or self.count == 1 or self.count % self.mesh.shape["seed"]:
            return None
        return "seed"

    def put(self, tree: Any, divided: bool = True) -> Any:
        """The arrays on the devices: leaves [R, ...] divided, or whole on each."""
        if self.mesh is None:
            return jax.device_put(tree)
        sharding = self._sharding(divided)
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)

    def put_batch(
        self, shape: tuple[int, ...], part: Callable[[tuple[slice, ...]], np.ndarray]
    ) -> jax.Array:
        """A batch [R, B, ...], of which a device asks `part` for its members and rows.

        That of one member is [B, ...].
        """
        alone = self.count == 1

        def asked(where: Any) -> np.ndarray:
            return part((slice(None), *where))[0] if alone else part(where)

        shape = shape[1:] if alone else shape
        if self.mesh is None:
            return jax.device_put(asked((slice(None),) * len(shape)))
        spec = PartitionSpec("data") if alone else PartitionSpec(self.axis, "data")
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(shape, sharding, asked)

    def out(self, divided: bool | tuple[bool, ...]) -> dict[str, Any]:
        """Options of `jax.jit` that place outputs as `put` does."""
        if self.mesh is None:
            return {}
        return {"out_shardings": jax.tree.map(self._sharding, divided)}

    def _sharding(self, divided: bool) -> NamedSharding:
        assert self.mesh is not None
        spec = PartitionSpec(self.axis) if divided and self.axis else PartitionSpec()
        return NamedSharding(self.mesh, spec)


def local(tree: Any) -> Any:
    """Arrays that are whole on every device, as arrays of this process's first one."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Every process holds the same numbers, and puts its part of them on its devices.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])
