"""What pip installs: the pins fit the ranges, the wheel carries the assets."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import psec_jax

ROOT = Path(__file__).parents[1]
EXTRAS = ("safe", "metaworld", "ogbench", "mjx", "onnx")
ON_TOP = [f"requirements-{name}.txt" for name in EXTRAS]


def pins(file: str = "requirements.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines)
    }


@pytest.mark.parametrize("file", ["requirements.txt", *ON_TOP])
def test_pins_hold_versions_only(file):
    for name, version in pins(file).items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name


@pytest.mark.parametrize("file", ON_TOP)
def test_simulators_come_on_top(file):
    assert not pins().keys() & pins(file).keys()


def test_ci_installs_every_simulator_and_tests():
    script = (ROOT / ".ci/run").read_text()
    *_, setup, last = script.splitlines()
    assert setup.split() == ["make", *(f"setup-{name}" for name in EXTRAS)]
    assert last == "make test"


def test_mjx_is_of_mujocos_version():
    assert pins("requirements-mjx.txt")["mujoco-mjx"] == pins()["mujoco"]


def test_pins_fit_the_ranges():
    pinned = pins()
    wanted = [Requirement(line) for line in requires("psec_jax")]
    wanted = [
        requirement
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate({"extra": "all"})
    ]
    assert len(wanted) > 15
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(pinned[name]), str(requirement)


def test_typed_marker_and_assets_are_in_the_package():
    package = Path(psec_jax.__file__).parent
    assert (package / "py.typed").is_file()
    for task in ("stand", "walk", "run"):
        assert (package / "assets" / "experts" / f"walker_{task}.npz").is_file()


def test_extras_named_in_messages_exist():
    extras = metadata("psec_jax").get_all("Provides-Extra")
    extras = {canonicalize_name(extra) for extra in extras}
    for top in ("psec_jax", "experiments", "launch"):
        for file in (ROOT / top).rglob("*.py"):
            for named in re.findall(r"psec_jax\[([^\]]+)\]", file.read_text("utf-8")):
                for extra in named.split(","):
                    assert canonicalize_name(extra) in extras, (
                        f"{file} names the extra {extra!r}"
                    )


def test_a_copy_without_git_and_pip_has_a_version(tmp_path):
    (tmp_path / "psec_jax").mkdir()
    shutil.copy(psec_jax.__file__, tmp_path / "psec_jax")
    code = "import psec_jax; print(psec_jax.__version__)"
    # -S: without what pip has installed.
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout == "0.0\n", run.stderr
    assert re.match(r"\d+\.\d+", psec_jax.__version__)
