"""Meta-World (Yu et al. 2019): 50 manipulation tasks of one arm, with its experts."""

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from psec_jax.data import keywords as names
from psec_jax.envs import gl
from psec_jax.envs.base import check_setup
from psec_jax.envs.experts import Policy
from psec_jax.envs.gymnasium import GymnasiumEnv
from psec_jax.errors import InputError, lookup

MAX_STEPS = 500
GOALS = ("random", "fixed")
FIXED_SEED = 0  # of the one episode of a fixed goal
# Of the weld that moves the arm: anchor, relative position, quaternion, torque scale.
WELD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0)


class MetaWorldEnv(GymnasiumEnv):
    """One task, with the package's expert for it as "scripted"; the observation ends
    with the position of the goal."""

    def __init__(self, spec: str, env: Any, expert: Any) -> None:
        super().__init__(spec, env)
        self.drivers = {"scripted": _scripted(expert)}


def _scripted(expert: Any) -> Policy:
    def act(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        with warnings.catch_warnings():
            # Its proportional controller goes beyond the bounds by design.
            warnings.filterwarnings("ignore", "Constant.* may be too high")
            action = expert.get_action(obs.astype(np.float64))
        return np.clip(action, -1, 1).astype(np.float32)

    return act


def _task(kind: Any, fixed: bool, end_at_success: bool) -> Any:
    """A class of Gymnasium's form for one of the package's own."""
    mujoco: Any = importlib.import_module("mujoco")

    class Task(kind):
        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__(render_mode=render_mode)
            # What the package's MT1 sets through its task objects: the goal is
            # observed, and drawn anew at every reset.
            self._partially_observable, self._set_task_called = False, True
            self._freeze_rand_vec, self.seeded_rand_vec = False, True
            self.__dict__.pop("sawyer_observation_space", None)  # cached without it

        def reset_mocap_welds(self) -> None:
            # The package's own writes 11 numbers into rows that have 12 in later
            # versions of MuJoCo than the one it pins, and fails.
            for row, equality in zip(
                self.model.eq_data, self.model.eq_type, strict=True
            ):
                if equality == int(mujoco.mjtEq.mjEQ_WELD):
                    row[:] = 0.0
                    row[: len(WELD)] = WELD

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if fixed:
                seed = FIXED_SEED
            if seed is not None:
                self.seed(seed)
            return super().reset()

        def step(self, action: np.ndarray) -> Any:
            obs, reward, terminal, timeout, info = super().step(action)
            if end_at_success and info["success"]:
                terminal = True
            return obs, reward, terminal, timeout, info

    return Task


def make(
    name: str,
    shift: Mapping[str, float] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> MetaWorldEnv:
    """Make a task such as "push-v3"; see `psec_jax.envs.make`.

    Keyword arguments: goal, "random" (objects and goal are drawn for every episode, the
    default) or "fixed" (every episode is the same one); max_episode_steps, up to 500;
    terminate_on_success, whether an episode ends at its first success.
    """
    options = dict(keywords or {})
    spec = names.join(f"metaworld:{name}", options)
    check_setup(spec, ("metaworld", "gymnasium", "mujoco", "scipy"), "setup-metaworld")
    goal = options.pop("goal", "random")
    steps = options.pop("max_episode_steps", MAX_STEPS)
    end = options.pop("terminate_on_success", False)
    lookup(dict.fromkeys(GOALS), goal, f"{spec}: goal")
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise InputError(
            f"{spec}: max_episode_steps is {steps!r}, expected 1 to {MAX_STEPS}"
        )
    if type(end) is not bool:
        raise InputError(
            f"{spec}: terminate_on_success is {end!r}, expected True or False"
        )
    if options:
        raise InputError(
            f"{spec}: unknown keyword argument {min(options)!r}; choose from goal, "
            "max_episode_steps, terminate_on_success"
        )
    gl.import_simulator("mujoco")
    tasks: Any = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    experts: Any = importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    kind = lookup(tasks, name, "metaworld task")
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    registered = EnvSpec(
        id=name,
        entry_point=_task(kind, goal == "fixed", end),
        max_episode_steps=steps,
        disable_env_checker=True,
    )
    env = gymnasium.make(registered, render_mode="rgb_array")
    return MetaWorldEnv(spec, env, experts[name]())
