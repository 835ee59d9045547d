"""Advantage-weighted actor-critic as a TorchRL LossModule.

The equations are in :mod:`torchrl_iql.objectives.functional`. This module evaluates the networks and calls
them; :mod:`torchrl_iql.objectives.base` reads the batch and reduces.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_iql.objectives import functional
from torchrl_iql.objectives.base import (
    AdvantageWeightedLoss,
    Reduction,
    ScalarOutputMode,
    action_bounds,
    check_log_prob,
    check_shape,
    distributions_of,
    inputs_of,
)

__all__ = ["AWACLoss"]


class AWACLoss(AdvantageWeightedLoss[functional.AWACOutputs]):
    r"""Advantage-weighted actor-critic for actions that Q(s, a) takes as input.

    Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets",
    2020 (https://arxiv.org/abs/2006.09359). With :math:`\hat Q` the target networks and D the data:

    .. math::
        L_Q &= E_D [ \sum_i ( r + \gamma (1 - terminated) \min_j \hat Q_j(s', a') - Q_i(s, a) )^2 ],
            \quad a' \sim \pi(s') \\
        A(s, a) &= \min_i Q_i(s, a) - \min_i Q_i(s, \tilde a), \quad \tilde a \sim \pi(s) \\
        L_\pi &= - E_D [ \min( e^{\beta A(s, a)}, clip ) \log \pi(a | s) ]

    The policy's loss is that of :class:`~torchrl_iql.IQLLoss`, with another advantage: there is no network
    for V, whose place a sample of Q at the policy's own action takes. :math:`\beta` is one over the paper's
    :math:`\lambda`. Everything else that :class:`~torchrl_iql.IQLLoss` says of its arguments, of what it
    reads, of masks, weights and priorities holds here, too.

    Args:
        actor_network: the policy, with ``get_dist``.
        qvalue_network: Q(s, a), a module or a list of them.

    Keyword Args:
        bounds: the lowest and the highest action, numbers or ``[A]``, to which sampled actions are
            clipped; None if the policy keeps within them by itself.
        num_qvalue_nets: the number N of Q networks.
        loss_function: the distance of Q to its target: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        temperature: :math:`\beta`, finite and at least 0. 0 is behaviour cloning.
        weight_clip: the largest advantage weight, above 0; ``inf`` for none.
        separate_losses: if True, parameters that the networks share are trained by the policy's loss only.
        reduction: ``"mean"`` (the default), ``"sum"``, or ``"none"`` for losses of shape ``[*B]``.
        deactivate_vmap: evaluate the Q networks in a loop instead of through :func:`torch.vmap`.
        scalar_output_mode: what becomes of the scalar diagnostics when ``reduction="none"``.

    Returns:
        a TensorDict of scalars: ``loss_actor``, ``loss_qvalue``, ``entropy`` (minus the mean
        log-likelihood of the data's actions), and the diagnostics ``advantage``, ``value`` (Q at the
        policy's action), ``qvalue`` (means) and ``clip_fraction``.

    Raises:
        ValueError, TypeError: an argument is out of range, the policy is deterministic, or composite with
            ``bounds``, at construction.
        KeyError, ValueError: an entry of the batch is missing or has the wrong shape or type.

    Examples:
        >>> import torch
        >>> from torchrl_iql import AWACLoss, models
        >>> loss = AWACLoss(models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), bounds=(-1, 1))
        >>> loss_actor, loss_qvalue, entropy = loss(
        ...     observation=torch.randn(8, 3),
        ...     action=torch.rand(8, 2),
        ...     next_observation=torch.randn(8, 3),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
    """

    out_keys = ["loss_actor", "loss_qvalue", "entropy"]  # pyright: ignore
    _schedulable_buffers = frozenset({"temperature"})

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        bounds: tuple[Any, Any] | None = None,
        num_qvalue_nets: int = 2,
        loss_function: functional.Distance = "l2",
        temperature: float = 3.0,
        weight_clip: float = 100.0,
        separate_losses: bool = False,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: ScalarOutputMode | None = None,
    ) -> None:
        super().__init__(
            {"actor_network": actor_network, "qvalue_network": qvalue_network},
            num_qvalue_nets=num_qvalue_nets,
            loss_function=loss_function,
            temperature=temperature,
            weight_clip=weight_clip,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            scalar_output_mode=scalar_output_mode,
        )
        if self._deterministic:
            raise TypeError(
                "actor_network is deterministic, expected one with get_dist: the advantage is that over "
                "actions that are drawn from it"
            )
        low, high = (None, None) if bounds is None else self._bounds(bounds)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def _bounds(self, bounds: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        if CompositeDistribution in distributions_of(self.actor_network):
            raise ValueError(
                "bounds are of one action, and the policy's distribution is composite: its parts keep within "
                "theirs by themselves"
            )
        low, high = action_bounds(bounds)
        return low.to(self._default_device), high.to(self._default_device)

    # --- The algorithm -----------------------------------------------------------------------------

    def evaluate(self, tensordict: TensorDictBase) -> functional.AWACOutputs:
        """Compute all that :meth:`losses` needs of the networks; two actions are drawn for it."""
        dist = self._distribution(tensordict)
        return functional.AWACOutputs(
            log_prob=self._log_prob(tensordict, dist),
            q=self._q(tensordict),
            policy_q=self._q_of(tensordict, dist, self.qvalue_network_params),
            td_target=self.td_target(tensordict, self._next_value(tensordict)),
        )

    def equations(self, outputs: functional.AWACOutputs) -> dict[str, Tensor]:
        """Compute the losses, ``[*B]`` each, and what is worth watching."""
        check_log_prob(outputs.log_prob, outputs.q.shape[1:])
        check_shape("Q(s, a)", outputs.q[0], outputs.td_target.shape)
        return functional.awac_losses(
            outputs,
            temperature=self.temperature.to(outputs.q.dtype),
            weight_clip=self.weight_clip,
            distance=self.loss_function,
        )

    @torch.no_grad()
    def _next_value(self, td: TensorDictBase) -> Tensor:
        """Compute min_i Q_i(s', a') of the target networks at an action of the policy, ``[*B]``."""
        terminated = self._terminated(td, (*td.shape, 1))

        def read(values: Tensor) -> Tensor:
            """Leave out what comes after a termination, which may be NaN."""
            return values.masked_fill(terminated.view(*td.shape, *[1] * (values.ndim - td.ndim)), 0)

        after = td.get("next").select(*self._read_of_networks()[1], strict=False)
        td = td.copy().set("next", after.apply(read))
        dist = self._distribution(td, prefix="next")
        return functional.min_q(self._q_of(td.get("next"), dist, self.target_qvalue_network_params))

    @torch.no_grad()
    def _q_of(self, td: TensorDictBase, dist: Any, params: Any) -> Tensor:
        """Compute Q_i(s, a), ``[N, *B]``, at an action that is drawn."""
        drawn, at = dist.sample(), td.copy()
        if is_tensor_collection(drawn):
            at.update(drawn)
        else:
            if self.low is not None:
                drawn = drawn.clamp(self.low, self.high)
            at.set(self.tensor_keys.action, drawn)
        return self._q_ensemble(at, params)

    def _read_of_networks(self) -> tuple[list[NestedKey], list[NestedKey]]:
        read = [*inputs_of(self.actor_network), *self.qvalue_network.in_keys]
        states = [key for key in read if key != self.tensor_keys.action]
        return states, states
