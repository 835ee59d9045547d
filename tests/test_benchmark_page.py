"""The page on the speed of a GPU: what is in it, and what becomes of failures."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchrl_iql_recipes.speed import page, update
from torchrl_iql_recipes.speed.work import Work

ARGUMENTS = ["--device", "cpu", "--threads", "1", "--quick", "--replicas"]


class Learner:
    """Takes steps in no time."""

    def __init__(self, name: str, build: object, configure: object) -> None:
        self.name, self.taken = name, []

    def run(self, steps: int) -> None:
        self.taken.append(steps)

    def close(self) -> float:
        return 0.25


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the page without running anything; return its exit status and what it says."""
    comparison = update.Comparison(Work(), [], ["JAX"], [], {"a": 0.5}, 1e11, None, {})
    outcome = SimpleNamespace(returncode=0, stdout="....\n4 passed in 1s\n", stderr="")

    def run(command: list[str], **_: object) -> SimpleNamespace:
        return outcome if "pytest" in command else SimpleNamespace(stdout="abc+\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(page, "Isolated", Learner)
    monkeypatch.setattr(page, "compare", lambda work, options: comparison)
    monkeypatch.setattr(update, "table", lambda results, limit: "| the table |")
    for name in ("PJRT_NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "restored afterwards")
    precision = torch.get_float32_matmul_precision()
    path = tmp_path / "speed.md"

    def make(*more: str) -> tuple[int, str]:
        status = page.main([*ARGUMENTS, "--output", str(path), *more])
        return status, path.read_text()

    yield SimpleNamespace(page=make, path=path, tests=outcome, comparison=comparison)
    torch.set_float32_matmul_precision(precision)


def test_says_what_was_measured_and_on_what(make):
    status, text = make.page()
    assert status == 0
    assert text.startswith("# Speed on ")
    assert "revision abc+" in text
    assert "--device cpu" in text
    assert f"torchrl {update.hardware()['torchrl']}" in text
    assert "```\n4 passed in 1s\n```" in text
    assert "| the table |" in text
    assert "Left out: JAX." in text
    assert text.index("## Tests") < text.index("## A gradient step") < text.index("## A million")


def test_a_million_is_timed_or_extrapolated(make, monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 5.0, 5.0, 7.0] * 2)
    monkeypatch.setattr(page.time, "perf_counter", lambda: next(now))
    _, text = make.page("--parts", "million", "--updates", "4000")
    assert "would take 500 s, extrapolated from 4,000 in 2.0 s, 2,000 updates/s" in text
    assert "5 s for the first 200" in text
    assert "Peak memory: 0.25 GiB" in text
    assert "## Tests" not in text
    _, text = make.page("--parts", "million", "--updates", "1000000")
    assert "1,000,000 updates took 2 s, 500,000 updates/s" in text
    assert "extrapolated" not in text


def test_a_failed_test_is_told(make):
    make.tests.returncode = 1
    make.tests.stdout = "..F\nFAILED tests/test_a.py::b - no\n1 failed, 2 passed in 1s\n"
    status, text = make.page()
    assert status == 1
    assert "```\nFAILED tests/test_a.py::b - no\n1 failed, 2 passed in 1s\n```" in text
    assert "## A million" in text


def test_a_failed_contender_of_ours_is_told(make):
    make.comparison.failed.append("torchrl-iql, eager")
    status, _ = make.page("--parts", "steps")
    assert status == 1


def test_what_was_measured_stays(make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make.page()
    assert "4 passed in 1s" in make.path.read_text()


def test_the_table_of_a_gpu_has_every_number_of_learners(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = page.parse(page._parser(), page.QUICK, [])
    assert (options.device, tuple(options.replicas)) == ("cuda", (4, 16, 64))
    assert options.updates == 1_000_000
    work = update.work_of(options)
    names = [*page.ours.contenders(work, options.replicas), *update.peers.contenders(work)]
    for name in ("cudagraph", "cudagraph, 64 learners", "cudagraph, step(batch)"):
        assert f"torchrl-iql, {name}" in names
    for name in ("compiled", "CUDA graph, data on the device"):
        assert f"TorchRL, {name}" in names


def test_no_pytest_is_a_failure(make):
    make.tests.returncode, make.tests.stdout, make.tests.stderr = 1, "", "No module named pytest"
    status, text = make.page("--parts", "tests")
    assert status == 1
    assert "No module named pytest" in text
