"""The Gaussian baselines: densities by hand, and a bandit whose answer is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax.agents import gaussian
from psec_jax.agents.common import OptimiserConfig, Transitions
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.gaussian import GaussianConfig
from psec_jax.errors import InputError
from psec_jax.losses import WeightConfig

TINY = {
    "widths": (16,),
    "optimiser": OptimiserConfig(learning_rate=1e-2, weight_decay=0.0, ema=1.0),
    "critics": CriticConfig(("reward",), widths=(16,), learning_rate=1e-2),
    "weights": WeightConfig(reward_temperature=3.0),
    "batch_size": 128,
}


def test_log_prob_by_hand():
    config = GaussianConfig(widths=())
    kernel, bias = jnp.array([[1.0, 0.0]]), jnp.array([0.0, 0.3])
    params = {
        "mean": {"output": {"kernel": kernel, "bias": bias}},
        "log_std": jnp.array([0.0, math.log(0.5)]),
    }
    obs, action = jnp.array([0.2]), jnp.array([0.1, -0.4])
    expected = 0.0
    for a, mean, std in zip(
        action, (math.tanh(0.2), math.tanh(0.3)), (1, 0.5), strict=True
    ):
        expected += -0.5 * ((a - mean) / std) ** 2 - math.log(std)
        expected -= 0.5 * math.log(2 * math.pi)
    got = gaussian.log_prob(config, params, obs, action)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("objective", ["bc", "reward"])
def test_bandit(objective):
    """Half of the actions are good: cloning takes the middle, IQL the good ones."""
    generator = np.random.default_rng(0)
    obs = generator.choice([-1.0, 1.0], (512, 1))
    action = generator.choice([-0.5, 0.5], (512, 1))
    zeros = np.zeros(512)
    columns = (obs, action, 4 * (obs * action)[:, 0], zeros, zeros, obs, zeros)
    data = Transitions(*(jnp.asarray(c, jnp.float32) for c in columns))
    config = GaussianConfig(objective, **TINY)
    state = gaussian.init(config, jax.random.key(0), 1, 1)
    assert (state.critics is None) == (objective == "bc")
    update = functools.partial(gaussian.update, config)
    update = jax.jit(tiny.drawing(update, config.batch_size))
    for step in range(300):
        state, metrics = update(state, data, None, jax.random.key(step))
    assert np.isfinite(metrics[f"loss/{objective}"]) and state.step == 300
    states = jnp.array([[-1.0], [1.0]])
    got = gaussian.mean(config, state.actor.params, states)
    expected = 0 if objective == "bc" else 0.5 * states
    np.testing.assert_allclose(got, jnp.broadcast_to(expected, (2, 1)), atol=0.12)


def test_refusals():
    with pytest.raises(InputError, match="unknown objective 'luck'"):
        GaussianConfig("luck")
    for objective in ("safety", "dql"):
        with pytest.raises(InputError, match="has bc and reward"):
            GaussianConfig(objective)
