"""Skills in the format of Hugging Face's PEFT: a folder of two files.

    adapter_config.json            adapter_model.safetensors

PEFT adds (lora_alpha / r) B A x to a layer, with A [r, d] and B [o, r]; here it is
alpha x A B, with A [d, r] and B [r, o]. So lora_alpha = alpha r, and both matrices are
transposed. The base is not in these files: its fingerprint is in the metadata of the
arrays, where a file has one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.numpy

from psec_jax import tree
from psec_jax.errors import InputError
from psec_jax.files import (
    parse_json,
    read_bytes,
    read_json,
    reported,
    write_atomic,
    write_json,
)
from psec_jax.library import read_arrays
from psec_jax.lora import adapter_of, pad, rank_of
from psec_jax.types import Params

CONFIG = "adapter_config.json"
ARRAYS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAVES = {"lora_A.weight": "a", "lora_B.weight": "b"}
# Forms of an adapter that are more than alpha A B on every layer.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (None, "gaussian", False, True),  # others change the base
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
}


def export(folder: str | Path, params: Params, card: Mapping[str, Any]) -> None:
    """Write a LoRA skill as PEFT reads it.

    Args:
      folder: to be made, or without these two files.
      params: {layer: {"a", "b"}}; layers of smaller ranks are padded with zeros.
      card: the skill's; "alpha" and "base_fingerprint" are used.

    Raises:
      InputError: an MLP skill, files that are there already, or a full disk.
    """
    if adapter_of(params) != "lora":
        raise InputError("only lora skills have a form in PEFT, this is an mlp skill")
    folder = Path(folder)
    for name in (CONFIG, ARRAYS):
        if (folder / name).exists():
            raise InputError(f"{folder / name} is there already; choose another --out")
    rank = rank_of(params)
    flat = tree.flatten(pad(params, rank))
    names = {leaf: name for name, leaf in _LEAVES.items()}
    arrays = {}
    for path, value in flat.items():
        layer, _, leaf = path.rpartition("/")
        name = f"{_PREFIX}{layer.replace('/', '.')}.{names[leaf]}"
        arrays[name] = np.asarray(value, np.float32).T.copy()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": card["alpha"] * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(
            path.removesuffix("/a").replace("/", ".")
            for path in flat
            if path.endswith("/a")
        ),
    }
    metadata = {"format": "pt", "base_fingerprint": card["base_fingerprint"]}
    content = safetensors.numpy.save(arrays, metadata)
    with reported(f"make folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ARRAYS, content)
    write_json(folder / CONFIG, config)


def read(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """A skill of PEFT's two files, and what its card is to say.

    Raises:
      InputError: damaged files, another kind of adapter than LoRA, or one that adds
        more to a layer than alpha A B.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    for field, plain in _PLAIN.items():
        if config.get(field) not in plain:
            raise InputError(
                f"{folder / CONFIG}: {field} is {config.get(field)!r:.80}, expected "
                f"{plain[-1]!r}: a skill is alpha A B on every layer"
            )
    rank, scale = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(scale) not in (int, float):
        raise InputError(
            f"{folder / CONFIG}: r is {rank!r:.40} and lora_alpha {scale!r:.40}, "
            "expected a number of 1 or more and a number"
        )
    path = folder / ARRAYS
    content = read_bytes(path)
    flat = {}
    for name, value in read_arrays(path, content).items():
        layer, leaf = _layer(path, name)
        array = np.asarray(value, np.float32)
        if array.ndim != 2 or array.shape[0 if leaf == "a" else 1] != rank:
            raise InputError(
                f"{path}: {name} is {array.shape}, which is not of rank {rank}"
            )
        flat[f"{layer}/{leaf}"] = array.T.copy()
    card = {"alpha": float(cast(float, scale)) / rank, "imported": {"format": "PEFT"}}
    metadata = parse_json(_head(content), f"{path}: its head").get("__metadata__") or {}
    if "base_fingerprint" in metadata:
        card["base_fingerprint"] = metadata["base_fingerprint"]
    return tree.unflatten(flat), card


def _head(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _layer(path: Path, name: str) -> tuple[str, str]:
    """Layer and leaf of an array's name, "base_model.model.LAYER.lora_A.weight"."""
    for ending, leaf in _LEAVES.items():
        if name.startswith(_PREFIX) and name.endswith(f".{ending}"):
            inner = name.removeprefix(_PREFIX).removesuffix(f".{ending}")
            return inner.replace(".", "/"), leaf
    raise InputError(
        f"{path}: array {name!r:.80}, expected {_PREFIX}LAYER.lora_A.weight or lora_B"
    )
