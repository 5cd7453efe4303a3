"""DSRL's sets: where they lie, what is refused, normalisation, and their options."""

import os

import h5py
import numpy as np
import pytest
from shell import call
from test_data import assert_same
from test_download import serve  # noqa: F401, a fixture

from psec_jax import data
from psec_jax.data import d4rl, dataset, dsrl, sets, trajectories
from psec_jax.data.paths import data_dir
from psec_jax.errors import InputError
from psec_jax.types import Dataset

NAME = "OfflineBallRun-v0"
TASK = dsrl.TASKS[NAME]


def make(episodes=12, length=TASK.length, task=TASK, seed=0):
    """Walks whose speed is their return, and whose cost counts how often they are
    fast, as in the run tasks: the faster, the more of both."""
    generator = np.random.default_rng(seed)
    n = episodes * length
    speed = np.repeat(generator.uniform(0.2, 1.8, episodes), length)
    speed = (speed + generator.normal(0, 0.2, n)).astype(np.float32)
    states = np.cumsum(generator.normal(size=(n + 1, task.obs_dim)), 0, np.float32)
    return Dataset(
        obs=states[:-1],
        action=np.clip(generator.normal(size=(n, task.action_dim)), -1, 1, dtype="f4"),
        reward=10 * speed,
        cost=(speed > 1.5).astype(np.float32),
        next_obs=states[1:],
        terminal=np.zeros(n, bool),
        timeout=np.arange(n) % length == length - 1,
    )


def episodes(ds):
    return len(dataset.episode_slices(ds))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Empty folders of data, and no address to download from."""
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "dsrl"))
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "made"))
    monkeypatch.setattr(dsrl, "MIRRORS", ())
    return tmp_path


def write(path, ds, attrs=(), **replaced):
    """A file in the cache's layout; an array replaced by None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, key in d4rl.KEYS.items():
            value = replaced.get(key, getattr(ds, name))
            if value is not None:
                file[key] = value
        file.attrs.update(dict(attrs))
    return path


def official(ds=None, name=NAME, **replaced):
    path = dsrl.cache_dir() / dsrl.TASKS[name].file
    return write(path, make() if ds is None else ds, **replaced)


def test_table():
    assert len(dsrl.TASKS) == 17
    for name, task in dsrl.TASKS.items():
        assert task.min_return < task.max_return and task.max_cost > 0, name
        assert task.file.endswith(f"-{task.trajectories}.hdf5"), name
        short = name.removeprefix("Offline").split("-")
        assert task.spec.split(":")[1] in (f"Safety{short[0]}-v0", short[1]), name
        assert dsrl.task_of(f"x/{task.file}") == name
        assert dsrl.task_of(dsrl.made_name(name)) == name
        assert dsrl.names(name)
    assert dsrl.made_name(NAME) == "SafetyBallRun-v0-made.hdf5"
    easy = dsrl.made_name("OfflineMetadrive-easysparse-v0")
    assert easy == "SafeMetaDrive-easysparse-v0-made.hdf5"
    assert dsrl.task_of("other.hdf5") is None


def test_places(monkeypatch, tmp_path):
    assert dsrl.cache_dir() == tmp_path / "dsrl"
    monkeypatch.delenv("DSRL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dsrl.cache_dir() == tmp_path / ".dsrl" / "datasets"


def test_the_official_file_comes_first():
    with pytest.raises(InputError, match="no such file, and offline"):
        dsrl.find(NAME, offline=True)
    made = dsrl.save(NAME, make(seed=1), {"seed": 1})
    assert dsrl.find(NAME) == (made, "made")
    assert_same(data.load(NAME), make(seed=1))
    path = official(make(seed=2))
    assert dsrl.find(NAME) == (path, "official")
    assert data.locate(NAME) == path
    assert_same(data.load(NAME, offline=True), make(seed=2))
    # By its own name the made one is still there.
    assert_same(data.load(made), make(seed=1))


def test_nothing_there_says_what_to_do():
    for offline in (True, False):
        with pytest.raises(InputError) as told:
            data.load(NAME, offline=offline)
        for words in (
            f"put {TASK.file} into {dsrl.cache_dir()} by hand",
            f"python -m experiments.tools.collect_safe --task={NAME}",
        ):
            assert words in str(told.value)
        assert "\n" not in str(told.value)


def test_download(serve, monkeypatch, tmp_path, capsys):  # noqa: F811
    whole = write(tmp_path / "served.hdf5", make()).read_bytes()
    page, server = serve(kind="text/html"), serve(content=whole, cut=10_000)
    monkeypatch.setattr(dsrl, "MIRRORS", (page.url(""), server.url("")))
    with pytest.raises(InputError, match="web page.*connection broke after 10000"):
        data.load(NAME)
    server.cut = None
    assert_same(data.load(NAME), make())
    assert [path for path, _ in server.asked] == [f"/{TASK.file}"] * 2
    assert server.asked[-1][1] == "bytes=10000-"
    assert os.listdir(dsrl.cache_dir()) == [TASK.file]
    assert f"downloading {server.url(TASK.file)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>not found</html>", "gives something else: not a readable HDF5 file"),
        ("half", "gives something else: not a readable HDF5 file"),
        ("other", r"gives something else: observations have the shape \(300, 8\)"),
        ("bare", "gives something else: no dataset 'costs'"),
    ],
)
def test_downloads_that_are_not_the_set(
    serve,  # noqa: F811
    monkeypatch,
    tmp_path,
    content,
    words,
):
    if isinstance(content, str):
        path = tmp_path / "served.hdf5"
        circle = dsrl.TASKS["OfflineBallCircle-v0"]
        ds = make(3, task=circle) if content == "other" else make(3)
        write(path, ds, **{"costs": None} if content == "bare" else {})
        content = path.read_bytes()[: 4000 if content == "half" else None]
    monkeypatch.setattr(dsrl, "MIRRORS", (serve(content=content).url(""),))
    with pytest.raises(InputError, match=words) as told:
        dsrl.find(NAME)
    assert "\n" not in str(told.value)
    assert not [name for name in os.listdir(dsrl.cache_dir()) if name[-4:] == "part"]


def test_columns(places):
    ds = make()
    columns = {
        key: getattr(ds, name)[:, None].astype(np.float32)
        for name, key in d4rl.KEYS.items()
        if getattr(ds, name).ndim == 1
    }
    assert len(columns) == 4
    got, attrs = dsrl.load(official(ds, **columns))
    assert_same(got, ds)
    assert attrs == {}


BAD = {
    "no costs": ({"costs": None}, "no dataset 'costs'; the file holds actions"),
    "no next observations": ({"next_observations": None}, "no dataset 'next_obs"),
    "no timeouts": ({"timeouts": None}, "no dataset 'timeouts'"),
    "negative costs": (
        {"costs": np.r_[-np.ones(3), np.zeros(1197)]},
        r"3 of 1200 costs are negative \(least -1\)",
    ),
    "costs that are not numbers": ({"costs": np.full(1200, np.nan)}, "cost holds 1200"),
    "other observations": (
        {k: np.zeros((1200, 8)) for k in ("observations", "next_observations")},
        rf"observations have the shape \(1200, 8\), those of {NAME} \[N, 7\]",
    ),
    "other actions": (
        {"actions": np.zeros((1200, 3))},
        rf"actions have the shape \(1200, 3\), those of {NAME} \[N, 2\]",
    ),
    "long episodes": (
        {"timeouts": np.arange(1200) % 200 == 199},
        f"a trajectory has 200 steps, an episode of {NAME} at most 100",
    ),
    "another task": (
        {"attrs": {"task": "OfflineCarRun-v0"}},
        f"is a set of OfflineCarRun-v0, expected {NAME}",
    ),
    "a made set": (
        {"attrs": {"made_by": sets.MAKER}},
        "has the name of an official set, but is made by psec_jax",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets(name):
    changes, words = BAD[name]
    path = official(**changes)
    for source in (NAME, path):
        with pytest.raises(InputError, match=words) as told:
            data.load(source)
        assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_set_of_nobody_under_the_made_name():
    write(data_dir() / dsrl.made_name(NAME), make())
    with pytest.raises(InputError, match="name of a made set, but is not made by"):
        data.load(NAME)


def test_a_made_set_may_be_renamed(places):
    path = dsrl.save(NAME, make(), {}).rename(places / "mine.hdf5")
    got, attrs = dsrl.load(path)
    assert_same(got, make())
    assert attrs["task"] == NAME and attrs["environment"] == TASK.spec
    with h5py.File(path, "r+") as file:
        del file.attrs[d4rl.CHECKSUM]
        file.attrs["task"] = "OfflineCarCircle-v0"
    with pytest.raises(InputError, match="those of OfflineCarCircle-v0"):
        dsrl.load(path)
    with pytest.raises(InputError, match="those of OfflineCarCircle-v0"):
        data.load(path)  # what commands read by


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        (make(task=dsrl.TASKS["OfflineBallCircle-v0"]), "those of OfflineBallRun"),
        (make(length=101), "a trajectory has 101 steps"),
        (make()._replace(cost=np.full(1200, -1.0)), "1200 of 1200 costs are negative"),
    ],
)
def test_save_refuses(ds, words):
    with pytest.raises(InputError, match=words):
        dsrl.save(NAME, ds, {})
    assert not data_dir().exists()


def test_save_writes_costs_of_a_safe_set():
    safe = make()._replace(cost=np.zeros(1200, np.float32))
    dsrl.save(NAME, safe, {})
    assert_same(data.load(NAME, max_cost=0.0), safe)


@pytest.mark.parametrize("name", ["OfflineBalRun-v0", "OfflineBallRun", "Offline-x"])
def test_unknown_tasks_are_listed(name):
    with pytest.raises(InputError, match=f"unknown DSRL task '{name}'; .*{NAME}, "):
        data.load(name)


def test_paths_are_no_tasks(places, monkeypatch):
    monkeypatch.chdir(places)
    dsrl.save(NAME, make(), {}).rename("OfflineMine")
    assert_same(data.load("OfflineMine"), make())
    with pytest.raises(InputError, match="gone.hdf5: no such file"):
        data.load("gone.hdf5")


def test_costs_are_asked_for_where_they_matter(places):
    bare = write(places / "bare.hdf5", make(), costs=None)
    assert not data.load(bare).cost.any()
    for asked in ({"with_costs": True}, {"max_cost": 10.0}, {"cost_quantile": 0.5}):
        with pytest.raises(InputError, match="no dataset 'costs'"):
            data.load(bare, **asked)
    np.savez(places / "episode.npz")
    with pytest.raises(InputError, match="episode files hold no costs"):
        data.load(places / "episode.npz", with_costs=True)
    below = write(places / "below.hdf5", make(), costs=np.full(1200, -1.0))
    with pytest.raises(InputError, match="1200 of 1200 costs are negative"):
        data.load(below)


def test_normalisation():
    low, high = TASK.min_return, TASK.max_return
    got = dsrl.normalised_return(NAME, np.array([low, (low + high) / 2, high]))
    np.testing.assert_allclose(got, [0, 0.5, 1])
    costs = np.array([0, 5, 20])
    np.testing.assert_array_equal(dsrl.normalised_cost(costs, 10.0), [0, 0.5, 2])
    np.testing.assert_array_equal(dsrl.normalised_cost(costs, 0.0), [1, 6, 21])
    for limit in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="cost limit: got .*, expected 0 or more"):
            dsrl.normalised_cost(costs, limit)
    with pytest.raises(InputError, match="unknown DSRL task 'x'"):
        dsrl.normalised_return("x", costs)


def plane(costs, returns):
    """Trajectories of two steps with these sums."""
    n = 2 * len(costs)
    halves = [np.repeat(np.asarray(x, np.float32) / 2, 2) for x in (costs, returns)]
    return Dataset(
        obs=np.arange(n, dtype=np.float32)[:, None],
        action=np.zeros((n, 1), np.float32),
        reward=halves[1],
        cost=halves[0],
        next_obs=np.arange(1, n + 1, dtype=np.float32)[:, None],
        terminal=np.zeros(n, bool),
        timeout=np.arange(n) % 2 == 1,
    )


def numbers(ds):
    """Which trajectories of `plane` are there."""
    return [int(ds.obs[rows.start, 0]) // 2 for rows in dataset.episode_slices(ds)]


COSTS, RETURNS = [0, 4, 8, 12, 16, 20], [1, 5, 3, 9, 2, 8]


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"max_cost": 8.0}, [0, 1, 2]),
        ({"cost_quantile": 0.4}, [0, 1, 2]),
        ({"cost_quantile": 0.0}, [0]),
        ({"return_quantile": 0.8}, [3, 5]),
        ({"max_cost": 8.0, "return_quantile": 0.5}, [1, 2]),
        ({"max_cost": 8.0, "return_quantile": 1.0}, [1]),
        ({"max_cost": 8.0, "best": 1}, [1]),
        ({"max_cost": 12.0, "cost_quantile": 0.4, "min_return": 2.0}, [1, 2]),
        ({"max_cost": 0.0}, [0]),
    ],
)
def test_selection_for_a_gate(asked, kept):
    assert numbers(dataset.select(plane(COSTS, RETURNS), **asked)) == kept


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"max_cost": 10.0},
            "FILE: no trajectory with cost <= 10 among 6; the least co",
        ),
        (
            {"max_cost": 10.0, "best": 2},
            "FILE has 0 with cost <= 10; the least cost is 11",
        ),
        ({"max_cost": 10.0}, "a gate would imitate trajectories that break it"),
        ({"max_cost": 10.0, "return_quantile": 0.5}, "the least cost is 11"),
        ({"max_cost": 11.0, "min_return": 9.0}, "<= 11 and return >= 9 among 6$"),
        ({"return_quantile": 1.5}, "return_quantile: got 1.5, expected 0 to 1"),
        ({"cost_quantile": np.nan}, "cost_quantile: got nan, expected a number"),
    ],
)
def test_selection_without_a_safe_trajectory(asked, words):
    unsafe = plane(np.add(COSTS, 11), RETURNS)
    with pytest.raises(InputError, match=words) as told:
        dataset.select(unsafe, **asked, source="FILE")
    assert "\n" not in str(told.value)


def test_split():
    ds = make(3, length=10)._replace(terminal=np.arange(30) == 19)
    ds = ds._replace(timeout=ds.timeout & ~ds.terminal)
    pieces = trajectories.split(ds, 4)
    lengths = [rows.stop - rows.start for rows in dataset.episode_slices(pieces)]
    assert lengths == [4, 4, 2] * 3
    assert_same(pieces._replace(timeout=ds.timeout), ds)
    assert pieces.terminal[19] and not pieces.timeout[19]
    assert_same(trajectories.split(ds, 10), ds)
    np.testing.assert_array_equal(trajectories.split(ds, 5).timeout[4::10], True)
    assert episodes(trajectories.split(ds, 1)) == 30
    with pytest.raises(InputError, match="pieces of 0 steps"):
        trajectories.split(ds, 0)


def test_share():
    ds = plane(np.arange(20), np.arange(20))
    fifth, half = trajectories.share(ds, 0.2), trajectories.share(ds, 0.5)
    assert len(numbers(fifth)) == 4 and len(numbers(half)) == 10
    assert set(numbers(fifth)) < set(numbers(half))
    assert numbers(half) == sorted(numbers(half))
    assert numbers(trajectories.share(ds, 0.5)) == numbers(half)
    assert numbers(trajectories.share(ds, 0.5, seed=1)) != numbers(half)
    assert len(numbers(trajectories.share(ds, 0.001))) == 1
    assert_same(trajectories.share(ds, 1.0), ds)
    for part in (0.0, 1.1, -1.0, np.nan):
        with pytest.raises(InputError, match="share of trajectories"):
            trajectories.share(ds, part)


def test_density():
    crowd = [0.0] * 9 + [5.0] * 2 + [10.0] * 3  # nine, two and three at one point
    ds = plane(crowd, crowd)
    kept = numbers(trajectories.apply_filter(ds, "density"))
    assert len([i for i in kept if i < 9]) == 5
    assert [i for i in kept if i >= 9] == [11, 12, 13]
    assert kept == numbers(trajectories.apply_filter(ds, "density"))
    assert kept != numbers(trajectories.apply_filter(ds, "density", seed=1))
    options = {"most": 1, "least": 1, "cost_cells": 1, "return_cells": 1}
    assert len(numbers(trajectories.apply_filter(ds, "density", **options))) == 1
    with pytest.raises(InputError, match="filter density: most is 0"):
        trajectories.apply_filter(ds, "density", most=0)
    with pytest.raises(InputError, match="filter density: leaves none of 14"):
        trajectories.apply_filter(ds, "density", least=10)


def test_outliers():
    generator = np.random.default_rng(0)
    costs, returns = generator.normal(50, 5, 60), generator.normal(100, 5, 60)
    costs[7], returns[33] = 150, -300
    ds = plane(costs, returns)
    kept = numbers(trajectories.apply_filter(ds, "outliers"))
    assert set(range(60)) - set(kept) == {7, 33}
    even = 0.1 * np.arange(20)  # most distances are equal, but for rounding
    few = plane(COSTS[:5], RETURNS[:5])
    for crowd in (few, plane([1] * 9, [2] * 9), plane(even, even)):
        assert_same(trajectories.apply_filter(crowd, "outliers"), crowd)
    with pytest.raises(InputError, match="neighbours is 0"):
        trajectories.apply_filter(ds, "outliers", neighbours=0)


@pytest.mark.parametrize("name", trajectories.FILTERS)
def test_filters_keep_whole_trajectories(name):
    ds = make(60, length=5)
    kept = trajectories.apply_filter(ds, name)
    assert 0 < episodes(kept) <= 60 and len(kept.obs) == 5 * episodes(kept)
    assert_same(dataset.check(kept, "kept"), kept)
    with pytest.raises(
        InputError, match="unknown filter 'x'; choose from density, out"
    ):
        trajectories.apply_filter(ds, "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"--data={NAME}", "--offline"), "no such file, and offline"),
        (("--data=OfflineBalRun-v0",), "unknown DSRL task 'OfflineBalRun-v0'"),
    ],
)
def test_stages_take_tasks(places, arguments, words):
    workdir, library = places / "run", places / "library"
    answer = call(
        "launch.pretrain", f"--workdir={workdir}", f"--library={library}", *arguments
    )
    assert answer.code == 2 and words in answer.err
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert not workdir.exists() and not library.exists()
