"""The forward pass of the losses on bare tensors, for the networks of :mod:`torchrl_iql.models`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.modules import IndependentNormal
from torchrl.objectives import LossModule

from torchrl_iql.objectives.iql import (
    DiscreteIQLLoss,
    IQLLoss,
    Outputs,
    at_least_float32,
    takes_stacked_parameters,
)

__all__ = ["DirectEvaluation"]


class DirectEvaluation:
    """What ``loss(batch)`` returns, to the last bit, in two thirds of the time.

    Putting parameters into a functional module and tensors into a TensorDict, and taking both out
    again, five times a step, costs as much as networks of this size. Here copies of the networks hold
    the tensors of the loss for good: whoever changes one changes the other. Moving or casting the loss
    replaces some of its tensors; make a new evaluation after that.

    Args:
        loss: a loss for which :meth:`of` does not return None.
    """

    def __init__(self, loss: IQLLoss) -> None:
        self.loss = loss
        self.v = loss.get_stateful_net("value_network").module
        self.q = loss.get_stateful_net("qvalue_network").module
        self.target_q = deepcopy(loss.qvalue_network).module
        loss.target_qvalue_network_params["module"].to_module(
            self.target_q, preserve_module_state=False
        )
        policy = loss.get_stateful_net("actor_network")
        self.gaussian: Callable[..., tuple[Tensor, Tensor]] | None = None
        if isinstance(policy, ProbabilisticTensorDictSequential):
            ours = takes_stacked_parameters(policy[0])
            if ours and policy[-1].distribution_class is IndependentNormal:
                self.gaussian = policy[0].module  # pyright: ignore

    @classmethod
    def of(cls, loss: LossModule) -> DirectEvaluation | None:
        """None unless loss and networks are of this package, and the keys are the usual ones."""
        if not isinstance(loss, IQLLoss) or type(loss) not in (IQLLoss, DiscreteIQLLoss):
            return None
        inputs = ["observation"] if isinstance(loss, DiscreteIQLLoss) else ["observation", "action"]
        usual = (
            loss.num_qvalue_nets > 1
            and takes_stacked_parameters(loss.qvalue_network)
            and takes_stacked_parameters(loss.value_network)
            and loss.qvalue_network.in_keys == inputs
            and loss.value_network.in_keys == ["observation"]
            and loss.tensor_keys == loss.default_keys()
        )
        return cls(loss) if usual else None

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        loss, observation = self.loss, td.get("observation")
        inputs = [td.get(key) for key in loss.qvalue_network.in_keys]
        with torch.no_grad():
            target_q = loss.at_action(td, self.target_q(*inputs))
            next_v = at_least_float32(self.v(td.get(("next", "observation"))).squeeze(-1))
        if self.gaussian is None:
            log_prob = loss.log_likelihood(td)
        else:
            distribution = IndependentNormal(*self.gaussian(observation), validate_args=False)
            log_prob = distribution.log_prob(td.get("action"))
        outputs = Outputs(
            log_prob=at_least_float32(log_prob),
            target_q=at_least_float32(target_q),
            q=at_least_float32(loss.at_action(td, self.q(*inputs))),
            v=at_least_float32(self.v(observation).squeeze(-1)),
            td_target=loss.td_target(td, next_v),
        )
        return loss.losses(td, outputs)
