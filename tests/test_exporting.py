"""Exported policies: every form of policy acts as `Policy.act`, and what is refused."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from shell import call

from psec_jax import exporting
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.data.actions import ActionBox
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, init_distance, init_gate
from psec_jax.networks.critics import init_q
from psec_jax.policy import Policy, compose
from psec_jax.types import Normaliser

pytest.importorskip("flatbuffers", reason="needs the extra export")
EXAMPLES = Path(__file__).parents[1] / "examples"
S, A, K = tiny.OBS_DIM, tiny.ACTION_DIM, tiny.SKILLS
NORMALISER = Normaliser(jnp.full(S, 0.5), jnp.full(S, 2.0))


def onnx():
    pytest.importorskip("jax2onnx", reason="needs make setup-onnx")


def support(kind):
    scale, tau = jnp.ones((K, S)), jnp.ones(K)
    if kind in ("neighbour", "nearest"):
        valid = jnp.arange(5) < jnp.asarray([[5], [3], [1]])
        demos = tiny.normal(K, 5, S)
        return {"demos": demos, "valid": valid, "tau": tau, "scale": scale}
    if kind == "learned":
        nets = jax.vmap(lambda key: init_distance(key, S))(tiny.keys(K))
        box = {"low": -scale, "high": scale, "reach": tau}
        return {"net": nets, "tau": tau, "scale": scale} | box
    return None


def policy(
    kind="mlp", sampler="ddpm", level="parameter", box=None, execute=1, net=None, **gate
):
    process, size = tiny.SAMPLERS[sampler], A
    if kind == "transformer":
        process = dataclasses.replace(process, horizon=2, execute=execute)
        size = 1
    base_member = level != "parameter"
    form = GateConfig(**{"widths": (8,), "base_member": base_member} | gate)
    start = jnp.full(K + base_member, 0.3)
    params = init_gate(form, jax.random.key(1), S, start, support(form.support))
    config = PolicyConfig(tiny.network(kind, **(net or {})), process, size, level, form)
    skills = tiny.library(kind=kind)
    arrays = PolicyParams(tiny.base(kind), NORMALISER, skills, jnp.ones(K), params)
    return Policy(config, arrays, ("a", "b", "c"), box)


def choosing():
    """Critics of a reward choose among two candidates."""
    plain = policy(head="constant")
    q = jax.vmap(lambda key: init_q((8,), key, S, A))(tiny.keys(2))
    params = plain.params._replace(critics={"reward": q}, cost_weight=jnp.ones(()))
    config = dataclasses.replace(plain.config, candidates=2, rule="reward")
    return dataclasses.replace(plain, config=config, params=params)


BOX = ActionBox((-2.0, 3.0), (1.0, 3.0))  # the second number never varies
RELEASED = {"compat": "released"}
FORMS = {
    "nearest support": {"support": "nearest"},
    "support, noise level": {"level": "noise", "support": "neighbour", "box": BOX},
    "ddim, learned support": {"sampler": "ddim", "support": "learned", "head": "topp"},
    "euler, action level": {"sampler": "euler", "level": "action", "head": "softmax"},
    "midpoint, released": {"sampler": "midpoint", "head": "sigmoid", "net": RELEASED},
    "chunks": {"kind": "transformer", "execute": 2, "head": "constant"},
}


@pytest.mark.parametrize("form", FORMS)
def test_onnx_acts_as_the_policy(form):
    onnx()
    _, difference = exporting.convert(policy(**FORMS[form]), "onnx")
    assert difference < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: policy(execute=2, kind="transformer"), choosing]
)
def test_jax_acts_as_the_policy(make):
    _, difference = exporting.convert(make(), "jax")
    assert difference < 1e-5


def test_the_comparison_sees_what_is_wrong():
    made = policy(box=BOX)
    right = exporting._function(made)
    assert exporting.compare(made, jax.jit(right)) < 1e-5
    shifted = jax.jit(lambda obs, noise: right(obs, noise) + jnp.asarray([3e-3, 0]))
    assert exporting.compare(made, shifted) == pytest.approx(2e-3, rel=0.1)
    for wrong in (lambda x: x[..., :1], lambda x: x * np.nan, lambda x: x[:1]):
        damaged = functools.partial(lambda wrong, *x: wrong(right(*x)), wrong)
        assert exporting.compare(made, damaged) == np.inf


def test_what_onnx_cannot_hold_is_refused():
    onnx()
    with pytest.raises(InputError, match=r"critics that choose.*jax can"):
        exporting.convert(choosing(), "onnx")
    half = policy(head="constant", net={"matmul_dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"onnxruntime cannot run.*jax can"):
        exporting.convert(half, "onnx")


def consume(name, folder):
    """The example in a process that cannot import psec_jax; its last action."""
    code = (
        "import runpy, sys; sys.modules['psec_jax'] = None; sys.argv[0] = 'x';"
        f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return [
        np.fromstring(line.strip("[]"), sep=" ") for line in ran.stdout.splitlines()
    ]


@pytest.mark.parametrize("name", ["jax", "onnx"])
def test_the_command_and_its_consumers(made, tmp_path, name):
    if name == "onnx":
        onnx()
    out = tmp_path / "robot"
    given = (f"--library={made}", f"--out={out}", f"--format={name}", "--gate=linear")
    for _ in range(2):  # an earlier export is replaced
        answer = call("launch.export", *given)
        assert answer.code == 0, answer.err
    assert f"policy.{name}: obs [3], noise [6, 2] -> action [2]" in answer.out
    assert {p.name for p in out.iterdir()} == {"policy.json", f"policy.{name}"}
    about = json.loads((out / "policy.json").read_text())
    assert about["differences"][name] < 1e-5
    assert [skill["name"] for skill in about["skills"]] == ["walk", "run"]
    assert ("onnxruntime" in about["versions"]) == (name == "onnx")
    assert about["gate"]["name"] == "linear" and about["units"] == "[-1, 1]"

    acting = compose(made, gate="linear")
    random, obs = np.random.default_rng(0), np.zeros((1, S), np.float32)
    act = acting.from_noise()
    expected = [
        act(random.standard_normal((1, 6, A), np.float32), obs)[0] for _ in range(3)
    ]
    np.testing.assert_allclose(consume(f"act_{name}.py", out), expected, atol=1e-4)


REFUSED = {
    "weights at call time": (["--skills=walk,run"], "need a gate, or one alpha"),
    "gate and weights": (["--gate=linear", "--alpha=1,2"], "both given"),
    "unknown format": (["--format=torch"], "unknown format 'torch'; choose from jax"),
    "no format": (["--format="], "format: got none"),
    "unknown gate": (["--gate=none"], "no gate 'none'"),
    "folder in use": (["--out=lib"], r"--out: lib holds base"),
    "a file": (["--out=file"], "is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(made, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "lib")
    Path("file").touch()
    flags, message = REFUSED[case]
    before = sorted(Path().rglob("*"))
    answer = call("launch.export", "--library=lib", "--out=new", *flags)
    assert answer.code == 2 and message in answer.err
    assert answer.err.count("\n") == 1
    assert sorted(p for p in Path().rglob("*") if p.name != ".lock") == before


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(InputError, match="jax2onnx is not installed: make setup-onnx"):
        exporting.convert(policy(), "onnx")


def test_a_damaged_conversion_is_not_kept(made, tmp_path, monkeypatch):
    write, read = exporting.FORMATS["jax"]

    def wrong(content):
        call = read(content)
        return lambda obs, noise: call(obs, 0 * noise)

    monkeypatch.setitem(exporting.FORMATS, "jax", (write, wrong))
    with pytest.raises(
        InputError, match=r"jax: actions of the file .* expected 0.0001"
    ):
        exporting.export(made, tmp_path / "new", ["jax"], gate="constant")
    assert not list(tmp_path.iterdir())
