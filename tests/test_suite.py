"""The table of the mini suite, made by its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import collect
import minari
import pytest

SUITE = Path(collect.__file__).parent / "benchmark" / "suite.py"
NAME = "pointmaze/medium"


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    small = ["hidden_sizes=[8,8]", "batch_size=32", "compute.execution=eager"]
    command = [sys.executable, str(SUITE), "--data", NAME, "--steps", "40", "--episodes", "2"]
    command += ["--folder", str(folder), *arguments, "--", *small]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_table_is_that_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collect.build(collect.dataset_id(NAME), collect.behavior(NAME), 1000, workers=1)
    done = suite(tmp_path / "suite")
    assert done.returncode == 0, done.stderr
    replicas = json.loads((tmp_path / "suite/pointmaze-medium/scores.json").read_text())["replicas"]
    assert {(each["temperature"], each["seed"]) for each in replicas} == {
        (t, s) for t in (0.0, 10.0) for s in (0, 1)
    }
    dataset = minari.load_dataset(collect.dataset_id(NAME))
    reached = [episode.terminations[-1] for episode in dataset]
    behaviour = 100 * sum(reached) / len(reached)
    assert done.stdout.splitlines()[-1].startswith(f"| {NAME} | {behaviour:.1f} | ")

    again = suite(tmp_path / "suite")
    assert again.stdout == done.stdout
    log = (tmp_path / "suite/pointmaze-medium/log.txt").read_text()
    assert log.count("Results:") == 1

    scores = tmp_path / "suite/pointmaze-medium/scores.json"
    scores.unlink()  # as if it had been stopped
    assert suite(tmp_path / "suite").stdout == done.stdout
    assert json.loads(scores.read_text())["replicas"] == replicas


def test_a_run_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collect.build(collect.dataset_id(NAME), collect.behavior(NAME), 200, workers=1)
    done = suite(tmp_path / "suite", "--seeds", "-1")
    assert done.returncode == 1
    log = tmp_path / "suite/pointmaze-medium/log.txt"
    assert f"training on {NAME} failed, see {log}" in done.stderr
    assert "seed" in log.read_text()
