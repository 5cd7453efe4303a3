"""Merged skills: exact where they say so, and their error stated where not."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import tiny
from fuzz import _demos as demos
from shell import call

from psec_jax import merging, tree
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.lora import init_skill
from psec_jax.merging import METHODS, MergeConfig, merge_of_library, merge_skills
from psec_jax.policy import compose

SKILLS = [tiny.skill(0, rank=2), tiny.skill(1, rank=3)]
ALPHA = [3.0, -0.7]
OBS = np.asarray(tiny.normal(20, tiny.OBS_DIM))


def errors(merged, skills=SKILLS, alpha=ALPHA):
    return merging.layer_errors(skills, alpha, merging.changes(merged))


def test_the_sum_of_products_is_not_the_product_of_sums():
    """(sum_k A_k)(sum_k B_k) has the products of different skills too."""
    same = [tiny.skill(0), tiny.skill(1)]
    flat = [tree.flatten(skill) for skill in same]
    naive = tree.unflatten({path: flat[0][path] + flat[1][path] for path in flat[0]})
    ones = [1.0, 1.0]
    found = errors(naive, same, ones)
    assert min(found.values()) > 0.5
    for layer, factors in merging.factors_of(same, ones).items():
        cross = sum(
            factors[i][0] @ factors[j][1] for i, j in itertools.permutations(range(2))
        )
        exact = sum(a @ b for a, b in factors)
        got = merging.changes(naive)[layer] - exact
        np.testing.assert_allclose(got, cross, atol=1e-6)
        ratio = np.linalg.norm(cross) / np.linalg.norm(exact)
        np.testing.assert_allclose(found[layer], ratio, rtol=1e-5)
    config = MergeConfig()
    assert max(errors(merge_skills(config, same, ones), same, ones).values()) < 1e-6


def test_concatenated_factors_are_the_sum():
    merged = merge_skills(MergeConfig(), SKILLS, ALPHA)
    assert max(errors(merged).values()) < 1e-6
    layers = tree.flatten(merged)
    assert all(x.shape[1] == 5 for path, x in layers.items() if path.endswith("/a"))


def test_the_nearest_of_a_rank():
    """The error is the singular values that are left out (Eckart and Young 1936)."""
    merged = merge_skills(MergeConfig("svd", rank=2), SKILLS, ALPHA)
    found = errors(merged)
    for layer, factors in merging.factors_of(SKILLS, ALPHA).items():
        s = np.linalg.svd(sum(a @ b for a, b in factors), compute_uv=False)
        expected = np.linalg.norm(s[2:]) / np.linalg.norm(s)
        np.testing.assert_allclose(found[layer], expected, atol=1e-6)
    whole = merge_skills(MergeConfig("svd", rank=50), SKILLS, ALPHA)
    assert max(errors(whole).values()) < 1e-6


def test_trimmed_and_elected():
    trimmed = merging.trim(np.array([[4.0, -3.0], [0.5, 1.0]]), 0.5)
    np.testing.assert_array_equal(trimmed, [[4, -3], [0, 0]])
    deltas = np.array([[[4.0, -3.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, -3.0]]])
    # Signs of the sums: +, -, 0, -; the means of what agrees.
    np.testing.assert_array_equal(merging.elect(deltas), [[3, -3], [0, -3]])


def test_ties_of_one_skill_untrimmed_is_the_skill():
    config = MergeConfig("ties", density=1.0)
    merged = merge_skills(config, SKILLS[:1], [2.0])
    assert max(errors(merged, SKILLS[:1], [2.0]).values()) < 1e-6


def test_dare_is_right_on_average():
    whole = merge_skills(MergeConfig("dare", density=1.0), SKILLS, ALPHA)
    assert max(errors(whole).values()) < 1e-6
    drawn = [
        merging.changes(
            merge_skills(MergeConfig("dare", 50, 0.5, seed), SKILLS, ALPHA)
        )["input"]
        for seed in range(200)
    ]
    exact = sum(a @ b for a, b in merging.factors_of(SKILLS, ALPHA)["input"])
    one = np.linalg.norm(drawn[0] - exact) / np.linalg.norm(exact)
    mean = np.linalg.norm(np.mean(drawn, 0) - exact) / np.linalg.norm(exact)
    assert one > 0.3 and mean < one / 8
    again = merge_skills(MergeConfig("dare", 50, 0.5, 3), SKILLS, ALPHA)
    np.testing.assert_array_equal(merging.changes(again)["input"], drawn[3])


def test_skills_that_change_nothing():
    nothing = init_skill(tiny.keys(1)[0], tiny.base(), 2)
    for method in METHODS:
        merged = merge_skills(MergeConfig(method), [nothing, nothing], [1.0, 2.0])
        assert set(errors(merged, [nothing, nothing], [1.0, 2.0]).values()) == {0.0}


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "lib")
    library = SkillLibrary.open("lib")
    library.add_skill("mlp", tiny.skill(2, adapter="mlp"), {"alpha": 1.0})
    ds = demos(obs_dim=tiny.OBS_DIM, action_dim=tiny.ACTION_DIM)
    d4rl.save("states.hdf5", ds, {})
    d4rl.save("other.hdf5", demos(obs_dim=7), {})
    return tmp_path / "lib"


def test_the_error_on_data(root):
    names, alpha = ["walk", "run"], [2.0, 1.0]
    for method in (merging.FOLD, "concatenate"):
        made = merge_of_library(root, names, alpha, MergeConfig(method), OBS)
        assert max(made.errors.layers.values()) < 1e-5
        assert made.errors.prediction < 1e-4 and made.errors.action < 1e-4
    made = merge_of_library(root, names, alpha, MergeConfig("svd", rank=1), OBS)
    assert made.errors.prediction > 0.01 and made.errors.action > 1e-4
    assert made.errors.worst()[1] >= made.errors.prediction
    with pytest.raises(InputError, match=r"is [\d.]+, above the bound 0.01"):
        made.errors.check(0.01)
    made.errors.check(made.errors.worst()[1])
    again = merge_of_library(root, names, alpha, MergeConfig("svd", rank=1), OBS)
    assert again.errors == made.errors


def run(name, *arguments):
    given = ("--library=lib", "--skills=walk,run", "--alpha=2,1", "--data=states.hdf5")
    return call("launch.library", "merge", name, *given, *arguments)


def test_the_command(root):
    answer = run("both")
    assert answer.code == 0, answer.err
    assert "predictions on data" in answer.out and "layer input" in answer.out
    assert answer.out.endswith("added skill both\n")
    card = SkillLibrary.open(root).card("skill", "both")
    assert card["merged"]["skills"] == ["walk", "run"] and card["alpha"] == 1
    assert card["merged"]["errors"]["prediction"] < 1e-4
    obs = OBS[:4]
    expected = compose(root, ["walk", "run"], alpha=[2.0, 1.0]).act(tiny.keys(4), obs)
    got = compose(root, "both").act(tiny.keys(4), obs)
    np.testing.assert_allclose(got, expected, atol=1e-5)

    answer = run("folded", "--method=fold", "--out=new")
    assert answer.code == 0, answer.err
    got = compose("new").act(tiny.keys(4), obs)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_error_above_the_bound_is_not_saved(root):
    answer = run("thin", "--method=svd", "--rank=1")
    assert answer.code == 2 and "above the bound 0.01; nothing was saved" in answer.err
    assert "predictions on data" in answer.out
    assert "thin" not in SkillLibrary.open(root).skills()
    assert run("thin", "--method=svd", "--rank=1", "--bound=10").code == 0
    answer = run("f", "--method=fold", "--out=new", "--bound=1e-12")
    assert answer.code == 2 and not (root.parent / "new").exists()


BAD = {
    "nothing": (("--skills=", "--alpha="), "got no skills, expected one or more"),
    "one weight": (("--alpha=2",), "alpha: got 1 weights for 2 skills"),
    "no weights": (("--alpha=",), "alpha: got 0 weights for 2 skills"),
    "a word": (("--alpha=2,x",), "--alpha: could not convert"),
    "NaN": (("--alpha=2,nan",), "--alpha: got nan, expected finite numbers"),
    "no such skill": (("--skills=walk,fly",), "has no skill 'fly'; it has"),
    "an mlp": (("--skills=walk,mlp",), "only lora skills are products"),
    "rank": (("--rank=2",), "rank: method concatenate keeps the sum of the ranks"),
    "density": (("--method=ties", "--density=0"), "density: got 0.0, expected in"),
    "bound": (("--bound=-1",), "bound: got -1.0, expected 0 or more"),
    "bound of NaN": (("--bound=nan",), "bound: got nan, expected 0 or more"),
    "no data": (("--data=",), "--data: not given"),
    "other data": (("--data=other.hdf5",), "observations have 7 numbers"),
    "no --out": (("--method=fold",), "--out: --method=fold needs it"),
    "--out": (("--out=new",), "--out: --method=fold needs it"),
    "a base there": (("--method=fold", "--out=lib"), "lib has a base already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(root, case):
    arguments, words = BAD[case]
    answer = run("both", *arguments)
    assert answer.code == 2 and words in answer.err, answer
    assert answer.err.count("\n") == 1 and answer.out == ""
    assert SkillLibrary.open(root).skills() == ["mlp", "run", "walk"]
    assert not (root.parent / "new").exists()


def test_a_name_in_use(root):
    answer = run("walk")
    assert answer.code == 2 and "has a skill 'walk' already" in answer.err


def test_the_released_form_cannot_be_folded(root):
    from psec_jax.probe import composed

    exact, _ = composed(root, tiny.library(2))
    released = dataclasses.replace(tiny.NETWORK, compat="released")
    exact = exact._replace(net=dataclasses.replace(exact.net, config=released))
    with pytest.raises(InputError, match="nothing can be folded into it"):
        merging._folded(exact, [1.0, 1.0])
