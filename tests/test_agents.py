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
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from psec_jax.agents.pretrain import PretrainConfig
from psec_jax.agents.skill import SkillConfig

from psec_jax import tree
from psec_jax.agents import gate, pretrain, skill
from psec_jax.agents.common import OptimiserConfig, TrainData, descend, init_state
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
from psec_jax.gating import GateConfig, init_gate
from psec_jax.lora import ADAPTERS
from psec_jax.losses import released_regulariser
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.process import ProcessConfig
from psec_jax.types import Normaliser

N, BATCH, STRENGTH = 512, 64, 2.0
NETWORK = NetworkConfig(width=32, blocks=1, expansion=2, time_features=8, time_width=16)
DIFFUSION = ProcessConfig()
OPTIMISER = OptimiserConfig(learning_rate=3e-3, weight_decay=0.0, ema=1.0)
BASE_STEPS = 1500
BASE = PretrainConfig(
    NETWORK,
    DIFFUSION,
    dataclasses.replace(OPTIMISER, learning_rate=5e-3, decay_steps=BASE_STEPS),
    BATCH,
)
SKILL = SkillConfig(NETWORK, DIFFUSION, OPTIMISER, BATCH, rank=4, alpha=STRENGTH)
SIDE = 0.6  # how far the skills push
OBS = tiny.normal(N, 2)
LEARNABLE = [
    (loss, level)
    for loss in GATE_LOSSES
    for level in LEVELS
    if loss != "diffusion" or level in DENOISERS
]


def demonstrations(actions, frozen=None):
    """Actions [2] or [N, 2] with a little noise."""
    noise = 0.05 * tiny.normal(N, 2, seed=1)
    return TrainData(OBS, jnp.asarray(actions, jnp.float32) + noise, frozen)


def sides():
    return np.where(np.arange(N)[:, None] % 2, 1, -1) * np.array([SIDE, -SIDE])


@functools.cache
def compiled(module, config):
    return jax.jit(functools.partial(module.update, config))


def run(update, state, data, steps, seed=0):
    """`steps` updates; the state and the last metrics."""
    keys = jax.random.split(jax.random.key(seed), steps)
    for step in range(steps):
        state, metrics = update(state, data, keys[step])
    return state, metrics


def gate_config(loss, level, **fields):
    policy = PolicyConfig(
        NETWORK, DIFFUSION, 2, level, GateConfig(widths=(16,), base_member=False)
    )
    return GateTrainConfig(policy, loss, OPTIMISER, BATCH, **fields)


@functools.cache
def init_base():
    init = jax.jit(functools.partial(pretrain.init, BASE), static_argnums=(1, 2))
    return init(jax.random.key(0), 2, 2)


@functools.cache
def trained_base():
    data = demonstrations(sides())
    return run(compiled(pretrain, BASE), init_base(), data, BASE_STEPS)[0].params


@functools.cache
def init_skills(adapter="lora"):
    """States of two skills, leaves [2, ...]."""
    config = dataclasses.replace(SKILL, adapter=adapter)
    init = jax.vmap(functools.partial(skill.init, config), (0, None))
    return jax.jit(init)(jax.random.split(jax.random.key(1), 2), trained_base())


def skill_data():
    """Data of the skills +x and +y, leaves [2, ...] but for the base."""
    x, y = demonstrations([SIDE, 0]), demonstrations([0, SIDE])
    both = tree.stack([x, y])
    return both._replace(frozen=trained_base())


@functools.cache
def two_skills():
    """`update` over both skills at once."""
    update = functools.partial(skill.update, SKILL)
    return jax.jit(jax.vmap(update, (0, TrainData(0, 0, None), 0)))


@functools.cache
def trained_library():
    """Both skills learned in one loop: the result is a library."""
    state, data = init_skills(), skill_data()
    keys = jax.random.split(jax.random.key(2), 800)
    for step in range(800):
        state, _ = two_skills()(state, data, jnp.stack([keys[step]] * 2))
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


def assert_trains_only(state, update, data, others):
    """Three updates move every leaf of the state and nothing of the data."""
    before = jax.tree.map(np.array, (state, data))
    got, metrics = run(update, state, data, 3)
    tiny.assert_trees_equal((state, data), before)
    assert got.step == state.step + 3
    assert moved(state.params, got.params) == set(tree.flatten(state.params)) - others
    tiny.assert_trees_equal(got.ema, got.params)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad/norm"] > 0


def test_base_training_reaches_the_whole_base():
    assert_trains_only(
        init_base(), compiled(pretrain, BASE), demonstrations(sides()), set()
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_skill_training_reaches_the_whole_skill_and_nothing_else(adapter):
    config = dataclasses.replace(SKILL, adapter=adapter)
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), init_skills(adapter))
    data = demonstrations([SIDE, 0], trained_base())
    assert_trains_only(state, compiled(skill, config), data, set())


@pytest.mark.parametrize(("loss", "level"), LEARNABLE)
def test_gate_training_reaches_the_whole_head_and_nothing_else(loss, level):
    config = gate_config(loss, level)
    data = demonstrations([SIDE / 2, SIDE / 2], frozen())
    state = gate.init(config, init_gate_params())
    assert set(tree.flatten(state.params)) == set(
        tree.flatten(init_gate_params()["head"])
    )
    assert_trains_only(state, compiled(gate, config), data, set())


def test_base_learns_two_modes():
    config = PolicyConfig(NETWORK, DIFFUSION, 2)
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
    data = demonstrations(target, frozen())
    state = gate.init(config, init_gate_params())
    state, _ = run(compiled(gate, config), state, data, 400)
    params = frozen()._replace(gate={"head": state.params})
    got = actions_of(config.policy, params)
    np.testing.assert_allclose(got.mean(0), target, atol=0.1)
    if level != "parameter":  # there the weights are known too
        alpha = jax.vmap(functools.partial(weights, config.policy), (None, 0))
        np.testing.assert_allclose(alpha(params, OBS).mean(0), 0.5, atol=0.15)


def test_gate_follows_the_state():
    """Left of the origin the demonstrations are skill +x's, right of it skill +y's."""
    config = gate_config("cloning", "action")
    left = np.asarray(OBS)[:, :1] < 0
    data = demonstrations(np.where(left, [SIDE, 0], [0, SIDE]), frozen())
    state = gate.init(config, init_gate_params())
    state, _ = run(compiled(gate, config), state, data, 400)
    got = actions_of(config.policy, frozen()._replace(gate={"head": state.params}))
    clear = np.abs(np.asarray(OBS)[:, 0]) > 0.5
    for side, where in (([SIDE, 0], left[:, 0]), ([0, SIDE], ~left[:, 0])):
        np.testing.assert_allclose(got[where & clear].mean(0), side, atol=0.12)


def test_vmap_over_seeds_is_the_single_runs():
    update = compiled(pretrain, BASE)
    data = demonstrations(sides())
    state = init_base()
    many = tree.stack([state, state])
    vmapped = jax.jit(jax.vmap(functools.partial(pretrain.update, BASE), (0, None, 0)))
    keys = jax.random.split(jax.random.key(5), (2, 3))
    singles = []
    for seed in range(2):
        single = state
        for step in range(3):
            single, _ = update(single, data, keys[seed, step])
        singles.append(single)
    for step in range(3):
        many, _ = vmapped(many, data, keys[:, step])
    tiny.assert_trees_close(many, tree.stack(singles), atol=1e-4)


def test_a_library_trained_at_once_is_its_skills_trained_alone():
    data, keys = skill_data(), jax.random.split(jax.random.key(6), 2)
    together, _ = two_skills()(init_skills(), data, keys)
    for k in range(2):
        state = jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf[k]), init_skills())
        one = TrainData(data.obs[k], data.action[k], data.frozen)
        single, _ = compiled(skill, SKILL)(state, one, keys[k])
        got = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        tiny.assert_trees_close(got, single, atol=1e-4)


def test_jit_on_and_off_agree():
    config = dataclasses.replace(gate_config("diffusion", "parameter"), batch_size=16)
    update = functools.partial(gate.update, config)
    data = demonstrations([SIDE / 2, SIDE / 2], frozen())
    state = gate.init(config, init_gate_params())
    expected, metrics = jax.jit(update)(state, data, jax.random.key(7))
    got, plain = update(state, data, jax.random.key(7))
    tiny.assert_trees_close(got.params, expected.params, atol=1e-4)
    tiny.assert_trees_close(plain, metrics, atol=1e-4, rtol=1e-3)


def test_data_sharded_over_eight_devices():
    update, state, data = compiled(pretrain, BASE), init_base(), demonstrations(sides())
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put(data, TrainData(rows, rows, whole))
    expected, metrics = run(update, state, data, 2)
    got, on_eight = run(update, jax.device_put(state, whole), sharded, 2)
    tiny.assert_trees_close(got.params, expected.params, atol=1e-4)
    tiny.assert_trees_close(on_eight, metrics, atol=1e-4, rtol=1e-3)


def test_released_gate_training_repeats_its_noise_and_regularises():
    """With one transition only the noise could differ between two updates."""
    paper = gate_config("diffusion", "parameter")
    released = dataclasses.replace(paper, compat="released", strength=3.0)
    data = demonstrations([0, 0], frozen())
    same = data._replace(
        obs=jnp.tile(data.obs[:1], (N, 1)), action=jnp.tile(data.action[:1], (N, 1))
    )
    state = gate.init(paper, init_gate_params())
    metrics = {
        config.compat: [
            compiled(gate, config)(state, same, key)[1] for key in tiny.keys(2)
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
    with pytest.raises(InputError, match=f"gate.loss 'bc'; choose from {losses}"):
        GateTrainConfig(policy, loss="bc")
    levels = ", ".join(sorted(DENOISERS))
    with pytest.raises(InputError, match=f"'action'; choose from {levels}"):
        GateTrainConfig(policy, loss="diffusion")
    with pytest.raises(InputError, match="no gate to train"):
        GateTrainConfig(dataclasses.replace(policy, gate=None), loss="cloning")
    with pytest.raises(InputError, match="gate.compat: got 'code'"):
        GateTrainConfig(policy, loss="cloning", compat="code")
    with pytest.raises(InputError, match="skill.alpha: got 0"):
        SkillConfig(alpha=0.0)
    for fields in (
        {"learning_rate": 0.0},
        {"ema": 0.0},
        {"decay_steps": -1},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(InputError, match=f"optimiser.{next(iter(fields))}"):
            OptimiserConfig(**fields)
