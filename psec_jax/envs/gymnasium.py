"""Gymnasium environments with a flat observation and a bounded continuous action."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from psec_jax.envs import gl, shifts
from psec_jax.envs.base import ActionBox, Step
from psec_jax.errors import InputError


class GymnasiumEnv:
    """One Gymnasium environment; `info["cost"]` is its cost where it gives one."""

    def __init__(self, spec: str, env: Any) -> None:
        """Wrap a made environment.

        Raises:
          InputError: no bounded box of actions, no observation that can be flattened
            into one vector, or no time limit.
        """
        from gymnasium import spaces

        self.spec, self._env = spec, env
        action_space = env.action_space
        if (
            not isinstance(action_space, spaces.Box)
            or len(action_space.shape) != 1
            or not action_space.is_bounded()
        ):
            raise InputError(
                f"{spec}: actions are {action_space}, expected a bounded Box of one "
                "dimension"
            )
        flat = env.observation_space.is_np_flattenable
        space = spaces.flatten_space(env.observation_space) if flat else None
        if space is None:
            raise InputError(
                f"{spec}: observations are {env.observation_space}, expected a space "
                "that flattens into one vector"
            )
        limit = env.spec.max_episode_steps
        if limit is None:
            raise InputError(
                f"{spec}: no time limit; register it with max_episode_steps"
            )
        self._flatten = spaces.flatten
        self._box = ActionBox(action_space.low, action_space.high)
        self._action_type = action_space.dtype
        self.obs_dim, self.action_dim = space.shape[0], action_space.shape[0]
        self.max_steps = int(limit)
        # MuJoCo environments know it; others only say how fast they are to be shown.
        seconds = getattr(env.unwrapped, "dt", None)
        self.step_seconds = float(seconds or 1 / env.metadata.get("render_fps", 50))

    def _vector(self, observation: Any) -> np.ndarray:
        vector = self._flatten(self._env.observation_space, observation)
        return np.asarray(vector, dtype=np.float32)

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        observation, _ = self._env.reset(seed=int(seed))
        return self._vector(observation)

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`."""
        scaled = self._box(action).astype(self._action_type)
        observation, reward, terminal, timeout, info = self._env.step(scaled)
        return Step(
            self._vector(observation),
            float(reward),
            float(info.get("cost", 0.0)),
            bool(terminal),
            bool(timeout) and not terminal,
        )

    def render(self, height: int, width: int) -> np.ndarray:
        """See `Env.render`; the environment's own picture, scaled onto black.

        Raises:
          CannotDraw: the environment draws no pictures, or a library is missing.
        """
        from gymnasium.error import DependencyNotInstalled

        if self._env.render_mode != "rgb_array":
            raise gl.CannotDraw(f"{self.spec}: this environment cannot draw itself")
        try:
            with gl.drawing():
                image = np.asarray(self._env.render())
        except DependencyNotInstalled as error:
            raise gl.CannotDraw(f"{self.spec}: cannot draw ({error})") from error
        scale = min(height / image.shape[0], width / image.shape[1])
        rows, columns = (round(scale * size) for size in image.shape[:2])
        image = image[(np.arange(rows) / scale).astype(int)]
        image = image[:, (np.arange(columns) / scale).astype(int)]
        frame = np.zeros((height, width, 3), np.uint8)
        top, left = (height - rows) // 2, (width - columns) // 2
        frame[top : top + rows, left : left + columns] = image
        return frame

    def close(self) -> None:
        """See `Env.close`."""
        self._env.close()


def _shifted(registered: Any, shift: Mapping[str, float], spec: str) -> Any:
    """A registered MuJoCo environment that loads a shifted model."""
    gl.import_simulator("mujoco")
    import mujoco
    from gymnasium.envs.mujoco import MujocoEnv
    from gymnasium.envs.registration import load_env_creator

    creator: Any = registered.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    load = MujocoEnv._initialize_simulation
    if getattr(creator, "_initialize_simulation", None) is not load:
        raise InputError(
            f"{spec}: not one of Gymnasium's MuJoCo environments, so it has no shifts"
        )

    class Shifted(creator):
        def _initialize_simulation(self) -> tuple[Any, Any]:
            source = mujoco.MjSpec.from_file(self.fullpath)
            model = shifts.compile_shifted(source, shift, spec)
            screen = model.vis.global_
            screen.offwidth = max(screen.offwidth, self.width)
            screen.offheight = max(screen.offheight, self.height)
            return model, mujoco.MjData(model)

    return dataclasses.replace(registered, entry_point=Shifted)


def make(name: str, shift: Mapping[str, float] | None = None) -> GymnasiumEnv:
    """Make the environment registered as `name`; see `psec_jax.envs.make`."""
    spec = shifts.join(f"gymnasium:{name}", shift or {})
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise InputError(
            f"{spec}: {error.name} is not installed; pip install 'psec_jax[gymnasium]'"
        ) from error
    try:
        package, _, registered_name = name.rpartition(":")
        if package:  # registers its environments when it is imported
            importlib.import_module(package)
        registered = gymnasium.spec(registered_name)
        if "mujoco" in str(registered.entry_point):
            gl.import_simulator("mujoco")
        if shift:
            registered = _shifted(registered, shift, spec)
        options: dict[str, Any] = {"disable_env_checker": True}
        env = gymnasium.make(registered, **options)
        if "rgb_array" in env.metadata.get("render_modes", ()):
            env.close()
            env = gymnasium.make(registered, render_mode="rgb_array", **options)
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{spec}: {reason}; expected an ID that is registered here, such as "
            "HalfCheetah-v5 or my_package:MyEnv-v0"
        ) from error
    return GymnasiumEnv(spec, env)
