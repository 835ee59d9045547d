"""The losses: :mod:`functional` holds the equations, :mod:`iql` the LossModules that call them."""

from torchrl_iql.objectives.iql import DiscreteIQLLoss, IQLLoss

__all__ = ["DiscreteIQLLoss", "IQLLoss"]
