"""The file of finished critics: a round trip; one line for all else that is there."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from psec_jax import tree
from psec_jax.agents import critic_file, critics
from psec_jax.errors import InputError
from psec_jax.types import Normaliser

S, A = 3, 2
IDENTITY = Normaliser(np.zeros(S, np.float32), np.ones(S, np.float32))
CONFIG = critics.CriticConfig(("reward", "safety"), widths=(8, 8))
CARD = {
    "kinds": ["reward", "safety"],
    "obs_dim": S,
    "action_dim": A,
    "steps": 2,
    "data": {},
    "summary": {},
}


def write(folder):
    params = critics.init(CONFIG, jax.random.key(0), S, A).trained
    return params, critic_file.save(folder, params, IDENTITY, CARD)


def test_round_trip(tmp_path):
    params, saved = write(tmp_path)
    got, normaliser, card = critic_file.load(tmp_path)
    tiny.assert_trees_equal(got, params)
    tiny.assert_trees_equal(normaliser, IDENTITY)
    assert card == saved.card and len(card["fingerprint"]) == 16
    path = tmp_path / critic_file.NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="do not match its fingerprint"):
        critic_file.load(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a safetensors file"):
        critic_file.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="holds no finished critics"):
        critic_file.load(tmp_path)
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        critic_file.load(tmp_path)


def rewrite(path, card=None, **arrays):
    """Other fields and arrays, with a fingerprint to match; None removes one."""
    with safetensors.safe_open(path, "numpy") as file:
        known = json.loads(file.metadata()["card"])
        flat = {name: file.get_tensor(name) for name in file.keys()}
    flat |= arrays
    flat = {name: x for name, x in flat.items() if x is not None}
    known |= {"fingerprint": tree.fingerprint(tree.unflatten(flat))} | (card or {})
    path.write_bytes(safetensors.numpy.save(flat, {"card": json.dumps(known)}))


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"kinds": "reward"}, "kinds is 'reward', expected a list of names"),
        ({"kinds": []}, r"kinds is \[\], expected names"),
        ({"kinds": [1, 2]}, "expected names"),
        ({"kinds": ["reward"]}, r"q/hidden_0/bias is \(2, 2, 8\), expected \(1, 2, 8"),
        ({"obs_dim": 4}, r"normaliser/mean is \(3,\), expected \(4,\)"),
        ({"obs_dim": 0}, "obs_dim is 0, expected a number of 1 or more"),
        ({"action_dim": True}, "action_dim is True"),
        ({"action_dim": 3}, r"q/hidden_0/kernel is \(2, 2, 5, 8\), expected"),
        ({"steps": None}, "steps is None"),
        ({"data": []}, r"data is \[\], expected an object"),
        ({"fingerprint": ["x"]}, "fingerprint is"),
    ],
)
def test_cards_are_checked(tmp_path, card, words):
    write(tmp_path)
    rewrite(tmp_path / critic_file.NAME, card)
    with pytest.raises(InputError, match=words):
        critic_file.load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"q/output/bias": None}, r"q/output/bias is missing, expected \(2, 2, 1\)"),
        ({"w": np.ones(3, np.float32)}, r"w is \(3,\), expected nothing"),
        ({"normaliser/std": np.zeros(3, np.float32)}, "std is not above 0"),
        (
            {"normaliser/mean": np.full(3, np.nan, np.float32)},
            "normaliser/mean holds 3 NaN or infinite of 3 values",
        ),
        ({"normaliser/mean": np.zeros(3, np.int32)}, r"mean is \(3,\), .* of floats"),
        ({"q/hidden_1/bias": np.ones(1, np.float32)}, "q/hidden_1/bias is"),
    ],
)
def test_arrays_are_checked(tmp_path, arrays, words):
    write(tmp_path)
    rewrite(tmp_path / critic_file.NAME, **arrays)
    with pytest.raises(InputError, match=words):
        critic_file.load(tmp_path)
