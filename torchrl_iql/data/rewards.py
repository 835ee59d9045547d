"""Reward rules: the paper's, one per family of tasks, and one for other data.

Each takes the raw episode returns ``[E]`` and rewards ``[n]`` of a data set, both float64, and says how its
rewards are changed. What is collected online later is changed by the same numbers. Beside the paper's there
is ``"unit_rms"``, for data of which nobody knows the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from torchrl_iql.data.rules import RewardRule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "REWARD_RULES",
    "UNCHANGED",
    "RewardRule",
    "RewardTransform",
    "check_discount",
    "minus_one",
    "none",
    "return_range",
    "unit_rms",
]

OF_WHOLE_EPISODES = ("return_range",)
"""Rules that are wrong where episodes are fragments of what was played."""


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

    def undone(self, rewards: Tensor) -> Tensor:
        """Return the rewards as they were recorded, float64."""
        return (rewards.double() - self.shift) / self.scale

    def __str__(self) -> str:
        scaled = "r" if self.scale == 1 else f"{self.scale:.4g} r"
        return (
            f"{scaled} {'-' if self.shift < 0 else '+'} {abs(self.shift):g}"
            if self.shift
            else scaled
        )


UNCHANGED = RewardTransform()


def check_discount(discount: float) -> None:
    """Refuse a number that no return is discounted by.

    Raises:
        ValueError: it is not from 0 to 1.
    """
    if not (isinstance(discount, Real) and 0 <= discount <= 1):
        raise ValueError(f"discount must be from 0 to 1, got {discount!r}")


def none(episode_returns: Tensor, rewards: Tensor) -> RewardTransform:
    """Leave the rewards as they are: Kitchen and Adroit."""
    return UNCHANGED


def minus_one(episode_returns: Tensor, rewards: Tensor) -> RewardTransform:
    """Make rewards ``r - 1``, so that every step before the goal costs one: AntMaze."""
    return RewardTransform(shift=-1.0)


def return_range(episode_returns: Tensor, rewards: Tensor) -> RewardTransform:
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
            f"but all of them are {best.item():g}; 'unit_rms' needs none"
        )
    return RewardTransform(scale=1000 / (best - worst).item())


def unit_rms(episode_returns: Tensor, rewards: Tensor) -> RewardTransform:
    """Divide rewards by their root mean square, so that the temperature means the same on any scale.

    Rewards that are all 0 stay so.

    Raises:
        ValueError: if there are no rewards.
    """
    if not len(rewards):
        raise ValueError("reward rule 'unit_rms' needs the rewards of a data set")
    largest = rewards.abs().max()
    if not largest:
        return UNCHANGED
    # Of those over the largest: the squares of large ones may be infinite.
    return RewardTransform(
        scale=(1 / (largest * (rewards / largest).square().mean().sqrt())).item()
    )


REWARD_RULES: dict[RewardRule, Callable[[Tensor, Tensor], RewardTransform]] = {
    "none": none,
    "minus_one": minus_one,
    "return_range": return_range,
    "unit_rms": unit_rms,
}
