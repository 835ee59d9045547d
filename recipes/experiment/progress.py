"""What a run shows of its learners while it lasts, in lines of 100 columns.

A mean is one over seeds: over different settings it would say nothing of any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from tqdm import tqdm

from torchrl_iql_recipes.experiment.schema import rounded, written
from torchrl_iql_recipes.experiment.settings import Settings

__all__ = ["bar", "clipped", "figures"]

ROOM = 46
"""Columns for figures beside what tqdm writes of a run of hours, with a title of three letters."""

MANY = 0.2
"""Share of clipped weights from which on the best actions are hardly told from good ones."""


IN_LOGS = 10.0
"""Seconds between two states of a bar that is written to a file, where every one of them stays."""


def bar(title: str, done: int, end: int, *, leave: bool = True) -> tqdm:
    """Make the progress bar of steps, of which some are done."""
    pause = 0.1 if sys.stderr.isatty() else IN_LOGS
    return tqdm(
        desc=title,
        initial=done,
        total=end,
        unit="step",
        unit_scale=True,
        leave=leave,
        mininterval=pause,
    )


def figures(
    settings: Settings, losses: Mapping[str, Sequence[float]], scores: Sequence[float] | None
) -> str:
    """Write scores as detailed as there is room: of each learner, or of each combination of settings.

    Without scores, and beside them if there is room, the losses of learners that differ in their seeds only.

    Args:
        settings: of the run.
        losses: of every learner, by name.
        scores: of every learner, None before the first evaluation.
    """
    room = ROOM + 3 - len(settings.algorithm.title)
    axes = list(settings.varied())
    shown = [] if axes else [f"{name} {mean(values):.3g}" for name, values in losses.items()]
    if scores is None:
        return ", ".join(shown)
    score = _scores(settings, axes, scores, room)
    text = f"{score}; {', '.join(shown)}"
    return text if shown and len(text) <= room else score


def _scores(settings: Settings, axes: Sequence[str], scores: Sequence[float], room: int) -> str:
    seeds = len({learner.seed for learner in settings.learners})
    each = _labelled("score", [*axes, "seed"], _means(settings, [*axes, "seed"], scores))
    if seeds > 1 and len(each) <= room:
        return each
    found, note = _means(settings, axes, scores), f" ({seeds} seeds)" if seeds > 1 else ""
    text = _labelled("score", axes, found) + note
    while len(text) > room and len(found) > 1:
        del found[min(found, key=found.__getitem__)]
        text = _labelled("best", axes, found) + note
    return text


def _means(settings: Settings, axes: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Return the mean over the learners that agree along some axes, by what they have there."""
    found: dict[str, list[float]] = {}
    for learner, value in zip(settings.learners, values, strict=True):
        its = learner.settings()
        found.setdefault("/".join(written(its[axis]) for axis in axes), []).append(value)
    return {label: mean(several) for label, several in found.items()}


def _labelled(name: str, axes: Sequence[str], values: Mapping[str, float]) -> str:
    if not axes:
        return f"{name} {rounded(values[''])}"
    each = (f"{label}: {rounded(value)}" for label, value in values.items())
    return f"{name} by {'/'.join(axes)} {', '.join(each)}"


def clipped(settings: Settings, steps: int, shares: Sequence[float]) -> Iterator[str]:
    """Say for each combination of settings how many of its weights are clipped, and what to do if many are.

    Args:
        settings: of the run.
        steps: taken so far.
        shares: of each learner's weights.
    """
    algorithm, axes = settings.algorithm, list(settings.varied())
    for label, share in _means(settings, axes, shares).items():
        where = f" at {'/'.join(axes)} {label}" if axes else ""
        advice = "; give a smaller temperature, or the task's reward rule" if share > MANY else ""
        yield (
            f"after {steps} steps {share:.0%} of {algorithm.title}'s weights reach "
            f"weight_clip={algorithm.weight_clip:g}{where}{advice}"  # pyright: ignore
        )
