"""The kernels for a CPU: against NumPy and PyTorch, and the same bits on any number of threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrl_iql.training import native
from torchrl_iql.training.native import Layers, Learner, Networks

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
COLUMNS = native.columns(torch.float64)
STEP_SIZES, EPSILON, TARGET_RATE = (1e-2, 3e-2, 2e-2), 1e-3, 0.1
INPUTS_OF = (0, 1, 1, 2, 1)  # two of the three that learn share an input; V at s' has its own


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_layers(widths: Sequence[int], random: torch.Generator, positive: bool = False) -> Layers:
    def tensor(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=random, dtype=torch.float64) / math.sqrt(shape[0])
        return x.square() if positive else x

    return Layers(
        [tensor(*shape) for shape in itertools.pairwise(widths)],
        [tensor(width) for width in widths[1:]],
    )


def converted(layers: Layers, dtype: torch.dtype) -> Layers:
    return Layers([x.to(dtype) for x in layers.weights], [x.to(dtype) for x in layers.biases])


def tensors(networks: Sequence[Learner]) -> list[Tensor]:
    """Return all that a step changes."""
    return [
        tensor
        for x in networks
        for its in (x.network, x.first_moments, x.second_moments, x.target)
        if its is not None
        for tensor in (*its.weights, *its.biases)
    ]


def make(
    widths: Sequence[int], batch: int, dtype: torch.dtype = torch.float64
) -> tuple[Networks, list[Learner], list[Layers]]:
    """Make them as in IQL: three learn, one with a target; the second and the target also frozen."""
    random = torch.Generator().manual_seed(0)

    def layers(positive: bool = False) -> Layers:
        return converted(random_layers(widths, random, positive), dtype)

    learning = [
        Learner(layers(), layers(), layers(positive=True), layers() if k == 2 else None)
        for k in range(3)
    ]
    target = learning[2].target
    assert target is not None
    frozen = [learning[1].network, target]
    networks = Networks(learning, frozen, INPUTS_OF, batch)
    for tensor in (networks.inputs, networks.gradients):
        tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64))
    return networks, learning, frozen


def forward(weights, biases, x: np.ndarray) -> list[np.ndarray]:
    """Compute the input of each layer, and the output, in NumPy."""
    activations = [x]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        if layer < len(weights) - 1:
            x = np.maximum(x, 0)
        activations.append(x)
    return activations


def backward(weights, activations, gradient: np.ndarray) -> tuple[list, list]:
    """Compute the gradients of weights and biases, in NumPy."""
    of_weights, of_biases = [], []
    for weight, x in reversed(list(zip(weights, activations[:-1], strict=True))):
        of_weights.insert(0, x.T @ gradient)
        of_biases.insert(0, gradient.sum(0))
        gradient = gradient @ weight.T * (x > 0)
    return of_weights, of_biases


@pytest.mark.parametrize("batch", [1, 7, 257])
@pytest.mark.parametrize(
    "multiples",
    [(1, 1), (3, 5), (2, 1, 4), (1, 2, 3, 4, 5), (33, 70, 40)],
    ids=["thin", "linear", "two", "four", "wide"],
)
def test_outputs_and_a_step_are_those_of_numpy(multiples: tuple[int, ...], batch: int) -> None:
    networks, learning, frozen = make([COLUMNS * n for n in multiples], batch)
    parts = [
        [
            [x.numpy().copy() for x in (*its.weights, *its.biases)]
            for its in roles
            if its is not None
        ]
        for roles in [(x.network, x.first_moments, x.second_moments, x.target) for x in learning]
    ]
    depth = len(multiples) - 1

    networks.forward()
    activations = []
    for k, its in enumerate([*(x.network for x in learning), *frozen]):
        numbers = [x.numpy() for x in its.weights], [x.numpy() for x in its.biases]
        activations.append(forward(*numbers, networks.inputs[0][INPUTS_OF[k]].numpy()))
        np.testing.assert_allclose(networks.outputs[k], activations[k][-1], rtol=1e-11, atol=1e-11)

    networks.backward(STEP_SIZES, EPSILON, TARGET_RATE)
    for k, (before, after) in enumerate(zip(parts, learning, strict=True)):
        gradients = backward(before[0][:depth], activations[k], networks.gradients[k].numpy())
        expected = [list(x) for x in before]
        for i, gradient in enumerate([*gradients[0], *gradients[1]]):
            first = 0.9 * before[1][i] + 0.1 * gradient
            second = 0.999 * before[2][i] + 0.001 * gradient**2
            value = before[0][i] - STEP_SIZES[k] * first / (np.sqrt(second) + EPSILON)
            expected[0][i], expected[1][i], expected[2][i] = value, first, second
            if after.target is not None:
                expected[3][i] = before[3][i] + TARGET_RATE * (value - before[3][i])
        for x, y in zip(tensors([after]), [y for part in expected for y in part], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def test_many_steps_are_those_of_autograd_and_adam() -> None:
    widths, rate, target_rate = [COLUMNS * n for n in (2, 5, 3, 1)], 1e-2, 0.05
    random = torch.Generator().manual_seed(0)
    networks, learning, frozen = make(widths, 33)
    for its in learning:
        for tensor in tensors([Learner(its.first_moments, its.second_moments, its.second_moments)]):
            tensor.zero_()
    others = [
        [x.clone().requires_grad_() for x in (*its.network.weights, *its.network.biases)]
        for its in learning
    ]
    target = [x.clone() for x in (*frozen[1].weights, *frozen[1].biases)]
    optimizer = torch.optim.Adam([x for its in others for x in its], lr=rate)

    def call(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        depth = len(widths) - 1
        for layer in range(depth):
            x = x @ parameters[layer] + parameters[depth + layer]
            x = x if layer == depth - 1 else F.relu(x)
        return x

    def loss(outputs: Tensor) -> Tensor:
        policy, value, quality, next_value, goal = outputs.unbind()
        first = (policy.tanh() - next_value.detach()).square().sum()
        return first + (value - goal.detach()).abs().mean() + (quality * value).tanh().sum()

    for step in range(1, 21):
        networks.inputs[0].copy_(torch.randn(networks.inputs[0].shape, generator=random))
        parameters = [*others, others[1], target]
        outputs = torch.stack(
            [call(its, networks.inputs[0][n]) for its, n in zip(parameters, INPUTS_OF, strict=True)]
        )
        optimizer.zero_grad()
        loss(outputs).backward()
        optimizer.step()
        for x, y in zip(target, others[2], strict=True):
            x.lerp_(y.detach(), target_rate)

        networks.forward()
        torch.testing.assert_close(networks.outputs, outputs.detach(), rtol=1e-9, atol=1e-9)
        leaf = networks.outputs.clone().requires_grad_()
        loss(leaf).backward()
        assert leaf.grad is not None
        networks.gradients.copy_(leaf.grad[:3])
        root = math.sqrt(1 - 0.999**step)
        networks.backward([rate * root / (1 - 0.9**step)] * 3, 1e-8 * root, target_rate)
    for its, expected in zip(
        [*(x.network for x in learning), frozen[1]], [*others, target], strict=True
    ):
        for x, y in zip((*its.weights, *its.biases), expected, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, batch: int) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        networks, learning, _ = make(
            [native.columns(dtype) * n for n in (1, 20, 3, 2)], batch, dtype
        )
        for _ in range(3):
            networks.forward()
            networks.backward(STEP_SIZES, EPSILON, TARGET_RATE)
        results.append([networks.outputs, *tensors(learning)])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_single_precision_is_that_of_pytorch() -> None:
    """The difference to float64 is no larger than that of PyTorch's own products."""
    panel = native.columns(torch.float32)
    networks, learning, _ = make([panel, 8 * panel, 8 * panel, panel], 64, torch.float32)
    networks.forward()

    def call(dtype: torch.dtype) -> Tensor:
        x = networks.inputs[0][0].to(dtype)
        its = converted(learning[0].network, dtype)
        for weight, bias in zip(its.weights[:-1], its.biases[:-1], strict=True):
            x = F.relu(x @ weight + bias)
        return x @ its.weights[-1] + its.biases[-1]

    exact = call(torch.float64)
    error = (networks.outputs[0] - exact).abs().max()
    assert error <= 2 * (call(torch.float32) - exact).abs().max()


def test_nan_and_infinity_are_not_lost() -> None:
    networks, learning, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 7)
    networks.inputs[0][0, 3, 0] = math.nan
    networks.inputs[0][1, 2, 0] = math.inf
    networks.forward()
    assert networks.outputs[0, 3].isnan().all()
    assert networks.outputs[0, [0, 1, 2, 4, 5, 6]].isfinite().all()
    assert not networks.outputs[1, 2].isfinite().any()
    networks.backward(STEP_SIZES, EPSILON, TARGET_RATE)
    assert learning[0].network.weights[0][0].isnan().all()
    assert learning[0].network.weights[0][1:].isfinite().all()


def test_relu_passes_gradients_like_that_of_pytorch() -> None:
    """None where the output is 0, whatever it was before; all where it is NaN."""
    widths = [COLUMNS] * 3
    network, zeros = (
        Layers(
            [torch.zeros(COLUMNS, COLUMNS).double() for _ in range(2)],
            [torch.zeros(COLUMNS).double() for _ in range(2)],
        )
        for _ in range(2)
    )
    second = random_layers(widths, torch.Generator(), positive=True)
    network.biases[0][:4] = torch.tensor([-1.0, 0.0, 1.0, math.nan])
    network.weights[1][:] = 1
    networks = Networks([Learner(network, zeros, second)], [], [0], 1)
    networks.forward()
    networks.gradients[:] = 1
    networks.backward([0.0], EPSILON, 1.0)
    x = torch.tensor([-1.0, 0.0, 1.0, math.nan], requires_grad=True)
    F.relu(x).sum().backward()
    assert x.grad is not None
    # The first moment is a tenth of the gradient.
    expected = x.grad.double() * COLUMNS / 10
    torch.testing.assert_close(zeros.biases[0][:4], expected)


def test_padding_stays_zero() -> None:
    networks, learning, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 9)
    for its in (learning[0].network, learning[0].first_moments, learning[0].second_moments):
        its.weights[0][3:] = 0
        its.weights[1][:, 1:] = 0
        its.biases[1][1:] = 0
    networks.inputs[0][0, :, 3:] = 0
    networks.gradients[0, :, 1:] = 0
    for _ in range(3):
        networks.forward()
        networks.backward(STEP_SIZES, EPSILON, TARGET_RATE)
    network = learning[0].network
    assert network.weights[0][:3].all() and not network.weights[0][3:].any()
    assert not network.weights[1][:, 1:].any() and not network.biases[1][1:].any()
    assert not networks.outputs[0, :, 1:].any()


def test_views_are_changed_in_place() -> None:
    _, learning, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 5)
    networks, others, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 5)
    storage = torch.cat([x.flatten() for x in (torch.zeros(1), *tensors(learning))])
    parts = iter(storage[1:].split([x.numel() for x in tensors(learning)]))

    def views(layers: Layers | None) -> Layers | None:
        return layers and Layers(
            [next(parts).view_as(x) for x in layers.weights],
            [next(parts).view_as(x) for x in layers.biases],
        )

    viewing = [
        Learner(*(views(its) for its in (x.network, x.first_moments, x.second_moments, x.target)))
        for x in learning
    ]
    again = Networks(viewing, [viewing[1].network, viewing[2].target], INPUTS_OF, 5)
    again.inputs.copy_(networks.inputs)
    again.gradients.copy_(networks.gradients)
    for its in (networks, again):
        its.forward()
        its.backward(STEP_SIZES, EPSILON, TARGET_RATE)
    assert torch.equal(networks.outputs, again.outputs)
    assert torch.equal(storage[1:], torch.cat([x.flatten() for x in tensors(others)]))


def test_one_of_several_batches_is_computed_as_if_it_were_the_only_one() -> None:
    networks, learning, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 5)
    others, again, _ = make([COLUMNS, 2 * COLUMNS, COLUMNS], 5)
    several = Networks(again, [again[1].network, again[2].target], INPUTS_OF, 5, batches=3)
    several.gradients.copy_(others.gradients)
    for place in (2, 0, 1):
        several.inputs[place] = networks.inputs[0] = torch.randn_like(networks.inputs[0])
        for its, at in ((networks, 0), (several, place)):
            its.forward(at)
            its.backward(STEP_SIZES, EPSILON, TARGET_RATE)
        assert torch.equal(networks.outputs, several.outputs)
    assert all(map(torch.equal, tensors(learning), tensors(again)))


def test_what_does_not_fit_is_refused() -> None:
    layers = random_layers([COLUMNS, COLUMNS], torch.Generator())
    learner = Learner(layers, layers, layers)
    networks = Networks([learner], [], [0], 2)
    with pytest.raises(ValueError, match="size"):
        networks.backward([0.1, 0.1], EPSILON, TARGET_RATE)
    with pytest.raises(ValueError, match="0 networks"):
        Networks([], [], [], 2)
    with pytest.raises(ValueError, match="inputs_of"):
        Networks([learner], [], [0, 1], 2)
    with pytest.raises(ValueError, match="batch_size"):
        Networks([learner], [], [0], 0)
    with pytest.raises(ValueError, match="multiples"):
        Networks([], [random_layers([COLUMNS, COLUMNS + 1], torch.Generator())], [0], 2)
    with pytest.raises(ValueError, match="expected"):
        Networks([learner], [random_layers([COLUMNS, 2 * COLUMNS], torch.Generator())], [0, 0], 2)
    with pytest.raises(ValueError, match="float16"):
        Networks([], [converted(layers, torch.float16)], [0], 2)
    with pytest.raises(ValueError, match="float64"):
        Networks([learner], [converted(layers, torch.float32)], [0, 0], 2)
    with pytest.raises(ValueError, match="contiguous"):
        Networks([], [Layers([x.t() for x in layers.weights], layers.biases)], [0], 2)


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(native, "_library", fail)
    assert native.unavailable.__wrapped__() == "no compiler"
    monkeypatch.setattr(native.sys, "platform", "win32")
    reason = native.unavailable.__wrapped__()
    monkeypatch.setattr(native, "unavailable", lambda: reason)
    with pytest.raises(RuntimeError, match="win32"):
        native.columns(torch.float32)
