"""The folder of a run belongs to one process at a time."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.files import whole

__all__ = ["LockedError", "held", "is_alive", "is_begun", "new_folder"]

LOCK, HOLDER = ".lock", ".holder"
"""The file that is locked, and the one that says by whom; its time is the heartbeat."""

HEARTBEAT = 30.0
"""Seconds between two heartbeats, for processes on other hosts, which may not see the lock."""

WRITTEN_FIRST = "config.yaml", "data.json"
"""What a run writes before anything has come of it."""

RUNS = "runs"
"""Where the folders of runs are, if nothing else is said."""

DEAD = 300.0
"""Seconds without a heartbeat after which a process on another host is taken for dead."""

_held: set[Path] = set()


class LockedError(SettingsError):
    """The folder belongs to another process, which is alive."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a run; it is created if it does not exist.

    The lock of a process that died is free. Inside of another such block of this process it does nothing.

    Raises:
        LockedError: another process holds it; the message says which, on which host.
        SettingsError: the folder can not be written to.
    """
    path = path.resolve()
    if path in _held:
        yield
        return
    lock, there = FileLock(path / LOCK), _folders(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(f"{path} belongs to {_holder(path)}, which is running there") from None
    except OSError as error:
        raise SettingsError(f"{path} can not be written to: {error}") from None
    _held.add(path)
    over = threading.Event()
    try:
        _take(path)
        beats = threading.Thread(target=_beat, args=(path / HOLDER, over), daemon=True)
        beats.start()
        yield
    finally:
        over.set()
        _held.remove(path)
        with suppress(OSError):
            if _is_ours(path):
                (path / HOLDER).unlink()
            if not is_begun(path):
                (path / LOCK).unlink()
                _remove_empty(path, there)
        lock.release()


def _take(path: Path) -> None:
    """Write who holds a folder, if nobody on another host does."""
    holder = path / HOLDER
    with whole(holder) as new:
        new.write_text(json.dumps(_us()))
        try:
            beaten, host = holder.stat().st_mtime, json.loads(holder.read_text())["host"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        # Both times are the file system's.
        if host != socket.gethostname() and new.stat().st_mtime - beaten < DEAD:
            raise LockedError(
                f"{path} belongs to {_holder(path)}, which was alive there within the last "
                f"{DEAD / 60:g} minutes"
            )


def _us() -> dict[str, int | str]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _is_ours(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return json.loads((path / HOLDER).read_text()) == _us()
    return False


def _holder(path: Path) -> str:
    try:
        known = json.loads((path / HOLDER).read_text())
        return f"process {known['pid']} on {known['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process"


def is_alive(path: Path) -> bool:
    """Return whether a process is at work in a folder, without taking the lock, which another may want."""
    holder = path / HOLDER
    try:
        known, beaten = json.loads(holder.read_text()), holder.stat().st_mtime
        if time.time() - beaten > DEAD:
            return False
        if known["host"] == socket.gethostname():
            os.kill(known["pid"], 0)
    except PermissionError:  # it is somebody else's
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return True


def _beat(holder: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(holder)


def is_begun(path: Path) -> bool:
    """Return whether something has come of a run in a folder."""
    return any(any(path.rglob(name)) for name in ("metrics.csv", "*.ckpt", "checkpoint-*"))


@contextmanager
def new_folder(path: Path, *, named: bool) -> Iterator[Path]:
    """Hold the folder of a new run; one of which nothing comes is removed.

    Args:
        path: of it, created if it does not exist.
        named: whether it has to be this one, whatever is in it; else a number is added to its name if there
            is a run in it.

    Raises:
        LockedError: it is named, and another process holds it.
        SettingsError: it can not be written to; or it is named, and has a file that no run has left, but one
            would write.
    """
    folder, there = path, _folders(path)
    if len(there) == 1 and not any(path.iterdir()):  # Hydra has just made it
        there = set()
    try:
        with ExitStack() as holding:
            for number in itertools.count(2):
                others = _files_of_others(folder)
                if named and others:
                    raise SettingsError(
                        f"{folder} has a {others[0]} that no run has left: give another folder"
                    )
                try:
                    holding.enter_context(held(folder))
                    if named or not (others or is_begun(folder)):
                        break
                except LockedError:
                    if named:
                        raise
                holding.close()
                folder = path.with_name(f"{path.name}-{number}")
                there = _folders(folder)
            try:
                yield folder
            finally:
                if not is_begun(folder):
                    for name in WRITTEN_FIRST:
                        (folder / name).unlink(missing_ok=True)
    finally:
        if not is_begun(folder):
            _remove_empty(folder, there)
            _remove_empty_parents(folder)


def _files_of_others(path: Path) -> list[str]:
    """Return what a run would write into a folder first, where somebody else has: a run leaves its lock."""
    found = [name for name in WRITTEN_FIRST if (path / name).exists()]
    return [] if (path / LOCK).exists() or is_begun(path) else found


def _remove_empty_parents(path: Path) -> None:
    """Remove the empty folders that Hydra has made around one in ``runs``."""
    root = Path(RUNS).resolve()
    for parent in path.resolve().parents:
        if not parent.is_relative_to(root):
            return
        with suppress(OSError):
            parent.rmdir()


def _folders(path: Path) -> set[Path]:
    """Return a folder and all in it, those that exist."""
    return {each for each in (path, *path.rglob("*")) if each.is_dir()}


def _remove_empty(path: Path, there: set[Path]) -> None:
    """Remove a folder and those in it that are empty, but for those that were there."""
    for each in sorted(_folders(path) - there, reverse=True):
        with suppress(OSError):
            each.rmdir()
