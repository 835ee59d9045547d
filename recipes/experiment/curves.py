"""The lines of ``metrics.csv`` as curves, and what several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from torchrl_iql_recipes.experiment.results import FEWEST
from torchrl_iql_recipes.files import rows

__all__ = ["Band", "Curve", "Curves", "band", "in_file", "unit"]

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values, ``[n]`` each."""

Curves = dict[str, Curve]
"""By metric."""

UNITS = {
    "score": "normalized score, or return",
    "normalized_score": "0 random, 100 expert",
    "return": "sum of rewards",
    "episode_return": "sum of rewards",
    "length": "steps of an episode",
    "episode_length": "steps of an episode",
    "success": "share of episodes",
    "failed": "1: it failed",
    "clip_fraction": "share of the weights",
    "effective_sample_size": "share of a batch",
    "offline_share": "share of a batch",
    "actions_at_bounds": "share of the actions",
    "entropy": "nats",
    "log_likelihood": "nats",
    "q_correlation": "Spearman's rho",
    "policy_lr": "learning rate",
    "frames": "environment steps",
    "value": "discounted return",
    "qvalue": "discounted return",
    "initial_value": "discounted return",
    "advantage": "discounted return",
    "advantage_10": "discounted return",
    "advantage_50": "discounted return",
    "advantage_90": "discounted return",
    "q_bias": "discounted return",
    "td_error": "discounted return",
}
"""Of metrics, by their names without ``eval/`` or ``validation/``. Losses have none that say something."""


@dataclass(frozen=True)
class Band:
    """A mean over seeds, where all of them have a value.

    Attributes:
        steps: ``[n]``.
        mean: ``[n]``.
        half: half the width of the 95% interval, Student's t, ``[n]``; None for fewer than three seeds.
        seeds: how many.
    """

    steps: np.ndarray
    mean: np.ndarray
    half: np.ndarray | None
    seeds: int


def in_file(metrics_csv: Path) -> Curves:
    """Read the curves of a learner; cells that are empty or no number are left out.

    Args:
        metrics_csv: has a column ``step`` and one per metric. A line that is being written is left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows(metrics_csv):
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, cell in row.items():
            value = None if name in (None, "step") else _number(cell)
            if value is not None:
                found.setdefault(name, []).append((step, value))
    return {name: (its[0], its[1]) for name, its in ((n, np.array(f).T) for n, f in found.items())}


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) and cell else None
    except ValueError:
        return None


def band(curves: Sequence[Curve]) -> Band:
    """Compute the mean over seeds, and its interval.

    Args:
        curves: the same metric of one or more seeds.
    """
    each: list[Mapping[float, float]] = [
        dict(zip(steps, values, strict=True)) for steps, values in curves
    ]
    common = sorted(set.intersection(*(set(its) for its in each)))
    values = np.array([[its[step] for step in common] for its in each], dtype=float)
    seeds = len(curves)
    half = None
    if seeds >= FEWEST:
        half = stdtrit(seeds - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return Band(np.array(common, dtype=float), values.mean(axis=0), half, seeds)


def unit(metric: str) -> str:
    """Return what a metric is counted in; empty where its name says all there is."""
    return UNITS.get(metric.rpartition("/")[2], "")
