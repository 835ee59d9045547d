"""What happens to a run that somebody else wants the folder of, that fails, or that is ended."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from runs import SMALL, TINY, of_maze, rows
from torchrl_iql import Evaluation, Evaluator, checkpoint
from torchrl_iql_recipes import files
from torchrl_iql_recipes.experiment import evaluations, lock, offline, online
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.records import Records
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.stopping import EXIT_CODES, Stopped, stoppable
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE
from torchrl_iql_recipes.reporting import text

RECIPES = CONFIG.parent
NEVER = "steps=10000000"


def config(maze_id: str, *overrides: str) -> Settings:
    return OFFLINE.settings([*SMALL, *of_maze([f"dataset={maze_id}", "temperature=3", *overrides])])


def start(
    folder: Path, maze_id: str, *overrides: str, script: str = "offline.py"
) -> subprocess.Popen:
    """Start a recipe in a working directory, as on the command line."""
    own = [*SMALL, *of_maze([f"dataset={maze_id}", "temperature=3"])] if maze_id else []
    command = [sys.executable, str(RECIPES / script), *own, *overrides]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- The folder --------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from torchrl_iql_recipes.experiment.lock import new_folder
with new_folder(Path(sys.argv[1]), named=False) as folder:
    (folder / "metrics.csv").touch()
    print(folder.name, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(path: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_runs_that_want_the_same_name_have_folders_of_their_own(tmp_path: Path) -> None:
    processes = [holding(tmp_path / "run", 3) for _ in range(3)]
    names = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert names == {"run", "run-2", "run-3"}
    with lock.new_folder(tmp_path / "run", named=False) as folder:  # nobody holds them any more
        assert folder.name == "run-4"


def test_a_folder_belongs_to_one_process_until_that_dies(tmp_path: Path) -> None:
    with running(holding(tmp_path / "run", 60)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        expected = f"run belongs to process {process.pid} on {lock.socket.gethostname()}, which is"
        with pytest.raises(lock.LockedError, match=expected), lock.held(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with (
            lock.held(tmp_path / "run"),
            lock.held(tmp_path / "run"),
        ):  # in one process as often as it likes
            assert json.loads((tmp_path / "run/.holder").read_text())["pid"] == os.getpid()
        assert not (tmp_path / "run/.holder").exists()


@pytest.mark.parametrize(("age", "dead"), [(200, False), (400, True)])
def test_a_process_on_another_host_is_dead_without_a_heartbeat_for_five_minutes(
    age: float, dead: bool, tmp_path: Path
) -> None:
    holder = tmp_path / ".holder"
    holder.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    os.utime(holder, (time.time() - age,) * 2)
    if dead:
        with lock.held(tmp_path):
            assert json.loads(holder.read_text())["host"] != "elsewhere"
        return
    with pytest.raises(lock.LockedError, match="process 1 on elsewhere"), lock.held(tmp_path):
        pass
    assert json.loads(holder.read_text())["host"] == "elsewhere"


def test_a_process_shows_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with lock.held(tmp_path):
        os.utime(tmp_path / ".holder", (0, 0))
        time.sleep(0.5)
        assert (tmp_path / ".holder").stat().st_mtime > 1


def test_a_folder_that_can_not_be_written_to_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(SettingsError, match="/proc/run can not be written to"),
        lock.held(Path("/proc/run")),
    ):
        pass


def test_a_run_is_refused_where_another_process_is_at_work(maze_id: str, tmp_path: Path) -> None:
    offline.run(config(maze_id), tmp_path / "run")
    code = (
        "import sys, time, torchrl_iql_recipes.experiment.lock as lock; from pathlib import Path\n"
    )
    code += "with lock.held(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with running(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(SettingsError, match=f"belongs to process {holder.pid} on "):
            offline.run(config(maze_id, "steps=90"), tmp_path / "run")
    assert offline.run(config(maze_id, "steps=90"), tmp_path / "run")["replicas"][0]["steps"] == 90


@pytest.fixture(scope="module")
def named(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory with a run that has a name."""
    folder = tmp_path_factory.mktemp("named")
    process = start(folder, maze_id, "name=mine")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["name=mine"],
            r"holds this run already: resume=.*mine goes on with it, or give another name",
        ),
        (
            ["name=mine", "steps=90"],
            r"holds this run already: resume=.*mine steps=90 goes on with it",
        ),
        (["name=mine", "steps=5"], r"holds this run already, with steps=\d+: give another name"),
        (
            ["name=mine", "seeds=5", "expectile=0.6"],
            r"holds a run with expectile=0.9, seeds=0, not expectile=0.6, seeds=5: begin a new run, of "
            r"another name=; checkpoint=",
        ),
        (  # of which no checkpoint is the beginning
            ["name=mine", "expectile=[0.6,0.9]"],
            r"not expectile=\[0.6,0.9\]: begin a new run, of another name=$",
        ),
        (["hydra.run.dir=runs/pointmaze/stitch/mine"], "holds this run already"),
        (["name=../mine"], r"name=\.\./mine: expected the name of a folder"),
        (["name=mine", "resume=runs/pointmaze/stitch/mine"], "goes on with one run, in its folder"),
        (["resume=runs/pointmaze/stitch/mine/last.ckpt"], "last.ckpt: is a file, give its folder"),
        (["resume=runs/pointmaze/stitch/yours"], "yours: there is no such folder"),
        (
            ["resume=runs/pointmaze/stitch/mine", "steps=90", "--cfg", "job"],
            "--cfg: resume=.*mine goes on with a run, without options",
        ),
    ],
)
def test_only_resume_resumes(given: list[str], message: str, named: Path, maze_id: str) -> None:
    run = named / "runs/pointmaze/stitch/mine"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    process = start(named, "" if "resume" in str(given) else maze_id, *given)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert re.search(message, errors), errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


def test_a_run_from_a_checkpoint_can_have_a_name(named: Path) -> None:
    path = named / "runs/pointmaze/stitch/mine/last.ckpt"
    expected = OFFLINE.settings([f"checkpoint={path}", "discount=0.9"])
    assert OFFLINE.settings([f"checkpoint={path}", "discount=0.9", "name=yours"]) == expected


def test_a_failed_start_leaves_no_folder(maze_id: str, tmp_path: Path) -> None:
    process = start(tmp_path, maze_id, "env=CartPole-v1")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "CartPole-v1 has" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_failed_start_leaves_what_was_there(named: bool, tmp_path: Path) -> None:
    def start_and_fail(folder: Path) -> None:
        with lock.new_folder(folder, named=named) as held:
            for name in ("config.yaml", "data.json"):
                (held / name).write_text("of the run")
            (held / "checkpoints").mkdir()
            raise SettingsError("refused")

    for name in ("config.yaml", "data.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        (folder / "empty").mkdir()
        message = f"has a {name} that no run has left" if named else "refused"
        with pytest.raises(SettingsError, match=message):
            start_and_fail(folder)
        assert sorted(path.name for path in folder.iterdir()) == [name, "empty"]
        assert (folder / name).read_text() == "mine"
        assert not folder.with_name(f"{name}-2").exists()
    (tmp_path / "notes/empty").mkdir(parents=True)
    (tmp_path / "notes/notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="refused"):
        start_and_fail(tmp_path / "notes")
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == ["empty", "notes.txt"]
    (tmp_path / "killed").mkdir()
    for name in (lock.LOCK, "config.yaml"):  # what a run that was killed at once has left
        (tmp_path / "killed" / name).touch()
    with pytest.raises(SettingsError, match="refused"):
        start_and_fail(tmp_path / "killed")
    assert not any((tmp_path / "killed").iterdir())


def test_a_config_of_something_else_is_not_overwritten(maze_id: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("servers: 3\n")
    with pytest.raises(SettingsError, match="holds another kind of run, with servers"):
        offline.run(config(maze_id), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "servers: 3\n"


def test_on_other_data_a_run_does_not_go_on(plant: list[str], tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "plant.hdf5"
    offline.run(OFFLINE.settings([*plant, "validation=0.4"]), run)
    assert offline.run(OFFLINE.resumed(run, ["steps=21"]), run)["replicas"][0]["steps"] == 21
    (run / "data.json").write_text("{}")  # of an earlier version, that said less
    offline.run(OFFLINE.resumed(run, ["steps=24"]), run)
    kept = {path: path.read_bytes() for path in run.glob("*.*")}
    with h5py.File(file, "a") as data:
        data["rewards"][:] = 2.0  # pyright: ignore
    message = "mean of returns 99, not 198, .*: checkpoint=.*/run/last.ckpt begins a new run"
    with pytest.raises(SettingsError, match=message):
        offline.run(OFFLINE.resumed(run, ["steps=27"]), run)
    assert {path: path.read_bytes() for path in run.glob("*.*")} == kept
    for checkpoint_ in [*run.rglob("*.ckpt"), *run.rglob("*.torchrl")]:
        checkpoint_.unlink()
    offline.run(OFFLINE.resumed(run, ["steps=27"]), run)  # from the beginning


def test_the_script_that_a_run_is_of_is_named(named: Path) -> None:
    with pytest.raises(SettingsError, match=r"not one of online.py, but of offline.py"):
        ONLINE.stored(named / "runs/pointmaze/stitch/mine")


# --- The end -----------------------------------------------------------------------------------------------


def test_signals_are_requests_where_a_run_is_patient() -> None:
    with stoppable() as stop, stop.patient():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster's may come twice
        begun: list[int] = []
        stop.at_once(lambda: begun.append(1))
        assert not begun
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stoppable() as stop, stoppable() as same, pytest.raises(Stopped):
        assert stop is same
        os.kill(os.getpid(), signal.SIGUSR1)


def test_what_a_run_waits_for_is_left_at_once() -> None:
    with stoppable() as stop, stop.patient():
        began = time.monotonic()
        stop.at_once(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)))  # pyright: ignore
        assert time.monotonic() - began < 2
        assert stop.requested == "SIGTERM"


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", *(pytest.param(each, marks=pytest.mark.slow) for each in ("SIGINT", "SIGUSR1"))],
)
def test_a_signal_saves_and_says_so(name: str, maze_id: str, tmp_path: Path) -> None:
    process = start(tmp_path, maze_id, "name=x", NEVER, "eval_interval=1000000")
    run = tmp_path / "runs/pointmaze/stitch/x"
    wait_for(run / "metrics.csv", process)
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODES[name], errors
    assert "Continue with: python recipes/offline.py resume=runs/pointmaze/stitch/x" in output
    assert "Traceback" not in errors
    (replica,) = json.loads((run / "scores.json").read_text())["replicas"]
    assert replica["interrupted"]
    assert checkpoint.load_metadata(run / "last.ckpt")["steps"] == replica["steps"] > 0


# --- Evaluations that fail ---------------------------------------------------------------------------------


class Plant(gymnasium.Env):
    """Fails at a call of step, or never ends."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    fails: set[int] = set()
    """Which of the environments made fail, by their number."""
    made = 0
    takes = 0.0
    """Seconds of a step."""

    def __init__(self) -> None:
        self.number = Plant.made
        Plant.made += 1

    def reset(self, **_: Any) -> tuple[np.ndarray, dict]:
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.number in self.fails:
            raise OSError("the simulator is lost")
        time.sleep(self.takes)
        return np.zeros(3, np.float32), 1.0, False, False, {}


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[list[str]]:
    """Return the settings of a run on data of an environment that may fail."""
    generator, n = np.random.default_rng(0), 300
    with h5py.File(tmp_path / "plant.hdf5", "w") as file:
        file["observations"] = generator.normal(size=(n, 3)).astype(np.float32)
        file["actions"] = generator.uniform(-1, 1, size=(n, 2)).astype(np.float32)
        file["rewards"] = np.ones(n, np.float32)
        file["terminals"] = np.zeros(n, bool)
        file["timeouts"] = np.arange(1, n + 1) % 100 == 0
    gymnasium.register("LifePlant-v0", Plant)
    Plant.fails, Plant.made, Plant.takes = set(), 0, 0.0
    data, env = tmp_path / "plant.hdf5", "env={id:LifePlant-v0,max_episode_steps:5}"
    yield [*TINY, f"dataset={data}", env, "steps=18", "temperature=3"]
    del gymnasium.registry["LifePlant-v0"]


FIRST = 2
"""The number of the environment of the first evaluation: others are made for the spaces and the trial."""


def test_after_an_evaluation_that_failed_training_goes_on(
    plant: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Plant.fails = {FIRST}
    scores = offline.run(OFFLINE.settings(plant), tmp_path / "run")
    told = "the evaluation after 6 steps failed: OSError: the simulator is lost; training goes on"
    assert told in capsys.readouterr().err
    lines = {
        row["step"]: (row["eval/failed"], row["eval/length"]) for row in rows(tmp_path / "run")
    }
    assert lines["6"] == ("1.0", "")
    assert lines["12"] == lines["18"] == ("", "5.0")
    assert scores["replicas"][0]["return"] == 5


def test_where_all_evaluations_failed_a_run_has_no_score_until_it_is_resumed(
    plant: list[str], tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", OFFLINE.settings([*plant, "seeds=[0,1]"])
    Plant.fails = {*range(FIRST, 99)}
    scores = offline.run(settings, run)
    assert [each["interrupted"] for each in scores["replicas"]] == [False] * 2
    assert not any(
        {"score", "return", "return_stderr"} & each.keys() for each in scores["replicas"]
    )
    assert "summary" not in scores
    told = offline.report(scores, run, settings)
    assert (
        "The last evaluation of seed=0 and 1 more failed: no score. python recipes/offline" in told
    )
    assert "return" not in told
    Plant.fails = set()
    (summary,) = offline.run(OFFLINE.resumed(run, []), run)["summary"]
    assert (summary["score"], summary["seeds"]) == (5, 2)


def test_learners_whose_last_evaluation_failed_are_left_out(
    plant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, seeds = Evaluator.__call__, []

    def fails(self: Evaluator, *arguments: Any, **more: Any) -> Evaluation:
        seeds.append(self.seed)
        if len(seeds) > 4 and self.seed == evaluations.SEED + 1:
            raise OSError("the simulator is lost")
        return call(self, *arguments, **more)

    monkeypatch.setattr(Evaluator, "__call__", fails)
    settings = OFFLINE.settings([*plant, "seeds=[0,1]"])
    scores = offline.run(settings, tmp_path)
    assert [each.get("score") for each in scores["replicas"]] == [5, None]
    assert [(each["score"], each["seeds"]) for each in scores["summary"]] == [(5, 1)]
    told = offline.report(scores, tmp_path, settings)
    assert "return 5.0 (one seed)" in told
    assert "The last evaluation of seed=1 failed: no score" in told
    lines = "\n".join(text.table([tmp_path]))
    assert "| IQL | 5.0 | 1 |" in lines
    assert "1 learner is not finished, or not evaluated" in lines
    # An earlier version left the score of the evaluation before.
    old = json.loads((tmp_path / "scores.json").read_text())
    old["replicas"][1] |= {"score": 5.0, "evaluated_after": 12}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    assert "| IQL | 5.0 | 1 |" in "\n".join(text.table([tmp_path]))


def test_a_run_that_is_stopped_in_its_last_evaluation_is_not_finished(
    plant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = Evaluator.__call__, []

    def interrupted(self: Evaluator, *arguments: Any, **more: Any) -> Evaluation:
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return call(self, *arguments, **more)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    (its,) = offline.run(OFFLINE.settings(plant), tmp_path)["replicas"]
    assert (its["steps"], its["interrupted"], its["evaluated_after"]) == (18, True, 12)
    (its,) = offline.run(OFFLINE.resumed(tmp_path, []), tmp_path)["replicas"]
    assert (its["interrupted"], its["evaluated_after"], its["score"]) == (False, 18, 5)


def test_an_evaluation_that_failed_can_end_the_run(plant: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    Plant.fails = {FIRST, FIRST + 1}
    expected = r"after 6 steps failed: OSError: the simulator is lost\nsaved are 6 of the 6 steps .*resume="
    with pytest.raises(RuntimeError, match=expected):
        offline.run(OFFLINE.settings([*plant, "on_eval_failure=stop"]), run)
    Plant.fails = set()
    offline.run(OFFLINE.resumed(run, []), run)
    assert [row["eval/length"] for row in rows(run) if row["eval/length"]] == ["5.0"] * 3


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_evaluation_that_does_not_end_costs_nothing(
    workers: int, plant: list[str], tmp_path: Path
) -> None:
    """It ends within two seconds of a signal, and the run goes on with it."""
    folder = tmp_path / "never"
    folder.mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import gymnasium, test_life
test_life.Plant.takes = 60.0
gymnasium.register("LifePlant-v0", test_life.Plant)
sys.argv = ["offline.py", *sys.argv[1:]]
from offline import OFFLINE, run
OFFLINE.open(run, "")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RECIPES), *sys.path])}
    command = [sys.executable, "-c", code, *plant, "name=x", f"eval_workers={workers}"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = folder / "runs/own/plant/x"
    wait_for(run / "last.ckpt", process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    # Two seconds, and the interpreter's end on a busy machine; a step of this environment takes 60.
    assert time.monotonic() - began < 30
    assert "Traceback" not in errors
    saved = checkpoint.load_metadata(run / "last.ckpt")
    # With a worker, the run may have come to the next one, and wait.
    assert saved["unevaluated"] in ([6], [6, 12][: 1 + workers])
    offline.run(OFFLINE.resumed(run, ["eval_workers=0"]), run)
    assert [row["step"] for row in rows(run) if row["eval/length"]] == ["6", "12", "18"]


def test_of_a_round_that_was_under_way_the_policies_are_played(
    plant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is stopped some steps after a round began: resumed, the round is that of then."""
    played: list[dict[str, torch.Tensor]] = []
    call = Evaluator.__call__

    def noted(self: Evaluator, policy: Any, **more: Any) -> Evaluation:
        played.append({key: value.clone() for key, value in policy.state_dict().items()})
        return call(self, policy, **more)

    monkeypatch.setattr(Evaluator, "__call__", noted)
    monkeypatch.setattr(
        "torchrl_iql_recipes.experiment.build.Evaluator.step_limit", 5, raising=False
    )
    settings = OFFLINE.settings(plant)
    offline.run(settings, tmp_path / "whole")
    expected = list(played)
    played.clear()
    take_steps = offline.TrainStep.run

    def stop_at_nine(self: offline.TrainStep, minibatches: Any, steps: int) -> Any:
        if self.steps == 6:  # the round has been started, but is not over
            os.kill(os.getpid(), signal.SIGTERM)
        return take_steps(self, minibatches, steps)

    with monkeypatch.context() as patched:
        patched.setattr(offline.TrainStep, "run", stop_at_nine)
        patched.setattr(
            Records, "evaluated", lambda self, *, wait=False: None
        )  # as if it lasted: nobody takes note
        scores = offline.run(settings, tmp_path / "run")
    assert scores["replicas"][0]["steps"] == 9
    assert checkpoint.load_metadata(tmp_path / "run/last.ckpt")["unevaluated"] == [6]
    played.clear()
    offline.run(settings, tmp_path / "run")
    assert len(played) == 3
    for one, other in zip(played, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# --- Failures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the scores of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, offline.run(config(maze_id), folder)


@pytest.mark.parametrize(
    "when",
    ["log", "step", *(pytest.param(x, marks=pytest.mark.slow) for x in ("save", "evaluate"))],
)
def test_whatever_fails_leaves_the_last_good_state(
    when: str, whole: Any, maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = config(maze_id), tmp_path / "run"
    folder, expected = whole
    owner, name = {
        "log": (RunFolder, "log"),
        "save": (checkpoint, "save"),
        "evaluate": (Evaluator, "__call__"),
        "step": (offline.TrainStep, "run"),
    }[when]
    does, calls = getattr(owner, name), []
    failing = 1 if when == "log" else 2  # nothing is saved before the first line

    def fails(*arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == failing:
            raise TypeError("something is missing")
        return does(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        if when == "evaluate":
            offline.run(settings, run)
        else:
            with pytest.raises(RuntimeError, match="TypeError: something is missing\n") as error:
                offline.run(settings, run)
            steps = {"log": 20, "save": 60, "step": None}[when]
            where = (
                "nothing is saved"
                if steps is None
                else f"saved are {steps} of the {steps} steps taken"
            )
            assert where in str(error.value)
    if when == "evaluate":  # the second is the one of the end
        assert [row["eval/failed"] for row in rows(run)][-1] == "1.0"
    assert offline.run(settings, run) == expected
    lines = [{k: v for k, v in row.items() if k != "eval/failed"} for row in rows(run)]
    # The line that could not be written is not known later.
    assert lines == [row for row in rows(folder) if when != "log" or row["step"] != "20"]


def test_a_full_disk_ends_a_run_with_what_was_saved(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(maze_id, "log_interval=1", "decay_steps=60")
    offline.run(config(maze_id, "log_interval=1", "decay_steps=60", "steps=30"), tmp_path)
    size = (tmp_path / "metrics.csv").stat().st_size
    resumed = OFFLINE.resumed(tmp_path, ["steps=60"])
    take_steps = offline.TrainStep.run

    def fill(self: offline.TrainStep, minibatches: Any, steps: int) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, resource.RLIM_INFINITY))
        return take_steps(self, minibatches, steps)

    message = (
        r"File too large.*\nsaved are 30 of the \d+ steps taken \(could not write the checkpoint"
    )
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match=message):
        patched.setattr(offline.TrainStep, "run", fill)
        try:
            offline.run(resumed, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert checkpoint.load_metadata(tmp_path / "last.ckpt")["steps"] == 30
    scores = offline.run(resumed, tmp_path)
    assert scores["replicas"][0]["steps"] == 60
    offline.run(settings, tmp_path / "whole")
    assert rows(tmp_path) == rows(tmp_path / "whole")
    with (tmp_path / "times.csv").open(newline="") as file:
        times = list(csv.DictReader(file))
    assert [row["step"] for row in times] == [row["step"] for row in rows(tmp_path)]
    seconds = [float(row["seconds"]) for row in times]
    assert seconds == sorted(seconds)
    assert all(float(row["updates_per_second"]) > 0 for row in times)


def test_pictures_that_fail_cost_no_scores(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Records, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Records, "draw", stopped)
    for script in (offline, online):
        door = OFFLINE if script is offline else ONLINE
        more = [] if script is offline else ["steps=0", "env_steps=20"]
        asked = [*SMALL, *of_maze([f"dataset={maze_id}", "temperature=3", *more])]
        with pytest.raises(Stopped):
            script.run(door.settings(asked), tmp_path / door.name)
        (its,) = json.loads((tmp_path / door.name / "scores.json").read_text())["replicas"]
        assert not its["interrupted"]


def test_data_that_vanish_while_they_are_streamed_do_no_harm(
    whole: Any, maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    settings = config(maze_id, "compute.streaming=true")
    take_steps = offline.TrainStep.run

    def vanish(self: offline.TrainStep, minibatches: Any, steps: int) -> Any:
        shutil.rmtree(cache_folder)
        cache_folder.mkdir()
        return take_steps(self, minibatches, steps)

    monkeypatch.setattr(offline.TrainStep, "run", vanish)
    assert offline.run(settings, tmp_path / "run") == whole[1]


@pytest.mark.parametrize(("minutes", "kept"), [("1e-9", 2), ("1000", 1)])
def test_checkpoints_are_apart_from_evaluations(
    minutes: str, kept: int, maze_id: str, tmp_path: Path
) -> None:
    offline.run(config(maze_id, "eval_interval=60", f"checkpoint_interval={minutes}"), tmp_path)
    # The steps depend on the machine: when the clock is looked at does.
    steps = sorted(RunFolder(tmp_path).checkpoints())
    assert (len(steps), steps[-1]) == (kept, 60)


def test_a_clock_that_is_set_back_changes_nothing(
    whole: Any, maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(maze_id, "eval_interval=60", "checkpoint_interval=1e-9")
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    offline.run(settings, tmp_path)
    assert len(RunFolder(tmp_path).checkpoints()) == 2
    assert rows(tmp_path)[-1] == rows(whole[0])[-1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text("before")
    with pytest.raises(OSError), files.whole(file) as new:
        new.write_text("ha")
        raise OSError
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
    with files.whole(file) as new:
        new.write_text("after")
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync, synced = tmp_path / "a.json", os.fsync, []

    def noted(handle: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with files.whole(path) as new:
        new.write_text("2")
    assert synced == [(str(new), False), (str(tmp_path), True)]


def test_files_that_differ_in_their_suffix_are_written_at_once(tmp_path: Path) -> None:
    with files.whole(tmp_path / "a.json") as one, files.whole(tmp_path / "a.csv") as another:
        one.write_text("one")
        another.write_text("another")
    assert (tmp_path / "a.json").read_text() == "one"
    assert (tmp_path / "a.csv").read_text() == "another"
