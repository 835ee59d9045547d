"""What is compared: algorithms on tasks, over seeds, each as one run."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.comparison.jobs import Job
from torchrl_iql_recipes.comparison.record import Curves, Record, digest
from torchrl_iql_recipes.experiment.door import CONFIG
from torchrl_iql_recipes.experiment.schema import SettingsError

__all__ = ["Cell", "Plan"]

RECIPES = Path(__file__).parents[1]
COMMON = {"algorithms", "seeds", "steps", "evaluations", "episodes", "settings"}
"""What a plan has for all tasks, and a task may have of its own."""


@dataclass(frozen=True)
class Cell:
    """An algorithm on a task.

    Attributes:
        task: its name.
        algorithm: its name.
        seeds: of its learners, all of one run.
        steps: of each.
        is_beside: whether it is left out of the aggregates.
        published: its score in the paper, on other data; None if there is none.
        job: the run.
        known: what it has come to, if that is known without it.
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    steps: int
    is_beside: bool
    published: float | None
    job: Job
    known: Curves | None

    def scores(self) -> list[float] | None:
        """Return the score of each seed after the last step; None before the run is finished."""
        if self.known is not None:
            return [self.known[seed][self.steps] for seed in self.seeds]
        result = self.job.result()
        return None if result is None else [each["score"] for each in result["replicas"]]

    def curves(self) -> Curves:
        """Return the scores so far."""
        return self.known or {seed: dict(self._read(seed)) for seed in self.seeds}

    def _read(self, seed: int) -> Iterator[tuple[int, float]]:
        folder = self.job.folder / (f"seed={seed}" if len(self.seeds) > 1 else "")
        if (folder / "metrics.csv").exists():
            with (folder / "metrics.csv").open(newline="") as lines:
                for row in csv.DictReader(lines):
                    if row.get("eval/score"):
                        yield int(row["step"]), float(row["eval/score"])


@dataclass(frozen=True)
class Plan:
    """All cells of a table.

    Attributes:
        file: where it is from.
        cells: task by task.
    """

    file: Path
    cells: tuple[Cell, ...]

    @classmethod
    def load(cls, file: Path, folder: Path, record: Record | None = None) -> Plan:
        """Read a plan.

        Args:
            file: YAML, as ``table.yaml``.
            folder: of all runs.
            record: of runs that are not to be done again, if they had the settings and seeds of the plan.

        Raises:
            SettingsError: it has a name that is not known, or lacks one.
        """
        try:
            values: Any = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
        _require(file, "the plan", values, {*COMMON, "beside", "tasks"})
        tasks = values.get("tasks") or {}
        cells = [
            cell
            for task, own in tasks.items()
            for cell in _cells(file, folder, values, task, own or {}, record or Record())
        ]
        if not cells:
            raise SettingsError(
                f"{file}: there is nothing to compare, expected tasks and algorithms"
            )
        return cls(file, tuple(cells))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def algorithms(self) -> list[str]:
        """Those of the aggregates, and then those beside."""
        ordered = sorted(self.cells, key=lambda cell: cell.is_beside)
        return list(dict.fromkeys(cell.algorithm for cell in ordered))

    def record(self) -> Record:
        """Return what is finished, to be kept.

        Raises:
            SettingsError: a run can not have its settings.
        """
        return Record(
            {
                (cell.task, cell.algorithm, digest(cell.job.settings)): cell.curves()
                for cell in self.cells
                if cell.scores() is not None
            }
        )

    def cell(self, task: str, algorithm: str) -> Cell | None:
        found = [each for each in self.cells if (each.task, each.algorithm) == (task, algorithm)]
        return found[0] if found else None


def _cells(
    file: Path,
    folder: Path,
    values: dict[str, Any],
    task: str,
    own: dict[str, Any],
    record: Record,
) -> list[Cell]:
    if not (CONFIG / "task" / f"{task}.yaml").exists():
        raise SettingsError(f"{file}: there is no task {task}")
    _require(file, task, own, {*COMMON, "published"})
    common = {key: value for key, value in values.items() if key in COMMON}
    beside = values.get("beside") or {}
    asked = own.get("algorithms", common.get("algorithms")) or []
    extra = [] if "algorithms" in own else [name for name in beside if name not in asked]
    found = []
    for algorithm in [*asked, *extra]:
        if algorithm not in algorithms():
            raise SettingsError(
                f"{file}: there is no algorithm {algorithm}, expected some of {list(algorithms())}"
            )
        its = {**common, **own, **(beside.get(algorithm) or {})}
        if missing := [key for key in ("seeds", "steps") if key not in its]:
            raise SettingsError(f"{file}: {task} has no {' and no '.join(missing)}")
        seeds, steps = tuple(its["seeds"]), int(its["steps"])
        settings = [
            *(f"task={task}", f"algorithm={algorithm}", f"steps={steps}"),
            f"seeds={list(seeds) if len(seeds) > 1 else seeds[0]}".replace(" ", ""),
            f"eval_interval={max(1, steps // its.get('evaluations', 10))}",
            f"eval_episodes={its.get('episodes', 50)}",
            *its.get("settings", []),
        ]
        job = Job(RECIPES / "offline.py", folder / task.replace("/", "-") / algorithm, settings)
        published = (own.get("published") or {}).get(algorithm)
        known = _known(record, task, algorithm, job, seeds, steps)
        found.append(
            Cell(task, algorithm, seeds, steps, algorithm in beside, published, job, known)
        )
    return found


def _known(
    record: Record, task: str, algorithm: str, job: Job, seeds: tuple[int, ...], steps: int
) -> Curves | None:
    if not any(key[:2] == (task, algorithm) for key in record.curves):
        return None
    its = record.curves.get((task, algorithm, digest(job.settings)), {})
    return its if all(steps in its.get(seed, {}) for seed in seeds) else None


def _require(file: Path, what: str, values: Any, known: set[str]) -> None:
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - known)):
        given = unknown if isinstance(values, dict) else repr(values)
        raise SettingsError(f"{file}: {what} has {given}, expected some of {sorted(known)}")
