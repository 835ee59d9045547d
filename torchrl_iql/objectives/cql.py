"""Conservative Q-Learning: TorchRL's loss, with its penalty as the paper and the official code have it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor
from torchrl import objectives

from torchrl_iql.objectives.base import action_bounds, unannotated
from torchrl_iql.objectives.functional import conservative_gap

__all__ = ["CQLLoss"]


class CQLLoss(objectives.CQLLoss):
    r"""Conservative Q-Learning, CQL(H), for actions within bounds.

    Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020
    (https://arxiv.org/abs/2006.04779). To SAC's losses of Q (here without entropy in the targets, as in the
    official code) comes the penalty

    .. math::
        \alpha \, E_D [ \log \sum_a e^{Q_i(s, a)} - Q_i(s, a_D) ],

    whose sum over actions is estimated by ``num_random`` actions each of the uniform distribution,
    :math:`\pi(s)` and :math:`\pi(s')`, all in state s, weighted by one over their density.

    Args:
        actor_network: SAC's policy, with ``get_dist``.
        qvalue_network: Q(s, a), or a list of two.

    Keyword Args:
        bounds: the lowest and the highest action, ``[A]`` each, between which random ones are drawn.
        **settings: those of :class:`torchrl.objectives.CQLLoss`. ``min_q_weight`` is :math:`\alpha`; with
            ``with_lagrange`` it is multiplied by one that is learned, so that :math:`\alpha` times the
            difference in the brackets comes to ``lagrange_thresh``. That and ``target_entropy``, -A by
            default, are in the units of actions: wider bounds by a factor c add :math:`A \log c` to entropy
            and difference.

    Returns:
        what TorchRL's returns, ``loss_actor_bc`` among it, which its recipe descends in the first steps
        instead of ``loss_actor``; and ``qvalue``, the mean of Q(s, a).

    Raises:
        ValueError: ``bounds`` are not the lowest and the highest action, or not finite.

    Differences from :class:`torchrl.objectives.CQLLoss` of TorchRL 0.14.1:
        - The log-sum-exp of a state goes over all its 3 ``num_random`` actions. TorchRL's goes over three of
          them at a time, and subtracts the values of the data's actions of all other states from each.
        - Actions of :math:`\pi(s')` are valued in s, as in the official code. TorchRL's are in s'.
        - Random actions are drawn within ``bounds``, with their density. TorchRL's are in [-1, 1].
        - With ``with_lagrange`` the learned factor multiplies the penalty, which has no gradient from its own
          loss. TorchRL's penalty does not know of the factor, and the loss of the factor moves Q.
        - ``loss_function="l2"`` is the default, as in the paper.
    """

    low: Tensor
    high: Tensor
    log_alpha_prime: Tensor
    _vmap_qvalue_networkN0: Any

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        bounds: tuple[Tensor, Tensor],
        loss_function: str = "l2",
        **settings: Any,
    ) -> None:
        low, high = action_bounds(bounds, finite=True)
        if low.ndim and settings.get("target_entropy", "auto") == "auto":
            settings["target_entropy"] = -float(low.numel())  # else a policy has to have a spec
        with unannotated():
            super().__init__(actor_network, qvalue_network, loss_function=loss_function, **settings)
        device = next(self.parameters()).device
        for name, bound in {"low": low, "high": high}.items():
            self.register_buffer(name, bound.to(device, torch.float32), persistent=False)

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses."""
        losses = super().forward(tensordict)
        keys = self.tensor_keys
        q = (tensordict.get(keys.pred_q1) + tensordict.get(keys.pred_q2)).detach().squeeze(-1) / 2
        reduction = "none" if self.reduction == "none" else "mean"
        return losses.set(
            "qvalue", self._reduce_loss(q, tensordict=tensordict, reduction=reduction)
        )

    @property
    def out_keys(self) -> list:
        """TorchRL's, and ``"qvalue"``."""
        if self._out_keys is None:
            self._out_keys = [*super().out_keys, "qvalue"]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list) -> None:
        self._out_keys = values

    def cql_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        r"""Compute the penalty, after :meth:`q_loss`.

        It leaves :math:`\alpha` times the difference of each network in the batch.

        Returns:
            the loss, and an empty dictionary.
        """
        keys = self.tensor_keys
        of_data = torch.stack([tensordict.get(keys.pred_q1), tensordict.get(keys.pred_q2)])
        actions, log_density = self._actions(tensordict)
        states = tensordict.select(*self.actor_network.in_keys, strict=False)
        states = states.expand(len(actions), *states.shape).clone(recurse=False)
        states.set(keys.action, actions)
        q = self._vmap_qvalue_networkN0(states, self.qvalue_network_params)
        q = q.get(keys.state_action_value).squeeze(-1)
        gaps = conservative_gap(q, log_density, of_data.squeeze(-1), self.temperature)
        gaps = self.min_q_weight * gaps
        for key, gap in zip((keys.cql_q1_loss, keys.cql_q2_loss), gaps.detach(), strict=True):
            tensordict.set(key, gap)
        if self.with_lagrange:
            factor = self.log_alpha_prime.detach().exp().clamp_max(1e6)
            gaps = factor * (gaps - self.target_action_gap)
        return self._reduce_loss(gaps.sum(0), tensordict=tensordict), {}

    @torch.no_grad()
    def _actions(self, td: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Draw actions ``[3 num_random, *B, A]`` and give their log-density ``[3 num_random, *B]``."""
        like, number = td.get(self.tensor_keys.action), self.num_random
        low, high = (bound.to(like.dtype) for bound in (self.low, self.high))
        random = low + (high - low) * torch.rand(number, *like.shape, device=like.device)
        uniform = -(high - low).log().expand_as(like).sum(-1).expand(number, *td.shape)
        drawn, densities = [random.to(like.dtype)], [uniform]
        for at in (td, td.get("next")):
            states = at.select(*self.actor_network.in_keys, strict=False)
            with self.actor_network_params.data.to_module(
                self.actor_network, preserve_module_state=False
            ):
                dist = self.actor_network.get_dist(states)  # pyright: ignore
            drawn.append(dist.sample((number,)))
            densities.append(dist.log_prob(drawn[-1]))
        return torch.cat(drawn), torch.cat(densities)
