"""Minari's datasets, written and read through its own package."""

import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
from shell import call
from test_data import assert_same, make

from psec_jax import data
from psec_jax.data import minari
from psec_jax.errors import InputError

package = pytest.importorskip("minari", reason="run: pip install 'psec_jax[minari]'")
spaces = pytest.importorskip("gymnasium").spaces
NAME = "minari:mine/walks-v0"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An empty folder of datasets, and nowhere to download from."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://here")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sets"


def write(name=NAME, actions=(-1.0, 1.0), observation=None, **changes):
    """A dataset of one episode as others write them."""
    episode = {
        "observations": np.arange(8.0).reshape(4, 2),
        "actions": np.array([[0.0], [2.0], [4.0]], np.float32),
        "rewards": [1.0, 2.0, 3.0],
        "terminations": [False, False, False],
        "truncations": [False, False, True],
        "infos": None,
    } | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no author, no description ...
        package.create_dataset_from_buffers(
            name.removeprefix("minari:"),
            [package.data_collector.EpisodeBuffer(**episode)],
            observation_space=observation or spaces.Box(-np.inf, np.inf, (2,)),
            action_space=spaces.Box(*np.array(actions, np.float32), (1,)),
        )


def test_written_and_read_again(places):
    ds = make((4, 3, 5), terminal=(1,))
    folder = minari.save("mine/walks-v0", ds, "Walker2d-v5")
    assert folder == places / "mine" / "walks-v0"
    assert os.listdir(folder.parent) == ["walks-v0"]
    for source in (NAME, folder):
        got, attrs = data.read(source, offline=True)
        assert_same(got, ds)
    assert attrs["dataset_id"] == "mine/walks-v0"
    assert attrs["minari_version"] == package.__version__
    assert attrs["environment"] == "gymnasium:Walker2d-v5"
    assert attrs["action_units"] == "scaled" and attrs["max_steps"] == 1000
    assert data.locate(NAME) == folder
    assert data.environment(folder) == "gymnasium:Walker2d-v5"
    # Minari sees it as one of its own.
    assert list(package.list_local_datasets()) == ["mine/walks-v0"]
    theirs = package.load_dataset("mine/walks-v0")
    assert (theirs.total_episodes, theirs.total_steps) == (3, 12)
    assert theirs.env_spec.id == "Walker2d-v5"
    episode = theirs[1]
    np.testing.assert_array_equal(episode.observations[1:], ds.next_obs[4:7])
    assert episode.terminations[-1] and not episode.truncations.any()


def test_costs_are_kept():
    ds = make()._replace(cost=np.arange(12, dtype=np.float32))
    minari.save("mine/walks-v0", ds)
    assert_same(data.load(NAME, max_cost=1e9), ds)
    below = ds._replace(cost=-ds.cost)
    minari.save("mine/below-v0", below)
    with pytest.raises(InputError, match="11 of 12 costs are negative"):
        data.load("minari:mine/below-v0")
    minari.save("mine/free-v0", make())
    with pytest.raises(InputError, match="free-v0: holds no costs"):
        data.load("minari:mine/free-v0", with_costs=True)


def test_a_set_of_another_author():
    write(actions=(0.0, 4.0))
    ds, attrs = data.read(NAME)
    np.testing.assert_array_equal(ds.action[:, 0], [-1, 0, 1])  # of [0, 4]
    np.testing.assert_array_equal(ds.obs, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(ds.next_obs, [[2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(ds.reward, [1, 2, 3])
    assert list(ds.timeout) == [False, False, True] and not ds.terminal.any()
    assert "environment" not in attrs


def test_an_end_that_is_not_told_is_a_timeout():
    write(truncations=[False] * 3, infos={"cost": np.array([1.0, 2.0, 3.0])})
    ds, _ = data.read(NAME, clip_actions=True)
    assert list(ds.timeout) == [False, False, True]
    np.testing.assert_array_equal(ds.cost, [1, 2, 3])  # no entry of the reset


def test_mujoco_sets_come_with_a_warning(capsys):
    minari.save("mujoco/halfcheetah/medium-v0", make())
    answer = call(
        "experiments.tools.dataset_card",
        "--data=minari:mujoco/halfcheetah/medium-v0",
        "--out=card",
    )
    assert answer.code == 0 and "(Minari dataset)" in answer.out
    assert answer.err.count("\n") == 1 and "are not D4RL v2" in answer.err
    assert "without reference scores" in answer.err
    minari.save("mine/walks-v0", make())
    data.read(NAME)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"2 of 3 action values lie outside \[-1, 1\]"),
        ({"actions": (-np.inf, np.inf)}, "expected a bounded Box"),
        (
            {"observation": spaces.Box(0, 1, (2, 1))},
            r"episode 0 are not Box.* \(got shape \(2,\), expected \(2, 1\)\)",
        ),
        ({"observation": spaces.Discrete(3)}, "episode 0 are not Discrete"),
        (
            {"observations": np.zeros((3, 2))},
            r"episode 0 has \(3,\) observations, \(3,\) actions and 3 rewards",
        ),
        ({"rewards": [1.0, np.nan, 2.0]}, "reward holds 1 NaN"),
    ],
)
def test_refused(changes, words):
    write(**changes)
    with pytest.raises(InputError, match=words) as told:
        data.load(NAME)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["x", "../x-v0", "a/b", "a//b-v0", "", "/etc-v0"])
def test_malformed_names(name, places):
    with pytest.raises(InputError, match=r"expected minari:\(NAMESPACE/\)NAME-vNUMBER"):
        data.load(f"minari:{name}")
    with pytest.raises(InputError, match="expected minari:"):
        minari.save(name, make())
    assert not places.exists()


def test_not_there():
    with pytest.raises(InputError, match="mine/walks-v0: not in .*, and offline"):
        data.load(NAME, offline=True)
    with pytest.raises(InputError, match=r"cannot be downloaded \(KeyError: 'nowh"):
        data.load(NAME)


def test_half_a_dataset(places):
    write()
    shutil.rmtree(places / "mine" / "walks-v0" / "data")
    with pytest.raises(InputError, match="holds no data/metadata.json: half a dataset"):
        data.load(NAME)
    with pytest.raises(InputError, match="no data/metadata.json"):
        minari.load(places)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "main_data.hdf5").write_bytes(b"no HDF5"),
        lambda folder: (folder / "main_data.hdf5").unlink(),
        lambda folder: (folder / "metadata.json").write_text("{"),
        lambda folder: (folder / "metadata.json").write_text("{}"),
    ],
)
def test_damaged(places, break_it):
    write(actions=(0.0, 4.0))
    break_it(places / "mine" / "walks-v0" / "data")
    with pytest.raises(InputError) as told:
        data.load(NAME)
    assert "walks-v0" in str(told.value) and "\n" not in str(told.value)


def test_of_another_minari(places):
    write(actions=(0.0, 4.0))
    path = places / "mine" / "walks-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | {"minari_version": "9.0.0"}
    path.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="not a readable Minari dataset .*9.0.0"):
        data.load(NAME)


def test_what_cannot_be_written(places):
    ds = make()
    shuffled = ds._replace(obs=ds.obs[::-1].copy())
    with pytest.raises(InputError, match="row 0 leads to another observation than th"):
        minari.save("mine/walks-v0", shuffled)
    with pytest.raises(InputError, match="environment 'Luck-v0'"):
        minari.save("mine/walks-v0", ds, "Luck-v0")
    assert not places.joinpath("mine").exists()
    minari.save("mine/walks-v0", ds)
    with pytest.raises(InputError, match="is there already"):
        minari.save("mine/walks-v0", make(seed=1))
    assert_same(data.load(NAME), ds)
    (places / "file").touch()
    with pytest.raises(InputError, match="minari:file/x-v0: "):
        minari.save("file/x-v0", ds)


def test_a_failed_write_leaves_nothing(places, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    storage = package.dataset._storages.get_minari_storage("hdf5")
    monkeypatch.setattr(storage, "update_episodes", full)
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        minari.save("mine/walks-v0", make())
    assert os.listdir(places / "mine") == []


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for attempt in (lambda: data.load(NAME), lambda: minari.save("a-v0", make())):
        with pytest.raises(InputError, match=r"pip install 'psec_jax\[minari\]'"):
            attempt()
