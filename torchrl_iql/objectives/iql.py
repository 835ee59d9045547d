"""Implicit Q-Learning as TorchRL LossModules.

The equations are in :mod:`torchrl_iql.objectives.functional`. This module reads the batch, evaluates
each network once, calls the equations and reduces.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import (
    TensorDict,
    TensorDictBase,
    TensorDictParams,
    is_tensor_collection,
)
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    dispatch,
)
from tensordict.nn.distributions import Delta as TensorDictDelta
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data.tensor_specs import TensorSpec
from torchrl.data.utils import _find_action_space
from torchrl.modules import Actor, Delta, TanhDelta
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import (
    ValueEstimators,
    _vmap_func,
    default_value_kwargs,
    dispatch_value_estimator,
)
from torchrl.objectives.value import TD1Estimator, TDLambdaEstimator, ValueEstimatorBase

from torchrl_iql.objectives import functional as iql

__all__ = ["DiscreteIQLLoss", "IQLLoss"]

Reduction = Literal["none", "mean", "sum"]
ScalarOutputMode = Literal["exclude", "non_tensor"]


class IQLLoss(LossModule):
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
    ``steps_to_next_obs`` (n-step transitions), ``priority_weight`` (importance weights) and TorchRL's
    masks. :meth:`set_keys` renames them. Inputs that a network can do without may be absent, as the
    states of :class:`~torchrl.modules.LSTMModule` and :class:`~torchrl.modules.GRUModule`, whose
    sequences are the last batch dimension and begin where ``is_init``.

    Returns:
        a TensorDict of scalars: ``loss_actor``, ``loss_qvalue``, ``loss_value``, ``entropy`` (minus the
        mean log-likelihood of the data's actions; absent for deterministic policies), and the
        diagnostics ``advantage``, ``value``, ``qvalue`` (means) and ``clip_fraction`` (the share of
        weights that reached ``weight_clip``). The squared TD error, the largest over the networks, is
        written to the batch under the ``priority`` key, unless the batch is locked.

    Raises:
        ValueError, TypeError: an argument is out of range, at construction.
        KeyError, ValueError: an entry of the batch is missing or has the wrong shape or type.
        RuntimeError: the Q networks can not be evaluated by :func:`torch.vmap`.

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

    @dataclass
    class _AcceptedKeys:
        """The entries that :meth:`set_keys` can rename.

        Attributes:
            value: V(s), written by the value network.
            action: the action of the data.
            log_prob: accepted for TorchRL's sake; the batch receives no log-probability.
            priority: the squared TD error, written to the batch.
            priority_weight: the importance weight of each transition, read if present.
            state_action_value: Q(s, a), written by the Q network.
            reward: the reward, under ``"next"``.
            done: the end of an episode, under ``"next"``.
            terminated: the end of an episode by the environment's own rules, under ``"next"``.
        """

        value: NestedKey = "state_value"
        action: NestedKey = "action"
        log_prob: NestedKey = "_log_prob"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )
    out_keys = ["loss_actor", "loss_qvalue", "loss_value", "entropy"]  # pyright: ignore
    _schedulable_buffers = frozenset({"expectile", "temperature"})

    tensor_keys: _AcceptedKeys
    expectile: Tensor
    temperature: Tensor
    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
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
        if gamma is not None:
            raise TypeError(
                f"gamma={gamma!r} is not an argument of the loss: call make_value_estimator(gamma=...)"
            )
        if priority_key is not None:
            raise RuntimeError(
                f"priority_key={priority_key!r} is not an argument of the loss: call "
                "set_keys(priority=...)"
            )
        for name, network in (("actor_network", actor_network), ("value_network", value_network)):
            _check_network(name, network)
        _check_choice("loss_function", loss_function, iql.DISTANCES)
        _check_choice("reduction", reduction, (None, *get_args(Reduction)))
        _check_choice(
            "scalar_output_mode",
            scalar_output_mode,
            (None, *get_args(ScalarOutputMode)),
        )
        _check_number("temperature", temperature, 0 <= temperature < math.inf, "[0, inf)")
        _check_number("expectile", expectile, 0 < expectile <= 1, "(0, 1]")
        _check_number("weight_clip", weight_clip, weight_clip > 0, "(0, inf]")
        qvalue_network = _check_qvalue_networks(qvalue_network, num_qvalue_nets)

        self._in_keys: list[NestedKey] = []
        self._out_keys = None
        super().__init__()
        self.deactivate_vmap = deactivate_vmap
        self.delay_qvalue = True
        self.num_qvalue_nets = num_qvalue_nets
        self.loss_function: iql.Distance = loss_function
        self.weight_clip = weight_clip
        self.reduction = reduction or "mean"
        self.scalar_output_mode = scalar_output_mode or "exclude"

        # Shared parameters: with separate_losses the networks converted later hold detached copies.
        self.convert_to_functional(actor_network, "actor_network")
        shared = list(actor_network.parameters()) if separate_losses else None
        self.convert_to_functional(value_network, "value_network", compare_against=shared)
        if shared is not None:
            shared += value_network.parameters()
        self.convert_to_functional(
            qvalue_network,  # pyright: ignore
            "qvalue_network",
            expand_dim=num_qvalue_nets if num_qvalue_nets > 1 else None,
            create_target_params=True,
            compare_against=shared,
        )
        if isinstance(qvalue_network, nn.Module):
            if num_qvalue_nets > 1:
                self._draw_ensemble(qvalue_network)
        elif shared is not None:
            with self.qvalue_network_params.unlock_() as params:
                for name, parameter in qvalue_network[0].named_parameters():
                    if any(parameter is other for other in shared):
                        key = tuple(name.split("."))
                        params.set(key, params.get(key).data)

        for name, number in (("expectile", expectile), ("temperature", temperature)):
            buffer = _coefficient(number, self._default_device)
            self.register_buffer(name, buffer, persistent=False)
        self.make_value_estimator(device=self._default_device)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

        self._deterministic = _is_deterministic(actor_network)
        if self.reduction == "none" and scalar_output_mode is None:
            warnings.warn(
                "With reduction='none' the scalars of the output (entropy and diagnostics) have no "
                "place among the losses and are excluded. Pass scalar_output_mode='exclude' to "
                "silence this warning or 'non_tensor' to keep them as non-tensor data.",
                category=UserWarning,
                stacklevel=2,
            )
        self._writes_scalars = self.reduction != "none" or scalar_output_mode == "non_tensor"
        if self._deterministic or not self._writes_scalars:
            self.out_keys = self.out_keys[:3]  # pyright: ignore
        # Found out now rather than in the first call, which torch.compile would trace twice.
        self._set_in_keys()
        _ = self.vmap_randomness

    # --- The algorithm -----------------------------------------------------------------------------

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the three losses and the diagnostics, each network evaluated once per input."""
        return self.losses(tensordict, self.evaluate(tensordict))

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

    def losses(self, tensordict: TensorDictBase, outputs: iql.Outputs) -> TensorDictBase:
        """Return what :meth:`forward` does, and the batch's priority, from given network outputs."""
        self._check_outputs(outputs)
        values = iql.losses(
            outputs,
            expectile=self.expectile,
            temperature=self.temperature.to(outputs.v.dtype),
            weight_clip=self.weight_clip,
            distance=self.loss_function,
        )
        td_error = values.pop("td_error")
        if not tensordict.is_locked:
            tensordict.set(self.tensor_keys.priority, td_error)
        names = [name for name in values if name.startswith("loss_")]
        losses = {name: self._reduce(tensordict, values.pop(name)) for name in names}
        out = TensorDict(losses, batch_size=losses["loss_actor"].shape)
        if self._deterministic:
            del values["entropy"]
        if self._writes_scalars:
            for name, value in values.items():
                scalar = self._reduce_loss(value, tensordict, reduction="mean")
                if self.reduction == "none":
                    out.set_non_tensor(name, scalar)
                else:
                    out.set(name, scalar)
        self._release(tensordict, out)
        return out

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Compute the advantage-weighted regression of the policy (equation 7).

        Returns:
            the loss, and an empty dictionary.
        """
        target_q, v = self._target_q(tensordict), self._v(tensordict)
        log_prob = self.log_likelihood(tensordict)
        _check_shape("V(s)", v, target_q.shape[1:])
        _check_log_prob(log_prob, v.shape)
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
        _check_shape("V(s)", v, target_q.shape[1:])
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
        _check_shape("Q(s, a)", q[0], target.shape)
        loss = self._reduce(tensordict, iql.qvalue_loss(q, target, self.loss_function))
        self._release(tensordict)
        return loss, {"td_error": (q - target).square().detach()}

    @staticmethod
    def _check_outputs(outputs: iql.Outputs) -> None:
        _check_shape("V(s)", outputs.v, outputs.target_q.shape[1:])
        _check_log_prob(outputs.log_prob, outputs.v.shape)
        _check_shape("Q(s, a)", outputs.q[0], outputs.td_target.shape)

    # --- The networks, evaluated --------------------------------------------------------------------

    def log_likelihood(self, td: TensorDictBase) -> Tensor:
        """Return log pi(a | s) at the data's actions, ``[*B]``; if deterministic -|a - pi(s)|^2."""
        name, network = "actor_network", self.actor_network
        with self.actor_network_params.to_module(network, preserve_module_state=False):
            if self._deterministic:
                predicted = _run(td, network, name).get(self.tensor_keys.action)
                action = self._get(td, self.tensor_keys.action)
                _check_shape("action of the policy", predicted, action.shape)
                return -(at_least_float32(predicted) - action).square().sum(dim=-1)
            dist = _run(td, network, name, network.get_dist)
        if isinstance(dist, CompositeDistribution):
            log_prob = dist.log_prob(td.copy())
        else:
            action = self._get(td, self.tensor_keys.action)
            if action.dtype is torch.bool:  # OneHot's own dtype, of which there is no argmax
                action = action.to(torch.uint8)
            if not dist.event_shape and action.shape == (*dist.batch_shape, 1):
                action = action.squeeze(-1)
            log_prob = dist.log_prob(action)
        if is_tensor_collection(log_prob):
            log_prob = log_prob.sum(dim="feature", reduce=True)  # pyright: ignore
        return at_least_float32(log_prob)

    def _v(self, td: TensorDictBase, prefix: str | None = None) -> Tensor:
        """Compute V(s), or V(s') with the prefix ``"next"``, ``[*B]``."""
        with self.value_network_params.to_module(self.value_network, preserve_module_state=False):
            outputs = _run(td, self.value_network, "value_network", prefix=prefix)
        value = _get_output(outputs, self.tensor_keys.value, self.value_network)
        return at_least_float32(_squeeze_last(value, self.tensor_keys.value))

    @torch.no_grad()
    def _next_v(self, td: TensorDictBase) -> Tensor:
        return self._v(td, prefix="next")

    def _q(self, td: TensorDictBase) -> Tensor:
        """Compute Q_i(s, a) at the actions of the data, ``[N, *B]``."""
        return self._q_ensemble(td, self.qvalue_network_params)

    @torch.no_grad()
    def _target_q(self, td: TensorDictBase) -> Tensor:
        return self._q_ensemble(td, self.target_qvalue_network_params)

    def _q_ensemble(self, td: TensorDictBase, params: TensorDictParams) -> Tensor:
        if self.num_qvalue_nets == 1:
            params = params.unsqueeze(0)
        name, network = "qvalue_network", self.qvalue_network
        key = self.tensor_keys.state_action_value
        if takes_stacked_parameters(network) and network.out_keys == [key]:

            def stacked(inputs: TensorDictBase) -> Tensor:
                return network.module(*(inputs[key] for key in network.in_keys))

            with params.to_module(network, preserve_module_state=False):
                q = _run(td, network, name, stacked)
        else:
            outputs = _run(td, network, name, lambda inputs: self._mapped(inputs, params))
            q = _get_output(outputs, key, network)
        return at_least_float32(self.at_action(td, q))

    def _mapped(self, inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
        """Evaluate the Q networks one by one, or as one through :func:`torch.vmap`.

        Raises:
            RuntimeError: they can be evaluated one by one, but not as one.
        """

        def evaluate(inputs: TensorDictBase, *, one_by_one: bool) -> Any:
            mapped = _vmap_func(
                self.qvalue_network,
                (None, 0),
                randomness=self.vmap_randomness,
                pseudo_vmap=one_by_one,
            )
            return mapped(inputs, params)  # pyright: ignore

        if self.deactivate_vmap or torch.compiler.is_compiling():
            return evaluate(inputs, one_by_one=self.deactivate_vmap)
        try:
            return evaluate(inputs.copy(), one_by_one=False)
        except Exception as error:
            try:
                with torch.no_grad():
                    evaluate(inputs, one_by_one=True)
            except Exception:
                raise error from None
            raise RuntimeError(
                "torch.vmap can not evaluate qvalue_network for all Q networks at once, though each "
                f"can be evaluated alone: build the loss with deactivate_vmap=True ({error})"
            ) from error

    def at_action(self, td: TensorDictBase, q: Tensor) -> Tensor:
        """Select the values of the data's actions, ``[N, *B]``, from what the Q networks put out."""
        return _squeeze_last(q, self.tensor_keys.state_action_value)

    @torch.no_grad()
    def td_target(self, td: TensorDictBase, next_v: Tensor) -> Tensor:
        """Compute the value estimator's target, ``[*B]``, from V(s'), ``[*B]``."""
        keys = self.tensor_keys
        next_v = next_v.unsqueeze(-1)
        _check_shape(("next", keys.reward), self._get(td, ("next", keys.reward)), next_v.shape)
        reads_done = isinstance(self.value_estimator, (TD1Estimator, TDLambdaEstimator))
        told = td.get(("next", keys.terminated), default=None) is not None
        if reads_done or not told:
            terminated = self._flag(td, ("next", keys.done), next_v.shape)
        if told:
            terminated = self._flag(td, ("next", keys.terminated), next_v.shape)
        target = self.value_estimator.value_estimate(
            td.copy(),  # average_rewards writes into it
            next_value=next_v.masked_fill(terminated, 0.0),
        )
        return target.squeeze(-1).to(next_v.dtype)

    # --- Reading and writing the batch ---------------------------------------------------------------

    def _reduce(self, td: TensorDictBase, loss: Tensor) -> Tensor:
        weights = None
        if self.use_prioritized_weights in (True, "auto"):
            weights = td.get(self.tensor_keys.priority_weight, default=None)
        if weights is not None:
            weights = self._expand_loss_mask(weights, loss)
        return self._reduce_loss(loss, td, weights=weights)

    @classmethod
    def _flag(cls, td: TensorDictBase, key: NestedKey, shape: tuple[int, ...]) -> Tensor:
        flag = cls._get(td, key)
        _check_shape(key, flag, shape)
        if flag.dtype is not torch.bool:
            raise ValueError(
                f"{key!r} has dtype {flag.dtype}, expected torch.bool: give it as .bool()"
            )
        return flag

    @staticmethod
    def _get(td: TensorDictBase, key: NestedKey) -> Tensor:
        value = td.get(key, default=None)
        if value is None:
            raise KeyError(_missing(td, [key], "the loss"))
        return value

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that :meth:`forward` reads, in a fixed order."""
        if not self._in_keys:
            self._set_in_keys()
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        in_keys: list[NestedKey] = [
            *_inputs(self.actor_network),
            *self.qvalue_network.in_keys,
            *self.value_network.in_keys,
            keys.action,
            *(_nested("next", key) for key in self.value_network.in_keys),
            *(_nested("next", key) for key in (keys.reward, keys.done, keys.terminated)),
        ]
        self._in_keys = list(dict.fromkeys(in_keys))

    # --- What a LossModule is made of ----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Not available: a loss may span devices, so nothing may rely on this."""
        raise RuntimeError("A loss has no device of its own; ask its parameters instead.")

    def make_value_estimator(
        self, value_type: ValueEstimators | str | Any = None, **hyperparams
    ) -> IQLLoss:
        """Choose how the target of Q is estimated; TD(0) with ``gamma=0.99`` if never called.

        Args:
            value_type: ``TD0``, ``TD1`` or ``TDLambda`` of :class:`~torchrl.objectives.ValueEstimators`,
                their name, or a value estimator (class or instance) of one's own.
            **hyperparams: what the estimator takes, for example ``gamma`` in [0, 1].

        Returns:
            the loss itself.
        """
        gamma = hyperparams.get("gamma")
        if gamma is not None:
            _check_number("gamma", gamma, 0 <= gamma <= 1, "[0, 1]")
        if value_type is None:
            value_type = self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase) or (
            isinstance(value_type, type) and issubclass(value_type, ValueEstimatorBase)
        ):
            super().make_value_estimator(value_type, **hyperparams)  # pyright: ignore
            self.value_estimator.set_keys(**self._estimator_keys())
            return self
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys=self._estimator_keys(),
            **hyperparams,
        )
        defaults = default_value_kwargs(self.value_type)  # pyright: ignore
        coefficients = {**defaults, **hyperparams}
        for name in ("gamma", "lmbda"):
            if name in coefficients:
                buffer = _coefficient(
                    coefficients[name], getattr(self.value_estimator, name).device
                )
                setattr(self.value_estimator, name, buffer)
        return self

    def _estimator_keys(self) -> dict[str, NestedKey]:
        keys = {name: getattr(self.tensor_keys, name) for name in ("reward", "done", "terminated")}
        # The estimator checks this name, though V(s') is evaluated here; V may be renamed after it.
        if self.tensor_keys.value in self.value_network.out_keys:
            keys["value"] = self.tensor_keys.value
        return keys

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self.value_estimator.set_keys(**self._estimator_keys())
        self._set_in_keys()

    def train(self, mode: bool = True) -> IQLLoss:
        """Set the training mode of the loss and of its networks (dropout, for example)."""
        super().train(mode)
        for network in (self.actor_network, self.qvalue_network, self.value_network):
            network.train(mode)
        return self

    def _apply(self, fn: Callable) -> IQLLoss:
        """Cast and move the networks, but only move the coefficients."""
        owners = ((self, "expectile"), (self, "temperature"))
        owners += tuple((self.value_estimator, name) for name in ("gamma", "lmbda"))
        kept = [(owner, name, getattr(owner, name, None)) for owner, name in owners]
        super()._apply(fn)
        for owner, name, buffer in kept:
            if buffer is not None:
                setattr(owner, name, buffer.to(getattr(owner, name).device))
        return self

    def _make_vmap(self) -> None:
        """Make nothing: each call maps the ensemble anew, so that the loss can be pickled."""

    def _release(self, *tensordicts: TensorDictBase) -> None:
        # Weak references cannot be rebuilt under torch.compile.
        names = ("actor_network", "qvalue_network", "value_network")
        params = [f"{prefix}{n}_params" for n in names for prefix in ("", "target_")]
        self._clear_weakrefs(*tensordicts, *params)

    @torch.no_grad()
    def _draw_ensemble(self, given: nn.Module) -> None:
        """Give network 0 the given parameters, the others fresh ones of the same kind."""
        for key, stacked in self.qvalue_network_params.items(True, True):
            if not isinstance(stacked, nn.Parameter):
                continue  # a buffer, or a parameter shared with another network
            name = key if isinstance(key, str) else ".".join(key)
            parameter = given.get_parameter(name)
            stacked.data[0] = parameter
            for other in stacked.data[1:]:
                other.copy_(_drawn_like(parameter, is_bias=name.endswith("bias")))
        self.target_qvalue_network_params.data.update_(self.qvalue_network_params.data)


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
            _check_shape(self.tensor_keys.action, action, q.shape[1:])
            return (q * action.to(q.dtype)).sum(dim=-1)
        if action.is_floating_point() or action.dtype is torch.bool:
            raise ValueError(
                f"{self.tensor_keys.action!r} has dtype {action.dtype}, expected integers for "
                "action_space='categorical': give it as .long()"
            )
        if action.ndim == q.ndim - 2:
            action = action.unsqueeze(-1)
        _check_shape(self.tensor_keys.action, action, (*q.shape[1:-1], 1))
        return q.gather(-1, action.long().expand(len(q), *action.shape)).squeeze(-1)


# --- Checks and helpers -----------------------------------------------------------------------------


def _check_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _check_number(name: str, value: float, within: bool, interval: str) -> None:
    if not within:  # NaN is within nothing
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def _check_network(name: str, network: object) -> None:
    if not isinstance(network, TensorDictModuleBase):
        raise TypeError(f"{name} must be a TensorDictModule, got {network!r}")


def _check_qvalue_networks(
    networks: TensorDictModule | list[TensorDictModule], number: int
) -> TensorDictModule | list[TensorDictModule]:
    if number < 1:
        raise ValueError(f"num_qvalue_nets must be at least 1, got {number!r}")
    for network in networks if isinstance(networks, (list, tuple)) else [networks]:
        _check_network("qvalue_network", network)
    if isinstance(networks, (list, tuple)):
        if len(networks) != number:
            raise ValueError(
                f"qvalue_network has {len(networks)} networks, but num_qvalue_nets={number}"
            )
        return networks if number > 1 else networks[0]
    if number > 1 and any(map(nn.parameter.is_lazy, networks.parameters())):
        raise ValueError(
            "qvalue_network has lazy parameters: run it once on a batch before it can be "
            f"expanded to num_qvalue_nets={number} networks, or pass a list of networks"
        )
    return networks


def takes_stacked_parameters(network: nn.Module) -> bool:
    """Return whether a network of :mod:`torchrl_iql.models` evaluates an ensemble in one call."""
    return getattr(getattr(network, "module", None), "takes_stacked_parameters", False)


def _is_deterministic(actor_network: TensorDictModule) -> bool:
    if isinstance(actor_network, Actor) or not hasattr(actor_network, "get_dist"):
        return True
    distributions = [getattr(m, "distribution_class", None) for m in actor_network.modules()]
    return any(d in (Delta, TanhDelta, TensorDictDelta) for d in distributions)


def _check_shape(
    what: NestedKey, tensor: Tensor, expected: tuple[int, ...], remedy: str = ""
) -> None:
    if tensor.shape == torch.Size(expected):
        return
    if (*tensor.shape, 1) == tuple(expected):
        remedy = ": give it as .unsqueeze(-1)"
    raise ValueError(
        f"{what!r} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{remedy}"
    )


def _check_log_prob(log_prob: Tensor, expected: tuple[int, ...]) -> None:
    remedy = ": a policy of several dimensions needs torch.distributions.Independent"
    _check_shape("log-probability of the action", log_prob, expected, remedy)


def _coefficient(number: float | Tensor, device: torch.device | None) -> Tensor:
    """Make a scalar in float64: 0-dim, it does not promote the losses, and 0.7 stays 0.7."""
    return torch.as_tensor(number, dtype=torch.float64).to(device)


def _missing(td: TensorDictBase, keys: list[NestedKey], reader: str) -> str:
    entries = f"the entry {keys[0]!r}" if len(keys) == 1 else f"one of the entries {keys}"
    return f"{reader} needs {entries}, and the batch holds {list(td.keys(True, True))}"


def _nested(prefix: str | None, key: NestedKey) -> NestedKey:
    if prefix is None:
        return key
    return (prefix, key) if isinstance(key, str) else (prefix, *key)


def _inputs(module: TensorDictModule) -> list[NestedKey]:
    """Return the ``in_keys``, less those where a composite policy writes its own parameters."""
    written = {key[0] for key in module.out_keys if isinstance(key, tuple)}
    return [key for key in module.in_keys if key not in written]


def _read(
    td: TensorDictBase, module: TensorDictModule, prefix: str | None = None
) -> TensorDictBase:
    """Make a TensorDict with the inputs of ``module``: what it writes stays out of the batch."""
    if prefix is None:
        return td.select(*_inputs(module), strict=False)
    inputs = td.get(prefix, default=td.empty()).select(*_inputs(module), strict=False)
    begins = td.get("is_init", default=None) if "is_init" in module.in_keys else None
    if begins is not None:
        # No environment marks a next state, yet a recurrent network has to begin there anew as well.
        inputs.set("is_init", begins)
    return inputs


def _run(
    td: TensorDictBase,
    module: TensorDictModule,
    name: str,
    call: Callable[[TensorDictBase], Any] | None = None,
    *,
    prefix: str | None = None,
) -> Any:
    """Evaluate a network, and explain a failure that comes from its inputs.

    Which of them it can do without, as recurrent networks can without a state, only the network knows.
    """
    inputs, call = _read(td, module, prefix), call or module
    if torch.compiler.is_compiling():
        return call(inputs)
    try:
        return call(inputs)
    except KeyError as error:
        missing = [_nested(prefix, key) for key in _inputs(module) if key not in inputs.keys(True)]
        if not missing:
            raise
        raise KeyError(_missing(td, missing, name)) from error
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        found = {key: value.dtype for key, value in inputs.items(True, True)}
        raise RuntimeError(
            f"{error}\nThe network was given {found}: cast the data to the dtype of the network's "
            "parameters once, when it is loaded"
        ) from error


def _get_output(outputs: TensorDictBase, key: NestedKey, module: TensorDictModule) -> Tensor:
    value = outputs.get(key, default=None)
    if value is None:
        raise KeyError(
            f"a network writes {module.out_keys}, but the loss reads {key!r}: rename it with "
            "set_keys(...) or in the network's out_keys"
        )
    return value


def _squeeze_last(value: Tensor, key: NestedKey) -> Tensor:
    if value.shape[-1:] != (1,):
        raise ValueError(
            f"a network writes {key!r} of shape {tuple(value.shape)}, expected a last dimension of 1"
        )
    return value.squeeze(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _drawn_like(parameter: Tensor, is_bias: bool) -> Tensor:
    """Draw a parameter of the kind of the given one: a rotated matrix, or a bias of its range."""
    if is_bias:
        return torch.empty_like(parameter).uniform_(-1, 1) * parameter.abs().max()
    if parameter.ndim < 2:
        return parameter  # the scale of a normalisation layer
    matrix = parameter.flatten(1).to(torch.float32)
    gaussian = torch.randn(matrix.shape[1], matrix.shape[1], device=matrix.device)
    rotation, r = torch.linalg.qr(gaussian)
    return (matrix @ (rotation * r.diagonal().sign())).view_as(parameter)


def _adapt_state_dict(module: IQLLoss, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Accept TorchRL's state dicts: without a value estimator, or one Q network with a leading dim."""
    for key, own in module.state_dict().items():
        full_key = prefix + key
        if key.startswith("_value_estimator."):
            state_dict.setdefault(full_key, own)
        elif (
            module.num_qvalue_nets == 1
            and key.removeprefix("target_").startswith("qvalue_network_params.")
            and full_key in state_dict
            and state_dict[full_key].shape == (1, *own.shape)
        ):
            state_dict[full_key] = state_dict[full_key].squeeze(0)
