"""OGBench (Park et al. 2025), and its scripted expert of one cube."""

import importlib
import warnings
from typing import Any

import numpy as np

from psec_jax.envs import gl
from psec_jax.envs.base import check_setup
from psec_jax.envs.experts import Policy


def prepare(spec: str) -> None:
    """What has to be done before the package is imported.

    Raises:
      InputError: it is not installed.
    """
    check_setup(spec, ("ogbench",), "setup-ogbench")
    gl.import_simulator("mujoco")
    # Its environments make their spaces anew wherever they need them.
    lowered = ".*precision lowered by casting"
    warnings.filterwarnings("ignore", lowered, module="gymnasium.spaces.box")


def drivers(env: Any) -> dict[str, Policy]:
    """The package's Markov oracle as "scripted", see `workflows.collection`, where the
    task is one cube and one goal; nothing elsewhere.

    Args:
      env: made by Gymnasium.
    """
    if not env.spec.id.startswith("cube-single-singletask"):
        return {}
    module: Any = importlib.import_module(
        "ogbench.manipspace.oracles.markov.cube_markov"
    )
    oracle, task = module.CubeMarkovOracle(env=env), env.unwrapped
    drawn = np.random.get_state()  # the global generator is the caller's
    oracle.reset(None, None)  # draws where the arm rests once the cube is there
    np.random.set_state(drawn)

    def act(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        # What the package's own collection gives its oracle.
        goal = {
            "privileged/target_block": 0,
            "privileged/target_block_pos": task.cur_task_info["goal_xyzs"][0],
            "privileged/target_block_yaw": np.zeros(1),
        }
        action = oracle.select_action(obs, task.compute_ob_info() | goal)
        return np.clip(action, -1, 1).astype(np.float32)

    return {"scripted": act}
