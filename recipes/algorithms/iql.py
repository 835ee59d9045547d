"""Implicit Q-Learning (Kostrikov, Nair, Levine, 2021).

Values are learned by expectiles, a policy by weighted regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from torchrl_iql_recipes.algorithms.base import (
    Algorithm,
    Discount,
    NumQvalueNets,
    TargetRate,
    Temperature,
    WeightClip,
)
from torchrl_iql_recipes.experiment.schema import AXIS, Fraction

if TYPE_CHECKING:
    from torchrl_iql import IQLLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class IQL(Algorithm):
    """The defaults are those of the paper for locomotion."""

    title: ClassVar[str] = "IQL"
    of_networks: ClassVar[tuple[str, ...]] = ("num_qvalue_nets",)

    discount: Discount = 0.99
    target_rate: TargetRate = 0.005
    expectile: Annotated[Fraction, AXIS] = Field(
        0.7, description="0.5: values of the behaviour; towards 1: of its best actions"
    )
    temperature: Temperature = 3.0
    weight_clip: WeightClip = 100.0
    num_qvalue_nets: NumQvalueNets = 2

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
