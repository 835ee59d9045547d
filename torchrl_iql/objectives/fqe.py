"""Fitted Q evaluation: what a given policy is worth, learned from transitions that it did not make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_iql.objectives import functional
from torchrl_iql.objectives.base import (
    at_category,
    at_least_float32,
    check_number,
    check_shape,
    nested,
    output_of,
    run,
    run_stacked,
    squeeze_last,
    takes_stacked_parameters,
)

__all__ = ["FQELoss"]

BEYOND = 0.01
"""Of the range between the bounds: what errors around a bound, as 0 of sparse rewards, do not reach."""


class FQELoss(LossModule):
    r"""Fitted Q evaluation of a fixed policy by N independent Q networks.

    Le, Voloshin, Yue, "Batch Policy Learning under Constraints", 2019 (https://arxiv.org/abs/1903.08738).
    Each network descends

    .. math::
        w_i \left( Q_i(s, a) - \mathrm{clip}[ r + \gamma (1 - terminated) \hat Q_i(s', \pi(s')) ] \right)^2

    with its own target network :math:`\hat Q_i`. The policy is not evaluated here: what it does in the next
    state is a column of the data, ``("next", "action")``, computed once
    (:func:`torchrl_iql.estimation.fitted_q` does all of it). With the data's own next actions there, it is
    the value of the behaviour.

    Args:
        qvalue_networks: N networks of the same kind, each freshly initialised: Q(s, a), which write
            ``state_action_value`` ``[*B, 1]``; or, if they do not read the action, Q(s, .), ``[*B, A]``, and
            actions are categories, integers ``[*B]``.

    Keyword Args:
        discount: :math:`\gamma` in [0, 1].
        bounds: the lowest and the highest return that there can be, which targets are clipped to: else an
            error of a network at actions that are not in the data may feed on itself. See
            :func:`~torchrl_iql.objectives.functional.return_bounds`.

    The batch may hold ``"bootstrap_weight"``, ``[*B, N]``: :math:`w_i`, how often the episode of a transition
    was drawn for network i. The differences between the networks then are those of the bootstrap (Hao et al.,
    "Bootstrapping Fitted Q-Evaluation for Off-Policy Inference", 2021), beside those of their initialisation.

    Returns:
        a TensorDict of scalars: ``loss_qvalue``, the sum over the networks, and the diagnostics ``qvalue``
        (mean), ``td_error`` (mean square, of the network that is furthest off) and ``clip_fraction`` (share
        of targets that were beyond the bounds by more than a hundredth of their range).

    Raises:
        ValueError, TypeError: an argument is out of range, at construction.
        KeyError, ValueError: an entry of the batch is missing or has the wrong shape or type.

    Examples:
        >>> import torch
        >>> from torchrl_iql import models
        >>> from torchrl_iql.objectives import FQELoss
        >>> loss = FQELoss(models.qvalue_ensemble(3, 2, num=5), discount=0.99)
        >>> loss_qvalue, *_ = loss(
        ...     observation=torch.randn(8, 3),
        ...     action=torch.rand(8, 2),
        ...     next_observation=torch.randn(8, 3),
        ...     next_action=torch.rand(8, 2),
        ...     next_reward=torch.randn(8, 1),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
    """

    @dataclass
    class _AcceptedKeys:
        """The entries that :meth:`set_keys` can rename.

        Attributes:
            action: that of the data, and under ``"next"`` that of the policy.
            state_action_value: Q, written by the networks.
            reward: the reward, under ``"next"``.
            terminated: the end of an episode by the environment's own rules, under ``"next"``.
            weight: of each transition for each network, read if present.
        """

        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        weight: NestedKey = "bootstrap_weight"

    default_keys = _AcceptedKeys
    default_value_estimator = None  # pyright: ignore
    out_keys = ["loss_qvalue", "qvalue", "td_error", "clip_fraction"]  # pyright: ignore

    tensor_keys: _AcceptedKeys
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        qvalue_networks: Sequence[TensorDictModule],
        *,
        discount: float = 0.99,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        check_number("discount", discount, lambda x: 0 <= x <= 1, "[0, 1]")
        low, high = map(float, bounds)
        if not low <= high:
            raise ValueError(f"bounds must be the lowest and the highest return, got {bounds!r}")
        networks = list(qvalue_networks)
        if not networks or not all(isinstance(each, TensorDictModule) for each in networks):
            raise TypeError(
                f"qvalue_networks must be one or more TensorDictModules, got {qvalue_networks!r}"
            )
        self._out_keys = None
        super().__init__()
        self.delay_qvalue = True
        self.num_qvalue_nets = len(networks)
        self.discount, self.low, self.high = float(discount), low, high
        self.reduction = "mean"
        self.convert_to_functional(
            networks if len(networks) > 1 else networks[0],  # pyright: ignore
            "qvalue_network",
            expand_dim=len(networks) if len(networks) > 1 else None,
            create_target_params=True,
        )

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss and the diagnostics."""
        q = self.values(tensordict)
        target, is_clipped = self.target(tensordict)
        check_shape("Q(s, a)", q, target.shape)
        weight = tensordict.get(self.tensor_keys.weight, default=None)
        if weight is not None:
            check_shape(self.tensor_keys.weight, weight, (*tensordict.shape, len(q)))
            weight = weight.movedim(-1, 0)
        loss = functional.fitted_q_loss(q, target, weight)
        watched = {
            "qvalue": q.mean(0),
            "td_error": (q - target).square().amax(0),
            "clip_fraction": is_clipped.to(q.dtype).mean(0),
        }
        means = {name: self._reduce_loss(its.detach(), tensordict) for name, its in watched.items()}
        out = TensorDict({"loss_qvalue": self._reduce_loss(loss, tensordict), **means})
        self._clear_weakrefs(
            tensordict, out, "qvalue_network_params", "target_qvalue_network_params"
        )
        return out

    def values(self, tensordict: TensorDictBase) -> Tensor:
        """Compute Q_i(s, a) at the actions of a batch, ``[N, *B]``."""
        return self._values(tensordict, self.qvalue_network_params)

    @torch.no_grad()
    def target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Compute what each network is to learn, and where that was far beyond, ``[N, *B]`` both."""
        keys, after = self.tensor_keys, self._get(tensordict, "next")
        next_q = self._values(after, self.target_qvalue_network_params, prefix="next")
        reward = squeeze_last(self._get(after, keys.reward), ("next", keys.reward))  # pyright: ignore
        ended = squeeze_last(self._get(after, keys.terminated), ("next", keys.terminated))  # pyright: ignore
        if ended.dtype is not torch.bool:
            raise ValueError(
                f"{('next', keys.terminated)!r} has dtype {ended.dtype}, expected torch.bool"
            )
        target = functional.td_target(reward, next_q, ended, self.discount)
        clipped = target.clamp(self.low, self.high)
        margin = BEYOND * (self.high - self.low)
        return clipped.to(next_q.dtype), (target - clipped).abs() > margin

    def _values(
        self, td: TensorDictBase, params: TensorDictParams, prefix: str | None = None
    ) -> Tensor:
        network, key, name = (
            self.qvalue_network,
            self.tensor_keys.state_action_value,
            "qvalue_network",
        )
        if self.num_qvalue_nets == 1:
            params = params.unsqueeze(0)
        if takes_stacked_parameters(network):
            q = run_stacked(td, network, name, params)
        else:
            each = []
            for its in params.unbind(0):
                with its.to_module(network, preserve_module_state=False):
                    each.append(output_of(run(td, network, name), key, network))
            q = torch.stack(each)
        if self.tensor_keys.action in network.in_keys:
            return at_least_float32(squeeze_last(q, key))
        action = self.tensor_keys.action
        return at_least_float32(at_category(q, self._get(td, action), nested(prefix, action)))

    @staticmethod
    def _get(td: TensorDictBase, key: NestedKey) -> Any:
        value = td.get(key, default=None)
        if value is None:
            raise KeyError(
                f"the loss needs the entry {key!r}, and found {list(td.keys(True, True))}"
            )
        return value

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that :meth:`forward` reads, in a fixed order."""
        keys = self.tensor_keys
        read = dict.fromkeys([*self.qvalue_network.in_keys, keys.action])
        after = [*read, keys.reward, keys.terminated]
        return [*read, *(nested("next", key) for key in after)]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Do nothing: there is no estimator."""

    def _make_vmap(self) -> None:
        """Make nothing: networks are evaluated stacked, or one by one."""

    def train(self, mode: bool = True) -> FQELoss:
        """Set the training mode of the loss and of its networks."""
        super().train(mode)
        self.qvalue_network.train(mode)
        return self
