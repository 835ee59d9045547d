"""One gradient step of all networks, of one learner or of many at once.

How a step is executed, step by step, compiled, or captured in a CUDA graph, is decided here and only
here; what it computes is in :mod:`torchrl_iql.objectives.stacked`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from torchrl_iql.data.minibatches import BLOCK, Minibatches
from torchrl_iql.objectives.iql import IQLLoss
from torchrl_iql.objectives.stacked import Stack, StackedLosses

__all__ = ["Execution", "TrainStep", "adam_", "resolve_execution"]

Execution = Literal["auto", "eager", "compiled", "cudagraph"]
BETAS = (0.9, 0.999)
EPSILON = 1e-8
STEPS_PER_GRAPH = 10
"""Gradient steps in one CUDA graph: enough that the time between two graphs does not count."""


def adam_(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
) -> None:
    """Adam (Kingma, Ba, 2015) on one tensor, as :class:`torch.optim.Adam`, with a step size per row.

    Args:
        parameters: any shape, changed in place.
        gradients: of the same shape.
        first_moment: of the same shape, changed in place.
        second_moment: of the same shape, changed in place.
        step_size: learning rate * c / (1 - beta_1^t), with c the square root of 1 - beta_2^t,
            broadcast over ``parameters``.
        epsilon: 1e-8 * c, broadcast over ``parameters``.
    """
    first_moment.lerp_(gradients, 1 - BETAS[0])
    second_moment.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
    parameters.sub_(step_size * first_moment / second_moment.sqrt().add_(epsilon))


class TrainStep:
    r"""Losses, gradients, Adam, learning-rate schedule and target networks, as one callable.

    All losses are taken from the same parameters and descended in one Adam step; the target networks
    follow by :math:`\hat\theta \leftarrow (1 - \alpha) \hat\theta + \alpha \theta`. Nothing waits for
    the device: the returned metrics stay there until somebody reads them.

    Given R losses, it trains R independent learners: on a GPU as one batched computation, on a CPU one
    after the other for up to 100 steps each, which suits its caches. Each has its own parameters,
    minibatches and optimiser state, and may have its own expectile, temperature, discount and learning
    rate. ``losses[r]`` remains an ordinary loss, whose networks are those in training.

    Args:
        losses: an :class:`~torchrl_iql.IQLLoss` or :class:`~torchrl_iql.DiscreteIQLLoss` with networks
            of :mod:`torchrl_iql.models`, on the device to train on; or several, alike but for the
            values of their parameters and coefficients. ``loss.temperature = 1.0`` and
            ``loss.expectile = 0.8`` take effect at the next step. Moving or casting a loss afterwards
            takes its networks out of the training.
        learning_rate: of Adam, for all networks; or one per loss.
        target_rate: :math:`\alpha` in (0, 1].
        actor_decay_steps: length of the cosine schedule that takes the policy's learning rate to 0, as
            in the paper's offline runs; it stays 0 afterwards. None keeps it constant.
        execution: ``"eager"``; ``"compiled"`` by :func:`torch.compile`, which takes up to a minute at
            the first step; ``"cudagraph"``, compiled and replayed by the GPU without the CPU; or
            ``"auto"``, the fastest of these that the machine can run.

    Attributes:
        losses: the losses.
        learning_rates: one per loss.
        execution: how steps are executed.
        steps: the number of gradient steps taken.

    Raises:
        TypeError, ValueError: an argument is out of range, or the losses can not be trained together.
    """

    def __init__(
        self,
        losses: IQLLoss | Sequence[IQLLoss],
        *,
        learning_rate: float | Sequence[float] = 3e-4,
        target_rate: float = 0.005,
        actor_decay_steps: int | None = None,
        execution: Execution = "eager",
    ) -> None:
        self.losses = [losses] if isinstance(losses, nn.Module) else list(losses)
        replicas = len(self.losses)
        if not replicas:
            raise ValueError("losses must hold at least one loss")
        rates = (
            [learning_rate] * replicas if isinstance(learning_rate, (int, float)) else learning_rate
        )
        if len(rates) != replicas or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(
                f"learning_rate must be in (0, inf), one or {replicas}, got {learning_rate!r}"
            )
        if not 0 < target_rate <= 1:
            raise ValueError(f"target_rate must be in (0, 1], got {target_rate!r}")
        if actor_decay_steps is not None and actor_decay_steps < 1:
            raise ValueError(f"actor_decay_steps must be at least 1, got {actor_decay_steps!r}")
        if execution not in get_args(Execution):
            raise ValueError(f"execution must be one of {get_args(Execution)}, got {execution!r}")

        self.learning_rates = list(rates)
        self.actor_decay_steps = actor_decay_steps
        self.steps = 0
        self._stacked = stacked = StackedLosses(self.losses)
        self.execution = resolve_execution(execution, self.device)
        self._moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in stacked.online]
        self._learning_rate = self._tensor(rates).unsqueeze(-1)
        # V in the frozen stack is V itself.
        self._target_rates = self._tensor([1.0] + [target_rate] * stacked.num_qvalue_nets)
        self._step: Callable[..., Tensor] = self._update
        if self.execution != "eager":
            self._step = torch.compile(_copy(self._update), fullgraph=True, dynamic=False)
        self._graph: _Graph | None = None

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Take one gradient step.

        Args:
            batch: transitions on the device of the networks, ``[B]``, or ``[R, B]`` for R losses.

        Returns:
            the metrics of the losses before the step, scalars, or ``[R]``.

        Raises:
            KeyError, ValueError: an entry of the batch is missing or does not fit.
        """
        replicas = len(self.losses)
        if batch.ndim == 1 and replicas == 1:
            batch = batch.unsqueeze(0)
        if batch.ndim != 2 or len(batch) != replicas:
            shape, expected = tuple(batch.shape), "[B]" if replicas == 1 else f"[{replicas}, B]"
            raise ValueError(f"the batch has shape {shape}, expected {expected}")
        source = batch.reshape(-1)
        indices = torch.arange(len(source), device=self.device)
        metrics = self._advance(source, indices.view(1, *batch.shape), replay=False)
        return self._named(metrics)

    def run(self, minibatches: Minibatches, steps: int) -> TensorDictBase:
        """Take gradient steps on minibatches drawn from a data set, on the device.

        Args:
            minibatches: for as many seeds as there are losses.
            steps: at least 1.

        Returns:
            the metrics of the losses before the last of these steps, scalars, or ``[R]``.
        """
        if len(minibatches.seeds) != len(self.losses):
            raise ValueError(
                f"minibatches are for {len(minibatches.seeds)} learners, but there are "
                f"{len(self.losses)} losses"
            )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        end = self.steps + steps
        while self.steps < end:
            block, done = divmod(self.steps, BLOCK)
            source, indices = minibatches(block)
            remaining = indices[done : done + end - self.steps]
            metrics = self._advance(source, remaining, replay=self.execution == "cudagraph")
        return self._named(metrics)

    # --- A step, and how it is executed --------------------------------------------------------------

    def _update(
        self,
        online: Stack,
        frozen: Stack,
        moments: Sequence[Stack],
        coefficients: Tensor,
        learning_rate: Tensor,
        target_rates: Tensor,
        source: dict[str, Tensor],
        indices: Tensor,
        schedule: Tensor,
    ) -> Tensor:
        """One step of all learners, on tensors alone; the first three are changed in place."""
        batch = {key: column[indices] for key, column in source.items()}
        gradients, metrics = _gradients(self._stacked, online, frozen, coefficients, batch)
        networks = online[0].shape[1]
        step_size, epsilon = learning_rate * schedule[:networks], schedule[networks]
        for parameters, slow, gradient, (first, second) in zip(
            online, frozen, gradients, moments, strict=True
        ):
            adam_(parameters, gradient, first, second, _like(step_size, gradient), epsilon)
            slow.lerp_(parameters[:, 1:], _like(target_rates, slow[0]))
        return metrics

    def _advance(self, source: TensorDictBase, indices: Tensor, *, replay: bool) -> Tensor:
        """As many steps as there are ``indices``, ``[steps, R, B]``; the metrics of the last one."""
        self._stacked.follow_value()  # somebody may have loaded other parameters
        columns = self._stacked.columns(source)
        schedule = self._schedule(self.steps, len(indices))
        self.steps += len(indices)
        if self.device.type == "cpu" and not replay:
            # Learner after learner: one fits into the caches, all of them do not.
            parts = [slice(r, r + 1) for r in range(len(self.losses))]
            return torch.cat(
                [self._one_by_one(self._state(r, columns), indices[:, r], schedule) for r in parts],
                dim=-1,
            )
        state = self._state(slice(None), columns)
        if not replay:
            return self._one_by_one(state, indices, schedule)
        if self._graph is None or not self._graph.reads(state):
            # Before it is recorded, the code must have run: these steps count as any others.
            self._graph = _Graph(self._one_by_one, state, indices, schedule)
            return self._graph.metrics
        return self._graph.advance(indices, schedule)

    def _state(self, replicas: slice, columns: dict[str, Tensor]) -> tuple:
        """What a step of some of the learners reads and changes, views of all."""

        def of(stack: Sequence[Tensor]) -> Stack:
            return tuple(tensor[replicas] for tensor in stack)

        stacked = self._stacked
        return (
            of(stacked.online),
            of(stacked.frozen),
            tuple(of(pair) for pair in self._moments),
            stacked.coefficients[:, replicas],
            self._learning_rate[replicas],
            self._target_rates,
            columns,
        )

    def _one_by_one(self, state: tuple, indices: Tensor, schedule: Tensor) -> Tensor:
        # The first call checks that the compiled code fits these tensors, then it does.
        metrics = self._step(*state, indices[0], schedule[0])
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            for at, rates in zip(indices[1:], schedule[1:], strict=True):
                metrics = self._step(*state, at, rates)
        return metrics

    def _schedule(self, first: int, steps: int) -> Tensor:
        """What changes from step to step, ``[steps, at least K + 1]``.

        The step sizes of the K networks of a learner, as multiples of its learning rate, and Adam's
        epsilon. They come from outside, where the number of the step is known exactly and costs
        nothing.
        """
        step = np.arange(first, first + steps, dtype=np.float64)
        first_correction, second_correction = (1 - beta ** (step + 1) for beta in BETAS)
        root = np.sqrt(second_correction)
        networks = self._stacked.online[0].shape[1]
        # Each row starts at a multiple of 16 bytes, as compiled code wants it.
        columns = np.zeros((steps, networks + 4 - networks % 4))
        columns[:, :networks] = (root / first_correction)[:, None]
        columns[:, 0] *= [self._policy_decay(int(t)) for t in step]
        columns[:, networks] = EPSILON * root
        return self._tensor(columns)

    def _policy_decay(self, step: int) -> float:
        done = 0.0 if self.actor_decay_steps is None else min(step / self.actor_decay_steps, 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _named(self, metrics: Tensor) -> TensorDictBase:
        if len(self.losses) == 1:
            metrics = metrics.squeeze(-1)
        named = zip(self._stacked.metrics, metrics, strict=True)
        return TensorDict(dict(named), batch_size=metrics.shape[1:])

    @property
    def device(self) -> torch.device:
        return self._stacked.coefficients.device

    def _tensor(self, numbers: ArrayLike) -> Tensor:
        """Numbers in the type and on the device of the networks, without waiting for it."""
        like = self._stacked.online[0]
        return torch.as_tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)

    # --- State -----------------------------------------------------------------------------------------

    @property
    def policy_lr(self) -> list[float]:
        """The current learning rate of each policy."""
        return [self._policy_decay(self.steps) * rate for rate in self.learning_rates]

    def state_dict(self, replica: int = 0) -> dict[str, Any]:
        """Networks, targets, optimiser and counter of one learner, copied.

        It is the same whether the learner is trained alone or among others.
        """
        return {
            "loss": {
                key: value.clone() for key, value in self.losses[replica].state_dict().items()
            },
            "moments": [tuple(m[replica].clone() for m in pair) for pair in self._moments],
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any], replica: int = 0) -> None:
        """Continue where :meth:`state_dict` was taken; the others must have taken as many steps."""
        self.losses[replica].load_state_dict(state["loss"])
        for pair, saved in zip(self._moments, state["moments"], strict=True):
            for moment, its in zip(pair, saved, strict=True):
                moment[replica] = its
        self.steps = state["steps"]


class _Graph:
    """``STEPS_PER_GRAPH`` steps, recorded once and replayed with other indices and schedules.

    Args:
        take: takes the steps of given indices and schedules, and returns the metrics of the last.
        state: what ``take`` reads and changes, always the same tensors; its last entry the columns of
            the transitions.
        indices: steps to take before recording, ``[steps, R, B]``.
        schedule: their schedule.

    Attributes:
        metrics: of the last of these steps.
    """

    def __init__(
        self, take: Callable[..., Tensor], state: tuple, indices: Tensor, schedule: Tensor
    ) -> None:
        self.take = take
        self.state = state
        self.indices = torch.zeros_like(indices[:1]).repeat(STEPS_PER_GRAPH, 1, 1)
        self.schedule = torch.zeros_like(schedule[:1]).repeat(STEPS_PER_GRAPH, 1)
        self.metrics, self.replay, self.recorded = _record(
            partial(take, state, indices, schedule),
            partial(take, state, self.indices, self.schedule),
        )

    def reads(self, state: tuple) -> bool:
        """Whether the graph was recorded on transitions at these very addresses."""
        columns, others = self.state[-1], state[-1]
        return columns.keys() == others.keys() and all(
            column.data_ptr() == others[key].data_ptr() and column.shape == others[key].shape
            for key, column in columns.items()
        )

    def advance(self, indices: Tensor, schedule: Tensor) -> Tensor:
        """Takes steps, and returns the metrics of the last one."""
        whole = len(indices) - len(indices) % STEPS_PER_GRAPH
        for first in range(0, whole, STEPS_PER_GRAPH):
            self.indices.copy_(indices[first : first + STEPS_PER_GRAPH])
            self.schedule.copy_(schedule[first : first + STEPS_PER_GRAPH])
            self.replay()
        if whole < len(indices):
            return self.take(self.state, indices[whole:], schedule[whole:])
        return self.recorded.clone()


def _record(
    first: Callable[[], Tensor], again: Callable[[], Tensor]
) -> tuple[Tensor, Callable[[], None], Tensor]:
    """Runs ``first``, in which everything is compiled and set up, and records ``again`` unexecuted.

    Returns:
        the result of ``first``, what replays ``again``, and the tensor with its result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = first()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = again()
    return result, graph.replay, recorded


def resolve_execution(wanted: Execution, device: torch.device) -> Execution:
    """The wanted one, if the machine can run it; for ``"auto"`` the fastest that it can."""
    if wanted == "cudagraph" and device.type != "cuda":
        raise ValueError(f"execution='cudagraph' needs a CUDA device, the losses are on {device}")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "cudagraph"
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, no Python headers, a device without code generation
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"training is not compiled, and slower: {reason}", stacklevel=3)
        return "eager"
    return "compiled"


def _gradients(
    losses: Callable[..., tuple[Tensor, Tensor]], online: Stack, *others: Any
) -> tuple[Stack, Tensor]:
    """The gradients of a loss with respect to ``online``, and what it returns beside the loss."""
    if torch.compiler.is_compiling():
        return torch.func.grad(losses, has_aux=True)(online, *others)
    # The same, without the layers of torch.func around every operation.
    leaves = tuple(parameters.detach().requires_grad_() for parameters in online)
    with torch.enable_grad():
        loss, metrics = losses(leaves, *others)
    return torch.autograd.grad(loss, leaves), metrics


def _copy(method: MethodType) -> MethodType:
    """The same method, of other code: PyTorch limits how often one code is compiled in a process."""
    its = method.__func__
    function = FunctionType(its.__code__.replace(), its.__globals__, its.__name__)
    return MethodType(function, method.__self__)


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Numbers for the leading dimensions of a tensor, broadcast over the others."""
    return numbers.reshape(*numbers.shape, *(1,) * (tensor.ndim - numbers.ndim))
