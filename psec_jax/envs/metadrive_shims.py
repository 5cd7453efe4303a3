"""What MetaDrive 0.2.6.0 needs before it can be imported here.

It was written for NumPy 1, gym 0.19 and protobuf 3. `install` changes this process for
good, so only a worker process that runs nothing but the simulator may call it.
"""

import importlib
import logging
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np


def install() -> None:
    """Make `import metadrive` work in this process; safe to call twice.

    - NumPy's aliases `float` and `int`, gone since 1.24, are Python's own types.
    - `gym` is answered by Gymnasium, of which only the spaces are used.
    - `metadrive.register`, which fills the registry of the old gym, is empty.
    - The protobuf modules of Waymo's data, generated for protobuf 3, count as missing;
      MetaDrive does without them unless such data is read.
    - `seaborn` is one function here: ten colours, matplotlib's. Their number matters
      to the simulator, the colours only to pictures. `cv2`, used for nothing that is
      needed here, is empty.
    - pygame opens no window and says no greeting, panda3d does not look for joysticks,
      and messages below errors are not logged.
    """
    for alias, kind in (("float", float), ("int", int)):
        setattr(np, alias, kind)
    modules: dict[str, Any] = sys.modules
    import gymnasium
    from matplotlib import colormaps
    from panda3d.core import loadPrcFileData

    sys.modules["gym"] = gymnasium
    sys.modules["gym.spaces"] = importlib.import_module("gymnasium.spaces")
    for name in ("metadrive.register", "cv2", "seaborn"):
        sys.modules[name] = ModuleType(name)
    colours: Any = colormaps["tab10"]
    modules["seaborn"].color_palette = lambda name: list(colours.colors)
    for name in ("scenario_pb2", "map_pb2"):
        modules[f"metadrive.utils.waymo_utils.protos.{name}"] = None
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    loadPrcFileData("", "notify-level-device fatal")
    logging.getLogger().setLevel(logging.ERROR)
