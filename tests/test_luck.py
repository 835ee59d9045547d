"""The expectile of the TD error believes in luck, and IQL does not, against exactly solved mazes."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_iql_recipes.comparison import luck
from torchrl_iql_recipes.comparison.luck import DISCOUNT, MAZE, MOVES, Maze

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seldom() -> dict[str, np.ndarray]:
    """Q where the door opens one time in ten, by objective."""
    batch = luck.data(Maze.of(MAZE, luck.OPENS), 50_000, seed=0)
    return {title: luck.learned(*its, batch) for title, its in luck.OBJECTIVES.items()}


def test_sarsa_values_random_moves(seldom: dict[str, np.ndarray]) -> None:
    maze = Maze.of(MAZE, luck.OPENS)
    uniform = maze.values(np.full((len(maze.cells), len(MOVES)), 1 / len(MOVES)))
    exact = (-1 + DISCOUNT * maze.transitions @ uniform)[maze.before_the_door()]
    np.testing.assert_allclose(seldom["SARSA"][maze.before_the_door()], exact, atol=1.0)


def test_of_the_three_only_iql_goes_around(seldom: dict[str, np.ndarray]) -> None:
    maze = Maze.of(MAZE, luck.OPENS)
    start, best = maze.find("s"), maze.best_values()
    worth = {
        title: maze.values(np.eye(len(MOVES))[q.argmax(1)])[start] for title, q in seldom.items()
    }
    assert worth["IQL"] == pytest.approx(best[start])
    assert worth["expectile of the TD error"] < worth["IQL"] - 1


def test_how_often_the_door_opens_matters_to_iql_alone(seldom: dict[str, np.ndarray]) -> None:
    """The lucky one thinks that it opens soon, however seldom it does."""
    maze = Maze.of(MAZE, 0.5)
    batch, before = luck.data(maze, 50_000, seed=0), maze.before_the_door()
    lucky, ours = (
        (seldom[title][before, 1], luck.learned(*luck.OBJECTIVES[title], batch)[before, 1])
        for title in ("expectile of the TD error", "IQL")
    )
    assert abs(lucky[1] - lucky[0]) < 0.5 * (ours[1] - ours[0])
    assert lucky[0] > ours[0] + 3
