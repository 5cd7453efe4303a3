"""A plain MLP, the body of gates and critics."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.lora import lecun_normal
from psec_jax.types import Params


class MLP(nn.Module):
    """Dense + relu for each width, then a linear layer "output"."""

    widths: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        for i, width in enumerate(self.widths):
            x = nn.relu(_dense(width, f"hidden_{i}")(x))
        return _dense(self.outputs, "output")(x)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=lecun_normal, name=name)


def init_net(net: nn.Module, key: Key[Array, ""], *shapes: tuple[int, ...]) -> Params:
    """Fresh parameters for inputs of these shapes; the network itself is not run."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return net.lazy_init(key, *inputs)["params"]


def apply(net: nn.Module, params: Params, *inputs: Any) -> Any:
    """The outputs alone: linen types them as if state could come with them."""
    return net.apply({"params": params}, *inputs)


def mlp_widths(shapes: Mapping[str, Sequence[int]], prefix: str) -> tuple[int, ...]:
    """Hidden widths of an MLP under a path, read off the shapes of its biases."""
    widths: tuple[int, ...] = ()
    while (name := f"{prefix}/hidden_{len(widths)}/bias") in shapes:
        widths += (shapes[name][-1] if shapes[name] else 0,)
    return widths


def mlp_shapes(
    widths: Sequence[int], inputs: int, outputs: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each of an MLP's parameters by its path."""
    names = [*(f"hidden_{i}" for i in range(len(widths))), "output"]
    sizes = [inputs, *widths, outputs]
    kernels = zip(names, sizes[:-1], sizes[1:], strict=True)
    return {
        f"{name}/{leaf}": shape
        for name, d, o in kernels
        for leaf, shape in (("kernel", (d, o)), ("bias", (o,)))
    }
