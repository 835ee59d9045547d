"""What a run leaves behind, metrics, checkpoints and scores in one folder, and how it is stopped."""

from __future__ import annotations

import csv
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torchrl.record.loggers import get_logger

__all__ = ["RunFolder", "StopSignal", "resumed"]


def resumed(resume: str, new: Path) -> tuple[Path, DictConfig]:
    """The folder of an interrupted run, and the configuration that it was started with.

    Args:
        resume: The folder.
        new: What Hydra made for this run, empty: removed.

    Raises:
        FileNotFoundError: If the folder is not that of a run.
    """
    new.rmdir()
    path = Path(resume)
    if not (path / "config.yaml").exists():
        raise FileNotFoundError(f"resume={resume!r}: that folder has no config.yaml")
    return path, cast(DictConfig, OmegaConf.load(path / "config.yaml"))


class RunFolder:
    """The folder of one run.

    ``metrics.csv`` has one line per logged step, whose first column is ``step``; a new metric adds a
    column, and cells are empty where a metric was not logged.

    Args:
        path: created if it does not exist.
        backend: a logger of TorchRL to send the metrics to as well: ``"tensorboard"``, ``"wandb"`` or
            ``""`` for none.
    """

    def __init__(self, path: Path, backend: str = "") -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.metrics = path / "metrics.csv"
        self.last = path / "last.ckpt"
        self.best = path / "best.ckpt"
        self._rows: dict[int, dict[str, Any]] = {}
        self._logger = get_logger(backend, str(path), path.name)
        if self.metrics.exists():  # a resumed run
            with self.metrics.open(newline="") as file:
                self._rows = {int(row["step"]): row for row in csv.DictReader(file)}
        self._columns = {"step": None}
        self._columns |= {key: None for row in self._rows.values() for key in row}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of a step."""
        appends = step not in self._rows and metrics.keys() <= self._columns.keys()
        self._rows.setdefault(step, {"step": step}).update(metrics)
        self._columns.update(dict.fromkeys(metrics))
        if appends:
            with self.metrics.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(self._rows[step])
        else:
            self._write()
        if self._logger is not None:
            self._logger.log_metrics(dict(metrics), step=step)

    def _write(self) -> None:
        new = self.metrics.with_suffix(".new")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows.values())
        new.replace(self.metrics)  # whole or not at all

    def forget_after(self, step: int) -> None:
        """Drop the lines after a step: a run that goes on from there logs them again."""
        self._rows = {at: row for at, row in self._rows.items() if at <= step}
        if self.metrics.exists():
            self._write()


class StopSignal:
    """Turns the first Ctrl-C into a request, so that no gradient step is left half done.

    Attributes:
        requested: whether Ctrl-C was pressed. A second one raises KeyboardInterrupt as usual.
    """

    requested = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
