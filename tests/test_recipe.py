"""The offline recipe as its users run it: real data, real environments, real interruptions."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import offline
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict

from torchrl_iql import Evaluator, IQLLoss, load_dataset, load_policy

RECIPES = Path(offline.__file__).parent
SMALL = [
    "steps=60",
    "eval_interval=30",
    "eval_episodes=2",
    "log_interval=20",
    "hidden_sizes=[16,16]",
    "batch_size=32",
    "compute.threads=1",
]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        return compose("offline", [*SMALL, *overrides])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    offline.run(config(f"dataset={maze_id}"), folder)
    return folder


def test_a_run_leaves_everything_that_the_readme_lists(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "learning_curves.png",
        "value_map.png",
        "scores.json",
        "last.ckpt",
        "best.ckpt",
        "cloning",
    }
    assert [row["step"] for row in rows(finished)] == ["20", "30", "40", "60"]
    assert all(row["loss_value"] for row in rows(finished) if row["step"] != "30")
    stored = OmegaConf.load(finished / "config.yaml")
    assert stored.expectile == 0.9  # resolved: no reference to a group is left
    assert "${" not in (finished / "config.yaml").read_text()


def test_the_scores_are_those_of_the_policy_on_disk(finished: Path, maze_id: str) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    dataset = load_dataset(maze_id)
    for folder, key in ((finished, "iql"), (finished / "cloning", "cloning")):
        with Evaluator(dataset.env_spec, episodes=2, seed=10_000) as evaluate:
            again = evaluate(load_policy(folder / "last.ckpt")).summary()
        assert {name: scores[key][name] for name in again} == again


def test_behaviour_cloning_is_the_same_run_at_temperature_zero(
    finished: Path, maze_id: str, tmp_path: Path
) -> None:
    offline.run(
        config(f"dataset={maze_id}", "temperature=0", "compare_with_cloning=false"), tmp_path
    )
    zero, cloning = load_policy(tmp_path / "last.ckpt"), load_policy(finished / "cloning/last.ckpt")
    assert all(map(torch.equal, zero.parameters(), cloning.parameters()))


def test_the_configuration_reaches_the_learner(maze_id: str) -> None:
    cfg = config("expectile=0.8", "weight_clip=7", "discount=0.9", "learning_rate=0.01", "steps=4")
    dataset = load_dataset(maze_id)
    architecture = offline.architecture_for(cfg, dataset)
    learner = offline.learner_for(cfg, dataset, architecture, temperature=2.0)
    loss = learner.loss
    assert isinstance(loss, IQLLoss)
    assert (loss.expectile, loss.temperature, loss.weight_clip) == (0.8, 2.0, 7)
    assert loss.value_estimator.gamma == pytest.approx(0.9)
    assert learner.policy_lr == 0.01
    mean, _ = dataset.observation_statistics()
    assert torch.equal(loss.value_network.module.normalize.mean, mean)


@pytest.mark.parametrize("task", [path.stem for path in (RECIPES / "config/task").iterdir()])
def test_every_task_gives_every_setting(task: str) -> None:
    cfg = config(f"task={task}")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    pointmaze = config("task=pointmaze")
    assert set(cfg.task) == set(pointmaze.task)


def test_no_setting_is_dead() -> None:
    source = (RECIPES / "offline.py").read_text()
    cfg = config()
    keys = [key for key in cfg if key not in ("task", "compute", "logger")]
    keys += [f"{group}.{key}" for group in ("compute", "logger") for key in cfg[group]]
    assert [key for key in keys if f"cfg.{key}" not in source] == []
    entries = (RECIPES / "config/offline.yaml").read_text()
    assert [key for key in cfg.task if f"task.{key}" not in entries] == []


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(RECIPES / "offline.py"), *SMALL, *overrides]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    maze_id: str, tmp_path: Path
) -> None:
    overrides = [f"dataset={maze_id}", "dropout=0.1", "compare_with_cloning=false"]
    overrides += ["steps=400", "eval_interval=200"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    process = start(tmp_path, *overrides, f"hydra.run.dir={halves}")
    deadline = time.monotonic() + 120
    while not (halves / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"resume={os.path.relpath(halves, tmp_path)}" in output
    assert 0 < json.loads((halves / "scores.json").read_text())["iql"]["steps"] < 400

    second = start(tmp_path, "resume=halves")
    output, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.ckpt"))
    offline.run(config(*overrides), whole)
    assert rows(halves) == rows(whole)
    parts = load_policy(halves / "last.ckpt"), load_policy(whole / "last.ckpt")
    assert all(map(torch.equal, parts[0].parameters(), parts[1].parameters()))


def test_a_run_stopped_before_anything_was_logged_can_be_resumed(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(f"dataset={maze_id}", "compare_with_cloning=false")
    step = offline.TrainStep.__call__

    def press_ctrl_c(self: offline.TrainStep, batch: TensorDict) -> TensorDict:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(offline.TrainStep, "__call__", press_ctrl_c)
    scores = offline.run(cfg, tmp_path)
    assert scores["iql"] == {"steps": 1, "best": None, "interrupted": True}
    assert "resume=folder" in offline.report(scores, "folder")
    monkeypatch.undo()
    assert offline.run(cfg, tmp_path)["iql"]["steps"] == 60


def test_what_cannot_be_resumed_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, "resume=nowhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "resume='nowhere'" in errors
    assert "config.yaml" in errors
