"""The data room, against environments replayed step by step, gymnasium's own flatten and numpy."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari import EpisodeData
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict, pad
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, SerialEnv

from torchrl_iql.data import OfflineDataset, load

gymnasium.register_envs(gymnasium_robotics)

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")

FORMATS = ("hdf5", "arrow", "parquet")
PLANE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
UNIT = spaces.Box(-1.0, 1.0, (1,))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    """The cache of one test, not that of the user."""
    folder = tmp_path_factory.mktemp("cache") / "torchrl_iql"
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """The local Minari root of one test, without a remote one."""

    def no_network(dataset_id: str) -> None:
        raise ConnectionError(f"no route to {dataset_id}")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari, "download_dataset", no_network)
    return tmp_path


def walk(length: int = 3, start: float = 0.0, **changes: Any) -> EpisodeBuffer:
    """Observation t is (start + t, -t), action t is t / length, reward t is start + t / 2."""
    steps = np.arange(length + 1.0)
    recorded = {
        "observations": np.stack([start + steps, -steps], axis=1),
        "actions": (steps[:-1, None] / length).astype(np.float32),
        "rewards": start + steps[:-1] / 2,
        "terminations": np.zeros(length, bool),
        "truncations": steps[1:] == length,
    }
    return EpisodeBuffer(**recorded | changes)


def joined(
    *episodes: EpisodeBuffer,
    observation_space: spaces.Space = PLANE,
    action_space: spaces.Space = UNIT,
    **rules: Any,
) -> OfflineDataset:
    """A data set without storage in between."""
    keys = "observations", "actions", "rewards", "terminations", "truncations", "infos"
    return OfflineDataset.from_episodes(
        "walks",
        [EpisodeData(i, *(getattr(e, key) for key in keys)) for i, e in enumerate(episodes)],
        observation_space=observation_space,
        action_space=action_space,
        **rules,
    )


def write(*episodes: EpisodeBuffer, dataset_id: str = "test/walks-v0", **options: Any) -> str:
    if "env" not in options:
        options = {"observation_space": PLANE, "action_space": UNIT} | options
    minari.create_dataset_from_buffers(dataset_id, list(episodes), **options)
    return dataset_id


def stacked(values: list) -> Any:
    if isinstance(values[0], dict):
        return {key: stacked([value[key] for value in values]) for key in values[0]}
    return np.stack(values)


def record(env: gymnasium.Env, seed: int, policy: Any) -> EpisodeBuffer:
    observation, info = env.reset(seed=seed)
    observations, infos, steps, done = [observation], [info], [], False
    while not done:
        action = policy(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        infos.append(info)
        steps.append((action, reward, terminated, truncated))
        done = terminated or truncated
    actions, rewards, terminations, truncations = map(list, zip(*steps, strict=True))
    return EpisodeBuffer(
        seed=seed,
        observations=stacked(observations),
        actions=np.stack(actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={"success": [bool(info.get("success")) for info in infos]},
    )


def replay(env: gymnasium.Env, seed: int | None, actions: Any) -> list[tuple]:
    """(observation, next observation, reward, terminated, truncated) from the environment alone."""
    env = gymnasium.wrappers.FlattenObservation(env)
    observation, _ = env.reset(seed=seed)
    transitions = []
    for action in actions:
        following, *outcome, _ = env.step(action)
        transitions.append((observation, following, *outcome))
        observation = following
    return transitions


def assert_transitions(found: TensorDict, expected: list[tuple]) -> None:
    following = found["next"]
    for column, values in zip(
        (
            found["observation"],
            following["observation"],
            following["reward"],
            following["terminated"],
            following["truncated"],
        ),
        zip(*expected, strict=True),
        strict=True,
    ):
        values = np.stack(values).reshape(column.shape)
        np.testing.assert_array_equal(column, values.astype(column.numpy().dtype))
    assert following["done"].equal(following["terminated"] | following["truncated"])


class TestValues:
    @pytest.mark.parametrize("data_format", FORMATS)
    @pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
    def test_a_data_set_is_its_replay(self, env_id, data_format):
        env = gymnasium.make(env_id, max_episode_steps=15)
        env.action_space.seed(0)
        episodes = [record(env, seed, lambda _: env.action_space.sample()) for seed in range(6)]

        dataset = load(write(*episodes, env=env, data_format=data_format))

        expected = [row for e in episodes for row in replay(env, e.seed, e.actions)]
        assert_transitions(dataset.transitions, expected)
        actions = np.concatenate([e.actions for e in episodes])
        # Torques of [-2, 2] stay 2e-5 inside.
        np.testing.assert_array_equal(
            dataset.transitions["action"],
            actions.clip(-1.99998, 1.99998) if env_id == "Pendulum-v1" else actions,
        )
        assert dataset.episode_lengths.tolist() == [len(e) for e in episodes]
        np.testing.assert_allclose(dataset.episode_returns, [sum(e.rewards) for e in episodes])
        ends = {(e.terminations[-1], e.truncations[-1]) for e in episodes}
        assert ends == {(False, True)} | ({(True, False)} if env_id == "CartPole-v1" else set())

    @pytest.mark.parametrize("data_format", FORMATS)
    def test_layout(self, data_format):
        dataset = load(write(walk(3), walk(2), data_format=data_format))
        assert dataset.transitions.batch_size == (5,)
        assert {
            key: (value.dtype, *value.shape[1:])
            for key, value in dataset.transitions.items(include_nested=True, leaves_only=True)
        } == {
            "observation": (torch.float32, 2),
            "action": (torch.float32, 1),
            ("next", "observation"): (torch.float32, 2),
            ("next", "reward"): (torch.float32, 1),
            ("next", "done"): (torch.bool, 1),
            ("next", "terminated"): (torch.bool, 1),
            ("next", "truncated"): (torch.bool, 1),
        }
        assert dataset.episode_lengths.dtype == torch.int64
        assert dataset.episode_returns.dtype == torch.float64

    def test_one_episode(self):
        transitions = load(write(walk(2))).transitions
        assert transitions["observation"].tolist() == [[0, 0], [1, -1]]
        assert transitions["next", "observation"].tolist() == [[1, -1], [2, -2]]

    def test_the_last_observation_is_not_the_first_of_the_next_episode(self):
        transitions = joined(walk(2), walk(3, start=10)).transitions
        assert transitions["observation"][:, 0].tolist() == [0, 1, 10, 11, 12]
        assert transitions["next", "observation"][:, 0].tolist() == [1, 2, 11, 12, 13]

    @pytest.mark.parametrize(
        ("stored", "terminated", "truncated"),
        [
            ((True, False), True, False),
            ((False, True), False, True),
            ((True, True), True, True),
            ((False, False), False, True),
        ],
    )
    def test_how_an_episode_ends(self, stored, terminated, truncated):
        flags = [np.array([False, False, flag]) for flag in stored]
        following = joined(walk(3, terminations=flags[0], truncations=flags[1])).transitions["next"]
        assert following["terminated"].flatten().tolist() == [False, False, terminated]
        assert following["truncated"].flatten().tolist() == [False, False, truncated]
        assert following["done"].flatten().tolist() == [False, False, True]


class TestSpaces:
    @pytest.mark.parametrize("data_format", FORMATS)
    def test_observations_are_flattened_as_by_gymnasium(self, data_format):
        space = spaces.Dict(
            {
                "zone": spaces.Discrete(4, start=2),
                "image": spaces.Box(-1, 1, (2, 3), np.float64),
                "gears": spaces.MultiDiscrete([2, 3], start=[0, 5]),
                "arm": spaces.Tuple((spaces.Box(-5, 5, (1,)), spaces.MultiBinary(3))),
            },
            seed=0,
        )
        samples = [space.sample() for _ in range(12)]
        observations = {
            key: stacked([s[key] for s in samples]) for key in ("zone", "image", "gears")
        }
        observations["arm"] = tuple(stacked([s["arm"][i] for s in samples]) for i in range(2))

        dataset = load(
            write(
                walk(11, observations=observations),
                observation_space=space,
                data_format=data_format,
            )
        )

        flat = np.stack([spaces.flatten(space, s) for s in samples]).astype(np.float32)
        np.testing.assert_array_equal(dataset.transitions["observation"], flat[:-1])
        np.testing.assert_array_equal(dataset.transitions["next", "observation"], flat[1:])
        assert dataset.observation_space == space
        assert dataset.action_space == UNIT

    @pytest.mark.parametrize("data_format", ["hdf5", "parquet"])
    def test_images_are_decoded(self, data_format):
        space = spaces.Dict({"view": spaces.Box(0, 255, (32, 32, 3), np.uint8)}, seed=0)
        images = stacked([space.sample() for _ in range(4)])
        episode = walk(3, observations=images)
        source = write(episode, observation_space=space, data_format=data_format)
        stored = next(minari.load_dataset(source).iterate_episodes()).observations["view"]
        found = load(source).transitions
        np.testing.assert_array_equal(found["observation"], stored[:-1].reshape(3, -1))
        np.testing.assert_array_equal(found["next", "observation"], stored[1:].reshape(3, -1))

    def test_actions_stay_inside_bounds_on_both_sides(self):
        space = spaces.Box(
            np.array([[-1.0, 0.0], [-np.inf, 2.0]]),
            np.array([[1.0, 10.0], [np.inf, np.inf]]),
            dtype=np.float64,
        )
        actions = np.array([[[-1, 10], [1e9, -7]], [[1.0005, -0.002], [0, 2]], [[0.25, 5], [1, 3]]])
        dataset = joined(walk(3, actions=actions), action_space=space)
        expected = [[-1 + 1e-5, 10 - 5e-5, 1e9, -7], [1 - 1e-5, 5e-5, 0, 2], [0.25, 5, 1, 3]]
        np.testing.assert_array_equal(dataset.transitions["action"], np.float32(expected))

    def test_discrete_actions_count_from_zero(self):
        space = spaces.Discrete(3, start=-1)
        actions = joined(walk(3, actions=[-1, 1, 0]), action_space=space).transitions["action"]
        assert actions.tolist() == [0, 2, 1]
        assert actions.dtype == torch.int64

    @pytest.mark.parametrize(
        ("changes", "spaces_", "message"),
        [
            (
                {"actions": np.array([[0.0], [-1.0021], [0.0]])},
                {},
                r"actions\[1, 0\] is -1.0021, outside \[-1, 1\] by more than 0.001",
            ),
            (
                {"actions": [0, 1, 4]},
                {"action_space": spaces.Discrete(3, start=1)},
                r"actions\[0\] is 0, outside 1..3",
            ),
            (
                {"observations": {"zone": [0, 1, 3, 2]}},
                {"observation_space": spaces.Dict({"zone": spaces.Discrete(3)})},
                r"observations/zone\[2\] is 3, outside 0..2",
            ),
        ],
    )
    def test_values_outside_their_space(self, changes, spaces_, message):
        with pytest.raises(ValueError, match=f"^walks, episode 0: {message}"):
            joined(walk(3, **changes), **spaces_)

    def test_spaces_without_rows(self):
        with pytest.raises(TypeError, match=r"observations: can not flatten Text\(1, 3"):
            joined(walk(3, observations=list("abcd")), observation_space=spaces.Text(3))
        with pytest.raises(TypeError, match=r"must be Box or Discrete, found MultiBinary\(1\)"):
            joined(walk(3), action_space=spaces.MultiBinary(1))


class TestEpisodeRules:
    @pytest.mark.parametrize("data_format", FORMATS)
    def test_a_maze_ends_at_its_goal(self, data_format):
        env = gymnasium.make(
            "PointMaze_Open-v3", continuing_task=True, reset_target=False, max_episode_steps=120
        )

        def seek(observation: dict) -> np.ndarray:
            way = observation["desired_goal"] - observation["achieved_goal"]
            return np.clip(4 * way - observation["observation"][2:], -1, 1).astype(np.float32)

        def rest(observation: dict) -> np.ndarray:
            return np.zeros(2, np.float32)

        episodes = [record(env, seed, policy) for seed, policy in enumerate((seek, rest, seek))]
        source = write(*episodes, env=env, data_format=data_format)

        dataset = load(source, episodes="until_success")

        expected, lengths = [], []
        for episode in episodes:
            steps = replay(env, episode.seed, episode.actions)
            # The keys are sorted: achieved_goal, desired_goal, observation.
            arrived = [np.linalg.norm(s[1][:2] - s[1][2:4]) <= 0.45 for s in steps]
            if any(arrived):
                steps = steps[: arrived.index(True) + 1]
                steps[-1] = (*steps[-1][:3], True, False)
            expected += steps
            lengths.append(len(steps))
        assert_transitions(dataset.transitions, expected)
        assert dataset.episode_lengths.tolist() == lengths
        assert 1 < lengths[0] < 120 == lengths[1]
        assert dataset.episode_returns.tolist() == [1, 0, 1]
        assert load(source).episode_lengths.tolist() == [120, 120, 120]

    @pytest.mark.parametrize(
        ("infos", "rewards"),
        [
            ({"success": [False, False, False, True, False]}, [1.0, 1.0, 1.0, 1.0]),
            ({"success": [False, False, True, False]}, [1.0, 1.0, 1.0, 1.0]),
            ({"success": [True, False, False, True, True]}, [0.0, 0.0, 0.0, 0.0]),
            (None, [0.0, 0.0, 1.0, 1.0]),
        ],
        ids=["with reset", "without reset", "success at reset", "sparse rewards"],
    )
    def test_where_success_is_found(self, infos, rewards):
        episode = walk(4, infos=infos, rewards=rewards)
        transitions = joined(episode, episode_rule="until_success").transitions
        assert transitions["observation"][:, 0].tolist() == [0, 1, 2]
        assert transitions["next", "observation"][:, 0].tolist() == [1, 2, 3]
        assert transitions["next", "terminated"].flatten().tolist() == [False, False, True]
        assert not transitions["next", "truncated"].any()

    @pytest.mark.parametrize("key", ["terminations", "truncations"])
    def test_an_end_inside_an_episode(self, key):
        episode = walk(
            4, **{key: np.array([False, True, False, True])}, rewards=[0.0, 1.0, 0.0, 0.0]
        )
        message = rf"^walks, episode 1: {key}\[1\] ends the episode before its last transition, 3$"
        with pytest.raises(ValueError, match=message):
            joined(walk(3), episode)
        # Where the rule cuts, it is the last one.
        assert joined(episode, episode_rule="until_success").episode_lengths.tolist() == [2]
        late = replace(episode, rewards=[0.0, 0.0, 1.0, 0.0])
        with pytest.raises(ValueError, match=rf"{key}\[1\] ends .* transition, 2$"):
            joined(late, episode_rule="until_success")

    def test_success_at_the_time_limit_terminates(self):
        episode = walk(2, rewards=[0.0, 1.0])
        assert episode.truncations[-1]
        following = joined(episode, episode_rule="until_success").transitions["next"]
        assert following["terminated"].flatten().tolist() == [False, True]
        assert following["truncated"].flatten().tolist() == [False, False]

    def test_without_success_an_episode_stays(self):
        stored = joined(walk(3, rewards=[0.0, 0.0, 0.0]))
        cut = joined(walk(3, rewards=[0.0, 0.0, 0.0]), episode_rule="until_success")
        assert (cut.transitions == stored.transitions).all()

    def test_what_is_cut_is_not_checked(self):
        observations = np.array([[0.0, 0.0], [1.0, 1.0], [np.nan, 0.0], [0.0, 0.0]])
        actions = np.array([[0.0], [np.inf], [5.0]])
        episode = walk(3, observations=observations, actions=actions, rewards=[1.0, 0.0, 0.0])
        transitions = joined(episode, episode_rule="until_success").transitions
        assert transitions["next", "observation"].tolist() == [[1, 1]]

    @pytest.mark.parametrize(
        ("infos", "message"),
        [
            ({"speed": [0.0] * 4}, r".* needs infos/success or .* found infos \['speed'\]"),
            (None, r".* needs infos/success or .* found infos \[\]"),
            ({"success": [True, True]}, "infos/success has 2 entries, expected 3 or 4"),
            ({"success": [0, np.nan, 0]}, r"infos/success\[1\] is nan, expected 0 or 1"),
            ({"success": ["False"] * 3}, "infos/success has dtype <U5, expected numbers"),
            ({"success": np.zeros((3, 2))}, r"infos/success has shape \[3, 2\], expected \[T\]"),
            ({"success": None}, "infos/success is None, expected an array"),
        ],
    )
    def test_without_a_record_of_success(self, infos, message):
        with pytest.raises(ValueError, match=f"^walks, episode 1: {message}"):
            joined(
                walk(3, rewards=[0.0, 0.0, 1.0], infos={"success": [False] * 4}),
                walk(3, infos=infos),
                episode_rule="until_success",
            )

    @pytest.mark.parametrize("data_format", FORMATS)
    def test_without_a_record_of_success_in_files(self, data_format):
        episode = walk(3, infos={"speed": [0.0] * 4, "height": [1.0] * 4})
        source = write(episode, data_format=data_format)
        message = rf"^{source}, episode 0: .* found infos \['height', 'speed'\] and other rewards"
        with pytest.raises(ValueError, match=message):
            load(source, episodes="until_success")


class TestRewardRules:
    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("none", [0, 0.5, 1, 4, 4.5]),
            ("minus_one", [-1, -0.5, 0, 3, 3.5]),
            ("return_range", np.array([0, 0.5, 1, 4, 4.5]) * 1000 / (8.5 - 1.5)),
        ],
    )
    def test_values(self, rule, expected):
        dataset = joined(walk(3), walk(2, start=4), reward_rule=rule)
        rewards = dataset.transitions["next", "reward"].flatten()
        np.testing.assert_array_equal(rewards, np.float32(expected))
        assert dataset.episode_returns.tolist() == [1.5, 8.5]
        assert dataset.reward_rule == rule

    @pytest.mark.parametrize("rule", ["none", "minus_one", "return_range"])
    def test_later_rewards_are_changed_by_the_same_numbers(self, rule):
        source = write(walk(3), walk(2, start=4))
        raw = load(source)
        for dataset in (
            load(source, reward=rule),
            load(source, reward=rule),
        ):  # parsed, then cached
            changed = dataset.reward_transform(raw.transitions["next", "reward"])
            torch.testing.assert_close(changed, dataset.transitions["next", "reward"])
        assert dataset.best_episodes(0.5).reward_transform == dataset.reward_transform

    def test_without_episodes(self):
        assert (
            OfflineDataset.empty("CartPole-v1", reward_rule="minus_one").reward_transform.shift
            == -1
        )
        with pytest.raises(ValueError, match="'return_range' needs the episodes of a data set"):
            OfflineDataset.empty("CartPole-v1", reward_rule="return_range")

    def test_the_range_is_that_of_the_cut_episodes(self):
        episodes = walk(3, rewards=[0.0, 1.0, 1.0]), walk(3, rewards=[0.0, 0.0, 0.0])
        rules = {"reward_rule": "return_range", "episode_rule": "until_success"}
        dataset = joined(*episodes, **rules)
        assert dataset.episode_returns.tolist() == [1, 0]
        assert dataset.transitions["next", "reward"].flatten().tolist() == [0, 1000, 0, 0, 0]

    @pytest.mark.parametrize(
        ("rule", "rewards", "message"),
        [
            ("none", [0.0, 1e39, 0.0], r", episode 0: rewards\[1\] is 1e\+39, expected a finite f"),
            (
                "return_range",
                [0, 3e38, -3e38],
                r": reward rule 'return_range': rewards\[1, 0\] is inf",
            ),
        ],
    )
    def test_infinite_as_float32(self, rule, rewards, message):
        with pytest.raises(ValueError, match=f"^walks{message}"):
            joined(walk(3, rewards=rewards), walk(3), reward_rule=rule)

    def test_without_a_range(self):
        with pytest.raises(ValueError, match=r"^walks: .* 'return_range' .* all of them are 1.5"):
            joined(walk(3), walk(3), reward_rule="return_range")


def with_value(value: float, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape)
    array[index] = value
    return array


def flat(episodes: list[EpisodeBuffer]) -> dict[str, np.ndarray]:
    """Episodes in D4RL's layout, with next observations."""
    return {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([e.terminations for e in episodes]),
        "timeouts": np.concatenate([e.truncations for e in episodes]),
        "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
    }


def as_tensordict(arrays: dict[str, np.ndarray]) -> TensorDict:
    """Arrays in D4RL's layout as TorchRL would hold them."""
    tensors = {key: torch.from_numpy(values) for key, values in arrays.items()}
    return TensorDict(
        {
            "observation": tensors["observations"],
            "action": tensors["actions"],
            "next": {
                "observation": tensors["next_observations"],
                "reward": tensors["rewards"][:, None],
                "terminated": tensors["terminals"][:, None],
                "truncated": tensors["timeouts"][:, None],
                "done": (tensors["terminals"] | tensors["timeouts"])[:, None],
            },
        },
        batch_size=[len(arrays["rewards"])],
    )


END = np.array([False, False, True])
WALKS = [walk(4), walk(3, start=10.0, terminations=END, truncations=~END & False), walk(2, 20.0)]


class TestOwnEpisodes:
    def test_mappings(self):
        expected = joined(*WALKS)
        entries = "observations", "actions", "rewards", "terminations"
        mappings = [{key: getattr(e, key) for key in entries} for e in WALKS]
        for changes in ({}, {"truncations": np.zeros(4, bool), "infos": {}, "id": 7}):
            dataset = OfflineDataset.from_episodes(
                "walks",
                [mappings[0] | changes, *mappings[1:]],
                observation_space=PLANE,
                action_space=UNIT,
            )
            assert_same(dataset, expected)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"terminations": None}, r"episode 1: found entries \['actions', 'observations', 'rew"),
            (
                {"terminals": END},
                "episode 1: found entries .*'terminals'.*, expected observations,",
            ),
            ({"id": "of May", "rewards": [0, 1, None]}, "episode of May: rewards has dtype object"),
            ({"rewards": ["a", "b", "c"]}, "episode 1: rewards has dtype <U1, expected numbers"),
            (
                {"rewards": np.zeros((3, 2))},
                r"episode 1: rewards has shape \[3, 2\], expected \[T\]",
            ),
            ({"terminations": [0, 0, 2]}, r"episode 1: terminations\[2\] is 2, expected 0 or 1"),
            ({"rewards": 1.0}, r"episode 1: rewards has shape \[\], expected \[T\]"),
            ({"rewards": [None]}, "episode 1: rewards has dtype object, expected numbers"),
            ({"terminations": True}, "episode 1: terminations has no entries, expected 3, as many"),
            (
                {"actions": [[0.0], [], [1.0]]},
                "episode 1: actions can not be made an array: .*inhom",
            ),
            ({"observations": [[1, 2], [3]]}, "episode 1: observations can not be made an array: "),
            (
                {"rewards": torch.zeros(3, dtype=torch.bfloat16)},
                "episode 1: rewards can not be made an array: .*BFloat16",
            ),
            (
                {"observations": np.zeros((4, 3))},
                r"episode 1: observations has shape \[4, 3\], expected \[T, 2\]",
            ),
            (
                {"actions": np.zeros((3, 2))},
                r"episode 1: actions has shape \[3, 2\], expected \[T, 1\]",
            ),
            (
                {"observations": {"position": np.zeros((4, 2))}},
                "episode 1: observations has dtype object, expected numbers",
            ),
        ],
    )
    def test_broken(self, changes, message):
        entries = "observations", "actions", "rewards", "terminations"
        good = {key: getattr(walk(3), key) for key in entries}
        bad = {key: value for key, value in (good | changes).items() if value is not None}
        with pytest.raises(ValueError, match=f"^walks, {message}"):
            OfflineDataset.from_episodes(
                "walks", [good, bad], observation_space=PLANE, action_space=UNIT
            )

    def test_none(self):
        episode = {
            key: getattr(walk(3), key) for key in ("observations", "actions", "terminations")
        }
        with pytest.raises(ValueError, match=r"^walks, episode 0: rewards is None, expected an"):
            OfflineDataset.from_episodes(
                "walks", [episode | {"rewards": None}], observation_space=PLANE, action_space=UNIT
            )

    def test_tensors_that_require_gradients(self):
        keys = "observations", "actions", "rewards", "terminations"
        tensors = {key: torch.as_tensor(np.asarray(getattr(walk(3), key))) for key in keys}
        tensors["observations"].requires_grad_()
        tensors["rewards"].requires_grad_()
        dataset = OfflineDataset.from_episodes(
            "walks", [tensors], observation_space=PLANE, action_space=UNIT
        )
        assert_same(dataset, joined(walk(3)))

    @pytest.mark.parametrize(
        ("episodes", "message"),
        [
            ({"rewards": [0.0]}, "episodes is a single episode, expected a list of them"),
            (EpisodeData(0, [], [], [], [], [], {}), "episodes is a single episode, expected a l"),
            ([[0.0, 1.0]], r"episodes\[0\] is a list, expected an episode"),
        ],
    )
    def test_that_are_none(self, episodes, message):
        with pytest.raises(TypeError, match=f"^walks: {message}"):
            OfflineDataset.from_episodes(
                "walks", episodes, observation_space=PLANE, action_space=UNIT
            )

    @pytest.mark.parametrize("scores", [(1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (np.nan, 1.0)])
    def test_reference_scores_are_checked_first(self, scores):
        with pytest.raises(ValueError, match=r"^walks: reference_scores must be finite returns"):
            joined(walk(3, rewards=[np.nan] * 3), reference_scores=scores)

    @pytest.mark.parametrize(
        ("space", "observations", "message"),
        [
            (
                spaces.Dict({"here": PLANE}),
                {"there": np.zeros((4, 2))},
                "observations has no entry 'here'",
            ),
            (spaces.Tuple((PLANE, UNIT)), (np.zeros((4, 2)),), "observations has no entry 1"),
            (
                spaces.Discrete(3),
                [0.0, 1.0, 0.5, 2.0],
                "observations has dtype float64, expected i",
            ),
            (
                spaces.MultiDiscrete([2, 2]),
                np.zeros((4, 3), int),
                r"observations has shape \[4, 3\], expected \[T, 2\]",
            ),
        ],
    )
    def test_observations_that_do_not_fit_their_space(self, space, observations, message):
        with pytest.raises(ValueError, match=f"^walks, episode 0: {message}"):
            joined(walk(3, observations=observations), observation_space=space)


class TestOwnArrays:
    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, np.ndarray.tolist])
    def test_with_next_observations(self, convert):
        arrays = {key: convert(values) for key, values in flat(WALKS).items()}
        spaces_ = {"observation_space": PLANE, "action_space": UNIT}
        assert_same(OfflineDataset.from_arrays("walks", **arrays, **spaces_), joined(*WALKS))

    def test_without(self):
        arrays = flat(WALKS) | {"next_observations": None}
        dataset = OfflineDataset.from_arrays("walks", **arrays)
        # Of the time-out at row 3 and of the last row there is no next observation.
        rows = torch.tensor([0, 1, 2, 4, 5, 6, 7])
        expected = joined(*WALKS).transitions[rows]
        assert dataset.episode_lengths.tolist() == [3, 3, 1]
        for key in ("observation", "action", ("next", "reward"), ("next", "terminated")):
            assert dataset.transitions[key].equal(expected[key])
        # The terminal row's belongs to the next episode and is never used.
        found = dataset.transitions["next", "observation"][:, 0]
        assert found.tolist() == [1, 2, 3, 11, 12, 20, 21]
        assert dataset.transitions["next", "truncated"].nonzero()[:, 0].tolist() == [2, 6]

    def test_spaces(self):
        arrays = flat(WALKS)
        dataset = OfflineDataset.from_arrays("walks", **arrays)
        assert dataset.observation_space == spaces.Box(-np.inf, np.inf, (2,))
        assert dataset.action_space == spaces.Box(-1, 1, (1,))
        arrays["observations"] = np.zeros((9, 3))
        arrays["next_observations"] = np.zeros((9, 3))
        dataset = OfflineDataset.from_arrays("walks", **arrays, env_spec="Pendulum-v1")
        env = gymnasium.make("Pendulum-v1")
        assert dataset.observation_space == env.observation_space
        assert dataset.action_space == env.action_space
        assert dataset.env_spec == gymnasium.spec("Pendulum-v1")

    def test_compound_observations_are_those_of_the_flattened_environment(self):
        env = gymnasium.make("PointMaze_Open-v3", max_episode_steps=20)
        episode = record(env, 0, lambda _: np.zeros(2, np.float32))
        flattened, keys = spaces.flatten_space(env.observation_space), episode.observations.keys()
        rows = np.stack(
            [
                spaces.flatten(env.observation_space, dict(zip(keys, row, strict=True)))
                for row in zip(*episode.observations.values(), strict=True)
            ]
        )
        dataset = OfflineDataset.from_arrays(
            "maze",
            observations=rows[:-1],
            actions=episode.actions,
            rewards=episode.rewards,
            terminals=episode.terminations,
            next_observations=rows[1:],
            env_spec=env.spec,
        )
        assert dataset.observation_space == flattened
        assert dataset.transitions["observation"].equal(torch.from_numpy(rows[:-1]).float())

    def test_the_time_limit_of_the_environment(self):
        arrays = flat([walk(10)]) | {"timeouts": None, "next_observations": None}
        spec = gymnasium.make("Pendulum-v1", max_episode_steps=4).spec
        dataset = OfflineDataset.from_arrays(
            "walks", **arrays, observation_space=PLANE, env_spec=spec
        )
        assert dataset.transitions["observation"][:, 0].tolist() == [0, 1, 2, 4, 5, 6, 8]
        assert dataset.episode_lengths.tolist() == [3, 3, 1]

    def test_discrete_actions_and_success(self):
        arrays = flat([walk(10)]) | {"actions": np.arange(10) % 3}
        dataset = OfflineDataset.from_arrays(
            "walks",
            **arrays,
            action_space=spaces.Discrete(3),
            infos={"success": np.arange(10) == 6},
            episode_rule="until_success",
            reward_rule="minus_one",
        )
        assert dataset.transitions["action"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert dataset.transitions["next", "terminated"].nonzero()[:, 0].tolist() == [6]
        assert dataset.transitions["next", "reward"][:, 0].tolist() == [i / 2 - 1 for i in range(7)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"actions": np.zeros(9, int)}, "actions has dtype int64, expected floats, or a Disc"),
            ({"observations": np.zeros(9)}, r"observations has shape \[9\], expected \[n, size\]"),
            ({"rewards": np.zeros(8)}, r"rewards has shape \[8\], expected the rows of obs"),
            ({"infos": {"success": np.zeros(8)}}, r"infos/success has shape \[8\], expected the"),
            ({"terminals": [0.5] * 9}, r"terminals\[0\] is 0.5, expected 0 or 1"),
            ({"rewards": [1e999] * 9}, r"walks, episode 0 \(rows 0 to 3\): rewards\[0\] is inf"),
            (
                {"actions": with_value(np.nan, (8, 0), (9, 1))},
                r"walks, episode 2 \(rows 7 to 8\): actions\[1, 0\] is nan",
            ),
            (
                {"next_observations": with_value(np.nan, (7, 1), (9, 2))},
                r"next_observations\[7, 1\] is nan, expected a finite float32",
            ),
            (
                {"next_observations": with_value(1e39, (0, 1), (9, 2))},
                r"next_observations\[0, 1\] is 1e\+39, expected a finite float32",
            ),
            ({"observations": None}, "observations is None, expected an array"),
            ({"terminals": None}, "terminals is None, expected an array"),
            ({"rewards": [[0.0], 1.0]}, "rewards can not be made an array: .*inhomogeneous"),
            (
                {"observations": torch.zeros(9, 2, dtype=torch.bfloat16)},
                "observations can not be made an array: .*BFloat16",
            ),
            (
                {"infos": {"success": [[0], 1]}},
                "infos/success can not be made an array: .*inhomogeneous",
            ),
            ({"env_spec": "Nowhere-v0"}, "unknown environment 'Nowhere-v0'"),
            (
                {"env_spec": gymnasium.envs.registration.EnvSpec("Odd-v0", "nowhere:Odd")},
                "the environment 'Odd-v0' can not be built: .*nowhere",
            ),
            ({key: [] for key in flat(WALKS)}, r"observations has shape \[0\], expected"),
            (
                {key: values[:0] for key, values in flat(WALKS).items()},
                "the data set has no episodes",
            ),
            ({"timeouts": None, "next_observations": None}, "without timeouts and next_obs"),
        ],
    )
    def test_broken(self, changes, message):
        with pytest.raises(ValueError, match=rf"^(walks: )?{message}"):
            OfflineDataset.from_arrays("walks", **flat(WALKS) | changes)


class TestOwnTensorDict:
    def test_in_the_order_of_time(self):
        transitions = as_tensordict(flat(WALKS))
        spaces_ = {"observation_space": PLANE, "action_space": UNIT}
        expected = joined(*WALKS)
        for keys in (
            [],
            [("next", "truncated")],
            [("next", "done")],
            [("next", "done"), ("next", "truncated")],  # the walks are far apart
        ):
            given = transitions.exclude(*keys)
            assert_same(OfflineDataset.from_tensordict("walks", given, **spaces_), expected)

    def test_rows_are_trajectories(self):
        # The second continues the first, but is not known to.
        transitions = as_tensordict(flat([walk(8, truncations=np.zeros(8, bool))])).reshape(2, 4)
        dataset = OfflineDataset.from_tensordict("walks", transitions)
        assert dataset.episode_lengths.tolist() == [4, 4]
        assert dataset.transitions["next", "truncated"].nonzero()[:, 0].tolist() == [3, 7]
        assert dataset.transitions["next", "observation"][3].tolist() == [4, -4]
        one = OfflineDataset.from_tensordict("walks", transitions.reshape(-1))
        assert one.episode_lengths.tolist() == [8]

    def test_padding_is_dropped(self):
        long, short = (as_tensordict(flat([walk(n, start=n)])) for n in (5, 3))
        padded = torch.stack([long, pad(short, [0, 2])])
        padded["collector", "mask"] = torch.arange(5) < torch.tensor([[5], [3]])
        dataset = OfflineDataset.from_tensordict("walks", padded)
        assert dataset.episode_lengths.tolist() == [5, 3]
        expected = OfflineDataset.from_tensordict("walks", torch.cat([long, short]))
        assert_same(dataset, expected)

    def test_padded_rows_are_trajectories(self):
        # Again, the second continues the first.
        whole = as_tensordict(flat([walk(8, truncations=np.zeros(8, bool))]))
        padded = torch.stack([pad(whole[:3], [0, 2]), whole[3:]])
        padded["collector", "mask"] = torch.arange(5) < torch.tensor([[3], [5]])
        dataset = OfflineDataset.from_tensordict("walks", padded)
        assert dataset.episode_lengths.tolist() == [3, 5]
        assert dataset.transitions["observation"].equal(whole["observation"].float())

    @pytest.mark.parametrize("categorical", [True, False])
    def test_what_an_environment_gives(self, categorical):
        env = GymEnv("CartPole-v1", categorical_action_encoding=categorical)
        env.set_seed(0)
        torch.manual_seed(0)
        steps = env.rollout(80, break_when_any_done=False)
        dataset = OfflineDataset.from_tensordict("poles", steps, env_spec="CartPole-v1")
        actions = steps["action"] if categorical else steps["action"].argmax(-1)
        assert dataset.transitions["action"].equal(actions.flatten())
        ends = steps["next", "done"].flatten().clone()
        ends[-1] = True
        lengths = torch.diff(ends.nonzero()[:, 0], prepend=torch.tensor([-1]))
        assert dataset.episode_lengths.equal(lengths)
        assert len(lengths) > 2
        for key in ("observation", ("next", "observation"), ("next", "reward")):
            assert dataset.transitions[key].equal(steps[key])
        assert dataset.transitions["next", "terminated"].equal(steps["next", "terminated"])

    @pytest.mark.filterwarnings("ignore:split_trajs")
    @pytest.mark.parametrize("split_trajs", [True, False])
    def test_what_a_collector_gives(self, split_trajs):
        torch.manual_seed(0)
        envs = SerialEnv(2, lambda: GymEnv("CartPole-v1"))
        collector = Collector(envs, frames_per_batch=80, total_frames=80, split_trajs=split_trajs)
        (batch,) = collector
        dataset = OfflineDataset.from_tensordict("poles", batch, env_spec="CartPole-v1")
        assert len(dataset.transitions) == 80
        assert (dataset.transitions["next", "reward"] == 1).all()
        steps = dataset.transitions
        ended = steps["next", "done"].flatten()
        assert steps["next", "observation"][:-1][~ended[:-1]].equal(
            steps["observation"][1:][~ended[:-1]]
        )
        assert dataset.episode_lengths.sum() == 80
        buffer = ReplayBuffer(storage=LazyTensorStorage(100))
        if not split_trajs:
            buffer.extend(batch.reshape(-1))
            again = OfflineDataset.from_tensordict("poles", buffer[:], env_spec="CartPole-v1")
            assert_same(again, dataset)
        collector.shutdown()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda td: td.exclude(("next", "terminated")), r"transitions has no \('next', 'termi"),
            (lambda td: td.reshape(3, 3, 1), r"transitions has batch size \[3, 3, 1\], expected"),
            (
                lambda td: td.update({"next": {"reward": torch.zeros(9, 2)}}),
                r"walks, episode 0 \(rows 0 to 3\): rewards has shape \[4, 2\]",
            ),
            (
                lambda td: td.update({"next": {"done": torch.full((9, 1), 2)}}),
                r"next/done\[0\] is 2, expected 0 or 1",
            ),
            (
                lambda td: td.update({"action": torch.full((9, 1), -3.0)}),
                r"walks, episode 0 \(rows 0 to 3\): actions\[0, 0\] is -3, outside \[-1, 1\]",
            ),
            (
                lambda td: td.update({"next": {"observation": torch.full((9, 2), torch.nan)}}),
                r"next_observations\[0, 0\] is nan",
            ),
            (
                lambda td: td.update({"action": torch.zeros(9, 1, dtype=torch.bfloat16)}),
                "actions can not be made an array: .*BFloat16",
            ),
        ],
    )
    def test_broken(self, change, message):
        with pytest.raises(ValueError, match=rf"^(walks: )?{message}"):
            OfflineDataset.from_tensordict("walks", change(as_tensordict(flat(WALKS))))

    def test_that_is_none(self):
        transitions = as_tensordict(flat(WALKS))
        with pytest.raises(
            TypeError, match=r"^walks: transitions is a dict, expected a TensorDict"
        ):
            OfflineDataset.from_tensordict("walks", transitions.to_dict())

    def test_shuffled(self):
        transitions = as_tensordict(flat([walk(30), walk(30, start=100)]))
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        message = r"^walks: 5\d of 60 transitions are .* are they in the order of time\?$"
        with pytest.warns(UserWarning, match=message) as caught:
            OfflineDataset.from_tensordict("walks", transitions[order])
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for keys in ([], [("next", "truncated"), ("next", "done")]):
                OfflineDataset.from_tensordict("walks", transitions.exclude(*keys))

    def test_not_one_hot(self):
        transitions = as_tensordict(flat(WALKS))
        transitions["action"] = torch.eye(3)[torch.arange(9) % 3]
        dataset = OfflineDataset.from_tensordict(
            "walks", transitions, action_space=spaces.Discrete(3, start=5)
        )
        assert dataset.transitions["action"].tolist() == [0, 1, 2] * 3
        transitions["action"][4, 2] = 1
        message = r"^walks: actions\[4\] is \[0. 1. 1.\], expected one 1 among zeros"
        with pytest.raises(ValueError, match=message):
            OfflineDataset.from_tensordict(
                "walks", transitions, action_space=spaces.Discrete(3, start=5)
            )


class TestDamage:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"observations": with_value(np.nan, (1, 1), (4, 2))}, r"observations\[1, 1\] is nan"),
            ({"observations": with_value(np.nan, (3, 0), (4, 2))}, r"observations\[3, 0\] is nan"),
            (
                {"observations": with_value(-np.inf, (0, 0), (4, 2))},
                r"observations\[0, 0\] is -inf",
            ),
            ({"actions": with_value(np.nan, (2, 0), (3, 1))}, r"actions\[2, 0\] is nan"),
            ({"rewards": with_value(np.inf, (1,), (3,))}, r"rewards\[1\] is inf"),
            ({"observations": np.zeros((3, 2))}, "observations has 3 entries, expected 4"),
            ({"actions": np.zeros((4, 1))}, "actions has 4 entries, expected 3"),
            ({"terminations": np.zeros(2, bool)}, "terminations has 2 entries, expected 3"),
            ({"truncations": np.zeros(4, bool)}, "truncations has 4 entries, expected 3"),
            ({"rewards": np.zeros(0)}, "rewards has no entries"),
            (
                {"observations": with_value(-1e39, (1, 0), (4, 2))},
                r"observations\[1, 0\] is -inf, expected a finite float32",
            ),
        ],
    )
    def test_is_located(self, changes, message):
        with pytest.raises(ValueError, match=f"^walks, episode 1: {message}"):
            joined(walk(3), walk(3, **changes))

    @pytest.mark.parametrize("data_format", FORMATS)
    def test_is_found_in_files(self, data_format):
        damaged = walk(3, observations=with_value(np.nan, (2, 0), (4, 2)))
        source = write(walk(3), damaged, data_format=data_format)
        with pytest.raises(ValueError, match=rf"^{source}, episode 1: observations\[2, 0\] is nan"):
            load(source)

    def test_actions_without_bounds_that_are_infinite_as_float32(self):
        episode = walk(3, actions=with_value(1e39, (1, 0), (3, 1)))
        message = r"^walks, episode 0: actions\[1, 0\] is 1e\+39, expected a finite float32"
        with pytest.raises(ValueError, match=message):
            joined(episode, action_space=spaces.Box(-np.inf, np.inf, (1,), np.float64))

    def test_after_a_termination_does_no_harm(self):
        observations = with_value(np.nan, (3, 0), (4, 2))
        end = np.array([False, False, True])
        dataset = joined(walk(3, observations=observations, terminations=end))
        assert dataset.transitions["next", "observation"][2].isnan().tolist() == [True, False]
        assert dataset.transitions["observation"].isfinite().all()
        assert all(statistic.isfinite().all() for statistic in dataset.observation_statistics())

    def test_no_episodes(self):
        with pytest.raises(ValueError, match=r"^walks: the data set has no episodes"):
            joined()

    @pytest.mark.parametrize("data_format", ["arrow", "parquet"])
    def test_episodes_that_minari_reads_in_part(self, data_format):
        source = write(walk(40_000), data_format=data_format)
        with pytest.raises(ValueError, match=rf"^{source}: read 32767 of 40000 .* use hdf5"):
            load(source)


class TestSource:
    @pytest.mark.parametrize("data_format", FORMATS)
    def test_folders_hold_what_the_id_names(self, root, data_format):
        source = write(walk(3), walk(2, start=5), data_format=data_format)
        expected = load(source).transitions
        for folder in (root / source, root / source / "data", str(root / source)):
            assert (load(folder).transitions == expected).all()
        assert load(source).name == source
        assert load(root / source).name == str(root / source)

    def test_metadata(self):
        specs = [gymnasium.make("Pendulum-v1", max_episode_steps=n).spec for n in (70, 90)]
        scores = {"ref_min_score": -5.0, "ref_max_score": 20.0}
        pendulum = walk(3, observations=np.zeros((4, 3), np.float32))
        for i, (options, limit, expected) in enumerate(
            [
                ({"env": specs[0], "eval_env": specs[1]} | scores, 90, (-5.0, 20.0)),
                ({"env": specs[0]}, 70, None),
            ]
        ):
            dataset = load(write(pendulum, dataset_id=f"test/pendulum-v{i}", **options))
            assert dataset.env_spec is not None
            assert dataset.env_spec.max_episode_steps == limit
            assert dataset.reference_scores == expected
        assert load(write(walk(3))).env_spec is None

    def test_rules_are_recorded(self):
        dataset = load(
            write(walk(2, rewards=[0.0, 1.0])), reward="minus_one", episodes="until_success"
        )
        assert (dataset.reward_rule, dataset.episode_rule) == ("minus_one", "until_success")

    @pytest.mark.parametrize(
        ("of_load", "of_episodes", "allowed"),
        [
            ("reward", "reward_rule", "none, minus_one, return_range"),
            ("episodes", "episode_rule", "as_stored, until_success"),
        ],
    )
    def test_unknown_rules_come_before_reading(self, of_load, of_episodes, allowed):
        message = f"^unknown (reward|episode) rule 'best', choose from {allowed}$"
        with pytest.raises(ValueError, match=message):
            load("there/is/none-v0", **{of_load: "best"})
        with pytest.raises(ValueError, match=message):
            joined(**{of_episodes: "best"})

    def test_missing(self, root):
        with pytest.raises(FileNotFoundError) as failed:
            load("there/is/none-v0")
        for part in (
            "'there/is/none-v0'",
            str(root),
            "minari list local",
            "no route to there/is/none",
        ):
            assert part in str(failed.value)
        with pytest.raises(FileNotFoundError, match=r"'there/is/none-v0'.* download is False"):
            load("there/is/none-v0", download=False)
        with pytest.raises(FileNotFoundError, match=rf"'{root}/none'.* in {root}$"):
            load(root / "none")

    def test_several_are_one(self, cache_folder):
        options = {"ref_min_score": -5.0, "ref_max_score": 20.0}
        env = gymnasium.make("Pendulum-v1").spec
        one = write(walk(3), walk(2, start=4), dataset_id="test/one-v0")
        pendulum = walk(4, start=7)
        two = write(
            pendulum,
            dataset_id="test/two-v0",
            env=env,
            observation_space=PLANE,
            action_space=UNIT,
            **options,
        )
        dataset = load([one, two], reward="return_range")
        expected = joined(walk(3), walk(2, start=4), walk(4, start=7), reward_rule="return_range")
        found = replace(dataset, name="walks", env_spec=None, reference_scores=None)
        assert_same(found, expected)
        assert dataset.name == "test/one-v0 + test/two-v0"
        assert dataset.env_spec == env
        assert dataset.reference_scores == (-5.0, 20.0)
        assert load([one]).name == one
        assert load([one, two], env="Hopper-v5").env_spec == gymnasium.spec("Hopper-v5")
        minari.delete_dataset(two)
        write(walk(4), dataset_id=two)
        assert load([one, two]).episode_returns.tolist() == [1.5, 8.5, 3.0]
        assert len(list(cache_folder.iterdir())) == 3

    def test_an_error_names_the_one_of_several(self):
        one = write(walk(3), dataset_id="test/one-v0")
        two = write(walk(3), walk(3, rewards=[0.0, np.nan, 0.0]), dataset_id="test/two-v0")
        message = rf"^{one} \+ {two}, episode 1 of {two}: rewards\[1\] is nan"
        with pytest.raises(ValueError, match=message):
            load([one, two])

    @pytest.mark.parametrize(
        ("file", "contents", "message"),
        [
            ("main_data.hdf5", b"", ", episode 0: its files are damaged or incomplete: .*file"),
            ("main_data.hdf5", None, ", episode 0: its files are damaged .*truncated file"),
            ("metadata.json", b"{", ": Minari can not open .*/data: JSONDecodeError"),
            ("metadata.json", b"{}", ": Minari can not open .*/data: AssertionError"),
            ("metadata.json", b"[]", ": Minari can not open .*/data: AttributeError"),
            ("metadata.json", b"null", ": Minari can not open .*/data: AttributeError"),
        ],
    )
    def test_damaged_files(self, root, cache_folder, file, contents, message):
        source = write(walk(3))
        path = root / source / "data" / file
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if contents is None else contents)
        advice = f"if its download was interrupted, delete {root / source} and load it again$"
        with pytest.raises(ValueError, match=f"^{source}{message}.*; {advice}"):
            load(source)
        assert not cache_folder.exists()

    def test_damaged_files_elsewhere_are_not_to_be_deleted(self, root, tmp_path_factory):
        folder = tmp_path_factory.mktemp("mine") / "data"
        shutil.copytree(root / write(walk(3)) / "data", folder)
        (folder / "metadata.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"can not open {folder}: AssertionError\(\)$"):
            load(folder)

    @pytest.mark.parametrize("data_format", FORMATS)
    @pytest.mark.parametrize(
        ("entry", "value", "message"),
        [
            (
                "total_steps",
                "a",
                r": Minari can not open .*total_steps is 'a', expected an integer",
            ),
            ("total_steps", 5, ": read 6 of 5 transitions"),
            ("total_episodes", "a", ": Minari can not open .*TypeError"),
            ("total_episodes", 1, ": read 3 of 6 transitions"),
            ("total_episodes", 3, ", episode 2: its files are damaged or incomplete: .*2"),
        ],
    )
    def test_damaged_metadata(self, root, data_format, entry, value, message):
        source = write(walk(3), walk(3), data_format=data_format)
        path = root / source / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
        with pytest.raises(ValueError, match=f"^{source}{message}"):
            load(source)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("", None, "its files are damaged or incomplete: .* 'episode_1' doesn't exist"),
            ("/rewards", None, "its files are damaged .*rewards can not be read: .* doesn't exist"),
            ("/observations", None, "its files are damaged .*observations can not be read: "),
            ("/rewards", h5py.Empty("f"), "its files are damaged .*rewards can not be read: "),
            ("/rewards", 1.0, r"rewards has shape \[\], expected \[T\]"),
            ("/rewards", np.zeros(0), "rewards has no entries"),
            ("/terminations", np.zeros(2), "terminations has 2 entries, expected 3"),
        ],
    )
    def test_damaged_episodes(self, root, key, value, message):
        source = write(walk(3), walk(3))
        with h5py.File(root / source / "data" / "main_data.hdf5", "a") as file:
            del file[f"episode_1{key}"]
            if value is not None:
                file[f"episode_1{key}"] = value
        with pytest.raises(ValueError, match=f"^{source}, episode 1: {message}"):
            load(source)

    @pytest.mark.parametrize("damage", ["half", "empty", "html", "missing"])
    @pytest.mark.parametrize("data_format", ["arrow", "parquet"])
    def test_damaged_episode_files(self, root, data_format, damage):
        source = write(walk(3), walk(3), walk(3), data_format=data_format)
        (path,) = (root / source / "data" / "1").glob("part*")
        whole = path.read_bytes()
        contents = {"half": whole[: len(whole) // 2], "empty": b"", "html": b"<html>" * 50}
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(contents[damage])
        with pytest.raises(ValueError, match=f"^{source}, episode 1: its files are damaged"):
            load(source)

    def test_missing_is_downloaded(self, monkeypatch):
        monkeypatch.setattr(minari, "download_dataset", lambda id: write(walk(3), dataset_id=id))
        assert load("far/away-v0").episode_lengths.tolist() == [3]

    @pytest.mark.parametrize("failure", [ConnectionError("cut off"), KeyboardInterrupt()])
    def test_half_a_download_is_removed(self, root, monkeypatch, failure):
        whole = write(walk(3))

        def broken(dataset_id: str) -> None:
            data = root / dataset_id / "data"
            data.mkdir(parents=True)
            shutil.copy(root / whole / "data" / "metadata.json", data)
            raise failure

        expected = KeyboardInterrupt if failure.args == () else FileNotFoundError
        with monkeypatch.context() as patch:
            patch.setattr(minari, "download_dataset", broken)
            with pytest.raises(expected):
                load("far/away-v0")
        assert not (root / "far/away-v0").exists()
        self.test_missing_is_downloaded(monkeypatch)

    def test_what_was_there_is_not_removed(self, root):
        (root / "far/away-v0/notes").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="no route to far/away-v0"):
            load("far/away-v0")
        assert (root / "far/away-v0/notes").exists()

    @pytest.mark.parametrize("scores", [(1.0, 1.0), ("a", 2.0)])
    def test_reference_scores_that_can_not_be_used(self, root, scores):
        source = write(walk(3))
        path = root / source / "data" / "metadata.json"
        given = dict(zip(("ref_min_score", "ref_max_score"), scores, strict=True))
        path.write_text(json.dumps(json.loads(path.read_text()) | given))
        with pytest.warns(UserWarning, match=f"^{source}: its reference scores are not used: "):
            assert load(source).reference_scores is None


def leaves(transitions: TensorDict) -> dict[Any, tuple]:
    """Type, shape and bytes of each entry: two NaN are equal, 0 and -0 are not."""
    return {
        key: (value.dtype, value.shape, value.numpy().tobytes())
        for key, value in transitions.items(include_nested=True, leaves_only=True)
    }


def assert_same(found: OfflineDataset, expected: OfflineDataset) -> None:
    assert found.transitions.batch_size == expected.transitions.batch_size
    assert found.transitions.device == expected.transitions.device
    assert found.transitions.is_locked == expected.transitions.is_locked
    for field in fields(OfflineDataset):
        value, other = getattr(found, field.name), getattr(expected, field.name)
        match value:
            case TensorDict():
                assert leaves(value) == leaves(other)
            case torch.Tensor():
                assert value.dtype == other.dtype
                assert value.equal(other)
            case _:
                assert value == other


def load_again_and_again(source: str, cache_folder: Path) -> bytes:
    """Loads and removes the entry in turns; in a process of its own."""
    warnings.simplefilter("error")
    for _ in range(20):
        contents = str(leaves(load(source).transitions)).encode()
        for entry in cache_folder.glob("*.tdz"):
            entry.unlink(missing_ok=True)
    return contents


class TestCache:
    @pytest.fixture
    def parsed(self, monkeypatch) -> list[str]:
        """The names of the data sets that were parsed."""
        names = []
        from_episodes = OfflineDataset.from_episodes

        def recorded(name: str, *args: Any, **kwargs: Any) -> OfflineDataset:
            names.append(name)
            return from_episodes(name, *args, **kwargs)

        monkeypatch.setattr(OfflineDataset, "from_episodes", recorded)
        return names

    @pytest.mark.parametrize("data_format", FORMATS)
    def test_a_second_start_gives_the_same_without_parsing(self, root, parsed, data_format):
        observations = with_value(np.nan, (3, 0), (4, 3)).astype(np.float32)
        end = np.array([False, False, True])
        changes = {"actions": np.zeros((3, 1), np.float32), "rewards": np.array([0.0, 1.0, 0.0])}
        source = write(
            walk(3, observations=observations, terminations=end, **changes),
            walk(3, observations=observations[:, ::-1].copy() + 1, terminations=end, **changes),
            env=gymnasium.make("Pendulum-v1", max_episode_steps=70).spec,
            ref_min_score=-5.0,
            ref_max_score=20.0,
            data_format=data_format,
        )
        rules = {"reward": "minus_one", "episodes": "as_stored"}
        expected = load(source, cache=False, **rules)
        assert_same(load(source, **rules), expected)
        assert_same(load(source, **rules), expected)
        assert_same(load(root / source, **rules), replace(expected, name=str(root / source)))
        assert parsed == [source, source]

    def test_is_not_touched_if_unwanted(self, cache_folder):
        load(write(walk(3)), cache=False)
        assert not cache_folder.exists()

    def test_another_source_is_parsed_and_replaces_the_entry(self, cache_folder, parsed):
        source = write(walk(3))
        other = write(walk(3, start=2), dataset_id="test/others-v0")
        for name in (source, other):
            load(name)
        minari.delete_dataset(source)
        write(walk(3, start=1))
        assert load(source).transitions["observation"][:, 0].tolist() == [1, 2, 3]
        assert load(other).transitions["observation"][:, 0].tolist() == [2, 3, 4]
        assert parsed == [source, other, source]
        assert len(list(cache_folder.iterdir())) == 2

    @pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
    def test_a_touched_source_is_parsed(self, root, parsed, file):
        source = write(walk(3))
        load(source)
        path = root / source / "data" / file
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        load(source)
        assert parsed == [source, source]

    def test_other_rules_are_parsed(self, parsed):
        source = write(walk(3, rewards=[0.0, 1.0, 0.0]))
        rules = [{}, {"reward": "minus_one"}, {"episodes": "until_success"}]
        for _ in range(2):
            assert [
                load(source, **rule).transitions["next", "reward"].flatten().tolist()
                for rule in rules
            ] == [[0, 1, 0], [-1, 0, -1], [0, 1]]
        assert len(parsed) == 3

    def test_what_can_not_be_loaded_is_not_kept(self, cache_folder):
        source = write(walk(3, rewards=np.array([0.0, np.nan, 0.0])))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
                load(source)
        assert not cache_folder.exists()

    def test_changes_in_memory_stay_there(self, cache_folder):
        source = write(walk(3))
        load(source)
        (entry,) = cache_folder.iterdir()
        contents = entry.read_bytes()
        load(source).transitions["observation"].zero_()
        assert entry.read_bytes() == contents

    @pytest.mark.parametrize("at", np.linspace(0, 1, 30, endpoint=False))
    def test_damaged_bytes_do_no_harm(self, cache_folder, at):
        source = write(walk(3))
        expected = load(source)
        (entry,) = cache_folder.iterdir()
        contents = bytearray(entry.read_bytes())
        contents[int(at * len(contents))] ^= 0xFF
        entry.write_bytes(contents)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(load(source), expected)
        # Some bytes, such as padding, do not matter.
        assert all(str(entry) in str(warning.message) for warning in caught)

    @pytest.mark.parametrize("damage", ["an array", "cut off", "empty"])
    def test_damage_is_reported_once(self, cache_folder, parsed, damage):
        source = write(walk(3))
        expected = load(source)
        (entry,) = cache_folder.iterdir()
        contents = entry.read_bytes()
        observations = expected.transitions["observation"].numpy().tobytes()
        entry.write_bytes(
            {
                "an array": contents.replace(observations, bytes(len(observations))),
                "cut off": contents[: len(contents) // 2],
                "empty": b"",
            }[damage]
        )
        with pytest.warns(UserWarning, match=rf"^the cache entry {entry} is damaged") as caught:
            assert_same(load(source), expected)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(load(source), expected)
        assert parsed == [source, source]

    def test_an_interrupted_write_leaves_nothing(self, cache_folder, monkeypatch):
        def interrupted(content: TensorDict, path: str, **options: Any) -> None:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt

        source = write(walk(3))
        with monkeypatch.context() as patch:
            patch.setattr(TensorDict, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(source)
        assert not list(cache_folder.iterdir())
        load(source)
        assert [path.suffix for path in cache_folder.iterdir()] == [".tdz"]

    def test_what_a_killed_process_left_is_removed_a_day_later(self, cache_folder):
        for name, age in (("old", 86_401), ("new", 0)):
            folder = cache_folder / f".unfinished-{name}"
            folder.mkdir(parents=True)
            os.utime(folder, (0, time.time() - age))
        load(write(walk(3)))
        assert [path.name for path in cache_folder.glob(".*")] == [".unfinished-new"]

    @pytest.mark.parametrize("obstacle", ["not a folder", "read-only", "full"])
    def test_without_room_the_data_are_loaded(self, cache_folder, monkeypatch, obstacle):
        def full(content: TensorDict, path: str, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", path)

        if obstacle == "not a folder":
            cache_folder.touch()
        elif obstacle == "read-only":
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere")
            cache_folder.mkdir(mode=0o500)
        else:
            monkeypatch.setattr(TensorDict, "save", full)
        source = write(walk(3))
        message = f"^could not write the cache entry {cache_folder}/"
        with pytest.warns(UserWarning, match=message) as caught:
            assert_same(load(source), load(source, cache=False))
        assert caught[0].filename == __file__

    def test_two_processes(self, cache_folder):
        source = write(walk(3), walk(200))
        expected = str(leaves(load(source).transitions)).encode()
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
            found = [processes.submit(load_again_and_again, source, cache_folder) for _ in range(2)]
            assert [future.result() for future in found] == [expected] * 2
        assert not list(cache_folder.iterdir())

    def test_an_entry_that_another_process_removes_while_it_is_read_is_not_damaged(
        self, cache_folder, monkeypatch, parsed
    ):
        source = write(walk(3))
        load(source)
        (entry,) = cache_folder.glob("*.tdz")
        real = zipfile.is_zipfile

        def removed_first(path: Path) -> bool:
            entry.unlink(missing_ok=True)
            return real(path)

        monkeypatch.setattr(zipfile, "is_zipfile", removed_first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(source)
        assert len(parsed) == 2 and entry.exists()

    def test_transitions_can_be_sent_to_a_process(self):
        source = write(walk(3))
        load(source)
        transitions = load(source).transitions
        assert not transitions["observation"].is_shared()
        assert transitions.share_memory_()["observation"].is_shared()

    @pytest.mark.parametrize("kept_by", ["cache", "tensordict"])
    def test_a_buffer_on_the_cpu_does_not_copy(self, tmp_path, kept_by):
        source = write(walk(3))
        dataset = load(source)
        if kept_by == "cache":
            dataset = load(source)
        else:
            dataset = replace(dataset, transitions=dataset.transitions.memmap(tmp_path / "mapped"))
        storage = dataset.replay_buffer(2).storage[:]
        for key, value in dataset.transitions.items(include_nested=True, leaves_only=True):
            assert storage[key].data_ptr() == value.data_ptr()
        batch = dataset.replay_buffer(2, generator=torch.Generator().manual_seed(0)).sample()
        assert batch["observation"][:, 0].equal(-batch["observation"][:, 1])


class TestUse:
    def test_statistics(self):
        rng = np.random.default_rng(0)
        observations = rng.normal([3.0, -1000.0], [0.5, 20.0], (50, 2))
        dataset = joined(walk(49, observations=observations))
        mean, std = dataset.observation_statistics()
        np.testing.assert_allclose(mean, observations[:-1].mean(0), rtol=1e-6)
        np.testing.assert_allclose(std, observations[:-1].std(0), rtol=1e-6)
        assert mean.dtype == std.dtype == torch.float32

    def test_statistics_are_taken_in_parts(self, monkeypatch):
        dataset = joined(walk(49, observations=np.random.default_rng(0).normal(3, 2, (50, 2))))
        whole = dataset.observation_statistics()
        monkeypatch.setattr("torchrl_iql.data.dataset.PART", 10)
        for found, expected in zip(dataset.observation_statistics(), whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-7)

    def test_without_transitions(self):
        empty = OfflineDataset.empty("CartPole-v1")
        for use in (empty.report, empty.observation_statistics, empty.reward_statistics):
            with pytest.raises(ValueError, match=r"^CartPole-v1: there are no transitions to "):
                use()

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-9])
    def test_constant_columns_have_deviation_one(self, value):
        steps = np.arange(8)
        columns = np.full(8, value), value * (1 + 1e-7 * (steps % 2)), 1e-9 * steps
        dataset = joined(
            walk(7, observations=np.stack(columns, axis=1)),
            observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float64),
        )
        mean, std = dataset.observation_statistics()
        np.testing.assert_allclose(mean, [value, value, 3e-9], rtol=1e-6)
        np.testing.assert_allclose(std, [1, 1, 2e-9], rtol=1e-6)

    def test_reward_statistics(self):
        rewards = np.random.default_rng(0).normal(3.0, 2.0, 49)
        mean, std = joined(walk(49, rewards=rewards), reward_rule="minus_one").reward_statistics()
        np.testing.assert_allclose(mean, [rewards.mean() - 1], rtol=1e-6)
        np.testing.assert_allclose(std, [rewards.std()], rtol=1e-6)
        assert joined(walk(3, rewards=[2.0] * 3)).reward_statistics()[1].tolist() == [1]

    def test_episode_starts(self):
        starts = joined(walk(3), walk(1), walk(4)).episode_starts
        assert starts.tolist() == [0, 3, 4]
        assert starts.dtype == torch.int64

    @pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
    def test_returns_to_go(self, discount):
        rng = np.random.default_rng(0)
        lengths = [1, 2, 3, 8, 9, 100, 1, 333]
        episodes = [walk(n, rewards=rng.normal(size=n)) for n in lengths]
        dataset = joined(*episodes, reward_rule="minus_one")
        expected = []
        for episode in episodes:
            rewards = np.asarray(episode.rewards) - 1
            for t in range(len(rewards)):
                powers = discount ** np.arange(len(rewards) - t)
                expected.append((powers * rewards[t:]).sum())
        found = dataset.returns_to_go(discount)
        assert found.shape == (sum(lengths), 1)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found[:, 0], expected, rtol=3e-6, atol=1e-6)

    def test_returns_to_go_are_summed_in_float64(self):
        steps = 100_001
        dataset = joined(walk(steps, rewards=np.full(steps, 0.1)))
        expected = np.float32(0.1).astype(np.float64) * np.arange(steps, 0, -1)
        assert dataset.returns_to_go()[:, 0].equal(torch.from_numpy(expected.astype(np.float32)))
        assert (dataset.transitions["next", "reward"] == np.float32(0.1)).all()

    @pytest.mark.parametrize("share", [1e-9, 0.1, 0.29, 0.5, 0.96, 1.0])
    def test_best_episodes(self, share):
        rng = np.random.default_rng(1)
        returns = rng.integers(0, 20, 100)
        episodes = [
            walk(n, start=1000 * i, rewards=np.eye(n)[0] * returns[i])
            for i, n in enumerate(rng.integers(1, 6, 100))
        ]
        whole = joined(*episodes, reward_rule="return_range")
        best = whole.best_episodes(share)
        number = {1e-9: 1, 0.1: 10, 0.29: 29, 0.5: 50, 0.96: 96, 1.0: 100}[share]
        chosen = np.sort(np.lexsort((np.arange(100), -returns))[:number])
        rewards = whole.transitions["next", "reward"]
        owner = np.repeat(np.arange(100), whole.episode_lengths)
        rows = torch.from_numpy(np.isin(owner, chosen).nonzero()[0])
        assert best.episode_returns.tolist() == returns[chosen].tolist()
        assert best.episode_lengths.tolist() == [len(episodes[i]) for i in chosen]
        assert (best.transitions == whole.transitions[rows]).all()
        assert best.transitions["next", "reward"].equal(rewards[rows])
        assert (best.name, best.reward_rule) == ("walks", "return_range")

    @pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
    def test_shares_and_discounts_out_of_range(self, share):
        with pytest.raises(ValueError, match=f"share must be above 0 and at most 1, got {share}"):
            joined(walk(3)).best_episodes(share)
        if share != 0:
            with pytest.raises(ValueError, match=f"discount must be from 0 to 1, got {share}"):
                joined(walk(3)).returns_to_go(share)

    def test_samples_are_transitions(self):
        transitions = joined(walk(3), walk(4, start=10)).transitions
        buffer = joined(walk(3), walk(4, start=10)).replay_buffer(
            700, generator=torch.Generator().manual_seed(0)
        )
        batch = buffer.sample()
        assert len(buffer) == 7
        assert batch.batch_size == (700,)
        rows = (batch["observation"][:, None, 0] == transitions["observation"][:, 0]).nonzero()[
            :, 1
        ]
        assert (batch == transitions[rows]).all()
        counts = rows.bincount(minlength=7)
        # Uniform: 100 of each, give or take four standard deviations.
        assert ((counts - 100).abs() < 4 * np.sqrt(700 / 7 * 6 / 7)).all()

    def test_sampling_depends_on_the_generator_alone(self):
        def draws(seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            buffer = joined(walk(500)).replay_buffer(64, generator=generator)
            torch.rand(3)
            return torch.stack([buffer.sample()["observation"] for _ in range(3)])

        assert draws(0).equal(draws(0))
        assert not draws(0).equal(draws(1))

    def test_the_buffer_is_read_only(self):
        dataset = joined(walk(3))
        with pytest.raises(RuntimeError, match="doesn't allow writing"):
            dataset.replay_buffer(2).extend(dataset.transitions)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_device(self):
        dataset = joined(walk(500))
        generator = torch.Generator("cuda").manual_seed(0)
        batch = dataset.replay_buffer(64, device="cuda", generator=generator).sample()
        assert {
            value.device.type for value in batch.values(include_nested=True, leaves_only=True)
        } == {"cuda"}
