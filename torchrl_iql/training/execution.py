"""How steps are executed: eagerly, compiled, or compiled and replayed from CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.utils._pytree import tree_map, tree_map_only

from torchrl_iql.training.building import compiler
from torchrl_iql.training.program import Program, Step, rows

__all__ = ["Execution", "Executor", "RandomStream", "Taken", "compiled_function"]

Execution = Literal["auto", "eager", "compiled", "cudagraph"]
Due = frozenset[str]

STEPS_PER_GRAPH = 10
"""Gradient steps in one CUDA graph: enough that the time between two graphs does not count."""

STEPS_AT_ONCE = 10
"""Minibatches that are gathered together, where that is done before the step."""


class Taken(NamedTuple):
    """Some steps, in the form of their program, which ``shared.results`` turns into results by name.

    Attributes:
        last: what the last of them returned.
        sums: of what all of them did, ``shared.sums``.
    """

    last: Any
    sums: Any


class Executor:
    """Takes the steps of programs.

    Args:
        wanted: what was asked for.
        device: of the programs.

    Attributes:
        execution: how steps are executed. With ``"auto"`` that may change at the first step, if it
            turns out that a program can not be compiled.
        reason: why so.

    Raises:
        ValueError: ``wanted`` is unknown, or the device can not do it.
    """

    def __init__(self, wanted: Execution, device: torch.device) -> None:
        if wanted not in get_args(Execution):
            raise ValueError(f"execution must be one of {get_args(Execution)}, got {wanted!r}")
        if wanted == "cudagraph" and device.type != "cuda":
            raise ValueError(
                f"execution='cudagraph' needs a CUDA device, the losses are on {device}"
            )
        self._may_fall_back = wanted == "auto"
        self.execution: Execution = wanted
        self.reason = f"execution={wanted!r} was asked for"
        if wanted == "auto":
            self.execution, self.reason = _fastest(device)
        self._taken = 0  # steps since the latest call
        # By what a step computes with, and the networks that are due.
        self._compiled: dict[tuple[Any, Due], Step] = {}
        self._graphs: dict[tuple[Program, tuple[Due, ...], bool], _Graph] = {}

    def take(
        self,
        program: Program,
        source: TensorDictBase,
        indices: Tensor | None,
        rates: Tensor,
        due: Sequence[Due],
    ) -> Taken:
        """Take some steps.

        Args:
            program: whose steps they are.
            source: transitions ``[n]``.
            indices: of the minibatches, ``[steps, ...]``; None for one step on all transitions.
            rates: ``[steps, ...]``.
            due: for each step, what is updated.
        """
        if self.execution == "eager":
            return self._one_by_one(
                self._eager, program, program.columns(source), indices, rates, due
            )
        ready = [(program.shared, kind) in self._compiled for kind in due]
        # Gradients are taken within the compiled code, which Dynamo traces only when told to, and runs
        # only while it is told so.
        tracing = torch._dynamo.config.patch(trace_autograd_ops=True)
        self._taken = 0
        try:
            if not all(ready):
                program.rehearse(program.columns(source), None if indices is None else indices[0])
            with tracing:
                if self.execution == "cudagraph":
                    return self._replay(program, source, indices, rates, due)
                columns = program.columns(source)
                step = self._compiled_step
                return self._one_by_one(step, program, columns, indices, rates, due)
        except _COMPILATION_ERRORS as error:
            if not self._may_fall_back or self._taken:
                raise
            self.execution, self.reason = "eager", f"compiling failed: {_first_line(error)}"
            warnings.warn(f"training is not compiled, and slower: {self.reason}", stacklevel=4)
            return self.take(program, source, indices, rates, due)

    def _one_by_one(
        self,
        step: Callable[[Program, Due], Step],
        program: Program,
        columns: Any,
        indices: Tensor | None,
        rates: Tensor,
        due: Sequence[Due],
    ) -> Taken:
        taken: list[Any] = []
        unchecked: set[Due] | None = set(due)
        with ExitStack() as stack:
            for t, (rate, kind) in enumerate(zip(rates.unbind(), due, strict=True)):
                if not unchecked and unchecked is not None and self.execution != "eager":
                    # The first calls have checked that the compiled code fits these tensors.
                    stack.enter_context(torch.compiler.set_stance(skip_guard_eval_unsafe=True))
                    unchecked = None
                its = step(program, kind)
                if t % STEPS_AT_ONCE == 0:
                    part = None if indices is None else indices[t : t + STEPS_AT_ONCE]
                    prepared = its.prepare(program, columns, part)
                taken.append(its.take(program, columns, prepared[t % STEPS_AT_ONCE], rate))
                self._taken += 1
                if unchecked:
                    unchecked.discard(kind)
        return Taken(taken[-1], program.shared.sums(taken))

    def _eager(self, program: Program, kind: Due) -> Step:
        def take(its: Program, columns: Any, at: Tensor | None, rate: Tensor) -> Any:
            return its.update(its.state, columns, at, rate, kind)

        return Step(take, rows)

    def _compiled_step(self, program: Program, kind: Due) -> Step:
        """Return the step, compiled at its first call."""
        key = program.shared, kind
        if key not in self._compiled:
            self._compiled[key] = program.shared.compiled(kind, compiled_function)
        return self._compiled[key]

    def __getstate__(self) -> dict[str, Any]:
        # A copy, also by copy.deepcopy, compiles anew: this code trains the losses that it was made of.
        return {**vars(self), "_compiled": {}, "_graphs": {}}

    # --- CUDA graphs ---------------------------------------------------------------------------------

    def _replay(
        self,
        program: Program,
        source: TensorDictBase,
        indices: Tensor | None,
        rates: Tensor,
        due: Sequence[Due],
    ) -> Taken:
        if indices is None:
            return self._graph(program, source, None, rates, due)
        parts = []
        whole = len(indices) - len(indices) % STEPS_PER_GRAPH
        for first in range(0, whole, STEPS_PER_GRAPH):
            part = slice(first, first + STEPS_PER_GRAPH)
            parts.append(self._graph(program, source, indices[part], rates[part], due[part]))
        if whole < len(indices):
            columns = program.columns(source)
            rest = indices[whole:], rates[whole:], due[whole:]
            parts.append(self._one_by_one(self._compiled_step, program, columns, *rest))
        sums = tree_map(_sum, *(part.sums for part in parts))
        return Taken(parts[-1].last, sums)

    def _graph(
        self,
        program: Program,
        source: TensorDictBase,
        indices: Tensor | None,
        rates: Tensor,
        due: Sequence[Due],
    ) -> Taken:
        key = program, tuple(due), indices is None
        graph = self._graphs.get(key)
        if graph is None or not graph.fits(program, source):
            take = partial(self._one_by_one, self._compiled_step, program)
            # Before it is recorded, the code must have run: these steps count as any others.
            self._graphs[key] = graph = _Graph(take, program, source, indices, rates, due)
            return graph.first
        return graph.replay(source, indices, rates)


class _Graph:
    """Some steps, recorded once and replayed with other minibatches and rates.

    Args:
        take: takes steps, given columns, indices, rates and what is due.
        program: whose steps they are.
        source: transitions; with ``indices`` those that are always there, else one batch of many.
        indices: of the steps to take before recording.
        rates: their rates.
        due: what is updated in each.

    Attributes:
        first: what these steps returned.
    """

    def __init__(
        self,
        take: Callable[..., Taken],
        program: Program,
        source: TensorDictBase,
        indices: Tensor | None,
        rates: Tensor,
        due: Sequence[Due],
    ) -> None:
        self.batch = source.clone() if indices is None else None
        self.indices = None if indices is None else indices.clone()
        self.rates = rates.clone()
        fixed = source if self.batch is None else self.batch
        again = partial(take, program.columns(fixed), self.indices, self.rates, due)
        self.first, self._again, self._recorded = record(again)
        self._addresses = self._where(program, fixed)

    def fits(self, program: Program, source: TensorDictBase) -> bool:
        """Return whether everything is still where it was when the graph was recorded."""
        if self.batch is None:
            return self._addresses == self._where(program, source)
        same = source.shape == self.batch.shape and _layout(source) == _layout(self.batch)
        return same and self._addresses == self._where(program, self.batch)

    @staticmethod
    def _where(program: Program, source: TensorDictBase) -> tuple:
        columns = source.items(True, True)
        return program.addresses(), tuple((k, c.data_ptr(), c.shape) for k, c in columns)

    def replay(self, source: TensorDictBase, indices: Tensor | None, rates: Tensor) -> Taken:
        """Take the steps with these."""
        if self.batch is not None:
            self.batch.update_(source, non_blocking=True)
        elif self.indices is not None:
            self.indices.copy_(indices)  # pyright: ignore
        self.rates.copy_(rates)
        self._again()
        return _copied(self._recorded)


def _layout(source: TensorDictBase) -> list:
    return [(key, column.shape, column.dtype) for key, column in source.items(True, True)]


def _sum(*its: Any) -> Any:
    return sum(its) if isinstance(its[0], Tensor) else its[0]


def _copied(taken: Taken) -> Taken:
    return tree_map_only(Tensor, Tensor.clone, taken)


def record(steps: Callable[[], Taken]) -> tuple[Taken, Callable[[], None], Taken]:
    """Take steps, in which everything is compiled and set up, and record the same unexecuted.

    Returns:
        what those steps returned, what replays the record, and the tensors with what it computes.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = _copied(steps())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = steps()
    return first, graph.replay, recorded


class RandomStream:
    """The random numbers of one learner: global generators that continue where it last stopped.

    Args:
        seed: where the stream begins.
        device: on which numbers are drawn.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self.state = [torch.Generator().manual_seed(seed).get_state()]
        if device.type == "cuda":
            self.state.append(torch.Generator(device).manual_seed(seed).get_state())

    def __enter__(self) -> None:
        self._outer = self._get()
        self._set(self.state)

    def __exit__(self, *_: object) -> None:
        self.state = self._get()
        self._set(self._outer)

    def _get(self) -> list[Tensor]:
        on_gpu = self._device.type == "cuda"
        return [torch.get_rng_state()] + (
            [torch.cuda.get_rng_state(self._device)] if on_gpu else []
        )

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0].cpu())
        if self._device.type == "cuda" and len(state) > 1:
            torch.cuda.set_rng_state(state[1].cpu(), self._device)


def _fastest(device: torch.device) -> tuple[Execution, str]:
    if device.type == "cuda":
        return "cudagraph", "a GPU replays recorded steps without waiting for the CPU"
    try:
        if device.type == "cpu":
            compiler()
    except FileNotFoundError as error:
        reason = f"nothing can be compiled here: {error}"
        warnings.warn(f"training is not compiled, and slower: {reason}", stacklevel=5)
        return "eager", reason
    # Whether it works, the first step tells.
    return "compiled", f"there is a compiler for {device.type}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def compiled_function(function: FunctionType | MethodType) -> Callable:
    """Compile a function as one graph, for fixed shapes.

    Of a copy of its code: PyTorch limits how often one code is compiled in a process.
    """
    its = function.__func__ if isinstance(function, MethodType) else function
    copy: Any = FunctionType(
        its.__code__.replace(), its.__globals__, its.__name__, its.__defaults__, its.__closure__
    )
    if isinstance(function, MethodType):
        copy = MethodType(copy, function.__self__)
    return torch.compile(copy, fullgraph=True, dynamic=False)


_COMPILATION_ERRORS = (TorchDynamoException, InductorError)
