"""Real data and the recipes, for tests that need them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

# Small networks gain nothing from more threads, and threads that wait slow each other down; here, and in
# the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import gymnasium_robotics
import minari
import pytest
import torch

gymnasium.register_envs(gymnasium_robotics)  # what tests make of it themselves


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests load and compile out of the user's cache, in one that all workers share."""
    if not hasattr(config, "workerinput"):  # a worker inherits it
        folder = tempfile.mkdtemp(prefix="torchrl-iql-tests-")
        os.environ["TORCHRL_IQL_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def maze_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Store a small PointMaze data set, in a Minari store of the tests' own; return its id."""
    from torchrl_iql_recipes.behaviors import collection, mazes

    os.environ["MINARI_DATASETS_PATH"] = str(tmp_path_factory.mktemp("minari"))
    with pytest.MonkeyPatch.context() as patch:
        # A third of the time limit, all of which policies that know nothing need.
        patch.setitem(mazes.POINT_STEPS, "stitch", 100)
        collection.build("test/maze-v0", collection.behavior("pointmaze/stitch"), 3000, workers=1)
    return "test/maze-v0"


@pytest.fixture
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache of one test."""
    folder = tmp_path_factory.mktemp("cache") / "torchrl_iql"
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the local Minari root of one test, without a remote one."""

    def no_network(dataset_id: str) -> None:
        raise ConnectionError(f"no route to {dataset_id}")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari, "download_dataset", no_network)
    return tmp_path


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("continuous", "categorical", "one-hot"))
def kind(request: pytest.FixtureRequest) -> str:
    """Return the kind of actions."""
    return request.param
