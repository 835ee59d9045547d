"""Policies judged from data alone, from the command line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from runs import TINY, of_maze
from torchrl_iql import load_policy
from torchrl_iql.estimation import DataReturn, FittedQ, fitted_q
from torchrl_iql_recipes.deployment import estimating
from torchrl_iql_recipes.deployment.settings import Estimation
from torchrl_iql_recipes.experiment import build, offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Compute
from torchrl_iql_recipes.experiment.training import OFFLINE

SCRIPT = Path(__file__).parents[1] / "recipes/estimate.py"
RULES = ["validation=0.3", "reward=minus_one", "episodes=until_success"]
FEW = {"steps": 30, "networks": 2, "hidden_sizes": [8, 8], "batch_size": 32}
COMPUTE = Compute.of({"execution": "eager", "threads": 1})


@pytest.fixture(scope="module")
def runs(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a few steps: IQL with two discounts, cloning, and a Decision Transformer."""
    found = {}
    for name, more in {
        "iql": ["discount=[0.9,0.95]", "temperature=3", *RULES],
        "bc": ["algorithm=bc", *RULES],
        "dt": ["algorithm=dt", "context=3"],
        "others": ["algorithm=bc"],
    }.items():
        folder = tmp_path_factory.mktemp(name)
        given = [f"dataset={maze_id}", *TINY, "eval_episodes=0", *more]
        offline.run(OFFLINE.settings(of_maze(given)), folder)
        found[name] = folder
    found["iql"] /= "discount=0.9"
    return {name: folder / "last.ckpt" for name, folder in found.items()} | {
        "patient": found["iql"].parent / "discount=0.95/last.ckpt"
    }


def judge(*checkpoints: Path, **settings: Any) -> dict[str, FittedQ]:
    given = [str(path) for path in checkpoints]
    its = Estimation.of({"checkpoint": given if len(given) > 1 else given[0], **FEW, **settings})
    return estimating.run(its, COMPUTE)


def test_it_is_what_fitted_q_says_of_the_data_of_the_run(
    runs: dict[str, Path], maze_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the rules of the run and its discount, on the rewards as recorded."""
    (found,) = judge(runs["iql"]).values()
    data = build.dataset_for(OFFLINE.settings(of_maze([f"dataset={maze_id}", *RULES])).data)
    assert data.episode_rule == "until_success" and data.reward_rule == "minus_one"
    policy = load_policy(runs["iql"])
    few = {**FEW, "hidden_sizes": None}
    del few["hidden_sizes"]
    expected = fitted_q(
        policy,
        data,
        discount=0.9,
        execution="eager",
        architecture=estimating.Judged.load(str(runs["iql"])).q_architecture((8, 8)),
        **few,
    )
    assert torch.equal(found.members, expected.members)
    lines = capsys.readouterr().out.splitlines()
    episodes, steps = len(data.episode_lengths), len(data.transitions)
    assert (
        lines[0]
        == f"{maze_id}: all episodes, {episodes:,} with {steps:,} transitions, until success"
    )
    assert lines[1].split()[:4] == ["estimate", f"{found.value:.4g}", "±", f"{found.spread:.2g}"]
    assert lines[4].startswith(
        "Not to be trusted: steps times target_rate times (1 - discount) is 0.15"
    )


@pytest.mark.parametrize("part", ["learned", "held_out"])
def test_a_part_of_the_episodes_is_that_of_the_run(
    part: str, runs: dict[str, Path], maze_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(runs["bc"], fit_on=part)
    settings = OFFLINE.settings(of_maze([f"dataset={maze_id}", *RULES]))
    from torchrl_iql_recipes.experiment.validation import hold_out

    learned, held_out = hold_out(settings, build.dataset_for(settings.data))
    its = learned if part == "learned" else held_out
    assert its is not None
    assert f" {len(its.episode_lengths):,} with {len(its.transitions):,}" in capsys.readouterr().out


def test_several_are_ranked(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ranked.json"
    found = judge(runs["bc"], runs["iql"], output=str(file))
    assert all(
        torch.equal(each.members, its.members)
        for each, its in zip(
            found.values(),
            (*judge(runs["bc"], discount=0.9).values(), *judge(runs["iql"]).values()),
            strict=True,
        )
    )
    written = json.loads(file.read_text())
    order = sorted(found, key=lambda path: -found[path].value)
    assert [each["checkpoint"] for each in written["policies"]] == order
    assert written["discount"] == 0.9 and written["policies"][0]["value"] == found[order[0]].value
    lines = [
        line for line in capsys.readouterr().out.splitlines() if ".ckpt" in line and ". /" in line
    ]
    assert [line.split()[1] for line in lines] == order


def test_weights_are_beside_it_where_the_behaviour_is_known(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a log, whose column it is; or a line says why there are none."""
    policy, rng = load_policy(runs["others"]), np.random.default_rng(0)
    size = estimating.Judged.load(str(runs["others"])).architecture.observation_size
    observations = rng.normal(size=(60, size)).astype(np.float32)
    read = TensorDict({"observation": torch.from_numpy(observations)}, [60])
    with torch.no_grad():
        dist = policy.get_dist(read)  # pyright: ignore
        actions = dist.sample().clamp(-0.99, 0.99)
        logs = dist.log_prob(actions)
    names = [f"x{i}" for i in range(size)]
    file = tmp_path / "log.csv"
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow([*names, "a", "b", "reward", "done", "run", "log_p", "half"])
        for i in range(60):
            own = [*observations[i], *actions[i].tolist(), rng.normal(), int(i % 6 == 5), i // 6]
            writer.writerow([*own, float(logs[i]), float(logs[i]) + 9 * (i // 6 > 2)])
    layout = {"observations": names, "actions": ["a", "b"], "rewards": "reward"}
    layout |= {"terminals": "done", "episode_ids": "run"}
    judge(runs["others"], dataset=str(file), layout=layout, log_prob="log_p", discount=0.9)
    assert capsys.readouterr().out.splitlines()[-1].endswith(", of 10.0 effective episodes")
    judge(runs["others"], dataset=str(file), layout=layout, log_prob="half", discount=0.9)
    told = "3.0 of 10 episodes are effective, expected at least 5"
    assert told in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SettingsError, match="no_such"):
        judge(runs["others"], dataset=str(file), layout=layout, log_prob="no_such", discount=0.9)
    run = tmp_path / "run"
    given = [f"dataset={file}", f"layout={layout}".replace("'", ""), "env=PointMaze_UMaze-v3"]
    offline.run(OFFLINE.settings(["algorithm=bc", *given, *TINY, "eval_episodes=0"]), run)
    newer = str(shutil.copy(file, tmp_path / "newer.csv"))
    for more in ({}, {"dataset": newer}):  # a layout is that of the run
        judge(run / "last.ckpt", discount=0.9, **more)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["dt"], {}, "a decision transformer acts by more than the present observation"),
        (
            ["iql", "patient"],
            {},
            r"discount was 0.9 in the run of .* and 0.95 in that of .*: give one$",
        ),
        (
            ["iql", "others"],
            {},
            "episodes was until_success in the run of .* and as_stored in that of",
        ),
        (["others"], {"fit_on": "held_out"}, "held nothing out .validation=0., give fit_on=all"),
        (["bc"], {"dataset": "none/log.csv"}, r"dataset=none/log\.csv: "),
    ],
)
def test_what_is_refused(
    names: list[str], given: dict, message: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(SettingsError, match=message):
        judge(*(runs[name] for name in names), **given)


def test_runs_without_a_discount_are_asked_for_one(maze_id: str, tmp_path: Path) -> None:
    given = [f"dataset={maze_id}", *TINY, "eval_episodes=0", "discount=1", "temperature=3"]
    offline.run(OFFLINE.settings(of_maze(given)), tmp_path / "run")
    with pytest.raises(
        SettingsError, match=r"discount=1, that of the runs, .*: give discount=0\.99"
    ):
        judge(tmp_path / "run/last.ckpt")


def test_data_of_another_kind_are_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "log.csv"
    table.write_text("x,force,reward,done\n0,0.1,0,0\n1,0.2,1,1\n")
    layout = {"observations": ["x"], "actions": "force", "rewards": "reward", "terminals": "done"}
    with pytest.raises(
        SettingsError, match=r"is for observations of .* numbers .* but .*log.csv has"
    ):
        judge(runs["others"], dataset=str(table), layout=layout)


def of(value: float, spread: float, **others: Any) -> FittedQ:
    """Make an estimate that has not moved, of data that came to 1 ± 0.1, at best 3."""
    members = torch.tensor([value - spread, value, value + spread], dtype=torch.float64)
    its = {
        "history": members.expand(50, 3),
        "of_data": DataReturn(1.0, 0.1, 3.0, 20),
        "bounds": (-10.0, 10.0),
        "clip_fraction": 0.0,
        "distance": 0.5,
        "sweeps": 5.0,
    }
    return FittedQ(**{**its, **others})


@pytest.mark.parametrize(
    ("its", "said"),
    [
        (of(2.0, 0.1), "Better than the data, by 1."),
        (of(0.2, 0.1), "Worse than the data, by 0.8."),
        (of(1.2, 0.1), "As good as the data, as far as this can tell."),
        (of(2.0, 0.6), "As good as the data, as far as this can tell."),
        (of(2.0, 0.1, of_data=DataReturn(1.0, 0.1, 3.0, 20, 5, -9.0)), "Better than the data's episodes "),
        (of(3.5, 0.1), "Above every episode of the data: better than all of them, or, more often, too high."),
        (of(2.0, 0.1, distance=1.2), "Better than the data, by 1. It does what the data hardly show"),
        (of(2.0, 0.1, clip_fraction=0.3), "Not to be trusted: Q diverges, 30% of the targets are beyond"),
        (of(2.0, 0.1, sweeps=2.0), "Not to be trusted: steps times target_rate"),
        (of(2.0, 0.1, history=torch.arange(50.0)[:, None].expand(50, 3)), "Not to be trusted: not converged"),
        (of(2.0, 0.1, of_data=DataReturn(*[float("nan")] * 3, 0)), "There is nothing in the data to compare"),
    ],
)  # fmt: skip
def test_the_verdict_is_what_the_figures_say(its: FittedQ, said: str) -> None:
    assert estimating.verdict(its).startswith(said)


def test_who_is_not_told_apart_is_by_the_same_draws() -> None:
    """Two that differ by little, but in every network alike, are told apart."""
    alike, worse = of(2.0, 0.5), of(1.9, 0.5)
    noisy = of(1.9, 0.5, history=torch.tensor([2.4, 1.9, 1.4]).double().expand(50, 3))
    assert (
        "The first is apart from all others" in estimating.ranked({"a": alike, "b": worse}, 0.9)[-1]
    )
    assert estimating.ranked({"a": alike, "c": noisy}, 0.9)[-1].endswith("of the difference: 2.")


def test_those_that_can_not_be_trusted_are_not_told_apart() -> None:
    moving = of(9.0, 0.1, history=torch.arange(50.0)[:, None].expand(50, 3))
    said = estimating.ranked({"a": of(2.0, 0.1), "b": moving}, 0.9)[-1]
    assert said == "Which is the best is not known before all of them can be trusted."


def test_episodes_that_are_cut_are_told() -> None:
    its = of(2.0, 0.1, of_data=DataReturn(1.0, 0.1, 3.0, 20, 5, -9.0))
    (line,) = (each for each in estimating.told(its, 0.9) if each.startswith("data"))
    assert line.endswith(
        "of the 20 episodes whose return is known; the best 3; 5 are cut before, at -9 until then"
    )


def test_data_that_have_moved_are_asked_for(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for episode in range(5):
        (logs / f"{episode}.csv").write_text("x,u,r,end\n" + "0.1,0.2,1,0\n" * 9 + "0.3,-0.2,0,1\n")
    layout = "layout={observations:[x],actions:[u],rewards:r,terminals:end}"
    given = [f"dataset={logs}", layout, *TINY, "eval_episodes=0", "algorithm=bc"]
    offline.run(OFFLINE.settings(given), tmp_path / "run")
    logs.rename(tmp_path / "moved")
    run = tmp_path / "run/last.ckpt"
    message = (
        rf"that is what the run of {run} learned from: where it is elsewhere, give dataset=<it>"
    )
    with pytest.raises(SettingsError, match=message):
        judge(run, discount=0.9)
    judge(run, discount=0.9, dataset=str(tmp_path / "moved"))


def test_what_is_to_be_said_of_one_is_said_of_each_that_is_ranked() -> None:
    found = {"a": of(2.0, 0.1), "b": of(9.0, 0.1, distance=1.2)}
    said = [line for line in estimating.ranked(found, 0.9) if line.endswith(".")][:2]
    assert said == [
        f"  1. {estimating.verdict(found['b'])}",
        f"  2. {estimating.verdict(found['a'])}",
    ]


@pytest.mark.slow
def test_the_command(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its output, and its exit code when it is told wrong."""
    few = [f"{k}={json.dumps(v).replace(' ', '')}" for k, v in FEW.items()]
    command = [sys.executable, str(SCRIPT), "compute.execution=eager", *few]
    path = f"checkpoint='{runs['bc']}'"
    ended = subprocess.run([*command, path], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0 and len(ended.stdout.splitlines()) == 5, ended.stderr
    ended = subprocess.run(
        [*command, path, "stepps=3"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 1
    assert ended.stderr == "estimate.py: there is no setting stepps: did you mean steps?\n"
    assert not list(tmp_path.iterdir())
