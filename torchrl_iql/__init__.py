"""Implicit Q-Learning for TorchRL."""

from torchrl_iql import models
from torchrl_iql.checkpoint import load_policy
from torchrl_iql.data import OfflineDataset
from torchrl_iql.data import load as load_dataset
from torchrl_iql.evaluation import Evaluation, Evaluator
from torchrl_iql.objectives import DiscreteIQLLoss, IQLLoss
from torchrl_iql.training import TrainStep

__all__ = [
    "DiscreteIQLLoss",
    "Evaluation",
    "Evaluator",
    "IQLLoss",
    "OfflineDataset",
    "TrainStep",
    "load_dataset",
    "load_policy",
    "models",
]
