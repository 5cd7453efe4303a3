"""Shifted simulators: the numbers of their models, their names, what is refused."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
from dm_control import suite
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from shell import call

from experiments.tools import shifted_bodies
from psec_jax import envs
from psec_jax.data import d4rl
from psec_jax.envs import dm_control, shifts
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import InputError
from psec_jax.workflows.collection import collect

CHEETAH, WALKER = "gymnasium:HalfCheetah-v5", "gymnasium:Walker2d-v5"
SUITE_CHEETAH, SUITE_WALKER = "dm_control:cheetah-run", "dm_control:walker-walk"
SCREEN = ("vis.global_.offwidth", "vis.global_.offheight")  # of Gymnasium, not the XML

NAMES = 70  # rows of a panel that the names may cover

# conftest.py sets it where it finds EGL or OSMesa.
needs_gl = pytest.mark.skipif(
    "MUJOCO_GL" not in os.environ,
    reason="neither EGL nor OSMesa is installed: apt-get install libegl1 libgl1",
)


def model_of(spec):
    """The compiled model that a new environment simulates with."""
    inner = envs.make(spec)._env
    if spec.startswith("gymnasium"):
        assert inner.unwrapped.mujoco_renderer.model is inner.unwrapped.model
        assert inner.unwrapped.data.model is inner.unwrapped.model
        return inner.unwrapped.model
    return inner.physics.model.ptr


def arrays_of(model):
    """Every number of a compiled model, by name."""
    structs = {"": model, "opt.": model.opt, "stat.": model.stat}
    structs["vis.global_."] = model.vis.global_
    found = {
        prefix + name: np.asarray(getattr(struct, name))
        for prefix, struct in structs.items()
        for name in dir(struct)
        if not name.startswith("_")
        and isinstance(getattr(struct, name), (np.ndarray, int, float))
    }
    return {k: v for k, v in found.items() if k not in SCREEN}


def differing(one, other):
    """Names of the arrays in which two models differ."""
    one, other = arrays_of(one), arrays_of(other)
    assert one.keys() == other.keys() and len(one) > 300
    return {k for k in one if not np.array_equal(one[k], other[k])}


def installed_xml(name):
    return Path(expand_model_path(name))


def times(match, factor):
    """The numbers of an attribute in XML text, multiplied."""
    numbers = (repr(float(n) * factor) for n in match[2].split())
    return f"{match[1]}{' '.join(numbers)}{match[3]}"


def edited(text, attribute, factor, of=""):
    """XML text with an attribute's numbers multiplied, of elements that say `of`."""
    pattern = rf'(<[^<>]*?\b{attribute}=")([^"]*)(")'
    element = rf"<(?!!)[^<>]*{of}[^<>]*>"
    return re.sub(
        element, lambda e: re.sub(pattern, lambda m: times(m, factor), e[0]), text
    )


def radius_doubled(text):
    """Walker2d's legs: the second number is half of what was between two joints."""
    pattern = r'(name="thigh_(?:left_)?geom"[^<>]*size=")(0.05\d*)'
    return re.sub(pattern, lambda m: f"{m[1]}0.1", text)


@pytest.mark.parametrize(
    ("spec", "file", "edit"),
    [
        (
            f"{CHEETAH}@friction:0.25",
            "half_cheetah.xml",
            lambda text: edited(text, "friction", 0.25),
        ),
        (
            f"{CHEETAH}@gravity:2",
            "half_cheetah.xml",
            lambda text: edited(text, "gravity", 2),
        ),
        (
            f"{CHEETAH}@thigh_size:2",
            "half_cheetah.xml",
            lambda text: edited(text, "size", 2, of='name="[bf]thigh"'),
        ),
        (
            f"{CHEETAH}@joint_damping:3",
            "half_cheetah.xml",
            lambda text: edited(text, "damping", 3),
        ),
        (
            f"{WALKER}@friction:0.5",
            "walker2d_v5.xml",
            lambda text: edited(text, "friction", 0.5),
        ),
        (f"{WALKER}@thigh_size:2", "walker2d_v5.xml", radius_doubled),
    ],
)
def test_it_is_the_model_of_an_edited_xml(spec, file, edit):
    text = installed_xml(file).read_text()
    assert edit(text) != text
    expected = mujoco.MjModel.from_xml_string(edit(text))
    assert not differing(model_of(spec), expected)


@pytest.mark.parametrize(
    ("spec", "array", "named"),
    [
        (
            f"{CHEETAH}@thigh_size:2",
            "size",
            {
                "bthigh": [0.092, 0.29, 0],
                "fthigh": [0.092, 0.266, 0],
                "bshin": [0.046, 0.15, 0],
            },
        ),
        (
            f"{WALKER}@thigh_size:2",
            "size",
            {
                "thigh_geom": [0.1, 0.225, 0],
                "thigh_left_geom": [0.1, 0.225, 0],
                "leg_geom": [0.04, 0.25, 0],
            },
        ),
        (
            f"{CHEETAH}@friction:0.25",
            "friction",
            {"floor": [0.1, 0.025, 0.025], "bfoot": [0.1, 0.025, 0.025]},
        ),
        (
            f"{WALKER}@friction:0.5",
            "friction",
            {
                "floor": [0.35, 0.05, 0.05],
                "torso_geom": [0.45, 0.05, 0.05],
                "foot_geom": [0.95, 0.05, 0.05],
                "foot_left_geom": [0.95, 0.05, 0.05],
            },
        ),
        (
            f"{SUITE_WALKER}@thigh_size:2",
            "size",
            {"right_thigh": [0.1, 0.45, 0], "left_leg": [0.04, 0.25, 0]},
        ),
        (
            f"{SUITE_CHEETAH}@friction:0.25",
            "friction",
            {"ground": [0.25, 1.25e-3, 2.5e-5], "ffoot": [0.1, 0.025, 0.025]},
        ),
    ],
)
def test_numbers_of_geoms(spec, array, named):
    model = model_of(spec)
    for name, numbers in named.items():
        got = getattr(model.geom(name), array)
        np.testing.assert_allclose(got, numbers, rtol=1e-12, err_msg=name)


def test_the_feet_of_the_older_walker_keep_their_ratio():
    model = model_of("gymnasium:Walker2d-v4@friction:0.5")
    assert model.geom("foot_geom").friction[0] == 0.45
    assert model.geom("foot_left_geom").friction[0] == 0.95


@pytest.mark.parametrize("base", [CHEETAH, WALKER, SUITE_CHEETAH, SUITE_WALKER])
def test_a_shift_changes_its_numbers_alone(base):
    plain = model_of(base)
    assert plain.opt.gravity.tolist() == [0, 0, -9.81]
    alone = {
        "friction": ("geom_friction", lambda m: m.geom_friction),
        "gravity": ("opt.gravity", lambda m: m.opt.gravity),
        "joint_damping": ("dof_damping", lambda m: m.dof_damping),
        "actuator_strength": ("actuator_gainprm", lambda m: m.actuator_gainprm),
    }
    for quantity, (name, numbers) in alone.items():
        model = model_of(f"{base}@{quantity}:1.5")
        assert differing(model, plain) == {name}, quantity
        np.testing.assert_array_equal(numbers(model), 1.5 * numbers(plain))

    model = model_of(f"{base}@thigh_size:2")
    for name in (
        "body_pos",
        "jnt_pos",
        "jnt_range",
        "geom_pos",
        "qpos0",
        "dof_damping",
    ):
        np.testing.assert_array_equal(getattr(model, name), getattr(plain, name))
    heavier = {body for body in range(plain.nbody) if "thigh" in plain.body(body).name}
    ratio = model.body_mass[1:] / plain.body_mass[1:]
    if "heetah" in base:
        assert model.body_mass.sum() == pytest.approx(14, abs=1e-9)
        assert plain.body_mass.sum() == pytest.approx(14, abs=1e-9)
    else:
        others = [b for b in range(1, plain.nbody) if b not in heavier]
        np.testing.assert_array_equal(model.body_mass[others], plain.body_mass[others])
    assert set(np.flatnonzero(ratio > 1) + 1) == heavier

    model = model_of(f"{base}@body_mass:0.5")
    np.testing.assert_allclose(model.body_mass, plain.body_mass / 2, rtol=1e-12)
    np.testing.assert_allclose(model.body_inertia, plain.body_inertia / 2, rtol=1e-12)
    np.testing.assert_array_equal(model.geom_size, plain.geom_size)


def test_several_at_once():
    spec = f"{CHEETAH}@friction:0.25,gravity:2,thigh_size:2"
    model, plain = model_of(spec), model_of(CHEETAH)
    np.testing.assert_array_equal(model.geom_friction, 0.25 * plain.geom_friction)
    assert model.opt.gravity.tolist() == [0, 0, -19.62]
    assert not differing(
        model_of(f"{CHEETAH}@thigh_size:2.0, gravity:2e0,friction:.25"), model
    )
    alone = model_of(f"{CHEETAH}@thigh_size:2")
    assert differing(model, alone) == {"geom_friction", "opt.gravity"}


@pytest.mark.parametrize("base", [CHEETAH, SUITE_CHEETAH])
def test_the_plain_environment_is_untouched(base):
    folders = [installed_xml("half_cheetah.xml").parent]
    folders.append(Path(suite.__file__).parent)
    assert len(list(folders[1].glob("*.xml"))) > 10

    def hashes():
        files = [file for folder in folders for file in folder.glob("*.*")]
        return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    before, files = model_of(base), hashes()
    registered = gymnasium.spec("HalfCheetah-v5").entry_point
    shifted = envs.make(f"{base}@thigh_size:2,gravity:2")
    with pytest.raises(InputError):
        envs.make(f"{base}@thigh_size:1e-9")
    assert not differing(model_of(base), before)
    assert hashes() == files
    assert gymnasium.spec("HalfCheetah-v5").entry_point is registered
    shifted.close()


def test_every_servo_is_stronger_by_the_factor():
    xml = """<mujoco><worldbody><body>
      <joint name="j" range="-1 1" limited="true" actuatorfrcrange="-90 90"/>
      <geom size=".1"/></body></worldbody><actuator>
      <position joint="j" kp="10" kv="2"/>
      <velocity joint="j" kv="3" forcerange="-1 1" gear="7"/><motor joint="j"/>
      {}</actuator></mujoco>"""

    def torques(factor):
        source = mujoco.MjSpec.from_string(xml.format(""))
        model = shifts.compile_shifted(source, {"actuator_strength": factor}, "x")
        data = mujoco.MjData(model)
        data.qpos[0], data.qvel[0], data.ctrl[:] = 0.5, 0.2, (0.1, 0.9, 0.4)
        mujoco.mj_forward(model, data)
        return [*data.actuator_force, *data.qfrc_actuator, *model.jnt_actfrcrange[0]]

    np.testing.assert_allclose(torques(3.0), 3 * np.array(torques(1.0)), rtol=1e-12)
    assert torques(1.0)[1] == -1 or torques(1.0)[1] == 1  # at its limit
    for other in ('<muscle joint="j"/>', '<position joint="j" dampratio="1"/>'):
        source = mujoco.MjSpec.from_string(xml.format(other))
        with pytest.raises(InputError, match="no actuator_strength; it has body_mass"):
            shifts.compile_shifted(source, {"actuator_strength": 2.0}, "x")


def test_masses_and_friction_however_the_xml_gives_them():
    xml = """<mujoco><compiler boundmass=".5" boundinertia=".01"/><worldbody>
      <geom name="floor" type="plane" size="1 1 1"/>
      <body><freejoint/><geom name="a" size=".1" mass="3"/></body>
      <body><freejoint/><geom name="b" type="box" size=".1 .2 .3" density="7"/></body>
      <body><joint/><inertial pos="0 0 0" mass="2" diaginertia="1 2 2.5"/></body>
      <body><joint/><inertial pos="0 0 0" mass="2" fullinertia="2 2 2 .1 .1 .1"/></body>
      </worldbody><contact><pair geom1="floor" geom2="a" friction="1 .9 .8 .7 .6"/>
      <pair geom1="floor" geom2="b"/></contact></mujoco>"""

    def model(**shift):
        return shifts.compile_shifted(mujoco.MjSpec.from_string(xml), shift, "x")

    plain, shifted = model(), model(friction=0.5, body_mass=4.0)
    for name in ("body_mass", "body_inertia"):
        got, before = getattr(shifted, name), getattr(plain, name)
        np.testing.assert_allclose(got, 4 * before, rtol=1e-12, err_msg=name)
        assert np.abs(before[1:]).min() > 0
    for name in ("geom_friction", "pair_friction"):
        got, before = getattr(shifted, name), getattr(plain, name)
        np.testing.assert_allclose(got, before / 2, rtol=1e-12, err_msg=name)
    assert plain.pair_friction[0].tolist() == [1, 0.9, 0.8, 0.7, 0.6]


def test_one_name_for_one_environment():
    spec = f"{WALKER}@friction:0.25,gravity:2"
    assert envs.shifted(WALKER) == WALKER
    assert envs.shifted(WALKER, "gravity:2.0", "friction: .25") == spec
    assert envs.shifted(f"{WALKER}@gravity:2", "friction:0.25") == spec
    assert envs.shifted(f"{WALKER}@ gravity:2.000,friction:25e-2 ") == spec
    assert envs.shifted(WALKER, "gravity:0.123456789") == f"{WALKER}@gravity:0.123457"
    made = envs.make(f"{WALKER}@gravity:2.0000001,friction:.25")
    assert made.spec == spec
    assert made._env.unwrapped.model.opt.gravity[2] == -19.62
    made.close()


def test_workers_simulate_the_shifted_model():
    spec = f"{SUITE_WALKER}@friction:0.5,gravity:2"
    single, plain = envs.make(spec), envs.make(SUITE_WALKER)
    action = np.full(6, 0.3, np.float32)
    with VectorEnv(spec, 1) as vector:
        obs = vector.reset([0], [3])
        np.testing.assert_array_equal(obs[0], single.reset(3))
        plain.reset(3)
        for _ in range(10):
            got = vector.step([0], action[None]).obs[0]
            np.testing.assert_array_equal(got, single.step(action).obs)
            other = plain.step(action).obs
        assert not np.allclose(got, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{CHEETAH}@frction:2", "unknown shift 'frction'; choose from actuator_str"),
        (f"{CHEETAH}@", "got '', expected QUANTITY:FACTOR, such as friction:0.25"),
        (f"{CHEETAH}@friction", "got 'friction', expected QUANTITY:FACTOR"),
        (f"{CHEETAH}@friction=2", "got 'friction=2', expected QUANTITY:FACTOR"),
        (f"{CHEETAH}@friction:2,", "got '', expected QUANTITY:FACTOR"),
        (f"{CHEETAH}@friction:0", "friction is '0', expected a finite number above 0"),
        (f"{CHEETAH}@friction:-2", "friction is '-2'"),
        (f"{CHEETAH}@friction:nan", "friction is 'nan'"),
        (f"{CHEETAH}@friction:inf", "friction is 'inf'"),
        (f"{CHEETAH}@friction:1e999", "friction is '1e999'"),
        (f"{CHEETAH}@friction:1e-999", "friction is '1e-999'"),
        (f"{CHEETAH}@friction:much", "friction is 'much'"),
        (f"{CHEETAH}@friction:2@gravity:2", "friction is '2@gravity:2'"),
        (f"{CHEETAH}@friction:2,friction:2", "friction is there twice"),
        (
            "gymnasium:Swimmer-v5@thigh_size:2",
            "no thigh_size; it has actuator_strength, body_mass, friction, gravity$",
        ),
        ("dm_control:swimmer-swimmer6@joint_damping:2", "has no joint_damping; it has"),
        (f"{CHEETAH}@thigh_size:1e-9", "cannot be compiled: .* mass and inertia"),
        ("gymnasium:Pendulum-v1@gravity:2", "not one of Gymnasium's MuJoCo env"),
        ("gymnasium:tiny_env:Tiny-v0@gravity:2", "not one of Gymnasium's MuJoCo env"),
        ("gymnasium:Nothing-v0@gravity:2", "`Nothing` doesn't exist"),
        (f"{SUITE_WALKER[:-5]}@gravity:2", "unknown task '' of walker"),
        ("bullet:SafetyBallRun-v0@gravity:2", "bullet has no shifts; dm_control and g"),
        ("metadrive:SafeMetaDrive-easysparse-v0@gravity:2", "metadrive has no shifts"),
        ("@gravity:2", "expected PREFIX:NAME"),
    ],
)
def test_refused(spec, message):
    with pytest.raises(InputError, match=message) as told:
        envs.make(spec)
    assert "\n" not in str(told.value)


def test_a_shift_on_a_shifted_name_is_another_quantity():
    with pytest.raises(InputError, match="gravity is there twice"):
        envs.shifted(f"{CHEETAH}@gravity:2", "gravity:2")
    with pytest.raises(InputError, match="gravity is there twice"):
        envs.shifted(CHEETAH, "gravity:2", "friction:2,gravity:2")


def test_a_body_without_a_free_pose_is_refused(monkeypatch):
    monkeypatch.setattr(dm_control, "MAX_POSES", 20)
    with pytest.raises(InputError, match="none of 20 first poses is free of contacts"):
        envs.make("dm_control:humanoid-stand@thigh_size:2")


def test_a_simulation_that_breaks_down_is_told_in_one_line():
    env = envs.make(f"{SUITE_WALKER}@actuator_strength:1e6")
    env.reset(0)
    with pytest.raises(InputError, match="walker-walk@.*Physics state is invalid"):
        for _ in range(100):
            env.step(np.ones(6))


def test_collect_names_the_shifted_simulator(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path))
    flags = ("--policy=random", "--episodes=1", "--workers=1")
    plain = ("experiments.tools.collect", *flags, "--env=gymnasium:Hopper-v5")
    answer = call(*plain, "--shift=gravity:2.0", "--shift=friction:.5,thigh_size:2")
    assert answer.code == 0, answer.err
    spec = "gymnasium:Hopper-v5@friction:0.5,gravity:2,thigh_size:2"
    (path,) = tmp_path.iterdir()
    assert path.name == (
        "gymnasium_Hopper-v5_friction_0.5_gravity_2_thigh_size_2_random_1_seed0.hdf5"
    )
    assert d4rl.load(path)[1]["environment"] == spec
    same = collect(f"{spec[:-2]}:2.0", "random", 1, 0)
    assert same == path
    answer = call(*plain, f"--out={path}")
    assert answer.code == 2 and f"environment {spec!r} (asked for" in answer.err
    for flag, message in {
        "--shift=gravity:0": "gravity is '0', expected a finite number above 0",
        "--shift=thigh:2": "unknown shift 'thigh'; choose from",
        "--shift=": "got '', expected QUANTITY:FACTOR",
    }.items():
        answer = call(*plain, flag)
        assert answer.code == 2 and message in answer.err
        assert len(answer.err.splitlines()) == 1


STAGE = ("--workdir=run", "--library=library", "--data=none.hdf5")


@pytest.mark.parametrize(
    "command",
    [
        ("launch.pretrain", *STAGE),
        ("launch.expand", *STAGE, "--name=new"),
        ("launch.compose", *STAGE, "--name=new", "--skills=old"),
        ("launch.critics", *STAGE),
        ("launch.evaluate", "--library=library"),
        ("experiments.tools.train_expert", "--out=e.npz"),
    ],
)
def test_every_command_reads_the_flag(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[1] / "experiments" / "configs" / "dmc_walker.py"
    if command[0] not in ("launch.evaluate", "experiments.tools.train_expert"):
        command = (*command, f"--config={config}:quick")
    answer = call(*command, f"--env={CHEETAH}@gravity:2", "--shift=gravity:2")
    assert (answer.code, answer.out) == (2, "")
    assert f"shift of {CHEETAH}@gravity:2: gravity is there twice" in answer.err
    if command[0].startswith("launch") and "evaluate" not in command[0]:
        answer = call(*command, "--shift=gravity:2")
        assert answer.code == 2 and "--env, which is not given" in answer.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch):
    """Panels that are drawn fast."""
    monkeypatch.setattr(shifted_bodies, "PANEL", 240)
    return 240


@needs_gl
def test_the_shifted_body_is_drawn(tmp_path, small):
    from PIL import Image

    options = {"env": [CHEETAH], "shift": ["thigh_size:2"]}
    out = shifted_bodies.draw(**options, out=tmp_path / "new" / "bodies.png")
    picture = np.asarray(Image.open(out).convert("RGB"), float)
    assert picture.shape == (small, 2 * small, 3)
    plain, thick = np.split(picture[NAMES:], 2, axis=1)
    changed = (np.abs(plain - thick).max(-1) > 60).mean()
    assert 0.005 < changed < 0.5


@needs_gl
def test_a_video_of_two_simulators(tmp_path, small):
    import imageio_ffmpeg

    out = tmp_path / "bodies.mp4"
    shifted_bodies.draw([CHEETAH], ["gravity:2"], out, every=2, steps=5)
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(out)]
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([*program, *raw], capture_output=True, check=True)
    assert b"10 fps" in done.stderr  # two steps of 0.05 s
    frames = np.frombuffer(done.stdout, np.uint8).reshape(3, small, 2 * small, 3)
    plain, shifted = np.split(frames[-1, NAMES:].astype(float), 2, axis=1)
    assert np.abs(plain - shifted).max() > 60
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@needs_gl
def test_a_video_has_one_length_of_steps(tmp_path, small):
    with pytest.raises(InputError, match=r"steps take \[0.008, 0.05\] s in these"):
        shifted_bodies.draw([CHEETAH, WALKER], [], tmp_path / "b.gif")
    assert not list(tmp_path.iterdir())


def test_a_panel_whose_episode_has_ended_keeps_its_frame(monkeypatch):
    monkeypatch.setattr(shifted_bodies, "PANEL", 1)
    panels = [
        (np.full((1, 1, 3), shade) for shade in shades)
        for shades in ((1, 2, 3), (4,), (5, 6), (7, 8, 9))
    ]
    grids = [grid[..., 0].tolist() for grid in shifted_bodies._grids(panels, 2)]
    assert grids == [[[1, 4], [5, 7]], [[2, 4], [6, 8]], [[3, 4], [6, 9]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "bodies.jpg"}, "unknown suffix '.jpg'; choose from .gif, .mp4, .png"),
        ({"every": 0}, "every is 0, expected 1 or more"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"shift": ["gravity:0"]}, "gravity is '0'"),
    ],
)
def test_bad_options_of_the_picture(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"env": [CHEETAH], "shift": [], "out": "bodies.mp4"} | options
    with pytest.raises(InputError, match=message):
        shifted_bodies.draw(**given)
    assert not list(tmp_path.iterdir())
