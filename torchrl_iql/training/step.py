"""One gradient step of any loss, of one learner or of many at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from torchrl_iql.data.minibatches import BLOCK, Minibatches
from torchrl_iql.spaces import listed
from torchrl_iql.training import native
from torchrl_iql.training.coefficients import coefficients, learned, plain, set_coefficients
from torchrl_iql.training.execution import Execution, Executor, RandomStream
from torchrl_iql.training.nonfinite import Mark, OnNonfinite, Watch
from torchrl_iql.training.optimization import Optimization, Schedule, network_of
from torchrl_iql.training.program import LossProgram, Moments, Program, tensors_of
from torchrl_iql.training.stacked import Parts, StackedProgram, parts_of, unlike

__all__ = ["FORMAT", "Own", "TrainStep"]

FORMAT = 3
"""Of :meth:`TrainStep.state_dict`. 2 had no coefficients that are not in the loss's state dict, and no
optimisation; before it had a number, moments were those of padded stacks."""

Own = Literal["settings", "optimizer", "random"]
"""What a training step may keep of its own when it loads a state: ``"settings"`` are the coefficients of
the loss (expectile, discount) and of the optimisation (learning rates), ``"optimizer"`` the moments and
the number of steps, ``"random"`` the random numbers."""

NAMED = 3
"""Of names that do not fit, those that a message lists."""

T = TypeVar("T")


class TrainStep:
    r"""Losses, gradients, Adam, learning rates and target networks of any LossModule, as one callable.

    The descended entries of the output are summed and descended in one Adam step, all from the same
    parameters; then the targets follow, :math:`\hat\theta \leftarrow (1 - \alpha) \hat\theta + \alpha
    \theta`. It is what the plain loop does (the loss, a buffer, Adam, SoftUpdate), number for number.
    What is returned stays on the device until somebody reads it, and nothing waits for the device, but for
    ``on_nonfinite`` once in 100 steps.

    :class:`~torchrl_iql.IQLLoss` and :class:`~torchrl_iql.DiscreteIQLLoss` on networks of
    :mod:`torchrl_iql.models` are stacked: all networks go through each layer as one product. Every other
    loss is called as it is. :attr:`path` says which, and why.

    Given R losses, it trains R independent learners, each with its own parameters, minibatches,
    optimiser, random numbers and learning rate. Stacks are trained together on a GPU; all others one
    after the other, up to 100 steps each. ``losses[r]`` remains an ordinary loss, whose networks are those
    in training: if they are replaced (``load_state_dict(assign=True)``, a cast and back), the next step
    trains the new ones; if they have another dtype or device it refuses.

    Args:
        losses: a LossModule on the device to train on, or several. ``loss.temperature = 1.0`` and other
            changes take effect at the next step.

    Keyword Args:
        entries: what is descended of the output; known for the losses of this project and for TorchRL's
            BC, DQN, IQL, SAC, TD3BC, CQL and DT, to be given for others.
        learning_rate: of Adam; or by network, as ``{"actor_network": 1e-4, "qvalue_network": 3e-4}``,
            where those that are not named are not trained; or a sequence of either, one per loss. A
            parameter that belongs to no network is named as it is called, ``"log_alpha"``.
        schedule: by network, the factor of its learning rate after so many steps, as
            :func:`~torchrl_iql.training.cosine_decay`.
        weight_decay: decoupled, as :class:`torch.optim.AdamW`; a number, or by network.
        max_grad_norm: the largest norm of the gradient, of all networks together or by network.
        every: by network, the steps from one update to the next: ``{"actor_network": 2}`` is TD3's
            delayed policy. Its moments and its gradient rest meanwhile.
        target_rate: :math:`\alpha` in (0, 1], for all networks with targets or by network; those that
            are not named stay as they are.
        target_every: the steps from one update of the targets to the next.
        seeds: where the random numbers of each learner begin, of losses that draw some (dropout, SAC):
            one per loss, or one for all.
        execution: ``"eager"``; ``"compiled"`` by :func:`torch.compile`, which takes up to a minute at
            the first step; ``"cudagraph"``, compiled and replayed by the GPU without the CPU; or
            ``"auto"``, the fastest of these that the machine and the loss allow.
        on_nonfinite: what to do at a step that leaves a loss, a parameter or a moment of Adam that is NaN
            or infinite. It is looked for after 100 steps, when :meth:`check_finite` is called, and before a
            state is saved; batches are kept until then. ``"stop"`` returns to before that step, and
            raises. ``"skip"`` leaves the learner as it was before it, but for the count of its steps and
            its random numbers, and looks after every :meth:`run`, and step that writes priorities, too;
            the output has the number of skipped steps under ``"skipped"``.

    Attributes:
        losses: the losses.
        path: ``"stacked"`` or ``"general"``, and why.
        steps: the number of gradient steps taken.
        skipped: how many of them were not, of each loss.

    Raises:
        TypeError, ValueError: an argument is out of range, or names what the loss does not have.
        NonFiniteError: by all methods that take steps or save them, see ``on_nonfinite``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl.objectives import BCLoss
        >>> from torchrl_iql import TrainStep, models
        >>> loss = BCLoss(models.gaussian_policy(3, 2))
        >>> step = TrainStep(loss, learning_rate=1e-3)
        >>> batch = {"observation": torch.randn(8, 3), "action": torch.rand(8, 2)}
        >>> step(TensorDict(batch, [8])).keys()
        _StringKeys(dict_keys(['loss_bc']))
    """

    def __init__(
        self,
        losses: LossModule | Sequence[LossModule],
        *,
        entries: Sequence[str] | None = None,
        learning_rate: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] = 3e-4,
        schedule: Mapping[str, Schedule] = MappingProxyType({}),
        weight_decay: float | Mapping[str, float] = 0.0,
        max_grad_norm: float | Mapping[str, float] | None = None,
        every: Mapping[str, int] = MappingProxyType({}),
        target_rate: float | Mapping[str, float] = 0.005,
        target_every: int = 1,
        seeds: int | Sequence[int] = 0,
        execution: Execution = "eager",
        on_nonfinite: OnNonfinite = "stop",
    ) -> None:
        self.losses = [losses] if isinstance(losses, nn.Module) else list(losses)
        if not self.losses:
            raise ValueError("losses must hold at least one loss")
        for loss in self.losses:
            if not isinstance(loss, LossModule):
                raise TypeError(
                    f"losses must be LossModules of TorchRL, got {type(loss).__qualname__} of "
                    f"{type(loss).__module__}"
                )
        if len(set(map(id, self.losses))) < len(self.losses):
            raise ValueError("losses must be different objects: one of them is there twice")
        _check_apart(self.losses)
        for loss in self.losses:
            # TorchRL warns of targets that nobody updates. And its losses cache parameters: those of a copy
            # are as they were when it was made.
            loss._has_update_associated = dict.fromkeys(loss._has_update_associated, True)
            loss._erase_cache()
        if on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(
                f"on_nonfinite must be one of {get_args(OnNonfinite)}, got {on_nonfinite!r}"
            )
        learners = len(self.losses)
        rates = _per_learner("learning_rate", learning_rate, learners)
        self._optimizations = [
            Optimization.of(
                loss,
                entries=entries,
                learning_rate=rate,
                schedule=schedule,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                every=every,
                target_rate=target_rate,
                target_every=target_every,
            )
            for loss, rate in zip(self.losses, rates, strict=True)
        ]
        self.steps = 0
        self._loaded: dict[int, int] = {}  # steps of learners, of states since the last step
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.skipped = [0] * learners
        self._totals: dict[str, Tensor] = {}  # of the scalars, [R], since the last means
        self._counted = [0] * learners  # steps in them
        self._watch = Watch(self)
        self._loads = list(map(_Loads, self.losses))
        self._held: list = []
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._executor = Executor(execution, self.device)
        self._programs, self.path = self._programs_for()
        self._made_with = self._settings()
        self._streams = [
            RandomStream(seed, self.device) for seed in _per_learner("seeds", seeds, learners)
        ]

    def _programs_for(self) -> tuple[Sequence[tuple[Program, slice]], str]:
        """Return what takes the steps, of which learners, and why it does."""
        losses, optimizations = self.losses, self._optimizations
        parts: list[Parts] = []
        for its in map(parts_of, losses, optimizations):
            if isinstance(its, str):
                general: list[Program] = list(map(LossProgram, losses, optimizations))
                return [(p, slice(r, r + 1)) for r, p in enumerate(general)], f"general: {its}"
            parts.append(its)
        apart = unlike(parts, optimizations)
        kernels = self._may_have_kernels()
        first = StackedProgram(losses[:1], optimizations[:1], native=kernels)  # pyright: ignore
        path = "stacked: IQL on networks of torchrl_iql.models"
        path += ", by kernels of their own" if first.shared.policy is not None else ""
        if apart is None and self.device.type != "cpu" and not first.draws:
            joint: Program = StackedProgram(losses, optimizations, first.shared)  # pyright: ignore
            return [(joint, slice(0, len(losses)))], f"{path}, all learners in one computation"
        programs: list[Program] = [first]
        shared = first.shared if apart is None else None
        for loss, optimization in zip(losses[1:], optimizations[1:], strict=True):
            program = StackedProgram([loss], [optimization], shared, kernels)  # pyright: ignore
            programs.append(program)
        why = apart or ("each draws its own dropout" if first.draws else "one fits a CPU's caches")
        path += f", one learner after the other: {why}" if len(losses) > 1 else ""
        return [(program, slice(r, r + 1)) for r, program in enumerate(programs)], path

    def _settings(self) -> tuple:
        """Return what the programs are made with. A loss that is called as it is reads its own."""
        its = [(_kind(loss), [p.requires_grad for p in loss.parameters()]) for loss in self.losses]
        return list(self._optimizations), its if self._is_stacked else None

    @property
    def _is_stacked(self) -> bool:
        return self.path.startswith("stacked")

    def _adopt(self) -> None:
        """Find out what became of the losses and their settings since the last step."""
        if self._held == self._present():
            return
        self._watch.look()  # else earlier steps would be taken again with other numbers
        if self._made_with != self._settings():
            moments = [self._moments(r) for r in range(len(self.losses))]
            self._programs, self.path = self._programs_for()
            self._made_with, self._tables = self._settings(), {}
            for r, before in enumerate(moments):
                for name, pair in self._moments(r).items():
                    for moment, its in zip(pair, before.get(name, ()), strict=False):
                        moment.copy_(its)
        for program, _ in self._programs:
            program.adopt()
        self._held = self._present()

    def _begin(self) -> None:
        """Be ready for a step."""
        if len(set(self._loaded.values())) > 1:
            raise ValueError(
                f"the learners have taken {list(self._loaded.values())} steps: load states of as many into "
                "all of them"
            )
        self._loaded = {}
        self._adopt()

    def _present(self) -> list:
        """Return by what it is told whether somebody has changed a loss."""
        return [
            (
                loads.count,
                _kind(loss),
                [(x.data_ptr(), x._version, x.requires_grad) for x in tensors_of(loss)],
            )
            for loss, loads in zip(self.losses, self._loads, strict=True)
        ]

    def _moments(self, replica: int) -> Moments:
        program, rows = self._program_of(replica)
        return program.moments(replica - rows.start)

    def _may_have_kernels(self) -> bool:
        """Return whether the kernels of this project can compute the stacks, but for their policies."""
        loss = self.losses[0]
        dtype = next(loss.parameters()).dtype
        dropout = any(isinstance(m, nn.Dropout) for m in loss.actor_network.modules())  # pyright: ignore
        return (
            self.execution == "compiled"
            and self.device.type == "cpu"
            and dtype in (torch.float32, torch.float64)
            and not dropout
            and native.unavailable() is None
        )

    @property
    def execution(self) -> Execution:
        """How steps are executed."""
        return self._executor.execution

    @property
    def reason(self) -> str:
        """Why steps are executed so."""
        return self._executor.reason

    @property
    def entries(self) -> tuple[str, ...]:
        """What is descended of the losses' output."""
        return self._optimizations[0].entries

    @property
    def device(self) -> torch.device:
        """Where the learners are trained."""
        return next(self.losses[0].parameters()).device

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.losses)} x {type(self.losses[0]).__name__}, {self.path}; "
            f"{self.execution}: {self.reason}; {self.steps} steps)"
        )

    # --- Steps ---------------------------------------------------------------------------------------

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Take one gradient step.

        Args:
            batch: what the loss reads, on its device; for R losses with R in front. If the loss writes
                priorities, they are there afterwards, unless the batch is locked.

        Returns:
            the scalars of the loss before the step; for several losses ``[R]``.

        Raises:
            KeyError, ValueError: an entry of the batch is missing or does not fit.
        """
        learners = len(self.losses)
        if learners > 1 and (batch.ndim < 2 or len(batch) != learners):
            shape = tuple(batch.shape)
            raise ValueError(f"the batch has shape {shape}, expected [{learners}, B]")
        self._begin()
        results = self._watch.take(batch, 1)
        priorities = [its["priority"] for its in results if "priority" in its.keys()]
        if priorities and not batch.is_locked:
            key, its = self.losses[0].tensor_keys.priority, torch.cat(priorities)  # pyright: ignore
            if self.on_nonfinite == "skip":
                its = its.nan_to_num(0.0, 0.0, 0.0)
            own = its.shape[batch.ndim - (learners > 1) :]  # some losses write [B, 1]
            batch.set(key, its.view(*batch.shape, *own))
        return self._joined(results)

    def run(self, minibatches: Minibatches, steps: int) -> TensorDictBase:
        """Take gradient steps on minibatches drawn from a data set, on the device.

        Args:
            minibatches: for as many seeds as there are losses.
            steps: at least 1.

        Returns:
            the scalars of the losses before the last of these steps; for several losses ``[R]``.
        """
        if not isinstance(minibatches, Minibatches):
            raise TypeError(
                f"minibatches is a {type(minibatches).__name__}, expected those of "
                "OfflineDataset.minibatches(...); step(batch) takes what a replay buffer samples"
            )
        if len(minibatches.seeds) != len(self.losses):
            raise ValueError(
                f"minibatches are for {len(minibatches.seeds)} learners, but there are "
                f"{len(self.losses)} losses"
            )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        self._begin()
        end, results = self.steps + steps, []
        while self.steps < end:
            remaining = min(end - self.steps, BLOCK - self.steps % BLOCK, self._watch.left)
            results = self._watch.take(minibatches, remaining)
        return self._joined(results)

    def means(self) -> TensorDictBase:
        """Return the means of the scalars of the losses over the steps since it was last called.

        What it counts is saved and restored with the rest, and steps that are skipped are not in it.

        Returns:
            by name, as :meth:`run`, in float32; NaN for a learner without a step; empty if there was none.

        Raises:
            NonFiniteError: as :meth:`check_finite`.
        """
        self.check_finite()
        counted = torch.tensor(self._counted, device=self.device)
        means = {key: (total / counted).float() for key, total in self._totals.items()}
        self._totals, self._counted = {}, [0] * len(self.losses)
        return self._joined([TensorDict(means)])

    def check_finite(self) -> TensorDictBase | None:
        """Look whether the steps so far have left everything finite. This waits for the device, once.

        Returns:
            the scalars of the last step; None if there was none.

        Raises:
            NonFiniteError: a step has not; the learners are as they were before it. With
                ``on_nonfinite="skip"`` they are as if it had been left out, and nothing is raised.
        """
        results = self._watch.look()
        return None if results is None else self._joined(results)

    def _take(self, source: Minibatches | TensorDictBase, steps: int) -> list[TensorDictBase]:
        """Take steps, up to the end of a block of minibatches, or one on a batch."""
        if isinstance(source, Minibatches):
            block, done = divmod(self.steps, BLOCK)
            transitions, indices = source(block)
            remaining = indices[done : done + steps]
            return self._advance([transitions] * len(self._programs), remaining)
        batches = source.unsqueeze(0) if len(self.losses) == 1 else source
        sources = [
            program.conformed(
                batches[rows].flatten(0, 1) if rows.stop - rows.start > 1 else batches[rows.start]
            )
            for program, rows in self._programs
        ]
        return self._advance(sources, None)

    def _advance(
        self, sources: Sequence[TensorDictBase], indices: Tensor | None
    ) -> list[TensorDictBase]:
        """Take as many steps as ``indices``, ``[steps, R, B]``, or one; return the last results."""
        steps = 1 if indices is None else len(indices)
        results = []
        for (program, rows), source in zip(self._programs, sources, strict=True):
            due = [self._optimizations[rows.start].due(self.steps + t) for t in range(steps)]
            program.columns(source)  # raises what does not fit, before anything has changed
            at, rates = None, self._rates(rows, steps)
            if indices is not None:
                at = indices[:, rows.start] if len(program.losses) == 1 else indices[:, rows]
            with self._streams[rows.start] if program.draws else nullcontext():
                taken = self._executor.take(program, source, at, rates, due)
            results.append(program.shared.results(taken.last))
            self._add(program.shared.results(taken.sums), rows)
        self._counted = [counted + steps for counted in self._counted]
        self.steps += steps
        if not self._is_stacked:  # of a stack's views autograd counts no versions
            self._held = self._present()
        return results

    def _add(self, sums: TensorDictBase, rows: slice) -> None:
        """Add to the totals of some learners."""
        found = {key: its.reshape(-1) for key, its in sums.items()}
        for key in [key for key in found if key not in self._totals]:  # in their order
            self._totals[key] = found[key].new_zeros(len(self.losses))
        torch._foreach_add_([self._totals[key][rows] for key in found], list(found.values()))  # pyright: ignore

    def _rates(self, rows: slice, steps: int) -> Tensor:
        """Return the next rates of some learners: ``[steps, R, networks, 6]``, without R for one."""
        block, done = divmod(self.steps, BLOCK)
        if (block, rows.start) not in self._tables:
            first, its = block * BLOCK, self._optimizations[rows]
            tables = np.stack([each.rates(first, BLOCK) for each in its], axis=1)
            table = torch.from_numpy(tables).to(self.device, non_blocking=True)
            self._tables = {key: kept for key, kept in self._tables.items() if key[0] == block}
            self._tables[block, rows.start] = table.squeeze(1) if len(its) == 1 else table
        return self._tables[block, rows.start][done : done + steps]

    def _joined(self, results: list[TensorDictBase]) -> TensorDictBase:
        """Return the scalars of all programs, ``[R]``, or those of a single learner."""
        learners, keys = len(self.losses), [k for k in results[0].keys() if k != "priority"]
        scalars = {key: [its[key].reshape(-1) for its in results] for key in keys}
        joined = {key: its[0] if len(its) == 1 else torch.cat(its) for key, its in scalars.items()}
        if self.on_nonfinite == "skip":
            joined["skipped"] = torch.tensor(self.skipped)
        if learners == 1:
            return TensorDict({key: value.squeeze(0) for key, value in joined.items()})
        return TensorDict(joined, batch_size=[learners])

    # --- State -----------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, list[float]]:
        """Return the present learning rate of each network, schedule included, one per learner."""
        networks = self._optimizations[0].networks
        return {
            network: [o.rate(network, self.steps) for o in self._optimizations]
            for network in networks
        }

    def state_dict(self, replica: int | None = None) -> dict[str, Any]:
        """Return all that one learner goes on with, copied.

        Networks and targets, coefficients of the loss (those that are not in its own state dict, too),
        learning rates and the other numbers of the optimisation, moments, random numbers and counter. A
        schedule is a function, and not saved. It is the same however the learner is trained: alone or
        among others, stacked or not.

        Args:
            replica: which learner, from 0; of one learner it needs not be said.

        Raises:
            IndexError, ValueError: there is no such learner, or several and it is not said which.
            NonFiniteError: as :meth:`check_finite`; nothing of such a step is saved.
        """
        replica = self.replica(replica)
        self.check_finite()
        loss = self.losses[replica]
        optimization = asdict(replace(self._optimizations[replica], schedule={}))
        del optimization["schedule"]
        return {
            "format": FORMAT,
            "loss": {key: value.clone() for key, value in loss.state_dict().items()},
            "coefficients": coefficients(loss),
            "optimization": optimization,
            "moments": {
                key: tuple(m.clone() for m in pair) for key, pair in self._moments(replica).items()
            },
            "random": [state.clone() for state in self._streams[replica].state],
            "steps": self.steps,
            "skipped": self.skipped[replica],
            "totals": {key: total[replica].item() for key, total in self._totals.items()},
            "counted": self._counted[replica],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], replica: int | None = None, *, keep: Collection[Own] = ()
    ) -> None:
        """Continue where :meth:`state_dict` was taken; before the next step, the others must, too.

        Args:
            state: of one learner.
            replica: which learner continues, as in :meth:`state_dict`.
            keep: what it keeps of its own, of ``"settings"``, ``"optimizer"`` and ``"random"``. With all
                three, it is a new learner that begins with these networks and targets.

        Raises:
            IndexError, ValueError: as :meth:`state_dict`.
            TypeError: ``keep`` is no collection of names.
            ValueError: the state is none of :meth:`state_dict`, of a later format, of other networks, or of
                another loss.
        """
        replica = self.replica(replica)
        if isinstance(keep, str):
            raise TypeError(f"keep must be a collection of names, as ({keep!r},), got {keep!r}")
        for each in keep:
            if each not in get_args(Own):
                raise ValueError(f"keep must hold some of {get_args(Own)}, got {each!r}")
        saved_format = state.get("format", 1)
        if saved_format > FORMAT:
            raise ValueError(
                f"the state has format {saved_format}, this version reads up to {FORMAT}: update "
                "torchrl-iql"
            )
        if lacks := [key for key in ("loss", "moments", "steps") if key not in state]:
            raise ValueError(
                f"the state is none of TrainStep.state_dict(): it has no {', '.join(lacks)}, and holds "
                f"{listed(list(state), NAMED) or 'nothing'}. What a loss's own state_dict() returned goes "
                "into its load_state_dict"
            )
        self._adopt()
        if saved_format == 1 and not self._is_stacked:
            raise ValueError(f"a state of format 1 is of stacked networks, these are {self.path}")
        loss, its = self.losses[replica], learned(self.losses[replica], state["loss"])
        own = loss.state_dict()
        found = {key: tuple(tensor.shape) for key, tensor in its.items()}
        expected = {key: tuple(tensor.shape) for key, tensor in learned(loss, own).items()}
        if others := [
            f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'nothing of this name')}"
            for key in {**expected, **found}
            if found.get(key) != expected.get(key)
        ]:
            raise ValueError(f"the state is of other parameters: {listed(others, NAMED, '; ')}")
        optimization = self._optimizations[replica]
        if "settings" not in keep:
            optimization = replace(optimization, **state.get("optimization", {}))
        if "optimizer" not in keep and saved_format > 1:
            trained = {n for n in its if network_of(n) in optimization.networks}
            missing = trained & dict(loss.named_parameters()).keys() - state["moments"].keys()
            if missing:
                raise ValueError(f"the state has no moments of {listed(sorted(missing), NAMED)}")
        if "settings" not in keep:
            persistent = {key: value for key, value in state["loss"].items() if key not in its}
            set_coefficients(loss, {**persistent, **state.get("coefficients", {})})
            self._optimizations[replica] = optimization
        loss.load_state_dict({**loss.state_dict(), **its})
        self._watch.forget()
        self._adopt()
        program, rows = self._program_of(replica)
        program.clear_padding(replica - rows.start)
        if "optimizer" not in keep:
            self._load_moments(state, replica)
            self._loaded = {**dict.fromkeys(range(len(self.losses)), self.steps), **self._loaded}
            self.steps = self._loaded[replica] = state["steps"]
            self.skipped[replica] = state.get("skipped", 0)
            self._load_totals(state.get("totals", {}), state.get("counted", 0), replica)
        if "random" not in keep and "random" in state:
            saved, stream = [random.cpu() for random in state["random"]], self._streams[replica]
            # A learner of a CPU has none of a GPU.
            stream.state = [*saved, *stream.state[len(saved) :]]

    def replica(self, replica: int | None) -> int:
        """Return which learner is meant, of one the only one.

        Raises:
            IndexError, ValueError: as :meth:`state_dict`.
        """
        learners = len(self.losses)
        if replica is None and learners > 1:
            raise ValueError(
                f"there are {learners} learners, each with a state of its own: give replica=0 to "
                f"{learners - 1}"
            )
        if not 0 <= (replica or 0) < learners:
            raise IndexError(f"there are {learners} learners, replica={replica!r} is none of them")
        return replica or 0

    def _load_moments(self, state: Mapping[str, Any], replica: int) -> None:
        program, _ = self._program_of(replica)
        saved = state["moments"]
        if state.get("format", 1) == 1:
            assert isinstance(program, StackedProgram)
            saved = program.moments_of_format_1(saved)
        for key, pair in self._moments(replica).items():
            for moment, its in zip(pair, saved[key], strict=True):
                moment.copy_(its)

    def _load_totals(self, totals: Mapping[str, Any], counted: int, replica: int) -> None:
        for key in [*totals, *(key for key in self._totals if key not in totals)]:
            if key not in self._totals:
                zeros = torch.zeros(len(self.losses), dtype=torch.float64, device=self.device)
                self._totals[key] = zeros
            self._totals[key][replica] = totals.get(key, 0.0)
        self._counted[replica] = counted

    def _mark(self) -> Mark:
        """Copy all that steps change, of all learners, on the device."""
        tensors = [[tensor.detach().clone() for tensor in _all(p)] for p, _ in self._programs]
        random = [list(stream.state) for stream in self._streams]
        totals = {key: total.clone() for key, total in self._totals.items()}
        return Mark(self.steps, tensors, random, totals, list(self._counted))

    def _restore(self, mark: Mark) -> None:
        """Return to a mark of this object."""
        for replica, (stream, state) in enumerate(zip(self._streams, mark.random, strict=True)):
            self._return(mark, replica)
            stream.state = list(state)
        self.steps = mark.steps

    @torch.no_grad()
    def _return(self, mark: Mark, replica: int) -> None:
        """Give a learner what it had at a mark; its steps and random numbers go on."""
        its_totals = {key: total[replica] for key, total in mark.totals.items()}
        self._load_totals(its_totals, mark.counted[replica], replica)
        for (program, rows), tensors in zip(self._programs, mark.tensors, strict=True):
            if rows.start <= replica < rows.stop:
                # Not strict: a loss may have made a buffer since.
                for tensor, its in zip(_all(program), tensors, strict=False):
                    if len(program.losses) > 1:
                        tensor, its = tensor[replica - rows.start], its[replica - rows.start]
                    tensor.copy_(its)

    def _learned(self) -> list[Tensor]:
        return [tensor for program, _ in self._programs for tensor in program.changing()[0]]

    def _program_of(self, replica: int) -> tuple[Program, slice]:
        return next(each for each in self._programs if each[1].start <= replica < each[1].stop)


class _Loads:
    """How often a state was loaded into a loss: in tensors of which autograd counts no versions."""

    def __init__(self, loss: nn.Module) -> None:
        self.count = 0
        loss.register_load_state_dict_post_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1


def _kind(loss: LossModule) -> tuple:
    """Return what of a loss, beside its tensors, decides how it is computed."""
    training = getattr(getattr(loss, "actor_network", None), "training", None)
    return plain(loss), dict(vars(loss.tensor_keys)), loss.loss_mask_key, training


def _all(program: Program) -> list[Tensor]:
    learned, following = program.changing()
    return [*learned, *following]


def _check_apart(losses: Sequence[LossModule]) -> None:
    """Refuse losses that learn the same tensor."""
    owners: dict[int, int] = {}
    for replica, loss in enumerate(losses):
        for name, parameter in loss.named_parameters():
            owner = owners.setdefault(parameter.data_ptr(), replica)
            if owner != replica and parameter.numel():
                raise ValueError(
                    f"losses {owner} and {replica} have the same {name}: each loss needs networks of its "
                    "own, made anew or copied with copy.deepcopy"
                )


def _per_learner(name: str, given: T | Sequence[T], learners: int) -> list[T]:
    if isinstance(given, (Mapping, str)) or not isinstance(given, Sequence):
        return [given] * learners  # pyright: ignore
    if len(given) != learners:
        raise ValueError(f"{name} must be one value or {learners}, got {given!r}")
    return list(given)
