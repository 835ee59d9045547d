"""Finished arrays on disk, so that a data set is parsed once.

An entry is one file, a tensordict archive, which is mapped into memory instead of read. It ends with
its checksum, and its name says what it was made from: another source has another entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

__all__ = ["entry_path", "folder", "read", "unfinished", "write"]

FOLDER_VARIABLE = "TORCHRL_IQL_CACHE"
DEFAULT_FOLDER = "~/.cache/torchrl_iql"
VERSION = 4
"""To be raised whenever the same source and rules give other arrays than before."""

CHECKSUM_BYTES = 4
SEALED = 0x2144DF1C
"""The CRC-32 of bytes that end with the CRC-32, little-endian, of those before: always the same."""

PART = 1 << 20
"""Bytes read at once."""

UNFINISHED = ".unfinished-"
ABANDONED_AFTER = 24 * 3600
"""Seconds after which what a killed process left unfinished is removed."""


def folder() -> Path:
    """Return the folder of all that is kept."""
    return Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER)).expanduser()


def entry_path(sources: Sequence[Path], *rules: Any) -> Path:
    """Name the file that keeps what these rules make of files and folders, as they are now.

    Args:
        sources: the files and folders. Their paths count, and the path, size and modification time
            of every file.
        rules: what else determines the arrays, as JSON can write it.
    """
    paths = [str(source.resolve()) for source in sources]
    states = [_states(source) for source in sources]
    return folder() / f"{_digest(paths, rules)}-{_digest(VERSION, states)}.tdz"


def _states(source: Path) -> list[tuple[str, int, int]]:
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    stats = [(str(path.relative_to(source)), path.stat()) for path in paths if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def read(entry: Path) -> TensorDict | None:
    """Read an entry; None if there is none or, with a warning, if it is damaged.

    All of its bytes are checked and none is kept: the tensors are mapped, and copied on write.
    """
    found = _identity(entry)
    if found is None:
        return None
    try:
        if _checksum(entry) != SEALED:
            raise ValueError("its checksum is wrong")
        mapped = TensorDict.load_memmap(entry, allow_pickle=False)
    except Exception as error:  # whatever is wrong with it, the source is still there
        if _identity(entry) == found:  # else another process has just removed or replaced it
            warnings.warn(
                f"the cache entry {entry} is damaged and made anew: {error}", stacklevel=3
            )
        return None
    # Through numpy, since torch can not send tensors that it mapped itself to another process.
    return mapped.apply(lambda tensor: torch.from_numpy(tensor.numpy()))


def _identity(entry: Path) -> tuple[int, int] | None:
    """Return what tells a file from another that replaced it; None if none can be found."""
    try:
        state = entry.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def write(entry: Path, content: TensorDict) -> None:
    """Store an entry whole or, with a warning, not at all.

    It replaces the entries of earlier states of the source.
    """
    source, _, _ = entry.name.partition("-")
    try:
        with unfinished(entry) as archive:
            content.save(str(archive), archive=True)
            _seal(archive)
        for earlier in set(entry.parent.glob(f"{source}-*.tdz")) - {entry}:
            earlier.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"could not write the cache entry {entry}: {error}", stacklevel=3)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield where to make a file that is there whole or not at all: it moves to ``path`` at last.

    What killed processes left beside it is removed after a day.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)


def _seal(archive: Path) -> None:
    """Add the checksum as the comment of the archive, its last bytes.

    The checksums within would not tell that an array is missing from the table of contents.
    """
    with zipfile.ZipFile(archive, "a") as file:
        file.comment = bytes(CHECKSUM_BYTES)
    os.truncate(archive, archive.stat().st_size - CHECKSUM_BYTES)
    checksum = _checksum(archive).to_bytes(CHECKSUM_BYTES, "little")
    with archive.open("ab") as file:
        file.write(checksum)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(PART):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if folder.stat().st_mtime < time.time() - ABANDONED_AFTER:
                shutil.rmtree(folder)
