"""Skills as pytrees: what adding, weighing, padding and merging them computes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psec_jax import lora, tree
from psec_jax.errors import InputError
from psec_jax.lora import ADAPTERS
from psec_jax.networks.denoiser import make_denoise
from psec_jax.networks.layers import mish

B = 5
OBS, A_T = tiny.normal(B, tiny.OBS_DIM), tiny.normal(B, tiny.ACTION_DIM, seed=1)
T = jnp.arange(B, dtype=jnp.float32)
ALPHA = tiny.normal(B, tiny.SKILLS, seed=2)


# Every form of skill over the mlp, and the default one over every other network.
FORMS = pytest.mark.parametrize(
    ("adapter", "kind"),
    [(adapter, "mlp") for adapter in ADAPTERS]
    + [("lora", kind) for kind in tiny.KINDS if kind != "mlp"],
)


@functools.partial(jax.jit, static_argnames="kind")
def base_eps(base, kind="mlp"):
    return jax.vmap(make_denoise(tiny.net(kind), base))(OBS, A_T, T)


@functools.partial(jax.jit, static_argnames="kind")
def per_sample_eps(bases, kind="mlp"):
    """Each example with base parameters of its own."""
    return jax.vmap(lambda base, *x: make_denoise(tiny.net(kind), base)(*x))(
        bases, OBS, A_T, T
    )


@functools.partial(jax.jit, static_argnames="kind")
def eps(library, alpha, kind="mlp"):
    """Noise [B, A] of the base with a library at weights [B, K]."""

    def one(alpha, *inputs):
        return make_denoise(tiny.net(kind), tiny.base(kind), library, alpha)(*inputs)

    return jax.vmap(one)(alpha, OBS, A_T, T)


def drawn_for_layers(kind, seed):
    """Weights [B, L, K], another vector for each example and layer."""
    layers = len(lora.dense_layers(tiny.base(kind)))
    return tiny.normal(B, layers, tiny.SKILLS, seed=seed)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_of_each_layer_are_merged_weights_per_sample(kind):
    base, library = tiny.base(kind), tiny.library(kind=kind)
    assert lora.layers_of(library) == list(lora.dense_layers(base))
    alpha = drawn_for_layers(kind, 3)
    merged = jax.jit(jax.vmap(lambda a: lora.merge(base, library, a)))(alpha)
    got, expected = eps(library, alpha, kind), per_sample_eps(merged, kind)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    shared = eps(library, alpha.mean(1), kind)
    assert np.abs(np.asarray(got) - shared).max() > 0.1


@FORMS
def test_equal_weights_of_all_layers_are_one_vector(adapter, kind):
    library = tiny.library(adapter=adapter, kind=kind)
    layers = len(lora.layers_of(library))
    rows = jnp.broadcast_to(ALPHA[:, None], (B, layers, tiny.SKILLS))
    np.testing.assert_array_equal(eps(library, rows, kind), eps(library, ALPHA, kind))


@FORMS
def test_another_layout_is_the_same_library(adapter, kind):
    library = tiny.library(adapter=adapter, kind=kind)
    moved = jax.jit(lora.inputs_first)(library)
    names = {path.rpartition("/")[2] for path in tree.flatten(moved)}
    assert "down" in names and "a" not in names
    got, expected = eps(moved, ALPHA, kind), eps(library, ALPHA, kind)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@FORMS
def test_a_layer_of_weight_zero_has_no_skill(adapter, kind):
    library = tiny.library(adapter=adapter, kind=kind)
    for row, layer in enumerate(lora.layers_of(library)):
        alpha = drawn_for_layers(kind, 4).at[:, row].set(0.0)
        flat = tree.flatten(library)
        without = tree.unflatten(flat | {f"{layer}/b": 0 * flat[f"{layer}/b"]})
        np.testing.assert_allclose(
            eps(library, alpha, kind), eps(without, alpha, kind), atol=1e-6
        )


def test_dense_layers_are_those_with_kernel_and_bias():
    layers = lora.dense_layers(tiny.base())
    assert set(layers) == {
        *("time_0", "time_1", "input", "block_0/up", "block_0/down", "output")
    }
    assert layers["block_0/up"] == (16, 32)
    attention = {f"block_0/{name}" for name in ("query", "key", "value", "attended")}
    layers = lora.dense_layers(tiny.base("transformer"))
    assert set(layers) == attention | {
        *("time_0", "time_1", "observation", "action", "block_0/up", "block_0/down"),
        "output",
    }
    assert {layers[name] for name in attention} == {(16, 16)}


@FORMS
def test_new_skill(adapter, kind):
    init = jax.jit(lora.init_skill, static_argnums=(2, 3))
    skill = init(jax.random.key(0), tiny.base(kind), 2, adapter)
    lora.check_skill(tiny.base(kind), skill)
    assert lora.adapter_of(skill) == adapter
    assert lora.rank_of(skill) == 2
    for path, leaf in tree.flatten(skill).items():
        assert bool(np.any(leaf)) == path.endswith("/a"), path
    got = eps(tiny.stack([skill]), np.full((B, 1), 16, np.float32), kind)
    np.testing.assert_allclose(got, base_eps(tiny.base(kind), kind), atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_delta_is_the_loop_over_skills(adapter):
    d, r, o = 4, 3, 6
    skills = [
        tiny.randomised(
            functools.partial(ADAPTERS[adapter], jax.random.key(0), d, o, r), k
        )
        for k in range(tiny.SKILLS)
    ]
    x, alpha = tiny.normal(d), tiny.normal(tiny.SKILLS)
    expected = 0
    for weight, skill in zip(alpha, skills, strict=True):
        h = x @ skill["a"]
        h = mish(h + skill["c"]) if "c" in skill else h
        expected += weight * h @ skill["b"]
    got = lora.adapter_delta(x, tree.stack(skills), alpha, mish)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fused_composition_is_per_sample_merged_weights(kind):
    library = tiny.library(kind=kind)
    merge = functools.partial(lora.merge, tiny.base(kind), library)
    merged = per_sample_eps(jax.jit(jax.vmap(merge))(ALPHA), kind)
    assert np.abs(merged - base_eps(tiny.base(kind), kind)).max() > 0.1
    np.testing.assert_allclose(eps(library, ALPHA, kind), merged, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_reach_every_adapter_alone(kind):
    """Those of the down matrices through up matrices that are not zero."""
    skill = tree.stack([tiny.skill(0, kind=kind)])
    for path, leaf in tree.flatten(
        jax.jit(jax.grad(lambda skill: jnp.sum(eps(skill, ALPHA[:, :1], kind) ** 2)))(
            skill
        )
    ).items():
        assert np.abs(leaf).max() > 0, path


def test_merged_product_of_tokens_has_the_plain_gradient():
    shapes = ((5, 3, 4), (4, 6), (4, 2), (2, 6))
    args = [tiny.normal(*shape, seed=i) for i, shape in enumerate(shapes)]

    def loss(product, x, *weights):
        return jnp.sum(jnp.sin(jax.vmap(product, (0, None, None, None))(x, *weights)))

    def grads(product):
        return jax.jit(jax.grad(functools.partial(loss, product), (0, 1, 2, 3)))(*args)

    expected = grads(lambda x, kernel, a, b: x @ (kernel + a @ b))
    chex.assert_trees_all_close(grads(lora.merged_product), expected, atol=1e-5)


@FORMS
def test_one_hot_alpha_is_the_skill_alone(adapter, kind):
    for k in range(tiny.SKILLS):
        one_hot = np.tile(np.eye(tiny.SKILLS, dtype=np.float32)[k], (B, 1))
        alone = tiny.stack([tiny.skill(k, adapter=adapter, kind=kind)])
        np.testing.assert_allclose(
            eps(tiny.library(adapter=adapter, kind=kind), one_hot, kind),
            eps(alone, np.ones((B, 1), np.float32), kind),
            atol=1e-5,
        )


@FORMS
def test_order_of_the_skills_does_not_matter(adapter, kind):
    library, order = tiny.library(adapter=adapter, kind=kind), [2, 0, 1]
    np.testing.assert_allclose(
        eps(tiny.take(library, order), np.asarray(ALPHA)[:, order], kind),
        eps(library, ALPHA, kind),
        atol=1e-5,
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_add_then_drop_is_the_identity(adapter):
    library = tiny.library(2, adapter)
    new = tiny.skill(2, adapter=adapter)
    more = tiny.add(library, new)
    chex.assert_trees_all_equal(more, tiny.library(3, adapter))
    chex.assert_trees_all_equal(tiny.drop(more, 2), library)
    chex.assert_trees_all_equal(tiny.drop(more, 0), tiny.take(more, [1, 2]))


@FORMS
def test_zero_padding_is_exact(adapter, kind):
    skill = tiny.skill(0, adapter=adapter, kind=kind)
    padded = tiny.pad(skill, 5)
    assert lora.rank_of(padded) == 5
    lora.check_skill(tiny.base(kind), padded)
    weight = np.full((B, 1), 1.5, np.float32)
    np.testing.assert_allclose(
        eps(tiny.stack([padded]), weight, kind),
        eps(tiny.stack([skill]), weight, kind),
        atol=1e-6,
    )


@FORMS
def test_skills_of_different_ranks_stack(adapter, kind):
    small, large = (tiny.skill(k, rank, adapter, kind) for k, rank in ((0, 1), (1, 4)))
    library = tiny.stack([small, large])
    chex.assert_trees_all_equal(tiny.take(library, [1]), tiny.stack([large]))
    np.testing.assert_allclose(
        eps(library, np.tile(np.float32([1, 0]), (B, 1)), kind),
        eps(tiny.stack([small]), np.ones((B, 1), np.float32), kind),
        atol=1e-5,
    )


@FORMS
def test_zero_skill_changes_nothing(adapter, kind):
    zero = lora.zero_skill(tiny.library(adapter=adapter, kind=kind))
    np.testing.assert_allclose(
        eps(zero, ALPHA, kind), base_eps(tiny.base(kind), kind), atol=1e-6
    )


@pytest.mark.parametrize("width", [1, tiny.SKILLS - 1, tiny.SKILLS + 1])
def test_wrong_number_of_weights_raises(width):
    alpha = jnp.ones((B, width))
    with pytest.raises(ValueError, match=f"3 skills but {width} weights"):
        eps(tiny.library(), alpha)
    with pytest.raises(ValueError, match=f"3 skills but {width} weights"):
        lora.merge(tiny.base(), tiny.library(), alpha[0])


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("input/b", None, "layer 'input' has no matrix 'b'"),
        ("input/b", jnp.zeros((3, 16)), r"'input' has a \(13, 2\) and b \(3, 16\)"),
        ("input/b", jnp.zeros((2, 15)), "layer 'input' maps 13 -> 15"),
        ("input/a", jnp.zeros((12, 2)), "layer 'input' maps 12 -> 16"),
        ("input/a", jnp.zeros((1, 13, 2)), r"has a \(1, 13, 2\) and b"),
        ("input/c", jnp.zeros(1), r"'input' has c \(1,\), expected \(2,\)"),
        ("input/scale", jnp.zeros(1), "layer 'input' has an unknown matrix 'scale'"),
    ],
)
def test_skill_of_another_shape_is_refused(path, leaf, message):
    flat = tree.flatten(tiny.skill(0)) | {path: leaf}
    skill = tree.unflatten({p: x for p, x in flat.items() if x is not None})
    with pytest.raises(InputError, match=f"walk: .*{message}"):
        lora.check_skill(tiny.base(), skill, "walk")


def test_layer_names_must_be_the_bases():
    skill = dict(tiny.skill(0))
    output = skill.pop("output")
    with pytest.raises(InputError, match="walk: no adapter for layer 'output'"):
        lora.check_skill(tiny.base(), skill, "walk")
    with pytest.raises(InputError, match="walk: layer 'head' is not in the base"):
        lora.check_skill(tiny.base(), tiny.skill(0) | {"head": output}, "walk")


def test_a_library_without_weights_raises():
    with pytest.raises(ValueError, match="a library and alpha need each other"):
        make_denoise(tiny.net(), tiny.base(), tiny.library())
    layers = len(lora.layers_of(tiny.library()))
    with pytest.raises(ValueError, match=f"{layers} layers but weights of 2"):
        make_denoise(tiny.net(), tiny.base(), tiny.library(), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="3 skills but 1 weights"):
        eps(tiny.library(), jnp.ones((B, layers, 1)))
    with pytest.raises(ValueError, match="a library and alpha need each other"):
        make_denoise(tiny.net(), tiny.base(), alpha=jnp.ones(1))


def test_refusals():
    key = jax.random.key(0)
    with pytest.raises(InputError, match="rank: got 0"):
        lora.init_skill(key, tiny.base(), 0)
    with pytest.raises(InputError, match=f"choose from {', '.join(sorted(ADAPTERS))}"):
        lora.init_skill(key, tiny.base(), 1, "none")
    with pytest.raises(InputError, match="at least one skill"):
        lora.stack_skills([])
    with pytest.raises(InputError, match="lora and mlp"):
        lora.stack_skills([tiny.skill(0), tiny.skill(1, adapter="mlp")])
    with pytest.raises(InputError, match="down to rank 1"):
        lora.pad(tiny.skill(0), 1)
    with pytest.raises(InputError, match="only lora skills"):
        lora.merge(tiny.base(), tiny.library(adapter="mlp"), jnp.ones(tiny.SKILLS))


def test_flatten_unflatten_and_fingerprint():
    base = tiny.base()
    chex.assert_trees_all_equal(tree.unflatten(tree.flatten(base)), base)
    assert list(tree.flatten(base)) == sorted(tree.flatten(base))
    assert tree.size(base) == sum(x.size for x in tree.flatten(base).values())
    other = base | {"output": base["output"] | {"bias": base["output"]["bias"] + 1}}
    assert tree.fingerprint(base) == tree.fingerprint(jax.device_get(base))
    assert tree.fingerprint(base) != tree.fingerprint(other)
