"""Tasks of DeepMind Control simulated on the device by MJX, whole roll-outs at once.

The model is dm_control's own, with its solver's settings; MJX computes in float32.
Episodes start in the states that dm_control draws from their seeds. What a task
observes and rewards is written here once more in jax.numpy, and the tests compare it
with dm_control's.
"""

import contextlib
import functools
import importlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.envs.base import Step
from psec_jax.envs.dm_control import DmControlEnv
from psec_jax.envs.gl import CannotDraw, import_simulator
from psec_jax.errors import InputError, lookup
from psec_jax.types import Dataset

Act = Callable[[Any, jax.Array], jax.Array]


class Rollout(NamedTuple):
    """T steps of B episodes.

    Attributes:
      reward: [T, B] float32.
      finite: [T, B] bool, whether the action was.
      action: [T, B, A] float32, clipped to [-1, 1]; None where not kept.
      obs: [T + 1, B, S] float32, the first before any step; None where not kept.
    """

    reward: np.ndarray
    finite: np.ndarray
    action: np.ndarray | None
    obs: np.ndarray | None

    def datasets(self) -> list[Dataset]:
        """The transitions of each episode, where they were kept."""
        assert self.action is not None and self.obs is not None
        none = np.zeros(len(self.reward))
        end = np.arange(len(none)) == len(none) - 1
        return [
            Dataset(
                self.obs[:-1, b],
                self.action[:, b],
                self.reward[:, b],
                none.astype(np.float32),
                self.obs[1:, b],
                none.astype(bool),
                end,
            )
            for b in range(self.reward.shape[1])
        ]


class Task(NamedTuple):
    """What dm_control's task computes from the simulator after a control step.

    Attributes:
      observe: `(model, data) -> [S]`; the model is MuJoCo's, for names.
      reward: `(model, data) -> scalar`.
    """

    observe: Callable[[Any, Any], jax.Array]
    reward: Callable[[Any, Any], jax.Array]


class MjxEnv(DmControlEnv):
    """One suite task whose steps are MJX's; sizes and first states are dm_control's."""

    prefix = "mjx"

    def __init__(
        self,
        domain: str,
        task: str,
        shift: Mapping[str, float],
        options: Mapping[str, Any],
    ) -> None:
        """Build the task; see `DmControlEnv`."""
        super().__init__(domain, task, shift, options)
        self._task = TASKS[f"{domain}-{task}"]
        self._steps = 0

    @functools.cached_property
    def _host_model(self) -> Any:
        """MuJoCo's model without what MJX lacks and no task here needs."""
        mujoco: Any = importlib.import_module("mujoco")
        model = self._env.physics.model.ptr.__copy__()
        model.opt.enableflags &= ~int(mujoco.mjtEnableBit.mjENBL_ENERGY)
        return model

    @functools.cached_property
    def model(self) -> Any:
        """MJX's model."""
        return _mjx().put_model(self._host_model)

    def start(self, model: Any, qpos: jax.Array, qvel: jax.Array) -> Any:
        """MJX's data of one first state."""
        return _mjx().make_data(model).replace(qpos=qpos, qvel=qvel)

    def advance(
        self, model: Any, data: Any, action: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One control step as a pure function of one example.

        Args:
          model: MJX's model.
          data: MJX's data.
          action: [A] in [-1, 1].

        Returns:
          The data after the step, the observation [S] and the reward.
        """
        mjx = _mjx()
        data = data.replace(
            ctrl=jnp.asarray(self.box.centre, jnp.float32)
            + jnp.asarray(self.box.half, jnp.float32) * action
        )
        data = jax.lax.fori_loop(
            0, self._env._n_sub_steps, lambda _, data: mjx.step(model, data), data
        )
        # As in dm_control, poses, velocities and their sensors are those after the
        # step. Sensors of forces are those of its last physics step.
        data = mjx.com_pos(model, mjx.kinematics(model, data))
        data = mjx.sensor_pos(model, data)
        data = mjx.sensor_vel(model, mjx.com_vel(model, data))
        task, named = self._task, self._host_model
        return data, task.observe(named, data), task.reward(named, data)

    @functools.cached_property
    def _advance(self) -> Callable[..., Any]:
        return jax.jit(self.advance)

    def reset(self, seed: int) -> np.ndarray:
        """See `Env.reset`."""
        obs = super().reset(seed)
        self._steps, self._data = 0, None
        return obs

    def step(self, action: np.ndarray) -> Step:
        """See `Env.step`; compiles in its first call."""
        if self._data is None:
            self._data = self.start(self.model, *self._state())
        action = np.asarray(action, np.float32)
        self._data, obs, reward = self._advance(self.model, self._data, action)
        self._steps += 1
        obs, reward = np.asarray(obs), float(reward)
        if not (np.isfinite(obs).all() and math.isfinite(reward)):
            raise InputError(f"{self.spec}: {BROKEN} in step {self._steps - 1}")
        return Step(obs, reward, 0.0, False, self._steps == self.max_steps)

    def render(self, height: int, width: int) -> np.ndarray:
        """Refused: episodes are rounded otherwise in every batch, and so a recorded one
        cannot be played again.

        Raises:
          CannotDraw: always.
        """
        raise CannotDraw(
            f"{self.spec} draws no pictures; "
            f"{self.spec.replace(self.prefix, DmControlEnv.prefix, 1)} does"
        )

    def _state(self) -> tuple[jax.Array, jax.Array]:
        """Positions and velocities in dm_control's simulator."""
        data = self._env.physics.data
        return jnp.array(data.qpos, jnp.float32), jnp.array(data.qvel, jnp.float32)

    def roll_out(
        self, act: Act, inputs: Any, seeds: Sequence[int] | np.ndarray, keep: bool
    ) -> Rollout:
        """Whole episodes of a policy, all at once and as one compiled program.

        Args:
          act: pure `(input, obs [B, S]) -> actions [B, A]`, or chunks of h actions
            [B, h, A] that are executed one after the other; clipped here. A
            `jax.tree_util.Partial` has its arrays as arguments of the program, which is
            then compiled once for all policies of the same shapes.
          inputs: of each call of the policy, such as keys: leaves [T / h, B, ...],
            rounded up.
          seeds: [B], of the episodes' first states.
          keep: observations and actions too.

        Returns:
          The T steps.

        Raises:
          InputError: the simulation is not finite although the actions are.
        """
        starts = [
            (DmControlEnv.reset(self, int(seed)), *self._state()) for seed in seeds
        ]
        obs, qpos, qvel = (np.stack(part) for part in zip(*starts, strict=True))
        if not isinstance(act, jax.tree_util.Partial):
            act = jax.tree_util.Partial(act)
        with jax.enable_x64(False):
            steps = _simulate(self, keep, self.model, act, inputs, obs, qpos, qvel)
        reward, finite, sound, action, seen = jax.tree.map(
            lambda rows: np.asarray(rows)[: self.max_steps], steps
        )
        broken = ~sound & np.logical_and.accumulate(finite)
        if broken.any():
            step, episode = np.argwhere(broken)[0]
            raise InputError(
                f"{self.spec}: {BROKEN} in step {step} of the episode of seed "
                f"{seeds[episode]}"
            )
        if keep:
            seen = np.concatenate([obs[None], seen])
        return Rollout(reward, finite, action, seen)


BROKEN = "the simulation is not finite"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _simulate(env, keep, model, act, inputs, obs, qpos, qvel):
    """Reward, finite action, finite simulation, action and next observation of every
    step, [T, B, ...]; the last two are None unless they are kept."""

    def step(carry, action):
        data, _ = carry
        finite = jnp.isfinite(action).all(-1)
        action = jnp.clip(action, -1, 1)
        data, obs, reward = jax.vmap(env.advance, (None, 0, 0))(model, data, action)
        sound = jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)
        kept = (action, obs) if keep else (None, None)
        return (data, obs), (reward, finite, sound, *kept)

    def call(carry, given):
        chunk = jnp.asarray(act(given, carry[1]), jnp.float32)
        chunk = chunk[:, None] if chunk.ndim == 2 else chunk
        return jax.lax.scan(step, carry, jnp.swapaxes(chunk, 0, 1))

    carry = jax.vmap(env.start, (None, 0, 0))(model, qpos, qvel), obs
    _, steps = jax.lax.scan(call, carry, inputs)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), steps)


@functools.cache
def _mjx() -> Any:
    # It prints that an optional package is missing.
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("mujoco.mjx")


def make(name: str, shift: Mapping[str, float], keywords: Mapping[str, Any]) -> MjxEnv:
    """Make DOMAIN-TASK, such as "walker-walk"; see `psec_jax.envs.make`."""
    lookup(TASKS, name, f"task of {MjxEnv.prefix}")
    try:
        import_simulator("dm_control.suite")
        _mjx()
    except ImportError as error:
        raise InputError(
            f"{MjxEnv.prefix}:{name}: MJX cannot be imported ({error}); "
            "run: make setup-mjx"
        ) from error
    domain, _, task = name.partition("-")
    return MjxEnv(domain, task, shift, keywords)


def tolerance(
    x: Any,
    lower: float = 0.0,
    upper: float = 0.0,
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> jax.Array:
    """dm_control's soft indicator of an interval: 1 inside, less with the distance.

    Args:
      x: numbers.
      lower: of the interval.
      upper: of the interval.
      margin: the distance at which the value is `value_at_margin`; at 0 the value is 0
        outside.
      sigmoid: a key of SIGMOIDS.
      value_at_margin: see `margin`.
    """
    distance = jnp.maximum(jnp.maximum(lower - x, x - upper), 0)
    if margin == 0:
        return jnp.where(distance > 0, 0.0, 1.0)
    return SIGMOIDS[sigmoid](distance / margin, value_at_margin)


SIGMOIDS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "gaussian": lambda d, value: jnp.exp(math.log(value) * d**2),
    "linear": lambda d, value: jnp.maximum(1 - (1 - value) * d, 0),
    "quadratic": lambda d, value: jnp.maximum(1 - (1 - value) * d**2, 0),
}


def _sensors(model: Any, data: Any, *names: str) -> jax.Array:
    """The first numbers of sensors, [N]."""
    return data.sensordata[np.array([model.sensor(name).adr[0] for name in names])]


def _speed(model: Any, data: Any) -> jax.Array:
    """Of the centre of mass, forwards."""
    return _sensors(model, data, "torso_subtreelinvel")[0]


def _cartpole_observe(model: Any, data: Any) -> jax.Array:
    poles = data.xmat[2:, [2, 0], 2].ravel()
    return jnp.concatenate([data.qpos[:1], poles, data.qvel])


def _cartpole_reward(model: Any, data: Any) -> jax.Array:
    upright = (data.xmat[2:, 2, 2] + 1) / 2
    centred = (1 + tolerance(data.qpos[0], margin=2.0)) / 2
    control = tolerance(data.ctrl[0], 0.0, 0.0, 1.0, "quadratic", 0.0)
    velocity = (1 + tolerance(data.qvel[1:], margin=5.0).min()) / 2
    return upright.mean() * (4 + control) / 5 * velocity * centred


def _cartpole_sparse(model: Any, data: Any) -> jax.Array:
    upright = tolerance(data.xmat[2:, 2, 2], 0.995, 1.0).prod()
    return tolerance(data.qpos[0], -0.25, 0.25) * upright


def _positions_and_velocities(model: Any, data: Any) -> jax.Array:
    """All but how far the robot has run."""
    return jnp.concatenate([data.qpos[1:], data.qvel])


def _cheetah_reward(model: Any, data: Any) -> jax.Array:
    return tolerance(_speed(model, data), 10.0, math.inf, 10.0, "linear", 0.0)


def _hopper_observe(model: Any, data: Any) -> jax.Array:
    touch = jnp.log1p(_sensors(model, data, "touch_toe", "touch_heel"))
    return jnp.concatenate([_positions_and_velocities(model, data), touch])


def _hopper_stands(model: Any, data: Any) -> jax.Array:
    torso, foot = model.body("torso").id, model.body("foot").id
    return tolerance(data.xipos[torso, 2] - data.xipos[foot, 2], 0.6, 2.0)


def _hopper_stand(model: Any, data: Any) -> jax.Array:
    control = tolerance(data.ctrl, 0.0, 0.0, 1.0, "quadratic", 0.0).mean()
    return _hopper_stands(model, data) * (control + 4) / 5


def _hopper_hop(model: Any, data: Any) -> jax.Array:
    hopping = tolerance(_speed(model, data), 2.0, math.inf, 1.0, "linear", 0.5)
    return _hopper_stands(model, data) * hopping


def _pendulum_observe(model: Any, data: Any) -> jax.Array:
    pole = data.xmat[model.body("pole").id]
    return jnp.concatenate([pole[[2, 0], 2], data.qvel])


def _pendulum_reward(model: Any, data: Any) -> jax.Array:
    upright = data.xmat[model.body("pole").id, 2, 2]
    return tolerance(upright, math.cos(math.radians(8)), 1.0)


def _walker_observe(model: Any, data: Any) -> jax.Array:
    height = data.xpos[model.body("torso").id, 2]
    orientations = data.xmat[1:, 0][:, [0, 2]].ravel()
    return jnp.concatenate([orientations, height[None], data.qvel])


def _walker_stand(model: Any, data: Any) -> jax.Array:
    torso = model.body("torso").id
    standing = tolerance(data.xpos[torso, 2], 1.2, math.inf, 0.6)
    upright = (1 + data.xmat[torso, 2, 2]) / 2
    return (3 * standing + upright) / 4


def _walker_move(model: Any, data: Any, speed: float) -> jax.Array:
    moving = tolerance(_speed(model, data), speed, math.inf, speed / 2, "linear", 0.5)
    return _walker_stand(model, data) * (5 * moving + 1) / 6


# A task is here if its episodes differ in the first state only (not in the model), and
# never end before the time limit.
TASKS = {
    "cartpole-balance": Task(_cartpole_observe, _cartpole_reward),
    "cartpole-balance_sparse": Task(_cartpole_observe, _cartpole_sparse),
    "cartpole-swingup": Task(_cartpole_observe, _cartpole_reward),
    "cartpole-swingup_sparse": Task(_cartpole_observe, _cartpole_sparse),
    "cheetah-run": Task(_positions_and_velocities, _cheetah_reward),
    "hopper-hop": Task(_hopper_observe, _hopper_hop),
    "hopper-stand": Task(_hopper_observe, _hopper_stand),
    "pendulum-swingup": Task(_pendulum_observe, _pendulum_reward),
    "walker-run": Task(_walker_observe, functools.partial(_walker_move, speed=8.0)),
    "walker-stand": Task(_walker_observe, _walker_stand),
    "walker-walk": Task(_walker_observe, functools.partial(_walker_move, speed=1.0)),
}
