"""How the losses are descended: what is given to a training step, resolved for every network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import numpy as np
from torch.nn import Module
from torchrl import objectives
from torchrl.objectives.common import LossModule

from torchrl_iql.objectives import (
    AWACLoss,
    BCLoss,
    CQLLoss,
    DiscreteIQLLoss,
    DTLoss,
    FQELoss,
    IQLLoss,
    TD3BCLoss,
)
from torchrl_iql.training.adam import BETAS, EPSILON, Rates

__all__ = ["Optimization", "Schedule", "cosine_decay", "network_of", "target_networks", "warm_up"]

Schedule = Callable[[int], float]
"""The factor of a learning rate after so many gradient steps."""

T = TypeVar("T")

DESCENDED: dict[type, tuple[str, ...]] = {
    AWACLoss: ("loss_actor", "loss_qvalue"),
    FQELoss: ("loss_qvalue",),
    IQLLoss: ("loss_actor", "loss_qvalue", "loss_value"),
    DiscreteIQLLoss: ("loss_actor", "loss_qvalue", "loss_value"),
    objectives.IQLLoss: ("loss_actor", "loss_qvalue", "loss_value"),
    objectives.DiscreteIQLLoss: ("loss_actor", "loss_qvalue", "loss_value"),
    objectives.BCLoss: ("loss_bc",),
    BCLoss: ("loss_bc",),
    objectives.DQNLoss: ("loss",),
    objectives.SACLoss: ("loss_actor", "loss_qvalue", "loss_alpha"),
    objectives.TD3BCLoss: ("loss_actor", "loss_qvalue"),
    TD3BCLoss: ("loss_actor", "loss_qvalue"),
    # Not loss_actor_bc, by which its recipe replaces loss_actor in the first steps.
    objectives.CQLLoss: ("loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"),
    CQLLoss: ("loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"),
    objectives.DTLoss: ("loss",),
    DTLoss: ("loss_actor",),
}
"""What is descended of the losses that are known; which entries these are, no rule tells."""


def cosine_decay(steps: int) -> Schedule:
    """Make a schedule that falls from 1 to 0 by half a cosine, and stays there.

    Args:
        steps: its length, at least 1.
    """
    _require_length(steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def warm_up(steps: int) -> Schedule:
    """Make a schedule that rises linearly to 1, which it reaches at step ``steps - 1``.

    Args:
        steps: its length, at least 1.
    """
    _require_length(steps)
    return lambda step: min((step + 1) / steps, 1.0)


def network_of(name: str) -> str:
    """Name the network that a loss's parameter belongs to, as ``"actor_network"``; else its name."""
    return name.partition("_params.")[0] if "_params." in name else name


def target_networks(loss: Module) -> list[str]:
    """Find the networks of a loss that have a slow copy."""
    prefix, suffix = "target_", "_params"
    return [
        name[len(prefix) : -len(suffix)]
        for name, module in loss._modules.items()
        if name.startswith(prefix) and name.endswith(suffix) and module is not None
    ]


@dataclass(frozen=True)
class Optimization:
    """The settings of :class:`~torchrl_iql.TrainStep`, checked, for one learner.

    Attributes:
        entries: what is descended of the output of the loss.
        learning_rate: by network that is trained.
        schedule: by network; without one the learning rate is constant.
        weight_decay: by network.
        max_grad_norm: of all networks together, or by network, or None.
        every: steps from one update to the next, by network.
        target_rate: by network that has targets.
        target_every: steps from one update of the targets to the next.
    """

    entries: tuple[str, ...]
    learning_rate: dict[str, float]
    schedule: dict[str, Schedule]
    weight_decay: dict[str, float]
    max_grad_norm: float | dict[str, float] | None
    every: dict[str, int]
    target_rate: dict[str, float]
    target_every: int

    @classmethod
    def of(
        cls,
        loss: LossModule,
        *,
        entries: Sequence[str] | None,
        learning_rate: float | Mapping[str, float],
        schedule: Mapping[str, Schedule],
        weight_decay: float | Mapping[str, float],
        max_grad_norm: float | Mapping[str, float] | None,
        every: Mapping[str, int],
        target_rate: float | Mapping[str, float],
        target_every: int,
    ) -> Optimization:
        """Resolve what was given for the networks of a loss.

        Raises:
            TypeError, ValueError: a value is out of range, or a name is none of a network of the loss.
        """
        found = list(dict.fromkeys(network_of(name) for name, _ in loss.named_parameters()))
        if not found:
            raise ValueError(f"{type(loss).__name__} has no parameters to train")
        rates = _by_network("learning_rate", learning_rate, found, "(0, inf)", _positive)
        trained = list(rates)
        slow = target_networks(loss)
        norm = max_grad_norm
        if isinstance(norm, Mapping):
            norm = _by_network("max_grad_norm", norm, trained, "(0, inf)", _positive)
        elif norm is not None and not _positive(norm):
            raise ValueError(f"max_grad_norm must be in (0, inf), got {norm!r}")
        if not isinstance(schedule, Mapping):
            raise TypeError(
                f"schedule must be given by network, as {{{found[0]!r}: cosine_decay(1000)}}, "
                f"got {schedule!r}"
            )
        _known("schedule", schedule, trained)
        for name, its in schedule.items():
            if not callable(its):
                raise TypeError(
                    f"schedule of {name} must be a function, as cosine_decay(1000), got {its!r}"
                )
        if not _count(target_every):
            raise ValueError(f"target_every must be an integer of at least 1, got {target_every!r}")
        return cls(
            entries=_entries(loss, entries),
            learning_rate=rates,
            schedule=dict(schedule),
            weight_decay=dict.fromkeys(trained, 0.0)
            | _by_network("weight_decay", weight_decay, trained, "[0, inf)", _not_negative),
            max_grad_norm=norm,
            every=dict.fromkeys(trained, 1)
            | _by_network("every", every, trained, "1, 2, ...", _count),
            target_rate=_by_network("target_rate", target_rate, slow, "(0, 1]", _fraction),
            target_every=target_every,
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are trained."""
        return tuple(self.learning_rate)

    def due(self, step: int) -> frozenset[str]:
        """Return the networks that are updated in a step, and ``"targets"`` if those are."""
        networks = {name for name, every in self.every.items() if (step + 1) % every == 0}
        return frozenset(networks | ({"targets"} if (step + 1) % self.target_every == 0 else set()))

    def rate(self, network: str, step: int) -> float:
        """Return the learning rate of a network after ``step`` steps."""
        factor = self.schedule[network](step) if network in self.schedule else 1.0
        return self.learning_rate[network] * factor

    def rates(self, first: int, steps: int) -> np.ndarray:
        """Return :class:`~torchrl_iql.training.adam.Rates` of steps, ``[steps, networks, 6]``, float64.

        The last column is empty: rows begin at multiples of 16 bytes, as compiled code wants it.
        """
        step = np.arange(first, first + steps)
        table = np.zeros((steps, len(self.networks), len(Rates._fields) + 1))
        for k, network in enumerate(self.networks):
            # A delayed network has taken fewer updates. Before its first one the numbers are not read.
            count = np.maximum((step + 1) // self.every[network], 1).astype(np.float64)
            first_correction, second_correction = (1 - beta**count for beta in BETAS)
            root = np.sqrt(second_correction)
            rate = np.array([self.rate(network, int(t)) for t in step])
            columns = {
                "step_size": rate * root / first_correction,
                "epsilon": EPSILON * root,
                "decay": 1 - rate * self.weight_decay[network],
                "learning_rate": rate,
                "count": count,
            }
            for name, column in columns.items():
                table[:, k, Rates._fields.index(name)] = column
        return table


def _entries(loss: LossModule, entries: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(entries, str):
        raise TypeError(f"entries must be a sequence of names, got {entries!r}")
    if entries is not None:
        if not entries or len(set(entries)) < len(entries):
            raise ValueError(f"entries must be one or more different names, got {entries!r}")
        return tuple(entries)
    if type(loss) not in DESCENDED:
        raise ValueError(
            f"which entries of {type(loss).__name__} are to be descended? It writes "
            f"{list(loss.out_keys)}: give entries=(...)"
        )
    known = DESCENDED[type(loss)]
    optional = ("loss_alpha_prime", "loss_value")  # CQL's Lagrangian, the first version of SAC
    return known + tuple(key for key in optional if key in loss.out_keys and key not in known)


def _by_network(
    setting: str,
    given: T | Mapping[str, T],
    networks: Sequence[str],
    interval: str,
    within: Callable[[object], bool],
) -> dict[str, T]:
    """Resolve one value for all networks, or those given by name."""
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(networks, given)
    _known(setting, values, networks)
    for value in [given] if not isinstance(given, Mapping) else values.values():
        if not within(value):
            raise ValueError(f"{setting} must be in {interval}, got {given!r}")
    return {name: values[name] for name in networks if name in values}  # pyright: ignore


def _known(setting: str, given: Mapping, networks: Sequence[str]) -> None:
    for name in given:
        if name not in networks:
            raise ValueError(f"{setting} names {name!r}, which is none of {list(networks)}")


def _require_length(steps: object) -> None:
    if not (isinstance(steps, Real) and steps >= 1):  # pyright: ignore
        raise ValueError(f"steps must be at least 1, got {steps!r}")


def _positive(value: object) -> bool:
    return isinstance(value, Real) and 0 < float(value) < math.inf


def _not_negative(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _fraction(value: object) -> bool:
    return isinstance(value, Real) and 0 < float(value) <= 1


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
