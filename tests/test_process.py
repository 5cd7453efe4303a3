"""Schedules, samplers and losses against known answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import TypeCheckError

from psec_jax import losses
from psec_jax.errors import InputError
from psec_jax.networks.denoiser import make_denoise
from psec_jax.process import (
    PROCESSES,
    SCHEDULES,
    ProcessConfig,
    corrupt,
    ddpm_reverse,
    make_schedule,
    q_sample,
    sample,
    sample_from,
    scan_after_first,
    target,
)

OBS = jnp.zeros(tiny.OBS_DIM)
POINT = jnp.array([0.6, -0.3])


@functools.cache
def point_denoise(config):
    """The exact prediction where every action is POINT."""
    if config.kind == "flow":
        return lambda obs, a_t, t: (a_t - POINT) * config.steps / t
    alpha_bar = jnp.asarray(make_schedule(config).alpha_bar)

    def denoise(obs, a_t, t):
        ab = alpha_bar[t.astype(jnp.int32)]
        return (a_t - jnp.sqrt(ab) * POINT) / jnp.sqrt(1 - ab)

    return denoise


def gaussian_denoise(config, mean, std):
    """The exact prediction where actions are normal."""

    def velocity(obs, a_t, t):
        """E[eps - a | a_t]."""
        u = t / config.steps
        off = (a_t - (1 - u) * mean) / ((1 - u) ** 2 * std**2 + u**2)
        return u * off - (mean + (1 - u) * std**2 * off)

    if config.kind == "flow":
        return velocity
    alpha_bar = jnp.asarray(make_schedule(config).alpha_bar)

    def denoise(obs, a_t, t):
        ab = alpha_bar[t.astype(jnp.int32)]
        return jnp.sqrt(1 - ab) * (a_t - jnp.sqrt(ab) * mean) / (ab * std**2 + 1 - ab)

    return denoise


def network_denoise(obs, a_t, t):
    return make_denoise(tiny.NET, tiny.base())(obs, a_t, t)


@functools.cache
def sampler_of(denoise, config):
    one = functools.partial(sample, denoise, config)
    return jax.jit(jax.vmap(lambda key: one(key, OBS, 2)))


def draw(denoise, config, keys):
    """Actions [B, A], one for each key."""
    return np.asarray(sampler_of(denoise, config)(keys))


@pytest.mark.parametrize("steps", [1, 5, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name, steps):
    schedule = make_schedule(ProcessConfig(steps=steps, schedule=name))
    beta, alpha_bar = schedule
    for array in schedule:
        assert array.shape == (steps,)
        assert array.dtype == np.float32
        assert ((array > 0) & (array < 1)).all()
    assert (np.diff(alpha_bar) < 0).all()
    np.testing.assert_allclose(
        alpha_bar, np.cumprod(1 - beta.astype(np.float64)), rtol=1e-4
    )


def test_schedules_by_hand():
    for steps in (5, 50):
        config = ProcessConfig(steps=steps)
        np.testing.assert_allclose(
            make_schedule(config).alpha_bar[-1], np.exp(-(0.1 + 4.95)), rtol=1e-5
        )
    linear = make_schedule(ProcessConfig(steps=50, schedule="linear"))
    np.testing.assert_allclose(linear.beta[[0, -1]], [1e-4, 2e-2], rtol=1e-6)
    cosine = make_schedule(ProcessConfig(steps=50, schedule="cosine"))
    half = (np.cos((0.5 + 0.008) / 1.008 * np.pi / 2)) ** 2
    start = (np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    np.testing.assert_allclose(cosine.alpha_bar[24], half / start, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process(name):
    schedule = make_schedule(ProcessConfig(schedule=name))
    for t in range(5):
        ab = schedule.alpha_bar[t]
        at = functools.partial(q_sample, schedule, t=jnp.int32(t))
        np.testing.assert_allclose(at(POINT, eps=jnp.zeros(2)), np.sqrt(ab) * POINT)
        np.testing.assert_allclose(
            at(jnp.zeros(2), eps=jnp.ones(2)), np.sqrt([1 - ab, 1 - ab]), rtol=1e-6
        )


@pytest.mark.parametrize("kind", PROCESSES)
def test_corruption_and_target_are_of_one_path(kind):
    """From the action at the least time to almost all noise at the largest."""
    config = next(c for c in tiny.SAMPLERS.values() if c.kind == kind)
    config = dataclasses.replace(config, schedule="vp")
    eps = tiny.normal(2)
    for t in (1, 4):
        denoise, at = point_denoise(config), jnp.asarray(t)
        a_t = corrupt(config, POINT, at, eps)
        got = denoise(OBS, a_t, at.astype(jnp.float32))
        np.testing.assert_allclose(got, target(config, POINT, eps), atol=1e-5)
    assert losses.prediction_error(denoise, config, OBS, POINT, at, eps) < 1e-9


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        (name, schedule)
        for name, config in tiny.SAMPLERS.items()
        for schedule in (SCHEDULES if config.kind == "diffusion" else ["vp"])
    ],
)
def test_a_single_action_is_reached_exactly(sampler, schedule, clip):
    config = dataclasses.replace(
        tiny.SAMPLERS[sampler], schedule=schedule, start_scale=1.0, clip=clip
    )
    got = draw(point_denoise(config), config, tiny.keys(8))
    np.testing.assert_allclose(got, np.tile(POINT, (8, 1)), atol=1e-4)


@pytest.mark.parametrize("sampler", tiny.SAMPLERS)
def test_a_normal_distribution_is_reached(sampler):
    config = ProcessConfig(
        kind=tiny.SAMPLERS[sampler].kind, steps=200, sampler=sampler, clip=False
    )
    denoise = gaussian_denoise(config, POINT / 2, 0.15)
    got = draw(denoise, config, tiny.keys(4000))
    np.testing.assert_allclose(got.mean(0), POINT / 2, atol=0.01)
    np.testing.assert_allclose(got.std(0), 0.15, atol=0.01)


@pytest.mark.parametrize("sampler", tiny.SAMPLERS)
def test_actions_are_bounded_and_follow_the_key(sampler):
    mild = tiny.SAMPLERS[sampler]
    keys = tiny.keys(16)
    got = draw(network_denoise, mild, keys)
    assert len(np.unique(got, axis=0)) == len(keys)
    np.testing.assert_array_equal(draw(network_denoise, mild, keys), got)
    steep = dataclasses.replace(mild, schedule="vp", start_scale=4.0, clip=False)
    assert np.abs(draw(network_denoise, steep, keys)).max() == 1


@pytest.mark.parametrize("sampler", tiny.SAMPLERS)
def test_jit_on_and_off_agree(sampler):
    config = dataclasses.replace(tiny.SAMPLERS[sampler], steps=3)
    key = jax.random.key(0)
    jitted = draw(network_denoise, config, key[None])[0]
    with jax.disable_jit():
        plain = sample(network_denoise, config, key, OBS, 2)
    np.testing.assert_allclose(plain, jitted, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("sampler", sorted(set(tiny.SAMPLERS) - {"ddpm"}))
def test_all_but_ddpm_are_deterministic(sampler, steps):
    """Only the start is random: without it every key gives the same action."""
    config = dataclasses.replace(
        tiny.SAMPLERS[sampler], sampling_steps=steps, start_scale=0.0
    )
    got = draw(network_denoise, config, tiny.keys(4))
    np.testing.assert_array_equal(got, np.tile(got[0], (4, 1)))
    point = draw(point_denoise(config), config, tiny.keys(1))[0]
    np.testing.assert_allclose(point, POINT, atol=1e-4)
    assert np.abs(got).max() > 0


@pytest.mark.parametrize("sampler", tiny.SAMPLERS)
def test_no_gradient_goes_through_the_starting_noise(sampler):
    """With the first step before the loop: of a weight on the prediction, as NSEC's."""
    config, calls = tiny.SAMPLERS[sampler], []

    @jax.custom_vjp
    def noted(a_t):
        return a_t

    def back(_, grad):
        jax.debug.callback(lambda: calls.append(1))
        return (grad,)

    noted.defvjp(lambda a_t: (a_t, None), back)

    def action(alpha, scan):
        def denoise(obs, a_t, t):
            return alpha * network_denoise(obs, noted(a_t), t)

        noise = tiny.normal(config.steps + 1, 2)
        return jnp.sum(sample_from(denoise, config, noise, OBS, scan) ** 2)

    grads, counts = [], []
    for scan in (jax.lax.scan, scan_after_first):
        both = jax.value_and_grad(functools.partial(action, scan=scan))
        grads.append(jax.block_until_ready(jax.jit(both)(jnp.float32(0.7))))
        jax.effects_barrier()
        counts.append(len(calls))
    np.testing.assert_allclose(*grads, rtol=1e-5)
    assert abs(grads[0][1]) > 1e-2
    assert counts[1] - counts[0] == counts[0] - 1


def test_ddpm_noise_scales():
    keys = tiny.keys(4)
    still = dataclasses.replace(tiny.PROCESS, temperature=0.0, start_scale=0.0)
    got = draw(network_denoise, still, keys)
    np.testing.assert_array_equal(got, np.tile(got[0], (4, 1)))
    for change in ({"temperature": 1.0}, {"start_scale": 1.0}):
        moved = draw(network_denoise, dataclasses.replace(still, **change), keys)
        assert np.abs(moved - moved[0]).max() > 1e-3


def test_ddpm_adds_no_noise_at_the_last_step():
    config = ProcessConfig(steps=4)
    reverse = jax.jit(functools.partial(ddpm_reverse, network_denoise, config, OBS))
    a_T, z = tiny.normal(2), tiny.normal(4, 2, seed=1)
    action, trace = reverse(a_T, z)
    same, _ = reverse(a_T, z.at[0].set(9.0))
    np.testing.assert_array_equal(same, action)
    np.testing.assert_array_equal(trace[-1], action)
    _, other = reverse(a_T, z.at[1].set(9.0))
    np.testing.assert_array_equal(other[:2], trace[:2])
    assert np.abs(other[2] - trace[2]).max() > 1e-3
    assert (np.abs(other) <= 1).all()


@pytest.mark.parametrize(
    "config",
    [ProcessConfig(schedule=name) for name in SCHEDULES] + [tiny.SAMPLERS["euler"]],
)
def test_loss_of_the_exact_prediction_is_zero(config):
    loss = functools.partial(losses.diffusion_loss, point_denoise(config), config)
    got = jax.jit(jax.vmap(lambda key: loss(key, OBS, POINT)))(tiny.keys(16))
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_loss_of_no_noise_is_the_number_of_actions():
    """E ||eps||^2 = A: the sum over action dimensions, not the mean."""
    action = jnp.zeros(7)
    loss = functools.partial(
        losses.diffusion_loss,
        lambda obs, a_t, t: jnp.zeros(7),
        ProcessConfig(),
    )
    got = jax.jit(jax.vmap(lambda key: loss(key, OBS, action)))(tiny.keys(4000))
    np.testing.assert_allclose(got.mean(), 7, atol=5 * np.sqrt(14 / 4000))


def test_loss_draws_every_step():
    def denoise(obs, a_t, t):
        return jnp.zeros(2) + t * 1e3

    loss = functools.partial(losses.diffusion_loss, denoise, ProcessConfig())
    got = jax.jit(jax.vmap(lambda key: loss(key, OBS, POINT)))(tiny.keys(2000))
    steps = np.round(np.sqrt(got / 2) / 1e3)
    shares = [(steps == t).mean() for t in range(5)]
    np.testing.assert_allclose(shares, 0.2, atol=0.05)


def test_flow_loss_draws_times_of_the_whole_path():
    def denoise(obs, a_t, t):
        return jnp.zeros(2) + 1e3 * t

    config = tiny.SAMPLERS["euler"]
    loss = functools.partial(losses.diffusion_loss, denoise, config)
    got = jax.jit(jax.vmap(lambda key: loss(key, OBS, POINT)))(tiny.keys(2000))
    times = np.sqrt(got / 2) / 1e3
    shares = np.histogram(times, bins=5, range=(0, config.steps))[0] / 2000
    np.testing.assert_allclose(shares, 0.2, atol=0.05)


def test_midpoint_steps_are_of_second_order():
    """On a slope linear in the action, against the exponential that solves it."""

    def denoise(obs, a_t, t):
        return a_t - POINT

    def error(sampler, count):
        config = dataclasses.replace(
            tiny.SAMPLERS[sampler], sampling_steps=count, clip=False
        )
        start = config.start_scale * jax.vmap(
            lambda key: jax.random.normal(jax.random.split(key)[0], (2,))
        )(tiny.keys(8))
        exact = POINT + (start - POINT) * np.exp(-1)
        return np.abs(draw(denoise, config, tiny.keys(8)) - exact).max()

    for sampler, order in (("euler", 1), ("midpoint", 2)):
        ratio = error(sampler, 4) / error(sampler, 8)
        assert abs(np.log2(ratio) - order) < 0.2


def test_losses_by_hand():
    assert losses.cloning_loss(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])) == 5
    alpha = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    assert losses.released_regulariser(alpha, 10.0) == (3 - 5) ** 2 + (4 - 10) ** 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schedule", "quadratic", f"choose from {', '.join(sorted(SCHEDULES))}"),
        ("kind", "gan", f"choose from {', '.join(sorted(PROCESSES))}"),
        ("sampler", "euler", "unknown sampler 'euler'; choose from ddim, ddpm"),
        ("kind", "flow", "unknown sampler 'ddpm'; choose from euler, midpoint"),
        ("horizon", 0, "horizon: got 0, expected 1 or more"),
        ("execute", 0, r"execute: got 0, expected 1 to 1 \(horizon\)"),
        ("execute", 2, r"execute: got 2, expected 1 to 1 \(horizon\)"),
        ("steps", 0, "steps: got 0"),
        ("sampling_steps", 6, r"sampling_steps: got 6, expected 0 \(all\) to 5"),
        ("temperature", -1.0, "temperature: got -1.0"),
        ("start_scale", -1.0, "start_scale: got -1.0"),
    ],
)
def test_refused_configs(field, value, message):
    with pytest.raises(InputError, match=message):
        ProcessConfig(**{field: value})


def test_shapes_in_annotations_are_checked_while_tests_run():
    schedule = make_schedule(ProcessConfig())
    with pytest.raises(TypeCheckError):
        q_sample(schedule, jnp.zeros(3), jnp.int32(0), jnp.zeros(2))
