"""What is compared: algorithms on tasks, over seeds, each as one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.comparison.jobs import Job
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
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    steps: int
    is_beside: bool
    published: float | None
    job: Job

    def scores(self) -> list[float] | None:
        """Return the score of each seed after the last step; None before the run is finished."""
        result = self.job.result()
        return None if result is None else [each["score"] for each in result["replicas"]]

    def metrics(self) -> list[Path]:
        """Return the metrics of each seed."""
        folder = self.job.folder
        folders = (
            [folder / f"seed={seed}" for seed in self.seeds] if len(self.seeds) > 1 else [folder]
        )
        return [each / "metrics.csv" for each in folders]


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
    def load(cls, file: Path, folder: Path) -> Plan:
        """Read a plan.

        Args:
            file: YAML, as ``table.yaml``.
            folder: of all runs.

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
            for cell in _cells(file, folder, values, task, own or {})
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

    def cell(self, task: str, algorithm: str) -> Cell | None:
        found = [each for each in self.cells if (each.task, each.algorithm) == (task, algorithm)]
        return found[0] if found else None


def _cells(
    file: Path, folder: Path, values: dict[str, Any], task: str, own: dict[str, Any]
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
        found.append(Cell(task, algorithm, seeds, steps, algorithm in beside, published, job))
    return found


def _require(file: Path, what: str, values: Any, known: set[str]) -> None:
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - known)):
        given = unknown if isinstance(values, dict) else repr(values)
        raise SettingsError(f"{file}: {what} has {given}, expected some of {sorted(known)}")
