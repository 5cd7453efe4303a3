"""Gates: heads, supports, priority, and the base as a member."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import gating
from psec_jax.errors import InputError
from psec_jax.gating import (
    BOUNDED_HEADS,
    HEADS,
    SUPPORTS,
    GateConfig,
    gate_alpha,
    init_gate,
)

K, B = 3, 16
ONE = [head for head in HEADS if head != "select"]  # one weight vector a state
OBS = tiny.normal(B, tiny.OBS_DIM)
START = jnp.array([2.0, 4.0, 8.0])


def configured(head, **fields):
    return GateConfig(head=head, widths=(8,), top_k=2, **fields)


@functools.cache
def head_params(head):
    make = functools.partial(init_gate, configured(head), obs_dim=tiny.OBS_DIM)
    return jax.jit(make)(jax.random.key(0), start=START)["head"]


@functools.cache
def compiled(config):
    return jax.jit(jax.vmap(functools.partial(gate_alpha, config), (None, 0)))


def alphas(config, params):
    """Weights [B, K] of a batch."""
    return np.asarray(compiled(config)(params, OBS))


def bounded(head):
    return "strength" in head_params(head)


def _given(params, obs):
    return params


@pytest.fixture
def given(monkeypatch):
    """A support that is its own parameters."""
    monkeypatch.setitem(SUPPORTS, "given", _given)
    return "given"


@pytest.mark.parametrize("head", ONE)
def test_every_head_weighs_every_skill(head):
    config, params = configured(head), {"head": head_params(head)}
    got = alphas(config, params)
    assert got.shape == (B, K)
    assert np.isfinite(got).all()
    one = gate_alpha(config, params, OBS[3])
    np.testing.assert_allclose(one, got[3], rtol=1e-5)
    assert bounded(head) == (head in BOUNDED_HEADS)
    if bounded(head):
        assert (got >= 0).all()
        assert (got <= START).all()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("head", ONE)
def test_gradients_reach_the_whole_head_but_its_bound(head, top_k):
    config = dataclasses.replace(configured(head), top_k=top_k)

    def loss(head):
        alpha = jax.vmap(lambda obs: gate_alpha(config, {"head": head}, obs))(OBS)
        return jnp.sum(alpha * jnp.arange(1.0, K + 1))

    for path, grad in jax.tree_util.tree_leaves_with_path(
        jax.jit(jax.grad(loss))(head_params(head))
    ):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all()
        assert bool(np.any(grad)) == ("strength" not in name), name


def test_constant_head_stays_at_its_start():
    got = alphas(configured("constant"), {"head": head_params("constant")})
    np.testing.assert_array_equal(got, np.tile(START, (B, 1)))


def test_linear_head_starts_around_its_start():
    params = head_params("linear")
    np.testing.assert_array_equal(params["output"]["bias"], START)
    silent = {**params, "output": {"kernel": jnp.zeros((8, K)), "bias": START}}
    got = alphas(configured("linear"), {"head": silent})
    np.testing.assert_array_equal(got, np.tile(START, (B, 1)))


def test_softmax_shares_add_up_to_one():
    got = alphas(configured("softmax"), {"head": head_params("softmax")})
    np.testing.assert_allclose((got / START).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk_keeps_the_largest_shares(top_k):
    config = dataclasses.replace(configured("topk"), top_k=top_k)
    params = {"head": head_params("topk")}
    share = alphas(config, params) / START
    every = alphas(configured("softmax"), params) / START
    assert ((share > 0).sum(1) == top_k).all()
    for kept, all_shares in zip(share, every, strict=True):
        largest = np.argsort(all_shares)[-top_k:]
        np.testing.assert_allclose(kept[largest], all_shares[largest], rtol=1e-5)


def with_shares(head, shares, **fields):
    """Weights, divided by the start, of a head whose softmax is `shares` everywhere."""
    config = dataclasses.replace(configured(head), widths=(), **fields)
    logits = config.temperature * jnp.log(jnp.asarray(shares))
    mlp = {"output": {"kernel": jnp.zeros((tiny.OBS_DIM, len(shares))), "bias": logits}}
    params = {"head": {"mlp": mlp, "strength": jnp.full(len(shares), 2.0)}}
    return np.asarray(gate_alpha(config, params, OBS[0])) / 2


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, (1,)),
        (0.49, (1,)),
        (0.51, (1, 3)),
        (0.79, (1, 3)),
        (0.81, (1, 3, 0)),
        (0.94, (1, 3, 0)),
        (0.96, (0, 1, 2, 3)),
        (1.0, (0, 1, 2, 3)),
    ],
)
def test_topp_keeps_the_fewest_skills_that_reach_top_p(top_p, kept):
    shares = np.array([0.15, 0.5, 0.05, 0.3])
    got = with_shares("topp", shares, top_p=top_p)
    expected = np.where(np.isin(np.arange(4), kept), shares, 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_of_equal_shares_the_first_are_kept():
    shares = [0.25] * 4
    assert with_shares("topp", shares, top_p=0.4).tolist() == [0.25, 0.25, 0, 0]
    assert with_shares("topk", shares, top_k=3).tolist() == [0.25, 0.25, 0.25, 0]


@pytest.mark.parametrize("head", ["softmax", "topk", "topp"])
def test_temperature_divides_the_logits(head):
    config, params = configured(head), {"head": head_params(head)}
    hot = dataclasses.replace(config, temperature=4.0)
    mlp = params["head"]["mlp"]
    output = jax.tree.map(lambda leaf: leaf / 4, mlp["output"])
    cooled = {"head": params["head"] | {"mlp": mlp | {"output": output}}}
    got = alphas(hot, params)
    np.testing.assert_allclose(got, alphas(config, cooled), rtol=1e-5)
    assert not np.allclose(got, alphas(config, params))
    plain = dataclasses.replace(config, temperature=1.0)
    np.testing.assert_array_equal(alphas(plain, params), alphas(config, params))


LAYERS = 4


@functools.cache
def layered(head):
    config = configured(head, layers=LAYERS)
    make = functools.partial(init_gate, config, obs_dim=tiny.OBS_DIM)
    return config, jax.jit(make)(jax.random.key(0), start=START)


@pytest.mark.parametrize("head", ONE)
def test_every_layer_may_have_weights_of_its_own(head, given):
    """Each layer's are those of a head with the same logits; a support scales all."""
    config, params = layered(head)
    got = alphas(config, params)
    assert got.shape == (B, LAYERS, K)
    share = np.array([0.5, 0.8, 0.3], np.float32)
    scaled = dataclasses.replace(config, support=given, priority=False)
    np.testing.assert_allclose(
        alphas(scaled, params | {"support": share}), got * share, rtol=1e-6
    )
    if head == "constant":
        np.testing.assert_array_equal(got, np.broadcast_to(START, got.shape))
        return
    mlp = params["head"].get("mlp", params["head"])
    for row in range(LAYERS):
        columns = slice(row * K, (row + 1) * K)
        output = jax.tree.map(lambda leaf: leaf[..., columns], mlp["output"])  # noqa: B023
        one = mlp | {"output": output}
        if head in BOUNDED_HEADS:
            one = {"strength": params["head"]["strength"][row], "mlp": one}
        np.testing.assert_allclose(
            got[:, row], alphas(configured(head), {"head": one}), rtol=1e-5
        )
    assert np.abs(got[:, 0] - got[:, 1]).max() > 1e-3


@pytest.mark.parametrize("layers", [0, LAYERS])
@pytest.mark.parametrize("head", [h for h in ONE if h != "constant"])
def test_a_grown_head_gives_what_it_gave(head, layers):
    config, params = configured(head, layers=layers), head_params(head)
    if layers:
        config, params = layered(head)[0], layered(head)[1]["head"]
    start = jnp.array([9.0, 9.0, 9.0, 5.0, 6.0])
    grown = gating.grow_head(config, params, start, OBS)
    gating.check_gate(config, {"head": grown}, tiny.OBS_DIM, 1, K + 2)
    before, after = (alphas(config, {"head": head}) for head in (params, grown))
    np.testing.assert_allclose(after[..., :K], before, rtol=1e-6)
    assert np.abs(after[..., K:]).max() <= 6.0 * gating.LOWEST_SHARE * 1.001
    if head not in ("softmax", "sigmoid"):
        np.testing.assert_array_equal(after[..., K:], 0)
    if head in BOUNDED_HEADS:
        new = np.asarray(grown["strength"])[..., K:]
        np.testing.assert_array_equal(new, np.broadcast_to([5.0, 6.0], new.shape))

    def total(head):
        every = jax.vmap(lambda obs: gate_alpha(config, {"head": head}, obs))(OBS)
        return jnp.sum(every * jnp.arange(1.0, K + 3))

    mlp = jax.grad(total)(grown)
    gradient = mlp.get("mlp", mlp)["output"]["bias"].reshape(-1, K + 2)
    assert np.all(np.asarray(gradient)[:, K:] != 0)


@pytest.mark.parametrize("priority", [True, False])
@pytest.mark.parametrize("head", ONE)
def test_support_scales_the_head(given, head, priority):
    config = configured(head)
    share = np.array([0.5, 0.8, 0.3], np.float32)
    shared = dataclasses.replace(config, support=given, priority=priority)
    alone = alphas(config, {"head": head_params(head)})
    got = alphas(shared, {"head": head_params(head), "support": share})
    if priority:  # each skill gets what those before it left over
        share = share * np.array([1, 0.5, 0.5 * 0.2])
    np.testing.assert_allclose(got, alone * share, rtol=1e-5)


def test_priority_never_hands_out_more_than_everything(given):
    config = configured("constant", support=given)
    generator = np.random.default_rng(0)
    params = {"head": {"alpha": jnp.ones(5)}}
    for _ in range(20):
        share = generator.uniform(size=5).astype(np.float32)
        got = alphas(config, params | {"support": share})[0]
        left = 1.0
        for k in range(5):
            np.testing.assert_allclose(got[k], share[k] * left, rtol=1e-4)
            left *= 1 - share[k]
        np.testing.assert_allclose(np.sum(got), 1 - left, rtol=1e-4)
    first = alphas(config, params | {"support": np.ones(5, np.float32)})[0]
    np.testing.assert_array_equal(first, [1, 0, 0, 0, 0])


@pytest.mark.parametrize("priority", [True, False])
@pytest.mark.parametrize("head", ONE)
def test_base_member_conserves_the_total_weight(given, head, priority):
    config = configured(head, base_member=True)
    shared = dataclasses.replace(config, support=given, priority=priority)
    alone = alphas(config, {"head": head_params(head)})
    share = np.array([0.7, 0.4], np.float32)
    got = alphas(shared, {"head": head_params(head), "support": share})
    np.testing.assert_allclose(got.sum(1), alone.sum(1), rtol=1e-5)
    if priority:
        share = share * np.array([1, 1 - 0.7])
    np.testing.assert_allclose(got[:, 1:], alone[:, 1:] * share, rtol=1e-5)


@pytest.mark.parametrize("head", ONE)
def test_where_no_skill_reaches_the_base_has_all(given, head):
    config = configured(head, base_member=True, support=given)
    params = {"head": head_params(head), "support": np.zeros(2, np.float32)}
    got = alphas(config, params)
    np.testing.assert_array_equal(got[:, 1:], 0)
    alone = alphas(configured(head), {"head": params["head"]})
    np.testing.assert_allclose(got[:, 0], alone.sum(1), rtol=1e-5)


distance = jax.jit(gating.neighbour_distance)


def test_neighbour_distance():
    demos, x = tiny.normal(50, 4), tiny.normal(4, seed=1)
    expected = np.linalg.norm(np.asarray(demos) - x, axis=1)
    valid = np.arange(50) < 30
    np.testing.assert_allclose(
        distance(demos, jnp.asarray(valid), x), expected[:30].min(), rtol=1e-5
    )
    near = distance(demos, jnp.asarray(valid), jnp.asarray(np.asarray(demos)[7]))
    assert near < 1e-2
    assert distance(demos, jnp.zeros(50, bool), x) == np.inf


def test_neighbour_distance_far_from_the_origin():
    offset = 5000.0
    demos, x = offset + tiny.normal(50, 4), offset + tiny.normal(4, seed=1)
    expected = np.linalg.norm(np.asarray(demos) - x, axis=1).min()
    got = distance(demos, jnp.ones(50, bool), x)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_neighbour_support_falls_off_at_tau():
    """Two skills with demonstrations at 0 and 10, tau 2 and 1, on a line."""
    params = {
        "demos": jnp.array([[[0.0], [0.0]], [[10.0], [0.0]]]),
        "valid": jnp.array([[True, True], [True, False]]),
        "tau": jnp.array([2.0, 1.0]),
        "scale": jnp.ones((2, 1)),
    }
    support = jax.jit(jax.vmap(functools.partial(SUPPORTS["neighbour"], params)))
    got = support(jnp.array([[0.0], [2.0], [9.0], [10.0], [1.0]]))
    edge = np.exp(-1)
    np.testing.assert_allclose(
        got, [[1, 0], [edge, 0], [0, edge], [0, 1], [np.exp(-1 / 16), 0]], atol=1e-5
    )


def test_supports_see_the_state_in_units_of_the_scale():
    params = {
        "demos": tiny.normal(2, 9, 3),
        "valid": jnp.ones((2, 9), bool),
        "tau": jnp.array([0.7, 1.5]),
        "scale": jnp.ones((2, 3)),
    }
    support = jax.jit(jax.vmap(SUPPORTS["neighbour"], (None, 0)))
    scaled = params | {"scale": jnp.full((2, 3), 5.0)}
    np.testing.assert_allclose(
        support(scaled, 5 * OBS), support(params, OBS), atol=1e-5
    )


REFUSED = [
    ({"top_k": -1}, "top_k: got -1, expected 1 or more"),
    ({"head": "topp", "top_p": 0.0}, "top_p: got 0.0, expected in"),
    ({"head": "topp", "top_p": -0.5}, "top_p: got -0.5, expected in"),
    ({"head": "topp", "top_p": 1.5}, "top_p: got 1.5, expected in"),
    ({"head": "topk", "top_p": 0.5}, "top_p: got 0.5 with the head 'topk', expected"),
    ({"head": "softmax", "temperature": 0.0}, "temperature: got 0.0, expected above"),
    ({"head": "softmax", "temperature": -1.0}, "temperature: got -1.0, expected above"),
    ({"head": "softmax", "temperature": float("nan")}, "temperature: got nan"),
    *(
        ({"head": head, "temperature": 2.0}, f"temperature: got 2.0 with .* '{head}'")
        for head in ("linear", "constant", "sigmoid", "select")
    ),
    ({"layers": -1}, "layers: got -1, expected 0 or more"),
    ({"layers": 2, "base_member": True}, "layers: got 2 with .* base_member True"),
    ({"layers": 2, "head": "select"}, "layers: got 2 with the head 'select'"),
]


def test_refusals(given):
    key, start = jax.random.key(0), jnp.ones(2)
    with pytest.raises(InputError, match=f"choose from {', '.join(sorted(HEADS))}"):
        GateConfig(head="argmax")
    with pytest.raises(InputError, match="support 'all'; choose from .*none"):
        GateConfig(support="all")
    with pytest.raises(InputError, match="top_k: got 0"):
        GateConfig(top_k=0)
    for fields, words in REFUSED:
        with pytest.raises(InputError, match=words):
            GateConfig(**fields)
    with pytest.raises(InputError, match="parameters are missing"):
        init_gate(GateConfig(support=given), key, 3, start)
    with pytest.raises(InputError, match="parameters are given"):
        init_gate(GateConfig(), key, 3, start, support={})
    config = dataclasses.replace(configured("topk"), top_k=K + 1)
    with pytest.raises(ValueError, match="top_k 4 of 3 skills"):
        gate_alpha(config, {"head": head_params("topk")}, OBS[0])
