"""What is in a data set, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete
from torch import Tensor

from torchrl_iql.data.episodes import EpisodeRule
from torchrl_iql.data.rewards import RewardRule, RewardTransform
from torchrl_iql.environments import reference_scores_of
from torchrl_iql.spaces import listed, named_leaves

__all__ = ["Report", "report"]

SHOWN = 8
"""Columns or actions that the table names one by one."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A summary of an :class:`~torchrl_iql.data.OfflineDataset`; ``str()`` makes a table of it.

    Attributes:
        name: of the data set.
        environment: id of the environment to evaluate in, if known.
        reward_rule: how rewards were changed.
        episode_rule: where episodes end.
        episodes: number of episodes.
        transitions: number of transitions.
        lengths: shortest, median and longest episode.
        returns: lowest, mean and highest sum of raw rewards of an episode.
        normalized: the mean return as a score, 0 and 100 at the reference scores, if episodes are as
            stored and these are known: those of the data set, else D4RL's of the environment.
        success_rate: share of episodes with a reward of 1, if raw rewards are 0 and 1; None if all are 1.
        rewards: lowest, mean and highest reward of a transition, after the reward rule.
        terminations: episodes that terminate.
        time_outs: episodes that are truncated, so that values bootstrap from their last observation.
        observation_size: columns of an observation.
        observation_parts: name, shape and type of the entries, of a dictionary or a tuple.
        constant_columns: indices of the columns in which all observations are equal.
        nan_rows: next observations with NaN, which only follow a termination.
        action_ranges: lowest and highest action in each dimension; empty for ``Discrete``.
        action_counts: how often each action was taken, for ``Discrete``; empty for ``Box``.
    """

    name: str
    environment: str | None
    reward_rule: RewardRule
    episode_rule: EpisodeRule
    episodes: int
    transitions: int
    lengths: tuple[int, float, int]
    returns: tuple[float, float, float]
    normalized: float | None
    success_rate: float | None
    rewards: tuple[float, float, float]
    terminations: int
    time_outs: int
    observation_size: int
    observation_parts: tuple[tuple[str, tuple[int, ...], str], ...]
    constant_columns: tuple[int, ...]
    nan_rows: int
    action_ranges: tuple[tuple[float, float], ...]
    action_counts: tuple[int, ...]

    def __str__(self) -> str:
        if self.action_counts:
            size = len(self.action_counts)
            actions = f"{size} categories, taken {listed(self.action_counts, SHOWN)} times"
        else:
            ranges = [f"{low:z.3g} to {high:z.3g}" for low, high in self.action_ranges]
            actions = f"{len(ranges)} dimensions, {listed(ranges, SHOWN)}"
        rows = {
            "environment": self.environment or "not known",
            "rules": f"reward {self.reward_rule}, episodes {self.episode_rule}",
            "episodes": f"{self.episodes:,}",
            "transitions": f"{self.transitions:,}",
            "length": "min {:,}, median {:,g}, max {:,}".format(*self.lengths),
            "return": _range(self.returns),
            "normalized": _known(
                self.normalized, ".1f", "needs reference scores and whole episodes"
            ),
            "success": _known(self.success_rate, ".1%", "is told by raw rewards of 0 and 1 alone"),
            "reward": _range(self.rewards),
            "ends": f"{self.terminations:,} terminations, {self.time_outs:,} time-outs",
            "observation": _parts(self.observation_size, self.observation_parts),
            "constant": f"columns {listed(self.constant_columns, SHOWN) or 'none'}",
            "NaN": f"{self.nan_rows:,} observations after a termination",
            "action": actions,
        }
        width = max(map(len, rows)) + 2
        return "\n".join([self.name, *(f"{key:{width}}{text}" for key, text in rows.items())])


class Described(Protocol):
    """What a report is made of, as :class:`~torchrl_iql.data.OfflineDataset` has it."""

    @property
    def name(self) -> str: ...
    @property
    def transitions(self) -> Any: ...
    @property
    def episode_lengths(self) -> Tensor: ...
    @property
    def episode_returns(self) -> Tensor: ...
    @property
    def action_space(self) -> Space: ...
    @property
    def observation_space(self) -> Space: ...
    @property
    def env_spec(self) -> EnvSpec | None: ...
    @property
    def reference_scores(self) -> tuple[float, float] | None: ...
    @property
    def reward_rule(self) -> RewardRule: ...
    @property
    def reward_transform(self) -> RewardTransform: ...
    @property
    def episode_rule(self) -> EpisodeRule: ...


def report(dataset: Described) -> Report:
    """Summarise a data set, without copying its columns.

    Raises:
        ValueError: if it has no transitions.
    """
    if not len(dataset.transitions):
        raise ValueError(f"{dataset.name}: there are no transitions to report on")
    transitions, following = dataset.transitions, dataset.transitions["next"]
    lengths, returns = dataset.episode_lengths, dataset.episode_returns
    normalized = None
    scores = dataset.reference_scores or reference_scores_of(dataset.env_spec)
    if scores is not None and dataset.episode_rule == "as_stored":
        random, expert = scores
        normalized = 100 * (returns.mean().item() - random) / (expert - random)
    rewards = following["reward"]
    success_rate = None
    raw = dataset.reward_transform.undone(rewards)
    is_zero = raw.abs() < 1e-5  # what float32 leaves of it
    if is_zero.any() and (is_zero | ((raw - 1).abs() < 1e-5)).all():
        success_rate = (returns > 0).double().mean().item()
    lowest, highest = transitions["observation"].aminmax(dim=0)
    terminated = following["terminated"]
    actions, space = transitions["action"], dataset.action_space
    ranges: list[list[float]] = []
    counts: list[int] = []
    if isinstance(space, Discrete):
        counts = actions.bincount(minlength=int(space.n)).tolist()
    else:
        ranges = torch.stack(actions.aminmax(dim=0), dim=1).tolist()
    return Report(
        name=dataset.name,
        environment=None if dataset.env_spec is None else dataset.env_spec.id,
        reward_rule=dataset.reward_rule,
        episode_rule=dataset.episode_rule,
        episodes=len(lengths),
        transitions=len(transitions),
        lengths=(int(lengths.min()), float(lengths.double().quantile(0.5)), int(lengths.max())),
        returns=(returns.min().item(), returns.mean().item(), returns.max().item()),
        normalized=normalized,
        success_rate=success_rate,
        rewards=(rewards.min().item(), rewards.double().mean().item(), rewards.max().item()),
        terminations=int(terminated.sum()),
        time_outs=int((following["truncated"] & ~terminated).sum()),
        observation_size=lowest.shape[-1],
        observation_parts=tuple(
            (name, leaf.shape or (), str(leaf.dtype))
            for name, leaf in named_leaves(dataset.observation_space)
            if name
        ),
        constant_columns=tuple((lowest == highest).nonzero()[:, 0].tolist()),
        nan_rows=int(following["observation"].isnan().any(1).sum()),
        action_ranges=tuple((low, high) for low, high in ranges),
        action_counts=tuple(counts),
    )


def _parts(columns: int, parts: Sequence[tuple[str, tuple[int, ...], str]]) -> str:
    of_each = ", ".join(f"{name} {list(shape)} {dtype}" for name, shape, dtype in parts)
    return f"{columns:,} columns{of_each and ': '}{of_each}"


def _range(values: tuple[float, float, float]) -> str:
    return "min {:z.4g}, mean {:z.4g}, max {:z.4g}".format(*values)


def _known(value: float | None, form: str, otherwise: str) -> str:
    return f"not known, {otherwise}" if value is None else f"{value:{form}}"
