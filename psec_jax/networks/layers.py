"""Building blocks of the denoiser: activation, dropout, time features, dense layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt16

from psec_jax.lora import adapter_delta, lecun_normal, merged_product, side_by_side

# e^2x must stay finite in float32; beyond 20 mish(x) = x to the last bit.
_MISH_LINEAR_FROM = 20.0


@jax.custom_jvp
def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x tanh(softplus(x)) (Misra 2020), elementwise, with a single exponential.

    With e = exp(x) and n = e (e + 2), tanh(softplus(x)) = n / (n + 2).
    """
    e = jnp.exp(jnp.minimum(x, _MISH_LINEAR_FROM))
    n = e * (e + 2)
    return x * (n / (n + 2))


@mish.defjvp
def _mish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    e = jnp.exp(jnp.minimum(x, _MISH_LINEAR_FROM))
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    slope = n * inverse + 4 * x * e * (e + 1) * inverse * inverse
    return x * (n * inverse), slope * dx


# Under `checkpoint` the gradient computes mish's parts again: writing them to memory
# and reading them back takes longer.
ACTIVATIONS: dict[str, Callable] = {
    "mish": jax.checkpoint(mish),
    "swish": nn.swish,
    "relu": nn.relu,
}


def drop(
    x: Float[Array, "*d"], bits: UInt16[Array, "*d"], rate: float
) -> Float[Array, "*d"]:
    """Dropout of one example by 16-bit draws, each kept with probability 1 - rate.

    The rate is held to 1 / 65536. 16-bit draws cost half of the usual 32-bit ones.
    """
    threshold = round(rate * 65536)
    return jnp.where(bits >= threshold, x / (1 - threshold / 65536), 0.0)


def dropout_bits(
    key: Key[Array, ""], blocks: int, width: int
) -> UInt16[Array, "blocks width"]:
    """The draws for every block of one example, in one call.

    Halves of 32-bit words; 16-bit draws take XLA three times as long.
    """
    words = jax.random.bits(key, (blocks, -(-width // 2)), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)
    return halves[:, :width].astype(jnp.uint16)


class FourierFeatures(nn.Module):
    """Learned Fourier features of the time: t [..., 1] -> [..., features]."""

    features: int

    @nn.compact
    def __call__(self, t: Float[Array, "*b 1"]) -> Float[Array, "*b f"]:
        kernel = self.param(
            "kernel", nn.initializers.normal(0.2), (self.features // 2, 1)
        )
        angle = 2 * jnp.pi * t @ kernel.T
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class AdaptedDense(nn.Module):
    """A dense layer to which skills may be added: W(s) = W0 + sum_k alpha_k B_k A_k.

    The layer looks its own adapters up in the collection "skills" (leaves with a
    leading axis of K skills); without them it is an ordinary dense layer, so one
    network class serves pretraining, one skill and any number of skills. Weights of the
    layer's own are beside its adapters (`lora.weigh_layers`) and come before `alpha`.
    Inputs may have axes that the weights lack, such as the tokens of one example.

    Attributes:
      features: outputs.
      matmul_dtype: of the products.
      merged: form W once for a batch whose examples all have the same weights, which
        makes the training of a skill faster; for LoRA skills in float32 alone, as in
        bfloat16 the sum would lose what a small skill adds.
    """

    features: int
    matmul_dtype: str = "float32"
    merged: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b d"], alpha: Float[Array, "*c k"] | None = None
    ) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", lecun_normal, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        dtype = jnp.dtype(self.matmul_dtype)
        x = x.astype(dtype)
        adapter = {
            leaf: self.get_variable("skills", leaf)
            for leaf in ("a", "down", "b", "c", "alpha")
            if alpha is not None and self.has_variable("skills", leaf)
        }
        alpha = adapter.pop("alpha", alpha)
        if self.merged and alpha is not None:
            if dtype != jnp.float32:
                raise ValueError(f"skills cannot be merged in {dtype}, only in float32")
            return merged_product(x, kernel, *side_by_side(adapter, alpha)) + bias
        y = jnp.matmul(x, kernel.astype(dtype), preferred_element_type=jnp.float32)
        y = y + bias
        if alpha is not None:
            tokens = tuple(range(alpha.ndim - 1, x.ndim - 1))
            alpha = jnp.expand_dims(alpha, tokens)
            y = y + adapter_delta(x, adapter, alpha, mish)
        return y
