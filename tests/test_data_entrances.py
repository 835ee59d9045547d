"""Every way into a data set reads all that it is given, and ends in the same checks."""

from __future__ import annotations

import pickle
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Text, Tuple
from gymnasium.wrappers import RecordEpisodeStatistics, TransformReward
from tensordict import TensorDict
from torchrl.envs import GymEnv
from torchrl.modules import ProbabilisticActor

from episodes import END, MARKS, PLANE, UNIT, WALKS, as_tensordict, flat, joined, walk, write
from torchrl_iql import Evaluator, IQLLoss, OfflineDataset, TrainStep, load_dataset, models
from torchrl_iql.environments import data_environment, observing

pytestmark = MARKS

MAZE = "PointMaze_UMaze-v3"
PARTS = ["achieved_goal", "desired_goal", "observation"]


def on_disk(arrays: dict[str, Any], folder: Path) -> Path:
    path = folder / "walks.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return path


# --- Which entries are read ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout() -> TensorDict:
    env = GymEnv(MAZE)
    env.set_seed(0)
    return env.rollout(50)  # pyright: ignore


def recorded(rollout: TensorDict) -> dict[str, Any]:
    """Return the arguments of from_arrays."""
    following = rollout["next"]
    return {
        "observations": {key: rollout[key] for key in PARTS},
        "next_observations": {key: following[key] for key in PARTS},
        "actions": rollout["action"],
        "rewards": following["reward"],
        "terminals": following["terminated"],
        "timeouts": following["truncated"],
    }


def as_episode(rollout: TensorDict) -> dict[str, Any]:
    following = rollout["next"]
    return {
        "observations": {
            key: torch.cat([rollout[key], following[key][-1:]]).numpy() for key in PARTS
        },
        "actions": rollout["action"].numpy(),
        "rewards": following["reward"].numpy(),
        "terminations": following["terminated"].numpy(),
    }


def entrances(rollout: TensorDict) -> dict[str, Callable[..., OfflineDataset]]:
    spaces = data_environment(MAZE).unwrapped
    return {
        "tensordict": lambda **k: OfflineDataset.from_tensordict(
            "maze", rollout, env_spec=MAZE, **k
        ),
        "arrays": lambda **k: OfflineDataset.from_arrays(
            "maze", **recorded(rollout), env_spec=MAZE, **k
        ),
        "episodes": lambda **k: OfflineDataset.from_episodes(
            "maze",
            [as_episode(rollout)],
            observation_space=spaces.observation_space,
            action_space=spaces.action_space,
            env_spec=MAZE,
            **k,
        ),
    }


@pytest.mark.parametrize("entrance", ["tensordict", "arrays", "episodes"])
def test_all_of_a_compound_observation_is_read(entrance: str, rollout: TensorDict) -> None:
    dataset = entrances(rollout)[entrance]()
    expected = torch.cat([rollout[key] for key in PARTS], dim=-1).float()
    assert dataset.transitions["observation"].equal(expected)
    shown = data_environment(dataset.env_spec).observation_space  # pyright: ignore
    assert shown.shape == (8,)


@pytest.mark.parametrize("keys", [["observation"], ["observation", "desired_goal"]])
@pytest.mark.parametrize("entrance", ["tensordict", "arrays", "episodes"])
def test_what_is_selected_is_observed_in_data_and_environment(
    entrance: str, keys: list[str], rollout: TensorDict
) -> None:
    dataset = entrances(rollout)[entrance](observation_keys=keys)
    in_order = [key for key in PARTS if key in keys]
    expected = torch.cat([rollout[key] for key in in_order], dim=-1).float()
    assert dataset.transitions["observation"].equal(expected)
    size = expected.shape[-1]
    env = data_environment(dataset.env_spec)  # pyright: ignore
    observation, _ = env.reset(seed=0)
    whole, _ = data_environment(MAZE).reset(seed=0)
    parts = dict(zip(PARTS, np.split(whole, [2, 4]), strict=True))
    np.testing.assert_array_equal(observation, np.concatenate([parts[key] for key in in_order]))
    with Evaluator(dataset.env_spec, episodes=1) as evaluate:  # pyright: ignore
        evaluate(models.deterministic_policy(size, 2))


class Halved(TransformReward):
    """A wrapper of one's own, which gymnasium keeps in its specification."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env, lambda reward: reward / 2)  # pyright: ignore


def made_by_hand() -> gymnasium.Env:
    return RecordEpisodeStatistics(Halved(gymnasium.make(MAZE).unwrapped))


def test_what_is_selected_of_a_function_that_wraps_is_observed(rollout: TensorDict) -> None:
    dataset = OfflineDataset.from_arrays(
        "maze", **recorded(rollout), env_spec=made_by_hand, observation_keys=PARTS[1:]
    )
    expected = torch.cat([rollout[key] for key in PARTS[1:]], dim=-1).float()
    assert dataset.transitions["observation"].equal(expected)
    spec = pickle.loads(pickle.dumps(dataset.env_spec))  # as workers get it
    env = data_environment(spec)  # pyright: ignore
    observation, _ = env.reset(seed=0)
    whole, _ = data_environment(MAZE).reset(seed=0)
    np.testing.assert_array_equal(observation, whole[2:])
    again = observing(spec, PARTS[2:])
    assert data_environment(again).reset(seed=0)[0].tolist() == whole[4:].tolist()


def test_a_goal_is_not_dropped_without_a_word(rollout: TensorDict) -> None:
    message = r"entries that are not read, \['achieved_goal', 'desired_goal'\].*observation_keys"
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_tensordict("maze", rollout)
    dataset = OfflineDataset.from_tensordict("maze", rollout, observation_keys=PARTS)
    assert dataset.transitions["observation"].shape == (50, 8)
    chosen = OfflineDataset.from_tensordict("maze", rollout, observation_keys=PARTS[1:])
    assert chosen.transitions["observation"].shape == (50, 6)
    masked = rollout.clone().set("action_mask", torch.ones(50, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not read, \['action_mask'\]"):
        OfflineDataset.from_tensordict("maze", masked, observation_keys=PARTS)
    kept = OfflineDataset.from_tensordict("maze", rollout, columns=PARTS[:2])
    assert kept.transitions["observation"].equal(rollout["observation"].float())
    for key in PARTS[:2]:
        assert kept.transitions[key].equal(rollout[key].float())
        assert kept.transitions["next", key].equal(rollout["next", key].float())


@pytest.mark.parametrize(
    ("entry", "shown"),
    [("action_mask", "action_mask"), (("next", "cost"), "cost"), (("a", "b"), "a/b")],
)
def test_any_other_entry_is_named_or_refused(entry: Any, shown: str) -> None:
    transitions = as_tensordict(flat(WALKS))
    transitions[entry] = torch.arange(9.0)[:, None]
    with pytest.raises(ValueError, match=rf"not read, \['{shown}'\]"):
        OfflineDataset.from_tensordict("walks", transitions)
    kept = OfflineDataset.from_tensordict("walks", transitions, columns=[entry])
    assert kept.transitions[entry].equal(transitions[entry])


def test_what_torchrl_adds_is_passed_over() -> None:
    from torchrl.collectors import Collector
    from torchrl.envs import InitTracker, RewardSum, StepCounter, TransformedEnv

    env = TransformedEnv(GymEnv("Pendulum-v1"))
    for transform in (InitTracker(), StepCounter(), RewardSum()):
        env.append_transform(transform)
    policy = models.gaussian_policy(3, 1)
    assert isinstance(policy, ProbabilisticActor)
    (policy.return_log_prob,) = (True,)  # pyright: ignore
    collector = Collector(env, policy, frames_per_batch=50, total_frames=50)
    for batch in collector:
        clipped = batch.set("action", batch["action"].clamp(-2, 2))
        dataset = OfflineDataset.from_tensordict("pendulum", clipped, env_spec="Pendulum-v1")
        assert len(dataset.transitions) == 50
    collector.shutdown()


def test_columns_reach_the_loss() -> None:
    """A network with an input of its own reads it in the batch."""
    mask = np.random.default_rng(0).normal(size=(9, 3))
    dataset = OfflineDataset.from_arrays("walks", **flat(WALKS), columns={"context": mask})
    assert dataset.transitions["context"].dtype is torch.float32
    from tensordict.nn import TensorDictModule

    class Value(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(5, 1)

        def forward(self, observation: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.cat([observation, context], -1))

    transitions = dataset.transitions
    transitions["next", "context"] = transitions["context"].roll(-1, 0)
    loss = IQLLoss(
        models.gaussian_policy(2, 1),
        models.qvalue_ensemble(2, 1),
        TensorDictModule(Value(), in_keys=["observation", "context"], out_keys=["state_value"]),
    )
    before = loss.value_network_params["module", "layer", "weight"].clone()
    step = TrainStep(loss)
    step.run(dataset.minibatches(4), 3)
    assert not loss.value_network_params["module", "layer", "weight"][0, 2:].equal(before[0, 2:])


def test_infos_are_kept_as_columns(tmp_path: Path) -> None:
    energy = np.arange(5.0)  # also of the last state, as Minari stores infos
    first = walk(4, infos={"energy": energy, "cost": np.arange(4), "other": np.zeros(5)})
    dataset = joined(first, columns=["energy", "cost"])
    assert dataset.transitions["energy"].tolist() == [0, 1, 2, 3]
    assert dataset.transitions["next", "energy"].tolist() == [1, 2, 3, 4]
    assert dataset.transitions["cost"].tolist() == [0, 1, 2, 3]
    assert ("next", "cost") not in dataset.transitions.keys(True)
    for _ in range(2):  # the second is from the cache
        stored = load_dataset(write(first) if _ == 0 else "test/walks-v0", columns=["energy"])
        assert stored.transitions["energy"].tolist() == [0, 1, 2, 3]
        assert "cost" not in stored.transitions.keys()
    other = load_dataset("test/walks-v0", columns=["cost"])
    assert other.transitions["cost"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
def test_infos_within_infos_are_columns(storage: str, tmp_path: Path) -> None:
    infos = {"a": {"b": np.arange(4.0), "c": np.zeros(4)}}
    write(walk(3, infos=infos), data_format=storage)
    dataset = load_dataset("test/walks-v0", columns=["a/b"])
    assert dataset.transitions["a/b"].flatten().tolist() == [0, 1, 2]
    assert dataset.transitions["next", "a/b"].flatten().tolist() == [1, 2, 3]
    for column in ("a/d", "a/b/c", "d"):
        with pytest.raises(ValueError, match=f"there is no infos/{column}, found"):
            load_dataset("test/walks-v0", columns=[column])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((4,), (3,), "infos/energy has T entries, expected T \\+ 1, as in the first episode"),
        ((3,), (4,), "infos/energy has T \\+ 1 entries, expected T, as in the first episode"),
        (
            (3, 2),
            (3, 4),
            r"infos/energy has entries of shape \[4\], expected \[2\], as in the first",
        ),
        ((4, 2), (4,), r"infos/energy has entries of shape \[\], expected \[2\], as in the first"),
    ],
)
def test_columns_are_alike_in_all_episodes(first: tuple, second: tuple, message: str) -> None:
    episodes = [walk(3, infos={"energy": np.zeros(shape)}) for shape in (first, second)]
    with pytest.raises(ValueError, match=f"^walks, episode 1: {message}"):
        joined(*episodes, columns=["energy"])


def test_columns_follow_the_episode_rules() -> None:
    first = walk(
        4, rewards=np.array([0.0, 1, 0, 0]), infos={"success": [0, 0, 1, 0, 0], "n": np.arange(4)}
    )
    dataset = joined(first, episode_rule="until_success", columns=["n"])
    assert dataset.transitions["n"].tolist() == [0, 1]
    assert dataset.recording.transitions == 4


def test_arrays_of_a_file_are_named_or_refused(tmp_path: Path) -> None:
    path = on_disk(flat(WALKS) | {"cost": np.arange(9.0), "note": np.zeros(3)}, tmp_path)
    with pytest.raises(ValueError, match=r"arrays that are not read, \['cost'\].*columns="):
        load_dataset(path)
    assert load_dataset(path, columns=["cost"]).transitions["cost"].tolist() == list(range(9))


@pytest.mark.parametrize("column", ["observation", "action", "next", "next/reward"])
def test_columns_take_no_other_entrys_place(column: str) -> None:
    with pytest.raises(ValueError, match=f"columns: '{column}' is taken"):
        joined(*WALKS, columns=[column])
    with pytest.raises(
        ValueError, match=r"columns must be a sequence .*, as \['cost'\], got 'cost'"
    ):
        joined(*WALKS, columns="cost")


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_text_is_left_out_by_a_selection(storage: str, tmp_path: Path) -> None:
    letters = string.ascii_lowercase + " "
    space = Dict(
        direction=Discrete(4),
        image=Box(0, 255, (2, 2, 3), np.uint8),
        mission=Text(9, charset=letters),
    )
    first = walk(
        3,
        observations={
            "direction": [0, 1, 2, 3],
            "image": [np.full((2, 2, 3), i, np.uint8) for i in range(4)],
            "mission": ["go"] * 4,
        },
        actions=[0, 1, 2],
    )
    write(first, observation_space=space, action_space=Discrete(3), data_format=storage)
    with pytest.raises(TypeError, match=r"mission: .*observation_keys=\['direction', 'image'\]"):
        load_dataset("test/walks-v0")
    dataset = load_dataset("test/walks-v0", observation_keys=["image", "direction"])
    rows = dataset.transitions["observation"]
    assert rows.shape == (3, 16)
    assert rows[2].tolist() == [0, 0, 1, 0, *[2] * 12]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            Dict(robot=Dict(joints=UNIT, name=Text(5)), camera=UNIT),
            r"observations/robot/name: can not .* size; give numbers in its place, or leave out all of "
            r"robot by observation_keys=\['camera'\]$",
        ),
        (
            Dict(robot=Dict(joints=UNIT, name=Text(5))),
            "observations/robot/name: can not .* size; give numbers in its place$",
        ),
        (Tuple([UNIT, Text(5)]), "observations/1: can not .* size; give numbers in its place$"),
        (
            Tuple([Dict(joints=UNIT, name=Text(5))]),
            "observations/0/name: can not .* size; give numbers in its place$",
        ),
        (Text(5), "observations: can not .* size; give numbers in its place$"),
    ],
)
def test_advice_on_text_can_be_followed(space: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^walks, episode 0: {message}"):
        joined(walk(3), observation_space=space)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["speed"], r"observation_keys=\['speed'\]: expected some of .*'desired_goal'"),
        ([], r"observation_keys=\[\]: expected some of"),
        ("speed", r"observation_keys must be a sequence of names, as \['speed'\], got 'speed'"),
    ],
)
def test_keys_that_are_not_there(keys: list[str], message: str, rollout: TensorDict) -> None:
    for entrance in (entrances(rollout)["arrays"], entrances(rollout)["episodes"]):
        with pytest.raises(ValueError, match=message):
            entrance(observation_keys=keys)


def test_there_is_nothing_to_choose_from(tmp_path: Path) -> None:
    path, message = on_disk(flat(WALKS), tmp_path), "observation_keys=.*without keys"
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays("walks", **flat(WALKS), observation_keys=["x"])
    with pytest.raises(ValueError, match=message):
        load_dataset(path, observation_keys=["x"])
    with pytest.raises(ValueError, match=message):
        load_dataset(write(*WALKS), observation_keys=["x"])


def test_vectors_that_are_not_the_whole_observation(rollout: TensorDict) -> None:
    given = recorded(rollout) | {
        "observations": rollout["observation"],
        "next_observations": rollout["next", "observation"],
    }
    message = (
        r"expected \[n, 8\], which are achieved_goal \(2\), desired_goal \(2\), observation \(4\)"
    )
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays("maze", **given, env_spec=MAZE)
    keys = {"observation_keys": ["observation"], "env_spec": MAZE}
    assert OfflineDataset.from_arrays("maze", **given, **keys).transitions["observation"].shape == (
        50,
        4,
    )


# --- Fragments -----------------------------------------------------------------------------------------

N = 600


def shuffled_walk(order: np.ndarray, *, timeouts: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(N + 1, 2)).cumsum(0)
    given = {
        "observations": positions[:-1],
        "next_observations": positions[1:],
        "actions": rng.uniform(-1, 1, (N, 1)),
        "rewards": rng.uniform(0, 3, N),
        "terminals": np.zeros(N, bool),
        "timeouts": np.arange(N) % 60 == 59,
    }
    return {key: its[order] for key, its in given.items() if timeouts or key != "timeouts"}


def ways(arrays: dict[str, Any], folder: Path) -> dict[str, Callable[..., OfflineDataset]]:
    """Return every entrance that rows without an order can take."""
    full = {"timeouts": np.zeros(N, bool)} | arrays
    return {
        "arrays": lambda **k: OfflineDataset.from_arrays("walk", **arrays, **k),
        "tensordict": lambda **k: OfflineDataset.from_tensordict("walk", as_tensordict(full), **k),
        "file": lambda **k: load_dataset(
            on_disk(arrays, folder), **({"reward": k["reward_rule"]} if k else {})
        ),
    }


@pytest.mark.parametrize("entrance", ["arrays", "tensordict", "file"])
def test_rows_without_an_order_are_told_at_every_entrance(entrance: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = ways(shuffled_walk(np.arange(N)), tmp_path)[entrance](reward_rule="return_range")
    assert whole.episode_lengths.tolist() == [60] * 10
    assert whole.recording.stopped == 0
    order = np.random.default_rng(1).permutation(N)
    mixed = ways(shuffled_walk(order), tmp_path)[entrance]
    for _ in range(2):  # of a file, the second is from the cache
        with pytest.warns(UserWarning, match="are they in the order of time") as caught:
            found = mixed()
        assert [w.filename for w in caught] == [__file__]
    with pytest.raises(ValueError, match=r"return_range'.*whole episodes.*time-out.*unit_rms"):
        mixed(reward_rule="return_range")
    with pytest.raises(ValueError, match="best episodes: a statistic of whole episodes"):
        found.best_episodes(0.1)


def test_rows_without_an_order_are_told_also_if_nothing_says_what_came_next(tmp_path: Path) -> None:
    """Then the next observation is that of the next row, and only how far it is away can tell."""
    for order, count in ((np.arange(N), 0), (np.random.default_rng(1).permutation(N), 1)):
        arrays = shuffled_walk(order)
        del arrays["next_observations"]
        folder = tmp_path / str(count)
        folder.mkdir()
        given = ways(arrays, folder)
        for entrance in ("arrays", "file", "file"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                given[entrance]()
            told = [
                str(each.message) for each in caught if "in the order of time" in str(each.message)
            ]
            assert len(told) == count
            assert all("as far away as the observations of any other" in each for each in told)


def test_what_is_fast_in_a_part_of_what_is_observed_is_no_other_order() -> None:
    """As velocities are; in another order all of it leads as far as to any other row."""
    rng, n = np.random.default_rng(0), 2000
    fast, slow = rng.normal(size=(n + 1, 15)), rng.normal(size=(n + 1, 2)).cumsum(axis=0)
    states = np.concatenate([fast, slow], axis=1)
    for order, count in ((np.arange(n), 0), (rng.permutation(n), 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            OfflineDataset.from_arrays(
                "fast",
                observations=states[:-1],
                next_observations=states[1:][order],
                actions=np.zeros((n, 1)),
                rewards=np.zeros(n),
                terminals=np.arange(n) == n - 1,
                timeouts=np.arange(n) % 100 == 99,
            )
        told = [each for each in caught if "in the order of time" in str(each.message)]
        assert len(told) == count, [str(each.message) for each in caught]


def test_rows_that_are_slices_are_fragments() -> None:
    transitions = as_tensordict(shuffled_walk(np.arange(N)) | {"timeouts": np.zeros(N, bool)})
    slices = transitions.reshape(30, 20)
    dataset = OfflineDataset.from_tensordict("slices", slices)
    assert dataset.recording.stopped == 30
    with pytest.raises(ValueError, match="30 of 30 end without a terminal or a recorded time-out"):
        OfflineDataset.from_tensordict("slices", slices, reward_rule="return_range")
    # Half of them recorded is enough.
    slices["next", "truncated"][:15, -1] = True
    OfflineDataset.from_tensordict("slices", slices, reward_rule="return_range").best_episodes(0.1)


def test_episodes_that_are_given_are_whole_unless_they_say_otherwise() -> None:
    episodes = [
        {
            "observations": np.zeros((4, 2)),
            "actions": np.zeros((3, 1)),
            "rewards": np.full(3, i),
            "terminations": np.zeros(3, bool),
        }
        for i in range(4)
    ]
    spaces: dict[str, Any] = {"observation_space": PLANE, "action_space": UNIT}
    rule: dict[str, Any] = {"reward_rule": "return_range"}
    OfflineDataset.from_episodes("walks", episodes, **spaces, **rule)
    said = [each | {"truncations": np.zeros(3, bool)} for each in episodes]
    with pytest.raises(ValueError, match="4 of 4 end without"):
        OfflineDataset.from_episodes("walks", said, **spaces, **rule)
    ended = [each | {"truncations": END} for each in episodes]
    OfflineDataset.from_episodes("walks", ended, **spaces, **rule)


def test_a_time_limit_is_a_record() -> None:
    arrays = shuffled_walk(np.arange(N), timeouts=False)
    del arrays["next_observations"]
    arrays["observations"] = np.pad(arrays["observations"], ((0, 0), (0, 1)))
    dataset = OfflineDataset.from_arrays(
        "walk", **arrays, env_spec="Pendulum-v1", action_space=UNIT, reward_rule="return_range"
    )
    assert dataset.episode_lengths.tolist() == [199, 199, 199]
    assert (dataset.recording.stopped, dataset.recording.transitions) == (0, N)


# --- A rule of no scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e30])
def test_unit_rms_means_the_same_on_any_scale(scale: float, tmp_path: Path) -> None:
    arrays = shuffled_walk(np.arange(N))
    dataset = OfflineDataset.from_arrays("walk", **arrays, reward_rule="unit_rms")
    scaled = arrays | {"rewards": arrays["rewards"] * scale}
    other = OfflineDataset.from_arrays("walk", **scaled, reward_rule="unit_rms")
    found = other.transitions["next", "reward"]
    torch.testing.assert_close(found, dataset.transitions["next", "reward"])
    np.testing.assert_allclose(found.double().square().mean(), 1, rtol=1e-6)
    factor = 1 / np.sqrt(np.mean(arrays["rewards"] ** 2))
    np.testing.assert_allclose(other.reward_transform.scale, factor / scale)
    path = on_disk(arrays, tmp_path)
    for _ in range(2):  # the second is from the cache
        stored = load_dataset(path, reward="unit_rms")
        assert stored.reward_transform == dataset.reward_transform


def test_unit_rms_of_nothing() -> None:
    zeros = joined(walk(4, rewards=np.zeros(4)), reward_rule="unit_rms")
    assert zeros.reward_transform.scale == 1
    with pytest.raises(ValueError, match="'unit_rms' needs the rewards of a data set"):
        OfflineDataset.empty("Pendulum-v1", reward_rule="unit_rms")


# --- Actions that their space does not hold ------------------------------------------------------------


@pytest.mark.parametrize("entrance", ["episodes", "arrays", "tensordict", "file", "minari"])
def test_actions_outside_are_refused_at_every_entrance(entrance: str, tmp_path: Path) -> None:
    walks = [walk(4), walk(5), walk(1)]
    walks[1].actions[3:] = 1.5
    calls: dict[str, Callable[[], OfflineDataset]] = {
        "episodes": lambda: joined(*walks),
        "arrays": lambda: OfflineDataset.from_arrays("walks", **flat(walks)),
        "tensordict": lambda: OfflineDataset.from_tensordict("walks", as_tensordict(flat(walks))),
        "file": lambda: load_dataset(on_disk(flat(walks), tmp_path)),
        "minari": lambda: load_dataset(write(*walks)),
    }
    message = r"actions\[3, 0\] is 1.5, outside \[-1, 1\].*2 of 10 actions, 20.00%.*action_space="
    with pytest.raises(ValueError, match=message):
        calls[entrance]()


def test_the_environments_bounds_hold_for_arrays_and_files(tmp_path: Path) -> None:
    given = flat([walk(4)])
    given["observations"] = np.pad(given["observations"], ((0, 0), (0, 1)))
    given["next_observations"] = np.pad(given["next_observations"], ((0, 0), (0, 1)))
    given["actions"] = given["actions"] + 1.2  # up to 1.95, of a pendulum's 2
    for dataset in (
        OfflineDataset.from_arrays("walks", **given, env_spec="Pendulum-v1"),
        load_dataset(on_disk(given, tmp_path), env="Pendulum-v1"),
    ):
        np.testing.assert_allclose(dataset.transitions["action"], given["actions"], rtol=1e-6)


# --- Messages ------------------------------------------------------------------------------------------


def test_messages_name_the_remedy() -> None:
    arrays = flat([walk(4)])
    bare = {k: v for k, v in arrays.items() if k not in ("timeouts", "next_observations")}
    with pytest.raises(ValueError, match="give timeouts, all zeros if"):
        OfflineDataset.from_arrays("walks", **bare)
    choices = arrays | {"actions": np.array([0.0, 1.0, 2.0, 1.0])}
    with pytest.raises(ValueError, match=r"actions has dtype float64, expected integers.*astype"):
        OfflineDataset.from_arrays("walks", **choices, action_space=Discrete(3))
    whole = arrays | {"actions": np.array([0, 1, 2, 1])}
    with pytest.raises(ValueError, match=r"action_space=gymnasium.spaces.Discrete\(n\)"):
        OfflineDataset.from_arrays("walks", **whole)
