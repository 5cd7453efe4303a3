"""Choices that depend on the backend alone: they change speed, never the maths."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Platform:
    """How programs are laid out on one kind of backend.

    Attributes:
      transpose_from: examples of a batch from which the weight gradient of a layer that
        narrows is computed transposed; None never does.
      unroll_skills: skills of one program come one after the other in it; False makes
        them one batched product.
    """

    transpose_from: int | None = None
    unroll_skills: bool = True

    def transposes(self, batch_size: int) -> bool:
        """Whether weight gradients are computed transposed at this batch size."""
        return self.transpose_from is not None and batch_size >= self.transpose_from


# A CPU's product is slow where the wide operand is the transposed one, and runs the
# products of two skills side by side but not the halves of a batched one. The defaults
# serve the backends on which neither choice was measured.
PLATFORMS = {"cpu": Platform(transpose_from=1024, unroll_skills=True)}


def current() -> Platform:
    """The choices for the backend that programs run on."""
    return PLATFORMS.get(jax.default_backend(), Platform())
