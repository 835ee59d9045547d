"""Runs of the recipes, a process with one thread each, several at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.comparison.record import Known
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.overrides import as_given
from torchrl_iql_recipes.experiment.schema import SettingsError, written
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.stopping import EXIT_CODES, Stopped, stoppable
from torchrl_iql_recipes.experiment.training import Experiment

__all__ = ["RECIPES", "Job", "ensure_data", "finish", "new_folder", "run", "told_if_stopped"]

RECIPES = Path(__file__).parents[1]
LONGEST = 300
"""Letters of what a run has said last."""


@dataclass(frozen=True)
class Job:
    """One run of a recipe.

    Attributes:
        door: of the recipe.
        folder: where it leaves its results.
        settings: what it is started with.
    """

    door: Experiment
    folder: Path
    settings: Sequence[str]

    @cached_property
    def wanted(self) -> Settings:
        """The settings that it is to have.

        Raises:
            SettingsError: it can not have them.
        """
        return self.door.settings(self.settings)

    @property
    def found(self) -> Settings | None:
        """The settings of the run in its folder; None if none has begun there."""
        return self.door.stored(self.folder) if self.has_begun else None

    @property
    def has_begun(self) -> bool:
        return (self.folder / "config.yaml").exists()

    def check(self) -> None:
        """Refuse a run in its folder that has other settings or seeds than it is to have.

        Raises:
            SettingsError: it names the folder and the settings.
        """
        if (found := self.found) is None:
            return
        differ = Known(found.values, {}).differences(self.wanted.values)
        seeds, asked = ({each.seed for each in its.learners} for its in (found, self.wanted))
        if seeds != asked:
            differ.append(f"seeds={written(sorted(seeds))}, not {written(sorted(asked))}")
        if differ:
            raise SettingsError(
                f"{self.folder} holds a run with other settings than are asked for: "
                f"{', '.join(differ)}: remove it, or give another --folder"
            )

    def result(self) -> dict[str, Any] | None:
        """Return what its ``scores.json`` holds, once it is finished."""
        result = results.read(self.folder)
        if result is None or any(each.get("interrupted", False) for each in result["replicas"]):
            return None
        return result

    def finish(self) -> None:
        """Start it, or go on with it, unless it is finished.

        Raises:
            SettingsError: the folder holds a run with other settings.
            RuntimeError: if it fails or is interrupted; its output is in ``log.txt`` of its folder.
        """
        self.check()
        if self.result() is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own = as_given("hydra.run.dir", str(self.folder))
        arguments = [*self.settings, "compute.threads=1", own]
        if self.has_begun:
            again = [each for each in self.settings if each.startswith(("env=", "trust_env="))]
            arguments = [as_given("resume", str(self.folder)), *again]
        script, log = RECIPES / f"{self.door.name}.py", self.folder / "log.txt"
        if run(script, arguments, log) != 0:
            raise RuntimeError(f"{script.name} failed, see {log}{_last_line(log)}")
        if self.result() is None:
            raise RuntimeError(f"{script.name} was interrupted, see {log}: start it again")


def _last_line(log: Path) -> str:
    """Return what a run has said last."""
    lines = [each.strip() for each in log.read_text(errors="replace").splitlines()]
    return f": {lines[-1][:LONGEST]}" if lines and lines[-1] else ""


def new_folder(path: Path) -> Path:
    """Make the folder of all runs, unless it is there.

    Raises:
        SettingsError: that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--folder {path}: {error.strerror}") from None
    return path


_running: set[subprocess.Popen] = set()


def run(script: Path, arguments: Sequence[str], log: Path) -> int:
    """Run a recipe in a process of its own, that :func:`finish` ends.

    Args:
        script: the recipe.
        arguments: of it.
        log: where its output goes, after what is there.

    Returns:
        its exit code.
    """
    with (
        log.open("a") as file,
        subprocess.Popen(
            [sys.executable, str(script), *arguments], stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        _running.add(process)
        try:
            return process.wait()
        finally:
            _running.remove(process)


def ensure_data(settings: Sequence[Settings]) -> None:
    """Make the data of runs that are not there, once each."""
    given = [each.data.dataset or () for each in settings]
    sources = [source for its in given for source in ([its] if isinstance(its, str) else its)]
    for source in dict.fromkeys(sources):
        collection.ensure(source)


class Finishing(Protocol):
    """What can be finished in a process of its own, and is not done again."""

    def finish(self) -> None: ...


def finish(jobs: Sequence[Finishing], processes: int) -> None:
    """Finish them, so many at a time; one that fails is told at once, and the others go on.

    Raises:
        RuntimeError: some have failed, raised after the others are finished.
        SettingsError: the folder of one holds another run; no other is begun.
        Stopped: a signal came; the runs have saved what they had.
    """
    failed = []
    with stoppable() as stop, ThreadPoolExecutor(processes) as executor:
        pending = [executor.submit(job.finish) for job in jobs]
        try:
            try:
                for each in tqdm(pending, desc="runs", unit="run"):
                    try:
                        each.result()
                    except RuntimeError as error:
                        failed.append(str(error))
                        tqdm.write(f"{error}; the others go on", file=sys.stderr)
            except Exception:
                executor.shutdown(cancel_futures=True)
                raise
        except Stopped as stopped:
            executor.shutdown(wait=False, cancel_futures=True)
            with stop.patient():
                _stop(pending, stopped.signal)
            raise
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(pending)} runs: {'; '.join(failed)}")


def _stop(pending: Sequence[Future], name: str) -> None:
    """Pass a signal on to the runs, and wait for their ends; a terminal has sent them its Ctrl-C itself."""
    told: set[subprocess.Popen] = set()
    while not all(each.done() for each in pending):
        for each in {*_running} - told if name != "SIGINT" else ():
            each.send_signal(getattr(signal, name))
            told.add(each)
        time.sleep(0.1)


@contextmanager
def told_if_stopped() -> Iterator[None]:
    """End the process with one line where a signal ended what is inside."""
    try:
        yield
    except KeyboardInterrupt as error:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(EXIT_CODES[error.signal if isinstance(error, Stopped) else "SIGINT"])
