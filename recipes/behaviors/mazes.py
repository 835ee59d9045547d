"""Mazes, and walkers through them that know the way.

As in D4RL, a planner leads from waypoint to waypoint, the centres of the cells on the shortest path: a
controller pushes the point mass there, a learned policy walks the ant. Whoever is evaluated starts at
``r`` and is rewarded once, at ``g``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer

from torchrl_iql.environments import register_robotics, registered
from torchrl_iql_recipes.behaviors.ant import fallen, from_canonical, to_canonical
from torchrl_iql_recipes.behaviors.policies import Stages
from torchrl_iql_recipes.behaviors.recording import record

__all__ = ["MAPS", "AntWalks", "PointWalks", "ant_maze", "point_maze", "share_arrived"]

if TYPE_CHECKING:
    from gymnasium_robotics.envs.maze.maze_v4 import Maze

register_robotics()

MAPS = {
    "stitch": """
        ########
        #r.#g###
        ##.#.#.#
        ##.....#
        ##.###.#
        #......#
        ########
    """,
    "umaze": """
        #####
        #r..#
        ###.#
        #g..#
        #####
    """,
    "medium": """
        ########
        #r.##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#.g#
        ########
    """,
    "large": """
        ############
        #r...#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#..g#
        ############
    """,
}
"""The last three are those of D4RL; the first has a dead end at every junction."""

Cell = tuple[int, int]

POINT_STEPS = {"stitch": 300, "umaze": 300, "medium": 600, "large": 800}
ANT_STEPS = {"umaze": 700, "medium": 1000, "large": 1000}
"""Time limits, those of gymnasium-robotics."""


def point_maze(name: str) -> EnvSpec:
    """Describe a point mass in a maze; ends with reward 1 within 0.45 m of the goal."""
    return _spec("point_maze:PointMazeEnv", f"PointMaze_{name.title()}-v3", name, POINT_STEPS)


def ant_maze(name: str) -> EnvSpec:
    """Describe an ant in a maze 4 times the size; ends with reward 1 within 0.45 m of the goal.

    Start and goal are within 1 m of the centres of their cells.
    """
    title = {"umaze": "UMaze"}.get(name, name.title())
    settings = {"include_cfrc_ext_in_observation": False}
    return _spec("ant_maze_v5:AntMazeEnv", f"AntMaze_{title}-v5", name, ANT_STEPS, **settings)


def _spec(entry_point: str, id: str, name: str, steps: dict[str, int], **settings: Any) -> EnvSpec:
    rows = MAPS[name].split()
    return EnvSpec(
        id,
        entry_point=f"gymnasium_robotics.envs.maze.{entry_point}",
        max_episode_steps=steps[name],
        kwargs={
            "maze_map": [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in rows],
            "continuing_task": False,
            **settings,
        },
    )


class Plan:
    """The cells of a maze and the distances between them, in steps from cell to cell."""

    def __init__(self, env: gymnasium.Env) -> None:
        self.maze: Maze = env.get_wrapper_attr("maze")
        kinds = {
            (i, j): kind for i, row in enumerate(self.maze.maze_map) for j, kind in enumerate(row)
        }
        self.free = [cell for cell, kind in kinds.items() if kind != 1]
        (self.start,) = (cell for cell in self.free if kinds[cell] == "r")
        (self.goal,) = (cell for cell in self.free if kinds[cell] == "g")
        self.distances = {cell: _distances(cell, set(self.free)) for cell in self.free}

    def centre(self, cell: Cell) -> np.ndarray:
        """Return the centre of a cell, in metres."""
        return self.maze.cell_rowcol_to_xy(np.array(cell))

    def cell(self, position: np.ndarray) -> Cell:
        """Return the cell around a position."""
        i, j = self.maze.cell_xy_to_rowcol(position)
        return int(i), int(j)

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
        kind: where the walks lead, as in D4RL: ``"goal"`` from ``r`` to ``g``; ``"play"`` from one of a
            few hand-picked cells to another; ``"diverse"`` from any cell to any other.
        policy: the stages of the walking policy, of which the last one is used.
    """

    maze: str
    kind: Literal["goal", "play", "diverse"]
    policy: Stages

    size = 200_000
    PLAY = {
        "medium": ([(1, 1), (1, 6), (6, 1), (4, 5)], [(2, 5), (6, 2), (4, 1), (1, 2), (6, 6)]),
        "large": (
            [(1, 1), (1, 6), (7, 1), (5, 4), (3, 9)],
            [(7, 10), (1, 10), (5, 1), (7, 4), (3, 1), (5, 8)],
        ),
    }
    """Starts and ends by hand."""
    PASSED = 1.2  # m from a waypoint, when the ant turns to the next one
    ARRIVED = 0.8  # m from the last one
    LYING = 50  # steps after which an ant that has fallen is given up

    @property
    def env_spec(self) -> EnvSpec:
        return ant_maze(self.maze)

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
        walker = Walker(self.policy, [plan.centre(cell) for cell in path], end == plan.goal, rng)
        options = {"reset_cell": np.array(start), "end_cell": np.array(end)}
        seed = int(rng.integers(2**31))
        return record(env, walker.act, seed=seed, options=options, stop=walker.stop)

    def _command(self, plan: Plan, rng: np.random.Generator) -> tuple[Cell, Cell]:
        if self.kind == "goal":
            return plan.start, plan.goal
        starts, ends = self.PLAY[self.maze] if self.kind == "play" else (plan.free, plan.free)
        # An ant that starts in the cell of the goal may stand on it.
        starts = [cell for cell in starts if cell != plan.goal]
        start = starts[rng.integers(len(starts))]
        ends = [cell for cell in ends if cell != start]
        return start, ends[rng.integers(len(ends))]


class Walker:
    """An ant on its way along waypoints.

    Args:
        policy: the stages of the walking policy.
        waypoints: positions, in metres.
        to_goal: whether the last one is the goal: then the ant walks to where that really is.
        rng: source of the noise of the actions.
    """

    def __init__(
        self,
        policy: Stages,
        waypoints: Sequence[np.ndarray],
        to_goal: bool,
        rng: np.random.Generator,
    ) -> None:
        self.sample = policy.sampler(-1)
        self.waypoints = list(waypoints)
        self.to_goal = to_goal
        self.rng = rng
        self.passed = 0
        self.lying = 0

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        position = observation["achieved_goal"]
        last = len(self.waypoints) - 1
        while self.passed < last and self._distance(position) < AntWalks.PASSED:
            self.passed += 1
        if self.passed == last and self.to_goal:
            self.waypoints[last] = observation["desired_goal"]
        view, turns = to_canonical(
            observation["observation"], self.waypoints[self.passed] - position
        )
        return from_canonical(self.sample(view, self.rng), turns)

    def stop(self, observation: dict[str, np.ndarray]) -> bool:
        """Return whether the walk is over: arrived, or given up."""
        self.lying = self.lying + 1 if fallen(observation["observation"]) else 0
        last = len(self.waypoints) - 1
        arrived = not self.to_goal and self.passed == last
        if arrived and self._distance(observation["achieved_goal"]) < AntWalks.ARRIVED:
            return True
        return self.lying == AntWalks.LYING

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
        position = episode.observations["achieved_goal"][-1]
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
