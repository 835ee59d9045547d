"""Real data and the recipes, for tests that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
# Small networks gain nothing from more threads, and threads that wait slow each other down.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests load is not kept in the user's cache."""
    os.environ["TORCHRL_IQL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def maze_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of a small PointMaze data set, in a Minari store of the tests' own."""
    import collect

    os.environ["MINARI_DATASETS_PATH"] = str(tmp_path_factory.mktemp("minari"))
    collect.build("test/maze-v0", collect.behavior("pointmaze/stitch"), 3000, workers=1)
    return "test/maze-v0"
