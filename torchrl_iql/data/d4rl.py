"""Reader of D4RL's HDF5 files, without D4RL and its dependencies.

The arrays ``observations``, ``actions``, ``rewards`` and ``terminals``, and ``timeouts`` and
``next_observations`` if they are stored, are split as :mod:`torchrl_iql.data.arrays` says. Without
``next_observations`` the transitions are those that the official code of IQL learns from. Of the
others, an episode rule reads ``infos/success``, and those that are named as columns are kept; any other array
beside these would be input that is not understood, and is refused.

Observations have no bounds. Actions are those of the environment that is given, if it has as many, else
they lie in [-1, 1]. A file names no environment, but one of D4RL's AntMaze is known by its name, or by its 29
and 8 columns and the one maze that holds all its positions.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import h5py
from gymnasium.envs.registration import EnvSpec
from minari import EpisodeData
from tensordict import NestedKey
from torch.hub import download_url_to_file

from torchrl_iql.antmaze import MAZES, is_free
from torchrl_iql.data.arrays import action_space_of, array_episodes, observation_box
from torchrl_iql.data.cache import unfinished
from torchrl_iql.data.episodes import errors_at
from torchrl_iql.data.source import Source
from torchrl_iql.data.stored import D4RL_SUFFIX, DownloadError, d4rl_folder
from torchrl_iql.data.tables import intact_hdf5
from torchrl_iql.environments import antmaze_id, spec_of, time_limit_of
from torchrl_iql.spaces import ActionBounds

__all__ = ["d4rl_episodes", "d4rl_source", "has_next_observations", "is_d4rl"]

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
LOCOMOTION = re.compile(
    r"(halfcheetah|hopper|walker2d)_"
    r"(random|medium|medium_replay|full_replay|medium_expert|expert)-v2\.hdf5"
)
ANTMAZE = re.compile(
    r"Ant_maze_(u-maze|big-maze|hardest-maze)_noisy_"
    r"(multistart_False_multigoal_False|multistart_True_multigoal_(?:True|False))_sparse(_fixed)?\.hdf5"
)
"""Version 0, and with ``_fixed`` version 2."""
MAZE_OF = {"u-maze": "umaze", "big-maze": "medium", "hardest-maze": "large"}

REQUIRED = "observations", "actions", "rewards", "terminals"
OPTIONAL = "timeouts", "next_observations"


def is_d4rl(source: str | Path) -> bool:
    """Return whether this is the name of a D4RL file, or any file that is there."""
    return Path(source).suffix == D4RL_SUFFIX or Path(source).is_file()


def d4rl_source(
    source: str | Path,
    *,
    env_spec: EnvSpec | None,
    download: bool,
    columns: Collection[str] | None = (),
    action_space: ActionBounds | None = None,
) -> Source:
    """Find a D4RL file: at its path, and a mere name also where D4RL keeps its files.

    That is the folder ``$D4RL_DATASET_DIR``, or ``~/.d4rl/datasets``.

    Args:
        source: the path, or the name.
        env_spec: the environment whose actions they are, and whose time limit ends the episodes of a file
            that does not tell.
        columns: arrays or infos that are to be kept; None if it does not matter what is read.
        action_space: the space of the actions, or their bounds.
        download: whether to download a name that is in neither place into that folder, if it is one of
            the locomotion files of version 2, as ``"hopper_medium-v2.hdf5"``, or of AntMaze.

    Raises:
        FileNotFoundError: if there is no such file, or its download failed.
        ValueError: if it is damaged or incomplete, now or when its episodes are read.
    """
    path = _path(Path(source), download)
    with _opened(path) as file:
        missing = [key for key in REQUIRED if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise ValueError(_missing(file, missing))
        if columns is not None:
            _require_read(file, columns)
        transitions = cast(h5py.Dataset, file["rewards"]).shape[:1]
        observation_space = observation_box(file["observations"])
        space = action_space_of(file["actions"], action_space, env_spec)
        tells = any(key in file for key in OPTIONAL)
        env_spec = env_spec or _antmaze(path, file)
    time_limit = None if tells else time_limit_of(env_spec)
    if env_spec is not None and time_limit is not None:
        warnings.warn(
            f"{path} has neither timeouts nor next_observations: episodes are taken to end at terminals "
            f"and after {time_limit} steps, the time limit of {env_spec.id}; where they were shorter, rows "
            "of two are one transition",
            stacklevel=2,
        )
    return Source(
        name=str(source),
        path=path,
        transitions=math.prod(transitions),
        observation_space=observation_space,
        action_space=space,
        env_spec=env_spec,
        made_with=time_limit,
        episodes=partial(d4rl_episodes, path, time_limit),
    )


def _missing(file: h5py.File, missing: Collection[str]) -> str:
    found = ", ".join(map(str, list(file)[:10])) or "nothing"
    groups = [
        f"{key} is a group of {', '.join(group)}"
        for key, group in file.items()
        if key in missing and isinstance(group, h5py.Group)
    ]
    told = "".join(
        f"; {each}: read it by h5py and give a dictionary of arrays to OfflineDataset.from_arrays"
        for each in groups
    )
    return f"has no array {', '.join(missing)}; found {found}{told}"


def _require_read(file: h5py.File, columns: Collection[str]) -> None:
    """Refuse arrays, as long as the others, that would be left out without a word."""
    arrays = {key: its for key, its in file.items() if isinstance(its, h5py.Dataset)}
    rows = arrays["rewards"].shape[:1]
    known = {*REQUIRED, *OPTIONAL, *columns}
    if unread := [key for key, its in arrays.items() if key not in known and its.shape[:1] == rows]:
        raise ValueError(
            f"has arrays that are not read, {unread}: name them in columns= to keep them beside the others"
        )


def _antmaze(path: Path, file: h5py.File) -> EnvSpec | None:
    """Find the environment of a file of D4RL's AntMaze; None if it is of another or can not be told."""
    shapes = [cast(h5py.Dataset, file[key]).shape[1:] for key in ("observations", "actions")]
    if shapes != [(29,), (8,)]:
        return None
    named = ANTMAZE.fullmatch(path.name)
    if named:
        mazes = [MAZE_OF[named[1]]]
    else:
        positions = _array(file, "observations")[:, :2]
        mazes = [maze for maze in MAZES if is_free(maze, positions).all()]
    return spec_of(antmaze_id(mazes[0])) if len(mazes) == 1 else None


def _path(path: Path, download: bool) -> Path:
    if path.exists():
        return path
    if path != Path(path.name):
        raise FileNotFoundError(
            f"no D4RL file {path}; a name without a folder is also looked for where D4RL keeps its files"
        )
    kept = d4rl_folder() / path.name
    if kept.exists():
        return kept
    missing = f"no D4RL file {path}, nor {kept}"
    if LOCOMOTION.fullmatch(path.name):
        url = f"{URL}/gym_mujoco_v2/{path.name}"
    elif antmaze := ANTMAZE.fullmatch(path.name):
        url = f"{URL}/{'ant_maze_v2' if antmaze[3] else 'ant_maze_new'}/{path.name}"
    else:
        raise FileNotFoundError(
            f"{missing}; only AntMaze and the v2 files of halfcheetah, hopper and walker2d are downloaded"
        )
    if not download:
        raise FileNotFoundError(f"{missing}, and download is False")
    try:
        with unfinished(kept) as part:
            download_url_to_file(url, str(part))
            # A connection that broke is no error there, but HDF5 knows how long its files are.
            h5py.File(part).close()
    except (OSError, HTTPException) as error:
        raise DownloadError(f"{missing}, and the download from {url} failed: {error}") from error
    return kept


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    with errors_at(str(path)), intact_hdf5(path) as file:
        yield file


def d4rl_episodes(
    path: Path, time_limit: int | None, wanted: Collection[str]
) -> Iterator[EpisodeData]:
    """Read the episodes of a file.

    Args:
        path: the file.
        time_limit: steps of an episode, for a file that does not tell where episodes end.
        wanted: names of infos to read, or of arrays beside the others; the other infos are None.

    Raises:
        ValueError: if the file is damaged or incomplete.
    """
    with _opened(path) as file:
        arrays = {key: _array(file, key) for key in REQUIRED + OPTIONAL if key in file}
        infos: dict[NestedKey, Any] = {}
        if wanted and isinstance(stored := file.get("infos"), h5py.Group):
            infos |= dict.fromkeys(stored)
            infos |= {name: _array(file, f"infos/{name}") for name in wanted if name in stored}
        others = set(wanted) & set(file) - {*REQUIRED, *OPTIONAL}
        infos |= {name: _array(file, name) for name in sorted(others)}
        return array_episodes(**arrays, infos=infos, time_limit=time_limit)


def has_next_observations(path: Path) -> bool:
    """Return whether a file stores them: without, the observation after a termination is not known."""
    with _opened(path) as file:
        return "next_observations" in file


def _array(file: h5py.File, key: str) -> Any:
    try:
        return cast(h5py.Dataset, file[key])[()]
    except (KeyError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{key} can not be read: {error}") from error
