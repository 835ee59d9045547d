"""The pictures show what they claim: checked on their pixels and on what V was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium_robotics.envs.maze.maze_v4 import Maze
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread

from torchrl_iql_recipes.experiment import plots


def count(picture: np.ndarray, color: str) -> int:
    """Count the pixels that have the color."""
    return int((np.abs(picture[..., :3] - to_rgb(color)).max(axis=-1) < 0.02).sum())


class TestLearningCurves:
    def draw(self, folder: Path, *lines: str) -> np.ndarray:
        metrics = folder / "metrics.csv"
        metrics.write_text("\n".join(lines) + "\n")
        plots.learning_curves(metrics, folder / "curves.png")
        return imread(folder / "curves.png")

    def test_one_panel_per_metric(self, tmp_path: Path):
        one = self.draw(tmp_path, "step,a", "1,0.5", "2,0.7")
        four = self.draw(tmp_path, "step,a,b,c,d", "1,1,2,3,4", "2,4,3,2,1")
        assert four.shape[0] > 1.5 * one.shape[0]
        assert four.shape[1] == 2 * one.shape[1]
        assert count(four, plots.BLUE) > 3 * count(one, plots.BLUE)

    def test_empty_cells_are_skipped_and_empty_columns_have_no_panel(self, tmp_path: Path):
        full = self.draw(tmp_path, "step,a", "10,1", "30,3")
        gaps = self.draw(tmp_path, "step,a,never", "10,1,", "20,,", "30,3,")
        np.testing.assert_array_equal(gaps, full)

    def test_the_curve_is_the_data(self, tmp_path: Path):
        rising = self.draw(tmp_path, "step,a", "0,0", "100,1")
        falling = self.draw(tmp_path, "step,a", "0,1", "100,0")
        blue = [
            np.nonzero(np.abs(p[..., :3] - to_rgb(plots.BLUE)).max(-1) < 0.02)
            for p in (rising, falling)
        ]
        slopes = [np.polyfit(column, -row, 1)[0] for row, column in blue]
        assert slopes[0] > 0 > slopes[1]
        assert slopes[0] == pytest.approx(-slopes[1], rel=0.05)

    def test_standard_errors_are_a_band_not_a_panel(self, tmp_path: Path):
        plain = self.draw(tmp_path, "step,a", "1,1", "2,2")
        banded = self.draw(tmp_path, "step,a,a_stderr", "1,1,0.5", "2,2,0.5")
        assert banded.shape == plain.shape
        pale = "#d4e2ea"  # the line's color at an opacity of 0.2 on white
        assert count(banded, pale) > 1000 > count(plain, pale)

    def test_an_earlier_run_is_drawn_up_to_the_switch(self, tmp_path: Path):
        earlier, later = tmp_path / "earlier.csv", tmp_path / "later.csv"
        earlier.write_text("step,a\n0,0\n50,1\n90,9\n")
        later.write_text("step,b,a\n50,1,1\n100,,2\n")
        whole = self.draw(tmp_path, "step,a,b", "0,0,", "50,1,1", "100,2,")
        plots.learning_curves(later, tmp_path / "curves.png", earlier=earlier, switch=50)
        marked = imread(tmp_path / "curves.png")
        assert count(whole, plots.RED) == 0 < count(marked, plots.RED)
        assert count(marked, plots.BLUE) == pytest.approx(count(whole, plots.BLUE), rel=0.1)
        plots.learning_curves(later, tmp_path / "curves.png", earlier=tmp_path / "none", switch=50)

    @pytest.mark.parametrize("lines", [[""], ["step"], ["step,a", "1,"]])
    def test_nothing_to_draw_is_an_error(self, tmp_path: Path, lines: list[str]):
        with pytest.raises(ValueError, match="no metric"):
            self.draw(tmp_path, *lines)


class TestValueMap:
    scaling = 2.0

    @pytest.fixture
    def maze(self) -> Maze:
        """Make three free cells around a corner, centred on (-2, 1), (0, 1) and (0, -1)."""
        rows = ["#####", "#r.##", "##g##", "#####"]
        cells = [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in rows]
        return Maze(cells, maze_size_scaling=self.scaling, maze_height=0.5)

    def trajectory(self, *positions: tuple[float, float]) -> np.ndarray:
        goal, velocity = (0.1, -1.1), (0.0, 0.0)
        return np.array([(*xy, *goal, *xy, *velocity) for xy in positions], dtype=np.float32)

    def draw(self, png: Path, maze: Maze, value, *trajectories: np.ndarray) -> np.ndarray:
        plots.value_map(value, maze, trajectories, png)
        return imread(png)

    def test_v_is_asked_at_rest_in_every_free_cell_with_the_goal(self, tmp_path: Path, maze: Maze):
        asked = []

        def value(observations: np.ndarray) -> np.ndarray:
            asked.append(observations)
            return observations[:, 0]

        self.draw(tmp_path / "map.png", maze, value, self.trajectory((-2, 1), (0, 1)))
        (observations,) = asked
        assert observations.dtype == np.float32
        area = self.scaling**2
        for centre in ((-2, 1), (0, 1), (0, -1)):
            inside = np.abs(observations[:, :2] - centre).max(axis=1) < self.scaling / 2
            assert inside.sum() == len(observations) / 3
            np.testing.assert_allclose(
                np.cov(observations[inside, :2].T), np.eye(2) * area / 12, atol=0.01
            )
        np.testing.assert_allclose(observations[:, 2:4], [[0.1, -1.1]] * len(observations))
        np.testing.assert_array_equal(observations[:, 4:6], observations[:, :2])
        assert not observations[:, 6:].any()

    def test_a_body_without_position_stays_as_it_is(self, tmp_path: Path, maze: Maze):
        body = np.array([0.75, 1.0, 0.0, 0.0, 0.0], dtype=np.float32)  # as that of AntMaze
        trajectory = np.concatenate([[-2, 1, 0, -1], body]).astype(np.float32)[None]
        asked = []
        self.draw(tmp_path / "map.png", maze, lambda o: asked.append(o) or o[:, 0], trajectory)
        np.testing.assert_array_equal(asked[0][:, 4:], np.tile(body, (len(asked[0]), 1)))

    def test_colors_follow_v_and_walls_are_dark(self, tmp_path: Path, maze: Maze):
        picture = self.draw(
            tmp_path / "map.png",
            maze,
            lambda observations: np.where(observations[:, 1] > 0, 1.0, 0.0),
            self.trajectory((-2, 1)),
        )
        high, low = (count(picture, to_hex(colormaps["viridis"](v))) for v in (1.0, 0.0))
        assert high == pytest.approx(2 * low, rel=0.1)  # two cells against one
        assert count(picture, plots.SLATE) == pytest.approx(17 * low, rel=0.1)  # of 20 cells

    def test_trajectories_are_drawn_on_top(self, tmp_path: Path, maze: Maze):
        def value(observations: np.ndarray) -> np.ndarray:
            return observations[:, 0]

        walk = self.trajectory((-2.5, 1), (0.5, 1))
        still = self.draw(tmp_path / "still.png", maze, value, walk[:1])
        moving = self.draw(tmp_path / "moving.png", maze, value, walk)
        row, column = np.nonzero((still != moving).any(axis=-1))
        assert 0 < np.ptp(row) < 10  # a thin horizontal line
        cell = np.sqrt(count(still, plots.SLATE) / 17)
        assert np.ptp(column) == pytest.approx(1.5 * cell, rel=0.1)  # 3 m in cells of 2 m
        assert count(still, plots.RED) > 200  # start and goal
