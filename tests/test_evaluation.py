"""Batched rollouts: what they count, and that batching changes nothing."""

import dataclasses
import os
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_env import LIMIT, SPEC

from psec_jax import envs, evaluation
from psec_jax.data import dataset
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.evaluation import episode_seeds, evaluate, evaluate_together, record
from psec_jax.runtime import platform

EPISODES = 7


@pytest.fixture(autouse=True)
def workers_find_tiny_env(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def overlap(request, monkeypatch):
    """Roll-outs as on a CPU, and with half of the environments at a time."""
    choices = dataclasses.replace(platform.PLATFORMS["cpu"], overlap=request.param)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", choices)


@jax.jit
def noisy(keys, obs):
    """Depends on the key and, elementwise, on the observation."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2,), minval=-1.0))(keys)
    return 0.5 * noise + 0.25 * jnp.tanh(obs)


@jax.jit
def chunky(keys, obs):
    """Chunks of two actions."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2, 2), minval=-1.0))(keys)
    return 0.5 * noise + 0.25 * jnp.tanh(obs)[:, None]


def played_plainly(act, horizon):
    """The rewards of the same episodes, one environment after the other."""
    env, key = envs.make(SPEC), jax.random.key(3)
    result = []
    for e, seed in enumerate(episode_seeds(3, EPISODES)):
        obs, rewards, ended = env.reset(int(seed)), [], False
        while not ended:
            if len(rewards) % horizon == 0:
                step_key = jax.random.fold_in(jax.random.fold_in(key, e), len(rewards))
                chunk = np.asarray(act(step_key[None], obs[None])).reshape(-1, 2)
            step = env.step(chunk[len(rewards) % horizon])
            obs, ended = step.obs, step.terminal or step.timeout
            rewards.append(step.reward)
        result.append(rewards)
    return result


@pytest.fixture(scope="module", params=[(noisy, 1), (chunky, 2)], ids=["h=1", "h=2"])
def one_by_one(request):
    """A policy, and the rewards of its episodes played one by one."""
    return request.param[0], played_plainly(*request.param)


@pytest.mark.parametrize(("width", "workers"), [(None, 2), (3, 1), (3, 2), (9, 2)])
def test_batching_changes_nothing(one_by_one, width, workers, overlap):
    act, rewards_of = one_by_one
    if width is None:
        episodes = evaluate(act, SPEC, EPISODES, 3, workers)
    else:
        with VectorEnv(SPEC, width, workers) as vector:
            episodes = evaluate(act, SPEC, EPISODES, 3, vector_env=vector)
    lengths = [len(rewards) for rewards in rewards_of]
    assert {3, LIMIT} == set(lengths)
    np.testing.assert_array_equal(episodes.lengths, lengths)
    np.testing.assert_array_equal(episodes.costs, 2.0 * np.array(lengths))
    np.testing.assert_array_equal(episodes.seeds, episode_seeds(3, EPISODES))
    expected = [sum(rewards) for rewards in rewards_of]
    np.testing.assert_allclose(episodes.returns, expected, rtol=1e-6)


REACH = "gymnasium:tiny_env:Reach-v0"


def test_success_is_that_of_any_step():
    """A raw action of 3 in the third step succeeds, one of 1 never does."""

    def act(keys, obs):
        sign = jnp.where(obs[:, :1] > 0.5, 0.5, -0.5)  # by how the episode starts
        return jnp.concatenate([sign, sign], 1)

    episodes = evaluate(act, REACH, EPISODES, 3, workers=2)
    starts = [envs.make(REACH).reset(int(seed))[0] for seed in episodes.seeds]
    expected = np.array(starts) > 0.5
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(episodes.success, expected)
    fields = evaluation.episode_fields(episodes, REACH, 3)
    assert fields["success"] == expected.astype(int).tolist()
    line = f", {expected.sum()} of {EPISODES} succeeded"
    assert evaluation.successes(fields["success"]) == line
    both = evaluate_together(
        lambda keys, obs: jnp.stack([act(keys[0], obs[0]), -act(keys[1], obs[1])]),
        2,
        REACH,
        EPISODES,
        3,
    )
    np.testing.assert_array_equal(both[0].success, ~both[1].success)


def test_without_reported_success_nothing_changes():
    episodes = evaluate(noisy, SPEC, 2, 3, workers=1)
    assert episodes.success is None and np.isnan(envs.Step(*range(5)).success)
    assert "success" not in evaluation.episode_fields(episodes, SPEC, 3)
    assert evaluation.successes(None) == ""
    with pytest.raises(InputError, match=r"success is 0\.5, expected 0 or 1"):
        evaluate(noisy, "gymnasium:tiny_env:Odd-v0", 2, 3, workers=1)


def test_more_episodes_keep_the_first_ones():
    few = evaluate(noisy, SPEC, 2, 3, workers=1)
    np.testing.assert_array_equal(few.seeds, episode_seeds(3, EPISODES)[:2])
    assert not np.intersect1d(few.seeds, evaluate(noisy, SPEC, 2, 4, 1).seeds).size


@pytest.mark.parametrize("act", [noisy, chunky])
def test_several_policies_play_as_each_alone(act, overlap):
    """They end at different steps, so that their chunks fall out of step."""

    def both(keys, obs):
        return jnp.stack([act(keys[0], obs[0]), -act(keys[1], obs[1])])

    alone = evaluate(act, SPEC, EPISODES, 3, 1)
    opposite = evaluate(lambda *x: -act(*x), SPEC, EPISODES, 3, 1)
    got = evaluate_together(both, 2, SPEC, EPISODES, 3)
    for episodes, expected in zip(got, (alone, opposite), strict=True):
        chex.assert_trees_all_close(episodes, expected, rtol=1e-6)


def test_record_gives_every_transition():
    with VectorEnv(SPEC, 2, 1) as vector:
        plain = evaluate(noisy, SPEC, 5, 3, vector_env=vector)
        result = record(noisy, SPEC, 5, 3, vector_env=vector)
    episodes, ds, slices = result
    for got, expected in zip(episodes, plain, strict=True):
        np.testing.assert_array_equal(got, expected)
    dataset.check(ds, "record")
    assert [s.stop - s.start for s in slices] == list(episodes.lengths)
    np.testing.assert_allclose(dataset.episode_returns(ds), episodes.returns, rtol=1e-6)
    np.testing.assert_array_equal(dataset.episode_costs(ds), episodes.costs)
    for rows in slices:
        np.testing.assert_array_equal(ds.obs[rows][1:], ds.next_obs[rows][:-1])
        np.testing.assert_array_equal(ds.obs[rows][:, 1], np.arange(len(ds.obs[rows])))


@pytest.mark.parametrize("workers", [1, 2])
def test_episodes_of_a_killed_worker_are_played_again(workers, overlap, capfd):
    with VectorEnv(SPEC, 3, workers) as vector:
        undisturbed = record(noisy, SPEC, EPISODES, 3, vector_env=vector)
    calls = []

    def deadly(keys, obs):
        """The same policy; some of its calls kill a worker first."""
        calls.append(None)
        if len(calls) in (2, 5, 8):
            pid = vector._workers[-1]._process.pid
            os.kill(pid, signal.SIGKILL)
        return noisy(keys, obs)

    with VectorEnv(SPEC, 3, workers) as vector:
        result = record(deadly, SPEC, EPISODES, 3, vector_env=vector)
    for got, expected in zip(result[0], undisturbed[0], strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(result[1], undisturbed[1], strict=True):
        np.testing.assert_array_equal(got, expected)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert f"environment worker {workers} of {workers}" in line
        assert "died (exit status -9)" in line and "played again" in line


def test_environments_step_while_others_wait(monkeypatch):
    """The policy acts for one half while the other half's step is not over."""
    choices = dataclasses.replace(platform.PLATFORMS["cpu"], overlap=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", choices)
    with VectorEnv(SPEC, 4, 2) as vector:
        stepping, begin = [], vector.start_step

        def start_step(slots, actions):
            result = begin(slots, actions)
            stepping.append(tuple(slots))

            def wait():
                stepping.remove(tuple(slots))
                return result()

            return wait

        seen = []

        def act(keys, obs):
            seen.append(list(stepping))
            return noisy(keys, obs)

        monkeypatch.setattr(vector, "start_step", start_step)
        evaluate(act, SPEC, 4, 3, vector_env=vector, max_steps=2)
    # Each half acts twice; only the first call finds no environment in a step.
    assert seen == [[], [(0, 1)], [(2, 3)], [(0, 1)]]


def test_a_step_left_alone_does_no_harm():
    with VectorEnv(SPEC, 2, 1) as vector:
        expected = vector.reset([0, 1], [5, 6])
        vector.start_step([0, 1], np.zeros((2, 2)))
        np.testing.assert_array_equal(vector.reset([1, 0], [6, 5]), expected[::-1])


def test_an_episode_that_does_not_repeat_is_an_error(capfd):
    with VectorEnv(SPEC, 1, 1) as vector:
        vector.reset([0], [5])
        vector._playing[0].seed = 6
        os.kill(vector._workers[0]._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="seed 6 came out otherwise"):
            vector.step([0], np.zeros((1, 2)))
    assert "died" in capfd.readouterr().err


def test_actions_are_clipped_and_the_batch_keeps_its_shape():
    shapes = set()

    def wild(keys, obs):
        shapes.add((keys.shape, obs.shape))
        return np.full((len(obs), 2), 50.0)

    with VectorEnv(SPEC, 3, 1) as vector:
        episodes = evaluate(wild, SPEC, 4, 0, vector_env=vector)
    assert shapes == {((3,), (3, 2))}
    np.testing.assert_allclose(episodes.returns, 2.5 * episodes.lengths)


def test_large_seeds():
    assert len(evaluate(noisy, SPEC, 1, 2**32 - 1, workers=1).returns) == 1


def test_refusals():
    for episodes in (0, -1):
        with pytest.raises(InputError, match=f"episodes is {episodes}, expected 1"):
            evaluate(noisy, SPEC, episodes, 0)
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=f"seed is {seed}"):
            evaluate(noisy, SPEC, 1, seed)
    with pytest.raises(InputError, match="unknown environment prefix"):
        evaluate(noisy, "tiny:Tiny", 1, 0)
    with VectorEnv(SPEC, 2, 1) as vector:
        with pytest.raises(InputError, match="expected dm_control:walker-walk"):
            evaluate(noisy, "dm_control:walker-walk", 1, 0, vector_env=vector)
        with pytest.raises(ValueError, match=r"actions \(2, 3\), .* expects \(2, 2\)"):
            evaluate(lambda k, o: np.zeros((2, 3)), SPEC, 1, 0, vector_env=vector)
        with pytest.raises(FloatingPointError, match="step 0 of episode 0"):
            evaluate(lambda k, o: o * np.nan, SPEC, 2, 0, vector_env=vector)


def test_width_is_bounded(monkeypatch):
    made = []

    class Watched(VectorEnv):
        def __init__(self, spec, num_envs, workers=None):
            made.append(num_envs)
            super().__init__(spec, num_envs, workers)

    monkeypatch.setattr(evaluation, "VectorEnv", Watched)
    monkeypatch.setattr(evaluation, "MAX_WIDTH", 2)
    assert len(evaluate(noisy, SPEC, 3, 0, workers=1).returns) == 3
    assert made == [2]
