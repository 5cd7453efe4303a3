"""A denoising transformer: one token for the observation and one for each action."""

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


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, name=name)


class Block(nn.Module):
    """x = h + Attention(LayerNorm(dropout(h))), then x + W2 f(W1 LayerNorm(x))."""

    config: NetworkConfig
    merged: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, h, alpha, bits):
        config = self.config
        activation = ACTIVATIONS[config.activation]

        def dense(features: int, name: str) -> AdaptedDense:
            return AdaptedDense(features, config.matmul_dtype, self.merged, name=name)

        x = h if bits is None else drop(h, bits, self.dropout)
        x = _norm("norm_attention")(x)
        heads = (*x.shape[:-1], config.heads, config.width // config.heads)
        q, k, v = (
            dense(config.width, name)(x, alpha).reshape(heads)
            for name in ("query", "key", "value")
        )
        x = nn.dot_product_attention(q, k, v).reshape(h.shape)
        h = h + dense(config.width, "attended")(x, alpha)
        x = dense(config.width * config.expansion, "up")(_norm("norm")(h), alpha)
        return h + dense(config.width, "down")(activation(x), alpha)


class Transformer(Denoiser):
    """Every token sees every other; the time is added to all of them."""

    @nn.compact
    def __call__(self, obs, a_t, t, alpha=None, dropout_key=None):
        """The prediction, see `Denoiser`."""
        config = self.config

        def dense(features: int, name: str) -> AdaptedDense:
            return AdaptedDense(features, config.matmul_dtype, self.merged, name=name)

        actions = a_t.reshape(*a_t.shape[:-1], self.horizon, -1)
        h = jnp.concatenate(
            [
                dense(config.width, "observation")(obs, alpha)[..., None, :],
                dense(config.width, "action")(actions, alpha),
            ],
            axis=-2,
        )
        time = FourierFeatures(config.time_features, name="fourier")(t[..., None])
        time = dense(config.time_width, "time_0")(time, alpha)
        time = ACTIVATIONS[config.activation](time)
        h = h + dense(config.width, "time_1")(time, alpha)[..., None, :]
        tokens = (self.horizon + 1, config.width)
        h = h + self.param("positions", nn.initializers.normal(0.02), tokens)
        bits = [None] * config.blocks
        if dropout_key is not None and self.dropout > 0:
            size = (self.horizon + 1) * config.width
            bits = dropout_bits(dropout_key, config.blocks, size)
            bits = bits.reshape(config.blocks, *tokens)
        for i in range(config.blocks):
            block = Block(config, self.merged, self.dropout, name=f"block_{i}")
            h = block(h, alpha, bits[i])
        h = _norm("norm")(h[..., 1:, :])
        return dense(actions.shape[-1], "output")(h, alpha).reshape(a_t.shape)
