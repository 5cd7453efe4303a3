"""What a composed network predicts on given states: the measure that skills share."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from psec_jax.composition import network_of, parameter_denoise
from psec_jax.errors import InputError
from psec_jax.networks.denoiser import Denoise, Denoiser
from psec_jax.policy import load_base
from psec_jax.process import ProcessConfig, corrupt, draw, sample
from psec_jax.types import Normaliser, Params


class Probe(NamedTuple):
    """Inputs of the network at which predictions are compared.

    Attributes:
      obs: [N, S], normalised.
      a_t: [N, A], actions on their way to noise.
      t: [N], times.
    """

    obs: Float[Array, "N S"]
    a_t: Float[Array, "N A"]
    t: Float[Array, " N"]


class Composed(NamedTuple):
    """A base with K LoRA skills, to be composed at any fixed weights."""

    net: Denoiser
    process: ProcessConfig
    base: Params
    library: Params

    def denoise(self, alpha: Float[Array, " K"]) -> Denoise:
        """The network with W0 + sum_k alpha_k A_k B_k."""
        return parameter_denoise(self.net, self.base, self.library, alpha, alpha)

    def actions(
        self, alpha: Float[Array, " K"], key: Key[Array, ""], obs: Float[Array, "N S"]
    ) -> Float[Array, "N A"]:
        """An action, or chunk, for each normalised state."""
        denoise = self.denoise(alpha)

        def one(key: Array, obs: Array) -> Array:
            return sample(denoise, self.process, key, obs, self.net.action_dim)

        return jax.vmap(one)(jax.random.split(key, len(obs)), obs)

    def probe(
        self, alpha: Float[Array, " K"], key: Key[Array, ""], obs: Float[Array, "N S"]
    ) -> Probe:
        """The states, with actions of these weights at random times and noise."""
        action_key, draw_key = jax.random.split(key)
        actions = self.actions(alpha, action_key, obs)

        def one(key: Array, action: Array) -> tuple[Array, Array]:
            t, eps = draw(self.process, key, self.net.action_dim)
            return corrupt(self.process, action, t, eps), t.astype(jnp.float32)

        a_t, t = jax.vmap(one)(jax.random.split(draw_key, len(obs)), actions)
        return Probe(obs, a_t, t)

    def predict(self, alpha: Float[Array, " K"], probe: Probe) -> Float[Array, "N A"]:
        """What the network predicts there."""
        return jax.vmap(self.denoise(alpha))(*probe)


def relative(got: Any, expected: Any, change: Any) -> float:
    """||got - expected|| / ||change||; 0 where nothing differs.

    Args:
      got: what is compared.
      expected: with what.
      change: in terms of which.
    """
    difference = float(np.linalg.norm(np.asarray(got) - np.asarray(expected)))
    if difference == 0:
        return 0.0
    size = float(np.linalg.norm(np.asarray(change)))
    return difference / size if size > 0 else float("inf")


def draw_states(
    obs: np.ndarray, normaliser: Normaliser, count: int, seed: int
) -> Array:
    """`count` normalised states of raw ones [N, S], or all, without replacement.

    Raises:
      InputError: observations of another size than the base's, or fewer than 1 wanted.
    """
    size = len(normaliser.mean)
    if obs.shape[-1] != size:
        raise InputError(
            f"observations have {obs.shape[-1]} numbers, the library's base expects "
            f"{size}"
        )
    if count < 1:
        raise InputError(f"states: got {count}, expected 1 or more")
    rows = np.random.default_rng(seed).permutation(len(obs))[:count]
    return jnp.asarray(normaliser(obs[np.sort(rows)]), jnp.float32)


def composed(root: str | Path, library: Params) -> tuple[Composed, Normaliser]:
    """A library's base with stacked skills, and its normaliser.

    Raises:
      InputError: a damaged base.
    """
    base = load_base(root)
    config, params = base.config, base.params
    made = Composed(network_of(config), config.process, params.base, library)
    return made, Normaliser(*map(np.asarray, params.normaliser))
