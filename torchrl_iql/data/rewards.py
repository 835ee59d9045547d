"""The paper's reward rules, one per family of tasks.

Each takes the rewards ``[n, 1]`` and the episode returns ``[E]`` of a data set, and returns the
rewards to learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

__all__ = ["REWARD_RULES", "RewardRule", "minus_one", "none", "return_range"]

RewardRule = Literal["none", "minus_one", "return_range"]


def none(rewards: Tensor, episode_returns: Tensor) -> Tensor:
    """Kitchen and Adroit: the rewards as they are."""
    return rewards


def minus_one(rewards: Tensor, episode_returns: Tensor) -> Tensor:
    """AntMaze: ``r - 1``, so that every step before the goal costs one."""
    return rewards - 1


def return_range(rewards: Tensor, episode_returns: Tensor) -> Tensor:
    """Locomotion: ``1000 r / (best - worst episode return)``.

    Raises:
        ValueError: If all episode returns are equal.
    """
    worst, best = episode_returns.aminmax()
    if best == worst:
        raise ValueError(
            "reward rule 'return_range' divides by the range of the episode returns, "
            f"but all of them are {best.item():g}"
        )
    return rewards * 1000 / (best - worst)


REWARD_RULES: dict[RewardRule, Callable[[Tensor, Tensor], Tensor]] = {
    "none": none,
    "minus_one": minus_one,
    "return_range": return_range,
}
