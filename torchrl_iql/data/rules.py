"""What may be made of data sets: names alone, without PyTorch."""

from __future__ import annotations

from typing import Literal

__all__ = ["EpisodeRule", "RewardRule"]

RewardRule = Literal["none", "minus_one", "return_range", "unit_rms"]
EpisodeRule = Literal["as_stored", "until_success"]
