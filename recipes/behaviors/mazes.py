"""Mazes, and walkers through them that know the way.

As in D4RL, a planner leads from waypoint to waypoint, the centres of the cells on the shortest path: a
controller pushes the point mass there, a learned policy walks the ant. Whoever is evaluated starts at
``r`` and is rewarded once, at ``g``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer

from torchrl_iql.antmaze import MAZES, AntMaze, centre
from torchrl_iql.environments import antmaze_id, register_robotics, registered, spec_of
from torchrl_iql_recipes.behaviors.ant import from_canonical, to_canonical
from torchrl_iql_recipes.behaviors.policies import Stages
from torchrl_iql_recipes.behaviors.recording import record

__all__ = ["MAPS", "AntWalks", "PointWalks", "point_maze", "share_arrived"]

register_robotics()

MAPS: dict[str, Sequence[str]] = {
    "stitch": (
        "########",
        "#r.#g###",
        "##.#.#.#",
        "##.....#",
        "##.###.#",
        "#......#",
        "########",
    ),
    **MAZES,
    "large": [row.replace("g.#", ".g#") for row in MAZES["large"]],
}
"""Of the point mass. The first has a dead end at every junction, the others are D4RL's."""

Cell = tuple[int, int]

POINT_STEPS = {"stitch": 300, "umaze": 300, "medium": 600, "large": 800}
"""Time limits, for the last three those of gymnasium-robotics."""


def point_maze(name: str) -> EnvSpec:
    """Describe a point mass in a maze; ends with reward 1 within 0.45 m of the goal."""
    return EnvSpec(
        f"PointMaze_{name.title()}-v3",
        entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv",
        max_episode_steps=POINT_STEPS[name],
        kwargs={
            "maze_map": [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in MAPS[name]],
            "continuing_task": False,
        },
    )


class Plan:
    """The cells of a maze and the distances between them, in steps from cell to cell."""

    def __init__(self, env: gymnasium.Env) -> None:
        inner: Any = env.unwrapped
        if isinstance(inner, AntMaze):
            rows: Sequence[Sequence[Any]] = MAZES[inner.maze_name]
            self.centre = partial(centre, inner.maze_name)
        else:
            rows = inner.maze.maze_map
            self.centre = lambda cell: inner.maze.cell_rowcol_to_xy(np.array(cell))
        kinds = {(i, j): kind for i, row in enumerate(rows) for j, kind in enumerate(row)}
        self.free = [cell for cell, kind in kinds.items() if kind not in ("#", 1)]
        (self.start,) = (cell for cell in self.free if kinds[cell] == "r")
        (self.goal,) = (cell for cell in self.free if kinds[cell] == "g")
        self.distances = {cell: _distances(cell, set(self.free)) for cell in self.free}
        self._centres = np.array([self.centre(cell) for cell in self.free])

    def cell(self, position: np.ndarray) -> Cell:
        """Return the free cell around a position."""
        return self.free[int(np.abs(self._centres - position).max(axis=1).argmin())]

    def next_cell(self, cell: Cell, end: Cell) -> Cell:
        """Return the cell to walk to: one nearer to the end, or the end itself."""
        return min((cell, *_adjacent(cell)), key=lambda c: self.distances[end].get(c, math.inf))


def _adjacent(cell: Cell) -> list[Cell]:
    i, j = cell
    return [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]


def _distances(goal: Cell, free: set[Cell]) -> dict[Cell, int]:
    """Count the steps from every free cell to the goal, by breadth-first search."""
    distances = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for near in free.intersection(_adjacent(cell)) - distances.keys():
            distances[near] = distances[cell] + 1
            queue.append(near)
    return distances


@dataclass(frozen=True)
class PointWalks:
    """Short walks of a point mass, from one random cell to another a few cells away.

    No walk leads from ``r`` to ``g``, and at every junction most of them turn the wrong way. Whoever
    imitates them gets lost; dynamic programming finds the way.
    """

    maze: str
    farthest: int  # cells from the start of a walk to its end
    longest: int  # steps of a walk
    size: int = 100_000

    GOAL_SHARE = 0.5
    """Of the walks that start near enough end at the goal: V has to learn what it is worth."""
    ARRIVED = 0.3  # m from the centre of the last cell
    POSITION_GAIN, VELOCITY_GAIN = 10.0, 1.0  # those of maze2d's controller
    ACTION_NOISE = 0.5  # standard deviation; actions are within +-1

    @property
    def env_spec(self) -> EnvSpec:
        return point_maze(self.maze)

    @property
    def algorithm(self) -> str:
        return "waypoint controller"

    @property
    def parameters(self) -> dict[str, Any]:
        return {"farthest": self.farthest, "longest": self.longest}

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        """Play one walk; ``"end_cell"`` in its options says where it leads."""
        plan = Plan(env)
        start, end = self._command(plan, rng)
        steps = 0

        def act(observation: dict[str, np.ndarray]) -> np.ndarray:
            nonlocal steps
            steps += 1
            position, velocity = np.split(observation["observation"], 2)
            waypoint = plan.centre(plan.next_cell(plan.cell(position), end))
            action = self.POSITION_GAIN * (waypoint - position) - self.VELOCITY_GAIN * velocity
            noise = self.ACTION_NOISE * rng.standard_normal(2)
            return np.clip(action + noise, -1, 1).astype(np.float32)

        def stop(observation: dict[str, np.ndarray]) -> bool:
            distance = np.linalg.norm(observation["achieved_goal"] - plan.centre(end))
            return bool(distance < self.ARRIVED) or steps == self.longest

        options = {"reset_cell": np.array(start), "end_cell": np.array(end)}
        return record(env, act, seed=int(rng.integers(2**31)), options=options, stop=stop)

    def _command(self, plan: Plan, rng: np.random.Generator) -> tuple[Cell, Cell]:
        starts = [cell for cell in plan.free if cell != plan.goal]
        start = starts[rng.integers(len(starts))]
        ends = [cell for cell in plan.free if 1 <= plan.distances[start][cell] <= self.farthest]
        end = ends[rng.integers(len(ends))]
        if plan.goal in ends and rng.random() < self.GOAL_SHARE:
            end = plan.goal
        return start, end


@dataclass(frozen=True)
class AntWalks:
    """Walks of an ant to where it is sent, by a policy that walks to the next waypoint.

    Attributes:
        maze: ``"umaze"``, ``"medium"`` or ``"large"``.
        kind: where the walks lead, as in D4RL: ``"goal"`` from ``r`` to ``g``; ``"play"`` from any cell
            to one of a few that are picked by hand; ``"diverse"`` from any cell to any other.
        policy: the stages of the walking policy, of which the last one is used.
    """

    maze: str
    kind: Literal["goal", "play", "diverse"]
    policy: Stages

    size = 500_000
    ACTION_NOISE = 0.2  # standard deviation, as in D4RL; actions are within +-1
    PLAY = {
        "medium": [(2, 5), (6, 2), (4, 1), (1, 2), (6, 6)],
        "large": [(7, 9), (1, 10), (5, 1), (7, 4), (3, 1), (5, 8)],
    }
    """Ends by hand."""
    PASSED = 1.2  # m from a waypoint, when the ant turns to the next one
    ARRIVED = 0.8  # m from the last one

    @property
    def env_spec(self) -> EnvSpec:
        spec = spec_of(antmaze_id(self.maze))
        assert spec is not None
        return spec

    @property
    def algorithm(self) -> str:
        return "SAC policy that walks to goals, and a waypoint planner"

    @property
    def parameters(self) -> dict[str, Any]:
        return {"kind": self.kind, "weights": self.policy.digest([-1])}

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        """Play one walk; ``"end_cell"`` in its options says where it should lead."""
        plan = Plan(env)
        start, end = self._command(plan, rng)
        path = _path(plan, start, end)
        inner: Any = env.unwrapped
        goal = (lambda: inner.goal) if end == plan.goal else None
        walker = Walker(self.policy, [plan.centre(cell) for cell in path], goal, rng)
        options = {"reset_cell": np.array(start), "end_cell": np.array(end)}
        seed = int(rng.integers(2**31))
        return record(env, walker.act, seed=seed, options=options, stop=walker.stop)

    def _command(self, plan: Plan, rng: np.random.Generator) -> tuple[Cell, Cell]:
        if self.kind == "goal":
            return plan.start, plan.goal
        # An ant that starts in the cell of the goal may stand on it.
        starts = [cell for cell in plan.free if cell != plan.goal]
        start = starts[rng.integers(len(starts))]
        ends = self.PLAY[self.maze] if self.kind == "play" else plan.free
        ends = [cell for cell in ends if cell != start]
        return start, ends[rng.integers(len(ends))]


class Walker:
    """An ant on its way along waypoints.

    Args:
        policy: the stages of the walking policy, of which the last one walks.
        waypoints: positions, in metres.
        goal: where the goal is, if the last waypoint is its cell: the ant walks to where it really is.
        rng: source of the noise of the actions.
    """

    def __init__(
        self,
        policy: Stages,
        waypoints: Sequence[np.ndarray],
        goal: Callable[[], np.ndarray] | None,
        rng: np.random.Generator,
    ) -> None:
        self.sample = policy.sampler(-1)
        self.waypoints = list(waypoints)
        self.goal = goal
        self.rng = rng
        self.passed = 0

    def act(self, state: np.ndarray) -> np.ndarray:
        position, body = state[:2], state[2:]
        last = len(self.waypoints) - 1
        while self.passed < last and self._distance(position) < AntWalks.PASSED:
            self.passed += 1
        if self.passed == last and self.goal is not None:
            self.waypoints[last] = self.goal()
        view, turns = to_canonical(body, self.waypoints[self.passed] - position)
        action = from_canonical(self.sample(view, self.rng), turns)
        noise = AntWalks.ACTION_NOISE * self.rng.standard_normal(8)
        return np.clip(action + noise, -1, 1).astype(np.float32)

    def stop(self, state: np.ndarray) -> bool:
        """Return whether it has arrived. As in D4RL, one that has fallen lies there to the end."""
        at_the_last = self.goal is None and self.passed == len(self.waypoints) - 1
        return at_the_last and self._distance(state[:2]) < AntWalks.ARRIVED

    def _distance(self, position: np.ndarray) -> float:
        return float(np.linalg.norm(self.waypoints[self.passed] - position))


def share_arrived(dataset: MinariDataset, within: float) -> float:
    """Return the share of walks that end where they should: not at a goal that lies on the way.

    Args:
        dataset: made by :class:`PointWalks` or :class:`AntWalks`.
        within: ``ARRIVED`` of these.
    """
    assert dataset.env_spec is not None
    plan = Plan(gymnasium.make(registered(dataset.env_spec)))
    infos = dataset.storage.get_episode_metadata(dataset.episode_indices)
    arrived = []
    for episode, info in zip(dataset, infos, strict=True):
        end = tuple(info["options"]["end_cell"])
        observations: Any = episode.observations
        if isinstance(observations, dict):
            position = observations["achieved_goal"][-1]
        else:
            position = observations[-1, :2]
        near = np.linalg.norm(position - plan.centre(end)) < within
        arrived.append(near or (end == plan.goal and episode.terminations[-1]))
    return float(np.mean(arrived))


def _path(plan: Plan, start: Cell, end: Cell) -> list[Cell]:
    """Return the cells after the start, to the end."""
    path = []
    while start != end:
        start = plan.next_cell(start, end)
        path.append(start)
    return path
