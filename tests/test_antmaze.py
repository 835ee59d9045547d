"""D4RL's AntMaze: its dynamics are those of OGBench's ant, its episodes those that D4RL describes."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from torchrl_iql.antmaze import CELL, MAZES, AntMaze, ant_model, centre, free_cells, is_free

IDS = {name: f"torchrl_iql/AntMaze_{name}-v0" for name in ("UMaze", "Medium", "Large")}


def put(env: gymnasium.Env, positions: np.ndarray, velocities: np.ndarray) -> None:
    mujoco.mj_resetData(env.unwrapped.model, env.unwrapped.data)
    env.unwrapped.set_state(positions, velocities)


@pytest.mark.parametrize("maze", ["medium", "large"])
def test_its_transitions_are_those_of_ogbench(maze: str) -> None:
    """OGBench's own model of D4RL's ant and mazes: the same state after 200 actions, to the bit."""
    make = pytest.importorskip("ogbench.locomaze.maze").make_maze_env
    ours, theirs = AntMaze(maze), make("ant", "maze", maze_type=maze)
    rng = np.random.default_rng(0)
    for env in (ours, theirs):
        env.reset(seed=0)
    ours.goal = np.full(2, -100.0)
    for cell in rng.permutation(free_cells(maze))[:5]:
        positions, velocities = ours.init_qpos.copy(), rng.normal(size=14)
        positions[:2] = centre(maze, tuple(cell)) + rng.uniform(-1.5, 1.5, 2)
        put(ours, positions, velocities)
        put(theirs, positions, velocities)
        for action in rng.uniform(-1, 1, (200, 8)):
            np.testing.assert_array_equal(ours.step(action)[0], theirs.step(action)[0])


def test_the_ant_is_gymnasiums_but_for_three_things() -> None:
    ant = gymnasium.make("Ant-v5").unwrapped.model
    ours = ant_model().compile()
    assert (ant.opt.timestep, ours.opt.timestep) == (0.01, 0.02)
    assert np.all(ant.actuator_gear[:, 0] == 150) and np.all(ours.actuator_gear[:, 0] == 30)
    assert np.all(ours.geom_solimp[:, :3] == [0.8, 0.8, 0.01])
    for name in (
        "geom_friction",
        "geom_size",
        "geom_margin",
        "geom_solref",
        "body_mass",
        "jnt_range",
    ):
        np.testing.assert_array_equal(getattr(ours, name), getattr(ant, name))


@pytest.mark.parametrize("id", IDS.values())
@pytest.mark.parametrize("arguments", [{}, {"goal_observation": True}])
@pytest.mark.filterwarnings("error", "ignore:.*infinity")  # positions have no bounds
def test_gymnasium_accepts_it(id: str, arguments: dict) -> None:
    check_env(gymnasium.make(id, **arguments).unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("name", "steps", "goal"), [
    ("UMaze", 700, (0, 8)), ("Medium", 1000, (20, 20)), ("Large", 1000, (32, 24)),
])  # fmt: skip
def test_episodes_are_d4rls(name: str, steps: int, goal: tuple[int, int]) -> None:
    env = gymnasium.make(IDS[name])
    assert env.spec.max_episode_steps == steps
    goals, states = [], []
    for seed in range(200):
        observation, info = env.reset(seed=seed)
        assert info == {"success": False}
        goals.append(env.unwrapped.goal)
        states.append(observation)
    noise = np.array(goals) - goal
    # U(0, 1) + U(0, 0.5): mean 0.75, variance (1 + 0.25) / 12
    assert np.all(noise >= 0) and np.all(noise <= 1.5)
    np.testing.assert_allclose(noise.mean(0), 0.75, atol=4 * np.sqrt(1.25 / 12 / 200))
    np.testing.assert_allclose(noise.std(0), np.sqrt(1.25 / 12), rtol=0.2)
    states = np.array(states)
    rest = np.array([0, 0, 0.75, 1, 0, 0, 0] + [0] * 8)
    assert np.abs(states[:, :15] - rest).max() <= 0.1
    np.testing.assert_allclose(states[:, :15].std(0), 0.1 / np.sqrt(3), rtol=0.2)
    np.testing.assert_allclose(states[:, 15:].std(0), 0.1, rtol=0.2)


def test_reward_and_end_at_the_goal_alone() -> None:
    env = AntMaze("umaze")
    env.reset(seed=0)
    for distance, reached in [(0.49, True), (0.52, False)]:
        env.reset()
        positions = env.data.qpos.copy()
        env.goal = positions[:2] + np.array([distance, 0.0])
        positions[2], positions[3:7] = 0.55, (0, 1, 0, 0)  # on its back: that ends nothing
        env.set_state(positions, np.zeros(14))
        _, reward, terminated, truncated, info = env.step(np.zeros(8))
        assert (reward, terminated, info["success"]) == (float(reached), reached, reached)
        assert not truncated


def test_all_chance_is_the_environments_own() -> None:
    """The same seed gives the same episode, whatever NumPy's global generator is at; others differ."""

    def play(seed: int, numpy_seed: int) -> np.ndarray:
        np.random.seed(numpy_seed)
        env = AntMaze("medium")
        first, _ = env.reset(seed=seed)
        goals = [env.goal]
        second, _ = env.reset()
        return np.concatenate([first, second, *goals, env.goal])

    np.testing.assert_array_equal(play(1, 0), play(1, 5))
    assert not np.any(play(1, 0) == play(2, 0))


def test_goals_are_drawn_once_or_at_each_reset() -> None:
    once, each = AntMaze("umaze", goals="once"), AntMaze("umaze")
    for env in (once, each):
        env.reset(seed=3)
    first, second = once.goal, each.goal
    for env in (once, each):
        env.reset()
    np.testing.assert_array_equal(first, once.goal)
    assert not np.any(second == each.goal)
    once.reset(seed=3)
    np.testing.assert_array_equal(first, once.goal)


def test_a_pose_a_cell_and_a_goal_can_be_asked_for() -> None:
    env = AntMaze("large", pose="standing", goal_observation=True)
    observation, _ = env.reset(seed=0, options={"reset_cell": (7, 9), "goal": (1.0, 2.0)})
    standing = [32, 24, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]
    assert np.abs(observation["observation"][:15] - standing).max() <= 0.1
    np.testing.assert_array_equal(observation["achieved_goal"], observation["observation"][:2])
    np.testing.assert_array_equal(observation["desired_goal"], [1, 2])
    for wrong, named in [({"reset_cell": (0, 0)}, r"\(0, 0\)"), ({"cell": (1, 1)}, "cell")]:
        with pytest.raises(ValueError, match=named):
            env.reset(options=wrong)
    for wrong in ({"maze": "giant"}, {"goals": "never"}, {"pose": "lying"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))}.*expected"):
            AntMaze(**wrong)


@pytest.mark.parametrize("maze", MAZES)
def test_its_map_is_where_it_says(maze: str) -> None:
    map = AntMaze(maze).maze
    found = set()
    for row, cells in enumerate(map.maze_map):
        for column, cell in enumerate(cells):
            x = (column + 0.5) * map.maze_size_scaling - map.x_map_center
            y = map.y_map_center - (row + 0.5) * map.maze_size_scaling
            found |= set() if cell else {(x, y)}
    assert found == {tuple(centre(maze, cell)) for cell in free_cells(maze)}
    goals = []
    env = AntMaze(maze)
    for seed in range(100):
        env.reset(seed=seed)
        goals.append(env.goal)
    np.testing.assert_allclose(np.mean(goals, axis=0), map.goal, atol=0.15)


def test_it_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    AntMaze("umaze").close()
    assert not list(tmp_path.iterdir())


def test_the_maze_is_seen_from_above() -> None:
    env = AntMaze("umaze", render_mode="rgb_array", width=200, height=200)
    env.reset(seed=0)
    try:
        picture = env.render()
    except Exception as error:  # no way to render without a display here
        pytest.skip(f"nothing to render with: {error}")
    finally:
        env.close()
    assert picture.shape == (200, 200, 3) and picture.std() > 10
    np.testing.assert_array_equal(env.data.site("goal").xpos[:2], env.goal)


def test_cells_and_positions() -> None:
    assert all(len(set(map(len, rows))) == 1 for rows in MAZES.values())
    assert centre("medium", (6, 6)).tolist() == [5 * CELL, 5 * CELL]
    assert [len(free_cells(maze)) for maze in MAZES] == [7, 26, 46]
    positions = np.array([[0, 0], [8, 0], [4, np.nan], [np.nan, np.nan], [np.inf, 0], [0, -np.inf]])
    assert is_free("umaze", positions).tolist() == [True, True, False, False, False, False]
