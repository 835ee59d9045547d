"""An environment that says what happened to it, importable by the processes that collect."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box

LENGTH = 7


class Diary(gymnasium.Env):
    """Observes the number of the episode, of the step in it, and the action that was executed last.

    The reward is the number of the step, and an episode ends after ``LENGTH`` steps: truncated if it is
    an even one, else terminated.

    Args:
        success_at: the step of an episode that reports success, without an end.
        nan_at: the step of the whole life that observes NaN.
        fails_at: the step of the whole life that raises an error.
    """

    observation_space = Box(-np.inf, np.inf, (3,))
    action_space = Box(-1, 1, (1,))

    def __init__(
        self,
        success_at: int | None = None,
        nan_at: int | None = None,
        fails_at: int | None = None,
    ) -> None:
        self.success_at, self.nan_at, self.fails_at = success_at, nan_at, fails_at
        self.episode, self.life = -1, 0

    def reset(self, **_: Any) -> tuple[np.ndarray, dict]:
        self.episode += 1
        self.t = 0
        return np.array([self.episode, 0, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.life += 1
        if self.life == self.fails_at:
            raise FloatingPointError("the simulation is unstable")
        observation = np.array([self.episode, self.t, action[0]], np.float32)
        if self.life == self.nan_at:
            observation[1] = np.nan
        ends = self.t == LENGTH
        truncated = ends and self.episode % 2 == 0
        info = {} if self.success_at is None else {"success": self.t == self.success_at}
        return observation, float(self.t), ends and not truncated, truncated, info


def diary(**kwargs: int) -> EnvSpec:
    return EnvSpec(
        "Diary-v0", entry_point="online_envs:Diary", kwargs=kwargs, disable_env_checker=True
    )
