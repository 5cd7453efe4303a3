"""Datasets: loaders, checks, selection, normalisation, and every kind of bad file."""

import os

import h5py
import numpy as np
import pytest

from psec_jax import data
from psec_jax.data import d4rl, dataset, dmc, normalise
from psec_jax.data.paths import data_dir
from psec_jax.errors import InputError
from psec_jax.types import Dataset

S, A = 3, 2


def make(lengths=(4, 3, 5), terminal=(), seed=0):
    """Trajectories of these lengths; those named in `terminal` truly end."""
    generator = np.random.default_rng(seed)
    n = sum(lengths)
    ends = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    for i, end in enumerate(ends):
        (terminals if i in terminal else timeouts)[end] = True
    states = generator.normal(size=(n + len(lengths), S)).astype(np.float32)
    first = np.concatenate([np.arange(n) + i for i in range(1)])
    episode = np.repeat(np.arange(len(lengths)), lengths)
    return Dataset(
        obs=states[first + episode],
        action=generator.uniform(-1, 1, (n, A)).astype(np.float32),
        reward=generator.normal(size=n).astype(np.float32),
        cost=np.zeros(n, np.float32),
        next_obs=states[first + episode + 1],
        terminal=terminals,
        timeout=timeouts,
    )


def assert_same(got, expected):
    for name, array in expected._asdict().items():
        np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)
        assert getattr(got, name).dtype == array.dtype, name


def write(path, ds, drop=(), **replaced):
    """A D4RL file with some keys dropped or replaced."""
    with h5py.File(path, "w") as file:
        for name, key in d4rl.KEYS.items():
            if key not in drop:
                file[key] = replaced.get(key, getattr(ds, name))
    return path


def test_episodes_and_returns():
    ds = make()._replace(reward=np.arange(12, dtype=np.float32), cost=np.ones(12, "f4"))
    assert dataset.episode_slices(ds) == [slice(0, 4), slice(4, 7), slice(7, 12)]
    np.testing.assert_array_equal(dataset.episode_returns(ds), [6, 15, 45])
    np.testing.assert_array_equal(dataset.episode_costs(ds), [4, 3, 5])


def test_select_takes_whole_trajectories_in_their_order():
    ds = make((2, 3, 4, 5), terminal=(1,))
    reward = np.repeat([3.0, 1.0, 4.0, 2.0], [2, 3, 4, 5]).astype(np.float32)
    ds = ds._replace(reward=reward / np.repeat([2, 3, 4, 5], [2, 3, 4, 5]))
    rows = {
        "first": (dataset.select(ds, first=2), np.r_[0:5]),
        "best": (dataset.select(ds, best=2), np.r_[0:2, 5:9]),
        "return": (dataset.select(ds, min_return=1.9), np.r_[0:2, 5:14]),
        "both": (dataset.select(ds, min_return=1.9, first=2), np.r_[0:2, 5:9]),
        "all": (dataset.select(ds), np.r_[0:14]),
    }
    for name, (got, expected) in rows.items():
        np.testing.assert_array_equal(got.obs, ds.obs[expected], err_msg=name)
        np.testing.assert_array_equal(got.timeout, ds.timeout[expected], err_msg=name)


def test_select_by_cost():
    ds = make((2, 2))._replace(cost=np.array([0, 1, 5, 5], np.float32))
    assert len(dataset.select(ds, max_cost=1.0).obs) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"first": 50}, "asked for 50 trajectories, FILE has 3"),
        ({"best": 4}, "asked for 4 trajectories, FILE has 3"),
        ({"first": 0}, "asked for 0 trajectories"),
        ({"first": 1, "best": 1}, "one of the two"),
        ({"min_return": 1e9}, "no trajectory with return >= 1e\\+09 among 3"),
        ({"max_cost": -1.0, "first": 1}, "FILE has 0 with cost <= -1"),
    ],
)
def test_select_refuses(asked, message):
    with pytest.raises(InputError, match=message):
        dataset.select(make(), **asked, source="FILE")


def test_concatenate_and_fingerprint():
    one, two = make(), make((6,), seed=1)
    both = dataset.concatenate([one, two])
    assert len(both.obs) == 18
    assert_same(Dataset(*(a[:12] for a in both)), one)
    assert dataset.fingerprint(both) == dataset.fingerprint(
        Dataset(*(a.copy() for a in both))
    )
    assert dataset.fingerprint(one) != dataset.fingerprint(both)
    flipped = one._replace(timeout=~one.timeout)
    assert dataset.fingerprint(one) != dataset.fingerprint(flipped)
    with pytest.raises(InputError, match="no dataset"):
        dataset.concatenate([])
    narrow = one._replace(action=one.action[:, :1])
    with pytest.raises(InputError, match="different"):
        dataset.concatenate([one, narrow])


@pytest.mark.parametrize("name", ["obs", "action", "reward", "cost", "next_obs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_refuses_what_is_not_finite(name, value):
    ds = make()
    array = getattr(ds, name).copy()
    array.flat[1] = value
    with pytest.raises(InputError, match=rf"FILE: {name} holds 1 NaN or infinite"):
        dataset.check(ds._replace(**{name: array}), "FILE")


def test_check_counts_actions_outside_and_clips_on_request():
    action = np.zeros((12, A), np.float32)
    action[:3, 0] = [1.5, -2, 1.0000001]
    ds = make()._replace(action=action)
    with pytest.raises(InputError, match=r"FILE: 2 of 24 action values .* magnitude 2"):
        dataset.check(ds, "FILE")
    clipped = dataset.check(ds, "FILE", clip_actions=True).action
    np.testing.assert_array_equal(clipped[:3, 0], [1, -1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": np.zeros(11)}, r"reward has shape \(11,\), expected \(12,\)"),
        ({"next_obs": np.zeros((12, 4))}, "next_obs has shape"),
        ({"action": np.zeros(12)}, r"expected \[N, S\] and \[N, A\]"),
        ({"reward": np.array(["a"] * 12)}, "expected numbers"),
    ],
)
def test_check_refuses_shapes_and_types(changes, message):
    with pytest.raises(InputError, match=message):
        dataset.check(make()._replace(**changes), "FILE")


def test_check_refuses_nothing_at_all():
    empty = Dataset(*(array[:0] for array in make()))
    with pytest.raises(InputError, match="holds no transitions"):
        dataset.check(empty, "FILE")


def test_check_ends_the_last_trajectory():
    ds = make()
    timeout = ds.timeout.copy()
    timeout[-1] = False
    assert_same(dataset.check(ds._replace(timeout=timeout), "FILE"), ds)


def test_save_and_load(tmp_path):
    ds = make(terminal=(1,))
    path = d4rl.save(tmp_path / "new" / "x.hdf5", ds, {"seed": 3, "env": "e"})
    got, attrs = d4rl.load(path)
    assert_same(got, ds)
    assert attrs == {"seed": 3, "env": "e"}
    assert os.listdir(path.parent) == ["x.hdf5"]
    with h5py.File(path) as file:
        assert "costs" not in file
    costly = ds._replace(cost=np.ones(12, np.float32))
    assert_same(d4rl.load(d4rl.save(path, costly, {}))[0], costly)


def test_attributes_may_be_long(tmp_path):
    returns = np.arange(20_000.0)
    path = d4rl.save(tmp_path / "x.hdf5", make(), {"returns": returns})
    np.testing.assert_array_equal(d4rl.load(path)[1]["returns"], returns)


def test_columns_and_missing_optional_keys(tmp_path):
    ds = make(terminal=(0, 1, 2))
    path = write(
        tmp_path / "x.hdf5",
        ds,
        drop=("timeouts", "costs"),
        rewards=ds.reward[:, None],
        terminals=ds.terminal[:, None].astype(np.float32),
    )
    assert_same(d4rl.load(path)[0], ds)


def test_missing_next_observations(tmp_path):
    ds = make((4, 3, 5), terminal=(1,))
    path = write(tmp_path / "x.hdf5", ds, drop=("next_observations",))
    got, _ = d4rl.load(path)
    # Rows 3 and 11 were cut, and what follows them is not known.
    kept = np.r_[0:3, 4:11]
    np.testing.assert_array_equal(got.obs, ds.obs[kept])
    np.testing.assert_array_equal(np.flatnonzero(got.terminal), [5])
    np.testing.assert_array_equal(np.flatnonzero(got.timeout), [2, 9])
    inside = ~(got.terminal | got.timeout)
    np.testing.assert_array_equal(
        got.next_obs[inside], got.obs[np.flatnonzero(inside) + 1]
    )
    np.testing.assert_array_equal(got.next_obs[2], ds.obs[3])
    np.testing.assert_array_equal(got.next_obs[9], ds.obs[11])


def test_missing_next_observations_of_single_rows(tmp_path):
    path = write(tmp_path / "x.hdf5", make((1, 1)), drop=("next_observations",))
    with pytest.raises(InputError, match="no episode of two rows"):
        d4rl.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ("terminals",)}, "no dataset 'terminals'"),
        ({"rewards": np.zeros(7)}, r"rewards has shape \(7,\) but observations has 12"),
        ({"costs": np.float32(1)}, "costs has shape"),
        ({"rewards": np.zeros((12, 2))}, "reward has shape"),
        ({"rewards": np.full(12, np.nan)}, "reward holds 12 NaN"),
        ({"actions": np.full((12, A), 3.0)}, "24 of 24 action values"),
        ({"observations": np.zeros((0, S))}, "no transitions"),
        ({"observations": np.float32(0)}, "no transitions"),
    ],
)
def test_bad_arrays_in_a_file(tmp_path, changes, message):
    path = write(tmp_path / "x.hdf5", make(), **changes)
    with pytest.raises(InputError, match=message) as told:
        data.load(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        data.load(tmp_path / "none.hdf5")
    text = tmp_path / "text.hdf5"
    text.write_text("not a dataset")
    whole = d4rl.save(tmp_path / "whole.hdf5", make((500,)), {}).read_bytes()
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty.hdf5"
    empty.touch()
    for path in (text, cut, empty):
        with pytest.raises(InputError, match="not a readable HDF5 file") as told:
            data.load(path)
        assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = d4rl.save(tmp_path / "x.hdf5", make(), {})
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        d4rl.save(path, make(seed=1), {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.hdf5"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make the folder"):
        d4rl.save(tmp_path / "file" / "x.hdf5", make(), {})


def test_load_selects_and_names_the_file(tmp_path):
    path = d4rl.save(tmp_path / "x.hdf5", make(), {})
    assert len(data.load(path, first=2).obs) == 7
    with pytest.raises(InputError, match=rf"asked for 50 trajectories, {path} has 3"):
        data.load(path, first=50)


def write_episode(path, steps=5, discount=1.0, seed=0, columns=True, **replaced):
    generator = np.random.default_rng(seed)
    shape = (steps + 1, 1) if columns else (steps + 1,)
    arrays = {
        "observation": generator.normal(size=(steps + 1, S)).astype(np.float32),
        "action": generator.uniform(-1, 1, (steps + 1, A)).astype(np.float32),
        "reward": generator.normal(size=shape).astype(np.float32),
        "discount": np.ones(shape, np.float32),
        "physics": np.zeros((steps + 1, 18)),
    }
    arrays["discount"][-1] = discount
    arrays |= replaced
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.mark.parametrize("columns", [True, False])
def test_episode_file_is_shifted_by_the_reset(tmp_path, columns):
    arrays = write_episode(tmp_path / "e.npz", discount=0.0, columns=columns)
    ds = data.load(tmp_path / "e.npz")
    np.testing.assert_array_equal(ds.obs, arrays["observation"][:-1])
    np.testing.assert_array_equal(ds.next_obs, arrays["observation"][1:])
    np.testing.assert_array_equal(ds.action, arrays["action"][1:])
    np.testing.assert_array_equal(ds.reward, arrays["reward"].reshape(-1)[1:])
    np.testing.assert_array_equal(ds.terminal, [0, 0, 0, 0, 1])
    assert not ds.timeout.any() and not ds.cost.any()


def test_episode_folder_in_number_order(tmp_path):
    for i in (10, 2, 0):
        write_episode(tmp_path / f"episode_{i}_7.npz", steps=i + 1, seed=i)
    ds = data.load(tmp_path)
    assert [s.stop - s.start for s in dataset.episode_slices(ds)] == [1, 3, 11]
    assert ds.timeout.sum() == 3
    assert_same(dmc.load(tmp_path, first=2), data.load(tmp_path, first=2))
    paths = [tmp_path / "episode_10_7.npz", tmp_path / "episode_0_7.npz"]
    assert len(dmc.load(paths).obs) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "no array 'reward'; the file holds action, discount"),
        ({"reward": np.zeros(3)}, "different lengths: observation 6, .* reward 3"),
        ({"reward": np.zeros((6, 2))}, r"reward has shape \(6, 2\)"),
        ({"observation": np.full((6, S), np.nan)}, "obs holds"),
        ({"action": np.full((6, A), 2.0)}, "10 of 10 action values"),
        ({"steps": 0}, "expected the reset and a step"),
        ({"reward": np.array([{}] * 6, dtype=object)}, "not a readable .npz"),
    ],
)
def test_bad_episode_files(tmp_path, changes, message):
    write_episode(tmp_path / "e.npz", **changes)
    with pytest.raises(InputError, match=message) as told:
        data.load(tmp_path / "e.npz")
    assert "e.npz" in str(told.value) and "\n" not in str(told.value)


def test_unreadable_episode_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        data.load(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no episode files"):
        data.load(tmp_path)
    with pytest.raises(InputError, match="list of episode files is empty"):
        dmc.load([])
    write_episode(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in {"text": b"text", "cut": whole[:200], "none": b""}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npz: not a readable .npz"):
            data.load(path)
    for first, message in ((9, "asked for 9 trajectories"), (0, "expected 1 or more")):
        with pytest.raises(InputError, match=message):
            dmc.load(tmp_path, first=first)


def test_normalisers():
    obs = np.random.default_rng(0).normal(3, 2, (1000, S)).astype(np.float32)
    obs[:, 1] = 5.0
    normaliser = normalise.fit(obs)
    z = normaliser(obs)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(0), [1, 0, 1], atol=1e-4)
    assert normaliser.mean.dtype == normaliser.std.dtype == np.float32
    assert normaliser.std[1] == np.float32(normalise.STD_FLOOR)
    assert normalise.fit(obs, 0.5).std[1] == 0.5
    np.testing.assert_array_equal(normalise.fit(obs, name="none")(obs), obs)
    with pytest.raises(InputError, match="unknown normaliser 'x'; choose from none"):
        normalise.fit(obs, name="x")


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("PSEC_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_dir() == tmp_path / "psec_jax" / "data"


def test_windows_stay_within_their_trajectory():
    n = 5
    ends = np.array([False, False, True, False, True])
    action = np.arange(2 * n, dtype=np.float32).reshape(n, 2) / 10
    zeros = np.zeros(n, np.float32)
    obs = np.zeros((n, 3), np.float32)
    ds = Dataset(obs, action, zeros, zeros, obs, ends, np.zeros(n, bool))
    np.testing.assert_array_equal(dataset.windows(ds, 1), action)
    rows = [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]
    np.testing.assert_array_equal(dataset.windows(ds, 3), action[rows].reshape(n, 6))
