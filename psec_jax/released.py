"""Checkpoints of the paper authors' released code as entries of a library.

Four kinds of checkpoint are known by what they hold: a pretrained base; the skills of
rewards and of costs with their critics and the base; a gate at the parameter level with
all of that; a gate that mixes predictions, whose own skills were never trained. The
averaged weights of bases and skills are read, and the target networks of critics.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax import tree
from psec_jax.agents import critic_file
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import CriticParams
from psec_jax.cards import NAME
from psec_jax.errors import InputError, lookup
from psec_jax.files import make_room, read_bytes, read_json
from psec_jax.gating import GateConfig
from psec_jax.library import SkillLibrary, base_fingerprint
from psec_jax.lora import check_skill
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.networks.mlp import mlp_widths
from psec_jax.policy import check_base
from psec_jax.process import SCHEDULES, ProcessConfig
from psec_jax.types import Normaliser, Params
from psec_jax.unpickle import MAX_BYTES, read_tree

SKILLS = {"reward": "q_target_lora_model", "safety": "qc_target_lora_model"}
# What the safety critic is, by the authors' setting `critic_type`.
COSTS = {"hj": "safety", "qc": "cost"}
# Names of their layers -> ours; blocks and layers are numbered alike.
_BASE = {
    r"FourierFeatures_0": "fourier",
    r"MLP_0/Dense_(\d+)": r"time_\1",
    r"MLPResNet_0/Dense_0": "input",
    r"MLPResNet_0/Dense_1": "output",
    r"MLPResNet_0/MLPResNetBlock_(\d+)/LayerNorm_0": r"block_\1/norm",
    r"MLPResNet_0/MLPResNetBlock_(\d+)/Dense_0": r"block_\1/up",
    r"MLPResNet_0/MLPResNetBlock_(\d+)/Dense_1": r"block_\1/down",
}
_SKILL = {
    r"LoRA_MLP_0/LoRALayer_(\d+)": r"time_\1",
    r"LoRAResNet_0/LoRALayer_0": "input",
    r"LoRAResNet_0/LoRALayer_1": "output",
    r"LoRAResNet_0/LoRAResnetBlock_(\d+)/LoRALayer_0": r"block_\1/up",
    r"LoRAResNet_0/LoRAResnetBlock_(\d+)/LoRALayer_1": r"block_\1/down",
}
_GATE = {r"MLP_0/Dense_(\d+)": r"hidden_\1", r"OutputVDense": "output"}
_Q = {
    r"VmapStateActionValue_0/MLP_0/Dense_(\d+)": r"hidden_\1",
    r"VmapStateActionValue_0/Dense_0": "output",
}
_V = {
    r"MLP_0/LayerNorm_0": "norm",
    r"MLP_0/Dense_(\d+)": r"mlp/hidden_\1",
    r"OutputVDense": "mlp/output",
}
_LEAVES = {"lora_a": "a", "lora_b": "b"}


class Entry(NamedTuple):
    """Arrays of an entry, and what its card says."""

    params: Params
    card: dict[str, Any]


class Released(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      base: the base; its card has network and process.
      normaliser: of one that changes nothing, as the authors' code has none.
      skills: by the names of `SKILLS`; empty for a base alone, and where the gate is
        over skills of another checkpoint.
      gate: over both skills, or None.
      critics: of the skills' training, or None.
    """

    base: Entry
    normaliser: Normaliser
    skills: dict[str, Entry]
    gate: Entry | None
    critics: CriticParams | None


def read(path: str | Path) -> Released:
    """A checkpoint of the authors' code.

    Raises:
      InputError: a file that is refused, or that holds something else.
    """
    flat = read_tree(path)
    tops = {name.partition("/")[0] for name in flat}
    lora = _within(flat, "lora0") if "lora0" in tops else flat
    pretrain = flat if "score_model" in tops else _within(lora, "pretrain_weights")
    if not any(name.startswith("target_score_model/") for name in pretrain):
        raise InputError(
            f"{path}: holds {', '.join(sorted(tops))[:200]}, expected a checkpoint of "
            "pretraining, of skills or of a gate"
        )
    content = read_bytes(path, MAX_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    origin = {"imported": {"file": Path(path).name, "sha256": digest}}
    base, normaliser = _base(path, pretrain, origin)
    if pretrain is flat:
        return Released(base, normaliser, {}, None, None)
    # The network that is the gate's is called "value" too.
    outputs = np.shape(flat.get("value/params/OutputVDense/bias", ""))
    if lora is flat and outputs == (len(SKILLS),):
        gate = _gate(path, flat, "noise", origin)
        return Released(base, normaliser, {}, gate, None)
    skills = {
        name: _skill(path, lora, model, base, origin) for name, model in SKILLS.items()
    }
    gate = None if lora is flat else _gate(path, flat, "parameter", origin)
    return Released(base, normaliser, skills, gate, _critics(path, lora))


def add(
    path: str | Path,
    root: str | Path,
    *,
    name: str = "",
    level: str | None = None,
    critics: str | Path | None = None,
) -> list[str]:
    """Add what a checkpoint holds to a library, which is made where there is none.

    Args:
      path: the checkpoint; its config.json beside it says what the critics judge.
      root: the library's folder.
      name: put before the names of skills and gate: "walk" makes "walk-reward".
      level: of a gate that mixes predictions, "noise" (the default) or "action": the
        file does not say for which of them it was trained.
      critics: folder where the checkpoint's critics are to be written.

    Returns:
      One line for each thing that was added or was there already.

    Raises:
      InputError: a file that is refused; other entries under these names; another
        base; critics that the file lacks. Nothing is added then.
    """
    found = read(path)
    finished = None if critics is None else _finished(path, found)
    prefix = f"{name}-" if name else ""
    entries = {
        ("skill", prefix + skill): entry for skill, entry in found.skills.items()
    }
    gate = _at_level(path, found.gate, level, [prefix + skill for skill in SKILLS])
    if gate is not None:
        entries["gate", f"{prefix}gate-{gate.card['level']}"] = gate
    if name and not entries:
        raise InputError(f"--name: got {name!r}, but {path} holds a base alone")
    for _, entry_name in entries:
        if not NAME.fullmatch(entry_name):
            raise InputError(
                f"--name: got {name!r}, expected letters, digits, '.', '_' and '-', "
                "not starting with '.'"
            )
    if critics is not None and os.path.lexists(Path(critics) / critic_file.NAME):
        raise InputError(f"{critics} holds critics already; choose another folder")
    library = SkillLibrary(root)
    there = (library.root / "base" / "base.json").exists()
    mine = base_fingerprint(found.base.params, found.normaliser)
    if there and library.card("base", "base")["fingerprint"] != mine:
        raise InputError(
            f"{root}: has another base than {path}; choose another library"
        )
    kept = {key for key, entry in entries.items() if _holds(library, *key, entry)}
    if gate is not None:
        present = {*library.skills(), *(name for kind, name in entries)}
        if missing := [s for s in gate.card["skills"] if s not in present]:
            raise InputError(
                f"{path}: its gate weighs {' and '.join(gate.card['skills'])}, and "
                f"{root} has no {missing[0]!r}; import their checkpoint first"
            )
    library = SkillLibrary.create(root)
    if not there:
        library.add_base(found.base.params, found.normaliser, found.base.card)
    lines = [f"{'kept' if there else 'added'} the base"]
    for (kind, entry_name), entry in entries.items():
        if (kind, entry_name) not in kept:
            write = library.add_skill if kind == "skill" else library.add_gate
            write(entry_name, entry.params, entry.card)
        done = "kept" if (kind, entry_name) in kept else "added"
        lines.append(f"{done} {kind} {entry_name}")
    if critics is not None and finished is not None:
        make_room(Path(critics) / critic_file.NAME)
        critic_file.save(critics, finished.params, finished.normaliser, finished.card)
        kinds = " and ".join(finished.card["kinds"])
        lines.append(f"wrote critics of {kinds} to {critics}")
    return lines


def _at_level(
    path: str | Path, gate: Entry | None, level: str | None, skills: Sequence[str]
) -> Entry | None:
    """The gate over skills of these names, at another level where one is given."""
    if level is not None and (gate is None or gate.card["level"] == "parameter"):
        raise InputError(
            f"{path}: --level={level}, but it holds no gate that mixes predictions"
        )
    if gate is None:
        return None
    own = {"level": level or gate.card["level"], "skills": list(skills)}
    return Entry(gate.params, gate.card | own)


def _holds(library: SkillLibrary, kind: str, name: str, entry: Entry) -> bool:
    """Whether the library has this very entry.

    Raises:
      InputError: it has another one of that name.
    """
    names = library.skills() if kind == "skill" else library.gates()
    if name not in names:
        return False
    if library.card(kind, name)["fingerprint"] != tree.fingerprint(entry.params):
        raise InputError(
            f"{library.root} has another {kind} {name!r}; --name gives other names"
        )
    return True


def _within(flat: Mapping[str, Any], top: str) -> dict[str, Any]:
    """The leaves under a path, without it."""
    start = f"{top}/"
    return {p.removeprefix(start): x for p, x in flat.items() if p.startswith(start)}


def _translated(
    path: str | Path, flat: Mapping[str, Any], model: str, layers: Mapping[str, str]
) -> Params:
    """The parameters of one of their models under our names.

    Raises:
      InputError: a layer that the model does not have here, or no array.
    """
    ours = {}
    for name, leaf in _within(flat, f"{model}/params").items():
        theirs, _, last = name.rpartition("/")
        found = [
            re.sub(pattern, replacement, theirs)
            for pattern, replacement in layers.items()
            if re.fullmatch(pattern, theirs)
        ]
        if not found or not isinstance(leaf, np.ndarray) or leaf.dtype.kind != "f":
            raise InputError(f"{path}: {model} holds {name}, which is not known")
        ours[f"{found[0]}/{_LEAVES.get(last, last)}"] = leaf.astype(np.float32)
    if not ours:
        raise InputError(f"{path}: holds no {model}")
    return tree.unflatten(ours)


def _number(path: str | Path, flat: Mapping[str, Any], name: str) -> float:
    """A number of a checkpoint, which some versions keep as an array."""
    value = np.asarray(flat.get(name, ""))
    if value.shape != () or value.dtype.kind not in "iuf" or not np.isfinite(value):
        raise InputError(f"{path}: {name} is no number")
    return float(value)


def _base(
    path: str | Path, flat: Mapping[str, Any], origin: Mapping[str, Any]
) -> tuple[Entry, Normaliser]:
    params = _translated(path, flat, "target_score_model", _BASE)
    leaves = tree.flatten(params)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    for layer in ("fourier", "time_0", "input", "block_0/up", "output"):
        if len(shapes.get(f"{layer}/kernel", ())) != 2:
            raise InputError(f"{path}: the base has no matrix {layer}/kernel")
    (inputs, width), actions = shapes["input/kernel"], shapes["output/kernel"][1]
    network = NetworkConfig(
        width=width,
        blocks=sum(name.endswith("/up/kernel") for name in shapes),
        expansion=max(shapes["block_0/up/kernel"][1] // max(width, 1), 1),
        time_features=2 * shapes["fourier/kernel"][0],
        time_width=shapes["time_0/kernel"][1],
        compat="released",
    )
    observations = inputs - actions - network.time_width
    if observations < 1 or actions < 1:
        raise InputError(f"{path}: the base reads {inputs} numbers, expected more")
    schedule, steps = _schedule(path, flat.get("betas"))
    process = ProcessConfig(
        steps=steps,
        schedule=schedule,
        temperature=_number(path, flat, "ddpm_temperature"),
    )
    card = {
        "name": "released",
        "obs_dim": observations,
        "action_dim": actions,
        "network": dataclasses.asdict(network),
        "process": dataclasses.asdict(process),
        "steps": int(_number(path, flat, "score_model/step")),
        **origin,
    }
    check_base(str(path), network, process, params, card)
    normaliser = Normaliser(
        np.zeros(observations, np.float32), np.ones(observations, np.float32)
    )
    return Entry(params, card), normaliser


def _schedule(path: str | Path, betas: Any) -> tuple[str, int]:
    """Name and steps of the schedule that a checkpoint's betas are."""
    if isinstance(betas, np.ndarray) and betas.ndim == 1 and 0 < len(betas) <= 10_000:
        for name, make in SCHEDULES.items():
            if np.allclose(make(len(betas)), betas, rtol=1e-4, atol=1e-6):
                return name, len(betas)
    raise InputError(f"{path}: betas of no known schedule ({', '.join(SCHEDULES)})")


def _skill(
    path: str | Path,
    flat: Mapping[str, Any],
    model: str,
    base: Entry,
    origin: Mapping[str, Any],
) -> Entry:
    params = _translated(path, flat, model, _SKILL)
    check_skill(base.params, params, f"{path}: {model}")
    card = {
        "alpha": _number(path, flat, "alpha_r"),
        "steps": int(_number(path, flat, f"{model.replace('_target', '')}/step")),
        **origin,
    }
    return Entry(params, card)


def _gate(
    path: str | Path,
    flat: Mapping[str, Any],
    level: str,
    origin: Mapping[str, Any],
) -> Entry:
    """A linear gate; at the noise level with a weight of zero for the base."""
    head = _translated(path, flat, "value", _GATE)
    leaves = tree.flatten(head)
    if level != "parameter":
        # Their weights are of the skills alone, ours have the base's in front.
        for name in ("output/kernel", "output/bias"):
            widths = [(0, 0)] * (np.ndim(leaves[name]) - 1)
            leaves[name] = np.pad(leaves[name], [*widths, (1, 0)])
    form = GateConfig(
        widths=mlp_widths({f"head/{p}": x.shape for p, x in leaves.items()}, "head"),
        base_member=level != "parameter",
    )
    card = {
        "level": level,
        "gate": dataclasses.asdict(form),
        "steps": int(_number(path, flat, "value/step")),
        **origin,
    }
    return Entry({"head": tree.unflatten(leaves)}, card)


def _critics(path: str | Path, flat: Mapping[str, Any]) -> CriticParams:
    """Target networks of both Q, and both V, stacked."""
    q = [
        _translated(path, flat, name, _Q)
        for name in ("target_critic", "safe_target_critic")
    ]
    v = [_translated(path, flat, name, _V) for name in ("value", "safe_value")]
    for pair, what in ((q, "Q"), (v, "V")):
        if tree.shapes(pair[0]) != tree.shapes(pair[1]):
            raise InputError(f"{path}: {what} of reward and of cost differ in shape")
    return CriticParams(*(_stacked(pair) for pair in (q, v)))


def _stacked(pair: Sequence[Params]) -> Params:
    flat = [tree.flatten(one) for one in pair]
    return tree.unflatten({p: np.stack([one[p] for one in flat]) for p in flat[0]})


def _finished(path: str | Path, found: Released) -> Finished:
    """The critics with a card, as a run that has trained them writes it."""
    if found.critics is None:
        raise InputError(f"{path}: holds no critics; the skills' checkpoint does")
    settings = Path(path).with_name("config.json")
    config = read_json(settings).get("rl_config")
    kind = config.get("critic_type") if isinstance(config, dict) else None
    cost = lookup(COSTS, str(kind), f"critic_type in {settings}")
    reward = next(iter(found.skills.values()))
    card = {
        "kinds": ["reward", cost],
        "obs_dim": found.base.card["obs_dim"],
        "action_dim": found.base.card["action_dim"],
        "steps": reward.card["steps"],
        "data": {},
        "summary": {},
        "imported": reward.card["imported"],
    }
    return Finished(found.critics, found.normaliser, card)
