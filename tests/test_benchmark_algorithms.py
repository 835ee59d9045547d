"""The runtime of the algorithms: what is compared does the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.speed import algorithms as speed
from torchrl_iql_recipes.speed.timing import Result

SMALL = ["hidden_sizes=[8,8]", "batch_size=16", "compute.execution=eager"]


def small(algorithm: str) -> list[str]:
    return [*SMALL, "context=3"] if algorithm == "dt" else SMALL


@pytest.fixture(autouse=True)
def few_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = speed.random_data(episodes=20, length=30)
    monkeypatch.setattr(speed, "random_data", lambda: data)


@pytest.mark.parametrize("name", speed.LOSSES)
def test_torchrls_loss_is_descended(name: str) -> None:
    loop = speed.Torchrl(name, "cpu", small(name), "eager")
    before = {key: value.clone() for key, value in loop.loss.state_dict().items()}
    loop.run(1)
    policy = [key for key in before if key.startswith("actor_network") and "weight" in key]
    moved = {key for key, value in loop.loss.state_dict().items() if not value.equal(before[key])}
    assert bool(moved & set(policy)) == (name != "td3bc")  # the policy's turn is the second step
    loop.run(1)
    after = loop.loss.state_dict()
    trained = [key for key in before if "weight" in key and "_weight" not in key.split(".")[-1]]
    assert trained
    trained = [key for key in trained if "wte" not in key]  # of words, which GPT-2 has here, unused
    still = [key for key in trained if after[key].equal(before[key])]
    assert not still


@pytest.mark.parametrize("name", ["bc", "iql"])
def test_both_train_on_networks_that_are_alike(name: str) -> None:
    loop = speed.Torchrl(name, "cpu", small(name), "eager")
    recipe = speed.Recipe(name, "cpu", small(name))
    (loss,) = recipe._step.losses

    def shapes(module: torch.nn.Module) -> list[torch.Size]:
        return sorted(each.shape for each in module.parameters() if each.requires_grad)

    assert shapes(loop.loss) == shapes(loss)
    before = [each.clone() for each in loss.parameters()]
    recipe.run(2)
    assert recipe._step.steps == 2
    assert not any(map(torch.equal, loss.parameters(), before))


def test_a_row_has_medians_and_ratios_within_rounds() -> None:
    def result(name: str, rates: list[float]) -> Result:
        return Result(name, name, 1, 10, rates, [1.0] * 3, 0.0)

    results = [
        result(speed.torchrl_name("eager"), [10.0, 20.0, 40.0]),
        result(speed.Recipe.name, [30.0, 80.0, 80.0]),
    ]
    got = speed.row("iql", results, [speed.torchrl_name(way) for way in speed.WAYS])
    assert got == "| IQL | 80 | 20 | 3.00 | - | - |"
    assert speed.row("awac", results[1:], ["unifloral"]) == "| AWAC | 80 | - | - |"


def test_a_folder_that_is_no_checkout_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--unifloral", str(tmp_path)])
    message = f"{tmp_path} must be a checkout of unifloral: no {tmp_path}/algorithms/bc.py"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_has_every_algorithm_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--only", "iql", "awac", "--json", str(tmp_path / "its.json")]
    assert speed.main([*arguments, "--settings", *SMALL]) == 0
    lines = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    titles = [f"| {algorithms()[name].title}" for name in ("awac", "iql")]
    assert [line for line in lines if line in titles] == titles
    assert set(json.loads((tmp_path / "its.json").read_text())["algorithms"]) == {"awac", "iql"}
