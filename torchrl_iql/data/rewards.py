"""The paper's reward rules, one per family of tasks.

Each takes the raw episode returns ``[E]`` of a data set, and says how its rewards are changed. What is
collected online later is changed by the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "REWARD_RULES",
    "UNCHANGED",
    "RewardRule",
    "RewardTransform",
    "minus_one",
    "none",
    "return_range",
]

RewardRule = Literal["none", "minus_one", "return_range"]


@dataclass(frozen=True)
class RewardTransform:
    """``scale * r + shift``, in numbers that are known once a data set is loaded.

    Example:
        >>> import torch
        >>> RewardTransform(scale=2.0, shift=-1.0)(torch.tensor([0.0, 3.0]))
        tensor([-1.,  5.])
    """

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, rewards: Tensor) -> Tensor:
        return rewards * self.scale + self.shift


UNCHANGED = RewardTransform()


def none(episode_returns: Tensor) -> RewardTransform:
    """Leave the rewards as they are: Kitchen and Adroit."""
    return UNCHANGED


def minus_one(episode_returns: Tensor) -> RewardTransform:
    """Make rewards ``r - 1``, so that every step before the goal costs one: AntMaze."""
    return RewardTransform(shift=-1.0)


def return_range(episode_returns: Tensor) -> RewardTransform:
    """Make rewards ``1000 r / (best - worst episode return)``: locomotion.

    Raises:
        ValueError: if there are no episodes, or all episode returns are equal.
    """
    if not len(episode_returns):
        raise ValueError("reward rule 'return_range' needs the episodes of a data set")
    worst, best = episode_returns.aminmax()
    if best == worst:
        raise ValueError(
            "reward rule 'return_range' divides by the range of the episode returns, "
            f"but all of them are {best.item():g}"
        )
    return RewardTransform(scale=1000 / (best - worst).item())


REWARD_RULES: dict[RewardRule, Callable[[Tensor], RewardTransform]] = {
    "none": none,
    "minus_one": minus_one,
    "return_range": return_range,
}
