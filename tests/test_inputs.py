"""What data say of themselves: units, ends, names, order; over generated variants."""

import contextlib
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from psec_jax import data, envs
from psec_jax.data import d4rl, dataset, keywords, spaces
from psec_jax.data.actions import FEW, ActionBox
from psec_jax.data.recording import Recording
from psec_jax.errors import InputError

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'psec_jax[gymnasium]'")
S, N = 3, 12
many = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def trajectories(lengths, seed=0):
    """Observations, next observations and the last rows of trajectories."""
    generator = np.random.default_rng(seed)
    walks = [generator.normal(size=(n + 1, S)).astype("f4") for n in lengths]
    ends = np.zeros(sum(lengths), bool)
    ends[np.cumsum(lengths) - 1] = True
    obs = np.concatenate([walk[:-1] for walk in walks])
    return obs, np.concatenate([walk[1:] for walk in walks]), ends


def write(path, arrays, attrs=None):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file.attrs.update(attrs or {})
    return path


def arrays(action, lengths=(5, 4, 3)):
    obs, next_obs, ends = trajectories(lengths)
    return {
        "observations": obs,
        "next_observations": next_obs,
        "actions": action,
        "rewards": np.arange(len(obs), dtype="f4"),
        "terminals": np.zeros(len(obs), bool),
        "timeouts": ends,
    }


def write_episodes(folder, action):
    """The same as a folder of episode files, which have no attributes."""
    folder.mkdir(exist_ok=True)
    table = arrays(action)
    ends = [0, *(np.flatnonzero(table["timeouts"]) + 1)]
    for i, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        obs = np.concatenate(
            [table["observations"][a:b], table["next_observations"][b - 1 : b]]
        )
        rows = np.concatenate([action[:1], action[a:b]])
        zeros = np.zeros(len(obs), "f4")
        np.savez(
            folder / f"{i}.npz",
            observation=obs,
            action=rows,
            reward=zeros,
            discount=zeros + 1,
        )
    return folder


DOORS = {
    "hdf5": lambda root, action, attrs: write(root / "x.hdf5", arrays(action), attrs),
    "npz": lambda root, action, attrs: write_episodes(root / "npz", action),
}


EDGES = [-3.0, -2.0, -1.0, -0.4, 0.0, 0.4, 0.5, 1.0, 2.0, 3.0]
PAIRS = [(low, high) for low in EDGES for high in EDGES if low < high]


def sides(size=2):
    return st.lists(st.sampled_from(PAIRS), min_size=size, max_size=size)


def box_of(pairs):
    return ActionBox.of(*zip(*pairs, strict=True))


def environment(box, **more):
    return Recording("gymnasium:X-v0", (S, len(box.low)), "scaled", box, **more)


def scaled_actions(seed, part):
    """Actions in [-1, 1], of which a part of the range is used."""
    return part * np.random.default_rng(seed).uniform(-1, 1, (N, 2))


@many
@given(
    pairs=sides(),
    door=st.sampled_from(sorted(DOORS)),
    stored=st.sampled_from(["env", "scaled"]),
    known=st.sampled_from(["nothing", "units", "requested"]),
    seed=st.integers(0, 99),
    part=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_units_are_never_silently_wrong(
    tmp_path, pairs, door, stored, known, seed, part
):
    assume(door == "hdf5" or known != "units")
    box = box_of(pairs)
    scaled = scaled_actions(seed, part)
    action = scaled if stored == "scaled" else box.to_env(scaled)
    attrs = {"action_units": stored} if known == "units" else {}
    path = DOORS[door](tmp_path, action.astype("f4"), attrs)
    options = {"actions": stored} if known == "requested" else {}
    try:
        ds, attrs = data.read(path, env=environment(box), **options)
    except InputError as error:
        assert known == "nothing" and "--actions=env or --actions=scaled" in str(error)
        assert box != ActionBox.unit(2) and "\n" not in str(error)
    else:
        np.testing.assert_allclose(ds.action, scaled, atol=1e-5)
        assert ActionBox.of(attrs["action_low"], attrs["action_high"]) == box
        assert attrs["action_units"] == "scaled"


@many
@given(sides(), sides(), st.integers(0, 99), st.booleans())
def test_another_box_keeps_the_physical_action(tmp_path, recorded, pairs, seed, scaled):
    recorded, box = box_of(recorded), box_of(pairs)
    stored = scaled_actions(seed, 1.0)
    physical = recorded.to_env(stored)
    attrs = {
        "action_units": "scaled" if scaled else "env",
        "action_low": recorded.low,
        "action_high": recorded.high,
    }
    action = stored if scaled else physical
    path = write(tmp_path / "x.hdf5", arrays(action), attrs)
    try:
        ds, _ = data.read(path, env=environment(box))
    except InputError as error:
        assert box.outside(physical).any() and "outside" in str(error)
    else:
        np.testing.assert_allclose(box.to_env(ds.action), physical, atol=1e-5)


@many
@given(sides(3))
def test_a_box_maps_and_maps_back(pairs):
    box = box_of(pairs)
    action = np.random.default_rng(0).uniform(-1, 1, (7, 3))
    np.testing.assert_allclose(box.to_scaled(box.to_env(action)), action, atol=1e-12)
    assert not box.outside(box.to_env(action).astype("f4")).any()
    assert box.outside(box.to_env(action * 0 + 1.01)).all()


def test_clipping_is_suggested_only_where_it_changes_little(tmp_path):
    action = np.zeros((100, 1))
    lengths, share = (60, 40), int(100 * FEW)
    for rows, words in ((share, "would change only these"), (50, "change what the da")):
        action[:rows] = 1.7
        path = write(tmp_path / "x.hdf5", arrays(action, lengths))
        with pytest.raises(InputError, match=rf"{rows} of 100 rows .*{words}"):
            data.read(path)


def test_what_was_read_is_said_in_one_line(tmp_path, capsys):
    box = ActionBox.of([0, 0], [1, 1])
    path = write(tmp_path / "x.hdf5", arrays(np.full((N, 2), -0.5)))
    data.read(path, env=environment(box))
    assert capsys.readouterr().err == (
        f"{path}: actions are scaled already: all in [-1, 1], 12 of 12 rows (1e+02 %) "
        "outside the environment's box [0, 1]\n"
    )
    data.read(path)
    assert capsys.readouterr().err == ""
    other = environment(box, max_steps=4)
    data.read(
        write(path, arrays(np.full((N, 2), -0.5)), {"environment": "a:B"}), env=other
    )
    err = capsys.readouterr().err
    assert "recorded in a:B, used for gymnasium:X-v0" in err
    assert "episodes of up to 5 steps, gymnasium:X-v0 cuts them after 4" in err
    assert data.environment(path) == "a:B"
    data.check_box({"low": [-1, -1], "high": [1, 1]}, other)
    assert "the base was trained for [-1, 1]" in capsys.readouterr().err
    data.check_box({"low": None, "high": None}, other)
    assert "is not known: actions are scaled to the first" in capsys.readouterr().err
    data.check_box({"low": [0, 0], "high": [1, 1]}, other)
    data.check_box({"low": None, "high": None}, environment(ActionBox.unit(2)))
    assert capsys.readouterr().err == ""


lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=6)
FLAWS = {
    "right": lambda ends, generator: ends,
    "never marked": lambda ends, generator: ends & False,
    "shifted": lambda ends, generator: np.roll(ends, generator.integers(0, len(ends))),
    "one missing": lambda ends, generator: (
        ends & (np.arange(len(ends)) != generator.choice(np.flatnonzero(ends)))
    ),
}


@many
@given(lengths_of, st.sampled_from(sorted(FLAWS)), st.integers(0, 99), st.booleans())
def test_ends_that_next_observations_contradict(
    tmp_path, capsys, lengths, flaw, seed, alone
):
    obs, next_obs, ends = trajectories(lengths, seed)
    true = [
        slice(int(b - n), int(b))
        for n, b in zip(lengths, np.cumsum(lengths), strict=True)
    ]
    flags = FLAWS[flaw](ends, np.random.default_rng(seed))
    table = arrays(np.zeros((len(obs), 1)), lengths) | {
        "observations": obs,
        "next_observations": next_obs,
        "timeouts": flags,
    }
    if alone:
        table["dones"] = table.pop("timeouts")
        del table["terminals"]
    path = write(tmp_path / "x.hdf5", table)
    capsys.readouterr()
    try:
        got = dataset.episode_slices(data.read(path)[0])
    except InputError as error:
        assert f"{path}: row " in str(error) and "--ends=observations" in str(error)
        assert flaw != "right"
    else:
        # Every true end that is not marked is refused or said.
        missed = {rows.stop for rows in true} - {rows.stop for rows in got}
        said = "ends are those of the flags" in capsys.readouterr().err
        assert not missed or said or max(lengths) == 1
    got = dataset.episode_slices(data.read(path, ends="observations")[0])
    assert got == true
    ds, _ = data.read(path, ends="flags")
    np.testing.assert_array_equal(ds.timeout[:-1], flags[:-1])


def test_longer_than_recorded_episodes(tmp_path):
    path = write(tmp_path / "x.hdf5", arrays(np.zeros((N, 1))), {"max_steps": 4})
    with pytest.raises(
        InputError, match="the trajectory of row 0 has 5 steps, its att"
    ):
        data.read(path)


def test_a_true_end_inside_an_episode_file(tmp_path):
    folder = write_episodes(tmp_path / "npz", np.zeros((N, 1)))
    path = folder / "1.npz"
    table = dict(np.load(path))
    table["discount"][2] = 0
    np.savez(path, **table)
    with pytest.raises(
        InputError, match=r"1.npz: row 2 has a discount of 0, .* 2 rows"
    ):
        data.read(folder)


@many
@given(data_=st.data(), column=st.booleans())
def test_other_names_of_keys(tmp_path, data_, column):
    plain = arrays(np.zeros((N, 1), "f4")) | {"costs": np.ones(N, "f4")}
    renamed = {}
    for field, key in d4rl.KEYS.items():
        name = data_.draw(st.sampled_from([key, *d4rl.ALIASES[field]]))
        array = plain[key]
        renamed[name] = array[:, None] if column and array.ndim == 1 else array
    path = write(tmp_path / "x.hdf5", renamed)
    got, expected = data.read(path)[0], data.read(write(tmp_path / "y.hdf5", plain))[0]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    field = data_.draw(st.sampled_from(sorted(d4rl.KEYS)))
    names = [d4rl.KEYS[field], *d4rl.ALIASES[field]]
    twice = [name for name in names if name not in renamed][0]
    with pytest.raises(InputError, match="are names of one field; remove all but one"):
        data.read(write(path, renamed | {twice: plain[d4rl.KEYS[field]]}))


def test_rewards_are_not_needed_for_cloning(tmp_path, capsys):
    table = arrays(np.zeros((N, 1)))
    del table["rewards"]
    path = write(tmp_path / "x.hdf5", table)
    ds, attrs = data.read(path)
    assert not ds.reward.any() and attrs["missing"] == ("reward",)
    assert "no rewards: fit for cloning only" in capsys.readouterr().err
    assert len(data.load(path, first=2).obs) == 9
    for bound in ({"best": 1}, {"min_return": 0.0}, {"return_quantile": 0.5}):
        with pytest.raises(InputError, match="no dataset 'rewards'; the file holds ac"):
            data.load(path, **bound)


def test_dones_alone_mark_no_true_end(tmp_path, capsys):
    table = arrays(np.zeros((N, 1)))
    table["dones"] = table.pop("timeouts")
    del table["terminals"]
    path = write(tmp_path / "x.hdf5", table)
    ds, attrs = data.read(path)
    assert attrs["missing"] == ("terminal",) and ds.timeout.sum() == 3
    assert "true ends are not known" in capsys.readouterr().err
    table["terminals"] = np.arange(N) == 4
    ds, attrs = data.read(write(path, table))
    assert list(np.flatnonzero(ds.terminal)) == [4] and attrs["missing"] == ()
    assert list(np.flatnonzero(ds.timeout)) == [8, 11]
    table["terminals"] = np.arange(N) == 3
    with pytest.raises(
        InputError, match="row 3 ends a trajectory by terminals but not"
    ):
        data.read(write(path, table))


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.hdf5", arrays(np.zeros((N, 1))))
    assert len(data.load("~/x.hdf5").obs) == N
    assert data.locate("~/x.hdf5") == tmp_path / "x.hdf5"
    assert data.environment("~/x.hdf5") is None


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@many
@given(st.dictionaries(identifiers, literals, max_size=4), st.booleans())
def test_keyword_arguments_of_an_environment(options, shifted):
    name = keywords.join("gymnasium:pkg:X-v0", options)
    assert keywords.split(name) == ("gymnasium:pkg:X-v0", options)
    assert keywords.canonical(name) == name and "," not in name
    spec = envs.shifted(name, *["gravity:2"] * shifted)
    assert envs.shifted(spec) == spec == name + "@gravity:2" * shifted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "got 'a', expected KEY=VALUE"),
        ("a=1&", "got '', expected KEY=VALUE"),
        ("a=1&a=2", "a is there twice"),
        ("render_mode=human", "render_mode is not for the caller to choose"),
        ("no_such=1", "cannot be made: .*unexpected keyword argument 'no_such'"),
    ],
)
def test_bad_keyword_arguments(text, words):
    with pytest.raises(InputError, match=words):
        envs.make(f"gymnasium:Pendulum-v1?{text}")
    if "_" not in text:
        with pytest.raises(InputError, match="bullet has no keyword arguments"):
            envs.make("bullet:SafetyBallRun-v0?a=1")


def test_keyword_arguments_reach_the_simulator():
    spec = envs.shifted("gymnasium:Pendulum-v1?max_episode_steps=7&g=0.0")
    assert spec == "gymnasium:Pendulum-v1?g=0.0&max_episode_steps=7"
    about = envs.describe(spec)
    assert (about.max_steps, about.sizes) == (7, (3, 1))
    assert about.box == ActionBox.of([-2.0], [2.0])
    assert Recording.of(about.attributes()) == Recording(
        spec, None, "scaled", about.box, 7
    )


@st.composite
def observation_spaces(draw, depth=2):
    kind = draw(st.sampled_from(["box", "dict"] if depth else ["box"]))
    if kind == "box":
        shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        return gymnasium.spaces.Box(-5, 5, shape, np.float32)
    keys = draw(st.lists(identifiers, min_size=1, max_size=3, unique=True))
    inner = [(key, draw(observation_spaces(depth - 1))) for key in keys]
    return gymnasium.spaces.Dict(inner)  # pairs keep their order


def stacked(space, rows):
    if isinstance(space, gymnasium.spaces.Dict):
        return {k: stacked(sub, [row[k] for row in rows]) for k, sub in space.items()}
    return np.array(rows)


@many
@given(observation_spaces(), st.integers(0, 99))
def test_data_are_flattened_as_simulators_do(space, seed):
    space.seed(seed)
    rows = [space.sample() for _ in range(3)]
    expected = [gymnasium.spaces.flatten(space, row) for row in rows]
    np.testing.assert_array_equal(
        spaces.flatten_rows(space, stacked(space, rows)), expected
    )
    sizes = [int(part.rpartition(":")[2]) for part in spaces.order(space)]
    assert sum(sizes) in (0, len(expected[0]))


@many
@given(st.permutations(["a:1", "b:2", "c:3"]), st.permutations(["a:1", "b:2", "c:3"]))
def test_parts_of_observations_in_the_order_of_the_environment(tmp_path, mine, theirs):
    columns = {"a:1": [1], "b:2": [2, 2], "c:3": [3, 3, 3]}
    row = np.concatenate([columns[part] for part in mine])
    table = arrays(np.zeros((N, 1)))
    table["observations"] = table["next_observations"] = np.tile(row, (N, 1))
    attrs = {"observation_order": json.dumps(mine)}
    path = write(tmp_path / "x.hdf5", table, attrs)
    box = ActionBox.unit(1)
    env = Recording("g:X", (6, 1), "scaled", box, observation=tuple(theirs))
    ds, attrs = data.read(path, env=env)
    expected = np.concatenate([columns[part] for part in theirs])
    np.testing.assert_array_equal(ds.obs, np.tile(expected, (N, 1)))
    assert json.loads(attrs["observation_order"]) == list(theirs)
    other = Recording("g:X", (6, 1), "scaled", box, observation=("a:1", "d:5"))
    with pytest.raises(InputError, match="those of g:X of a:1, d:5"):
        data.read(path, env=other)


class Odd(gymnasium.Env):
    """An environment whose forms are drawn by the test."""

    def __init__(self, observation_space, action_space, reward, cost, form):
        self.observation_space, self.action_space = observation_space, action_space
        self.reward, self.cost, self.form = reward, cost, form

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        observation = self.observation_space.sample()
        return {
            "pair": (observation, {}),
            "alone": observation,
            "list": [observation, {}],
            "three": (observation, {}, 0),
        }[self.form]

    def step(self, action):
        assert self.action_space.contains(action)
        info = {} if self.cost is None else {"cost": self.cost}
        return self.observation_space.sample(), self.reward, False, False, info


gymnasium.register("OddForm-v0", Odd, max_episode_steps=5)
NUMBERS = [1.0, 1, True, np.float32(1), np.ones(1), np.ones((1, 1)), np.array(1.0)]
NO_NUMBERS = [None, np.ones(2), "1", np.nan, [1.0, 2.0], np.array([np.inf])]


@many
@given(
    observation=observation_spaces(),
    shape=st.lists(st.integers(1, 2), max_size=2).map(tuple),
    side=st.tuples(st.sampled_from([-3.0, -0.4, 0.1]), st.sampled_from([0.3, 1.0])),
    kind=st.sampled_from([np.float32, np.float64]),
    reward=st.sampled_from(NUMBERS + NO_NUMBERS),
    cost=st.sampled_from([*NUMBERS, *NO_NUMBERS[1:], None]),
    metadata=st.sampled_from(
        [
            {"render_modes": [], "render_fps": None},
            {"render_modes": ["rgb_array"], "render_fps": 30},
        ]
    ),
    form=st.sampled_from(["pair", "pair", "pair", "alone", "list", "three"]),
)
def test_whatever_gymnasium_makes(
    observation, shape, side, kind, reward, cost, metadata, form
):
    action = gymnasium.spaces.Box(*side, shape, kind)
    spec = gymnasium.spec("OddForm-v0")
    options = {
        "observation_space": observation,
        "action_space": action,
        "reward": reward,
        "cost": cost,
        "form": form,
    }
    Odd.metadata = metadata  # of classes, Gymnasium says
    made = envs.gymnasium.make(spec.id, keywords=options)
    if form != "pair":
        with pytest.raises(InputError, match=r"reset returns .*\(observation, info\)"):
            made.reset(0)
        return
    obs = made.reset(3)
    assert obs.shape == (made.obs_dim,) and obs.dtype == np.float32
    np.testing.assert_array_equal(obs, made.reset(3))
    assert made.step_seconds > 0 and made.action_dim == int(np.prod(shape))
    good = [not any(value is bad for bad in NO_NUMBERS) for value in (reward, cost)]
    good[1] |= cost is None
    for edge in (-1, 1):
        with (
            contextlib.nullcontext()
            if all(good)
            else pytest.raises(
                InputError, match="(reward|cost) is .*, expected (one|a finite) number"
            )
        ):
            step = made.step(np.full(made.action_dim, edge))
            assert (step.reward, step.cost) == (1.0, 0.0 if cost is None else 1.0)


def test_help_follows_from_the_table():
    for prefix, simulator in envs.ENVS.items():
        assert f"{prefix}:{simulator.form}" in envs.FORMS


def test_cards_of_actions():
    box = ActionBox.of([0.0], [4.0])
    card = json.loads(json.dumps(Recording(box=box).card()))
    assert data.box_of_card(card) == box
    assert data.box_of_card(Recording().card()) is None
    assert data.box_of_card(None) is None
    for attrs in (
        {"action_units": "metres"},
        {"max_steps": "many"},
        {"observation_order": "{"},
        {"action_low": "x", "action_high": "y"},
    ):
        with pytest.raises(InputError, match="the file: "):
            Recording.of(attrs)


def test_collected_files_say_how(tmp_path, monkeypatch):
    from psec_jax.workflows.collection import collect

    monkeypatch.chdir(Path(__file__).parent)
    path = collect(
        "gymnasium:tiny_env:Tiny-v0", "random", 2, 0, workers=1, out=tmp_path / "x.hdf5"
    )
    ds, attrs = data.read(path)
    assert attrs["environment"] == "gymnasium:tiny_env:Tiny-v0"
    assert attrs["action_units"] == "scaled" and attrs["max_steps"] == 6
    assert (list(attrs["action_low"]), list(attrs["action_high"])) == ([0, -1], [4, 1])
    again, _ = data.read(path, env=envs.describe(attrs["environment"]))
    np.testing.assert_array_equal(ds.action, again.action)
    assert os.path.isfile(path) and data.environment(path) == attrs["environment"]
