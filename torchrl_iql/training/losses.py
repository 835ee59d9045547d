"""The losses of IQL on a CPU, in ``losses.cpp``: their gradients by what the networks put out.

They are those of :func:`torchrl_iql.objectives.functional.losses`. Autograd and :func:`torch.compile` know
nothing of them: to trace and compile the equations would take seconds at every start.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributions, nn
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from torchrl_iql.models import LOG_STD_BOUNDS, GaussianParameters, TanhTo
from torchrl_iql.objectives.base import check_categories
from torchrl_iql.objectives.functional import DISTANCES, Distance
from torchrl_iql.training.native import Networks, address, function

__all__ = ["MEANS", "Batch", "Losses", "Policy"]

MEANS = ("loss_actor", "loss_qvalue", "loss_value", "advantage", "value", "qvalue", "clip_fraction")
MEANS += ("entropy",)
"""What is measured, in the order of ``losses.cpp``."""


@dataclass(frozen=True, eq=False)
class Policy:
    """What makes log pi(a | s) of the outputs of a network and of a parameter of no layer.

    Attributes:
        outputs: how many there are: A, the size of an action, or the number of choices.
        choices: the policy is one over these.
        bounds: middle and half range ``[A]`` of the bounds that tanh takes the mean into, if it does.
        unit: of the deviations, ``[A]``, if it has such.
        tanh: makes the actions of what is normally distributed, if it is.
    """

    outputs: int
    choices: bool = False
    bounds: tuple[Tensor, Tensor] | None = None
    unit: Tensor | None = None
    tanh: distributions.Transform | None = None

    @classmethod
    def of(cls, head: nn.Module, distribution: Any, outputs: int) -> Policy | None:
        """Describe a policy of :mod:`torchrl_iql.models`; None if it is none of them.

        Args:
            head: what turns outputs into an action, or into the parameters of its distribution.
            distribution: names of these parameters, class, and settings; None of a deterministic policy.
            outputs: how many there are.
        """
        if distribution is None:
            return cls(outputs, bounds=_bounds(head)) if isinstance(head, TanhTo) else None
        names, kind, settings = distribution
        settings = {key: its for key, its in settings.items() if key != "validate_args"}
        if kind in (distributions.Categorical, OneHotCategorical):
            plain = names == ["logits"] and not settings and isinstance(head, nn.Identity)
            return cls(outputs, choices=True) if plain else None
        if not isinstance(head, GaussianParameters) or settings.keys() - {"low", "high"}:
            return None
        tanh = None
        if kind is TanhNormal:
            zeros = torch.zeros_like(head.unit)
            tanh = kind(zeros, zeros + 1, **settings).transforms[0]
        elif kind is not IndependentNormal or settings:
            return None
        return cls(outputs, bounds=_bounds(head.squash), unit=head.unit, tanh=tanh)


def _bounds(squash: nn.Module) -> tuple[Tensor, Tensor] | None:
    return (squash.middle, squash.half_range) if isinstance(squash, TanhTo) else None


class Losses:
    """The losses of one learner, by the outputs of its networks.

    Args:
        policy: of the learner.
        networks: policy, V and N Q networks, which learn; and V at s' and the N targets of the Q networks.
        log_std: the policy's parameter, if it has one, and Adam's first and second moment of it, ``[A]``.
        coefficients: expectile, temperature and discount, ``[3, 1]``, float64, to be read at each step.
        weight_clip: as in :class:`~torchrl_iql.IQLLoss`.
        distance: likewise, its ``loss_function``.
    """

    def __init__(
        self,
        policy: Policy,
        networks: Networks,
        log_std: Sequence[Tensor],
        coefficients: Tensor,
        *,
        weight_clip: float,
        distance: Distance,
    ) -> None:
        outputs, dtype = networks.outputs, networks.outputs.dtype
        self._policy, self._coefficients = policy, coefficients
        numbers = [*(policy.bounds or (None, None)), policy.unit]
        numbers = [None if x is None else x.to(dtype).contiguous() for x in numbers]
        learned = [None] * 3 if policy.unit is None else list(log_std)
        self._kept = [networks, numbers, learned]  # what the addresses are of
        qvalues = len(networks.gradients) - 2
        self._losses = ctypes.byref(
            _Losses(
                *(outputs.shape[1], outputs.shape[2], qvalues),
                *(policy.outputs, policy.outputs if policy.choices else 1),
                DISTANCES.index(distance),
                *(weight_clip, *LOG_STD_BOUNDS),
                *map(address, (coefficients, outputs, networks.gradients, *numbers, *learned)),
            )
        )
        self._descend = function("losses", dtype)

    def read(self, batches: Mapping[str, Tensor]) -> list[Batch]:
        """Prepare minibatches.

        Args:
            batches: ``action`` ``[S, B, A]``, of choices int64 ``[S, B]`` or one-hot, ``reward`` ``[S, B]``,
                ``terminated`` bool ``[S, B]``; and where there are such, ``steps_to_next_obs``,
                ``priority_weight`` and ``mask`` ``[S, B]``.

        Raises:
            ValueError: an action is none of the choices.
        """
        policy, action, reward = self._policy, batches["action"], batches["reward"]
        choice, constant = None, torch.zeros_like(reward)
        if policy.unit is not None:
            constant -= policy.unit.log().sum() + policy.outputs * math.log(2 * math.pi) / 2
        if policy.choices:
            choice = action.argmax(-1) if action.ndim == 3 else action
            check_categories("action", choice, policy.outputs)
            action = None
        elif policy.tanh is not None:
            before = policy.tanh.inv(action)
            constant -= policy.tanh.log_abs_det_jacobian(before, action).sum(-1)
            action = before
        discount = self._coefficients[2].to(reward.dtype)
        if "steps_to_next_obs" in batches:
            discount = discount ** batches["steps_to_next_obs"]
        columns = constant, reward, discount, *_shares(batches)
        columns = [x.to(reward.dtype).expand_as(reward) for x in columns]
        columns = [action, choice, *columns, batches["terminated"]]
        columns = [None if x is None else x.contiguous() for x in columns]
        means = reward.new_empty(len(reward), len(MEANS))
        columns += [means, td_errors := torch.empty_like(constant)]
        starts = [(address(x), 0 if x is None else x[0].nbytes) for x in columns]
        return [
            Batch(
                means[s],
                td_errors[s],
                _Batch(*(at and at + s * size for at, size in starts)),
                columns,
            )
            for s in range(len(reward))
        ]

    def descend(self, batch: Batch, step_size: float, epsilon: float) -> None:
        """Write gradients by the outputs that the networks have now, and means; step with ``log_std``.

        Args:
            batch: of which the outputs are.
            step_size: as in :class:`~torchrl_iql.training.adam.Rates`, of the policy.
            epsilon: likewise.
        """
        rates = ctypes.c_double(step_size), ctypes.c_double(epsilon)
        self._descend(self._losses, ctypes.byref(batch.addresses), *rates)


@dataclass(frozen=True)
class Batch:
    """A minibatch, and what is measured of it.

    Attributes:
        means: in the order of ``MEANS``, written by :meth:`Losses.descend`.
        td_errors: squared, the largest of the ensemble, ``[B]``, likewise.
        addresses: of what ``losses.cpp`` reads and writes.
        kept: what they are of.
    """

    means: Tensor
    td_errors: Tensor
    addresses: _Batch
    kept: Sequence[Tensor | None]


def _shares(batches: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what each transition counts in the mean, and in that of a loss, as TorchRL's losses do."""
    reward, mask, weight = (batches.get(key) for key in ("reward", "mask", "priority_weight"))
    assert reward is not None
    counted = torch.ones_like(reward) if mask is None else mask.to(reward.dtype)
    share = counted / counted.sum(-1, keepdim=True).clamp_min(1)
    if weight is None:
        return share, share
    counted = counted * weight
    return share, counted / counted.sum(-1, keepdim=True)


# --- The structures of losses.cpp ---------------------------------------------------------------


class _Losses(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "width", "qvalues")),
        *((name, ctypes.c_int64) for name in ("policy_outputs", "q_outputs", "distance")),
        *((name, ctypes.c_double) for name in ("clip", "least", "most")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "outputs", "gradients")),
        *((name, ctypes.c_void_p) for name in ("middle", "half_range", "unit")),
        *((name, ctypes.c_void_p) for name in ("log_std", "first_moment", "second_moment")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("action", "choice", "constant", "reward")),
        *((name, ctypes.c_void_p) for name in ("discount", "share", "loss_share", "terminated")),
        *((name, ctypes.c_void_p) for name in ("means", "td_errors")),
    ]
