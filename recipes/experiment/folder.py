"""What a learner of a run leaves behind: metrics and checkpoints, in one folder."""

from __future__ import annotations

import csv
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointRotation
from torchrl.record.loggers import Logger

from torchrl_iql import checkpoint
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.files import on_disk, rows, whole

__all__ = ["RunFolder", "newest_common_step"]

SCORE = "eval/score"

KEPT = 2
"""Checkpoints by step: learners of a run that is killed while they are saved differ by one."""


class RunFolder:
    """The folder of one learner.

    ``metrics.csv`` has one line per logged step, whose first column is ``step``; a new metric adds a
    column, and cells are empty where a metric was not logged. ``checkpoints`` holds the latest two, and
    ``last.ckpt`` and ``best.ckpt`` are names of the latest and of the best one.

    Args:
        path: created if it does not exist.
        best_by: the metric that is highest where it was best; with a minus, lowest.
    """

    def __init__(self, path: Path, best_by: str = SCORE) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._best_by = best_by
        self.metrics = path / "metrics.csv"
        self.last = path / "last.ckpt"
        self.best = path / "best.ckpt"
        self.rotation = CheckpointRotation(path / "checkpoints", keep_last=KEPT, prefix="step")
        self._rows: dict[int, dict[str, Any]] = {}
        self._logger: Logger | None = None
        if self.metrics.exists():  # a resumed run
            self._rows = {int(row["step"]): dict(row) for row in rows(self.metrics)}
        self._columns = {"step": None}
        self._columns |= {key: None for row in self._rows.values() for key in row}

    # --- Metrics -----------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of a step, and tell the logger what is new of them."""
        known = self._rows.get(step, {})
        news = {k: v for k, v in metrics.items() if str(known.get(k, "")) != str(v)}
        appends = step > max(self._rows, default=-1) and metrics.keys() <= self._columns.keys()
        self._rows.setdefault(step, {"step": step}).update(metrics)
        self._columns.update(dict.fromkeys(metrics))
        if appends and self.metrics.exists():
            with self.metrics.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(self._rows[step])
        else:
            self._write()
        if self._logger is not None:
            self._logger.log_metrics(news, step=step)

    def tell(self, logger: Logger) -> None:
        """Tell a logger every line there is, and from now on what is logged."""
        self._logger = logger
        for step, row in sorted(self._rows.items()):
            known = {k: float(v) for k, v in row.items() if k != "step" and v != ""}
            logger.log_metrics(known, step=step)

    def _write(self) -> None:
        with whole(self.metrics) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self._rows.items()))

    def keep(self) -> None:
        """Wait until the lines that there are would outlast a power cut."""
        if self.metrics.exists():
            on_disk(self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines, in order."""
        return [row for _, row in sorted(self._rows.items())]

    def newest(self) -> int:
        """Return the step of the last line, 0 if there is none."""
        return max(self._rows, default=0)

    def has(self, key: str) -> bool:
        """Return whether a metric was ever logged."""
        return any(row.get(key, "") != "" for row in self._rows.values())

    def scores(self) -> dict[int, float]:
        """Return the scores of all evaluations, by step."""
        return self._values(SCORE)

    def evaluated_after(self) -> int | None:
        """Return the step of the last evaluation; None if there is none."""
        return max(self.scores(), default=None)

    def best_row(self) -> dict[str, Any] | None:
        """Find where it was best, the first of several such steps.

        Returns:
            the ``step``, its ``score`` if it was evaluated, and what was best there by its own name if that
            is something else; None if nothing of that name is finite yet.
        """
        name = self._best_by.removeprefix("-")
        sign = -1 if name != self._best_by else 1
        values = {k: v for k, v in self._values(name).items() if math.isfinite(v)}
        step = max(values, key=lambda at: sign * values[at], default=None)
        if step is None:
            return None
        own = {} if name == SCORE else {name: values[step]}
        scores = self.scores()
        return {**({"score": scores[step]} if step in scores else {}), **own, "step": step}

    def latest(self, prefix: str) -> dict[str, float]:
        """Return the last value of every metric whose name begins so, without the beginning."""
        names = [name for name in self._columns if name.startswith(prefix)]
        found = {name: list(self._values(name).values()) for name in names}
        return {name.removeprefix(prefix): its[-1] for name, its in found.items() if its}

    def _values(self, name: str) -> dict[int, float]:
        """Return all values of a metric, by step."""
        rows = sorted(self._rows.items())
        return {step: float(row[name]) for step, row in rows if row.get(name, "") != ""}

    # --- Checkpoints -------------------------------------------------------------------------------------

    def checkpoints(self) -> dict[int, Path]:
        """Return the checkpoints that are kept by step."""
        found = {int(path.stem.rpartition("-")[2]): path for path in self.rotation.checkpoints()}
        if not found and self.last.exists():  # somebody has made room
            step = checkpoint.load_metadata(self.last).get("steps")
            return {} if step is None else {step: self.last}
        return found

    def name_checkpoints(self) -> None:
        """Give ``last.ckpt`` and, if it is still there, ``best.ckpt`` to the right ones."""
        kept, best = self.checkpoints(), self.best_row()
        if kept:
            _link(kept[max(kept)], self.last)
        if best is not None and best["step"] in kept:
            _link(kept[best["step"]], self.best)

    def return_to(self, step: int) -> None:
        """Drop what comes after a step, from which a run goes on."""
        self._rows = {at: row for at, row in self._rows.items() if at <= step}
        if self.metrics.exists():
            self._write()
        for at, path in self.checkpoints().items():
            if at > step:
                path.unlink()
        self.name_checkpoints()


def newest_common_step(folders: Sequence[RunFolder]) -> int | None:
    """Return the latest step of which every learner has a checkpoint; None if a run begins.

    Raises:
        SettingsError: there is none, and more would be lost than a kill at the first one explains.
    """
    kept = {folder.path: set(folder.checkpoints()) for folder in folders}
    common = max(set.intersection(*kept.values()), default=None)
    if common is None and max(map(len, kept.values())) > 1:
        shown = ", ".join(f"{path.name}: {sorted(steps) or 'none'}" for path, steps in kept.items())
        raise SettingsError(
            f"the learners have no checkpoint of the same step ({shown}): put back what is missing, or "
            "start anew in another folder"
        )
    return common


def _link(path: Path, name: Path) -> None:
    """Give a file another name, replaced in one piece."""
    if name.exists() and name.samefile(path):
        return
    with whole(name) as new:
        new.unlink(missing_ok=True)
        try:
            os.link(path, new)
        except OSError:  # a file system without links
            shutil.copyfile(path, new)
