"""Videos of policies: real frames, the plot under them, and machines without OpenGL."""

import os
import subprocess

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments.tools import rollout
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.rendering import Renderer
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, init_gate
from psec_jax.lora import init_skill, stack_skills
from psec_jax.networks.denoiser import init_base
from psec_jax.policy import Policy
from psec_jax.types import Normaliser

ENV, OBS_DIM, ACTION_DIM = "dm_control:walker-walk", 24, 6
STEPS, SEED = 20, 3
HEIGHT = rollout.FRAME_HEIGHT + rollout.PANEL_HEIGHT

# conftest.py sets it where it finds EGL or OSMesa.
needs_gl = pytest.mark.skipif(
    "MUJOCO_GL" not in os.environ,
    reason="neither EGL nor OSMesa is installed: apt-get install libegl1 libgl1",
)


def random_policy(base_member=False, layers=0):
    key = jax.random.key(0)
    base = tiny.randomised(
        lambda: init_base(tiny.NETWORK, key, OBS_DIM, ACTION_DIM), seed=0
    )
    skills = [
        tiny.randomised(lambda: init_skill(key, base, 2), seed) for seed in (1, 2)
    ]
    gate = GateConfig(base_member=base_member, widths=(8,), layers=layers)
    start = jnp.arange(2.0 + base_member)
    level = "noise" if base_member else "parameter"
    return Policy(
        PolicyConfig(tiny.NETWORK, tiny.PROCESS, ACTION_DIM, level, gate),
        PolicyParams(
            base,
            Normaliser(jnp.zeros(OBS_DIM), jnp.ones(OBS_DIM)),
            stack_skills(skills),
            jnp.ones(2),
            init_gate(gate, key, OBS_DIM, start),
        ),
        ("left", "right"),
    )


def read_frames(path):
    program = imageio_ffmpeg.get_ffmpeg_exe()
    options = ["-loglevel", "error", "-i", str(path)]
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([program, *options, *raw], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, HEIGHT, rollout.WIDTH, 3)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def trace(policy):
    return rollout.make_trace(policy, ENV, 2, SEED, STEPS)


def test_trace_holds_the_gate_at_every_step(policy, trace):
    assert trace.obs.shape == (2 * STEPS, OBS_DIM)
    assert trace.action.shape == (2 * STEPS, ACTION_DIM)
    assert trace.names == ("left", "right")
    assert trace.lengths.tolist() == [STEPS, STEPS]
    np.testing.assert_allclose(trace.alpha, policy.alpha(trace.obs), rtol=1e-5)
    assert trace.alpha.std(0).min() > 0


def test_weights_are_named_with_the_base_where_it_has_one(trace):
    policy = random_policy(base_member=True)
    alpha = rollout._alpha(policy, trace.obs)
    assert rollout._names(policy) == ("base", "left", "right")
    assert alpha.shape == (2 * STEPS, 3)
    alone = Policy(
        PolicyConfig(tiny.NETWORK, tiny.PROCESS, ACTION_DIM),
        policy.params._replace(library=None, strength=None, gate=None),
    )
    alpha = rollout._alpha(alone, trace.obs)
    assert rollout._names(alone) == ()
    assert alpha.shape == (2 * STEPS, 0)


def test_weights_of_layers_are_traced_as_their_means():
    policy = random_policy(layers=6)
    obs = np.asarray(tiny.normal(5, OBS_DIM))
    every = np.asarray(policy.alpha(obs))
    assert every.shape == (5, 6, 2)
    got = rollout._alpha(policy, obs)
    np.testing.assert_allclose(got, every.mean(axis=1), rtol=1e-6)


def test_saved_trace_reads_back(trace, tmp_path):
    with np.load(rollout.save_trace(tmp_path / "t.npz", trace, ENV, SEED)) as saved:
        np.testing.assert_array_equal(saved["alpha"], trace.alpha)
        np.testing.assert_array_equal(saved["obs"], trace.obs)
        assert saved["names"].tolist() == list(trace.names)
        assert str(saved["env"]) == ENV


def test_plot_grows_up_to_its_step(trace):
    panel = rollout.Panel(trace, trace.episodes()[0], step_seconds=0.025)
    early, late = panel.at(5), panel.at(STEPS - 1)
    assert early.shape == (rollout.PANEL_HEIGHT, rollout.WIDTH, 3)
    before = slice(0, panel._column[5])
    after = slice(panel._column[5] + 1, None)
    np.testing.assert_array_equal(early[:, before], late[:, before])
    assert (early[:, after] != late[:, after]).any()


def test_plot_takes_more_skills_than_it_names(trace):
    count = rollout.NAMED + 3
    many = trace._replace(
        alpha=np.ones((2 * STEPS, count), np.float32),
        names=tuple(f"skill-{k}" for k in range(count)),
    )
    rollout.Panel(many, many.episodes()[1], step_seconds=0.025)


@needs_gl
@pytest.mark.parametrize("suffix", rollout.WRITERS)
def test_video_has_every_second_step(trace, tmp_path, suffix):
    out = rollout.draw(trace, ENV, tmp_path / f"walk{suffix}", every=2)
    frames = read_frames(out)
    assert len(frames) == STEPS  # half the steps of two episodes
    scenes = frames[:, : rollout.FRAME_HEIGHT].astype(float)
    assert scenes[0].std() > 10, "an empty picture"
    assert np.abs(scenes[1:] - scenes[:-1]).max((1, 2, 3)).min() > 0
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@needs_gl
def test_an_episode_that_cannot_be_repeated_is_refused(trace):
    with Renderer(ENV, 32, 32) as renderer:
        frames = renderer.frames(
            int(trace.seeds[1]), trace.obs[:STEPS], trace.action[:STEPS]
        )
        with pytest.raises(InputError, match="step 0 .* came out otherwise"):
            list(frames)


def test_without_opengl_one_line_says_what_to_install(
    policy, trace, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    monkeypatch.setattr(rollout.policies, "compose", lambda *args, **options: policy)
    monkeypatch.setattr(rollout, "make_trace", lambda *args: trace)
    out = tmp_path / "walk.mp4"
    assert rollout.try_video("library", env=ENV, out=out) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "apt-get install libegl1 libgl1" in line
    assert [file.name for file in tmp_path.iterdir()] == ["walk.npz"]
    with pytest.raises(CannotDraw):
        rollout.film(policy, ENV, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "walk.avi"}, "unknown video suffix '.avi'; choose from .gif, .mp4"),
        ({"every": 0}, "every is 0, expected 1 or more"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"episodes": 0}, "episodes is 0, expected 1 or more"),
    ],
)
def test_bad_options_are_named(policy, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        rollout.film(policy, ENV, **({"out": "walk.mp4"} | options))
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_written_is_told(tmp_path):
    images = [np.zeros((HEIGHT, rollout.WIDTH, 3), np.uint8)] * 3
    with pytest.raises(InputError, match="cannot write .*: ffmpeg: "):
        rollout.WRITERS[".mp4"](tmp_path / "missing" / "x.mp4", 20, iter(images))
