"""Round trips of drawn episodes: whatever way they are given, the transitions are the same."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from episodes import FORMATS, MARKS, as_tensordict, assert_same, flat, joined, write
from torchrl_iql.data import OfflineDataset, load

pytestmark = MARKS
quick = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # ids are of one example
)
numbers = count()
Recorded = tuple[list[EpisodeBuffer], dict[str, spaces.Space]]


@st.composite
def recordings(draw: st.DrawFn) -> Recorded:
    """Draw episodes that end by themselves or at a time limit, and their spaces."""
    size = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    action_space: spaces.Space = draw(
        st.sampled_from(
            [spaces.Box(-2.0, 1.0, (2,)), spaces.Discrete(3), spaces.Discrete(2, start=5)]
        )
    )
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = 10.0 ** draw(st.integers(-3, 6))
    rng = np.random.default_rng(seed)
    action_space.seed(seed)
    episodes = []
    for length in lengths:
        last = np.arange(1, length + 1) == length
        terminated = draw(st.booleans())
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(length + 1, size)).astype(dtype),
                actions=np.stack([action_space.sample() for _ in range(length)]),
                rewards=scale * rng.normal(size=length),
                terminations=last & terminated,
                truncations=last & (not terminated),
            )
        )
    observation_space = spaces.Box(-np.inf, np.inf, (size,), dtype)
    return episodes, {"observation_space": observation_space, "action_space": action_space}


def arrays(recorded: Recorded) -> dict[str, np.ndarray]:
    """Return D4RL's layout; the jump from one episode to the next is recorded as well."""
    return flat(recorded[0])


@quick
@given(recordings())
def test_transitions_are_numpys(recorded: Recorded) -> None:
    """No entrance of the package takes part in what is expected."""
    episodes, spaces_ = recorded
    found, rows = joined(*episodes, **spaces_), arrays(recorded)
    actions = rows["actions"]
    if isinstance(space := spaces_["action_space"], spaces.Box):
        margin = 1e-5 * (space.high.astype(float) - space.low) / 2
        actions = actions.clip(space.low + margin, space.high - margin)
    else:
        actions = actions - space.start
    expected = as_tensordict(rows | {"actions": actions})
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        value = found.transitions[key]
        np.testing.assert_allclose(value, expected[key].to(value.dtype), rtol=1e-6, atol=1e-7)
    for key in ("terminated", "truncated", "done"):
        assert found.transitions["next", key].equal(expected["next", key])
    assert found.episode_lengths.tolist() == [len(e.rewards) for e in episodes]
    np.testing.assert_allclose(found.episode_returns, [sum(e.rewards) for e in episodes])


@quick
@given(recordings())
def test_arrays_and_tensordicts_are_episodes(recorded: Recorded) -> None:
    episodes, spaces_ = recorded
    rows, expected = arrays(recorded), joined(*episodes, **spaces_)
    assert_same(OfflineDataset.from_arrays("walks", **rows, **spaces_), expected)
    given_ = as_tensordict(rows)
    assert_same(OfflineDataset.from_tensordict("walks", given_, **spaces_), expected)


@pytest.mark.parametrize("data_format", FORMATS)
@quick
@given(recordings())
def test_arrays_go_through_minari_and_come_back(data_format: str, recorded: Recorded) -> None:
    """From arrays to transitions, to a stored data set, and back, from its files and from the cache."""
    spaces_ = recorded[1]
    dataset = OfflineDataset.from_arrays("walks", **arrays(recorded), **spaces_)
    name = f"test/walks-v{next(numbers)}"
    write(*as_recorded(dataset), dataset_id=name, data_format=data_format, **spaces_)
    for _ in range(2):
        found = load(name)
        for key, value in dataset.transitions.items(True, True):
            assert found.transitions[key].dtype == value.dtype
            assert found.transitions[key].equal(value)
        assert found.episode_lengths.equal(dataset.episode_lengths)
        assert (found.observation_space, found.action_space) == tuple(spaces_.values())


def as_recorded(dataset: OfflineDataset) -> list[EpisodeBuffer]:
    """Turn transitions into the episodes of an environment, in the types of its spaces."""
    episodes = []
    for td in dataset.transitions.split(dataset.episode_lengths.tolist()):
        after = td["next"]
        observations = torch.cat([td["observation"], after["observation"][-1:]])
        actions: Any = td["action"].numpy()
        if isinstance(dataset.action_space, spaces.Discrete):
            actions = actions + dataset.action_space.start
        episodes.append(
            EpisodeBuffer(
                observations=observations.numpy().astype(dataset.observation_space.dtype),
                actions=actions,
                rewards=after["reward"].flatten().numpy(),
                terminations=after["terminated"].flatten().numpy(),
                truncations=after["truncated"].flatten().numpy(),
            )
        )
    return episodes


@quick
@given(recordings())
def test_transitions_are_read_as_what_they_are(recorded: Recorded) -> None:
    """What was made once can be given again, as arrays of the layout of TorchRL, unchanged."""
    dataset = joined(*recorded[0], **recorded[1])
    space = recorded[1]["action_space"]
    if isinstance(space, spaces.Discrete):  # its transitions count from 0
        space = spaces.Discrete(int(space.n))
    again = OfflineDataset.from_tensordict("walks", dataset.transitions.clone(), action_space=space)
    assert again.transitions.batch_size == dataset.transitions.batch_size
    for key, value in dataset.transitions.items(True, True):
        assert again.transitions[key].equal(value)
    assert again.episode_lengths.equal(dataset.episode_lengths)
