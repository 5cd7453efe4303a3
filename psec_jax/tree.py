"""Pytree helpers: names of leaves, fingerprints, a leading axis of skills."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.errors import InputError
from psec_jax.types import Params


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict keyed by "/"-joined paths, in sorted order."""
    flat = {}
    for name in sorted(tree):
        path = f"{prefix}{name}"
        if isinstance(tree[name], Mapping):
            flat.update(flatten(tree[name], f"{path}/"))
        else:
            flat[path] = tree[name]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`.

    Raises:
      InputError: a path leads through another one's leaf.
    """
    tree: dict[str, Any] = {}
    for path in sorted(flat):  # a leaf comes before what would be inside it
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"array {path!r} is inside another array")
        node[name] = flat[path]
    return tree


def fingerprint(tree: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def shapes(tree: Params) -> Params:
    """Shape and dtype of every leaf, to be compared."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def size(tree: Params) -> int:
    """Number of scalars in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def stack(trees: Sequence[Params]) -> Params:
    """K trees of one structure to one tree with leaves [K, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def add(stacked: Params, tree: Params) -> Params:
    """Append one tree to a stack of K: leaves [K + 1, ...]."""
    return jax.tree.map(lambda k, s: jnp.concatenate([k, s[None]]), stacked, tree)


def drop(stacked: Params, index: int) -> Params:
    """Remove entry `index` of a stack of K: leaves [K - 1, ...]."""
    return jax.tree.map(lambda k: jnp.concatenate([k[:index], k[index + 1 :]]), stacked)


def take(stacked: Params, indices: Sequence[int]) -> Params:
    """The entries `indices` of a stack, in that order."""
    return jax.tree.map(lambda k: k[jnp.asarray(indices)], stacked)
