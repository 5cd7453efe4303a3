"""Sets in D4RL's layout, made in the real simulators from tiny policies."""

import json
from pathlib import Path

import numpy as np
import pytest
from shell import call

from experiments.tools.collect_d4rl import RECIPES, collect_d4rl, snapshots
from psec_jax import data
from psec_jax.data import d4rl_sets, dataset
from psec_jax.envs.experts import D4RL_ASSETS
from psec_jax.errors import InputError

WALKER, MEDIUM = "gymnasium:Walker2d-v5", "walker2d-medium-v2"
# Steps and evaluation returns of six snapshots: scores 0, 11, 33, 22, 100 and 55.
CURVE = {100: 0, 200: 500, 300: 1500, 400: 1000, 500: 4592, 600: 2500}
PARTS = ("kernel", "bias")
STD = 0.1  # of the policies' distributions


def write_policy(path: Path, push: float, sizes=(17, 6)) -> None:
    """A policy that always gives the same push."""
    obs_dim, action_dim = sizes
    push = np.full(action_dim, np.arctanh(push))
    arrays = {
        "layer_0/kernel": np.zeros((obs_dim, 4)),
        "layer_0/bias": np.zeros(4),
        "head/kernel": np.zeros((4, 2 * action_dim)),
        "head/bias": np.concatenate([push, np.full(action_dim, np.log(STD))]),
        "log_std_clip": np.array([-20, 2]),
        "obs_mean": np.zeros(obs_dim),
        "obs_std": np.ones(obs_dim),
    }
    np.savez(path, **{k: v.astype(np.float32) for k, v in arrays.items()})


def write_snapshots(folder: Path, env=WALKER, curve=CURVE, key="training_curve"):
    """Policies and their card, as train_expert --snapshots leaves them."""
    folder.mkdir()
    points = [{"steps": 50, "returns": [9.0]}]  # one that was not kept
    for i, (steps, mean) in enumerate(curve.items()):
        file = f"sac_{steps}.npz"
        write_policy(folder / file, i / 10)
        returns = [mean - 1.0, mean + 1.0]
        points.append({"steps": steps, "returns": returns, "file": file})
    card = {"environment": env, "file": "sac.npz", key: points[key == "snapshots" :]}
    (folder / "sac.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Empty folders of data, and no address to download from."""
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "made"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "official"))
    monkeypatch.setattr(d4rl_sets, "MIRRORS", ())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("quality", "steps"),
    [
        ("expert", [500]),
        ("medium", [300]),
        ("medium-replay", [100, 200, 300]),
        ("medium-expert", [300, 500]),
        ("full-replay", list(CURVE)),
        ("source", list(CURVE)),
    ],
)
@pytest.mark.parametrize("key", ["training_curve", "snapshots"])
def test_recipes(tmp_path, quality, steps, key):
    found = snapshots(MEDIUM, write_snapshots(tmp_path / "walker", key=key))
    assert [s.steps for s in RECIPES[quality](found)] == steps
    assert set(RECIPES) == {t.quality for t in d4rl_sets.TASKS.values()} - {"random"}
    score = d4rl_sets.normalised_score("walker2d", 500.0)
    assert found[1].score == pytest.approx(score)


def test_medium_is_sought_before_the_expert(tmp_path):
    curve = {1: 0, 2: 400, 3: 3000, 4: 1000}
    found = snapshots(MEDIUM, write_snapshots(tmp_path / "walker", curve=curve))
    assert [s.steps for s in RECIPES["medium"](found)] == [2]
    with pytest.raises(InputError, match="no snapshot before the best, sac_1.npz"):
        RECIPES["medium"](found[:1])


def test_medium_replay(tmp_path):
    folder = write_snapshots(tmp_path / "walker")
    name = "walker2d-medium-replay-v2"
    path = collect_d4rl(name, 601, seed=3, policies=folder)
    assert path.name == "walker2d-medium-replay-made.hdf5"
    ds, attrs = data.read(name, offline=True)
    assert len(ds.obs) == 601
    # Three policies, each with its part of the transitions, in whole trajectories but
    # for the last of each.
    of_policy = attrs["policy_of_trajectory"]
    slices = dataset.episode_slices(ds)
    sizes = [r.stop - r.start for r in slices]
    assert [sum(np.array(sizes)[of_policy == k]) for k in range(3)] == [200, 200, 201]
    last = np.flatnonzero(np.diff(of_policy, append=3))
    cut = [i for i, rows in enumerate(slices) if ds.timeout[rows.stop - 1]]
    assert set(cut) <= set(last) and len(slices) > 3
    for rows in slices:
        inside = slice(rows.start, rows.stop - 1)
        after = slice(rows.start + 1, rows.stop)
        np.testing.assert_array_equal(ds.next_obs[inside], ds.obs[after])
    # The policies push 0, 0.1 and 0.2, by samples of their distributions.
    means = [ds.action[200 * k : 200 * (k + 1)].mean() for k in range(3)]
    np.testing.assert_allclose(means, [0, 0.1, 0.2], atol=0.02)
    assert 0.08 < ds.action[:200].std() < 0.12
    names = [f"sampled:sac_{n}00.npz" for n in (1, 2, 3)]
    assert json.loads(attrs["policies"]) == names
    assert len(set(json.loads(attrs["policies_sha256"]))) == 3
    assert (attrs["made_by"], attrs["task"]) == ("psec_jax", name)
    assert (attrs["environment"], attrs["d4rl_environment"]) == (WALKER, "Walker2d-v2")
    assert attrs["action_noise"] == 0 and attrs["medium_score"] > 30
    assert list(attrs["policy_steps"]) == [100, 200, 300]
    returns = dataset.episode_returns(ds)
    np.testing.assert_allclose(attrs["returns"], returns)
    expected = 100 * (returns - 1.629008) / (4592.3 - 1.629008)
    np.testing.assert_allclose(attrs["scores"], expected)


def test_the_same_whatever_the_processes_and_kept_or_refused(tmp_path, monkeypatch):
    folder = write_snapshots(tmp_path / "walker")
    path = collect_d4rl(MEDIUM, 50, 0, policies=folder, workers=1)
    one = path.read_bytes()
    assert collect_d4rl(MEDIUM, 50, 0, policies=folder) == path
    with pytest.raises(InputError, match="holds another collection, with seed 0 "):
        collect_d4rl(MEDIUM, 50, 1, policies=folder)
    write_policy(folder / "sac_300.npz", 0.9)
    with pytest.raises(InputError, match="policies_sha256"):
        collect_d4rl(MEDIUM, 50, 0, policies=folder)
    assert path.read_bytes() == one
    write_policy(folder / "sac_300.npz", 0.2)
    collect_d4rl(MEDIUM, 50, 0, policies=folder, workers=2, overwrite=True)
    assert path.read_bytes() == one
    # A longer set begins with a shorter one, up to where that was cut.
    short, _ = data.read(path)
    collect_d4rl(MEDIUM, 90, 0, policies=folder, overwrite=True)
    np.testing.assert_array_equal(data.load(path).obs[:50], short.obs)


def test_source_set_of_a_shifted_simulator(tmp_path):
    env = "gymnasium:HalfCheetah-v5@friction:0.25"
    curve = {10: -500.0, 20: 4000.0}
    folder = write_snapshots(tmp_path / "cheetah", env, curve)
    name = "halfcheetah-friction-source"
    options = (f"--set={name}", "--transitions=600", f"--policies={folder}")
    answer = call("experiments.tools.collect_d4rl", *options, "--action_noise=0.3")
    assert answer.code == 0, answer.err
    path = tmp_path / "made" / "halfcheetah-friction-source-made.hdf5"
    assert answer.out.startswith(f"{path}: 600 transitions, 2 trajectories, norm")
    ds, attrs = data.read(name)
    assert attrs["environment"] == env and attrs["d4rl_environment"] == "HalfCheetah-v2"
    assert list(np.flatnonzero(ds.timeout)) == [299, 599] and not ds.terminal.any()
    assert "medium" not in attrs
    # The plain simulator from the same state and actions does something else.
    plain = write_snapshots(tmp_path / "plain", env.partition("@")[0], curve)
    collect_d4rl("halfcheetah-full-replay-v2", 600, 0, 0.3, plain)
    other, _ = data.read("halfcheetah-full-replay-v2")
    np.testing.assert_array_equal(other.obs[0], ds.obs[0])
    assert np.abs(other.obs[:300] - ds.obs[:300]).max() > 0.1


def test_random_set_needs_no_policy():
    collect_d4rl("hopper-random-v2", 60, seed=0)
    ds, attrs = data.read("hopper-random-v2")
    assert ds.obs.shape == (60, 11) and len(attrs["policy_steps"]) == 0
    assert np.abs(ds.action).mean() == pytest.approx(0.5, abs=0.1)
    assert attrs["action_noise"] == 0 and attrs["policies"] == '["random"]'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "walker2d-luck-v2"}, "unknown D4RL set 'walker2d-luck-v2'; choose"),
        ({"name": "walker2d-medium-v0"}, "expected walker2d-medium-v2"),
        ({"transitions": 0}, "transitions is 0, expected 1 or more"),
        (
            {"name": "walker2d-medium-expert-v2", "transitions": 1},
            "transitions is 1, expected 2 or more, one for each policy",
        ),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"action_noise": -1.0}, "action_noise is -1.0"),
        ({"policies": "none"}, "none: no card of a policy"),
        (
            {"name": "walker2d-random-v2", "action_noise": 0.2},
            "action_noise is 0.2: walker2d-random-v2 is of uniform actions",
        ),
        ({"name": "hopper-medium-v2"}, "policies of gymnasium:Walker2d-v5, hopper"),
        (
            {"name": "walker2d-gravity-source"},
            "made in gymnasium:Walker2d-v5@gravity:2",
        ),
    ],
)
def test_refused(tmp_path, changes, words):
    write_snapshots(tmp_path / "walker")
    arguments = {"name": MEDIUM, "transitions": 9, "seed": 0, "policies": "walker"}
    with pytest.raises(InputError, match=words) as told:
        collect_d4rl(**(arguments | changes))
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("made/*"))


def test_cards_that_do_not_hold(tmp_path):
    folder = write_snapshots(tmp_path / "walker")
    (folder / "sac_200.npz").unlink()
    with pytest.raises(InputError, match="sac.json: sac_200.npz is missing"):
        snapshots(MEDIUM, folder)
    point = {"steps": 1, "returns": [1.0]}
    for changes, words in (
        ({}, "sac.json: names no snapshot"),
        ({"file": "x.npz", "returns": []}, "x.npz has no steps or no returns"),
    ):
        card = {"environment": WALKER, "training_curve": [point | changes]}
        (folder / "sac.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match=words):
            snapshots(MEDIUM, folder)


def test_a_place_that_cannot_be_written_is_told_before_playing(tmp_path, monkeypatch):
    folder = write_snapshots(tmp_path / "walker")
    monkeypatch.setattr("experiments.tools.collect_d4rl.play", None)
    (tmp_path / "made" / "walker2d-medium-made.hdf5").mkdir(parents=True)
    with pytest.raises(InputError, match="it is a folder"):
        collect_d4rl(MEDIUM, 9, 0, policies=folder)
    monkeypatch.setenv("PSEC_DATA_DIR", str(folder / "sac.json"))
    with pytest.raises(InputError, match="cannot make the folder"):
        collect_d4rl(MEDIUM, 9, 0, policies=folder)


def test_packaged_policies_are_whole():
    """Every folder of the package fits its simulator; a set's name leads to it."""
    folders = set()
    for name, task in d4rl_sets.TASKS.items():
        if task.quality not in ("medium", "source"):
            continue
        try:
            found = snapshots(name)
        except InputError as error:
            assert "no card of a policy" in str(error)
        else:
            assert RECIPES[task.quality](found)
            folders |= {policy.path.parent for policy in found}
    assert folders == set(D4RL_ASSETS.iterdir()) and folders


def test_samples_of_the_policies_own_distributions_or_means_with_noise(tmp_path):
    folder = write_snapshots(tmp_path / "walker")
    path = collect_d4rl(MEDIUM, 500, 0, policies=folder)
    ds, attrs = data.read(path)
    assert np.arctanh(ds.action).std() == pytest.approx(STD, rel=0.05)
    assert json.loads(attrs["policies"]) == ["sampled:sac_300.npz"]
    with pytest.raises(InputError, match="holds another collection"):
        collect_d4rl(MEDIUM, 500, 0, 0.3, folder)
    collect_d4rl(MEDIUM, 500, 0, 0.3, folder, overwrite=True)
    ds, attrs = data.read(path)
    assert ds.action.std() == pytest.approx(0.3, rel=0.05)
    assert json.loads(attrs["policies"]) == ["sac_300.npz"]
    assert attrs["action_noise"] == 0.3
    arrays = dict(np.load(folder / "sac_300.npz"))
    del arrays["log_std_clip"]
    arrays |= {f"head/{part}": arrays[f"head/{part}"][..., :6] for part in PARTS}
    np.savez(folder / "sac_300.npz", **arrays)
    with pytest.raises(InputError, match="expected the expert or a file with a standa"):
        collect_d4rl(MEDIUM, 500, 0, policies=folder, overwrite=True)
