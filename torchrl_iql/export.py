"""Policies as files that run without this package: a program of PyTorch, ONNX, or arrays.

* :func:`export_policy`: writes one, once it does what the policy does.

Each is a function of observations ``[B, D]`` to actions of the environment, with normalisation and bounds
inside, and says what it is in JSON. What runs it is on the page of this folder.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

import torchrl_iql
from torchrl_iql.acting import Acting
from torchrl_iql.checkpoint import (
    load_architecture,
    load_metadata,
    load_policy,
    recorded_observations,
)
from torchrl_iql.files import whole
from torchrl_iql.models import Architecture, Torso, Vision
from torchrl_iql.spaces import (
    environment_actions,
    named_leaves,
    observation_dtype,
    observation_row_space,
)

__all__ = ["SUFFIXES", "Exported", "export_policy"]

SUFFIXES = (".pt2", ".onnx", ".npz")

OPSET = 18
"""Of ONNX: the first that PyTorch's exporter writes without converting it, of 2022."""

TOLERANCE = 1e-6
"""In units of half the range of actions."""

ROUNDINGS = 4
"""A file may differ by as often what float32 loses of float64: it sums in another order."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: of the file.
        metadata: that it holds.
        observations: on how many it was compared with the policy,
        recorded: of which so many are those of the data.
        difference: the largest from an action of the policy, in units of half the range of actions; of
            categories the share that differs.
        tolerance: how large it might have been.
    """

    path: Path
    metadata: dict[str, Any]
    observations: int
    recorded: int
    difference: float
    tolerance: float


def export_policy(
    checkpoint: str | Path, output: str | Path, *, observations: int = 1000
) -> Exported:
    """Write the policy of a checkpoint as a file that needs no TorchRL; an old one is replaced.

    Args:
        checkpoint: a file that :func:`torchrl_iql.load_policy` reads.
        output: the file, ``.pt2`` for ``torch.export``, ``.onnx`` or ``.npz``.
        observations: how many of them it is compared on: those that the checkpoint has of the data, at most
            256, and others at random in their range.

    Returns:
        what was written.

    Raises:
        OSError: there is no such checkpoint, or no folder for the file.
        ImportError: what ONNX needs is not installed.
        ValueError: the suffix is another, the checkpoint is none, or its policy is no function of the
            observation, as a Decision Transformer, or for ``.npz`` one that sees images; ``observations`` is
            below 1.
        RuntimeError: the file would not do what the policy does. It is not written.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if observations < 1:
        raise ValueError(f"observations must be at least 1, got {observations!r}")
    if output.suffix == ".onnx":
        _require_onnx()
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.parent}")
    architecture, policy = load_architecture(checkpoint), load_policy(checkpoint)
    act: Acting = policy.act  # pyright: ignore
    if list(policy.in_keys) != ["observation"]:
        raise ValueError(
            f"{checkpoint}: a {architecture.policy} can not be exported, it acts by its rewards and earlier "
            "steps, and a file is a function of one observation: play it with torchrl_iql.Evaluator"
        )
    if architecture.images and output.suffix == ".npz":
        raise ValueError(
            f"{output}: a policy that sees images is more than a few products of matrices: give a file that "
            "ends in .pt2 or .onnx"
        )
    metadata = _metadata(checkpoint, act)
    function = _Function(architecture, act).eval().requires_grad_(False)
    write, opened = _FORMATS[output.suffix]
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of PyTorch about its own code
        content = write(function, metadata)
        run = opened(content)
    rows, recorded = _observations(function, checkpoint, metadata, observations)
    difference, tolerance = _differences(function, act, rows, run)
    if not difference <= tolerance:
        raise RuntimeError(
            f"{output} is not written: its actions differ from those of the policy by {difference:.3g}, "
            f"expected at most {tolerance:.3g}"
        )
    with whole(output) as new:
        new.write_bytes(content)
    return Exported(output, metadata, len(rows), recorded, difference, tolerance)


class _Function(nn.Module):
    """The deterministic policy as plain arithmetic, from observations to actions of the environment."""

    mean: Tensor
    std: Tensor
    middle: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, architecture: Architecture, act: Acting) -> None:
        super().__init__()
        torso = next(each for each in act.policy.modules() if isinstance(each, Torso))
        self.vision = next(
            (each for each in act.policy.modules() if isinstance(each, Vision)), None
        )
        # Which normalises what is no image.
        size = architecture.observation_size if self.vision is None else self.vision.features
        for name, default in (("mean", torch.zeros(size)), ("std", torch.ones(size))):
            self.register_buffer(name, getattr(torso.normalize, name, default).clone())
        weights = [layer.weight.detach().clone() for layer in torso.layers]
        biases = [layer.bias.detach().clone() for layer in torso.layers]
        size = architecture.action_size
        # Of outputs that are mean and deviation, the mean comes first.
        weights[-1], biases[-1] = weights[-1][:size].clone(), biases[-1][:size].clone()
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        space = self.space = act.action_space
        if isinstance(space, spaces.Box):
            low, high = torch.tensor(architecture.action_bounds or ([-1.0] * size, [1.0] * size))
            self.register_buffer("middle", (high + low) / 2)
            self.register_buffer("half_range", (high - low) / 2)
            dtype = space.dtype if space.dtype == np.float64 else np.float32
            for name, bound in (("low", space.low), ("high", space.high)):
                self.register_buffer(name, torch.from_numpy(bound.astype(dtype).reshape(-1)))

    def outputs(self, observation: Tensor) -> Tensor:
        x = observation if self.vision is None else self.vision(observation)
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(x.relu() if i else x, weight, bias)
        return x

    def bounded(self, observation: Tensor) -> Tensor:
        """Return actions before they are rounded, ``[B, A]``."""
        action = self.middle + self.half_range * torch.tanh(self.outputs(observation))
        return torch.minimum(torch.maximum(action, self.low), self.high)

    def forward(self, observation: Tensor) -> Tensor:
        if isinstance(self.space, spaces.Discrete):
            return self.outputs(observation).argmax(-1) + int(self.space.start)
        action = self.bounded(observation)
        action = action.unflatten(-1, self.space.shape) if self.space.shape else action.squeeze(-1)
        if self.space.dtype.kind != "f":  # pyright: ignore
            action = action.round()
        return action.to(getattr(torch, str(self.space.dtype)))


# --- Formats --------------------------------------------------------------------------------------------

Run = Callable[[np.ndarray], np.ndarray]


def _program(function: _Function, metadata: dict[str, Any]) -> torch.export.ExportedProgram:
    size, dtype = metadata["observation"]["size"], metadata["observation"]["dtype"]
    example = torch.zeros(2, size, dtype=getattr(torch, dtype))
    batch = {"observation": {0: torch.export.Dim("batch")}}
    return torch.export.export(function, (example,), dynamic_shapes=batch)


def _torch(function: _Function, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    files = {"metadata.json": json.dumps(metadata)}
    torch.export.save(_program(function, metadata), buffer, extra_files=files)
    return buffer.getvalue()


def _opened_torch(content: bytes) -> Run:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda observations: module(torch.from_numpy(observations)).numpy()


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f".onnx needs {' and '.join(missing)}, not installed: pip install 'torchrl-iql[onnx]', or give "
            "a file that ends in .pt2 or .npz"
        )


def _onnx(function: _Function, metadata: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        _program(function, metadata),
        dynamo=True,
        opset_version=OPSET,
        input_names=["observation"],
        output_names=["action"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    model.metadata_props.add(key="metadata", value=json.dumps(metadata))
    return model.SerializeToString()


def _opened_onnx(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda observations: session.run(None, {"observation": observations})[0]  # pyright: ignore


def _numpy(function: _Function, metadata: dict[str, Any]) -> bytes:
    arrays: dict[str, Any] = {name: its.numpy() for name, its in function.named_buffers()}
    for i, (weight, bias) in enumerate(zip(function.weights, function.biases, strict=True)):
        arrays |= {f"weight_{i}": weight.numpy(), f"bias_{i}": bias.numpy()}
    arrays["layers"] = np.array(len(function.weights))
    if isinstance(function.space, spaces.Discrete):
        arrays["start"] = np.array(function.space.start)
    buffer = io.BytesIO()
    np.savez(buffer, metadata=np.array(json.dumps(metadata)), **arrays)
    return buffer.getvalue()


def _opened_numpy(content: bytes) -> Run:
    its = np.load(io.BytesIO(content))

    def run(observations: np.ndarray) -> np.ndarray:
        x = (observations.astype(np.float32) - its["mean"]) / its["std"]
        for layer in range(its["layers"]):
            x = np.maximum(x, 0) if layer > 0 else x
            x = x @ its[f"weight_{layer}"].T + its[f"bias_{layer}"]
        if "start" in its:
            return x.argmax(-1) + its["start"]
        action = its["middle"] + its["half_range"] * np.tanh(x)
        action = np.clip(action, its["low"], its["high"])
        space = json.loads(its["metadata"].item())["action"]
        dtype = np.dtype(space["dtype"])
        action = action if dtype.kind == "f" else np.rint(action)
        return action.reshape(-1, *space["shape"]).astype(dtype)

    return run


_FORMATS: dict[str, tuple[Callable[[_Function, dict[str, Any]], bytes], Callable[[bytes], Run]]] = {
    ".pt2": (_torch, _opened_torch),
    ".onnx": (_onnx, _opened_onnx),
    ".npz": (_numpy, _opened_numpy),
}


# --- What it is, and whether it is that ------------------------------------------------------------------


def _metadata(checkpoint: str | Path, act: Acting) -> dict[str, Any]:
    known, observed, taken = load_metadata(checkpoint), act.observation_space, act.action_space
    flat = observation_row_space(observed)
    observation: dict[str, Any] = {
        "size": spaces.flatdim(observed),
        "dtype": np.dtype(observation_dtype(observed)).name,
        "low": _bound(flat.low),
        "high": _bound(flat.high),
    }
    if known.get("observed") is not None:
        observation["observed"] = dict(zip(("low", "high"), known["observed"], strict=True))
    if isinstance(observed, spaces.Dict | spaces.Tuple | spaces.Discrete | spaces.MultiDiscrete):
        observation["entries"] = list(_entries(observed))
    if isinstance(taken, spaces.Discrete):
        action = {"shape": [], "dtype": "int64", "n": int(taken.n), "start": int(taken.start)}
    else:
        assert isinstance(taken, spaces.Box)
        bounds = {"low": _bound(taken.low), "high": _bound(taken.high)}
        action = {"shape": list(taken.shape), "dtype": str(taken.dtype), **bounds}
    env, config = known.get("env"), known.get("config") or {}
    return {
        "version": torchrl_iql.__version__,
        "algorithm": config.get("algorithm"),
        "dataset": known.get("dataset"),
        "layout": config.get("layout"),  # of logs: which column is what, in order
        "environment": env and json.loads(env)["id"],
        "steps": known["steps"],
        "observation": observation,
        "action": action,
    }


def _bound(values: np.ndarray) -> Any:
    """Write one number for all dimensions, or a list of one each; null is none."""
    its = [value if np.isfinite(value) else None for value in values.ravel().tolist()]
    return its[0] if len(set(its)) == 1 else its


def _entries(space: Space) -> Iterator[dict[str, Any]]:
    """Yield what a flat observation is joined from."""
    for key, leaf in named_leaves(space):
        match leaf:
            case spaces.Discrete():
                yield {"key": key, "size": int(leaf.n), "start": int(leaf.start)}
            case spaces.MultiDiscrete():
                for n, start in zip(leaf.nvec.flat, leaf.start.flat, strict=True):
                    yield {"key": key, "size": int(n), "start": int(start)}
            case _:
                shape, dtype = list(leaf.shape or ()), str(leaf.dtype)
                yield {"key": key, "size": spaces.flatdim(leaf), "shape": shape, "dtype": dtype}


def _observations(
    function: _Function, checkpoint: str | Path, metadata: Mapping[str, Any], number: int
) -> tuple[np.ndarray, int]:
    """Return observations, and how many are of the data; the others are at random in their range.

    Where that is not known, in three deviations.
    """
    observation, rng = metadata["observation"], np.random.default_rng(0)
    dtype, size = np.dtype(observation["dtype"]), observation["size"]
    recorded = recorded_observations(load_metadata(checkpoint), dtype, size)[:number]
    known, others = observation.get("observed"), (number - len(recorded), size)
    if known is not None:
        low, high = np.array(known["low"]), np.array(known["high"])
    elif function.vision is not None:
        low, high = 0, 256
    else:
        low, high = ((function.mean + sign * function.std).numpy() for sign in (-3, 3))
    if dtype == np.uint8:
        drawn = rng.integers(0, 256, others, dtype=np.uint8)
    else:
        drawn = rng.uniform(low, high, others).astype(np.float32)
    return np.concatenate([recorded, drawn]), len(recorded)


def _differences(
    function: _Function, act: Acting, observations: np.ndarray, run: Run
) -> tuple[float, float]:
    """Return how much the actions of a file differ from those of the policy, and how much they may."""
    expected, found = (
        environment_actions(act.action_space, act.rows(observations)),
        run(observations),
    )
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return np.inf, TOLERANCE
    rows, exact = torch.from_numpy(observations), copy.deepcopy(function).double()
    if not bool(function.outputs(rows).isfinite().all()):
        return np.nan, TOLERANCE
    if isinstance(function.space, spaces.Discrete):
        outputs = exact.outputs(rows)
        lost = (function.outputs(rows) - outputs).abs().max()
        best = outputs.topk(min(2, outputs.shape[-1])).values
        # Between categories that are equally good, rounding decides.
        decided = ((best[:, 0] - best[:, -1]) > ROUNDINGS * lost).numpy()
        return float(((found != expected) & decided).mean()), 0.0
    unit = function.half_range.numpy()
    actions = exact.bounded(rows).numpy()
    lost = np.abs(function.bounded(rows).numpy() - actions) / unit
    tolerance = TOLERANCE + ROUNDINGS * float(lost.max())
    difference = np.abs(found.astype(np.float64) - expected).reshape(len(rows), -1) / unit
    if found.dtype.kind != "f":  # a half is rounded up or down
        difference[np.abs(actions - np.floor(actions) - 0.5) <= tolerance * unit] = 0
    return float(difference.max()), tolerance


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter of ONNX from telling of its progress."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
