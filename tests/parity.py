"""Reads tests/parity.npz, vectors computed with the paper authors' released code."""

from functools import cache
from pathlib import Path

import numpy as np

from psec_jax import tree
from psec_jax.networks.denoiser import NetworkConfig

BASE_LAYERS = {
    "FourierFeatures_0": "fourier",
    "MLP_0/Dense_0": "time_0",
    "MLP_0/Dense_1": "time_1",
    "MLPResNet_0/Dense_0": "input",
    "MLPResNet_0/MLPResNetBlock_0/LayerNorm_0": "block_0/norm",
    "MLPResNet_0/MLPResNetBlock_0/Dense_0": "block_0/up",
    "MLPResNet_0/MLPResNetBlock_0/Dense_1": "block_0/down",
    "MLPResNet_0/MLPResNetBlock_1/LayerNorm_0": "block_1/norm",
    "MLPResNet_0/MLPResNetBlock_1/Dense_0": "block_1/up",
    "MLPResNet_0/MLPResNetBlock_1/Dense_1": "block_1/down",
    "MLPResNet_0/Dense_1": "output",
}
SKILL_LAYERS = {
    "LoRA_MLP_0/LoRALayer_0": "time_0",
    "LoRA_MLP_0/LoRALayer_1": "time_1",
    "LoRAResNet_0/LoRALayer_0": "input",
    "LoRAResNet_0/LoRAResnetBlock_0/LoRALayer_0": "block_0/up",
    "LoRAResNet_0/LoRAResnetBlock_0/LoRALayer_1": "block_0/down",
    "LoRAResNet_0/LoRAResnetBlock_1/LoRALayer_0": "block_1/up",
    "LoRAResNet_0/LoRAResnetBlock_1/LoRALayer_1": "block_1/down",
    "LoRAResNet_0/LoRALayer_1": "output",
}
GATE_LAYERS = {
    "MLP_0/Dense_0": "hidden_0",
    "MLP_0/Dense_1": "hidden_1",
    "OutputVDense": "output",
}
Q_LAYERS = {
    "VmapStateActionValue_0/MLP_0/Dense_0": "hidden_0",
    "VmapStateActionValue_0/MLP_0/Dense_1": "hidden_1",
    "VmapStateActionValue_0/Dense_0": "output",
}
V_LAYERS = {
    "MLP_0/LayerNorm_0": "norm",
    "MLP_0/Dense_0": "mlp/hidden_0",
    "MLP_0/Dense_1": "mlp/hidden_1",
    "OutputVDense": "mlp/output",
}
SKILL_LEAVES = {"lora_a": "a", "lora_b": "b"}


@cache
def load() -> dict[str, np.ndarray]:
    """All vectors by name."""
    with np.load(Path(__file__).parent / "parity.npz") as file:
        return {name: file[name] for name in file.files}


def params(prefix: str, layers: dict[str, str]) -> dict:
    """The tree stored under `prefix`, with this project's layer names."""
    flat = {}
    for name, value in load().items():
        if name.startswith(f"{prefix}/"):
            layer, _, leaf = name.removeprefix(f"{prefix}/").rpartition("/")
            flat[f"{layers[layer]}/{SKILL_LEAVES.get(leaf, leaf)}"] = value
    return tree.unflatten(flat)


def base(prefix: str = "pretrain") -> dict:
    return params(prefix, BASE_LAYERS)


def skill(prefix: str) -> dict:
    return params(prefix, SKILL_LAYERS)


def gate(prefix: str) -> dict:
    return params(prefix, GATE_LAYERS)


def q(*prefixes: str) -> dict:
    """Twins stacked over critics: leaves [C, 2, ...]."""
    return tree.stack([params(prefix, Q_LAYERS) for prefix in prefixes])


def v(*prefixes: str) -> dict:
    """Stacked over critics: leaves [C, ...]."""
    return tree.stack([params(prefix, V_LAYERS) for prefix in prefixes])


def network(compat: str) -> NetworkConfig:
    """The vectors' sizes: hidden 32, two blocks, no dropout."""
    return NetworkConfig(width=32, blocks=2, compat=compat)
