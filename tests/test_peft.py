"""Skills in PEFT's format: back and forth, and what PEFT itself makes of them."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tiny
from shell import call
from test_library import assert_same

from psec_jax import peft, tree
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.lora import adapter_delta, dense_layers

CARD = {"alpha": 0.7, "base_fingerprint": "0" * 16}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_there_and_back(tmp_path, kind):
    skill = tiny.skill(0, kind=kind)
    peft.export(tmp_path / "new", skill, CARD)
    params, card = peft.read(tmp_path / "new")
    assert_same(params, skill)
    assert card["base_fingerprint"] == CARD["base_fingerprint"]
    assert card["alpha"] == pytest.approx(0.7, rel=1e-12)
    config = json.loads((tmp_path / "new" / peft.CONFIG).read_text())
    assert config["r"] == tiny.RANK
    assert config["lora_alpha"] == pytest.approx(0.7 * tiny.RANK)


def test_layers_of_several_ranks_are_padded(tmp_path):
    flat = tree.flatten(tiny.skill(0, rank=2)) | {
        path: leaf
        for path, leaf in tree.flatten(tiny.skill(1, rank=5)).items()
        if path.startswith("input/")
    }
    peft.export(tmp_path, tree.unflatten(flat), CARD)
    read = tree.flatten(peft.read(tmp_path)[0])
    assert read["output/a"].shape[1] == 5
    for layer in dense_layers(tiny.base()):
        expected = flat[f"{layer}/a"] @ flat[f"{layer}/b"]
        got = read[f"{layer}/a"] @ read[f"{layer}/b"]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_arithmetic(tmp_path):
    """(lora_alpha / r) B A x, as PEFT's documentation has it."""
    skill = tiny.skill(0)
    peft.export(tmp_path, skill, CARD)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    arrays = safetensors.numpy.load_file(tmp_path / peft.ARRAYS)
    a = arrays["base_model.model.block_0.up.lora_A.weight"]
    b = arrays["base_model.model.block_0.up.lora_B.weight"]
    assert a.shape == (tiny.RANK, 16) and b.shape == (32, tiny.RANK)
    x = tiny.normal(16)
    got = config["lora_alpha"] / config["r"] * b @ (a @ x)
    adapter = {leaf: skill["block_0"]["up"][leaf][None] for leaf in ("a", "b")}
    expected = adapter_delta(x, adapter, np.full(1, 0.7, np.float32) + x[:1] * 0, abs)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def torch_base():
    """The base's dense layers as modules of the same names."""
    torch = pytest.importorskip("torch")
    root = torch.nn.Module()
    for layer, (d, o) in dense_layers(tiny.base()).items():
        *parents, name = layer.split("/")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        node.add_module(name, torch.nn.Linear(d, o))
    return root


def assert_adds(model, skill, alpha):
    """Each layer of PEFT's model adds alpha x A B to what it gives without."""
    import torch

    flat = tree.flatten(skill)
    for layer, (d, _) in dense_layers(tiny.base()).items():
        module = model.base_model.model.get_submodule(layer.replace("/", "."))
        x = torch.from_numpy(np.array(tiny.normal(5, d)))
        with torch.no_grad():
            got = (module(x) - module.base_layer(x)).numpy()
        a, b = np.asarray(flat[f"{layer}/a"]), np.asarray(flat[f"{layer}/b"])
        np.testing.assert_allclose(got, alpha * (x.numpy() @ a) @ b, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_peft_itself_reads_a_skill(tmp_path):
    theirs = pytest.importorskip("peft")
    skill = tiny.skill(0)
    peft.export(tmp_path, skill, CARD)
    model = theirs.PeftModel.from_pretrained(torch_base(), tmp_path)
    assert_adds(model, skill, 0.7)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_itself_writes_is_read(tmp_path):
    theirs = pytest.importorskip("peft")
    import torch

    names = [layer.replace("/", ".") for layer in dense_layers(tiny.base())]
    config = theirs.LoraConfig(r=3, lora_alpha=5, target_modules=names)
    torch.manual_seed(0)
    model = theirs.get_peft_model(torch_base(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    params, card = peft.read(tmp_path)
    assert card["alpha"] == pytest.approx(5 / 3)
    assert_adds(model, params, card["alpha"])


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "lib")
    library = SkillLibrary.open("lib")
    library.add_skill("mlp", tiny.skill(2, adapter="mlp"), {"alpha": 1.0})
    return library


def run(*arguments):
    return call("launch.library", *arguments, "--library=lib")


def test_the_commands(root):
    answer = run("export", "walk", "--out=walk")
    assert answer.code == 0, answer.err
    answer = run("import", "walk", "--name=copy")
    assert (answer.code, answer.out) == (0, "added skill copy\n")
    assert_same(root.load_skill("copy")[0], root.load_skill("walk")[0])
    assert root.card("skill", "copy")["alpha"] == root.card("skill", "walk")["alpha"]
    for arguments, words in (
        (("export", "walk"), "--out: not given, expected a folder"),
        (("export", "walk", "--out=walk"), "is there already; choose another --out"),
        (("export", "mlp", "--out=mlp"), "only lora skills have a form in PEFT"),
        (("export", "fly", "--out=fly"), "has no skill 'fly'"),
        (("import", "walk"), "--name: not given, expected a name for the skill walk"),
        (("import", "walk", "--name=run"), "has a skill 'run' already"),
        (("import", "walk", "--name=../x"), "expected letters, digits"),
        (("import", "lib", "--name=x"), "cannot read lib/adapter_config.json"),
    ):
        answer = run(*arguments)
        assert answer.code == 2 and words in answer.err, answer
    assert root.skills() == ["copy", "mlp", "run", "walk"]


CONFIGS = {
    "peft_type": ("LOHA", "peft_type is 'LOHA', expected 'LORA'"),
    "bias": ("all", "bias is 'all', expected 'none'"),
    "use_dora": (True, "use_dora is True, expected False"),
    "use_rslora": (True, "use_rslora is True"),
    "rank_pattern": ({"input": 2}, "rank_pattern is {'input': 2}"),
    "alpha_pattern": ({"input": 2}, "alpha_pattern is"),
    "modules_to_save": (["output"], "modules_to_save is ['output']"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa'"),
    "r": (0, "r is 0 and lora_alpha"),
    "lora_alpha": ("x", "lora_alpha 'x', expected"),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_other_adapters_are_refused(root, field):
    value, words = CONFIGS[field]
    peft.export("walk", *root.load_skill("walk"))
    path = root.root.parent / "walk" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    answer = run("import", "walk", "--name=x")
    assert answer.code == 2 and words in answer.err, answer
    assert answer.err.count("\n") == 1 and "x" not in root.skills()


def rewritten(change, metadata=None):
    arrays = safetensors.numpy.load_file(f"walk/{peft.ARRAYS}")
    safetensors.numpy.save_file(change(arrays), f"walk/{peft.ARRAYS}", metadata)


UP = "base_model.model.block_0.up.lora_A.weight"
CHANGES = {
    "a layer missing": (
        lambda x: {n: v for n, v in x.items() if "input" not in n},
        "no adapter for layer 'input' of the base",
    ),
    "another layer": (
        lambda x: x | {UP.replace("up", "side"): x[UP]},
        "layer 'block_0/side' is not in the base",
    ),
    "another name": (
        lambda x: x | {"walk": x[UP]},
        "array 'walk', expected base_",
    ),
    "another rank": (lambda x: x | {UP: x[UP][:1]}, "which is not of rank 2"),
    "another size": (lambda x: x | {UP: x[UP][:, :3].copy()}, "maps 3 -> 32"),
    "NaN": (lambda x: x | {UP: x[UP] * np.nan}, "holds 32 NaN or infinite"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_arrays_are_refused(root, case):
    change, words = CHANGES[case]
    peft.export("walk", *root.load_skill("walk"))
    rewritten(change)
    answer = run("import", "walk", "--name=x")
    assert answer.code == 2 and words in answer.err, answer
    assert "x" not in root.skills()


def test_a_skill_of_another_base_is_refused(root):
    peft.export("walk", *root.load_skill("walk"))
    rewritten(dict, {"base_fingerprint": "1" * 16})
    answer = run("import", "walk", "--name=x")
    assert (
        answer.code == 2 and "made for base_fingerprint 1111111111111111" in answer.err
    )


def test_a_damaged_file(tmp_path):
    peft.export(tmp_path, tiny.skill(0), CARD)
    content = (tmp_path / peft.ARRAYS).read_bytes()
    (tmp_path / peft.ARRAYS).write_bytes(content[:100])
    with pytest.raises(InputError, match="is not a safetensors file"):
        peft.read(tmp_path)
