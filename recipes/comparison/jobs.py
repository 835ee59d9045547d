"""Runs of the recipes, a process with one thread each, several at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.stopping import EXIT_CODES, Stopped, stoppable
from torchrl_iql_recipes.files import whole

__all__ = [
    "Job",
    "ensure_data",
    "finish",
    "run",
    "settings_in",
    "told_if_stopped",
    "write_settings",
]


@dataclass(frozen=True)
class Job:
    """One run of a recipe.

    Attributes:
        script: the recipe.
        folder: where it leaves its results.
        settings: what it is started with.
    """

    script: Path
    folder: Path
    settings: Sequence[str]

    def result(self) -> dict[str, Any] | None:
        """Return what its ``scores.json`` holds, once it is finished."""
        result = results.read(self.folder)
        if result is None or any(each.get("interrupted", False) for each in result["replicas"]):
            return None
        return result

    def finish(self) -> None:
        """Start it, or go on with it, unless it is finished.

        Raises:
            ValueError: if the folder holds a run with other settings.
            RuntimeError: if it fails or is interrupted; its output is in ``log.txt`` of its folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known, begun = self.folder / "settings.json", (self.folder / "config.yaml").exists()
        asked = settings_in(known)
        is_of_others = begun and not known.exists()
        if is_of_others or asked not in (None, list(self.settings)):
            where = "config.yaml" if is_of_others else known.name
            raise ValueError(
                f"{self.folder} holds a run with other settings, see {where}: remove it, or give "
                "another --folder"
            )
        if asked is None:
            write_settings(known, self.settings)
        if self.result() is not None:
            return
        arguments = [*self.settings, "compute.threads=1", f"hydra.run.dir='{self.folder}'"]
        if begun:
            again = [each for each in self.settings if each.startswith(("env=", "trust_env="))]
            arguments = [f"resume='{self.folder}'", *again]
        log = self.folder / "log.txt"
        if run(self.script, arguments, log) != 0:
            raise RuntimeError(f"{self.script.name} failed, see {log}")
        if self.result() is None:
            raise RuntimeError(f"{self.script.name} was interrupted, see {log}: start it again")


def settings_in(file: Path) -> list[str] | None:
    """Return what something was started with; None if there is no such file, or a kill cut it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def write_settings(file: Path, settings: Sequence[str]) -> None:
    """Write what something is started with, for :func:`settings_in`."""
    with whole(file) as new:
        new.write_text(json.dumps(list(settings), indent=2) + "\n")


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
        ValueError: the folder of one holds another run; no other is begun.
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
