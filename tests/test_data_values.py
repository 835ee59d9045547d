"""Values, spaces, ends of episodes and rewards, against environments replayed step by step and numpy."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.data.postprocs import MultiStep

from episodes import (
    FORMATS,
    MARKS,
    UNIT,
    assert_transitions,
    joined,
    record,
    replay,
    stacked,
    walk,
    write,
)
from torchrl_iql.data import OfflineDataset, load

pytestmark = MARKS


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
            ({"is_success": [False, False, False, True, False]}, [1.0, 1.0, 1.0, 1.0]),
            ({"success": [True, False, False, True, True]}, [0.0, 0.0, 0.0, 0.0]),
            (None, [0.0, 0.0, 1.0, 1.0]),
        ],
        ids=["with reset", "without reset", "is_success", "success at reset", "sparse rewards"],
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


class TestNSteps:
    @pytest.mark.parametrize("n", [1, 2, 3, 10])
    def test_are_those_of_torchrl(self, n: int) -> None:
        dataset = joined(walk(4), walk(2, start=10.0), walk(1, start=20.0))
        found = dataset.n_step(n, 0.9).transitions
        first = 0
        for length in (4, 2, 1):
            rows = dataset.transitions[first : first + length].clone()
            expected = MultiStep(gamma=0.9, n_steps=n)(rows.unsqueeze(0)).squeeze(0)
            its = found[first : first + length]
            assert torch.equal(its["steps_to_next_obs"], expected["steps_to_next_obs"])
            torch.testing.assert_close(its["next", "reward"], expected["next", "reward"])
            assert torch.equal(its["next", "observation"], expected["next", "observation"])
            # TorchRL leaves these as they were in the first step, also beyond the end of an episode.
            for t, row in enumerate(its.unbind(0)):
                last = rows[min(t + n, length) - 1]
                for key in ("terminated", "truncated", "done"):
                    assert torch.equal(row["next", key], last["next", key]), key
            assert torch.equal(its["observation"], rows["observation"])
            first += length

    def test_leave_the_data_set_as_it_is(self) -> None:
        dataset = joined(walk(4))
        before = dataset.transitions.clone()
        dataset.n_step(3, 0.5)
        assert (dataset.transitions == before).all()

    @pytest.mark.parametrize(("n", "discount"), [(0, 0.9), (2, 1.5), (2, -0.1)])
    def test_out_of_range(self, n: int, discount: float) -> None:
        with pytest.raises(ValueError, match=r"n must be at least 1|discount must be from 0 to 1"):
            joined(walk(3)).n_step(n, discount)

    def test_are_not_summed_twice(self) -> None:
        dataset = joined(walk(3)).n_step(2, 0.9)
        for again in (lambda: dataset.n_step(2, 0.9), lambda: dataset.returns_to_go(0.9)):
            with pytest.raises(ValueError, match="the rewards are sums over several steps"):
                again()
