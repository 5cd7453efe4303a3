"""Retraining an expert: the exported file, and refusals before any training."""

import sys

import numpy as np
import pytest

from experiments.tools.train_expert import VAR_FLOOR, export, train_expert
from psec_jax.envs.experts import load_expert
from psec_jax.errors import InputError

WALKER = "dm_control:walker-stand"


def test_exported_actor_acts_alike(tmp_path):
    generator = np.random.default_rng(0)
    sizes = {
        "latent_pi.0": (5, 3),
        "latent_pi.2": (4, 5),
        "mu": (2, 4),
        "log_std": (2, 4),
    }
    state = {}
    for name, shape in sizes.items():
        state[f"{name}.weight"] = generator.normal(size=shape)
        state[f"{name}.bias"] = generator.normal(size=shape[0])
    mean, var = generator.normal(size=3), generator.uniform(0.5, 2, 3)
    np.savez(tmp_path / "e.npz", **export(state, mean, var))
    obs = generator.normal(size=(6, 3)).astype(np.float32)
    x = (obs - mean) / np.sqrt(var + VAR_FLOOR)
    for name in ("latent_pi.0", "latent_pi.2"):
        x = np.maximum(x @ state[f"{name}.weight"].T + state[f"{name}.bias"], 0)
    expected = np.tanh(x @ state["mu.weight"].T + state["mu.bias"])
    expert = load_expert(tmp_path / "e.npz", 2)
    np.testing.assert_allclose(expert(obs), expected, rtol=1e-4, atol=1e-5)
    noise = generator.normal(size=(6, 2))
    log_std = x @ state["log_std.weight"].T + state["log_std.bias"]
    mean = x @ state["mu.weight"].T + state["mu.bias"]
    sampled = np.tanh(mean + np.exp(np.clip(log_std, -20, 2)) * noise)
    assert (log_std > 2).any()
    got = expert.sample(obs, noise)
    np.testing.assert_allclose(got, sampled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"out": "expert.txt"}, "expected a name ending in .npz"),
    ],
)
def test_refusals(changes, message, tmp_path):
    arguments = {"env": WALKER, "steps": 1, "seed": 0, "out": tmp_path / "e.npz"}
    with pytest.raises(InputError, match=message):
        train_expert(**(arguments | changes))


def test_a_file_that_is_there_is_kept(tmp_path):
    out = tmp_path / "e.npz"
    out.touch()
    with pytest.raises(InputError, match="e.npz exists already"):
        train_expert(WALKER, 1, 0, out)


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(InputError, match=r"pip install 'psec_jax\[experts\]'"):
        train_expert(WALKER, 1, 0, tmp_path / "e.npz")
    assert not list(tmp_path.iterdir())
