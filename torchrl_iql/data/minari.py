"""Reader of Minari data sets, in all of Minari's storage formats."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import minari
import numpy as np
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec
from minari import EpisodeData, MinariDataset
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path

from torchrl_iql.data.episodes import errors_at
from torchrl_iql.data.hdf5 import has_images, hdf5_episodes, is_plain_hdf5
from torchrl_iql.data.saving import STOPPED
from torchrl_iql.data.source import Source
from torchrl_iql.data.stored import DownloadError
from torchrl_iql.environments import observing, registered, require_reference_scores
from torchrl_iql.spaces import listed, selected, sorted_space

__all__ = ["minari_source", "opened", "stored_env"]

SPACES = "observation_space", "action_space"
NAMED = 5
"""Data sets that a message names, if there are no more."""


def minari_source(
    source: str | Path,
    *,
    env_spec: EnvSpec | None = None,
    download: bool,
    observation_keys: Sequence[str] | None = None,
    trust_env: bool = False,
    with_env: bool = True,
) -> Source:
    """Find a Minari data set.

    Args:
        source: its id, or its folder: the one that contains ``data``, or ``data`` itself.
        env_spec: the environment to evaluate in; by default, that of the data set.
        download: whether to download an id that is not there locally.
        observation_keys: the entries of its observations that are read; all by default.
        trust_env: whether its environment may be made by code that only the data set names.
        with_env: whether that of the data set has to be known here; without, one that is not is left out.

    Raises:
        FileNotFoundError: if there is no such data set, or its download failed.
        ValueError: if it is damaged or incomplete, now or when its episodes are read, or names such code.
    """
    folder = _folder(source, download)
    try:
        dataset = opened(folder, trust_env=trust_env)
        metadata = dataset.storage.metadata
        stopped = metadata.get(STOPPED, 0)
        for key, number in (("total_steps", metadata["total_steps"]), (STOPPED, stopped)):
            if not isinstance(number, int):
                raise TypeError(f"{key} is {number!r}, expected an integer")
    except Exception as error:  # whatever Minari meets in damaged metadata
        raise ValueError(
            f"{source}: Minari can not open {folder}: {error!r}{_advice(folder)}"
        ) from error
    with errors_at(str(source)):
        space = sorted_space(selected(dataset.observation_space, observation_keys))
        if metadata.get("jpeg_encoding") and has_images(space):
            warnings.warn(
                f"{source}: images are stored as JPEG, and are not quite what the environment shows a "
                "policy; Minari stores them as they are with jpeg_encoding=False",
                stacklevel=3,
            )
        if env_spec is None:
            # Minari has no public name for this specification, only for the environment made from it.
            stored = dataset._eval_env_spec or dataset.env_spec
            try:
                env_spec = stored_env(stored, trust_env=trust_env)
            except (ImportError, ValueError):
                if with_env:
                    raise
        if observation_keys is not None and env_spec is not None:
            env_spec = observing(env_spec, observation_keys)
    return Source(
        name=str(source),
        path=dataset.storage.data_path,
        transitions=int(metadata["total_steps"]),
        observation_space=space,
        action_space=dataset.action_space,
        env_spec=env_spec,
        reference_scores=_reference_scores(metadata, str(source)),
        episodes=partial(_complete_episodes, dataset, str(source), space, stopped),
    )


def opened(folder: Path, *, trust_env: bool = False) -> MinariDataset:
    """Open a Minari data set without making the environment that it names.

    Raises:
        ValueError: its metadata lack a space, which Minari would ask that environment for.
    """
    known = MinariStorage.read_raw_metadata(folder).keys()
    missing = [key for key in SPACES if key not in known]
    if missing and "env_spec" in known and not trust_env:
        raise ValueError(
            f"metadata.json has no {' and no '.join(missing)}, which only the environment that it names "
            "could tell: give trust_env if you trust who made it"
        )
    return MinariDataset(folder)


def stored_env(env_spec: EnvSpec | None, *, trust_env: bool) -> EnvSpec | None:
    """Return the environment of a data set as it may be used: see :func:`registered`."""
    return env_spec if trust_env or env_spec is None else registered(env_spec)


def _reference_scores(metadata: dict[str, Any], name: str) -> tuple[float, float] | None:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if low is None or high is None:
        return None
    try:
        require_reference_scores((low, high))
    except (TypeError, ValueError) as error:  # they are no reason not to train
        warnings.warn(f"{name}: its reference scores are not used: {error}", stacklevel=3)
        return None
    return low, high


def _folder(source: str | Path, download: bool) -> Path:
    for folder in (Path(source), Path(source, "data")):
        if (folder / "metadata.json").is_file():
            return folder

    root = get_dataset_path()
    missing = f"no Minari data set {str(source)!r}, neither as a folder nor as an id in {root}"
    # What is no id, as ../there, would be looked for, and downloaded, outside of that folder.
    match = None if isinstance(source, Path) else DATASET_ID_RE.fullmatch(source)
    if match is None or not (root / source / "data").is_dir():
        near = [str(each) for each in _near(Path(source))]
        if match is not None and not near:
            near = [str(each.relative_to(root)) for each in _near(root / source)]
        if near:
            raise FileNotFoundError(f"{missing}; there are {listed(near, NAMED)}: give one of them")
    if match is None:
        raise FileNotFoundError(missing)
    if match["version"] is None:
        raise FileNotFoundError(f"{missing}; an id ends with its version, as {source}-v0")
    folder = root / source
    if (folder / "data").is_dir() and not (folder / "data" / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder / 'data'} has no metadata.json: its files are incomplete")
    if str(source).startswith("mini/") and not folder.is_dir():
        made = str(source).removeprefix("mini/").rpartition("-v")[0]
        raise FileNotFoundError(
            f"{missing}; the data sets of mini/ are made, not downloaded: torchrl-iql collect data={made} "
            f"(in a clone, python recipes/collect.py data={made})"
        )
    if not (folder / "data").is_dir():
        if not download:
            raise FileNotFoundError(f"{missing} (see `minari list local`), and download is False")
        is_new = not folder.exists()
        try:
            minari.download_dataset(str(source))
        except BaseException as error:
            # Minari downloads into the final folder: half of a data set would pass for the whole.
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            # network, unknown id or version, optional package not installed
            raise DownloadError(
                f"{missing} (see `minari list local`), and its download failed: {error}"
            ) from error
    return folder / "data"


def _near(folder: Path) -> list[Path]:
    """Return the data sets in a folder, of a namespace, or of a name without its version."""
    its = [f"{folder.name}-v*", f"{folder.name}/*", f"{folder.name}/*/*"] if folder.name else []
    found = (folder.parent.glob(f"{each}/data/metadata.json") for each in its)
    return sorted(path.parents[1] for each in found for path in each)


def _advice(folder: Path) -> str:
    """Say what to do about a killed download, if Minari may have downloaded this folder."""
    if folder.name != "data" or not folder.is_relative_to(get_dataset_path()):
        return ""
    return f"; if its download was interrupted, delete {folder.parent} and load it again"


def _episode(dataset: MinariDataset, observation_space: Space, index: int) -> EpisodeData:
    # One at a time: of several, Minari attributes what Arrow reads by its position.
    for episode in dataset.iterate_episodes([index]):
        if isinstance(observation_space, spaces.Dict):
            read = {key: episode.observations[key] for key in observation_space}  # pyright: ignore
            return replace(episode, observations=read)
        return episode
    raise ValueError("the episode is empty")


def _complete_episodes(
    dataset: MinariDataset,
    name: str,
    observation_space: Space,
    stopped: int,
    wanted: Collection[str],
) -> Iterator[EpisodeData]:
    """Yield all episodes; so many of those that are truncated without it, of which no end was recorded."""
    advice = _advice(dataset.storage.data_path)
    indices = dataset.episode_indices.tolist()
    if is_plain_hdf5(dataset):
        episodes = hdf5_episodes(dataset, observation_space, wanted)
    else:
        episodes = map(partial(_episode, dataset, observation_space), indices)
    steps = 0
    for index in indices:
        try:
            episode = next(episodes)
        except Exception as error:  # whatever h5py, Arrow and Minari meet in damaged files
            raise ValueError(
                f"{name}, episode {index}: its files are damaged or incomplete: "
                f"{type(error).__name__}: {error}{advice}"
            ) from error
        steps += np.size(episode.rewards)
        if stopped > 0 and np.any(episode.truncations):
            stopped -= 1
            episode = replace(episode, truncations=np.zeros_like(episode.truncations))
        yield episode
    if steps != dataset.total_steps:
        # Minari 0.5.4 silently cuts an episode of Arrow or Parquet after 32767 transitions.
        raise ValueError(
            f"{name}: read {steps} of {dataset.total_steps} transitions; files are missing, or an "
            "episode is too long for Minari's arrow and parquet readers (32767 steps): use "
            f"hdf5{advice}"
        )
