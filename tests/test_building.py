"""How the C++ of this project is compiled, kept and found again, with real compilers and real damage."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_iql.training import building

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)

SEVEN = 'extern "C" int number() { return 7; }'
WIDTH = """
#if defined(__AVX__)
extern "C" int number() { return 32; }
#else
extern "C" int number() { return 16; }
#endif
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.cpp"
    path.write_text(SEVEN)
    return path


def compiler_that(path: Path, does: str) -> None:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o700)


def kept(cache_folder: Path) -> list[Path]:
    return sorted(cache_folder.glob("kernels/*.so"))


def test_it_is_compiled_once(
    source: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler_that(compiler, f'echo "$@" >> {log}\nexec g++ "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(3):
        assert number(source) == 7
    calls = log.read_text().splitlines()
    assert sum(str(source) in each for each in calls) == 1
    (library,) = kept(cache_folder)
    assert library.stat().st_mode & 0o077 == 0  # nobody else can change what is run


def test_another_text_or_processor_has_its_own(
    source: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home directory may belong to machines of several kinds: here the compiler says which."""
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(compiler))
    source.write_text(WIDTH)
    for option, width in (("-mavx", 32), ("-mno-avx", 16)):
        compiler_that(compiler, f'exec g++ "$@" {option}')
        assert number(source) == width
    assert len(kept(cache_folder)) == 2
    source.write_text(SEVEN)
    assert number(source) == 7
    assert len(kept(cache_folder)) == 3


def number(source: Path) -> int:
    return building.library([source]).number()


def test_processes_that_need_it_at_once_compile_it_once(
    source: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler_that(compiler, f'echo "$@" >> {log}\nexec g++ "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(number, [source] * 4, chunksize=1) == [7] * 4
    assert sum(str(source) in each for each in log.read_text().splitlines()) == 1
    assert len(kept(cache_folder)) == 1


def test_what_is_damaged_or_of_another_user_is_made_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(tmp_path / "first"))
    assert number(source) == 7
    (whole,) = kept(tmp_path / "first")
    # A process loads a path once, so the damaged one is elsewhere.
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(tmp_path / "second"))
    damaged = tmp_path / "second" / "kernels" / whole.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(whole.read_bytes()[:100])
    assert number(source) == 7
    assert damaged.stat().st_size == whole.stat().st_size
    before, other = damaged.stat().st_ino, os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert number(source) == 7
    assert damaged.stat().st_ino != before


def test_a_folder_that_can_not_be_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(folder))
    with pytest.warns(UserWarning, match=f"could not keep .*{folder}"):
        assert number(source) == 7


def test_what_can_not_be_compiled_says_why(
    source: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text("int number() { return seven; }")
    with pytest.raises(RuntimeError, match=r"g\+\+ fails: .*error: 'seven' was not declared"):
        building.library([source])
    assert not kept(cache_folder)
    monkeypatch.setenv("CXX", "nowhere --fast")
    with pytest.raises(FileNotFoundError, match="no C\\+\\+ compiler 'nowhere --fast'"):
        building.library([source])


STEP = """
import sys, warnings
import torch
from tensordict import TensorDict
from torchrl_iql import IQLLoss, TrainStep, models
loss = IQLLoss(models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), models.value_network(3))
step = TrainStep(loss, execution="auto")
flags = {"done": torch.zeros(8, 1, dtype=torch.bool), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
after = {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1), **flags}
batch = {"observation": torch.randn(8, 3), "action": torch.rand(8, 2), "next": after}
step(TensorDict(batch, [8]))
print(step.execution, "torch._inductor.compile_fx" in sys.modules, "by kernels" in step.path)
print(step.reason)
"""


def first_step(**variables: str) -> tuple[list[str], str]:
    """Take one in a process of its own; return what it prints, and what it warns of."""
    ended = subprocess.run(
        [sys.executable, "-c", STEP],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr


@pytest.mark.slow
def test_the_first_step_needs_no_torch_compile() -> None:
    """To load what compiles there would take a second, and to use it five."""
    assert first_step()[0][0] == "compiled False True"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("nowhere", "nothing can be compiled here: .*'nowhere'"), ("false", "compiling failed: ")],
)
def test_without_a_compiler_that_works_steps_are_eager(
    compiler: str, reason: str, tmp_path: Path
) -> None:
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHRL_IQL_CACHE": str(tmp_path)}
    (how, why), warned = first_step(CXX=compiler, **folders)
    assert how.startswith("eager") and how.endswith("False")
    assert re.match(reason, why), why
    assert f"UserWarning: training is not compiled, and slower: {why}" in warned
