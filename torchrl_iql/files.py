"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["on_disk", "whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write instead of another one, which it replaces when it is complete; else it is removed.

    After a power cut, too, there is the one or the other.

    Args:
        path: to be replaced, if it is there.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        yield new
        on_disk(new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    with suppress(OSError):  # there are file systems that do not know it of folders
        on_disk(path.parent)


def on_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
