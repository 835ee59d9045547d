"""Exported policies: what runs without this package does what the policy does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.spaces import Dict as GymDict

from iql_losses import built
from test_acting import COMPOUND, KINDS, SPACES, batch_of, dataset, saved, saved_transformer
from torchrl_iql import IQLLoss, TrainStep, __version__, checkpoint, export, load_policy
from torchrl_iql.export import SUFFIXES, export_policy
from torchrl_iql.models import Architecture
from torchrl_iql.spaces import observed_rows
from torchrl_iql_recipes.deployment.settings import Export, Play
from torchrl_iql_recipes.experiment.schema import SettingsError

PAGE = (Path(__file__).parents[1] / "torchrl_iql/README.md").read_text()
BOUNDED = Box(np.float32([-1, 2]), np.float32([3, 2.5]))
POLICIES: dict[str, tuple[gymnasium.Space, gymnasium.Space, str, dict[str, Any]]] = {
    **{kind: (SPACES["vector"], BOUNDED, kind, {}) for kind in KINDS},
    "raw": (SPACES["vector"], BOUNDED, "gaussian", {"normalize_observation": False}),
    "data's bounds": (
        SPACES["vector"],
        BOUNDED,
        "gaussian",
        {"action_bounds": ([0, 2.1], [1, 2.2])},
    ),
    "whole numbers": (COMPOUND, Box(-4, 5, (3,), np.int16), "gaussian", {}),
    "doubles": (SPACES["matrix"], Box(-0.3, 0.1, (3,), np.float64), "squashed", {}),
    "categories": (COMPOUND, Discrete(3, start=7), "categorical", {}),
    "image": (SPACES["image"], BOUNDED, "deterministic", {}),
    "image's categories": (SPACES["image"], Discrete(4), "categorical", {}),
}


def consumer(suffix: str, action: gymnasium.Space, rows: np.ndarray) -> str:
    """Return the code of the page."""
    found = re.search(rf"<!-- tested: policy\{suffix} -->\n```python\n(.*?)```", PAGE, re.S)
    assert found is not None
    cast = r"\.astype\(np\.float32\)  # \[B, D\]; of images np\.uint8"
    code = re.sub(cast, ".astype(np.uint8)", found[1]) if rows.dtype == np.uint8 else found[1]
    lines = code.splitlines()
    assert len(lines) <= 10
    if suffix == ".npz" and isinstance(action, Discrete):
        other = re.search(r"Of discrete ones, there is\n`(.*?)` in place of the last two", PAGE)
        assert other is not None
        lines[-2:] = [other[1]]
    elif suffix == ".npz" and action.dtype == np.int16:
        assert "where the space holds whole numbers, `np.rint(action)`" in PAGE
        lines.append("action = np.rint(action)")
    return "\n".join(lines)


def alone(code: str, folder: Path) -> None:
    """Run code where nothing of this package or of TorchRL can be imported."""
    blocked = ["torchrl_iql", "torchrl_iql_recipes", "torchrl", "tensordict", "gymnasium", "minari"]
    script = f"import sys\nsys.modules |= dict.fromkeys({blocked})\n{code}"
    command = [sys.executable, "-W", "error", "-c", script]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow), ".npz"])
def test_a_file_acts_as_its_policy_without_this_package(suffix: str, tmp_path: Path) -> None:
    """By the code of the page, on NumPy's numbers, single or in batches, also far outside of the data."""
    code, expected = ["import os", "import numpy as np", "import torch" * (suffix == ".pt2")], {}
    for name, (observed, action, kind, more) in POLICIES.items():
        folder = tmp_path / name
        folder.mkdir()
        path = saved(folder, dataset(observed, action), kind, **more)
        its = export_policy(path, folder / f"policy{suffix}")
        assert its.observations == 1000 and its.difference <= its.tolerance < 2e-5
        several = [observed.sample() for _ in range(37)]
        expected[name] = load_policy(path).act(batch_of(observed, several))
        rows, _ = observed_rows(observed, batch_of(observed, several))
        np.save(folder / "observations.npy", rows if rows.dtype == np.uint8 else rows.astype(float))
        code += [f"os.chdir({str(folder)!r})", "several = np.load('observations.npy')"]
        for batch, number in (("several", "all"), ("several[0]", "one")):
            code += [f"observations = {batch}", consumer(suffix, action, rows)]
            code += [f"np.save('{number}.npy', action)"]
    alone("\n".join(code), tmp_path)
    for name, actions in expected.items():
        found, one = (np.load(tmp_path / name / f"{number}.npy") for number in ("all", "one"))
        tolerance = 0 if actions.dtype.kind == "i" else 1e-5
        shape = (-1, *actions.shape[1:])
        np.testing.assert_allclose(found.reshape(shape), actions, rtol=0, atol=tolerance)
        np.testing.assert_allclose(one.reshape(shape), actions[:1], rtol=0, atol=tolerance)
        if suffix != ".npz":  # which is arrays: their code says nothing of types
            assert (found.shape, found.dtype) == (actions.shape, actions.dtype)
            assert all(POLICIES[name][1].contains(each) for each in found)


def test_every_file_says_what_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path, data := dataset(COMPOUND, Box(-4, 5, (1, 3), np.int16)))
    for suffix in SUFFIXES:
        expected = export_policy(path, tmp_path / f"policy{suffix}").metadata
    found = re.search(r"<!-- tested: metadata -->\n```python\n(.*?)```", PAGE, re.S)
    assert found is not None
    reads = re.sub(r"metadata = (.*)", r"print(json.dumps(\1), file=out)", found[1])
    prefix = "import torch, onnxruntime, numpy as np\nout = open('out.txt', 'w')\n"
    alone(f"{prefix}{reads}\nout.close()", tmp_path)
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [expected] * 3
    rows = data.transitions["observation"]
    assert expected["version"] == __version__ and expected["dataset"] == "numbers"
    assert (expected["algorithm"], expected["environment"], expected["steps"]) == (None, None, 0)
    assert expected["action"] == {"shape": [1, 3], "dtype": "int16", "low": -4, "high": 5}
    observation = expected["observation"]
    assert observation["observed"]["low"] == rows.amin(0).tolist()
    assert (observation["size"], observation["dtype"]) == (rows.shape[1], "float32")
    assert observation["entries"] == [
        {"key": "dials", "size": 2, "start": 5},
        {"key": "dials", "size": 3, "start": -1},
        {"key": "hand/gear", "size": 4, "start": -1},
        {"key": "hand/position", "size": 6, "shape": [2, 3], "dtype": "float32"},
        {"key": "lights", "size": 3, "shape": [3], "dtype": "int8"},
        {"key": "pair/0", "size": 2, "shape": [2], "dtype": "float64"},
        {"key": "pair/1", "size": 2, "start": 0},
    ]
    flat = gymnasium.spaces.flatten_space(COMPOUND)
    assert (observation["low"], observation["high"]) == (flat.low.tolist(), flat.high.tolist())  # pyright: ignore


def test_bounds_that_there_are_not_are_null(tmp_path: Path) -> None:
    unbounded = Box(np.float32([-np.inf, 0]), np.float32([np.inf, 1]))
    path = saved(tmp_path, dataset(unbounded, Discrete(3, start=7)))
    its = export_policy(path, tmp_path / "policy.npz").metadata
    assert (its["observation"]["low"], its["observation"]["high"]) == ([None, 0.0], [None, 1.0])
    assert "entries" not in its["observation"]
    assert its["action"] == {"shape": [], "dtype": "int64", "n": 3, "start": 7}


def test_a_policy_of_an_earlier_checkpoint_is_exported(tmp_path: Path) -> None:
    """Without spaces, environment or range."""
    path = saved(tmp_path, dataset(SPACES["vector"], BOUNDED), known=False)
    its = export_policy(path, tmp_path / "policy.npz")
    assert its.metadata["action"]["low"] == [-1.0, 2.0]
    assert (its.metadata["dataset"], "observed" in its.metadata["observation"]) == (None, False)


# --- Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_would_not_do_it_is_not_left(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, dataset(SPACES["vector"], BOUNDED))
    output = tmp_path / f"policy{suffix}"
    output.write_text("an older one")
    write, opened = export._FORMATS[suffix]

    def wrong(function: Any, metadata: dict[str, Any]) -> bytes:
        function.biases[-1].add_(1e-4)
        content = write(function, metadata)
        function.biases[-1].sub_(1e-4)
        return content

    monkeypatch.setitem(export._FORMATS, suffix, (wrong, opened))
    with pytest.raises(RuntimeError, match=rf"policy\{suffix} is not written: its actions differ"):
        export_policy(path, output)
    assert output.read_text() == "an older one"
    monkeypatch.undo()
    export_policy(path, output)
    assert output.stat().st_size > 1000
    assert {file.name for file in tmp_path.iterdir()} == {path.name, output.name}


@pytest.mark.parametrize("action", [BOUNDED, Discrete(2)], ids=["continuous", "discrete"])
def test_a_policy_that_is_not_finite_is_not_exported(
    action: gymnasium.Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(SPACES["vector"], action)
    monkeypatch.setattr(
        torch.nn.init, "zeros_", lambda tensor: torch.nn.init.constant_(tensor, torch.nan)
    )
    path = saved(tmp_path, data)
    with pytest.raises(RuntimeError, match="differ from those of the policy by nan"):
        export_policy(path, tmp_path / "policy.npz")


def test_a_decision_transformer_is_refused_by_name(tmp_path: Path) -> None:
    path = saved_transformer(tmp_path)
    for suffix in SUFFIXES:
        with pytest.raises(ValueError, match="a decision_transformer can not be exported, it acts"):
            export_policy(path, tmp_path / f"policy{suffix}")
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_not_be_written_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"policy\.pt: expected a file that ends in \.pt2 or \.on"):
        export_policy("missing.ckpt", "policy.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        export_policy("missing.ckpt", tmp_path / "none/policy.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at missing\.ckpt"):
        export_policy("missing.ckpt", tmp_path / "policy.npz")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"\.onnx needs onnxruntime, not installed: pip install"):
        export_policy("missing.ckpt", tmp_path / "policy.onnx")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (Export, {"output": "a.npz"}, "give checkpoint=<file>"),
        (Export, {"checkpoint": "a"}, "give output=<file>"),
        (Export, {"checkpoint": "a", "output": "b.pt"}, r"output=b\.pt: expected a file that ends"),
        (Export, {"checkpoint": "a", "output": "no/b.npz"}, "there is no folder no"),
        (Play, {}, "give checkpoint=<file>"),
        (Play, {"checkpoint": "a", "env": {"noise": 1}}, "expected an id beside the arguments"),
        (Play, {"checkpoint": "a", "video": "b.gif"}, r"video=b\.gif: expected a file that ends"),
        (Play, {"checkpoint": "a", "episodes": 0}, "episodes=0: expected an integer of at least 1"),
    ],
)
def test_settings_are_refused_in_one_line(part: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        part.of(values)


def test_the_script_writes_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, dataset(SPACES["vector"], BOUNDED))
    script = Path(__file__).parents[1] / "recipes/export.py"
    for output, code, told in [
        (
            "policy.npz",
            0,
            r"policy\.npz: \d kB, actions for 1000 observations, \d+ of them recorded, as the policy's to",
        ),
        ("policy.txt", 1, r"export\.py: output=policy\.txt: expected a file that ends in \.pt2 or"),
    ]:
        command = [sys.executable, str(script), f"checkpoint={path}", f"output={output}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        (line,) = (ended.stdout + ended.stderr).splitlines()
        assert ended.returncode == code and re.match(told, line)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("space", [SPACES["image"], COMPOUND])
def test_a_file_is_compared_on_what_was_recorded(
    space: gymnasium.Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(space, BOUNDED)
    compared, differences = [], export._differences

    def seen(function: Any, act: Any, observations: np.ndarray, run: Any) -> tuple[float, float]:
        compared.append(observations)
        return differences(function, act, observations, run)

    monkeypatch.setattr(export, "_differences", seen)
    its = export_policy(saved(tmp_path, data, "deterministic"), tmp_path / "policy.pt2")
    rows = data.transitions["observation"].numpy()
    assert 0 < its.recorded <= min(256, len(rows))
    assert len(compared[0]) == 1000 and compared[0].dtype == rows.dtype
    assert all((rows == each).all(-1).any() for each in compared[0][: its.recorded])
    assert compared[0][: its.recorded].nbytes <= 2**18


def test_observations_may_be_far_from_the_unit(tmp_path: Path) -> None:
    """The file is compared where the data are."""
    wide = Box(-3000, 3000, (4,))
    its = export_policy(
        saved(tmp_path, dataset(wide, BOUNDED), normalize_observation=False),
        tmp_path / "policy.npz",
    )
    assert its.difference <= its.tolerance < 1e-2
    assert its.metadata["observation"]["observed"]["high"][0] > 1000


def test_a_loop_of_ones_own_is_exported(tmp_path: Path) -> None:
    architecture = Architecture(observation_size=3, action_size=2)
    step = TrainStep(IQLLoss(*built(architecture)))
    path = checkpoint.save(tmp_path / "a.ckpt", step, architecture)
    assert export_policy(path, tmp_path / "policy.npz").metadata["action"]["low"] == -1.0


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("joints", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_policy_that_sees_images_leaves_with_its_convolutions(
    suffix: str, joints: bool, tmp_path: Path
) -> None:
    camera = Box(0, 255, (3, 40, 36), np.uint8)
    observed = GymDict({"camera": camera, "joints": Box(-1, 1, (2,))}) if joints else camera
    data = dataset(observed, BOUNDED)
    path = saved(tmp_path, data, images=[(0, [3, 40, 36])])
    its = export_policy(path, tmp_path / f"policy{suffix}", observations=20)
    assert its.metadata["observation"]["dtype"] == ("float32" if joints else "uint8")
    policy, rows = load_policy(path), data.transitions["observation"].numpy()
    expected = policy.act.rows(rows)  # pyright: ignore
    names = [
        "observations = np.load('rows.npy')",
        "assert np.allclose(action, expected, atol=1e-5)",
    ]
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "expected.npy", expected)
    code = [
        *("import numpy as np", "import torch" * (suffix == ".pt2"), names[0]),
        *(consumer(suffix, BOUNDED, rows), "expected = np.load('expected.npy')", names[1]),
    ]
    alone("\n".join(code), tmp_path)
    with pytest.raises(ValueError, match=r"give a file that ends in \.pt2 or \.onnx"):
        export_policy(path, tmp_path / "policy.npz")
