"""The real walker in episodes of a few steps: gymnasium:short:walker-TASK-v0."""

from typing import Any

import gymnasium
import numpy as np

from psec_jax import envs

STEPS = 8
SPEC = "gymnasium:short:walker-{}-v0"


class ShortWalker(gymnasium.Env):
    """dm_control's walker behind Gymnasium's interface."""

    def __init__(self, task: str) -> None:
        self._walker = envs.make(f"dm_control:walker-{task}")
        obs, action = (self._walker.obs_dim,), (self._walker.action_dim,)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, obs, np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, action, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        return self._walker.reset(seed), {}

    def step(self, action):
        step = self._walker.step(action)
        return step.obs, step.reward, step.terminal, step.timeout, {}


for task in ("stand", "walk", "run"):
    gymnasium.register(
        f"walker-{task}-v0",
        ShortWalker,
        max_episode_steps=STEPS,
        kwargs={"task": task},
    )
