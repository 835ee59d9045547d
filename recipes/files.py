"""Files that are replaced whole or not at all, or grow line by line, and how they are shown."""

from __future__ import annotations

import csv
from pathlib import Path

from torchrl_iql.files import on_disk, whole

__all__ = ["on_disk", "rows", "shown", "whole"]


def rows(file: Path) -> list[dict[str, str]]:
    """Read the lines of a CSV; one that is being written, or that a kill has cut, is left out."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def shown(path: Path) -> Path:
    """Return a path as it is short to read: what is below the working directory, from there."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
