"""Reader of logs: CSV, Parquet, NPZ and HDF5 files whose columns have any names, and LeRobot's folders.

What the columns are is said by a layout, in the terms of
:meth:`~torchrl_iql.data.OfflineDataset.from_arrays`: ``{"observations": ["x", "y"], "actions": "force",
"rewards": "reward", "terminals": "done", "episode_ids": "run"}``. What it does not say is called as its role
is, or as LeRobot calls it, and other columns are not read; but if it does not say what observations are, they
are refused, since they may be some.

Several files, listed or in a folder, are read one after the other, and no episode goes on in the next one.
Within a file, episodes end where :mod:`torchrl_iql.data.arrays` says. One without ``next_observations`` and
``episode_ids`` is a whole log: its last episode ends with it, so that a terminal row is kept there, and at a
time-out. Without ``timeouts`` either, no row before the last one may be terminal, and it is one episode.

LeRobot's data sets, of version 2 and 3, are folders of Parquet files beside ``meta/info.json``. Observations
are ``observation.state``, actions ``action``, rewards ``next.reward``, and episodes ``episode_index``. The
rows of ``next.success`` are terminal; ``next.done``, which marks the last row of every episode, says nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete
from minari import EpisodeData

from torchrl_iql.data.arrays import ENDS, action_space_of, array_episodes, observation_box
from torchrl_iql.data.episodes import errors_at
from torchrl_iql.data.layout import ROLES, WIDE, Layout, columns_of
from torchrl_iql.data.source import Source
from torchrl_iql.data.tables import SUFFIXES, Table, open_table
from torchrl_iql.spaces import ActionBounds, numbers

__all__ = ["is_logs", "logs_source"]

PLAIN = {role: role for role in ROLES}
LEROBOT = {
    "observations": "observation.state",
    "actions": "action",
    "rewards": "next.reward",
    "terminals": "next.success",
    "success": "next.success",
    "episode_ids": "episode_index",
}
COUNTERS = "timestamp", "frame_index", "index", "task_index", "next.done"
"""Columns of LeRobot's that tell nothing of a state."""
PICTURES = "video", "image"


def is_logs(source: str | Path, layout: Layout | None) -> bool:
    """Return whether this is a file of columns, or a folder of such; HDF5 with a layout alone."""
    path = Path(source)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return layout is not None or path.suffix.lower() not in (".hdf5", ".h5")
    return path.is_dir() and (_is_lerobot(path) or bool(_inside(path)))


def _is_lerobot(folder: Path) -> bool:
    return (folder / "meta/info.json").is_file()


def _inside(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in ("metadata.json", "data/metadata.json")):
        return []  # Minari's
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


@dataclass(frozen=True)
class _Log:
    """A file that was opened, and its columns by role."""

    table: Table
    names: Mapping[str, tuple[str, ...]]

    def row_shape(self, role: str) -> tuple[int, ...]:
        shapes = [self.table.columns[name].shape[1:] for name in self.names[role]]
        return shapes[0] if len(shapes) == 1 and shapes[0] else (sum(map(math.prod, shapes)),)

    def header(self, role: str) -> Any:
        """Return shape and type of an array before it is read; those of several columns are numbers."""
        dtypes = [self.table.columns[name].dtype for name in self.names[role]]
        dtype = (
            np.result_type(*dtypes) if role == "actions" or len(dtypes) == 1 else np.dtype(float)
        )
        return SimpleNamespace(shape=(1, *self.row_shape(role)), dtype=dtype)


def logs_source(
    source: str | Path,
    layout: Layout | None,
    *,
    env_spec: EnvSpec | None = None,
    action_space: ActionBounds | None = None,
    columns: Sequence[str] = (),
) -> Source:
    """Open a file, or all of a folder.

    Args:
        source: the path.
        layout: which columns are what, as :func:`~torchrl_iql.data.layout.require_layout` wants it.
        env_spec: the environment whose actions they are, if it has as many.
        action_space: the space of the actions, or their bounds.
        columns: further columns to keep.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow, which reads Parquet, is not installed.
        ValueError: a file is damaged, empty or lacks a column, now or when its episodes are read.
    """
    path = Path(source)
    info = _info(path) if path.is_dir() and _is_lerobot(path) else None
    paths = _paths(path, info)
    logs = []
    for each in paths:
        with errors_at(str(each)):
            logs.append(_opened(each, layout, columns, info))
    first = logs[0]
    for log in logs[1:]:
        _require_equal(first, log)
    rows = sum(_rows(log) for log in logs)
    if info is not None and rows != info["total_frames"]:
        raise ValueError(
            f"{source}: its files hold {rows} of the {info['total_frames']} rows that meta/info.json tells of"
        )
    with errors_at(str(first.table.path)):
        observation_space = observation_box(first.header("observations"))
        space = action_space_of(first.header("actions"), action_space, env_spec)
    told = action_space is not None or env_spec is not None
    names = {role: list(its) for role, its in first.names.items()}
    return Source(
        name=str(source),
        path=path,
        transitions=rows,
        observation_space=observation_space,
        action_space=space,
        env_spec=env_spec,
        made_with=json.dumps(names),
        episodes=partial(_episodes, logs, space, told, columns),
    )


def _paths(path: Path, info: Mapping[str, Any] | None) -> list[Path]:
    if info is not None:
        found = sorted(path.glob("data/chunk-*/*.parquet"))
        if not found:
            raise ValueError(f"{path}: has no files data/chunk-*/*.parquet")
        return found
    if not path.is_dir():
        return [path]
    found = _inside(path)
    if len(kinds := sorted({each.suffix for each in found})) > 1:
        raise ValueError(
            f"{path}: holds files of {' and '.join(kinds)}, expected one kind: list those to read"
        )
    return found


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "meta/info.json"
    with errors_at(str(path)):
        try:
            info = json.loads(path.read_text())
            version, features = str(info["codebase_version"]), dict(info["features"])
            kinds = {name: str(feature["dtype"]) for name, feature in features.items()}
            frames = int(info["total_frames"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"does not describe a data set of LeRobot: {error!r}") from error
        if not re.match(r"v[23]\.", version):
            raise ValueError(
                f"is of version {version}, expected v2 or v3: convert it by LeRobot's own scripts"
            )
    return {"kinds": kinds, "total_frames": frames}


def _opened(
    path: Path, layout: Layout | None, columns: Sequence[str], info: Mapping[str, Any] | None
) -> _Log:
    table = open_table(path)
    kinds = {} if info is None else info["kinds"]
    _require_no_pictures(kinds, layout, columns)
    usual = PLAIN if info is None else LEROBOT
    if info is not None and "next.success" not in table.columns:
        layout = {"terminals": None, **(layout or {})}
    names = columns_of(list(table.columns), layout, usual)
    if absent := [name for name in columns if name not in table.columns]:
        raise ValueError(f"columns: has no {', '.join(absent)}; found {', '.join(table.columns)}")
    if "observations" not in (layout or {}):
        decided = {usual[role] for role in layout or {}}
        _require_read(table, kinds, {*chain(*names.values()), *decided, *columns})
    log = _Log(table, names)
    if not _rows(log):
        raise ValueError("has no rows")
    sizes = {
        role: math.prod(log.row_shape(role)) for role in names if role.endswith("observations")
    }
    if len(set(sizes.values())) > 1:
        told = " and ".join(f"{role} {size}" for role, size in sizes.items())
        raise ValueError(f"has {told} wide, expected them to be the same")
    return log


def _require_no_pictures(
    kinds: Mapping[str, str], layout: Layout | None, columns: Sequence[str]
) -> None:
    named = chain(
        *([its] if isinstance(its, str) else its or () for its in (layout or {}).values())
    )
    wanted = {*named, *columns}
    pictures = [name for name, kind in kinds.items() if kind in PICTURES]
    if asked := [name for name in pictures if name in wanted]:
        raise ValueError(
            f"{', '.join(asked)}: {kinds[asked[0]]} columns are not read; decode them, by LeRobotDataset, "
            "and give arrays to OfflineDataset.from_arrays, or do without"
        )


def _require_read(table: Table, kinds: Mapping[str, str], read: Collection[str]) -> None:
    """Refuse columns that would be left out without a word."""
    rows = max((its.shape[0] for its in table.columns.values()), default=0)
    found = {name for name, its in table.columns.items() if its.shape[0] == rows} | set(kinds)
    passed = COUNTERS if kinds else ()
    if unread := sorted(found - {*read, *passed}):
        pictures = [name for name in unread if kinds.get(name) in PICTURES]
        told = f" ({', '.join(pictures)}: pictures, which are not read)" if pictures else ""
        raise ValueError(
            f"has columns that are not read, {', '.join(unread)}{told}: say in layout= which ones are "
            "observations, and keep others by columns="
        )


def _rows(log: _Log) -> int:
    return log.table.columns[log.names["actions"][0]].shape[0]


def _require_equal(first: _Log, other: _Log) -> None:
    for role in ("observations", "actions"):
        found, expected = other.row_shape(role), first.row_shape(role)
        if found != expected:
            raise ValueError(
                f"{other.table.path}: {role} are of shape {list(found)}, not {list(expected)} as in "
                f"{first.table.path.name}"
            )
    if other.names.keys() != first.names.keys():
        differ = sorted(other.names.keys() ^ first.names.keys())
        raise ValueError(
            f"{other.table.path}: only one of it and {first.table.path.name} has {', '.join(differ)}"
        )


def _episodes(
    logs: Sequence[_Log],
    action_space: Space,
    told: bool,
    columns: Sequence[str],
    wanted: Collection[str],
) -> Iterator[EpisodeData]:
    for log in logs:
        names = {
            role: its for role, its in log.names.items() if role != "success" or role in wanted
        }
        with errors_at(str(log.table.path)):
            read = replace(log, names=names)
            found = array_episodes(**_arrays(read, action_space, told, columns))
        for episode in found:
            name = f"{episode.id} of {log.table.path.name}" if len(logs) > 1 else episode.id
            yield replace(episode, id=name)  # pyright: ignore[reportArgumentType]


def _arrays(log: _Log, action_space: Space, told: bool, columns: Sequence[str]) -> dict[str, Any]:
    """Read the arguments of :func:`array_episodes`."""
    texts = log.names.get("episode_ids", ())
    read = log.table.read({*chain(*log.names.values()), *columns}, texts)
    for name, values in read.items():
        if len(values) != _rows(log):
            raise ValueError(
                f"column {name} has {len(values)} rows, expected {_rows(log)}, as {log.names['actions'][0]}"
            )
        if name not in texts:
            numbers(values, f"column {name}")
    arrays: dict[str, Any] = {
        role: _joined([read[name] for name in names]) for role, names in log.names.items()
    }
    for role, values in arrays.items():
        if role not in WIDE and math.prod(values.shape[1:]) != 1:
            raise ValueError(
                f"column {log.names[role][0]} has shape {list(values.shape)}, expected one of {role} in a row"
            )
    none = np.zeros(_rows(log))
    arrays = {"rewards": none, "terminals": none, **arrays}
    for role in ("terminals", "timeouts", "success"):
        if role in arrays:
            arrays[role] = _flags(log, role, arrays[role])
    _require_ends(log, arrays)
    _require_finite(log, read, arrays)
    actions = arrays["actions"]
    is_whole = actions.dtype.kind == "f" and bool((actions == np.rint(actions)).all())
    if isinstance(action_space, Discrete) and is_whole:
        arrays["actions"] = actions.astype(np.int64)
    elif log.table.is_text and not told and is_whole and actions.any():
        raise ValueError(
            f"actions, {', '.join(log.names['actions'])}, are whole numbers: say whether they are categories "
            "or amounts, by action_space=<how many there are> or by action_space=[low,high]"
        )
    infos = {name: read[name] for name in columns}
    if "success" in arrays:
        infos["success"] = arrays.pop("success")
    return {**arrays, "infos": infos}


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    if len(columns) == 1:
        (values,) = columns
        return values
    return np.concatenate([values.reshape(len(values), -1) for values in columns], axis=1)


def _flags(log: _Log, role: str, values: np.ndarray) -> np.ndarray:
    values = values.reshape(len(values))
    if (wrong := (values != 0) & (values != 1)).any():
        row = int(wrong.argmax())
        (name,) = log.names[role]
        raise ValueError(f"{log.table.place(row)}, column {name} is {values[row]}, expected 0 or 1")
    return values.astype(bool)


def _require_ends(log: _Log, arrays: dict[str, Any]) -> None:
    """Let the last episode end with its file; refuse a file that does not tell where others end."""
    if "next_observations" in arrays or "episode_ids" in arrays:
        return
    before = np.flatnonzero(arrays["terminals"][:-1])
    if len(before) and "timeouts" not in arrays:
        (name,) = log.names["terminals"]
        raise ValueError(
            f"{log.table.place(int(before[0]))}, column {name} ends an episode, and nothing tells where "
            f"those end that do not terminate: name {', '.join(ENDS[:-1])} or {ENDS[-1]} in layout="
        )
    arrays["episode_ids"] = np.zeros(len(arrays["actions"]), np.int64)


def _require_finite(log: _Log, read: Mapping[str, np.ndarray], arrays: Mapping[str, Any]) -> None:
    """Refuse what is no number where it is read; name its file's own column and row."""
    terminals = arrays["terminals"]
    used = np.ones(len(terminals), bool)
    if "next_observations" not in arrays:  # what was done in the last row of an episode is not read
        ids = arrays["episode_ids"]
        used[-1:] = False
        used[:-1] = (ids[1:] == ids[:-1]).reshape(len(ids) - 1)
        if "timeouts" in arrays:
            used &= ~arrays["timeouts"]
        used |= terminals
    rows = {"actions": used, "rewards": used, "next_observations": ~terminals}
    for role in ("observations", "actions", "rewards", "next_observations"):
        for name in log.names.get(role, ()):
            values = read[name].reshape(len(terminals), -1)
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(values.astype(np.float32, copy=False))
            wrong = wrong.any(1) & rows.get(role, True)
            if wrong.any():
                row = int(wrong.argmax())
                bad = values[row][~np.isfinite(values[row].astype(np.float32))][0]
                raise ValueError(
                    f"{log.table.place(row)}, column {name} is {bad}, expected a finite number"
                )
