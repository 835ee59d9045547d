"""The embedded data set: short walks through a maze that have to be stitched together.

A point mass starts at ``r`` and is rewarded once, at ``g``. The data come from a scripted waypoint
controller, as in D4RL's maze2d, that only ever walks from one random cell to another a few cells away:
no episode leads from ``r`` to ``g``, and at every junction most of them turn the wrong way. Whoever
imitates them gets lost; dynamic programming finds the way.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium_robotics.envs.maze.maze_v4 import Maze
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path
from tqdm import tqdm

__all__ = ["DATASET_ID", "ENV_SPEC", "ensure_dataset"]

DATASET_ID = "pointmaze-stitch-v0"
"""Its version goes up whenever the constants or the code of this file change the data."""

MAZE = """
########
#r.#g###
##.#.#.#
##.....#
##.###.#
#......#
########
"""
ENV_SPEC = EnvSpec(
    "PointMazeStitch-v0",
    entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv",
    max_episode_steps=300,
    kwargs={
        "maze_map": [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in MAZE.split()],
        "continuing_task": False,
    },
)
"""The environment of the data and of the evaluation: ends with reward 1 within 0.45 m of the goal."""

NEAREST, FARTHEST = 1, 4  # cells from the start of a walk to its end
GOAL_SHARE = (
    0.5  # of the walks that start near enough end at the goal: V has to learn what it is worth
)
ARRIVED = 0.3  # m from the centre of the last cell
LONGEST = 150  # steps of a walk
POSITION_GAIN, VELOCITY_GAIN = 10.0, 1.0  # those of maze2d's controller
ACTION_NOISE = 0.5  # standard deviation; actions are within +-1

Cell = tuple[int, int]


def ensure_dataset(*, transitions: int = 60_000, seed: int = 0) -> str:
    """Makes the data set in Minari's local store, unless it is there.

    The same arguments give the same data. The store is ``MINARI_DATASETS_PATH``, or Minari's default.
    The data set appears there in one piece: an interrupted build leaves nothing.

    Args:
        transitions: The size at which no further episode is added.
        seed: Of the walks, the noise and the environment.

    Returns:
        The Minari id, :data:`DATASET_ID`.

    Raises:
        ValueError: If the one that is there was made with other arguments.
    """
    recipe = {"transitions": transitions, "seed": seed}
    path = get_dataset_path(DATASET_ID)
    if not path.exists():
        _build(path, recipe)
    recorded = MinariStorage.read_raw_metadata(path / "data").get("recipe")
    if recorded != recipe:
        raise ValueError(
            f"{path} was made with {recorded}, not with {recipe}. Delete it, or set "
            "MINARI_DATASETS_PATH to another folder."
        )
    return DATASET_ID


def _build(path: Path, recipe: dict[str, int]) -> None:
    env = gymnasium.make(ENV_SPEC)
    with env, tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished = Path(folder, path.name)
        unfinished.mkdir()
        storage = MinariStorage.new(
            unfinished / "data",
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_spec=ENV_SPEC,
        )
        storage.update_metadata(
            {
                "dataset_id": DATASET_ID,
                "minari_version": minari.__version__,
                "eval_env_spec": ENV_SPEC.to_json(),
                "algorithm_name": "waypoint controller",
                "description": "Noisy walks between nearby cells of a maze.",
                "recipe": recipe,
            }
        )
        storage.update_episodes(_episodes(env, **recipe))
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():  # Otherwise another process was faster.
                raise


def _episodes(env: gymnasium.Env, transitions: int, seed: int) -> Iterator[EpisodeBuffer]:
    rng = np.random.default_rng(seed)
    maze: Maze = env.get_wrapper_attr("maze")
    kinds = {(i, j): kind for i, row in enumerate(maze.maze_map) for j, kind in enumerate(row)}
    free = [cell for cell, kind in kinds.items() if kind != 1]
    starts = [cell for cell in free if kinds[cell] != "g"]
    (goal,) = (cell for cell in free if kinds[cell] == "g")
    distances = {cell: _distances(cell, set(free)) for cell in free}
    total = 0
    with tqdm(total=transitions, desc=DATASET_ID, unit="step") as bar:
        while total < transitions:
            start = starts[rng.integers(len(starts))]
            ends = [cell for cell in free if NEAREST <= distances[start][cell] <= FARTHEST]
            end = ends[rng.integers(len(ends))]
            if goal in ends and rng.random() < GOAL_SHARE:
                end = goal
            episode = _walk(env, start, end, distances[end], rng)
            total += len(episode)
            bar.update(len(episode))
            yield episode


def _walk(
    env: gymnasium.Env,
    start: Cell,
    end: Cell,
    distances: dict[Cell, int],
    rng: np.random.Generator,
) -> EpisodeBuffer:
    """One episode: towards the centre of whichever adjacent cell is nearer to the end, and so on."""
    maze: Maze = env.get_wrapper_attr("maze")
    seed = int(rng.integers(2**31))
    options = {"reset_cell": np.array(start)}
    observation, _ = env.reset(seed=seed, options=options)
    destination = maze.cell_rowcol_to_xy(np.array(end))
    observations, actions, rewards, terminations = [observation], [], [], []
    done = False
    while not done:
        position, velocity = np.split(observation["observation"], 2)
        cell = tuple(maze.cell_xy_to_rowcol(position))
        near = min((cell, *_adjacent(cell)), key=lambda c: distances.get(c, math.inf))
        waypoint = maze.cell_rowcol_to_xy(np.array(near))
        action = POSITION_GAIN * (waypoint - position) - VELOCITY_GAIN * velocity
        action = np.clip(action + ACTION_NOISE * rng.standard_normal(2), -1, 1).astype(np.float32)
        observation, reward, terminated, _, _ = env.step(action)
        arrived = np.linalg.norm(observation["achieved_goal"] - destination) < ARRIVED
        done = terminated or arrived or len(actions) + 1 == LONGEST
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
        terminations.append(terminated)
    return EpisodeBuffer(
        seed=seed,
        options=options,
        observations={key: [each[key] for each in observations] for key in observation},
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=[False] * (len(actions) - 1) + [not terminated],
        infos={},
    )


def _adjacent(cell: Cell) -> list[Cell]:
    i, j = cell
    return [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]


def _distances(goal: Cell, free: set[Cell]) -> dict[Cell, int]:
    """Steps from every free cell to the goal, by breadth-first search."""
    distances = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for near in free.intersection(_adjacent(cell)) - distances.keys():
            distances[near] = distances[cell] + 1
            queue.append(near)
    return distances
