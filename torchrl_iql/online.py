"""The parts of online fine-tuning that do not depend on the algorithm, nor on where data are collected.

* :func:`environment`: pays and ends as the episodes of a data set do.
* :func:`behavior`: a policy as it acts while data are collected.
* :func:`collecting`: a collector, in this process, in others or on other machines.
* :func:`transitions`: what a collector gives, as rows of the data set.
* :class:`Experience`: offline and online transitions, sampled together.

They are in the package, and not in a recipe, because the processes and machines that collect import them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import (
    Bounded,
    ImmutableDatasetWriter,
    LazyTensorStorage,
    OfflineToOnlineReplayBuffer,
    ReplayBuffer,
    TensorStorage,
)
from torchrl.envs import (
    Compose,
    EnvBase,
    GymWrapper,
    InitTracker,
    RewardScaling,
    RewardSum,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType
from torchrl.weight_update import SharedMemWeightSyncScheme

from torchrl_iql.data.dataset import OfflineDataset
from torchrl_iql.data.episodes import EpisodeRule
from torchrl_iql.data.rewards import UNCHANGED, RewardTransform
from torchrl_iql.environments import Env, data_environment, success, success_paid
from torchrl_iql.spaces import action_support, in_float32, observation_dtype, written

__all__ = [
    "Experience",
    "behavior",
    "check_mixture",
    "collecting",
    "environment",
    "transitions",
]

ANSWER_TIMEOUT = 10.0
"""Seconds that a worker has to take new weights over."""


def environment(
    env_spec: Env,
    *,
    reward_transform: RewardTransform = UNCHANGED,
    episode_rule: EpisodeRule = "as_stored",
) -> EnvBase:
    """Make a TorchRL environment whose transitions are like those of a data set.

    Observations and actions are the rows of a data set, see
    :func:`~torchrl_iql.environments.data_environment`, and ``("next", "reward")`` is transformed.
    ``("next", "episode_reward")`` is the sum of the raw rewards and ``("next", "step_count")`` the number
    of steps of the present episode.

    Args:
        env_spec: the environment: an id, a specification, or a function that makes it.
        reward_transform: that of the data set.
        episode_rule: that of the data set. ``"until_success"`` terminates at the first success that
            the environment reports or, if it reports none and has paid nothing but 0 and 1, at a reward of 1.

    Raises:
        ValueError: if the environment cannot be built.

    Example:
        >>> env = environment("Pendulum-v1", reward_transform=RewardTransform(shift=-1.0))
        >>> steps = env.rollout(3)["next"]
        >>> raw = steps["reward"] + 1
        >>> torch.testing.assert_close(raw.cumsum(0), steps["episode_reward"])
    """
    env = _of_rows(data_environment(env_spec))
    if episode_rule == "until_success":
        env = _UntilSuccess(env)
    return TransformedEnv(
        GymWrapper(env, categorical_action_encoding=True),
        Compose(
            InitTracker(),  # collectors of TorchRL want it for any policy
            StepCounter(),  # pyright: ignore
            RewardSum(),  # before the scaling: of the raw rewards
            RewardScaling(loc=reward_transform.shift, scale=reward_transform.scale),
        ),
    )


def _of_rows(env: gymnasium.Env) -> gymnasium.Env:
    """Make the observations rows' type, and their bounds, of which gymnasium's own wrapper warns."""
    space = env.observation_space
    assert isinstance(space, Box)
    dtype: Any = observation_dtype(space)
    bounds = space if dtype is np.uint8 else Box(*in_float32(space))
    return TransformObservation(env, partial(np.asarray, dtype=dtype), bounds)


class _UntilSuccess(gymnasium.Wrapper):
    """Ends where the data do: at what is reported or, if nothing is, at the 1 of rewards of 0 and 1."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._is_paid = True

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        reported, paid = success(info), success_paid(reward)
        self._is_paid &= reported is None and paid is not None
        if reported or (self._is_paid and paid):
            terminated, truncated = True, False
        return observation, reward, terminated, truncated, info


def behavior(
    policy: TensorDictModule, action_space: Space, *, noise: float = 1.0
) -> TensorDictSequential:
    """Make a policy that acts within the support of a data set's actions.

    Args:
        policy: of :mod:`torchrl_iql.models`, on the CPU. Its parameters are shared.
        action_space: ``Box`` or ``Discrete``. Into a ``Box``, actions are clipped before they are
            executed, as the data set's are, and into the bounds that the policy was built with.
        noise: factor on the standard deviation of the policy, at least 0. With 0, collect without
            exploration.

    Raises:
        ValueError: if ``noise`` is out of range, or neither 0 nor 1 for a policy without a standard
            deviation.
    """
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise!r}")
    modules = [policy]
    if noise not in (0, 1):
        if "scale" not in policy.out_keys:
            raise ValueError(
                f"noise must be 0 or 1, got {noise!r}: the policy has no standard deviation to scale"
            )
        parameters, draw = policy  # pyright: ignore
        scaled = partial(torch.mul, other=noise)
        modules = [
            parameters,
            TensorDictModule(scaled, in_keys=["scale"], out_keys=["scale"]),
            draw,
        ]
    if isinstance(action_space, Box):
        low, high = map(torch.from_numpy, action_support(action_space))
        if isinstance(spec := policy.spec["action"], Bounded):  # pyright: ignore
            low, high = low.maximum(spec.low), high.minimum(spec.high)
        clip = partial(torch.clamp, min=low, max=high)
        modules.append(TensorDictModule(clip, in_keys=["action"], out_keys=["action"]))
    return TensorDictSequential(*modules)


@contextmanager
def collecting(
    create_env: Callable[[], EnvBase],
    policy: TensorDictModuleBase,
    *,
    total_frames: int,
    explore: bool = True,
    seed: int = 0,
    **arguments: Any,
) -> Iterator[BaseCollector]:
    """Yield a collector that leaves no process behind.

    Args:
        create_env: as :func:`environment`, with its arguments in a :func:`functools.partial`: it is sent
            to the workers.
        policy: acts, and is sent to the workers anew by ``collector.update_policy_weights_()``.
        total_frames: how many steps to take.
        explore: whether actions are drawn from its distribution, instead of taking its mean or mode.
        seed: of the environments.
        **arguments: others of :class:`torchrl.collectors.Collector`: ``frames_per_batch``, ``backend``,
            ``num_collectors``, ``sync``, ``backend_options``.
    """
    backend = arguments.get("backend", "direct")
    threads = torch.get_num_threads()
    if backend == "process":
        arguments["weight_sync_schemes"] = {"policy": _WeightSync()}  # pyright: ignore
        arguments.setdefault(
            "num_threads", threads
        )  # TorchRL would take one from us for each worker
    # Workers inherit that Ctrl-C is ignored: the learner receives it, and ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        collector = Collector(
            create_env,  # pyright: ignore
            policy,
            total_frames=total_frames,
            exploration_type=ExplorationType("random" if explore else "deterministic"),
            **arguments,
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        collector.set_seed(seed)
        # That resets the environments, and only the multi-process collectors take notice.
        if backend == "direct":
            collector.reset()  # pyright: ignore
        elif backend == "ray":
            collector.map_fn("reset")  # pyright: ignore
        collector.update_policy_weights_()  # pyright: ignore
        yield collector
    finally:
        collector.shutdown()
        torch.set_num_threads(threads)


class _WeightSync(SharedMemWeightSyncScheme):
    """TorchRL's, which would wait forever for the answer of a worker that has died."""

    def _wait_for_ack(
        self, worker_ids: int | list[int] | None = None, timeout: float | None = None
    ) -> None:
        super()._wait_for_ack(worker_ids, ANSWER_TIMEOUT if timeout is None else timeout)


def transitions(
    collected: TensorDictBase, like: TensorDictBase, *, first_step: int = 0
) -> TensorDictBase:
    """Make rows of a data set from what a collector gave.

    Args:
        collected: transitions of any batch shape.
        like: transitions with the entries that are wanted.
        first_step: what messages call the first of them.

    Returns:
        TensorDict ``[n]`` with the entries of ``like``.

    Raises:
        ValueError: if a value is NaN or infinite, other than in the observation after a termination,
            which is never used.
    """
    keys = list(like.keys(include_nested=True, leaves_only=True))
    rows = collected.select(*keys).reshape(-1)
    wrong = {}
    for key in keys:
        finite = rows[key].isfinite().reshape(len(rows), -1).all(dim=1)
        if key == ("next", "observation"):
            finite |= rows["next", "terminated"].squeeze(-1)
        if not finite.all():
            wrong[key] = int(finite.int().argmin())
    if wrong:
        key, row = min(wrong.items(), key=lambda item: item[1])
        raise ValueError(
            f"{written(key)} of environment step {first_step + row} is {rows[key][row].tolist()}, expected "
            "finite numbers"
        )
    return rows


def check_mixture(offline_share: float | None, anneal_steps: int | None) -> None:
    """Refuse what :class:`Experience` cannot mix.

    Raises:
        ValueError: if an argument is out of range, or there is no share to anneal.
    """
    if offline_share is not None and not 0 < offline_share < 1:
        raise ValueError(f"offline_share must be None or in (0, 1), got {offline_share!r}")
    if anneal_steps is not None and offline_share is None:
        raise ValueError(f"anneal_steps={anneal_steps} needs an offline_share to anneal")
    if anneal_steps is not None and anneal_steps < 1:
        raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")


class Experience:
    """The transitions of a data set, and those collected since, to be sampled together.

    Args:
        dataset: the offline part; it may be empty.
        capacity: how many transitions can be collected.
        batch_size: transitions per sample.
        offline_share: of each sample, from the data set, in (0, 1): TorchRL's
            :class:`~torchrl.data.OfflineToOnlineReplayBuffer`. None samples all transitions alike.
        anneal_steps: collected transitions after which the share has fallen, linearly, to 0. None keeps
            it.
        device: where the transitions lie.

    Raises:
        ValueError: if an argument is out of range, or there is a share of nothing.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        capacity: int,
        batch_size: int,
        *,
        offline_share: float | None = None,
        anneal_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_mixture(offline_share, anneal_steps)
        offline = dataset.transitions
        self._anneal_steps = anneal_steps
        if offline_share is None:
            storage = LazyTensorStorage(len(offline) + capacity, device=device)
            self._buffer = self._rows = ReplayBuffer(storage=storage, batch_size=batch_size)
            if len(offline):
                self._rows.extend(offline)
        else:
            if not len(offline):
                raise ValueError(
                    f"offline_share={offline_share!r} needs offline data, there are none"
                )
            storage = TensorStorage(offline.to(device), device=device)
            self._buffer = OfflineToOnlineReplayBuffer(
                ReplayBuffer(storage=storage, writer=ImmutableDatasetWriter()),
                online_storage=LazyTensorStorage(capacity, device=device),
                offline_fraction=offline_share,
                batch_size=batch_size,
            )
            self._rows = self._buffer.online_buffer
        self._first = len(self._rows)  # of the collected ones, in their buffer
        self._offline_size = len(offline)

    def __len__(self) -> int:
        """Count the transitions that were collected."""
        return len(self._rows) - self._first

    @property
    def offline_share(self) -> float:
        """Of the next sample, on average."""
        if isinstance(self._buffer, OfflineToOnlineReplayBuffer):
            return self._buffer.offline_fraction if len(self) else 1.0
        return self._offline_size / max(1, len(self._rows))

    def extend(self, transitions: TensorDictBase) -> None:
        """Add collected transitions, ``[n]``."""
        self._rows.extend(transitions)
        if self._anneal_steps is not None:
            self._buffer.anneal(len(self), self._anneal_steps)  # pyright: ignore

    def truncate(self) -> None:
        """Mark the latest collected transition as truncated, if it is not terminated: nothing follows it."""
        if len(self):
            last = len(self._rows) - 1
            row = self._rows[last]
            row["next", "truncated"] = ~row["next", "terminated"]
            row["next", "done"] = torch.ones_like(row["next", "done"])
            self._rows[last] = row

    def sample(self) -> TensorDictBase:
        """Draw a batch, with replacement, by the global random number generator."""
        return self._buffer.sample()

    def state_dict(self) -> dict[str, Any]:
        """Return the collected transitions, copied; those of the data set are stored elsewhere."""
        return self._rows[self._first :].clone().to_dict() if len(self) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the transitions of another one's :meth:`state_dict`."""
        if state:
            self.extend(TensorDict(state).auto_batch_size_(1))
