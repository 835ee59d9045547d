"""TD3 with behaviour cloning (Fujimoto, Gu, 2021).

A deterministic policy goes up Q, in units of its mean magnitude, and is held back by the squared distance
to the actions of the data, in units of half their range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from torchrl_iql_recipes.algorithms.base import Algorithm, Discount, TargetRate
from torchrl_iql_recipes.experiment.schema import AXIS, Count, NotNegative

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchrl_iql.objectives import TD3BCLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class TD3BC(Algorithm):
    """The defaults are the paper's, for all tasks; it normalises observations, as config/algorithm says."""

    title: ClassVar[str] = "TD3+BC"
    is_continuous: ClassVar[bool] = True

    discount: Discount = 0.99
    target_rate: TargetRate = 0.005
    alpha: Annotated[NotNegative, AXIS] = Field(
        2.5, description="of Q against cloning; 0 is behaviour cloning"
    )
    policy_noise: NotNegative = Field(
        0.2, description="deviation of the noise on next actions, in units of half their range"
    )
    noise_clip: NotNegative = Field(0.5, description="the largest such noise, in the same units")
    policy_interval: Count = Field(
        2, description="gradient steps from one of the policy and the targets to the next"
    )

    def loss(self, networks: Networks) -> TD3BCLoss:
        from torchrl_iql.objectives import TD3BCLoss

        networks.require("TD3+BC", policies=("deterministic",))
        loss = TD3BCLoss(
            networks.policy(),
            networks.qvalues(2),
            bounds=networks.action_bounds(),
            alpha=self.alpha,
            policy_noise=self.policy_noise,
            noise_clip=self.noise_clip,
        )
        loss.make_value_estimator(gamma=self.discount)
        return loss

    def values(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean magnitude, of which ``lmbd`` is ``alpha`` over it."""
        return (
            {"|Q|": self.alpha / float(metrics["lmbd"])} if self.alpha and "lmbd" in metrics else {}
        )

    def optimization(self, steps: int) -> dict[str, Any]:
        every = self.policy_interval
        return {
            **super().optimization(steps),
            "target_rate": self.target_rate,
            "every": {"actor_network": every},
            "target_every": every,
        }
