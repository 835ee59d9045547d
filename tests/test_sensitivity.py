"""The grid of expectile and temperature: a real run, its scores and its picture."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from torchrl_iql_recipes.comparison import sensitivity
from torchrl_iql_recipes.experiment.schema import SettingsError

ASKED = {"expectiles": [0.5, 0.9], "temperatures": [0.0, 1.0, 3.0], "seeds": [0, 1]}


def asked(**more: object) -> Namespace:
    return Namespace(**ASKED, steps=10, episodes=2, **more)


def rows(task: str, **other: str) -> list[dict[str, str]]:
    return [
        {
            **{"task": task, "steps": "10", "episodes": "2", "expectile": str(expectile)},
            **{"temperature": str(temperature), "seed": str(seed)},
            "score": str(100 * expectile + temperature + seed),
            **other,
        }
        for expectile in ASKED["expectiles"]
        for temperature in ASKED["temperatures"]
        for seed in ASKED["seeds"]
    ]


@pytest.mark.slow
def test_the_map_is_that_of_the_learners(maze_id: str, tmp_path: Path) -> None:
    def started(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(sensitivity.__file__)), "--folder", str(folder)]
        command += ["--tasks", "mini/pointmaze-medium", "--steps", "10", "--episodes", "2"]
        for name, values in ASKED.items():
            command += [f"--{name}", *map(str, values)]
        command += [*more, "--", f"dataset={maze_id}", "hidden_sizes=[8,8]", "batch_size=32"]
        command += ["compute.execution=eager"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = started(tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/mini-pointmaze-medium/scores.json").read_text())
    places = [(r["expectile"], r["temperature"], r["seed"]) for r in result["replicas"]]
    assert len(set(places)) == 12
    with (tmp_path / "runs/sensitivity.csv").open(newline="") as lines:
        read = {
            (float(r["expectile"]), float(r["temperature"]), int(r["seed"])): float(r["score"])
            for r in csv.DictReader(lines)
        }
    assert read == {p: r["score"] for p, r in zip(places, result["replicas"], strict=True)}
    assert (tmp_path / "runs/sensitivity.png").stat().st_size > 5000

    again = started(tmp_path / "again", "--record", str(tmp_path / "runs/sensitivity.csv"))
    assert again.returncode == 0, again.stderr
    assert {each.name for each in (tmp_path / "again").iterdir()} == {
        *("sensitivity.csv", "sensitivity.png")
    }
    for name in ("sensitivity.csv", "sensitivity.png"):
        before = (tmp_path / "runs" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == before


def test_a_cell_is_the_mean_over_the_seeds() -> None:
    got = sensitivity.scores(rows("a"), asked())
    np.testing.assert_allclose(got, [[50.5, 90.5], [51.5, 91.5], [53.5, 93.5]])


def test_of_a_record_counts_what_is_complete_and_the_same(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.csv"

    def written(*its: dict[str, str]) -> dict[str, list]:
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, sensitivity.COLUMNS)
            writer.writeheader()
            writer.writerows(its)
        return sensitivity.recorded(file, asked())

    assert list(written(*rows("a"), *rows("b"))) == ["a", "b"]
    assert list(written(*rows("a")[:-1], *rows("b"))) == ["b"]
    assert written(*rows("a", steps="20")) == {}
    assert written(*rows("a", expectile="0.7")) == {}
    file.write_text("task,score\na,3\n")
    with pytest.raises(SettingsError, match="expected the columns"):
        sensitivity.recorded(file, asked())
    with pytest.raises(SettingsError, match="No such file"):
        sensitivity.recorded(tmp_path / "none.csv", asked())
