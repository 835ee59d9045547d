"""The losses: :mod:`functional` holds the equations, :mod:`iql` and :mod:`dt` the LossModules."""

from torchrl_iql.objectives.dt import DTLoss
from torchrl_iql.objectives.iql import DiscreteIQLLoss, IQLLoss

__all__ = ["DTLoss", "DiscreteIQLLoss", "IQLLoss"]
