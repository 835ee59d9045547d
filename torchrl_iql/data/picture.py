"""What is in a data set, as a page of histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchrl_iql.data.bins import BINS, bin_edges, share_at_bounds

if TYPE_CHECKING:
    from torchrl_iql.data.dataset import OfflineDataset

__all__ = ["page"]

BLUE = "#2a6f97"
SLATE = "#2f3640"
RED = "#e63946"
DPI = 150
DIMENSIONS = 12
"""Dimensions of actions that are drawn, a panel each, six in a row."""
PER_LINE = 6
ROWS = 20_000
"""Transitions, evenly spread, that the quantiles of observations are taken of."""
MANY = 1000
"""Values of which the numbers are drawn on a logarithmic scale."""


def page(dataset: OfflineDataset) -> Figure:
    """Draw returns, lengths, rewards, actions beside their bounds, and the ranges of observations.

    Args:
        dataset: with at least one transition.

    Returns:
        the page, to be saved by ``page.savefig("data.png")``.

    Raises:
        ValueError: there are no transitions.
    """
    if not len(dataset.transitions):
        raise ValueError(f"{dataset.name}: there are no transitions to draw")
    space = dataset.action_space
    dimensions = 1 if isinstance(space, Discrete) else dataset.transitions["action"].shape[-1]
    lines = -(-min(dimensions, DIMENSIONS) // PER_LINE)
    figure = Figure(figsize=(11, 2.3 * (lines + 2) + 1.1), dpi=DPI, layout="constrained")
    figure.suptitle(_title(dataset), fontsize=11, color=SLATE)
    parts: Any = figure.subfigures(3, 1, height_ratios=[1, lines, 1.15])
    rewards = dataset.transitions["next", "reward"].flatten().numpy()
    rule = "" if dataset.reward_rule == "none" else f", {dataset.reward_rule}"
    for axes, (name, values) in zip(
        parts[0].subplots(1, 3),
        {
            "return of an episode": dataset.episode_returns.numpy(),
            "steps of an episode": dataset.episode_lengths.numpy(),
            f"reward of a step{rule}": rewards,
        }.items(),
        strict=True,
    ):
        _histogram(axes, values, name)
    if isinstance(space, Discrete):
        _categories(parts[1].subplots(), dataset)
    else:
        assert isinstance(space, Box)
        across = max(3, -(-min(dimensions, DIMENSIONS) // lines))
        panels = parts[1].subplots(lines, across, squeeze=False)
        _actions(panels.ravel().tolist(), dataset, space, dimensions)
    _observations(parts[2].subplots(), dataset)
    return figure


def _title(dataset: OfflineDataset) -> str:
    terminated = int(dataset.transitions["next", "terminated"].sum())
    episodes = len(dataset.episode_lengths)
    return (
        f"{dataset.name}: {len(dataset.transitions):,} transitions, {episodes:,} episodes, of which "
        f"{terminated:,} terminate"
    )


def _styled(axes: Axes, name: str) -> None:
    axes.set_title(name, fontsize=9, loc="left", color=SLATE)
    axes.tick_params(labelsize=7, colors=SLATE)
    axes.spines[["top", "right"]].set_visible(False)


def _histogram(axes: Axes, values: np.ndarray, name: str) -> None:
    values = values.astype(np.float64)
    axes.hist(values, bin_edges(values, BINS), color=BLUE)  # pyright: ignore
    axes.axvline(values.mean(), color=SLATE, lw=1, ls=":")
    if len(values) > MANY:  # a few of them matter, too
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=bool((values % 1 == 0).all())))
    _styled(axes, f"{name}: {values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}")


def _categories(axes: Axes, dataset: OfflineDataset) -> None:
    counts = dataset.transitions["action"].bincount(minlength=int(dataset.action_space.n))  # pyright: ignore
    axes.bar(np.arange(len(counts)) + dataset.action_space.start, counts.numpy(), color=BLUE)  # pyright: ignore
    axes.locator_params(axis="x", integer=True)
    _styled(axes, "actions taken")


def _actions(panels: list[Axes], dataset: OfflineDataset, space: Box, dimensions: int) -> None:
    actions = dataset.transitions["action"].numpy().astype(np.float64)
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    for i, axes in enumerate(panels):
        if i >= min(dimensions, DIMENSIONS):
            axes.set_visible(False)
            continue
        values, bounds = actions[:, i], np.array([low[i], high[i]])
        is_bounded = bool(np.isfinite(bounds).all())
        edges = bin_edges(values, BINS, tuple(bounds) if is_bounded else None)
        axes.hist(values, edges, color=BLUE)  # pyright: ignore
        name = f"action {i}"
        if is_bounded:
            for bound in bounds:
                axes.axvline(bound, color=RED, lw=1)
            name += f": {share_at_bounds(values, *bounds):.0%} at bounds"
        else:
            name += ": no bounds"
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        _styled(axes, name)
    if dimensions > DIMENSIONS:
        panels[DIMENSIONS - 1].set_xlabel(
            f"and {dimensions - DIMENSIONS} more", fontsize=8, color=SLATE
        )


def _observations(axes: Axes, dataset: OfflineDataset) -> None:
    rows = dataset.transitions["observation"]
    lowest, highest = (each.flatten().numpy().astype(np.float64) for each in rows.aminmax(dim=0))
    some = rows[:: max(1, len(rows) // ROWS)].flatten(1).numpy().astype(np.float32)
    low, median, high = np.quantile(some, [0.01, 0.5, 0.99], axis=0)
    columns = np.arange(len(lowest))
    axes.vlines(columns, lowest, highest, color=BLUE, alpha=0.35, lw=1)
    axes.vlines(columns, low, high, color=BLUE, lw=min(5, 400 / len(columns)))
    axes.plot(columns, median, ls="", marker="_", color=RED, markersize=5)
    axes.set_xlim(-0.7, len(columns) - 0.3)
    axes.locator_params(axis="x", integer=True)
    largest = max(1e-9, float(np.abs([lowest, highest]).max()))
    spread = np.abs([low, high]).max(0)
    if largest > 20 * max(1e-9, float(np.median(spread))):
        axes.set_yscale("symlog", linthresh=max(1e-9, float(np.median(spread))))
    axes.axhline(0, color=SLATE, lw=0.5)
    axes.set_xlabel("column", fontsize=8, color=SLATE)
    constant = int((lowest == highest).sum())
    _styled(
        axes,
        "observations: thick from 1% to 99%, thin from lowest to highest, red the median"
        + (f"; {constant} of {len(columns)} columns are constant" if constant else ""),
    )
