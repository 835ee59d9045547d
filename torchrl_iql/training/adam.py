"""Adam and the targets' moving average, on all tensors of a learner at once.

What changes from step to step, bias corrections and schedules, comes from outside as tensors: compiled
code and CUDA graphs read it, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BETAS", "EPSILON", "Rates", "adam_", "adam_all_", "clip_", "follow_"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Rates(NamedTuple):
    """What Adam needs to know of one step, scalars.

    Attributes:
        step_size: learning rate * c / (1 - beta_1^t), with c the square root of 1 - beta_2^t.
        epsilon: 1e-8 * c.
        decay: what weight decay leaves of a parameter, 1 - learning rate * weight decay.
        learning_rate: of the step, its schedule included.
        count: t, the number of updates taken, this one included.
    """

    step_size: Tensor
    epsilon: Tensor
    decay: Tensor
    learning_rate: Tensor
    count: Tensor


def adam_(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
) -> None:
    """Apply Adam (Kingma, Ba, 2015) to a tensor, as :class:`torch.optim.Adam`, a step size per row.

    Args:
        parameters: any shape, changed in place.
        gradients: of the same shape.
        first_moment: of the same shape, changed in place.
        second_moment: of the same shape, changed in place.
        step_size: as in :class:`Rates`, broadcast over ``parameters``.
        epsilon: as in :class:`Rates`, broadcast over ``parameters``.
    """
    first_moment.lerp_(gradients, 1 - BETAS[0])
    second_moment.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
    parameters.sub_(step_size * first_moment / second_moment.sqrt().add_(epsilon))


def adam_all_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    rates: Rates,
    weight_decay: float,
) -> None:
    """Apply Adam to a network, with decoupled weight decay (Loshchilov, Hutter, 2019) if not 0.

    Eagerly PyTorch's fused kernel, where it can be used; else the same arithmetic, which the compiler
    fuses if there is one.

    Args:
        parameters: changed in place.
        gradients: one per parameter.
        first_moments: changed in place.
        second_moments: changed in place.
        rates: of this step.
        weight_decay: in units of the learning rate.
    """
    # The fused kernel walks through memory, so that it takes a transposed tensor for another one.
    dense = not torch.compiler.is_compiling() and all(p.is_contiguous() for p in parameters)
    if dense:
        rate, count = rates.learning_rate, rates.count
        if rate.device.type == "cuda":  # its kernel reads these as float32, whatever they are
            rate, count = rate.float(), count.float()
        torch._fused_adamw_(  # pyright: ignore
            list(parameters),
            [gradient.contiguous() for gradient in gradients],
            list(first_moments),
            list(second_moments),
            [],
            [count] * len(parameters),
            lr=rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        return
    for parameter, gradient, first, second in zip(
        parameters, gradients, first_moments, second_moments, strict=True
    ):
        if weight_decay:
            parameter.mul_(rates.decay.to(parameter.dtype))
        step_size, epsilon = (x.to(parameter.dtype) for x in (rates.step_size, rates.epsilon))
        adam_(parameter, gradient, first, second, step_size, epsilon)


def clip_(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale gradients to a norm up to ``max_norm``, as :func:`torch.nn.utils.clip_grad_norm_`."""
    if not gradients:  # no network is due
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    scale = (max_norm / (torch.linalg.vector_norm(norms) + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def follow_(targets: Sequence[Tensor], parameters: Sequence[Tensor], rate: float) -> None:
    r"""Apply Polyak averaging, :math:`\hat\theta \leftarrow (1 - \alpha) \hat\theta + \alpha \theta`."""
    if targets:
        torch._foreach_lerp_(list(targets), list(parameters), rate)  # pyright: ignore
