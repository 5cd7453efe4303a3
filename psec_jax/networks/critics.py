"""Critics: Q(s, a) in twins and V(s), ensembles by vmap over stacked parameters."""

from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.networks.mlp import MLP, init_net
from psec_jax.types import Params

# Of each pair of twins the Q that counts: the smaller reward, the larger harm.
PESSIMISM = {"reward": jnp.min, "safety": jnp.max, "cost": jnp.max}


class ValueNet(nn.Module):
    """V(s): LayerNorm on the state itself, then an MLP."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, obs: Float[Array, "*b s"]) -> Float[Array, "*b"]:
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(obs)
        return MLP(self.widths, 1, name="mlp")(x)[..., 0]


def init_q(
    widths: Sequence[int], key: Key[Array, ""], obs_dim: int, action_dim: int
) -> Params:
    """Parameters of one Q."""
    return init_net(MLP(widths, 1), key, (obs_dim + action_dim,))


def init_v(widths: Sequence[int], key: Key[Array, ""], obs_dim: int) -> Params:
    """Parameters of one V."""
    return init_net(ValueNet(widths), key, (obs_dim,))


def q_value(
    params: Params, obs: Float[Array, "*b s"], action: Float[Array, "*b a"]
) -> Float[Array, "*b"]:
    """Q(s, a) of one network; its widths are read off the parameters."""
    x = jnp.concatenate([obs, action], axis=-1)
    return cast(Array, MLP(_widths(params), 1).apply({"params": params}, x))[..., 0]


def v_value(params: Params, obs: Float[Array, "*b s"]) -> Float[Array, "*b"]:
    """V(s) of one network."""
    net = ValueNet(_widths(params["mlp"]))
    return cast(Array, net.apply({"params": params}, obs))


def twin_q(
    params: Params, obs: Float[Array, "*b s"], action: Float[Array, "*b a"]
) -> Float[Array, "N ..."]:
    """Each of N, leaves [N, ...]: twins as they are trained, one Q as it is fitted."""
    return jax.vmap(q_value, (0, None, None))(params, obs, action)


def _widths(mlp: Params) -> tuple[int, ...]:
    hidden = len(mlp) - 1
    return tuple(mlp[f"hidden_{i}"]["bias"].shape[-1] for i in range(hidden))
