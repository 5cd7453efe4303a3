"""D4RL's sets: names and places, what is refused, scores, and the cut of a target."""

import os
import sys

import h5py
import numpy as np
import pytest
from shell import call
from test_data import assert_same
from test_download import serve  # noqa: F401, a fixture

from psec_jax import data
from psec_jax.data import d4rl, d4rl_sets, dataset, sets, trajectories
from psec_jax.data.paths import data_dir
from psec_jax.envs import shifted
from psec_jax.errors import InputError
from psec_jax.types import Dataset

NAME = "halfcheetah-medium-v2"
FILE = "halfcheetah_medium-v2.hdf5"
HEIGHTS = {"halfcheetah": -0.1, "walker2d": 1.2, "hopper": 1.2}


def make(name=NAME, lengths=(40, 40, 40), terminal=(), seed=0):
    """Random walks about the height of the set's robot."""
    task = d4rl_sets.TASKS[name]
    generator = np.random.default_rng(seed)
    n, ends = sum(lengths), np.cumsum(lengths) - 1
    ended = np.isin(np.arange(n), ends[list(terminal)])
    obs = generator.normal(0, 0.1, (n, task.obs_dim)).astype("f4")
    obs[:, 0] += HEIGHTS[task.robot]
    after = generator.normal(0, 0.1, obs.shape).astype("f4")
    inside = ~np.isin(np.arange(n), ends)
    after[inside] = obs[1:][inside[:-1]]
    return Dataset(
        obs=obs,
        action=generator.uniform(-1, 1, (n, task.action_dim)).astype("f4"),
        reward=generator.uniform(0, 10, n).astype("f4"),
        cost=np.zeros(n, np.float32),
        next_obs=after,
        terminal=ended,
        timeout=np.isin(np.arange(n), ends) & ~ended,
    )


def write(path, ds, attrs=(), **replaced):
    """A file as D4RL v2 has them, infos among the keys; None leaves an array out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, key in d4rl.KEYS.items():
            value = replaced.get(key, getattr(ds, name))
            if value is not None and name != "cost":
                file[key] = value
        file["infos/qpos"] = np.zeros((len(ds.obs), 9))
        file["metadata/algorithm"] = "SAC"
        file.attrs.update(dict(attrs))
    return path


def official(ds=None, name=NAME, **replaced):
    path = d4rl_sets.cache_dir() / d4rl_sets.TASKS[name].file
    return write(path, make(name) if ds is None else ds, **replaced)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Empty folders of data, and no address to download from."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "made"))
    monkeypatch.setattr(d4rl_sets, "MIRRORS", ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_table():
    assert len(d4rl_sets.TASKS) == 3 * 6 + 2 * 3
    for name, task in d4rl_sets.TASKS.items():
        robot = d4rl_sets.ROBOTS[task.robot]
        assert (task.obs_dim, task.action_dim) == (robot.obs_dim, robot.action_dim)
        assert d4rl_sets.names(name) and name.startswith(task.robot)
        assert d4rl_sets.task_of(f"x/{d4rl_sets.made_name(name)}") == name
        assert shifted(task.spec) == task.spec
        source = name.endswith("-source")
        assert (task.file == "") == source == ("@" in task.spec)
        assert d4rl_sets.task_of(task.file or ".") == (None if source else name)
    replay = d4rl_sets.TASKS["walker2d-medium-replay-v2"]
    assert replay.file == "walker2d_medium_replay-v2.hdf5"
    assert replay.spec == "gymnasium:Walker2d-v5"
    assert replay.d4rl_environment == "Walker2d-v2"
    assert d4rl_sets.made_name(NAME) == "halfcheetah-medium-made.hdf5"
    friction = d4rl_sets.TASKS["walker2d-friction-source"]
    assert friction.spec == "gymnasium:Walker2d-v5@friction:0.5"
    thigh = d4rl_sets.TASKS["halfcheetah-thigh_size-source"]
    assert thigh.spec == "gymnasium:HalfCheetah-v5@thigh_size:2"


def test_places(monkeypatch, tmp_path):
    assert d4rl_sets.cache_dir() == tmp_path / "d4rl"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert d4rl_sets.cache_dir() == tmp_path / ".d4rl" / "datasets"


def test_the_official_file_comes_first():
    made = d4rl_sets.save(NAME, make(seed=1), {"seed": 1})
    assert d4rl_sets.find(NAME) == (made, "made")
    assert_same(data.load(NAME), make(seed=1))
    _, attrs = data.read(made)
    assert attrs["environment"] == "gymnasium:HalfCheetah-v5"
    assert attrs["d4rl_environment"] == "HalfCheetah-v2"
    path = official(make(seed=2))
    assert d4rl_sets.find(NAME) == (path, "official")
    assert data.locate(NAME) == path
    assert_same(data.load(NAME, offline=True), make(seed=2))
    assert_same(data.load(made), make(seed=1))


@pytest.mark.parametrize("name", [NAME, "walker2d-gravity-source"])
def test_nothing_there_says_what_to_do(name):
    for offline in (True, False):
        with pytest.raises(InputError) as told:
            data.load(name, offline=offline)
        assert f"python -m experiments.tools.collect_d4rl --set={name}" in str(
            told.value
        )
        assert (f"put {FILE} into" in str(told.value)) == (name == NAME)
        assert "\n" not in str(told.value)


def test_download(serve, monkeypatch, tmp_path):  # noqa: F811
    whole = write(tmp_path / "served.hdf5", make()).read_bytes()
    server = serve(content=whole)
    monkeypatch.setattr(d4rl_sets, "MIRRORS", (server.url(""),))
    assert_same(data.load(NAME), make())
    assert server.asked[0][0] == f"/{FILE}"
    assert os.listdir(d4rl_sets.cache_dir()) == [FILE]
    older = write(tmp_path / "older.hdf5", make(), next_observations=None)
    server.content = older.read_bytes()
    with pytest.raises(InputError, match="no dataset 'next_observations', as in D4RL"):
        data.load("walker2d-medium-v2")
    assert [f for f in os.listdir(d4rl_sets.cache_dir()) if f[0] != "."] == [FILE]


BAD = {
    "v0": ({"next_observations": None}, "no dataset 'next_observations', as in D4RL v"),
    "no timeouts": ({"timeouts": None}, "no dataset 'timeouts', as in D4RL v0; the fi"),
    "another robot": (
        {"ds": make("hopper-medium-v2")},
        rf"observations have the shape \(120, 11\), those of {NAME} \[N, 17\]",
    ),
    "another robot of the same sizes": (
        {"ds": make("walker2d-medium-v2")},
        "has the median 1.2., a halfcheetah's is -0.75 to 0.75: a set of another robot",
    ),
    "another set": (
        {"attrs": {"task": "halfcheetah-expert-v2"}},
        f"is a set of halfcheetah-expert-v2, expected {NAME}",
    ),
    "a made set": (
        {"attrs": {"made_by": sets.MAKER}},
        "has the name of an official set, but is made by psec_jax",
    ),
    "loud": ({"actions": np.full((120, 6), 2.0)}, "720 of 720 action values lie outs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets(name):
    changes, words = BAD[name]
    path = official(**changes)
    for source in (NAME, path):
        with pytest.raises(InputError, match=words) as told:
            data.load(source)
        assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_save_refuses():
    with pytest.raises(InputError, match="a set of another robot"):
        d4rl_sets.save("walker2d-gravity-source", make(), {})
    assert not data_dir().exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("halfcheetah-middling-v2", "unknown D4RL set 'halfcheetah-middling-v2'; choo"),
        ("halfcheetah-medium", "unknown D4RL set 'halfcheetah-medium'; choose from"),
        ("ant-medium-v2", "choose from halfcheetah-expert-v2, "),
        ("walker2d-wind-source", "walker2d-friction-source"),
        ("halfcheetah-medium-v0", "first versions .*expected halfcheetah-medium-v2"),
        ("halfcheetah-medium-replay-v1", "expected halfcheetah-medium-replay-v2"),
    ],
)
def test_unknown_names(name, words):
    answer = call("experiments.tools.dataset_card", f"--data={name}", "--out=card")
    assert answer.code == 2 and answer.err.count("\n") == 1
    with pytest.raises(InputError, match=words):
        data.load(name)


def test_paths_are_no_names(places):
    d4rl_sets.save(NAME, make(), {}).rename("my-source")
    assert_same(data.load("my-source"), make())
    with pytest.raises(InputError, match="gone-v2.hdf5: no such file"):
        data.load("gone-v2.hdf5")


def test_simulators_and_costs():
    assert data.environment(NAME) == "gymnasium:HalfCheetah-v5"
    made = d4rl_sets.save("walker2d-friction-source", make("walker2d-medium-v2"), {})
    assert data.environment(made) == "gymnasium:Walker2d-v5@friction:0.5"
    assert data.environment("other.hdf5") is None
    for asked in ({"with_costs": True}, {"max_cost": 1.0}):
        with pytest.raises(InputError, match="no dataset 'costs'"):
            data.load(made, **asked)


@pytest.mark.parametrize("name", ["halfcheetah", NAME, "halfcheetah-friction-source"])
def test_scores(name):
    low, high = -280.178953, 12135.0
    got = d4rl_sets.normalised_score(name, np.array([low, (low + high) / 2, high]))
    np.testing.assert_allclose(got, [0, 50, 100])
    assert d4rl_sets.normalised_score("walker2d", 1.629008) == 0
    assert d4rl_sets.normalised_score("hopper", 3234.3) == pytest.approx(100)
    with pytest.raises(InputError, match="unknown D4RL set 'cheetah'"):
        d4rl_sets.normalised_score("cheetah", 0.0)


def customary(ds):
    """`qlearning_dataset` of D4RL, of a file's raw arrays, but for next observations
    at true ends, which nothing reads."""
    rows = [i for i in range(len(ds.obs) - 1) if not ds.timeout[i]]
    return ds.obs[rows], ds.obs[np.add(rows, 1)], ds.terminal[rows]


def test_rows_of_the_customary_view(tmp_path, capsys):
    ds = make("walker2d-medium-v2", (40, 30, 20, 10), terminal=(1, 3))
    obs, after, ended = customary(ds)
    # v2: the rows at a timeout and a true end in last place come on top.
    kept, _ = d4rl.load(write(tmp_path / "x.hdf5", ds))
    assert capsys.readouterr().err == ""
    assert len(kept.obs) == 100 == len(obs) + 2 + 1
    same = ~kept.timeout & (np.arange(100) < 99)
    np.testing.assert_array_equal(kept.obs[same], obs)
    np.testing.assert_array_equal(kept.terminal[same], ended)
    np.testing.assert_array_equal(kept.next_obs[same][~ended], after[~ended])
    # v0 with timeouts: the same rows, and the last one.
    path = write(tmp_path / "older.hdf5", ds, next_observations=None)
    kept, _ = d4rl.load(path)
    told = capsys.readouterr().err
    assert told.startswith(f"{path}: no next_observations, as in D4RL v0")
    assert "2 rows at a cut are dropped" in told and told.count("\n") == 1
    np.testing.assert_array_equal(kept.obs[:-1], obs)
    np.testing.assert_array_equal(kept.terminal[:-1], ended)
    np.testing.assert_array_equal(kept.next_obs[:-1][~ended], after[~ended])
    assert kept.terminal[-1]


def test_a_file_without_timeouts_says_how_episodes_end(tmp_path, capsys):
    ds = make("walker2d-medium-v2", (40, 30, 20), terminal=(0,))
    path = write(tmp_path / "x.hdf5", ds, timeouts=None)
    got, _ = data.read(path)
    told = capsys.readouterr().err
    assert told.startswith(
        f"{path}: no timeouts: episodes end at 1 terminals, at 1 rows whose next "
        "observation does not lead on, and at the last row\n"
    )
    assert dataset.episode_slices(got) == dataset.episode_slices(ds)
    np.testing.assert_array_equal(got.next_obs, ds.next_obs)
    both = write(tmp_path / "y.hdf5", ds, timeouts=None, next_observations=None)
    with pytest.raises(InputError, match="neither timeouts nor next_observations, as"):
        data.read(both)


def test_cut():
    ds = make(lengths=(10, 20, 30, 40), terminal=(1, 3))
    got = trajectories.cut(ds, 45, seed=3)
    assert len(got.obs) == 45
    assert_same(dataset.check(got, "cut"), got)
    assert_same(trajectories.cut(ds, 45, seed=3), got)
    assert not np.array_equal(trajectories.cut(ds, 45, seed=4).obs, got.obs)
    # Whole trajectories, but for the last, in the order drawn.
    starts = [int(np.flatnonzero((ds.obs == row).all(1))[0]) for row in got.obs]
    assert sorted(starts) == sorted(set(starts))
    of = np.searchsorted([10, 30, 60, 100], starts, side="right")
    slices = dataset.episode_slices(got)
    assert [len(set(of[rows])) for rows in slices] == [1] * len(slices)
    for rows in slices[:-1]:
        assert rows.stop - rows.start == 10 * (of[rows.start] + 1)
    assert list(dict.fromkeys(of)) != sorted(set(of))
    np.testing.assert_array_equal(got.terminal, ds.terminal[starts])
    assert got.timeout[-1] and not ds.timeout[starts[-1]]
    # A smaller cut is the beginning of a larger one; a cut to all drops nothing.
    np.testing.assert_array_equal(trajectories.cut(ds, 20, seed=3).obs, got.obs[:20])
    assert len(dataset.episode_slices(trajectories.cut(ds, 100))) == 4
    assert ds.timeout.sum() == 2  # the set itself is as it was


def test_cut_at_a_true_end():
    ds = make(lengths=(10,), terminal=(0,))
    whole = trajectories.cut(ds, 10)
    assert_same(whole, ds)


@pytest.mark.parametrize(
    ("transitions", "words"),
    [(121, "a cut to 121 transitions asked for, the set has 120"), (0, "0 transitio")],
)
def test_cut_refuses(transitions, words):
    with pytest.raises(InputError, match=words):
        trajectories.cut(make(), transitions)


def test_card():
    d4rl_sets.save(NAME, make(), {"medium": "a third of the expert's score"})
    answer = call("experiments.tools.dataset_card", f"--data={NAME}", "--out=card")
    assert answer.code == 0, answer.err
    page = (data_dir().parent / "card" / "card.md").read_text()
    assert page.startswith(f"# {NAME}\n") and "| normalised score |" in page
    assert "a third of the expert's score" in page and "cost" not in page
    answer = call(
        "experiments.tools.dataset_card", f"--data={official()}", "--out=card"
    )
    assert "(official D4RL file)" in answer.out and "cost" not in answer.out


def test_check_against_d4rl_wants_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym", None)
    options = (f"--data={official()}", f"--set={NAME}")
    answer = call("experiments.tools.check_d4rl", *options)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "experiments/tools/check_d4rl.py says how" in answer.err
    options = (options[0], "--set=halfcheetah-friction-source")
    assert "no set of D4RL's own" in call("experiments.tools.check_d4rl", *options).err
