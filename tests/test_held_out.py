"""What is held out: not learned from, looked at with every evaluation, and what the best is by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runs import SMALL, rows
from torchrl_iql import checkpoint, load_dataset
from torchrl_iql.validation import Validator
from torchrl_iql_recipes.experiment import build, offline, online, plots
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

GIVEN = [*SMALL, "validation=0.2", "temperature=3", "decay_steps=0"]


def settings(maze_id: str, *more: str) -> Settings:
    return OFFLINE.settings([f"dataset={maze_id}", *GIVEN, *more])


def test_it_is_looked_at_with_every_evaluation(maze_id: str, tmp_path: Path) -> None:
    its = settings(maze_id, "steps=30", "eval_interval=10", "log_interval=15", "seeds=[3,4]")
    scores = offline.run(its, tmp_path)
    dataset = build.dataset_for(its.data)
    _, held_out = dataset.split(0.2)
    for seed, replica in zip((3, 4), scores["replicas"], strict=True):
        folder = tmp_path / f"seed={seed}"
        found = [row for row in rows(folder) if row["validation/td_error"]]
        assert [row["step"] for row in found] == ["10", "20", "30"]
        described = checkpoint.load_architecture(folder / "last.ckpt")
        step = build.step_for(its.learners[:1], described, dataset, its.compute, 30)
        checkpoint.load_learner(folder / "last.ckpt", step, keep=("settings",))
        expected = Validator(held_out, 0.99)(step.losses[0]).metrics
        assert replica["held_out"] == pytest.approx(expected)
        assert {k: float(v) for k, v in found[-1].items() if k.startswith("validation/")} == {
            f"validation/{k}": pytest.approx(v) for k, v in expected.items()
        }
        assert (folder / "calibration.png").exists()
    told = offline.report(scores, tmp_path, its)
    assert "seed=3: held out: TD error " in told


def test_without_an_environment_it_is_what_is_said(maze_id: str, tmp_path: Path) -> None:
    its = settings(maze_id, "steps=10", "eval_episodes=0")
    scores = offline.run(its, tmp_path)
    told = offline.report(scores, tmp_path, its).splitlines()
    assert told[0] == "Not evaluated (eval_episodes=0)."
    assert told[1].startswith("held out: TD error ")


def test_of_a_decision_transformer_it_is_windows(maze_id: str, tmp_path: Path) -> None:
    given = [each for each in GIVEN if "temperature" not in each]
    its = OFFLINE.settings(
        [f"dataset={maze_id}", *given, "algorithm=dt", "context=3", "steps=20", "eval_episodes=0"]
    )
    (replica,) = offline.run(its, tmp_path)["replicas"]
    assert replica["held_out"].keys() == {"loss_actor"}
    assert np.isfinite(replica["held_out"]["loss_actor"])


@pytest.mark.parametrize("asked", ["-validation/td_error", "validation/log_likelihood"])
def test_the_best_is_by_what_is_asked(asked: str, maze_id: str, tmp_path: Path) -> None:
    its = settings(
        maze_id, "steps=40", "eval_interval=10", "eval_episodes=0", f"best_by={asked}", "seeds=1"
    )
    scores = offline.run(its, tmp_path)
    name = asked.removeprefix("-")
    values = {int(row["step"]): float(row[name]) for row in rows(tmp_path) if row[name]}
    choose = min if asked.startswith("-") else max
    best = choose(values, key=values.__getitem__)
    assert scores["replicas"][0]["best"] == {name: values[best], "step": best}
    assert checkpoint.load_metadata(tmp_path / "best.ckpt")["steps"] == best
    with pytest.raises(SettingsError, match=f"holds a run with best_by={asked}, not best_by=eval/"):
        OFFLINE.resumed(tmp_path, ["best_by=eval/score"])


def test_a_run_that_goes_on_is_the_one_that_was_not_interrupted(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = settings(maze_id, "steps=30", "eval_interval=10", "seeds=2")
    expected = offline.run(its, tmp_path / "whole")
    save = checkpoint.save

    def save_and_die(*arguments: object, **more: object) -> None:
        save(*arguments, **more)  # pyright: ignore
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        offline.run(its, tmp_path / "parts")
    monkeypatch.undo()
    assert offline.run(its, tmp_path / "parts") == expected
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_online_it_is_not_learned_from_either(maze_id: str, tmp_path: Path) -> None:
    given = [f"dataset={maze_id}", *GIVEN, "steps=10", "env_steps=20", "eval_interval=10"]
    its = ONLINE.settings([*given, "collector.frames_per_batch=5"])
    rest, held_out = online.data_for(its)
    assert held_out is not None
    whole = load_dataset(maze_id, episodes=its.data.episodes, reward=its.data.reward)
    together = len(rest.transitions) + len(held_out.transitions)
    assert together == len(whole.transitions)
    assert not {tuple(row) for row in held_out.transitions["observation"].tolist()} & {
        tuple(row) for row in rest.transitions["observation"].tolist()
    }
    scores = online.run(its, tmp_path)
    assert np.isfinite(scores["replicas"][0]["held_out"]["td_error"])
    steps = [row["step"] for row in rows(tmp_path) if row["validation/td_error"]]
    assert steps == ["10", "20", "30"]
    with pytest.raises(SettingsError, match="without a data set there is nothing to hold out"):
        online.data_for(
            ONLINE.settings(["dataset=null", "env=Pendulum-v1", "validation=0.1", "task=own"])
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["validation=1"], "validation"),
        (["best_by=validation/td_error", "validation=0"], "nothing is held out, give validation=0"),
        (["best_by=td_error"], "expected eval/... or validation/..."),
        (["best_by=eval/scor"], "expected eval/ and one of score, return, "),
    ],
)
def test_what_can_not_be_is_refused_at_once(given: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        OFFLINE.settings(given)


def test_a_metric_that_is_none_is_refused_before_training(maze_id: str, tmp_path: Path) -> None:
    its = settings(maze_id, "best_by=-validation/tderror", "seeds=1")
    with pytest.raises(SettingsError, match=r"expected validation/ and one of \['action_error'"):
        offline.run(its, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_one_episode_can_not_be_divided(tmp_path: Path, maze_id: str) -> None:
    its = settings(maze_id)
    dataset = load_dataset(maze_id)
    (one, _) = dataset.split(0.999)
    assert len(one.episode_lengths) == 1
    from torchrl_iql_recipes.experiment.validation import hold_out

    with pytest.raises(SettingsError, match=r"validation=0.2: .* can not be split"):
        hold_out(its, one)


def test_values_are_drawn_against_returns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    returns = rng.normal(size=500)
    plots.calibration(returns + 0.1, returns, tmp_path / "some.png")
    plots.calibration(returns[:1], returns[:1], tmp_path / "one.png", "IQL on a/b-v0, seed=0")
    assert (tmp_path / "some.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 1000
