"""Commands as a shell would run them, in this process: no start-up for each one."""

import contextlib
import io
import runpy
import sys
import warnings
from typing import NamedTuple
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver

# Once a process, and so not among the flags that a command brings and takes away.
app.define_help_flags()


class Answer(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def call(module: str, *arguments: object) -> Answer:
    """`python -m MODULE ARGUMENTS`; an exception that would be a traceback passes."""
    out, err = io.StringIO(), io.StringIO()
    saved, code = flagsaver.save_flag_values(), 0
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        stack.callback(flagsaver.restore_flag_values, saved)
        stack.enter_context(
            mock.patch.object(sys, "argv", [module, *map(str, arguments)])
        )
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        # Of runpy, where a module was imported before it runs as a command.
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        # Of ml_collections, where it reads a config file.
        warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    return Answer(code, out.getvalue(), err.getvalue())


def _forget() -> None:
    """The flags a command defines come with its modules: both begin anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        del sys.modules[name]
    assert "workdir" not in flags.FLAGS
