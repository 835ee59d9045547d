"""Complete episodes of a deterministic policy, and what they are worth.

* :class:`Evaluator`: plays the same seeded episodes at every call.
* :class:`Evaluation`: the outcome of one call, per episode and summarised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.wrappers import TimeLimit
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from torchrl_iql.environments import (
    Env,
    data_environment,
    reference_scores_of,
    require_reference_scores,
    success,
    time_limit,
)
from torchrl_iql.spaces import observation_dtype

__all__ = ["Evaluation", "Evaluator"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of ``E`` complete episodes.

    Args:
        returns: undiscounted sums of rewards, float64 ``[E]``.
        lengths: numbers of steps, int64 ``[E]``.
        successes: whether the environment reported success at any step, bool ``[E]``; ``None`` if
            it never reported on it.
        normalized_scores: 0 for a random and 100 for an expert policy, float64 ``[E]``; ``None`` if
            neither reference returns nor successes are known.
        trajectories: the flat observations of each episode, ``[length + 1, D]``; ``None``
            unless they were asked for.

    Example:
        >>> evaluation = Evaluation(returns=np.array([1.0, 3.0]), lengths=np.array([5, 7]))
        >>> evaluation.score_name, evaluation.score
        ('return', 2.0)
        >>> evaluation.summary()
        {'score': 2.0, 'return': 2.0, 'return_stderr': 1.0, 'length': 6.0, 'length_stderr': 1.0}
    """

    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray | None = None
    normalized_scores: np.ndarray | None = None
    trajectories: list[np.ndarray] | None = None

    @property
    def score(self) -> float:
        """The headline number: the mean normalized score if there is one, else the mean return."""
        scores = self.returns if self.normalized_scores is None else self.normalized_scores
        return float(scores.mean())

    @property
    def score_name(self) -> str:
        """What :attr:`score` is the mean of: ``"normalized_score"`` or ``"return"``."""
        return "return" if self.normalized_scores is None else "normalized_score"

    def summary(self) -> dict[str, float]:
        """Return means and standard errors, for a logger or a JSON file.

        Returns:
            ``score``, then ``return``, ``length``, ``success`` and ``normalized_score`` as far as
            they are known, each with its standard error ``*_stderr`` (absent after a single
            episode, which says nothing about the spread).
        """
        samples = {
            "return": self.returns,
            "length": self.lengths,
            "success": self.successes,
            "normalized_score": self.normalized_scores,
        }
        summary = {"score": self.score}
        for name, sample in samples.items():
            if sample is not None:
                summary[name] = float(sample.mean())
                if len(sample) > 1:
                    summary[f"{name}_stderr"] = float(sample.std(ddof=1)) / math.sqrt(len(sample))
        return summary


class Evaluator:
    """Plays complete episodes of a deterministic policy, the same ones at every call.

    There is one environment per episode, built once. The policy acts for all of them at once, and
    each plays exactly one episode, until it is terminated or truncated: a short episode does not
    make room for another, and a finished environment is not stepped any more. Observations and actions
    are as data sets hold them, whatever the spaces of the environment
    (:func:`~torchrl_iql.environments.data_environment`).

    Args:
        env_spec: the environment: an id, ``"module:Id-v0"``, the specification of a data set, or a
            function that makes a new one at each call.
        episodes: the number of episodes ``E``, at least 1.
        seed: episode ``i`` is reset with ``seed + i``, at every call.
        reference_scores: the returns of a random and of an expert policy, for the normalized score
            ``100 (return - random) / (expert - random)``. Default: those of
            :data:`~torchrl_iql.environments.REFERENCE_SCORES` under the exact name of the
            environment; failing that the normalized score is ``100 * success``, as D4RL scores its
            mazes, where the environment reports success.
        step_limit: of an episode, in environments that have no limit of their own. An episode that
            reaches it counts as it is, with a warning.

    Raises:
        ValueError: if ``episodes``, ``step_limit`` or ``reference_scores`` are out of range, the
            environment cannot be built, or a function returns the same one twice.
        TypeError: if the action space is neither ``Box`` nor ``Discrete``.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> push_right = TensorDictModule(
        ...     lambda observation: torch.ones(len(observation), dtype=torch.int64),
        ...     in_keys=["observation"],
        ...     out_keys=["action"],
        ... )
        >>> with Evaluator("CartPole-v1", episodes=3) as evaluate:
        ...     evaluate(push_right).returns.tolist()
        [8.0, 9.0, 10.0]
    """

    def __init__(
        self,
        env_spec: Env,
        *,
        episodes: int = 10,
        seed: int = 0,
        reference_scores: tuple[float, float] | None = None,
        step_limit: int = 10_000,
    ) -> None:
        for name, value in (("episodes", episodes), ("step_limit", step_limit)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if reference_scores is not None:
            require_reference_scores(reference_scores)
        self.seed = seed
        self.envs = [data_environment(env_spec) for _ in range(episodes)]
        if len({id(env.unwrapped) for env in self.envs}) < episodes:
            raise ValueError(
                f"env_spec returned {self.envs[0].unwrapped} more than once: a function has to make one "
                "anew at each call, since all episodes are played at once."
            )
        self._limit = None
        if time_limit(self.envs[0]) is None:
            self._limit = step_limit
            self.envs = [TimeLimit(env, step_limit) for env in self.envs]
        self.action_space = self.envs[0].action_space
        if reference_scores is None:
            reference_scores = reference_scores_of(self.envs[0].spec)
        self.reference_scores = reference_scores

    def __call__(
        self, policy: TensorDictModuleBase, *, keep_trajectories: bool = False
    ) -> Evaluation:
        """Play one episode in each environment.

        Args:
            policy: reads ``"observation"``, ``[E, D]``, uint8 of images and else float32, and writes
                ``"action"``: ``[E, A]`` or ``[E, *shape]`` for a ``Box`` of a shape of ``A`` entries
                (clipped to its bounds, and rounded where it holds integers); ``[E]`` or ``[E, 1]``
                (categories from 0) or ``[E, n]`` (one-hot) for a ``Discrete(n)``. It acts on the device
                of its parameters, in eval mode, without gradients and without exploration. A recurrent
                one reads ``"is_init"``, bool ``[E, 1]``, and what it wrote under ``"next"`` one step
                before; one that is told its rewards reads ``"reward"``, ``[E, 1]``, of the step before,
                0 at first.
            keep_trajectories: whether to return the observations of every episode.

        Returns:
            the outcome of the ``E`` episodes.

        Raises:
            ValueError: if an action has another shape, or that of a running episode, or what is observed
                there, is NaN; or if the policy can not do without an input that nothing provides.
        """
        episodes = len(self.envs)
        returns = np.zeros(episodes)
        lengths = np.zeros(episodes, dtype=np.int64)
        successes: list[bool | None] = [None] * episodes
        running = np.ones(episodes, dtype=bool)
        resets = [env.reset(seed=self.seed + i)[0] for i, env in enumerate(self.envs)]
        dtype = observation_dtype(self.envs[0].observation_space)
        observations = np.stack(resets).astype(dtype)
        rewards = np.zeros((episodes, 1), np.float32)
        trajectories = [[observation] for observation in observations.copy()]

        with (
            torch.no_grad(),
            set_exploration_type(ExplorationType.DETERMINISTIC),
            set_recurrent_mode(False),
            _eval_mode(policy),
        ):
            remembering = _Remembering(policy)
            while running.any():
                self._require_observed(observations, running)
                actions = self._actions(remembering, observations, rewards, running)
                for i in np.flatnonzero(running):
                    observations[i], reward, terminated, truncated, info = self.envs[i].step(
                        actions[i]
                    )
                    rewards[i] = reward
                    returns[i] += float(reward)
                    lengths[i] += 1
                    running[i] = not (terminated or truncated)
                    succeeded = success(info)
                    if succeeded is not None:
                        successes[i] = bool(successes[i]) or succeeded
                    if keep_trajectories:
                        trajectories[i].append(observations[i].copy())

        if self._limit is not None and self._limit in lengths:
            warnings.warn(
                f"{(lengths == self._limit).sum()} of {episodes} episodes in {self.envs[0].unwrapped} were "
                f"cut after {self._limit} steps: it has no max_episode_steps",
                stacklevel=2,
            )
        reported = any(each is not None for each in successes)
        succeeded = np.array(successes, dtype=bool) if reported else None
        return Evaluation(
            returns=returns,
            lengths=lengths,
            successes=succeeded,
            normalized_scores=self._normalized_scores(returns, succeeded),
            trajectories=[np.stack(t) for t in trajectories] if keep_trajectories else None,
        )

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_observed(self, observations: np.ndarray, running: np.ndarray) -> None:
        """Refuse what no policy can answer, before the policy is blamed for its answer."""
        wrong = running & ~np.isfinite(observations).all(axis=1)
        if wrong.any():
            episode = np.flatnonzero(wrong)[0]
            raise ValueError(
                f"{self.envs[0].unwrapped} observed {observations[episode].tolist()} in episode {episode}, "
                "expected finite numbers."
            )

    def _actions(
        self,
        policy: TensorDictModuleBase,
        observations: np.ndarray,
        rewards: np.ndarray,
        running: np.ndarray,
    ) -> np.ndarray:
        """Return checked actions, ``[E, A]``, or ``[E]`` if discrete."""
        device = next((parameter.device for parameter in policy.parameters()), None)
        known = {"observation": observations, "reward": rewards}
        batch = TensorDict(
            {key: torch.tensor(its, device=device) for key, its in known.items()},
            [len(observations)],
        )
        actions = policy(batch)["action"].cpu().numpy()
        played, taken = (env.action_space for env in (self.envs[0].unwrapped, self.envs[0]))
        if isinstance(taken, Discrete):
            shapes: list[tuple[int, ...]] = [(), (1,), (int(taken.n),)]
        else:
            shapes = [played.shape or (), taken.shape or ()]
        allowed = [(len(observations), *shape) for shape in dict.fromkeys(shapes)]
        if actions.shape not in allowed:
            raise ValueError(
                f"The policy wrote an action of shape {list(actions.shape)}; {played} needs "
                f"{' or '.join(str(list(shape)) for shape in allowed)}."
            )
        not_a_number = running & np.isnan(actions).reshape(len(actions), -1).any(axis=1)
        if not_a_number.any():
            raise ValueError(f"The action of episode {np.flatnonzero(not_a_number)[0]} is NaN.")
        if isinstance(taken, Discrete) and actions.shape == (len(actions), taken.n) and taken.n > 1:
            return actions.argmax(axis=1)
        return actions.reshape(len(actions), *(taken.shape or ()))

    def _normalized_scores(
        self, returns: np.ndarray, successes: np.ndarray | None
    ) -> np.ndarray | None:
        if self.reference_scores is not None:
            random, expert = self.reference_scores
            return 100.0 * (returns - random) / (expert - random)
        return None if successes is None else 100.0 * successes


class _Remembering(TensorDictModuleBase):
    """A policy in episodes that begin at its first call: it reads what it wrote under ``"next"``."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation", "reward"], ["action"]
        self.policy = policy
        self.state: TensorDictBase | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        keys = self.policy.in_keys
        if "is_init" in keys:
            like = tensordict["observation"][:, :1]
            first = torch.full_like(like, self.state is None, dtype=torch.bool)
            tensordict.set("is_init", first)
        if self.state is not None:
            tensordict.update(self.state)
        try:
            written = self.policy(tensordict)
        except KeyError as error:
            if missing := [key for key in keys if key not in tensordict.keys(True)]:
                raise ValueError(
                    f"The policy reads {missing}, which nothing provides: it is given 'observation', "
                    "'reward', 'is_init', and from the second step on what it wrote under 'next'."
                ) from error
            raise
        self.state = written.get("next", default=tensordict.empty()).select(*keys, strict=False)
        return written


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Set eval mode inside; outside every submodule is back in its own mode."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
