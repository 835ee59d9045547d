"""Reader of Minari data sets, in all of Minari's storage formats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import minari
from minari import EpisodeData, MinariDataset
from minari.storage import get_dataset_path

from torchrl_iql.data.episodes import EpisodeRule
from torchrl_iql.data.hdf5 import hdf5_episodes, is_plain_hdf5
from torchrl_iql.data.source import Source

__all__ = ["minari_source"]


def minari_source(source: str | Path, *, download: bool) -> Source:
    """Finds a Minari data set.

    Args:
        source: Its id, or its folder: the one that contains ``data``, or ``data`` itself.
        download: Whether to download an id that is not there locally.

    Raises:
        FileNotFoundError: If there is no such data set, or its download failed.
        ValueError: If it is damaged or incomplete, now or when its episodes are read.
    """
    folder = _folder(source, download)
    try:
        dataset = MinariDataset(folder)
        metadata = dataset.storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        return Source(
            name=str(source),
            path=dataset.storage.data_path,
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            # Minari has no public name for this specification, only for the environment made from it.
            env_spec=dataset._eval_env_spec or dataset.env_spec,
            reference_scores=None if low is None or high is None else (low, high),
            episodes=partial(_complete_episodes, dataset, str(source)),
        )
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: Minari can not open {folder}: {error!r}") from error


def _folder(source: str | Path, download: bool) -> Path:
    for folder in (Path(source), Path(source, "data")):
        if (folder / "metadata.json").is_file():
            return folder

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
    return root / source / "data"


def _complete_episodes(
    dataset: MinariDataset, name: str, episode_rule: EpisodeRule
) -> Iterator[EpisodeData]:
    steps = 0
    try:
        if is_plain_hdf5(dataset):
            episodes = hdf5_episodes(dataset, with_success=episode_rule == "until_success")
        else:
            episodes = dataset.iterate_episodes()
        for episode in episodes:
            steps += len(episode)
            yield episode
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: its files are damaged or incomplete: {error}") from error
    if steps != dataset.total_steps:
        # Minari 0.5.4 silently cuts an episode of Arrow or Parquet after 32767 transitions.
        raise ValueError(
            f"{name}: read {steps} of {dataset.total_steps} transitions; files are missing, or an "
            "episode is too long for Minari's arrow and parquet readers (32767 steps): use hdf5"
        )
