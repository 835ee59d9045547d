"""Advantage-weighted actor-critic (Nair, Gupta, Dalal, Levine, 2020).

The policy's loss is IQL's, but Q is that of the policy itself: it is asked at actions that the data may
not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torchrl_iql_recipes.algorithms.base import (
    Algorithm,
    Discount,
    NumQvalueNets,
    TargetRate,
    Temperature,
    WeightClip,
)

if TYPE_CHECKING:
    from torchrl_iql import AWACLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class AWAC(Algorithm):
    """The temperature is one over the paper's lambda; the default is CORL's for locomotion."""

    title: ClassVar[str] = "AWAC"
    of_networks: ClassVar[tuple[str, ...]] = ("num_qvalue_nets",)
    is_continuous: ClassVar[bool] = True

    discount: Discount = 0.99
    target_rate: TargetRate = 0.005
    temperature: Temperature = 3.0
    weight_clip: WeightClip = 100.0
    num_qvalue_nets: NumQvalueNets = 2

    def loss(self, networks: Networks) -> AWACLoss:
        from torchrl_iql import AWACLoss

        networks.require("AWAC", policies=("gaussian", "squashed"))
        loss = AWACLoss(
            networks.policy(),
            networks.qvalues(self.num_qvalue_nets),
            bounds=networks.action_bounds(),
            num_qvalue_nets=self.num_qvalue_nets,
            temperature=self.temperature,
            weight_clip=self.weight_clip,
        )
        return loss.make_value_estimator(gamma=self.discount)

    def optimization(self, steps: int) -> dict[str, Any]:
        return {**super().optimization(steps), "target_rate": self.target_rate}
