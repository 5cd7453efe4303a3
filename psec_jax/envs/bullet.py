"""Bullet-Safety-Gym (Gronauer 2022): the eight tasks of which DSRL has data."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import Recording
from psec_jax.envs.base import Step, check_setup
from psec_jax.errors import InputError, lookup

# Observations, actions and steps of an episode in DSRL's data. The package's other
# tasks (reach, gather, push) keep state from one episode to the next.
TASKS = {
    "SafetyAntCircle-v0": (34, 8, 500),
    "SafetyAntRun-v0": (33, 8, 200),
    "SafetyBallCircle-v0": (8, 2, 200),
    "SafetyBallRun-v0": (7, 2, 100),
    "SafetyCarCircle-v0": (8, 2, 300),
    "SafetyCarRun-v0": (7, 2, 200),
    "SafetyDroneCircle-v0": (18, 4, 300),
    "SafetyDroneRun-v0": (17, 4, 200),
}
FIELD_OF_VIEW = 60.0  # degrees
CAMERA_DISTANCE = 5.0  # m at least; the package's own shows the agent alone
HIDDEN = (0.0, 0.0, -100.0)


@contextlib.contextmanager
def _own_streams() -> Iterator[None]:
    """The interpreter's own standard streams in the body.

    The package silences Bullet through their file numbers and the names of C's streams,
    and fails where a notebook or a test has put others in their place.
    """
    with (
        contextlib.redirect_stdout(sys.__stdout__),
        contextlib.redirect_stderr(sys.__stderr__),
    ):
        yield


class BulletEnv:
    """One task; costs are 0 or 1 a step."""

    def __init__(self, name: str) -> None:
        """Build the task; `make` checks the name first.

        Raises:
          InputError: an installed version that is not the data's.
        """
        import gymnasium

        self.spec = f"bullet:{name}"
        with _own_streams(), warnings.catch_warnings():
            # Importing the package registers its environments. They are built without
            # Gymnasium's wrappers, which would hide the simulator for nothing.
            from bullet_safety_gym.envs.builder import EnvironmentBuilder

            # Gymnasium compares the float32 bounds with those of float64.
            warnings.filterwarnings("ignore", "overflow encountered in cast")
            registered: Any = gymnasium.spec(name)
            self._env: Any = EnvironmentBuilder(**registered.kwargs)
        self.obs_dim = self._env.observation_space.shape[0]
        self.action_dim = self._env.action_space.shape[0]
        self.max_steps = int(registered.max_episode_steps)
        sizes = (self.obs_dim, self.action_dim, self.max_steps)
        if sizes != TASKS[name]:
            raise InputError(
                f"{self.spec}: observations, actions and steps are {sizes}, expected "
                f"{TASKS[name]} as in DSRL's data; run: make setup-safe"
            )
        self.step_seconds = float(self._env.dt)
        self.box, self.observation = ActionBox.unit(self.action_dim), ()
        self._steps = 0
        # The first reset saves the state that every later one starts from, so it must
        # not be one of a seed that the caller chose.
        self.reset(0)

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        # Motors keep their targets over a reset, which simulates one step: without this
        # an episode would begin with the last action of the one before. The step here
        # uses up the forces that some agents apply together with their targets.
        self._env.agent.apply_action(np.zeros(self.action_dim))
        self._env.bc.stepSimulation()
        # The simulator draws from NumPy's global generator, and only here; the caller
        # gets his own back.
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            observation, _ = self._env.reset()
        finally:
            np.random.set_state(state)
        self._steps = 0
        return np.asarray(observation, dtype=np.float32)

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`."""
        observation, reward, terminal, _, info = self._env.step(
            np.asarray(action, np.float64)
        )
        self._steps += 1
        return Step(
            np.asarray(observation, dtype=np.float32),
            float(reward),
            float(info["cost"]),
            bool(terminal),
            self._steps == self.max_steps and not terminal,
        )

    def render(self, height: int, width: int) -> np.ndarray:
        """See `Env.render`; the simulator's software renderer, which needs no OpenGL.
        The camera follows the agent."""
        import pybullet

        camera, client = self._env.world.camera, self._env.bc
        # A sphere that marks violations; the software renderer draws it opaque.
        client.resetBasePositionAndOrientation(
            self._env.agent.violation_body_id, HIDDEN, [0, 0, 0, 1]
        )
        view = client.computeViewMatrixFromYawPitchRoll(
            cameraTargetPosition=self._env.agent.get_position().tolist(),
            distance=max(camera.cam_dist, CAMERA_DISTANCE),
            yaw=camera.cam_yaw,
            pitch=camera.cam_pitch,
            roll=0,
            upAxisIndex=2,
        )
        projection = client.computeProjectionMatrixFOV(
            fov=FIELD_OF_VIEW, aspect=width / height, nearVal=0.1, farVal=100.0
        )
        *_, pixels, _, _ = client.getCameraImage(
            width, height, view, projection, renderer=pybullet.ER_TINY_RENDERER
        )
        image = np.asarray(pixels, np.uint8).reshape(height, width, 4)
        return np.ascontiguousarray(image[..., :3])

    def close(self) -> None:
        """See `Env.close`."""
        self._env.close()


def recording(name: str) -> Recording:
    """How data of a task are recorded; see `psec_jax.envs.describe`."""
    obs_dim, action_dim, steps = lookup(TASKS, name, "bullet task")
    box = ActionBox.unit(action_dim)
    return Recording(f"bullet:{name}", (obs_dim, action_dim), "scaled", box, steps)


def make(
    name: str,
    shift: Mapping[str, float] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> BulletEnv:
    """Make a task such as "SafetyBallRun-v0", which has neither shifts nor keyword
    arguments; see `psec_jax.envs.make`."""
    lookup(TASKS, name, "bullet task")
    packages = ("bullet_safety_gym", "pybullet", "gymnasium")
    check_setup(f"bullet:{name}", packages, "setup-safe")
    return BulletEnv(name)
