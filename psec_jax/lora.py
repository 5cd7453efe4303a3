"""Low-rank skills as pure functions on pytrees.

A skill mirrors the base's dense layers, {layer: {"a": [d, r], "b": [r, o]}}; a library
is the same tree with a leading axis of K skills. `alpha` is the whole multiplier: there
is no hidden alpha / rank.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from psec_jax import tree
from psec_jax.errors import InputError, lookup
from psec_jax.types import Params

_DRAWS = 2**18  # at once, enough for each layer of the paper's networks


def lecun_normal(
    key: Key[Array, ""], shape: tuple[int, int], dtype: Any = jnp.float32
) -> Float[Array, "d o"]:
    """A kernel of jax.nn.initializers.lecun_normal, bit for bit.

    JAX's compiles a program for each shape, which for a network takes longer than a
    training's step. The first numbers that a key draws are the same in any number of
    them, so that one program is enough.
    """
    std = np.sqrt(np.float32(1 / shape[0])) / np.float32(0.87962566103423978)
    size = shape[0] * shape[1]
    drawn = _truncated_normal(key, max(size, _DRAWS), std, dtype)
    return drawn[:size].reshape(shape)


@partial(jax.jit, static_argnums=(1, 3))
def _truncated_normal(key: Key[Array, ""], count: int, std: Any, dtype: Any) -> Array:
    return jax.random.truncated_normal(key, -2, 2, (count,), dtype) * std


def _lora(key: Key[Array, ""], d: int, o: int, rank: int) -> dict[str, Array]:
    return {"a": lecun_normal(key, (d, rank)), "b": jnp.zeros((rank, o))}


def _mlp(key: Key[Array, ""], d: int, o: int, rank: int) -> dict[str, Array]:
    return _lora(key, d, o, rank) | {"c": jnp.zeros(rank)}


# "mlp" is the control of the paper's PSEC (MLP) row: a bottleneck MLP instead of
# each low-rank pair, of the same width and so of like size.
ADAPTERS = {"lora": _lora, "mlp": _mlp}


def dense_layers(base: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The layers a skill adapts: path -> (inputs, outputs).

    These are the dense layers, the nodes with both a kernel and a bias; biases,
    LayerNorm and Fourier kernels stay frozen without an adapter.
    """
    flat = tree.flatten(base)
    return {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in flat.items()
        if path.endswith("/kernel") and f"{path.removesuffix('kernel')}bias" in flat
    }


def init_skill(
    key: Key[Array, ""], base: Params, rank: int, adapter: str = "lora"
) -> Params:
    """A new skill for `base`: down matrices LeCun normal, up matrices zero.

    With the up matrices zero the skill's policy is the base's policy.

    Raises:
      InputError: rank below 1 or an unknown adapter.
    """
    if rank < 1:
        raise InputError(f"skill rank: got {rank}, expected 1 or more")
    init = lookup(ADAPTERS, adapter, "adapter")
    layers = dense_layers(base)
    keys = jax.random.split(key, len(layers))
    flat = {}
    for layer_key, (path, (d, o)) in zip(keys, layers.items(), strict=True):
        for leaf, value in init(layer_key, d, o, rank).items():
            flat[f"{path}/{leaf}"] = value
    return tree.unflatten(flat)


def layers_of(skill: Params) -> list[str]:
    """Paths of the layers that a skill, or library, adapts, in the order of weights
    [L, K] that every layer has of its own."""
    return [p.removesuffix("/a") for p in tree.flatten(skill) if p.endswith("/a")]


def weigh_layers(library: Params, alpha: Float[Array, "L K"]) -> Params:
    """The library with the weights of each layer in it, as the leaf "alpha" [K].

    Raises:
      ValueError: the number of rows is not the number of layers.
    """
    layers = layers_of(library)
    if len(alpha) != len(layers):
        raise ValueError(f"{len(layers)} layers but weights of {len(alpha)}")
    rows = {f"{layer}/alpha": row for layer, row in zip(layers, alpha, strict=True)}
    return tree.unflatten(tree.flatten(library) | rows)


def check_weights(alpha: Array, skills: int) -> None:
    """Refuse weights [..., k] that are not one for each skill.

    Width 1 would otherwise be broadcast over all skills without a word.

    Raises:
      ValueError: the number of weights is not the number of skills.
    """
    if alpha.shape[-1] != skills:
        raise ValueError(
            f"{skills} skills but {alpha.shape[-1]} weights (alpha {alpha.shape})"
        )


def adapter_delta(
    x: Float[Array, "*#b d"],
    adapter: Mapping[str, Array],
    alpha: Float[Array, "*#b k"],
    activation: Callable[[Array], Array],
) -> Float[Array, "*#b o"]:
    """sum_k alpha_k (x A_k) B_k, all K skills in two products.

    Args:
      x: layer input; its dtype is the one the products are made in.
      adapter: "a" [K, d, r], or "down" of `inputs_first`, "b" [K, r, o] and, for an
        MLP adapter, "c" [K, r]: then the term is alpha_k f(x A_k + c_k) B_k with f =
        `activation`.
      alpha: weight of each skill.
      activation: f of the MLP adapters.

    Raises:
      ValueError: the number of weights is not the number of skills.
    """
    b = adapter["b"]
    check_weights(alpha, b.shape[0])
    leaf, order = ("down", "dkr") if "down" in adapter else ("a", "kdr")
    h = jnp.einsum(
        f"...d,{order}->...kr",
        x,
        adapter[leaf].astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    if "c" in adapter:
        h = activation(h + adapter["c"])
    h = (h * alpha[..., None]).astype(x.dtype)
    return jnp.einsum(
        "...kr,kro->...o", h, b.astype(x.dtype), preferred_element_type=jnp.float32
    )


def inputs_first(library: Params) -> Params:
    """The library as products with a single example read it best: the leaf "down"
    [d, K, r] in place of "a" [K, d, r], which would be transposed in every call."""
    flat = {}
    for path, leaf in tree.flatten(library).items():
        if path.endswith("/a"):
            path, leaf = f"{path.removesuffix('a')}down", jnp.moveaxis(leaf, 0, 1)
        flat[path] = leaf
    return tree.unflatten(flat)


def side_by_side(
    adapter: Mapping[str, Array], alpha: Float[Array, " k"]
) -> tuple[Float[Array, "d kr"], Float[Array, "kr o"]]:
    """K LoRA adapters of one layer as one of rank K r: sum_k alpha_k A_k B_k = A B.

    Raises:
      ValueError: MLP adapters, or the number of weights is not the number of skills.
    """
    if "c" in adapter:
        raise ValueError("MLP adapters cannot be merged into the base's weights")
    a, b = adapter["a"], adapter["b"]
    check_weights(alpha, a.shape[0])
    b = alpha[:, None, None] * b
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1])


@jax.custom_vjp
def merged_product(
    x: Float[Array, "*n d"],
    kernel: Float[Array, "d o"],
    a: Float[Array, "d r"],
    b: Float[Array, "r o"],
) -> Float[Array, "*n o"]:
    """x (W0 + A B) of one example, with the matrix formed once for a whole batch.

    The gradient of A and B goes through the r columns alone, as `adapter_delta`'s does:
    the matrix's own gradient, d o numbers from every example, is never formed.

    Args:
      x: layer input; leading axes are tokens of the example.
      kernel: W0.
      a: of all skills side by side.
      b: likewise, times the weights; no example may have weights of its own.
    """
    return x @ (kernel + a @ b)


def _merged_product_fwd(x, kernel, a, b):
    merged = kernel + a @ b
    return x @ merged, (x, merged, a, b)


def _merged_product_bwd(residuals, dy):
    x, merged, a, b = residuals
    # The compiler leaves the kernel's gradient out wherever the base is frozen.
    return (
        jnp.einsum("do,...o->...d", merged, dy),
        _summed_outer(x, dy),
        _summed_outer(x, jnp.einsum("ro,...o->...r", b, dy)),
        _summed_outer(x @ a, dy),
    )


def _summed_outer(
    x: Float[Array, "*n i"], y: Float[Array, "*n j"]
) -> Float[Array, "i j"]:
    """The outer products of all tokens, summed."""
    return jnp.sum(x[..., :, None] * y[..., None, :], axis=tuple(range(x.ndim - 1)))


merged_product.defvjp(_merged_product_fwd, _merged_product_bwd)


def adapter_of(skill: Params) -> str:
    """ "lora" or "mlp", by the skill's leaves."""
    return "mlp" if any(p.endswith("/c") for p in tree.flatten(skill)) else "lora"


def rank_of(skill: Params) -> int:
    """The largest rank over the skill's layers (all equal in skills made here)."""
    flat = tree.flatten(skill)
    return max(leaf.shape[-1] for path, leaf in flat.items() if path.endswith("/a"))


def check_skill(base: Params, skill: Params, name: str = "skill") -> None:
    """Refuse a skill whose layers are not the base's.

    Flax would silently ignore an adapter under a name that the network lacks.

    Raises:
      InputError: a layer or matrix is missing, unknown or of another shape.
    """
    layers = dense_layers(base)
    flat = tree.flatten(skill)
    names = {path.rpartition("/")[0] for path in flat}
    if missing := sorted(set(layers) - names):
        raise InputError(f"{name}: no adapter for layer {missing[0]!r} of the base")
    if unknown := sorted(names - set(layers)):
        raise InputError(
            f"{name}: layer {unknown[0]!r} is not in the base; "
            f"expected {sorted(layers)}"
        )
    for path, (d, o) in layers.items():
        for leaf in ("a", "b"):
            if f"{path}/{leaf}" not in flat:
                raise InputError(f"{name}: layer {path!r} has no matrix {leaf!r}")
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise InputError(
                f"{name}: layer {path!r} has a {a.shape} and b {b.shape}, "
                f"expected ({d}, rank) and (rank, {o})"
            )
        if (a.shape[0], b.shape[1]) != (d, o):
            raise InputError(
                f"{name}: layer {path!r} maps {a.shape[0]} -> {b.shape[1]}, "
                f"the base's maps {d} -> {o}"
            )
        c = flat.get(f"{path}/c")
        if c is not None and c.shape != a.shape[1:]:
            raise InputError(
                f"{name}: layer {path!r} has c {c.shape}, expected {a.shape[1:]}"
            )
    for path in flat:
        layer, _, leaf = path.rpartition("/")
        if leaf not in ("a", "b", "c"):
            raise InputError(
                f"{name}: layer {layer!r} has an unknown matrix {leaf!r}; "
                "expected a, b and, for an mlp adapter, c"
            )


def pad(skill: Params, rank: int) -> Params:
    """Zero-pad one skill to a larger rank; the function it computes is unchanged."""

    def leaf(path: str, x: Array | np.ndarray) -> Array:
        extra = rank - x.shape[0 if path.endswith("/b") else -1]
        if extra < 0:
            raise InputError(f"cannot pad {path!r} {x.shape} down to rank {rank}")
        widths = [(0, 0)] * x.ndim
        widths[0 if path.endswith("/b") else -1] = (0, extra)
        return jnp.pad(x, widths)

    return tree.unflatten({p: leaf(p, x) for p, x in tree.flatten(skill).items()})


def stack_skills(skills: Sequence[Params]) -> Params:
    """Skills of any ranks to one library with leaves [K, ...] at the largest rank.

    Raises:
      InputError: no skill, or both low-rank and MLP adapters.
    """
    if not skills:
        raise InputError("a library needs at least one skill, got none")
    adapters = {adapter_of(skill) for skill in skills}
    if len(adapters) > 1:
        raise InputError("cannot compose lora and mlp skills in one library")
    rank = max(rank_of(skill) for skill in skills)
    return tree.stack([pad(skill, rank) for skill in skills])


def zero_skill(skill: Params) -> Params:
    """The skill that changes nothing: the base itself as one of a library."""
    return jax.tree.map(jnp.zeros_like, skill)


def merge(base: Params, library: Params, alpha: Float[Array, "*L k"]) -> Params:
    """Base parameters with W0 + sum_k alpha_k A_k B_k folded in.

    Only for weights that do not depend on the state; they may be each layer's own.

    Raises:
      InputError: the library holds MLP adapters, which cannot be folded.
      ValueError: the number of weights is not the number of skills.
    """
    if adapter_of(library) != "lora":
        raise InputError("only lora skills can be merged into the base's weights")
    if alpha.ndim == 2:
        library = weigh_layers(library, alpha)
    flat, low_rank = tree.flatten(base), tree.flatten(library)
    for path in dense_layers(base):
        adapter = {leaf: low_rank[f"{path}/{leaf}"] for leaf in ("a", "b")}
        a, b = side_by_side(adapter, low_rank.get(f"{path}/alpha", alpha))
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + a @ b
    return tree.unflatten(flat)
