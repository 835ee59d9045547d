"""List tasks, their data, whether these are here, and what a run takes.

    python recipes/tasks.py
    python recipes/tasks.py mini
    python recipes/tasks.py hopper medium

With words, the tasks in whose names all of them are. Where a task's data are not here, a run downloads them;
those of mini/... and of pointmaze/stitch it makes, in minutes, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from torchrl_iql.data.stored import is_stored
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.commands import Parser, errors_in_one_line, label
from torchrl_iql_recipes.experiment.choices import of_task, similar, tasks
from torchrl_iql_recipes.experiment.lock import RUNS
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import PARTS
from torchrl_iql_recipes.files import shown

ALIKE = ("algorithm", "hidden_sizes", "batch_size", "encoder")
"""Settings by which runs are told that take as long per step, beside the number of learners."""

LONG = 10_000
"""Steps of which the time is told of longer runs, too."""


@dataclass(frozen=True)
class Pace:
    """How fast an offline run was.

    Attributes:
        folder: of the run.
        values: its settings.
        steps: gradient steps that were timed.
        per_step: seconds, evaluations included.
    """

    folder: Path
    values: Mapping[str, Any]
    steps: int
    per_step: float

    def is_like(self, values: Mapping[str, Any]) -> bool:
        """Return whether a run with other settings takes about as long per step.

        A short run tells little: it is all compiling and evaluating.
        """
        long = self.steps >= min(values["steps"] / 2, LONG)
        same = all(self.values.get(key) == values.get(key) for key in ALIKE)
        return long and same and _learners(self.values) == _learners(values)


def _learners(values: Mapping[str, Any]) -> int:
    axes = ("seeds", *algorithms()[values["algorithm"]].axes())
    several = (values.get(axis) for axis in axes)
    return prod(len(each) for each in several if isinstance(each, list))


def paces(folder: Path) -> list[Pace]:
    """Return how fast the offline runs in a folder were, the last one first."""
    found: list[tuple[str, Pace]] = []
    for file in folder.rglob("times.json"):
        try:
            last = json.loads(file.read_text())[-1]
            steps = last["to_step"] - last["from_step"]
            values: Any = OmegaConf.to_container(OmegaConf.load(file.parent / "config.yaml"))
            if steps > 0 and "env_steps" not in values and values["algorithm"] in algorithms():
                found.append(
                    (last["started"], Pace(file.parent, values, steps, last["seconds"] / steps))
                )
        except (OmegaConfBaseException, YAMLError, OSError, ValueError, LookupError, TypeError):
            continue  # of another version, or not of a run
    return [pace for _, pace in sorted(found, key=lambda each: each[0], reverse=True)]


def values_of(task: str) -> dict[str, Any]:
    """Return the settings of a run of a task that say what it learns from, and how long."""
    parts = (PARTS[name] for name in ("data", "networks", "training"))
    values = {key: value for part in parts for key, value in part.defaults().items()}
    plain = {key: list(its) if isinstance(its, tuple) else its for key, its in values.items()}
    return {**plain, **of_task(task), "task": task, "algorithm": "iql"}


def data(dataset: str | None) -> tuple[str, str]:
    """Return the data of a task, and whether they are here."""
    if dataset is None:
        return "your own: dataset=...", ""
    made = dataset.startswith("mini/")
    return dataset, "here" if is_stored(dataset) else "to be made" if made else "to be downloaded"


def takes(values: Mapping[str, Any], known: Sequence[Pace]) -> str:
    """Say what a run takes: its steps, and as many minutes as the last run like it would have."""
    steps = values["steps"]
    likes = [pace for pace in known if pace.is_like(values)]
    same = [pace for pace in likes if pace.values["task"] == values["task"]]
    pace = next(iter(same or likes), None)
    if pace is None:
        return f"{steps:,} steps"
    minutes = steps * pace.per_step / 60
    length = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(minutes, 1):.0f} min"
    return f"{steps:,} steps, {'' if same else 'about '}{length}, as {shown(pace.folder)}"


def table(names: Sequence[str], known: Sequence[Pace]) -> list[str]:
    """Write a line for each task."""
    rows = [("task", "data", "", "a run takes")]
    for name in names:
        values = values_of(name)
        rows.append((name, *data(values["dataset"]), takes(values, known)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(f"{its:{w}}" for its, w in zip(row, [*widths, 0], strict=True)) for row in rows
    ]


def main() -> None:
    parser = Parser(__doc__, "tasks")
    parser.add_argument("words", nargs="*", metavar="WORD", help="in the names of the tasks")
    args = parser.parse_args()
    with errors_in_one_line(label("tasks"), debug=args.debug):
        names = [name for name in tasks() if all(word in name for word in args.words)]
        if not names:
            near = similar("-".join(args.words), tasks())
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise SettingsError(f"there is no task with {' and '.join(args.words)}{hint}")
        print("\n".join(table(names, paces(Path(RUNS)))))


if __name__ == "__main__":
    main()
