"""The data set that every reader ends in and every run starts from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import flatdim
from minari import EpisodeData
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, RandomSampler, ReplayBuffer, TensorStorage

from torchrl_iql.data.arrays import action_box, array_episodes, observation_box
from torchrl_iql.data.episodes import (
    EpisodeRule,
    episode_data,
    errors_at,
    is_episode,
    transition_columns,
)
from torchrl_iql.data.minibatches import Minibatches
from torchrl_iql.data.report import Report, report
from torchrl_iql.data.rewards import REWARD_RULES, UNCHANGED, RewardRule, RewardTransform
from torchrl_iql.data.spaces import action_rows, array, flags, require_finite
from torchrl_iql.data.tensordicts import categories, transition_arrays
from torchrl_iql.environments import require_reference_scores, spaces_of, spec_of

__all__ = ["OfflineDataset", "require_rules"]

STD_FLOOR = 1e-6
"""A deviation of at most this share of a column's largest magnitude is float32 rounding."""

PART = 100_000
"""Transitions that statistics are taken of at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OfflineDataset:
    """The transitions of whole episodes, and what is needed to evaluate what learns from them.

    Attributes:
        name: data set id or path; of several sources, joined by ``" + "``.
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
        episode_lengths: transitions per episode, ``[E]`` int64, after the episode rule.
        episode_returns: sum of raw rewards per episode, ``[E]`` float64, after the episode rule.
        observation_space: space of the source, not flattened.
        action_space: space of the source.
        env_spec: the environment to evaluate in, if known.
        reference_scores: the returns that score 0 and 1 when normalized, if known.
        reward_rule: how rewards were changed, see :mod:`torchrl_iql.data.rewards`.
        reward_transform: the same in numbers, for rewards that are collected later.
        episode_rule: where episodes end: ``"as_stored"`` or ``"until_success"``.
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
    reward_transform: RewardTransform = UNCHANGED
    episode_rule: EpisodeRule = "as_stored"

    @classmethod
    def from_episodes(
        cls,
        name: str,
        episodes: Iterable[EpisodeData | Mapping[str, Any]],
        *,
        observation_space: Space,
        action_space: Space,
        env_spec: str | EnvSpec | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
    ) -> OfflineDataset:
        """Check episodes and join them: the one way in, in which every other one ends.

        Args:
            name: what error messages call the data set.
            episodes: episodes with one observation more than actions, rewards and flags: Minari's,
                or mappings with the same entries. Of these, ``"truncations"``, ``"infos"`` and
                ``"id"``, the position by default, may be missing.
            observation_space: space of one observation.
            action_space: space of one action, ``Box`` or ``Discrete``.
            env_spec: the environment to evaluate in, or its id.
            reference_scores: the returns that score 0 and 1 when normalized.
            reward_rule: ``"none"``, ``"minus_one"`` or ``"return_range"``.
            episode_rule: ``"as_stored"``, or ``"until_success"`` to terminate each episode at its
                first success and drop the rest.

        Raises:
            TypeError: if a space can not be turned into rows, or what is given is no list of episodes.
            ValueError: if a rule is unknown or does not apply, reference scores are not finite or not
                in order, there are no episodes, or one is damaged; the message names the data set,
                the episode, the key and the index.

        Example:
            >>> import numpy as np
            >>> from gymnasium.spaces import Box, Discrete
            >>> walk = {
            ...     "observations": np.eye(3),
            ...     "actions": [1, 0],
            ...     "rewards": [0.0, 1.0],
            ...     "terminations": [False, False],
            ... }
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
        if reference_scores is not None:
            with errors_at(name):
                require_reference_scores(reference_scores)
        if is_episode(episodes):
            raise TypeError(f"{name}: episodes is a single episode, expected a list of them")
        spaces = observation_space, action_space
        parts = []
        for position, episode in enumerate(episodes):
            if not is_episode(episode):
                found = type(episode).__name__
                raise TypeError(f"{name}: episodes[{position}] is a {found}, expected an episode")
            is_mapping = isinstance(episode, Mapping)
            number = episode.get("id", position) if is_mapping else episode.id
            with errors_at(f"{name}, episode {number}"):
                recorded = episode_data(episode) if is_mapping else episode
                parts.append(transition_columns(recorded, *spaces, episode_rule))
        if not parts:
            raise ValueError(f"{name}: the data set has no episodes")

        columns = {
            key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
        }
        returns = torch.tensor([part["next", "reward"].sum() for part in parts])
        with errors_at(name):
            transform = REWARD_RULES[reward_rule](returns)
            columns["next", "reward"] = transform(columns["next", "reward"]).float()
            changed = f"reward rule {reward_rule!r}: rewards"
            require_finite(columns["next", "reward"].numpy(), changed)
        return cls(
            name=name,
            transitions=TensorDict(columns, batch_size=[len(columns["action"])], device="cpu"),
            episode_lengths=torch.tensor([len(part["action"]) for part in parts]),
            episode_returns=returns,
            observation_space=observation_space,
            action_space=action_space,
            env_spec=spec_of(env_spec),
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            reward_transform=transform,
            episode_rule=episode_rule,
        )

    @classmethod
    def empty(
        cls,
        env_spec: str | EnvSpec,
        *,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
    ) -> OfflineDataset:
        """Make a data set of an environment before there are any data: to start from scratch.

        Args:
            env_spec: the environment, or its id.
            reward_rule: ``"none"`` or ``"minus_one"``.
            episode_rule: as in :meth:`from_episodes`.

        Raises:
            TypeError: if the action space is neither ``Box`` nor ``Discrete``.
            ValueError: if the environment can not be built, or a rule is unknown or needs episodes.

        Example:
            >>> OfflineDataset.empty("CartPole-v1").transitions["observation"].shape
            torch.Size([0, 4])
        """
        require_rules(reward_rule, episode_rule)
        spec = spec_of(env_spec)
        assert spec is not None
        observation_space, action_space = spaces_of(spec)
        observations = torch.zeros(0, flatdim(observation_space))
        no_flags = torch.zeros(0, 1, dtype=torch.bool)
        empty = np.zeros((0, *action_space.shape), action_space.dtype)  # pyright: ignore
        columns: dict[NestedKey, Tensor] = {
            "observation": observations,
            "action": torch.from_numpy(action_rows(action_space, empty)),
            ("next", "observation"): observations,
            ("next", "reward"): torch.zeros(0, 1),
            **{("next", key): no_flags for key in ("done", "terminated", "truncated")},
        }
        returns = torch.zeros(0, dtype=torch.float64)
        return cls(
            name=spec.id,
            transitions=TensorDict(columns, batch_size=[0], device="cpu"),
            episode_lengths=torch.zeros(0, dtype=torch.int64),
            episode_returns=returns,
            observation_space=observation_space,
            action_space=action_space,
            env_spec=spec,
            reward_rule=reward_rule,
            reward_transform=REWARD_RULES[reward_rule](returns),
            episode_rule=episode_rule,
        )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        *,
        observations: ArrayLike | Tensor,
        actions: ArrayLike | Tensor,
        rewards: ArrayLike | Tensor,
        terminals: ArrayLike | Tensor,
        timeouts: ArrayLike | Tensor | None = None,
        next_observations: ArrayLike | Tensor | None = None,
        infos: Mapping[str, ArrayLike | Tensor] | None = None,
        observation_space: Space | None = None,
        action_space: Space | None = None,
        env_spec: str | EnvSpec | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
    ) -> OfflineDataset:
        """Split arrays of n rows, in the order of time, into episodes: D4RL's layout.

        Where episodes end and which rows are kept: :mod:`torchrl_iql.data.arrays`.

        Args:
            name: what error messages call the data set.
            observations: ``[n, D]``, or as the observation space says.
            actions: ``[n, A]``, or as the action space says.
            rewards: ``[n]`` or ``[n, 1]``.
            terminals: where the task ended, ``[n]`` or ``[n, 1]``, 0 or 1 of any type.
            timeouts: where an episode just stopped, likewise.
            next_observations: as ``observations``.
            infos: arrays ``[n, ...]``, of which ``"until_success"`` reads ``"success"``.
            observation_space: by default that of the environment, if one is given, flattened if it
                is compound, else a ``Box`` without bounds.
            action_space: by default that of the environment, else, for floats, ``Box(-1, 1)``.
            env_spec: the environment to evaluate in, or its id. Without ``timeouts`` and
                ``next_observations``, its time limit ends episodes.
            reference_scores: the returns that score 0 and 1 when normalized.
            reward_rule: as in :meth:`from_episodes`.
            episode_rule: as in :meth:`from_episodes`.

        Raises:
            TypeError: if a space can not be turned into rows.
            ValueError: as in :meth:`from_episodes`, if arrays do not fit together, or if nothing
                tells where episodes end.

        Example:
            >>> import numpy as np
            >>> dataset = OfflineDataset.from_arrays(
            ...     "walks",
            ...     observations=np.arange(5.0)[:, None],
            ...     actions=np.zeros((5, 1)),
            ...     rewards=np.ones(5),
            ...     terminals=[0, 1, 0, 0, 0],
            ...     timeouts=[0, 0, 0, 0, 1],
            ... )
            >>> dataset.episode_lengths
            tensor([2, 2])
            >>> dataset.transitions["next", "observation"].flatten()
            tensor([1., 2., 3., 4.])
        """
        spec = spec_of(env_spec)
        given: dict[str, Any] = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminals": terminals,
            "timeouts": timeouts,
            "next_observations": next_observations,
        }
        with errors_at(name):
            arrays: dict[str, Any] = {
                key: array(values, key)
                for key, values in given.items()
                if values is not None or key not in ("timeouts", "next_observations")
            }
            spaces = _spaces(arrays, observation_space, action_space, spec)
            episodes = array_episodes(
                **arrays,
                infos={key: array(values, f"infos/{key}") for key, values in (infos or {}).items()},
                time_limit=None if spec is None else spec.max_episode_steps,
            )
        return cls.from_episodes(
            name,
            episodes,
            **spaces,
            env_spec=spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            episode_rule=episode_rule,
        )

    @classmethod
    def from_tensordict(
        cls,
        name: str,
        transitions: TensorDictBase,
        *,
        observation_space: Space | None = None,
        action_space: Space | None = None,
        env_spec: str | EnvSpec | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
    ) -> OfflineDataset:
        """Split what a TorchRL collector or replay buffer gives into episodes.

        An episode ends with ``terminated``, ``truncated`` or ``done``, where the next observation
        is not that of the following transition, and with each row of ``[B, T]``. All transitions
        are kept, except for padding, which ``("collector", "mask")`` tells. One that is both
        terminated and truncated is terminated. If most transitions are followed by one that does not
        continue them, a warning says that they may not be in the order of time.

        Args:
            name: what error messages call the data set.
            transitions: ``[n]`` in the order of time, or ``[B, T]``, each row a part of a
                trajectory, on any device, with ``"observation"``, ``"action"``,
                ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")`` and,
                optionally, ``("next", "truncated")`` and ``("next", "done")``.
            observation_space: as in :meth:`from_arrays`. For ``Discrete``, categories or one-hot.
            action_space: as in :meth:`from_arrays`. For ``Discrete``, categories or one-hot.
            env_spec: the environment to evaluate in, or its id.
            reference_scores: the returns that score 0 and 1 when normalized.
            reward_rule: as in :meth:`from_episodes`.
            episode_rule: as in :meth:`from_episodes`.

        Raises:
            TypeError: if a space can not be turned into rows, or ``transitions`` is no TensorDict.
            ValueError: as in :meth:`from_arrays`, or if an entry is missing.

        Example:
            >>> transitions = TensorDict(
            ...     {
            ...         "observation": torch.tensor([[0.0], [1.0], [5.0]]),
            ...         "action": torch.zeros(3, 1),
            ...         "next": {
            ...             "observation": torch.tensor([[1.0], [2.0], [6.0]]),
            ...             "reward": torch.ones(3, 1),
            ...             "terminated": torch.zeros(3, 1, dtype=torch.bool),
            ...         },
            ...     },
            ...     batch_size=[3],
            ... )
            >>> OfflineDataset.from_tensordict("walks", transitions).episode_lengths
            tensor([2, 1])
        """
        spec = spec_of(env_spec)
        with errors_at(name):
            arrays = transition_arrays(transitions)
            spaces = _spaces(arrays, observation_space, action_space, spec)
            for key in ("observations", "next_observations", "actions"):
                kind = "action_space" if key == "actions" else "observation_space"
                arrays[key] = categories(spaces[kind], arrays[key], key)
            episodes = array_episodes(**arrays)
        dataset = cls.from_episodes(
            name,
            episodes,
            **spaces,
            env_spec=spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            episode_rule=episode_rule,
        )
        ends = flags(arrays["terminals"], "terminals") | arrays["timeouts"]
        jumps = len(dataset.episode_lengths) - int(ends.sum())
        if 2 * jumps > len(ends):
            warnings.warn(
                f"{name}: {jumps} of {len(ends)} transitions are followed by one that does not "
                "continue them; are they in the order of time?",
                stacklevel=2,
            )
        return dataset

    @property
    def episode_starts(self) -> Tensor:
        """Index of the first transition of each episode, ``[E]`` int64."""
        return self.episode_lengths.cumsum(0) - self.episode_lengths

    def returns_to_go(self, discount: float = 1.0) -> Tensor:
        """Sum the rewards, discounted, from each transition to the end of its episode.

        They are the rewards of ``transitions``, after the reward rule. Nothing is added for what
        comes after a truncation.

        Args:
            discount: from 0 to 1.

        Returns:
            tensor ``[n, 1]``, float32, summed in float64.

        Raises:
            ValueError: if ``discount`` is out of range.
        """
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must be from 0 to 1, got {discount!r}")
        if "steps_to_next_obs" in self.transitions.keys():
            raise ValueError("the rewards are sums over several steps: call this before n_step")
        lengths = self.episode_lengths
        ends = lengths.cumsum(0).repeat_interleave(lengths)
        left = ends - torch.arange(len(ends))
        sums = self.transitions["next", "reward"].double()
        # sums holds those of `span` rewards each, or of all that are left.
        span = 1
        while len(rows := (left > span).nonzero()[:, 0]):
            sums[rows] += discount**span * sums[rows + span]
            span *= 2
        return sums.float()

    def best_episodes(self, share: float) -> OfflineDataset:
        """Select the episodes of the highest raw returns, in the order they are in.

        Their rewards stay as they are: of ``"return_range"``, the range is that of all episodes.

        Args:
            share: of the number of episodes, above 0 and up to 1; the result has this many, rounded,
                and at least one. Of equal returns, the first are taken.

        Returns:
            a data set of their transitions, copied.

        Raises:
            ValueError: if ``share`` is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
        number = max(1, round(share * len(self.episode_returns)))
        order = self.episode_returns.argsort(descending=True, stable=True)
        chosen = order[:number].sort().values
        is_chosen = torch.zeros(len(order), dtype=torch.bool).index_fill(0, chosen, True)
        return replace(
            self,
            transitions=self.transitions[is_chosen.repeat_interleave(self.episode_lengths)],
            episode_lengths=self.episode_lengths[chosen],
            episode_returns=self.episode_returns[chosen],
        )

    def n_step(self, n: int, discount: float) -> OfflineDataset:
        """Return the same transitions over up to n steps, as :class:`torchrl.data.MultiStep` does.

        The reward of each is the discounted sum of those of n steps, or of all that are left in its
        episode, and what comes next is what comes after the last of them. ``"steps_to_next_obs"``,
        ``[n]`` int64, holds their number, which TD targets discount by.

        Args:
            n: at least 1.
            discount: from 0 to 1, that of the loss.

        Returns:
            a data set of new transitions, in memory.

        Raises:
            ValueError: if an argument is out of range.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n!r}")
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must be from 0 to 1, got {discount!r}")
        if "steps_to_next_obs" in self.transitions.keys():
            raise ValueError("the rewards are sums over several steps already")
        lengths = self.episode_lengths
        rows = torch.arange(int(lengths.sum()))
        left = lengths.cumsum(0).repeat_interleave(lengths) - rows
        reward = self.transitions["next", "reward"].double()
        summed = reward.clone()
        for k in range(1, n):
            more = (left > k).nonzero()[:, 0]
            summed[more] += discount**k * reward[more + k]
        taken = left.clamp_max(n)
        transitions = self.transitions.copy()
        transitions["next"] = self.transitions["next"][rows + taken - 1]
        transitions["next", "reward"] = summed.to(self.transitions["next", "reward"].dtype)
        transitions["steps_to_next_obs"] = taken
        return replace(self, transitions=transitions)

    def replay_buffer(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> ReplayBuffer:
        """Put all transitions on a device, to be sampled there uniformly with replacement.

        Args:
            batch_size: transitions per sample.
            device: where the transitions lie and are drawn; ``"cpu"`` shares their memory.
            generator: source of the indices, on the same device; torch's global one by default.

        Returns:
            a read-only buffer whose ``sample()`` is a TensorDict ``[batch_size]`` on ``device``.
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
        """Return uniform minibatches of the transitions for one learner per seed.

        Args:
            batch_size: transitions in the minibatch of one learner.
            seeds: one per learner, at least 0.
            device: where to train.
            streaming: whether the device holds some of the transitions at a time instead of all.

        Returns:
            the :class:`~torchrl_iql.data.Minibatches`, which also say what is drawn when.
        """
        return Minibatches(
            self.transitions, batch_size, seeds=seeds, device=device, streaming=streaming
        )

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, ``[D]`` float32 each, of ``"observation"``.

        The deviation is that of the population. In a column that is constant, or varies by no more
        than the rounding of float32, it is replaced by 1: normalizing then gives zeros.

        Raises:
            ValueError: if there are no transitions.
        """
        with errors_at(self.name):
            return _statistics(self.transitions["observation"])

    def reward_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, ``[1]`` float32 each, of the rewards after the reward rule.

        The deviation is as in :meth:`observation_statistics`.

        Raises:
            ValueError: if there are no transitions.
        """
        with errors_at(self.name):
            return _statistics(self.transitions["next", "reward"])

    def report(self) -> Report:
        """Describe what is in the data set, to be printed before it is trained on."""
        return report(self)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    if not len(rows):
        raise ValueError("there are no transitions to take statistics of")
    # In parts, since they may exceed the memory.
    parts = rows.split(PART)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(rows)
    squares = torch.stack([(part - mean).square().sum(0) for part in parts])
    std = (squares.sum(0) / len(rows)).sqrt()
    largest = torch.stack([part.abs().amax(0) for part in parts]).amax(0)
    constant = std <= STD_FLOOR * largest
    return mean.float(), std.masked_fill(constant, 1.0).float()


def _spaces(
    arrays: Mapping[str, np.ndarray],
    observation_space: Space | None,
    action_space: Space | None,
    env_spec: EnvSpec | None,
) -> dict[str, Space]:
    """Return the spaces that are given, else those of the environment, else those of the arrays."""
    if env_spec is not None and (observation_space is None or action_space is None):
        of_env = spaces_of(env_spec)
        observation_space = of_env[0] if observation_space is None else observation_space
        action_space = of_env[1] if action_space is None else action_space
    if observation_space is None:
        observation_space = observation_box(arrays["observations"])
    if action_space is None:
        action_space = action_box(arrays["actions"])
    return {"observation_space": observation_space, "action_space": action_space}


def require_rules(reward_rule: str, episode_rule: str) -> None:
    """Raise a ValueError that names the value and the allowed ones if a rule does not exist."""
    for kind, rule, allowed in (
        ("reward", reward_rule, get_args(RewardRule)),
        ("episode", episode_rule, get_args(EpisodeRule)),
    ):
        if rule not in allowed:
            raise ValueError(f"unknown {kind} rule {rule!r}, choose from {', '.join(allowed)}")
