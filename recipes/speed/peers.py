"""The contenders that are not ours: TorchRL's IQL loss in its own recipe, and IQL in JAX.

``update.py`` measures them beside our own. A contender has a ``name`` and a method ``run(steps)``, which
takes that many gradient steps and returns when the device has finished them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import CudaGraphModule, NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, SoftUpdate, group_optimizers

from torchrl_iql import models
from torchrl_iql_recipes.speed.timing import Contender, synchronize
from torchrl_iql_recipes.speed.work import Work

__all__ = ["TorchRL", "contenders"]

Execution = Literal["eager", "compiled", "CUDA graph"]
Policy = Literal["tanh_normal", "gaussian"]


class TorchRL:
    """``torchrl.objectives.IQLLoss`` as TorchRL's ``sota-implementations/iql/iql_offline.py`` uses it.

    Minibatches come without replacement from a memory-mapped replay buffer that prefetches four, and go
    to the device; one backward pass of the summed losses, one Adam over the grouped parameters, and
    ``SoftUpdate`` are one function. It is called as it is, or compiled as a whole in the recipe's mode,
    or compiled and replayed by ``CudaGraphModule``, for which Adam is made capturable.

    The networks have TorchRL's own initialisation and as many hidden units as all others here. The loss
    evaluates the target Q networks and V(s) twice, which is part of what is measured.

    Args:
        work: what to do in a step.
        execution: how the function is called.
        policy: ``"tanh_normal"``, the recipe's, whose MLP puts out mean and deviation; or
            ``"gaussian"``, the policy of all other contenders. Their products differ by 0.3 %.
        data_on_device: keep the data on the device and sample there, which the recipe does not.

    Attributes:
        name: of the contender.
        replicas: 1, the number of learners.
        loss: the loss, with the networks in training.
        optimizer: over all networks.
        buffer: that minibatches come from.
    """

    replicas = 1

    def __init__(
        self,
        work: Work,
        execution: Execution = "eager",
        *,
        policy: Policy = "tanh_normal",
        data_on_device: bool = False,
    ) -> None:
        if execution not in get_args(Execution):
            raise ValueError(f"execution must be one of {get_args(Execution)}, got {execution!r}")
        if execution == "CUDA graph" and work.device != "cuda":
            raise ValueError(f"a CUDA graph needs device 'cuda', got {work.device!r}")
        self.name = _name(execution, policy, data_on_device)
        self.device = work.device
        torch.manual_seed(work.seed)
        self.loss = _loss(work, policy)
        self.optimizer = _optimizer(self.loss, work, capturable=execution == "CUDA graph")
        self.buffer = _buffer(work, data_on_device)
        self._target = SoftUpdate(self.loss, tau=work.target_rate)
        self._step = self._executable(execution)

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        for _ in range(steps):
            batch = self.buffer.sample().to(self.device)
            torch.compiler.cudagraph_mark_step_begin()
            self._step(batch)
        synchronize(self.device)

    def _update(self, batch: TensorDictBase) -> TensorDictBase:
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.loss(batch)
        (losses["loss_actor"] + losses["loss_value"] + losses["loss_qvalue"]).backward()
        self.optimizer.step()
        self._target.step()
        return losses.detach()

    def _executable(self, execution: Execution) -> Callable[[TensorDictBase], TensorDictBase]:
        if execution == "eager":
            return self._update
        graph = execution == "CUDA graph"
        # Nothing shared: else the shapes of one contender become dynamic in the next one, and the
        # last ones are over the limit of recompilations and run eagerly.
        compiled = torch.compile(
            self._update,
            mode="default" if graph else "reduce-overhead",
            dynamic=False,
            isolate_recompiles=True,
        )
        return CudaGraphModule(compiled, in_keys=[], out_keys=[], warmup=50) if graph else compiled


def contenders(work: Work, replicas: tuple[int, ...] = ()) -> dict[str, Callable[[], Contender]]:
    """Return how to build each contender that the device allows, by name.

    Args:
        work: what to do in a step.
        replicas: numbers of learners that JAX trains at once, beside the single one.
    """
    variants: list[tuple[Execution, Policy, bool]] = [
        ("eager", "tanh_normal", False),
        ("compiled", "tanh_normal", False),
        ("compiled", "gaussian", False),
    ]
    if work.device == "cuda":
        variants.append(("compiled", "tanh_normal", True))
        variants.append(("CUDA graph", "tanh_normal", True))
        variants.append(("CUDA graph", "gaussian", True))
    builders: dict[str, Callable[[], Contender]] = {
        _name(execution, policy, on_device): partial(
            TorchRL, work, execution, policy=policy, data_on_device=on_device
        )
        for execution, policy, on_device in variants
    }
    for number in (1, *replicas):
        builders[_jax_name(number)] = partial(_jax, work, number)
    return builders


def _name(execution: Execution, policy: Policy, data_on_device: bool) -> str:
    name = f"TorchRL, {execution}"
    name += ", our policy" if policy == "gaussian" else ""
    return name + (", data on the device" if data_on_device else "")


def _jax_name(replicas: int) -> str:
    return "JAX" if replicas == 1 else f"JAX, {replicas} learners"


def _jax(work: Work, replicas: int) -> Contender:
    from torchrl_iql_recipes.speed.jax_iql import (
        JaxIQL,  # optional, and only imported when asked for
    )

    return JaxIQL(work, name=_jax_name(replicas), replicas=replicas)


def _loss(work: Work, policy: Policy) -> IQLLoss:
    observation, action = work.observation_size, work.action_size
    hidden = {"num_cells": list(work.hidden_sizes), "activation_class": nn.ReLU}
    qvalue = MLP(in_features=observation + action, out_features=1, **hidden)
    value = MLP(in_features=observation, out_features=1, **hidden)
    if policy == "gaussian":
        actor = models.gaussian_policy(observation, action, hidden_sizes=work.hidden_sizes)
    else:
        actor = _tanh_normal_policy(
            MLP(in_features=observation, out_features=2 * action, **hidden), work
        )
    loss = IQLLoss(
        actor.to(work.device),
        ValueOperator(qvalue, in_keys=["observation", "action"]).to(work.device),
        value_network=ValueOperator(value, in_keys=["observation"]).to(work.device),
        num_qvalue_nets=work.num_qvalue_nets,
        loss_function="l2",
        temperature=work.temperature,
        expectile=work.expectile,
    )
    loss.make_value_estimator(gamma=work.discount, device=torch.device(work.device))
    return loss


def _tanh_normal_policy(mlp: nn.Module, work: Work) -> ProbabilisticActor:
    bound = torch.ones(work.action_size, device=work.device)
    scale = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp, scale), in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -bound, "high": bound, "tanh_loc": False},
    )


def _optimizer(loss: IQLLoss, work: Work, capturable: bool) -> torch.optim.Optimizer:
    networks = loss.actor_network_params, loss.qvalue_network_params, loss.value_network_params
    return group_optimizers(
        *(
            torch.optim.Adam(
                list(network.flatten_keys().values()), lr=work.learning_rate, capturable=capturable
            )
            for network in networks
        )
    )


def _buffer(work: Work, data_on_device: bool) -> TensorDictReplayBuffer:
    if data_on_device:
        storage, prefetch = LazyTensorStorage(work.transitions, device=work.device), None
    else:
        storage, prefetch = LazyMemmapStorage(work.transitions), 4
    buffer = TensorDictReplayBuffer(
        storage=storage,
        sampler=SamplerWithoutReplacement(drop_last=True),
        batch_size=work.batch_size,
        prefetch=prefetch,
    )
    buffer.extend(work.data())
    return buffer
