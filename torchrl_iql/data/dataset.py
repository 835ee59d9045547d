"""The data set that every reader ends in and every run starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from minari import EpisodeData
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, RandomSampler, ReplayBuffer, TensorStorage

from torchrl_iql.data.episodes import EpisodeRule, transition_columns
from torchrl_iql.data.minibatches import Minibatches
from torchrl_iql.data.rewards import REWARD_RULES, RewardRule

__all__ = ["OfflineDataset", "require_rules"]

STD_FLOOR = 1e-6
"""A deviation of at most this share of a column's largest magnitude is float32 rounding."""

PART = 100_000
"""Transitions that statistics are taken of at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OfflineDataset:
    """The transitions of whole episodes, and what is needed to evaluate what learns from them.

    Attributes:
        name: Data set id or path.
        transitions: TensorDict on the CPU, in memory or mapped from a file, batch size ``[n]``,
            episode after episode:

            - ``"observation"`` and ``("next", "observation")``: ``[n, D]`` float32, flattened as
              ``gymnasium.wrappers.FlattenObservation`` does;
            - ``"action"``: ``[n, A]`` float32, just inside the bounds, for ``Box``; ``[n]`` int64,
              counted from 0, for ``Discrete``;
            - ``("next", "reward")``: ``[n, 1]`` float32, after the reward rule;
            - ``("next", "terminated")`` and ``("next", "truncated")``: ``[n, 1]`` bool, and
              ``("next", "done")``, one or the other. An episode that ends with neither is marked
              truncated.
        episode_lengths: Transitions per episode, ``[E]`` int64, after the episode rule.
        episode_returns: Sum of raw rewards per episode, ``[E]`` float64, after the episode rule.
        observation_space: Space of the source, not flattened.
        action_space: Space of the source.
        env_spec: The environment to evaluate in, if known.
        reference_scores: The returns that score 0 and 1 when normalized, if known.
        reward_rule: How rewards were changed, see :mod:`torchrl_iql.data.rewards`.
        episode_rule: Where episodes end: ``"as_stored"`` or ``"until_success"``.
    """

    name: str
    transitions: TensorDict
    episode_lengths: Tensor
    episode_returns: Tensor
    observation_space: Space
    action_space: Space
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    reward_rule: RewardRule = "none"
    episode_rule: EpisodeRule = "as_stored"

    @classmethod
    def from_episodes(
        cls,
        name: str,
        episodes: Iterable[EpisodeData],
        *,
        observation_space: Space,
        action_space: Space,
        env_spec: EnvSpec | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
    ) -> OfflineDataset:
        """Checks episodes and joins them: the one way in, for readers and for arrays of your own.

        Args:
            name: What error messages call the data set.
            episodes: Episodes with one observation more than actions, rewards and flags.
            observation_space: Space of one observation.
            action_space: Space of one action, ``Box`` or ``Discrete``.
            env_spec: The environment to evaluate in.
            reference_scores: The returns that score 0 and 1 when normalized.
            reward_rule: ``"none"``, ``"minus_one"`` or ``"return_range"``.
            episode_rule: ``"as_stored"``, or ``"until_success"`` to terminate each episode at its
                first success and drop the rest.

        Raises:
            TypeError: If a space can not be turned into rows.
            ValueError: If a rule is unknown or does not apply, there are no episodes, or one is
                damaged; the message names the data set, the episode, the key and the index.

        Example:
            >>> import numpy as np
            >>> from gymnasium.spaces import Box, Discrete
            >>> from minari import EpisodeData
            >>> rewards, no = np.array([0.0, 1.0]), np.array([False, False])
            >>> walk = EpisodeData(0, np.eye(3), np.array([1, 0]), rewards, no, no, infos={})
            >>> dataset = OfflineDataset.from_episodes(
            ...     "walk",
            ...     [walk],
            ...     observation_space=Box(0, 1, (3,)),
            ...     action_space=Discrete(2),
            ...     reward_rule="minus_one",
            ...     episode_rule="until_success",
            ... )
            >>> dataset.transitions["next", "reward"].flatten()
            tensor([-1.,  0.])
        """
        require_rules(reward_rule, episode_rule)
        parts = []
        for episode in episodes:
            with _errors_at(f"{name}, episode {episode.id}"):
                parts.append(
                    transition_columns(episode, observation_space, action_space, episode_rule)
                )
        if not parts:
            raise ValueError(f"{name}: the data set has no episodes")

        columns = {
            key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
        }
        returns = torch.tensor([part["next", "reward"].sum() for part in parts])
        with _errors_at(name):
            rewards = REWARD_RULES[reward_rule](columns["next", "reward"], returns)
        columns["next", "reward"] = rewards.float()
        return cls(
            name=name,
            transitions=TensorDict(columns, batch_size=[len(rewards)], device="cpu"),
            episode_lengths=torch.tensor([len(part["action"]) for part in parts]),
            episode_returns=returns,
            observation_space=observation_space,
            action_space=action_space,
            env_spec=env_spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            episode_rule=episode_rule,
        )

    def replay_buffer(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> ReplayBuffer:
        """Puts all transitions on a device, to be sampled there uniformly with replacement.

        Args:
            batch_size: Transitions per sample.
            device: Where the transitions lie and are drawn; ``"cpu"`` shares their memory.
            generator: Source of the indices, on the same device; torch's global one by default.

        Returns:
            A read-only buffer whose ``sample()`` is a TensorDict ``[batch_size]`` on ``device``.
        """
        return ReplayBuffer(
            storage=TensorStorage(self.transitions.to(device), device=device),
            sampler=RandomSampler(),
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
            generator=generator,
        )

    def minibatches(
        self,
        batch_size: int,
        *,
        seeds: Sequence[int] = (0,),
        device: torch.device | str = "cpu",
        streaming: bool = False,
    ) -> Minibatches:
        """Uniform minibatches of the transitions for one learner per seed.

        Args:
            batch_size: Transitions in the minibatch of one learner.
            seeds: One per learner, at least 0.
            device: Where to train.
            streaming: Whether the device holds some of the transitions at a time instead of all.

        Returns:
            The :class:`~torchrl_iql.data.Minibatches`, which also say what is drawn when.
        """
        return Minibatches(
            self.transitions, batch_size, seeds=seeds, device=device, streaming=streaming
        )

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, ``[D]`` float32 each, of ``"observation"``.

        The deviation is that of the population. In a column that is constant, or varies by no more
        than the rounding of float32, it is replaced by 1: normalizing then gives zeros.
        """
        observations = self.transitions["observation"]
        # In parts, since they may exceed the memory.
        parts = observations.split(PART)
        mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(observations)
        squares = torch.stack([(part - mean).square().sum(0) for part in parts])
        std = (squares.sum(0) / len(observations)).sqrt()
        largest = torch.stack([part.abs().amax(0) for part in parts]).amax(0)
        constant = std <= STD_FLOOR * largest
        return mean.float(), std.masked_fill(constant, 1.0).float()


def require_rules(reward_rule: str, episode_rule: str) -> None:
    """Raises a ValueError that names the value and the allowed ones if a rule does not exist."""
    for kind, rule, allowed in (
        ("reward", reward_rule, get_args(RewardRule)),
        ("episode", episode_rule, get_args(EpisodeRule)),
    ):
        if rule not in allowed:
            raise ValueError(f"unknown {kind} rule {rule!r}, choose from {', '.join(allowed)}")


@contextmanager
def _errors_at(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
