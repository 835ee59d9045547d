"""IQL on the networks of :mod:`torchrl_iql.models`, stacked so that each layer is one batched product.

These networks differ in their inputs and outputs and in nothing between. Here they are the rows of one
matrix, padded to common widths that processors like: policy, V and the Q networks of every learner go
through a layer together, with those that receive no gradient, V at s' and the target Q networks. What is
computed of their outputs is :func:`torchrl_iql.objectives.functional.losses`, as in the loss itself, and
what its gradients are by the outputs, autograd says; from there they go back through the layers by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.objectives import ValueEstimators
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS, LossModule

from torchrl_iql.models import GaussianParameters, Torso, unlike_made
from torchrl_iql.objectives import functional as iql
from torchrl_iql.objectives.base import at_least_float32, check_categories
from torchrl_iql.objectives.iql import NOT_ONE_HOT, DiscreteIQLLoss, IQLLoss
from torchrl_iql.training.adam import Rates, adam_
from torchrl_iql.training.execution import STEPS_AT_ONCE
from torchrl_iql.training.losses import MEANS, Batch, Losses, Policy
from torchrl_iql.training.native import Layers, Learner, Networks, columns
from torchrl_iql.training.optimization import Optimization
from torchrl_iql.training.program import Moments, Step, compiled_whole, summed, tensors_of

__all__ = ["Parts", "StackedLosses", "StackedProgram", "parts_of", "unlike"]

Stack = tuple[Tensor, ...]
"""K networks of R learners: the weights of each layer, ``[K, R, in, out]``, and in one last tensor
``[K, R, S]`` all biases, one layer after the other, and the policy's log deviations."""

WIDTH = 16
"""Rows and columns of weights are padded to multiples of this: thin products are slow."""

POLICY, VALUE, QVALUES = 0, 1, slice(2, None)
"""The places of the networks that learn in a stack."""

STEP_SIZE, EPSILON = Rates._fields.index("step_size"), Rates._fields.index("epsilon")


class StackedProgram:
    """A step of R learners, whose networks are two stacks.

    From now on the parameters and targets of the given losses are views of the stacks, and their
    coefficients of ``coefficients``: whoever changes one changes the other. Where a loss has parted from
    them, by a cast, a move or assigned parameters, :meth:`adopt` joins them again, with its values.

    Args:
        losses: R losses whose modules :func:`parts_of` returns, and of which :func:`unlike` says None.
        optimizations: one per loss.
        shared: of another program with such losses, to share compiled code.
        native: whether a compiled step is to use the kernels of :mod:`torchrl_iql.training.native` and
            :mod:`torchrl_iql.training.losses`, if these know the policy.

    Attributes:
        losses: the losses.
        state: a stack (policy, V and N Q networks, which learn; V again, which reads s', and N target Q
            networks), the moments of those that learn, and expectile, temperature and discount
            ``[3, R]``, float64.
    """

    def __init__(
        self,
        losses: Sequence[IQLLoss],
        optimizations: Sequence[Optimization],
        shared: StackedLosses | None = None,
        native: bool = False,
    ) -> None:
        self.losses: list[LossModule] = list(losses)
        self.shared = shared or StackedLosses(losses[0], optimizations[0], native)
        self._kernels: dict[tuple[int, int, Policy | None], tuple[Networks, Losses]] = {}
        self.draws = self.shared.dropout > 0
        replicas, number = len(losses), self.shared.num_qvalue_nets
        like = next(losses[0].parameters()).detach()
        stack = self.shared.empty(like, replicas, 3 + 2 * number)
        learning = [tensor[: 2 + number] for tensor in stack]
        self._moments = tuple((torch.zeros_like(x), torch.zeros_like(x)) for x in learning)
        self._coefficients = torch.zeros(3, replicas, dtype=torch.float64, device=like.device)
        self.state = (stack, self._moments, self._coefficients)
        self._view()
        self.adopt()

    def _view(self) -> None:
        """Take the parts of the stacks that learn and that follow, and those of each loss."""
        stack, learning = self.state[0], self.shared.learning
        self._online = tuple(tensor[:learning] for tensor in stack)
        self._frozen = tuple(tensor[learning:] for tensor in stack)
        self._views = [self._views_of(r) for r in range(len(self.losses))]

    def adopt(self) -> None:
        for r, (loss, views) in enumerate(zip(self.losses, self._views, strict=True)):
            # In the order of their names: looking those up would take longer than all the rest.
            tensors = tensors_of(loss)
            for tensor, (name, view) in zip(tensors, views.items(), strict=True):
                if view is None or tensor.data_ptr() == view.data_ptr():
                    continue
                for what in ("shape", "dtype", "device"):
                    if getattr(tensor, what) != getattr(view, what):
                        raise ValueError(
                            f"{name} was {view.dtype} {tuple(view.shape)} on {view.device} and is now "
                            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: build a new "
                            "training step"
                        )
                view.copy_(tensor.detach())
                tensor.data = view
            if loss is self.shared.loss:
                others = zip(tensors, views.items(), strict=True)
                constants = [x for x, (name, view) in others if view is None and "_network" in name]
                self.shared.follow(constants)
            for row, (owner, name) in enumerate(_coefficients(loss)):
                coefficient = self._coefficients[row, r]
                if owner._buffers[name].data_ptr() != coefficient.data_ptr():  # pyright: ignore
                    coefficient.copy_(owner._buffers[name])  # pyright: ignore
                    owner._buffers[name] = coefficient

    def conformed(self, batch: TensorDictBase) -> TensorDictBase:
        return self.shared.conformed(batch)

    def columns(self, source: TensorDictBase) -> dict[str, Tensor]:
        return self.shared.columns(source)

    def addresses(self) -> tuple:
        return self.shared.addresses()  # the stacks stay where they are

    def rehearse(self, columns: Any, indices: Tensor | None) -> None:
        """Do nothing: :meth:`columns` has checked all there is."""

    def update(
        self,
        state: tuple,
        columns: dict[str, Tensor],
        indices: Tensor | None,
        rates: Tensor,
        due: frozenset[str],
    ) -> tuple[Tensor, Tensor | None]:
        return self.shared.update(state, columns, indices, rates, due)

    def kernels(self, batch_size: int, batches: int) -> tuple[Networks, Losses]:
        """Return the only learner's networks and losses for batches of a size, with their memory."""
        key = batch_size, batches, self.shared.policy
        if key not in self._kernels:
            self._kernels = {key: self.shared.kernels(self.state, batch_size, batches)}
        return self._kernels[key]

    def __getstate__(self) -> dict[str, Any]:
        # Kernels know these tensors by their addresses, and a view would be pickled as a tensor of its own.
        views = dict.fromkeys(("_online", "_frozen", "_views"))
        return {**vars(self), "_kernels": {}, **views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._view()

    def moments(self, learner: int) -> Moments:
        first, second = zip(*self._moments, strict=True)
        firsts, seconds = (
            dict(self.shared.slices(_of(stack, learner))) for stack in (first, second)
        )
        return {name: (firsts[name], seconds[name]) for name in firsts}

    def changing(self) -> tuple[list[Tensor], list[Tensor]]:
        moments = (moment for pair in self._moments for moment in pair)
        learned = [tensor.transpose(0, 1) for tensor in (*self._online, *moments)]
        return learned, [tensor.transpose(0, 1) for tensor in self._frozen]

    def clear_padding(self, learner: int) -> None:
        views = [view for view in self._views[learner].values() if view is not None]
        views += [moment for pair in self.moments(learner).values() for moment in pair]
        values = [view.clone() for view in views]
        learned, following = self.changing()
        for stack in (*learned, *following):
            stack[learner].zero_()
        for view, its in zip(views, values, strict=True):
            view.copy_(its)

    def moments_of_format_1(self, saved: Sequence[Sequence[Tensor]]) -> Moments:
        """Return moments by name, from those of stacks padded to the widest network alone."""
        first, second = zip(*saved, strict=True)
        firsts, seconds = (dict(self.shared.slices(stack)) for stack in (first, second))
        return {name: (firsts[name], seconds[name]) for name in firsts}

    def _views_of(self, replica: int) -> dict[str, Tensor | None]:
        """Return the part of the stacks that holds each tensor of a loss, if one does, by name."""
        views = dict(self.shared.slices(_of(self._online, replica)))
        views |= self.shared.slices(_of(self._frozen, replica), frozen=True)
        return {name: views.get(name) for name in _names(self.losses[replica])}


class StackedLosses:
    """The losses of R learners as a pure function of their stacked networks.

    Args:
        loss: one of them; the others are alike.
        optimization: its.
        native: as in :class:`StackedProgram`.

    Attributes:
        loss: that one.
        learning: how many networks of a stack learn: policy, V and the Q networks.
        policy: what the kernels compute with; None without them.
    """

    def __init__(self, loss: IQLLoss, optimization: Optimization, native: bool = False) -> None:
        networks = Parts(loss)
        self.loss = loss
        self.num_qvalue_nets = loss.num_qvalue_nets
        self.learning = 2 + loss.num_qvalue_nets
        self.loss_function: iql.Distance = loss.loss_function
        self.weight_clip = loss.weight_clip
        self.discrete = isinstance(loss, DiscreteIQLLoss)
        self.one_hot = self.discrete and loss.action_space == "one_hot"
        like = networks.value.layers[0].weight
        self.dtype, self.device = like.dtype, like.device
        self.target_rate = optimization.target_rate["qvalue_network"]
        names = optimization.networks
        self.rows = [names.index(f"{name}_network") for name in ("actor", "value")]
        self.rows += [names.index("qvalue_network")] * self.num_qvalue_nets
        self.policy_size, _, self.qvalue_size = (t.layers[-1].out_features for t in networks.torsos)
        self.state_size = networks.value.layers[0].in_features
        hidden = [layer.out_features for layer in networks.value.layers[:-1]]
        widths = [networks.qvalue.layers[0].in_features, *hidden]
        widths.append(max(self.policy_size, self.qvalue_size))
        self._native = native
        self._where: list[int] | None = None
        self._read_constants(networks)
        unit = WIDTH if self.policy is None else max(WIDTH, columns(self.dtype))
        self.widths = [-(-width // unit) * unit for width in widths]
        self.action_size = 0 if networks.log_std is None else len(networks.log_std)
        self.dropout = networks.policy.dropout if networks.policy.training else 0.0
        self._learning, self._following = _places(loss, networks)

    def follow(self, constants: Sequence[Tensor]) -> None:
        """Read the constants of the loss anew if they are elsewhere than at the last call.

        Args:
            constants: statistics of observations and bounds of actions, which no learner learns.
        """
        where = [tensor.data_ptr() for tensor in constants]
        if self._where not in (None, where):
            self._read_constants(Parts(self.loss))
        self._where = where

    def _read_constants(self, its: Parts) -> None:
        self.normalize = its.value.normalize
        self.scale_action = copy(its.qvalue.scale_action)
        self.scale_action._buffers = {  # every Q network has the same
            name: buffer.reshape(-1, self.policy_size)[0]
            for name, buffer in its.qvalue.scale_action.named_buffers()
        }
        self.head: Any = its.head
        self.distribution = its.distribution
        self.policy = None
        if self._native:
            policy = Policy.of(its.head, its.distribution, self.policy_size)
            self.policy = policy if policy and policy.choices == self.discrete else None

    def addresses(self) -> tuple:
        """Return where the constants are."""
        modules = self.normalize, self.head, self.scale_action
        return tuple(buffer.data_ptr() for module in modules for buffer in module.buffers())

    def empty(self, like: Tensor, replicas: int, networks: int) -> Stack:
        shapes = [*pairwise(self.widths), (sum(self.widths[1:]) + self.action_size,)]
        return tuple(like.new_zeros(networks, replicas, *shape) for shape in shapes)

    def slices(
        self, stack: Sequence[Tensor], *, frozen: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the parts of a learner's stack that are tensors of its loss, by their names there.

        Args:
            stack: its networks, ``[K, in, out]`` and so on, in any padding.
            frozen: the stack is that of the targets, whose first network, V, is left out.
        """
        *weights, vectors = stack
        sizes = [weight.shape[-1] for weight in weights]
        *biases, log_std = vectors.split([*sizes, vectors.shape[-1] - sum(sizes)], dim=-1)
        for rows, layers, of_log_std in self._following if frozen else self._learning:
            for its, weight, bias in zip(layers, weights, biases, strict=True):
                of_weight, of_bias, (out, into) = its
                yield of_weight, weight[rows].mT[..., :out, :into]
                yield of_bias, bias[rows, ..., :out]
            if of_log_std is not None:
                yield of_log_std, log_std[rows]

    def conformed(self, batch: TensorDictBase) -> TensorDictBase:
        """Return a batch in the one form that :meth:`columns` reads, of those that the loss reads.

        Args:
            batch: ``[*B]``, of any dtypes; it may tell of a termination by ``"done"``, of categories in
                ``[*B, 1]``, and of one-hot actions by flags or numbers.
        """
        flat = batch if batch.ndim == 1 else batch.reshape(-1)
        changed: dict[NestedKey, Tensor] = {}
        kept = self.dtype, torch.uint8, torch.bool  # bytes are images, and flags no numbers
        for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
            column = flat.get(key, default=None)
            if column is None or (key == "action" and self.discrete):
                continue
            if column.dtype not in kept:
                changed[key] = column.to(self.dtype)
        action, done = flat.get("action", default=None), flat.get(("next", "done"), default=None)
        if self.discrete and action is not None:
            changed["action"] = self._choices(action)
        if ("next", "terminated") not in flat.keys(True) and done is not None:
            changed["next", "terminated"] = done
        return flat.copy().update(changed) if changed else flat

    def _choices(self, action: Tensor) -> Tensor:
        """Return discrete actions as int64 where the loss reads them as such."""
        if self.one_hot:
            return (action > 0.5).long() if action.is_floating_point() else action.long()
        if action.is_floating_point() or action.dtype is torch.bool:
            return action  # no categories
        if action.device.type == "cpu":
            check_categories("action", action, self.policy_size)
        return (action.squeeze(-1) if action.shape[1:] == (1,) else action).long()

    def columns(self, source: TensorDictBase) -> dict[str, Tensor]:
        """Return what the losses read of transitions ``[n]``, numbers and flags without a last 1.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit.
        """
        n, dtype = len(source), self.dtype
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
            allowed = (kind, torch.uint8) if name.endswith("observation") else (kind,)
            if column.shape != shape or column.dtype not in allowed:
                found = f"{tuple(column.shape)} of {column.dtype}"
                remedy = NOT_ONE_HOT if key == "action" and self.one_hot else ""
                raise ValueError(f"{key!r} is {found}, expected {shape} of {kind}{remedy}")
            columns[name] = column
        for key in ("steps_to_next_obs", "priority_weight", *AUTO_LOSS_MASK_KEYS):
            column = source.get(key, default=None)
            if column is None:
                continue
            if column.numel() != n:
                raise ValueError(
                    f"{key!r} is {tuple(column.shape)}, expected one value per transition"
                )
            column = column.reshape(n)
            if key in AUTO_LOSS_MASK_KEYS:
                columns["mask"] = column & columns["mask"] if "mask" in columns else column
            else:
                columns[key] = column
        for name in ("reward", "terminated"):
            columns[name] = columns[name].squeeze(-1)
        return columns

    # --- A step --------------------------------------------------------------------------------------

    def update(
        self,
        state: tuple,
        columns: Mapping[str, Tensor],
        indices: Tensor | None,
        rates: Tensor,
        due: frozenset[str],
    ) -> tuple[Tensor, Tensor | None]:
        stack, moments, coefficients = state
        self.read_value(stack)
        if indices is not None:
            indices = indices.view(1, stack[0].shape[1], -1)
        (batch,) = self.minibatches(stack, columns, indices)
        gradients, metrics, td_error = self.gradients(stack, coefficients, batch)
        self.descend(stack, moments, gradients, rates)
        return metrics, td_error if indices is None else None

    def read_value(self, stack: Stack) -> None:
        """Give the V that reads s' what the one that learns holds."""
        for tensor in stack:
            tensor[self.learning].copy_(tensor[VALUE])

    @staticmethod
    def minibatches(
        stack: Stack, columns: Mapping[str, Tensor], indices: Tensor | None
    ) -> list[dict[str, Tensor]]:
        """Gather minibatches, ``[R, B, ...]``, of rows ``[S, R, B]``, or one of all rows."""
        if indices is None:
            replicas = stack[0].shape[1]
            return [{key: column.unflatten(0, (replicas, -1)) for key, column in columns.items()}]
        gathered = _gathered(columns, indices)
        return [{key: column[s] for key, column in gathered.items()} for s in range(len(indices))]

    def descend(
        self,
        stack: Stack,
        moments: Sequence[tuple[Tensor, Tensor]],
        gradients: Stack,
        rates: Tensor,
    ) -> None:
        """Take a step of Adam with the networks that learn, and move the targets."""
        rates = rates.to(stack[0].dtype).view(stack[0].shape[1], -1, rates.shape[-1])[:, self.rows]
        its = Rates(*rates.transpose(0, 1).unbind(-1)[: len(Rates._fields)])
        for tensor, gradient, (first, second) in zip(stack, gradients, moments, strict=True):
            parameters = tensor[: self.learning]
            step_size, epsilon = (_like(x, gradient) for x in (its.step_size, its.epsilon))
            adam_(parameters, gradient, first, second, step_size, epsilon)
            tensor[self.learning + 1 :].lerp_(parameters[QVALUES], self.target_rate)

    def results(self, of_step: tuple[Tensor, Tensor | None]) -> TensorDictBase:
        metrics, td_error = of_step
        results = dict(zip(self.metrics, metrics, strict=True))
        if td_error is not None:
            results["priority"] = td_error.flatten()
        return TensorDict(results)

    def sums(self, of_steps: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, None]:
        return summed([each for each, _ in of_steps]), None

    @property
    def metrics(self) -> list[str]:
        """What is measured, in the names of the output of :class:`~torchrl_iql.IQLLoss`."""
        return [name for name in MEANS if name != "entropy" or self.distribution is not None]

    def gradients(
        self, stack: Stack, coefficients: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Stack, Tensor, Tensor]:
        """Compute the three losses of every learner and their gradients, a pure function.

        Args:
            stack: all networks.
            coefficients: ``[3, R]``.
            batch: ``observation`` and ``next_observation`` ``[R, B, D]``, ``action`` ``[R, B, A]`` (or
                ``[R, B]``), ``reward`` ``[R, B]``, ``terminated`` bool ``[R, B]``; and where there are
                such, ``steps_to_next_obs``, ``priority_weight`` and ``mask`` ``[R, B]``.

        Returns:
            of the sum of all losses of all learners by the networks that learn; the ``metrics``,
            ``[len(metrics), R]``, and the squared TD errors ``[R, B]``.
        """
        activations, outputs = self._forward(stack, batch)
        log_std = stack[-1][POLICY, :, sum(self.widths[1:]) :]
        learned = outputs[: self.learning], log_std
        frozen = outputs[self.learning :]
        found, beside = _gradients(self._losses, learned, frozen, coefficients, batch)
        return self._backward(stack, activations, *found), *beside

    def _losses(
        self,
        learned: tuple[Tensor, Tensor],
        frozen: Tensor,
        coefficients: Tensor,
        batch: Mapping[str, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute the losses from the outputs of the networks, ``[K, R, B, out]``.

        Args:
            learned: of the networks that learn, and the policies' log deviations ``[R, A]``.
            frozen: of the others.
            coefficients: as in :meth:`gradients`.
            batch: likewise.

        Returns:
            the sum of all losses of all learners, a scalar; and, detached, metrics and TD errors.
        """
        outputs, log_std = learned
        action, v = batch["action"], outputs[VALUE, ..., 0]
        expectile, temperature, discount = coefficients.to(v.dtype).unsqueeze(-1)
        if "steps_to_next_obs" in batch:
            discount = discount ** batch["steps_to_next_obs"]
        next_v = frozen[0, ..., 0]
        values = iql.losses(
            iql.Outputs(
                self._log_likelihood(outputs[POLICY], log_std, action),
                self._at_action(frozen[1:], action),
                self._at_action(outputs[QVALUES], action),
                v,
                iql.td_target(batch["reward"], next_v, batch["terminated"], discount),
            ),
            expectile=expectile,
            temperature=temperature,
            weight_clip=self.weight_clip,
            distance=self.loss_function,
        )
        means = {
            name: _mean(values[name], batch, weighted=name.startswith("loss_"))
            for name in self.metrics
        }
        total = (means["loss_actor"] + means["loss_qvalue"] + means["loss_value"]).sum()
        return total, (torch.stack(list(means.values())).detach(), values["td_error"].detach())

    def _forward(self, stack: Stack, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Compute what each layer reads, ``[K * R, B, in]``, and the outputs, ``[K, R, B, out]``."""
        *weights, vectors = stack
        biases = vectors[..., : sum(self.widths[1:])].split(self.widths[1:], dim=-1)
        state, next_state, qvalue = (
            F.pad(x, (0, self.widths[0] - x.shape[-1])) for x in self._inputs(batch)
        )
        q = [qvalue] * self.num_qvalue_nets
        x = torch.stack([state, state, *q, next_state, *q])
        lead, x = x.shape[:2], x.flatten(0, 1)
        activations = []
        for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if depth:
                x = x.relu_()
                if self.dropout:
                    policies = lead[1]
                    x = torch.cat([F.dropout(x[:policies], self.dropout), x[policies:]])
            activations.append(x)
            x = torch.bmm(x, weight.flatten(0, 1)).add_(bias.flatten(0, 1).unsqueeze(-2))
        return activations, at_least_float32(x).unflatten(0, lead)

    def _backward(
        self, stack: Stack, activations: Sequence[Tensor], outputs: Tensor, log_std: Tensor
    ) -> Stack:
        """Compute gradients by all that learns from those by the outputs and the log deviations."""
        replicas = stack[0].shape[1]
        rows = self.learning * replicas
        gradient = outputs.to(self.dtype).flatten(0, 1)
        weights, biases = [], []
        for depth, x in reversed(list(enumerate(activations))):
            weights.append(torch.bmm(x[:rows].mT, gradient))
            biases.append(gradient.sum(-2))
            if depth:
                gradient = torch.bmm(gradient, stack[depth][: self.learning].flatten(0, 1).mT)
                # Where a ReLU or the dropout let nothing through, the activation is 0.
                gradient = gradient.masked_fill(x[:rows] <= 0, 0)
                if self.dropout:
                    policies = gradient[:replicas] / (1 - self.dropout)
                    gradient = torch.cat([policies, gradient[replicas:]])
        vectors = torch.cat(biases[::-1], dim=-1)
        if self.action_size:
            others = log_std.new_zeros(rows - replicas, self.action_size)
            vectors = torch.cat([vectors, torch.cat([log_std, others]).to(vectors.dtype)], dim=-1)
        lead = self.learning, replicas
        its = *weights[::-1], vectors
        return tuple(tensor.to(self.dtype).unflatten(0, lead) for tensor in its)  # if autocast

    # --- Compiled steps ------------------------------------------------------------------------------

    def compiled(self, due: frozenset[str], compiler: Callable[[Callable], Callable]) -> Step:
        if self.policy is not None:
            return self._by_kernels()
        if self.device.type == "cuda":
            return self._on_a_gpu(compiler)
        return compiled_whole(self.update, due, compiler)

    def _on_a_gpu(self, compiler: Callable[[Callable], Callable]) -> Step:
        """Make a step of few kernels: on small networks each of them takes longer than what it computes."""
        from torchrl_iql.training.fused import descend_  # Triton is not everywhere

        graph = compiler(self.gradients)
        policy, value, qvalue, *_ = self.rows

        def prepare(
            program: StackedProgram, columns: dict[str, Tensor], indices: Tensor | None
        ) -> list[tuple[dict[str, Tensor], bool]]:
            """Gather minibatches, each with whether it is all rows."""
            stack = program.state[0]
            self.read_value(stack)
            is_all = indices is None
            if indices is not None:
                indices = indices.view(len(indices), stack[0].shape[1], -1)
            return [(batch, is_all) for batch in self.minibatches(stack, columns, indices)]

        def take(
            program: StackedProgram,
            columns: dict[str, Tensor],
            prepared: tuple[dict[str, Tensor], bool],
            rates: Tensor,
        ) -> tuple[Tensor, Tensor | None]:
            stack, moments, coefficients = program.state
            batch, is_all = prepared
            gradients, metrics, td_error = graph(stack, coefficients, batch)
            rates = rates.view(stack[0].shape[1], -1, rates.shape[-1])
            for tensor, gradient, pair in zip(stack, gradients, moments, strict=True):
                its = gradient.contiguous(), *pair
                descend_(tensor, *its, rates, (policy, value, qvalue), self.target_rate)
            return metrics, td_error if is_all else None

        return Step(take, prepare)  # pyright: ignore

    def _by_kernels(self) -> Step:
        """Make a step of :mod:`torchrl_iql.training.native` and :mod:`torchrl_iql.training.losses`."""

        def prepare(
            program: StackedProgram, columns: dict[str, Tensor], indices: Tensor | None
        ) -> list[tuple[int, Batch]]:
            """Gather minibatches of some steps: for each its place, and what the losses read."""
            steps = 1 if indices is None else len(indices)
            if indices is not None:
                indices = indices.flatten(1)
            size = len(columns["reward"]) if indices is None else indices.shape[1]
            networks, losses = program.kernels(size, 1 if indices is None else STEPS_AT_ONCE)
            batches = self._read(columns, indices, networks.inputs[:steps])
            return list(enumerate(losses.read(batches)))

        def take(
            program: StackedProgram,
            columns: dict[str, Tensor],
            prepared: tuple[int, Batch],
            rates: Tensor,
        ) -> tuple[Tensor, Tensor | None]:
            ((networks, losses),) = program._kernels.values()
            place, batch = prepared
            table = rates.tolist()
            sizes = [table[row][STEP_SIZE] for row in self.rows]
            epsilon = table[0][EPSILON]
            networks.forward(place)
            losses.descend(batch, sizes[POLICY], epsilon)
            networks.backward(sizes, epsilon, self.target_rate)
            metrics = batch.means[: len(self.metrics)]
            return metrics, batch.td_errors if len(networks.inputs) == 1 else None

        return Step(take, prepare)  # pyright: ignore

    def kernels(self, state: tuple, batch_size: int, batches: int) -> tuple[Networks, Losses]:
        """Build the networks and the losses of the only learner of a state."""
        stack, moments, coefficients = state
        first, second = zip(*moments, strict=True)
        targets = self.learning + 1

        def layers(stack: Stack, place: int) -> Layers:
            *weights, vectors = (tensor[place, 0] for tensor in stack)
            biases = vectors.split([*self.widths[1:], self.action_size])[:-1]
            return Layers(weights, biases)

        number = self.num_qvalue_nets
        learning = [
            Learner(
                *(layers(its, place) for its in (stack, first, second)),
                target=layers(stack, targets + place - 2) if place > VALUE else None,
            )
            for place in range(self.learning)
        ]
        # V at s' has the parameters of V, and an input of its own.
        others = [layers(stack, VALUE), *(layers(stack, targets + n) for n in range(number))]
        state_action = 0 if self.discrete else 2
        reads = [0, 0, *[state_action] * number, 1, *[state_action] * number]
        networks = Networks(learning, others, reads, batch_size, batches)
        assert self.policy is not None
        losses = Losses(
            self.policy,
            networks,
            [its[-1][POLICY, 0, sum(self.widths[1:]) :] for its in (stack, first, second)],
            coefficients,
            weight_clip=self.weight_clip,
            distance=self.loss_function,
        )
        return networks, losses

    def _read(
        self, columns: Mapping[str, Tensor], indices: Tensor | None, inputs: Tensor
    ) -> dict[str, Tensor]:
        """Gather minibatches, ``[S, B, ...]``, and what networks read of them, ``[S, N, B, in]``.

        Not compiled: PyTorch gathers whole rows, in a fifth of the time of the code that inductor makes.
        """
        if indices is None:
            batch = {key: column.unsqueeze(0) for key, column in columns.items()}
        else:
            batch = _gathered(columns, indices)
        for place, its in zip(inputs.unbind(1), self._inputs(batch), strict=False):
            place[..., : its.shape[-1]] = its  # the padding is 0 and stays so
        return {key: column for key, column in batch.items() if not key.endswith("observation")}

    def _inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what V and the policy read at s and at s', and what the Q networks read."""
        # Images are kept in bytes until here.
        state = self.normalize(batch["observation"].to(self.dtype))
        next_state = self.normalize(batch["next_observation"].to(self.dtype))
        if self.discrete:
            return state, next_state, state
        return state, next_state, torch.cat([state, self.scale_action(batch["action"])], dim=-1)

    def _at_action(self, q: Tensor, action: Tensor) -> Tensor:
        """Select Q at the data's actions, ``[N, R, B]``, from the outputs, ``[N, R, B, out]``."""
        if not self.discrete:
            return q[..., 0]
        q = q[..., : self.qvalue_size]
        if self.one_hot:
            return (q * action.to(q.dtype)).sum(-1)
        return q.gather(-1, action.unsqueeze(-1).expand(*q.shape[:-1], 1)).squeeze(-1)

    def _log_likelihood(self, output: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s), of a deterministic policy minus the squared error, ``[R, B]``."""
        output = output[..., : self.policy_size]
        if self.distribution is None:
            return -(self.head(output) - action).square().sum(-1)
        parameters = self.head.moments(output, log_std) if self.action_size else (output,)
        names, kind, settings = self.distribution
        return kind(**dict(zip(names, parameters, strict=True)), **settings).log_prob(action)


def _gradients(
    losses: Callable[..., tuple[Tensor, Any]], learned: tuple[Tensor, ...], *others: Any
) -> tuple[tuple[Tensor, ...], Any]:
    """Return the gradients of the losses by ``learned``, and what they return beside the sum."""
    if torch.compiler.is_compiling():
        return torch.func.grad(losses, has_aux=True)(learned, *others)
    # The same, without the layers of torch.func around every operation.
    leaves = tuple(tensor.detach().requires_grad_() for tensor in learned)
    with torch.enable_grad():
        loss, beside = losses(leaves, *others)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)  # not all policies have a log_std
    zeros = map(torch.zeros_like, leaves)
    return tuple(x if x is not None else zero for x, zero in zip(found, zeros, strict=True)), beside


def _mean(values: Tensor, batch: Mapping[str, Tensor], *, weighted: bool) -> Tensor:
    """Average over transitions, ``[R, B] -> [R]``, as TorchRL by masks and importance weights."""
    mask, weight = batch.get("mask"), batch.get("priority_weight") if weighted else None
    if mask is None and weight is None:
        return values.mean(-1)
    if mask is not None:  # what is masked may be NaN
        values = torch.where(mask, values, torch.zeros_like(values))
        if weight is None:
            return values.sum(-1) / mask.sum(-1).clamp_min(1)
        weight = weight * mask
    assert weight is not None
    return (values * weight).sum(-1) / weight.sum(-1)


def _gathered(columns: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Gather rows of each column, in the shape of their indices."""
    rows = indices.flatten()
    return {
        key: column.index_select(0, rows).unflatten(0, indices.shape)
        for key, column in columns.items()
    }


def _of(stack: Sequence[Tensor], replica: int) -> Stack:
    return tuple(tensor[:, replica] for tensor in stack)


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Shape numbers for the leading dimensions of a tensor, broadcast over the others."""
    return numbers.reshape(*numbers.shape, *(1,) * (tensor.ndim - numbers.ndim))


def _names(loss: nn.Module) -> list[str]:
    return [name for name, _ in (*loss.named_parameters(), *loss.named_buffers())]


def _coefficients(loss: LossModule) -> list[tuple[nn.Module, str]]:
    return [(loss, "expectile"), (loss, "temperature"), (loss.value_estimator, "gamma")]


class Parts:
    """The modules that hold the tensors of one loss."""

    def __init__(self, loss: IQLLoss) -> None:
        policy: Any = _with(loss.actor_network, loss.actor_network_params)
        self.policy, self.head = _torso_and_head(policy)
        self.log_std = self.head.log_std if isinstance(self.head, GaussianParameters) else None
        self.distribution: tuple[list[str], Callable[..., Distribution], dict[str, Any]] | None = (
            None
        )
        if isinstance(policy, ProbabilisticTensorDictSequential):
            last: Any = policy[-1]
            kind, settings = last.distribution_class, dict(last.distribution_kwargs)
            self.distribution = (list(last.dist_keys), kind, settings)
        self.value: Torso = _with(loss.value_network, loss.value_network_params).module
        self.qvalue: Torso = _with(loss.qvalue_network, loss.qvalue_network_params).module
        self.loss = loss

    @property
    def target_qvalue(self) -> Torso:
        return _with(self.loss.qvalue_network, self.loss.target_qvalue_network_params).module

    @property
    def torsos(self) -> tuple[Torso, Torso, Torso]:
        return self.policy, self.value, self.qvalue


def _with(network: nn.Module, params: Any) -> Any:
    """Return a network with its tensors, as ``get_stateful_net``; its deep copy takes ten times as long."""
    its = _shell(network)
    params.to_module(its, preserve_module_state=False)
    return its


def _shell(module: nn.Module) -> nn.Module:
    """Copy modules, but nothing that they hold."""
    its = copy(module)
    its._parameters, its._buffers = dict(module._parameters), dict(module._buffers)
    its._modules = {name: child and _shell(child) for name, child in module._modules.items()}
    return its


_Place = tuple[int | slice, list[tuple[str, str, torch.Size]], str | None]
"""The rows of a stack, of each layer the names of weight and bias and the size, and the name of log_std."""


def _places(loss: IQLLoss, its: Parts) -> tuple[list[_Place], list[_Place]]:
    """Return what the stack that learns holds of a loss, and what the one that follows holds."""
    names = dict(zip(map(id, tensors_of(loss)), _names(loss), strict=True))

    def place(rows: int | slice, torso: Torso, log_std: Tensor | None = None) -> _Place:
        layers = [
            (names[id(x.weight)], names[id(x.bias)], x.weight.shape[-2:]) for x in torso.layers
        ]
        return rows, layers, None if log_std is None else names[id(log_std)]

    several = loss.num_qvalue_nets > 1
    learning = [place(POLICY, its.policy, its.log_std), place(VALUE, its.value)]
    learning.append(place(QVALUES if several else 2, its.qvalue))
    return learning, [place(slice(1, None) if several else 1, its.target_qvalue)]


def _torso_and_head(policy: TensorDictModuleBase) -> tuple[Any, nn.Module]:
    """Return a policy's layers, and what turns their outputs into an action or its distribution."""
    first: Any = policy[0] if isinstance(policy, ProbabilisticTensorDictSequential) else policy
    module = getattr(first, "module", None)
    if isinstance(module, GaussianParameters):
        return module.torso, module
    if isinstance(module, nn.Sequential) and len(module) == 2:  # deterministic
        return module[0], module[1]
    return module, nn.Identity()


def parts_of(loss: LossModule, optimization: Optimization) -> Parts | str:
    """Return the modules of a loss whose networks have a stack, or say why they have none."""
    if type(loss) not in (IQLLoss, DiscreteIQLLoss):
        return f"{type(loss).__name__} of {type(loss).__module__} is not this project's IQL"
    assert isinstance(loss, IQLLoss)
    for name, torso in (
        ("actor_network", _torso_and_head(loss.actor_network)[0]),
        ("qvalue_network", getattr(loss.qvalue_network, "module", None)),
        ("value_network", getattr(loss.value_network, "module", None)),
    ):
        if not isinstance(torso, Torso):
            return f"{name} is not a network of torchrl_iql.models, whose layers can be stacked"
        if other := unlike_made(getattr(loss, name)):
            return f"{name} {other}, unlike the networks of torchrl_iql.models"
    state = ["observation"]
    inputs = [
        (loss.actor_network, state),
        (loss.value_network, state),
        (loss.qvalue_network, state if isinstance(loss, DiscreteIQLLoss) else [*state, "action"]),
    ]
    if loss.tensor_keys != loss.default_keys() or any(its.in_keys != keys for its, keys in inputs):
        return "the networks and the loss do not read and write the default keys"
    if loss._ties:
        return "networks share parameters"
    if not all(parameter.requires_grad for parameter in loss.parameters()):
        return "some parameters are frozen"
    if loss.reduction != "mean" or loss.value_type is not ValueEstimators.TD0:
        return "the loss does not have reduction='mean' and the value estimator TD0"
    if loss.value_estimator.average_rewards:  # pyright: ignore
        return "the value estimator has average_rewards"
    if loss.loss_mask_key != "auto" or loss.use_prioritized_weights not in (True, "auto"):
        return "the loss has its own rules for masks or importance weights"
    plain = (
        set(optimization.networks) == {"actor_network", "value_network", "qvalue_network"}
        and set(optimization.entries) == {"loss_actor", "loss_qvalue", "loss_value"}
        and not any(optimization.weight_decay.values())
        and optimization.max_grad_norm is None
        and set(optimization.every.values()) == {1}
        and optimization.target_every == 1
        and set(optimization.target_rate) == {"qvalue_network"}
    )
    if not plain:
        return "not all networks are descended by Adam alone at every step"
    its = Parts(loss)
    hidden = [[layer.out_features for layer in torso.layers[:-1]] for torso in its.torsos]
    if hidden[0] != hidden[1] or hidden[0] != hidden[2]:
        return f"policy, V and Q have different hidden_sizes, {', '.join(map(str, hidden))}"
    if any(torso.dropout for torso in (its.value, its.qvalue)):
        return "V or Q has dropout"
    for torso in its.torsos:
        if not _same(torso.normalize, its.value.normalize):
            return "policy, V and Q have different observation_statistics"
    return its


def unlike(parts: Sequence[Parts], optimizations: Sequence[Optimization]) -> str | None:
    """Say why losses, each of which has a stack, have none together, or return None if they do."""
    if any(its.target_rate != optimizations[0].target_rate for its in optimizations):
        return "the targets follow at different rates"
    first, *others = parts
    return next(filter(None, (_unlike(first, each) for each in others)), None)


def _unlike(its: Parts, others: Parts) -> str | None:
    """Say why a loss does not fit into the stack of the first one."""
    first, loss = its.loss, others.loss
    for name in ("num_qvalue_nets", "loss_function", "weight_clip"):
        one, other = getattr(first, name), getattr(loss, name)
        if one != other:
            return f"the losses have different {name}, {one!r} and {other!r}"
    if type(first) is not type(loss) or getattr(first, "action_space", None) != getattr(
        loss, "action_space", None
    ):
        return "the losses read different actions"
    for module, other in [*zip(its.torsos, others.torsos, strict=True), (its.head, others.head)]:
        if not _same(module, other):
            return "the networks of the losses have different sizes, statistics or action bounds"
    if str(its.distribution) != str(others.distribution) or _names(first) != _names(loss):
        return "the policies of the losses are different"
    one, other = next(first.parameters()), next(loss.parameters())
    if (one.dtype, one.device) != (other.dtype, other.device):
        return f"the losses are {one.dtype} on {one.device} and {other.dtype} on {other.device}"
    return None


def _same(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules differ in nothing but the values of their parameters."""
    buffers, others = list(module.buffers()), list(other.buffers())
    return (
        str(module) == str(other)
        and len(buffers) == len(others)
        and all(
            a.shape[-1] == b.shape[-1] and bool((a == b).all())
            for a, b in zip(buffers, others, strict=True)
        )
    )
