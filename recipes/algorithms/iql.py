"""Implicit Q-Learning (Kostrikov, Nair, Levine, 2021).

Values are learned by expectiles, a policy by weighted regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torchrl_iql_recipes.algorithms.base import Algorithm
from torchrl_iql_recipes.experiment.schema import (
    AXIS,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Rate,
)

if TYPE_CHECKING:
    from torchrl_iql_recipes.experiment.networks import Networks

    from torchrl_iql import IQLLoss


class IQL(Algorithm):
    """The defaults are those of the paper for locomotion."""

    title: ClassVar[str] = "IQL"
    of_networks: ClassVar[tuple[str, ...]] = ("num_qvalue_nets",)

    discount: Annotated[Rate, AXIS] = Field(0.99, description="of rewards, per step")
    target_rate: Rate = Field(0.005, description="of the target networks, per gradient step")
    expectile: Annotated[Fraction, AXIS] = Field(
        0.7, description="0.5: values of the behaviour; towards 1: of its best actions"
    )
    temperature: Annotated[NotNegative, AXIS] = Field(
        3.0, description="inverse: 0 is behaviour cloning, large is greedy"
    )
    weight_clip: Positive = Field(
        100.0, description="the largest weight of an action in the policy's loss"
    )
    num_qvalue_nets: Count = Field(2, description="the smallest of their values counts")

    def loss(self, networks: Networks) -> IQLLoss:
        from torchrl_iql import DiscreteIQLLoss, IQLLoss

        parts = networks.policy(), networks.qvalues(self.num_qvalue_nets), networks.value()
        settings = {
            "num_qvalue_nets": self.num_qvalue_nets,
            "expectile": self.expectile,
            "temperature": self.temperature,
            "weight_clip": self.weight_clip,
        }
        if networks.discrete:
            loss = DiscreteIQLLoss(*parts, action_space="categorical", **settings)
        else:
            loss = IQLLoss(*parts, **settings)
        loss.make_value_estimator(gamma=self.discount)
        return loss

    def optimization(self, steps: int) -> dict[str, Any]:
        return {**super().optimization(steps), "target_rate": self.target_rate}

    def __str__(self) -> str:
        return "IQL (behaviour cloning)" if self.temperature == 0 else "IQL"
