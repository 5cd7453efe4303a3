"""The denoiser and its parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import tree
from psec_jax.errors import InputError
from psec_jax.lora import init_skill, lecun_normal
from psec_jax.networks import layers
from psec_jax.networks.denoiser import (
    COMPATS,
    NETWORKS,
    NetworkConfig,
    init_base,
    make_denoise,
    make_network,
)
from psec_jax.networks.layers import ACTIVATIONS
from psec_jax.networks.mlp import MLP

B = 6
INPUTS = (
    tiny.normal(B, tiny.OBS_DIM),
    tiny.normal(B, tiny.ACTION_DIM, seed=1),
    jnp.arange(B, dtype=jnp.float32),
)


@pytest.mark.parametrize("shape", [(3, 2), (24, 256), (1024, 8), (600, 500)])
def test_kernels_are_drawn_as_jax_draws_them(shape):
    """Bit for bit, so that a seed keeps its numbers."""
    expected = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(
        lecun_normal(keys[0], shape), expected(keys[0], shape)
    )
    both = [
        jax.vmap(lambda k, f=f: f(k, shape))(keys) for f in (lecun_normal, expected)
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_base_is_initialised_without_running_it(kind):
    config, horizon = tiny.network(kind), tiny.HORIZON.get(kind, 1)
    sizes = tiny.OBS_DIM, tiny.ACTION_DIM, horizon
    key = jax.random.key(0)
    chex.assert_trees_all_equal(
        init_base(config, key, *sizes),
        tiny.net(kind).init(key, *map(jnp.zeros, (*sizes[:2], ())))["params"],
    )
    text = str(jax.make_jaxpr(lambda key: init_base(config, key, *sizes))(key))
    assert "truncated_normal" in text and "dot_general" not in text


@functools.cache
def compiled(net):
    """(base, library, alpha) -> noise [B, A] on INPUTS."""
    return jax.jit(lambda *params: jax.vmap(make_denoise(net, *params))(*INPUTS))


def eps(base=None, library=None, alpha=None, kind="mlp", **changes):
    """Noise [B, A] of a tiny network with some fields of its config changed."""
    net = tiny.net(kind, **changes)
    return compiled(net)(base or tiny.base(kind), library, alpha)


def test_mish():
    x = jnp.concatenate([jnp.linspace(-40, 40, 4001), jnp.array([-1e4, 0.0, 1e4])])
    np.testing.assert_allclose(layers.mish(x), jax.nn.mish(x), rtol=2e-6, atol=1e-7)
    got, expected = (jax.vmap(jax.grad(f))(x) for f in (layers.mish, jax.nn.mish))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise_and_distinct(name):
    x = jnp.linspace(-3, 3, 12)
    got = ACTIVATIONS[name](x)
    np.testing.assert_allclose(ACTIVATIONS[name](x.reshape(3, 4)).ravel(), got)
    assert abs(ACTIVATIONS[name](jnp.array([0.0])).item()) < 1e-6
    for other in set(ACTIVATIONS) - {name}:
        assert np.abs(ACTIVATIONS[other](x) - got).max() > 1e-2


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(rate):
    bits = layers.dropout_bits(jax.random.key(0), 4, 25_000).ravel()
    dropped = layers.drop(jnp.ones(bits.size), bits, rate)
    kept = np.asarray(dropped) > 0
    deviation = np.sqrt(rate * (1 - rate) / bits.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation
    np.testing.assert_allclose(dropped[kept], 1 / (1 - rate), rtol=1e-3)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dropout_in_training_only(kind):
    net = tiny.net(kind, dropout=0.5)

    @jax.jit
    def trained(keys):
        def one(key, *inputs):
            return make_denoise(net, tiny.base(kind), dropout_key=key)(*inputs)

        return jax.vmap(one)(keys, *INPUTS)

    keys = tiny.keys(2 * B)
    without = eps(kind=kind, dropout=0.5)
    np.testing.assert_array_equal(without, eps(kind=kind))
    np.testing.assert_array_equal(trained(keys[:B]), trained(keys[:B]))
    for a, b in ((trained(keys[:B]), trained(keys[B:])), (trained(keys[:B]), without)):
        assert (np.abs(a - b).max(axis=1) > 1e-4).all()


def test_dropout_rate_zero_draws_nothing():
    inputs = [x[0] for x in INPUTS]
    plain = make_denoise(tiny.NET, tiny.base())
    with_key = make_denoise(tiny.NET, tiny.base(), dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(with_key(*inputs), plain(*inputs))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_merged_weights_give_the_same_noise_and_gradients(kind):
    def loss(params, merged):
        net = tiny.net(kind, merged)
        noise = jax.vmap(make_denoise(net, *params))(*INPUTS)
        return jnp.sum(noise**2), noise

    both = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    library = tiny.library(kind=kind)
    params = (tiny.base(kind), library, jnp.linspace(0.5, 2.0, tiny.SKILLS))
    got, expected = both(params, True), both(params, False)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("adapter", "dtype", "why"),
    [("mlp", "float32", "cannot be merged into"), ("lora", "bfloat16", "in bfloat16")],
)
def test_what_cannot_be_merged(adapter, dtype, why):
    net = tiny.net(merged=True, matmul_dtype=dtype)
    library = tiny.library(adapter=adapter)
    denoise = make_denoise(net, tiny.base(), library, jnp.ones(tiny.SKILLS))
    with pytest.raises(ValueError, match=why):
        denoise(*(x[0] for x in INPUTS))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bfloat16_products_only(kind):
    skills = {"library": tiny.library(kind=kind), "alpha": jnp.ones(tiny.SKILLS)}
    for kwargs in ({}, skills):
        kwargs = kwargs | {"kind": kind}
        full, half = eps(**kwargs), eps(**kwargs, matmul_dtype="bfloat16")
        assert half.dtype == jnp.float32
        error = np.linalg.norm(half - full) / np.linalg.norm(full)
        assert 0 < error < 0.03


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_parameters_and_gradients_stay_float32(kind):
    net = tiny.net(kind, matmul_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: init_base(net.config, jax.random.key(0), 3, 2))
    inputs = [x[0] for x in INPUTS]

    def loss(base):
        return jnp.sum(make_denoise(net, base)(*inputs) ** 2)

    grads = jax.eval_shape(jax.grad(loss), tiny.base(kind))
    skill = jax.eval_shape(lambda: init_skill(jax.random.key(0), tiny.base(kind), 2))
    for arrays in (shapes, grads, skill):
        assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {
            jnp.dtype("float32")
        }


def test_released_form_is_swish_with_skills_only():
    skills = {"library": tiny.library(), "alpha": jnp.ones(tiny.SKILLS)}
    np.testing.assert_array_equal(eps(compat="released"), eps())
    released = eps(**skills, compat="released")
    np.testing.assert_array_equal(released, eps(**skills, activation="swish"))
    assert np.abs(released - eps(**skills)).max() > 1e-3


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_batch_is_its_examples(kind):
    """With skills too, weighed alike or each example its own way."""
    batched = jax.jit(make_denoise(tiny.net(kind), tiny.base(kind)))(*INPUTS)
    np.testing.assert_allclose(batched, eps(kind=kind), atol=1e-6)
    library, alpha = tiny.library(kind=kind), tiny.normal(B, tiny.SKILLS, seed=2)
    one = functools.partial(make_denoise, tiny.net(kind), tiny.base(kind), library)
    expected = jax.jit(jax.vmap(lambda alpha, *x: one(alpha)(*x)))(alpha, *INPUTS)
    variables = {"params": tiny.base(kind), "skills": library}
    got = jax.jit(tiny.net(kind).apply)(variables, *INPUTS, alpha)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [("mlp", 1 + 4 * 2 + 2 * 6), ("transformer", 1 + 5 * 2 + 1 + 2 + 2 * 16)],
)
def test_every_input_and_parameter_matters(kind, leaves):
    net = tiny.net(kind, blocks=2)
    base = tiny.randomised(
        lambda: init_base(net.config, jax.random.key(0), 3, 2, net.horizon), 0
    )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(base, inputs):
        return jnp.sum(make_denoise(net, base)(*inputs) ** 2)

    of_base, of_inputs = grads(base, INPUTS)
    assert len(jax.tree.leaves(base)) == leaves
    for path, leaf in (tree.flatten(of_base) | dict(enumerate(of_inputs))).items():
        # Attention only compares keys with one another.
        assert (np.abs(leaf).max() > 1e-5) != str(path).endswith("key/bias"), path


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fresh_base(kind):
    net = tiny.net(kind)
    base = init_base(
        *(net.config, jax.random.key(0), tiny.OBS_DIM, tiny.ACTION_DIM, net.horizon)
    )
    chex.assert_trees_all_equal_shapes(base, tiny.base(kind))
    assert np.isfinite(eps(base, kind=kind)).all()
    assert not base["output"]["bias"].any()


def test_mlp_is_relu_layers_and_a_linear_one():
    net = MLP((4, 5), 2)
    params = tiny.randomised(
        lambda: net.init(jax.random.key(0), jnp.zeros(3))["params"], 0
    )
    x = tiny.normal(3)
    h = np.asarray(x)
    for name in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ params[name]["kernel"] + params[name]["bias"], 0)
    expected = h @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(net.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "cnn", f"choose from {', '.join(sorted(NETWORKS))}"),
        ("heads", 0, "heads: got 0"),
        ("activation", "gelu", f"choose from {', '.join(sorted(ACTIVATIONS))}"),
        ("compat", "authors", str(COMPATS[0])),
        ("matmul_dtype", "float16", "float32 or bfloat16"),
        ("width", 0, "width: got 0"),
        ("blocks", 0, "blocks: got 0"),
        ("time_features", 3, "time_features: got 3, expected an even number"),
    ],
)
def test_refused_sizes(field, value, message):
    with pytest.raises(InputError, match=message):
        NetworkConfig(**{field: value})


def test_refused_combinations():
    with pytest.raises(InputError, match="heads: got 3, expected a divisor"):
        tiny.network("transformer", heads=3)
    with pytest.raises(InputError, match="compat: got 'released' for a transformer"):
        tiny.network("transformer", compat="released")
    with pytest.raises(InputError, match="horizon: got 3, which does not divide"):
        make_network(tiny.NETWORK, 2, horizon=3)


def test_transformer_sees_actions_in_their_order():
    """And every action of the chunk is read by every other one's prediction."""
    net, base = tiny.net("transformer"), tiny.base("transformer")
    predict = jax.jit(make_denoise(net, base))
    obs, a_t, t = (x[0] for x in INPUTS)
    flipped = predict(obs, a_t[::-1], t)[::-1]
    assert np.abs(flipped - predict(obs, a_t, t)).max() > 1e-3
    jacobian = jax.jit(jax.jacobian(make_denoise(net, base), 1))(obs, a_t, t)
    assert np.abs(jacobian).min() > 1e-6
