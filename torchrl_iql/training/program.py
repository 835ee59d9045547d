"""One gradient step of any LossModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_iql.objectives.base import were_given
from torchrl_iql.spaces import written
from torchrl_iql.training.adam import Rates, adam_all_, clip_, follow_
from torchrl_iql.training.optimization import Optimization, network_of

__all__ = [
    "LossProgram",
    "Moments",
    "Program",
    "Step",
    "compiled_whole",
    "rows",
    "summed",
    "tensors_of",
]

Moments = dict[str, tuple[Tensor, Tensor]]
"""Adam's first and second moment of each parameter, by its name in the loss, in its shape."""


class Program(Protocol):
    """A gradient step of one learner, or of several in one computation, on tensors that stay in place.

    Attributes:
        losses: of the learners.
        draws: whether the step draws random numbers.
        state: what a step changes, beside what ``shared`` holds itself.
        shared: has a method ``compiled``, and programs with the same one share what that returns.
    """

    losses: list[LossModule]
    draws: bool
    state: tuple

    @property
    def shared(self) -> Shared: ...

    def adopt(self) -> None:
        """Find out what became of the losses since the last step, and train what they hold now."""
        ...

    def conformed(self, batch: TensorDictBase) -> TensorDictBase:
        """Return a batch that somebody gave, ``[*B]``, in a form that :meth:`columns` reads."""
        ...

    def columns(self, source: TensorDictBase) -> Any:
        """Return what a step reads of transitions ``[n]``, checked."""
        ...

    def addresses(self) -> tuple:
        """Return where the tensors of a step lie, and the plain numbers that it is made with."""
        ...

    def rehearse(self, columns: Any, indices: Tensor | None) -> None:
        """Raise what would go wrong in a step, before anything is compiled."""
        ...

    def update(
        self,
        state: tuple,
        columns: Any,
        indices: Tensor | None,
        rates: Tensor,
        due: frozenset[str],
    ) -> Any:
        """Take the step.

        Args:
            state: as above.
            columns: of :meth:`columns`.
            indices: rows of the minibatch, ``[B]``, or ``[R, B]`` of several learners; None for all.
            rates: of :meth:`Optimization.rates`, ``[networks, 6]``, or ``[R, networks, 6]``.
            due: the networks that are updated, and ``"targets"``.

        Returns:
            the scalars of the loss before the step, and the priority if the rows are all; in a form
            that ``shared.results`` knows.
        """
        ...

    def moments(self, learner: int) -> Moments:
        """Return the moments of one learner, in place."""
        ...

    def changing(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a step may change, in place; of several learners ``[R, ...]``.

        Returns:
            what is learned, parameters and their moments; and the rest, targets and buffers. Those that a
            loss makes at its first step, as SAC's target entropy, come last.
        """
        ...

    def clear_padding(self, learner: int) -> None:
        """Set to 0 what lies around the tensors of a learner: a step that is not finite leaves NaN there."""
        ...


@dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
        take: takes it, given a program, columns, what ``prepare`` gave for it, and rates.
        prepare: given a program, columns, and indices ``[steps, ...]`` or None, what each step reads.
    """

    take: Callable[[Program, Any, Any, Tensor], Any]
    prepare: Callable[[Program, Any, Tensor | None], Sequence[Any]]


def rows(program: Program, columns: Any, indices: Tensor | None) -> Sequence[Tensor | None]:
    """Return what a step reads that gathers its minibatch itself."""
    return [None] if indices is None else indices.unbind()


class Shared(Protocol):
    """What programs that differ in nothing but their tensors compute with."""

    def compiled(self, due: frozenset[str], compiler: Callable[[Callable], Callable]) -> Step:
        """Make the step of compiled functions.

        Args:
            due: what is updated.
            compiler: compiles a function of tensors, as one graph.
        """
        ...

    def results(self, of_step: Any) -> TensorDictBase:
        """Return what :meth:`update` or a compiled step returned, by name."""
        ...

    def sums(self, of_steps: Sequence[Any]) -> Any:
        """Return the sums of the scalars over several steps, by :func:`summed`, in the form of a step's."""
        ...


def tensors_of(loss: LossModule) -> list[Tensor]:
    """Return the parameters and the buffers of a loss."""
    return [*loss.parameters(), *loss.buffers()]


def summed(scalars: Sequence[Tensor]) -> Tensor:
    """Add tensors of one shape in float64, in which the order makes no difference that float32 shows."""
    return torch.stack(list(scalars)).double().sum(0)


def compiled_whole(
    update: Callable, due: frozenset[str], compiler: Callable[[Callable], Callable]
) -> Step:
    """Make a step that is one graph."""

    def whole(state: Any, columns: Any, indices: Any, rates: Tensor) -> Any:
        return update(state, columns, indices, rates, due)

    graph = compiler(whole)
    return Step(lambda program, *step: graph(program.state, *step), rows)


class LossProgram:
    """A step of one learner by its loss as it is: forward, gradients, Adam, targets.

    Args:
        loss: whose parameters are trained in place.
        optimization: of this loss.

    Raises:
        ValueError: at the first step, if an entry is not there or a network gets no gradient.
    """

    draws = True
    state = ()

    def __init__(self, loss: LossModule, optimization: Optimization) -> None:
        self.shared: Shared = self
        self.losses = [loss]
        self.loss = loss
        self.optimization = optimization
        if loss.default_value_estimator is not None and loss._value_estimator is None:
            loss.make_value_estimator()  # else the first step would, and change the state dict
        self._moments: Moments = {}
        self._buffers: dict[str, Tensor] = {}
        self.adopt()

    def adopt(self) -> None:
        parameters = dict(self.loss.named_parameters())
        for name, parameter in parameters.items():
            if network_of(name) not in self.optimization.networks:
                continue
            if name not in self._moments:
                moments = torch.zeros(2, *parameter.shape, dtype=parameter.dtype)
                first, second = moments.to(parameter.device).unbind()
                self._moments[name] = first, second
            first = self._moments[name][0]
            for what in ("shape", "dtype", "device"):
                if getattr(parameter, what) != getattr(first, what):
                    raise ValueError(
                        f"{name} was {first.dtype} {tuple(first.shape)} on {first.device} and is now "
                        f"{parameter.dtype} {tuple(parameter.shape)} on {parameter.device}: build a "
                        "new training step"
                    )
        self._parameters = {
            network: {
                n: p for n, p in parameters.items() if network_of(n) == network and p.requires_grad
            }
            for network in self.optimization.networks
        }
        buffers = dict(self.loss.named_buffers())
        known = [name for name in self._buffers if name in buffers]
        self._buffers = {name: buffers[name] for name in (*known, *buffers)}
        self._device = next(iter(parameters.values())).device
        self._targets = [self._pairs(network) for network in self.optimization.target_rate]

    def _pairs(self, network: str) -> tuple[list[Tensor], list[Tensor], float]:
        """Return targets, what they follow, and how fast. Buffers of a network are not followed."""
        learned = {parameter.data_ptr() for parameter in self.loss.parameters()}
        sources = getattr(self.loss, f"{network}_params")
        targets = self.loss._modules[f"target_{network}_params"]
        pairs = [
            (targets.get(key).data, parameter.data)  # pyright: ignore
            for key, parameter in sources.items(True, True)
            # Also where it is the parameter of another network.
            if isinstance(parameter, torch.nn.Parameter) or parameter.data_ptr() in learned
        ]
        slow, fast = zip(*pairs, strict=True)
        return list(slow), list(fast), self.optimization.target_rate[network]

    def addresses(self) -> tuple:
        modules = (*self.loss.modules(), *_networks(self.loss))
        plain = {k: v for k, v in vars(self.loss).items() if isinstance(v, (bool, int, float, str))}
        plain |= {f"key {k}": written(key) for k, key in vars(self.loss.tensor_keys).items()}
        return (
            tuple(tensor.data_ptr() for tensor in tensors_of(self.loss)),
            tuple(module.training for module in modules),
            tuple(sorted(plain.items())),
        )

    def conformed(self, batch: TensorDictBase) -> TensorDictBase:
        return batch

    def columns(self, source: TensorDictBase) -> TensorDictBase:
        return source

    def rehearse(self, columns: TensorDictBase, indices: Tensor | None) -> None:
        due = frozenset(self.optimization.networks)
        with torch.random.fork_rng(devices=_cuda(self._device)):
            self._gradients(self._batch(columns, indices), due)

    def compiled(self, due: frozenset[str], compiler: Callable[[Callable], Callable]) -> Step:
        return compiled_whole(self.update, due, compiler)

    def results(self, of_step: TensorDictBase) -> TensorDictBase:
        return of_step

    def sums(self, of_steps: Sequence[TensorDictBase]) -> TensorDictBase:
        names = [name for name in of_steps[-1].keys() if name != "priority"]
        return TensorDict({name: summed([each[name] for each in of_steps]) for name in names})

    def update(
        self,
        state: tuple,
        columns: TensorDictBase,
        indices: Tensor | None,
        rates: Tensor,
        due: frozenset[str],
    ) -> TensorDictBase:
        batch = self._batch(columns, indices)
        gradients, outputs = self._gradients(batch, due)
        with torch.no_grad():
            self._descend(gradients, rates)
            if "targets" in due:
                for targets, sources, rate in self._targets:
                    follow_(targets, sources, rate)
            return self._results(outputs, batch, with_priority=indices is None)

    @staticmethod
    def _batch(columns: TensorDictBase, indices: Tensor | None) -> TensorDictBase:
        # A new one: what the loss writes stays out of the transitions.
        return columns.copy() if indices is None else columns[indices]

    def _gradients(
        self, batch: TensorDictBase, due: frozenset[str]
    ) -> tuple[dict[str, dict[str, Tensor]], TensorDictBase]:
        """Compute gradients by network and parameter, of those due; and the output of the loss."""
        entries = self.optimization.entries
        names = [
            (network, name)
            for network, its in self._parameters.items()
            if network in due
            for name in its
        ]
        leaves = [self._parameters[network][name] for network, name in names]
        with torch.enable_grad():
            outputs = self._outputs(batch)
            total = _total(outputs, entries)
            found = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
        gradients: dict[str, dict[str, Tensor]] = {network: {} for network, _ in names}
        for (network, name), gradient in zip(names, found, strict=True):
            if gradient is not None:
                gradients[network][name] = gradient
        for network, its in gradients.items():
            if not its:
                raise ValueError(
                    f"{network} gets no gradient from {list(entries)}: leave it out of "
                    "learning_rate={...}, or descend what trains it"
                )
        return gradients, outputs

    def _outputs(self, batch: TensorDictBase) -> TensorDictBase:
        """Call the loss, and note what it was given where PyTorch fails and the loss does not say it."""
        if torch.compiler.is_compiling():
            return self.loss(batch)
        try:
            return self.loss(batch)
        except RuntimeError as error:
            said = [str(error), *getattr(error, "__notes__", ())]
            if not any("was given" in each for each in said):
                error.add_note(were_given(type(self.loss).__name__, batch))
            raise

    def _descend(self, gradients: dict[str, dict[str, Tensor]], rates: Tensor) -> None:
        optimization, norm = self.optimization, self.optimization.max_grad_norm
        if isinstance(norm, (int, float)):
            clip_([g for its in gradients.values() for g in its.values()], norm)
        elif norm is not None:
            for network in norm.keys() & gradients.keys():
                clip_(list(gradients[network].values()), norm[network])
        for k, network in enumerate(optimization.networks):
            if network in gradients:
                its = gradients[network]
                moments = [self._moments[name] for name in its]
                adam_all_(
                    [self._parameters[network][name] for name in its],
                    list(its.values()),
                    [first for first, _ in moments],
                    [second for _, second in moments],
                    Rates(*rates[k].unbind()[: len(Rates._fields)]),
                    optimization.weight_decay[network],
                )

    def _results(
        self, outputs: TensorDictBase, batch: TensorDictBase, *, with_priority: bool
    ) -> TensorDictBase:
        results = {
            key: value.detach().reshape(())
            for key, value in outputs.items()
            if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        }
        priority: NestedKey | None = getattr(self.loss.tensor_keys, "priority", None)
        written = batch.get(priority, default=None) if with_priority and priority else None
        if written is not None:
            results["priority"] = written.detach()
        return TensorDict(results)

    def moments(self, learner: int) -> Moments:
        return self._moments

    def changing(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters = (p for its in self._parameters.values() for p in its.values())
        moments = (moment for pair in self._moments.values() for moment in pair)
        return [*parameters, *moments], list(self._buffers.values())

    def clear_padding(self, learner: int) -> None:
        """Do nothing: there is none."""


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _networks(loss: LossModule) -> Iterable[torch.nn.Module]:
    """Return the networks of a loss, which are not among its children."""
    for value in vars(loss).values():
        if isinstance(value, torch.nn.Module):
            yield from value.modules()


def _total(outputs: TensorDictBase, entries: tuple[str, ...]) -> Tensor:
    total = None
    for entry in entries:
        value = outputs.get(entry, default=None)
        if value is None:
            raise KeyError(f"the loss writes {list(outputs.keys())}, and not {entry!r}")
        if value.numel() != 1:
            raise ValueError(
                f"{entry!r} has shape {tuple(value.shape)}: only scalars are descended, so build the "
                "loss with reduction='mean' or 'sum'"
            )
        total = value.reshape(()) if total is None else total + value.reshape(())
    assert total is not None
    return total
