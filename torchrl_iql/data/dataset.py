"""The data set that every reader ends in and every run starts from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from types import MappingProxyType
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

from torchrl_iql.data import saving
from torchrl_iql.data.arrays import ENDS, array_episodes, require_rows
from torchrl_iql.data.episodes import (
    EpisodeRule,
    episode_data,
    errors_at,
    is_episode,
    require_names,
    transition_columns,
)
from torchrl_iql.data.minibatches import Minibatches
from torchrl_iql.data.observed import chosen, flattened, given_arrays, shown
from torchrl_iql.data.report import Report, report
from torchrl_iql.data.rewards import (
    OF_WHOLE_EPISODES,
    REWARD_RULES,
    UNCHANGED,
    RewardRule,
    RewardTransform,
    check_discount,
)
from torchrl_iql.data.tensordicts import transition_arrays
from torchrl_iql.environments import (
    Env,
    observing,
    require_reference_scores,
    spaces_of,
    spec_of,
    time_limit_of,
)
from torchrl_iql.spaces import (
    LEVELS,
    ActionBounds,
    ActionsOutside,
    Extents,
    action_rows,
    array,
    hardly_told_apart,
    observation_dtype,
    require_finite,
    selected,
    sorted_space,
    written,
)

__all__ = ["OfflineDataset", "Recording", "require_rules", "warn_of_fragments"]

STD_FLOOR = 1e-6
"""A deviation of at most this share of a column's largest magnitude is float32 rounding."""

PART = 100_000
"""Transitions that statistics are taken of at once, or fewer:"""

PART_BYTES = 1 << 25
"""Bytes that one of their copies in float64 takes at most, if it has several rows."""


@dataclass(frozen=True)
class Recording:
    """Where transitions were taken from: equal transitions may be, whatever it is.

    Attributes:
        stopped: how many episodes end without a record of it, neither terminal nor time-out.
        transitions: how many were recorded, before rules dropped some; None if that is not known.
    """

    stopped: int = field(default=0, compare=False)
    transitions: int | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class OfflineDataset:
    """The transitions of whole episodes, and what is needed to evaluate what learns from them.

    Attributes:
        name: data set id or path; of several sources, joined by ``" + "``.
        transitions: TensorDict on the CPU, in memory or mapped from a file, batch size ``[n]``,
            episode after episode:

            - ``"observation"`` and ``("next", "observation")``: ``[n, D]`` float32, or uint8 where
              all of it is bytes, flattened as ``gymnasium.wrappers.FlattenObservation`` does;
            - ``"action"``: ``[n, A]`` float32, just inside the bounds, for ``Box``; ``[n]`` int64,
              counted from 0, for ``Discrete``;
            - ``("next", "reward")``: ``[n, 1]`` float32, after the reward rule;
            - ``("next", "terminated")`` and ``("next", "truncated")``: ``[n, 1]`` bool, and
              ``("next", "done")``, one or the other. An episode that ends with neither is marked
              truncated;
            - the columns that were asked for, as they are stored, of floats in float32;
            - with a ``window``, what :meth:`windows` adds.
        episode_lengths: transitions per episode, ``[E]`` int64, after the episode rule.
        episode_returns: sum of raw rewards per episode, ``[E]`` float64, after the episode rule.
        observation_space: space of the source, not flattened, of dictionaries with sorted keys.
        action_space: space of the source.
        env_spec: the environment to evaluate in, if known.
        reference_scores: the returns that score 0 and 100 when normalized, if known.
        reward_rule: how rewards were changed, see :mod:`torchrl_iql.data.rewards`.
        reward_transform: the same in numbers, for rewards that are collected later.
        episode_rule: where episodes end: ``"as_stored"`` or ``"until_success"``.
        recording: what is known of where the transitions were taken from.
        window: how many consecutive transitions minibatches hold of each that is drawn, see
            :meth:`windows`; None for itself alone.
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
    recording: Recording = Recording()
    window: int | None = None

    @classmethod
    def from_episodes(
        cls,
        name: str,
        episodes: Iterable[EpisodeData | Mapping[str, Any]],
        *,
        observation_space: Space,
        action_space: Space,
        env_spec: Env | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
        observation_keys: Sequence[str] | None = None,
        columns: Sequence[NestedKey] = (),
    ) -> OfflineDataset:
        """Check episodes and join them: the one way in, in which every other one ends.

        Args:
            name: what error messages call the data set.
            episodes: episodes with one observation more than actions, rewards and flags: Minari's,
                or mappings with the same entries. Of these, ``"truncations"``, which says that the
                last transition is one if it is no termination, ``"infos"`` and ``"id"``, the position
                by default, may be missing.
            observation_space: space of one observation.
            action_space: space of one action, ``Box`` or ``Discrete``.
            env_spec: the environment to evaluate in, or its id.
            reference_scores: the returns that score 0 and 100 when normalized.
            reward_rule: ``"none"``, ``"minus_one"``, ``"return_range"`` or ``"unit_rms"``, see
                :mod:`torchrl_iql.data.rewards`.
            episode_rule: ``"as_stored"``, or ``"until_success"`` to terminate each episode at its
                first success and drop the rest.
            observation_keys: which entries of a ``Dict`` space are observed, in the data and, by
                ``dataset.env_spec``, in the environment; all by default.
            columns: the infos that become columns of the transitions, under their names. One that also
                tells of the last state, with T + 1 entries, has a column under ``"next"``, too.

        Raises:
            TypeError: if a space can not be turned into rows, or what is given is no list of episodes.
            ValueError: if a rule is unknown or does not apply, reference scores are not finite or not
                in order, there are no episodes, or one is damaged; the message names the data set,
                the episode, the key and the index.

        Where most transitions are followed by one that does not continue them, a warning says that they
        may not be in the order of time.

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
        spec = spec_of(env_spec)
        with errors_at(name):
            require_names(columns)
            if observation_keys is not None:
                observation_space = selected(observation_space, observation_keys)
                spec = spec and observing(spec, observation_keys)
        observation_space = sorted_space(observation_space)
        parts, stopped, recorded = [], 0, 0
        extents: Extents = {}
        outside: list[ActionsOutside] = []
        for position, episode in enumerate(episodes):
            if not is_episode(episode):
                found = type(episode).__name__
                raise TypeError(f"{name}: episodes[{position}] is a {found}, expected an episode")
            is_mapping = isinstance(episode, Mapping)
            number = episode.get("id", position) if is_mapping else episode.id
            try:
                with errors_at(f"{name}, episode {number}"):
                    given = episode_data(episode) if is_mapping else episode
                    if observation_keys is not None:
                        kept = chosen(given.observations, observation_keys, "observations")
                        given = replace(given, observations=kept)
                    part, ended = transition_columns(
                        given,
                        observation_space,
                        action_space,
                        episode_rule,
                        columns,
                        extents,
                    )
                    if parts:
                        _require_alike(part, parts[0])
            except ActionsOutside as error:
                outside.append(error)
                continue
            parts.append(part)
            stopped += not ended
            recorded += len(given.rewards)
        if outside:
            _refuse(outside, sum(len(part["action"]) for part in parts))
        if not parts:
            raise ValueError(f"{name}: the data set has no episodes")
        _warn_of_rounding(name, extents)

        rows = {
            key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
        }
        returns = torch.tensor([part["next", "reward"].sum() for part in parts])
        with errors_at(name):
            if reward_rule in OF_WHOLE_EPISODES:
                _require_whole(stopped, len(parts), f"reward rule {reward_rule!r}")
            transform = REWARD_RULES[reward_rule](returns, rows["next", "reward"])
            if reward_rule == "unit_rms":
                _warn_of_dominant(name, rows["next", "reward"], transform.scale)
            rows["next", "reward"] = transform(rows["next", "reward"]).float()
            changed = f"reward rule {reward_rule!r}: rewards"
            require_finite(rows["next", "reward"].numpy(), changed)
        dataset = cls(
            name=name,
            transitions=TensorDict(rows, batch_size=[len(rows["action"])], device="cpu"),
            episode_lengths=torch.tensor([len(part["action"]) for part in parts]),
            episode_returns=returns,
            observation_space=observation_space,
            action_space=action_space,
            env_spec=spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            reward_transform=transform,
            episode_rule=episode_rule,
            recording=Recording(stopped, recorded),
        )
        warn_of_fragments(dataset)
        return dataset

    @classmethod
    def empty(
        cls,
        env_spec: Env,
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
        observation_space = sorted_space(observation_space)
        dtype = observation_dtype(observation_space)
        observations = torch.from_numpy(np.zeros((0, flatdim(observation_space)), dtype))
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
            reward_transform=REWARD_RULES[reward_rule](returns, returns),
            episode_rule=episode_rule,
        )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        *,
        observations: ArrayLike | Tensor | Mapping[str, ArrayLike | Tensor],
        actions: ArrayLike | Tensor,
        rewards: ArrayLike | Tensor,
        terminals: ArrayLike | Tensor,
        timeouts: ArrayLike | Tensor | None = None,
        next_observations: ArrayLike | Tensor | Mapping[str, ArrayLike | Tensor] | None = None,
        episode_ids: ArrayLike | Tensor | None = None,
        infos: Mapping[str, ArrayLike | Tensor] | None = None,
        observation_space: Space | None = None,
        action_space: ActionBounds | None = None,
        env_spec: Env | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
        observation_keys: Sequence[str] | None = None,
        columns: Mapping[str, ArrayLike | Tensor] = MappingProxyType({}),
    ) -> OfflineDataset:
        """Split arrays of n rows, in the order of time, into episodes: D4RL's layout.

        Where episodes end and which rows are kept: :mod:`torchrl_iql.data.arrays`.

        Args:
            name: what error messages call the data set.
            observations: ``[n, D]``, or as the observation space says: a dictionary of arrays of a
                ``Dict``.
            actions: ``[n, A]``, or as the action space says.
            rewards: ``[n]`` or ``[n, 1]``.
            terminals: where the task ended, ``[n]`` or ``[n, 1]``, 0 or 1 of any type.
            timeouts: where an episode just stopped, likewise.
            next_observations: as ``observations``.
            episode_ids: which episode, or log, a row is of, ``[n]``, numbers or text. An episode ends
                with its rows, truncated if the last one is not terminal, and with a terminal.
            infos: arrays ``[n, ...]``, of which ``"until_success"`` reads ``"success"`` or ``"is_success"``.
            observation_space: by default that of the environment, if one is given, else a ``Box``
                without bounds, of bytes for uint8. Of a compound one, observations may also be the
                vectors that it is flattened to.
            action_space: a space, or ``(low, high)``, each a number or one per dimension; by default
                that of the environment, else, for floats, ``(-1, 1)``.
            env_spec: the environment to evaluate in, or its id. Without ``timeouts``,
                ``next_observations`` and ``episode_ids``, its time limit ends episodes.
            reference_scores: the returns that score 0 and 100 when normalized.
            reward_rule: as in :meth:`from_episodes`.
            episode_rule: as in :meth:`from_episodes`.
            observation_keys: as in :meth:`from_episodes`.
            columns: further columns of the transitions, ``[n, ...]`` each.

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
        given: dict[str, Any] = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminals": terminals,
            "timeouts": timeouts,
            "next_observations": next_observations,
            "episode_ids": episode_ids,
        }
        with errors_at(name):
            arrays: dict[str, Any] = {
                key: given_arrays(values, key)
                for key, values in given.items()
                if values is not None or key not in ENDS
            }
            told: dict[NestedKey, np.ndarray] = {}
            for group, theirs in (("infos", infos or {}), ("columns", columns)):
                if not isinstance(theirs, Mapping):
                    raise TypeError(
                        f"{group} is a {type(theirs).__name__}, expected {{name: array [n, ...]}}"
                    )
                found = {key: array(its, f"{group}/{key}") for key, its in theirs.items()}
                require_rows(arrays | {f"{group}/{key}": its for key, its in found.items()})
                told |= found
            extents: Extents = {}
            spec, spaces, shown_space = flattened(
                arrays,
                observation_space,
                action_space,
                spec_of(env_spec),
                observation_keys,
                extents,
            )
            tells = any(key in arrays for key in ENDS)
            limit = None if tells else time_limit_of(spec)
            episodes = array_episodes(**arrays, infos=told, time_limit=limit)
        dataset = cls.from_episodes(
            name,
            episodes,
            observation_space=spaces[0],
            action_space=spaces[1],
            env_spec=spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            episode_rule=episode_rule,
            columns=list(columns),
        )
        _warn_of_rounding(name, extents)
        recording = replace(dataset.recording, transitions=len(arrays["rewards"]))
        return replace(dataset, observation_space=shown_space, recording=recording)

    @classmethod
    def from_tensordict(
        cls,
        name: str,
        transitions: TensorDictBase,
        *,
        observation_space: Space | None = None,
        action_space: ActionBounds | None = None,
        env_spec: Env | None = None,
        reference_scores: tuple[float, float] | None = None,
        reward_rule: RewardRule = "none",
        episode_rule: EpisodeRule = "as_stored",
        observation_keys: Sequence[NestedKey] | None = None,
        columns: Sequence[NestedKey] = (),
    ) -> OfflineDataset:
        """Split what a TorchRL collector or replay buffer gives into episodes.

        An episode ends with ``terminated``, ``truncated`` or ``done``, where the next observation
        is not that of the following transition, and with each row of ``[B, T]``. All transitions
        are kept, except for padding, which ``("collector", "mask")`` tells. One that is both
        terminated and truncated is terminated.

        Args:
            name: what error messages call the data set.
            transitions: ``[n]`` in the order of time, or ``[B, T]``, each row a part of a
                trajectory, on any device, with ``"observation"``, ``"action"``,
                ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")`` and,
                optionally, ``("next", "truncated")`` and ``("next", "done")``. What collectors,
                policies and buffers of TorchRL add is passed over; anything else has to be named.
            observation_space: as in :meth:`from_arrays`. For ``Discrete``, categories or one-hot.
            action_space: as in :meth:`from_arrays`. For ``Discrete``, categories or one-hot.
            env_spec: the environment to evaluate in, or its id.
            reference_scores: the returns that score 0 and 100 when normalized.
            reward_rule: as in :meth:`from_episodes`.
            episode_rule: as in :meth:`from_episodes`.
            observation_keys: the entries that are observed, here and under ``"next"``, instead of
                ``"observation"``. By default, if the environment shows several, these.
            columns: further entries to keep, here, under ``"next"`` or both.

        Raises:
            TypeError: if a space can not be turned into rows, or ``transitions`` is no TensorDict.
            ValueError: as in :meth:`from_arrays`, if an entry is missing, or if there is one that is
                not read.

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
        with errors_at(name):
            spec = spec_of(env_spec)
            if observation_keys is None and isinstance(transitions, TensorDictBase):
                observed = shown(observation_space, spec, transitions)
            else:
                observed = observation_keys
            arrays = transition_arrays(transitions, observed, columns)
            extents: Extents = {}
            spec, spaces, shown_space = flattened(
                arrays,
                observation_space,
                action_space,
                spec,
                None if observation_keys is None else list(map(written, observation_keys)),
                extents,
            )
            kept = list(arrays["infos"])
            episodes = array_episodes(**arrays)
        dataset = cls.from_episodes(
            name,
            episodes,
            observation_space=spaces[0],
            action_space=spaces[1],
            env_spec=spec,
            reference_scores=reference_scores,
            reward_rule=reward_rule,
            episode_rule=episode_rule,
            columns=kept,
        )
        _warn_of_rounding(name, extents)
        return replace(dataset, observation_space=shown_space)

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
        check_discount(discount)
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
            ValueError: if ``share`` is out of range, or most episodes are fragments.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
        with errors_at(self.name):
            _require_whole(
                self.recording.stopped, len(self.episode_lengths), "the best episodes", remedy=""
            )
        number = max(1, round(share * len(self.episode_returns)))
        order = self.episode_returns.argsort(descending=True, stable=True)
        return self._of_episodes(order[:number].sort().values, Recording())

    def split(self, share: float, *, seed: int = 0) -> tuple[OfflineDataset, OfflineDataset]:
        """Hold out episodes that are drawn uniformly, to validate on what was not learned from.

        Both parts have the rules of the whole and the rewards that it has: of ``"return_range"`` and
        ``"unit_rms"``, the scale is that of all episodes.

        Args:
            share: of the number of episodes that are held out, above 0 and below 1, rounded, but at least
                one episode in each part.
            seed: of the draw, at least 0; which episodes they are depends on it, on the share, and on how
                many there are.

        Returns:
            the rest, and the share that is held out, their transitions copied, in the order they are in.

        Raises:
            ValueError: if an argument is out of range, or there are fewer than two episodes.

        Example:
            >>> dataset = OfflineDataset.from_arrays(
            ...     "walks",
            ...     observations=np.arange(10.0)[:, None],
            ...     actions=np.zeros((10, 1)),
            ...     rewards=np.ones(10),
            ...     terminals=[0, 1] * 5,
            ...     next_observations=np.arange(10.0)[:, None] + 1,
            ... )
            >>> rest, held_out = dataset.split(0.2)
            >>> rest.episode_lengths, held_out.episode_lengths
            (tensor([2, 2, 2, 2]), tensor([2]))
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {share!r}")
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        episodes = len(self.episode_lengths)
        if episodes < 2:
            raise ValueError(
                f"{self.name}: {episodes} episodes can not be split, expected at least 2"
            )
        number = min(max(1, round(share * episodes)), episodes - 1)
        drawn = torch.from_numpy(np.random.default_rng(seed).permutation(episodes))
        parts = drawn[number:].sort().values, drawn[:number].sort().values
        # Which of the episodes stopped is not known, but how many of them.
        stopped = [round(self.recording.stopped * len(part) / episodes) for part in parts]
        rest, held_out = (
            self._of_episodes(part, Recording(number))
            for part, number in zip(parts, stopped, strict=True)
        )
        return rest, held_out

    def _of_episodes(self, chosen: Tensor, recording: Recording) -> OfflineDataset:
        """Return those of some episodes, numbers ``[k]`` in ascending order, their transitions copied."""
        is_chosen = torch.zeros(len(self.episode_lengths), dtype=torch.bool).index_fill(
            0, chosen, True
        )
        return replace(
            self,
            transitions=self.transitions[is_chosen.repeat_interleave(self.episode_lengths)],
            episode_lengths=self.episode_lengths[chosen],
            episode_returns=self.episode_returns[chosen],
            recording=recording,
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
        check_discount(discount)
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

    def windows(self, length: int) -> OfflineDataset:
        """Return the same transitions, of which minibatches are windows of consecutive ones.

        A minibatch of B windows is a TensorDict ``[B, length]``. Each begins at a transition drawn
        uniformly, and goes on into the next episode where its own ends: what belongs to it are the
        entries whose ``"time"`` follows on that of the first. No transition is copied: the data are as
        large as before, on every device. The transitions have, too,

        - ``"time"``: ``[n]`` int64, the number of the step in its episode, from 0;
        - ``"return_to_go"``: ``[n, 1]`` float32, the sum of the rewards from the step to the end of its
          episode, as the environment paid them, before the reward rule.

        Args:
            length: of a window, at least 1.

        Raises:
            ValueError: if ``length`` is out of range, there are columns of these names, or most episodes
                are fragments.

        Example:
            >>> dataset = OfflineDataset.from_arrays(
            ...     "walks",
            ...     observations=np.arange(4.0)[:, None],
            ...     actions=np.zeros((4, 1)),
            ...     rewards=np.ones(4),
            ...     terminals=[False, False, True, True],
            ...     next_observations=np.arange(4.0)[:, None] + 1,
            ... )
            >>> source, indices = dataset.windows(3).minibatches(256)(block=0)
            >>> batch = source[indices[0, 0]]
            >>> batch.shape
            torch.Size([256, 3])
            >>> batch["time"].unique(dim=0)
            tensor([[0, 0, 0],
                    [0, 1, 2],
                    [1, 2, 0],
                    [2, 0, 0]])
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length!r}")
        if taken := {"time", "return_to_go"} & set(self.transitions.keys()):
            raise ValueError(f"{self.name}: there are columns {sorted(taken)} already")
        with errors_at(self.name):
            _require_whole(
                self.recording.stopped, len(self.episode_lengths), "returns to go", remedy=""
            )
        lengths, transform = self.episode_lengths, self.reward_transform
        time = torch.arange(len(self.transitions)) - self.episode_starts.repeat_interleave(lengths)
        left = lengths.repeat_interleave(lengths) - time
        returns = self.returns_to_go().double() - transform.shift * left.unsqueeze(-1)
        transitions = self.transitions.copy()
        transitions["time"] = time
        transitions["return_to_go"] = (returns / transform.scale).float()
        return replace(self, transitions=transitions, window=length)

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

        Raises:
            ValueError: minibatches are windows, of which a buffer knows nothing.
        """
        if self.window is not None:
            raise ValueError(
                f"{self.name} is of windows of {self.window} transitions, and a buffer samples single ones: "
                "take minibatches"
            )
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
            batch_size: transitions, or windows, in the minibatch of one learner.
            seeds: one per learner, at least 0.
            device: where to train.
            streaming: whether the device holds some of the transitions at a time instead of all.

        Returns:
            the :class:`~torchrl_iql.data.Minibatches`, which also say what is drawn when.
        """
        return Minibatches(
            self.transitions,
            batch_size,
            seeds=seeds,
            device=device,
            streaming=streaming,
            window=self.window,
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

    def save_minari(self, dataset_id: str) -> None:
        """Store the data set as one of Minari's, whole or not at all, which :func:`load` reads.

        Loaded again, its transitions are the same, it has the same spaces, environment and reference
        scores, and as many episodes end without a record of it. Episodes are those that it has: after
        the rule ``"until_success"`` they end there. Further columns become infos. It is in the folder of the
        environment variable ``MINARI_DATASETS_PATH``, or Minari's own.

        Args:
            dataset_id: of the new data set, as ``"own/walks-v0"``.

        Raises:
            FileExistsError: if there is one of this id.
            ValueError: if it is no id, the rewards are not those that were paid, or the environment is a
                function, which no file can hold.
        """
        saving.save_minari(self, dataset_id)

    def report(self) -> Report:
        """Describe what is in the data set, to be printed before it is trained on."""
        return report(self)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    if not len(rows):
        raise ValueError("there are no transitions to take statistics of")
    # In parts, since they may exceed the memory.
    size = rows[0].numel()
    parts = rows.split(max(1, min(PART, PART_BYTES // (8 * max(1, size)))))
    mean = torch.zeros(rows.shape[1:], dtype=torch.float64)
    squares, largest = torch.zeros_like(mean), torch.zeros_like(mean)
    for part in parts:
        mean += part.double().sum(0)
    mean /= len(rows)
    for part in parts:
        squares += (part - mean).square_().sum(0)
        largest = largest.maximum(part.double().abs_().amax(0))
    std = (squares / len(rows)).sqrt()
    constant = std <= STD_FLOOR * largest
    return mean.float(), std.masked_fill(constant, 1.0).float()


def _require_alike(
    part: Mapping[NestedKey, np.ndarray], first: Mapping[NestedKey, np.ndarray]
) -> None:
    """Refuse columns of an episode that can not be joined with those of the first one."""
    for key in part.keys() ^ first.keys():  # under "next", of what tells also of the last state
        found, expected = ("T + 1", "T") if key in part else ("T", "T + 1")
        raise ValueError(
            f"infos/{written(key[1:])} has {found} entries, expected {expected}, as in the first episode"  # pyright: ignore
        )
    for key, its in part.items():
        if its.shape[1:] != first[key].shape[1:]:
            raise ValueError(
                f"infos/{written(key)} has entries of shape {list(its.shape[1:])}, expected "
                f"{list(first[key].shape[1:])}, as in the first episode"
            )


def _refuse(outside: Sequence[ActionsOutside], others: int) -> None:
    """Say which action is the first that its space does not hold, and how many there are."""
    number, among = (sum(getattr(each, key) for each in outside) for key in ("outside", "actions"))
    raise ValueError(
        f"{outside[0]}; so are {number} of {among + others} actions, {number / (among + others):.2%}. "
        "The policy keeps the bounds of the action space: give action_space=, by default what the data "
        "declare, the environment's, or [-1, 1] without either, or the environment that has it"
    )


def warn_of_fragments(dataset: OfflineDataset) -> None:
    """Warn if most transitions are not followed by what came next, as far as that can be seen."""
    stopped, transitions = dataset.recording.stopped, len(dataset.transitions)
    if 2 * stopped > transitions > 1:
        warnings.warn(
            f"{dataset.name}: {stopped} of {transitions} transitions are followed by one that does not "
            "continue them; are they in the order of time?",
            stacklevel=_stacklevel(),
        )
    elif _looks_shuffled(dataset.transitions):
        warnings.warn(
            f"{dataset.name}: next observations are as far away as the observations of any other "
            "transitions; are they in the order of time?",
            stacklevel=_stacklevel(),
        )
    elif (number := _jumps_at_time_outs(dataset.transitions)) is not None:
        warnings.warn(
            f"{dataset.name}: number {number} of the observation jumps where episodes end by a time-out, "
            "further than at any other step; are the flags on the right rows, and is the last next "
            "observation not that of another episode?",
            stacklevel=_stacklevel(),
        )


def _looks_shuffled(transitions: TensorDictBase, pairs: int = 1000) -> bool:
    """Return whether a step leads as far as to any other row, as if what follows were not what came next.

    So it does in public data, too, in what is fast, as velocities of a cheetah at 20 steps a second, but not
    in all that is observed: in the tenth of it that moves least it is 0.55 times as far at most, and of rows
    in the wrong order 0.94 times at least.
    """
    if len(transitions) < 100:
        return False
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randint(len(transitions), (2, pairs), generator=generator)
    goes_on = ~transitions["next", "terminated"].squeeze(-1)[rows]
    rows, others = rows[goes_on], others[goes_on]
    here, after, elsewhere = (
        _observed(transitions, key, at)
        for key, at in (
            ("observation", rows),
            (("next", "observation"), rows),
            ("observation", others),
        )
    )
    near, far = ((other - here).abs().mean(dim=0) for other in (after, elsewhere))
    changes = far > 0
    if not changes.any():
        return False
    return bool((near[changes] / far[changes]).quantile(0.1) > 0.8)


JUMP, FEWEST = 3.0, 5
"""In public data that are right it is 0.9 times as much at most, with flags a row late 21 times."""


def _jumps_at_time_outs(transitions: TensorDictBase, rows: int = 1000) -> int | None:
    """Find the number of the observation that jumps furthest where episodes end by a time-out, if one does.

    Returns:
        the one whose median change there is largest beside that which one of 100 other steps exceeds, if that
        is ``JUMP`` times as much; None if none is, with fewer than 100 transitions or ``FEWEST`` time-outs.
    """
    terminated, done = (transitions["next", key].squeeze(-1) for key in ("terminated", "done"))
    timed_out = (done & ~terminated).nonzero().squeeze(-1)
    if len(transitions) < 100 or len(timed_out) < FEWEST:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn, among = (
        torch.randint(len(each), (rows,), generator=generator) for each in (transitions, timed_out)
    )
    usual, at_ends = (
        (
            _observed(transitions, ("next", "observation"), at)
            - _observed(transitions, "observation", at)
        ).abs()
        for at in (drawn[~done[drawn]], timed_out[among])
    )
    if not len(usual):
        return None
    often = usual.kthvalue(int(0.99 * len(usual)) + 1, dim=0).values
    times = torch.where(often > 0, at_ends.median(dim=0).values / often, 0.0)
    return int(times.argmax()) if bool(times.max() > JUMP) else None


def _observed(transitions: TensorDictBase, key: NestedKey, rows: Tensor) -> Tensor:
    return torch.as_tensor(transitions[key][rows]).flatten(1).double()


SINGLE = "; or give a rule of single transitions, as 'unit_rms' or 'none'"


def _require_whole(stopped: int, episodes: int, what: str, remedy: str = SINGLE) -> None:
    if 2 * stopped > episodes:
        raise ValueError(
            f"{what}: a statistic of whole episodes, but {stopped} of {episodes} end without a terminal "
            "or a recorded time-out; give timeouts where episodes were cut (truncations, ('next', "
            f"'truncated')), and rows in the order of time{remedy}"
        )


DOMINANT = 0.99
"""The share of the sum of squares at which a single reward decides about the scale of the others."""


def _warn_of_dominant(name: str, raw: Tensor, scale: float) -> None:
    """Warn if one reward makes the scale of ``"unit_rms"``, beside which the others vanish."""
    scaled = raw.abs().flatten() * scale
    others = scaled.count_nonzero() - 1
    if others >= 10 and scaled.max().square() > DOMINANT * scaled.square().sum():
        where = int(scaled.argmax())
        warnings.warn(
            f"{name}: reward rule 'unit_rms' scales by a single reward, {raw.flatten()[where]:g} of "
            f"transition {where}; the {others} others that are not 0 become {scaled.median():.2g} or so. Is "
            "it one?",
            stacklevel=_stacklevel(),
        )


def _warn_of_rounding(name: str, extents: Extents) -> None:
    """Warn of columns whose values float32 can hardly tell apart."""
    if lost := hardly_told_apart(extents):
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.warn(
            f"{name}: rows are float32, which has fewer than {LEVELS} values over the range of "
            f"{', '.join(lost[:5])}{more}: subtract an offset",
            stacklevel=_stacklevel(),
        )


def _stacklevel() -> int:
    """Return the one that makes a warning point to the caller of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(__package__):
        frame, level = frame.f_back, level + 1
    return level


def require_rules(reward_rule: str, episode_rule: str) -> None:
    """Raise a ValueError that names the value and the allowed ones if a rule does not exist."""
    for kind, rule, allowed in (
        ("reward", reward_rule, get_args(RewardRule)),
        ("episode", episode_rule, get_args(EpisodeRule)),
    ):
        if rule not in allowed:
            raise ValueError(f"unknown {kind} rule {rule!r}, choose from {', '.join(allowed)}")
