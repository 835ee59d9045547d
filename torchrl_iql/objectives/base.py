"""What losses have in common that learn a policy by advantage-weighted regression on a Q ensemble.

A subclass says which networks there are, evaluates them, and gives what they put out to its equations, in
:mod:`torchrl_iql.objectives.functional`. Here the batch is read, networks are called, and losses are
reduced, as TorchRL's LossModules do it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args

import torch
from tensordict import (
    TensorDict,
    TensorDictBase,
    TensorDictParams,
    is_tensor_collection,
)
from tensordict.nn import (
    CompositeDistribution,
    TensorDictModule,
    TensorDictModuleBase,
    dispatch,
)
from tensordict.nn.distributions import Delta as TensorDictDelta
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import Actor, Delta, TanhDelta
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import (
    ValueEstimators,
    _vmap_func,
    default_value_kwargs,
    dispatch_value_estimator,
)
from torchrl.objectives.value import TD1Estimator, TDLambdaEstimator, ValueEstimatorBase

from torchrl_iql.objectives import functional
from torchrl_iql.spaces import written

__all__ = ["AdvantageWeightedLoss", "Reduction", "ScalarOutputMode", "at_least_float32"]

Reduction = Literal["none", "mean", "sum"]
ScalarOutputMode = Literal["exclude", "non_tensor"]
Outputs = TypeVar("Outputs")


class _Tie(NamedTuple):
    """An entry of a network that is a parameter of another, by which it is trained or not."""

    entry: tuple[str, NestedKey]
    owner: tuple[str, NestedKey]
    shape: torch.Size
    learns: bool


class AdvantageWeightedLoss(LossModule, Generic[Outputs]):
    """A policy ``actor_network``, N networks ``qvalue_network`` with targets, and what else a subclass has.

    Args:
        networks: by name, in the order in which parameters that they share are trained.

    Keyword Args:
        coefficients: the scalar buffers beside ``temperature``, which schedules may change.
        **others: those of :class:`~torchrl_iql.IQLLoss`.
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

    temperature: Tensor
    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        networks: Mapping[str, Any],
        *,
        num_qvalue_nets: int,
        loss_function: functional.Distance,
        temperature: float,
        weight_clip: float,
        coefficients: Mapping[str, float] = MappingProxyType({}),
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
        for name, network in networks.items():
            if name != "qvalue_network":
                _check_network(name, network)
        check_choice("loss_function", loss_function, functional.DISTANCES)
        check_choice("reduction", reduction, (None, *get_args(Reduction)))
        check_choice(
            "scalar_output_mode",
            scalar_output_mode,
            (None, *get_args(ScalarOutputMode)),
        )
        check_number("temperature", temperature, lambda x: 0 <= x < math.inf, "[0, inf)")
        check_number("weight_clip", weight_clip, lambda x: x > 0, "(0, inf]")
        qvalue_network = check_qvalue_networks(networks["qvalue_network"], num_qvalue_nets)

        self._in_keys: list[NestedKey] = []
        self._out_keys = None
        super().__init__()
        self.deactivate_vmap = deactivate_vmap
        self.delay_qvalue = True
        self.num_qvalue_nets = num_qvalue_nets
        self.loss_function: functional.Distance = loss_function
        self.weight_clip = weight_clip
        self.reduction = reduction or "mean"
        self.scalar_output_mode = scalar_output_mode or "exclude"
        self._network_names = tuple(networks)
        self._coefficients = (*coefficients, "temperature")

        # Shared parameters: with separate_losses the networks converted later hold detached copies.
        shared: list[nn.Parameter] | None = None
        for name, network in networks.items():
            if name == "qvalue_network":
                self._add_ensemble(qvalue_network, shared)
            else:
                self.convert_to_functional(network, name, compare_against=shared)
                if separate_losses:
                    shared = [*(shared or []), *network.parameters()]
        self._ties = self._find_ties()

        for name, number in ({**coefficients, "temperature": temperature}).items():
            buffer = _coefficient(number, self._default_device)
            self.register_buffer(name, buffer, persistent=False)
        self.make_value_estimator(device=self._default_device)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

        self._deterministic = is_deterministic(networks["actor_network"])
        if self.reduction == "none" and scalar_output_mode is None:
            warnings.warn(
                "With reduction='none' the scalars of the output (entropy and diagnostics) have no "
                "place among the losses and are excluded. Pass scalar_output_mode='exclude' to "
                "silence this warning or 'non_tensor' to keep them as non-tensor data.",
                category=UserWarning,
                stacklevel=3,
            )
        self._writes_scalars = self.reduction != "none" or scalar_output_mode == "non_tensor"
        if self._deterministic or not self._writes_scalars:
            self.out_keys = [key for key in self.out_keys if key.startswith("loss_")]  # pyright: ignore
        # Found out now rather than in the first call, which torch.compile would trace twice.
        self._set_in_keys()
        _ = self.vmap_randomness

    @property
    def tensor_keys(self) -> AdvantageWeightedLoss._AcceptedKeys:
        """The names of the entries, as :meth:`set_keys` has left them."""
        return self._tensor_keys  # pyright: ignore

    def _add_ensemble(self, networks: Any, shared: list[nn.Parameter] | None) -> None:
        number = self.num_qvalue_nets
        self.convert_to_functional(
            networks,
            "qvalue_network",
            expand_dim=number if number > 1 else None,
            create_target_params=True,
            compare_against=shared,
        )
        if isinstance(networks, nn.Module):
            if number > 1:
                self._draw_ensemble(networks)
        elif shared is not None:
            with self.qvalue_network_params.unlock_() as params:
                for name, parameter in networks[0].named_parameters():
                    if any(parameter is other for other in shared):
                        key = tuple(name.split("."))
                        params.set(key, params.get(key).data)

    def _find_ties(self) -> list[_Tie]:
        """Find what networks hold of parameters that are others'.

        Raises:
            ValueError: Q networks share a parameter that is no other network's, and would never be trained.
        """
        entries = [
            (f"{name}_params", key, tensor)
            for name in self._network_names
            for key, tensor in getattr(self, f"{name}_params").items(True, True)
            if tensor.numel()
        ]
        owners = {
            tensor.data_ptr(): (name, key)
            for name, key, tensor in entries
            if isinstance(tensor, nn.Parameter)
        }
        ties = []
        for name, key, tensor in entries:
            if isinstance(tensor, nn.Parameter):
                continue
            if tensor.data_ptr() in owners:
                owner = owners[tensor.data_ptr()]
                ties.append(_Tie((name, key), owner, tensor.shape, tensor.requires_grad))
            elif tensor.requires_grad:
                raise ValueError(
                    f"qvalue_network is a list of networks with the same {written(key)}, which no loss would "
                    "train: give each its own, as copy.deepcopy makes it"
                )
        return ties

    def _tie(self, *, apart: bool = False) -> None:
        """Let networks hold each other's parameters again, or values of their own meanwhile."""
        for (name, key), (owner, its), shape, learns in self._ties:
            source = getattr(self, owner).get(its)
            tensor = (source if learns else source.data).expand(shape)
            with getattr(self, name).unlock_() as params:
                params.set(key, tensor.detach().clone() if apart else tensor)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, of TorchRL's losses as well. See :meth:`torch.nn.Module.load_state_dict`."""
        self._tie(apart=True)  # a tensor that is expanded can not be written
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        finally:
            self._tie()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()

    # --- The algorithm, of which a subclass has the equations ----------------------------------------

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses and the diagnostics, each network evaluated once per input."""
        return self.losses(tensordict, self.evaluate(tensordict))

    def evaluate(self, tensordict: TensorDictBase) -> Outputs:
        """Compute all that :meth:`losses` needs of the networks."""
        raise NotImplementedError

    def equations(self, outputs: Outputs) -> dict[str, Tensor]:
        """Compute the losses and what is worth watching of given network outputs, ``[*B]`` each."""
        raise NotImplementedError

    def losses(self, tensordict: TensorDictBase, outputs: Outputs) -> TensorDictBase:
        """Return what :meth:`forward` does, and the batch's priority, from given network outputs."""
        values = self.equations(outputs)
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

    # --- The networks, evaluated --------------------------------------------------------------------

    def log_likelihood(self, td: TensorDictBase) -> Tensor:
        """Return log pi(a | s) at the data's actions, ``[*B]``; if deterministic -|a - pi(s)|^2."""
        if not self._deterministic:
            return self._log_prob(td, self._distribution(td))
        name, network = "actor_network", self.actor_network
        with self.actor_network_params.to_module(network, preserve_module_state=False):
            predicted = run(td, network, name).get(self.tensor_keys.action)
        action = self._get(td, self.tensor_keys.action)
        check_shape("action of the policy", predicted, action.shape)
        return -(at_least_float32(predicted) - action).square().sum(dim=-1)

    def _distribution(self, td: TensorDictBase, prefix: str | None = None) -> Any:
        """Return pi(. | s), or pi(. | s') with the prefix ``"next"``."""
        name, network = "actor_network", self.actor_network
        with self.actor_network_params.to_module(network, preserve_module_state=False):
            return run(td, network, name, network.get_dist, prefix=prefix)

    def _log_prob(self, td: TensorDictBase, dist: Any) -> Tensor:
        """Return the log-likelihood of the data's actions, ``[*B]``."""
        if isinstance(dist, CompositeDistribution):
            log_prob = _likelihood(dist, td.copy(), td, dist.dists)
        else:
            action = self._get(td, self.tensor_keys.action)
            if action.dtype is torch.bool:  # OneHot's own dtype, of which there is no argmax
                action = action.to(torch.uint8)
            if not dist.event_shape and action.shape == (*dist.batch_shape, 1):
                action = action.squeeze(-1)
            log_prob = _likelihood(dist, action, td, [self.tensor_keys.action])
        if is_tensor_collection(log_prob):
            log_prob = log_prob.sum(dim="feature", reduce=True)  # pyright: ignore
        return at_least_float32(log_prob)

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
            q = run_stacked(td, network, name, params)
        else:
            outputs = run(td, network, name, lambda inputs: self._mapped(inputs, params))
            q = output_of(outputs, key, network)
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
        return squeeze_last(q, self.tensor_keys.state_action_value)

    @torch.no_grad()
    def td_target(self, td: TensorDictBase, next_v: Tensor) -> Tensor:
        """Compute the value estimator's target, ``[*B]``, from V(s'), ``[*B]``."""
        keys = self.tensor_keys
        next_v = next_v.unsqueeze(-1)
        check_shape(("next", keys.reward), self._get(td, ("next", keys.reward)), next_v.shape)
        target = self.value_estimator.value_estimate(
            td.copy(),  # average_rewards writes into it
            next_value=next_v.masked_fill(self._terminated(td, next_v.shape), 0.0),
        )
        return target.squeeze(-1).to(next_v.dtype)

    def _terminated(self, td: TensorDictBase, shape: tuple[int, ...]) -> Tensor:
        """Return where what comes next is worth nothing, bool of this shape, ``[*B, 1]``."""
        keys = self.tensor_keys
        reads_done = isinstance(self.value_estimator, (TD1Estimator, TDLambdaEstimator))
        told = td.get(("next", keys.terminated), default=None) is not None
        if reads_done or not told:
            terminated = self._flag(td, ("next", keys.done), shape)
        if told:
            terminated = self._flag(td, ("next", keys.terminated), shape)
        return terminated

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
        check_shape(key, flag, shape)
        if flag.dtype is not torch.bool:
            raise ValueError(
                f"{key!r} has dtype {flag.dtype}, expected torch.bool: give it as .bool()"
            )
        return flag

    @staticmethod
    def _get(td: TensorDictBase, key: NestedKey) -> Tensor:
        value = td.get(key, default=None)
        if value is None:
            raise KeyError(missing(td, [key], "the loss"))
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
        here, after = self._read_of_networks()
        in_keys: list[NestedKey] = [
            *here,
            keys.action,
            *(nested("next", key) for key in after),
            *(nested("next", key) for key in (keys.reward, keys.done, keys.terminated)),
        ]
        self._in_keys = list(dict.fromkeys(in_keys))

    def _read_of_networks(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """Return what networks read of a state, and of the next one."""
        raise NotImplementedError

    # --- What a LossModule is made of ----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Not available: a loss may span devices, so nothing may rely on this."""
        raise RuntimeError("A loss has no device of its own; ask its parameters instead.")

    def make_value_estimator(
        self, value_type: ValueEstimators | str | Any = None, **hyperparams
    ) -> Self:
        """Choose how the target of Q is estimated; TD(0) with ``gamma=0.99`` if never called.

        Args:
            value_type: ``TD0``, ``TD1`` or ``TDLambda`` of :class:`~torchrl.objectives.ValueEstimators`,
                their name, or a value estimator (class or instance) of one's own.
            **hyperparams: what the estimator takes, for example ``gamma`` in [0, 1].

        Returns:
            the loss itself.
        """
        check_gamma(hyperparams)
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
        network = getattr(self, "value_network", None)
        if network is not None and self.tensor_keys.value in network.out_keys:
            keys["value"] = self.tensor_keys.value
        return keys

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self.value_estimator.set_keys(**self._estimator_keys())
        self._set_in_keys()

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the loss and of its networks (dropout, for example)."""
        super().train(mode)
        for name in self._network_names:
            getattr(self, name).train(mode)
        return self

    def _apply(self, fn: Callable) -> Self:
        """Cast and move the networks, but only move the coefficients."""
        owners = tuple((self, name) for name in self._coefficients)
        owners += tuple((self.value_estimator, name) for name in ("gamma", "lmbda"))
        kept = [(owner, name, getattr(owner, name, None)) for owner, name in owners]
        super()._apply(fn)
        for owner, name, buffer in kept:
            if buffer is not None:
                setattr(owner, name, buffer.to(getattr(owner, name).device))
        self._tie()
        return self

    def _make_vmap(self) -> None:
        """Make nothing: each call maps the ensemble anew, so that the loss can be pickled."""

    def _release(self, *tensordicts: TensorDictBase) -> None:
        # Weak references cannot be rebuilt under torch.compile.
        params = [f"{prefix}{n}_params" for n in self._network_names for prefix in ("", "target_")]
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
                other.copy_(drawn_like(parameter, is_bias=name.endswith("bias")))
        self.target_qvalue_network_params.data.update_(self.qvalue_network_params.data)


# --- Checks and helpers -----------------------------------------------------------------------------


def check_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_number(name: str, value: Any, within: Callable[[Any], Any], interval: str) -> None:
    try:
        fits = bool(within(value))  # NaN is within nothing
    except (TypeError, ValueError, RuntimeError):  # text, None, or several numbers
        fits = False
    if not fits:
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_gamma(hyperparams: Mapping[str, Any]) -> None:
    """Refuse discounts that a value estimator can not have."""
    for name in ("gamma", "lmbda"):
        if (number := hyperparams.get(name)) is not None:
            check_number(name, number, lambda x: 0 <= x <= 1, "[0, 1]")


@contextmanager
def unannotated() -> Iterator[None]:
    """Silence TorchRL's warning that a subclass of one of its losses does not repeat the annotations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The name .* wasn't part of the annotations")
        yield


def action_bounds(bounds: tuple[Any, Any], *, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Return copies of the lowest and the highest action as tensors.

    Raises:
        ValueError: they are not, or not finite where they have to be.
    """
    low, high = (torch.as_tensor(each).detach().clone() for each in bounds)
    if not bool((low < high).all()) or (finite and not bool((high - low).isfinite().all())):
        expected = "the lowest and the highest action" + (", finite" if finite else "")
        raise ValueError(f"bounds must be {expected}, got {bounds!r}")
    return low, high


def _check_network(name: str, network: object) -> None:
    if not isinstance(network, TensorDictModuleBase):
        raise TypeError(f"{name} must be a TensorDictModule, got {network!r}")


def check_qvalue_networks(
    networks: TensorDictModule | list[TensorDictModule], number: int
) -> TensorDictModule | list[TensorDictModule]:
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"num_qvalue_nets must be an integer of at least 1, got {number!r}")
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


def is_deterministic(actor_network: TensorDictModule) -> bool:
    """Return whether a policy has no distribution.

    Raises:
        TypeError: it has one, and no ``get_dist`` that tells it.
    """
    distributions = distributions_of(actor_network)
    if isinstance(actor_network, Actor) or {Delta, TanhDelta, TensorDictDelta} & {*distributions}:
        return True
    if hasattr(actor_network, "get_dist"):
        return False
    if distributions:
        raise TypeError(
            f"actor_network is a {type(actor_network).__name__} that holds a {distributions[0].__name__} and "
            "has no get_dist: put its modules in a ProbabilisticTensorDictSequential"
        )
    return True


def distributions_of(network: nn.Module) -> list[type]:
    """Return the classes of the distributions that a network has."""
    found = (getattr(module, "distribution_class", None) for module in network.modules())
    return [each for each in found if each is not None]


def check_shape(
    what: NestedKey, tensor: Tensor, expected: tuple[int, ...], remedy: str = ""
) -> None:
    if tensor.shape == torch.Size(expected):
        return
    if (*tensor.shape, 1) == tuple(expected):
        remedy = ": give it as .unsqueeze(-1)"
    raise ValueError(
        f"{what!r} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{remedy}"
    )


def check_log_prob(log_prob: Tensor, expected: tuple[int, ...]) -> None:
    remedy = ": a policy of several dimensions needs torch.distributions.Independent"
    check_shape("log-probability of the action", log_prob, expected, remedy)


def _coefficient(number: float | Tensor, device: torch.device | None) -> Tensor:
    """Make a scalar in float64: 0-dim, it does not promote the losses, and 0.7 stays 0.7."""
    return torch.as_tensor(number, dtype=torch.float64).to(device)


def missing(td: TensorDictBase, keys: list[NestedKey], reader: str) -> str:
    entries = f"the entry {keys[0]!r}" if len(keys) == 1 else f"one of the entries {keys}"
    return f"{reader} needs {entries}, and the batch holds {list(td.keys(True, True))}"


def nested(prefix: str | None, key: NestedKey) -> NestedKey:
    if prefix is None:
        return key
    return (prefix, key) if isinstance(key, str) else (prefix, *key)


def inputs_of(module: TensorDictModule) -> list[NestedKey]:
    """Return the ``in_keys``, less those where a composite policy writes its own parameters."""
    written = {key[0] for key in module.out_keys if isinstance(key, tuple)}
    return [key for key in module.in_keys if key not in written]


def _read(
    td: TensorDictBase, module: TensorDictModule, prefix: str | None = None
) -> TensorDictBase:
    """Make a TensorDict with the inputs of ``module``: what it writes stays out of the batch."""
    if prefix is None:
        return td.select(*inputs_of(module), strict=False)
    inputs = td.get(prefix, default=td.empty()).select(*inputs_of(module), strict=False)
    begins = td.get("is_init", default=None) if "is_init" in module.in_keys else None
    if begins is not None:
        # No environment marks a next state, yet a recurrent network has to begin there anew as well.
        inputs.set("is_init", begins)
    return inputs


def run(
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
    except Exception as error:
        lacking = [nested(prefix, key) for key in inputs_of(module) if key not in inputs.keys(True)]
        if isinstance(error, KeyError) and lacking:
            raise KeyError(missing(td, lacking, name)) from error
        given = were_given(name, inputs, prefix)
        if isinstance(error, RuntimeError) and re.search("dtype|scalar type", str(error)):
            raise RuntimeError(
                f"{error}\n{given}. Cast the data to the dtype of the network's parameters once, when it is "
                "loaded"
            ) from error
        error.add_note(given)
        raise


def were_given(name: str, entries: TensorDictBase, prefix: str | None = None) -> str:
    """Say what entries were given to a network, of which shapes and types: the cause of most failures."""
    found = (
        f"{nested(prefix, key)!r}: {tuple(its.shape)} of {its.dtype}"
        for key, its in entries.items(True, True)
    )
    return f"{name} was given {', '.join(found)}"


def _likelihood(dist: Any, value: Any, td: TensorDictBase, actions: Iterable[NestedKey]) -> Any:
    """Return the log-likelihood of a value, and explain a failure that comes from the actions in it.

    Raises:
        ValueError: they are integers, and the distribution can not do with them.
    """
    if torch.compiler.is_compiling():
        return dist.log_prob(value)
    try:
        return dist.log_prob(value)
    except Exception as error:
        name = f"the policy's {type(dist).__name__}"
        given = were_given(name, td.select(*actions, strict=False))
        if isinstance(error, TypeError) and "floating point" in str(error):
            raise ValueError(f"{given}, expected floating point: give it as .float()") from error
        error.add_note(given)
        raise


def run_stacked(
    td: TensorDictBase, network: TensorDictModule, name: str, params: TensorDictBase
) -> Tensor:
    """Evaluate a network that :func:`takes_stacked_parameters`, ``[N, *B, out]``."""

    def stacked(inputs: TensorDictBase) -> Tensor:
        return network.module(*(inputs[key] for key in network.in_keys))

    with params.to_module(network, preserve_module_state=False):
        return run(td, network, name, stacked)


def at_category(q: Tensor, action: Tensor, key: NestedKey) -> Tensor:
    """Select the values of categories, integers ``[*B]`` or ``[*B, 1]``: ``[N, *B, A]`` to ``[N, *B]``.

    Raises:
        ValueError: ``action``, called by ``key``, is none, or on a CPU out of range.
    """
    if action.is_floating_point() or action.dtype is torch.bool:
        raise ValueError(
            f"{key!r} has dtype {action.dtype}, expected integers, the categories: give it as .long()"
        )
    if action.ndim == q.ndim - 2:
        action = action.unsqueeze(-1)
    check_shape(key, action, (*q.shape[1:-1], 1))
    index = action.long().expand(len(q), *action.shape)
    if torch.compiler.is_compiling():
        return q.gather(-1, index).squeeze(-1)
    try:
        return q.gather(-1, index).squeeze(-1)
    except RuntimeError:
        if action.device.type == "cpu":  # a GPU has failed as a whole
            check_categories(key, action, q.shape[-1])
        raise


def check_categories(key: NestedKey, action: Tensor, number: int) -> None:
    """Raise a ValueError if not all categories are below ``number``; a GPU is waited for."""
    for its in map(int, action.aminmax()) if action.numel() else ():
        if not 0 <= its < number:
            raise ValueError(f"{key!r} holds {its}, expected integers from 0 to {number - 1}")


def output_of(outputs: TensorDictBase, key: NestedKey, module: TensorDictModule) -> Tensor:
    value = outputs.get(key, default=None)
    if value is None:
        raise KeyError(
            f"a network writes {module.out_keys}, but the loss reads {key!r}: rename it with "
            "set_keys(...) or in the network's out_keys"
        )
    return value


def squeeze_last(value: Tensor, key: NestedKey) -> Tensor:
    if value.shape[-1:] != (1,):
        raise ValueError(
            f"a network writes {key!r} of shape {tuple(value.shape)}, expected a last dimension of 1"
        )
    return value.squeeze(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def drawn_like(parameter: Tensor, is_bias: bool) -> Tensor:
    """Draw a parameter of the kind of the given one: a rotated matrix, or a bias of its range."""
    if is_bias:
        return torch.empty_like(parameter).uniform_(-1, 1) * parameter.abs().max()
    if parameter.ndim < 2:
        return parameter  # the scale of a normalisation layer
    matrix = parameter.flatten(1).to(torch.float32)
    size = matrix.shape[1]
    gaussian = torch.randn(size, size, device=matrix.device, dtype=matrix.dtype)
    rotation, r = torch.linalg.qr(gaussian)
    return (matrix @ (rotation * r.diagonal().sign())).view_as(parameter)


def _adapt_state_dict(
    module: AdvantageWeightedLoss, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
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
