"""Drawing without a screen: which OpenGL library MuJoCo uses."""

import contextlib
import ctypes.util
import importlib
import os
import sys
from collections.abc import Iterator

from psec_jax.errors import InputError

NO_GL = (
    "cannot draw: no OpenGL library works here without a screen; on Debian or Ubuntu "
    "apt-get install libegl1 libgl1"
)
LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}  # the one on a graphics card first
OFF = "disabled"


class CannotDraw(InputError):
    """This machine lacks what drawing needs; everything else works."""


def cannot_draw(error: BaseException | None) -> CannotDraw:
    """The one line to show for a failure of OpenGL."""
    reason = " ".join(str(error).split())
    return CannotDraw(f"{NO_GL} ({reason})" if reason else NO_GL)


def import_simulator(module: str) -> None:
    """Import a simulator's module, with an OpenGL library that works here.

    MuJoCo loads its OpenGL library on import, and may fail there. Unless `MUJOCO_GL` is
    set or there is a screen, it is set here: to EGL or OSMesa where one is installed,
    else to none at all, which loses nothing but drawing.

    Raises:
      CannotDraw: the library that `MUJOCO_GL` names does not work.
      ImportError: a package is missing.
    """
    given = os.environ.get("MUJOCO_GL")
    if given is not None:
        choices = [given]
    elif "DISPLAY" in os.environ:
        importlib.import_module(module)
        return
    else:
        found = [b for b, lib in LIBRARIES.items() if ctypes.util.find_library(lib)]
        choices = [*found, OFF]
    failure: BaseException | None = None
    for backend in choices:
        os.environ["MUJOCO_GL"] = backend
        try:
            importlib.import_module(module)
            return
        except ModuleNotFoundError:
            raise
        except (ImportError, AttributeError, RuntimeError) as error:
            os.environ.pop("PYOPENGL_PLATFORM", None)  # set by the failed attempt
            failure = error
    raise CannotDraw(f"MUJOCO_GL={given}: {cannot_draw(failure)}") from failure


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Turn a failure of OpenGL in the body into `CannotDraw`."""
    failures: tuple[type[Exception], ...] = (ImportError, AttributeError, RuntimeError)
    if "mujoco" in sys.modules:
        failures += (sys.modules["mujoco"].FatalError,)
    try:
        yield
    except failures as error:
        raise cannot_draw(error) from error
