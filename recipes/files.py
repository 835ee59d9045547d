"""Files that are replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write instead of another one, which it replaces when it is complete.

    Args:
        path: to be replaced, if it is there.
    """
    new = path.with_suffix(".new")
    yield new
    new.replace(path)
