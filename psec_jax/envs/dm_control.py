"""DeepMind Control suite (Tassa et al. 2018)."""

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from psec_jax.data import keywords
from psec_jax.data.actions import ActionBox
from psec_jax.envs import gl, shifts
from psec_jax.envs.base import Step
from psec_jax.envs.experts import Policy, expert_path, load_expert
from psec_jax.errors import InputError

MAX_POSES = 10_000  # as many as the suite's quadruped tries
MAX_SPEED = 10.0  # m/s
# Mean speed in m/s of the packaged experts' actions mixed: a share of the run expert's,
# the rest of the walk expert's. Measured over 900 steps of one episode each.
SHARES = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
SPEEDS = (1.81, 2.04, 2.61, 3.76, 4.87, 6.08, 6.60)
# Target speeds in m/s with one packaged expert.
ALONE = {0: "stand", -1: "walk?speed=-1", -2: "walk?speed=-2"}


class DmControlEnv:
    """One suite task; observations are the dictionary's values, concatenated in the
    environment's order. Action repeat is 1."""

    prefix = "dm_control"

    def __init__(
        self,
        domain: str,
        task: str,
        shift: Mapping[str, float],
        options: Mapping[str, Any],
    ) -> None:
        """Build the task; `make` checks the names first.

        Raises:
          InputError: options that the task does not take, actions without bounds, or no
            time limit.
        """
        from dm_control import suite

        self.spec = shifts.join(
            keywords.join(f"{self.prefix}:{domain}-{task}", options), shift
        )
        if "random" in options:
            raise InputError(f"{self.spec}: random is the seed of the episode")
        # A fixed seed here, because a few tasks draw their model when they are built.
        settings: dict[str, Any] = {"random": 0, **options}
        with _shifted_models(shift, self.spec):
            try:
                self._env = suite.load(domain, task, task_kwargs=settings)
            except (TypeError, ValueError) as error:
                if not options:
                    raise
                reason = " ".join(str(error).split())
                raise InputError(f"{self.spec}: {reason}") from error
        self._poses = 0
        if shift:
            self._env.physics.after_reset = self._after_reset
        # The suite's shadows take a third of the time of drawing without a GPU.
        self._env.physics.model.vis.quality.shadowsize = 1024
        bounds = self._env.action_spec()
        self.box = ActionBox.of(
            np.broadcast_to(bounds.minimum, bounds.shape),
            np.broadcast_to(bounds.maximum, bounds.shape),
        )
        if not (
            np.isfinite(self.box.half).all() and np.isfinite(self._env._step_limit)
        ):
            raise InputError(
                f"{self.spec}: expected bounded actions and a time limit, got bounds "
                f"{bounds.minimum} to {bounds.maximum} and a limit of "
                f"{self._env._step_limit} steps"
            )
        self.action_dim = int(bounds.shape[0])
        self.max_steps = math.ceil(self._env._step_limit)
        self.step_seconds = float(self._env.control_timestep())
        self.obs_dim = len(self.reset(0))
        parts = self._env.task.get_observation(self._env.physics)
        self.observation = tuple(f"{k}:{np.size(v)}" for k, v in parts.items())

    def _after_reset(self) -> None:
        """The simulator's own, but not for ever: the humanoid draws poses until nothing
        touches, and thick thighs always do."""
        self._poses += 1
        if self._poses > MAX_POSES:
            raise RuntimeError(f"none of {MAX_POSES} first poses is free of contacts")
        physics = self._env.physics
        type(physics).after_reset(physics)

    @contextlib.contextmanager
    def _stable(self) -> Iterator[None]:
        """Turn what the simulator gives up on in the body into an `InputError`."""
        try:
            yield
        except RuntimeError as error:
            raise InputError(f"{self.spec}: {error}") from error

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        self._env.task.random.seed(seed)
        self._poses = 0
        with self._stable():
            return _flatten(self._env.reset().observation)

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`."""
        with self._stable():
            result = self._env.step(self.box.to_env(action))
        terminal = result.last() and result.discount == 0.0
        return Step(
            _flatten(result.observation),
            float(result.reward),
            0.0,
            terminal,
            result.last() and not terminal,
        )

    def render(self, height: int, width: int) -> np.ndarray:
        """See `Env.render`."""
        with gl.drawing():
            return self._env.physics.render(height, width, camera_id=0)

    def close(self) -> None:
        """See `Env.close`."""
        self._env.close()


class TargetSpeedEnv(DmControlEnv):
    """walker-walk with a target speed, which the suite's own tasks only have to exceed.

    The suite's reward of standing, times (5 m + 1) / 6 where m is 1 within a tenth of
    the target speed (0.1 m/s at least) and falls linearly to 1/2 at half of it (0.5 m/s
    at least) beyond, as the suite's own do below their least speeds.
    """

    def __init__(
        self, shift: Mapping[str, float], speed: Any, options: Mapping[str, Any]
    ) -> None:
        """Build the task.

        Raises:
          InputError: a speed that is no number of -10 to 10 m/s.
        """
        if isinstance(speed, bool) or not isinstance(speed, int | float):
            raise InputError(f"speed: got {speed!r}, expected a number")
        if not abs(speed) <= MAX_SPEED:
            raise InputError(
                f"speed: got {speed}, expected {-MAX_SPEED:g} to {MAX_SPEED:g} m/s"
            )
        from dm_control.suite import walker
        from dm_control.utils import rewards

        super().__init__("walker", "walk", shift, options)
        name = keywords.join("dm_control:walker-walk", {**options, "speed": speed})
        self.spec = shifts.join(name, shift)
        standing = walker.PlanarWalker(move_speed=0, random=0)
        width, margin = max(abs(speed) / 10, 0.1), max(abs(speed) / 2, 0.5)

        def reward(physics: Any) -> float:
            met = rewards.tolerance(
                physics.horizontal_velocity(),
                bounds=(speed - width, speed + width),
                margin=margin,
                value_at_margin=0.5,
                sigmoid="linear",
            )
            return standing.get_reward(physics) * (5 * met + 1) / 6

        self._env.task.get_reward = reward
        if speed in ALONE:
            self.drivers = {"scripted": _mixed({ALONE[speed]: 1.0}, self.action_dim)}
        elif SPEEDS[0] <= speed <= SPEEDS[-1]:
            share = float(np.interp(speed, SPEEDS, SHARES))
            shares = {"walk": 1 - share, "run": share}
            self.drivers = {"scripted": _mixed(shares, self.action_dim)}


def _mixed(shares: Mapping[str, float], action_dim: int) -> Policy:
    """The actions of the walker's packaged experts, in these shares."""
    experts = [
        (load_expert(expert_path(f"dm_control:walker-{name}"), action_dim), share)
        for name, share in shares.items()
    ]

    def act(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        action = sum(np.float32(share) * expert(obs) for expert, share in experts)
        return np.asarray(action, np.float32)

    return act


@contextlib.contextmanager
def _shifted_models(shift: Mapping[str, float], spec: str) -> Iterator[None]:
    """In the body, models are shifted when they are made of XML.

    A task keeps neither its XML nor the choices that went into it; this is the one
    function that every task's XML goes through.
    """
    if not shift:
        yield
        return
    mujoco: Any = importlib.import_module("mujoco")
    wrapper: Any = importlib.import_module("dm_control.mujoco.wrapper")

    def from_xml_string(xml: str | bytes, assets: Any = None) -> Any:
        text = xml.decode() if isinstance(xml, bytes) else xml
        model = mujoco.MjSpec.from_string(text, include=assets, assets=assets)
        return wrapper.MjModel(shifts.compile_shifted(model, shift, spec))

    plain = vars(wrapper.MjModel)["from_xml_string"]
    wrapper.MjModel.from_xml_string = from_xml_string
    try:
        yield
    finally:
        wrapper.MjModel.from_xml_string = plain


def _flatten(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [np.ravel(value) for value in observation.values()]
    return np.concatenate(parts).astype(np.float32)


def make(
    name: str,
    shift: Mapping[str, float] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> DmControlEnv:
    """Make DOMAIN-TASK, such as "walker-walk"; keyword arguments are those of the
    suite's task, such as time_limit, and of walker-walk "speed", see `TargetSpeedEnv`;
    see `psec_jax.envs.make`."""
    try:
        gl.import_simulator("dm_control.suite")
    except ImportError as error:
        raise InputError(
            f"dm_control:{name}: dm_control cannot be imported ({error}); "
            "pip install 'psec_jax[dm_control]'"
        ) from error
    from dm_control import suite

    domain, _, task = name.partition("-")
    tasks = sorted(t for d, t in suite.ALL_TASKS if d == domain)
    if not tasks:
        domains = ", ".join(sorted({d for d, _ in suite.ALL_TASKS}))
        raise InputError(
            f"dm_control:{name}: unknown domain {domain!r}; choose from {domains}"
        )
    if task not in tasks:
        raise InputError(
            f"dm_control:{name}: unknown task {task!r} of {domain}; choose from "
            f"{', '.join(f'{domain}-{t}' for t in tasks)}"
        )
    options = dict(keywords or {})
    if name == "walker-walk" and "speed" in options:
        return TargetSpeedEnv(shift or {}, options.pop("speed"), options)
    return DmControlEnv(domain, task, shift or {}, options)
