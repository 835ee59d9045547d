"""The first step that leaves something NaN or infinite: found, named, and kept to be taken again.

NaN stays in a parameter, and infinity in a moment of Adam, for ever. So nothing has to be looked at in
every step: where metrics are read anyway, :class:`Watch` looks at what is there, and only if that is
not finite takes the steps since its last look again, one by one. They are the same, since minibatches
and random numbers depend on seed and step alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchrl_iql.data.minibatches import BLOCK, Minibatches
from torchrl_iql.spaces import written
from torchrl_iql.training.optimization import network_of
from torchrl_iql.training.step import TrainStep

__all__ = ["NonFiniteError", "Watch", "reproduce"]


class NonFiniteError(ArithmeticError):
    """A gradient step left a loss, a parameter or a moment of Adam that is NaN or infinite.

    Attributes:
        step: the number of the step, from 1; None if it was not found again.
        learner: its place among the losses.
        path: the file that takes the step again, by :func:`reproduce`; None as ``step``.
    """

    def __init__(
        self, message: str, step: int | None, learner: int, path: Path | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.learner = learner
        self.path = path


class Watch:
    """Ends a training that is no longer finite.

    Args:
        step: what is trained by :meth:`TrainStep.run`.
        minibatches: on which.
        folder: where the file of a step that is not finite is written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from torchrl_iql import IQLLoss, OfflineDataset, models
        >>> data = OfflineDataset.from_arrays(
        ...     "own",
        ...     observations=np.zeros((2, 3)),
        ...     actions=np.zeros((2, 1)),
        ...     rewards=[1e30, 1e30],
        ...     terminals=[False, True],
        ...     timeouts=[False, False],
        ... )
        >>> loss = IQLLoss(
        ...     models.gaussian_policy(3, 1), models.qvalue_ensemble(3, 1), models.value_network(3)
        ... )
        >>> step, minibatches = TrainStep(loss), data.minibatches(4)
        >>> watch = Watch(step, minibatches, tempfile.mkdtemp())
        >>> try:
        ...     watch(step.run(minibatches, 100))
        ... except NonFiniteError as error:
        ...     print(error.step, reproduce(error.path, step))
        1 ['loss_qvalue is inf', 'moments of qvalue_network']
    """

    def __init__(self, step: TrainStep, minibatches: Minibatches, folder: str | Path) -> None:
        self.step = step
        self.minibatches = minibatches
        self.folder = Path(folder)
        self._finite = step.mark()

    def __call__(self, results: TensorDictBase) -> None:
        """Look at all that is learnt, and at the losses of the last step. This waits for the device, once.

        Args:
            results: what the last :meth:`TrainStep.run` returned.

        Raises:
            NonFiniteError: something is not finite. Training can go on from before the step that did it.
        """
        mark = self.step.mark()
        losses = [results[key] for key in self.step.entries if key in results.keys()]
        finite: list[Any] = [x.isfinite().all() for x in (*mark.tensors, *losses)]
        if not torch.stack(finite).all():
            for learner in range(len(self.step.losses)):
                if found := _not_finite(self.step, learner, results):
                    self._replay(found, learner)
        self._finite = mark

    def _replay(self, found: list[str], learner: int) -> None:
        """Raise for the first step since the last look that leaves something not finite."""
        first, end = self._finite.steps + 1, self.step.steps
        self.step.restore(self._finite)
        for number in range(first, end + 1):
            before = self.step.mark()
            results = self.step.run(self.minibatches, 1)
            for its in range(len(self.step.losses)):
                if again := _not_finite(self.step, its, results):
                    self.step.restore(before)
                    raise self._error(again, its, number)
        raise NonFiniteError(
            f"steps {first} to {end} of learner {learner}: {', '.join(found)}; taken again, all are "
            "finite: the device, or a loss of one's own, does not give the same numbers twice",
            None,
            learner,
        )

    def _error(self, found: list[str], learner: int, number: int) -> NonFiniteError:
        block, place = divmod(number - 1, BLOCK)
        source, indices = self.minibatches(block)
        batch: Any = source[indices[place, learner]].cpu()
        rows = self.minibatches.rows(number - 1)[learner]
        path = self.folder / f"nonfinite-step-{number}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {
            "found": found,
            "step": number,
            "learner": learner,
            "rows": rows,
            "batch": batch.to_dict(),
            "state": tree_map_only(Tensor, Tensor.cpu, self.step.state_dict(learner)),
        }
        torch.save(kept, path)
        largest = ", ".join(
            f"{written(key)} {value.abs().max():.3g}"
            for key, value in batch.items(True, True)
            if value.is_floating_point()
        )
        shown = ", ".join(map(str, rows[:8].tolist())) + (", ..." if len(rows) > 8 else "")
        return NonFiniteError(
            f"step {number} of learner {learner}: {', '.join(found)}. Its batch, rows {shown} of the "
            f"data, has magnitudes up to: {largest}. If one of these is large, scale it (rewards by the "
            "reward rule 'unit_rms', observations by normalisation); else lower learning_rate or set "
            f"max_grad_norm. torchrl_iql.training.reproduce({str(path)!r}, step) takes the step again",
            number,
            learner,
            path,
        )


def reproduce(path: str | Path, step: TrainStep) -> list[str]:
    """Take a step again that was not finite.

    Args:
        path: the file that :class:`Watch` wrote.
        step: for one loss, built as that of the run. It is changed to the state after the step.

    Returns:
        what is not finite afterwards.

    Raises:
        ValueError: ``step`` is for several losses, or for other networks.
    """
    if len(step.losses) != 1:
        raise ValueError(
            f"step is for {len(step.losses)} losses, expected one: build it of the loss alone"
        )
    kept = torch.load(path, weights_only=True)
    step.load_state_dict(kept["state"])
    batch = TensorDict(kept["batch"], batch_size=[len(kept["rows"])], device=step.device)
    return _not_finite(step, 0, step(batch))


def _not_finite(step: TrainStep, learner: int, results: TensorDictBase) -> list[str]:
    """Say what of a learner is NaN or infinite; nothing if all is finite."""
    moments = step.state_dict(learner)["moments"]
    loss, entries = step.losses[learner], [key for key in step.entries if key in results.keys()]
    values = {key: results[key].reshape(-1)[learner] for key in entries}
    groups: dict[str, list[Tensor]] = {key: [value] for key, value in values.items()}
    for name, parameter in loss.named_parameters():
        groups.setdefault(f"parameters of {network_of(name)}", []).append(parameter.detach())
    for name, pair in moments.items():
        groups.setdefault(f"moments of {network_of(name)}", []).extend(pair)
    finite = [torch.stack([x.isfinite().all() for x in its]).all() for its in groups.values()]
    flags = dict(zip(groups, torch.stack(finite).tolist(), strict=True))
    wrong = [what for what, is_finite in flags.items() if not is_finite]
    return [f"{what} is {values[what].item()}" if what in values else what for what in wrong]
