"""The README's own code runs, and its statements about the project are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_custom_loop_trains(maze_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"<!-- tested: custom loop -->\n```python\n(.*?)```", README, re.S)
    assert code is not None
    loop = code[1]
    for written, small in (
        ("mujoco/hopper/medium-v0", maze_id),
        ('reward="return_range"', 'reward="minus_one"'),
        ("100_000", "3"),
        ("episodes=10", "episodes=1"),
    ):
        assert written in loop
        loop = loop.replace(written, small)
    exec(compile(loop, "README.md", "exec"), {})
    assert "'score': " in capsys.readouterr().out


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
