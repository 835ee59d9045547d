"""Where the bins of a histogram lie, of whatever numbers data hold, and how many actions lie at bounds."""

from __future__ import annotations

import numpy as np

__all__ = ["BINS", "bin_edges", "share_at_bounds"]

BINS = 40
"""Of a histogram of data."""

EDGE = 0.01
"""Of the range of actions: what is as near to a bound is at it."""


def share_at_bounds(
    actions: np.ndarray, low: np.ndarray | float, high: np.ndarray | float
) -> float:
    """Return the share of actions, each dimension by itself, that are at a bound.

    Args:
        actions: ``[n]`` or ``[n, A]``.
        low: the finite bounds, of one dimension or ``[A]``.
        high: likewise.
    """
    margin = EDGE * (np.asarray(high, np.float64) - low)
    return float(((actions <= low + margin) | (actions >= high - margin)).mean())


def bin_edges(
    values: np.ndarray, number: int, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """Return the edges of bins of the same width, ``[number + 1]`` float64.

    NumPy makes none of values that differ by less than so many of their last digits, as rewards that are all
    1e30: these get a range that is wide enough.

    Args:
        values: finite, at least one.
        number: of bins.
        limits: the lowest and the highest edge; None: of the values.
    """
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    least = 2 * number * float(np.spacing(max(abs(low), abs(high))))
    if high - low < least:
        low, high = low - max(0.5, least), high + max(0.5, least)
    return np.linspace(low, high, number + 1)
