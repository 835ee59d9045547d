"""One step of policy improvement (Brandfonbrener et al., 2021), by IQL's losses at expectile 0.5.

V is then the mean of Q over the actions of the data, and Q that of the behaviour: what SARSA
learns. The policy is improved on it once, by the same weighted regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torchrl_iql_recipes.algorithms.base import Algorithm
from torchrl_iql_recipes.algorithms.iql import IQL
from torchrl_iql_recipes.experiment.schema import AXIS, Count, NotNegative, Positive, Rate

if TYPE_CHECKING:
    from torchrl_iql_recipes.experiment.networks import Networks

    from torchrl_iql import IQLLoss


class OneStep(Algorithm):
    """IQL without its expectile; the other settings mean what they mean there."""

    title: ClassVar[str] = "one-step RL"
    of_networks: ClassVar[tuple[str, ...]] = ("num_qvalue_nets",)

    discount: Annotated[Rate, AXIS] = Field(0.99, description="of rewards, per step")
    target_rate: Rate = Field(0.005, description="of the target networks, per gradient step")
    temperature: Annotated[NotNegative, AXIS] = Field(
        3.0, description="inverse: 0 is behaviour cloning, large is greedy"
    )
    weight_clip: Positive = Field(
        100.0, description="the largest weight of an action in the policy's loss"
    )
    num_qvalue_nets: Count = Field(1, description="the smallest of their values counts")

    def loss(self, networks: Networks) -> IQLLoss:
        return IQL(expectile=0.5, **self.model_dump()).loss(networks)

    def optimization(self, steps: int) -> dict[str, Any]:
        return IQL(expectile=0.5, **self.model_dump()).optimization(steps)
