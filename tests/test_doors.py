"""What the Python API takes, and what it refuses: shapes, types, one or many, NaN."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import make

from psec_jax import composition, evaluation
from psec_jax import policy as policy_module
from psec_jax.data import trajectories
from psec_jax.data.actions import ActionBox
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose
from psec_jax.types import Normaliser
from psec_jax.workflows.demonstrations import Selection

S, A = tiny.OBS_DIM, tiny.ACTION_DIM
many = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A library with two skills and a gate that looks at the state."""
    root = tmp_path_factory.mktemp("doors") / "library"
    library = SkillLibrary.create(root)
    normaliser = Normaliser(np.zeros(S, "f4"), np.ones(S, "f4"))
    card = {
        "name": "base",
        "obs_dim": S,
        "action_dim": A,
        "network": dataclasses.asdict(tiny.NETWORK),
        "process": dataclasses.asdict(tiny.PROCESS),
        "actions": {"units": "scaled", "low": [0.0, -1.0], "high": [4.0, 1.0]},
    }
    library.add_base(tiny.base(), normaliser, card)
    for name in ("walk", "run"):
        library.add_skill(name, tiny.skill(len(name)), {"alpha": 16.0})
    generator = np.random.default_rng(0)
    head = {
        "kernel": generator.normal(size=(S, 2)).astype("f4"),
        "bias": np.ones(2, "f4"),
    }
    library.add_gate(
        "lin",
        {"head": {"output": head}},
        {
            "skills": ["walk", "run"],
            "level": "parameter",
            "gate": {"head": "linear", "support": "none", "widths": []},
        },
    )
    return root


@pytest.fixture(scope="module")
def policy(root):
    return compose(root, gate="lin")


def key(seed=0):
    return jax.random.key(seed)


TYPES = {
    "float32": lambda x: np.asarray(x, np.float32),
    "float64": lambda x: np.asarray(np.asarray(x, np.float32), np.float64),
    "list": lambda x: np.asarray(x, np.float32).tolist(),
    "jax": lambda x: jnp.asarray(x, jnp.float32),
    "strided": lambda x: np.repeat(np.asarray(x, np.float32), 2, -1)[..., ::2],
    "fortran": lambda x: np.asfortranarray(np.asarray(x, np.float32)),
}
KEYS = {
    "typed": lambda keys: keys,
    "legacy": lambda keys: jax.random.key_data(keys),
    "legacy numpy": lambda keys: np.asarray(jax.random.key_data(keys)),
}


@many
@given(
    st.sampled_from(sorted(TYPES)),
    st.sampled_from(sorted(KEYS)),
    st.sampled_from([None, 1, 2, 5]),
    st.integers(0, 9),
)
def test_observations_of_any_type_give_the_same(policy, kind, form, batch, seed):
    shape = (S,) if batch is None else (batch, S)
    obs = np.random.default_rng(seed).normal(size=shape).astype("f4")
    keys = key(seed) if batch is None else jax.random.split(key(seed), batch)
    got = policy.act(KEYS[form](keys), TYPES[kind](obs))
    assert got.dtype == jnp.float32 and got.shape == (*shape[:-1], A)
    np.testing.assert_array_equal(got, policy.act(keys, obs))
    np.testing.assert_array_equal(policy.alpha(TYPES[kind](obs)), policy.alpha(obs))
    if batch is not None:  # one key stands for as many as there are observations
        one = policy.act(KEYS[form](key(seed)), TYPES[kind](obs))
        np.testing.assert_array_equal(one, got)


def test_one_observation_has_the_weights_of_its_row(policy):
    obs = np.random.default_rng(0).normal(size=(4, S))
    rows = policy.alpha(obs)
    assert rows.shape == (4, 2) and np.ptp(rows, 0).min() > 0
    for row, one in zip(rows, obs, strict=True):
        assert policy.alpha(one).shape == (2,)
        np.testing.assert_allclose(policy.alpha(one), row, rtol=1e-5)


BAD = {
    "0-d": 1.0,
    "three axes": np.zeros((2, 3, S)),
    "one number": np.zeros(1),
    "too many": np.zeros(S + 1),
    "a batch of other sizes": np.zeros((2, S + 1)),
    "a dict": {"x": np.zeros(S)},
    "ragged": [[0.0] * S, [0.0]],
    "texts": ["a"] * S,
    "objects": np.array([None] * S),
    "complex": np.zeros(S, complex),
    "NaN": np.full(S, np.nan),
    "one NaN of a batch": np.array([[0.0] * S, [np.inf] + [0.0] * (S - 1)]),
    "too large for float32": np.full(S, 1e300),
}


@pytest.mark.parametrize("name", BAD)
def test_other_observations_are_refused(policy, name):
    for call in (lambda: policy.act(key(), BAD[name]), lambda: policy.alpha(BAD[name])):
        with pytest.raises(InputError, match="^observations ") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_large_observations(root, policy):
    assert np.isfinite(compose(root).act(key(), np.full(S, 1e7))).all()
    with pytest.raises(InputError, match=r"of magnitudes up to 1e\+30 are too large"):
        policy.act(key(), np.full(S, 1e30))
    assert policy.act(key(), np.zeros((0, S))).shape == (0, A)


@pytest.mark.parametrize(
    ("keys", "obs"),
    [
        (0, np.zeros(S)),
        (np.zeros(3), np.zeros(S)),
        (jax.random.split(key(), 5), np.zeros(S)),
        (jax.random.split(key(), 5), np.zeros((4, S))),
        (jax.random.split(key(), (2, 2)), np.zeros((2, S))),
        (None, np.zeros(S)),
    ],
)
def test_other_keys_are_refused(policy, keys, obs):
    with pytest.raises(InputError, match=r"keys: got .*expected jax.random.key"):
        policy.act(keys, obs)


def test_transformations_see_the_same_policy(policy):
    obs = np.random.default_rng(0).normal(size=(3, S)).astype("f4")
    keys = jax.random.split(key(), 3)
    expected = policy.act(keys, obs)
    np.testing.assert_allclose(jax.vmap(policy.act)(keys, obs), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(policy.act)(keys, obs), expected, atol=1e-5)
    gradient = jax.grad(lambda x: policy.act(keys[0], x).sum())(jnp.asarray(obs[0]))
    assert gradient.shape == (S,) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("skills", "options"),
    [
        ("walk", {}),
        (("walk",), {"alpha": 8}),
        (["walk"], {"alpha": np.float32(8)}),
        (["walk", "run"], {"alpha": [8, 8]}),
        (["walk", "run"], {"alpha": np.array([8, 4])}),
        (["walk", "run"], {"alpha": jnp.array([8.0, 4.0])}),
        ((), {"alpha": np.zeros(0)}),
    ],
)
def test_compose_takes(root, skills, options):
    made = compose(root, skills, **options)
    names = (skills,) if isinstance(skills, str) else tuple(skills)
    assert made.skills == names
    assert made.act(key(), np.zeros(S)).shape == (A,)
    if "alpha" in options and names:
        expected = np.ravel(options["alpha"]).astype("f4")
        np.testing.assert_array_equal(made.alpha(np.zeros(S)), expected)


@pytest.mark.parametrize(
    ("skills", "options", "words"),
    [
        (["walk"], {"alpha": [np.nan]}, "alpha: got .nan., expected finite"),
        (["walk"], {"alpha": ["8"]}, "alpha: got <U1 of shape"),
        (
            ["walk", "run"],
            {"alpha": np.ones((2, 2))},
            "alpha: has weights for 2 layers",
        ),
        (["walk", "run"], {"alpha": 8.0}, "alpha: got 1 weights for 2 skills"),
        ((), {"alpha": np.array([1.0, 2.0])}, "alpha: got 2 weights for no skills"),
        (["walk"], {"alpha": [[1], [1, 2]]}, "alpha: no array of numbers"),
        (["walk"], {"sampling": {"heat": 1}}, "unknown field of sampling 'heat'"),
        (["walk"], {"sampling": {"temperature": "0"}}, "temperature is '0', expected"),
        (
            ["walk"],
            {"sampling": {"temperature": -1}},
            "temperature: got -1.0, expected",
        ),
        (["walk"], {"sampling": {"execute": 2}}, "execute: got 2, expected 1 to 1"),
    ],
)
def test_compose_refuses(root, skills, options, words):
    with pytest.raises(InputError, match=words):
        compose(root, skills, **options)


def test_actions_without_noise_are_the_same_for_every_key(root):
    obs, keys = np.zeros((8, S)), jax.random.split(key(), 8)
    assert len(np.unique(compose(root).act(keys, obs), axis=0)) > 1
    still = compose(root, sampling={"temperature": 0, "start_scale": 0.0})
    assert len(np.unique(still.act(keys, obs), axis=0)) == 1


def test_batches_of_like_size_compile_once(policy, monkeypatch):
    jax.clear_caches()
    chex.clear_trace_counter()
    once = chex.assert_max_traces(composition.act, n=1)
    monkeypatch.setattr(policy_module, "act", once)
    for batch in (5, 6, 7, 8, 5):
        keys = jax.random.split(key(), batch)
        assert policy.act(keys, np.zeros((batch, S))).shape == (batch, A)
    with pytest.raises(AssertionError, match="traced"):
        policy.act(jax.random.split(key(), 9), np.zeros((9, S)))


def test_actions_in_the_units_of_the_environment(root, policy):
    assert policy.box == compose(root, "walk").box == ActionBox.of([0, -1], [4, 1])
    np.testing.assert_array_equal(policy.to_env([[-1, 0], [0, 1]]), [[0, 0], [2, 1]])
    bare = dataclasses.replace(policy, box=None)
    with pytest.raises(InputError, match="the base's card has no action box"):
        bare.to_env([0, 0])


def test_results_do_not_depend_on_64_bits(root, policy):
    obs = np.linspace(-1, 1, S)
    code = (
        "import jax, numpy as np, sys; from psec_jax.policy import compose;"
        "assert jax.numpy.zeros(1, float).dtype == np.float64;"
        f"p = compose(sys.argv[1], gate='lin'); o = np.linspace(-1, 1, {S});"
        "a = p.act(jax.random.key(0), o); w = p.alpha(o);"
        "print(np.asarray(a, np.float32).tobytes().hex(), a.dtype);"
        "print(np.asarray(w, np.float32).tobytes().hex(), w.dtype)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
    )
    assert run.returncode == 0, run.stderr
    for line, array in zip(
        run.stdout.splitlines(),
        (policy.act(key(), obs), policy.alpha(obs)),
        strict=True,
    ):
        assert line == f"{np.asarray(array).tobytes().hex()} float32"


@pytest.mark.parametrize("number", [np.float32(16), np.int64(16), np.array(16.0)])
def test_numbers_of_numpy_on_a_card_are_stored_as_numbers(root, number):
    library = SkillLibrary.open(root)
    params, _ = library.load_skill("walk")
    library.add_skill("walk16", params, {"alpha": number}, overwrite=True)
    assert library.load_skill("walk16")[1]["alpha"] == 16
    with pytest.raises(InputError, match=r"a card holds \{1\}, expected numb"):
        library.add_skill("set", params, {"alpha": 1.0, "tags": {1}})


@pytest.mark.parametrize(
    ("selection", "episodes", "words"),
    [
        (Selection(min_return="3"), 0, "min_return: got '3', expected a number"),
        (Selection(max_cost=float("nan")), 0, "max_cost: got nan, expected a number"),
        (Selection(return_quantile="x"), 0, "return_quantile: got 'x', expected a n"),
        (Selection(cost_quantile=2.0), 0, "cost_quantile: got 2, expected 0 to 1"),
        (Selection(split=2.5), 0, "split: got 2.5, expected a whole number"),
        (Selection(share=[1]), 0, r"share: got \[1\], expected a number"),
        (Selection(transitions="9"), 0, "transitions: got '9', expected a whole num"),
        (Selection(transitions=9, draw=1.5), 0, "draw: got 1.5, expected a whole num"),
        (Selection(transitions=9, draw=-1), 0, "draw: got -1, expected 0 to"),
        (Selection(draw=1), 0, "draw: nothing is drawn without filter, share or tr"),
        (Selection(filter="no"), 0, "unknown filter 'no'; choose from"),
    ],
)
def test_selection_refuses(selection, episodes, words):
    with pytest.raises(InputError, match=words):
        selection.of(make(), episodes, "FILE")


def test_selection_takes_numbers_of_numpy():
    chosen = Selection(min_return=np.float64(-1e3), transitions=5)
    assert len(chosen.of(make(), 2, "FILE").obs) == 5
    assert len(trajectories.share(make(), np.float64(1)).obs) == 12


def test_numbers_of_other_types_are_refused():
    # In an interpreter of its own: the tests check annotations before any door does.
    code = """
from psec_jax import evaluation, errors
from psec_jax.data import dataset
from psec_jax.types import Dataset
import numpy as np
row = np.ones(1, bool)
ds = Dataset(*[np.zeros((1, 2))] * 2, *[np.zeros(1)] * 2, np.zeros((1, 2)), row, ~row)
def evaluate(episodes, seed):
    evaluation.evaluate(lambda keys, obs: obs, "a:b", episodes, seed)
for call, *arguments in (
    (evaluate, 1.5, 0), (evaluate, "2", 0), (evaluate, 0, 0), (evaluate, 1, 0.5),
    (evaluate, 1, -1), (evaluate, True, 0), (dataset.select, ds, "1"),
    (dataset.select, ds, None, None, "3"), (dataset.select, ds, None, None, None, [1]),
):
    try:
        call(*arguments)
    except errors.InputError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "episodes: got 1.5, expected a whole number",
        "episodes: got '2', expected a whole number",
        "episodes is 0, expected 1 or more",
        "seed: got 0.5, expected a whole number",
        "seed is -1, expected 0 to 4294967295",
        "episodes: got True, expected a whole number",
        "trajectories: got '1', expected a whole number",
        "min_return: got '3', expected a number",
        "max_cost: got [1], expected a number",
    ]


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (lambda obs: [["a"] * 2] * len(obs), "the policy gave no array of numbers"),
        (lambda obs: obs[:, :1], r"the policy gave actions \(1, 1\)"),
    ],
)
def test_evaluate_refuses_other_actions(actions, words, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    spec = "gymnasium:tiny_env:Tiny-v0"
    with pytest.raises(InputError, match=words):
        evaluation.evaluate(lambda keys, obs: actions(obs), spec, 1, 0)
