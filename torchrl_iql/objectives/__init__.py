"""The losses: :mod:`functional` holds the equations, the other modules the LossModules that call them."""

from torchrl_iql.objectives.awac import AWACLoss
from torchrl_iql.objectives.bc import BCLoss
from torchrl_iql.objectives.cql import CQLLoss
from torchrl_iql.objectives.dt import DTLoss
from torchrl_iql.objectives.fqe import FQELoss
from torchrl_iql.objectives.iql import DiscreteIQLLoss, IQLLoss
from torchrl_iql.objectives.td3_bc import TD3BCLoss

__all__ = [
    "AWACLoss",
    "BCLoss",
    "CQLLoss",
    "DTLoss",
    "DiscreteIQLLoss",
    "FQELoss",
    "IQLLoss",
    "TD3BCLoss",
]
