"""Every finite column has a histogram."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_iql.data.bins import bin_edges


@pytest.mark.parametrize(
    "values",
    [
        *([1e30] * 3, [0.0], [-7.0], [1.0, 1.0 + 1e-15], [1e30, 1e30 * (1 + 1e-7)]),
        *([1.0, 2.0, 4.0], [-3e38, 3e38], [0.0, 1e-300], [16777216.0, 16777217.0]),
    ],
)
def test_every_value_is_in_a_bin(values: list[float]) -> None:
    given = np.array(values)
    edges = bin_edges(given, 40)
    assert len(edges) == 41 and (np.diff(edges) > 0).all()
    counts, _ = np.histogram(given, edges)
    assert counts.sum() == len(values)


def test_where_numpy_makes_bins_they_are_these() -> None:
    given = np.random.default_rng(0).normal(size=100)
    for limits in (None, (-1.0, 0.5)):
        expected = np.histogram_bin_edges(given, 40, range=limits)
        np.testing.assert_allclose(bin_edges(given, 40, limits), expected)
    np.testing.assert_allclose(bin_edges(np.ones(3), 40), np.histogram_bin_edges(np.ones(3), 40))
