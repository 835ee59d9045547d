"""The README's own code runs, and its statements about the project are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(name: str, *replacements: tuple[str, str]) -> None:
    code = re.search(rf"<!-- tested: {name} -->\n```python\n(.*?)```", README, re.S)
    assert code is not None
    program = code[1]
    for written, small in replacements:
        assert written in program
        program = program.replace(written, small)
    exec(compile(program, "README.md", "exec"), {})


def test_the_custom_loop_trains(maze_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "custom loop",
        ("mujoco/hopper/medium-v0", maze_id),
        ('reward="return_range"', 'reward="minus_one"'),
        ("100_000", "3"),
        ("episodes=10", "episodes=1"),
    )
    assert "'score': " in capsys.readouterr().out


def test_the_training_step_trains(maze_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "training step",
        ("mujoco/hopper/medium-v0", maze_id),
        ('reward="return_range"', 'reward="minus_one"'),
        ('"auto"', '"eager"'),
        ("1000", "2"),
        ("100_000", "200"),
        ("range(100)", "range(2)"),
    )
    assert capsys.readouterr().out.startswith("2 tensor([")


def test_the_test_command_is_what_ci_runs() -> None:
    command = re.search(r"To install and test:\n\n```bash\n(.*?)\n```", README, re.S)
    assert command is not None
    install, pytest_command = command[1].rsplit(" && ", 1)
    ci = (ROOT / ".ci/run").read_text()
    assert install.replace("install -e", "install -q -e") in ci
    assert pytest_command in ci


def test_every_file_that_is_named_exists() -> None:
    links = re.findall(r"\]\(([\w./]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []
    layout = re.search(r"## What is where\n\n```\n(.*?)```", README, re.S)
    assert layout is not None
    folder = ROOT
    for line in layout[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir()
        else:
            assert (folder / name).exists(), line
