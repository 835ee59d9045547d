"""What an import loads, prints and offers: a process for each, since this one has loaded everything."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import torchrl_iql
import torchrl_iql.data

ROOT = Path(__file__).parents[1]
PACKAGES = [torchrl_iql, torchrl_iql.data]
LIGHT = {"cloudpickle", "farama_notifications", "filelock", "gymnasium", "torchrl_iql"}
"""What the loss may load beside TorchRL's."""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments, *(["-c", code] if code else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def loaded(code: str) -> set[str]:
    """Return the modules that are loaded after this, nothing having been printed."""
    ended = python(f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))")
    assert ended.stderr == ""
    return set(json.loads(ended.stdout))


def test_the_loss_loads_little_more_than_torchrls() -> None:
    theirs = loaded("import torchrl.objectives")
    ours = loaded("from torchrl_iql import IQLLoss, TrainStep, Evaluator, load_policy, models")
    packages = ({name.partition(".")[0] for name in each} for each in (ours, theirs))
    assert set.difference(*packages) <= LIGHT
    heavy = {"torch", "minari", "h5py", "gymnasium_robotics", "mujoco"}
    assert not heavy & loaded("import torchrl_iql")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_are_those_that_a_type_checker_sees(package: ModuleType) -> None:
    with open(package.__file__ or "") as file:
        (guarded,) = (node for node in ast.parse(file.read()).body if isinstance(node, ast.If))
    seen: dict[str, object] = {}
    exec(compile(ast.Module(guarded.body, []), "<imports>", "exec"), seen)
    del seen["__builtins__"]
    assert sorted(seen) == package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name) is value for name, value in seen.items())
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_the_version_is_known_without_pytorch() -> None:
    """From one place: the package says it, and what is installed has it from there."""
    code = "import sys, torchrl_iql\nprint(torchrl_iql.__version__, 'torch' in sys.modules)"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert version == {"version": {"attr": "torchrl_iql.__version__"}}
    assert python(code).stdout.split() == [metadata.version("torchrl-iql"), "False"]


def test_names_are_there_before_they_are_used() -> None:
    python(
        "import torchrl_iql, torchrl_iql.data.replaying\n"
        "for package in (torchrl_iql, torchrl_iql.data):\n"
        "    assert set(package.__all__) <= set(dir(package))\n"
        "from torchrl_iql import *\n"
        "from torchrl_iql.data import *\n"
        "assert load is load_dataset and TrainStep is torchrl_iql.training.TrainStep\n"
        "assert {*torchrl_iql.__all__, *torchrl_iql.data.__all__} <= set(globals())"
    )


def test_a_name_is_not_that_of_the_module_it_is_in() -> None:
    """Else whoever imports that module first would find it in the name's place."""
    for package in PACKAGES:
        modules = {module.name for module in iter_modules(package.__path__)}
        assert modules & set(package.__all__) <= {"models"}


def test_a_module_that_lacks_another_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not an attribute that is missing."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "torchrl_iql.data.hdf5", raising=False)
    monkeypatch.delattr(torchrl_iql.data, "hdf5", raising=False)
    with pytest.raises(ModuleNotFoundError, match="h5py"):
        _ = torchrl_iql.data.hdf5
    monkeypatch.undo()
    assert importlib.import_module("torchrl_iql.data.hdf5")


def test_gymnasium_knows_antmaze_after_the_import_alone() -> None:
    python("import torchrl_iql, gymnasium\ngymnasium.make('torchrl_iql/AntMaze_UMaze-v0').reset()")


def test_gymnasium_knows_the_robots_at_the_first_look_up() -> None:
    """Without a word, but to who asks for a hand whose rewards have changed."""
    made = "from torchrl_iql.environments import flat_environment, spec_of\n"
    assert python(made + "spec_of('PointMaze_UMaze-v3')").stderr == ""
    assert python(made + "flat_environment('AdroitHandPen-v1')").stderr == ""
    told = python(made + "for _ in range(2): flat_environment('AdroitHandDoor-v1')").stderr
    changed = "reward functions were updated"
    assert told.count(changed) == python("import gymnasium_robotics").stderr.count(changed)


def test_a_report_on_runs_loads_no_pytorch() -> None:
    """Nor what reads data or plays: it is made from what runs have recorded."""
    page = loaded("from torchrl_iql_recipes import report")
    assert {"jinja2", "matplotlib", "torchrl_iql_recipes.reporting.page"} <= page
    assert not {"torch", "tensordict", "minari", "h5py", "mujoco"} & page


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_help_on_data_loads_no_pytorch(command: str) -> None:
    ended = python("", "-X", "importtime", "-m", "torchrl_iql.data", command, "--help")
    assert "usage: python -m torchrl_iql.data" in ended.stdout
    modules = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "gymnasium" in modules and "torch" not in modules
