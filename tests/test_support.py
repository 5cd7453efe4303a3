"""Supports fitted from demonstrations, against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psec_jax.errors import InputError
from psec_jax.gating import (
    NO_SUPPORT,
    SEARCHED,
    SUPPORTS,
    GateConfig,
    gate_alpha,
    index_boxes,
)
from psec_jax.support import (
    FITS,
    SupportConfig,
    fit_nearest,
    fit_neighbour,
    leave_one_out_distances,
    nearest,
)

SMALL = SupportConfig(
    steps=600, queries=6000, batch_size=128, learning_rate=2e-3, expectile=0.6
)


def cloud(centre, seed, trajectories=5, steps=20):
    """Demonstrations of one skill: states around a centre in the plane."""
    generator = np.random.default_rng(seed)
    shape = (trajectories, steps, 2)
    return list((centre + generator.normal(size=shape)).astype(np.float32))


SKILLS = [cloud([0, 0], 0), cloud([7, 0], 1, trajectories=4)]
BACKGROUND = np.random.default_rng(2).uniform(-4, 8, (500, 2)).astype(np.float32)


@functools.cache
def fitted(name):
    return FITS[name](SMALL, SKILLS, BACKGROUND)


def shares(name, states):
    """Support [B, K] of states [B, S]."""
    support = functools.partial(SUPPORTS[name], fitted(name))
    return np.asarray(jax.jit(jax.vmap(support))(jnp.asarray(states, jnp.float32)))


def brute_distance(queries, demos):
    return np.linalg.norm(queries[:, None] - demos[None], axis=-1).min(1)


def brute_left_out(trajectories):
    return np.concatenate(
        [
            brute_distance(
                t, np.concatenate([u for j, u in enumerate(trajectories) if j != i])
            )
            for i, t in enumerate(trajectories)
        ]
    )


def test_every_support_can_be_fitted():
    assert set(FITS) == {name for name, support in SUPPORTS.items() if support}


@pytest.mark.parametrize("chunk", [1, 7, 100, 512])
def test_nearest_is_brute_force(chunk):
    generator = np.random.default_rng(0)
    queries, demos = generator.normal(size=(100, 5)), generator.normal(size=(30, 5))
    np.testing.assert_allclose(
        nearest(queries, demos, chunk), brute_distance(queries, demos), atol=1e-6
    )


def test_leave_one_out_is_brute_force():
    for trajectories in SKILLS:
        got = leave_one_out_distances(trajectories)
        np.testing.assert_allclose(got**2, brute_left_out(trajectories) ** 2, atol=1e-5)


@pytest.mark.parametrize("quantile", [0.5, 0.98, 1.0])
def test_tau_is_the_stated_quantile(quantile):
    fit = fit_neighbour(SupportConfig(quantile=quantile), SKILLS, BACKGROUND)
    for k, trajectories in enumerate(SKILLS):
        scale = np.concatenate(trajectories).std(0)
        np.testing.assert_allclose(fit["scale"][k], scale, rtol=1e-5)
        left_out = brute_left_out([t / scale for t in trajectories])
        expected = np.quantile(left_out, quantile)
        np.testing.assert_allclose(fit["tau"][k], expected, rtol=2e-3)


def test_neighbour_support_is_brute_force():
    fit = fitted("neighbour")
    got = shares("neighbour", BACKGROUND)
    for k, trajectories in enumerate(SKILLS):
        demos, scale = np.concatenate(trajectories), np.asarray(fit["scale"][k])
        distance = brute_distance(BACKGROUND / scale, demos / scale)
        expected = np.exp(-((distance / fit["tau"][k]) ** 4))
        np.testing.assert_allclose(got[:, k], expected, atol=1e-3)


def test_nearest_support_shares_one_by_distance():
    fit = fitted("nearest")
    states = np.concatenate([BACKGROUND, [[30, 30], [-50, 0], [3, 40], [1e4, -1e4]]])
    got = shares("nearest", states)
    scaled = [
        brute_distance(states / fit["scale"][k], np.concatenate(t) / fit["scale"][k])
        for k, t in enumerate(SKILLS)
    ]
    np.testing.assert_array_equal(fit["tau"], 1)
    logits = -(np.stack(scaled, axis=1) ** 2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True)
    assert 0.05 < expected[:, 0].mean() < 0.95
    np.testing.assert_allclose(got, expected, atol=3e-3)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)


def test_scattered_demonstrations_are_no_nearer():
    """A state between those of one skill, close together, and of one, far apart."""
    line = [np.linspace(0, 6, 50)[:, None] + [i / 100, 0] for i in range(3)]
    apart = [cloud(c, i, 1)[0] * 0.1 for i, c in enumerate([(80, 80), (140, 80)])]
    skills = [[np.float32(t) for t in ts] for ts in (line, apart)]
    state = jnp.asarray([6.5, 6.5])
    near = fit_nearest(SMALL, skills, BACKGROUND)
    in_tau = fit_neighbour(SMALL, skills, BACKGROUND)
    assert SUPPORTS["nearest"](near, state)[0] > 0.6
    assert SUPPORTS["nearest"](in_tau, state)[1] > 0.9


@pytest.mark.parametrize("distance", [1e3, 1e5, 1e8, 1e18, 1e25])
def test_nearest_support_is_finite_far_from_everything(distance):
    states = jnp.asarray([[distance, 0], [-distance, distance]], jnp.float32)
    got = shares("nearest", states)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)
    boxes = jax.vmap(SUPPORTS["nearest"], (None, 0))
    np.testing.assert_allclose(boxes(index_boxes(fitted("nearest")), states), got)


@pytest.mark.parametrize("priority", [True, False])
def test_nearest_support_leaves_the_base_nothing(priority):
    form = GateConfig(head="constant", support="nearest", priority=priority)
    params = {"head": {"alpha": jnp.full(2, 16.0)}, "support": fitted("nearest")}
    got = jax.vmap(lambda state: gate_alpha(form, params, state))(BACKGROUND)
    np.testing.assert_allclose(got, 16 * shares("nearest", BACKGROUND), atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 16, rtol=1e-6)


@pytest.mark.parametrize("name", SEARCHED)
def test_boxes_leave_the_weights_as_they_are(name):
    """Nine skills along a line, two of them at one place, states all along it."""
    centres = [0, 7, 14, 14, 21, 28, 35, 42, 49]
    skills = [cloud([c, 0], k) for k, c in enumerate(centres)]
    fit = fit_neighbour(SMALL, skills, BACKGROUND)
    indexed = jax.jit(index_boxes)(fit)
    assert indexed.keys() - fit.keys() == {"low", "high"}
    generator = np.random.default_rng(3)
    states = generator.uniform((-9, -9), (58, 9), (400, 2)).astype(np.float32)
    support = jax.jit(jax.vmap(SUPPORTS[name], (None, 0)))
    expected, got = (
        np.asarray(support(fit, states)),
        np.asarray(support(indexed, states)),
    )
    assert 0.05 < (expected > 0).mean() < 0.35  # most skills are out of reach
    np.testing.assert_allclose(got, expected, atol=1e-5)
    one = jax.jit(SUPPORTS[name])
    for state, row in zip(states[:20], got, strict=False):
        np.testing.assert_allclose(one(indexed, state), row, atol=1e-5)
    if name == "nearest":
        np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)
        return
    # Where a box is too far nothing would be left in float32, and nearer something is.
    x, tau = states[:, None] / fit["scale"], fit["tau"]
    outside = np.maximum(np.maximum(indexed["low"] - x, x - indexed["high"]), 0)
    far = np.linalg.norm(outside, axis=-1) >= NO_SUPPORT * tau
    assert 0.7 < far.mean() < 0.95 and not expected[far].any() and not got[far].any()
    assert np.exp(np.float32(-(NO_SUPPORT**4))) == 0 < np.exp(np.float32(-(3**4)))


@pytest.mark.parametrize("name", ["neighbour", "learned"])
def test_one_on_the_demonstrations_and_zero_far_from_them(name):
    for k, trajectories in enumerate(SKILLS):
        own = shares(name, np.concatenate(trajectories))
        assert own[:, k].mean() > 0.9
        assert np.quantile(own[:, k], 0.1) > 0.7
        assert np.quantile(own[:, 1 - k], 0.9) < 0.01
    far = shares(name, [[30, 30], [-50, 0], [3, 40], [1e4, -1e4], [0, -9]])
    assert far.shape == (5, 2)
    assert far.max() < 0.01


def test_learned_support_agrees_with_the_neighbour_support():
    """To 0.1 on average, after a short fit; closer with the default steps."""
    seen = np.concatenate(cloud([0, 0], 7) + cloud([7, 0], 8))
    for states in (BACKGROUND, seen):
        error = np.abs(shares("learned", states) - shares("neighbour", states))
        assert error.mean() < 0.1


def test_units_of_the_states_do_not_matter():
    units = np.array([100, 0.02], np.float32)
    scaled = [[t * units for t in ts] for ts in SKILLS]
    fit = fit_neighbour(SMALL, scaled, BACKGROUND)
    np.testing.assert_allclose(fit["tau"], fitted("neighbour")["tau"], rtol=1e-3)
    np.testing.assert_allclose(fit["demos"], fitted("neighbour")["demos"], atol=1e-3)


def test_demonstrations_are_thinned_evenly_and_padded():
    config = SupportConfig(max_demos=90)
    fit = fit_neighbour(config, SKILLS, BACKGROUND)
    assert fit["demos"].shape == (2, 90, 2)
    np.testing.assert_array_equal(fit["valid"].sum(1), [90, 80])
    first = np.concatenate(SKILLS[0]) / np.asarray(fit["scale"][0])
    kept = np.asarray(fit["demos"][0])
    np.testing.assert_array_equal(kept[[0, -1]], first[[0, -1]])
    assert len(np.unique(kept, axis=0)) == 90


def test_a_variable_that_never_moves_is_no_division_by_zero():
    still = [
        [np.pad(t, ((0, 0), (0, 1)), constant_values=5) for t in ts] for ts in SKILLS
    ]
    fit = fit_neighbour(SMALL, still, BACKGROUND)
    np.testing.assert_allclose(fit["tau"], fitted("neighbour")["tau"], rtol=1e-3)
    support = jax.jit(functools.partial(SUPPORTS["neighbour"], fit))
    assert support(jnp.asarray(still[0][0][3]))[0] > 0.99
    assert support(jnp.asarray(still[0][0][3] + np.float32([0, 0, 1])))[0] < 0.01


def test_refusals():
    with pytest.raises(InputError, match="at least 2 demonstrations .* got 1"):
        fit_neighbour(SMALL, [SKILLS[0], SKILLS[1][:1]], BACKGROUND)
    same = [SKILLS[0][0], SKILLS[0][0].copy()]
    with pytest.raises(
        InputError, match="demonstrations of skill 1 all visit the same"
    ):
        fit_neighbour(SMALL, [SKILLS[0], same], BACKGROUND)
    for field, value in {
        "quantile": 1.1,
        "expectile": 1.0,
        "learning_rate": 0.0,
        "steps": 0,
        "queries": 0,
    }.items():
        with pytest.raises(InputError, match=f"{field}: got {value}"):
            SupportConfig(**{field: value})
