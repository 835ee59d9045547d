"""One step of policy improvement (Brandfonbrener et al., 2021), by IQL's losses at expectile 0.5.

V is then the mean of Q over the actions of the data, and Q that of the behaviour: what SARSA
learns. The policy is improved on it once, by the same weighted regression.
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
from torchrl_iql_recipes.algorithms.iql import IQL

if TYPE_CHECKING:
    from torchrl_iql import IQLLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class OneStep(Algorithm):
    """IQL without its expectile; the other settings mean what they mean there."""

    title: ClassVar[str] = "one-step RL"
    of_networks: ClassVar[tuple[str, ...]] = ("num_qvalue_nets",)

    discount: Discount = 0.99
    target_rate: TargetRate = 0.005
    temperature: Temperature = 3.0
    weight_clip: WeightClip = 100.0
    num_qvalue_nets: NumQvalueNets = 1

    def loss(self, networks: Networks) -> IQLLoss:
        return self._iql().loss(networks)

    def optimization(self, steps: int) -> dict[str, Any]:
        return self._iql().optimization(steps)

    def _iql(self) -> IQL:
        return IQL(expectile=0.5, **self.model_dump())
