"""What is compared: algorithms on tasks, over seeds, offline or then also online, each as a few runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.comparison.jobs import Job
from torchrl_iql_recipes.comparison.record import Curves, Known, Record, curves_of
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.curves import in_file
from torchrl_iql_recipes.experiment.results import final_score, score_kind
from torchrl_iql_recipes.experiment.schema import SettingsError, written
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE, Experiment

__all__ = ["Cell", "Plan"]

RECIPES = Path(__file__).parents[1]
COMMON = {"algorithms", "seeds", "steps", "env_steps", "evaluations", "episodes", "settings"}
"""What a plan has for all tasks, and a task may have of its own."""

LEAST = {"steps": 1, "env_steps": 0, "evaluations": 1, "episodes": 0}
"""Numbers of a plan, and the least that they may be."""


@dataclass(frozen=True)
class Cell:
    """An algorithm on a task.

    Attributes:
        task: its name.
        algorithm: its name.
        seeds: of its learners.
        steps: of gradient, offline.
        env_steps: online, after these; 0 if there is nothing after them.
        is_beside: whether it is left out of the aggregates.
        published: its scores in the paper, on other data: after the offline steps, and after those online.
        asked: the settings of its runs, but for the seeds.
        folder: of its runs.
        record: of runs that are not to be done again.
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    steps: int
    env_steps: int
    is_beside: bool
    published: tuple[float, ...]
    asked: tuple[str, ...]
    folder: Path
    record: Record

    @property
    def door(self) -> Experiment:
        """That of the recipe of its runs."""
        return ONLINE if self.env_steps else OFFLINE

    @cached_property
    def settings(self) -> Settings:
        """Those of a learner.

        Raises:
            SettingsError: a run can not have them.
        """
        return self.door.settings(self.asked)

    @cached_property
    def recorded(self) -> list[Known]:
        """What the record has of runs with its settings and seeds."""
        if not self.record.tells_of(self.task, self.algorithm):
            return []  # settings take a moment
        return self.record.of(self.settings.values, self.seeds)

    @cached_property
    def known(self) -> Curves:
        """The scores in it."""
        return curves_of(self.recorded)

    def check(self) -> None:
        """Refuse runs in its folder of other settings or seeds, as of an earlier version of the plan.

        Raises:
            SettingsError: it names the folder and the settings.
        """
        for seeds, run in self.runs.items():
            if (run.folder / "config.yaml").exists():
                its = self.door.stored(run.folder)
                differ = Known(its.values, {}).differences(self.settings.values)
                if (known := {each.seed for each in its.learners}) != {*seeds}:
                    differ.append(f"seeds={written(sorted(known))}, not {written(sorted(seeds))}")
                if differ:
                    raise SettingsError(
                        f"{run.folder} holds a run with other settings than the plan: "
                        f"{', '.join(differ)}: remove it, or give another --folder"
                    )

    @cached_property
    def runs(self) -> Mapping[tuple[int, ...], Job]:
        """Those of the other seeds, by these: offline one of all, online one of each."""
        missing = tuple(seed for seed in self.seeds if seed not in self.known)
        if self.env_steps:
            return {
                (seed,): self._run("online.py", f"seeds={seed}", self.folder / f"seed={seed}")
                for seed in missing
            }
        part = "" if not self.known else "-" + "-".join(map(str, missing))
        folder = self.folder.with_name(self.folder.name + part)
        seeds = f"seeds=[{','.join(map(str, missing))}]"
        return {missing: self._run("offline.py", seeds, folder)} if missing else {}

    def _run(self, script: str, seeds: str, folder: Path) -> Job:
        return Job(RECIPES / script, folder, [*self.asked, seeds])

    def curves(self) -> dict[int, Mapping[int, float]]:
        """Return the scores so far: by seed, and by gradient step."""
        found = dict(self.known)
        for seeds, run in self.runs.items():
            for seed in seeds:
                own = run.folder / f"seed={seed}" if len(seeds) > 1 else run.folder
                found[seed] = dict(_scores_in(own))
        return {seed: found[seed] for seed in self.seeds}

    def finished(self) -> Curves:
        """Return the scores of the seeds whose run is finished, and has the score of the last step."""
        done = {each["seed"] for each in self._scored()}
        curves = {s: its for s, its in self.curves().items() if its}
        return {s: its for s, its in curves.items() if s in self.known or s in done}

    def _scored(self) -> list[Mapping[str, Any]]:
        """Return the outcomes of what is finished, and has the score of the last step."""
        found = [result for run in self.runs.values() if (result := run.result()) is not None]
        replicas = [each for result in found for each in result["replicas"]]
        return [each for each in replicas if final_score(each) is not None]

    @property
    def is_normalized(self) -> bool:
        """Whether the scores of what is finished are normalized: those of all tasks have one scale then."""
        kinds = {score_kind(each) for each in self._scored()}
        return "return" not in kinds and all(each.is_normalized for each in self.recorded)

    def kept(self) -> list[Known]:
        """Return what is finished, with the settings that it was run with."""
        curves = self.finished()
        return self.recorded + [
            Known(
                self.door.stored(run.folder).values,
                {seed: curves[seed] for seed in seeds},
                self.is_normalized,
            )
            for seeds, run in self.runs.items()
            if curves.keys() >= {*seeds}
        ]

    def scores(self) -> list[float] | None:
        """Return the score of each seed after the last step; None before all runs are finished."""
        its = self.finished()
        return [its[s][max(its[s])] for s in self.seeds] if len(its) == len(self.seeds) else None

    def before(self) -> list[float] | None:
        """Return the score of each seed after the offline steps, in the same case, if all are known."""
        its = [curve.get(self.steps) for curve in self.finished().values()]
        known = [score for score in its if score is not None]
        return known if len(known) == len(self.seeds) else None


def _scores_in(folder: Path) -> Iterator[tuple[int, float]]:
    """Read the steps and scores of a learner, of an offline phase too."""
    for metrics in (folder / "offline/metrics.csv", folder / "metrics.csv"):
        if metrics.exists():
            steps, scores = in_file(metrics).get("eval/score", ((), ()))
            yield from zip(map(int, steps), map(float, scores), strict=True)


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
            record: of runs that are not to be done again, if they had the settings of the plan.

        Raises:
            SettingsError: it has a name that is not known, or lacks one, or the folder has other runs.
        """
        try:
            values: Any = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
        _require(file, "the plan", values, {*COMMON, "beside", "tasks"})
        tasks = values.get("tasks") or {}
        for name, of in {"tasks": tasks, "beside": values.get("beside") or {}}.items():
            if not isinstance(of, dict):
                raise SettingsError(f"{file}: {name}={written(of)}: expected names with settings")
        cells = [
            cell
            for task, own in tasks.items()
            for cell in _cells(file, folder, values, task, own or {}, record or Record())
        ]
        if not cells:
            raise SettingsError(
                f"{file}: there is nothing to compare, expected tasks and algorithms"
            )
        for cell in cells:
            cell.check()
        return cls(file, tuple(cells))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def algorithms(self) -> list[str]:
        """Those of the aggregates, and then those beside."""
        ordered = sorted(self.cells, key=lambda cell: cell.is_beside)
        return list(dict.fromkeys(cell.algorithm for cell in ordered))

    @property
    def jobs(self) -> list[Job]:
        """All runs."""
        return [run for cell in self.cells for run in cell.runs.values()]

    def finished(self) -> Record:
        """Return what is to be kept."""
        return Record(tuple(each for cell in self.cells for each in cell.kept()))

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
) -> Iterator[Cell]:
    if not (CONFIG / "task" / f"{task}.yaml").exists():
        raise SettingsError(f"{file}: there is no task {task}")
    _require(file, task, own, {*COMMON, "published"})
    common = {key: value for key, value in values.items() if key in COMMON}
    beside = values.get("beside") or {}
    for algorithm, others in beside.items():
        _require(file, algorithm, others or {}, COMMON)
    _require(file, f"published of {task}", own.get("published") or {}, {*algorithms()})
    asked = own.get("algorithms", common.get("algorithms")) or []
    extra = [] if "algorithms" in own else [name for name in beside if name not in asked]
    for algorithm in [*asked, *extra]:
        if algorithm not in algorithms():
            raise SettingsError(
                f"{file}: there is no algorithm {algorithm}, expected some of {list(algorithms())}"
            )
        its = {**common, **own, **(beside.get(algorithm) or {})}
        if missing := [key for key in ("seeds", "steps") if key not in its]:
            raise SettingsError(f"{file}: {task} has no {' and no '.join(missing)}")
        _check_values(f"{file}: {task}, {algorithm}", its)
        published = (own.get("published") or {}).get(algorithm, ())
        yield Cell(
            task,
            algorithm,
            seeds=tuple(its["seeds"]),
            steps=int(its["steps"]),
            env_steps=int(its.get("env_steps", 0)),
            is_beside=algorithm in beside,
            published=tuple(published) if isinstance(published, list | tuple) else (published,),
            asked=tuple(_asked(task, algorithm, its)),
            folder=folder / task.replace("/", "-") / algorithm,
            record=record,
        )


def _asked(task: str, algorithm: str, its: Mapping[str, Any]) -> Sequence[str]:
    steps, env_steps = int(its["steps"]), int(its.get("env_steps", 0))
    return [
        *(f"task={task}", f"algorithm={algorithm}", f"steps={steps}"),
        *([f"env_steps={env_steps}"] if env_steps else []),
        f"eval_interval={max(1, (env_steps or steps) // int(its.get('evaluations', 10)))}",
        f"eval_episodes={int(its.get('episodes', 50))}",
        *its.get("settings", []),
    ]


def _check_values(where: str, its: Mapping[str, Any]) -> None:
    """Refuse what a cell can not have."""
    for name, least in LEAST.items():
        value = its.get(name, least)
        if not isinstance(value, int | float) or value != int(value) or value < least:
            raise SettingsError(
                f"{where}: {name}={written(value)}: expected an integer of at least {least}"
            )
    seeds, settings = its["seeds"], its.get("settings", [])
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise SettingsError(f"{where}: seeds={written(seeds)}: expected a list of integers")
    if not (isinstance(settings, list) and all(isinstance(each, str) for each in settings)):
        raise SettingsError(f"{where}: settings={written(settings)}: expected a list of text")


def _require(file: Path, what: str, values: Any, known: set[str]) -> None:
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - known)):
        given = unknown if isinstance(values, dict) else repr(values)
        raise SettingsError(f"{file}: {what} has {given}, expected some of {sorted(known)}")
