"""The one door to stored data sets, and their cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from minari import EpisodeData
from tensordict import TensorDict

from torchrl_iql.data.cache import entry_path, read, write
from torchrl_iql.data.d4rl import d4rl_source, is_d4rl
from torchrl_iql.data.dataset import OfflineDataset, Recording, require_rules, warn_of_fragments
from torchrl_iql.data.episodes import EpisodeRule, errors_at, require_names
from torchrl_iql.data.layout import Layout, require_layout
from torchrl_iql.data.logs import is_logs, logs_source
from torchrl_iql.data.minari import minari_source
from torchrl_iql.data.ogbench import is_ogbench, ogbench_source
from torchrl_iql.data.rewards import RewardRule, RewardTransform
from torchrl_iql.data.source import Source
from torchrl_iql.environments import SUCCESS, Env, observing, spec_of
from torchrl_iql.spaces import ActionBounds, actions_within, differ_in_type_alone, selected

__all__ = ["load"]

CACHED = "transitions", "episode_lengths", "episode_returns"
"""What is expensive to make of an OfflineDataset; the rest is in the metadata of the source."""


NAMED = 5
"""Sources that the name of a data set names, if there are no more."""


def load(
    source: str | Path | Sequence[str | Path],
    *,
    layout: Layout | None = None,
    reward: RewardRule = "none",
    episodes: EpisodeRule = "as_stored",
    env: Env | None = None,
    with_env: bool = True,
    trust_env: bool = False,
    action_space: ActionBounds | None = None,
    observation_keys: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    download: bool = True,
    cache: bool = True,
) -> OfflineDataset:
    """Read a Minari data set, a D4RL file, a single task of OGBench, logs, or several of them as one.

    The result, rules applied, is kept as one file in ``~/.cache/torchrl_iql``, or in the folder that
    the environment variable ``TORCHRL_IQL_CACHE`` names. A later call with the same rules and
    unchanged source files (path, sizes, modification times) verifies the checksum of that file and
    maps it instead of parsing, which takes no memory of its own. A damaged file is reported and made
    anew; the folder may be deleted at any time.

    Args:
        source: the id of a Minari data set, as ``"mujoco/hopper/medium-v0"``, or its folder: the one
            that contains ``data``, or ``data`` itself. Or a D4RL file, which is any file that is
            there, or a name that ends as ``"hopper_medium-v2.hdf5"``, see
            :mod:`torchrl_iql.data.d4rl`. Or one of OGBench's single tasks, as
            ``"antmaze-medium-navigate-singletask-v0"``, or its ``.npz`` file, see
            :mod:`torchrl_iql.data.ogbench`. Or logs: a CSV, Parquet, NPZ or HDF5 file, a folder of
            them, or a data set of LeRobot, see :mod:`torchrl_iql.data.logs`. Several are joined in
            their order; their spaces must be equal, but for the type of their numbers.
        layout: of logs, which columns are what: columns, one or several, by their names in
            :meth:`OfflineDataset.from_arrays`, as ``{"observations": ["x", "y"], "rewards": "reward"}``.
            Those that it does not name are called as there, or as LeRobot calls them; None says that no
            rewards, no terminals, or no others were recorded.
        reward: reward rule: ``"none"``, ``"minus_one"`` (AntMaze), ``"return_range"`` (locomotion), or
            ``"unit_rms"`` (rewards of unknown scale). It sees the episodes of all sources.
        episodes: episode rule: ``"as_stored"``, or ``"until_success"`` for mazes, whose recordings
            go on after the goal: each episode terminates at its first success.
        env: the environment to evaluate in, as an id, a specification or a function that makes it,
            instead of the first that a source names; a D4RL file and logs name none. Its actions are
            those of such files, its time limit ends the episodes of D4RL files
            that do not tell where they end, and its task gives the rewards of OGBench's files.
            Reference scores are the first that a source names.
        with_env: whether the environment that a Minari data set names has to be known here. Without, one
            that is not installed, or not trusted, is left out.
        trust_env: whether the environment that a Minari data set names may be made by code that only the
            data set names, see :func:`~torchrl_iql.environments.registered`. Beside ``env`` it is not used.
        action_space: the space of the actions, ``(low, high)``, each a number or one per dimension, or how
            many discrete ones there are, instead of what a source declares, of files that of the
            environment, or [-1, 1].
        observation_keys: the entries of compound observations that are observed, in the data and in the
            environment; all by default.
        columns: infos, of D4RL's files also arrays, of logs columns, that become further columns of the
            transitions, see :meth:`OfflineDataset.from_episodes`.
        download: whether to download what is not there locally: a Minari id, one of D4RL's
            files of AntMaze or, of version 2, of locomotion, or the file of a single task of OGBench.
        cache: whether to use that folder. A folder that can not be written to is a warning.

    Raises:
        FileNotFoundError: if there is no such data set, or its download failed.
        ModuleNotFoundError: if it is OGBench's, or Parquet, and OGBench or pyarrow is not installed.
        TypeError: if a space can not be turned into rows.
        ValueError: if a rule is unknown or does not apply, the data are damaged or incomplete, the
            spaces of the sources differ, or an environment needs ``trust_env``.
    """
    require_rules(reward, episodes)
    env_spec = spec_of(env)
    names = [source] if isinstance(source, str | Path) else list(source)
    if not names:
        raise ValueError("there is no source to load")
    require_names(columns)
    if layout is not None:
        require_layout(layout)
    sources = [
        _open(
            name,
            layout=layout,
            env_spec=env_spec,
            with_env=with_env,
            trust_env=trust_env,
            action_space=action_space,
            download=download,
            observation_keys=observation_keys,
            columns=columns,
        )
        for name in names
    ]
    if observation_keys is not None and env_spec is not None:
        env_spec = observing(env_spec, observation_keys)
    _require_equal_spaces(sources)
    first_env = next((each.env_spec for each in sources if each.env_spec), None)
    scores = next((each.reference_scores for each in sources if each.reference_scores), None)
    known: dict[str, Any] = {
        "name": _name(sources),
        "observation_space": sources[0].observation_space,
        "action_space": sources[0].action_space,
        "env_spec": env_spec or first_env,
        "reference_scores": scores,
        "reward_rule": reward,
        "episode_rule": episodes,
    }
    made_with = [each.made_with for each in sources]
    paths = [each.path for each in sources]
    recorded = sum(each.transitions for each in sources)
    space = sources[0].action_space
    by_env = env_spec is not None and space != Box(-1.0, 1.0, space.shape)
    actions = str(space) if by_env or action_space is not None else None
    chosen = observation_keys and list(observation_keys), list(columns), actions
    rules = reward, episodes, made_with, *chosen
    entry = entry_path(paths, *rules) if cache else None
    if entry and (arrays := read(entry)) is not None:
        scale, shift, stopped = arrays["numbers"].tolist()
        kept = {key: arrays[key] for key in CACHED}
        transform, recording = RewardTransform(scale, shift), Recording(int(stopped), recorded)
        cached = OfflineDataset(**kept, **known, reward_transform=transform, recording=recording)
        warn_of_fragments(cached)
        return cached

    wanted = {*columns, *(SUCCESS if episodes == "until_success" else ())}
    loaded = OfflineDataset.from_episodes(
        episodes=_episodes(sources, wanted), columns=columns, **known
    )
    if entry:
        transform = loaded.reward_transform
        numbers = torch.tensor(
            [transform.scale, transform.shift, loaded.recording.stopped], dtype=torch.float64
        )
        arrays = {key: getattr(loaded, key) for key in CACHED}
        write(entry, TensorDict({**arrays, "numbers": numbers}))
    return replace(loaded, recording=replace(loaded.recording, transitions=recorded))


def _name(sources: Sequence[Source]) -> str:
    names = [each.name for each in sources]
    return " + ".join(names if len(names) <= NAMED else [names[0], f"{len(names) - 1} more"])


def _open(
    source: str | Path,
    *,
    layout: Layout | None,
    env_spec: EnvSpec | None,
    with_env: bool,
    trust_env: bool,
    action_space: ActionBounds | None,
    download: bool,
    observation_keys: Sequence[str] | None,
    columns: Sequence[str],
) -> Source:
    told = {"env_spec": env_spec, "action_space": action_space, "columns": columns}
    if layout is None and is_ogbench(source):
        found = ogbench_source(source, env_spec=env_spec, download=download)
    elif is_logs(source, layout):
        found = logs_source(source, layout, **told)
    elif layout is not None:
        read = "a layout is of CSV, Parquet, NPZ and HDF5 files, and of folders of these"
        if Path(source).exists():
            raise ValueError(f"{source}: {read}")
        there = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}{there}; {read}")
    elif is_d4rl(source):
        found = d4rl_source(source, download=download, **told)
    else:
        found = minari_source(
            source,
            env_spec=env_spec,
            download=download,
            observation_keys=observation_keys,
            trust_env=trust_env,
            with_env=with_env,
        )
    with errors_at(found.name):
        selected(found.observation_space, observation_keys)
        if action_space is None:
            return found
        shape = found.action_space.shape or ()
        return replace(found, action_space=actions_within(action_space, shape))


def _require_equal_spaces(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        for kind in ("observation", "action"):
            space, expected = (getattr(each, f"{kind}_space") for each in (other, first))
            if not differ_in_type_alone(space, expected):
                raise ValueError(
                    f"{other.name} can not be joined with {first.name}: "
                    f"its {kind} space is {space}, not {expected}"
                )


def _episodes(
    sources: Sequence[Source], wanted: Collection[str]
) -> Iterator[EpisodeData | dict[str, Any]]:
    """Yield the episodes of all sources; of several, each is named after its source."""
    if len(sources) == 1:
        yield from sources[0].episodes(wanted)
        return
    for source in sources:
        for episode in source.episodes(wanted):
            yield vars(episode) | {"id": f"{episode.id} of {source.name}"}
