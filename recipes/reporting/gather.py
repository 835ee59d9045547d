"""What the folders of runs hold, as plain values: nothing of it is loaded but text, numbers and pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.curves import Curves, in_file
from torchrl_iql_recipes.experiment.learned_from import FILE as DATA
from torchrl_iql_recipes.experiment.lock import is_alive
from torchrl_iql_recipes.experiment.schema import written
from torchrl_iql_recipes.experiment.settings import flat
from torchrl_iql_recipes.reporting.commands import (
    Command,
    command,
    command_to_go_on,
    completed,
)

__all__ = ["Learner", "NoRunError", "Run", "folders", "is_going_on", "run"]

OWN_PICTURES = {"learning_curves.png", "calibration.png", "value_map.png"}
"""Those of runs; another is a film."""

ESTIMATES = "estimate*.json"
"""What ``estimate.py`` has left in the folder of a run or of a learner."""

State = Literal["finished", "running", "interrupted"]


class NoRunError(ValueError):
    """A folder holds no run of offline.py or online.py."""


@dataclass(frozen=True)
class Learner:
    """One of a run.

    Attributes:
        name: what tells it from the others of its run; empty if it is alone.
        title: of its algorithm.
        seed: its own; None if that is not recorded.
        settings: those that may differ within a run, by name.
        outcome: what ``scores.json`` says of it; empty without one.
        curves: of ``metrics.csv``.
        pictures: by kind, ``calibration.png``, ``value_map.png``, and films by their names.
    """

    name: str
    title: str
    seed: int | None
    settings: Mapping[str, Any]
    outcome: Mapping[str, Any]
    curves: Curves
    pictures: Mapping[str, Path]

    @property
    def score(self) -> float | None:
        """The final one; None if it was not evaluated, or that failed."""
        return _finite(results.final_score(self.outcome))

    @property
    def step(self) -> int:
        """The last step of which something is known."""
        lasts = [int(steps[-1]) for steps, _ in self.curves.values() if len(steps)]
        return max([*lasts, int(self.outcome.get("steps") or 0)])

    @property
    def latest(self) -> float | None:
        """The score of its last evaluation so far."""
        if self.score is not None:
            return self.score
        curve = self.curves.get("eval/score")
        return None if curve is None or not len(curve[1]) else _finite(curve[1][-1])


@dataclass(frozen=True)
class Run:
    """A run of offline.py or online.py.

    Attributes:
        path: its folder.
        label: short and its own among those of a page.
        script: ``offline`` or ``online``.
        state: running, if a process is at work; interrupted, if it is not and not all steps are done.
        settings: all of them, by the names that they are given by; empty if they can not be read.
        learners: at least one.
        data: of ``data.json``; None without one.
        rules: what ``scores.json`` says of the data.
        dataset: its name.
        offline: the curves of the offline phase of an online run, and the step at which it was over.
        times: the sessions of ``times.json``.
        estimates: what policies are worth by data alone, of the files that it holds.
        command: what makes it anew; None if its settings can not be read.
        go_on: the command that goes on with it.
        words: what is missing, or was not readable, a sentence each.
    """

    path: Path
    label: str
    script: str
    state: State
    settings: Mapping[str, Any]
    learners: tuple[Learner, ...]
    data: Mapping[str, Any] | None
    rules: Mapping[str, Any]
    dataset: str
    offline: tuple[Curves, float] | None
    times: Sequence[Mapping[str, Any]]
    estimates: Sequence[Mapping[str, Any]]
    command: Command | None
    go_on: str | None
    words: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int:
        """Gradient steps, or, of an online run, environment steps that it is to take."""
        known = _finite(self.settings.get("env_steps" if self.script == "online" else "steps"))
        return self.learners[0].step if known is None else int(known)

    @property
    def transitions(self) -> int | None:
        """Transitions of the data, by which data of the same name are told apart; None if it is not known."""
        its = [self.rules.get("transitions")]
        if its == [None] and self.data is not None:
            is_rest = self.script == "offline"
            keys = ["transitions", "held_out_transitions"][: 1 + is_rest]
            its = [self.data.get(key, 0) for key in keys]
        return sum(its) if its[0] and all(isinstance(each, int) for each in its) else None

    @property
    def world(self) -> str:
        """What scores are comparable in: the task, or the data, and the environment if it is another."""
        name = self.settings.get("task")
        base = self.dataset if name in (None, "own") else str(name)
        env = self.settings.get("env")
        return base if env is None else f"{base} in {written(env)}"

    @property
    def score_name(self) -> str:
        """What scores are."""
        known = [its.outcome or its.curves for its in self.learners]
        normal = any("normalized_score" in its or "eval/normalized_score" in its for its in known)
        return "normalized score" if normal else "return"


def folders(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Find the folders of runs.

    Args:
        paths: folders of runs, or folders that hold some, however deep.

    Returns:
        each once, in the order given; and a line for each run in them that is of another script.

    Raises:
        NoRunError: one of the paths is none, and holds none.
    """
    found: dict[Path, Path] = {}
    left = []
    for path in paths:
        if not path.is_dir():
            what = "is a file, expected the folder of a run" if path.exists() else "is not there"
            if not path.exists() and "=" in str(path):
                what += "; options are written --name value, see --help"
            raise NoRunError(f"{path} {what}")
        its = [path] if _is_run(path) else _below(path)
        if not its:
            raise NoRunError(
                f"{path} holds no run: expected config.yaml beside metrics.csv or scores.json, as offline.py "
                "and online.py leave them"
            )
        runs = [each for each in its if _is_of_training(each)]
        left += [f"{each} is of another script" for each in its if each not in runs]
        if not runs:
            raise NoRunError(f"{path} is no run of offline.py or online.py")
        found |= {each.resolve(): each for each in runs if each.resolve() not in found}
    return list(found.values()), left


def runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read all runs of :func:`folders`.

    Returns:
        the runs; and a line for each that is of another script, or holds nothing yet.

    Raises:
        NoRunError: as :func:`folders`, or all of them hold nothing.
    """
    found, left = folders(paths)
    read = []
    for path, label in zip(found, _labels(found), strict=True):
        try:
            read.append(run(path, label))
        except NoRunError as error:
            left.append(str(error))
    if not read:
        raise NoRunError("; ".join(left))
    return read, left


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the ends of the paths, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(each) for each in parts]


def _is_run(path: Path) -> bool:
    if not any((path / each).is_file() for each in ("config.yaml", "scores.json")):
        return False
    left = ("scores.json", "metrics.csv", "*/metrics.csv", ".holder")
    return any(any(path.glob(each)) for each in left)


def _below(path: Path) -> list[Path]:
    found: list[Path] = []
    files = [file for name in ("config.yaml", "scores.json") for file in path.rglob(name)]
    for each in sorted({file.parent for file in files} - {path}):
        # The offline phase of an online run is a part of it.
        if _is_run(each) and not any(other in each.parents for other in found):
            found.append(each)
    return found


def _is_of_training(path: Path) -> bool:
    values = _config(path)[0]
    return not values or "algorithm" in values


def is_going_on(path: Path) -> bool:
    """Return whether a process is at work in a run of a folder."""
    return any(is_alive(file.parent) for file in path.rglob(".holder"))


def run(path: Path, label: str = "") -> Run:
    """Read the folder of a run; what is missing or damaged is said in words.

    Args:
        path: one of :func:`folders`.
        label: for it.

    Raises:
        NoRunError: there is nothing in it that could be shown.
    """
    values, words = _config(path)
    scores, told = _scores(path)
    words += told
    script = "online" if "env_steps" in values or _is_online(scores) else "offline"
    phase, offline = path / "offline", None
    in_phase = script == "online" and not (path / "metrics.csv").is_file() and phase.is_dir()
    learners = _learners(phase if in_phase else path, values, scores)
    if in_phase:
        words.append("It is in its offline phase: the curves are of that.")
    elif script == "online" and (phase / "metrics.csv").is_file():
        curves = _curves(phase / "metrics.csv")
        offline = curves, max((its[0][-1] for its in curves.values()), default=0.0)
    if not learners:
        raise NoRunError(f"{path} holds a run that has not logged anything yet")
    rules, data = scores.get("data"), _json(path / DATA, words, dict)
    if data is None and script == "online":
        data = _json(phase / DATA, words, dict)
    times = _json(path / "times.json", words, list) or []
    return Run(
        path=path,
        label=label or path.name,
        script=script,
        state=_state(path, script, values, scores),
        settings=completed(values),
        learners=learners,
        data=data,
        rules=rules if isinstance(rules, dict) else {},
        dataset=str(scores.get("dataset") or (data or {}).get("dataset") or _dataset(values)),
        offline=offline,
        times=[each for each in times if isinstance(each, dict)],
        estimates=_estimates(path, learners, words),
        command=command(script, values) if values else None,
        go_on=command_to_go_on(script, path, values) if values else None,
        words=tuple(words),
    )


def _estimates(
    path: Path, learners: Sequence[Learner], words: list[str]
) -> list[Mapping[str, Any]]:
    found = []
    for folder in dict.fromkeys([path, *(path / each.name for each in learners)]):
        for file in sorted(folder.glob(ESTIMATES)):
            its = _json(file, words, dict)
            if its is not None and not _is_estimate(its):
                words.append(f"{file.name} holds something else than expected.")
            elif its is not None:
                found.append(its)
    return found


def _is_estimate(its: Mapping[str, Any]) -> bool:
    policies, data = its.get("policies"), its.get("data")
    if not (isinstance(policies, list) and isinstance(data, dict)):
        return False
    figures = [(data, ("value", "stderr", "best")), (its, ("discount",))]
    figures += [(each, ("value", "spread", "distance")) for each in policies]
    return all(isinstance(each, dict) for each, _ in figures) and all(
        isinstance(each.get(key), int | float | None) for each, keys in figures for key in keys
    )


def _config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read plain values; those of interpolations stay text."""
    try:
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"config.yaml can not be read: {_line(error)}."]
    if not isinstance(values, dict):
        return {}, ["config.yaml holds no settings by name."]
    groups = {key: each for key, each in values.items() if isinstance(key, str)}
    try:
        return flat(groups), []
    except (AttributeError, TypeError):
        return {}, ["config.yaml holds no settings of a run."]


def _scores(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        scores = results.read(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return {}, [f"scores.json can not be read: {_line(error)}."]
    if scores is None:
        return {}, []
    replicas = scores["replicas"]
    if not (isinstance(replicas, list) and replicas and all(map(_is_outcome, replicas))):
        return {}, ["scores.json holds something else than expected."]
    return scores, []


def _is_outcome(its: Any) -> bool:
    numbers = ("score", "steps", "frames")
    return isinstance(its, dict) and all(
        isinstance(its.get(key), int | float | None) for key in numbers
    )


def _json(file: Path, words: list[str], kind: type) -> Any:
    if not file.is_file():
        return None
    try:
        values = json.loads(
            file.read_text(encoding="utf-8"), parse_float=_number, parse_constant=_number
        )
    except (OSError, ValueError) as error:
        words.append(f"{file.name} can not be read: {_line(error)}.")
        return None
    if not isinstance(values, kind):
        words.append(f"{file.name} holds something else than expected.")
        return None
    return values


def _number(text: str) -> float:
    """Read a number, which has to be finite: none that a run counts is not."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _is_online(scores: Mapping[str, Any]) -> bool:
    return any("frames" in each for each in scores.get("replicas", ()))


def _learners(
    path: Path, values: Mapping[str, Any], scores: Mapping[str, Any]
) -> tuple[Learner, ...]:
    """Read those that results know of, or else those that have left metrics."""
    outcomes = {str(each.get("name") or ""): each for each in scores.get("replicas", ())}
    if not outcomes:
        files = [path / "metrics.csv", *sorted(path.glob("*/metrics.csv"))]
        named = [file.parent for file in files if file.is_file() and file.parent.name != "offline"]
        outcomes = {"" if each == path else each.name: {} for each in named}
    inside = {name: its for name, its in outcomes.items() if not {"/", "\\", ".."} & {*name, name}}
    return tuple(_learner(path / name, name, values, its) for name, its in inside.items())


def _learner(
    folder: Path, name: str, values: Mapping[str, Any], outcome: Mapping[str, Any]
) -> Learner:
    algorithm = algorithms().get(str(values.get("algorithm")))
    axes = (*(algorithm.axes() if algorithm else ()), "seed")
    known = {axis: outcome[axis] for axis in axes if axis in outcome}
    if not known:  # as its folder is called, and otherwise as its run is
        one = {key: each for key, each in values.items() if not isinstance(each, list)}
        known = {axis: one[axis] for axis in axes if axis in one}
        known |= {key: yaml.safe_load(its) for key, its in re.findall(r"(\w+)=([^,]+)", name)}
        if "seed" not in known and not isinstance(values.get("seeds"), list):
            known["seed"] = values.get("seeds")
    seed = known.get("seed")
    metrics = folder / "metrics.csv"
    return Learner(
        name=name,
        title=str(outcome.get("title") or (algorithm.title if algorithm else "the learner")),
        seed=seed if isinstance(seed, int) else None,
        settings={key: each for key, each in known.items() if key != "seed"},
        outcome=outcome,
        curves=_curves(metrics),
        pictures={each.name: each for each in sorted(folder.glob("*.png"))},
    )


def _curves(metrics_csv: Path) -> Curves:
    try:
        return in_file(metrics_csv) if metrics_csv.is_file() else {}
    except (OSError, csv.Error):
        return {}


def _state(path: Path, script: str, values: Mapping[str, Any], scores: Mapping[str, Any]) -> State:
    replicas = scores.get("replicas", ())
    done, asked = ("frames", "env_steps") if script == "online" else ("steps", "steps")
    asked = values.get(asked)
    is_over = bool(replicas) and not any(
        each.get("interrupted")
        or (isinstance(asked, int) and each.get(done, asked) < asked)  # it has gone on since
        for each in replicas
    )
    if is_over:  # though its process may be there, and write its page
        return "finished"
    return "running" if is_alive(path) else "interrupted"


def _dataset(values: Mapping[str, Any]) -> str:
    its = values.get("dataset")
    return " + ".join(map(str, its)) if isinstance(its, list) else str(its)


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < float("inf") else None
