"""Losses of one example: pure, scalar, vmapped by the caller."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax.diffusion import Schedule, q_sample
from psec_jax.networks.denoiser import Denoise


def noise_error(
    denoise: Denoise,
    schedule: Schedule,
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
    t: Int[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, ""]:
    """||eps_hat(s, a_t, t) - eps||^2 at a given step and noise."""
    a_t = q_sample(schedule, action, t, eps)
    return jnp.sum((denoise(obs, a_t, t.astype(jnp.float32)) - eps) ** 2)


def diffusion_loss(
    denoise: Denoise,
    schedule: Schedule,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
) -> Float[Array, ""]:
    """||eps_hat - eps||^2 at a random step (Ho et al. 2020, eq. 14).

    The sum, not the mean, over action dimensions.
    """
    t_key, eps_key = jax.random.split(key)
    t = jax.random.randint(t_key, (), 0, schedule.beta.shape[0])
    eps = jax.random.normal(eps_key, action.shape)
    return noise_error(denoise, schedule, obs, action, t, eps)


def cloning_loss(
    sampled: Float[Array, " A"], action: Float[Array, " A"]
) -> Float[Array, ""]:
    """||a_sampled - a||^2: behaviour cloning through the sampler."""
    return jnp.sum((sampled - action) ** 2)


def released_regulariser(
    alpha: Float[Array, "B K"], strength: float
) -> Float[Array, ""]:
    """(mean alpha - strength / 2)^2 + (mean alpha of the last skill - strength)^2.

    Of a batch, from the authors' code (strength 16, the last skill is the safety
    skill); not in the paper, and larger than the diffusion loss it is added to.
    """
    return (jnp.mean(alpha) - strength / 2) ** 2 + (
        jnp.mean(alpha[:, -1]) - strength
    ) ** 2
