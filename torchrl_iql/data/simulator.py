"""An environment that can be put into a state of MuJoCo and asked what it observes there."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete

from torchrl_iql.environments import flat_environment

__all__ = ["Simulator"]

SAME = 1e-6
"""Observations of the simulator's own are the same up to this share of 1 + the magnitude."""
HUGE = 1e4
"""A velocity, in m/s or rad/s, that an environment that clips its observations clips."""


class Simulator:
    """An environment with vectors as observations, ``[D]``, and its state.

    A state is a vector ``[S]`` of positions, velocities and, in mazes, the goal.

    Attributes:
        env: the environment, reset once.
        body: the environment of MuJoCo that is put into states; None if there is none.
        positions: number of positions, 0 without a body.
        velocities: number of velocities.
        has_goal: whether the last two entries of a state are the goal of a maze.

    Args:
        env_spec: the environment.

    Raises:
        ValueError: it can not be built.
    """

    def __init__(self, env_spec: EnvSpec) -> None:
        self.env = flat_environment(env_spec)
        # Not before: gymnasium-robotics is imported without a word at the first look-up.
        from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
        from gymnasium_robotics.envs.maze.maze_v4 import MazeEnv

        from torchrl_iql.antmaze import AntMaze

        self.env.reset(seed=0)
        self._inner: Any = self.env.unwrapped
        parts = [
            self._inner,
            *(getattr(self._inner, name, None) for name in ("ant_env", "point_env")),
        ]
        bodies = (
            each for each in parts if isinstance(each, MujocoEnv) and hasattr(each, "_get_obs")
        )
        self.body: Any = next(bodies, None)
        self.has_goal = self.body is not None and isinstance(self._inner, AntMaze | MazeEnv)
        self.positions, self.velocities = 0, 0
        if self.body is not None:
            self.positions, self.velocities = self.body.model.nq, self.body.model.nv
            if self.put(self.state()).shape != self.env.observation_space.shape:
                # Changed by a wrapper that is none of observations.
                self.body, self.has_goal = None, False

    def put(self, state: np.ndarray) -> np.ndarray:
        """Go into a state; return the observation. What else MuJoCo remembers is as after a reset."""
        import mujoco

        mujoco.mj_resetData(  # pyright: ignore[reportAttributeAccessIssue]
            self.body.model, self.body.data
        )
        qpos, qvel, goal = np.split(state, [self.positions, self.positions + self.velocities])
        if self.has_goal:
            self._inner.goal = goal.copy()
        self.body.set_state(qpos, qvel)
        observation = self.body._get_obs()  # there is no public one
        if isinstance(observation, tuple):  # of gymnasium-robotics' point
            observation = observation[0]
        if self.body is not self._inner:
            observation = self._inner._get_obs(observation)
        for wrapper in reversed(list(_wrappers(self.env))):
            if isinstance(wrapper, gymnasium.ObservationWrapper):
                observation = wrapper.observation(observation)
        return np.asarray(observation, np.float64)

    def state(self) -> np.ndarray:
        """Return the state."""
        goal = self._inner.goal if self.has_goal else []
        return np.concatenate([self.body.data.qpos, self.body.data.qvel, goal])

    def step(self, action: Any) -> tuple[np.ndarray, float, bool]:
        """Apply an action of any shape; return the observation, the reward, and whether it terminates."""
        space = self.env.action_space
        action = (
            int(np.asarray(action).item())
            if isinstance(space, Discrete)
            else np.reshape(action, space.shape or ())
        )
        observation, reward, terminated, *_ = self.env.step(action)
        return np.asarray(observation, np.float64), float(reward), bool(terminated)

    @cached_property
    def _carries(self) -> np.ndarray:
        """Find which columns of observations carry which entries of a state, ``[S, D]`` bool."""
        rng = np.random.default_rng(0)
        states, observations = [], []
        for _ in range(4):
            observations.append(self.put(self._any_state(rng)))
            states.append(self.state())
        found, sought = np.stack(observations)[:, None], np.stack(states)[:, :, None]
        return np.all(np.abs(found - sought) <= SAME, axis=0)

    @cached_property
    def columns(self) -> np.ndarray:
        """The column of observations that carries each entry of a state, ``[S]``; -1 where none does."""
        return np.where(np.any(self._carries, axis=1), self._carries.argmax(1), -1)

    def _any_state(self, rng: np.random.Generator) -> np.ndarray:
        moved = self.body.init_qpos + rng.uniform(-0.1, 0.1, self.positions)
        return np.concatenate([moved, rng.uniform(-1, 1, self.velocities + 2 * self.has_goal)])

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds that columns of velocities are clipped at, ``[D]`` each; else infinite."""
        moving = slice(self.positions, self.positions + self.velocities)
        columns = self.columns[moving][self.columns[moving] >= 0]
        bounds = []
        for velocity in (-HUGE, HUGE):
            state = self._any_state(np.random.default_rng(0))
            state[moving] = velocity
            observation = self.put(state)
            bound = np.full(len(observation), np.copysign(np.inf, velocity))
            clipped = columns[np.abs(observation[columns]) < HUGE / 2]
            bound[clipped] = observation[clipped]
            bounds.append(bound)
        return bounds[0], bounds[1]

    def clipped(self, observations: np.ndarray) -> np.ndarray:
        """Return which entries of observations ``[n, D]`` lie at a bound."""
        if self.body is None:
            return np.zeros(observations.shape, bool)
        low, high = self.bounds
        return (observations <= low + SAME) | (observations >= high - SAME)

    def names(self) -> dict[int, str]:
        """Name what columns carry: ``"qpos[2] root"``, with the joint, or ``"goal[0]"``."""
        if self.body is None:
            return {}
        model, names = self.body.model, []
        for kind, size, starts in (
            ("qpos", self.positions, model.jnt_qposadr),
            ("qvel", self.velocities, model.jnt_dofadr),
        ):
            joints = np.searchsorted(starts, np.arange(size), side="right") - 1
            names += [f"{kind}[{i}] {model.joint(j).name}".strip() for i, j in enumerate(joints)]
        names += ["goal[0]", "goal[1]"]
        return {int(column): names[entry] for entry, column in np.argwhere(self._carries)}

    def own(self, moved: np.ndarray) -> tuple[list[tuple], list[tuple]]:
        """Step from states that the simulator reached, and again after going back into them.

        Args:
            moved: positions that are a metre off the second time, indices.

        Returns:
            the outcomes of the steps: they are equal both times if observation, reward and termination
            are functions of the state, without the positions that moved, and the action.
        """
        self.env.action_space.seed(0)
        first, again = [], []
        for seed in range(10):
            self.env.reset(seed=seed)
            for _ in range(20):
                self.step(self.env.action_space.sample())
                state = self.state()
                action = self.env.action_space.sample()
                first.append(self.step(action))
                state[moved] += 1
                self.put(state)
                again.append(self.step(action))
        return first, again


def _wrappers(env: gymnasium.Env) -> Any:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
