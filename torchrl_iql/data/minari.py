"""Reader of Minari data sets, in all of Minari's storage formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minari
from minari import EpisodeData, MinariDataset
from minari.storage import get_dataset_path
from tensordict import TensorDict

from torchrl_iql.data.cache import entry_path, read, write
from torchrl_iql.data.dataset import OfflineDataset, require_rules
from torchrl_iql.data.episodes import EpisodeRule
from torchrl_iql.data.hdf5 import hdf5_episodes, is_plain_hdf5
from torchrl_iql.data.rewards import RewardRule

__all__ = ["load"]

CACHED = "transitions", "episode_lengths", "episode_returns"
"""What is expensive to make of an OfflineDataset; the rest is in the metadata of the source."""


def load(
    source: str | Path,
    *,
    reward: RewardRule = "none",
    episodes: EpisodeRule = "as_stored",
    download: bool = True,
    cache: bool = True,
) -> OfflineDataset:
    """Reads a Minari data set.

    The result, rules applied, is kept as one file in ``~/.cache/torchrl_iql``, or in the folder that
    the environment variable ``TORCHRL_IQL_CACHE`` names. A later call with the same rules and
    unchanged source files (path, sizes, modification times) verifies the checksum of that file and
    maps it instead of parsing, which takes no memory of its own. A damaged file is reported and made
    anew; the folder may be deleted at any time.

    Args:
        source: The id of a data set, as ``"mujoco/hopper/medium-v0"``, or its folder: the one that
            contains ``data``, or ``data`` itself.
        reward: Reward rule: ``"none"``, ``"minus_one"`` (AntMaze), ``"return_range"`` (locomotion).
        episodes: Episode rule: ``"as_stored"``, or ``"until_success"`` for mazes, whose recordings
            go on after the goal: each episode terminates at its first success.
        download: Whether to download an id that is not there locally.
        cache: Whether to use that folder. A folder that can not be written to is a warning.

    Raises:
        FileNotFoundError: If there is no such data set, or its download failed.
        TypeError: If a space can not be turned into rows.
        ValueError: If a rule is unknown or does not apply, or the data are damaged or incomplete.
    """
    require_rules(reward, episodes)
    dataset = _open(source, download)
    known: dict[str, Any] = {**_known(dataset), "reward_rule": reward, "episode_rule": episodes}
    entry = entry_path(dataset.storage.data_path, reward, episodes) if cache else None
    if entry and (arrays := read(entry)) is not None:
        return OfflineDataset(name=str(source), **arrays, **known)

    recorded = _complete_episodes(dataset, str(source), episodes)
    loaded = OfflineDataset.from_episodes(str(source), recorded, **known)
    if entry:
        write(entry, TensorDict({key: getattr(loaded, key) for key in CACHED}))
    return loaded


def _known(dataset: MinariDataset) -> dict[str, Any]:
    """What the metadata say, as arguments of OfflineDataset."""
    metadata = dataset.storage.metadata
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return {
        "observation_space": dataset.observation_space,
        "action_space": dataset.action_space,
        # Minari has no public name for this specification, only for the environment made from it.
        "env_spec": dataset._eval_env_spec or dataset.env_spec,
        "reference_scores": None if low is None or high is None else (low, high),
    }


def _open(source: str | Path, download: bool) -> MinariDataset:
    for folder in (Path(source), Path(source, "data")):
        if (folder / "metadata.json").is_file():
            return MinariDataset(folder)

    root = get_dataset_path()
    missing = f"no Minari data set {str(source)!r}, neither as a folder nor as an id in {root}"
    if isinstance(source, Path):
        raise FileNotFoundError(missing)
    if not (root / source / "data").is_dir():
        if not download:
            raise FileNotFoundError(f"{missing} (see `minari list local`), and download is False")
        try:
            minari.download_dataset(source)
        except Exception as error:  # network, unknown id or version, optional package not installed
            raise FileNotFoundError(
                f"{missing} (see `minari list local`), and its download failed: {error}"
            ) from error
    return minari.load_dataset(source)


def _complete_episodes(
    dataset: MinariDataset, name: str, episode_rule: EpisodeRule
) -> Iterator[EpisodeData]:
    if is_plain_hdf5(dataset):
        episodes = hdf5_episodes(dataset, with_success=episode_rule == "until_success")
    else:
        episodes = dataset.iterate_episodes()
    steps = 0
    for episode in episodes:
        steps += len(episode)
        yield episode
    if steps != dataset.total_steps:
        # Minari 0.5.4 silently cuts an episode of Arrow or Parquet after 32767 transitions.
        raise ValueError(
            f"{name}: read {steps} of {dataset.total_steps} transitions; files are missing, or an "
            "episode is too long for Minari's arrow and parquet readers (32767 steps): use hdf5"
        )
