"""What the recipes print while they run: progress, and nothing that other libraries say to nobody."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import TINY
from torchrl_iql_recipes.experiment import progress
from torchrl_iql_recipes.experiment.choices import CONFIG

SLOW = pytest.mark.slow
PROGRESS = re.compile(r".+: +\d+%\|.*\| [\d.]+[kMG]?/[\d.]+[kMG]? \[.*\]")

SAC = [
    "behavior=hopper",
    "frames=40",
    "random_frames=20",
    "frames_per_batch=20",
    "stage_interval=20",
]
ONLINE = [*TINY, "temperature=3", "env_steps=20", "collector.frames_per_batch=10"]


def run(folder: Path, script: str, *overrides: str) -> str:
    """Run a script; check that it printed progress alone, and no word of TorchRL's log.

    Returns:
        the last that it printed of that.
    """
    command = [sys.executable, str(CONFIG.parent / script), *overrides]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in re.split(r"[\r\n]", ended.stderr) if line.strip()]
    assert [line for line in lines if not PROGRESS.fullmatch(line.strip())] == []
    assert "[torchrl]" not in ended.stdout
    return lines[-1]


def test_a_bar_in_a_log_moves_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("IQL", 0, 60) as bar:
        for _ in range(60):
            time.sleep(0.01)
            bar.update()
    states = [each for each in capsys.readouterr().err.split("\r") if each.strip()]
    assert len(states) <= 2 and "60.0/60.0" in states[-1]  # how it began, and how it ended


@pytest.mark.parametrize(
    "settings",
    [
        "temperature=3 eval_workers=1",
        pytest.param("temperature=3 compute.execution=auto", marks=SLOW),
        pytest.param("algorithm=bc compute.execution=auto", marks=SLOW),
        pytest.param("algorithm=td3bc compute.execution=auto", marks=SLOW),
    ],
)
def test_offline(maze_id: str, tmp_path: Path, settings: str) -> None:
    last = run(tmp_path, "offline.py", *TINY, f"dataset={maze_id}", *settings.split(), "name=it")
    (scores,) = tmp_path.glob("runs/**/it/scores.json")
    assert f"score {json.loads(scores.read_text())['replicas'][0]['score']:.1f}" in last


@pytest.mark.slow
@pytest.mark.parametrize("collector", ["sync", "multi_async"])
def test_online(maze_id: str, tmp_path: Path, collector: str) -> None:
    run(tmp_path, "online.py", *ONLINE, f"dataset={maze_id}", f"collector={collector}")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["hopper/medium", "antmaze/umaze", "pointmaze/umaze"])
def test_collect(root: Path, data: str) -> None:
    run(root, "collect.py", f"data={data}", "transitions=200", "id=test/own-v0", "workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_sac(tmp_path: Path, execution: str) -> None:
    sizes = ["actor_sizes=[8]", "critic_sizes=[8]"]
    run(tmp_path, "sac.py", *SAC, *sizes, "eval_episodes=1", f"execution={execution}")
