"""Relations of skills by hand-made ones, and pruning that can be undone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from fuzz import _demos as demos
from fuzz import _make_library as make_library
from shell import call
from test_library import files_of

from psec_jax import analysis, pruning, tree
from psec_jax.analysis import AnalysisConfig
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose

OBS = np.asarray(tiny.normal(40, tiny.OBS_DIM))
RNG = np.random.default_rng(0)


def scaled(skill, factor):
    return tree.unflatten(
        {
            path: np.asarray(leaf * factor if path.endswith("/b") else leaf)
            for path, leaf in tree.flatten(skill).items()
        }
    )


def test_inner_products_by_factors():
    factors = [(RNG.normal(size=(5, r)), RNG.normal(size=(r, 4))) for r in (2, 3)]
    deltas = [(a @ b).ravel() for a, b in factors]
    np.testing.assert_allclose(analysis.gram(factors), np.inner(deltas, deltas))
    cosines = analysis.cosines(analysis.gram(factors))
    np.testing.assert_allclose(np.diag(cosines), 1)
    np.testing.assert_array_equal(analysis.cosines(np.zeros((2, 2))), 0)


def test_principal_angles_of_known_spaces():
    """The planes xy and xz' share x; z' is at 30 degrees to y."""
    a = np.eye(3)[:, :2]
    tilted = np.array([[1.0, 0], [0, np.cos(np.pi / 6)], [0, np.sin(np.pi / 6)]])
    found = analysis.principal_cosines(a, tilted)
    np.testing.assert_allclose(np.degrees(np.arccos(found)), [0, 30], atol=1e-5)
    mixed = np.array([[2.0, 1.0], [0.0, 3.0]])
    inputs, outputs = analysis.spaces(tilted @ mixed, np.eye(2, 4))
    cosines = analysis.principal_cosines(inputs, tilted)
    np.testing.assert_allclose(cosines, 1)
    np.testing.assert_allclose(np.abs(outputs[2:]), 0, atol=1e-12)
    # What B drops is not read: only one direction is left of two.
    inputs, _ = analysis.spaces(a, np.array([[1.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(np.abs(inputs), [[1], [0], [0]], atol=1e-12)
    assert analysis.spaces(a, np.zeros((2, 2)))[0].shape == (3, 0)


def test_overlap_of_supports():
    shares = np.array([[1.0, 0.5, np.nan], [0.0, 0.5, np.nan]])
    found = analysis.overlaps(shares)
    assert found[0][:2] == [1, pytest.approx(0.5 / 1.5)] and found[0][2] is None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Skills walk and run, twice walk, and the opposite of run at half its size."""
    folder = tmp_path_factory.mktemp("made")
    make_library(folder / "lib")
    library = SkillLibrary.open(folder / "lib")
    for gate in library.gates():
        library.remove("gate", gate)
    small = {"walk": 0.02, "run": 0.02, "third": 0.02}
    for seed, (name, factor) in enumerate(small.items()):
        if name in library.skills():
            library.remove("skill", name)
        library.add_skill(name, scaled(tiny.skill(seed), factor), {"alpha": 16.0})
    walk, run = (library.load_skill(name)[0] for name in ("walk", "run"))
    library.add_skill("walk-2", scaled(walk, 2.0), {"alpha": 8.0})
    library.add_skill("against", scaled(run, -0.5), {"alpha": 16.0})
    d4rl.save(folder / "states.hdf5", demos(obs_dim=tiny.OBS_DIM), {})
    return folder / "lib"


@pytest.fixture(scope="module")
def found(made):
    return analysis.analyse(made, [], AnalysisConfig(states=32), OBS)


def test_what_is_alike_and_what_is_opposed(found):
    result, record = found
    names = result.skills
    assert names == ["against", "run", "third", "walk", "walk-2"]
    against, run, third, walk, twin = range(5)
    assert result.cosine[walk][twin] == pytest.approx(1)
    assert result.cosine[run][against] == pytest.approx(-1)
    assert abs(result.cosine[walk][run]) < 0.5
    for layer in result.layers.values():
        assert layer["cosine"][walk][twin] == pytest.approx(1)
        assert layer["inputs"][run][against] == pytest.approx(1)
        assert layer["inputs"][walk][run] < 1
    assert np.max(result.angles["input"]["3,4"]["inputs"]) < 0.1
    assert result.distance[walk][twin] < 1e-4
    assert result.agreement[run][against] < -0.5
    assert result.conflict[run][against] > 0.5 and result.conflict[walk][twin] == 0
    assert result.overlap is None and record["states"] == 32
    assert record["alpha"] == [16, 16, 16, 16, 8]


def test_what_the_rest_makes_up_for(found):
    result, _ = found
    against, run, third, walk, twin = range(5)
    assert result.left[third] > 0.3
    assert max(result.left[k] for k in (against, run, walk, twin)) < 1e-3
    # One of each pair can go, and only one.
    assert len(result.removed) == 2 and "third" not in result.removed
    assert len({"walk", "walk-2"} & result.removed.keys()) == 1
    assert len({"run", "against"} & result.removed.keys()) == 1
    for name, one in result.removed.items():
        assert not one["weights"].keys() & result.removed.keys()
        assert result.suggestions[name].startswith("remove: ")
    assert result.suggestions["third"] == "keep"


def test_the_error_is_that_of_the_composed_policy(made, found):
    """A replaced skill acts as what takes its place."""
    result, record = found
    strength = dict(zip(result.skills, record["alpha"], strict=True))
    for name, one in result.removed.items():
        names = list(one["weights"])
        alpha = [one["weights"][other] * strength[other] for other in names]
        got = compose(made, names, alpha=alpha).act(tiny.keys(8), OBS[:8])
        expected = compose(made, name).act(tiny.keys(8), OBS[:8])
        np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.fixture
def lib(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "lib")
    shutil.copy(made.parent / "states.hdf5", ".")
    return SkillLibrary.open("lib")


def run(command, *arguments):
    return call("launch.library", command, "--library=lib", "--out=out", *arguments)


def saved(found, lib, **changes):
    """An analysis on disk, as the command writes it."""
    result, record = found
    content = result._asdict() | {"made_of": record} | changes
    lib.root.parent.joinpath("out").mkdir(exist_ok=True)
    path = lib.root.parent / "out" / "analysis.json"
    path.write_text(json.dumps(content))
    return path


def test_the_commands(lib):
    answer = run("analyse", "--data=states.hdf5", "--states=16")
    assert answer.code == 0, answer.err
    assert "remove: " in answer.out and "keep" in answer.out
    content = json.loads(Path("out/analysis.json").read_text())
    assert content["made_of"]["data"] == "states.hdf5"
    assert Path("out/heatmaps.png").read_bytes().startswith(b"\x89PNG")
    before = files_of(lib.root)
    expected = {
        name: compose("lib", name).act(tiny.keys(4), OBS[:4])
        for name in content["removed"]
    }
    answer = run("prune")
    assert answer.code == 0, answer.err
    assert len(content["removed"]) == 2
    for name, action in expected.items():
        assert name not in lib.skills() and name in answer.out
        got = compose("lib", gate=name).act(tiny.keys(4), OBS[:4])
        np.testing.assert_allclose(got, action, atol=1e-3)
    assert lib.verify() == [] and lib.retired("skill") == sorted(expected)
    answer = run("prune")
    assert answer.code == 2 and "has no skill" in answer.err
    for name in expected:
        assert run("restore", name).code == 0
        lib.remove("gate", name)
    assert files_of(lib.root) == before


def test_an_environment_that_does_not_fit(lib, found):
    saved(found, lib)
    answer = run("prune", "--env=dm_control:walker-walk", "--episodes=1")
    assert answer.code == 2 and "observations have 24 numbers" in answer.err
    assert lib.retired("skill") == []


def test_nothing_is_pruned_that_is_needed(lib, found):
    saved(found, lib)
    name = min(found[0].removed)
    gate = {"head": {"alpha": np.ones(1, np.float32)}}
    card = {"skills": [name], "level": "parameter", "gate": {"head": "constant"}}
    lib.add_gate("mine", gate, card)
    before = files_of(lib.root)
    answer = run("prune")
    assert answer.code == 2 and f"{name!r} is needed by gate 'mine'" in answer.err
    assert files_of(lib.root) == before
    lib.remove("gate", "mine")
    lib.add_gate(name, gate, card | {"skills": ["third"]})
    answer = run("prune")
    assert answer.code == 2 and f"has a gate {name!r}" in answer.err


def test_other_analyses_are_refused(lib, found):
    result, record = found
    prints = ["0" * 16] * 5
    for changes, words in (
        (
            {"made_of": record | {"skill_fingerprints": prints}},
            "analyse the library",
        ),
        ({"made_of": record | {"base_fingerprint": "x"}}, "made for another base"),
        ({"made_of": 1}, "not an analysis"),
        ({"removed": {"walk": 1}}, "not an analysis"),
        ({"removed": {"walk": {"weights": {"fly": 1.0}}}}, "name other skills"),
        ({"removed": {"walk": {"weights": {"walk": 1.0}}}}, "name other skills"),
        ({"removed": {"walk": {"weights": {"run": "x"}}}}, "not an analysis"),
    ):
        path = saved(found, lib, **changes)
        with pytest.raises(InputError, match=words):
            pruning.read(path, lib)
    saved(found, lib, removed={})
    answer = run("prune")
    assert answer.code == 0 and "suggests to remove no skill" in answer.out


def test_restoring(lib):
    before = files_of(lib.root)
    lib.retire("skill", "walk")
    with pytest.raises(InputError, match="has no retired skill 'run': walk"):
        lib.restore("skill", "run")
    lib.add_skill("walk", tiny.skill(5), {"alpha": 1.0})
    with pytest.raises(InputError, match="has a skill 'walk' again"):
        lib.restore("skill", "walk")
    with pytest.raises(InputError, match="is there already; restore it or move"):
        lib.retire("skill", "walk")
    lib.remove("skill", "walk")
    array = lib.root / "removed/skills/walk/skill.safetensors"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="SHA-256"):
        lib.restore("skill", "walk")
    assert lib.retired("skill") == ["walk"] and "walk" not in lib.skills()
    array.write_bytes(whole)
    lib.restore("skill", "walk")
    assert files_of(lib.root) == before


BAD = {
    "no data": (("analyse",), "--data: not given"),
    "one skill": (
        ("analyse", "--data=states.hdf5", "--skills=walk"),
        "got 1 skills",
    ),
    "twice": (("analyse", "--data=states.hdf5", "--skills=run,run"), "is given twice"),
    "no skill": (("analyse", "--data=states.hdf5", "--skills=a,run"), "no skill 'a'"),
    "no gate": (("analyse", "--data=states.hdf5", "--gates=a"), "has no gate 'a'"),
    "bound": (("analyse", "--data=states.hdf5", "--redundant=2"), "redundant: got 2.0"),
    "NaN": (("analyse", "--data=states.hdf5", "--conflict=nan"), "conflict: got nan"),
    "no analysis": (("prune",), "cannot read out/analysis.json"),
    "nothing retired": (("restore", "walk"), "has no retired skill 'walk': none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(lib, case):
    arguments, words = BAD[case]
    before = files_of(lib.root)
    answer = run(*arguments)
    assert answer.code == 2 and words in answer.err, answer
    assert answer.err.count("\n") == 1 and files_of(lib.root) == before
