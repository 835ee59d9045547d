"""Files that are replaced whole or not at all, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["shown", "whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write instead of another one, which it replaces when it is complete; else it is removed.

    Args:
        path: to be replaced, if it is there.
    """
    new = path.with_suffix(".new")
    try:
        yield new
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)


def shown(path: Path) -> Path:
    """Return a path as it is short to read: what is below the working directory, from there."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
