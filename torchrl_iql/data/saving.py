"""A data set of one's own as one of Minari's, by Minari's own writer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import minari
import numpy as np
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE, parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path
from tensordict import NestedKey, TensorDict

from torchrl_iql.data.cache import unfinished
from torchrl_iql.data.episodes import TAKEN
from torchrl_iql.data.hdf5 import has_images
from torchrl_iql.spaces import observations_of, written

if TYPE_CHECKING:
    from torchrl_iql.data.dataset import OfflineDataset

__all__ = ["STOPPED", "save_minari"]


STOPPED = "unrecorded_ends"
"""Where Minari's metadata say how many episodes end without a record of it; these are stored as truncated."""


def save_minari(dataset: OfflineDataset, dataset_id: str) -> None:
    """Write a data set into Minari's store: see :meth:`OfflineDataset.save_minari`."""
    if DATASET_ID_RE.fullmatch(dataset_id) is None:
        raise ValueError(f"{dataset_id!r} is no id of Minari's, as own/walks-v0")
    if dataset.reward_rule != "none" or "steps_to_next_obs" in dataset.transitions.keys():
        changed = (
            f"reward rule {dataset.reward_rule!r}" if dataset.reward_rule != "none" else "n_step"
        )
        raise ValueError(
            f"{dataset.name}: its rewards were changed by {changed}, and Minari's data sets hold what was "
            "paid: load it by reward rule 'none', and change it when it is trained on"
        )
    path = get_dataset_path(dataset_id)
    if path.exists():
        raise FileExistsError(f"there is a data set {dataset_id} already, in {path}")
    if (namespace := parse_dataset_id(dataset_id)[0]) and namespace not in list_local_namespaces():
        create_namespace(namespace)
    with unfinished(path) as folder:
        folder.mkdir()
        pictures = has_images(dataset.observation_space)
        options: Any = {"jpeg_encoding": False} if pictures else {}  # which would change them
        storage = MinariStorage.new(
            folder / "data",
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            env_spec=_storable(dataset.env_spec),
            **options,
        )
        metadata: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": minari.__version__}
        if dataset.reference_scores is not None:
            low, high = dataset.reference_scores
            metadata |= {"ref_min_score": low, "ref_max_score": high}
        if dataset.recording.stopped:
            metadata[STOPPED] = dataset.recording.stopped
        storage.update_metadata(metadata)
        storage.update_episodes(_episodes(dataset))


def _storable(env_spec: EnvSpec | None) -> EnvSpec | None:
    if env_spec is not None:
        try:
            env_spec.to_json()
        except (TypeError, ValueError) as error:
            raise ValueError(f"the environment {env_spec.id} can not be stored: {error}") from error
    return env_spec


def _episodes(dataset: OfflineDataset) -> Iterator[EpisodeBuffer]:
    columns = [key for key in dataset.transitions.keys(True, True) if written(key) not in TAKEN]
    for rows in dataset.transitions.split(dataset.episode_lengths.tolist()):
        entries: dict[str, Any] = {
            "observations": observations_of(
                dataset.observation_space, _states(rows, "observation")
            ),
            "actions": _actions(dataset.action_space, rows["action"].numpy()),
            "rewards": rows["next", "reward"].squeeze(-1).numpy(),
            "terminations": rows["next", "terminated"].squeeze(-1).numpy(),
            "truncations": rows["next", "truncated"].squeeze(-1).numpy(),
            "infos": {
                written(key): _states(rows, key)
                if ("next", *_path(key)) in columns
                else rows[key].numpy()
                for key in columns
                if _path(key)[0] != "next"
            },
        }
        yield EpisodeBuffer(**entries)


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key  # pyright: ignore[reportReturnType]


def _states(rows: TensorDict, key: NestedKey) -> np.ndarray:
    """Return an entry before each of T transitions, and after the last one, ``[T + 1, ...]``."""
    following = rows["next", *_path(key)]
    return torch.cat([rows[key], following[-1:]]).numpy()  # pyright: ignore


def _actions(space: Space, rows: np.ndarray) -> np.ndarray:
    """Return the actions that rows stand for, ``[T, ...]``."""
    if isinstance(space, Discrete):
        return rows + space.start
    assert isinstance(space, Box)
    values = rows.reshape(len(rows), *space.shape)
    return (values if space.dtype.kind == "f" else np.rint(values)).astype(space.dtype)  # pyright: ignore
