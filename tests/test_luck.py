"""The expectile of the TD error believes in luck, and IQL does not, against exactly solved mazes."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_iql_recipes.comparison import luck
from torchrl_iql_recipes.comparison.luck import DISCOUNT, MAZE, MOVES, Maze


def test_what_the_objectives_believe_of_the_door() -> None:
    believed: dict[str, list[float]] = {}
    for opens in (0.1, 0.5):
        maze = Maze.of(MAZE, opens)
        batch, before = luck.data(maze, 50_000, seed=0), maze.before_the_door()
        for title, (make, expectile) in luck.OBJECTIVES.items():
            q = luck.learned(make, expectile, batch)
            believed.setdefault(title, []).append(q[before, 1])
            if title == "SARSA":  # solved exactly: the value of random moves
                uniform = maze.values(np.full((len(maze.cells), len(MOVES)), 1 / len(MOVES)))
                exact = -1 + DISCOUNT * maze.transitions @ uniform
                np.testing.assert_allclose(q[before], exact[before], atol=1.0)
    seldom, often = (np.array([each[k] for each in believed.values()]) for k in (0, 1))
    _, lucky, ours = often - seldom
    # The lucky one thinks that it opens soon, however seldom it does.
    assert abs(lucky) < 0.5 * ours
    assert seldom[1] > seldom[2] + 3


def test_of_the_three_only_iql_goes_around() -> None:
    maze = Maze.of(MAZE, luck.OPENS)
    batch, best = luck.data(maze, 50_000, seed=1), maze.best_values()
    worth = {}
    for title, objective in luck.OBJECTIVES.items():
        greedy = np.eye(len(MOVES))[luck.learned(*objective, batch).argmax(1)]
        worth[title] = maze.values(greedy)[maze.find("s")]
    assert worth["IQL"] == pytest.approx(best[maze.find("s")])
    assert worth["expectile of the TD error"] < worth["IQL"] - 1
