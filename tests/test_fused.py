"""The step of a GPU, its kernel interpreted on the CPU, against that of PyTorch in float64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep, models
from torchrl_iql.training import adam_
from torchrl_iql.training.stacked import StackedProgram

FUSED = "torchrl_iql.training.fused"
SIZES = {"hidden_sizes": (16, 32)}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is defined
    monkeypatch.delitem(sys.modules, FUSED, raising=False)
    yield importlib.import_module(FUSED)
    sys.modules.pop(FUSED, None)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(7,), (40, 50)])
def test_descend(
    fused: ModuleType, replicas: int, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(networks: int) -> Tensor:
        its = networks, replicas, *shape
        return torch.randn(its, generator=generator, dtype=torch.float64).to(dtype)

    stack, gradients, first, second = draw(7), draw(4), draw(4), draw(4).abs()
    rates = torch.rand(replicas, 3, 6, generator=generator, dtype=torch.float64)
    expected, moment, square = stack.double(), first.double(), second.double()
    step_size, epsilon = (
        rates[:, [2, 0, 1, 1], column].T.reshape(4, replicas, *(1 for _ in shape))
        for column in (0, 1)
    )
    adam_(expected[:4], gradients.double(), moment, square, step_size, epsilon)
    expected[4] = expected[1]
    expected[5:].lerp_(expected[2:4], 0.005)

    fused.descend_(stack, gradients, first, second, rates, (2, 0, 1), 0.005)
    for found, wanted in ((stack, expected), (first, moment), (second, square)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def continuous(**settings: Any) -> IQLLoss:
    policy = models.gaussian_policy(3, 2, **SIZES)
    q = models.qvalue_ensemble(3, 2, num=settings.get("num_qvalue_nets", 2), **SIZES)
    return IQLLoss(policy, q, models.value_network(3, **SIZES), **settings)


def single() -> IQLLoss:
    policy = models.squashed_policy(3, 2, **SIZES)
    q = models.qvalue_network(3, 2, **SIZES)
    return IQLLoss(policy, q, models.value_network(3, **SIZES), num_qvalue_nets=1)


def discrete() -> IQLLoss:
    policy = models.categorical_policy(3, 4, **SIZES)
    q = models.discrete_qvalue_network(3, 4, **SIZES)
    networks = policy, q, models.value_network(3, **SIZES)
    return DiscreteIQLLoss(*networks, num_qvalue_nets=1, action_space="categorical")


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("make", [continuous, single, discrete])
@pytest.mark.usefixtures("fused")
def test_a_step_of_a_gpu_is_that_of_the_cpu(make: Callable[[], IQLLoss], replicas: int) -> None:
    torch.manual_seed(0)
    data = TensorDict(
        {
            "observation": torch.randn(100, 3).double(),
            "action": torch.rand(100, 2).double() * 1.8 - 0.9,
            "next": {
                "observation": torch.randn(100, 3).double(),
                "reward": torch.randn(100, 1).double(),
                "terminated": torch.rand(100, 1) < 0.1,
            },
        },
        [100],
    )
    if make is discrete:
        data["action"] = torch.randint(4, (100,))

    def program() -> StackedProgram:
        losses = []
        for seed in range(replicas):
            torch.manual_seed(seed)
            losses.append(make().double())
        rates = [3e-4 * (1 + seed) for seed in range(replicas)]
        optimizations = TrainStep(losses, learning_rate=rates)._optimizations
        return StackedProgram(losses, optimizations)

    ours, other = program(), program()
    indices = torch.randint(100, (5, replicas, 16))
    rates = torch.rand(5, replicas, 3, 6, dtype=torch.float64) * 1e-2
    whole = frozenset[str]()
    step = ours.shared._on_a_gpu(lambda function: function)
    prepared = step.prepare(ours, ours.columns(data), indices)
    for t in range(5):
        found, priority = step.take(ours, None, prepared[t], rates[t])
        wanted, _ = other.update(other.state, other.columns(data), indices[t], rates[t], whole)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert priority is None
    batch = ours.columns(data[: 16 * replicas])
    for mine, its in zip(
        step.take(ours, None, step.prepare(ours, batch, None)[0], rates[0]),
        other.update(other.state, batch, None, rates[0], whole),
        strict=True,
    ):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    for mine, its in zip(ours.losses, other.losses, strict=True):
        torch.testing.assert_close(mine.state_dict(), its.state_dict(), rtol=1e-12, atol=1e-12)
