"""Offline data sets: read, checked and joined once, then sampled on the training device."""

from typing import TYPE_CHECKING

from torchrl_iql import lazy

__all__ = [
    "EpisodeRule",
    "Minibatches",
    "OfflineDataset",
    "Replay",
    "Report",
    "RewardRule",
    "load",
    "replay",
]

if TYPE_CHECKING:
    from torchrl_iql.data.dataset import OfflineDataset
    from torchrl_iql.data.loading import load
    from torchrl_iql.data.minibatches import Minibatches
    from torchrl_iql.data.replaying import Replay, replay
    from torchrl_iql.data.report import Report
    from torchrl_iql.data.rules import EpisodeRule, RewardRule
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "EpisodeRule": "rules",
            "Minibatches": "minibatches",
            "OfflineDataset": "dataset",
            "Replay": "replaying",
            "Report": "report",
            "RewardRule": "rules",
            "load": "loading",
            "replay": "replaying",
        },
    )
