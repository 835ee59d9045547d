"""How long a gradient step of any loss takes, in a training step and in the plain loop around the loss.

    python recipes/speed/losses.py --only SAC CQL --rounds 5

The losses of TorchRL, and ours on networks of one's own, all ``nn.Sequential``; sizes and data are those of
``work.py``. The plain loop is the README's: the loss, a replay buffer, ``torch.optim.Adam``, ``SoftUpdate``.
Compiled, it is what users compile, ``torch.compile(loss)``; the backward pass comes with it, and the buffer,
Adam and the targets stay as they are. A training step compiles all of it. Every contender has a process of
its own; those of a loss take turns, and ratios are taken within a round. The exit status is 1 if a training
step fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl import objectives
from torchrl.data import Bounded, Categorical
from torchrl.modules import (
    Actor,
    IndependentNormal,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_iql import IQLLoss, TrainStep
from torchrl_iql.data import Minibatches
from torchrl_iql.training import Execution
from torchrl_iql_recipes.speed import update
from torchrl_iql_recipes.speed.ours import replay_buffer
from torchrl_iql_recipes.speed.timing import Contender, Result, synchronize
from torchrl_iql_recipes.speed.update import (
    chosen,
    conclude,
    configure,
    parse,
    parser,
    race,
    work_of,
)
from torchrl_iql_recipes.speed.work import Work

__all__ = [
    "LOSSES",
    "Plain",
    "Step",
    "build_loss",
    "contenders",
    "data_for",
    "heading",
    "pairs",
    "row",
]

Way = Literal["eager", "compiled"]

QUICK = {**update.QUICK, "only": ("TorchRL's IQLLoss",), "ways": ("eager",)}


# --- The losses --------------------------------------------------------------------------------------


def mlp(work: Work, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in work.hidden_sizes:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class StateAction(nn.Module):
    """Q(s, a) of one's own."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.mlp = mlp(work, work.observation_size + work.action_size, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.mlp(torch.cat([observation, action], dim=-1))


def actions(work: Work) -> Bounded:
    return Bounded(-1, 1, (work.action_size,))


def stochastic(work: Work, distribution: type = TanhNormal) -> ProbabilisticActor:
    network = mlp(work, work.observation_size, 2 * work.action_size)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(network, NormalParamExtractor()), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=actions(work),
        distribution_class=distribution,
    )


def deterministic(work: Work) -> Actor:
    network = nn.Sequential(mlp(work, work.observation_size, work.action_size), nn.Tanh())
    return Actor(network, in_keys=["observation"], spec=actions(work))


def qvalue(work: Work) -> ValueOperator:
    return ValueOperator(StateAction(work), in_keys=["observation", "action"])


def value(work: Work) -> ValueOperator:
    return ValueOperator(mlp(work, work.observation_size, 1), in_keys=["observation"])


def bc(work: Work) -> LossModule:
    return objectives.BCLoss(stochastic(work, IndependentNormal))


def dqn(work: Work) -> LossModule:
    network = QValueActor(
        mlp(work, work.observation_size, work.action_size),
        in_keys=["observation"],
        spec=Categorical(work.action_size),
    )
    return objectives.DQNLoss(network, action_space="categorical", delay_value=True)


def torchrl_iql(work: Work) -> LossModule:
    return objectives.IQLLoss(stochastic(work), qvalue(work), value(work))


def sac(work: Work) -> LossModule:
    return objectives.SACLoss(stochastic(work), qvalue(work), action_spec=actions(work))


def td3_bc(work: Work) -> LossModule:
    return objectives.TD3BCLoss(deterministic(work), qvalue(work), action_spec=actions(work))


def cql(work: Work) -> LossModule:
    return objectives.CQLLoss(stochastic(work), qvalue(work), action_spec=actions(work))


def dt(work: Work) -> LossModule:
    return objectives.DTLoss(deterministic(work))


def our_iql(work: Work) -> LossModule:
    qvalues = [qvalue(work) for _ in range(work.num_qvalue_nets)]
    return IQLLoss(stochastic(work, IndependentNormal), qvalues, value(work))


IQL = ("loss_actor", "loss_qvalue", "loss_value")
LOSSES: dict[str, tuple[Callable[[Work], LossModule], tuple[str, ...]]] = {
    "BCLoss": (bc, ("loss_bc",)),
    "DQNLoss": (dqn, ("loss",)),
    "TorchRL's IQLLoss": (torchrl_iql, IQL),
    "SACLoss": (sac, ("loss_actor", "loss_qvalue", "loss_alpha")),
    "TD3BCLoss": (td3_bc, ("loss_actor", "loss_qvalue")),
    "CQLLoss": (cql, ("loss_actor", "loss_qvalue", "loss_cql", "loss_alpha")),
    "DTLoss": (dt, ("loss",)),
    "IQLLoss": (our_iql, IQL),
}
"""Each loss, and what its recipe descends."""


def build_loss(name: str, work: Work) -> LossModule:
    """Build a loss on the device, on freshly initialised networks."""
    torch.manual_seed(work.seed)
    return LOSSES[name][0](work).to(work.device)


def data_for(name: str, work: Work) -> TensorDict:
    """Return the transitions of ``work``, for DQN with actions that are counted."""
    data = work.data()
    if name == "DQNLoss":
        generator = torch.Generator().manual_seed(work.seed)
        data["action"] = torch.randint(work.action_size, (work.transitions,), generator=generator)
    return data


# --- The contenders ----------------------------------------------------------------------------------


class Plain:
    """The loss, a replay buffer, Adam and SoftUpdate, as the README writes them.

    Args:
        loss: its name.
        work: what to do in a step.
        way: ``"compiled"``, the loss is ``torch.compile(loss)``.

    Attributes:
        name: of the contender.
        replicas: 1.
        loss: in training.
    """

    replicas = 1

    def __init__(self, loss: str, work: Work, way: Way) -> None:
        self.name = plain_name(way)
        self.device = work.device
        self.entries = LOSSES[loss][1]
        self.loss = build_loss(loss, work)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=work.learning_rate)
        followed = any(name.startswith("target_") for name in self.loss.state_dict())
        self.target = SoftUpdate(self.loss, tau=work.target_rate) if followed else None
        self.buffer = replay_buffer(work, data_for(loss, work))
        self._losses = torch.compile(self.loss) if way == "compiled" else self.loss

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        for _ in range(steps):
            losses = self._losses(self.buffer.sample())
            self.optimizer.zero_grad()
            sum(losses[entry] for entry in self.entries).backward()  # pyright: ignore
            self.optimizer.step()
            if self.target is not None:
                self.target.step()
        synchronize(self.device)


class Step:
    """The training step on minibatches of its own.

    Args:
        loss: its name.
        work: what to do in a step.
        execution: how.

    Attributes:
        name: of the contender.
        replicas: 1.
        loss: in training.
    """

    replicas = 1

    def __init__(self, loss: str, work: Work, execution: Execution) -> None:
        self.name = step_name(execution)
        self.loss = build_loss(loss, work)
        self.step = TrainStep(
            self.loss,
            learning_rate=work.learning_rate,
            target_rate=work.target_rate,
            execution=execution,
        )
        self.minibatches = Minibatches(
            data_for(loss, work), work.batch_size, seeds=[work.seed], device=work.device
        )

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        self.step.run(self.minibatches, steps)
        synchronize(self.step.device.type)


def plain_name(way: Way) -> str:
    return f"plain loop, {way}"


def step_name(execution: Execution) -> str:
    return f"TrainStep, {execution}"


def pairs(device: str, ways: Sequence[Way]) -> list[tuple[Way, Execution]]:
    """Return what is compared: a plain loop, and a training step."""
    found: list[tuple[Way, Execution]] = [(way, way) for way in ways]
    if device == "cuda" and "compiled" in ways:
        found.append(("compiled", "cudagraph"))
    return found


def contenders(loss: str, work: Work, ways: Sequence[Way]) -> dict[str, Callable[[], Contender]]:
    """Return how to build each contender of a loss, by name."""
    builders: dict[str, Callable[[], Contender]] = {}
    for way, execution in pairs(work.device, ways):
        builders[plain_name(way)] = partial(Plain, loss, work, way)
        builders[step_name(execution)] = partial(Step, loss, work, execution)
    return builders


# --- The table ---------------------------------------------------------------------------------------


def heading(compared: Sequence[tuple[Way, Execution]]) -> list[str]:
    """Write the first two lines of a Markdown table: a column of updates per second, or of ratios.

    Args:
        compared: of :func:`pairs`.
    """
    names = [
        contender if other is None else f"times {other}" for contender, other in _columns(compared)
    ]
    return [_line(["loss", *names]), _line(["---"] + ["---:"] * len(names))]


def row(loss: str, results: Sequence[Result], compared: Sequence[tuple[Way, Execution]]) -> str:
    """Write the line of a loss: medians, ratios being taken within a round.

    Args:
        loss: its name.
        results: of its contenders that worked.
        compared: of :func:`pairs`.
    """
    rates = {result.name: np.array(result.rates) for result in results}
    return _line([loss, *(_cell(rates, *column) for column in _columns(compared))])


def _columns(compared: Sequence[tuple[Way, Execution]]) -> list[tuple[str, str | None]]:
    """Return the contender of each, and what it is divided by, if by anything."""
    columns: list[tuple[str, str | None]] = []
    for way, execution in compared:
        plain, step = plain_name(way), step_name(execution)
        columns += [] if (plain, None) in columns else [(plain, None)]
        columns += [(step, None), (step, plain)]
    return columns


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(rates: Mapping[str, np.ndarray], name: str, other: str | None) -> str:
    """Write the median rate of one, or the median ratio of two."""
    if name not in rates or (other is not None and other not in rates):
        return "-"
    if other is None:
        return f"{np.median(rates[name]):,.0f}"
    return f"{np.median(rates[name] / rates[other]):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        the exit status: 1 if a training step failed.
    """
    options = parse(_parser(), QUICK, arguments)
    setting = partial(configure, options.threads, options.precision)
    setting()
    work = work_of(options)
    compared = pairs(work.device, options.ways)
    results: dict[str, list[Result]] = {}
    failed = []
    print("\n".join(heading(compared)), flush=True)
    for loss in LOSSES:
        if not chosen(loss, options.only):
            continue
        builders = contenders(loss, work, options.ways)
        results[loss] = race(builders, options, setting)
        measured = {result.name for result in results[loss]}
        steps = [step_name(execution) for _, execution in compared]
        failed += [f"{loss} in {step}" for step in steps if step not in measured]
        print(row(loss, results[loss], compared), flush=True)
    return conclude(options, failed, {"losses": results}, work=asdict(work))


def _parser() -> argparse.ArgumentParser:
    described = parser(__doc__)
    described.add_argument("--ways", nargs="+", choices=get_args(Way), default=get_args(Way))
    return described


if __name__ == "__main__":
    sys.exit(main())
