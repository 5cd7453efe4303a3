"""MetaDrive (Li et al. 2022): the nine driving tasks of DSRL.

A process can hold one simulator, and importing it changes the process for good
(`metadrive_shims`), so every environment made here lives in a worker process of its
own, or is the worker's own.
"""

import atexit
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import Recording
from psec_jax.envs.base import Step, check_setup
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.remote import RemoteEnv, answer
from psec_jax.envs.workers import in_worker
from psec_jax.errors import InputError, lookup

# The seed of the map and its blocks, and the density of traffic.
ROADS = {"easy": (0, "SCS"), "medium": (100, "XST"), "hard": (200, "TRO")}
TRAFFIC = {"sparse": 0.1, "mean": 0.15, "dense": 0.2}
TASKS = {
    f"{road}{traffic}": (*ROADS[road], TRAFFIC[traffic])
    for road in ROADS
    for traffic in TRAFFIC
}
PACKAGES = ("metadrive", "panda3d", "gltf", "pygame", "gymnasium", "matplotlib")
OBS_DIM, ACTION_DIM, MAX_STEPS = 259, 2, 1000
RAYS = 240  # the last coordinates of an observation, 1 where nothing is near
COST_RATE = 1e-2
FREE_SPEED = 10.0  # km/h
NEAR = 0.1  # of the lidar's range, 50 m
ENDS = ("arrive_dest", "crash", "out_of_road")
IDM_SPEEDS = (5, 9, 13, 17, 21, 25)  # km/h
FILM = 1500  # pixels along the whole map, of which a picture shows a part


def step_cost(base: float, speed: float, rays: np.ndarray) -> float:
    """DSRL's cost of one step.

    Args:
      base: the simulator's own cost, 1 for a crash or for leaving the road.
      speed: km/h.
      rays: lidar distances [RAYS], as shares of the range.

    Returns:
      base + 0.01 max(0, speed - 10) + 0.01 max(0, 0.1 - min rays)^2.
    """
    near = max(0.0, NEAR - float(np.min(rays)))
    return base + COST_RATE * max(0.0, speed - FREE_SPEED) + COST_RATE * near**2


class MetaDriveEnv:
    """One task, in this process; `make` is the door for everyone but a worker.

    Only the traffic differs from one seed to another: the map and the start belong to
    the task.

    Attributes:
      simulator: MetaDrive's own environment.
      info: what it reported of the last step, such as "velocity" in km/h, "raw_action"
        (the action of its own controller, where one drives) and the reason of the end.
      drivers: the simulator's own policies by name, each `(obs, generator) -> action
        [2]`; they look at the simulator, not at their arguments. "expert" is a trained
        network, "idm-SPEED" keeps its lane and its distance at up to SPEED km/h, and
        "idm", the simulator's default, does so at 30 km/h and overtakes.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        """Build the task; `make` checks the name first.

        Args:
          name: a key of `TASKS`.
          settings: more of MetaDrive's own, such as agent_policy.

        Raises:
          InputError: a simulator that cannot be imported or is not the data's version.
        """
        from psec_jax.envs import metadrive_shims

        self.spec = f"metadrive:{name}"
        metadrive_shims.install()
        try:
            from metadrive.envs.safe_metadrive_env import SafeMetaDriveEnv
            from metadrive.manager.traffic_manager import TrafficMode
        except ImportError as error:
            raise InputError(
                f"{self.spec}: MetaDrive cannot be imported ({error}); "
                "run: make setup-safe"
            ) from error
        self._seed, blocks, density = TASKS[name]

        class Task(SafeMetaDriveEnv):
            def default_config(self) -> Any:
                config = super().default_config()
                config.update(
                    {
                        "idm_target_speed": 30,
                        "idm_acc_factor": 1.0,
                        "idm_deacc_factor": 5.0,
                    },
                    allow_add_new_key=True,
                )
                return config

        self.simulator: Any = Task(
            {
                "start_seed": self._seed,
                "environment_num": 1,
                "map": 3,
                "map_config": {"type": "block_sequence", "config": blocks},
                "traffic_density": density,
                "random_traffic": True,
                "traffic_mode": TrafficMode.Hybrid,
                "accident_prob": 0.0,
                "crash_vehicle_penalty": 0.0,
                "horizon": MAX_STEPS,
                # Objects that are used again carry a little of their last episode.
                "force_destroy": True,
                **settings,
            }
        )
        # Without this the interpreter crashes when it ends.
        atexit.register(self.close)
        self.obs_dim, self.action_dim = OBS_DIM, ACTION_DIM
        self.max_steps = MAX_STEPS
        self.box, self.observation = ActionBox.unit(ACTION_DIM), ()
        config = self.simulator.config
        self.step_seconds = (
            config["decision_repeat"] * config["physics_world_step_size"]
        )
        self.info: dict[str, Any] = {}
        self._steps, self._screen = 0, (0, 0)
        self._idm: dict[int, Any] = {}  # by speed
        self.drivers: dict[str, Callable[..., np.ndarray]] = {"expert": self._expert}
        for speed in IDM_SPEEDS:
            self.drivers[f"idm-{speed}"] = partial(self._drive, speed, False)
        self.drivers["idm"] = partial(self._drive, 30, True)
        sizes = (
            *self.simulator.observation_space.shape,
            *self.simulator.action_space.shape,
        )
        if sizes != (OBS_DIM, ACTION_DIM):
            raise InputError(
                f"{self.spec}: observations and actions have sizes {sizes}, expected "
                f"{(OBS_DIM, ACTION_DIM)}; run: make setup-safe"
            )

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        self.simulator.lazy_init()
        # With random traffic the simulator seeds everything but the traffic.
        traffic = self.simulator.engine.traffic_manager
        traffic.np_random = np.random.RandomState(seed)
        self._steps, self.info, self._idm = 0, {}, {}
        return self.simulator.reset(force_seed=self._seed)

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`."""
        obs, reward, _, self.info = self.simulator.step(np.asarray(action, np.float64))
        self._steps += 1
        terminal = any(self.info[end] for end in ENDS)
        return Step(
            obs,
            float(reward),
            step_cost(self.info["cost"], self.info["velocity"], obs[-RAYS:]),
            terminal,
            self._steps == MAX_STEPS and not terminal,
        )

    def _expert(self, obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        from metadrive.examples.ppo_expert.numpy_expert import expert

        return _action(expert(self.simulator.vehicle, deterministic=True))

    def _drive(
        self,
        speed: int,
        overtake: bool,
        obs: np.ndarray,
        generator: np.random.Generator,
    ) -> np.ndarray:
        """The intelligent driver model, which remembers its lane and its errors."""
        from metadrive.policy.idm_policy import IDMPolicy

        if speed not in self._idm:
            driver: Any = IDMPolicy(self.simulator.vehicle, random_seed=0)
            driver.NORMAL_SPEED = driver.target_speed = speed
            driver.enable_lane_change = overtake
            self._idm[speed] = driver
        return _action(self._idm[speed].act())

    def render(self, height: int, width: int) -> np.ndarray:
        """See `Env.render`; the road from above, the car in the middle.

        Raises:
          CannotDraw: pygame does not work here.
        """
        import pygame

        if self._screen != (width, height):
            self._screen = (width, height)
            self.simulator.engine._top_down_renderer = None
        try:
            frame = self.simulator.render(
                mode="topdown",
                film_size=(FILM, FILM),
                screen_size=self._screen,
                track_target_vehicle=True,
                num_stack=1,
            )
        except pygame.error as error:
            raise CannotDraw(f"{self.spec}: cannot draw ({error})") from error
        return np.ascontiguousarray(pygame.surfarray.array3d(frame).swapaxes(0, 1))

    def close(self) -> None:
        """See `Env.close`."""
        self.simulator.close()


def _action(raw: Any) -> np.ndarray:
    return np.clip(raw, -1, 1).astype(np.float32)


def serve(pipe: Connection, name: str) -> None:
    """A worker's job: hold the environment of a process that may not."""
    answer(pipe, MetaDriveEnv(name))


_here: list[MetaDriveEnv] = []


def recording(name: str) -> Recording:
    """How data of a task are recorded; see `psec_jax.envs.describe`."""
    lookup(TASKS, name, "metadrive task")
    sizes, box = (OBS_DIM, ACTION_DIM), ActionBox.unit(ACTION_DIM)
    return Recording(f"metadrive:{name}", sizes, "scaled", box, MAX_STEPS)


def make(
    name: str,
    shift: Mapping[str, float] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> MetaDriveEnv | RemoteEnv:
    """Make a task such as "easysparse", which has neither shifts nor keyword arguments;
    see `psec_jax.envs.make`."""
    spec = f"metadrive:{name}"
    lookup(TASKS, name, "metadrive task")
    check_setup(spec, PACKAGES, "setup-safe")
    if in_worker() and not _here:
        _here.append(MetaDriveEnv(name))
        return _here[0]
    return RemoteEnv(spec, "psec_jax.envs.metadrive:serve", name)
