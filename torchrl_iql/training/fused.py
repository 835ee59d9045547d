"""Adam and what follows the networks in one kernel, for stacks on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrl_iql.training.adam import BETAS, Rates

__all__ = ["descend_"]

BLOCK = 1024
"""Numbers of a network that one program changes."""

_STEP_SIZE = tl.constexpr(Rates._fields.index("step_size"))
_EPSILON = tl.constexpr(Rates._fields.index("epsilon"))
_SECOND = tl.constexpr(BETAS[1])
_REST_OF_FIRST, _REST_OF_SECOND = (tl.constexpr(1 - beta) for beta in BETAS)


def descend_(
    stack: Tensor,
    gradients: Tensor,
    first_moments: Tensor,
    second_moments: Tensor,
    rates: Tensor,
    rows: tuple[int, int, int],
    target_rate: float,
) -> None:
    """Take a step of Adam with networks of R learners, and move their targets.

    Args:
        stack: policy, V and N Q networks; V again, and N targets, ``[3 + 2N, R, ...]``, contiguous,
            changed in place.
        gradients: of those that learn, ``[2 + N, R, ...]``, contiguous.
        first_moments: likewise, changed in place.
        second_moments: likewise, changed in place.
        rates: of :meth:`Optimization.rates`, ``[R, networks, 6]``, contiguous, float64.
        rows: of policy, V and the Q networks among the networks of ``rates``.
        target_rate: how far the targets go towards the Q networks.
    """
    learning, replicas = gradients.shape[:2]
    size = gradients[0, 0].numel()
    wide = tl.float64 if stack.dtype == torch.float64 else tl.float32
    _descend[(triton.cdiv(size, BLOCK), learning * replicas)](
        stack,
        gradients,
        first_moments,
        second_moments,
        rates,
        size,
        replicas,
        learning,
        rates.shape[-2],
        rates.shape[-1],
        *rows,
        TARGET_RATE=target_rate,  # pyright: ignore
        WIDE=wide,  # pyright: ignore
        BLOCK=BLOCK,  # pyright: ignore
    )


@triton.jit
def _descend(
    stack,
    gradients,
    first_moments,
    second_moments,
    rates,
    size,
    replicas,
    learning,
    networks,
    columns,
    policy_row,
    value_row,
    qvalue_row,
    TARGET_RATE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    network = tl.program_id(1) // replicas
    replica = tl.program_id(1) % replicas
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = within < size
    at = tl.program_id(1).to(tl.int64) * size + within

    row = tl.where(network == 0, policy_row, tl.where(network == 1, value_row, qvalue_row))
    rates += (replica * networks + row) * columns
    step_size = tl.load(rates + _STEP_SIZE).to(WIDE)
    epsilon = tl.load(rates + _EPSILON).to(WIDE)

    gradient = tl.load(gradients + at, mask=held, other=0).to(WIDE)
    first = tl.load(first_moments + at, mask=held, other=0).to(WIDE)
    second = tl.load(second_moments + at, mask=held, other=0).to(WIDE)
    parameter = tl.load(stack + at, mask=held, other=0).to(WIDE)
    first += _REST_OF_FIRST * (gradient - first)
    second = _SECOND * second + _REST_OF_SECOND * gradient * gradient
    parameter -= step_size * first / (tl.sqrt(second) + epsilon)
    tl.store(first_moments + at, first, mask=held)
    tl.store(second_moments + at, second, mask=held)
    tl.store(stack + at, parameter, mask=held)

    if network > 0:  # V at s' has what V has, and the targets go towards the Q networks
        follower = (learning + network - 1) * replicas + replica
        there = follower.to(tl.int64) * size + within
        slow = tl.load(stack + there, mask=held, other=0).to(WIDE)
        moved = slow + TARGET_RATE * (parameter - slow)
        tl.store(stack + there, tl.where(network == 1, parameter, moved), mask=held)
