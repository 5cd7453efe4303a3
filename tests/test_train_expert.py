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
    actor = {
        f"Dense_{i}": {
            "kernel": generator.normal(size=shape),
            "bias": generator.normal(size=shape[1]),
        }
        for i, shape in enumerate([(3, 5), (5, 4), (4, 2), (4, 2)])
    }

    def dense(i, x):
        return x @ actor[f"Dense_{i}"]["kernel"] + actor[f"Dense_{i}"]["bias"]

    obs_mean, var = generator.normal(size=3), generator.uniform(0.5, 2, 3)
    np.savez(tmp_path / "e.npz", **export(actor, obs_mean, var))
    obs = generator.normal(size=(6, 3)).astype(np.float32)
    x = (obs - obs_mean) / np.sqrt(var + VAR_FLOOR)
    for i in range(2):
        x = np.maximum(dense(i, x), 0)
    mean, log_std = dense(2, x), dense(3, x)
    expert = load_expert(tmp_path / "e.npz", 2)
    np.testing.assert_allclose(expert(obs), np.tanh(mean), rtol=1e-4, atol=1e-5)
    noise = generator.normal(size=(6, 2))
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
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(InputError, match=r"pip install 'psec_jax\[experts\]'"):
        train_expert(WALKER, 1, 0, tmp_path / "e.npz")
    assert not list(tmp_path.iterdir())
