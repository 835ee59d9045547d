"""What a run has learned from, in few numbers: ``data.json``, for whoever has the run and not the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import Box

from torchrl_iql.data.bins import BINS, bin_edges, share_at_bounds
from torchrl_iql_recipes.files import whole

if TYPE_CHECKING:
    from torchrl_iql import OfflineDataset

__all__ = ["FILE", "summary", "write"]

FILE = "data.json"

VERSION = 1

DIMENSIONS = 12
"""Dimensions of actions that are counted, the first ones."""

ROWS = 20_000
"""Transitions, evenly spread, of which the actions are counted."""


def write(
    path: Path, dataset: OfflineDataset, learned: OfflineDataset, held_out: OfflineDataset | None
) -> None:
    """Write the summary in the folder of a run, whole or not at all; the same whenever the run goes on.

    Args:
        path: the folder.
        dataset: what may be learned from. Nothing is written of one without transitions.
        learned: what the algorithm has made of it.
        held_out: what is not learned from, if anything.
    """
    if not len(dataset.transitions):
        return
    with whole(path / FILE) as new:
        new.write_text(json.dumps(summary(dataset, learned, held_out)) + "\n")


def summary(
    dataset: OfflineDataset, learned: OfflineDataset, held_out: OfflineDataset | None = None
) -> dict[str, Any]:
    """Count returns, lengths, rewards and actions.

    It reads all rewards once and at most 20,000 actions, also of data that stay on disk.

    Args:
        dataset: with at least one transition.
        learned: what the algorithm has made of it.
        held_out: what is not learned from, if anything.

    Returns:
        plain values. ``returns`` are sums of raw rewards, and ``rewards`` as the losses read them. A
        histogram has ``counts``, in bins of the same width between ``edges``, ``mean``, ``lowest`` and
        ``highest``.
    """
    rows, space = dataset.transitions, dataset.action_space
    actions = rows["action"][:: max(1, len(rows) // ROWS)].numpy()
    if isinstance(space, Box):
        low, high = (each.ravel().astype(float) for each in (space.low, space.high))
        taken = actions.reshape(len(actions), -1).astype(float)
        columns = range(min(taken.shape[1], DIMENSIONS))
        its = {
            "dimensions": taken.shape[1],
            "columns": [_action(taken[:, i], low[i], high[i]) for i in columns],
        }
    else:
        counts = np.bincount(actions.ravel(), minlength=int(space.n))  # pyright: ignore
        its = {"dimensions": 1, "first": int(space.start), "categories": counts.tolist()}  # pyright: ignore
    return {
        "version": VERSION,
        "dataset": dataset.name,
        "environment": None if dataset.env_spec is None else dataset.env_spec.id,
        "transitions": len(rows),
        "learned_transitions": len(learned.transitions),
        "recorded_transitions": dataset.recording.transitions,
        "episodes": len(dataset.episode_lengths),
        "held_out_transitions": 0 if held_out is None else len(held_out.transitions),
        "held_out_episodes": 0 if held_out is None else len(held_out.episode_lengths),
        "terminated": int(rows["next", "terminated"].sum()),
        "observation": list(rows["observation"].shape[1:]),
        "reward": dataset.reward_rule,
        "reward_transform": str(dataset.reward_transform),
        "returns": _histogram(dataset.episode_returns.numpy()),
        "lengths": _histogram(dataset.episode_lengths.numpy()),
        "rewards": _histogram(rows["next", "reward"].flatten().numpy()),
        "actions": its,
    }


def _action(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    if not np.isfinite([low, high]).all():
        return {**_histogram(values), "bounds": None, "at_bounds": None}
    its = _histogram(values, (min(low, values.min()), max(high, values.max())))
    return {**its, "bounds": [low, high], "at_bounds": share_at_bounds(values, low, high)}


def _histogram(values: np.ndarray, limits: tuple[float, float] | None = None) -> dict[str, Any]:
    values = values.astype(np.float64)
    counts, edges = np.histogram(values, bin_edges(values, BINS, limits))
    return {
        "mean": float(values.mean()),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "edges": [float(edges[0]), float(edges[-1])],
        "counts": counts.tolist(),
    }
