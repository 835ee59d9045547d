"""This project's contenders: the training step in each way of executing it, and the loop of the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tensordict import TensorDict
from torchrl.data import ImmutableDatasetWriter, RandomSampler, ReplayBuffer, TensorStorage
from torchrl.objectives import SoftUpdate

from torchrl_iql import IQLLoss, TrainStep, models
from torchrl_iql.data import Minibatches
from torchrl_iql.training import Execution
from torchrl_iql_recipes.speed.timing import Contender, synchronize
from torchrl_iql_recipes.speed.work import Work

__all__ = ["Calls", "Loop", "Step", "contenders", "replay_buffer"]


def contenders(work: Work, replicas: Sequence[int] = ()) -> dict[str, Callable[[], Contender]]:
    """Return how to build each contender that the device allows, by name.

    Args:
        work: what to do in a step.
        replicas: numbers of learners that are trained at once, beside the single one.
    """
    on_gpu = work.device == "cuda"
    ways: list[Execution] = ["eager", "compiled", "cudagraph"] if on_gpu else ["eager", "compiled"]
    steps: list[tuple[Execution, int, bool]] = [(way, 1, False) for way in ways]
    steps += [(ways[-1], number, False) for number in replicas]
    steps += [(ways[-1], 1, True)]
    return {
        Loop.name: partial(Loop, work),
        **{
            step_name(way, number, streaming): partial(
                Step, work, way, replicas=number, streaming=streaming
            )
            for way, number, streaming in steps
        },
        calls_name(ways[-1]): partial(Calls, work, ways[-1]),
    }


def step_name(execution: Execution, replicas: int, streaming: bool) -> str:
    name = f"torchrl-iql, {execution}"
    name += f", {replicas} learners" if replicas > 1 else ""
    return name + (", streaming" if streaming else "")


def calls_name(execution: Execution) -> str:
    return f"{step_name(execution, 1, False)}, step(batch)"


def replay_buffer(work: Work, data: TensorDict) -> ReplayBuffer:
    """Put all transitions on the device, to be sampled there uniformly with replacement."""
    return ReplayBuffer(
        storage=TensorStorage(data.to(work.device), device=work.device),
        sampler=RandomSampler(),
        writer=ImmutableDatasetWriter(),
        batch_size=work.batch_size,
    )


def loss_for(work: Work, seed: int) -> IQLLoss:
    """Build a loss on the device, with freshly initialised networks."""
    torch.manual_seed(seed)
    sizes = work.observation_size, work.action_size
    hidden = {"hidden_sizes": work.hidden_sizes}
    loss = IQLLoss(
        models.gaussian_policy(*sizes, **hidden),
        models.qvalue_ensemble(*sizes, num=work.num_qvalue_nets, **hidden),
        models.value_network(work.observation_size, **hidden),
        num_qvalue_nets=work.num_qvalue_nets,
        expectile=work.expectile,
        temperature=work.temperature,
    )
    loss.make_value_estimator(gamma=work.discount)
    return loss.to(work.device)


class Step:
    """The training step on minibatches of its own.

    Args:
        work: what to do in a step.
        execution: how.
        replicas: the number of learners. With more than one, a step is one of each.
        streaming: whether the data stay in main memory.

    Attributes:
        name: of the contender.
        replicas: the number of learners.
    """

    def __init__(
        self, work: Work, execution: Execution, *, replicas: int = 1, streaming: bool = False
    ) -> None:
        self.name = step_name(execution, replicas, streaming)
        self.replicas = replicas
        seeds = range(work.seed, work.seed + replicas)
        losses = [loss_for(work, seed) for seed in seeds]
        self.step = TrainStep(
            losses,
            learning_rate=work.learning_rate,
            target_rate=work.target_rate,
            execution=execution,
        )
        self.minibatches = Minibatches(
            work.data(), work.batch_size, seeds=seeds, device=work.device, streaming=streaming
        )

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        self.step.run(self.minibatches, steps)
        synchronize(self.step.device.type)


class Calls:
    """The training step called with batches of a replay buffer, one after the other.

    Args:
        work: what to do in a step.
        execution: how.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    replicas = 1

    def __init__(self, work: Work, execution: Execution) -> None:
        self.name = calls_name(execution)
        self.step = TrainStep(
            loss_for(work, work.seed),
            learning_rate=work.learning_rate,
            target_rate=work.target_rate,
            execution=execution,
        )
        self.buffer = replay_buffer(work, work.data())

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        for _ in range(steps):
            self.step(self.buffer.sample())
        synchronize(self.step.device.type)


class Loop:
    """The loop of the README: the loss, a replay buffer, Adam, and TorchRL's target updater.

    Args:
        work: what to do in a step.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    name = "torchrl-iql, the loss in a loop"
    replicas = 1

    def __init__(self, work: Work) -> None:
        self.device = work.device
        self.loss = loss_for(work, work.seed)
        self.target = SoftUpdate(self.loss, tau=work.target_rate)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=work.learning_rate, fused=True)
        self.buffer = replay_buffer(work, work.data())

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        for _ in range(steps):
            losses = self.loss(self.buffer.sample())
            self.optimizer.zero_grad()
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
            self.optimizer.step()
            self.target.step()
        synchronize(self.device)
