"""Where data sets are kept that are known by a name, and whether they are there, without PyTorch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from minari.storage import get_dataset_path

__all__ = ["OGBENCH_TASK", "DownloadError", "d4rl_folder", "is_stored"]


class DownloadError(FileNotFoundError):
    """A data set is not on this machine, and could not be had from elsewhere."""


D4RL_SUFFIX = ".hdf5"

OGBENCH_TASK = re.compile(r"([\w-]+)-(\w+)(-singletask(?:-task\d)?)-(v\d+)")
OGBENCH_FOLDER = "~/.ogbench/data"
"""As OGBench has it, which need not be installed to look there."""


def d4rl_folder() -> Path:
    """Return the folder of D4RL's files: ``$D4RL_DATASET_DIR``, or ``~/.d4rl/datasets``."""
    return Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()


def is_stored(source: str) -> bool:
    """Return whether a data set is on this machine, by its path, or where its kind is kept.

    Args:
        source: a path, a Minari id, the name of a D4RL file, or a single task of OGBench.
    """
    if Path(source).exists():
        return True
    if source.endswith(D4RL_SUFFIX):
        return (d4rl_folder() / source).exists()
    if task := OGBENCH_TASK.fullmatch(source):
        world, kind, _, version = task.groups()
        return Path(OGBENCH_FOLDER, f"{world}-{kind}-{version}.npz").expanduser().exists()
    return (get_dataset_path(source) / "data").is_dir()
