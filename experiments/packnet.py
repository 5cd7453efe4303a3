"""PackNet's masks (Mallya and Lazebnik 2018): who owns the weights of one network.

A weight that no task owns is exactly 0, so that the network itself says which are used.
"""

import numpy as np

from psec_jax import tree
from psec_jax.lora import dense_layers
from psec_jax.types import Params

Masks = dict[str, np.ndarray]  # of the kernel of each dense layer, by its path


def used(params: Params) -> Masks:
    """Where the kernels of the dense layers are not 0."""
    flat = tree.flatten(params)
    paths = [f"{layer}/kernel" for layer in dense_layers(params)]
    return {path: np.asarray(flat[path]) != 0 for path in paths}


def masked(params: Params, masks: Masks) -> Params:
    """The parameters with 0 for the weights outside the masks."""
    flat = tree.flatten(params)
    for path, mask in masks.items():
        flat[path] = np.where(mask, flat[path], np.float32(0))
    return tree.unflatten(flat)


def pruned(params: Params, owned: Masks | None, share: float) -> Params:
    """The parameters with 0 for the smallest weights of those that are not owned.

    Args:
      params: of a network.
      owned: weights of earlier tasks, which stay; None owns nothing.
      share: of the other weights of each layer, rounded, that stays.
    """
    flat, masks = tree.flatten(params), used(params)
    for path in masks:
        size = np.abs(np.asarray(flat[path]))
        mine = np.zeros(size.shape, bool) if owned is None else owned[path]
        free = np.flatnonzero(~mine)
        kept = round(share * len(free))
        largest = np.argsort(-size.ravel()[free], kind="stable")[:kept]
        masks[path] = mine.copy()
        masks[path].ravel()[free[largest]] = True
    return masked(params, masks)


def fixed(params: Params, free: Masks, rest: bool) -> Params:
    """The anchor (`agents.cloning.Anchor`) that lets the weights in the masks move.

    Args:
      params: of the network.
      free: of its kernels.
      rest: whether biases and norms are fixed.
    """

    def weight(path: str, leaf: np.ndarray) -> np.ndarray:
        still = ~free[path] if path in free else np.full(np.shape(leaf), rest)
        return np.where(still, np.inf, 0).astype(np.float32)

    flat = tree.flatten(params)
    return tree.unflatten({path: weight(path, leaf) for path, leaf in flat.items()})
