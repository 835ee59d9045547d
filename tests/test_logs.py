"""Logs: CSV, Parquet, NPZ and HDF5 files under any names, and LeRobot's folders."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium.spaces import Box, Discrete

from episodes import MARKS, leaves
from runs import TINY
from torchrl_iql import load_policy
from torchrl_iql.data import OfflineDataset, load, replay
from torchrl_iql.data.__main__ import main as inspect
from torchrl_iql_recipes.experiment import build, offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE

pytestmark = MARKS

LAYOUT = {
    "observations": ["x", "speed"],
    "actions": "force",
    "rewards": "reward",
    "terminals": "done",
    "episode_ids": "run",
}
LENGTHS = (5, 4, 6)


def drive(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, np.ndarray]:
    """Make what a robot logs in some runs, of which the second ends at the goal."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    run = np.repeat(np.arange(len(lengths)) + 7, lengths)
    last = np.cumsum(lengths)[min(1, len(lengths) - 1)] - 1
    return {
        "time": np.arange(n) * 0.1,
        "x": rng.normal(size=n).astype(np.float32).astype(np.float64),
        "speed": rng.normal(size=n).astype(np.float32).astype(np.float64),
        "force": rng.uniform(-4, 4, n).astype(np.float32).astype(np.float64),
        "reward": rng.normal(size=n).astype(np.float32).astype(np.float64),
        "done": np.arange(n) == last,
        "run": run,
    }


def expected(columns: Mapping[str, np.ndarray], name: str) -> OfflineDataset:
    """Return the transitions of the runs, put together row by row."""
    steps, rows = [], len(columns["run"])
    for row in range(rows):
        goes_on = row + 1 < rows and columns["run"][row + 1] == columns["run"][row]
        if goes_on or columns["done"][row]:
            steps.append((row, row + 1 if goes_on else row))
    here, after = map(list, zip(*steps, strict=True))
    seen, run = np.stack([columns["x"], columns["speed"]], axis=1), columns["run"][here]
    is_last = np.append(run[1:] != run[:-1], True)
    return OfflineDataset.from_arrays(
        name,
        observations=seen[here],
        actions=columns["force"][here, None],
        rewards=columns["reward"][here],
        terminals=columns["done"][here],
        timeouts=is_last & ~columns["done"][here],
        next_observations=seen[after],
        action_space=(-5, 5),
    )


def write_csv(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(each.tolist() for each in columns.values()), strict=True))


def write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    pq.write_table(pa.table({name: pa.array(list(each)) for name, each in columns.items()}), path)


def write_npz(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **columns)  # pyright: ignore


def write_hdf5(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = values


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "csv": write_csv,
    "parquet": write_parquet,
    "npz": write_npz,
    "hdf5": write_hdf5,
}
EVERY = pytest.mark.parametrize("kind", WRITERS)


def assert_equal(found: OfflineDataset, other: OfflineDataset) -> None:
    assert leaves(found.transitions) == leaves(other.transitions)
    assert found.episode_lengths.equal(other.episode_lengths)
    assert found.episode_returns.equal(other.episode_returns)
    assert (found.observation_space, found.action_space) == (
        other.observation_space,
        other.action_space,
    )


class TestFiles:
    @EVERY
    def test_of_any_names(self, kind: str, tmp_path: Path) -> None:
        path, columns = tmp_path / f"log.{kind}", drive()
        WRITERS[kind](path, columns)
        for _ in range(2):  # parsed, then cached
            found = load(path, layout=LAYOUT, action_space=(-5, 5))
            assert_equal(found, expected(columns, str(path)))
            assert found.episode_lengths.tolist() == [4, 4, 5]
            assert found.transitions["next", "terminated"].sum() == 1
            assert found.recording.transitions == 15

    @EVERY
    def test_of_d4rls_names_need_no_layout(self, kind: str, tmp_path: Path) -> None:
        columns = drive()
        wide = {"observations": np.stack([columns["x"], columns["speed"]], 1)}
        if kind == "csv":
            wide = {"observations": columns["x"]}
        arrays = {
            **wide,
            "actions": columns["force"] / 5,
            "rewards": columns["reward"],
            "terminals": columns["done"],
            "timeouts": np.isin(np.arange(15), [4, 14]),
        }
        if kind in ("npz", "hdf5"):
            arrays["actions"] = arrays["actions"][:, None]
        path = tmp_path / f"log.{kind}"
        WRITERS[kind](path, arrays)
        direct = {
            key: its[:, None] if its.ndim == 1 and key[0] in "oa" else its
            for key, its in arrays.items()
        }
        assert_equal(load(path), OfflineDataset.from_arrays("direct", **direct))

    @EVERY
    def test_in_a_folder_or_a_list_are_an_episode_each(self, kind: str, tmp_path: Path) -> None:
        whole = drive()
        layout = {role: its for role, its in LAYOUT.items() if role != "episode_ids"}
        paths = []
        for run in (7, 8, 9):
            path = tmp_path / f"run-{run}.{kind}"
            WRITERS[kind](
                path,
                {name: its[whole["run"] == run] for name, its in whole.items() if name != "run"},
            )
            paths.append(path)
        for source in (tmp_path, paths):
            found = load(source, layout=layout, action_space=(-5, 5))
            assert_equal(found, expected(whole, "logs"))
        assert load(tmp_path, layout=layout, action_space=(-5, 5)).name == str(tmp_path)

    @pytest.mark.parametrize("marked", ["nowhere", "where a file ends", "within a file"])
    def test_with_time_outs_end_an_episode_each(self, marked: str, tmp_path: Path) -> None:
        """A last row that is terminal is kept with its reward, also where it is a time-out."""
        whole = drive((5, 4, 6, 3))
        files = {7: [7], 8: [8], 9: [9, 10]}
        if marked != "within a file":
            files = {run - 7: [run] for run in range(7, 11)}
        is_last = np.append(np.diff(whole["run"]) > 0, True)
        columns = {**whole, "timeout": is_last if marked != "nowhere" else np.zeros(18)}
        for name, its in files.items():
            rows = np.isin(whole["run"], its)
            write_csv(
                tmp_path / f"run-{name}.csv",
                {key: values[rows] for key, values in columns.items() if key != "run"},
            )
        layout = {role: its for role, its in LAYOUT.items() if role != "episode_ids"}
        found = load(tmp_path, layout={**layout, "timeouts": "timeout"}, action_space=(-5, 5))
        assert_equal(found, expected(whole, "logs"))
        assert found.recording.stopped == 0

    def test_that_are_many_have_a_short_name(self, tmp_path: Path) -> None:
        for run in range(7):
            write_csv(tmp_path / f"{run}.csv", drive((5,), seed=run))
        paths = sorted(tmp_path.iterdir())
        found = load(paths, layout={**LAYOUT, "terminals": None}, action_space=(-5, 5))
        assert found.name == f"{paths[0]} + 6 more"
        assert len(found.episode_lengths) == 7

    def test_that_change_are_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        for seed in (0, 1):
            write_csv(path, drive(seed=seed))
            found = load(path, layout=LAYOUT, action_space=(-5, 5))
            assert_equal(found, expected(drive(seed=seed), str(path)))
        swapped = load(
            path, layout={**LAYOUT, "observations": ["speed", "x"]}, action_space=(-5, 5)
        )
        assert swapped.transitions["observation"].equal(found.transitions["observation"].flip(1))

    def test_without_rewards_and_terminals(self, tmp_path: Path) -> None:
        path, columns = tmp_path / "log.csv", drive()
        write_csv(path, {name: columns[name] for name in ("x", "speed", "force", "run")})
        layout = {**LAYOUT, "rewards": None, "terminals": None}
        found = load(path, layout=layout, action_space=(-5, 5))
        assert not found.transitions["next", "reward"].any()
        assert not found.transitions["next", "terminated"].any()
        assert found.episode_lengths.tolist() == [4, 3, 5]

    def test_of_which_the_last_row_has_no_action(self, tmp_path: Path) -> None:
        """Who logs one observation more than actions leaves cells empty, which nobody reads."""
        path, columns = tmp_path / "log.csv", drive()
        columns["force"][[4, 14]] = columns["reward"][[4, 14]] = np.nan
        write_csv(path, columns)
        found = load(path, layout=LAYOUT, action_space=(-5, 5))
        assert_equal(found, expected(drive(), str(path)))

    def test_with_success_and_further_columns(self, tmp_path: Path) -> None:
        path, columns = tmp_path / "log.parquet", drive()
        columns["arrived"] = np.isin(np.arange(15), [2, 8, 11])
        write_parquet(path, columns)
        layout = {**LAYOUT, "success": "arrived"}
        found = load(
            path, layout=layout, action_space=(-5, 5), columns=["time"], episodes="until_success"
        )
        assert found.episode_lengths.tolist() == [3, 4, 3]
        np.testing.assert_array_equal(
            found.transitions["time"], np.float32([0, 1, 2, 5, 6, 7, 8, 9, 10, 11]) / 10
        )

    @EVERY
    def test_of_discrete_actions(self, kind: str, tmp_path: Path) -> None:
        path, columns = tmp_path / f"log.{kind}", drive()
        columns["force"] = np.arange(15) % 3
        WRITERS[kind](path, columns)
        message = "whole numbers" if kind == "csv" else "actions has dtype int64, expected floats"
        with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
            load(path, layout=LAYOUT)
        found = load(path, layout=LAYOUT, action_space=3)
        assert found.action_space == Discrete(3)
        assert found.transitions["action"].tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 0, 1, 2, 0, 1]
        amounts = load(path, layout=LAYOUT, action_space=(0, 2)).transitions["action"]
        assert amounts.shape == (13, 1)

    def test_of_an_environment(self, tmp_path: Path) -> None:
        path, columns = tmp_path / "log.csv", drive()
        columns["force"] /= 2
        write_csv(path, columns)
        for _ in range(2):  # whatever was cached before
            with pytest.raises(ValueError, match=r"outside \[-1, 1\]"):
                load(path, layout=LAYOUT)
            found = load(path, layout=LAYOUT, env="Pendulum-v1")
            assert found.action_space == Box(-2, 2, (1,))
            assert found.env_spec is not None and found.env_spec.id == "Pendulum-v1"

    def test_text_tells_episodes_apart(self, tmp_path: Path) -> None:
        path, columns = tmp_path / "log.csv", drive()
        columns["run"] = np.array([f"2026-01-{run:02}, robot" for run in columns["run"]])
        write_csv(path, columns)
        assert load(path, layout=LAYOUT, action_space=(-5, 5)).episode_lengths.tolist() == [4, 4, 5]
        write_parquet(tmp_path / "log.parquet", columns)
        found = load(tmp_path / "log.parquet", layout=LAYOUT, action_space=(-5, 5))
        assert_equal(found, expected(columns, "log"))

    def test_of_several_kinds_are_joined(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"log.{kind}" for kind in WRITERS]
        for path in paths:
            WRITERS[path.suffix[1:]](path, drive())
        found = load(paths, layout=LAYOUT, action_space=(-5, 5))
        one = expected(drive(), "log").transitions
        for rows in found.transitions.split(len(one)):
            assert leaves(rows) == leaves(one)


# What is wrong, in the file, and what is said about it.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "a missing column",
        {"speed": None},
        "has no column speed; found (time, x, force, reward, done, run|done, force, reward, run, time, x)$",
    ),
    ("NaN", {"speed": (3, np.nan)}, "{place3}, column speed is nan, expected a finite number"),
    ("infinity", {"x": (0, np.inf)}, "{place0}, column x is inf, expected a finite number"),
    (
        "NaN in what was done",
        {"force": (2, np.nan)},
        "{place2}, column force is nan, expected a finite",
    ),
    ("a flag", {"done": (4, 2)}, "{place4}, column done is 2(.0)?, expected 0 or 1"),
    ("nothing", {"rows": 0}, "has no rows"),
]


@EVERY
@pytest.mark.parametrize(
    ("changes", "message"), [its[1:] for its in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_what_is_wrong_is_said_in_one_line(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path, cache_folder: Path
) -> None:
    path, columns = tmp_path / f"log.{kind}", drive()
    for name, change in changes.items():
        if name == "rows":
            columns = {key: its[:change] for key, its in columns.items()}
        elif change is None:
            del columns[name]
        else:
            columns[name] = columns[name].astype(np.float64)
            columns[name][change[0]] = change[1]
    WRITERS[kind](path, columns)
    for row in range(6):
        place = f"line {row + 2}" if kind == "csv" else f"row {row}"
        message = message.replace(f"{{place{row}}}", place)
    with pytest.raises(ValueError, match=f"^{path}: {message}") as error:
        load(path, layout=LAYOUT, action_space=(-5, 5))
    assert "\n" not in str(error.value)
    assert not cache_folder.exists()


@EVERY
def test_damaged_files(kind: str, tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / f"log.{kind}"
    WRITERS[kind](path, drive())
    contents = path.read_bytes()
    for broken in (contents[: len(contents) // 2 - 1], b"", b"\x00\xff\xfe\x80"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{path}: ") as error:
            load(path, layout=LAYOUT, action_space=(-5, 5))
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^no file {path}"):
        load(path, layout=LAYOUT)
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x,speed,force,reward,done,run\n1,2,3,4,0,7\n1,2,3,4\n",
            "line 3 has 4 cells, expected 6, as the fi",
        ),
        (
            "x,speed,force,reward,done,run\n1,2,3,4,0,7\n\n1,2,3,4,0,7\n",
            "line 3 has 0 cells, expected 6",
        ),
        (
            "x,speed,force,reward,done,run\n1,2,3,4,0,7\n1,fast,3,4,0,7\n",
            "line 3, column speed is 'fast', exp",
        ),
        (
            "x,speed,force,reward,done,run\n1,2,3,4,0,7\n1,,3,4,0,7\n",
            "line 3, column speed is nan, expected",
        ),
        (
            "x,speed,force,reward,done,run\n1,2,3,4,maybe,7\n",
            "line 2, column done is 'maybe', expected a num",
        ),
        ("x,x,speed\n1,2,3\n", "has several columns x"),
        ("1.5,2,3\n1,2,3\n", "has no names of columns: its first line is 1.5,2,3"),
        (
            "x;speed;force\n1;2;3\n",
            "has no column x, speed, force, reward, done, run; found x;speed;force",
        ),
        (
            "x,speed,force,reward,done,run\n1,2,3,4,1,7\n1,2,3,4,0,8\n1,2,3,4,0,7\n",
            r"episode_ids\[2\] is 7, an",
        ),
    ],
)
def test_what_is_wrong_in_text(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load(path, layout=LAYOUT, action_space=(-5, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": [[1.0, 2.0]] * 14 + [[1.0]]},
            r"row 14, column x has 1 entries, expected 2, as row 0",
        ),
        ({"x": ["a"] * 15}, "column x has dtype <U1, expected numbers"),
        ({"done": [None, *[False] * 14]}, "row 0, column done is null, expected a value"),
        ({"x": [{"a": 1}] * 15}, r"column x holds structures, struct<a: int64>, expected numbers"),
    ],
)
def test_what_is_wrong_in_parquet(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write_parquet(path, {**drive(), **changes})
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load(path, layout=LAYOUT, action_space=(-5, 5))


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros(9)}, "column x has 9 rows, expected 15, as force"),
        ({"x": np.array([b"a"] * 15)}, r"column x has dtype .*, expected numbers"),
        ({"x": np.zeros(15, complex)}, "column x has dtype complex128, expected numbers"),
    ],
)
def test_what_is_wrong_in_arrays(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"log.{kind}"
    WRITERS[kind](path, {**drive(), **changes})
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load(path, layout=LAYOUT, action_space=(-5, 5))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"observation": "x"},
            "layout: there is no 'observation', expected some of observations, actions,",
        ),
        (
            {"observations": None},
            "layout: observations=None, expected the name of a column, or a list of",
        ),
        (
            {"observations": []},
            r"layout: observations=\[\], expected the name of a column, or a list",
        ),
        (
            {"rewards": ["a", "b"]},
            r"layout: rewards=\['a', 'b'\], expected the name of a column or null",
        ),
        ({"rewards": 0}, "layout: rewards=0, expected the name of a column or null"),
    ],
)
def test_layouts_that_are_none(layout: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        load(tmp_path / "log.csv", layout=layout)
    with pytest.raises(SettingsError, match=f"^{message}"):
        OFFLINE.settings([f"dataset={tmp_path}/log.csv", f"layout={_written(layout)}"])


def _written(layout: dict) -> str:
    return json.dumps(layout).replace('"', "").replace(" ", "")


def test_what_is_not_said_is_asked_for(tmp_path: Path) -> None:
    path, columns = tmp_path / "log.csv", drive()
    write_csv(path, columns)
    with pytest.raises(
        ValueError, match=r"has no column observations, .*; found time, x.*; name in layout="
    ):
        load(path)
    named = {
        "observations": columns["x"],
        "actions": columns["force"] / 5,
        "rewards": columns["reward"],
    }
    named |= {"terminals": columns["done"], "qpos": columns["x"]}
    write_csv(path, named)
    with pytest.raises(
        ValueError, match=f"^{path}: has columns that are not read, qpos: say in layout="
    ):
        load(path)
    with pytest.raises(
        ValueError, match=f"^{path}: line 10, column terminals ends an episode, and nothing"
    ):
        load(path, columns=["qpos"])
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder 'test/walks-v0' in /.*; a layout is of CSV"
    ):
        load("test/walks-v0", layout=LAYOUT)
    with pytest.raises(ValueError, match=f"^{tmp_path}: a layout is of CSV"):
        (tmp_path / "log.csv").unlink()
        load(tmp_path, layout=LAYOUT)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", drive())
    with h5py.File(tmp_path / "b.hdf5", "w"):
        pass
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}: holds files of .csv and .hdf5, expected one kind"
    ):
        load(tmp_path, layout=LAYOUT)
    (tmp_path / "b.hdf5").unlink()
    columns = drive()
    columns["timeouts"] = columns["done"]
    write_csv(tmp_path / "c.csv", columns)
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/c.csv: only one of it and a.csv has timeouts"
    ):
        load(tmp_path, layout=LAYOUT)
    (tmp_path / "c").mkdir()
    wide = {**drive(), "x": np.zeros((15, 2))}
    write_npz(tmp_path / "c/1.npz", drive())
    write_npz(tmp_path / "c/2.npz", wide)
    message = rf"^{tmp_path}/c/2.npz: observations are of shape \[3\], not \[2\] as in 1.npz"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "c", layout=LAYOUT)


# --- LeRobot -----------------------------------------------------------------------------------------------


def write_lerobot(folder: Path, version: str = "v2.1", **features: Any) -> dict[str, np.ndarray]:
    """Write a data set as LeRobot does: a file for each episode in version 2, one for several in 3."""
    columns, n = drive(), 15
    state = np.stack([columns["x"], columns["speed"]], 1).astype(np.float32)
    rows: dict[str, Any] = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 2),
        "action": pa.array(
            columns["force"].astype(np.float32)[:, None].tolist(), pa.list_(pa.float32())
        ),
        "next.reward": pa.array(columns["reward"].astype(np.float32)),
        "next.done": pa.array(np.isin(np.arange(n), [4, 8, 14])),
        "next.success": pa.array(columns["done"]),
        "timestamp": pa.array(columns["time"].astype(np.float32)),
        "frame_index": pa.array(np.concatenate([np.arange(k) for k in LENGTHS])),
        "episode_index": pa.array(columns["run"] - 7),
        "index": pa.array(np.arange(n)),
        "task_index": pa.array(np.zeros(n, np.int64)),
    }
    table = pa.table(rows)
    chunk = folder / "data/chunk-000"
    chunk.mkdir(parents=True)
    if version.startswith("v3"):
        pq.write_table(table.slice(0, 9), chunk / "file-000.parquet")
        pq.write_table(table.slice(9), chunk / "file-001.parquet")
    else:
        for i, start in enumerate((0, 5, 9)):
            pq.write_table(table.slice(start, LENGTHS[i]), chunk / f"episode_{i:06}.parquet")
    kinds = {name: {"dtype": str(its.type), "shape": [1]} for name, its in rows.items()}
    info = {"codebase_version": version, "total_frames": n, "total_episodes": 3, "fps": 10}
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text(json.dumps({**info, "features": {**kinds, **features}}))
    return columns


class TestLeRobot:
    @pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
    def test_folders(self, version: str, tmp_path: Path) -> None:
        columns = write_lerobot(tmp_path / "robot", version)
        found = load(tmp_path / "robot", action_space=(-5, 5))
        assert_equal(found, expected(columns, "robot"))
        named = load(tmp_path / "robot", layout={"rewards": None}, action_space=(-5, 5))
        assert not named.transitions["next", "reward"].any()

    def test_pictures_are_refused_by_name(self, tmp_path: Path) -> None:
        video = {"observation.images.top": {"dtype": "video", "shape": [480, 640, 3]}}
        columns = write_lerobot(tmp_path / "robot", **video)
        with pytest.raises(
            ValueError, match=r"not read, observation.images.top \(.*pictures, which are not r"
        ):
            load(tmp_path / "robot", action_space=(-5, 5))
        asked = {"observations": ["observation.state", "observation.images.top"]}
        with pytest.raises(
            ValueError, match=r"observation.images.top: video columns are not read; decode"
        ):
            load(tmp_path / "robot", layout=asked)
        found = load(
            tmp_path / "robot", layout={"observations": "observation.state"}, action_space=(-5, 5)
        )
        assert_equal(found, expected(columns, "robot"))

    def test_what_is_missing_is_said(self, tmp_path: Path) -> None:
        folder = tmp_path / "robot"
        write_lerobot(folder)
        lost = shutil.copytree(folder, tmp_path / "lost")
        (lost / "data/chunk-000/episode_000001.parquet").unlink()
        with pytest.raises(
            ValueError, match=f"^{lost}: its files hold 11 of the 15 rows that meta/info"
        ):
            load(lost)
        shutil.rmtree(lost / "data")
        with pytest.raises(ValueError, match=f"^{lost}: has no files data/chunk"):
            load(lost)
        info = folder / "meta/info.json"
        kept = info.read_text()
        for text, message in (
            ("{", "does not describe a data set of LeRobot: JSONDecodeError"),
            ("{}", "does not describe a data set of LeRobot: KeyError"),
            (kept.replace("v2.1", "v1.6"), "is of version v1.6, expected v2 or v3: convert it"),
        ):
            info.write_text(text)
            with pytest.raises(ValueError, match=f"^{info}: {message}"):
                load(folder)
        info.write_text(kept)
        for path in (folder / "data/chunk-000").iterdir():
            table = pq.read_table(path)
            pq.write_table(table.drop_columns(["next.reward", "next.success"]), path)
        with pytest.raises(
            ValueError, match=r"has no column next.reward; .*null for rewards that were not"
        ):
            load(folder)


# --- The ways in -------------------------------------------------------------------------------------------


def test_the_recipe_trains_on_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for run in range(4):
        write_csv(tmp_path / f"logs/{run}.csv", drive((20,), seed=run))
    layout = "layout={observations:[x,speed],actions:force,rewards:reward,terminals:done}"
    given = [*TINY, f"dataset={tmp_path}/logs", "eval_episodes=0", "action_space=[-5,5]"]
    settings = OFFLINE.settings([*given, layout])
    offline.run(settings, tmp_path / "run")
    found = build.dataset_for(settings.data).transitions
    assert found["observation"].shape == (80, 2)
    assert load_policy(tmp_path / "run/last.ckpt")
    other = OFFLINE.settings([*given, layout.replace("[x,speed]", "time")])
    seen = build.dataset_for(other.data).transitions["observation"]
    assert seen.shape == (80, 1) and not seen.equal(found["observation"][:, :1])
    with pytest.raises(SettingsError, match=r"there is no setting layout.actions"):
        OFFLINE.settings([*given, "layout.actions=force"])
    with pytest.raises(
        SettingsError, match=r"^dataset=.*: .*/0.csv: has no column observations, actions"
    ):
        offline.run(OFFLINE.settings(given), tmp_path / "other")
    discrete = OFFLINE.settings([*given[:-1], layout.replace("force", "run"), "action_space=8"])
    assert build.dataset_for(discrete.data).action_space == Discrete(8)


def test_the_command_inspects_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    write_csv(path, drive())
    layout = [
        "observations=x,speed",
        "actions=force",
        "rewards=null",
        "terminals=done",
        "episode_ids=run",
    ]
    assert inspect(["inspect", str(path), "--action-space", "[-5,5]", "--layout", *layout]) == 0
    shown = capsys.readouterr().out
    assert "transitions  13" in shown and "2 columns" in shown
    assert inspect(["inspect", str(path), "--layout", *layout]) == 1
    assert "outside [-1, 1]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect(["inspect", str(path), "--action-space", "wide"])
    assert "wide: expected [low,high], or a number" in capsys.readouterr().err


def test_logs_are_replayed_as_minaris(root: Path) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(20):
        action = env.action_space.sample()
        seen, (observation, reward, *_) = observation, env.step(action)
        rows.append([*seen, *action, reward])
    path = root / "pendulum.csv"
    write_csv(path, dict(zip("xyvur", np.array(rows, np.float64).T, strict=True)))
    with pytest.raises(
        ValueError, match=f"^{path}: logs are replayed as a data set of Minari's: store"
    ):
        replay(path, "Pendulum-v1")
    layout = {"observations": ["x", "y", "v"], "actions": "u", "rewards": "r", "terminals": None}
    load(path, layout=layout, env="Pendulum-v1").save_minari("own/pendulum-v0")
    assert load("own/pendulum-v0").env_spec is not None
    assert replay("own/pendulum-v0").environment == "Pendulum-v1"


def test_csv_needs_no_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("csv", "parquet"):
        WRITERS[kind](tmp_path / f"log.{kind}", drive())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(load(tmp_path / "log.csv", layout=LAYOUT, action_space=(-5, 5)).transitions) == 13
    message = r"log.parquet: Parquet is read by pyarrow: pip install 'torchrl-iql\[arrow\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(tmp_path / "log.parquet", layout=LAYOUT)


@pytest.mark.parametrize("role", ["rewards", "terminals", "timeouts", "episode_ids", "success"])
def test_what_is_one_of_a_row_is_no_more(role: str, tmp_path: Path) -> None:
    path, columns = tmp_path / "log.npz", drive()
    two = {**columns, "two": np.zeros((15, 2))}
    write_npz(path, two)
    layout = {**LAYOUT, role: "two"}
    message = rf"^{path}: column two has shape \[15, 2\], expected one of {role} in a row"
    with pytest.raises(ValueError, match=message):
        load(path, layout=layout, action_space=(-5, 5), episodes="until_success")
    write_npz(path, {**columns, "run": columns["run"][:, None], "done": columns["done"][:, None]})
    found = load(path, layout=LAYOUT, action_space=(-5, 5))
    assert_equal(found, expected(columns, str(path)))


def test_a_name_as_ogbenchs_is_none(tmp_path: Path) -> None:
    path = tmp_path / "pick-place-v1.npz"
    write_npz(path, drive())
    assert_equal(load(path, layout=LAYOUT, action_space=(-5, 5)), expected(drive(), str(path)))
    named = {
        "observations": np.zeros((4, 2)),
        "actions": np.zeros((4, 1)),
        "terminals": np.zeros(4),
    }
    write_npz(path, {**named, "timeouts": np.arange(4) == 3})
    with pytest.raises(ValueError, match=f"^{path}: has no column rewards; found "):
        load(path)


class TestEpisodeIds:
    def arrays(self, **changes: Any) -> dict[str, Any]:
        columns = drive()
        given = {
            "observations": np.stack([columns["x"], columns["speed"]], 1),
            "actions": columns["force"][:, None],
            "rewards": columns["reward"],
            "terminals": columns["done"],
            "episode_ids": columns["run"],
            "action_space": (-5, 5),
        }
        return {**given, **changes}

    @pytest.mark.parametrize(
        "ids",
        [
            [7, 8, 9],
            ["a", "bb", "c"],
            [2.5, 1.0, 0.0],
            [True, False, 2],
            np.array(["a", "bb", "c"], object),  # as pandas has text
        ],
    )
    def test_are_numbers_or_text(self, ids: list) -> None:
        found = OfflineDataset.from_arrays(
            "log", **self.arrays(episode_ids=np.repeat(ids, LENGTHS))
        )
        assert_equal(found, expected(drive(), "log"))
        assert found.recording.stopped == 0

    def test_with_next_observations_all_rows_are_kept(self) -> None:
        given = self.arrays()
        found = OfflineDataset.from_arrays(
            "log", **given, next_observations=given["observations"] + 1
        )
        assert len(found.transitions) == 15
        assert found.recording.stopped > 0  # jumps

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (
                [0, 1, 0],
                r"episode_ids\[9\] is 0, an episode that ended at row 4: the rows of one have to",
            ),
            ([0, np.nan, 1], r"episode_ids\[5\] is nan, expected an id"),
            ([0j, 1j, 2j], "episode_ids has dtype complex128, expected numbers or text"),
            (np.array(["a", None, "b"]), "episode_ids has dtype object, expected numbers or text"),
        ],
    )
    def test_that_are_none(self, ids: list, message: str) -> None:
        with pytest.raises(ValueError, match=f"^log: {message}"):
            OfflineDataset.from_arrays("log", **self.arrays(episode_ids=np.repeat(ids, LENGTHS)))
        with pytest.raises(
            ValueError, match=r"^log: episode_ids has shape \[3\], expected 15 rows"
        ):
            OfflineDataset.from_arrays("log", **self.arrays(episode_ids=ids))
