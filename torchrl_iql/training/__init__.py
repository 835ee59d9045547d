"""The training step: any loss, one learner or many, executed as fast as the machine allows."""

from torchrl_iql.training.adam import adam_
from torchrl_iql.training.execution import Execution
from torchrl_iql.training.nonfinite import NonFiniteError, OnNonfinite, reproduce
from torchrl_iql.training.optimization import cosine_decay, warm_up
from torchrl_iql.training.step import TrainStep

__all__ = [
    "Execution",
    "NonFiniteError",
    "OnNonfinite",
    "TrainStep",
    "adam_",
    "cosine_decay",
    "reproduce",
    "warm_up",
]
