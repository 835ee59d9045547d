"""The offline recipe as its users run it: real data, real environments, real interruptions."""

from __future__ import annotations

import dataclasses
import json
import os
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
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict
from omegaconf import OmegaConf
from tensordict import TensorDict

from runs import SMALL, TINY, of_maze, rows
from torchrl_iql import Evaluator, OfflineDataset, checkpoint, load_dataset, load_policy
from torchrl_iql.data import Minibatches
from torchrl_iql_recipes.algorithms.iql import IQL
from torchrl_iql_recipes.experiment import build, offline, online, results
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.networks import architecture_for
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

RECIPES = CONFIG.parent


def config(*overrides: str) -> Settings:
    return OFFLINE.settings([*SMALL, *of_maze(overrides)])


@pytest.fixture(scope="module")
def finished(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    offline.run(config(f"dataset={maze_id}", "seeds=[3,4]"), folder)
    return folder


LEARNERS = [f"temperature={t},seed={seed}" for t in ("10.0", "0.0") for seed in (3, 4)]


def test_a_run_leaves_everything_that_the_readme_lists(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    own = {"scores.json", "times.json", "times.csv", "data.json", "learning_curves.png"}
    assert names == {".lock", "config.yaml", *own, *LEARNERS}
    for folder in map(finished.joinpath, LEARNERS):
        names = {path.name for path in folder.iterdir()}
        pictures = {"learning_curves.png", "value_map.png"}
        assert names == {"metrics.csv", "checkpoints", "last.ckpt", "best.ckpt", *pictures}
        assert [row["step"] for row in rows(folder)] == ["20", "30", "40", "60"]
        assert all(row["loss_value"] for row in rows(folder) if row["step"] != "30")
    stored = OmegaConf.load(finished / "config.yaml")
    assert stored.expectile == 0.9  # resolved: no reference to a group is left
    assert "${" not in (finished / "config.yaml").read_text()


def test_the_scores_are_those_of_the_policies_on_disk(finished: Path, maze_id: str) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    dataset = load_dataset(maze_id)
    assert [each["name"] for each in scores["replicas"]] == LEARNERS
    for each in scores["replicas"]:
        with Evaluator(dataset.env_spec, episodes=2, seed=10_000 + each["seed"]) as evaluate:
            again = evaluate(load_policy(finished / each["name"] / "last.ckpt")).summary()
        assert {name: each[name] for name in again} == again


def test_a_learner_among_others_is_the_one_of_a_run_of_its_own(
    finished: Path, maze_id: str, tmp_path: Path
) -> None:
    offline.run(config(f"dataset={maze_id}", "temperature=0", "seeds=4"), tmp_path)
    assert {"metrics.csv", "last.ckpt"} <= {path.name for path in tmp_path.iterdir()}
    alone = load_policy(tmp_path / "last.ckpt").parameters()
    among = load_policy(finished / "temperature=0.0,seed=4/last.ckpt").parameters()
    assert all(map(torch.equal, alone, among))  # bit for bit, on the CPU


def test_the_summary_is_taken_over_seeds() -> None:
    settings = {"title": "IQL", "expectile": 0.7}
    scores = [
        {**settings, "temperature": temperature, "seed": seed, "score": score}
        for temperature, values in ((3.0, (1.0, 2.0, 6.0)), (0.0, (4.0,)))
        for seed, score in enumerate(values)
    ]
    three, one = results.summaries(scores, ["expectile", "temperature"])
    expected = {**settings, "temperature": 3.0, "seeds": 3, "score": 3.0}
    assert three == {**expected, "ci95": three["ci95"]}
    # Student's t for 2 degrees of freedom, times the standard error sqrt(7 / 3).
    assert three["ci95"] == pytest.approx(4.3026527 * 1.5275252)
    assert (one["score"], one["seeds"], one["ci95"]) == (4.0, 1, None)


def test_a_grid_is_every_combination_of_what_has_several_values() -> None:
    grid = config("seeds=[0,1]", "expectile=[0.7,0.9]", "temperature=3").learners
    assert [each.name for each in grid] == [
        "expectile=0.7,seed=0",
        "expectile=0.7,seed=1",
        "expectile=0.9,seed=0",
        "expectile=0.9,seed=1",
    ]
    assert {each.algorithm.temperature for each in grid} == {3}
    (single,) = config("temperature=3").learners
    assert single.name == ""


def test_the_settings_reach_the_learners(maze_id: str) -> None:
    overrides = ["weight_clip=7", "discount=0.9", "learning_rate=0.01", "num_qvalue_nets=3"]
    cfg = config("expectile=0.8", "temperature=[2,5]", *overrides)
    dataset = load_dataset(maze_id)
    architecture = architecture_for(cfg.networks, dataset, cfg.algorithm)
    step = build.step_for(cfg.learners, architecture, dataset, cfg.compute, 60)
    for loss, temperature in zip(step.losses, (2, 5), strict=True):
        assert (loss.expectile, loss.temperature, loss.weight_clip) == (0.8, temperature, 7)
        assert loss.num_qvalue_nets == 3
        assert loss.value_estimator.gamma == pytest.approx(0.9)
        mean, _ = dataset.observation_statistics()
        assert torch.equal(loss.value_network.module.normalize.mean, mean)
    assert step.learning_rates()["actor_network"] == [0.01, 0.01]
    assert step.execution == "eager"


def test_the_length_of_the_decay_is_a_setting(maze_id: str) -> None:
    dataset = load_dataset(maze_id)
    rates = {}
    for given in ("decay_steps=null", "decay_steps=0", "decay_steps=4"):
        cfg = config("temperature=3", given)
        architecture = architecture_for(cfg.networks, dataset, cfg.algorithm)
        step = build.step_for(cfg.learners, architecture, dataset, cfg.compute, 8)
        step.run(dataset.minibatches(8, seeds=[0]), 4)
        (rates[given],) = step.learning_rates()["actor_network"]
    assert rates["decay_steps=null"] == pytest.approx(1.5e-4)  # half of the run
    assert rates["decay_steps=0"] == 3e-4
    assert rates["decay_steps=4"] == pytest.approx(0, abs=1e-12)


def test_the_folder_of_a_run_is_named_after_its_task(tmp_path: Path) -> None:
    arguments = ["--cfg", "hydra", "-p", "hydra.run.dir", "task=kitchen/partial"]
    process = start(tmp_path, *arguments)
    output, errors = process.communicate(timeout=60)
    assert output.startswith("runs/kitchen/partial/20"), errors


def test_the_environment_is_an_id_with_arguments() -> None:
    assert build.environment(config("env=null").data.env) is None
    assert build.environment(config("env=Hopper-v5").data.env).id == "Hopper-v5"
    cfg = config("env={id:Hopper-v5,max_episode_steps:7,frame_skip:2}")
    env = gymnasium.make(build.environment(cfg.data.env))
    assert (env.spec.id, env.spec.max_episode_steps) == ("Hopper-v5", 7)
    assert env.unwrapped.frame_skip == 2
    assert gymnasium.spec("Hopper-v5").max_episode_steps == 1000
    assert gymnasium.spec("Hopper-v5").kwargs == {}


def test_several_data_sets_are_joined(maze_id: str) -> None:
    single, joined = (
        build.dataset_for(config(f"dataset={given}").data)
        for given in (maze_id, f"[{maze_id},{maze_id}]")
    )
    assert len(joined.transitions) == 2 * len(single.transitions)
    assert joined.env_spec == single.env_spec


def test_without_evaluation_no_environment_is_needed(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "Evaluator", None)
    cfg = config(f"dataset={maze_id}", "temperature=3", "eval_episodes=0")
    dataset = load_dataset(maze_id, reward="minus_one")
    monkeypatch.setattr(
        build, "load_dataset", lambda *_, **__: dataclasses.replace(dataset, env_spec=None)
    )
    scores = offline.run(cfg, tmp_path)
    (replica,) = scores["replicas"]
    assert (replica["steps"], replica["best"], replica["interrupted"]) == (60, None, False)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert "Not evaluated" in offline.report(scores, Path("folder"), cfg)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "scores.json",
        "times.json",
        "times.csv",
        "data.json",
        "metrics.csv",
        "checkpoints",
        "last.ckpt",
        "learning_curves.png",
    }
    assert offline.run(cfg, tmp_path) == scores  # nothing is left to do
    load_policy(tmp_path / "last.ckpt")


def test_data_without_an_environment_are_refused(maze_id: str) -> None:
    dataset = dataclasses.replace(load_dataset(maze_id), env_spec=None)
    with pytest.raises(ValueError, match=rf"{maze_id} does not .* env=<id>, or eval_episodes=0"):
        build.evaluator_for(config().evaluation, config().data, dataset)


class Shown(gymnasium.Env):
    """Shows pixels, and takes matrices."""

    observation_space = Dict(
        [("z", Box(0, 255, (6, 4, 3), np.uint8)), ("a", Box(0, 255, (2,), np.uint8))]
    )
    action_space = Box(-1, 1, (2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"z": np.zeros((4, 6, 4, 3))}, None),  # bytes, as numbers
        (
            {"z": np.full((4, 6, 4, 3), 0.5)},
            "observations of float32, but Shown shows uint8: give env=",
        ),
        (
            {"z": np.zeros((4, 3, 6, 4), np.uint8)},
            r"observations of shape \[3, 6, 4\], but those of Shown are of \[6, 4, 3\]",
        ),
        (
            {"action": np.zeros((4, 3, 2))},
            r"actions of shape \[3, 2\], but those of Shown are of \[2, 3\]",
        ),
    ],
)
def test_as_many_numbers_that_are_others_are_refused(
    changes: dict[str, np.ndarray], message: str | None
) -> None:
    seen = {"z": np.zeros((4, 6, 4, 3), np.uint8), "a": np.zeros((4, 2), np.uint8), **changes}
    actions = seen.pop("action", np.zeros((4, 2, 3)))
    boxes = {
        key: Box(0, 255, its.shape[1:], its.dtype if its.dtype == np.uint8 else np.float32)
        for key, its in seen.items()
    }
    dataset = OfflineDataset.from_episodes(
        "seen",
        [
            {
                "observations": seen,
                "actions": actions[1:],
                "rewards": np.zeros(3),
                "terminations": np.zeros(3),
            }
        ],
        observation_space=Dict(boxes),
        action_space=Box(-1, 1, actions.shape[1:]),
        env_spec=Shown,
    )
    if message is None:
        build.evaluator_for(config().evaluation, config().data, dataset)
        return
    with pytest.raises(ValueError, match=f"^seen holds {message}"):
        build.evaluator_for(config().evaluation, config().data, dataset)


def test_bytes_are_no_numbers_of_the_environment() -> None:
    dataset = OfflineDataset.from_arrays(
        "bytes",
        observations=np.zeros((4, 3), np.uint8),
        actions=np.zeros((4, 1)),
        rewards=np.zeros(4),
        terminals=np.zeros(4),
        timeouts=np.zeros(4),
        observation_space=Box(0, 255, (3,), np.uint8),
        env_spec="Pendulum-v1",
    )
    message = "bytes holds observations of uint8, but Pendulum-v1 shows float32"
    with pytest.raises(ValueError, match=message):
        build.evaluator_for(config().evaluation, config().data, dataset)


def test_what_does_not_say_enough_is_refused(maze_id: str) -> None:
    with pytest.raises(ValueError, match="dataset=null: expected a Minari id"):
        build.dataset_for(config("dataset=null").data)
    with pytest.raises(ValueError, match=r"env=\{'max_episode_steps': 5\}: expected an id"):
        config(f"dataset={maze_id}", "env={max_episode_steps: 5}")
    cfg = config(f"dataset={maze_id}", "action_bounds=data")
    dataset = build.dataset_for(cfg.data)
    dataset.transitions["action"] = dataset.transitions["action"].clone()
    dataset.transitions["action"][:, 1] = 0.5
    with pytest.raises(
        ValueError, match=rf"action 1 of {maze_id} is always 0.5; give action_bounds"
    ):
        architecture_for(cfg.networks, dataset, cfg.algorithm)


@pytest.mark.parametrize(
    ("env", "sizes"),
    [
        ("Pendulum-v1", "observations of 3 numbers and actions of 1 numbers"),
        ("CartPole-v1", "observations of 4 numbers and actions of 2 choices"),
    ],
)
def test_an_environment_of_another_size_is_refused_before_training(
    maze_id: str, tmp_path: Path, env: str, sizes: str
) -> None:
    ours = f"{maze_id} holds observations of 8 numbers and actions of 2 numbers"
    with pytest.raises(ValueError, match=f"{ours}, but {env} has {sizes}"):
        offline.run(config(f"dataset={maze_id}", f"env={env}"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    small = [] if overrides[0].startswith(("resume=", "--")) else SMALL
    command = [sys.executable, str(RECIPES / "offline.py"), *small, *overrides]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    maze_id: str, tmp_path: Path
) -> None:
    overrides = [f"dataset={maze_id}", "dropout=0.1", "temperature=3", "eval_workers=1"]
    overrides += ["steps=400", "eval_interval=200"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    process = start(tmp_path, *of_maze(overrides), f"hydra.run.dir={halves}")
    deadline = time.monotonic() + 120
    while not (halves / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"resume={halves.name}" in output
    (replica,) = json.loads((halves / "scores.json").read_text())["replicas"]
    assert 0 < replica["steps"] < 400

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
    cfg = config(f"dataset={maze_id}", "seeds=[0,1]", "temperature=3")
    take_steps = offline.TrainStep.run

    def press_ctrl_c(self: offline.TrainStep, minibatches: Minibatches, steps: int) -> TensorDict:
        os.kill(os.getpid(), signal.SIGINT)
        return take_steps(self, minibatches, 1)

    monkeypatch.setattr(offline.TrainStep, "run", press_ctrl_c)
    scores = offline.run(cfg, tmp_path)
    assert all(
        (each["steps"], each["best"], each["interrupted"]) == (1, None, True)
        for each in scores["replicas"]
    )
    assert "summary" not in scores
    assert "resume=folder" in offline.report(scores, Path("folder"), cfg)
    monkeypatch.undo()
    finished = offline.run(cfg, tmp_path)["replicas"]
    assert [each["steps"] for each in finished] == [60, 60]


@pytest.mark.slow
@pytest.mark.parametrize("saved", [1, 3])
def test_a_run_killed_while_its_learners_are_saved_continues(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    """The first checkpoints of two learners are written, then perhaps one of the second ones."""
    cfg = config(f"dataset={maze_id}", "seeds=[0,1]", "temperature=3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = offline.run(cfg, whole)
    save, calls = checkpoint.save, []

    def save_some(*arguments: Any, **more: Any) -> Path:
        calls.append(arguments)
        if len(calls) > saved:
            raise KeyboardInterrupt  # a second one: nothing more is done
        return save(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        offline.run(cfg, killed)
    monkeypatch.undo()
    steps = [sorted(RunFolder(killed / f"seed={s}").checkpoints()) for s in (0, 1)]
    assert steps == ([[30], []] if saved == 1 else [[30, 60], [30]])
    assert offline.run(cfg, killed) == expected
    for name in ("seed=0", "seed=1"):
        assert rows(killed / name) == rows(whole / name)
        ends = (load_policy(each / name / "last.ckpt").parameters() for each in (killed, whole))
        assert all(map(torch.equal, *ends))


def test_what_cannot_be_resumed_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, "resume=nowhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors == "offline.py: resume=nowhere: there is no such folder\n"


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 1000 bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_keeps_the_metrics_that_are_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(200):
        folder.log(step, {"loss": 0.125})
    before = folder.metrics.read_text()
    with full_disk(), pytest.raises(OSError):
        folder.log(200, {"loss": 0.125, "score": 1.0})  # a new column
    assert folder.metrics.read_text() == before


@pytest.mark.parametrize("kept", ["1500,1.0,150", "1500,1.0,", "1500,", "15", ""])
def test_a_line_that_was_cut_is_left_out(kept: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (500, 1000, 1500):
        folder.log(step, {"loss": 1.0, "eval/score": step / 10})
    text = folder.metrics.read_text()
    folder.metrics.write_text(text[: text.index("1500,1.0,150.0")] + kept)
    again = RunFolder(tmp_path)
    assert again.best_row() == {"score": 100.0, "step": 1000}
    again.return_to(1500)
    again.log(1500, {"loss": 1.0, "eval/score": 150.0})
    assert folder.metrics.read_text() == text


def test_a_run_that_starts_anew_forgets_what_was_killed_before_its_first_checkpoint(
    maze_id: str, tmp_path: Path
) -> None:
    cfg = config(f"dataset={maze_id}", "seeds=0", "temperature=3")
    build.claim(tmp_path, cfg)
    RunFolder(tmp_path).log(7, {"loss_value": 1.0})
    offline.run(OFFLINE.resumed(tmp_path, []), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["20", "30", "40", "60"]


def test_a_folder_of_another_run_is_not_taken_over(maze_id: str, tmp_path: Path) -> None:
    offline.run(config(f"dataset={maze_id}", "temperature=3"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    for given in ("learning_rate=0.01", "seeds=7"):
        other = config(f"dataset={maze_id}", "temperature=3", given)
        name = given.partition("=")[0]
        expected = (
            f"holds a run with {name}=.*, not {given}: begin a new run, of another name=; "
            f"checkpoint=.*/last.ckpt {given} begins it"
        )
        with pytest.raises(ValueError, match=expected):
            offline.run(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_what_the_other_learners_have_is_not_deleted(maze_id: str, tmp_path: Path) -> None:
    cfg = config(f"dataset={maze_id}", "seeds=[0,1]", "temperature=3")
    offline.run(cfg, tmp_path)
    shutil.rmtree(tmp_path / "seed=1")
    with pytest.raises(SettingsError, match=r"no checkpoint of the same step .*seed=1: none"):
        offline.run(cfg, tmp_path)
    assert sorted(RunFolder(tmp_path / "seed=0").checkpoints()) == [30, 60]


def test_the_last_checkpoint_is_enough_to_go_on(maze_id: str, tmp_path: Path) -> None:
    cfg = config(f"dataset={maze_id}", "temperature=3")
    expected = offline.run(cfg, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert offline.run(cfg, tmp_path) == expected
    assert [row["step"] for row in rows(tmp_path)] == ["20", "30", "40", "60"]


def test_what_learners_share_can_not_differ_between_them(
    maze_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("temperature=[1,3]")
    dataset = load_dataset(maze_id)
    architecture = architecture_for(cfg.networks, dataset, cfg.algorithm)

    def optimization(self: IQL, steps: int) -> dict[str, Any]:
        return {"learning_rate": 1e-3, "target_rate": 0.1 * self.temperature}

    monkeypatch.setattr(IQL, "optimization", optimization)
    with pytest.raises(ValueError, match="target_rate of the optimisation differs"):
        build.step_for(cfg.learners, architecture, dataset, cfg.compute, 60)
    monkeypatch.setattr(IQL, "data", lambda self, data: data.best_episodes(1 / self.temperature))
    with pytest.raises(TypeError):
        build.learned_from(cfg, dataset)


def test_what_is_observed_and_kept_is_as_asked(maze_id: str, tmp_path: Path) -> None:
    """A policy that sees no goal, from the command line to its evaluation."""
    asked = config(f"dataset={maze_id}", "temperature=3", "observation_keys=[observation]")
    dataset, whole = (
        build.dataset_for(each.data) for each in (asked, config(f"dataset={maze_id}"))
    )
    assert whole.transitions["observation"].shape[1] == 8
    assert dataset.transitions["observation"].equal(whole.transitions["observation"][:, 4:])
    with pytest.raises(SettingsError, match="columns: there is no infos/success"):
        build.dataset_for(config(f"dataset={maze_id}", "columns=[success]").data)
    offline.run(asked, tmp_path / "run")
    policy = load_policy(tmp_path / "run/last.ckpt")
    assert policy(observation=torch.zeros(1, 4))[-1].shape == (1, 2)
    with pytest.raises(SettingsError, match=r"columns=\['success'\]: are not collected"):
        online.data_for(ONLINE.settings([f"dataset={maze_id}", "columns=[success]"]))


def test_the_bounds_of_actions_are_as_asked(tmp_path: Path) -> None:
    """A file that declares none, of a robot whose joints take other torques than [-1, 1]."""
    path, rng = tmp_path / "robot.hdf5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(200, 3))
        file["actions"] = rng.uniform([-5, -0.2], [5, 0.3], (200, 2))
        file["rewards"], file["terminals"] = np.ones(200), np.zeros(200)
        file["timeouts"] = np.arange(1, 201) % 50 == 0
    given = [*TINY, f"dataset={path}", "eval_episodes=0"]
    with pytest.raises(SettingsError, match=r"outside \[-1, 1\] .*action_space"):
        offline.run(OFFLINE.settings(given), tmp_path / "run")
    settings = OFFLINE.settings([*given, "action_space=[[-5,-0.5],[5,0.5]]"])
    offline.run(settings, tmp_path / "run")
    policy = load_policy(tmp_path / "run/last.ckpt")
    mean = policy(observation=torch.randn(1000, 3) * 100)[0].abs().amax(0)
    torch.testing.assert_close(mean, torch.tensor([5, 0.5]), rtol=0.05, atol=0)
    assert build.dataset_for(settings.data).transitions["action"].abs().amax() > 4.9


def test_an_environment_that_is_not_here_is_not_missed_where_nothing_is_played(
    maze_id: str, tmp_path: Path
) -> None:
    copied = shutil.copytree(Path(os.environ["MINARI_DATASETS_PATH"], maze_id), tmp_path / "data")
    file = copied / "data/metadata.json"
    spec = EnvSpec("Elsewhere-v0", entry_point="elsewhere:Robot").to_json()
    named = dict.fromkeys(["env_spec", "eval_env_spec"], spec)
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    given = [*TINY, f"dataset={copied}"]
    with pytest.raises(SettingsError, match=r"'elsewhere:Robot'.*eval_episodes=0 in a recipe"):
        offline.run(OFFLINE.settings(given), tmp_path / "run")
    scores = offline.run(OFFLINE.settings([*given, "eval_episodes=0"]), tmp_path / "run")
    assert scores["replicas"][0]["steps"] == 6
