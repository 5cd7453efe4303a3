"""A Gymnasium environment with hand-checkable numbers, registered on import.

Worker processes import it by the name `tiny_env:Tiny-v0`.
"""

import contextlib
import os

import gymnasium
import numpy as np

from psec_jax.errors import InputError

LIMIT = 6
SPEC = "gymnasium:tiny_env:Tiny-v0"


class Tiny(gymnasium.Env):
    """obs = (start, steps so far); reward = mean of the raw action; cost = 2 a step.

    Starts above 0.5 truly end after 3 steps, the others are cut after LIMIT. A raw
    action of exactly 4 on a machine told so kills the process.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(
        np.array([0, -1], np.float32), np.array([4, 1], np.float32)
    )

    def _obs(self):
        return np.array([self.start, self.count], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.count = self.np_random.uniform(), 0
        return self._obs(), {}

    def step(self, action):
        if action[0] == 4 and "TINY_DIES" in os.environ:
            os._exit(7)
        self.count += 1
        terminal = self.start > 0.5 and self.count == 3
        return self._obs(), float(np.mean(action)), terminal, False, {"cost": 2.0}


class Reach(Tiny):
    """Tiny, reporting success in its third step of a raw action above 2."""

    def step(self, action):
        obs, reward, terminal, timeout, info = super().step(action)
        info["is_success"] = bool(self.count == 3 and action[0] > 2)
        return obs, reward, terminal, timeout, info


class Odd(Tiny):
    """Tiny, reporting a share of success."""

    def step(self, action):
        return *super().step(action)[:4], {"success": 0.5}


gymnasium.register("Tiny-v0", Tiny, max_episode_steps=LIMIT)
gymnasium.register("Endless-v0", Tiny)
gymnasium.register("Reach-v0", Reach, max_episode_steps=LIMIT)
gymnasium.register("Odd-v0", Odd, max_episode_steps=LIMIT)


def refuse_late(pipe):
    """A worker's job that refuses its input when its parent has gone."""
    with contextlib.suppress(EOFError):
        pipe.recv()
    raise InputError("too late")
