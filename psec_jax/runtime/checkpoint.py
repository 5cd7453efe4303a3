"""Training states on disk: a thin layer over Orbax's CheckpointManager."""

import asyncio
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from psec_jax.errors import InputError
from psec_jax.files import read_json, reported, write_json

_SUMS = "sha256.json"
_MARGIN = 2**20  # bytes of a save that are not arrays, and more
# What Orbax and TensorStore raise for unreadable or unwritable files: TensorStore knows
# only ValueError ("RESOURCE_EXHAUSTED: ... No space left on device").
_FAILURES = (OSError, ValueError, KeyError, asyncio.CancelledError)


class _Quiet(logging.Filter):
    """Drops what Orbax logs: its threads print tracebacks of errors we raise anyway.

    Logging at level DEBUG brings it back.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep the record."""
        debugging = logging.getLogger("absl").isEnabledFor(logging.DEBUG)
        return debugging or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


class _Summed(ocp.StandardCheckpointHandler):
    """Writes checksums: Orbax restores an array with flipped bits without a word."""

    def finalize(self, directory: Any) -> None:
        """Called when all files are written, before the save gets its name."""
        super().finalize(directory)
        write_json(Path(directory) / _SUMS, _sums(Path(directory)))


class Checkpoints:
    """The newest saves of a training state, one folder a step.

    A save is written in the background into a temporary folder that is renamed when
    complete, so that a stopped process leaves the older saves as they were. It holds
    the SHA-256 of its files. A save whose files do not match is set aside when the
    folder is opened, with a line on stderr; the one before it then is the newest.

    Args:
      folder: made if missing.
      keep: newest saves to keep.

    Raises:
      InputError: the folder cannot be used, or there are saves and none is whole.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder
        if jax.process_index() == 0:
            _set_damaged_aside(folder)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            handlers.add("default", args, _Summed())
        try:
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    cleanup_tmp_directories=True,
                ),
                handler_registry=handlers,
            )
        except _FAILURES as error:
            raise InputError(f"cannot open {folder}: {_reason(error)}") from error
        self._last = self._manager.latest_step()
        self._writing: int | None = None
        self._failed_step: int | None = None

    @property
    def last(self) -> int | None:
        """Step of the newest complete save."""
        return self._last

    def save(self, step: int, state: Any) -> None:
        """Start writing `state`; the arrays must stay alive until it is written.

        Raises:
          InputError: this save or the one before it failed, as on a full disk.
        """
        self.wait()
        # Foreseen where it can be: background writers that run out of space print.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _MARGIN
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise self._failed(
                step,
                f"No space left on device ({needed:,} bytes needed, {free:,} free)",
            )
        self._writing = step
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except _FAILURES as error:
            self._writing = None
            raise self._failed(step, _reason(error)) from error

    def wait(self) -> None:
        """Block until the save in progress is complete.

        Raises:
          InputError: it failed; the message names the last good save.
        """
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except _FAILURES as error:
            step, self._writing = self._writing, None
            raise self._failed(step, _reason(error)) from error
        self._last, self._writing = self._writing, None

    def restore(self, like: Any) -> Any:
        """The newest save, with the structure, shapes and placement of `like`.

        Raises:
          InputError: it is damaged or holds another state.
        """
        folder = self._folder / str(self._last)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Checked first: Orbax would cast another dtype without a word.
        wanted = _layout(like)
        try:
            assert self._last is not None
            stored = _layout(self._manager.item_metadata(self._last).tree)
            if stored == wanted:
                return self._manager.restore(
                    self._last, args=ocp.args.StandardRestore(abstract)
                )
        # Orbax raises a plain Exception for arrays that it cannot read.
        except Exception as error:
            raise InputError(
                f"cannot read the save {folder}: {_reason(error)}; remove that folder "
                "to go on from an older save"
            ) from error
        name = min(n for n, _ in stored.items() ^ wanted.items())
        raise InputError(
            f"the save {folder} holds another state: {name} is "
            f"{stored.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        )

    def close(self) -> None:
        """Release the background threads; `wait` first to learn of a failed save."""
        self._manager.close()
        if self._failed_step is not None:
            _remove_unfinished(self._folder, self._failed_step)

    def _failed(self, step: int, reason: str) -> InputError:
        # Now, as a disk may be full, and again when Orbax's threads have ended.
        self._failed_step = step
        _remove_unfinished(self._folder, step)
        good = "none" if self._last is None else f"step {self._last}"
        return InputError(
            f"cannot save step {step} in {self._folder}: {reason}; "
            f"last good save: {good}"
        )


def _remove_unfinished(folder: Path, step: int) -> None:
    """Remove what a failed save left; TensorStore may still write for a moment."""
    for _ in range(20):
        left = list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))
        if not left:
            return
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


def _set_damaged_aside(folder: Path) -> None:
    """Rename saves newer than the newest whole one: 40 becomes 40.damaged."""
    saves = [path for path in folder.glob("*") if path.name.isdecimal()]
    damaged = {}
    for save in sorted(saves, key=lambda path: int(path.name), reverse=True):
        with reported(f"read the save {save}"):
            problem = _problem(save)
        if problem is None:
            break
        damaged[save] = problem
    else:
        if damaged:
            told = "; ".join(f"step {s.name}: {why}" for s, why in damaged.items())
            raise InputError(
                f"no save in {folder} is whole ({told}); remove that folder to start "
                "from the first step"
            )
    for path, problem in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        with reported(f"rename {path}"):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        print(
            f"the save {path} is damaged: {problem}; renamed to {aside.name}, going on "
            f"from step {save.name}",
            file=sys.stderr,
        )


def _problem(save: Path) -> str | None:
    """What is wrong with a save; None if nothing is."""
    items = save / "default"
    if not (items / _SUMS).exists():
        if (items / "_METADATA").exists():
            print(f"the save {save} has no checksums; taken as it is", file=sys.stderr)
            return None
        return f"{_SUMS} is missing"
    try:
        expected = read_json(items / _SUMS)
    except InputError:
        return f"{_SUMS} cannot be read"
    found = _sums(items)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if not wrong:
        return None
    return f"{wrong[0]} {'does not match' if wrong[0] in found else 'is missing'}"


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[str(path.relative_to(folder))] = digest
    return sums


def _layout(state: Any) -> dict[str, str]:
    """Dotted name -> "float32 [4, 4]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{jnp.dtype(leaf.dtype).name} {list(leaf.shape)}"
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text[:200] or type(error).__name__
