"""Figures as SVG inside of the page: text stays text, in the colours of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from torchrl_iql_recipes.experiment.curves import Curve, band
from torchrl_iql_recipes.experiment.results import FEWEST
from torchrl_iql_recipes.reporting.compare import Group

__all__ = ["DASHES", "PLACE", "SERIES", "curves", "histogram", "intervals", "ranges"]

INK, LINE = "#0000f0", "#0000f1"
SERIES = 8
"""Colours of the page; further series begin again, with other dashes."""

DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
"""Of a line, so that it is told from others without its colour."""

POINTS = 150
"""Of a line; longer ones are drawn as means of neighbours."""

SIZE = (4.4, 2.7)
SMALL = (2.7, 1.6)
LONGEST = 22
"""Letters of a name in a figure."""

_VARIABLES = {INK: "var(--ink)", LINE: "var(--line)"} | {
    f"#00000{i + 1}": f"var(--series-{i + 1})" for i in range(SERIES)
}


def colour(index: int) -> str:
    return f"#00000{index % SERIES + 1}"


def dashes(index: int) -> Any:
    """Return the pattern of a series."""
    its = DASHES[(index + index // SERIES) % len(DASHES)]
    return (0, its) if its else "-"


def curves(
    lines: Mapping[int, Sequence[Curve]],
    *,
    name: str,
    unit: str,
    x: str = "gradient steps",
    switch: float | None = None,
) -> str:
    """Draw a metric: a line for each series, from three seeds on their mean with its interval.

    Args:
        lines: the curves of the seeds, by the number of the series.
        name: of the metric, for who can not see it.
        unit: of the values.
        x: name of the steps.
        switch: the step where the offline phase ends, to mark by a line.
    """
    with _drawn(SIZE, name) as (axes, done):
        last = 0.0
        for index, seeds in lines.items():
            style = {"color": colour(index), "linestyle": dashes(index)}
            for steps, values, half in _of_seeds(seeds):
                last = max(last, float(steps[-1]))
                few = len(steps) <= 40
                axes.plot(steps, values, lw=1.8, marker="o" if few else None, ms=3, **style)
                if half is not None:
                    edges = values - half, values + half
                    axes.fill_between(steps, *edges, color=style["color"], alpha=0.18, lw=0)
        if switch is not None:
            axes.axvline(switch, color=INK, lw=1, ls=":")
        axes.set_xlim(0, 1.02 * last or 1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(nbins=5)
        axes.set_xlabel(x)
        axes.set_ylabel(unit)
    return done[0]


def _of_seeds(seeds: Sequence[Curve]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    its = band(seeds) if len(seeds) >= FEWEST else None
    if its is not None and its.half is not None and len(its.steps):
        yield _thinned(its.steps, its.mean, its.half)
        return
    for steps, values in seeds:
        if len(steps):
            yield (*_thinned(steps, values)[:2], None)


def _thinned(*arrays: np.ndarray) -> Any:
    """Replace neighbours by their mean, where there are more points than can be seen."""
    width = -(-len(arrays[0]) // POINTS)
    if width <= 1:
        return arrays if len(arrays) > 2 else (*arrays, None)
    cuts = np.arange(0, len(arrays[0]), width)
    counts = np.diff([*cuts, len(arrays[0])])
    thin = [np.add.reduceat(its, cuts) / counts for its in arrays]
    return thin if len(thin) > 2 else (*thin, None)


def intervals(groups: Sequence[tuple[int, Group]], *, name: str, unit: str) -> str:
    """Draw the scores of the seeds of each group, their mean, and its 95% interval.

    Args:
        groups: each with the number of its series; those without scores are left out.
        name: of what is shown, for who can not see it.
        unit: of the scores.
    """
    known = [(index, its) for index, its in groups if its.scores]
    with _drawn((SIZE[0], 0.75 + 0.42 * len(known)), name) as (axes, done):
        for row, (index, its) in enumerate(known):
            assert its.mean is not None
            if its.half is not None:
                ends = [its.mean - its.half, its.mean + its.half]
                axes.plot(
                    ends, [row, row], color=colour(index), lw=6, alpha=0.3, solid_capstyle="butt"
                )
            axes.plot(its.values, [row] * len(its.values), "|", color=colour(index), ms=11, mew=1.2)
            axes.plot(its.mean, row, "o", color=colour(index), ms=6)
        every = [score for _, its in known for score in its.values]
        if len(known) and max(every) == min(every):
            axes.set_xlim(every[0] - 1, every[0] + 1)
        axes.set_yticks(range(len(known)), short([its.label for _, its in known]))
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)
    return done[0]


def ranges(rows: Mapping[str, tuple[float, float, float]], *, name: str, unit: str) -> str:
    """Draw a value and its interval, a row each.

    Args:
        rows: value, and the ends of the interval, NaN without one, by label.
        name: of what is shown.
        unit: of the values.
    """
    with _drawn((SIZE[0], 0.75 + 0.42 * len(rows)), name) as (axes, done):
        for row, (value, low, high) in enumerate(rows.values()):
            axes.plot(
                [low, high], [row, row], color=colour(0), lw=6, alpha=0.3, solid_capstyle="butt"
            )
            axes.plot(value, row, "o", color=colour(0), ms=6)
        axes.set_yticks(range(len(rows)), short(list(rows)))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.1)
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
    return done[0]


def histogram(
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    name: str,
    bounds: Sequence[float] | None = None,
    x: str = "",
    y: str = "",
) -> str:
    """Draw counts in bins of the same width.

    Args:
        counts: of each bin.
        edges: the first and the last.
        name: of what is counted.
        bounds: values to mark by lines.
        x: name of the values.
        y: name of what is counted.
    """
    with _drawn(SMALL, name) as (axes, done):
        its = np.asarray(counts, dtype=float)
        axes.stairs(its, np.linspace(*edges, len(its) + 1), fill=True, color=colour(0))
        large = its.max() > 100 * max(1.0, its[its > 0].min()) if (its > 0).any() else False
        if large and y:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for bound in bounds or ():
            axes.axvline(bound, color=INK, lw=1, ls=":")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if y:
            axes.set_ylabel(f"{y}, log" if large else y)
        else:
            axes.set_yticks([])
        if not large:
            axes.locator_params(axis="y", nbins=4)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x)
        axes.grid(visible=False)
    return done[0]


def short(names: Sequence[str]) -> list[str]:
    """Cut names to what a figure has room for, at the end, before it, or not at all: none become alike."""
    half = LONGEST // 2
    at_the_end = [_cut(each, LONGEST - 1, 0) for each in names]
    before_it = [_cut(each, half - 1, LONGEST - half) for each in names]
    ways = (at_the_end, before_it, list(names))
    return next(its for its in ways if len({*its}) == len({*names}))


def _cut(text: str, first: int, last: int) -> str:
    return text if len(text) <= LONGEST else f"{text[:first]}…{text[len(text) - last :]}"


@contextmanager
def _drawn(size: tuple[float, float], name: str) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw in; when they are left, the list holds the SVG."""
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # names are not to be read as formulas
        "font.size": 10,
        "axes.labelsize": 9.5,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": LINE,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    done: list[str] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        yield axes, done
        _place(figure, axes)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    done.append(_inline(file.getvalue(), name))


def _place(figure: Figure, axes: Axes) -> None:
    """Leave as much room as words and numbers need; a layout that is found by drawing takes long."""
    width, height = figure.get_size_inches()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    left = 0.14 + max(map(_inches, labels), default=0) + 0.27 * bool(axes.get_ylabel())
    bottom = 0.27 + 0.2 * bool(axes.get_xlabel())
    figure.subplots_adjust(left / width, bottom / height, 1 - 0.15 / width, 1 - 0.08 / height)


def _inches(text: str) -> float:
    """Return about how long a word is, whatever font a browser takes; capitals and signs are wide."""
    return sum(0.105 if each.isupper() or each in "+=%mw…" else 0.08 for each in text)


PLACE = "\0"
"""Stands before the names in a figure, for the page to put the number of the figure there."""


def _inline(svg: str, name: str) -> str:
    """Take what belongs into a page, in the colours of the page."""
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))

    def tag(match: re.Match[str]) -> str:
        its = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", match[0])
        its = re.sub(r'(href="#|url\(#| id=")', rf"\g<1>{PLACE}", its)
        its = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", its)
        for known, variable in _VARIABLES.items():
            its = its.replace(known, variable)
        return its

    svg = re.sub(r"<[^>]+>", tag, svg)  # what is between them is text
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="[^"]+"', svg)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(name)}">{body.strip()}'
