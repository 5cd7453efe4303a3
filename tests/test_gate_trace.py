"""Weights of a gate along episodes: really played, and known answers by hand."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from shell import call

from experiments import plots
from experiments.tools import gate_trace
from experiments.tools.gate_trace import (
    Correlation,
    as_json,
    correlate,
    film_steps,
    pearson,
)
from experiments.tools.rollout import Trace
from psec_jax import envs
from psec_jax.envs.gl import CannotDraw
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, init_gate
from psec_jax.library import SkillLibrary
from psec_jax.lora import init_skill
from psec_jax.networks.denoiser import init_base
from psec_jax.types import Normaliser

ENV, OBS_DIM, ACTION_DIM, STEPS = "bullet:SafetyBallRun-v0", 7, 2, 100
SEED = 10_000
NAME = f"bullet-SafetyBallRun-v0-{{}}_seed{SEED}"
PNG = b"\x89PNG\r\n\x1a\n"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"no {package}; run: make setup-safe")


needs_bullet, needs_metadrive = needs("bullet_safety_gym"), needs("metadrive")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two skills; "moving" sees the state, "fixed" does not, "homeless" names no
    environment."""
    key = jax.random.key(0)
    base = tiny.randomised(
        lambda: init_base(tiny.NETWORK, key, OBS_DIM, ACTION_DIM), seed=0
    )
    made = SkillLibrary.create(tmp_path_factory.mktemp("trace") / "library")
    made.add_base(
        base,
        Normaliser(jnp.zeros(OBS_DIM), jnp.ones(OBS_DIM)),
        {
            "name": "base",
            "network": asdict(tiny.NETWORK),
            "process": asdict(tiny.PROCESS),
            "obs_dim": OBS_DIM,
            "action_dim": ACTION_DIM,
        },
    )
    for seed, name in enumerate(("calm", "bold")):
        skill = tiny.randomised(lambda: init_skill(key, base, 2), seed)
        made.add_skill(name, skill, {"env": ENV, "alpha": 1.0})
    sees, blind = GateConfig(widths=(8,)), GateConfig(head="constant")
    for name, gate in (("moving", sees), ("homeless", sees), ("fixed", blind)):
        params = init_gate(gate, key, OBS_DIM, jnp.arange(2.0))
        card = {"skills": ["calm", "bold"], "level": "parameter", "gate": asdict(gate)}
        made.add_gate(name, params, card | ({} if name == "homeless" else {"env": ENV}))
    return made.root


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(library, *arguments):
    return call("experiments.tools.gate_trace", f"--library={library}", *arguments)


@needs_bullet
def test_two_episodes_of_a_real_simulator(library, place):
    answer = command(library, "--gate=moving", "--episodes=2", "--out=out")
    assert answer.code == 0 and answer.err == "", answer.err
    name = NAME.format("moving")
    assert f"figure   out/{name}.png" in answer.out
    raw_path = Path("out/raw") / f"{name}.json"
    raw = json.loads(raw_path.read_text())
    assert (raw["env"], raw["gate"], raw["level"]) == (ENV, "moving", "parameter")
    assert len(raw["episodes"]) == 2
    for episode in raw["episodes"]:
        assert episode["t"] == list(range(STEPS))
        assert list(episode["alpha"]) == ["calm", "bold"]
        assert {len(episode[k]) for k in ("reward", "cost")} == {STEPS}
        assert np.std(episode["alpha"]["calm"]) > 0
        assert episode["events"] == {"cost": [cost > 0 for cost in episode["cost"]]}
    frames = raw_path.with_name(f"{name}_frames.png")
    shown = gate_trace._read_film(frames, STEPS)
    assert [step for step, _ in shown] == [7, 21, 35, 49, 63, 77, 91]
    assert all(image.std() > 10 for _, image in shown)

    files = [Path("out") / f"{name}.{end}" for end in ("png", "svg", "md", "json")]
    first = [file.read_bytes() for file in files]
    assert first[0].startswith(PNG) and first[2].decode() in answer.out
    # What is there is kept, and drawn again without the library.
    kept = raw_path.stat().st_mtime_ns
    assert command(library, "--gate=moving", "--episodes=2", "--out=out").code == 0
    assert raw_path.stat().st_mtime_ns == kept
    assert command("none", "--plot_only", "--out=out").code == 0
    assert [file.read_bytes() for file in files] == first
    answer = command(library, "--gate=moving", "--out=out")
    assert answer.code == 2 and "holds a trace with other episode_count" in answer.err


@needs_bullet
def test_fixed_weights_and_no_frames_are_told_in_words(
    library, place, monkeypatch, capfd
):
    def refuse(*args):
        raise CannotDraw("no OpenGL here")

    monkeypatch.setattr(gate_trace, "Renderer", refuse)
    path = gate_trace.play(library, "fixed", "out", seed=SEED)
    assert capfd.readouterr().err == "no frames: no OpenGL here\n"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    text = gate_trace.write(path, "out", 10)
    assert "nan" not in text.lower()
    assert f"the weight is always 1 in {STEPS} steps" in text
    assert "| cost of the step | 100 | undefined | undefined |" in text


def raw_file(*episodes):
    """A raw file by hand, of episodes (cost, {skill: weights})."""
    return {
        "env": "some:env",
        "gate": "g",
        "level": "parameter",
        "seed": 3,
        "rules": {"cost": "cost > 0"},
        "episodes": [
            {
                "t": list(range(len(cost))),
                "reward": [1.0] * len(cost),
                "cost": cost,
                "alpha": alpha,
                "events": {"cost": [c > 0 for c in cost]},
            }
            for cost, alpha in episodes
        ],
    }


def test_correlations_by_hand():
    raw = raw_file(
        ([0.0, 1.0, 0.0, 1.0], {"a": [1.0, 2.0, 1.0, 4.0], "b": [5.0] * 4}),
        ([2.0, 0.0], {"a": [3.0, 1.0], "b": [5.0] * 2}),
    )
    a_step, b_step, a_ahead, b_ahead, a_event, _ = correlate(raw, 2)
    # Costs 0 1 0 1 2 0 (mean 2/3), weights 1 2 1 4 3 1 (mean 2).
    assert a_step == Correlation(
        "a", "cost of the step", 6, pytest.approx(4 / np.sqrt(10 / 3 * 8)), None
    )
    assert b_step.r is None and b_step.undefined == "the weight is always 5 in 6 steps"
    # Sums of two steps, within an episode: 1 1 1 and 2; weights 1 2 1 and 3.
    assert a_ahead[1:3] == ("cost of the next 2 steps", 4)
    assert a_ahead.r == pytest.approx(1.25 / np.sqrt(0.75 * 2.75))
    assert b_ahead.undefined == "the weight is always 5 in 4 steps"
    # Events 0 1 0 1 1 0: the mean weight is 3 with them, 1 without.
    assert a_event.other == "cost > 0"
    assert a_event.r == pytest.approx(3 / np.sqrt(1.5 * 8))
    assert len(correlate(raw, 1)) == 4  # the next step alone is the step
    with pytest.raises(InputError, match="ahead is 0, expected 1 or more"):
        correlate(raw, 0)


def test_undefined_correlations_say_why():
    rising = np.arange(4.0)
    assert pearson(rising, 2 * rising) == (pytest.approx(1.0), None)
    assert pearson(rising, np.zeros(4)) == (None, "always 0 in 4 steps")
    assert pearson(rising[:0], rising[:0]) == (None, "0 steps, too few")
    assert pearson(rising[:1], rising[:1]) == (None, "1 step, too few")
    raw = raw_file(([0.0, 0.0, 0.0], {"a": [1.0, 2.0, 1.0]}))
    text = gate_trace.markdown(raw, correlate(raw, 10))
    assert "| cost of the step | 3 | undefined |" in text
    for reason in (
        "Undefined for a with cost of the next 10 steps: 0 steps, too few.",
        "Undefined for a with cost of the step: always 0 in 3 steps.",
    ):
        assert f"- {reason}" in text


def test_events_of_metadrive():
    obs = np.full((4, 259), 0.5, np.float32)
    obs[:, 11], obs[2, 11] = 0, 0.3
    obs[1, 19] = obs[3, 258] = 0.1  # of 50 m: the first and the last ray
    obs[0, 18] = 0.0  # no ray
    weights = np.arange(4, dtype=np.float32)[:, None]
    trace = Trace(
        obs,
        np.zeros((4, 2), np.float32),
        np.zeros(4, np.float32),
        np.array([0, 0, 0.2, 0], np.float32),
        weights,
        ("calm",),
        np.array([3, 1]),
        np.array([8, 9]),
    )
    told = as_json(trace, "metadrive:easysparse")
    first, second = told["episodes"]
    assert first["events"] == {
        "cost": [False, False, True],
        "turn": [False, False, True],
        "vehicle near": [False, True, False],
    }
    assert second["events"]["vehicle near"] == [True]
    assert list(told["rules"]) == list(first["events"])
    assert first["measured"]["least lidar distance (m)"] == [25, 5, 25]
    assert (first["alpha"], second["t"]) == ({"calm": [0, 1, 2]}, [0])
    assert list(as_json(trace, "bullet:SafetyBallRun-v0")["rules"]) == ["cost"]


@needs_metadrive
def test_straight_on_ends_where_the_lane_bends():
    turn = gate_trace.EVENTS["metadrive"]["turn"]
    env = envs.make("metadrive:easysparse")
    obs, bends = env.reset(0), []
    for _ in range(300):
        step = env.step(np.array((0.0, 1.0)))
        if step.terminal:
            break
        obs = step.obs
        bends.append(bool(turn.happens(turn.measure(obs[None]))[0]))
    env.close()
    assert step.terminal and bends[-1] and not any(bends[:50])
    assert bends == sorted(bends)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 100, 999, 1000])
def test_frames_are_spread_over_the_episode(length):
    steps = film_steps(length)
    assert len(steps) <= plots.FRAMES and all(0 <= step < length for step in steps)
    if length > plots.FRAMES:
        assert len(steps) >= plots.FRAMES / 2
        assert length - steps[-1] <= 2 * steps.step


def test_figure_takes_many_skills_and_one_step(place):
    weights = {f"skill-{k}": [float(k), 0.0] for k in range(30)}
    figure = plots.gate_trace(raw_file(([0.0, 1.0], weights)), "note")
    assert plots.save(figure, place, "many").read_bytes().startswith(PNG)
    figure = plots.gate_trace(raw_file(([0.0], {"a": [1.0]})), "note")
    assert plots.save(figure, place, "one").read_bytes().startswith(PNG)


REFUSED = {
    "no such gate": (("--gate=luck",), "luck"),
    "no gate": ((), "gate: give the name of one; "),
    "no episodes": (("--gate=moving", "--episodes=0"), "episodes is 0, expected 1"),
    "below seeds": (("--gate=moving", "--seed=-1"), "seed is -1, expected 0 to"),
    "no steps ahead": (("--gate=moving", "--ahead=0"), "ahead"),
    "no environment": (("--gate=homeless",), "the card of gate 'homeless' names none"),
    "no such environment": (("--gate=moving", "--env=luck:1"), "unknown environment"),
    "other sizes": (("--gate=moving", "--env=dm_control:walker-walk"), "24 numbers"),
    "no raw files": (("--plot_only",), "out: no raw/*.json; play an episode first"),
    "an argument": (("--gate=moving", "more"), "unexpected argument 'more'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(library, place, name):
    arguments, words = REFUSED[name]
    answer = command(library, "--out=out", *arguments)
    assert answer.code == 2 and answer.out == "", answer
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert words in answer.err
    assert not any(place.iterdir())


def test_the_gates_are_listed_where_none_is_named(library, place):
    answer = command(library)
    assert "has fixed, homeless, moving" in answer.err
    assert command("nowhere").code == 2


def test_other_files_are_refused(place):
    Path("out/raw").mkdir(parents=True)
    Path("out/raw/x.json").write_text('{"mean": 1}')
    answer = command("none", "--plot_only", "--out=out")
    assert answer.code == 2 and "x.json: not a trace" in answer.err
    Path("out/raw/x.json").write_text(json.dumps(raw_file(([0.0], {"a": [1.0]}))))
    Path("out/raw/x_frames.png").write_bytes(PNG)
    answer = command("none", "--plot_only", "--out=out")
    assert answer.code == 2 and "cannot read out/raw/x_frames.png" in answer.err
