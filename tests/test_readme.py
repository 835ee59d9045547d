"""The code on the pages runs, and what they say about the project is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, flatten_space

from iql_losses import built, iql_loss, transitions
from runs import TINY
from test_distributed import torchrun
from test_logs import write_lerobot
from torchrl_iql import IQLLoss, OfflineDataset, TrainStep, checkpoint, load_dataset, load_policy
from torchrl_iql.data import Minibatches
from torchrl_iql.data.__main__ import main as inspect
from torchrl_iql.models import Architecture
from torchrl_iql.training import NonFiniteError, reproduce
from torchrl_iql_recipes import algorithms
from torchrl_iql_recipes.collect import COLLECT
from torchrl_iql_recipes.estimate import ESTIMATE
from torchrl_iql_recipes.evaluate import EVALUATE
from torchrl_iql_recipes.experiment import build, offline
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE
from torchrl_iql_recipes.export import EXPORT
from torchrl_iql_recipes.sac import SAC

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "torchrl_iql/training/README.md").read_text()
USE = (ROOT / "torchrl_iql/README.md").read_text()
ALGORITHMS = (ROOT / "recipes/algorithms/README.md").read_text()
DATA = (ROOT / "torchrl_iql/data/README.md").read_text()


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
        page=USE,
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


def test_a_step_that_is_not_finite_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    td = transitions(batch=(60,))
    td["next", "reward"][17] = float("nan")
    names = {"minibatches": Minibatches(td, 2, seeds=[0]), "step": TrainStep(iql_loss())}
    names |= {"NonFiniteError": NonFiniteError, "reproduce": reproduce}
    code = program("not finite", ("100_000", "200"), page=TRAINING)
    exec(compile(code, "README.md", "exec"), names)
    assert "loss_qvalue is nan" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/own/nonfinite-step-*.pt"))) == 1


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


def test_a_policy_is_used(tmp_path: Path) -> None:
    """As the two pages say it, in an environment and on rows of data."""
    data = OfflineDataset.empty("Hopper-v5")
    architecture = Architecture(observation_size=11, action_size=3, hidden_sizes=(8,))
    described = checkpoint.described(data)
    step = TrainStep(IQLLoss(*built(architecture)))
    path = str(checkpoint.save(tmp_path / "last.ckpt", step, architecture, **described))
    code = program("act", ("runs/hopper/last.ckpt", path), page=USE)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["over"] and names["observation"].shape == (11,)
    shown = {"observation": names["observation"]}
    code = program("use a policy", ("runs/pointmaze/stitch/.../last.ckpt", path))
    exec(compile(code, "README.md", "exec"), shown)
    assert shown["action"].shape == (3,)
    exec(compile(program("module", page=USE), "README.md", "exec"), shown)
    torch.testing.assert_close(shown["action"].numpy(), names["policy"].act(names["observation"]))
    rows = {"observations": torch.zeros(5, 11), "actions": torch.zeros(5, 3)}
    code = program("networks", ("runs/hopper/last.ckpt", path), page=USE)
    exec(compile(code, "README.md", "exec"), rows)
    assert (rows["q"].shape, rows["advantage"].shape) == ((5, 2, 1), (5, 1))


def test_a_loop_of_ones_own_saves_what_it_learned(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("(256, 256)", "(8,)"), ("minibatches(256", "minibatches(8"), ("[0]), 1000", "[0]), 3")
    run("save", ("mujoco/hopper/medium-v0", maze_id), *small, page=USE)
    observation = load_dataset(maze_id).observation_space.sample()
    assert load_policy("own.ckpt").act(observation).shape == (2,)


def test_an_algorithm_is_one_file(
    maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decayed_bc.py").write_text(program("an algorithm", page=ALGORITHMS))
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


class TestEveryEntranceOfData:
    @pytest.fixture(autouse=True)
    def elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)

    def data(self, name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        code = program(name, *replacements, page=DATA)
        assert len(code.splitlines()) <= 10
        exec(compile(code, "README.md", "exec"), names)
        return names

    def test_logs(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("logs").mkdir()
        lines = [
            "time,x,y,speed,force,reward,done",
            *(f"{t},{t},0,1,{t - 2},1,{t // 4}" for t in range(5)),
        ]
        for run in range(20):
            Path(f"logs/run-{run:02}.csv").write_text("\n".join(lines))
        data = self.data("logs")["data"]
        assert data.episode_lengths.tolist() == [5] * 20
        shown = capsys.readouterr().out
        commands = re.search(
            r"```bash\n(python -m torchrl_iql.data inspect logs.*?)```", DATA, re.S
        )
        assert commands is not None
        first, second = commands[1].replace("\\\n", "").strip().splitlines()
        inspected, trained = (shlex.split(each) for each in (first, second))
        assert inspect(inspected[3:]) == 0
        assert capsys.readouterr().out == shown
        settings = OFFLINE.settings([*trained[2:], *TINY[:1]])
        assert build.dataset_for(settings.data).episode_lengths.tolist() == [5] * 20

    def test_lerobot(self, tmp_path: Path) -> None:
        write_lerobot(tmp_path / "pusher", video={"dtype": "video"})
        assert self.data("lerobot")["data"].episode_lengths.tolist() == [4, 4, 5]

    def test_arrays(self) -> None:
        rng, n = np.random.default_rng(0), 300
        rows = {"observations": rng.normal(size=(n, 3)), "actions": rng.uniform(-1, 1, (n, 2))}
        np.savez("log.npz", **rows, rewards=np.zeros(n), terminals=np.arange(n) == 199)
        assert self.data("arrays")["data"].episode_lengths.tolist() == [99, 100, 99]

    def test_stored(self, maze_id: str, tmp_path: Path) -> None:
        recorded = load_dataset(maze_id)
        rows = recorded.transitions
        with h5py.File("hopper_medium-v2.hdf5", "w") as file:
            file["observations"], file["actions"] = rows["observation"], rows["action"]
            file["rewards"], file["terminals"] = rows["next", "reward"], rows["next", "terminated"]
            file["timeouts"] = rows["next", "truncated"]
            file["next_observations"] = rows["next", "observation"]
        flat = replace(recorded, observation_space=flatten_space(recorded.observation_space))
        box = Box(-np.inf, np.inf, flat.observation_space.shape, np.float64)
        replace(flat, observation_space=box, env_spec=None).save_minari("test/flat-v0")
        names = self.data(
            "stored",
            ("mujoco/hopper/medium-v0", "test/flat-v0"),
            ("Hopper-v5", "PointMaze_UMaze-v3"),
            ('"return_range"', '"none"'),
            ("\nogbench =", "\n# "),  # test_ogbench.py
        )
        assert len(names["both"].transitions) == 2 * len(recorded.transitions)

    def test_episodes(self) -> None:
        assert self.data("episodes")["data"].episode_lengths.tolist() == [2]

    def test_torchrl(self) -> None:
        names = self.data("torchrl")
        assert (names["data"].transitions == names["again"].transitions).all()
        assert names["again"].episode_lengths.tolist() == [200] * 3


@pytest.mark.parametrize("killed", [False, True])
def test_the_script_for_a_cluster_goes_on_with_what_a_kill_left(
    killed: bool, tmp_path: Path
) -> None:
    page = (ROOT / "recipes/experiment/README.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", page, re.S)
    assert script is not None
    folder = tmp_path / "runs/antmaze/large-play/seed-2"
    if killed:  # before its first checkpoint
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    begins = 'srun() { echo "$@"; return 75; }; scontrol() { echo "$@"; }; SLURM_ARRAY_TASK_ID=2\n'
    command = ["bash", "-c", f"{begins}SLURM_ARRAY_JOB_ID=7\n{script[1]}"]
    started, again = subprocess.check_output(command, cwd=tmp_path, text=True).splitlines()
    own = "resume=runs/antmaze/large-play/seed-2"
    if not killed:
        own = "task=antmaze/large-play name=seed-2 seeds=2"
    assert (started, again) == (f"python recipes/offline.py {own}", "requeue 7_2")


def test_the_test_command_is_what_ci_runs() -> None:
    command = re.search(r"To install and test:\n\n```bash\n(.*?)\n```", README, re.S)
    assert command is not None
    install, pytest_command = command[1].rsplit(" && ", 1)
    ci = (ROOT / ".ci/run").read_text()
    assert install.replace("install -e", "install -q -e") in ci
    assert pytest_command in ci


PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(
        page
        for room in ("torchrl_iql", "recipes")
        for page in sorted((ROOT / room).glob("**/*.md"))
    ),
]


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]+`(?!\])", "", page.read_text(), flags=re.S | re.M)


def links(page: Path) -> list[tuple[Path, str]]:
    """Return where those of a page lead, within the project: the file and the anchor."""
    its = re.findall(r"\]\(([^)\s]*)\)", prose(page))
    assert "" not in its, page
    own = [link.partition("#") for link in its if not link.startswith("https://")]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in own]


def anchors(page: Path) -> set[str]:
    """Return those of the headings of a page, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M
    )
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", each) for each in headings)
    return {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists()
        assert not anchor or anchor in anchors(target), (target, anchor)


def test_every_page_is_reached_from_the_first() -> None:
    seen: set[Path] = set()
    ahead = [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            ahead += [target for target, _ in links(page)]
    assert set(PAGES) <= seen
    assert len(README.splitlines()) <= 200


DOORS = {each.name: each for each in (OFFLINE, ONLINE, COLLECT, SAC, EVALUATE, EXPORT, ESTIMATE)}
SCRIPTS = {"train": "offline", **{name: name for name in DOORS}}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield those of the blocks for a shell."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub("<([a-z]+)>", r"\1", line), comments=True)
            if words[:1] == ["python"] and words[1].startswith("recipes/"):
                yield [words[1].removeprefix("recipes/").removesuffix(".py"), *words[2:]]
            elif words[:2] == ["python", "-m"]:
                yield [words[3], *words[4:]]
            elif words[:1] == ["torchrl-iql"] and len(words) > 1:
                yield [SCRIPTS.get(words[1], words[1]), *words[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_settings_and_options_that_there_are(page: Path) -> None:
    for script, *given in commands(page):
        if script in DOORS:
            DOORS[script].check([each for each in given if each != "-m" and "hydra" not in each])
            continue
        of_data = script in ("inspect", "replay")
        file = ROOT / ("torchrl_iql/data/__main__.py" if of_data else f"recipes/{script}.py")
        code = file.read_text() + (ROOT / "recipes/compare.py").read_text()
        for option in (each for each in given if each.startswith("--")):
            assert f'"{option}"' in code, (script, option)


def test_every_block_of_python_is_tested() -> None:
    blocks = {
        page: re.findall(r"^(?:<!-- tested: (.+) -->\n)?```python$", page.read_text(), re.M)
        for page in PAGES
    }
    names = [name for its in blocks.values() for name in its]
    assert len(names) > 15 and "" not in names
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in names:
        assert f'"{name}"' in tests or f"tested: {name}" in tests or name.startswith("policy."), (
            name
        )


def test_every_file_that_is_named_exists() -> None:
    layout = re.search(r"```\n(torchrl_iql/ .*?)```", README, re.S)
    assert layout is not None
    folder = ROOT
    for line in layout[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir()
        else:
            assert (folder / name).exists(), line
        for other in re.findall(r"\b\w+\.py\b", line.split(None, 1)[1]):
            assert (folder / name).with_name(other).exists(), line


@pytest.mark.slow
def test_the_pages_of_functions_and_classes_are_made_without_warnings(tmp_path: Path) -> None:
    """By the command of CONTRIBUTING; pdoc warns of annotations that it can not read."""
    command = re.search(r"bin/(pdoc -d google torchrl_iql)`", PAGES[2].read_text())
    assert command is not None
    words = [sys.executable, "-m", *command[1].split(), "-o", str(tmp_path)]
    ended = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stderr.strip() == ""
    assert "expectile" in (tmp_path / "torchrl_iql.html").read_text()
