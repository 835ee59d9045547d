"""Forward and backward pass of many small multilayer perceptrons on a CPU, in ``mlp.cpp``.

A network is a chain of linear layers with ReLU between them. Those that learn are changed in place,
with their moments and targets: Adam's step is taken where a gradient is computed, which is never
written to memory. Autograd knows nothing of all this.

It is compiled together with ``losses.cpp``, by :mod:`torchrl_iql.training.building`.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrl_iql.training.building import library

__all__ = ["Layers", "Learner", "Networks", "address", "columns", "function", "unavailable"]

_TYPES = {torch.float32: "float", torch.float64: "double"}
_SOURCES = ("mlp.cpp", "losses.cpp")


@dataclass(frozen=True)
class Layers:
    """The parameters of a network, or what belongs to each of them, as a moment.

    Attributes:
        weights: of each layer, ``[in, out]``, contiguous, ``in`` and ``out`` multiples of
            :func:`columns`.
        biases: of each layer, ``[out]``, contiguous.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]


@dataclass(frozen=True)
class Learner:
    """A network that learns, and what changes with it.

    Attributes:
        network: its parameters.
        first_moments: of Adam.
        second_moments: of Adam.
        target: follows the network, if there is one.
    """

    network: Layers
    first_moments: Layers
    second_moments: Layers
    target: Layers | None = None


class Networks:
    """K networks that learn, and F that do not, of the same shapes.

    The tensors given are read and written wherever they are: they may be views, and a frozen
    network may share its parameters with one that learns, or be the target of one.

    Args:
        learning: the networks that learn.
        frozen: the others.
        inputs_of: which of the N inputs each network reads, those that learn first, ``[K + F]``.
        batch_size: B, at least 1.
        batches: S, how many batches ``inputs`` holds.

    Attributes:
        inputs: ``[S, N, B, in]``, to be filled before :meth:`forward`.
        outputs: ``[K + F, B, out]``, what :meth:`forward` computes.
        gradients: ``[K, B, out]``, of the loss with respect to the outputs of the networks that
            learn, to be filled before :meth:`backward`.

    Raises:
        RuntimeError: see :func:`unavailable`.
        ValueError: the tensors do not fit.
    """

    def __init__(
        self,
        learning: Sequence[Learner],
        frozen: Sequence[Layers],
        inputs_of: Sequence[int],
        batch_size: int,
        batches: int = 1,
    ) -> None:
        roles = [(x.network, x.first_moments, x.second_moments, x.target) for x in learning]
        roles += [(network, None, None, None) for network in frozen]
        if not roles or len(inputs_of) != len(roles) or min(inputs_of) < 0 or batch_size < 1:
            raise ValueError(
                f"{len(roles)} networks, inputs_of={inputs_of!r}, batch_size={batch_size!r}"
            )
        first = roles[0][0].weights[0]
        if first.dtype not in _TYPES:
            raise ValueError(f"the weights have the type {first.dtype}")
        panel = columns(first.dtype)
        widths = [len(first), *(weights.shape[-1] for weights in roles[0][0].weights)]
        if any(width % panel for width in widths):
            raise ValueError(f"the widths {widths} are not all multiples of {panel}")
        for layers in itertools.chain(*roles):
            if layers is not None:
                _check(layers, widths, first.dtype)

        self.inputs = first.new_zeros(batches, max(inputs_of) + 1, batch_size, widths[0])
        self.outputs = first.new_zeros(len(roles), batch_size, widths[-1])
        self.gradients = first.new_zeros(len(learning), batch_size, widths[-1])
        table: list[_Layer] = []
        self._kept: list[Any] = [roles]  # what the addresses in it are of
        for k, its in enumerate(roles):
            hidden = [first.new_zeros(width // panel, batch_size, panel) for width in widths[1:-1]]
            activations = [self.inputs[0, inputs_of[k]], *hidden, self.outputs[k]]
            gradients = [None] * (len(widths) - 1)
            if k < len(learning):
                gradients = [*map(torch.zeros_like, hidden), self.gradients[k]]
            self._kept += [activations, gradients]
            for layer, gradient in enumerate(gradients):
                weights = _Parameter(*(address(x and x.weights[layer]) for x in its))
                biases = _Parameter(*(address(x and x.biases[layer]) for x in its))
                matrices = [_matrix(x) for x in (*activations[layer : layer + 2], gradient)]
                table.append(_Layer(*widths[layer : layer + 2], *matrices, weights, biases))
        depth, layers = len(widths) - 1, (_Layer * len(table))(*table)
        sizes = len(learning), len(roles), depth, batch_size
        self._networks = []
        for _ in range(batches):
            self._kept.append(layers)
            self._networks.append(ctypes.byref(_Networks(*sizes, ctypes.addressof(layers))))
            layers = type(layers).from_buffer_copy(layers)
            for layer in layers[::depth]:
                layer.inputs.data += self.inputs[0].nbytes
        self._latest = self._networks[0]
        self._rates = (ctypes.c_double * (len(learning) + 2))()
        self._forward = function("forward", first.dtype)
        self._backward = function("backward", first.dtype)

    def forward(self, batch: int = 0) -> None:
        """Compute ``outputs`` from one of the batches in ``inputs``."""
        self._latest = self._networks[batch]
        self._forward(self._latest, torch.get_num_threads())

    def backward(self, step_sizes: Sequence[float], epsilon: float, target_rate: float) -> None:
        r"""Take a step of Adam with each network that learns, and move its target.

        The activations are those of the last :meth:`forward`.

        Args:
            step_sizes: :math:`\eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` for each network that
                learns, ``[K]``, with the learning rate :math:`\eta` and the betas 0.9 and 0.999.
            epsilon: :math:`10^{-8} \sqrt{1 - \beta_2^t}`.
            target_rate: how far the targets go towards the networks.
        """
        self._rates[:] = (*step_sizes, epsilon, target_rate)
        self._backward(self._latest, self._rates, torch.get_num_threads())


def columns(dtype: torch.dtype) -> int:
    """Return what all widths are multiples of, at most 32: the numbers in two of its vectors."""
    return function("columns", dtype)()


@cache
def unavailable() -> str | None:
    """Say why networks can not be computed by this module, or return None if they can."""
    if sys.platform != "linux":
        return f"it is written for Linux, not {sys.platform}"
    try:
        _library()
    except Exception as error:  # no compiler, or one that fails
        return str(error).strip().partition("\n")[0] or repr(error)
    return None


@cache
def _library() -> ctypes.CDLL:
    return library([Path(__file__).with_name(name) for name in _SOURCES])


def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """Return a function of the library for a type of numbers."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    return getattr(_library(), f"{name}_{_TYPES[dtype]}")


# --- The structures of mlp.cpp ------------------------------------------------------------------


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("panel", ctypes.c_int64)]


class _Parameter(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("value", "first_moment", "second_moment", "target")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in", "out")),
        *((name, _Matrix) for name in ("inputs", "outputs", "gradients")),
        *((name, _Parameter) for name in ("weights", "biases")),
    ]


class _Networks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("learning", "count", "depth", "batch")),
        ("layers", ctypes.c_void_p),
    ]


def address(tensor: Tensor | None) -> int | None:
    """Return where the numbers of a tensor are; None, C's null, of None."""
    return None if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> _Matrix:
    """Describe a tensor ``[B, width]``, or in panels ``[width / columns, B, columns]``."""
    if tensor is None:
        return _Matrix()
    width = tensor.shape[-1]
    panel = columns(tensor.dtype) if tensor.ndim == 2 else tensor.stride(0)
    return _Matrix(tensor.data_ptr(), width, panel)


def _check(layers: Layers, widths: Sequence[int], dtype: torch.dtype) -> None:
    shapes = [*itertools.pairwise(widths), *((width,) for width in widths[1:])]
    tensors = [*layers.weights, *layers.biases]
    if [tuple(tensor.shape) for tensor in tensors] != shapes:
        raise ValueError(f"shapes {[tuple(x.shape) for x in tensors]}, expected {shapes}")
    for x in tensors:
        if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(f"a tensor is not contiguous, not of {dtype}, or not on the CPU")
