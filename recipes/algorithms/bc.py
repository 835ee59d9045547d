"""Behaviour cloning: the likelihood of the data's actions, by TorchRL's loss, mended."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torchrl_iql_recipes.algorithms.base import Algorithm

if TYPE_CHECKING:
    from torchrl_iql.objectives import BCLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class BC(Algorithm):
    """The same policy as IQL at temperature 0, without values to learn: a fifth of the work."""

    title: ClassVar[str] = "BC"

    def loss(self, networks: Networks) -> BCLoss:
        from torchrl_iql.objectives import BCLoss

        return BCLoss(networks.policy())  # pyright: ignore
