"""What scores of several tasks and seeds say together, by rliable; and the pictures of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from torchrl_iql_recipes.comparison.plan import Cell, Plan
from torchrl_iql_recipes.experiment.plots import BLUE, DPI, RED, SEEDS, SLATE
from torchrl_iql_recipes.experiment.results import FEWEST

__all__ = ["Aggregates", "curves", "draw_aggregates", "of", "over"]

SAMPLES = 2000
"""Of the bootstrap, stratified by task."""

Scores = dict[str, np.ndarray]
"""By algorithm, normalized scores ``[seeds, tasks]``."""


class Aggregates:
    """Algorithms over the tasks that all of them have finished.

    Attributes:
        tasks: these.
        seeds: of each.
        means: by algorithm the interquartile mean, and the ends of its 95% interval, NaN for too few seeds.
        improvement: by algorithm how probable it is that the last one is better, with the interval.
        thresholds: of the profiles, ``[T]``.
        profiles: by algorithm the share of runs with at least so much, and the interval, ``[3, T]``.
    """

    def __init__(self, tasks: Sequence[str], scores: Scores) -> None:
        from rliable import library, metrics

        self.tasks = list(tasks)
        self.seeds = min(len(its) for its in scores.values())
        *others, best = scores
        pairs = {other: (scores[best], scores[other]) for other in others}
        highest = max(float(its.max()) for its in scores.values())
        self.thresholds = np.linspace(0, max(100.0, highest), 51)
        with _own_chance():
            means, intervals = library.get_interval_estimates(
                scores, lambda its: np.array([metrics.aggregate_iqm(its)]), reps=SAMPLES
            )
            profiles, bands = library.create_performance_profile(
                scores, self.thresholds, reps=SAMPLES // 10
            )
            better, ranges = library.get_interval_estimates(
                pairs, metrics.probability_of_improvement, reps=SAMPLES
            )
        known = self.seeds >= FEWEST

        def with_interval(value: Any, interval: np.ndarray) -> tuple[float, float, float]:
            low, high = np.ravel(interval) if known else (np.nan, np.nan)
            return float(np.ravel(value)[0]), float(low), float(high)

        self.means = {name: with_interval(means[name], intervals[name]) for name in scores}
        self.improvement = {name: with_interval(better[name], ranges[name]) for name in pairs}
        self.profiles = {name: np.stack([profiles[name], *bands[name]]) for name in scores}


@contextmanager
def _own_chance() -> Iterator[None]:
    """Draw the same samples every time: rliable draws from NumPy's global generator."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


def of(plan: Plan) -> Aggregates | None:
    """Take together the tasks that every algorithm of the aggregates has finished; None without any.

    Returns are of another scale in every task: those without normalized scores are left out.
    """
    names = [
        name for name in plan.compared if any(_counts(plan, task, name) for task in plan.tasks)
    ]
    found: dict[str, dict[str, list[float]]] = {}
    for task in plan.tasks:
        its = {name: _counts(plan, task, name) for name in names}
        if all(its.values()) and len({len(each) for each in its.values() if each}) == 1:
            found[task] = {name: each for name, each in its.items() if each}
    return over(found, names) if found else None


def over(
    found: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str] = ()
) -> Aggregates:
    """Take tasks together, with as many seeds of each as all of them have.

    Args:
        found: by task and by algorithm the normalized score of each seed.
        names: of the algorithms, of which the last one is compared with the others; if none are given, by
            their means, the highest last.
    """
    each = [found[task] for task in found]
    seeds = min(len(values) for its in each for values in its.values())
    scores = {name: np.array([its[name][:seeds] for its in each]).T for name in names or each[0]}
    if not names:
        scores = dict(sorted(scores.items(), key=lambda its: float(its[1].mean())))
    return Aggregates(list(found), scores)


def _counts(plan: Plan, task: str, algorithm: str) -> list[float] | None:
    cell = plan.cell(task, algorithm)
    if cell is None or cell.is_beside or not cell.is_normalized:
        return None
    return cell.scores()


def draw_aggregates(its: Aggregates, titles: Mapping[str, str], png: Path) -> None:
    """Draw interquartile means, the probability of improvement, and performance profiles."""
    names, colours = list(its.means), _colours(list(titles))
    figure = Figure(figsize=(11, 1.3 + 0.35 * len(names)), dpi=DPI, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    best = names[-1]
    for axes, values, title in (
        (left, its.means, "interquartile mean of the normalized score"),
        (middle, its.improvement, f"probability that {titles[best]} is better"),
    ):
        for row, (name, (value, low, high)) in enumerate(values.items()):
            colour = colours[name] if name == best else SLATE
            axes.plot([low, high], [row, row], color=colour, linewidth=6, alpha=0.35)
            axes.plot(value, row, "o", color=colour)
        axes.set_yticks(range(len(values)), [titles[name] for name in values])
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.2)
    middle.axvline(0.5, color=SLATE, linestyle=":", linewidth=1)
    middle.set_xlim(0, 1)
    for name in names:
        share, low, high = its.profiles[name]
        right.plot(its.thresholds, share, color=colours[name], label=titles[name])
        right.fill_between(its.thresholds, low, high, color=colours[name], alpha=0.12, linewidth=0)
    right.set(xlabel="normalized score", ylim=(-0.02, 1.02))
    right.set_title("share of runs with at least this score", fontsize=9)
    right.legend(fontsize=7)
    figure.savefig(png)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Return the colour of each algorithm, the same in all pictures: IQL's is blue."""
    others = itertools.cycle([*SEEDS[1:], "#8d99ae", "#b56576", "#6d597a"])
    return {name: BLUE if name == "iql" else next(others) for name in names}


def curves(plan: Plan, titles: Mapping[str, str], png: Path) -> None:
    """Draw the scores on the way, a panel for each task: the mean over seeds, and their range."""
    tasks = [
        task for task in plan.tasks if any(_curve(plan.cell(task, a)) for a in plan.algorithms)
    ]
    if not tasks:
        return
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.8 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    online = any(cell.env_steps for cell in plan.cells)
    xlabel = "gradient steps; past the line online" if online else "gradient steps"
    colours = _colours(plan.algorithms)
    for panel, task in zip(panels, tasks, strict=False):
        for name in plan.algorithms:
            cell = plan.cell(task, name)
            if cell is None or not (found := _curve(cell)):
                continue
            steps = np.array(sorted(found))
            values = [found[step] for step in steps]
            style = ":" if cell.is_beside else "-"
            label = titles[name] + ("*" if cell.is_beside else "")
            panel.plot(steps, [np.mean(v) for v in values], style, color=colours[name], label=label)
            low, high = [min(v) for v in values], [max(v) for v in values]
            panel.fill_between(steps, low, high, color=colours[name], alpha=0.12, linewidth=0)
            if cell.env_steps:
                panel.axvline(cell.steps, color=RED, linestyle=":", linewidth=1)
        panel.set_title(task, fontsize=9)
        cells = [cell for name in plan.algorithms if (cell := plan.cell(task, name)) is not None]
        is_normalized = all(cell.is_normalized for cell in cells)
        panel.set(xlabel=xlabel, ylabel="normalized score" if is_normalized else "return")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in panels[len(tasks) :]:
        panel.axis("off")
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    shown = [line for label, line in lines.items() if not str(label).startswith("_")]
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(png)


def _curve(cell: Cell | None) -> dict[int, list[float]]:
    """Return the scores of all seeds by step, of the steps that all of them have."""
    if cell is None:
        return {}
    each = list(cell.curves().values())
    steps = set.intersection(*(set(its) for its in each))
    return {step: [its[step] for its in each] for step in steps}
