"""A room imports only its own and lower rooms; the core is free of simulators."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first, as in docs/architecture.md. A package stands for all its modules.
ROOMS = [
    [
        "psec_jax",
        "psec_jax.errors",
        "psec_jax.types",
        "psec_jax.tree",
        "psec_jax.files",
        "psec_jax.unpickle",
    ],
    ["psec_jax.data"],
    [
        "psec_jax.lora",
        "psec_jax.networks",
        "psec_jax.choice",
        "psec_jax.gating",
        "psec_jax.support",
        "psec_jax.cards",
        "psec_jax.library",
    ],
    ["psec_jax.process", "psec_jax.composition"],
    ["psec_jax.losses", "psec_jax.runtime"],
    [
        "psec_jax.agents",
        "psec_jax.policy",
        "psec_jax.probe",
        "psec_jax.peft",
        "psec_jax.exporting",
        "psec_jax.serving",
        "psec_jax.sharing",
        "psec_jax.analysis",
        "psec_jax.pruning",
        "psec_jax.merging",
        "psec_jax.released",
    ],
    ["psec_jax.envs", "psec_jax.evaluation"],
    ["psec_jax.workflows"],
    ["psec_jax.cli"],
    ["experiments", "launch"],
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
CORE = [name for room in ROOMS[:6] for name in room]
SIMULATORS = [
    "mujoco",
    "dm_control",
    "gymnasium",
    "bullet_safety_gym",
    "pybullet",
    "metadrive",
    "metaworld",
    "ogbench",
    "panda3d",
]
RIM = ["absl", "ml_collections"]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(file): file
    for top in ("psec_jax", "experiments", "launch")
    for file in sorted((ROOT / top).rglob("*.py"))
}


def level_of(module: str) -> int | None:
    """The level of the room that holds `module`, or None."""
    if module == "psec_jax":
        return LEVEL[module]
    while module and module != "psec_jax":
        if module in LEVEL:
            return LEVEL[module]
        module = module.rpartition(".")[0]
    return None


def imports_of(source: str) -> set[str]:
    """Every module that the source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from psec_jax import tree` imports a module, not a name of psec_jax.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
    return found


def core_modules() -> list[str]:
    return [name for name in MODULES if level_of(name) in range(6)]


def python(code: str) -> str:
    """Standard output of a fresh interpreter in the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level names in sys.modules after a fresh interpreter imported `modules`."""
    names = python(f"import sys, {', '.join(modules)}; print(*sys.modules)").split()
    return {name.partition(".")[0] for name in names}


def test_imports_of_sees_every_form():
    source = "import a.b\nfrom psec_jax import lora, __version__\ndef f(): import c"
    assert imports_of(source) == {"a.b", "psec_jax.lora", "c"}


def test_every_module_is_in_a_room():
    homeless = [name for name in MODULES if level_of(name) is None]
    assert not homeless, "add them to ROOMS"


@pytest.mark.parametrize("module", [m for m in MODULES if level_of(m) is not None])
def test_imports_point_down(module):
    for other in imports_of(MODULES[module].read_text(encoding="utf-8")):
        level = level_of(other)
        assert level is None or level <= level_of(module), (
            f"{module} imports {other}, which sits above it"
        )


@pytest.mark.parametrize("module", MODULES)
def test_rim_libraries_stay_out_of_the_package(module):
    tops = {
        name.partition(".")[0]
        for name in imports_of(MODULES[module].read_text(encoding="utf-8"))
    }
    if module.startswith("psec_jax") and module != "psec_jax.cli":
        assert not tops & set(RIM)
    if module in core_modules():
        # Minari describes spaces and environments in Gymnasium's classes.
        of_spaces = ("psec_jax.data.minari", "psec_jax.data.spaces")
        needed = {"gymnasium"} if module in of_spaces else set()
        assert tops & set(SIMULATORS) == needed
    assert not tops & {"pickle", "cloudpickle", "dill"}


def test_h5py_is_used_by_one_module():
    users = [
        name
        for name, file in MODULES.items()
        if "h5py" in imports_of(file.read_text(encoding="utf-8"))
        and name.startswith("psec_jax")
    ]
    # One reads what anybody wrote, the other one writes.
    assert users == ["psec_jax.data.d4rl", "psec_jax.data.hdf5"]


def test_one_module_knows_pickles():
    users = [
        name
        for name, file in MODULES.items()
        if "pickletools" in imports_of(file.read_text(encoding="utf-8"))
    ]
    # It takes a pickle's instructions from there, and runs none of them.
    assert users == ["psec_jax.unpickle"]


def test_core_loads_no_simulator():
    # absl itself comes with optax and flax; the package's own imports of it are
    # looked at above.
    assert not loaded_by(core_modules()) & {*SIMULATORS, "ml_collections"}


def test_package_loads_neither_jax_nor_simulator():
    assert not loaded_by(["psec_jax"]) & {*SIMULATORS, "jax", "flax"}


def test_environments_load_no_jax():
    modules = [name for name in MODULES if name.startswith("psec_jax.envs")]
    modules.remove("psec_jax.envs.mjx")  # the simulator is written in it
    assert modules
    assert not loaded_by(modules) & {"jax", "flax"}
