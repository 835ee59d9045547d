"""Behaviour cloning: the likelihood of the data's actions, by TorchRL's loss."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar

from torchrl_iql_recipes.algorithms.base import Algorithm

if TYPE_CHECKING:
    from torchrl.objectives import BCLoss

    from torchrl_iql_recipes.experiment.networks import Networks


class BC(Algorithm):
    """The same policy as IQL at temperature 0, without values to learn: a fifth of the work."""

    title: ClassVar[str] = "BC"

    def loss(self, networks: Networks) -> BCLoss:
        from torchrl.objectives import BCLoss

        with warnings.catch_warnings():  # the class lacks an annotation, which is TorchRL's to mend
            warnings.filterwarnings("ignore", "The name target_actor_network_params wasn't part of")
            return BCLoss(networks.policy())
