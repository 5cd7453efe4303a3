"""Noise schedules, the forward process and samplers, for one example.

Everything is written against `denoise(obs [S], a_t [A], t []) -> eps [A]`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from psec_jax.errors import InputError, lookup
from psec_jax.networks.denoiser import Denoise


class Schedule(NamedTuple):
    """beta_t and alpha_bar_t = prod_{i <= t} (1 - beta_i): host arrays, each [T]."""

    beta: Float[np.ndarray, " T"]
    alpha_bar: Float[np.ndarray, " T"]


def vp_beta(steps: int) -> np.ndarray:
    """Variance-preserving betas, beta_min 0.1 and beta_max 10 (Song et al. 2021)."""
    t = np.arange(1, steps + 1)
    beta_min, beta_max = 0.1, 10.0
    return 1 - np.exp(
        -beta_min / steps - 0.5 * (beta_max - beta_min) * (2 * t - 1) / steps**2
    )


def cosine_beta(steps: int) -> np.ndarray:
    """Cosine betas with offset 0.008 (Nichol and Dhariwal 2021, eq. 17)."""
    t = np.linspace(0, 1, steps + 1)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - f[1:] / f[:-1], 0, 0.999)


def linear_beta(steps: int) -> np.ndarray:
    """Betas from 1e-4 to 2e-2 (Ho et al. 2020); meant for hundreds of steps."""
    return np.linspace(1e-4, 2e-2, steps)


SCHEDULES = {"vp": vp_beta, "cosine": cosine_beta, "linear": linear_beta}


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and how it is sampled.

    Attributes:
      steps: T, diffusion steps of training.
      schedule: a key of `SCHEDULES`.
      sampler: a key of `SAMPLERS`.
      sampling_steps: of DDIM; 0 takes all T. DDPM always takes all T.
      temperature: multiplies the noise of each DDPM step (not the start).
      start_scale: standard deviation of the starting noise; 1 is the paper's.
      clip: clip a_t to [-1, 1] after every reverse step, as the paper does.
    """

    steps: int = 5
    schedule: str = "vp"
    sampler: str = "ddpm"
    sampling_steps: int = 0
    temperature: float = 1.0
    start_scale: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        lookup(SCHEDULES, self.schedule, "diffusion.schedule")
        lookup(SAMPLERS, self.sampler, "diffusion.sampler")
        if self.steps < 1:
            raise InputError(f"diffusion.steps: got {self.steps}, expected 1 or more")
        if not 0 <= self.sampling_steps <= self.steps:
            raise InputError(
                f"diffusion.sampling_steps: got {self.sampling_steps}, "
                f"expected 0 (all) to {self.steps}"
            )
        for field in ("temperature", "start_scale"):
            if getattr(self, field) < 0:
                raise InputError(
                    f"diffusion.{field}: got {getattr(self, field)}, expected 0 or more"
                )


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule's arrays, computed in float64 and held in float32."""
    beta = SCHEDULES[config.schedule](config.steps)
    return Schedule(beta.astype(np.float32), np.cumprod(1 - beta).astype(np.float32))


def q_sample(
    schedule: Schedule,
    action: Float[Array, " A"],
    t: Int[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, " A"]:
    """sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""
    alpha_bar = jnp.asarray(schedule.alpha_bar)[t]
    return jnp.sqrt(alpha_bar) * action + jnp.sqrt(1 - alpha_bar) * eps


def ddpm_reverse(
    denoise: Denoise,
    config: DiffusionConfig,
    obs: Float[Array, " S"],
    a_T: Float[Array, " A"],
    z: Float[Array, "T A"],
) -> tuple[Float[Array, " A"], Float[Array, "T A"]]:
    """The DDPM reverse process (Ho et al. 2020, algorithm 2) from given noise.

    Args:
      denoise: the noise predictor.
      config: schedule, temperature and clipping.
      obs: normalised observation.
      a_T: starting noise.
      z: z[t] is added at step t; z[0] never is.

    Returns:
      The action, clipped to [-1, 1], and the trace of a_t after each of the T steps
      (from t = T - 1 down to 0).
    """
    schedule = make_schedule(config)
    t = np.arange(config.steps - 1, -1, -1)

    def step(a_t: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        t, beta, alpha_bar = inputs
        eps = denoise(obs, a_t, t.astype(jnp.float32))
        mean = (a_t - beta / jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(1 - beta)
        a_t = mean + (t > 0) * jnp.sqrt(beta) * config.temperature * z[t]
        if config.clip:
            a_t = jnp.clip(a_t, -1, 1)
        return a_t, a_t

    a_0, trace = jax.lax.scan(step, a_T, (t, schedule.beta[t], schedule.alpha_bar[t]))
    return jnp.clip(a_0, -1, 1), trace


def ddpm_sample(
    denoise: Denoise,
    config: DiffusionConfig,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action_dim: int,
) -> Float[Array, " A"]:
    """One action by DDPM, all T steps."""
    start_key, noise_key = jax.random.split(key)
    a_T = config.start_scale * jax.random.normal(start_key, (action_dim,))
    z = jax.random.normal(noise_key, (config.steps, action_dim))
    return ddpm_reverse(denoise, config, obs, a_T, z)[0]


def ddim_sample(
    denoise: Denoise,
    config: DiffusionConfig,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action_dim: int,
) -> Float[Array, " A"]:
    """One action by deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""
    schedule = make_schedule(config)
    taken = config.sampling_steps or config.steps
    t = np.linspace(config.steps - 1, 0, taken).round().astype(np.int32)
    alpha_bar = schedule.alpha_bar[t]
    next_alpha_bar = np.append(alpha_bar[1:], np.float32(1))
    start_key, _ = jax.random.split(key)
    a_T = config.start_scale * jax.random.normal(start_key, (action_dim,))

    def step(a_t: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, alpha_bar, next_alpha_bar = inputs
        eps = denoise(obs, a_t, t.astype(jnp.float32))
        a_0 = (a_t - jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(alpha_bar)
        if config.clip:
            a_0 = jnp.clip(a_0, -1, 1)
            eps = (a_t - jnp.sqrt(alpha_bar) * a_0) / jnp.sqrt(1 - alpha_bar)
        return jnp.sqrt(next_alpha_bar) * a_0 + jnp.sqrt(1 - next_alpha_bar) * eps, None

    a_0, _ = jax.lax.scan(step, a_T, (t, alpha_bar, next_alpha_bar))
    return jnp.clip(a_0, -1, 1)


SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}


def sample(
    denoise: Denoise,
    config: DiffusionConfig,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action_dim: int,
) -> Float[Array, " A"]:
    """One action by the configured sampler."""
    return SAMPLERS[config.sampler](denoise, config, key, obs, action_dim)
