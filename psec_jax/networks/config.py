"""What every network of `denoiser.NETWORKS` has in common: its config and its call."""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float, Key

from psec_jax.errors import InputError, lookup
from psec_jax.networks.layers import ACTIVATIONS

Denoise = Callable[[Array, Array, Array], Array]  # (obs [S], a_t [A], t []) -> [A]

COMPATS = ("paper", "released")


@dataclass(frozen=True)
class NetworkConfig:
    """Kind, sizes and forms of the denoiser.

    Attributes:
      kind: a key of `denoiser.NETWORKS`.
      width: of the residual stream.
      blocks: residual blocks.
      expansion: width of a block's hidden layer over `width`.
      heads: of attention; of the transformer.
      time_features: learned Fourier features of the time, half of them cosines and
        half sines.
      time_width: of the layer on top of them (two of this width in the mlp).
      activation: a key of `ACTIVATIONS`.
      compat: "paper", or "released": the authors' code, which applies swish over the
        frozen mish-trained weights as soon as skills are present; of the mlp.
      matmul_dtype: dtype of the dense layers' products; parameters and sums stay
        float32.
    """

    kind: str = "mlp"
    width: int = 256
    blocks: int = 3
    expansion: int = 4
    heads: int = 4
    time_features: int = 64
    time_width: int = 128
    activation: str = "mish"
    compat: str = "paper"
    matmul_dtype: str = "float32"

    def __post_init__(self) -> None:
        # The table imports the networks, and these import this module.
        from psec_jax.networks.denoiser import NETWORKS

        lookup(NETWORKS, self.kind, "kind")
        lookup(ACTIVATIONS, self.activation, "activation")
        if self.compat not in COMPATS:
            raise InputError(f"compat: got {self.compat!r}, expected one of {COMPATS}")
        if self.compat == "released" and self.kind != "mlp":
            raise InputError(
                f"compat: got 'released' for a {self.kind}, the authors' code has the "
                "mlp alone"
            )
        if self.matmul_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"matmul_dtype: got {self.matmul_dtype!r}, expected float32 or bfloat16"
            )
        for field in (
            *("width", "blocks", "expansion", "heads", "time_features", "time_width"),
        ):
            if getattr(self, field) < 1:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 1 or more"
                )
        if self.time_features % 2:
            raise InputError(
                f"time_features: got {self.time_features}, expected an even number"
            )
        if self.kind == "transformer" and self.width % self.heads:
            raise InputError(
                f"heads: got {self.heads}, expected a divisor of the width {self.width}"
            )


class Denoiser(nn.Module):
    """A network that predicts noise or velocity; its dense layers are `AdaptedDense`.

    Attributes:
      config: sizes and forms.
      action_dim: numbers in and out, H * A of a chunk of H actions.
      horizon: H.
      merged: see `AdaptedDense`.
      dropout: rate at the input of each block, where a key is given.
    """

    config: NetworkConfig
    action_dim: int
    horizon: int = 1
    merged: bool = False
    dropout: float = 0.0

    def __call__(
        self,
        obs: Float[Array, "*b s"],
        a_t: Float[Array, "*b a"],
        t: Float[Array, "*b"],
        alpha: Float[Array, "*b k"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*b a"]:
        """The prediction.

        Args:
          obs: normalised observation.
          a_t: noised action, or chunk of H actions one after the other.
          t: time of the process as a float, not scaled.
          alpha: weight of each skill; given exactly when skills are.
          dropout_key: for one example in training; None leaves dropout out.
        """
        raise NotImplementedError
