"""Steps that leave something NaN or infinite: found, and skipped; or named, and kept to be taken again.

NaN stays in a parameter, and infinity in a moment of Adam, for ever. So nothing has to be looked at in
every step, and nothing waits: :class:`Watch` looks once in a while, and only if what it sees is not finite
takes the steps since its last look again, one by one. They are the same, since minibatches and random
numbers depend on seed and step alone; however they are executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchrl_iql.data.minibatches import BLOCK, Minibatches
from torchrl_iql.spaces import written
from torchrl_iql.training.optimization import network_of

if TYPE_CHECKING:
    from torchrl_iql.training.step import TrainStep

__all__ = ["Mark", "NonFiniteError", "OnNonfinite", "Watch", "reproduce"]

OnNonfinite = Literal["stop", "skip"]
"""What to do at a step that leaves a loss, a parameter or a moment of Adam that is NaN or infinite."""

STEPS = 100
"""Most steps between two looks."""

BYTES = 2**28
"""Most memory that is held by batches which were given since the last look."""


class Mark(NamedTuple):
    """Where a training was: steps, what they change of each program, random numbers, sums of scalars."""

    steps: int
    tensors: list[list[Tensor]]
    random: list[list[Tensor]]
    totals: dict[str, Tensor]
    counted: list[int]


class NonFiniteError(ArithmeticError):
    """A gradient step left a loss, a parameter or a moment of Adam that is NaN or infinite.

    Attributes:
        step: the number of the step, from 1; None if it was not found again.
        learner: its place among the losses.
        kept: what :func:`reproduce` needs; None as ``step``.
    """

    def __init__(
        self, message: str, step: int | None, learner: int, kept: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.learner = learner
        self.kept = kept

    def save(self, folder: str | Path) -> Path | None:
        """Write ``nonfinite-step-<n>.pt``, from which :func:`reproduce` takes the step again.

        Returns:
            the path of the file; None if the step was not found again.
        """
        if self.kept is None:
            return None
        path = Path(folder) / f"nonfinite-step-{self.step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.kept, path)
        return path


class Watch:
    """Looks whether a training is finite, and does what is to be done at the steps that it is not after.

    Args:
        step: what is trained.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._results: list[TensorDictBase] | None = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins to look anew: data sets are not copied with it.
        return {**vars(self), "_mark": None, "_taken": []}

    def forget(self) -> None:
        """Look at nothing that was done before."""
        self._mark: Mark | None = None
        self._taken: list[tuple[Minibatches | TensorDictBase, int]] = []

    @property
    def left(self) -> int:
        """The number of steps until it is time to look."""
        return STEPS if self._mark is None else self._mark.steps + self._most - self._step.steps

    def take(self, source: Minibatches | TensorDictBase, steps: int) -> list[TensorDictBase]:
        """Take steps, at most to the end of a block, and look if it is time.

        Returns:
            the results of the last step.

        Raises:
            NonFiniteError: as :meth:`look`.
        """
        if self._mark is None:
            self._mark, self._most = self._step._mark(), STEPS
            if isinstance(source, TensorDictBase):
                size = sum(column.nbytes for column in source.values(True, True))
                self._most = max(1, min(STEPS, BYTES // max(1, size)))
        self._results = results = self._step._take(source, steps)
        self._taken.append((source, steps))
        is_time = self._step.steps - self._mark.steps >= self._most
        if self._step.on_nonfinite == "skip":  # and what is returned is used at once
            is_time |= isinstance(source, Minibatches) or "priority" in results[0].keys()
        return self.look() or results if is_time else results

    def look(self) -> list[TensorDictBase] | None:
        """Look at all that is learnt, and at the losses of the last step. This waits for the device, once.

        Returns:
            the results of the last step; None if there was none.

        Raises:
            NonFiniteError: something is not finite, and is not to be skipped. Training can go on from before
                the step that did it.
        """
        mark, taken = self._mark, self._taken
        if mark is None or self._results is None:
            return self._results
        self.forget()
        learned, entries = self._step._learned(), self._step.entries
        losses = [its[entry] for its in self._results for entry in entries]
        if not _finite([*learned, *losses]):
            self._results = self._take_again(mark, taken)
        return self._results

    def _take_again(
        self, mark: Mark, taken: list[tuple[Minibatches | TensorDictBase, int]]
    ) -> list[TensorDictBase]:
        """Take the steps since a mark one by one, and skip each that is not finite, or raise."""
        step, learners, results = self._step, range(len(self._step.losses)), []
        found = [r for r in learners if _not_finite(step, r, None)]
        step._restore(mark)
        for source in (source for source, steps in taken for _ in range(steps)):
            before = step._mark()
            results = step._take(source, 1)
            for r in learners:
                again = _not_finite(step, r, results)
                if again and step.on_nonfinite == "stop":
                    step._restore(before)
                    raise _error(step, again, r, source)
                if again:
                    step._return(before, r)
                    step.skipped[r] += 1
        if step.on_nonfinite == "stop":
            raise NonFiniteError(
                f"steps {mark.steps + 1} to {step.steps} of learner {found} were not finite, and taken "
                "again they are: batches, settings or networks were changed meanwhile, or the device or "
                "the loss does not give the same numbers twice",
                None,
                found[0] if found else 0,
            )
        return results


def _error(
    step: TrainStep, found: list[str], learner: int, source: Minibatches | TensorDictBase
) -> NonFiniteError:
    """Describe the step that comes next."""
    number, several = step.steps + 1, len(step.losses) > 1
    if isinstance(source, Minibatches):
        block, place = divmod(step.steps, BLOCK)
        transitions, indices = source(block)
        batch: Any = transitions[indices[place, learner]]
        rows = source.rows(step.steps)[learner]
    else:
        batch = source[learner] if several else source
        rows = batch.get("index", default=None)
    batch = batch.detach().cpu()
    kept = {
        "found": found,
        "step": number,
        "learner": learner,
        "rows": rows if rows is None else rows.cpu(),
        "batch": batch.to_dict(),
        "batch_size": list(batch.batch_size),
        "state": tree_map_only(Tensor, Tensor.cpu, step.state_dict(learner)),
    }
    largest = ", ".join(
        f"{written(key)} {value.abs().max():.3g}"
        for key, value in batch.items(True, True)
        if value.is_floating_point() and value.numel()
    )
    shown = ""
    if rows is not None:
        first = ", ".join(map(str, rows.flatten()[:8].tolist()))
        shown = f", rows {first}{', ...' if rows.numel() > 8 else ''} of the data,"
    return NonFiniteError(
        f"step {number} of learner {learner}: {', '.join(found)}. Its batch{shown} has magnitudes up to: "
        f"{largest}. If one of these is NaN or large, mend or scale it (rewards by the reward rule "
        "'unit_rms', observations by normalisation); else lower the learning rate, or limit the norm of "
        "gradients (max_grad_norm of TrainStep); 'skip' for on_nonfinite leaves such steps out",
        number,
        learner,
        kept,
    )


def reproduce(path: str | Path, step: TrainStep) -> list[str]:
    """Take a step again that was not finite.

    Args:
        path: the file that :meth:`NonFiniteError.save` wrote.
        step: for one loss, built as that of the run. It is changed to the state after the step.

    Returns:
        what is not finite afterwards.

    Raises:
        ValueError: ``step`` is for several losses, for other networks, or skips such steps.
    """
    if len(step.losses) != 1:
        raise ValueError(
            f"step is for {len(step.losses)} losses, expected one: build it of the loss alone"
        )
    if step.on_nonfinite != "stop":
        raise ValueError(f"on_nonfinite={step.on_nonfinite!r} undoes the step: give 'stop'")
    kept = torch.load(path, weights_only=True)
    step.load_state_dict(kept["state"])
    batch = TensorDict(kept["batch"], batch_size=kept["batch_size"], device=step.device)
    return _not_finite(step, 0, step._take(batch, 1))


def _not_finite(step: TrainStep, learner: int, results: list[TensorDictBase] | None) -> list[str]:
    """Say what of a learner is NaN or infinite, of its last results, too; nothing if all is finite."""
    values = {}
    if results is not None:
        joined = {key: torch.cat([its[key].reshape(-1) for its in results]) for key in step.entries}
        values = {key: value[learner] for key, value in joined.items()}
    groups: dict[str, list[Tensor]] = {key: [value] for key, value in values.items()}
    parameters = dict(step.losses[learner].named_parameters())
    for name, moments in step._moments(learner).items():
        network = network_of(name)
        groups.setdefault(f"parameters of {network}", []).append(parameters[name])
        groups.setdefault(f"moments of {network}", []).extend(moments)
    flags = torch.stack([_finite(its) for its in groups.values()]).tolist()
    wrong = [what for what, is_finite in zip(groups, flags, strict=True) if not is_finite]
    return [f"{what} is {values[what].item()}" if what in values else what for what in wrong]


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all numbers are finite, on the device."""
    # The extremes pass NaN on, and are found in a fraction of the time that isfinite takes.
    extremes = [x.detach().aminmax() for x in tensors if x.numel()]
    return torch.stack([each for pair in extremes for each in pair]).isfinite().all()
