"""Data of one's own, and what is wrong with it: episodes, arrays, TensorDicts."""

from __future__ import annotations

import warnings
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari import EpisodeData
from tensordict import pad
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, SerialEnv

from episodes import (
    END,
    FORMATS,
    MARKS,
    PLANE,
    UNIT,
    WALKS,
    as_tensordict,
    assert_same,
    flat,
    joined,
    record,
    walk,
    with_value,
    write,
)
from torchrl_iql.data import OfflineDataset, load
from torchrl_iql.spaces import action_row_space, differ_in_type_alone

pytestmark = MARKS


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
                "episode 1: observations can not be made an array: dictionaries, expected a",
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
        ("shape", "message"),
        [
            ((4, 2, 3, 1), None),
            ((4, 2, 3), None),
            ((4, 2, 1, 3), None),
            ((4, 6), None),
            ((4, 3, 2), r"shape \[4, 3, 2\], expected \[T, 2, 3, 1\]"),
            ((4, 1, 3, 2), r"shape \[4, 1, 3, 2\], expected \[T, 2, 3, 1\]"),
        ],
    )
    def test_as_many_numbers_of_another_shape_are_refused(self, shape, message):
        values, like = np.arange(24.0), spaces.Box(-99, 99, (2, 3, 1))
        given = {"observations": values.reshape(shape), "actions": np.zeros((3, *shape[1:]))}
        for key in given:  # each of a wrong shape, the other of a right one
            right = {"observations": np.zeros((4, 2, 3, 1)), "actions": np.zeros((3, 2, 3, 1))}
            episode = walk(3, **right | {key: given[key]})
            if message is None:
                rows = joined(episode, observation_space=like, action_space=like).transitions
                if key == "observations":
                    assert rows["observation"].flatten().tolist() == values[:18].tolist()
                continue
            told = message.replace("[4", "[4" if key == "observations" else "[3")
            with pytest.raises(ValueError, match=f"^walks, episode 0: {key} has {told}"):
                joined(episode, observation_space=like, action_space=like)

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
        made = partial(gymnasium.make, "Pendulum-v1", max_episode_steps=4)
        for env in (made().spec, made):
            dataset = OfflineDataset.from_arrays(
                "walks", **arrays, observation_space=PLANE, env_spec=env
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
            ({"rewards": np.zeros(8)}, r"rewards has shape \[8\], expected 9 rows, as the others"),
            (
                {"observations": np.zeros((8, 2))},
                r"observations has shape \[8, 2\], expected 9 rows",
            ),
            (
                {"observations": {"x": np.zeros(9), "y": np.zeros(8)}},
                r"observations/y has shape \[8\]",
            ),
            (
                {"infos": {"success": np.zeros(8)}},
                r"infos/success has shape \[8\], expected 9 rows",
            ),
            ({"columns": {"cost": np.zeros(8)}}, r"columns/cost has shape \[8\], expected 9 rows"),
            (
                {"actions": np.zeros(9)},
                r"actions has shape .*: of one column, give actions\[:, None\]",
            ),
            (
                {"observations": [{"x": 0.0}] * 9},
                r"observations .* expected a dictionary of arrays",
            ),
            (
                {
                    "observations": {"x": np.zeros((9, 2))},
                    "next_observations": {"y": np.zeros((9, 2))},
                },
                "next_observations has no entry 'x', which the space has",
            ),
            (
                {"action_space": (1, -1)},
                r"action_space=\(1, -1\): expected a space, .*, or \(low, high\)",
            ),
            ({"action_space": ([0, 0], [1, 1, 1])}, r"action_space=.*one per dimension of \[1\]"),
            ({"action_space": (-np.inf, 1)}, "action_space=.*finite"),
            (
                {"action_space": 0},
                "action_space=0: expected a space, the number of discrete actions",
            ),
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
            ({"timeouts": None, "next_observations": None}, "without timeouts, next_obs"),
        ],
    )
    def test_broken(self, changes, message):
        with pytest.raises(ValueError, match=rf"^(walks: )?{message}"):
            OfflineDataset.from_arrays("walks", **flat(WALKS) | changes)


def test_bounds_that_float32_does_not_have_are_none() -> None:
    most = np.finfo(np.float64).max
    arrays = flat(WALKS) | {"actions": np.full((9, 1), 0.3)}
    for bound in (most, np.inf):
        space = spaces.Box(-bound, bound, (1,), np.float64)
        dataset = OfflineDataset.from_arrays("walks", **arrays, action_space=space)
        assert dataset.transitions["action"].flatten().tolist() == [np.float32(0.3)] * 9
        assert dataset.action_space == space
        rows = action_row_space(space)
        assert rows == spaces.Box(-np.inf, np.inf, (1,)) and differ_in_type_alone(rows, space)


def test_bounds_of_actions_are_a_space_or_numbers() -> None:
    arrays = flat(WALKS)
    arrays["actions"] = 5 * arrays["actions"]
    for bounds in ((-5, 5), ([-5], 5.0), spaces.Box(-5, 5, (1,))):
        dataset = OfflineDataset.from_arrays("walks", **arrays, action_space=bounds)
        assert dataset.action_space == spaces.Box(-5, 5, (1,))
    with pytest.raises(ValueError, match=r"outside \[-1, 1\].*give action_space="):
        OfflineDataset.from_arrays("walks", **arrays)


@pytest.mark.parametrize(
    ("space", "remedy"),
    [
        (spaces.MultiDiscrete([3, 4]), r"as one Discrete\(12\)"),
        (spaces.MultiBinary(3), r"as one Discrete\(8\)"),
        (spaces.Text(3), "must be Box or Discrete, found Text"),
    ],
)
def test_actions_of_no_policy_are_refused_with_what_to_do(space, remedy) -> None:
    arrays = flat(WALKS) | {"actions": np.zeros((9, *(space.shape or ())), int)}
    with pytest.raises(TypeError, match=remedy):
        OfflineDataset.from_arrays("walks", **arrays, action_space=space)


def test_columns_are_given_by_name() -> None:
    with pytest.raises(TypeError, match=r"walks: columns is a list, expected \{name: array"):
        OfflineDataset.from_arrays("walks", **flat(WALKS), columns=["cost"])  # pyright: ignore


@pytest.mark.parametrize("outlier", [1e30, -1e9])
def test_a_reward_that_dwarfs_all_others_is_told(outlier: float) -> None:
    arrays = flat([walk(50)])
    arrays["rewards"] = np.ones(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OfflineDataset.from_arrays("walks", **arrays, reward_rule="unit_rms")
        sparse = arrays | {"rewards": np.eye(50)[-1]}
        OfflineDataset.from_arrays("walks", **sparse, reward_rule="unit_rms")
    arrays["rewards"][7] = outlier
    with pytest.warns(
        UserWarning, match=r"'unit_rms' scales by a single reward, .* of transition 7;"
    ):
        OfflineDataset.from_arrays("walks", **arrays, reward_rule="unit_rms")


@pytest.mark.parametrize("entrance", ["vectors", "dictionary", "episodes", "infos"])
def test_digits_that_float32_does_not_hold_are_told(entrance: str) -> None:
    """A place in the north, and the time of a log: few of their values are left in a row."""
    n = np.arange(1000)
    east, stamp = 5.4e6 + 2 * np.sin(n / 20), 1.7e9 + 0.02 * n
    assert len(np.unique(east.astype(np.float32))) == 9
    assert len(np.unique(stamp.astype(np.float32))) == 1
    fine = np.stack([east - 5.4e6, n * 1e-30, np.full(1000, 5.4e6 + 0.1), 1e6 * np.cos(n)], axis=1)
    rows = np.stack([east, *fine.T, stamp], axis=1)
    given = {"actions": np.zeros((1000, 1)), "rewards": np.zeros(1000), "terminals": n % 20 == 19}
    given |= {"timeouts": np.zeros(1000)}
    expected = "observations[:, 0], observations[:, 5]"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if entrance == "vectors":
            OfflineDataset.from_arrays("log", observations=rows, **given)
        elif entrance == "dictionary":
            parts = {"z": rows[:, [0]], "a": fine, "stamp": stamp[:, None]}
            OfflineDataset.from_arrays("log", observations=parts, **given)
            expected = "observations/stamp[:, 0], observations/z[:, 0]"
        elif entrance == "infos":
            OfflineDataset.from_arrays("log", observations=fine, columns={"at": stamp}, **given)
            expected = "infos/at[:, 0]"
        else:  # each of which goes a short way
            parts = [walk(19, observations=part) for part in np.split(rows, 50)]
            joined(*parts, observation_space=spaces.Box(-np.inf, np.inf, (6,), np.float64))
        OfflineDataset.from_arrays("log", observations=rows.astype(np.float32), **given)
        OfflineDataset.from_arrays("log", observations=fine, **given)
    (message,) = [str(each.message) for each in told if "float32" in str(each.message)]
    assert f"fewer than 256 values over the range of {expected}: subtract" in message
    (place,) = {each.filename for each in told if "float32" in str(each.message)}
    assert place == (
        __file__ if entrance != "episodes" else __file__.replace("test_data_own", "episodes")
    )


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
