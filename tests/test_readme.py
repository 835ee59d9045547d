"""The README's own code runs, and its statements about the project are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_distributed import torchrun
from torchrl_iql import checkpoint, load_policy
from torchrl_iql_recipes import algorithms
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "torchrl_iql/training/README.md").read_text()
RECIPES = (ROOT / "recipes/README.md").read_text()


def program(name: str, *replacements: tuple[str, str], page: str = README) -> str:
    code = re.search(rf"<!-- tested: {name} -->\n```python\n(.*?)```", page, re.S)
    assert code is not None
    text = code[1]
    for written, small in replacements:
        assert written in text
        text = text.replace(written, small)
    return text


def run(name: str, *replacements: tuple[str, str], page: str = README) -> None:
    exec(compile(program(name, *replacements, page=page), "README.md", "exec"), {})


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


def test_the_step_trains_a_loss_of_torchrl(
    maze_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        "any loss",
        ("mujoco/hopper/medium-v0", maze_id),
        ('"auto"', '"eager"'),
        ("1000)", "2)"),
        ("range(100)", "range(2)"),
        page=TRAINING,
    )
    printed = capsys.readouterr().out
    assert printed.startswith("2 tensor(")
    assert "general: TD3BCLoss" in printed


def test_the_step_trains_on_a_prioritized_buffer(maze_id: str) -> None:
    run(
        "prioritized",
        ("mujoco/hopper/medium-v0", maze_id),
        ('reward="return_range"', 'reward="minus_one"'),
        ("100_000", "3"),
        page=TRAINING,
    )


@pytest.mark.slow
def test_several_processes_train(maze_id: str, tmp_path: Path) -> None:
    text = program(
        "several processes",
        ("mujoco/hopper/medium-v0", maze_id),
        ('reward="return_range"', 'reward="minus_one"'),
        ("100_000", "2"),
        page=TRAINING,
    )
    script = tmp_path / "train.py"
    script.write_text(text + "\nprint(sum(x.double().sum().item() for x in loss.parameters()))\n")
    sums = re.findall(r"^-?\d+\.\d+$", torchrun(script, 2), re.M)
    assert len(sums) == 2 and len(set(sums)) == 1  # the same networks in both


def test_an_algorithm_is_one_file(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decayed_bc.py").write_text(program("an algorithm", page=RECIPES))
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    algorithms.algorithms.cache_clear()
    values = {"algorithm": "decayed_bc", "dataset": maze_id, "steps": 3, "weight_decay": 0.5}
    values |= {"eval_episodes": 0, "hidden_sizes": [8], "compute": {"execution": "eager"}}
    scores = offline.run(Settings.of(values), tmp_path / "run")
    assert scores["replicas"][0]["title"] == "decayed BC"
    assert checkpoint.load_metadata(tmp_path / "run/last.ckpt")["config"]["weight_decay"] == 0.5
    assert load_policy(tmp_path / "run/last.ckpt")
    monkeypatch.undo()
    algorithms.algorithms.cache_clear()


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
