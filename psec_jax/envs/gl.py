"""Drawing without a screen: which GL library MuJoCo uses."""

import importlib
import os
from collections.abc import Sequence

from psec_jax.errors import InputError

HELP = (
    "drawing needs a GL library: apt-get install libegl1 (MUJOCO_GL=egl) or "
    "libosmesa6 (MUJOCO_GL=osmesa)"
)
OFF = "disabled"


def import_simulator(modules: Sequence[str]) -> None:
    """Import simulator modules, with a GL library that works here.

    MuJoCo loads its GL library on import and may fail there. Unless `MUJOCO_GL` is set
    (or a screen is there), EGL is tried, then OSMesa, then none at all: only
    drawing is lost then.

    Raises:
      InputError: the library that `MUJOCO_GL` names does not work.
      ImportError: a package is missing.
    """
    given = os.environ.get("MUJOCO_GL")
    if given is None and "DISPLAY" in os.environ:
        _import(modules)
        return
    for backend in ("egl", "osmesa", OFF) if given is None else (given,):
        os.environ["MUJOCO_GL"] = backend
        try:
            _import(modules)
            return
        except ModuleNotFoundError:
            raise
        except (ImportError, AttributeError, RuntimeError) as error:
            # PyOpenGL keeps the first library asked for; forget it.
            os.environ.pop("PYOPENGL_PLATFORM", None)
            reason = error
    raise InputError(f"MUJOCO_GL={given} does not work here ({reason}); {HELP}")


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
