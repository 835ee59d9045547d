"""Implicit Q-Learning for TorchRL."""

from typing import TYPE_CHECKING

from torchrl_iql import environments as environments  # tells gymnasium of AntMaze
from torchrl_iql import lazy

__all__ = [
    "AWACLoss",
    "DiscreteIQLLoss",
    "Evaluation",
    "Evaluator",
    "IQLLoss",
    "OfflineDataset",
    "TrainStep",
    "load_dataset",
    "load_networks",
    "load_policy",
    "models",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torchrl_iql import models
    from torchrl_iql.checkpoint import load_networks, load_policy
    from torchrl_iql.data import OfflineDataset
    from torchrl_iql.data import load as load_dataset
    from torchrl_iql.evaluation import Evaluation, Evaluator
    from torchrl_iql.objectives import AWACLoss, DiscreteIQLLoss, IQLLoss
    from torchrl_iql.training import TrainStep
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "AWACLoss": "objectives",
            "DiscreteIQLLoss": "objectives",
            "Evaluation": "evaluation",
            "Evaluator": "evaluation",
            "IQLLoss": "objectives",
            "OfflineDataset": "data",
            "TrainStep": "training",
            "load_dataset": "data:load",
            "load_networks": "checkpoint",
            "load_policy": "checkpoint",
            "models": "models",
        },
    )
