"""Nothing that a card or a data file names is run: a canary at every door."""

import json
import os
import sys

import pytest
import short
from fuzz import _make_minari as make_minari
from shell import call
from test_library import reseal

from psec_jax import data
from psec_jax.envs.trust import check_untrusted, runs_code
from psec_jax.errors import InputError
from psec_jax.workflows.demonstrations import card_env, environment_of

CANARY = """
import pathlib
pathlib.Path(__file__).with_name("it_ran").touch()
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported; the file."""
    (tmp_path / "canary.py").write_text(CANARY + "def make(**options): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.path.dirname(short.__file__)}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "it_ran"
    sys.modules.pop("canary", None)


@pytest.mark.parametrize(
    "spec",
    [
        "gymnasium:canary:X-v0",
        "gymnasium:runs.library.evil:X-v0",
        "gymnasium:canary:X-v0@friction:2",
        "gymnasium:canary:X-v0?x=1",
        "gymnasium:Hopper-v5?xml_file=/tmp/x.xml",
        "gymnasium:Hopper-v5?x=['../a']",
    ],
)
def test_environments_that_are_code(spec):
    assert runs_code(spec)
    with pytest.raises(InputError, match=r"allow it with --env=.* if you trust it"):
        check_untrusted(spec, "skill 'walk'")
    with pytest.raises(InputError, match="skill 'walk': names the environment"):
        card_env({"env": spec}, "skill 'walk'")
    assert card_env({"env": spec}, "skill 'walk'", named=spec) == spec


@pytest.mark.parametrize(
    "spec",
    [
        "dm_control:walker-walk",
        "gymnasium:Hopper-v5",
        "gymnasium:Hopper-v5?x=1.5&y=True&terrain=hills",
        "gymnasium:Hopper-v5?x=1@gravity:2,friction:0.5",
        "bullet:SafetyBallRun-v0",
    ],
)
def test_environments_that_are_names(spec):
    assert check_untrusted(spec, "x") == spec == card_env({"env": spec}, "x")
    with pytest.raises(InputError, match="the environment is 3, expected a name"):
        check_untrusted(3, "x")


def test_metadata_of_minari(canary, tmp_path):
    pytest.importorskip("minari", reason="run: pip install 'psec_jax[minari]'")
    folder = tmp_path / "set"
    folder.mkdir()
    make_minari(folder)
    path = folder / "data" / "metadata.json"
    good = json.loads(path.read_text())
    for entry in ("os:system", "canary:make"):
        spec = {"id": "X-v0", "entry_point": entry, "kwargs": {"command": "touch it"}}
        for missing in ("observation_space", "action_space", None):
            metadata = {n: v for n, v in good.items() if n != missing}
            path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
            if missing:
                with pytest.raises(InputError, match=f"{missing} in its metadata"):
                    data.read(folder)
            else:
                data.read(folder)
            data.environment(folder)
            with pytest.raises(InputError, match="runs code of its choice"):
                environment_of(str(folder), None, "here")
            answer = call(
                "launch.pretrain",
                f"--data={folder}",
                "--workdir=new",
                "--library=none",
            )
            assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert not canary.exists() and not (tmp_path / "it").exists()


def test_commands_on_a_library_that_names_code(canary, tmp_path):
    import fuzz

    fuzz._make_library(tmp_path / "lib")
    spec = "gymnasium:canary:X-v0"
    for name in ("skills/walk/skill", "skills/run/skill", "base/base"):
        path = tmp_path / "lib" / f"{name}.json"
        reseal(path, path.with_suffix(".safetensors").read_bytes(), env=spec)
    for gate in ("linear", "constant"):
        path = tmp_path / "lib" / "gates" / gate / "gate.json"
        reseal(path, path.with_suffix(".safetensors").read_bytes(), env=spec)
    common = ("--library=lib", "--workdir=new", "--name=new")
    for command in (
        ("launch.compose", *common, "--skills=walk,run"),
        ("experiments.tools.gate_trace", "--library=lib", "--gate=linear"),
    ):
        answer = call(*command)
        assert answer.code == 2, answer
        assert "runs code of its choice; allow it with --env=" in answer.err, answer.err
        assert answer.err.count("\n") == 1
    for command in (
        ("launch.library", "list", "--library=lib"),
        ("launch.library", "verify", "--library=lib"),
        ("launch.library", "show", "walk", "--library=lib"),
    ):
        assert call(*command).code == 0
    assert not canary.exists()
