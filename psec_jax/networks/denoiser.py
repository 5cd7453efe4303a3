"""Denoising networks with or without skills: the table, their making and their call."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Key

from psec_jax.errors import InputError
from psec_jax.lora import weigh_layers
from psec_jax.networks.config import COMPATS, Denoise, Denoiser, NetworkConfig
from psec_jax.networks.mlp import init_net
from psec_jax.networks.residual import ResidualMLP
from psec_jax.networks.transformer import Transformer
from psec_jax.types import Params

__all__ = [
    "COMPATS",
    "NETWORKS",
    "Denoise",
    "Denoiser",
    "NetworkConfig",
    "init_base",
    "make_denoise",
    "make_network",
]

NETWORKS: Mapping[str, type[Denoiser]] = {
    "mlp": ResidualMLP,
    "transformer": Transformer,
}


def make_network(
    config: NetworkConfig,
    action_dim: int,
    horizon: int = 1,
    merged: bool = False,
    dropout: float = 0.0,
) -> Denoiser:
    """The configured network.

    Args:
      config: kind and sizes.
      action_dim: numbers it predicts, H * A of a chunk.
      horizon: H.
      merged: see `layers.AdaptedDense`.
      dropout: rate, for training.

    Raises:
      InputError: H does not divide the numbers to be predicted.
    """
    if action_dim % horizon:
        raise InputError(
            f"horizon: got {horizon}, which does not divide chunks of {action_dim} "
            "numbers"
        )
    return NETWORKS[config.kind](config, action_dim, horizon, merged, dropout)


def init_base(
    config: NetworkConfig,
    key: Key[Array, ""],
    obs_dim: int,
    action_dim: int,
    horizon: int = 1,
) -> Params:
    """Fresh parameters of the base; `action_dim` and `horizon` as in `make_network`."""
    net = make_network(config, action_dim, horizon)
    return init_net(net, key, (obs_dim,), (action_dim,), ())


def make_denoise(
    net: Denoiser,
    base: Params,
    library: Params | None = None,
    alpha: Float[Array, "*L k"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Denoise:
    """The function everything else is written against: (obs, a_t, t) of one example.

    Args:
      net: the network.
      base: its parameters.
      library: K skills, leaves [K, ...], or None for the base alone.
      alpha: weight of each skill, or [L, k] those of every layer in the order of
        `lora.layers_of`; required with a library.
      dropout_key: given in training only.

    Raises:
      ValueError: a library without weights, which would be the base alone, or weights
        without a library.
    """
    if (library is None) != (alpha is None):
        raise ValueError("a library and alpha need each other: got only one")
    variables = {"params": base}
    if library is not None and alpha is not None:
        variables["skills"] = (
            library if alpha.ndim == 1 else weigh_layers(library, alpha)
        )
    apply: Callable[..., Any] = net.apply
    return lambda obs, a_t, t: apply(variables, obs, a_t, t, alpha, dropout_key)
