"""Conservative Q-Learning (Kumar, Zhou, Tucker, Levine, 2020).

SAC, with a penalty that keeps the values of actions that are not in the data below those that are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from torchrl_iql_recipes.algorithms.base import Algorithm, Discount, TargetRate
from torchrl_iql_recipes.experiment.schema import AXIS, Count, Flag, NotNegative, Number, Positive

if TYPE_CHECKING:
    from torchrl_iql.objectives import CQLLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class CQL(Algorithm):
    """The defaults are the paper's for locomotion; its networks are in config/algorithm."""

    title: ClassVar[str] = "CQL"
    of_networks: ClassVar[tuple[str, ...]] = ("gap",)
    is_continuous: ClassVar[bool] = True

    discount: Discount = 0.99
    target_rate: TargetRate = 0.005
    policy_learning_rate: Annotated[Positive, AXIS] = Field(
        1e-4, description="of the policy and of its entropy's weight"
    )
    alpha: Annotated[NotNegative, AXIS] = Field(
        5.0, description="of the penalty; 0 is SAC without entropy in its targets"
    )
    gap: Number | None = Field(
        None,
        description="what the penalty is to come to, by a factor on alpha that is learned; null: the factor "
        "is 1",
    )
    num_random: Count = Field(
        10, description="actions of each distribution that the penalty is estimated from"
    )
    max_q_backup: Flag = Field(
        False, description="targets are of the best of num_random actions of the policy"
    )

    def loss(self, networks: Networks) -> CQLLoss:
        from torchrl_iql.objectives import CQLLoss

        networks.require("CQL", policies=("heteroscedastic",))
        low, high = networks.action_bounds()
        # The paper's numbers are of actions in [-1, 1]; in others' units entropies are higher by this.
        stretch = ((high - low) / 2).log().sum().item()
        loss = CQLLoss(
            networks.policy(),  # pyright: ignore
            networks.qvalues(2),
            bounds=(low, high),
            target_entropy=stretch - len(low),
            min_q_weight=self.alpha,
            max_q_backup=self.max_q_backup,
            num_random=self.num_random,
            with_lagrange=self.gap is not None,
            lagrange_thresh=(self.gap or 0.0) + self.alpha * stretch,
        )
        loss.make_value_estimator(gamma=self.discount)
        return loss

    def optimization(self, steps: int) -> dict[str, Any]:
        rates = {
            "actor_network": self.policy_learning_rate,
            "log_alpha": self.policy_learning_rate,
            "qvalue_network": self.learning_rate,
        }
        if self.gap is not None:
            rates["log_alpha_prime"] = self.learning_rate
        return {
            **super().optimization(steps),
            "learning_rate": rates,
            "target_rate": self.target_rate,
        }
