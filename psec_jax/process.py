"""Generative processes of actions, for one example: what is drawn, learned and sampled.

Everything is written against `denoise(obs [S], a_t [A], t []) -> [A]`. A chunk of H
actions is one vector of H * A numbers here. Samplers are functions of their noise, of
Z = 1 + T rows (`draw_noise`). `PROCESSES` at the foot is the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real

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
class ProcessConfig:
    """The generative process, its sampler and its action chunks.

    Attributes:
      kind: a key of `PROCESSES`.
      steps: T. The time that the network reads is 0, ..., T - 1 in a diffusion and
        runs from 0 (the action) to T (noise) in a flow.
      schedule: a key of `SCHEDULES`; of diffusion.
      sampler: one of the process's own samplers.
      sampling_steps: of DDIM and of a flow; 0 takes T. DDPM always takes all T.
      temperature: multiplies the noise of each DDPM step (not the start).
      start_scale: standard deviation of the starting noise; 1 is the paper's.
      clip: clip to [-1, 1] on the way, as the paper does: a_t after each DDPM step,
        the predicted action in the other samplers.
      horizon: H, actions predicted at once.
      execute: h, how many of them are executed before the next prediction.
    """

    kind: str = "diffusion"
    steps: int = 5
    schedule: str = "vp"
    sampler: str = "ddpm"
    sampling_steps: int = 0
    temperature: float = 1.0
    start_scale: float = 1.0
    clip: bool = True
    horizon: int = 1
    execute: int = 1

    def __post_init__(self) -> None:
        process = lookup(PROCESSES, self.kind, "kind")
        lookup(process.samplers, self.sampler, "sampler")
        lookup(SCHEDULES, self.schedule, "schedule")
        for field in ("steps", "horizon"):
            if getattr(self, field) < 1:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 1 or more"
                )
        for field in ("sampling_steps", "temperature", "start_scale"):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 0 or more"
                )
        if self.kind == "diffusion" and self.sampling_steps > self.steps:
            raise InputError(
                f"sampling_steps: got {self.sampling_steps}, "
                f"expected 0 (all) to {self.steps}"
            )
        if not 1 <= self.execute <= self.horizon:
            raise InputError(
                f"execute: got {self.execute}, expected 1 to {self.horizon} (horizon)"
            )


def make_schedule(config: ProcessConfig) -> Schedule:
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


Scan = Callable[..., tuple[Array, Any]]


def scan_after_first(
    step: Callable[[Array, Any], tuple[Array, Any]], start: Array, inputs: Any
) -> tuple[Array, Any]:
    """`lax.scan` with the first step before the loop.

    In the loop a gradient goes through the input of every step, even of the first one,
    which is noise. Before it that is left out, for one more copy of the step in the
    program.
    """
    carry, first = step(start, jax.tree.map(lambda x: jnp.asarray(x[0]), inputs))
    carry, rest = jax.lax.scan(step, carry, jax.tree.map(lambda x: x[1:], inputs))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)
    return carry, joined


def ddpm_reverse(
    denoise: Denoise,
    config: ProcessConfig,
    obs: Float[Array, " S"],
    a_T: Float[Array, " A"],
    z: Float[Array, "T A"],
    scan: Scan = jax.lax.scan,
) -> tuple[Float[Array, " A"], Float[Array, "T A"]]:
    """The DDPM reverse process (Ho et al. 2020, algorithm 2) from given noise.

    Args:
      denoise: the noise predictor.
      config: schedule, temperature and clipping.
      obs: normalised observation.
      a_T: starting noise.
      z: z[t] is added at step t; z[0] never is.
      scan: `lax.scan`, or `scan_after_first`.

    Returns:
      The action, clipped to [-1, 1], and the trace of a_t after each of the T steps
      (from t = T - 1 down to 0).
    """
    schedule = make_schedule(config)
    t = np.arange(config.steps - 1, -1, -1)

    def step(a_t: Array, inputs: tuple[Any, ...]) -> tuple[Array, Array]:
        t, beta, alpha_bar, z_t = inputs
        eps = denoise(obs, a_t, t.astype(jnp.float32))
        mean = (a_t - beta / jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(1 - beta)
        a_t = mean + (t > 0) * jnp.sqrt(beta) * config.temperature * z_t
        if config.clip:
            a_t = jnp.clip(a_t, -1, 1)
        return a_t, a_t

    inputs = (t, schedule.beta[t], schedule.alpha_bar[t], z[::-1])
    a_0, trace = scan(step, a_T, inputs)
    return jnp.clip(a_0, -1, 1), trace


def ddpm_sample(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Float[Array, " A"]:
    """One action by DDPM, all T steps."""
    a_T = config.start_scale * noise[0]
    return ddpm_reverse(denoise, config, obs, a_T, noise[1:], scan)[0]


def ddim_sample(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Float[Array, " A"]:
    """One action by deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""
    schedule = make_schedule(config)
    count = config.sampling_steps or config.steps
    t = np.linspace(config.steps - 1, 0, count).round().astype(np.int32)
    alpha_bar = schedule.alpha_bar[t]
    next_alpha_bar = np.append(alpha_bar[1:], np.float32(1))
    a_T = config.start_scale * noise[0]

    def step(a_t: Array, inputs: tuple[Any, Any, Any]) -> tuple[Array, None]:
        t, alpha_bar, next_alpha_bar = inputs
        eps = denoise(obs, a_t, t.astype(jnp.float32))
        a_0 = (a_t - jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(alpha_bar)
        if config.clip:
            a_0 = jnp.clip(a_0, -1, 1)
            eps = (a_t - jnp.sqrt(alpha_bar) * a_0) / jnp.sqrt(1 - alpha_bar)
        return jnp.sqrt(next_alpha_bar) * a_0 + jnp.sqrt(1 - next_alpha_bar) * eps, None

    a_0, _ = scan(step, a_T, (t, alpha_bar, next_alpha_bar))
    return jnp.clip(a_0, -1, 1)


def draw_step(
    config: ProcessConfig, key: Key[Array, ""], action_dim: int
) -> tuple[Int[Array, ""], Float[Array, " A"]]:
    """A uniform step t of 0, ..., T - 1 and standard normal noise."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.randint(t_key, (), 0, config.steps)
    return t, jax.random.normal(eps_key, (action_dim,))


def add_noise(
    config: ProcessConfig,
    action: Float[Array, " A"],
    t: Int[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, " A"]:
    """`q_sample` on the configured schedule."""
    return q_sample(make_schedule(config), action, t, eps)


def noise(
    config: ProcessConfig, action: Float[Array, " A"], eps: Float[Array, " A"]
) -> Float[Array, " A"]:
    """The noise itself (Ho et al. 2020, eq. 14)."""
    return eps


def draw_time(
    config: ProcessConfig, key: Key[Array, ""], action_dim: int
) -> tuple[Float[Array, ""], Float[Array, " A"]]:
    """A uniform time t in [0, T) and standard normal noise.

    Not in [0, 1): the network's Fourier features are made for steps that are 1 apart,
    and would hardly tell times within the unit interval from each other.
    """
    t_key, eps_key = jax.random.split(key)
    t = config.steps * jax.random.uniform(t_key)
    return t, jax.random.normal(eps_key, (action_dim,))


def interpolate(
    config: ProcessConfig,
    action: Float[Array, " A"],
    t: Real[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, " A"]:
    """(1 - t / T) a + (t / T) eps, the straight path (Lipman et al. 2023, eq. 22)."""
    share = t / config.steps
    return (1 - share) * action + share * eps


def velocity(
    config: ProcessConfig, action: Float[Array, " A"], eps: Float[Array, " A"]
) -> Float[Array, " A"]:
    """eps - a, the slope of the straight path in t / T (Lipman et al. 2023, eq. 23)."""
    return eps - action


def _integrate(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan,
    midpoint: bool,
) -> Float[Array, " A"]:
    """The flow from noise at time T to the action at time 0, in equal steps."""
    count = config.sampling_steps or config.steps
    a_T = config.start_scale * noise[0]

    def slope(a_t: Array, share: Array) -> Array:
        v = denoise(obs, a_t, share * config.steps)
        if not config.clip:
            return v
        return (a_t - jnp.clip(a_t - share * v, -1, 1)) / share

    def step(a_t: Array, share: Any) -> tuple[Array, None]:
        v = slope(a_t, share)
        if midpoint:
            v = slope(a_t - v / (2 * count), share - 1 / (2 * count))
        return a_t - v / count, None

    shares = np.arange(count, 0, -1, dtype=np.float32) / count
    return jnp.clip(scan(step, a_T, shares)[0], -1, 1)


def euler_sample(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Float[Array, " A"]:
    """One action of a flow by Euler steps, one call of the network each."""
    return _integrate(denoise, config, noise, obs, scan, midpoint=False)


def midpoint_sample(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Float[Array, " A"]:
    """One action of a flow by midpoint steps, two calls of the network each."""
    return _integrate(denoise, config, noise, obs, scan, midpoint=True)


Sampler = Callable[[Denoise, ProcessConfig, Array, Array, Scan], Array]


class Process(NamedTuple):
    """What a process is, all of one example.

    Attributes:
      draw: `(config, key, action_dim) -> (t, eps)`, the random numbers of one loss.
      corrupt: `(config, action, t, eps) -> a_t`, what the network sees.
      target: `(config, action, eps)`, what the network predicts.
      samplers: name -> `(denoise, config, noise, obs, scan) -> action`, the noise of
        `draw_noise`.
    """

    draw: Callable[[ProcessConfig, Array, int], tuple[Array, Array]]
    corrupt: Callable[[ProcessConfig, Array, Array, Array], Array]
    target: Callable[[ProcessConfig, Array, Array], Array]
    samplers: Mapping[str, Sampler]


PROCESSES = {
    "diffusion": Process(
        draw_step, add_noise, noise, {"ddpm": ddpm_sample, "ddim": ddim_sample}
    ),
    "flow": Process(
        draw_time,
        interpolate,
        velocity,
        {"euler": euler_sample, "midpoint": midpoint_sample},
    ),
}


def draw(
    config: ProcessConfig, key: Key[Array, ""], action_dim: int
) -> tuple[Real[Array, ""], Float[Array, " A"]]:
    """Time and noise of one example of the loss."""
    return PROCESSES[config.kind].draw(config, key, action_dim)


def corrupt(
    config: ProcessConfig,
    action: Float[Array, " A"],
    t: Real[Array, ""],
    eps: Float[Array, " A"],
) -> Float[Array, " A"]:
    """The action a_t on its way to the noise, at time t."""
    return PROCESSES[config.kind].corrupt(config, action, t, eps)


def target(
    config: ProcessConfig, action: Float[Array, " A"], eps: Float[Array, " A"]
) -> Float[Array, " A"]:
    """What `denoise` is trained to predict: the noise, or the velocity of the flow."""
    return PROCESSES[config.kind].target(config, action, eps)


def draw_noise(
    config: ProcessConfig, key: Key[Array, ""], action_dim: int
) -> Float[Array, "Z A"]:
    """Standard normal numbers for one action (or chunk): those of the start, then a row
    for each of T steps, which DDPM alone reads."""
    start_key, noise_key = jax.random.split(key)
    start = jax.random.normal(start_key, (1, action_dim))
    steps = jax.random.normal(noise_key, (config.steps, action_dim))
    return jnp.concatenate([start, steps])


def sample_from(
    denoise: Denoise,
    config: ProcessConfig,
    noise: Float[Array, "Z A"],
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Float[Array, " A"]:
    """The action (or chunk) that the configured sampler makes of given noise, its steps
    by `lax.scan` or `scan_after_first`."""
    sampler = PROCESSES[config.kind].samplers[config.sampler]
    return sampler(denoise, config, noise, obs, scan)


def sample(
    denoise: Denoise,
    config: ProcessConfig,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action_dim: int,
) -> Float[Array, " A"]:
    """One action (or one chunk of them) by the configured sampler."""
    return sample_from(denoise, config, draw_noise(config, key, action_dim), obs)
