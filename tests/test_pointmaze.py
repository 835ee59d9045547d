"""The embedded data set: genuine, deterministic, built in one piece, and in need of stitching."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from pathlib import Path

import minari
import numpy as np
import pointmaze
import pytest
from gymnasium_robotics.envs.maze.maze_v4 import Maze
from minari import EpisodeData, MinariDataset

TRANSITIONS = 8000  # Two walks of them reach the goal.


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Minari store."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MinariDataset:
    """A small data set with seed 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        return minari.load_dataset(pointmaze.ensure_dataset(transitions=TRANSITIONS))


def same(a: EpisodeData, b: EpisodeData) -> bool:
    return (
        np.array_equal(a.actions, b.actions)
        and np.array_equal(a.rewards, b.rewards)
        and np.array_equal(a.terminations, b.terminations)
        and all(np.array_equal(a.observations[key], b.observations[key]) for key in a.observations)
    )


class TestData:
    def test_has_the_size_asked_for(self, dataset: MinariDataset):
        last = dataset[int(dataset.episode_indices[-1])]
        assert dataset.total_steps - len(last) < TRANSITIONS <= dataset.total_steps
        assert dataset.total_steps == sum(len(episode) for episode in dataset)

    def test_replaying_seeds_and_actions_gives_it_back(self, dataset: MinariDataset):
        env = dataset.recover_environment(eval_env=True)
        metadata = dataset.storage.get_episode_metadata(dataset.episode_indices)
        for episode, recorded in zip(dataset, metadata, strict=True):
            observation, _ = env.reset(seed=recorded["seed"], options=recorded["options"])
            observations, rewards, terminations, successes = [observation], [], [], []
            for action in episode.actions:
                observation, reward, terminated, _, info = env.step(action)
                observations.append(observation)
                rewards.append(reward)
                terminations.append(terminated)
                successes.append(info["success"])
            for key, values in episode.observations.items():
                np.testing.assert_array_equal(values, [each[key] for each in observations])
            np.testing.assert_array_equal(episode.rewards, rewards)
            np.testing.assert_array_equal(episode.terminations, terminations)
            np.testing.assert_array_equal(episode.terminations, successes)

    def test_ends_where_the_walk_ends(self, dataset: MinariDataset):
        maze: Maze = dataset.recover_environment(eval_env=True).get_wrapper_attr("maze")
        for episode in dataset:
            assert len(episode) <= pointmaze.LONGEST
            assert not (episode.terminations | episode.truncations)[:-1].any()
            assert episode.terminations[-1] != episode.truncations[-1]
            if len(episode) < pointmaze.LONGEST and episode.truncations[-1]:
                position = episode.observations["achieved_goal"][-1]
                centre = maze.cell_rowcol_to_xy(maze.cell_xy_to_rowcol(position))
                assert np.linalg.norm(position - centre) < pointmaze.ARRIVED

    def test_must_be_stitched(self, dataset: MinariDataset):
        """Every walk is short; all know the one evaluation goal, which few reach and none from afar."""
        maze: Maze = dataset.recover_environment(eval_env=True).get_wrapper_attr("maze")
        (start,), (goal,) = maze.unique_reset_locations, maze.unique_goal_locations
        reached = 0
        for episode in dataset:
            positions = episode.observations["achieved_goal"]
            desired = episode.observations["desired_goal"]
            assert np.abs(desired - goal).max() <= 0.25
            assert np.ptp(desired, axis=0).max() == 0
            assert np.abs(np.diff(positions, axis=0)).max() < 0.06  # m, at most 5.24 m/s for 0.01 s
            at_start = np.abs(positions - start).max(axis=1) < 0.5
            assert not (at_start.any() and episode.terminations.any())
            reached += episode.terminations[-1]
        assert 0 < reached < len(dataset) / 5

    def test_visits_every_free_cell(self, dataset: MinariDataset):
        maze: Maze = dataset.recover_environment(eval_env=True).get_wrapper_attr("maze")
        positions = np.concatenate([episode.observations["achieved_goal"] for episode in dataset])
        visited = {tuple(maze.cell_xy_to_rowcol(position)) for position in positions}
        assert visited == {
            (i, j)
            for i, row in enumerate(pointmaze.MAZE.split())
            for j, cell in enumerate(row)
            if cell != "#"
        }


class TestStore:
    def test_the_seed_decides(self, dataset: MinariDataset, store: Path):
        again = minari.load_dataset(pointmaze.ensure_dataset(transitions=TRANSITIONS, seed=0))
        assert all(same(a, b) for a, b in zip(dataset, again, strict=True))
        minari.delete_dataset(pointmaze.DATASET_ID)
        other = minari.load_dataset(pointmaze.ensure_dataset(transitions=200, seed=1))
        assert not same(dataset[0], other[0])

    def test_what_is_there_is_reused(self, store: Path, monkeypatch: pytest.MonkeyPatch):
        first = pointmaze.ensure_dataset(transitions=200)
        monkeypatch.setattr(pointmaze, "_walk", None)
        assert pointmaze.ensure_dataset(transitions=200) == first
        assert list(minari.list_local_datasets()) == [first]

    @pytest.mark.parametrize("other", [{"transitions": 300}, {"transitions": 200, "seed": 1}])
    def test_another_recipe_is_not_mistaken_for_it(self, store: Path, other: dict[str, int]):
        pointmaze.ensure_dataset(transitions=200)
        with pytest.raises(ValueError, match=r"'transitions': 200, 'seed': 0.*Delete it"):
            pointmaze.ensure_dataset(**other)

    def test_an_interrupted_build_leaves_nothing(
        self, dataset: MinariDataset, store: Path, monkeypatch: pytest.MonkeyPatch
    ):
        walk, walks = pointmaze._walk, []

        def interrupted(*args):
            walks.append(walk(*args))
            if len(walks) == 4:
                assert list(store.glob(".*/*/data/main_data.hdf5"))
                raise KeyboardInterrupt
            return walks[-1]

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pointmaze, "_walk", interrupted)
            pointmaze.ensure_dataset(transitions=TRANSITIONS)
        assert list(store.iterdir()) == []
        rebuilt = minari.load_dataset(pointmaze.ensure_dataset(transitions=TRANSITIONS))
        assert all(same(a, b) for a, b in zip(dataset, rebuilt, strict=True))

    def test_a_killed_build_is_not_taken_for_complete(self, store: Path):
        build = """if True:
            import os, signal, pointmaze
            pointmaze.MinariStorage.update_metadata = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            pointmaze.ensure_dataset(transitions=200)
        """
        folder = Path(inspect.getfile(pointmaze)).parent
        killed = subprocess.run([sys.executable, "-c", build], cwd=folder, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert list(store.iterdir())
        assert not minari.list_local_datasets()
        dataset = minari.load_dataset(pointmaze.ensure_dataset(transitions=200))
        assert dataset.total_steps >= 200

    def test_the_first_of_two_simultaneous_builds_stays(self, store: Path):
        first = minari.load_dataset(pointmaze.ensure_dataset(transitions=200))
        pointmaze._build(store / pointmaze.DATASET_ID, {"transitions": 100, "seed": 1})
        assert len(first) == len(minari.load_dataset(pointmaze.DATASET_ID))
        assert [path.name for path in store.iterdir()] == [pointmaze.DATASET_ID]
