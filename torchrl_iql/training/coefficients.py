"""What a loss computes with and does not learn: expectile, discount, the clip of the weights.

A loss has the buffers that are in no network, and the modules in it that are no networks, as its value
estimator, have theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictParams
from torch import Tensor, nn
from torchrl.objectives import ValueEstimators
from torchrl.objectives.common import LossModule

__all__ = ["Coefficients", "coefficients", "learned", "plain", "set_coefficients"]

Coefficients = dict[str, Tensor | bool | int | float | str]
"""By name, as ``"expectile"`` or ``"_value_estimator.gamma"``."""


def learned(loss: LossModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was learned of a state dict: networks, targets, and parameters of their own."""
    parameters = {name for name, _ in loss.named_parameters()}
    return {k: tensor for k, tensor in state.items() if "_params." in k or k in parameters}


def coefficients(loss: LossModule) -> Coefficients:
    """Return the coefficients of a loss: its buffers, copied, persistent or not, and :func:`plain`."""
    buffers = {
        prefix + name: buffer.clone()
        for prefix, module in _owners(loss)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    return {**plain(loss), **buffers}


def plain(loss: LossModule) -> dict[str, bool | int | float | str]:
    """Return the public attributes that are numbers, flags or text, and the type of value estimator."""
    found = {
        prefix + name: value
        for prefix, module in _owners(loss)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and name != "training"
        and not name.startswith("_")
    }
    kind = getattr(loss, "value_type", None)
    return {**found, "value_type": kind.name} if isinstance(kind, ValueEstimators) else found


def set_coefficients(loss: LossModule, values: Mapping[str, Any]) -> None:
    """Set coefficients of a loss in place; those that are not named stay as they are.

    Raises:
        ValueError: the loss has none of that name, or of another shape.
    """
    kind = values.get("value_type")
    if kind is not None and kind != plain(loss).get("value_type"):
        loss.make_value_estimator(ValueEstimators[kind])
    if unknown := sorted(values.keys() - coefficients(loss).keys()):
        raise ValueError(
            f"the state has {', '.join(unknown)}, and this {type(loss).__name__} has not: build it as the "
            'one that was saved, or load with keep=("settings",)'
        )
    for prefix, module in _owners(loss):
        for name in {*vars(module), *module._buffers} - {"value_type"}:
            if prefix + name not in values:
                continue
            value, buffer = values[prefix + name], module._buffers.get(name)
            if buffer is None:
                setattr(module, name, value)
                continue
            if (its := torch.as_tensor(value)).shape != buffer.shape:
                raise ValueError(
                    f"the state's {prefix + name} has shape {tuple(its.shape)}, expected that of this "
                    f'{type(loss).__name__}, {tuple(buffer.shape)}: load with keep=("settings",)'
                )
            buffer.copy_(its)


def _owners(loss: LossModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the loss and the modules in it that are no networks, with what stands before their names."""
    yield "", loss
    for name, module in loss._modules.items():
        if module is not None and not isinstance(module, TensorDictParams):
            yield f"{name}.", module
