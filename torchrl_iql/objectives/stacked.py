"""The losses of R learners at once, their networks stacked so that each layer is one batched product.

The networks of :mod:`torchrl_iql.models` differ in their inputs and outputs and in nothing between. Here
they are the rows of one matrix, padded to a common width: policy, V and the Q networks of every learner
go through a layer together, and so do those that receive no gradient, V at s' and the target Q networks.
A learner is one replica of many, or the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.objectives import ValueEstimators
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

from torchrl_iql.models import GaussianParameters, Torso
from torchrl_iql.objectives import functional as iql
from torchrl_iql.objectives.iql import DiscreteIQLLoss, IQLLoss, at_least_float32

__all__ = ["Stack", "StackedLosses"]

Stack = tuple[Tensor, ...]
"""K networks of R learners: the weights of each layer, ``[R, K, in, out]``, and in one last tensor
``[R, K, S]`` all biases, one layer after the other, and the policy's log deviations."""


class StackedLosses:
    """The networks of R losses as two stacks, and the losses as a function of these.

    From now on the parameters of the given losses are views of the stacks, and their coefficients of
    ``coefficients``: whoever changes one changes the other. Moving or casting a loss parts them.

    Args:
        losses: R losses with networks of :mod:`torchrl_iql.models`, equal but for the values of
            parameters and of expectile, temperature and discount.

    Attributes:
        online: the 2 + N networks that learn: policy, V, and N Q networks.
        frozen: the 1 + N that follow: V, and N target Q networks.
        coefficients: ``[3, R]`` float64: expectile, temperature, discount.
        metrics: what is measured, in the names of the output of :class:`~torchrl_iql.IQLLoss`.

    Raises:
        TypeError, ValueError: the losses can not be stacked.
    """

    def __init__(self, losses: Sequence[IQLLoss]) -> None:
        networks = [_Networks(loss) for loss in losses]
        first = losses[0]
        self.num_qvalue_nets = first.num_qvalue_nets
        self.loss_function: iql.Distance = first.loss_function
        self.weight_clip = first.weight_clip
        self.discrete = isinstance(first, DiscreteIQLLoss)
        self.one_hot = self.discrete and first.action_space == "one_hot"
        _require_uniform(networks[0])
        for loss, its in zip(losses[1:], networks[1:], strict=True):
            _require_alike(first, networks[0], loss, its)
        self._describe(networks[0])
        parameter = networks[0].value.layers[0].weight
        self.online = self._empty(parameter, len(losses), 2 + self.num_qvalue_nets)
        self.frozen = self._empty(parameter, len(losses), 1 + self.num_qvalue_nets)
        self.coefficients = torch.zeros(
            3, len(losses), dtype=torch.float64, device=parameter.device
        )
        for r, (loss, its) in enumerate(zip(losses, networks, strict=True)):
            self._adopt(r, its)
            loss._has_update_associated = dict.fromkeys(loss._has_update_associated, True)
            for row, owner, name in (
                (0, loss, "expectile"),
                (1, loss, "temperature"),
                (2, loss.value_estimator, "gamma"),
            ):
                coefficient = self.coefficients[row, r]
                coefficient.copy_(getattr(owner, name))
                owner._buffers[name] = coefficient
        self.follow_value()

    def follow_value(self) -> None:
        """Copies V into the frozen stack, after the parameters of a loss were replaced."""
        for frozen, online in zip(self.frozen, self.online, strict=True):
            frozen[:, 0] = online[:, 1]

    def _describe(self, networks: _Networks) -> None:
        self.policy_size, _, self.qvalue_size = (t.layers[-1].out_features for t in networks.torsos)
        self.state_size = networks.value.layers[0].in_features
        self.input_size = networks.qvalue.layers[0].in_features
        hidden = [layer.out_features for layer in networks.value.layers[:-1]]
        widths = [self.input_size, *hidden, max(self.policy_size, self.qvalue_size)]
        self.shapes = list(pairwise(widths))
        self.action_size = 0 if networks.log_std is None else len(networks.log_std)
        self.sizes = [*widths[1:], self.action_size]
        self.dropout = networks.policy.dropout
        self.normalize = networks.value.normalize
        self.scale_action = deepcopy(networks.qvalue.scale_action)
        for name, buffer in networks.qvalue.scale_action.named_buffers():
            # Every Q network has the same.
            setattr(self.scale_action, name, buffer.reshape(-1, self.policy_size)[0])
        self.head: Any = networks.head
        self.distribution = networks.distribution
        self.metrics = ["loss_actor", "loss_qvalue", "loss_value"]
        self.metrics += ["advantage", "value", "qvalue", "clip_fraction"]
        self.metrics += ["entropy"] if self.distribution is not None else []

    def _empty(self, like: Tensor, replicas: int, networks: int) -> Stack:
        shapes = [*self.shapes, (sum(self.sizes),)]
        return tuple(like.detach().new_zeros(replicas, networks, *shape) for shape in shapes)

    def _adopt(self, replica: int, networks: _Networks) -> None:
        qvalues = slice(2, None) if self.num_qvalue_nets > 1 else 2
        targets = slice(1, None) if self.num_qvalue_nets > 1 else 1
        for torso, stack, rows in (
            (networks.policy, self.online, 0),
            (networks.value, self.online, 1),
            (networks.qvalue, self.online, qvalues),
            (networks.target_qvalue, self.frozen, targets),
        ):
            *weights, vectors = (tensor[replica, rows] for tensor in stack)
            biases = vectors.split(self.sizes, dim=-1)
            for layer, weight, bias in zip(torso.layers, weights, biases, strict=False):
                out, into = layer.weight.shape[-2:]
                _become_view(layer.weight, weight.mT[..., :out, :into])
                _become_view(layer.bias, bias[..., :out])
        if networks.log_std is not None:
            vectors = self.online[-1][replica, 0]
            _become_view(networks.log_std, vectors.split(self.sizes, dim=-1)[-1])

    def columns(self, source: TensorDictBase) -> dict[str, Tensor]:
        """What the losses read of transitions ``[n]``, numbers and flags without their last 1.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit, or the transitions are masked or
                weighted, which only the losses themselves know how to do.
        """
        keys = source.keys(True)
        for key in (*AUTO_LOSS_MASK_KEYS, "priority_weight"):
            if key in keys:
                raise ValueError(
                    f"the batch holds {key!r}, which the training step does not read: write the "
                    "loop around the loss yourself"
                )
        n, dtype = len(source), self.online[0].dtype
        state, action = ((n, self.state_size), dtype), ((n, self.policy_size), dtype)
        if self.discrete:
            action = ((n, self.policy_size) if self.one_hot else (n,), torch.int64)
        expected: dict[str, tuple[NestedKey, tuple[tuple[int, ...], torch.dtype]]] = {
            "observation": ("observation", state),
            "action": ("action", action),
            "next_observation": (("next", "observation"), state),
            "reward": (("next", "reward"), ((n, 1), dtype)),
            "terminated": (("next", "terminated"), ((n, 1), torch.bool)),
        }
        columns = {}
        for name, (key, (shape, kind)) in expected.items():
            column = source.get(key, default=None)
            if column is None:
                held = list(source.keys(True, True))
                raise KeyError(f"a step needs the entry {key!r}, and the batch holds {held}")
            if column.shape != shape or column.dtype != kind:
                found = f"{tuple(column.shape)} of {column.dtype}"
                raise ValueError(f"{key!r} is {found}, expected {shape} of {kind}")
            columns[name] = column
        if "steps_to_next_obs" in keys:
            columns["steps_to_next_obs"] = source["steps_to_next_obs"]
        for name in columns.keys() - {"observation", "next_observation", "action"}:
            columns[name] = columns[name].squeeze(-1)
        return columns

    # --- The losses --------------------------------------------------------------------------------

    def __call__(
        self, online: Stack, frozen: Stack, coefficients: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The three losses of every replica, a pure function.

        Args:
            online: the stack that gradients flow to.
            frozen: the stack without gradients.
            coefficients: ``[3, R]``.
            batch: ``observation`` and ``next_observation`` ``[R, B, D]``, ``action`` ``[R, B, A]`` (or
                ``[R, B]``), ``reward`` ``[R, B]``, ``terminated`` bool ``[R, B]``, and where there are
                n-step transitions ``steps_to_next_obs`` ``[R, B]``.

        Returns:
            the sum of all losses of all replicas, a scalar, and their ``metrics``, detached,
            ``[len(metrics), R]``.
        """
        action = batch["action"]
        state = self._state_input(batch["observation"])
        next_state = self._state_input(batch["next_observation"])
        qvalue = state if self.discrete else self._action_input(batch["observation"], action)
        networks = self.num_qvalue_nets
        outputs, log_std = self._forward(online, [state, state] + [qvalue] * networks, self.dropout)
        frozen_outputs, _ = self._forward(frozen, [next_state] + [qvalue] * networks)

        log_prob = self._log_likelihood(outputs[:, 0, :, : self.policy_size], log_std[:, 0], action)
        v = outputs[:, 1, :, 0]
        expectile, temperature, discount = coefficients.to(v.dtype).unsqueeze(-1)
        q = self._at_action(outputs[:, 2:], action)
        target_q = self._at_action(frozen_outputs[:, 1:], action)
        if "steps_to_next_obs" in batch:
            discount = discount ** batch["steps_to_next_obs"]
        td_target = iql.td_target(
            batch["reward"], frozen_outputs[:, 0, :, 0], batch["terminated"], discount
        )

        advantage = (iql.min_q(target_q) - v).detach()
        weight = iql.advantage_weight(advantage, temperature, self.weight_clip)
        loss_actor = iql.actor_loss(log_prob, weight).mean(-1)
        loss_qvalue = iql.qvalue_loss(q, td_target, self.loss_function).mean(-1)
        loss_value = iql.value_loss(target_q, v, expectile).mean(-1)
        total = (loss_actor + loss_qvalue + loss_value).sum()
        metrics = [
            loss_actor,
            loss_qvalue,
            loss_value,
            advantage.mean(-1),
            v.mean(-1),
            q.mean((0, -1)),
            (weight >= self.weight_clip).to(v.dtype).mean(-1),
        ]
        if self.distribution is not None:
            metrics.append(-log_prob.mean(-1))
        return total, torch.stack(metrics).detach()

    def _forward(
        self, stack: Stack, inputs: list[Tensor], dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The outputs of every network, ``[R, K, B, out]``, and the log deviations, ``[R, K, A]``."""
        *weights, vectors = stack
        *biases, log_std = vectors.split(self.sizes, dim=-1)
        x = torch.stack(inputs, dim=1)
        lead, x = x.shape[:2], x.flatten(0, 1)
        for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if depth:
                x = x.relu_()
                if dropout:  # of the policies, the first of each replica's networks
                    x = x.unflatten(0, lead)
                    x = torch.cat([F.dropout(x[:, :1], dropout), x[:, 1:]], dim=1).flatten(0, 1)
            x = torch.bmm(x, weight.flatten(0, 1)).add_(bias.flatten(0, 1).unsqueeze(-2))
        return at_least_float32(x).unflatten(0, lead), log_std

    def _state_input(self, observation: Tensor) -> Tensor:
        return F.pad(self.normalize(observation), (0, self.input_size - observation.shape[-1]))

    def _action_input(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.normalize(observation), self.scale_action(action)], dim=-1)

    def _at_action(self, q: Tensor, action: Tensor) -> Tensor:
        """Q at the actions of the data, ``[N, R, B]``, from the outputs, ``[R, N, B, out]``."""
        q = q.transpose(0, 1)
        if not self.discrete:
            return q[..., 0]
        q = q[..., : self.qvalue_size]
        if self.one_hot:
            return (q * action.to(q.dtype)).sum(-1)
        return q.gather(-1, action.unsqueeze(-1).expand(*q.shape[:-1], 1)).squeeze(-1)

    def _log_likelihood(self, output: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
        """log pi(a | s), or minus the squared error of a deterministic policy, ``[R, B]``."""
        if self.distribution is None:
            return -(self.head(output) - action).square().sum(-1)
        parameters = self.head.moments(output, log_std) if self.action_size else (output,)
        names, kind, settings = self.distribution
        return kind(**dict(zip(names, parameters, strict=True)), **settings).log_prob(action)


class _Networks:
    """The modules that hold the tensors of one loss."""

    def __init__(self, loss: IQLLoss) -> None:
        _require_stackable(loss)
        policy = loss.get_stateful_net("actor_network")
        self.policy, self.head = _torso_and_head(policy)
        self.log_std = self.head.log_std if isinstance(self.head, GaussianParameters) else None
        self.distribution: tuple[list[str], Callable[..., Distribution], dict[str, Any]] | None = (
            None
        )
        if isinstance(policy, ProbabilisticTensorDictSequential):
            last: Any = policy[-1]
            kind, settings = last.distribution_class, dict(last.distribution_kwargs)
            self.distribution = (list(last.dist_keys), kind, settings)
        self.value: Torso = loss.get_stateful_net("value_network").module
        self.qvalue: Torso = loss.get_stateful_net("qvalue_network").module
        target: Any = deepcopy(loss.qvalue_network)
        loss.target_qvalue_network_params.to_module(target, preserve_module_state=False)
        self.target_qvalue: Torso = target.module

    @property
    def torsos(self) -> tuple[Torso, Torso, Torso]:
        return self.policy, self.value, self.qvalue


def _torso_and_head(policy: TensorDictModuleBase) -> tuple[Any, nn.Module]:
    """The layers of a policy, and what turns their outputs into an action or its distribution."""
    first: Any = policy[0] if isinstance(policy, ProbabilisticTensorDictSequential) else policy
    module = getattr(first, "module", None)
    if isinstance(module, GaussianParameters):
        return module.torso, module
    if isinstance(module, nn.Sequential) and len(module) == 2:  # deterministic
        return module[0], module[1]
    return module, nn.Identity()


def _require_stackable(loss: object) -> None:
    if not isinstance(loss, IQLLoss) or type(loss) not in (IQLLoss, DiscreteIQLLoss):
        raise TypeError(
            f"expected an IQLLoss or DiscreteIQLLoss of torchrl_iql, got {type(loss).__qualname__} "
            f"of {type(loss).__module__}"
        )
    for name, torso in (
        ("actor_network", _torso_and_head(loss.actor_network)[0]),
        ("qvalue_network", getattr(loss.qvalue_network, "module", None)),
        ("value_network", getattr(loss.value_network, "module", None)),
    ):
        if not isinstance(torso, Torso):
            raise TypeError(
                f"{name} is not a network of torchrl_iql.models, whose layers can be stacked; "
                "for other networks write the loop around the loss yourself"
            )
    inputs = ["observation"] if isinstance(loss, DiscreteIQLLoss) else ["observation", "action"]
    if loss.qvalue_network.in_keys != inputs or loss.tensor_keys != loss.default_keys():
        raise ValueError("the networks and the loss must read and write the default keys")
    if loss.reduction != "mean" or loss.value_type is not ValueEstimators.TD0:
        raise ValueError("the loss must have reduction='mean' and the value estimator TD0")
    if loss.value_estimator.average_rewards:  # pyright: ignore
        raise ValueError("the value estimator of the loss must not have average_rewards")


def _require_uniform(networks: _Networks) -> None:
    hidden = [[layer.out_features for layer in torso.layers[:-1]] for torso in networks.torsos]
    if hidden[0] != hidden[1] or hidden[0] != hidden[2]:
        raise ValueError(
            "policy, V and Q must have the same hidden_sizes to be trained together, "
            f"got {', '.join(map(str, hidden))}"
        )
    for torso in networks.torsos:
        if str(torso.normalize) != str(networks.value.normalize) or not all(
            bool((one == other).all())
            for one, other in zip(
                torso.normalize.buffers(), networks.value.normalize.buffers(), strict=True
            )
        ):
            raise ValueError("policy, V and Q must have the same observation_statistics")


def _require_alike(first: IQLLoss, its: _Networks, loss: IQLLoss, others: _Networks) -> None:
    for name in ("num_qvalue_nets", "loss_function", "weight_clip"):
        one, other = getattr(first, name), getattr(loss, name)
        if one != other:
            raise ValueError(f"all losses must have the same {name}, got {one!r} and {other!r}")
    pairs = [*zip(its.torsos, others.torsos, strict=True), (its.head, others.head)]
    for module, other in pairs:
        if str(module) != str(other) or not all(
            map(torch.equal, module.buffers(), other.buffers())
        ):
            raise ValueError(
                "all losses must have networks of the same sizes, observation statistics and action "
                f"bounds, got\n{module}\nand\n{other}"
            )


def _become_view(parameter: Tensor, view: Tensor) -> None:
    view.copy_(parameter.detach())
    parameter.data = view
