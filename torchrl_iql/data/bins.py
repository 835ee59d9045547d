"""Where the bins of a histogram lie, of whatever numbers data hold."""

from __future__ import annotations

import numpy as np

__all__ = ["BINS", "EDGE", "bin_edges"]

BINS = 40
"""Of a histogram of data."""

EDGE = 0.01
"""Share of the range of actions that counts as their bound."""


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
