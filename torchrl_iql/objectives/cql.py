"""Conservative Q-Learning: TorchRL's loss, with its penalty as the paper and the official code have it."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
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

__all__ = ["CQLLoss"]


class CQLLoss(Mended, objectives.CQLLoss):
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
        qvalue_network: Q(s, a), or a list of two, of what the policy observes.

    Keyword Args:
        bounds: the lowest and the highest action, ``[A]`` each, between which random ones are drawn.
        min_q_weight: :math:`\alpha`, finite and at least 0. 0 is SAC without entropy in its targets.
        temperature: of the log-sum-exp, above 0.
        with_lagrange: whether :math:`\alpha` is multiplied by a factor that is learned, so that
            :math:`\alpha` times the difference in the brackets comes to ``lagrange_thresh``.
        lagrange_thresh: that number. It and ``target_entropy``, -A by default, are in the units of actions:
            wider bounds by a factor c add :math:`A \log c` to entropy and difference.
        num_random: the actions of each distribution.
        loss_function: the distance of Q to its target: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        reduction: ``"mean"`` (the default), ``"sum"`` or ``"none"``.
        **settings: others of :class:`torchrl.objectives.CQLLoss`.

    Returns:
        what TorchRL's returns, ``loss_actor_bc`` among it, which its recipe descends in the first steps
        instead of ``loss_actor``; and ``qvalue``, the mean of Q(s, a).

    Raises:
        ValueError: ``bounds`` are not the lowest and the highest action, ``[A]``, or not finite, or another
            argument is out of range.
        TypeError: the policy has no distribution.
        KeyError: an entry of the batch is missing.

    Differences from :class:`torchrl.objectives.CQLLoss` of TorchRL 0.14.1:
        - The log-sum-exp of a state goes over all its 3 ``num_random`` actions. TorchRL's goes over three of
          them at a time, and subtracts the values of the data's actions of all other states from each.
        - Actions of :math:`\pi(s')` are valued in s, as in the official code. TorchRL's are in s'.
        - Random actions are drawn within ``bounds``, with their density. TorchRL's are in [-1, 1].
        - With ``with_lagrange`` the learned factor multiplies the penalty, which has no gradient from its own
          loss. TorchRL's penalty does not know of the factor, and the loss of the factor moves Q.
        - Of one module for Q, its parameters are those of the first network, and the second is of its kind.
          TorchRL's draws both anew, uniformly.
        - ``reduction="none"`` works with keyword arguments and with ``with_lagrange``. TorchRL's are errors.
        - Masks reach ``entropy``.
        - ``loss_function="l2"`` is the default, as in the paper.
        - What :class:`~torchrl_iql.objectives.mended.Mended` mends.
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
        min_q_weight: float = 1.0,
        temperature: float = 1.0,
        with_lagrange: bool = False,
        lagrange_thresh: float = 0.0,
        num_random: int = 10,
        loss_function: functional.Distance = "l2",
        reduction: Reduction | None = None,
        **settings: Any,
    ) -> None:
        check_choice("loss_function", loss_function, functional.DISTANCES)
        check_choice("reduction", reduction, (None, *get_args(Reduction)))
        check_number("min_q_weight", min_q_weight, lambda x: 0 <= x < math.inf, "[0, inf)")
        check_number("temperature", temperature, lambda x: 0 < x < math.inf, "(0, inf)")
        check_number("lagrange_thresh", lagrange_thresh, math.isfinite, "(-inf, inf)")
        check_number("num_random", num_random, lambda x: x >= 1, "[1, inf)")
        if is_deterministic(actor_network):
            raise TypeError("actor_network is deterministic, expected one with get_dist")
        low, high = action_bounds(bounds, finite=True)
        if low.ndim != 1:
            raise ValueError(f"bounds must be of each dimension of actions, [A], got {bounds!r}")
        if settings.get("target_entropy", "auto") == "auto":
            settings["target_entropy"] = -float(low.numel())  # else a policy has to have a spec
        with unannotated():
            super().__init__(
                actor_network,
                as_list(qvalue_network, 2, actor_network),
                min_q_weight=min_q_weight,
                temperature=temperature,
                with_lagrange=with_lagrange,
                lagrange_thresh=lagrange_thresh,
                num_random=num_random,
                loss_function=loss_function,
                reduction=reduction,
                **settings,
            )
        device = next(self.parameters()).device
        for name, bound in {"low": low, "high": high}.items():
            self.register_buffer(name, bound.to(device, torch.float32), persistent=False)
        self._begin()

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses."""
        td, keys = self._readable(tensordict), self.tensor_keys
        losses: dict[str, Tensor] = {}
        losses["loss_qvalue"], of_q = self.q_loss(td)
        losses["loss_cql"], _ = self.cql_loss(td)
        if self.with_lagrange:
            losses["loss_alpha_prime"], _ = self.alpha_prime_loss(td)
        losses["loss_actor_bc"], _ = self.actor_bc_loss(td)
        losses["loss_actor"], of_actor = self.actor_loss(td)
        losses["loss_alpha"], _ = self.alpha_loss(of_actor, mask_tensordict=td)
        td.set(keys.priority, of_q["td_error"].detach().amax(0))
        written = ("pred_q1", "pred_q2", "cql_q1_loss", "cql_q2_loss")
        self._write_back(tensordict, td, *written)
        q = (td.get(keys.pred_q1) + td.get(keys.pred_q2)).detach().squeeze(-1) / 2
        entropy = self._reduce_loss(-of_actor[keys.log_prob], tensordict=td, reduction="mean")
        scalars = {"alpha": self._alpha, "entropy": entropy}
        out = TensorDict(losses, batch_size=losses["loss_actor"].shape)
        is_whole = self.reduction == "none"
        reduction = "none" if is_whole else "mean"
        out.set("qvalue", self._reduce_loss(q, tensordict=td, reduction=reduction))
        if not is_whole:
            out.update(scalars)
        elif self.scalar_output_mode == "non_tensor":
            for name, value in scalars.items():
                out.set_non_tensor(name, value)
        networks = ("actor_network_params", "qvalue_network_params")
        self._clear_weakrefs(td, out, *networks, *(f"target_{each}" for each in networks))
        return out.select(*self.out_keys)

    @property
    def out_keys(self) -> list:
        """TorchRL's, and ``"qvalue"``, without scalars where there is no place for them."""
        if self._out_keys is None:
            has_scalars = self.reduction != "none" or self.scalar_output_mode == "non_tensor"
            left_out = () if has_scalars else ("alpha", "entropy")
            self._out_keys = [key for key in [*super().out_keys, "qvalue"] if key not in left_out]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list) -> None:
        self._out_keys = values

    def alpha_prime_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the loss of the learned factor, after :meth:`cql_loss`."""
        if self.reduction != "none":
            return super().alpha_prime_loss(tensordict)  # pyright: ignore
        keys = self.tensor_keys
        gap = (tensordict.get(keys.cql_q1_loss) + tensordict.get(keys.cql_q2_loss)) / 2
        factor = self.log_alpha_prime.exp().clamp_max(1e6)
        loss = factor * (self.target_action_gap - gap)
        return self._reduce_loss(loss, tensordict=tensordict), {}

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
        gaps = functional.conservative_gap(q, log_density, of_data.squeeze(-1), self.temperature)
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
