"""Small runs, and what they leave."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

SMALL = [
    "steps=60",
    "eval_interval=30",
    "eval_episodes=2",
    "log_interval=20",
    "hidden_sizes=[16,16]",
    "batch_size=32",
    "compute.threads=1",
    "compute.execution=eager",
]
TINY = [
    "steps=6",
    "eval_interval=6",
    "eval_episodes=1",
    "log_interval=3",
    "hidden_sizes=[8,8]",
    "batch_size=16",
    "compute.threads=1",
    "compute.execution=eager",
]


def of_maze(overrides: Sequence[str]) -> list[str]:
    """Add the embedded task, whose data the tests' are like, unless another is given."""
    has_task = any(each.startswith("task=") for each in overrides)
    return [*([] if has_task else ["task=pointmaze/stitch"]), *overrides]


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the lines of ``metrics.csv``."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the steps and values of every tag in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: sorted((each.step, each.value) for each in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
