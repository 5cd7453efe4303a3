"""A plain MLP, the body of gates."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense + relu for each width, then a linear layer "output"."""

    widths: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(self.outputs, name="output")(x)
