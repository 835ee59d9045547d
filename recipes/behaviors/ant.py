"""D4RL's ant, walking to a goal, seen from where its symmetry makes the four quarters the same.

The ant's four legs are copies of each other, a quarter turn apart. Whatever direction the goal lies in,
world and body can be turned by quarters, and the legs renamed, until it lies ahead to within 45 degrees.
A policy that sees the ant this way learns a quarter of what there is. As D4RL's own it keeps its heading:
it is rewarded for turning back to where the body began. Whoever imitates it then finds one gait for every
direction, and sees what is done about a body that has turned away.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec

from torchrl_iql.antmaze import FRAME_SKIP, RESET_NOISE, ant_model

__all__ = ["ANT_TO_GOAL", "AntToGoal", "fallen", "from_canonical", "heading", "to_canonical"]

ARRIVED = 0.8  # m
NEAREST, FARTHEST = 2.0, 8.0  # m, from one goal to the next
ALIVE = 0.5  # reward per step; a speed of 1 m/s towards the goal is worth 1
EFFORT = 0.05  # reward per step that the largest torques in all joints cost
TWIST = 0.5  # reward per step and radian that the body is turned away
UPRIGHT = 0.2  # cosine between the ant's vertical and the world's, below which it counts as fallen

QUARTER = np.pi / 2

ANKLE_SIGNS = np.array([1.0, -1.0, -1.0, 1.0])
"""Ankles 1 and 4 bend with positive angles, 2 and 3 with negative ones."""

ACTUATORS = np.array([3, 0, 1, 2])
"""The order of the legs in an action, where joints are in the order 0, 1, 2, 3."""


def _legs(joints: np.ndarray, turns: int) -> np.ndarray:
    """Order hips and ankles ``[8]`` by leg, ankles of one sign, each leg ``turns`` legs further."""
    legs = joints.reshape(4, 2).copy()
    legs[:, 1] *= ANKLE_SIGNS
    return np.roll(legs, turns, axis=0).ravel()


def _turn(angle: float) -> np.ndarray:
    """Return the quaternion of a rotation about the vertical."""
    return np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])


def _product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    w, v = p[0] * q[0] - p[1:] @ q[1:], p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:])
    return np.array([w, *v])


def _rotated(xy: np.ndarray, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * xy[0] - s * xy[1], s * xy[0] + c * xy[1]])


def heading(observation: np.ndarray) -> float:
    """Return by how much the ant, given by its observation ``[27]``, is turned about the vertical.

    Args:
        observation: its orientation need not be of length 1.

    Returns:
        radians in [-pi, pi]: the twist of the orientation, whatever its tilt.
    """
    w, z = observation[1], observation[4]
    return float(2 * np.arctan2(z if w >= 0 else -z, abs(w)))


def to_canonical(observation: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the ant as it looks with the goal ahead.

    Args:
        observation: ``[27]``, the ant's observation without its position: height, orientation,
            joint angles, velocities.
        direction: ``[2]``, from the ant to the goal; any length.

    Returns:
        the canonical observation ``[29]``, at its end the direction, of length 1 and within 45 degrees
        of ``(1, 0)``; and the number of legs, 0 to 3, by which the legs are renamed. Its :func:`heading`
        is the ant's.
    """
    height, orientation, joints = observation[:1], observation[1:5], observation[5:13]
    velocity, rotation, speeds = observation[13:16], observation[16:19], observation[19:27]
    turns = -round(np.arctan2(direction[1], direction[0]) / QUARTER)
    angle = turns * QUARTER
    orientation = orientation / np.linalg.norm(orientation)  # noisy after a reset
    canonical = _product(_turn(angle), _product(orientation, _turn(-angle)))
    parts = (
        height,
        canonical if canonical[0] >= 0 else -canonical,
        _legs(joints, turns),
        _rotated(velocity[:2], angle),
        velocity[2:],
        _rotated(rotation[:2], angle),
        rotation[2:],
        _legs(speeds, turns),
        _rotated(direction / np.linalg.norm(direction), angle),
    )
    return np.concatenate(parts), turns % 4


def from_canonical(action: np.ndarray, turns: int) -> np.ndarray:
    """Turn an action ``[8]`` of the canonical ant into one of the ant as it is, both in [-1, 1]."""
    legs = np.roll(action.reshape(4, 2), -turns, axis=0)
    legs = legs * np.stack([np.ones(4), ANKLE_SIGNS], axis=1)
    return legs[ACTUATORS].ravel().astype(np.float32)


def fallen(observation: np.ndarray) -> bool:
    """Return whether the ant, given by its observation ``[27]``, lies on its side or back."""
    w, x, y, z = observation[1:5]
    return bool(w * w - x * x - y * y + z * z < UPRIGHT * (w * w + x * x + y * y + z * z))


class AntToGoal(gymnasium.Env):
    """D4RL's ant on a plain that walks from one random goal to the next, in the canonical view.

    The reward is the speed towards the goal, in m/s, a small one for not having fallen, and small
    costs of the torques and of a body that is turned, as it is at first, by any angle. The episode
    terminates when the ant has fallen.
    """

    def __init__(self) -> None:
        self.model = ant_model().compile()
        self.data = mujoco.MjData(self.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += self.np_random.uniform(-RESET_NOISE, RESET_NOISE, self.model.nq)
        self.data.qvel[:] = RESET_NOISE * self.np_random.standard_normal(self.model.nv)
        turned = self.np_random.uniform(-np.pi, np.pi)
        self.data.qpos[3:7] = _product(_turn(turned), self.data.qpos[3:7])
        self._new_goal()
        return self._view(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        before = self._distance()
        self.data.ctrl[:] = from_canonical(action, self._turns)
        mujoco.mj_step(self.model, self.data, nstep=FRAME_SKIP)
        terminated = fallen(self._state[2:])
        speed = (before - self._distance()) / (FRAME_SKIP * self.model.opt.timestep)
        reward = speed + ALIVE - EFFORT * float(np.mean(np.square(action)))
        reward -= TWIST * abs(heading(self._state[2:]))
        info = {"goals": 0}
        if self._distance() < ARRIVED:
            info["goals"] = 1
            self._new_goal()
        return self._view(), reward, terminated, False, info

    @property
    def _state(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def _new_goal(self) -> None:
        angle = self.np_random.uniform(-np.pi, np.pi)
        distance = self.np_random.uniform(NEAREST, FARTHEST)
        self._goal = self._state[:2] + distance * np.array([np.cos(angle), np.sin(angle)])

    def _distance(self) -> float:
        return float(np.linalg.norm(self._goal - self._state[:2]))

    def _view(self) -> np.ndarray:
        view, self._turns = to_canonical(self._state[2:], self._goal - self._state[:2])
        return view


ANT_TO_GOAL = EnvSpec(
    "AntToGoal-v0",
    entry_point="torchrl_iql_recipes.behaviors.ant:AntToGoal",
    max_episode_steps=500,
)
