"""Behaviour cloning of the best episodes, 10% BC in the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from torchrl_iql_recipes.algorithms.bc import BC
from torchrl_iql_recipes.experiment.schema import Rate

if TYPE_CHECKING:
    from torchrl_iql import OfflineDataset


class PercentBC(BC):
    """Without values, and with the returns of whole episodes instead."""

    title: ClassVar[str] = "%BC"

    share: Rate = Field(0.1, description="of the episodes, those with the highest returns")

    def data(self, dataset: OfflineDataset) -> OfflineDataset:
        return dataset.best_episodes(self.share)
