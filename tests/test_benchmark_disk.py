"""The benchmark of data on disk measures minibatches of what it wrote, and removes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from test_benchmark_losses import InProcess
from torchrl_iql.data import Minibatches
from torchrl_iql_recipes.speed import disk, update
from torchrl_iql_recipes.speed.timing import Result
from torchrl_iql_recipes.speed.work import Work

SMALL = Work(hidden_sizes=(16,), transitions=50, batch_size=8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill a folder with 250 transitions, made in three parts."""
    monkeypatch.setattr(disk, "PART", 100)
    disk.write(tmp_path, SMALL, 250)
    return tmp_path


def test_what_is_written_is_random_throughout(folder: Path):
    mapped = TensorDict.load_memmap(folder)
    assert mapped.batch_size == (250,)
    assert mapped["observation"].unique(dim=0).shape == (250, 17)
    assert mapped["next", "reward"].std() == pytest.approx(1, abs=0.2)
    assert mapped["action"].abs().max() < 1
    assert set(mapped.keys(True, True)) == set(SMALL.data().keys(True, True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [disk.Sampling, partial(disk.Training, execution="eager")])
def test_steps_are_taken_on_what_is_there(kind, streaming: bool, folder: Path):
    builders = disk.contenders(kind, SMALL, folder, 250)
    assert list(builders) == [
        "50 in memory",
        "250 on disk",
        "50 in memory, streaming",
        "250 on disk, streaming",
    ]
    for name, build in builders.items():
        contender = build()
        assert (contender.name, contender.replicas) == (name, 1)
        contender.run(3)
        contender.run(101)
        training = getattr(contender, "step", contender)
        assert training.steps == 104
        minibatches = contender.minibatches
        large = "on disk" in name
        assert (minibatches(0)[1].max() >= 50) == (large or "streaming" in name)
        source, rows = minibatches(7)
        data = TensorDict.load_memmap(folder) if large else SMALL.data()
        expected, same = Minibatches(data, SMALL.batch_size)(7)
        for key in disk.KEYS:
            assert source[key][rows].equal(expected[key][same])
        minibatches.close()


def test_training_moves_the_networks(folder: Path):
    contender = disk.Training(SMALL, folder, False, name="x", execution="eager")
    before = [p.clone() for p in contender.step.losses[0].parameters()]
    contender.run(1)
    after = contender.step.losses[0].parameters()
    assert all(not p.equal(b) for p, b in zip(after, before, strict=True))


def test_table():
    def result(name: str, rate: float, ratio: float) -> Result:
        return Result(name, "a", 1, 10, [rate], [ratio], 0.0)

    sampling = [result("a", 4000.0, 1.0), result("b", 3000.0, 0.75)]
    memory = {"a": (0.5, 0.25)}
    lines = disk.table(["a", "b"], sampling, [result("a", 200.0, 1.0)], memory).splitlines()
    assert lines[2] == "| a | 4,000 | 1.00 | 200 | 1.00 | 0.50 | 0.25 |"
    assert lines[3] == "| b | 3,000 | 0.75 | - | - | - | - |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("broken", ["", "300 on disk"])
def test_the_script_measures_and_removes(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(update, "Isolated", InProcess)
    monkeypatch.setattr(InProcess, "broken", broken)
    monkeypatch.setattr(InProcess, "memory", lambda self, entry: 1.5, raising=False)
    for name in ("PJRT_NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "restored afterwards")
    written = []
    write = disk.write
    monkeypatch.setattr(disk, "write", lambda *args: written.append(args[0]) or write(*args))
    small = ["--quick", "--on-disk", "300", "--hidden", "8", "--seconds", "0.01", "--threads", "1"]
    precision = torch.get_float32_matmul_precision()
    status = disk.main(
        [*small, "--device", "cpu", "--folder", str(tmp_path), "--only", "1,", "300"]
    )
    torch.set_float32_matmul_precision(precision)
    output = capsys.readouterr().out
    assert status == (1 if broken else 0)
    assert written[0].parent == tmp_path
    assert not list(tmp_path.iterdir())
    assert "| 1,000 in memory | " in output
    cells = next(line for line in output.splitlines() if line.startswith("| 300 on disk |"))
    assert cells.endswith("| - |" if broken else "| 1.50 | 1.50 |")
