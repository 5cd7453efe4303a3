"""The paper's denoiser: a residual MLP."""

import flax.linen as nn
import jax.numpy as jnp

from psec_jax.networks.config import Denoiser, NetworkConfig
from psec_jax.networks.layers import (
    ACTIVATIONS,
    AdaptedDense,
    FourierFeatures,
    drop,
    dropout_bits,
)


class Block(nn.Module):
    """h + W2 f(W1 LayerNorm(dropout(h)))."""

    config: NetworkConfig
    merged: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, h, alpha, activation, bits):
        config = self.config
        x = h if bits is None else drop(h, bits, self.dropout)
        x = nn.LayerNorm(epsilon=1e-6, use_fast_variance=True, name="norm")(x)
        forms = config.matmul_dtype, self.merged
        up = AdaptedDense(config.width * config.expansion, *forms, name="up")
        down = AdaptedDense(config.width, *forms, name="down")
        return h + down(activation(up(x, alpha)), alpha)


class ResidualMLP(Denoiser):
    """Time features, input layer, residual blocks, output layer."""

    @nn.compact
    def __call__(self, obs, a_t, t, alpha=None, dropout_key=None):
        """The prediction, see `Denoiser`."""
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
        if dropout_key is not None and self.dropout > 0:
            bits = dropout_bits(dropout_key, config.blocks, config.width)
        for i in range(config.blocks):
            block = Block(config, self.merged, self.dropout, name=f"block_{i}")
            h = block(h, alpha, activation, bits[i])
        return dense(self.action_dim, "output")(activation(h), alpha)
