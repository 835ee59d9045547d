"""What every algorithm tells the recipes of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from torchrl_iql_recipes.experiment.schema import (
    AXIS,
    LATER,
    Count,
    Natural,
    NotNegative,
    Part,
    Positive,
    Rate,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchrl.objectives import LossModule

    from torchrl_iql import OfflineDataset
    from torchrl_iql.models import Architecture
    from torchrl_iql_recipes.experiment.networks import Networks

__all__ = [
    "Algorithm",
    "DecaySteps",
    "Discount",
    "LearningRate",
    "NumQvalueNets",
    "TargetRate",
    "Temperature",
    "WeightClip",
]

# What several algorithms are told, in the same words; the default is each one's own.
LearningRate = Annotated[Positive, AXIS, Field(description="of Adam")]
DecaySteps = Annotated[
    Natural | None,
    LATER,
    Field(
        description="gradient steps over which the policy's learning rate falls to 0, by half a cosine; "
        "null: all of them, 0: it stays"
    ),
]
Discount = Annotated[Rate, AXIS, Field(description="of rewards, per step")]
TargetRate = Annotated[Rate, Field(description="of the target networks, per gradient step")]
Temperature = Annotated[
    NotNegative, AXIS, Field(description="inverse: 0 is behaviour cloning, large is greedy")
]
WeightClip = Annotated[
    float,  # also infinity
    BeforeValidator(number),
    Field(gt=0),
    Field(description="the largest weight of an action in the policy's loss"),
]
NumQvalueNets = Annotated[Count, Field(description="the smallest of their values counts")]


class Algorithm(Part):
    """The settings of an algorithm, and what it makes of them.

    Of settings that are marked with ``AXIS``, several values may be given: there is one learner for each
    combination of them, and a column of the results for each setting. PyTorch is imported by the methods,
    not by the module, so that help and refusals come at once.

    Attributes:
        title: what results call it.
        of_networks: the settings that say what is in a checkpoint, and can not be changed with one.
        is_offline: whether it learns from whole episodes, and not from what is collected step by step.
        is_continuous: whether it is for continuous actions only.
    """

    title: ClassVar[str]
    of_networks: ClassVar[tuple[str, ...]] = ()
    is_offline: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = False

    learning_rate: LearningRate = 3e-4
    decay_steps: DecaySteps = None

    def data(self, dataset: OfflineDataset) -> OfflineDataset:
        """Return what it learns from of a data set, before rewards are summed over ``n_steps``.

        All learners of a run share it: an axis of several values is None here.
        """
        return dataset

    def architecture(self, architecture: Architecture, dataset: OfflineDataset) -> Architecture:
        """Return what its networks are like, given what the settings say of them.

        Args:
            architecture: of the settings, in the sizes of the data.
            dataset: what it learns from.
        """
        return architecture

    def loss(self, networks: Networks) -> LossModule:
        """Make its loss on freshly initialised networks; the policy's is ``actor_network``."""
        raise NotImplementedError

    def optimization(self, steps: int) -> dict[str, Any]:
        """Return :class:`torchrl_iql.TrainStep` arguments for a run of so many gradient steps."""
        from torchrl_iql.training import cosine_decay

        decay = steps if self.decay_steps is None else self.decay_steps
        return {
            "learning_rate": self.learning_rate,
            "schedule": {"actor_network": cosine_decay(decay)} if decay else {},
        }

    def values(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean of the values that it learns, by their symbol, where a line of metrics tells."""
        return {"Q": float(metrics["qvalue"])} if "qvalue" in metrics else {}

    def __str__(self) -> str:
        return self.title
