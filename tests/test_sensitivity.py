"""The grid of expectile and temperature: a real run, its scores and its picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from torchrl_iql_recipes.comparison import sensitivity
from torchrl_iql_recipes.comparison.record import Record

ASKED = {"expectiles": [0.5, 0.9], "temperatures": [0.0, 1.0, 3.0], "seeds": [0, 1]}


TASK = "mini/pointmaze-medium"


def asked(tmp_path: Path, **more: object) -> Namespace:
    its = {**ASKED, "steps": 10, "episodes": 2, "folder": tmp_path, "settings": [], **more}
    return Namespace(**its)


SCORES = {
    (expectile, temperature): {seed: 100 * expectile + temperature + seed for seed in (0, 1)}
    for expectile in ASKED["expectiles"]
    for temperature in ASKED["temperatures"]
}


@pytest.mark.slow
def test_the_map_is_that_of_the_learners(maze_id: str, tmp_path: Path) -> None:
    def started(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(sensitivity.__file__)), "--folder", str(folder)]
        command += ["--tasks", TASK, "--steps", "10", "--episodes", "2"]
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

    again = started(tmp_path / "again", "--record", str(tmp_path / "runs/record.json"))
    assert again.returncode == 0, again.stderr
    names = {"sensitivity.csv", "sensitivity.png", "record.json"}
    assert {each.name for each in (tmp_path / "again").iterdir()} == names
    for name in names:
        before = (tmp_path / "runs" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == before


def test_a_cell_is_the_mean_over_the_seeds(tmp_path: Path) -> None:
    got = sensitivity.grid(SCORES, asked(tmp_path))
    np.testing.assert_allclose(got, [[50.5, 90.5], [51.5, 91.5], [53.5, 93.5]])


def test_of_a_record_counts_what_is_complete_and_the_same(tmp_path: Path) -> None:
    file, args = tmp_path / "record.json", asked(tmp_path)
    sensitivity.kept({TASK: SCORES}, args).write(file)
    record = Record.read(file)
    assert sensitivity.of_record(record, TASK, args) == SCORES
    assert sensitivity.of_record(record, "mini/hopper-medium", args) is None
    for other in (
        {"steps": 20},
        {"episodes": 3},
        {"expectiles": [0.5, 0.8]},
        {"seeds": [0, 1, 2]},
        {"settings": ["batch_size=32"]},
    ):
        assert sensitivity.of_record(record, TASK, asked(tmp_path, **other)) is None
    fewer = dataclasses.replace(record, known=record.known[:-1])
    assert sensitivity.of_record(fewer, TASK, args) is None
    few = asked(tmp_path, expectiles=[0.9], seeds=[1])
    assert sensitivity.of_record(record, TASK, few) == {
        (0.9, b): {1: SCORES[0.9, b][1]} for b in ASKED["temperatures"]
    }
