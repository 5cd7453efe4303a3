"""Training states on disk: a thin layer over Orbax's CheckpointManager."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from psec_jax.errors import InputError

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


class Checkpoints:
    """The newest saves of a training state, one folder a step.

    A save is written in the background into a temporary folder that is renamed when
    complete, so that a stopped process leaves the older saves as they were.

    Args:
      folder: made if missing.
      keep: newest saves to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder
        try:
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    cleanup_tmp_directories=True,
                ),
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        except _FAILURES as error:
            raise InputError(f"cannot open {folder}: {_reason(error)}") from error
        self._last = self._manager.latest_step()
        self._writing: int | None = None

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
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
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

    def _failed(self, step: int, reason: str) -> InputError:
        for left in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        good = "none" if self._last is None else f"step {self._last}"
        return InputError(
            f"cannot save step {step} in {self._folder}: {reason}; "
            f"last good save: {good}"
        )


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
    if "No space left on device" in text:
        return "No space left on device"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text[:200] or type(error).__name__
