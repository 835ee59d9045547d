"""Data of one's own as one of Minari's: what is loaded again is what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from episodes import END, MARKS, PLANE, WALKS, joined, leaves, record, walk, write
from torchrl_iql.data import OfflineDataset, load
from torchrl_iql.spaces import observation_rows, observations_of

pytestmark = MARKS

ROBOT = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (36, 40, 3), np.uint8),
        "joints": spaces.Box(-3, 3, (2, 2), np.float64),
        "mode": spaces.Discrete(4, start=2),
        "pair": spaces.Tuple((spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3))),
    }
)


def assert_saved(dataset: OfflineDataset, dataset_id: str, **options: Any) -> OfflineDataset:
    dataset.save_minari(dataset_id)
    found = load(dataset_id, **options)
    assert leaves(found.transitions) == leaves(dataset.transitions)
    assert found.episode_lengths.equal(dataset.episode_lengths)
    assert found.observation_space == dataset.observation_space
    assert found.action_space == dataset.action_space
    assert found.reference_scores == dataset.reference_scores
    return found


def test_terminations_truncations_and_scores_are_kept(root: Path) -> None:
    dataset = joined(*WALKS, reference_scores=(-1.0, 5.0))
    assert_saved(dataset, "own/walks-v0")
    episodes = list(minari.load_dataset("own/walks-v0").iterate_episodes())  # Minari's own reader
    for episode, saved in zip(episodes, WALKS, strict=True):
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_allclose(getattr(episode, key), getattr(saved, key), atol=1e-5)
    assert not list(root.glob("**/.unfinished*"))


def test_the_environment_is_kept() -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    env.action_space.seed(0)
    recorded = write(record(env, 0, lambda _: env.action_space.sample()), env=env)
    for env_spec in (None, "Acrobot-v1"):
        found = assert_saved(load(recorded, env=env_spec), f"own/of-{env_spec}-v0")
        assert found.env_spec is not None
        assert found.env_spec.id == env_spec or (
            found.env_spec.max_episode_steps == 20 and not env_spec
        )
    function = EnvSpec("Mine-v0", entry_point=lambda: env)
    with pytest.raises(ValueError, match="the environment Mine-v0 can not be stored: "):
        joined(walk(3), env_spec=function).save_minari("own/mine-v0")


def test_fragments_stay_fragments() -> None:
    rows = {"observations": np.arange(12.0).reshape(6, 2), "actions": np.zeros((6, 1))}
    rows |= {"rewards": np.arange(6.0), "terminals": np.arange(6) == 0}
    fragments = OfflineDataset.from_arrays(
        "rows", next_observations=rows["observations"] + 0.5, **rows
    )
    assert fragments.recording.stopped == 5
    found = assert_saved(fragments, "own/rows-v0")
    assert found.recording.stopped == 5
    for _ in range(2):  # parsed, then cached
        with pytest.raises(ValueError, match="a statistic of whole episodes, but 5 of 6 end"):
            load("own/rows-v0", reward="return_range")
        load("own/rows-v0")
    joined(walk(3), walk(2)).save_minari("own/walks-v0")
    assert load("own/walks-v0").recording.stopped == 0


def test_images_and_compound_observations_are_kept_bit_for_bit() -> None:
    ROBOT.seed(0)
    seen = [ROBOT.sample() for _ in range(6)]
    observations = {
        "camera": np.stack([each["camera"] for each in seen]),
        "joints": np.stack([each["joints"] for each in seen]),
        "mode": np.stack([each["mode"] for each in seen]),
        "pair": tuple(np.stack([each["pair"][i] for each in seen]) for i in range(2)),
    }
    rows = observation_rows(ROBOT, observations, 6)
    for row, each in zip(rows, seen, strict=True):  # Gymnasium's own inverse
        np.testing.assert_allclose(row, spaces.flatten(ROBOT, each), rtol=1e-6)
    again: Any = observations_of(ROBOT, rows)
    for i in range(6):
        expected: Any = spaces.unflatten(ROBOT, rows[i].astype(np.float64))
        for key in ("camera", "joints", "mode"):
            np.testing.assert_allclose(again[key][i], expected[key], rtol=1e-6)
            assert again[key].dtype == ROBOT[key].dtype
        for part, other in zip(again["pair"], expected["pair"], strict=True):
            np.testing.assert_array_equal(part[i], other)
    dataset = joined(walk(5, observations=observations), observation_space=ROBOT)
    assert_saved(dataset, "own/robot-v0")
    camera = joined(walk(5, observations=observations["camera"]), observation_space=ROBOT["camera"])
    found = assert_saved(camera, "own/camera-v0")
    assert found.transitions["observation"].dtype == torch.uint8


def test_discrete_and_integer_actions_are_kept() -> None:
    for space, actions in (
        (spaces.Discrete(3, start=5), np.array([5, 7, 6])),
        (spaces.Box(-3, 3, (2,), np.int64), np.array([[-3, 3], [0, 1], [2, -2]])),
        (spaces.Box(-0.1, 0.3, (2, 1), np.float64), np.full((3, 2, 1), 0.3)),
    ):
        dataset = joined(walk(3, actions=actions), action_space=space)
        name = f"own/{type(space).__name__}-{space.dtype}-v0"
        assert_saved(dataset, name)
        (episode,) = minari.load_dataset(name).iterate_episodes()
        np.testing.assert_allclose(episode.actions, actions, atol=1e-5)


def test_columns_are_kept() -> None:
    infos = {"cost": np.arange(3.0), "here": np.arange(4), "deep/er": np.ones((3, 2), np.float32)}
    dataset = joined(walk(3, infos=infos), columns=["cost", "here"])
    assert_saved(dataset, "own/walks-v0", columns=["cost", "here"])


def test_the_last_observation_may_be_nan() -> None:
    observations = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [np.nan, np.nan]])
    assert_saved(joined(walk(3, observations=observations, terminations=END)), "own/walks-v0")


def test_parts_and_cut_episodes_are_saved_as_they_are() -> None:
    walks = [walk(4, 10.0 * i, rewards=[0, 1, 0, 0]) for i in range(6)]
    whole = joined(*walks, episode_rule="until_success")
    assert_saved(whole.split(0.5)[1], "own/some-v0")
    assert load("own/some-v0").episode_lengths.tolist() == [2, 2, 2]


def test_what_can_not_be_saved_leaves_nothing(root: Path) -> None:
    dataset = joined(walk(3), walk(4, 10.0))
    with pytest.raises(ValueError, match=r"'../walks-v0' is no id of Minari's"):
        dataset.save_minari("../walks-v0")
    with pytest.raises(
        ValueError, match=r"^walks: its rewards were changed by reward rule 'minus_one'"
    ):
        joined(walk(3), reward_rule="minus_one").save_minari("own/walks-v0")
    with pytest.raises(ValueError, match=r"^walks: its rewards were changed by n_step"):
        dataset.n_step(2, 0.9).save_minari("own/walks-v0")
    assert not list(root.iterdir())
    dataset.save_minari("own/walks-v0")
    with pytest.raises(FileExistsError, match="there is a data set own/walks-v0 already, in "):
        dataset.save_minari("own/walks-v0")


def test_data_that_differ_in_the_type_of_numbers_alone_are_joined(tmp_path: Path) -> None:
    """As a file of D4RL, which declares none, and Minari's of the same environment."""
    import h5py

    write(walk(4))
    first = walk(3)
    path = tmp_path / "walks.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.asarray(first.observations[:-1], np.float32)
        file["next_observations"] = np.asarray(first.observations[1:], np.float32)
        file["actions"], file["rewards"] = first.actions, np.asarray(first.rewards)
        file["terminals"], file["timeouts"] = np.zeros(3), np.asarray(first.truncations)
    for sources, lengths in ((["test/walks-v0", path], [4, 3]), ([path, "test/walks-v0"], [3, 4])):
        found = load(sources)
        assert found.episode_lengths.tolist() == lengths
        expected = joined(*(walk(n) for n in lengths))
        assert leaves(found.transitions) == leaves(expected.transitions)
    assert load(["test/walks-v0", path]).observation_space == PLANE
    bounded = spaces.Box(-99, 99, (2,), np.float64)
    write(walk(4), dataset_id="test/bounded-v0", observation_space=bounded)
    with pytest.raises(
        ValueError, match=r"test/bounded-v0 can not be joined with .*walks.hdf5: its obs"
    ):
        load([path, "test/bounded-v0"])
