"""D4RL's AntMaze on today's MuJoCo and Gymnasium.

D4RL's ant is gymnasium's with three changes, :func:`ant_model`: longer time steps, a fifth of the torques and
softer contacts. An action then lasts 0.1 s instead of 0.05 s, so that an episode has half as many
decisions. Transitions recorded with D4RL's ant are reproduced to 1e-5; gymnasium-robotics' AntMaze, whose
ant is gymnasium's, does not reproduce any.

Gymnasium knows the environments after ``import torchrl_iql``, as
``torchrl_iql/AntMaze_UMaze-v0``, ``torchrl_iql/AntMaze_Medium-v0`` and ``torchrl_iql/AntMaze_Large-v0``.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names are those of a compiled module)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import gymnasium
import gymnasium.envs.mujoco
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import DEFAULT_SIZE, MujocoEnv
from gymnasium.spaces import Box, Dict
from gymnasium.utils import EzPickle

__all__ = ["CELL", "MAZES", "AntMaze", "Map", "ant_model", "centre", "free_cells", "is_free"]

MAZES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "umaze": (
            "#####",
            "#r..#",
            "###.#",
            "#g..#",
            "#####",
        ),
        "medium": (
            "########",
            "#r.##..#",
            "#..#...#",
            "##...###",
            "#..#...#",
            "#.#..#.#",
            "#...#.g#",
            "########",
        ),
        "large": (
            "############",
            "#r...#.....#",
            "#.##.#.#.#.#",
            "#......#...#",
            "#.####.###.#",
            "#..#.#.....#",
            "##.#.#.#.###",
            "#..#...#.g.#",
            "############",
        ),
    }
)
"""D4RL's mazes ``*_MAZE_TEST``, row by row: walls ``#``, the reset cell ``r``, the goal cell ``g``."""

CELL = 4.0
"""Side of a cell, in metres."""

WALL_HEIGHT = 2.0  # m
GOAL_RADIUS = 0.5  # m
GOAL_NOISE = 1.0, 0.5
"""The goal is the centre of its cell plus U(0, first) plus U(0, second), in m, in x and in y."""
RESET_NOISE = 0.1
FRAME_SKIP = 5  # steps of 0.02 s, of MuJoCo

ANT_XML = Path(gymnasium.envs.mujoco.__file__).parent / "assets" / "ant.xml"

Cell = tuple[int, int]


def ant_model(maze: str | None = None) -> mujoco.MjSpec:
    """Describe D4RL's ant, in a maze or on the plain.

    Args:
        maze: a key of :data:`MAZES`; None for none.
    """
    spec = mujoco.MjSpec.from_file(str(ANT_XML))
    spec.option.timestep = 0.02
    for actuator in spec.actuators:
        actuator.gear[0] = 30
    if maze is not None:
        rows = MAZES[maze]
        for cell in _cells(rows, "#"):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[*centre(maze, cell), WALL_HEIGHT / 2],
                size=[CELL / 2, CELL / 2, WALL_HEIGHT / 2],
                contype=1,
                conaffinity=1,
                condim=3,
                margin=0.01,
                friction=[1, 0.5, 0.5],
                rgba=[0.7, 0.5, 0.3, 1],
            )
        site = {
            "pos": [0, 0, GOAL_RADIUS],
            "size": [GOAL_RADIUS, 0, 0],
            "rgba": [0.9, 0.1, 0.1, 0.6],
        }
        spec.worldbody.add_site(name="goal", **site)
    for geom in spec.geoms:
        geom.solimp[:3] = [0.8, 0.8, 0.01]
    return spec


def free_cells(maze: str) -> list[Cell]:
    """Return the cells ``(row, column)`` of a maze that are no walls."""
    return _cells(MAZES[maze], ".rg")


def is_free(maze: str, positions: np.ndarray) -> np.ndarray:
    """Return which positions lie in free cells.

    Args:
        maze: a key of :data:`MAZES`.
        positions: ``[n, 2]``, in metres.

    Returns:
        bool ``[n]``.
    """
    rows = MAZES[maze]
    free = np.pad([[kind != "#" for kind in row] for row in rows], 1)  # outside is not
    (reset,) = _cells(rows, "r")
    cells = np.round(positions[:, ::-1] / CELL) + np.array(reset) + 1
    cells = np.nan_to_num(cells, nan=0).clip(0, np.array(free.shape) - 1)  # NaN is outside
    return free[tuple(cells.astype(int).T)]


def centre(maze: str, cell: Cell) -> np.ndarray:
    """Return the centre of a cell, ``[2]``, in metres: that of the reset cell is the origin."""
    ((row, column),) = _cells(MAZES[maze], "r")
    return CELL * np.array([cell[1] - column, cell[0] - row], dtype=np.float64)


def _cells(rows: tuple[str, ...], kinds: str) -> list[Cell]:
    return [(i, j) for i, row in enumerate(rows) for j, kind in enumerate(row) if kind in kinds]


@dataclass(frozen=True)
class Map:
    """A maze as gymnasium-robotics' mazes tell theirs, rows from the top, where y is largest.

    Attributes:
        maze_map: 1 for walls, 0 for free cells.
        maze_size_scaling: side of a cell, in metres.
        x_map_center: distance of the left edge from the origin, in metres.
        y_map_center: of the upper edge.
        goal: the middle of where goals are drawn, ``[2]`` in metres.
    """

    maze_map: list[list[int]]
    maze_size_scaling: float
    x_map_center: float
    y_map_center: float
    goal: np.ndarray


class AntMaze(MujocoEnv, EzPickle):
    """D4RL's ant in D4RL's maze: rewarded once, where it reaches the goal and the episode terminates.

    An action, ``[8]`` in [-1, 1], is a torque in units of 30, kept for 0.1 s. The reward is 1 within 0.5 m of
    the goal, else 0; falling ends nothing. The goal lies in its cell, at the centre plus U(0, 1) m plus
    U(0, 0.5) m in x and in y. After a reset the ant is near the centre of its cell: positions get noise
    U(-0.1, 0.1), velocities 0.1 times N(0, 1). Time limits, as registered: 700 steps in the U maze, else
    1000. ``info["success"]`` tells whether the goal is reached; ``reset(options={"reset_cell": (row,
    column)})`` starts in another cell.

    Args:
        maze: ``"umaze"``, ``"medium"`` or ``"large"``.
        goals: whether a goal is drawn at each reset, ``"each_reset"`` as in D4RL's version 2, or once,
            ``"once"`` as in version 0.
        pose: of the ant at a reset, before the noise: ``"zero"``, D4RL's, at a height of 0.75 m with all
            joints at 0, outside the range of the ankles; or ``"standing"``, the ``init_qpos`` of ant.xml,
            with the ankles bent.
        goal_observation: whether observations are dictionaries that include the goal, with
            ``observation``, ``achieved_goal`` and ``desired_goal``. Otherwise they are
            ``[29]``: position [2], height, orientation [4], joints [8], and the velocities of these [14].
        render_mode: ``"human"``, ``"rgb_array"`` or ``"depth_array"``.
        width: of pictures, in pixels.
        height: of pictures, in pixels.

    Raises:
        ValueError: an argument is none of these.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["human", "rgb_array", "depth_array"],
        "render_fps": 10,
    }

    def __init__(
        self,
        maze: Literal["umaze", "medium", "large"] = "umaze",
        *,
        goals: Literal["each_reset", "once"] = "each_reset",
        pose: Literal["zero", "standing"] = "zero",
        goal_observation: bool = False,
        render_mode: str | None = None,
        width: int = DEFAULT_SIZE,
        height: int = DEFAULT_SIZE,
    ) -> None:
        for name, value, known in [
            ("maze", maze, tuple(MAZES)),
            ("goals", goals, ("each_reset", "once")),
            ("pose", pose, ("zero", "standing")),
        ]:
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        EzPickle.__init__(
            self,
            maze,
            goals=goals,
            pose=pose,
            goal_observation=goal_observation,
            render_mode=render_mode,
            width=width,
            height=height,
        )
        self.maze_name = maze
        self.goals = goals
        self.goal_observation = goal_observation
        self.goal: np.ndarray | None = None  # [2], in metres
        state, position = (Box(-np.inf, np.inf, shape, np.float64) for shape in [(29,), (2,)])
        # In the order of the keys: as data are flattened, whose space forgets another order.
        goal_space = Dict(achieved_goal=position, desired_goal=position, observation=state)
        rows = MAZES[maze]
        middle = CELL * np.array([len(rows[0]) / 2 - 1.5, len(rows) / 2 - 1.5])
        camera: dict[str, Any] = {  # from above, the whole maze in sight
            "lookat": np.array([*middle, 0.0]),
            "distance": 1.25 * CELL * max(len(rows), len(rows[0])),
            "elevation": -89.9,
            "azimuth": 90.0,
        }
        MujocoEnv.__init__(
            self,
            str(ANT_XML),
            frame_skip=FRAME_SKIP,
            observation_space=goal_space if goal_observation else state,
            render_mode=render_mode,
            width=width,
            height=height,
            default_camera_config=camera,
        )
        if pose == "standing":
            self.init_qpos[2:] = self.model.numeric("init_qpos").data[2:]

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = ant_model(self.maze_name).compile()
        model.vis.global_.offwidth = self.width
        model.vis.global_.offheight = self.height
        return model, mujoco.MjData(model)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: as in Gymnasium.
            options: ``reset_cell``, the cell (row, column) to start in instead of the reset cell;
                ``goal``, a position ``[2]`` in metres instead of one drawn; and ``end_cell``, of no
                effect, where a recorded walk was to lead.

        Raises:
            ValueError: an option is none of these, or the cell is a wall.
        """
        options = options or {}
        unknown = options.keys() - {"reset_cell", "goal", "end_cell"}
        if unknown:
            raise ValueError(
                f"options has {', '.join(sorted(unknown))}, expected reset_cell and goal"
            )
        cell = options.get("reset_cell")
        if cell is not None and tuple(cell) not in free_cells(self.maze_name):
            raise ValueError(f"reset_cell is {tuple(cell)}, not a free cell of {self.maze_name}")
        self._start = (0.0, 0.0) if cell is None else centre(self.maze_name, tuple(cell))
        self._goal_asked = options.get("goal")
        if seed is not None:
            self.goal = None
        return super().reset(seed=seed)

    def reset_model(self) -> Any:
        """Put the ant and the goal where an episode starts; return the first observation."""
        if self._goal_asked is not None:
            self.goal = np.asarray(self._goal_asked, dtype=np.float64)
        elif self.goal is None or self.goals == "each_reset":
            (cell,) = _cells(MAZES[self.maze_name], "g")
            noise = sum(self.np_random.uniform(0, high, 2) for high in GOAL_NOISE)
            self.goal = centre(self.maze_name, cell) + noise
        self.model.site("goal").pos[:2] = self.goal  # to be seen
        noise = self.np_random.uniform(-RESET_NOISE, RESET_NOISE, self.model.nq)
        positions = self.init_qpos + noise
        positions[:2] += self._start
        velocities = RESET_NOISE * self.np_random.standard_normal(self.model.nv)
        self.set_state(positions, self.init_qvel + velocities)
        return self._get_obs()

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply torques, ``[8]`` in [-1, 1], for 0.1 s."""
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached, False, {"success": reached}

    @property
    def maze(self) -> Map:
        """The maze, for pictures."""
        rows = MAZES[self.maze_name]
        ((row, column),), (goal,) = _cells(rows, "r"), _cells(rows, "g")
        return Map(
            maze_map=[[int(kind == "#") for kind in each] for each in reversed(rows)],
            maze_size_scaling=CELL,
            x_map_center=CELL * (column + 0.5),
            y_map_center=CELL * (len(rows) - row - 0.5),
            goal=centre(self.maze_name, goal) + sum(GOAL_NOISE) / 2,
        )

    def _get_obs(self) -> Any:
        state = np.concatenate([self.data.qpos, self.data.qvel])
        if not self.goal_observation:
            return state
        assert self.goal is not None
        return {
            "observation": state,
            "achieved_goal": state[:2].copy(),
            "desired_goal": self.goal.copy(),
        }

    def _get_reset_info(self) -> dict[str, Any]:
        return {"success": False}
