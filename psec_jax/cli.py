"""What every command shares: help that teaches, errors in one line, exit codes."""

import errno
import inspect
import math
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from absl import app, flags, logging
from ml_collections import config_flags

from psec_jax.envs import FORMS
from psec_jax.envs.shifts import QUANTITIES
from psec_jax.errors import InputError, Stopped, TrainingError

_PROJECT = ("launch", "experiments", "psec_jax")
_HELP = ("--help", "-help", "-h", "-?", "--helpshort")
_QUOTES = "\"'"
_CONFIG_DEFAULTS: dict[str, str] = {}
# The checkout's root: default config files are there, whatever the current directory.
_ROOT = Path(__file__).resolve().parents[1]
# Names of the first edition, as the beginnings of options.
_RENAMED = {
    "--config.diffusion.": "--config.process.",
    "--config.critics.safety=False": "--config.critics.kinds=('reward',)",
    "--config.critics.safety=True": "--config.critics.kinds=('reward','safety')",
}
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(
    main: Callable[[list[str]], None],
    parser: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Parse the flags, by `parse` or another parser, call `main(argv)` with what is
    left, and exit.

    Exit codes: 0 done; 1 numbers that are not finite, in training or of a policy; 2
    input that cannot be used. Both are told in one line on stderr that starts with
    "error: ". 128 + the signal's number when stopped, SIGPIPE's where the reader of the
    output has ended. Any other exception is a fault of this project and keeps its
    traceback. One of several processes that ends with an error alone does not wait for
    the others.
    """
    try:
        _run(main, parser)
    except BaseException as end:
        code = end.code if isinstance(end, SystemExit) else 1
        # A module that was never imported has connected no processes.
        joined = sys.modules.get("psec_jax.runtime.processes")
        if code and joined and not joined.all_leave():
            # JAX would wait for the others at the end of Python, and they wait for us.
            if not isinstance(end, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        raise


def _run(
    main: Callable[[list[str]], None],
    parser: Callable[[list[str]], list[str]] | None,
) -> None:
    try:
        try:
            app.run(_quiet(main), flags_parser=parser or parse)
        finally:
            sys.stdout.flush()  # here, and not when Python ends
    except InputError as error:
        _fail(str(error), 2)
    except (TrainingError, FloatingPointError) as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        # What read our output, such as `head`, has ended; other pipes are seen to where
        # they are used. Python would try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}", 2)
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signum)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def no_arguments(argv: Sequence[str]) -> None:
    """Refuse the rest of the command line after the flags."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; every option is a --flag")


def floats(name: str, texts: Sequence[str] | None) -> list[float] | None:
    """Finite numbers of a list flag; None where the flag was not given."""
    if texts is None:
        return None
    try:
        numbers = [float(text) for text in texts]
    except ValueError as error:
        raise InputError(f"--{name}: {error}") from error
    for number in numbers:
        if not math.isfinite(number):
            raise InputError(f"--{name}: got {number}, expected finite numbers")
    return numbers


class Seed(NamedTuple):
    """One of several runs of a command, which are one program.

    Attributes:
      name: "seed S", or "" where --seeds was not given.
      seed: S, or None.
      folder: its directory in each of the directories given, or "".
    """

    name: str = ""
    seed: int | None = None
    folder: str = ""

    def within(self, folder: str) -> Path:
        """Its own directory in one given by flag."""
        return Path(folder, self.folder)

    def within_any(self, folder: str | None) -> Path | None:
        """The same of an optional flag; None where it was not given."""
        return None if folder is None else self.within(folder)


def define_seeds() -> flags.FlagHolder:
    """The flag of several seeds, for `seeds_of`."""
    return flags.DEFINE_list(
        "seeds",
        None,
        "Several training seeds, such as 0,1,2, as one program: seed S has the "
        "directory seedS in --workdir, --library and --critics.",
    )


def seeds_of(texts: Sequence[str] | None) -> list[Seed]:
    """The runs that --seeds stands for; one without a name where it was not given.

    Raises:
      InputError: see `seeds`.
    """
    if texts is None:
        return [Seed()]
    return [Seed(f"seed {seed}", seed, f"seed{seed}") for seed in seeds(texts)]


def seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """The seeds of a list flag.

    Raises:
      InputError: none, one that is there twice, or something else than a number from 0
        to 2**32 - 1.
    """
    if not texts:
        raise InputError("--seeds: got none, expected one or more")
    for i, text in enumerate(texts):
        if not (text.isascii() and text.isdecimal() and int(text) < 2**32):
            raise InputError(
                f"--seeds: got {text!r}, expected numbers from 0 to {2**32 - 1}"
            )
        if int(text) in map(int, texts[:i]):
            raise InputError(f"--seeds: {int(text)} is there twice")
    return tuple(map(int, texts))


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _quiet(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def called(argv: list[str]) -> None:
        if not any(a.lstrip("-").startswith(("v=", "verbosity")) for a in sys.argv[1:]):
            logging.set_verbosity(logging.WARNING)
        if "jax" in sys.modules:  # a command without it compiles nothing
            from psec_jax.runtime import platform

            platform.keep_programs()
            platform.keep_memory()
        main(argv)

    return called


def define_config(
    default: str, help_text: str, name: str = "config"
) -> flags.FlagHolder:
    """Like ml_collections' DEFINE_config_file, with locked fields.

    Given a default directly, ml_collections would read the file, and trip over a wrong
    field, while the module with the flag is imported: before `run` can report it.
    """
    _CONFIG_DEFAULTS[name] = default
    return config_flags.DEFINE_config_file(name, None, help_text, lock_config=True)


def define_env(required: bool = True) -> flags.FlagHolder:
    """The flag of an environment, for `psec_jax.envs.make`."""
    return flags.DEFINE_string("env", None, ENV_HELP, required=required)


ENV_HELP = f"Simulator: {FORMS}."


def define_shift() -> flags.FlagHolder:
    """The flag of a change of the simulator, for `psec_jax.envs.shifted`."""
    return flags.DEFINE_multi_string(
        "shift",
        [],
        "Change the simulator of --env: QUANTITY:FACTOR, such as friction:0.25, "
        "several separated by commas. Multiplies the numbers that the MuJoCo model has "
        f"for one of {', '.join(QUANTITIES)}",  # absl adds that it may be repeated
    )


def flags_of(
    function: Callable[..., Any],
    given: Mapping[str, flags.FlagHolder] | None = None,
    omit: Sequence[str] = (),
    **defaults: Any,
) -> dict[str, flags.FlagHolder]:
    """A flag for each argument of a function, with its type, default and help.

    Args:
      function: arguments are int, float, bool, str or Path, or None; what the docstring
        says of one is the help of its flag.
      given: flags that are defined already, of arguments or beside them.
      omit: arguments without a flag.
      **defaults: in place of the function's; a flag without a default is required.
    """
    holders = dict(given or {})
    parameters = inspect.signature(function).parameters
    hints, texts = get_type_hints(function), _argument_texts(function)
    for name in [name for name in parameters if name not in {*holders, *omit}]:
        default = defaults.get(name, parameters[name].default)
        required = default is inspect.Parameter.empty
        kinds = {hints[name], *get_args(hints[name])}
        define = next(define for kind, define in _DEFINE.items() if kind in kinds)
        holders[name] = define(
            name, None if required else default, texts[name], required=required
        )
    return holders


_DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    Path: flags.DEFINE_string,
}


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function says of each argument."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2]
    texts = re.findall(r"^  (\w+): (.+(?:\n    .+)*)", section, re.MULTILINE)
    return {name: text[0].upper() + text[1:] for name, text in texts}


def values_of(holders: Mapping[str, flags.FlagHolder]) -> dict[str, Any]:
    """The values of flags by name."""
    return {name: holder.value for name, holder in holders.items()}


def parse(
    argv: list[str], values: flags.FlagValues = flags.FLAGS, known_only: bool = False
) -> list[str]:
    """Parse `values`, with every mistake of the user as an InputError.

    Returns:
      What is not a flag; with `known_only` the flags that `values` lacks too.
    """
    options = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if any(option in _HELP for option in options):
        print(_help(values))
        sys.exit(0)
    for option in options:
        if "gs://" in option:
            raise InputError(
                f"{option}: a bucket is used through a folder where it is mounted, see "
                "docs/launching.md"
            )
    argv = [argv[0], *map(_today, argv[1:])]
    sys.argv = list(argv)  # where ml_collections looks for overrides of fields
    for name, default in _CONFIG_DEFAULTS.items():
        if name not in values:
            continue
        if not given(options, name):
            path = default if os.path.isfile(default.split(":")[0]) else _ROOT / default
            argv = [argv[0], f"--{name}={path}", *argv[1:]]
        # ml_collections keeps silent about a missing file until a field is read.
        for path in given(argv[1:], name):
            if not os.path.isfile(path.split(":")[0]):
                raise InputError(f"--{name}={path}: there is no such config file")
    # Flags may also follow arguments: launch.library list --library=DIR.
    values.set_gnu_getopt(True)
    try:
        return values(argv, known_only)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_explain(error)) from error


def _today(option: str) -> str:
    """An option with the names of today, where it has those of the first edition.

    Raises:
      InputError: a config field with a "-", on which ml_collections stumbles.
    """
    for old, new in _RENAMED.items():
        if option.startswith(old):
            return new + option.removeprefix(old)
    name, equals, _ = option.partition("=")
    section, dot, field = name.lstrip("-").partition(".")
    if equals and dot and section in _CONFIG_DEFAULTS and "-" in field:
        raise InputError(
            f"{name}: names of fields have no '-'; did you mean "
            f"--{section}.{field.replace('-', '_')}?"
        )
    return option


def given(options: Sequence[str], name: str) -> list[str]:
    """Values given to a flag, as --name=value or --name value."""
    values = []
    for option, after in zip(options, [*options, ""][1:], strict=True):
        flag, equals, value = option.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            values.append(value if equals else after)
    return values


def _explain(error: BaseException) -> str:
    """One line for what absl and ml_collections raise while parsing.

    A config file's own error arrives wrapped, as text with a traceback; the original
    hangs on the chain of contexts.
    """
    while "Traceback" in str(error) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, (AttributeError, KeyError)):
        while isinstance(error.args[0], BaseException):
            error = error.args[0]
        name, _, hint = str(error.args[0]).partition("\n")
        return f"unknown config field {name.strip(_QUOTES)!r}. {hint}".rstrip(". ")
    return str(error)


def _help(values: flags.FlagValues) -> str:
    """The docstring of the command and the flags of this project's modules."""
    parts = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for module, members in sorted(values.flags_by_module_dict().items()):
        ours = module.split(".")[0] in _PROJECT or module == sys.argv[0]
        for flag in sorted(members, key=lambda f: f.name):
            if ours or flag.name in _CONFIG_DEFAULTS:
                parts += _flag_help(flag)
    return "\n".join(parts)


def _flag_help(flag: flags.Flag) -> list[str]:
    head = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}=..."
    text = " ".join((flag.help or "").split())
    default = _CONFIG_DEFAULTS.get(flag.name, flag.default)
    if isinstance(default, list):
        default = ",".join(map(str, default))
    if default not in (None, ""):
        text += f" (default: {default})"
    elif any("must have a value" in check.message for check in flag.validators):
        text += " Required."
    wrapped = textwrap.wrap(text, 88, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [head, *wrapped]
