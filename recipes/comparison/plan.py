"""What is compared: algorithms on tasks, over seeds, offline or then also online, each as a few runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import model_validator
from yaml import YAMLError

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.comparison.jobs import Job
from torchrl_iql_recipes.comparison.record import Curves, Known, Record, curves_of
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.curves import in_file
from torchrl_iql_recipes.experiment.results import final_score, score_kind
from torchrl_iql_recipes.experiment.schema import (
    Count,
    Natural,
    Part,
    SettingsError,
    Text,
    written,
)
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE, Experiment

__all__ = ["Cell", "Plan"]

TOLD_BY_THE_PLAN = {
    **{name: name for name in ("task", "algorithm", "seeds", "steps", "env_steps")},
    "eval_interval": "evaluations",
    "eval_episodes": "episodes",
    "resume": "--folder",
    "name": "--folder",
    "compute.threads": "one thread for each run",
}
"""Settings of the recipes that ``settings`` may not have, and what says them."""


class Asked(Part):
    """What a plan says of all tasks, a task of itself, and an algorithm beside of its runs."""

    algorithms: tuple[Text, ...] = ()
    seeds: tuple[Natural, ...] = ()
    steps: Count = 1
    env_steps: Natural = 0
    evaluations: Count = 10
    episodes: Count = 50
    settings: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _differ(self) -> Asked:
        for name in ("algorithms", "seeds"):
            its = getattr(self, name)
            if name in self.model_fields_set and not its:
                raise ValueError(f"{name}=[]: expected at least one")
            if len({*its}) < len(its):
                raise ValueError(f"{name}={written(its)}: expected different ones")
        for each in self.algorithms:
            _require_algorithm(each)
        for each in self.settings:
            name = each.partition("=")[0].lstrip("+~")
            by = "--folder" if name.startswith("hydra.") else TOLD_BY_THE_PLAN.get(name)
            if by is not None:
                raise ValueError(f"settings has {each}: leave it out, that is said by {by}")
        return self

    def over(self, other: Asked) -> Asked:
        """Return what another says, and over it what this says; ``settings`` are put together."""
        its = (other, self)
        given = {name: getattr(each, name) for each in its for name in each.model_fields_set}
        return Asked(**{**given, "settings": (*other.settings, *self.settings)})


@dataclass(frozen=True)
class Cell:
    """An algorithm on a task.

    Attributes:
        task: its name.
        algorithm: its name.
        seeds: of its learners.
        steps: of gradient, offline.
        env_steps: online, after these; 0 if there is nothing after them.
        episodes: of an evaluation.
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
    episodes: int
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
        found = self.record.of(self.settings.values, self.seeds)
        wholes = ({s: c for s, c in its.curves.items() if self._is_whole(c)} for its in found)
        return [replace(i, curves=c) for i, c in zip(found, wholes, strict=True) if c]

    @cached_property
    def known(self) -> Curves:
        """The scores in it."""
        return curves_of(self.recorded)

    def _is_whole(self, curve: Mapping[int, float]) -> bool:
        """Return whether a curve has the score of the last step, as far as a plan can tell it."""
        return self.steps in curve if not self.env_steps else max(curve, default=0) > self.steps

    @cached_property
    def runs(self) -> Mapping[tuple[int, ...], Job]:
        """Those of the other seeds, by these: offline as few as there are, online one of each.

        Where the plan has got more seeds since, the run of the others stays what it is.

        Raises:
            SettingsError: a folder holds a run that is none of this plan's.
        """
        missing = tuple(seed for seed in self.seeds if seed not in self.known)
        if self.env_steps:
            return {
                (seed,): self._run(f"seeds={seed}", self.folder / f"seed={seed}")
                for seed in missing
            }
        found: dict[tuple[int, ...], Job] = {}
        folder = self.folder
        while missing:
            begun = Job(self.door, folder, ()).found
            there = () if begun is None else tuple(each.seed for each in begun.learners)
            of = missing if begun is None else tuple(seed for seed in missing if seed in there)
            run = self._run(f"seeds=[{','.join(map(str, there or missing))}]", folder)
            if of:
                found[of] = run
            elif folder != self.folder:
                raise SettingsError(f"{folder} holds a run of seeds {written(there)}: remove it")
            missing = tuple(seed for seed in missing if seed not in of)
            folder = self.folder.with_name("-".join([self.folder.name, *map(str, missing)]))
        return found

    def _run(self, seeds: str, folder: Path) -> Job:
        return Job(self.door, folder, [*self.asked, seeds])

    def curves(self) -> dict[int, Mapping[int, float]]:
        """Return the scores so far: by seed, and by gradient step."""
        found = dict(self.known)
        for seeds, run in self.runs.items():
            for seed in seeds:
                own = run.folder / f"seed={seed}"
                found[seed] = dict(_scores_in(own if own.exists() else run.folder))
        return {seed: found[seed] for seed in self.seeds}

    def finished(self) -> Curves:
        """Return the scores of the seeds whose run is finished, and has the score of the last step."""
        done = {each["seed"]: each for each in self._scored()}
        curves: dict[int, Mapping[int, float]] = {}
        for seed, curve in self.curves().items():
            if seed in self.known:
                curves[seed] = curve
            elif seed in done:
                last = done[seed].get("steps", max(curve, default=self.steps))
                curves[seed] = {**curve, last: done[seed]["score"]}
        return curves

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
        compared: the algorithms of the aggregates, of which the last one is compared with the others.
    """

    file: Path
    cells: tuple[Cell, ...]
    compared: tuple[str, ...]

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
            values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
        _require(file, "the plan", values, {*Asked.model_fields, "beside", "tasks"})
        tasks, beside = (values.pop(name, None) or {} for name in ("tasks", "beside"))
        for name, of in {"tasks": tasks, "beside": beside}.items():
            if not isinstance(of, dict):
                raise SettingsError(f"{file}: {name}={written(of)}: expected names with settings")
        common = _asked(file, "", values)
        others = {}
        for algorithm, its in beside.items():
            _require(file, f"{algorithm} beside", its or {}, {*Asked.model_fields} - {"algorithms"})
            with _told(f"{file}: beside"):
                _require_algorithm(algorithm)
            others[algorithm] = _asked(file, f"{algorithm} beside: ", its or {})
            if algorithm in common.algorithms:
                raise SettingsError(
                    f"{file}: {algorithm} is in algorithms and beside, expected one"
                )
        cells = tuple(
            cell
            for task, own in tasks.items()
            for cell in _cells(file, folder, common, others, task, own or {}, record or Record())
        )
        if not cells:
            raise SettingsError(
                f"{file}: there is nothing to compare, expected tasks and algorithms"
            )
        for cell in cells:
            for run in cell.runs.values():
                run.check()
        first = [cell.algorithm for cell in cells if not cell.is_beside]
        return cls(file, cells, common.algorithms or tuple(dict.fromkeys(first)))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def algorithms(self) -> list[str]:
        """Those of the plan in its order, then those of some tasks alone, then those beside."""
        names = [cell.algorithm for cell in sorted(self.cells, key=lambda cell: cell.is_beside)]
        return list(dict.fromkeys([*(n for n in self.compared if n in names), *names]))

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
    common: Asked,
    beside: Mapping[str, Asked],
    task: str,
    values: dict[str, Any],
    record: Record,
) -> Iterator[Cell]:
    if not (CONFIG / "task" / f"{task}.yaml").exists():
        raise SettingsError(f"{file}: there is no task {task}")
    _require(file, task, values, {*Asked.model_fields, "published"})
    published = values.pop("published", None) or {}
    _require(file, f"published of {task}", published, {*algorithms()})
    own = _asked(file, f"{task}: ", values)
    of_task = own.over(common)
    extra = [] if own.algorithms else [name for name in beside if name not in of_task.algorithms]
    for algorithm in [*of_task.algorithms, *extra]:
        is_beside = algorithm in beside
        its = beside[algorithm].over(of_task) if is_beside else of_task
        if missing := [key for key in ("seeds", "steps") if key not in its.model_fields_set]:
            raise SettingsError(f"{file}: {task} has no {' and no '.join(missing)}")
        yield Cell(
            task,
            algorithm,
            seeds=its.seeds,
            steps=its.steps,
            env_steps=its.env_steps,
            episodes=its.episodes,
            is_beside=is_beside,
            published=_published(file, task, algorithm, published, is_online=its.env_steps > 0),
            asked=tuple(_settings(task, algorithm, its)),
            folder=folder / task.replace("/", "-") / algorithm,
            record=record,
        )


def _settings(task: str, algorithm: str, its: Asked) -> Sequence[str]:
    return [
        *(f"task={task}", f"algorithm={algorithm}", f"steps={its.steps}"),
        *([f"env_steps={its.env_steps}"] if its.env_steps else []),
        f"eval_interval={max(1, (its.env_steps or its.steps) // its.evaluations)}",
        f"eval_episodes={its.episodes}",
        *its.settings,
    ]


def _published(
    file: Path, task: str, algorithm: str, its: Mapping[str, Any], *, is_online: bool
) -> tuple[float, ...]:
    """Return the scores of a paper: one, or of an online run also the one before it."""
    given = its.get(algorithm, [])
    scores = given if isinstance(given, list) else [given]
    numbers = all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores)
    if not (numbers and all(map(math.isfinite, scores)) and len(scores) <= 1 + is_online):
        expected = "a number" + (", or [before, after]" if is_online else "")
        raise SettingsError(
            f"{file}: {task}: published.{algorithm}={written(given)}: expected {expected}"
        )
    return tuple(map(float, scores))


def _asked(file: Path, where: str, values: Mapping[str, Any]) -> Asked:
    with _told(f"{file}: {where}".rstrip(": ")):
        return Asked.of(values)


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None


def _require_algorithm(name: str) -> None:
    if name not in algorithms():
        raise SettingsError(f"there is no algorithm {name}, expected some of {list(algorithms())}")


def _require(file: Path, what: str, values: Any, known: set[str]) -> None:
    if not isinstance(values, dict) or (unknown := sorted(map(str, values.keys() - known))):
        given = unknown if isinstance(values, dict) else repr(values)
        raise SettingsError(f"{file}: {what} has {given}, expected some of {sorted(known)}")
