"""Jobs: one tree of dataclasses, checked at one door."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from shell import call

from experiments.configs import d4rl, dmc_walker, dsrl
from psec_jax.errors import InputError
from psec_jax.library import gate_config
from psec_jax.workflows import Job

FILES = {"dmc_walker": dmc_walker, "dsrl": dsrl, "d4rl": d4rl}
PRESETS = [(name, preset) for name in FILES for preset in FILES[name].PRESETS]


def leaves(values, prefix=""):
    """Dotted names and values of the fields of nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict) and name != "seeds":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


FIELDS = dict(leaves(dataclasses.asdict(Job())))


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_config_is_its_job(name, preset):
    job = FILES[name].job(preset)
    config = FILES[name].get_config(preset)
    assert job.preset == preset and Job.from_dict(config.to_dict()) == job
    # As a run's directory and JSON hold it: lists for tuples.
    assert Job.from_dict(json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_fields_that_are_not_given_keep_their_defaults():
    assert Job.from_dict({}) == Job()
    job = Job.from_dict({"skill": {"rank": 3}})
    assert job == Job().changed({"skill.rank": 3}) and job.skill.rank == 3


def test_names_of_the_first_edition():
    old = {"diffusion": {"steps": 7}, "critics": {"safety": False}}
    job = Job.from_dict(old)
    assert job.process.steps == 7 and job.critics.kinds == ("reward",)
    both = Job.from_dict({"critics": {"safety": True}}).critics
    assert both.kinds == ("reward", "safety")
    gate = {"head": "select", "values": "own"}
    assert Job.from_dict({"gate": gate}).gate.q_of == "own"
    assert gate_config({"gate": gate}).q_of == "own"


def test_every_field_can_be_a_flag():
    """What is an attribute of every config hides the field of that name."""
    parts = {part for name in FIELDS for part in name.split(".")}
    assert not parts & set(dir(ConfigDict()))


@given(st.sampled_from(sorted(FIELDS)), st.sampled_from([None, [None], object(), b""]))
def test_a_value_of_another_type_names_its_field(name, value):
    with pytest.raises(InputError) as caught:
        Job().changed({name: value})
    assert str(caught.value).startswith(f"{name}: got ")
    assert "\n" not in str(caught.value)


@given(
    st.sampled_from([n for n, v in FIELDS.items() if type(v) is float]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_a_number_that_is_not_finite_names_its_field(name, value):
    with pytest.raises(InputError, match=f"^{name}: got .*, expected a finite number$"):
        Job().changed({name: value})


@given(st.sampled_from(sorted(FIELDS)))
def test_an_unknown_field_names_its_neighbours(name):
    section = name.rpartition(".")[0]
    wrong = f"{section}.nothing" if section else "nothing"
    with pytest.raises(InputError) as caught:
        Job().changed({wrong: 1})
    assert str(caught.value).startswith(f"unknown config field '{wrong}'; choose from")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base.steps": 0}, "base.steps: got 0, expected 1 or more"),
        ({"skill.rank": 0}, "skill.rank: got 0, expected 1 or more"),
        ({"skill.rank": True}, "skill.rank: got True, expected a whole number"),
        ({"skill.rank": 8.0}, "skill.rank: got 8.0, expected a whole number"),
        ({"skill.objective": "magic"}, "skill: unknown objective 'magic'; choose"),
        ({"base.dropout": 1.0}, "base.dropout: got 1.0, expected 0 <= rate < 1"),
        ({"base.learning_rate": -1.0}, "base.learning_rate: got -1.0"),
        ({"gate.top_k": 0}, "gate.top_k: got 0, expected 1 or more"),
        ({"evaluation.seed": -1}, "evaluation.seed: got -1, expected 0 or more"),
        ({"run.log_every": 0}, "run.log_every: got 0, expected 1 or more"),
        ({"cost_limit": -1.0}, "cost_limit: got -1.0, expected 0 or more"),
        ({"std_floor": 0.0}, "std_floor: got 0.0, expected above 0"),
        ({"base": 3}, "base: got 3, expected a section of fields"),
        ({"gate.widths": 8}, "gate.widths: got 8, expected several in brackets"),
        ({"gate.widths": ("a",)}, "gate.widths: got 'a', expected a whole number"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(InputError) as caught:
        Job().changed(changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.base.batch-size=3", "did you mean --config.base.batch_size?"),
        ("--config.base.nothing=3", "unknown config field 'nothing'"),
        ("--config.base.steps=many", "--config.base.steps"),
        ("--config.base.steps=-1", "base.steps: got -1, expected 1 or more"),
        ("--config.diffusion.steps=0", "process.steps: got 0"),
        ("--config.critics.safety=False", "x.hdf5: no such file"),
    ],
)
def test_flags(option, message, tmp_path, monkeypatch):
    """From any directory: the default config is the checkout's."""
    monkeypatch.chdir(tmp_path)
    answer = call(
        "launch.pretrain", "--workdir=w", "--data=x.hdf5", "--objective=safety", option
    )
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert message in answer.err
