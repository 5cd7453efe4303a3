"""The shell of the commands, as processes: what is printed, and the exit code."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

from psec_jax import cli
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig, init_gate
from psec_jax.library import SkillLibrary
from psec_jax.types import Normaliser

ROOT = Path(__file__).parents[1]

CONFIG = """
    import ml_collections

    from psec_jax.errors import lookup

    PRESETS = {"quick": 1, "paper": 1000}


    def get_config(preset="quick"):
        steps = lookup(PRESETS, preset, "preset")
        return ml_collections.ConfigDict({"steps": steps, "net": {"width": 2}})
"""

COMMAND = '''
    """Try the shell.

        python command.py --seed=3
    """

    import errno
    import os
    import signal

    from absl import flags, logging
    from psec_jax import cli

    from psec_jax.errors import InputError, Stopped, TrainingError

    CONFIG = cli.define_config("config.py:quick", "Config file and preset.")
    SEED = flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0)
    ALPHA = flags.DEFINE_list("alpha", None, "Weights.")

    FAULTS = {
        "input": lambda: InputError("demos.hdf5: no key\\n'rewards'"),
        "training": lambda: TrainingError("loss/base is not finite"),
        "disk": lambda: OSError(errno.ENOSPC, "No space left on device", "x.json"),
        "mounted": lambda: OSError(errno.EROFS, "Read-only file system", "x.json"),
        "bug": lambda: KeyError("a fault"),
        "stop": lambda: Stopped("stopped by SIGTERM at step 3", signal.SIGTERM),
        "interrupt": lambda: KeyboardInterrupt(),
    }


    def main(argv):
        logging.info("noise")
        if len(argv) > 1 and argv[1] in FAULTS:
            raise FAULTS[argv[1]]()
        cli.no_arguments(argv)
        config = CONFIG.value
        alpha = cli.floats("alpha", ALPHA.value)
        print(config.steps, config.net.width, SEED.value, alpha)


    if __name__ == "__main__":
        cli.run(main)
'''

# One process per command line, as absl parses once per process; forked, because the
# imports take longer than everything else.
DRIVER = """
    import os
    import runpy
    import sys
    import warnings

    import psec_jax.cli  # noqa: F401

    target, *lines = sys.argv[1:]
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    for number, line in enumerate(lines):
        with warnings.catch_warnings():
            # JAX warns of forks; nothing of it is running here.
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            for descriptor, suffix in {1: "out", 2: "err"}.items():
                with open(f"{number}.{suffix}", "w") as file:
                    os.dup2(file.fileno(), descriptor)
            sys.argv = [target, *line.split()]
            run(target, run_name="__main__")
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
"""

# Arguments: exit code, all of stdout (or None), all of stderr (or None).
CASES = {
    "": (0, "1 2 0 None\n", ""),
    "--config=config.py:paper --config.net.width=7": (0, "1000 7 0 None\n", ""),
    "--config.steps=5 --seed=3 --alpha=1,2.5": (0, "5 2 3 [1.0, 2.5]\n", ""),
    "--verbosity=0": (0, "1 2 0 None\n", None),
    "--seed=-1": (2, "", "error: flag --seed=-1: -1 is not a non-negative integer\n"),
    "--nope=1": (2, "", "error: Unknown command line flag 'nope'\n"),
    "--alpha=1,x": (2, "", "error: --alpha: could not convert string to float: 'x'\n"),
    "extra": (2, "", "error: unexpected argument 'extra'; every option is a --flag\n"),
    "--config.nope=1": (2, "", "error: unknown config field 'nope'\n"),
    "--config.net.nope=1": (2, "", "error: unknown config field 'nope'\n"),
    "--config.steps=many": (
        2,
        "",
        "error: flag --config.steps=many: invalid literal for int() with base 10: "
        "'many'\n",
    ),
    "--config=config.py:huge": (
        2,
        "",
        "error: unknown preset 'huge'; choose from paper, quick\n",
    ),
    "--config=gone.py --config.steps=1": (
        2,
        "",
        "error: --config=gone.py: there is no such config file\n",
    ),
    "input": (2, "", "error: demos.hdf5: no key 'rewards'\n"),
    "training": (1, "", "error: loss/base is not finite\n"),
    "disk": (2, "", "error: cannot write x.json: No space left on device\n"),
    "mounted": (2, "", "error: cannot write x.json: Read-only file system\n"),
    "bug": (1, "", None),
    "stop": (143, "", "stopped by SIGTERM at step 3\n"),
    "interrupt": (130, "", "interrupted\n"),
}


def run_all(folder, target, lines):
    """Exit code, stdout and stderr of the command for each line of arguments."""
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    driver = subprocess.run(
        [sys.executable, "driver.py", target, *lines],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr
    codes = driver.stdout.split()
    return [
        SimpleNamespace(
            returncode=int(code),
            stdout=(folder / f"{number}.out").read_text(),
            stderr=(folder / f"{number}.err").read_text(),
        )
        for number, code in zip(range(len(lines)), codes, strict=True)
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    (folder / "command.py").write_text(textwrap.dedent(COMMAND))
    lines = [*CASES, "--help"]
    return dict(zip(lines, run_all(folder, "command.py", lines), strict=True))


@pytest.mark.parametrize("line", CASES)
def test_answers(answers, line):
    code, stdout, stderr = CASES[line]
    answer = answers[line]
    assert answer.returncode == code, answer.stderr
    assert answer.stdout == stdout
    if stderr is not None:
        assert answer.stderr == stderr


def test_verbosity_brings_the_log_back(answers):
    assert "noise" in answers["--verbosity=0"].stderr


def test_faults_of_ours_keep_their_traceback(answers):
    assert "Traceback" in answers["bug"].stderr


@pytest.mark.parametrize("words", [("--help",), ("list", "--help")])
def test_a_reader_that_ends_is_no_fault(words):
    """As with `... | head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [sys.executable, "-m", "launch.library", *words],
        cwd=ROOT,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_help_teaches(answers):
    answer = answers["--help"]
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.startswith("Try the shell.\n\n    python command.py --seed=3")
    for words in ("--seed=...", "Of everything. (default: 0)", "config.py:quick"):
        assert words in answer.stdout
    assert "pdb" not in answer.stdout and "verbosity" not in answer.stdout


def test_library_commands(tmp_path):
    root = tmp_path / "library"
    library = SkillLibrary.create(root)
    normaliser = Normaliser(np.zeros(tiny.OBS_DIM), np.ones(tiny.OBS_DIM))
    sizes = {"obs_dim": tiny.OBS_DIM, "action_dim": tiny.ACTION_DIM}
    library.add_base(tiny.base(), normaliser, {"name": "stand", "network": {}, **sizes})
    card = {"alpha": 16.0, "env": "dm_control:walker-walk", "steps": 50}
    library.add_skill("walk", tiny.skill(0), card)
    library.set_returns("skill", "walk", {"mean": 901.25})
    form = GateConfig(head="linear", widths=(8,))
    gate = init_gate(form, jax.random.key(0), tiny.OBS_DIM, jax.numpy.ones(1))
    library.add_gate(
        "walk", gate, {"skills": ["walk"], "level": "noise", "gate": asdict(form)}
    )
    flag = f"--library={root}"
    listed, shown, whole, several, unknown, missing, bare = run_all(
        tmp_path,
        "launch.library",
        [
            f"list {flag}",
            f"{flag} show skill/walk",
            f"verify {flag}",
            f"remove walk {flag}",
            f"show fly {flag}",
            f"list --library={tmp_path}",
            flag,
        ],
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert rows[2][:5] == ["skill", "walk", "dm_control:walker-walk", "901.2", "50"]
    assert "linear gate over walk, noise level" in listed.stdout
    assert "alpha " in shown.stdout and "output/kernel" not in shown.stdout
    assert "output/a" in shown.stdout
    assert whole.returncode == 0 and "3 entries" in whole.stdout
    for answer, words in [
        (several, "write skill/walk or gate/walk"),
        (unknown, "has no 'fly'; it has base, walk, walk"),
        (missing, "is not a skill library"),
        (bare, "no sub-command; choose from analyse, export, import"),
    ]:
        assert answer.returncode == 2 and answer.stdout == ""
        assert answer.stderr.startswith("error: ") and words in answer.stderr
        assert answer.stderr.count("\n") == 1

    (root / "gates" / "walk" / "gate.safetensors").write_bytes(b"")
    (root / "skills" / "walk" / "skill.json").write_text("{")
    broken, listed, removed = run_all(
        tmp_path,
        "launch.library",
        [f"verify {flag}", f"list {flag}", f"remove gate/walk {flag}"],
    )
    assert broken.returncode == 2 and "2 problems found" in broken.stderr
    assert "skill.json" in broken.stdout and "gate.safetensors" in broken.stdout
    assert listed.returncode == 0 and "damaged: see verify" in listed.stdout
    assert removed.returncode == 0 and library.gates() == []


def test_flags_of_a_function():
    def collect(env: str, count: int, noise: float = 0.5, out: Path | None = None):
        """Collect.

        Args:
          env: not a flag here.
          count: whole
            episodes.
          noise: of actions.
          out: file.

        Returns:
          Nothing: no argument.
        """

    saved = flagsaver.save_flag_values()
    holders = cli.flags_of(collect, omit=["env"], count=3)
    texts = {name: flags.FLAGS[name].help for name in holders}
    try:
        cli.parse(["collect", "--noise=2", "--count=4"])
        assert cli.values_of(holders) == {"count": 4, "noise": 2.0, "out": None}
        with pytest.raises(InputError, match="--count=x"):
            cli.parse(["collect", "--count=x"])
    finally:
        flagsaver.restore_flag_values(saved)
    assert texts == {
        "count": "Whole\n    episodes.",
        "noise": "Of actions.",
        "out": "File.",
    }
