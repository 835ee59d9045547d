"""The table of all losses: plain loop and training step do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from torchrl_iql_recipes.speed import losses, update
from torchrl_iql_recipes.speed.timing import Result
from torchrl_iql_recipes.speed.work import Work

SMALL = Work(
    observation_size=5, action_size=3, hidden_sizes=(16, 8), transitions=200, batch_size=32
)
NAMES = pytest.mark.parametrize("name", losses.LOSSES)
TEXT = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--seconds", "0.01"]
SIZES = ["--hidden", "8", "--batch-size", "16", "--transitions", "100"]


@NAMES
def test_both_take_the_same_steps(name: str):
    plain, step = losses.Plain(name, SMALL, "eager"), losses.Step(name, SMALL, "eager")
    assert step.step.path.startswith("general"), step.step.path
    before = {key: value.clone() for key, value in step.loss.state_dict().items()}
    source, indices = step.minibatches(0)
    batches: list[TensorDict] = [source[rows] for rows in indices[:, 0]]
    step.run(3)
    plain.buffer.sample = lambda: batches.pop(0)
    torch.manual_seed(0)  # the training step's: the same noise
    plain.run(3)
    assert len(batches) == len(indices) - 3
    expected = plain.loss.state_dict()
    for key, value in step.loss.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    moved = {key for key, value in step.loss.state_dict().items() if not value.equal(before[key])}
    assert {key for key in before if "weight" in key} <= moved


@NAMES
def test_both_start_alike_and_from_their_own_buffer(name: str):
    plain = losses.Plain(name, SMALL, "eager")
    expected = losses.build_loss(name, SMALL).state_dict()
    assert all(value.equal(expected[key]) for key, value in plain.loss.state_dict().items())
    plain.run(2)
    counts = {int(state["step"]) for state in plain.optimizer.state.values()}
    assert counts == {2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TD3BCLoss"])
def test_what_is_compiled_is_the_loss(name: str):
    eager, compiled = losses.Plain(name, SMALL, "eager"), losses.Plain(name, SMALL, "compiled")
    batches = [eager.buffer.sample() for _ in range(3)]
    for each in (eager, compiled):
        remaining = iter(batches)
        each.buffer.sample = lambda its=remaining: next(its).clone()
        with torch._inductor.config.patch(fallback_random=True):
            torch.manual_seed(0)
            each.run(3)
    assert compiled._losses is not compiled.loss
    expected = eager.loss.state_dict()
    for key, value in compiled.loss.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=key)


def test_the_data_of_work_with_actions_to_count_for_dqn():
    data = losses.data_for("SACLoss", SMALL)
    assert data["action"].equal(SMALL.data()["action"])
    counted = losses.data_for("DQNLoss", SMALL)
    assert set(counted["action"].tolist()) == set(range(SMALL.action_size))
    assert counted["observation"].equal(data["observation"])


def test_what_is_compared():
    assert losses.pairs("cpu", ["eager", "compiled"]) == [
        ("eager", "eager"),
        ("compiled", "compiled"),
    ]
    assert losses.pairs("cuda", ["compiled"])[-1] == ("compiled", "cudagraph")
    assert losses.pairs("cuda", ["eager"]) == [("eager", "eager")]
    for name, build in losses.contenders("BCLoss", SMALL, ["eager", "compiled"]).items():
        assert build().name == name


class TestTable:
    @staticmethod
    def result(name: str, rates: list[float]) -> Result:
        return Result(name, "?", 1, 10, rates, [0.0] * len(rates), 0.0)

    def test_ratios_are_taken_within_a_round(self):
        its = [
            self.result("plain loop, eager", [10.0, 20.0, 40.0]),
            self.result("TrainStep, eager", [20.0, 60.0, 80.0]),
        ]
        compared = losses.pairs("cpu", ["eager"])
        assert losses.heading(compared) == [
            "| loss | plain loop, eager | TrainStep, eager | times plain loop, eager |",
            "| --- | ---: | ---: | ---: |",
        ]
        assert losses.row("A", its, compared) == "| A | 20 | 60 | 2.00 |"
        assert losses.row("B", its[1:], compared) == "| B | - | 60 | - |"

    def test_two_training_steps_beside_one_loop(self):
        its = [
            self.result("plain loop, compiled", [100.0]),
            self.result("TrainStep, compiled", [200.0]),
            self.result("TrainStep, cudagraph", [3000.0]),
        ]
        compared = losses.pairs("cuda", ["compiled"])
        line = losses.row("A", its, compared)
        assert line == "| A | 100 | 200 | 2.00 | 3,000 | 30.00 |"
        assert {each.count("|") for each in losses.heading(compared)} == {line.count("|")}


class InProcess:
    """A contender in this process, that fails on request."""

    replicas = 1
    broken = ""

    def __init__(self, name: str, build: object, configure: object) -> None:
        self.name = name
        self.contender = build()  # pyright: ignore

    def run(self, steps: int) -> None:
        if self.name == self.broken:
            raise RuntimeError("no reason")
        self.contender.run(steps)

    def close(self) -> float:
        return 0.0


class TestScript:
    @pytest.fixture(autouse=True)
    def _in_process(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(update, "Isolated", InProcess)
        for name in ("PJRT_NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
            monkeypatch.setenv(name, "restored afterwards")
        precision = torch.get_float32_matmul_precision()
        yield
        torch.set_float32_matmul_precision(precision)

    def test_prints_a_table_and_writes_json(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        path = tmp_path / "losses.json"
        only = ["--only", "bcloss", "dt", "--ways", "eager", "--json", str(path)]
        assert losses.main([*TEXT, *SIZES, *only]) == 0
        rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
        assert [row for row in rows if row.startswith("| ")] == [
            "| loss",
            "| ---",
            "| BCLoss",
            "| TD3BCLoss",
            "| DTLoss",
        ]
        written = json.loads(path.read_text())
        assert written["work"]["hidden_sizes"] == [8]
        assert [len(each["rates"]) for each in written["losses"]["DTLoss"]] == [2, 2]

    @pytest.mark.parametrize("broken", ["plain loop, eager", "TrainStep, eager"])
    def test_the_exit_status_tells_whether_a_training_step_failed(
        self, broken: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(InProcess, "broken", broken)
        status = losses.main([*TEXT, *SIZES, "--only", "DT", "--ways", "eager"])
        output = capsys.readouterr().out
        assert status == (broken == "TrainStep, eager")
        assert ("Failed: DTLoss in TrainStep, eager." in output) == (status == 1)
