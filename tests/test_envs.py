"""Environments, worker processes and packaged experts; simulators really run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_env import LIMIT, SPEC

from psec_jax import envs
from psec_jax.data import d4rl
from psec_jax.data.actions import ActionBox
from psec_jax.envs import experts
from psec_jax.envs.vector import RESTARTS, VectorEnv
from psec_jax.envs.workers import Worker, default_workers
from psec_jax.errors import InputError
from psec_jax.workflows.collection import collect

WALKER = "dm_control:walker-walk"


@pytest.fixture(autouse=True)
def workers_find_tiny_env(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def play(env, seed, steps=30):
    """Observations and rewards of random actions."""
    generator = np.random.default_rng(0)
    obs, rewards = [env.reset(seed)], []
    for _ in range(steps):
        step = env.step(generator.uniform(-1, 1, env.action_dim).astype(np.float32))
        obs.append(step.obs)
        rewards.append(step.reward)
    return np.array(obs), np.array(rewards)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (WALKER, (24, 6, 1000)),
        ("dm_control:ball_in_cup-catch", (8, 2, 1000)),
        ("gymnasium:Swimmer-v5", (8, 2, 1000)),
        ("dm_control:walker-walk@friction:0.5,gravity:2", (24, 6, 1000)),
        ("gymnasium:Walker2d-v5@friction:0.5,thigh_size:2", (17, 6, 1000)),
    ],
)
def test_reset_repeats_the_episode_of_a_fresh_environment(spec, sizes):
    used = envs.make(spec)
    assert isinstance(used, envs.Env)
    assert (used.obs_dim, used.action_dim, used.max_steps) == sizes
    assert used.spec == spec
    first = play(used, seed=5)
    other = play(used, seed=6)
    again = play(used, seed=5)
    fresh = envs.make(spec)
    assert first[0].dtype == np.float32
    for got in (again, play(fresh, seed=5)):
        np.testing.assert_array_equal(got[0], first[0])
        np.testing.assert_array_equal(got[1], first[1])
    assert not np.array_equal(first[0], other[0])
    used.close()
    fresh.close()


def test_dm_control_agrees_with_the_suite():
    from dm_control import suite

    raw = suite.load("walker", "walk", task_kwargs={"random": 11})
    expected = np.concatenate([np.ravel(v) for v in raw.reset().observation.values()])
    env = envs.make(WALKER)
    np.testing.assert_array_equal(env.reset(11), expected.astype(np.float32))
    action = np.linspace(-1, 1, 6, dtype=np.float32)
    for _ in range(10):
        result, step = raw.step(action.astype(np.float64)), env.step(action)
    expected = np.concatenate([np.ravel(v) for v in result.observation.values()])
    np.testing.assert_array_equal(step.obs, expected.astype(np.float32))
    assert step.reward == result.reward
    assert (step.cost, step.terminal, step.timeout) == (0.0, False, False)


@pytest.mark.parametrize(
    ("speed", "moving", "met"),
    [
        (3.0, 3.2, 1.0),  # within a tenth
        (3.0, 4.8, 0.5),  # the band ends at 3.3, and 1.5 beyond it half is left
        (3.0, 0.0, 0.1),
        (-2.0, -2.1, 1.0),
        (-2.0, 2.0, 0.0),
        (0.5, 0.1, 0.7),  # 0.1 and 0.5 m/s at least
    ],
)
def test_a_target_speed_by_hand(speed, moving, met):
    env = envs.make(f"{WALKER}?speed={speed}")
    assert env.spec == f"{WALKER}?speed={speed}" and env.max_steps == 1000
    env.reset(0)
    physics = env._env.physics

    class Moving:
        def __getattr__(self, name):
            return getattr(physics, name)

        def horizontal_velocity(self):
            return moving

    standing = envs.make("dm_control:walker-stand")
    standing.reset(0)
    upright = standing._env.task.get_reward(physics)
    got = env._env.task.get_reward(Moving())
    np.testing.assert_allclose(got, upright * (5 * met + 1) / 6, rtol=1e-6)


def test_demonstrators_keep_a_target_speed(monkeypatch, tmp_path):
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path))
    path = collect(f"{WALKER}?speed=3&time_limit=5", "scripted", 1, 0)
    ds, attrs = d4rl.load(path)
    assert len(ds.obs) == 200 and attrs["returns"] > 120
    faster, _ = d4rl.load(collect(f"{WALKER}?speed=6&time_limit=5", "scripted", 1, 0))
    index = 14 + 1 + 1  # orientations, height, then the torso's velocity up and ahead
    assert 2 < ds.obs[80:, index].mean() < 4 < faster.obs[80:, index].mean() < 7
    still, _ = d4rl.load(collect(f"{WALKER}?speed=0&time_limit=5", "scripted", 1, 0))
    assert np.abs(still.obs[80:, index].mean()) < 0.3
    for speed in (-1, -2):
        name = f"{WALKER}?speed={speed}&time_limit=5"
        back, _ = d4rl.load(collect(name, "scripted", 1, 0))
        assert np.abs(back.obs[120:, index].mean() - speed) < 0.4
    for speed, message in (
        ("'fast'", "speed: got 'fast', expected a number"),
        ("11", "speed: got 11, expected -10 to 10 m/s"),
    ):
        with pytest.raises(InputError, match=message):
            envs.make(f"{WALKER}?speed={speed}")
    with pytest.raises(InputError, match="unknown policy 'scripted'"):
        collect(f"{WALKER}?speed=-3", "scripted", 1, 0)


def test_dm_control_episode_is_cut_at_the_limit():
    env = envs.make(WALKER)
    env.reset(0)
    for t in range(env.max_steps):
        step = env.step(np.zeros(6))
        assert step.timeout == (t == 999) and not step.terminal


def test_gymnasium_rescales_actions_and_reads_costs():
    env = envs.make(SPEC)
    assert (env.obs_dim, env.action_dim, env.max_steps) == (2, 2, LIMIT)
    seed = next(s for s in range(50) if env.reset(s)[0] <= 0.5)
    env.reset(seed)
    steps = [env.step(np.array([0.5, -1.0])) for _ in range(LIMIT)]
    assert steps[0].reward == pytest.approx((3 - 1) / 2)
    assert steps[0].cost == 2.0
    assert [s.timeout for s in steps] == [False] * 5 + [True]
    assert not any(s.terminal for s in steps)
    seed = next(s for s in range(50) if env.reset(s)[0] > 0.5)
    env.reset(seed)
    steps = [env.step(np.zeros(2)) for _ in range(3)]
    assert [s.terminal for s in steps] == [False, False, True]
    assert not any(s.timeout for s in steps)


def test_action_box():
    same = ActionBox.of(-np.ones(2), np.ones(2))
    action = np.array([0.1, -0.7], np.float32)
    np.testing.assert_array_equal(same.to_env(action), action.astype(np.float64))
    box = ActionBox.of(np.array([0.0, -2.0]), np.array([4.0, 6.0]))
    np.testing.assert_allclose(
        box.to_env(np.array([[-1, 1], [0, 0]])), [[0, 6], [2, 2]]
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("walker-walk", "expected PREFIX:NAME, bullet:TASK or dm_control:DOMAIN-T"),
        ("brax:ant", "unknown environment prefix 'brax'; choose from bullet, d"),
        ("dm_control:wolker-walk", "unknown domain 'wolker'; choose from acrobot"),
        ("dm_control:walker-fly", "unknown task 'fly' of walker; choose from walker-r"),
        ("dm_control:walker", "unknown task '' of walker"),
        ("dm_control:lqr-lqr_2_1", "and a time limit, got .* a limit of inf steps"),
        ("gymnasium:Swimmer-v99", "gymnasium:Swimmer-v99: Environment version"),
        ("gymnasium:Nothing-v0", "`Nothing` doesn't exist"),
        ("gymnasium:no_such_package:Nothing-v0", "no_such_package"),
        ("gymnasium:CartPole-v1", "expected a bounded Box"),
        ("gymnasium:tiny_env:Endless-v0", "no time limit"),
    ],
)
def test_unknown_environments(spec, message):
    with pytest.raises(InputError, match=message) as told:
        envs.make(spec)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("spec", "missing"),
    [("gymnasium:Swimmer-v5", "gymnasium"), (WALKER, "dm_control")],
)
def test_missing_package_names_the_extra(spec, missing, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"pip install 'psec_jax\[{missing}\]'"):
        envs.make(spec)


@pytest.mark.parametrize("workers", [1, 2])
def test_vector_env_equals_single_environments(workers):
    generator = np.random.default_rng(1)
    seeds = [4, 9, 2]
    singles = [envs.make(WALKER) for _ in seeds]
    with VectorEnv(WALKER, 3, workers) as vector:
        assert (vector.obs_dim, vector.action_dim, vector.max_steps) == (24, 6, 1000)
        obs = vector.reset([2, 0, 1], [seeds[i] for i in (2, 0, 1)])
        expected = [singles[i].reset(seeds[i]) for i in (2, 0, 1)]
        np.testing.assert_array_equal(obs, expected)
        for indices in ([0, 1, 2], [2, 1], [1], [0, 2]):
            actions = generator.uniform(-1, 1, (len(indices), 6)).astype(np.float32)
            step = vector.step(indices, actions)
            pairs = zip(indices, actions, strict=True)
            expected = [singles[i].step(a) for i, a in pairs]
            for got, values in zip(step, zip(*expected, strict=True), strict=True):
                np.testing.assert_array_equal(got, np.array(values))


def test_vector_env_refuses():
    for arguments in ((SPEC, 0), (SPEC, 2, 0)):
        with pytest.raises(InputError, match="expected 1 or more"):
            VectorEnv(*arguments)
    with pytest.raises(InputError, match="unknown domain 'wolker'"):
        VectorEnv("dm_control:wolker-walk", 2)
    with VectorEnv(SPEC, 2, 1) as vector:
        with pytest.raises(IndexError, match="expected 0 to 1"):
            vector.reset([2], [0])
        with pytest.raises(ValueError, match=r"expected \(1, 2\)"):
            vector.step([0], np.zeros((1, 3)))
    with pytest.raises(RuntimeError, match="closed"):
        vector.reset([0], [0])
    vector.close()


def test_a_worker_that_keeps_dying_is_named(monkeypatch, capfd):
    monkeypatch.setenv("TINY_DIES", "1")
    with VectorEnv(SPEC, 2, 2) as vector:
        vector.reset([0, 1], [0, 0])
        actions = np.zeros((2, 2))
        actions[1] = 1
        named = r"environment worker 2 of 2 .* died \(exit status 7\)"
        for _ in range(2):  # and it stays so
            with pytest.raises(RuntimeError, match=named):
                vector.step([0, 1], actions)
                vector.step([1], actions[1:])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == RESTARTS
    for number, line in enumerate(lines, 1):
        assert re.match(f"{named}; .* played again .restart {number} of", line)


def tell_environment(pipe):
    """A worker's job: what it was started with."""
    pipe.send(dict(os.environ))


def test_workers_leave_out_large_pages(monkeypatch):
    """`make demo` sets them for training; MetaDrive crashes with them."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    worker = Worker("test_envs:tell_environment", name="worker")
    assert "GLIBC_TUNABLES" not in worker.recv()
    worker.close()


def test_workers_never_run_the_main_module_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('main runs')\n"
        "from psec_jax.envs.vector import RESTARTS, VectorEnv\n"
        f"with VectorEnv({SPEC!r}, 2, 2) as vector:\n"
        "    print(vector.reset([0, 1], [3, 4]).shape)\n"
    )
    root, tests = Path(__file__).parents[1], Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tests}"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script], env=env, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("main runs\n(2, 2)\n", "")


def test_a_refusal_that_nobody_waits_for_is_silent(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    worker = Worker("tiny_env:refuse_late", name="late")
    worker.close()
    assert worker._process.returncode == 0
    assert capfd.readouterr() == ("", "")


def test_default_workers():
    assert default_workers(1) == 1
    assert 1 <= default_workers(10_000) <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("task", "least"),
    [("stand", 850), ("walk", 850), ("walk?speed=-1", 850), ("walk?speed=-2", 850)],
)
def test_packaged_experts_do_their_task(task, least):
    spec = f"dm_control:walker-{task}"
    env = envs.make(spec)
    policy = experts.make_policy("expert", spec, 24, 6)
    obs, total = env.reset(0), 0.0
    for _ in range(env.max_steps):
        step = env.step(policy(obs, np.random.default_rng(0)))
        obs, total = step.obs, total + step.reward
    assert total > least


def test_cards_say_where_experts_come_from():
    cards = experts.cards()
    tasks = ("run", "stand", "walk", "walk?speed=-1", "walk?speed=-2")
    assert sorted(cards) == [f"dm_control:walker-{task}" for task in tasks]
    for spec, card in cards.items():
        needed = {"source", "algorithm", "steps", "returns", "licence", "medium"}
        assert needed <= card.keys()
        assert card["medium"]["returns"]["mean"] < 0.7 * card["returns"]["mean"]
        assert experts.expert_path(spec).is_file()
        json.dumps(card, allow_nan=False)


def tiny_expert(path, norm=True, **replaced):
    generator = np.random.default_rng(0)
    arrays = {
        "layer_0/kernel": generator.normal(size=(3, 5)),
        "layer_0/bias": generator.normal(size=5),
        "head/kernel": generator.normal(size=(5, 2)),
        "head/bias": np.zeros(2),
        "obs_mean": np.ones(3),
        "obs_std": np.full(3, 2.0),
    }
    if norm:
        arrays |= {"layer_0/norm_scale": np.ones(5), "layer_0/norm_bias": np.zeros(5)}
    arrays |= replaced
    arrays = {k: np.asarray(v, np.float32) for k, v in arrays.items() if v is not None}
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("norm", [True, False])
def test_expert_follows_its_formula(tmp_path, norm):
    w = tiny_expert(tmp_path / "e.npz", norm)
    obs = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32) * 50
    x = np.clip((obs - 1) / 2, -10, 10) @ w["layer_0/kernel"] + w["layer_0/bias"]
    if norm:
        centred = x - x.mean(1, keepdims=True)
        x = centred / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    expected = np.tanh(np.maximum(x, 0) @ w["head/kernel"])
    expert = experts.load_expert(tmp_path / "e.npz", 2)
    np.testing.assert_allclose(expert(obs), expected, rtol=1e-4, atol=1e-5)
    assert expert(obs[0]).shape == (2,) and expert(obs).dtype == np.float32


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"head/bias": None}, "no head/bias"),
        ({"obs_std": None}, "no obs_std"),
        ({"obs_std": np.ones(4)}, r"obs_std has shape \(4,\)"),
        ({"obs_std": np.zeros(3)}, "obs_std .* above 0"),
        ({"layer_0/bias": np.ones(4)}, r"layer_0/bias has shape \(4,\)"),
        ({"head/kernel": np.ones((4, 2))}, r"head/kernel has shape \(4, 2\)"),
        ({"layer_0/kernel": np.full((3, 5), np.nan)}, "layer_0/kernel"),
        ({"layer_0/norm_bias": None}, "one of norm_scale and norm_bias"),
        (
            {"head/kernel": np.ones((5, 3)), "head/bias": np.ones(3)},
            "head has 3 outputs, expected 2 or 4",
        ),
        ({"log_std_clip": [2, -20]}, r"log_std_clip is \[2.0, -20.0\]"),
    ],
)
def test_bad_expert_files(tmp_path, replaced, message):
    tiny_expert(tmp_path / "e.npz", **replaced)
    with pytest.raises(InputError, match=message):
        experts.load_expert(tmp_path / "e.npz", 2)


def test_policies_by_name(tmp_path):
    tiny_expert(tmp_path / "e.npz")
    path = str(tmp_path / "e.npz")
    obs = np.zeros(3, np.float32)
    still = experts.make_policy(path, SPEC, 3, 2)
    noisy = experts.make_policy(path, SPEC, 3, 2, action_noise=5.0)
    uniform = experts.make_policy("random", SPEC, 3, 2)
    one, two = (np.random.default_rng(s) for s in (0, 1))
    np.testing.assert_array_equal(still(obs, one), still(obs, two))
    for policy in (noisy, uniform):
        drawn = np.array([policy(obs, one) for _ in range(200)])
        assert drawn.dtype == np.float32
        assert np.abs(drawn).max() <= 1 and drawn.std() > 0.4
    with pytest.raises(InputError, match="e.npz': .* deviation for each of the 2"):
        experts.make_policy(f"sampled:{path}", SPEC, 3, 2)
    walker = np.zeros(24, np.float32)
    sampled = experts.make_policy("sampled:expert", WALKER, 24, 6)
    drawn = np.array([sampled(walker, one) for _ in range(1000)])
    expert = experts.load_expert(experts.expert_path(WALKER), 6)
    outputs = expert._outputs(walker)
    std = np.exp(-5 + 3 * (np.tanh(outputs[6:]) + 1))
    np.testing.assert_allclose(
        np.arctanh(drawn).std(0), std, rtol=0.1, err_msg="the formula of its card"
    )
    medium = experts.make_policy("medium", WALKER, 24, 6)
    assert not np.array_equal(medium(walker, one), medium(walker, one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("expert", SPEC, 2, 2), "no packaged expert for .*; there is one for dm_con"),
        (("best", WALKER, 24, 6), "unknown policy 'best'; choose from expert, medium"),
        (("none.npz", WALKER, 24, 6), "none.npz: no such file"),
        (("expert", WALKER, 24, 6, -1.0), "action_noise is -1.0"),
        (("expert", WALKER, 24, 6, float("nan")), "action_noise is nan"),
        (("random", WALKER, 24, 6, 0.5), "takes no action noise"),
        (("sampled:expert", WALKER, 24, 6, 0.5), "takes no action noise"),
        (("sampled:medium", WALKER, 24, 6), "the expert or a file with a standard dev"),
        (("expert", WALKER, 23, 6), "observations of size 24, .* has 23"),
    ],
)
def test_bad_policies(arguments, message):
    with pytest.raises(InputError, match=message):
        experts.make_policy(*arguments)
