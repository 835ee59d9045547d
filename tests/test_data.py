"""The data room, against environments replayed step by step, gymnasium's own flatten and numpy."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium_robotics
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari import EpisodeData
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict

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

    def test_the_range_is_that_of_the_cut_episodes(self):
        episodes = walk(3, rewards=[0.0, 1.0, 1.0]), walk(3, rewards=[0.0, 0.0, 0.0])
        rules = {"reward_rule": "return_range", "episode_rule": "until_success"}
        dataset = joined(*episodes, **rules)
        assert dataset.episode_returns.tolist() == [1, 0]
        assert dataset.transitions["next", "reward"].flatten().tolist() == [0, 1000, 0, 0, 0]

    def test_without_a_range(self):
        with pytest.raises(ValueError, match=r"^walks: .* 'return_range' .* all of them are 1.5"):
            joined(walk(3), walk(3), reward_rule="return_range")


def with_value(value: float, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape)
    array[index] = value
    return array


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

    def test_missing_is_downloaded(self, monkeypatch):
        monkeypatch.setattr(minari, "download_dataset", lambda id: write(walk(3), dataset_id=id))
        assert load("far/away-v0").episode_lengths.tolist() == [3]


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
