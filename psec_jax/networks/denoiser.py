"""The one denoising network: a residual MLP, with or without skills."""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.errors import InputError, lookup
from psec_jax.networks.layers import (
    ACTIVATIONS,
    AdaptedDense,
    FourierFeatures,
    drop,
    dropout_bits,
)
from psec_jax.types import Params

Denoise = Callable[[Array, Array, Array], Array]  # (obs [S], a_t [A], t []) -> eps [A]

COMPATS = ("paper", "released")


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and forms of the denoiser.

    Attributes:
      width: of the residual stream.
      blocks: residual blocks.
      expansion: width of a block's hidden layer over `width`.
      time_features: learned Fourier features of the diffusion step, half of them
        cosines and half sines.
      time_width: of the two layers on top of them.
      dropout: rate at the input of each block, in training only.
      activation: a key of `ACTIVATIONS`.
      compat: "paper", or "released": the authors' code, which applies swish over the
        frozen mish-trained weights as soon as skills are present.
      matmul_dtype: dtype of the products; parameters and sums stay float32.
    """

    width: int = 256
    blocks: int = 3
    expansion: int = 4
    time_features: int = 64
    time_width: int = 128
    dropout: float = 0.1
    activation: str = "mish"
    compat: str = "paper"
    matmul_dtype: str = "float32"

    def __post_init__(self) -> None:
        lookup(ACTIVATIONS, self.activation, "network.activation")
        if self.compat not in COMPATS:
            raise InputError(
                f"network.compat: got {self.compat!r}, expected one of {COMPATS}"
            )
        if self.matmul_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"network.matmul_dtype: got {self.matmul_dtype!r}, "
                "expected float32 or bfloat16"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"network.dropout: got {self.dropout}, expected 0 <= rate < 1"
            )
        for field in ("width", "blocks", "expansion", "time_features", "time_width"):
            if getattr(self, field) < 1:
                raise InputError(
                    f"network.{field}: got {getattr(self, field)}, expected 1 or more"
                )
        if self.time_features % 2:
            raise InputError(
                f"network.time_features: got {self.time_features}, "
                "expected an even number"
            )


class Block(nn.Module):
    """h + W2 f(W1 LayerNorm(dropout(h)))."""

    config: NetworkConfig
    merged: bool = False

    @nn.compact
    def __call__(self, h, alpha, activation, bits):
        config = self.config
        x = h if bits is None else drop(h, bits, config.dropout)
        x = nn.LayerNorm(epsilon=1e-6, use_fast_variance=True, name="norm")(x)
        forms = config.matmul_dtype, self.merged
        up = AdaptedDense(config.width * config.expansion, *forms, name="up")
        down = AdaptedDense(config.width, *forms, name="down")
        return h + down(activation(up(x, alpha)), alpha)


class Denoiser(nn.Module):
    """eps(s, a_t, t): time features, input layer, residual blocks, output layer.

    Attributes:
      config: sizes and forms.
      action_dim: A.
      merged: see `AdaptedDense`.
    """

    config: NetworkConfig
    action_dim: int
    merged: bool = False

    @nn.compact
    def __call__(
        self,
        obs: Float[Array, "*b s"],
        a_t: Float[Array, "*b a"],
        t: Float[Array, "*b"],
        alpha: Float[Array, "*b k"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*b a"]:
        """The predicted noise.

        Args:
          obs: normalised observation.
          a_t: noised action.
          t: diffusion step 0..T-1 as a float, not scaled.
          alpha: weight of each skill; given exactly when skills are.
          dropout_key: for one example in training; None leaves dropout out.
        """
        config = self.config
        released_skills = config.compat == "released" and alpha is not None
        activation = ACTIVATIONS["swish" if released_skills else config.activation]

        def dense(features: int, name: str) -> AdaptedDense:
            return AdaptedDense(features, config.matmul_dtype, self.merged, name=name)

        time = FourierFeatures(config.time_features, name="fourier")(t[..., None])
        time = activation(dense(config.time_width, "time_0")(time, alpha))
        time = dense(config.time_width, "time_1")(time, alpha)
        h = dense(config.width, "input")(
            jnp.concatenate([a_t, obs, time], axis=-1), alpha
        )
        bits = [None] * config.blocks
        if dropout_key is not None and config.dropout > 0:
            bits = dropout_bits(dropout_key, config.blocks, config.width)
        for i in range(config.blocks):
            block = Block(config, self.merged, name=f"block_{i}")
            h = block(h, alpha, activation, bits[i])
        return dense(self.action_dim, "output")(activation(h), alpha)


def init_base(
    config: NetworkConfig, key: Key[Array, ""], obs_dim: int, action_dim: int
) -> Params:
    """Fresh parameters of the base."""
    net = Denoiser(config, action_dim)
    return net.init(key, jnp.zeros(obs_dim), jnp.zeros(action_dim), jnp.zeros(()))[
        "params"
    ]


def make_denoise(
    net: Denoiser,
    base: Params,
    library: Params | None = None,
    alpha: Float[Array, " k"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Denoise:
    """The seam everything else is written against: (obs, a_t, t) -> eps, one example.

    Args:
      net: the network.
      base: its parameters.
      library: K skills, leaves [K, ...], or None for the base alone.
      alpha: weight of each skill; required with a library.
      dropout_key: given in training only.

    Raises:
      ValueError: a library without weights, which would be the base alone, or weights
        without a library.
    """
    if (library is None) != (alpha is None):
        raise ValueError("a library and alpha go together: got only one of them")
    variables = {"params": base}
    if library is not None:
        variables["skills"] = library
    return lambda obs, a_t, t: net.apply(variables, obs, a_t, t, alpha, dropout_key)
