"""Files that are replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write instead of another one, which it replaces when it is complete; else it is removed.

    Args:
        path: to be replaced, if it is there.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        yield new
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
