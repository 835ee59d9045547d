"""What TensorBoard and wandb are left with is metrics.csv, learner by learner, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from runs import TINY, in_tensorboard, rows
from torchrl_iql_recipes.experiment import offline, online, progress
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.loggers import TensorBoard, Wandb
from torchrl_iql_recipes.experiment.records import Records
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

LEARNERS = ("temperature=3.0", "temperature=0.0")
Points = dict[
    str, list[tuple[int, float]]
]  # (step, value) of every metric, as often as it was told

BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            each, marks=pytest.mark.skipif(find_spec(each) is None, reason="not installed")
        )
        for each in ("tensorboard", "wandb")
    ],
)


@pytest.fixture(autouse=True)
def without_a_server_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(Records, "draw", lambda *_, **__: None)


def config(maze_id: str, *overrides: str) -> Settings:
    own = ["temperature=[3.0,0.0]", "steps=12", "log_interval=1"]
    return OFFLINE.settings([*TINY, f"dataset={maze_id}", *own, *overrides])


# --- What was told -------------------------------------------------------------------------------------


def told(backend: str, folder: Path) -> Points:
    return in_tensorboard(folder) if backend == "tensorboard" else in_wandb(folder)


def in_wandb(folder: Path) -> Points:
    found: Points = {}
    for record in records(folder):
        line = {each.nested_key[0]: json.loads(each.value_json) for each in record.history.item}
        for key, value in line.items():
            if not key.startswith("_") and not key.endswith("step"):
                step = line["eval/step" if key.startswith("eval/") else "step"]
                found.setdefault(key, []).append((step, value))
    return {key: sorted(points) for key, points in found.items()}


def records(folder: Path) -> Iterator[Any]:
    """Read the files of wandb, block by block; what was under way when it was killed is left out."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # a run that is finished may still be written
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        content, whole = path.read_bytes(), b""
        for begin in range(0, len(content), 32768):
            block = content[begin or 7 : begin + 32768]
            while len(block) >= 7:
                _, size, kind = struct.unpack("<IHB", block[:7])
                piece, block = block[7 : 7 + size], block[7 + size :]
                if len(piece) < size:
                    break
                whole = piece if kind in (1, 2) else whole + piece
                if kind in (1, 4):
                    yield Record.FromString(whole)


def in_csv(folder: Path, kind: type = float) -> Points:
    found: Points = {}
    for row in rows(folder):
        for key, value in row.items():
            if key != "step" and value != "":
                found.setdefault(key, []).append((int(row["step"]), float(kind(value))))
    return found


def assert_all_was_told_once(backend: str, folder: Path) -> None:
    assert told(backend, folder) == in_csv(
        folder, np.float32 if backend == "tensorboard" else float
    )


# --- Runs ----------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.settings import Settings

values, path, at, metric, learner = json.loads(sys.argv[1])
log = RunFolder.log

def log_or_die(self, step, metrics):
    if step == at and metric in metrics and self.path.name == learner:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, step, metrics)

if __name__ == "__main__":
    RunFolder.log = log_or_die
    offline.run(Settings.of(values), Path(path))
"""


def killed(folder: Path, program: str, *arguments: str) -> None:
    """Run a program that kills itself, from a file: processes that evaluate import it again."""
    script, output = folder / "killed.py", folder / "killed.txt"
    script.write_text(program)
    # A wandb that runs here would be taken for that of the program, and outlive it.
    env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    command = [sys.executable, str(script), *arguments]
    with output.open("w") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=file, start_new_session=True
        )
        process.wait(timeout=300)
    assert process.returncode == -signal.SIGKILL, output.read_text()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # who evaluated for it


@pytest.fixture(scope="module")
def uninterrupted(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    offline.run(config(maze_id), folder)
    return folder


@BACKENDS
@pytest.mark.parametrize(
    ("where", "workers"),
    [
        pytest.param((10, "loss_actor", LEARNERS[1]), 0, id="steps are lost"),
        # Noted after the checkpoint of its step was written; one of the learners knows its own already.
        pytest.param((6, "eval/score", LEARNERS[1]), 1, id="an evaluation", marks=pytest.mark.slow),
    ],
)
def test_a_logger_has_every_step_once_after_a_kill(
    backend: str, where: tuple, workers: int, maze_id: str, uninterrupted: Path, tmp_path: Path
) -> None:
    settings = config(maze_id, f"logger={backend}", f"eval_workers={workers}")
    run = tmp_path / "run"
    killed(tmp_path, KILLED, json.dumps([dict(settings.values), str(run), *where]))
    assert max(int(row["step"]) for row in rows(run / LEARNERS[0])) > 6  # beyond the checkpoint
    offline.run(settings, run)
    for name in LEARNERS:
        assert in_csv(run / name) == in_csv(uninterrupted / name)
        assert_all_was_told_once(backend, run / name)
    before = {name: told(backend, run / name) for name in LEARNERS}
    offline.run(settings, run)  # it is over: evaluated again, for its results
    assert {name: told(backend, run / name) for name in LEARNERS} == before


@BACKENDS
def test_a_run_that_starts_anew_forgets_what_was_told_before_its_first_checkpoint(
    backend: str, maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, log = config(maze_id, f"logger={backend}"), RunFolder.log

    def log_some(self: RunFolder, step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt  # a second one: nothing more is done
        log(self, step, metrics)

    monkeypatch.setattr(RunFolder, "log", log_some)
    with pytest.raises(KeyboardInterrupt):
        offline.run(settings, tmp_path)
    monkeypatch.setattr(RunFolder, "log", log)
    assert told(backend, tmp_path / LEARNERS[0])["loss_actor"][-1][0] == 4
    offline.run(settings, tmp_path)
    for name in LEARNERS:
        assert_all_was_told_once(backend, tmp_path / name)


@BACKENDS
def test_fine_tuning_has_a_run_of_its_own_after_that_of_its_offline_phase(
    backend: str, maze_id: str, tmp_path: Path
) -> None:
    own = [f"dataset={maze_id}", "temperature=3", "env_steps=20", "collector.frames_per_batch=10"]
    online.run(ONLINE.settings([*TINY, *own, f"logger={backend}"]), tmp_path)
    assert in_csv(tmp_path).keys() >= {"frames", "loss_actor", "eval/score"}
    for folder in (tmp_path / "offline", tmp_path):
        assert_all_was_told_once(backend, folder)


@pytest.mark.parametrize("clock", [0, -3600], ids=["within a second", "on a clock that is behind"])
def test_event_files_are_read_in_the_order_they_were_written_in(
    clock: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    now = time.time()
    for again in range(3):  # killed in its fourth step, with a checkpoint of its second
        monkeypatch.setattr(time, "time", lambda again=again: now + clock * again)
        monkeypatch.setattr(os, "getpid", lambda again=again: 900 - again)  # next in the names
        last = 2 * again
        folder = RunFolder(tmp_path)
        folder.return_to(last)
        logger = TensorBoard(tmp_path, last)
        folder.tell(logger)
        for step in range(last + 1, last + 5):
            folder.log(step, {"loss": step + 0.25 * again})
        logger.close()
    assert in_tensorboard(tmp_path) == in_csv(tmp_path)
    assert [step for step, _ in in_csv(tmp_path)["loss"]] == list(range(1, 9))


# --- wandb ---------------------------------------------------------------------------------------------


def test_a_run_of_wandb_is_one_learner_with_its_settings(maze_id: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings = config(maze_id, "logger=wandb", "task=pointmaze/umaze")
    path = tmp_path / "umaze/2026-01-31_10-00-00"
    offline.run(settings, path)
    offline.run(settings, path)
    ids = set()
    for learner in settings.learners:
        run, again = (each.run for each in records(path / learner.name) if each.HasField("run"))
        assert run.run_id == again.run_id
        assert run.display_name == f"IQL {learner.name} pointmaze/umaze"
        assert run.run_group == f"{tmp_path.name}/umaze/2026-01-31_10-00-00"
        known = {each.key: json.loads(each.value_json) for each in run.config.update}
        assert settings.of_learner(learner).items() <= known.items()
        codes = [
            each.exit.exit_code for each in records(path / learner.name) if each.HasField("exit")
        ]
        assert codes == [0, 0]
        ids.add(run.run_id)
        assert_all_was_told_once("wandb", path / learner.name)  # evaluated twice: it was over
    assert len(ids) == 2


def test_a_run_that_fails_is_closed_as_failed(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")

    def fail(*_: object) -> None:
        raise FloatingPointError("in the middle")

    monkeypatch.setattr(offline.TrainStep, "run", fail)
    with pytest.raises(RuntimeError, match="FloatingPointError: in the middle"):
        offline.run(config(maze_id, "logger=wandb"), tmp_path)
    for name in LEARNERS:
        codes = [each.exit.exit_code for each in records(tmp_path / name) if each.HasField("exit")]
        assert codes == [1]


LONG = """
import os, signal, sys, time
from pathlib import Path
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.loggers import Wandb

folder = RunFolder(Path(sys.argv[1]))
logger = Wandb(folder.path, "name", "group", {})
folder.tell(logger)
for step in range(1, 601):
    folder.log(step, {"loss": step / 3})
    if step % 10 == 0:
        folder.log(step - 5, {"eval/score": step / 7})
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_of_a_long_run_that_was_killed_wandb_is_sent_what_it_lacks(tmp_path: Path) -> None:
    """Its files are written in pieces, so that a kill leaves the first ones, and the rest of no step."""
    pytest.importorskip("wandb")
    killed(tmp_path, LONG, str(tmp_path))
    folder = RunFolder(tmp_path)
    kept = in_wandb(tmp_path)
    assert 0 < len(kept["loss"]) < 600
    logger = Wandb(tmp_path, "name", "group", {})
    folder.tell(logger)
    folder.log(601, {"loss": 0.5})
    logger.close()
    assert in_wandb(tmp_path) == in_csv(tmp_path)


# --- What is shown -------------------------------------------------------------------------------------


def shown(*overrides: str) -> str:
    """Return the figures of a run whose learners score 0.0, 1.0, ..., with losses 0.5, 1.5, ...."""
    settings = OFFLINE.settings(list(overrides))
    scores = [float(i) for i in range(len(settings.learners))]
    return progress.figures(settings, {"value": [0.5 + score for score in scores]}, scores)


@pytest.mark.parametrize(
    ("overrides", "figures"),
    [
        (["temperature=3"], "score 0.0; value 0.5"),
        (["temperature=3", "seeds=[5,6]"], "score by seed 5: 0.0, 6: 1.0; value 1"),
        (["temperature=3", "seeds=[0,1,2,3,4,5,6]"], "score 3.0 (7 seeds); value 3.5"),
        (["temperature=[10,0]"], "score by temperature 10: 0.0, 0: 1.0"),
        (["temperature=[10,0]", "seeds=[0,1]"], "score by temperature 10: 0.5, 0: 2.5 (2 seeds)"),
        (["temperature=[1,2,3,4,5,6]"], "best by temperature 4: 3.0, 5: 4.0, 6: 5.0"),
        (["temperature=[1,3]", "expectile=[0.5,0.9]"], "best by expectile/temperature 0.9/3: 3.0"),
    ],
)
def test_the_progress_bar_shows_no_mean_over_different_settings(
    overrides: list[str], figures: str
) -> None:
    assert shown(*overrides) == figures


@pytest.mark.parametrize("algorithm", ["iql", "onestep"])
def test_the_progress_bar_is_a_line_of_100_columns(algorithm: str) -> None:
    settings = OFFLINE.settings([f"algorithm={algorithm}", "temperature=[10,0]"])
    figures = progress.figures(settings, {}, [1234.5, -1234.5])
    line = tqdm.format_meter(
        450_000, 1_000_000, 7200, prefix=settings.algorithm.title, unit="step", unit_scale=True, ncols=100,
        postfix=figures,
    )  # fmt: skip
    assert len(line) <= 100 and figures in line


def test_before_any_score_losses_of_equal_learners_are_shown() -> None:
    losses = {"actor": [1.0, 2.0], "value": [0.25, 0.5]}
    alike = OFFLINE.settings(["temperature=3", "seeds=[0,1]"])
    assert progress.figures(alike, losses, None) == "actor 1.5, value 0.375"
    assert progress.figures(OFFLINE.settings(["temperature=[10,0]"]), losses, None) == ""


@pytest.mark.parametrize("clip", [1e-30, 1e6])
def test_the_first_line_of_a_run_says_how_many_weights_are_clipped(
    clip: float, maze_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(maze_id, f"weight_clip={clip}", "eval_episodes=0", "log_interval=2")
    offline.run(settings, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "weight_clip" in line]
    for line, name in zip(lines, LEARNERS, strict=True):
        share = float(rows(tmp_path / name)[0]["clip_fraction"])
        assert line.startswith(
            f"after 2 steps {share:.0%} of IQL's weights reach weight_clip={clip:g} "
        )
        assert f"at temperature {3 if name == LEARNERS[0] else 0}" in line
        assert ("; give a smaller temperature" in line) == (share > 0.2) == (clip < 1)
    offline.run(settings, tmp_path)
    assert "weight_clip" not in capsys.readouterr().out


def test_an_algorithm_without_weights_says_nothing_of_them(
    maze_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = OFFLINE.settings([*TINY, f"dataset={maze_id}", "algorithm=bc", "eval_episodes=0"])
    offline.run(settings, tmp_path)
    assert "weight" not in capsys.readouterr().out
