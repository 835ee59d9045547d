"""The tables on the mini suite, made by their commands."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import minari
import pytest

from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.comparison import finetuning
from torchrl_iql_recipes.comparison.jobs import Job

COMPARISON = Path(finetuning.__file__).parent
NAME = "pointmaze/medium"
SMALL = ["hidden_sizes=[8,8]", "batch_size=32", "compute.execution=eager"]


def suite(
    folder: Path, *arguments: str, script: str = "suite.py"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARISON / script), "--data", NAME]
    command += ["--steps", "40", "--episodes", "2", "--folder", str(folder)]
    return subprocess.run(
        [*command, *arguments, "--", *SMALL], capture_output=True, text=True, timeout=300
    )


def replicas(folder: Path) -> list[dict]:
    return json.loads((folder / "scores.json").read_text())["replicas"]


@pytest.mark.slow
def test_the_table_is_that_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collection.build(collection.dataset_id(NAME), collection.behavior(NAME), 1000, workers=1)
    done = suite(tmp_path / "suite")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "suite" / "pointmaze-medium"
    for algorithm, title in (("bc", "BC"), ("iql", "IQL")):
        learners = {(each["title"], each["seed"]) for each in replicas(folder / algorithm)}
        assert learners == {(title, 0), (title, 1)}
    dataset = minari.load_dataset(collection.dataset_id(NAME))
    reached = [episode.terminations[-1] for episode in dataset]
    behaviour = 100 * sum(reached) / len(reached)
    assert done.stdout.splitlines()[-1].startswith(f"| {NAME} | {behaviour:.1f} | ")

    again = suite(tmp_path / "suite")
    assert again.stdout == done.stdout
    assert (folder / "iql" / "log.txt").read_text().count("Results:") == 1

    other = suite(tmp_path / "suite", "--seeds", "0")
    assert other.returncode == 1
    assert f"{folder / 'bc'} holds a run with other settings, see settings.json" in other.stderr

    before = {algorithm: replicas(folder / algorithm) for algorithm in ("bc", "iql")}
    for algorithm in before:  # as if they had been stopped
        (folder / algorithm / "scores.json").unlink()
    assert suite(tmp_path / "suite").stdout == done.stdout
    assert {algorithm: replicas(folder / algorithm) for algorithm in before} == before


@pytest.mark.slow
def test_fine_tuning_goes_on_from_the_offline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collection.build(collection.dataset_id(NAME), collection.behavior(NAME), 1000, workers=1)
    online = ["compute.execution=eager", "collector.frames_per_batch=10"]
    arguments = ["--env-steps", "40", "--evaluations", "2", "--online", *online]
    done = suite(tmp_path / "suite", *arguments, script="finetuning.py")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "suite" / "pointmaze-medium"
    offline_scores = [each["score"] for each in replicas(folder / "iql")]
    runs = [replicas(folder / f"online/seed={s}")[0] for s in (0, 1)]
    assert [run["before"]["score"] for run in runs] == offline_scores
    assert [(run["seed"], run["steps"], run["frames"]) for run in runs] == [
        (0, 80, 40),
        (1, 80, 40),
    ]
    heading, _, row, picture = done.stdout.splitlines()
    assert "after 20 steps | after 40 steps | mean of the last 1 evaluations" in heading
    _, name, offline_last, before, _, after, half, _ = map(str.strip, row.split("|"))
    assert (name, offline_last, half) == (NAME, before, after)
    ends = [run["after"]["score"] for run in runs]
    assert after == f"{sum(ends) / 2:.1f} ({ends[0]:.1f}, {ends[1]:.1f})"
    assert Path(picture).stat().st_size > 10_000


def test_the_table_has_the_last_score_and_the_mean_of_the_second_half(tmp_path: Path):
    for seed in (0, 1):
        for phase, scores in {"iql": [5, 10], "online": [10, 7, 90, 20, 40, 60]}.items():
            folder = tmp_path / "pointmaze-medium" / phase / f"seed={seed}"
            folder.mkdir(parents=True)
            with (folder / "metrics.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["step", "eval/score"])
                rows.writerows([(t, "") for t in range(3)])  # logged between the evaluations
                rows.writerows([(t, score + 2 * seed) for t, score in enumerate(scores)])
    args = {"env_steps": 5000, "evaluations": 5, "steps": 40, "episodes": 2}
    args |= {"data": [NAME], "seeds": [0, 1], "folder": tmp_path, "online": [], "overrides": []}
    args |= {"algorithms": ["iql"]}
    heading, _, row = finetuning.table(Namespace(**args)).splitlines()
    assert "after 1,000 steps | after 5,000 steps | mean of the last 3 evaluations" in heading
    cells = ["11.0 (10.0, 12.0)", "11.0 (10.0, 12.0)", "8.0 (7.0, 9.0)"]
    cells += ["61.0 (60.0, 62.0)", "41.0 (40.0, 42.0)"]
    assert row == f"| {' | '.join([NAME, *cells])} |"


def test_a_folder_that_something_else_has_filled_is_not_taken_over(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("expectile: 0.5")
    job = Job(Path("offline.py"), tmp_path, ["expectile=0.9"])
    with pytest.raises(ValueError, match=r"holds a run with other settings, see config\.yaml"):
        job.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collection.build(collection.dataset_id(NAME), collection.behavior(NAME), 200, workers=1)
    done = suite(tmp_path / "suite", "--seeds", "-1")
    assert done.returncode == 1
    log = tmp_path / "suite/pointmaze-medium/bc/log.txt"
    assert f"offline.py failed, see {log}" in done.stderr
    assert "seed" in log.read_text()
