"""Episodes to make data sets of, and what has to come out of them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari import EpisodeData
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict

from torchrl_iql.data import OfflineDataset, load

MARKS = [
    pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None"),
    pytest.mark.usefixtures("cache_folder", "root"),
]
"""Of every test of data: a Minari store and a cache of its own."""
FORMATS = ("hdf5", "arrow", "parquet")
PLANE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
UNIT = spaces.Box(-1.0, 1.0, (1,))


def walk(length: int = 3, start: float = 0.0, **changes: Any) -> EpisodeBuffer:
    """Make an episode: at t observation (start + t, -t), action t / length, reward start + t / 2."""
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
    """Make a data set without storage in between."""
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
    """List (observation, next observation, reward, terminated, truncated), the environment's own."""
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


def refused_bytes(path: Path, contents: bytes, every: int) -> int:
    """Flip one byte of a file after the other; count the times that loading is refused, by its name."""
    refused = 0
    for at in range(0, len(contents), every):
        broken = bytearray(contents)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            load(path, cache=False)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refused += 1
    return refused


def with_value(value: float, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape)
    array[index] = value
    return array


def flat(episodes: list[EpisodeBuffer]) -> dict[str, np.ndarray]:
    """Make episodes in D4RL's layout, with next observations."""
    return {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([e.terminations for e in episodes]),
        "timeouts": np.concatenate([e.truncations for e in episodes]),
        "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
    }


def as_tensordict(arrays: dict[str, np.ndarray]) -> TensorDict:
    """Turn arrays in D4RL's layout into what TorchRL would hold."""
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


def leaves(transitions: TensorDict) -> dict[Any, tuple]:
    """Return type, shape and bytes of each entry: two NaN are equal, 0 and -0 are not."""
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


END = np.array([False, False, True])
WALKS = [walk(4), walk(3, start=10.0, terminations=END, truncations=~END & False), walk(2, 20.0)]
