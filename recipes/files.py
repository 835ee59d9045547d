"""Files that are replaced whole or not at all, and how they are shown."""

from __future__ import annotations

from pathlib import Path

from torchrl_iql.files import on_disk, whole

__all__ = ["on_disk", "shown", "whole"]


def shown(path: Path) -> Path:
    """Return a path as it is short to read: what is below the working directory, from there."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
