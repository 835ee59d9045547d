"""Reader of OGBench's single tasks, by OGBench's own code, which is optional.

A data set of OGBench is one ``.npz`` file of walks: ``observations``, ``actions``, ``terminals``, and the
states of the simulator, ``qpos`` and, of scenes and puzzles, ``button_states``. It has no rewards: each of
the five tasks of its environment gives others. The transitions are all those of
``ogbench.make_env_and_datasets``, with its rewards and masks; the last row of a walk, which has no successor,
is none. The reward is that of the state before the action, -1 or 0, in scenes from -5 to 0, and a transition
that starts at the goal terminates. An episode ends there, and the rest of the walk is the next one: as long
as a walk stays at the goal, each transition is an episode. The last transition of a walk is truncated.

The file of ``"antmaze-medium-navigate-singletask-task3-v0"`` is ``antmaze-medium-navigate-v0.npz``, and its
environment ``antmaze-medium-singletask-task3-v0``; without ``-task3``, the task is OGBench's default. The
file with ``-val`` in its name is not read.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path

from gymnasium.envs.registration import EnvSpec
from minari import EpisodeData

from torchrl_iql.data.arrays import action_box, array_episodes, observation_box
from torchrl_iql.data.cache import unfinished
from torchrl_iql.data.episodes import errors_at
from torchrl_iql.data.source import Source
from torchrl_iql.data.stored import OGBENCH_TASK, DownloadError
from torchrl_iql.data.tables import Column, intact_npz, npz_headers
from torchrl_iql.environments import flat_environment, spec_of
from torchrl_iql.ogbench import ogbench_package

__all__ = ["is_ogbench", "ogbench_source"]

SUFFIX = ".npz"

FILE = re.compile(r"([\w-]+)-\w+-(v\d+)")
ENVIRONMENT = re.compile(r"(?!visual-)[\w-]+-singletask(-task\d)?-v\d+")

REQUIRED = "observations", "actions", "terminals", "qpos"
STATES = "qpos", "qvel", "button_states"
"""Of the simulator, some of which every file has."""


def is_ogbench(source: str | Path) -> bool:
    """Return whether this is the name of a single task, or a file of OGBench.

    That is an NPZ file with states, and without rewards; by its name alone, one that can not be read.
    """
    path = Path(source)
    if path.suffix != SUFFIX:
        return OGBENCH_TASK.fullmatch(str(source)) is not None
    is_named = FILE.fullmatch(path.stem) is not None
    if not path.is_file():
        return is_named
    try:
        found = npz_headers(path)
    except ValueError:
        return is_named
    return "rewards" not in found and any(key in found for key in STATES)


def ogbench_source(source: str | Path, *, env_spec: EnvSpec | None, download: bool) -> Source:
    """Find the file of a single task: at its path, or by its name where OGBench keeps its files.

    Args:
        source: the path, or the name of the task, as ``"antmaze-medium-navigate-singletask-v0"``.
        env_spec: the environment of the task. Of a path with the file name that OGBench gives, it is
            that of the default task if it is None.
        download: whether to download the file of a name into OGBench's folder, ``~/.ogbench/data``, if
            it is not there.

    Raises:
        FileNotFoundError: if there is no such file, or its download failed.
        ModuleNotFoundError: if OGBench is not installed.
        ValueError: if the name and the environment do not fit, or the file is damaged or incomplete,
            now or when its episodes are read.
    """
    if dataset := OGBENCH_TASK.fullmatch(str(source)):
        world, kind, task, version = dataset.groups()
        spec = _spec(f"{world}{task}-{version}", source)
        if env_spec is not None and env_spec.id != spec.id:
            raise ValueError(
                f"{source} has the rewards of {spec.id}, but env={env_spec.id}: name the task in the "
                "data set, as antmaze-medium-navigate-singletask-task3-v0"
            )
        spec = _checked(env_spec or spec, source)
        path = _kept(f"{world}-{kind}-{version}", download)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"no OGBench file {path}; one that OGBench keeps is found by the name of a task, as "
                "antmaze-medium-navigate-singletask-v0"
            )
        named = FILE.fullmatch(path.stem)
        if env_spec is None and named is None:
            raise ValueError(
                f"{path} has no rewards, and its name tells no environment: give that of a task as env, "
                "as antmaze-medium-singletask-v0"
            )
        spec = env_spec or _spec("{}-singletask-{}".format(*named.groups()), source)  # pyright: ignore
        spec = _checked(spec, source)
    required = [*REQUIRED, *(["button_states"] if _has_buttons(spec) else [])]
    arrays = _headers(path, required)
    with errors_at(str(path)):
        observation_space = observation_box(arrays["observations"])
        action_space = action_box(arrays["actions"])
    return Source(
        name=str(source),
        path=path,
        transitions=int(arrays["observations"].shape[0]),
        observation_space=observation_space,
        action_space=action_space,
        env_spec=spec,
        made_with=spec.to_json(),
        episodes=partial(_episodes, path, spec),
    )


def _spec(env: str, source: str | Path) -> EnvSpec:
    with errors_at(str(source)):
        spec = spec_of(env)
    assert spec is not None
    return spec


def _checked(spec: EnvSpec, source: str | Path) -> EnvSpec:
    if not ENVIRONMENT.fullmatch(spec.id):
        raise ValueError(
            f"{source} gets its rewards from its environment, and {spec.id} is no single task of OGBench "
            "with states as observations, as antmaze-medium-singletask-v0"
        )
    ogbench_package()
    return spec


def _has_buttons(spec: EnvSpec) -> bool:
    return "scene" in spec.id or "puzzle" in spec.id


def _kept(name: str, download: bool) -> Path:
    utils = ogbench_package().utils
    kept = Path(utils.DEFAULT_DATASET_DIR).expanduser() / f"{name}{SUFFIX}"
    if kept.exists():
        return kept
    missing = f"no OGBench file {kept}"
    if not download:
        raise FileNotFoundError(f"{missing}, and download is False")
    try:
        with unfinished(kept) as part:
            # OGBench would also download this one, which nobody trains on.
            part.with_stem(f"{name}-val").touch()
            utils.download_datasets([name], str(part.parent))
            # A connection that broke is no error there, but a list of the contents ends the file.
            zipfile.ZipFile(part).close()
    except (OSError, HTTPException, zipfile.BadZipFile) as error:
        url = f"{utils.DATASET_URL}/{kept.name}"
        raise DownloadError(f"{missing}, and the download from {url} failed: {error}") from error
    return kept


def _headers(path: Path, required: list[str]) -> dict[str, Column]:
    """Read shape and dtype of the required arrays, not what is in them."""
    with errors_at(str(path)):
        headers = npz_headers(path)
    if missing := [key for key in required if key not in headers]:
        found = ", ".join(sorted(headers)[:10]) or "nothing"
        raise ValueError(f"{path}: has no array {', '.join(missing)}; found {found}")
    return {key: headers[key] for key in required}


def _episodes(path: Path, spec: EnvSpec, _: Collection[str]) -> Iterator[EpisodeData]:
    from ogbench.relabel_utils import relabel_dataset

    with errors_at(str(path)), intact_npz():
        data = ogbench_package().load_dataset(str(path), add_info=True)
    with errors_at(str(path)):
        with flat_environment(spec) as env:
            shape, size = data["qpos"].shape, env.unwrapped.model.nq  # pyright: ignore
            if shape[1:] != (size,):
                raise ValueError(
                    f"qpos has shape {list(shape)}, expected [n, {size}], the states of {spec.id}"
                )
            relabel_dataset(spec.id, env, data)
        episodes = array_episodes(
            observations=data["observations"],
            actions=data["actions"],
            rewards=data["rewards"],
            terminals=1 - data["masks"],
            timeouts=data["terminals"],
            next_observations=data["next_observations"],
        )
    return episodes
