"""TD3 with behaviour cloning: TorchRL's loss, with actions in units of their bounds."""

from __future__ import annotations

import math
from typing import Any, get_args

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl import objectives

from torchrl_iql.objectives import functional
from torchrl_iql.objectives.base import (
    Reduction,
    action_bounds,
    check_choice,
    check_number,
    is_deterministic,
    unannotated,
)
from torchrl_iql.objectives.mended import Mended, as_list

__all__ = ["TD3BCLoss"]

OUT_KEYS = [
    *("loss_actor", "loss_qvalue", "bc_loss", "lmbd"),
    *("pred_value", "state_action_value_actor", "next_state_value", "target_value"),
]


class TD3BCLoss(Mended, objectives.TD3BCLoss):
    r"""TD3 with behaviour cloning, for a deterministic policy of actions within bounds.

    Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", 2021
    (https://arxiv.org/abs/2106.06860). With :math:`\hat Q` and :math:`\hat\pi` the target networks, D the
    data, and h half the range of actions:

    .. math::
        L_Q &= E_D [ \sum_i ( r + \gamma (1 - terminated) \min_j \hat Q_j(s', a') - Q_i(s, a) )^2 ],
            \quad a' = clip(\hat\pi(s') + h \, clip(\epsilon, -c, c), low, high) \\
        L_\pi &= E_D [ - \lambda Q_1(s, \pi(s)) + | (\pi(s) - a) / h |^2 / A ],
            \quad \lambda = \alpha / E_D | Q_1(s, \pi(s)) |

    The paper's actions are in [-1, 1], where h is 1. In units of h its numbers are good for any bounds.

    Args:
        actor_network: the policy, deterministic.
        qvalue_network: Q(s, a), a module or a list of them, of what the policy observes.

    Keyword Args:
        bounds: the lowest and the highest action, numbers or ``[A]``.
        alpha: :math:`\alpha`, finite and at least 0. 0 is behaviour cloning.
        num_qvalue_nets: the number of Q networks.
        policy_noise: the deviation of :math:`\epsilon`, in units of h.
        noise_clip: c, in units of h.
        loss_function: the distance of Q to its target: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        reduction: ``"mean"`` (the default), ``"sum"`` or ``"none"``.
        **settings: others of :class:`torchrl.objectives.TD3BCLoss`.

    Returns:
        what TorchRL's returns.

    Raises:
        ValueError: ``bounds`` are not the lowest and the highest action, or not finite, or another argument
            is out of range.
        TypeError: the policy has a distribution.
        KeyError: an entry of the batch is missing.

    Differences from :class:`torchrl.objectives.TD3BCLoss` of TorchRL 0.14.1:
        - Cloning and noise are in units of h. TorchRL's are in those of actions: with bounds of 0.05, cloning
          is next to nothing beside Q, and the noise goes from one bound to the other.
        - Masks and importance weights reach the cloning term, and masks :math:`\lambda`. TorchRL's are
          averages over whatever is in the batch.
        - Of one module for Q, its parameters are those of the first network, and the others are of its kind.
          TorchRL's draws all of them anew, uniformly.
        - ``loss_function="l2"`` is the default, as in the paper.
        - What :class:`~torchrl_iql.objectives.mended.Mended` mends.
    """

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        bounds: tuple[Any, Any],
        alpha: float = 2.5,
        num_qvalue_nets: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        loss_function: functional.Distance = "l2",
        reduction: Reduction | None = None,
        **settings: Any,
    ) -> None:
        check_choice("loss_function", loss_function, functional.DISTANCES)
        check_choice("reduction", reduction, (None, *get_args(Reduction)))
        check_number("alpha", alpha, lambda x: 0 <= x < math.inf, "[0, inf)")
        check_number("policy_noise", policy_noise, lambda x: 0 <= x < math.inf, "[0, inf)")
        check_number("noise_clip", noise_clip, lambda x: x >= 0, "[0, inf]")
        if not is_deterministic(actor_network):
            raise TypeError("actor_network has a distribution, expected a deterministic policy")
        self._out_keys: list | None = None
        low, high = action_bounds(bounds, finite=True)
        dtype = next(actor_network.parameters()).dtype
        low, high = low.to(dtype), high.to(dtype)
        with unannotated():
            super().__init__(
                actor_network,
                as_list(qvalue_network, num_qvalue_nets, actor_network),
                bounds=(low, high),  # pyright: ignore
                alpha=alpha,
                num_qvalue_nets=num_qvalue_nets,
                loss_function=loss_function,
                reduction=reduction,
                **settings,
            )
        half_range = ((high - low) / 2).to(next(self.parameters()).device)
        self._half_range: Tensor
        self.register_buffer("_half_range", half_range, persistent=False)
        for name, value in {"policy_noise": policy_noise, "noise_clip": noise_clip}.items():
            delattr(self, name)  # a number, the same for all dimensions
            self.register_buffer(name, value * half_range, persistent=False)
        self._begin()

    @property
    def out_keys(self) -> list:
        """TorchRL's."""
        return OUT_KEYS if self._out_keys is None else self._out_keys

    @out_keys.setter
    def out_keys(self, values: list) -> None:
        self._out_keys = values

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses."""
        readable = self._readable(tensordict)
        losses = super().forward(readable)
        self._write_back(tensordict, readable)
        return losses

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the policy's loss.

        Returns:
            the loss, and ``"state_action_value_actor"``, ``"bc_loss"`` and ``"lmbd"``.
        """
        states = tensordict.select(*self.actor_network.in_keys, strict=False)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            taken = self.actor_network(states)
        first = self.qvalue_network_params.data[0]
        with first.to_module(self.qvalue_network, preserve_module_state=False):
            q = self.qvalue_network(taken.select(*self.qvalue_network.in_keys, strict=False))
        q = q.get(self.tensor_keys.state_action_value).squeeze(-1)
        distance = taken.get(self.tensor_keys.action) - tensordict.get(self.tensor_keys.action)
        cloning = (distance / self._half_range).square().mean(dim=-1)
        size = self._reduce_loss(q.detach().abs(), tensordict=tensordict, reduction="mean")
        factor = self.alpha / size
        weights = self._maybe_get_priority_weight(tensordict)
        loss = self._reduce_loss(-factor * q + cloning, tensordict=tensordict, weights=weights)
        watched = {
            "state_action_value_actor": q.detach(),
            "bc_loss": self._reduce_loss(
                cloning.detach(), tensordict=tensordict, weights=weights, reduction="mean"
            ),
            "lmbd": factor,
        }
        return loss, watched
