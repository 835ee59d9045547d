"""Pictures of a run: its learning curves, and what it learned of a maze."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

from torchrl_iql.antmaze import Map
from torchrl_iql_recipes.experiment.curves import Curve, Curves, band, in_file, unit
from torchrl_iql_recipes.experiment.results import FEWEST

if TYPE_CHECKING:
    from gymnasium_robotics.envs.maze.maze_v4 import Maze

__all__ = ["calibration", "learners", "learning_curves", "seeds_curves", "value_map"]

BLUE = "#2a6f97"
SLATE = "#2f3640"
RED = "#e63946"
SEEDS = (BLUE, "#e09f3e", "#3a7d44", "#7d5ba6", SLATE)
DPI = 150
PIXELS_PER_CELL = 32


def learning_curves(
    metrics_csv: Path,
    png: Path,
    *,
    title: str = "",
    earlier: Path | None = None,
    switch: int | None = None,
) -> None:
    """Draw every metric of a learner over its gradient steps, a panel each.

    Args:
        metrics_csv: has a column ``step`` and one per metric, whose cells are empty where it was not
            logged. ``x_stderr`` is drawn as a band around ``x``.
        png: the picture to write.
        title: of the picture.
        earlier: the metrics of the run that this one continues, if it left any; drawn up to the switch.
        switch: the step at which this run took over, to mark by a line.

    Raises:
        ValueError: if no metric was ever logged.
    """
    found = in_file(metrics_csv)
    if earlier is not None and switch is not None and earlier.exists():
        before = {
            name: (steps[steps <= switch], values[steps <= switch])
            for name, (steps, values) in in_file(earlier).items()
        }
        found = _joined(before, found)
    panels = [name for name, (steps, _) in found.items() if len(steps)]
    panels = [name for name in panels if not name.endswith("_stderr")]
    if not panels:
        raise ValueError(f"{metrics_csv} holds no metric to draw.")
    figure, drawn = _panels(panels, title)
    last = max(float(steps.max()) for steps, _ in found.values() if len(steps))
    for name, axes in drawn.items():
        steps, values = found[name]
        axes.plot(steps, values, color=BLUE, lw=1.5, marker="." if len(steps) < 50 else None)
        if f"{name}_stderr" in found:
            error = np.interp(steps, *found[f"{name}_stderr"])
            axes.fill_between(steps, values - error, values + error, color=BLUE, alpha=0.2, lw=0)
        if switch is not None:
            axes.axvline(switch, color=RED, lw=1, ls="--")
        axes.set_xlim(0, 1.03 * last)
    figure.savefig(png, dpi=DPI)


def _joined(earlier: Curves, later: Curves) -> Curves:
    none = np.zeros(0), np.zeros(0)
    names = dict.fromkeys([*earlier, *later])
    parts = {name: (earlier.get(name, none), later.get(name, none)) for name in names}
    return {
        name: (np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))
        for name, (a, b) in parts.items()
    }


def learners(groups: Mapping[str, Sequence[Path]], png: Path, *, title: str = "") -> None:
    """Draw every metric of all learners of a run, a panel each and a colour for each combination of settings.

    Of three seeds on it is their mean, with its 95% interval (Student's t) as a band, else a line for each.

    Args:
        groups: the ``metrics.csv`` of the seeds of each combination, by what it is called.
        png: the picture to write.
        title: of the picture.

    Raises:
        ValueError: if no metric was ever logged.
    """
    found = {label: [in_file(path) for path in paths] for label, paths in groups.items()}
    each = [curves for its in found.values() for curves in its]
    names = dict.fromkeys(name for curves in each for name in curves)
    panels = [name for name in names if not name.endswith("_stderr")]
    if not panels:
        raise ValueError("the learners have no metric to draw.")
    figure, drawn = _panels(panels, title, labelled=len(found) > 1)
    last = max(float(steps.max()) for curves in each for steps, _ in curves.values())
    for name, axes in drawn.items():
        for (label, its), colour in zip(found.items(), itertools.cycle(SEEDS), strict=False):
            seeds_curves(axes, [curves[name] for curves in its if name in curves], colour, label)
        axes.set_xlim(0, 1.03 * last)
    if len(found) > 1:
        handles, labels = next(iter(drawn.values())).get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper right", ncols=4, fontsize=8, frameon=False, labelcolor=SLATE
        )
    figure.savefig(png, dpi=DPI)


def seeds_curves(axes: Axes, curves: Sequence[Curve], colour: str, label: str) -> None:
    """Draw a metric of several seeds: from three on their mean and its interval, else each of them."""
    its = band(curves) if len(curves) >= FEWEST else None
    if its is None or its.half is None or not len(its.steps):
        for i, (steps, values) in enumerate(curves):
            marker = "." if len(steps) < 50 else None
            axes.plot(
                steps, values, color=colour, lw=1.2, marker=marker, label=None if i else label
            )
        return
    marker = "." if len(its.steps) < 50 else None
    axes.plot(its.steps, its.mean, color=colour, lw=1.8, marker=marker, label=label)
    low, high = its.mean - its.half, its.mean + its.half
    axes.fill_between(its.steps, low, high, color=colour, alpha=0.2, lw=0)


def _panels(
    names: Sequence[str], title: str, *, labelled: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """Make a page with a panel for each metric, in its unit, over gradient steps."""
    columns = min(4, math.ceil(math.sqrt(len(names))))
    lines = math.ceil(len(names) / columns)
    above = 0.45 + 0.35 * bool(title) + 0.25 * labelled
    width, height = 3.3 * columns, 2.2 * lines + above - 0.15
    figure = Figure(figsize=(width, height))
    # Not a layout that is found by drawing twice: there is a picture of every learner.
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.15 / width,
        bottom=0.55 / height,
        top=1 - above / height,
        wspace=0.36,
        hspace=0.42,
    )
    if title:
        figure.suptitle(title, x=0.15 / width, ha="left", fontsize=11, color=SLATE)
    drawn = {}
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left", color=SLATE)
        axes.set_ylabel(unit(name), fontsize=7, color=SLATE)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=8, colors=SLATE)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=SLATE, alpha=0.12)
        drawn[name] = axes
    figure.supxlabel("gradient steps", fontsize=9, color=SLATE)
    return figure, drawn


def _entitle(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle("\n".join(wrap(title, 60)), x=0.02, ha="left", fontsize=9, color=SLATE)


def calibration(q: np.ndarray, returns: np.ndarray, png: Path, title: str = "") -> None:
    """Draw values against the returns that followed, and the mean return of values that are alike.

    Args:
        q: Q(s, a), ``[n]``.
        returns: the discounted return that followed, ``[n]``.
        png: the picture to write.
        title: of the picture.
    """
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    _entitle(figure, title)
    axes = figure.add_subplot()
    low, high = min(q.min(), returns.min()), max(q.max(), returns.max())
    axes.plot([low, high], [low, high], color=SLATE, lw=1, ls=":", label="as it came")
    axes.scatter(q, returns, s=4, color=BLUE, alpha=0.15, lw=0)
    bins = np.array_split(np.argsort(q), min(10, len(q)))
    means = np.array([(q[rows].mean(), returns[rows].mean()) for rows in bins]).T
    axes.plot(*means, color=RED, marker="o", ms=4, lw=1.5, label="mean of a tenth")
    axes.set_xlabel("Q(s, a), by the rewards of the rule", fontsize=9, color=SLATE)
    axes.set_ylabel("discounted return that followed", fontsize=9, color=SLATE)
    axes.tick_params(labelsize=8, colors=SLATE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(png, dpi=DPI)


def value_map(
    value: Callable[[np.ndarray], np.ndarray],
    maze: Maze | Map,
    trajectories: Sequence[np.ndarray],
    png: Path,
    title: str = "",
) -> None:
    """Draw V over the free cells of a maze, for a body at rest, and trajectories on top.

    A flat observation of a maze is ``(achieved goal [2], desired goal [2], body [D - 4])``, and of D4RL's
    AntMaze ``(position [2], body [27])``. The map moves the body of the first trajectory's first observation,
    which is at rest and knows the goal if it is told, to every position.

    Args:
        value: V of flat observations, float32 ``[n, D]`` to ``[n]``.
        maze: the maze of the environment, ``env.unwrapped.maze``.
        trajectories: flat observations ``[length + 1, D]`` of one or more episodes.
        png: the picture to write.
        title: of the picture.
    """
    free = np.array([[cell != 1 for cell in row] for row in maze.maze_map])
    pixels = np.kron(free, np.ones((PIXELS_PER_CELL, PIXELS_PER_CELL), dtype=bool))
    size = maze.maze_size_scaling / PIXELS_PER_CELL
    row, column = np.nonzero(pixels)
    positions = np.stack(
        [(column + 0.5) * size - maze.x_map_center, maze.y_map_center - (row + 0.5) * size], axis=1
    )
    at_rest = trajectories[0][0]
    observations = np.tile(at_rest, (len(positions), 1)).astype(np.float32)
    observations[:, :2] = positions
    told = not isinstance(maze, Map) or len(at_rest) > 29
    goal = at_rest[2:4] if told else maze.goal
    if np.array_equal(at_rest[4:6], at_rest[:2]):  # The point mass's body has its position, too.
        observations[:, 4:6] = positions
    values = np.full(pixels.shape, np.nan)
    values[pixels] = value(observations)

    height, width = pixels.shape
    figure = Figure(figsize=(6.4, 5.2 * height / width + 0.5), layout="constrained")
    _entitle(figure, title)
    axes = figure.add_subplot()
    image = axes.imshow(
        values,
        cmap=colormaps["viridis"].with_extremes(bad=SLATE),
        extent=(
            -maze.x_map_center,
            width * size - maze.x_map_center,
            maze.y_map_center - height * size,
            maze.y_map_center,
        ),
    )
    outline = [withStroke(linewidth=2.4, foreground=SLATE)]
    for trajectory in trajectories:
        axes.plot(*trajectory[:, :2].T, color="white", lw=1.2, path_effects=outline)
    marker = {"color": RED, "edgecolors": "white", "zorder": 3}
    starts = np.stack([trajectory[0, :2] for trajectory in trajectories])
    axes.scatter(starts[:, 0], starts[:, 1], s=40, label="start", **marker)
    axes.scatter(*goal, s=250, marker="*", label="goal", **marker)
    axes.set_axis_off()
    figure.colorbar(image, label="V(s)", shrink=0.8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(png, dpi=DPI)
