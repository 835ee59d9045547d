"""Implicit Q-Learning as TorchRL LossModules.

The equations are in :mod:`torchrl_iql.objectives.functional`. This module evaluates each network once and
calls them; :mod:`torchrl_iql.objectives.base` reads the batch and reduces.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import TensorSpec
from torchrl.data.utils import _find_action_space

from torchrl_iql.objectives import functional as iql
from torchrl_iql.objectives.base import (
    AdvantageWeightedLoss,
    Reduction,
    ScalarOutputMode,
    at_category,
    at_least_float32,
    check_log_prob,
    check_number,
    check_shape,
    inputs_of,
    output_of,
    run,
    squeeze_last,
)

__all__ = ["DiscreteIQLLoss", "IQLLoss"]

NOT_ONE_HOT = ': if it holds categories, build the loss with action_space="categorical"'
"""What may be wrong with one-hot actions of another shape."""


class IQLLoss(AdvantageWeightedLoss[iql.Outputs]):
    r"""Implicit Q-Learning for continuous, composite or any other actions that Q(s, a) takes as input.

    Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", 2021
    (https://arxiv.org/abs/2110.06169). With :math:`\hat Q` the target networks and D the data:

    .. math::
        L_V &= E_D [ L_2^\tau ( \min_i \hat Q_i(s, a) - V(s) ) ] \\
        L_Q &= E_D [ \sum_i ( r + \gamma (1 - terminated) V(s') - Q_i(s, a) )^2 ] \\
        L_\pi &= - E_D [ \min( e^{\beta (\min_i \hat Q_i(s, a) - V(s))}, clip ) \log \pi(a | s) ]

    :meth:`forward` evaluates each network once per input (policy, target Q, Q, V(s), V(s')) and all
    three losses from the same parameters. :meth:`value_loss`, :meth:`qvalue_loss` and
    :meth:`actor_loss` compute one of them, from the entries that it needs.

    Args:
        actor_network: the policy. One with ``get_dist`` is trained on the log-likelihood of the data's
            actions; a deterministic one (a module that writes the action, or a ``Delta`` or
            ``TanhDelta`` distribution) on its squared error, summed over the action's dimensions.
        qvalue_network: Q(s, a), writing ``state_action_value`` ``[*B, 1]``. From a single module
            ``num_qvalue_nets`` are made: the first keeps the given parameters and the others are
            drawn to resemble it (see Differences). A list of modules is stacked as it is.
        value_network: V(s), writing ``state_value`` ``[*B, 1]``.

    Keyword Args:
        num_qvalue_nets: the number N of Q networks, at least 1; the length of the list, if given.
        loss_function: the distance of Q to its target: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        temperature: :math:`\beta`, finite and at least 0. 0 is behaviour cloning.
        expectile: :math:`\tau` in (0, 1]. 0.5 gives the values of the behaviour policy.
        weight_clip: the largest advantage weight, above 0; ``inf`` for none.
        gamma: deprecated by TorchRL, must be None: see :meth:`make_value_estimator`.
        priority_key: deprecated by TorchRL, must be None: see :meth:`set_keys`.
        separate_losses: if True, parameters that the networks share are trained by one loss only:
            the policy's, then the value's.
        reduction: ``"mean"`` (the default), ``"sum"``, or ``"none"`` for losses of shape ``[*B]``.
        deactivate_vmap: evaluate the Q networks in a loop instead of through :func:`torch.vmap`. Those
            of :mod:`torchrl_iql.models` need neither: they take stacked parameters.
        scalar_output_mode: what becomes of the scalar diagnostics when ``reduction="none"``:
            ``"exclude"`` or ``"non_tensor"``.

    ``expectile`` and ``temperature`` are scalar buffers, so that a schedule may assign
    ``loss.temperature = 5.0`` without recompiling. They are not part of the state dict.

    Reads: the ``in_keys`` of the networks, ``action``, ``("next", "reward")`` (``[*B, 1]``),
    ``("next", "terminated")`` (bool ``[*B, 1]``; without it, ``("next", "done")``, which TD(1) and
    TD(lambda) read anyway), the ``in_keys`` of V under ``"next"``, and where present
    ``steps_to_next_obs`` (n-step transitions), ``priority_weight`` (importance weights w: as in TorchRL, a
    mean is sum(w x) / sum(w), so that weights of 2 everywhere change nothing; a sum is sum(w x)) and
    TorchRL's masks. :meth:`set_keys` renames these, but for ``steps_to_next_obs``, and ``loss_mask_key`` the
    masks. Inputs that a network can do without may be absent, as the states of
    :class:`~torchrl.modules.LSTMModule` and :class:`~torchrl.modules.GRUModule`, whose sequences are the
    last batch dimension and begin where ``is_init``.

    Returns:
        a TensorDict of scalars: ``loss_actor``, ``loss_qvalue``, ``loss_value``, ``entropy`` (minus the
        mean log-likelihood of the data's actions; absent for deterministic policies), and the
        diagnostics ``advantage``, ``value``, ``qvalue`` (means) and ``clip_fraction`` (the share of
        weights that reached ``weight_clip``). The squared TD error, the largest over the networks, is
        written to the batch under the ``priority`` key, unless the batch is locked.

    Raises:
        ValueError, TypeError: an argument is out of range, at construction.
        KeyError, ValueError: an entry of the batch is missing or has the wrong shape or type.
        RuntimeError: the Q networks can not be evaluated by :func:`torch.vmap`, or an input has another width
            or type than a network's weights.

    Differences from :class:`torchrl.objectives.IQLLoss`:
        - The defaults are the paper's: ``loss_function="l2"`` (TorchRL ``"smooth_l1"``),
          ``expectile=0.7`` (0.5), ``temperature=3.0`` (1.0). The clip of the weights is an argument.
        - The output holds diagnostics beside TorchRL's four entries.
        - All three losses honour masks and importance weights, Q's honours n-step discounts, and the
          entropy and the diagnostics honour masks.
        - A single ``qvalue_network`` keeps its initialisation. In the further networks each weight
          matrix is multiplied by a random orthogonal one, which keeps its singular values (an
          orthogonal matrix stays orthogonal), and biases are redrawn within their own range.
          TorchRL redraws every parameter uniformly.
        - The batch receives the priority and nothing else (no ``_log_prob``, ``loc``, ``scale``, nor
          states of recurrent networks), and may be locked; in that case the priority is not written.
        - V(s') is not read where ``terminated``: the next observation may be NaN there.
        - A recurrent V(s') begins anew where V(s) does, at ``is_init``; TorchRL's goes on from the
          trajectory before.
        - The losses are float32 or wider, also from bfloat16 networks; expectile, temperature and
          discount stay float64 when the networks are cast.
        - Composite, categorical ``[B, 1]``, boolean one-hot and deterministic actions work, and
          networks may have inputs of their own.
        - :meth:`train` and :meth:`eval` reach the networks; the module can be pickled; its state dict
          is the same before and after use; :meth:`make_value_estimator` returns the module.

    Examples:
        >>> import torch
        >>> from torchrl_iql import IQLLoss, models
        >>> loss = IQLLoss(
        ...     models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), models.value_network(3)
        ... )
        >>> loss_actor, loss_qvalue, loss_value, entropy = loss(
        ...     observation=torch.randn(8, 3),
        ...     action=torch.rand(8, 2),
        ...     next_observation=torch.randn(8, 3),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
    """

    out_keys = ["loss_actor", "loss_qvalue", "loss_value", "entropy"]  # pyright: ignore
    _schedulable_buffers = frozenset({"expectile", "temperature"})

    expectile: Tensor
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 2,
        loss_function: iql.Distance = "l2",
        temperature: float = 3.0,
        expectile: float = 0.7,
        weight_clip: float = 100.0,
        gamma: float | None = None,
        priority_key: str | None = None,
        separate_losses: bool = False,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: ScalarOutputMode | None = None,
    ) -> None:
        check_number("expectile", expectile, lambda x: 0 < x <= 1, "(0, 1]")
        super().__init__(
            {
                "actor_network": actor_network,
                "value_network": value_network,
                "qvalue_network": qvalue_network,
            },
            num_qvalue_nets=num_qvalue_nets,
            loss_function=loss_function,
            temperature=temperature,
            weight_clip=weight_clip,
            coefficients={"expectile": expectile},
            gamma=gamma,
            priority_key=priority_key,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            scalar_output_mode=scalar_output_mode,
        )

    # --- The algorithm -----------------------------------------------------------------------------

    def evaluate(self, tensordict: TensorDictBase) -> iql.Outputs:
        """Compute all that :meth:`losses` needs of the networks."""
        target_q = self._target_q(tensordict)  # first: it checks the shape of discrete actions
        return iql.Outputs(
            log_prob=self.log_likelihood(tensordict),
            target_q=target_q,
            q=self._q(tensordict),
            v=self._v(tensordict),
            td_target=self.td_target(tensordict, self._next_v(tensordict)),
        )

    def equations(self, outputs: iql.Outputs) -> dict[str, Tensor]:
        """Compute equations 5, 6 and 7 of the paper, ``[*B]`` each, and what is worth watching."""
        check_shape("V(s)", outputs.v, outputs.target_q.shape[1:])
        check_log_prob(outputs.log_prob, outputs.v.shape)
        check_shape("Q(s, a)", outputs.q[0], outputs.td_target.shape)
        return iql.losses(
            outputs,
            expectile=self.expectile,
            temperature=self.temperature.to(outputs.v.dtype),
            weight_clip=self.weight_clip,
            distance=self.loss_function,
        )

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the advantage-weighted regression of the policy (equation 7).

        Returns:
            the loss, and an empty dictionary.
        """
        target_q, v = self._target_q(tensordict), self._v(tensordict)
        log_prob = self.log_likelihood(tensordict)
        check_shape("V(s)", v, target_q.shape[1:])
        check_log_prob(log_prob, v.shape)
        advantage = iql.min_q(target_q) - v
        temperature = self.temperature.to(v.dtype)
        weight = iql.advantage_weight(advantage, temperature, self.weight_clip)
        loss = self._reduce(tensordict, iql.actor_loss(log_prob, weight))
        self._release(tensordict)
        return loss, {}

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the expectile regression of V on the target Q (equation 5).

        Returns:
            the loss, and an empty dictionary.
        """
        target_q, v = self._target_q(tensordict), self._v(tensordict)
        check_shape("V(s)", v, target_q.shape[1:])
        loss = self._reduce(tensordict, iql.value_loss(target_q, v, self.expectile))
        self._release(tensordict)
        return loss, {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the regression of every Q network on the TD target (equation 6).

        Returns:
            the loss, and a dictionary with the squared ``td_error``, ``[N, *B]``, detached.
        """
        q = self._q(tensordict)
        target = self.td_target(tensordict, self._next_v(tensordict))
        check_shape("Q(s, a)", q[0], target.shape)
        loss = self._reduce(tensordict, iql.qvalue_loss(q, target, self.loss_function))
        self._release(tensordict)
        return loss, {"td_error": (q - target).square().detach()}

    def _v(self, td: TensorDictBase, prefix: str | None = None) -> Tensor:
        """Compute V(s), or V(s') with the prefix ``"next"``, ``[*B]``."""
        with self.value_network_params.to_module(self.value_network, preserve_module_state=False):
            outputs = run(td, self.value_network, "value_network", prefix=prefix)
        value = output_of(outputs, self.tensor_keys.value, self.value_network)
        return at_least_float32(squeeze_last(value, self.tensor_keys.value))

    @torch.no_grad()
    def _next_v(self, td: TensorDictBase) -> Tensor:
        return self._v(td, prefix="next")

    def _read_of_networks(self) -> tuple[list[NestedKey], list[NestedKey]]:
        of_policy, of_value = inputs_of(self.actor_network), self.value_network.in_keys
        return [*of_policy, *self.qvalue_network.in_keys, *of_value], list(of_value)


class DiscreteIQLLoss(IQLLoss):
    """Implicit Q-Learning for discrete actions: Q(s) holds one value per action.

    Everything that :class:`IQLLoss` says holds here too, but for the Q networks, which write
    ``state_action_value`` with one entry per action, ``[*B, A]``.

    Args:
        actor_network: the policy, a distribution over A actions.
        qvalue_network: Q(s, .), a module or a list of them.
        value_network: V(s).

    Keyword Args:
        action_space: how the data writes actions: ``"one-hot"`` (``[*B, A]``) or ``"categorical"``
            (integers, ``[*B]`` or ``[*B, 1]``), or a spec (:class:`~torchrl.data.OneHot`,
            :class:`~torchrl.data.Categorical`). None warns and means one-hot.
        **kwargs: those of :class:`IQLLoss`.

    Examples:
        >>> import torch
        >>> from torchrl_iql import DiscreteIQLLoss, models
        >>> loss = DiscreteIQLLoss(
        ...     models.categorical_policy(3, 4),
        ...     models.discrete_qvalue_network(3, 4),
        ...     models.value_network(3),
        ...     action_space="categorical",
        ... )
        >>> loss_actor, loss_qvalue, loss_value, entropy = loss(
        ...     observation=torch.randn(8, 3),
        ...     action=torch.randint(4, (8,)),
        ...     next_observation=torch.randn(8, 3),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        value_network: TensorDictModule,
        *,
        action_space: str | TensorSpec | None = None,
        **kwargs: Any,
    ) -> None:
        if action_space is None:
            warnings.warn(
                "action_space was not given: DiscreteIQLLoss reads actions as 'one-hot'. Pass "
                "action_space='one-hot' or 'categorical'.",
                category=UserWarning,
                stacklevel=2,
            )
            action_space = "one-hot"
        found = _find_action_space(action_space)
        if found not in ("one_hot", "categorical"):
            raise ValueError(
                f"action_space must be 'one-hot' or 'categorical', got {action_space!r}"
            )
        self.action_space = found
        super().__init__(actor_network, qvalue_network, value_network, **kwargs)

    def at_action(self, td: TensorDictBase, q: Tensor) -> Tensor:
        action = self._get(td, self.tensor_keys.action)
        if self.action_space == "one_hot":
            check_shape(self.tensor_keys.action, action, q.shape[1:], NOT_ONE_HOT)
            return (q * action.to(q.dtype)).sum(dim=-1)
        return at_category(q, action, self.tensor_keys.action)
