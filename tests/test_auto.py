"""Expand or compose: three tasks of which the answer is known, and bad input.

A point in a plane: every behaviour has a region of states and one action there.
"""

import json
import re

import jax
import numpy as np
import pytest
from shell import call

from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose
from psec_jax.types import Dataset
from psec_jax.workflows import Job, auto, base, skill
from psec_jax.workflows.config import AutoSection

# Middle of the states, action.
REGIONS = {
    "home": ((0, 0), (0, 0)),
    "west": ((-3, 0), (0.8, 0)),
    "east": ((3, 0), (-0.8, 0)),
    "north": ((0, 3), (0, -0.8)),
}
SHORT = {
    "network.width": 32,
    "network.blocks": 1,
    "base.steps": 600,
    "base.batch_size": 64,
    "base.episodes": 0,
    "base.learning_rate": 3e-3,
    "base.ema": 0.02,
    "skill.steps": 600,
    "skill.batch_size": 64,
    "skill.episodes": 0,
    "skill.learning_rate": 3e-3,
    "skill.ema": 0.02,
    "skill.dropout": 0.0,
    "skill.rank": 4,
    "gate.steps": 300,
    "gate.batch_size": 64,
    "gate.widths": (16,),
    "gate.learning_rate": 1e-2,
    "auto.steps": 300,
    "auto.ranks": (2,),
    "auto.draws": 2,
    "auto.tolerance": 0.3,
    "run.log_every": 300,
    "run.save_every": 300,
}
JOB = Job().changed(SHORT)


def write(path, seed, *names, episodes=4, length=40):
    """Demonstrations that visit these regions in turn, an episode each."""
    generator = np.random.default_rng(seed)
    obs, action = [], []
    for i in range(episodes * len(names)):
        middle, act = REGIONS[names[i % len(names)]]
        obs.append(generator.normal(middle, 0.5, (length, 2)))
        action.append(generator.normal(act, 0.2, (length, 2)))
    obs, action = np.concatenate(obs), np.concatenate(action)
    n = len(obs)
    last = np.arange(n) % length == length - 1
    ds = Dataset(
        obs=obs.astype(np.float32),
        action=np.clip(action, -1, 1).astype(np.float32),
        reward=np.zeros(n, np.float32),
        cost=np.zeros(n, np.float32),
        next_obs=np.concatenate([obs[1:], obs[-1:]]).astype(np.float32),
        terminal=np.zeros(n, bool),
        timeout=last,
    )
    d4rl.save(path, ds, {"action_low": -np.ones(2), "action_high": np.ones(2)})
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A library of a base at home, skills in the west and the east, and their data."""
    folder = tmp_path_factory.mktemp("auto")
    data = {
        name: write(folder / f"{name}.hdf5", i, name)
        for i, name in enumerate(("home", "west", "east"))
    }
    common = {"library": folder / "lib", "evaluate": False}
    base.run(
        JOB, base.Request(folder / "base", name="home", data=data["home"], **common)
    )
    for name in ("west", "east"):
        skill.run(
            JOB, skill.Request(folder / name, name=name, data=data[name], **common)
        )
    return folder


def request(place, run, data, **fields):
    support = [str(place / "west.hdf5"), str(place / "east.hdf5")]
    return auto.Request(
        **{
            "workdir": place / f"run-{run}",
            "library": place / "lib",
            "name": run,
            "data": data,
            "evaluate": False,
            "skills": ("west", "east"),
            "support_data": support,
            "base_data": str(place / "home.hdf5"),
        }
        | fields
    )


@pytest.mark.parametrize(
    ("name", "regions", "kind", "skills"),
    [
        ("home-again", ["home"], "base", []),
        ("west-again", ["west"], "skill", ["west"]),
        ("both", ["west", "east"], "gate", {"west", "east"}),
        ("northern", ["north"], "new skill", []),
    ],
)
def test_the_least_that_does_it_is_added(place, name, regions, kind, skills):
    data = write(place / f"{name}.hdf5", 7, *regions)
    result = auto.run(JOB, request(place, name, data))
    decision, chosen = result["decision"], result["decision"]["chosen"]
    assert (chosen["kind"], type(skills)(chosen["skills"])) == (kind, skills)
    kinds = [row["kind"] for row in decision["candidates"]]
    assert kinds == ["base", "skill", "skill", "gate", "new skill"]
    library = SkillLibrary.open(place / "lib")
    entry = {"base": None, "skill": "gate", "gate": "gate", "new skill": "skill"}[kind]
    assert result["kind"] == entry
    if entry is None:
        assert name not in library.gates() + library.skills()
        return
    card = library.card(entry, name)
    assert card["decision"] == json.loads(json.dumps(decision))
    # What was added acts as the demonstrations do.
    made = {"gate": name} if entry == "gate" else {"skills": name}
    policy = compose(place / "lib", **made)
    for region in regions:
        middle, action = REGIONS[region]
        np.testing.assert_allclose(
            policy.act(jax.random.key(0), middle), action, atol=0.3
        )


def row(loss, coverage):
    return {"loss": loss, "coverage": coverage}


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([row(1.0, 1.0), row(0.95, 1.0), row(0.94, None)], 0),
        ([row(2.0, 1.0), row(1.0, 1.0), row(0.94, None)], 1),
        ([row(2.0, 1.0), row(1.0, 0.8), row(0.94, None), row(0.9, None)], 2),
        # The least loss of all, in states that it does not know.
        ([row(2.0, 1.0), row(0.1, 0.5), row(0.9, None), row(0.7, None)], 3),
    ],
)
def test_the_rule(candidates, chosen):
    rule = AutoSection(tolerance=0.1, coverage=0.9)
    assert auto.choose(rule, candidates) is candidates[chosen]


def test_the_same_again_trains_nothing(place):
    """Trials and the entry are kept, so a stopped run goes on where it was."""
    data = write(place / "again.hdf5", 9, "north")
    wanted = request(place, "again", data)
    first = auto.run(JOB, wanted)
    files = [place / "run-again" / "trials" / n for n in ("gate", "rank2")]
    written = [(f / "metrics.jsonl").read_text() for f in files]
    assert auto.run(JOB, wanted) == first
    assert [(f / "metrics.jsonl").read_text() for f in files] == written


@pytest.mark.parametrize(
    ("changes", "fields", "words"),
    [
        ({}, {"name": ("a", "b")}, "name: got a, b"),
        ({}, {"objectives": ("reward",)}, "objective: got reward"),
        ({"gate.head": "constant"}, {}, "gate.head"),
        ({"gate.level": "noise"}, {}, "gate.level"),
        ({}, {"skills": ("west", "south")}, "south"),
        ({}, {"support_data": ["one.hdf5"]}, "support_data: got 1"),
        ({}, {"support_data": ()}, "give --support_data"),
        ({}, {"base_data": None}, "give --base_data"),
    ],
)
def test_bad_requests(place, changes, fields, words):
    data = str(place / "west.hdf5")
    wanted = request(place, "bad", data, workdir=place / "bad", **fields)
    with pytest.raises(InputError, match=words):
        auto.decide(JOB.changed(changes), wanted)


def test_one_demonstration_is_too_few(place):
    data = write(place / "one.hdf5", 3, "west", episodes=1)
    with pytest.raises(InputError, match="1 trajectory to decide on"):
        auto.decide(JOB, request(place, "one", data, workdir=place / "one"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--auto", "--name=a,b"], "name: got a, b"),
        (["--name=a", "--skills=west"], "--skills: got .* --auto alone"),
        (["--auto", "--name=a", "--config.auto.ranks=(0,)"], "auto.ranks"),
        (["--auto", "--name=a", "--config.auto.coverage=2"], "auto.coverage"),
    ],
)
def test_bad_flags(place, arguments, words):
    answer = call(
        "launch.expand",
        f"--library={place / 'lib'}",
        f"--workdir={place / 'flags'}",
        f"--data={place / 'west.hdf5'}",
        *arguments,
    )
    assert answer.code == 2
    assert re.search(words, answer.err), answer.err
    assert len(answer.err.strip().splitlines()) == 1
