"""Offline data sets: read, checked and joined once, then sampled on the training device."""

from torchrl_iql.data.dataset import OfflineDataset
from torchrl_iql.data.episodes import EpisodeRule
from torchrl_iql.data.loading import load
from torchrl_iql.data.minibatches import Minibatches
from torchrl_iql.data.replay import Replay, replay
from torchrl_iql.data.report import Report
from torchrl_iql.data.rewards import RewardRule

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
