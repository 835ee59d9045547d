"""What a run has learned from, in few numbers: ``data.json``, for whoever has the run and not the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import Box

from torchrl_iql.data.bins import BINS, bin_edges, share_at_bounds
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import argument
from torchrl_iql_recipes.files import whole

if TYPE_CHECKING:
    from torchrl_iql import OfflineDataset

__all__ = ["FILE", "check", "summary", "write"]

FILE = "data.json"

VERSION = 1

DIMENSIONS = 12
"""Dimensions of actions that are counted, the first ones."""

ROWS = 20_000
"""Transitions, evenly spread, of which the actions are counted."""


def check(path: Path, its: Mapping[str, Any]) -> None:
    """Refuse to go on with a run on other data than those that it has learned from.

    Args:
        path: its folder.
        its: the :func:`summary` of the data.

    Raises:
        SettingsError: there are checkpoints of a run, and its summary says otherwise; it names what differs.
    """
    saved = next((file for name in ("last.ckpt", "*.torchrl") for file in path.rglob(name)), None)
    try:
        before, after = (_figures(of) for of in (json.loads((path / FILE).read_text()), its))
    except (OSError, ValueError, AttributeError):  # of an earlier version, or damaged
        return
    differ = [name for name in before if name in after and not _same(before[name], after[name])]
    if differ and saved is not None:
        told = ", ".join(f"{name} {before[name]:.7g}, not {after[name]:.7g}" for name in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise SettingsError(
            f"{path}: the data have changed, its run has learned from others, with {told}{more}: "
            f"{argument('checkpoint', saved)} begins a new run from it"
        )


def _figures(its: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary that another version of this project would find, too."""
    counted = {key: each for key, each in its.items() if isinstance(each, int) and key != "version"}
    return counted | {
        f"{name} of {key}": its[key][name]
        for key in ("returns", "lengths", "rewards")
        if key in its
        for name in ("mean", "lowest", "highest")
    }


def _same(one: float, other: float) -> bool:
    """Return whether they are equal but for the order of a sum, which is another on another machine."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def write(path: Path, its: Mapping[str, Any]) -> None:
    """Write a summary in the folder of a run, whole or not at all; the same whenever the run goes on."""
    with whole(path / FILE) as new:
        new.write_text(json.dumps(its) + "\n")


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
