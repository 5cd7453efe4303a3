"""The authors' checkpoints give their recorded outputs through a library.

tests/released/ holds four of their checkpoints, packed, and outputs that their code
gave for them. Numbers that are not read (moments of optimisers, weights that were not
averaged) are zeros there.
"""

import json
import lzma
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from shell import call

from psec_jax import released, tree
from psec_jax.agents import critic_file
from psec_jax.agents.critics import values
from psec_jax.choice import judge
from psec_jax.composition import DENOISERS, members, network_of
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.networks.denoiser import make_denoise
from psec_jax.policy import compose
from psec_jax.process import ddpm_reverse
from psec_jax.unpickle import read_tree

HERE = Path(__file__).parent / "released"
KINDS = ("pretrain", "lora", "composition", "nsec")
with np.load(HERE / "outputs.npz") as _file:
    V = {name: _file[name] for name in _file.files}
OBS = V["obs"]
CONFIG = json.dumps({"rl_config": {"critic_type": "hj"}})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the checkpoints, and settings beside them."""
    folder = tmp_path_factory.mktemp("released")
    for kind in KINDS:
        packed = (HERE / f"{kind}.pickle.xz").read_bytes()
        (folder / f"{kind}.pickle").write_bytes(lzma.decompress(packed))
    (folder / "config.json").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def root(files):
    """A library of all four, and their critics."""
    for kind in KINDS:
        critics = files / "critics" if kind == "lora" else None
        released.add(files / f"{kind}.pickle", files / "library", critics=critics)
    released.add(files / "nsec.pickle", files / "library", level="action")
    return files / "library"


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def test_what_is_imported(root):
    library = SkillLibrary.open(root)
    assert library.skills() == ["reward", "safety"]
    assert library.gates() == ["gate-action", "gate-noise", "gate-parameter"]
    assert library.verify() == []
    card = library.card("base", "base")
    assert (card["obs_dim"], card["action_dim"]) == (24, 6)
    assert card["network"]["compat"] == "released" and card["network"]["width"] == 32
    assert card["process"]["schedule"] == "vp" and card["process"]["steps"] == 5
    assert library.card("skill", "reward")["alpha"] == 16


def predictions(denoise):
    time = V["time"][:, 0].astype(np.float32)
    return jax.jit(jax.vmap(denoise))(OBS, V["noisy_action"], time)


def test_predictions(root):
    base = compose(root)
    net = network_of(base.config)
    close(predictions(make_denoise(net, base.params.base)), V["pretrain/eps_target"])
    for skill, name in (("reward", "reward"), ("safety", "cost")):
        params = compose(root, skill).params
        denoise = make_denoise(net, params.base, params.library, jnp.full(1, 16.0))
        close(predictions(denoise), V[f"lora/{name}_eps_target"])
    policy = compose(root, gate="gate-parameter")
    params = policy.params
    denoise = make_denoise(net, params.base, params.library, jnp.full(2, 16.0))
    close(predictions(denoise), V["composition/eps_const_alpha_r"])
    alpha = policy.alpha(OBS)
    close(alpha, V["composition/alpha"])
    time = V["time"][:, 0].astype(np.float32)

    def one(alpha, *inputs):
        return make_denoise(net, params.base, params.library, alpha)(*inputs)

    got = jax.jit(jax.vmap(one))(alpha, OBS, V["noisy_action"], time)
    close(got, V["composition/eps"])


def test_weights_of_predictions(root):
    for level in ("noise", "action"):
        alpha = compose(root, gate=f"gate-{level}").alpha(OBS)
        np.testing.assert_array_equal(alpha[:, 0], 0)
        close(alpha[:, 1:], V["nsec/w"])


def test_critics(root):
    found = critic_file.load(root.parent / "critics")
    assert found.card["kinds"] == ["reward", "safety"]
    action = jnp.tanh(V["noisy_action"])
    obs = jnp.asarray(OBS)
    got = values(found.params, found.card["kinds"], obs, action)
    close(got["reward"].q, V["lora/q_target"].min(0))
    close(got["safety"].q, V["lora/qc_target"].max(0))
    close(got["reward"].v, V["lora/v"])
    close(got["safety"].v, V["lora/vc"])


def candidates(policy, alpha, x_T, z):
    """Actions [B, N, A] from the recorded noise; alpha [B, K] or None."""
    net, params, config = network_of(policy.config), policy.params, policy.config
    library = None if alpha is None else members(config, params)

    def denoise(alpha):
        if library is None:
            return make_denoise(net, params.base)
        return DENOISERS[config.level](net, params.base, *library, alpha)

    def one(obs, alpha, x, z):
        return ddpm_reverse(denoise(alpha), config.process, obs, x, z)[0]

    alpha = jnp.zeros((len(OBS), 0)) if alpha is None else alpha
    each = jax.vmap(one, (None, None, 0, 1))
    return jax.jit(jax.vmap(each, (0, 0, None, None)))(OBS, alpha, x_T, z)


ACTIONS = {
    "pretrain/eval_actions_bc": ({}, None),
    "lora/eval_actions_lora_reward": ({"skills": "reward"}, 1),
    "lora/eval_actions_lora_cost": ({"skills": "safety"}, 1),
    "composition/eval_actions_composition": ({"gate": "gate-parameter"}, 2),
    "nsec/eval_actions_lora_score_com": ({"gate": "gate-noise"}, 2),
}


def chosen(root, found):
    """Of candidates [B, N, A] the safest, as their code chooses."""
    critics = critic_file.load(root.parent / "critics")
    twins = {"safety": jax.tree.map(lambda x: x[1], critics.params.q)}
    q = jax.vmap(lambda obs, actions: judge(twins, obs, actions)["safety"])(OBS, found)
    return jnp.take_along_axis(found, jnp.argmin(q, 1)[:, None, None], 1)[:, 0]


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("name", ACTIONS)
def test_actions(root, name, count):
    given, skills = ACTIONS[name]
    policy = compose(root, **given)
    alpha = None if skills is None else policy.alpha(OBS)
    noise = f"{name}/N{count}"
    got = candidates(policy, alpha, V[f"{noise}/x_T"], V[f"{noise}/z"])
    got = got[:, 0] if name.startswith("pretrain") else chosen(root, got)
    close(got, V[f"{noise}/actions"])


@pytest.mark.parametrize("count", [1, 64])
def test_mixed_actions(root, count):
    noise = f"asec/eval_actions_lora_action_com/N{count}"
    actions = [
        candidates(compose(root, skill), jnp.full((len(OBS), 1), 16.0), x_T, z)
        for skill, x_T, z in (
            ("reward", V[f"{noise}/x_T"], V[f"{noise}/z"]),
            ("safety", V[f"{noise}/x_T_second"], V[f"{noise}/z_second"]),
        )
    ]
    alpha = compose(root, gate="gate-action").alpha(OBS)[:, 1:]
    mixed = jnp.einsum("bk,kbna->bna", alpha, jnp.stack(actions))
    close(chosen(root, mixed), V[f"{noise}/actions"])


def test_the_imported_policies_act(root):
    critics = root.parent / "critics"
    policy = compose(root, gate="gate-parameter", candidates=4, critics=critics)
    assert policy.act(jax.random.key(0), OBS).shape == (8, 6)


def test_layers_are_named_as_in_the_reference_vectors(files):
    flat = read_tree(files / "lora.pickle")
    for model, layers, ours in (
        ("q_target_lora_model", released._SKILL, parity.SKILL_LAYERS),
        ("pretrain_weights/target_score_model", released._BASE, parity.BASE_LAYERS),
        ("target_critic", released._Q, parity.Q_LAYERS),
        ("value", released._V, parity.V_LAYERS),
    ):
        got = tree.flatten(released._translated("file", flat, model, layers))
        for theirs, name in ours.items():
            leaves = {p.rpartition("/")[2] for p in got if p.startswith(f"{name}/")}
            assert leaves, theirs


def run(*arguments):
    return call("launch.library", *arguments)


def test_the_command(files, tmp_path):
    given = (f"--library={tmp_path / 'new'}", "--name=a")
    answer = run("import", files / "nsec.pickle", *given)
    assert answer.code == 2 and "has no 'a-reward'; import their" in answer.err
    assert not (tmp_path / "new").exists()
    answer = run("import", files / "lora.pickle", *given)
    lines = ["added the base", "added skill a-reward", "added skill a-safety"]
    assert (answer.code, answer.out.splitlines()) == (0, lines)
    answer = run("import", files / "nsec.pickle", *given, "--level=action")
    assert answer.out.splitlines() == ["kept the base", "added gate a-gate-action"]
    answer = run("import", files / "lora.pickle", *given)
    assert answer.out == "kept the base\nkept skill a-reward\nkept skill a-safety\n"
    assert "released" in run("list", given[0]).out


def patched(files, tmp_path, kind, old, new):
    data = (files / f"{kind}.pickle").read_bytes()
    assert old in data and len(old) == len(new)
    (tmp_path / "model.pickle").write_bytes(data.replace(old, new))
    return tmp_path / "model.pickle"


BAD = {
    "no checkpoint": (
        "lora",
        b"pretrain_weights",
        b"pretrain_heights",
        "expected a chec",
    ),
    "another layer": ("pretrain", b"MLPResNet_0", b"MLPResNet_9", "which is not known"),
    "no skill": (
        "lora",
        b"q_target_lora_model",
        b"q_target_lara_model",
        "holds no q_t",
    ),
    "no strength": ("lora", b"alpha_r", b"alpha_s", "alpha_r is no number"),
    "no schedule": ("pretrain", b"betas", b"bytes", "betas of no known schedule"),
    "another name": ("lora", b"dtype", b"ctype", "asks for numpy.ctype"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused(files, tmp_path, case):
    kind, old, new, words = BAD[case]
    path = patched(files, tmp_path, kind, old, new)
    answer = run("import", path, f"--library={tmp_path / 'new'}")
    assert answer.code == 2 and words in answer.err and answer.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_replaced(files, root, tmp_path):
    library = tmp_path / "library"
    shutil.copytree(root, library)
    # Another base, and another skill over the same base.
    other = dict(read_tree(files / "pretrain.pickle"))
    kernel = other["target_score_model/params/MLPResNet_0/Dense_0/kernel"].tobytes()
    changed = bytearray((files / "lora.pickle").read_bytes())
    at = changed.find(kernel)
    changed[at : at + 4] = bytes(4)
    (tmp_path / "base.pickle").write_bytes(changed)
    skill = read_tree(files / "lora.pickle")
    first = skill["q_target_lora_model/params/LoRAResNet_0/LoRALayer_0/lora_a"]
    changed = (files / "lora.pickle").read_bytes()
    changed = changed.replace(first.tobytes(), bytes(first.nbytes))
    (tmp_path / "skill.pickle").write_bytes(changed)
    before = {p: p.read_bytes() for p in library.rglob("*.*") if p.is_file()}
    for name, words in (
        ("base", "has another base than"),
        ("skill", "has another skill 'reward'; --name gives other names"),
    ):
        with pytest.raises(InputError, match=words):
            released.add(tmp_path / f"{name}.pickle", library)
    assert before == {p: p.read_bytes() for p in library.rglob("*.*") if p.is_file()}


def test_critics_need_to_be_there_and_named(files, tmp_path):
    given = {"root": tmp_path / "new", "critics": tmp_path / "critics"}
    with pytest.raises(InputError, match="holds no critics"):
        released.add(files / "pretrain.pickle", **given)
    shutil.copy(files / "lora.pickle", tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        released.add(tmp_path / "lora.pickle", **given)
    for settings, words in (
        ("{}", "unknown critic_type"),
        ('{"rl_config": {"critic_type": "x"}}', "unknown critic_type .* 'x'; choose"),
        ("[]", "expected a JSON object"),
    ):
        (tmp_path / "config.json").write_text(settings)
        with pytest.raises(InputError, match=words):
            released.add(tmp_path / "lora.pickle", **given)
    (tmp_path / "critics").mkdir()
    (tmp_path / "critics" / critic_file.NAME).touch()
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(InputError, match="holds critics already"):
        released.add(tmp_path / "lora.pickle", **given)
    with pytest.raises(InputError, match=r"--name: got '\.\./x', expected letters"):
        released.add(tmp_path / "lora.pickle", tmp_path / "new", name="../x")
    with pytest.raises(InputError, match=r"--name: got 'x', but .* a base alone"):
        released.add(files / "pretrain.pickle", tmp_path / "new", name="x")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="holds no gate that mixes predictions"):
        released.add(files / "composition.pickle", tmp_path / "new", level="noise")
