"""The losses: :mod:`functional` holds the equations, :mod:`iql` and :mod:`awac` the LossModules."""

from torchrl_iql.objectives.awac import AWACLoss
from torchrl_iql.objectives.cql import CQLLoss
from torchrl_iql.objectives.iql import DiscreteIQLLoss, IQLLoss

__all__ = ["AWACLoss", "CQLLoss", "DiscreteIQLLoss", "IQLLoss"]
