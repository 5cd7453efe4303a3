"""A script: a skill is added or replaced, killed at every file operation; the library
must then be whole, with the old or the new, and hold nothing else. Prints the kills.

    python tests/killed_library.py FOLDER

A script, because processes are forked here, which a process with JAX in use must not.
"""

import functools
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import tiny

from psec_jax.library import SkillLibrary
from psec_jax.types import Normaliser

OPERATIONS = ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir")
CARD = {"name": "b", "obs_dim": 3, "action_dim": 2, "network": {}, "process": {}}


def killed_add(root: Path, name: str, skill: dict, at: int, after: bool) -> bool:
    """Add in a child that dies at its operation number `at`; whether it died."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(operation, *arguments, **options):
            nonlocal count
            count += 1
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*arguments, **options)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        for operation in OPERATIONS:
            patched = functools.partial(counted, getattr(os, operation))
            setattr(os, operation, patched)
        try:
            SkillLibrary.open(root).add_skill(name, skill, {"alpha": 1}, overwrite=True)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(folder: Path) -> int:
    """Every operation, before and after it, of adding and of replacing."""
    base, old, new = jax.tree.map(
        np.asarray, (tiny.base(), tiny.skill(0), tiny.skill(1))
    )
    whole = SkillLibrary.create(folder / "whole")
    whole.add_base(base, Normaliser(np.zeros(3), np.ones(3)), CARD)
    whole.add_skill("old", old, {"alpha": 1})
    kills = 0
    for name in ("new", "old"):
        for after in (False, True):
            at, died = 0, True
            while died:
                at += 1
                root = folder / f"{name}-{after}-{at}"
                shutil.copytree(whole.root, root)
                died = killed_add(root, name, new, at, after)
                kills += died
                library = SkillLibrary.open(root)
                assert library.verify() == [], root
                assert library.skills() in (["old"], ["new", "old"]), root
                left = [path.name for path in root.rglob(".*")]
                assert left == [".lock"], (root, left)
            left, _ = library.load_skill(name)  # of the one that did not die
            jax.tree.map(np.testing.assert_array_equal, left, new)
    return kills


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
