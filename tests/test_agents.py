"""What training changes, and whether it learns: a probe problem with known answers.

Actions are points in the plane. The base learns two opposite modes; one skill pushes
the action to +x, one to +y; a gate over both is trained on demonstrations along the
diagonal, and on demonstrations whose side depends on the state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from psec_jax import tree
from psec_jax.agents import cloning, gate
from psec_jax.agents.cloning import AdapterConfig, CloningConfig
from psec_jax.agents.common import (
    Demonstrations,
    OptimiserConfig,
    batch_noise,
    descend,
    init_state,
)
from psec_jax.agents.gate import GATE_LOSSES, GateTrainConfig
from psec_jax.composition import (
    DENOISERS,
    LEVELS,
    PolicyConfig,
    PolicyParams,
    act,
    weights,
)
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, grow_head, init_gate
from psec_jax.lora import ADAPTERS
from psec_jax.losses import released_regulariser
from psec_jax.networks.denoiser import NetworkConfig, make_denoise, make_network
from psec_jax.process import ProcessConfig, make_schedule, q_sample
from psec_jax.runtime import platform
from psec_jax.types import Normaliser

N, BATCH, STRENGTH = 512, 64, 2.0
NETWORK = NetworkConfig(width=32, blocks=1, expansion=2, time_features=8, time_width=16)
PROCESS = ProcessConfig()
OPTIMISER = OptimiserConfig(learning_rate=3e-3, weight_decay=0.0, ema=1.0)
BASE_STEPS = 1500
BASE = CloningConfig(
    NETWORK,
    PROCESS,
    dataclasses.replace(OPTIMISER, learning_rate=5e-3, decay_steps=BASE_STEPS),
    BATCH,
)
SKILL = CloningConfig(
    NETWORK, PROCESS, OPTIMISER, BATCH, skill=AdapterConfig(rank=4, alpha=STRENGTH)
)
SIDE = 0.6  # how far the skills push
OBS = tiny.normal(N, 2)
LEARNABLE = [
    (loss, level)
    for loss in GATE_LOSSES
    if not GATE_LOSSES[loss].critics  # those are in test_choice.py
    for level in LEVELS
    if loss != "diffusion" or level in DENOISERS
]


def demonstrations(actions):
    """Actions [2] or [N, 2] with a little noise."""
    noise = 0.05 * tiny.normal(N, 2, seed=1)
    return Demonstrations(OBS, jnp.asarray(actions, jnp.float32) + noise)


def sides():
    return np.where(np.arange(N)[:, None] % 2, 1, -1) * np.array([SIDE, -SIDE])


@functools.cache
def compiled(module, config):
    return jax.jit(drawing(module, config))


def drawing(module, config):
    """(state, data, frozen, key) -> `update` on rows drawn from the data."""
    update = functools.partial(module.update, config)
    return tiny.drawing(update, config.batch_size)


def run(update, state, data, frozen, steps, seed=0):
    """`steps` updates; the state and the last metrics."""
    keys = jax.random.split(jax.random.key(seed), steps)
    for step in range(steps):
        state, metrics = update(state, data, frozen, keys[step])
    return state, metrics


def gate_config(loss, level, **fields):
    policy = PolicyConfig(
        NETWORK, PROCESS, 2, level, GateConfig(widths=(16,), base_member=False)
    )
    return GateTrainConfig(policy, loss, OPTIMISER, BATCH, **fields)


@functools.cache
def init_base():
    init = jax.jit(functools.partial(cloning.init, BASE), static_argnums=(1, 2))
    return init(jax.random.key(0), 2, 2)


@functools.cache
def trained_base():
    data = demonstrations(sides())
    return run(compiled(cloning, BASE), init_base(), data, None, BASE_STEPS)[0].params


@functools.cache
def init_skills(adapter="lora"):
    """States of two skills, leaves [2, ...]."""
    config = skill_config(adapter)
    base = trained_base()
    init = jax.vmap(lambda key: cloning.init(config, key, 2, 2, base))
    return jax.jit(init)(jax.random.split(jax.random.key(1), 2))


def skill_config(adapter):
    form = dataclasses.replace(SKILL.skill, adapter=adapter)
    return dataclasses.replace(SKILL, skill=form)


def skill_data():
    """Data of the skills +x and +y, leaves [2, ...]."""
    return tree.stack([demonstrations([SIDE, 0]), demonstrations([0, SIDE])])


@functools.cache
def two_skills():
    """`update` over both skills at once."""
    return jax.jit(jax.vmap(drawing(cloning, SKILL), (0, 0, None, 0)))


@functools.cache
def trained_library():
    """Both skills learned in one loop: the result is a library."""
    state, data = init_skills(), skill_data()
    keys = jax.random.split(jax.random.key(2), 800)
    for step in range(800):
        both = jnp.stack([keys[step]] * 2)
        state, _ = two_skills()(state, data, trained_base(), both)
    return state.params


@functools.cache
def init_gate_params():
    init = functools.partial(init_gate, GateConfig(widths=(16,)), obs_dim=2)
    return jax.jit(init)(jax.random.key(3), start=jnp.full(2, 0.2))


def frozen():
    """Everything a gate's training leaves alone."""
    normaliser = Normaliser(jnp.zeros(2), jnp.ones(2))
    strength = jnp.full(2, STRENGTH)
    return PolicyParams(
        trained_base(), normaliser, trained_library(), strength, init_gate_params()
    )


@functools.cache
def acting(config):
    return jax.jit(jax.vmap(functools.partial(act, config), (None, 0, 0)))


def actions_of(config, params):
    return np.asarray(acting(config)(params, tiny.keys(N), OBS))


def moved(before, after):
    """Paths of the leaves that changed."""
    after = tree.flatten(after)
    return {p for p, x in tree.flatten(before).items() if np.any(x != after[p])}


def assert_trains_only(state, update, data, frozen):
    """Three updates move every leaf of the state and nothing else."""
    before = jax.tree.map(np.array, (state, data, frozen))
    got, metrics = run(update, state, data, frozen, 3)
    tiny.assert_trees_equal((state, data, frozen), before)
    assert got.step == state.step + 3
    assert moved(state.params, got.params) == set(tree.flatten(state.params))
    tiny.assert_trees_equal(got.ema, got.params)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad/norm"] > 0


def test_base_training_reaches_the_whole_base():
    update = compiled(cloning, BASE)
    assert_trains_only(init_base(), update, demonstrations(sides()), None)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_skill_training_reaches_the_whole_skill_and_nothing_else(adapter):
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), init_skills(adapter))
    update = compiled(cloning, skill_config(adapter))
    assert_trains_only(state, update, demonstrations([SIDE, 0]), trained_base())


@pytest.mark.parametrize(("loss", "level"), LEARNABLE)
def test_gate_training_reaches_the_whole_head_and_nothing_else(loss, level):
    config = gate_config(loss, level)
    data = demonstrations([SIDE / 2, SIDE / 2])
    state = gate.init(config, init_gate_params())
    assert set(tree.flatten(state.params)) == set(
        tree.flatten(init_gate_params()["head"])
    )
    assert_trains_only(state, compiled(gate, config), data, frozen())


def test_base_learns_two_modes():
    config = PolicyConfig(NETWORK, PROCESS, 2)
    params = PolicyParams(trained_base(), Normaliser(jnp.zeros(2), jnp.ones(2)))
    got = actions_of(config, params)
    mode = np.array([SIDE, -SIDE])
    near = [np.linalg.norm(got - m, axis=1) < 0.35 for m in (mode, -mode)]
    assert np.mean(near[0] | near[1]) > 0.75
    assert 0.3 < np.mean(near[0]) < 0.7


def test_skills_push_to_their_sides():
    params = frozen()
    config = gate_config("cloning", "parameter").policy
    for k, side in enumerate(([SIDE, 0], [0, SIDE])):
        alpha = STRENGTH * jnp.eye(2)[k]
        gate_form = dataclasses.replace(config.gate, head="constant")
        got = actions_of(
            dataclasses.replace(config, gate=gate_form),
            params._replace(gate={"head": {"alpha": alpha}}),
        )
        np.testing.assert_allclose(got.mean(0), side, atol=0.1)


@pytest.mark.parametrize(("loss", "level"), LEARNABLE)
def test_gate_reaches_the_diagonal(loss, level):
    config = gate_config(loss, level)
    target = np.array([SIDE / 2, SIDE / 2])
    data = demonstrations(target)
    state = gate.init(config, init_gate_params())
    state, _ = run(compiled(gate, config), state, data, frozen(), 400)
    params = frozen()._replace(gate={"head": state.params})
    got = actions_of(config.policy, params)
    np.testing.assert_allclose(got.mean(0), target, atol=0.1)
    if level != "parameter":  # there the weights are known too
        alpha = jax.vmap(functools.partial(weights, config.policy), (None, 0))
        np.testing.assert_allclose(alpha(params, OBS).mean(0), 0.5, atol=0.15)


@pytest.mark.parametrize("head", ["linear", "softmax"])
def test_a_gate_grown_by_a_skill_keeps_what_it_learned_and_trains_on(head):
    """First +x everywhere, over skill +x alone; then +y right of the origin."""
    config = gate_config("diffusion", "parameter")
    form = GateConfig(head=head, widths=(16,))
    policy = dataclasses.replace(config.policy, gate=form)
    config = dataclasses.replace(config, policy=policy)
    both, update = frozen(), compiled(gate, config)
    first = jax.jit(lambda tree: jax.tree.map(lambda x: x[:1], tree))
    library, strength = first((both.library, both.strength))
    one = both._replace(library=library, strength=strength)
    start = init_gate(form, jax.random.key(3), 2, strength)
    one, state = one._replace(gate=start), gate.init(config, start)
    state, _ = run(update, state, demonstrations([SIDE, 0]), one, 200)

    head = grow_head(form, state.params, both.strength, OBS)
    both = both._replace(gate={"head": head})
    of = jax.jit(jax.vmap(functools.partial(weights, policy), (None, 0)))
    learned = of(one._replace(gate={"head": state.params}), OBS)
    assert np.abs(learned).min() > 0.5
    np.testing.assert_allclose(of(both, OBS)[:, :1], learned, rtol=1e-6)
    assert np.abs(of(both, OBS)[:, 1]).max() < 1e-6

    right = np.asarray(OBS)[:, :1] > 0
    data = demonstrations(np.where(right, [0, SIDE], [SIDE, 0]))
    state, _ = run(update, gate.init(config, both.gate), data, both, 800)
    got = actions_of(policy, both._replace(gate={"head": state.params}))
    x = np.asarray(OBS)[:, 0]
    np.testing.assert_allclose(got[x > 0.5].mean(0), [0, SIDE], atol=0.15)
    np.testing.assert_allclose(got[x < -0.5].mean(0), [SIDE, 0], atol=0.15)


@pytest.mark.parametrize(
    ("loss", "level"), [c for c in LEARNABLE if c[1] != "parameter"]
)
def test_a_gate_of_merged_skills_is_the_same(loss, level, monkeypatch):
    """Large batches on a CPU merge each skill into the base."""
    config = gate_config(loss, level)
    state = gate.init(config, init_gate_params())
    data = demonstrations([SIDE / 2, SIDE / 2])
    apart, _ = run(compiled(gate, config), state, data, frozen(), 3)
    monkeypatch.setattr(
        platform, "PLATFORMS", {"cpu": platform.Platform(merge_from=BATCH)}
    )
    merged, _ = run(compiled.__wrapped__(gate, config), state, data, frozen(), 3)
    for x, y in zip(
        jax.tree.leaves(apart.params), jax.tree.leaves(merged.params), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert gate._merges(config, frozen(), BATCH)
    assert not gate._merges(config, frozen(), BATCH - 1)
    other = dataclasses.replace(config.policy.network, matmul_dtype="bfloat16")
    policy = dataclasses.replace(config.policy, network=other)
    rounded = dataclasses.replace(config, policy=policy)
    assert not gate._merges(rounded, frozen(), BATCH)


def test_gate_follows_the_state():
    """Left of the origin the demonstrations are skill +x's, right of it skill +y's."""
    config = gate_config("cloning", "action")
    left = np.asarray(OBS)[:, :1] < 0
    data = demonstrations(np.where(left, [SIDE, 0], [0, SIDE]))
    state = gate.init(config, init_gate_params())
    state, _ = run(compiled(gate, config), state, data, frozen(), 400)
    got = actions_of(config.policy, frozen()._replace(gate={"head": state.params}))
    clear = np.abs(np.asarray(OBS)[:, 0]) > 0.5
    for side, where in (([SIDE, 0], left[:, 0]), ([0, SIDE], ~left[:, 0])):
        np.testing.assert_allclose(got[where & clear].mean(0), side, atol=0.12)


@pytest.mark.parametrize("config", [BASE, SKILL], ids=["base", "skill"])
def test_an_update_by_hand(config):
    """The key of a step gives each example its time, noise and dropout, in this way."""
    config = dataclasses.replace(config, dropout=0.5, optimiser=OptimiserConfig())
    base = trained_base() if config.skill else None
    batch = jax.tree.map(lambda x: x[:8], demonstrations([SIDE, 0]))
    state = cloning.init(config, jax.random.key(1), 2, 2, base)
    merged = config.skill is not None

    def loss(params):
        def one(key, obs, action):
            dropout_key, noise_key = jax.random.split(key)
            t_key, eps_key = jax.random.split(noise_key)
            t = jax.random.randint(t_key, (), 0, PROCESS.steps)
            eps = jax.random.normal(eps_key, (2,))
            a_t = q_sample(make_schedule(PROCESS), action, t, eps)
            net = make_network(NETWORK, 2, merged=merged, dropout=0.5)
            given = (base, tree.stack([params]), jnp.full(1, STRENGTH))
            given = given if config.skill else (params, None, None)
            denoise = make_denoise(net, *given, dropout_key)
            return jnp.sum((denoise(obs, a_t, t.astype(jnp.float32)) - eps) ** 2)

        keys = jax.random.split(jax.random.key(5), 8)
        return jnp.mean(jax.vmap(one)(keys, *batch))

    def by_hand(state):
        grads = jax.grad(loss)(state.params)
        optimiser = optax.adamw(3e-4, weight_decay=1e-4)
        updates, _ = optimiser.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), loss(state.params)

    params, expected = jax.jit(by_hand)(state)
    update = jax.jit(functools.partial(cloning.update, config))
    got, metrics = update(state, batch, base, jax.random.key(5))
    # A step is 3e-4 long; other noise would turn many of its signs.
    tiny.assert_trees_close(got.params, params, atol=1e-6, rtol=0)
    (name,) = [name for name in metrics if name.startswith("loss/")]
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)


def test_an_anchor_pulls_and_fixes():
    """Finite weights by hand; infinite ones fix the parameter and its average."""
    anchor = cloning.Anchor(
        {"x": jnp.array([1.0, 2, 3]), "y": jnp.array([5.0])},
        {"x": jnp.array([2.0, 0, np.inf]), "y": jnp.array([0.5])},
    )
    now = {"x": jnp.array([4.0, 9, 3]), "y": jnp.array([3.0])}
    term, grads = jax.value_and_grad(functools.partial(cloning.anchor_term, anchor))(
        now
    )
    assert term == 2 * 9 + 0.5 * 4
    np.testing.assert_array_equal(grads["x"], [2 * 2 * 3, 0, 0])
    np.testing.assert_array_equal(grads["y"], [-2 * 0.5 * 2])

    config = dataclasses.replace(BASE, optimiser=OptimiserConfig(ema=0.3))
    state = cloning.init(config, jax.random.key(0), 2, 2)
    start = jax.tree.map(jnp.copy, state.params)
    moved = state._replace(params=jax.tree.map(lambda x: x + 1 / 64, start))
    batch = jax.tree.map(lambda x: x[:8], demonstrations([SIDE, 0]))
    step = jax.jit(functools.partial(cloning.update, config))
    free = jax.tree.map(jnp.zeros_like, start)
    plain, _ = step(moved, batch, None, jax.random.key(5))
    same, metrics = step(moved, batch, cloning.Anchor(start, free), jax.random.key(5))
    tiny.assert_trees_close(same.params, plain.params, atol=1e-6)
    assert metrics["loss/anchor"] == 0
    strong = jax.tree.map(lambda x: x + 1e6, free)
    back, metrics = step(moved, batch, cloning.Anchor(start, strong), jax.random.key(5))
    np.testing.assert_allclose(
        metrics["loss/anchor"], 1e6 * tree.size(start) / 64**2, rtol=1e-3
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_array_less(x, y), back.params, moved.params
    )

    def alternating(x):
        """Every second parameter is fixed."""
        return jnp.where(jnp.arange(x.size) % 2, np.inf, 0).reshape(x.shape)

    half = jax.tree.map(alternating, start)
    for seed in range(5):
        state, _ = step(state, batch, cloning.Anchor(start, half), jax.random.key(seed))

    def check(now, before, weight):
        still = np.isinf(weight)
        np.testing.assert_array_equal(now[still], before[still])
        assert not np.any(now[~still] == before[~still])

    for kind in (state.params, state.ema):
        jax.tree.map(check, kind, start, half)


def test_fisher_of_the_last_bias_by_hand():
    """There the gradient of ||prediction - eps||^2 is twice the error."""
    params, key = init_base().params, jax.random.key(2)
    batch = jax.tree.map(lambda x: x[:5], demonstrations([SIDE, 0]))
    got = jax.jit(cloning.fisher, static_argnums=0)(BASE, params, batch, key)
    noise = batch_noise(PROCESS, key, 5, 2)
    denoise = make_denoise(make_network(NETWORK, 2), params)
    errors = []
    for obs, action, t, eps in zip(*batch, noise.t, noise.eps, strict=True):
        a_t = q_sample(make_schedule(PROCESS), action, t, eps)
        errors.append(denoise(obs, a_t, t.astype(jnp.float32)) - eps)
    expected = np.mean((2 * np.array(errors)) ** 2, axis=0)
    np.testing.assert_allclose(got["output"]["bias"], expected, rtol=1e-4)
    assert tree.shapes(got) == tree.shapes(params)


def test_vmap_over_seeds_is_the_single_runs():
    update = compiled(cloning, BASE)
    data = demonstrations(sides())
    state = init_base()
    many = tree.stack([state, state])
    vmapped = jax.jit(jax.vmap(drawing(cloning, BASE), (0, None, None, 0)))
    keys = jax.random.split(jax.random.key(5), (2, 3))
    singles = []
    for seed in range(2):
        single = state
        for step in range(3):
            single, _ = update(single, data, None, keys[seed, step])
        singles.append(single)
    for step in range(3):
        many, _ = vmapped(many, data, None, keys[:, step])
    tiny.assert_trees_close(many, tree.stack(singles), atol=1e-4)


def test_a_library_trained_at_once_is_its_skills_trained_alone():
    data, keys = skill_data(), jax.random.split(jax.random.key(6), 2)
    both, _ = two_skills()(init_skills(), data, trained_base(), keys)
    for k in range(2):
        state = jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf[k]), init_skills())
        one = Demonstrations(data.obs[k], data.action[k])
        single, _ = compiled(cloning, SKILL)(state, one, trained_base(), keys[k])
        got = jax.tree.map(lambda leaf, k=k: leaf[k], both)
        tiny.assert_trees_close(got, single, atol=1e-4)


def test_jit_on_and_off_agree():
    config = dataclasses.replace(gate_config("diffusion", "parameter"), batch_size=16)
    update = functools.partial(gate.update, config)
    data = demonstrations([SIDE / 2, SIDE / 2])
    batch = jax.tree.map(lambda x: x[:16], data)
    state = gate.init(config, init_gate_params())
    expected, metrics = jax.jit(update)(state, batch, frozen(), jax.random.key(7))
    got, plain = update(state, batch, frozen(), jax.random.key(7))
    tiny.assert_trees_close(got.params, expected.params, atol=1e-4)
    tiny.assert_trees_close(plain, metrics, atol=1e-4, rtol=1e-3)


def test_data_sharded_over_eight_devices():
    update, state, data = compiled(cloning, BASE), init_base(), demonstrations(sides())
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put(data, rows)
    expected, metrics = run(update, state, data, None, 2)
    got, on_eight = run(update, jax.device_put(state, whole), sharded, None, 2)
    tiny.assert_trees_close(got.params, expected.params, atol=1e-4)
    tiny.assert_trees_close(on_eight, metrics, atol=1e-4, rtol=1e-3)


def test_released_gate_training_repeats_its_noise_and_regularises():
    """With one transition only the noise could differ between two updates."""
    paper = gate_config("diffusion", "parameter")
    released = dataclasses.replace(paper, compat="released", strength=3.0)
    data = demonstrations([0, 0])
    same = Demonstrations(
        obs=jnp.tile(data.obs[:1], (N, 1)), action=jnp.tile(data.action[:1], (N, 1))
    )
    state = gate.init(paper, init_gate_params())
    metrics = {
        config.compat: [
            compiled(gate, config)(state, same, frozen(), key)[1]
            for key in tiny.keys(2)
        ]
        for config in (paper, released)
    }
    losses = {c: [m["loss/gate"] for m in pair] for c, pair in metrics.items()}
    assert losses["released"][0] == losses["released"][1]
    assert losses["paper"][0] != losses["paper"][1]
    assert "loss/regulariser" not in metrics["paper"][0]
    params = frozen()
    alpha = jax.vmap(functools.partial(weights, paper.policy), (None, 0))
    np.testing.assert_allclose(
        metrics["released"][0]["loss/regulariser"],
        released_regulariser(alpha(params, same.obs[:BATCH]), 3.0),
        rtol=1e-4,
    )


def test_optimiser_by_hand():
    """Adam's first step is the learning rate, whatever the gradient's size."""
    config = OptimiserConfig(0.1, decay_steps=2, weight_decay=0.5, ema=0.25)

    def loss_fn(params):
        return 7.0 * params["w"], {}

    step = jax.jit(lambda state: descend(config, state, loss_fn)[0])
    first = step(init_state(config, {"w": jnp.float32(2.0)}))
    np.testing.assert_allclose(first.params["w"], 2 - 0.1 * (1 + 0.5 * 2), rtol=1e-4)
    np.testing.assert_allclose(first.ema["w"], 2 - 0.25 * 0.2, rtol=1e-4)
    last = step(step(first))
    np.testing.assert_array_equal(step(last).params["w"], last.params["w"])
    assert last.step == 3


def test_refusals():
    policy = gate_config("cloning", "action").policy
    losses = ", ".join(sorted(GATE_LOSSES))
    with pytest.raises(InputError, match=f"unknown loss 'bc'; choose from {losses}"):
        GateTrainConfig(policy, loss="bc")
    levels = ", ".join(sorted(DENOISERS))
    with pytest.raises(InputError, match=f"'action'; choose from {levels}"):
        GateTrainConfig(policy, loss="diffusion")
    with pytest.raises(InputError, match="no gate to train"):
        GateTrainConfig(dataclasses.replace(policy, gate=None), loss="cloning")
    with pytest.raises(InputError, match="compat: got 'code'"):
        GateTrainConfig(policy, loss="cloning", compat="code")
    for fields, message in (
        ({"alpha": 0.0}, "alpha: got 0"),
        ({"rank": 0}, "rank: got 0, expected 1 or more"),
        ({"adapter": "x"}, "unknown adapter 'x'; choose from lora, mlp"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            AdapterConfig(**fields)
    gates = functools.partial(GateTrainConfig, policy, "cloning")
    for config in (CloningConfig, gates):
        with pytest.raises(InputError, match="^batch_size: got 0, expected 1 or more"):
            config(batch_size=0)
    for fields in (
        {"learning_rate": 0.0},
        {"ema": 0.0},
        {"decay_steps": -1},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(InputError, match=f"^{next(iter(fields))}"):
            OptimiserConfig(**fields)
