"""Gymnasium environments with a flat observation and a bounded continuous action."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.data.keywords import join
from psec_jax.data.spaces import order
from psec_jax.envs import gl, ogbench, shifts
from psec_jax.envs.base import Step, number
from psec_jax.envs.experts import Policy
from psec_jax.errors import InputError

FRAMES = 50  # a second, where an environment does not say it
# Packages that need preparation, and have experts of their own.
KNOWN = {"ogbench": ogbench}
# What constructors raise for a file that is not there or arguments that do not fit.
FAILURES = (OSError, ImportError, TypeError, ValueError, AttributeError, LookupError)


class GymnasiumEnv:
    """One Gymnasium environment; `info["cost"]` is its cost where it gives one, and
    `info["success"]` or `info["is_success"]` says whether its goal is reached.

    Observations are flattened as `psec_jax.data.spaces` says.

    Attributes:
      drivers: experts of the environment's package by name, see
        `workflows.collection`.
    """

    drivers: dict[str, Policy]

    def __init__(self, spec: str, env: Any) -> None:
        """Wrap a made environment.

        Raises:
          InputError: no bounded box of actions, no observation that can be flattened
            into one vector, or no time limit.
        """
        from gymnasium import spaces

        self.spec, self._env, self.drivers = spec, env, {}
        action_space = env.action_space
        if not isinstance(action_space, spaces.Box) or not action_space.is_bounded():
            raise InputError(
                f"{spec}: actions are {action_space}, expected a bounded Box"
            )
        flat = env.observation_space.is_np_flattenable
        if not flat:
            raise InputError(
                f"{spec}: observations are {env.observation_space}, expected a space "
                "that flattens into one vector"
            )
        limit = env.spec.max_episode_steps
        if limit is None:
            raise InputError(
                f"{spec}: no time limit; register it with max_episode_steps, or give "
                "that as a keyword argument"
            )
        self._flatten, self._action = spaces.flatten, action_space
        self.box = ActionBox.of(action_space.low, action_space.high)
        self.obs_dim = spaces.flatdim(env.observation_space)
        self.action_dim = len(self.box.low)
        self.observation = order(env.observation_space)
        self.max_steps = int(limit)
        # MuJoCo environments know it; others only say how fast they are to be shown.
        seconds = getattr(env.unwrapped, "dt", None)
        if not isinstance(seconds, (int, float)) or not seconds > 0:
            seconds = 1 / ((env.metadata or {}).get("render_fps") or FRAMES)
        self.step_seconds = float(seconds)

    def _vector(self, observation: Any) -> np.ndarray:
        try:
            vector = self._flatten(self._env.observation_space, observation)
            vector = np.asarray(vector, dtype=np.float32)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"{self.spec}: observation {_short(observation)} is not of "
                f"{self._env.observation_space} ({_reason(error)})"
            ) from error
        if vector.shape != (self.obs_dim,) or not np.isfinite(vector).all():
            raise InputError(
                f"{self.spec}: observation {_short(vector)} of shape {vector.shape}, "
                f"expected {self.obs_dim} finite numbers"
            )
        return vector

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`.

        Raises:
          InputError: what the environment returns is not Gymnasium's (observation,
            info), or an observation that is not of its space, or not finite.
        """
        result = self._env.reset(seed=int(seed))
        pair = isinstance(result, tuple) and len(result) == 2
        if not pair or not isinstance(result[1], dict):
            raise InputError(
                f"{self.spec}: reset returns {type(result).__name__} {_short(result)}, "
                "expected Gymnasium's (observation, info)"
            )
        return self._vector(result[0])

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`.

        Raises:
          InputError: an observation that is not of its space, or not finite, a reward
            or cost that is not one finite number, or a success other than 0 or 1.
        """
        space = self._action
        raw = self.box.to_env(action).reshape(space.shape)
        if np.issubdtype(space.dtype, np.integer):
            raw = np.rint(raw)
        # Rounding to the type of the space may leave its box by a hair.
        raw = np.asarray(np.clip(raw.astype(space.dtype), space.low, space.high))
        observation, reward, terminal, timeout, info = self._env.step(raw)
        return Step(
            self._vector(observation),
            number(reward, "reward", self.spec),
            number(info.get("cost", 0.0), "cost", self.spec),
            bool(terminal),
            bool(timeout) and not terminal,
            self._success(info.get("success", info.get("is_success"))),
        )

    def _success(self, value: Any) -> float:
        if value is None:
            return math.nan
        reached = number(value, "success", self.spec)
        if reached not in (0.0, 1.0):
            raise InputError(f"{self.spec}: success is {reached}, expected 0 or 1")
        return reached

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
    from gymnasium.envs.mujoco import MujocoEnv
    from gymnasium.envs.registration import load_env_creator

    mujoco: Any = importlib.import_module("mujoco")
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


def make(
    name: str,
    shift: Mapping[str, float] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> GymnasiumEnv:
    """Make the environment registered as `name`, which may have its package in front,
    "my_package:MyEnv-v0"; see `psec_jax.envs.make`.

    Keyword arguments are those of the environment, and max_episode_steps.
    """
    plain = join(f"gymnasium:{name}", keywords or {})
    spec = shifts.join(plain, shift or {})
    given = dict(keywords or {})
    for reserved in ("render_mode", "disable_env_checker", "vectorization_mode"):
        if reserved in given:
            raise InputError(f"{spec}: {reserved} is not for the caller to choose")
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise InputError(
            f"{spec}: {error.name} is not installed; pip install 'psec_jax[gymnasium]'"
        ) from error
    package, _, registered_name = name.rpartition(":")
    if package in KNOWN:
        KNOWN[package].prepare(spec)
    try:
        if package:  # registers its environments when it is imported
            importlib.import_module(package)
        registered = gymnasium.spec(registered_name)
        if "mujoco" in str(registered.entry_point):
            gl.import_simulator("mujoco")
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(
            f"{spec}: {_reason(error)}; expected an ID that is registered here, such "
            "as HalfCheetah-v5 or my_package:MyEnv-v0"
        ) from error
    if shift:
        registered = _shifted(registered, shift, spec)
    given["disable_env_checker"] = True
    try:
        env = gymnasium.make(registered, **given)
    except (gymnasium.error.Error, *FAILURES) as error:
        raise InputError(f"{spec}: cannot be made: {_reason(error)}") from error
    if "rgb_array" in ((env.metadata or {}).get("render_modes") or ()):
        try:
            drawn = gymnasium.make(registered, render_mode="rgb_array", **given)
        except (gymnasium.error.Error, TypeError):
            pass  # it has pictures but no such argument: it is not drawn
        else:
            env.close()
            env = drawn
    made = GymnasiumEnv(spec, env)
    if package in KNOWN:
        made.drivers = KNOWN[package].drivers(env)
    return made


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
