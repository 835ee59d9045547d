"""One episode, played and written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

__all__ = ["record"]

Act = Callable[[Any], np.ndarray]
Stop = Callable[[Any], bool]


def record(
    env: gymnasium.Env,
    act: Act,
    *,
    seed: int,
    options: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> EpisodeBuffer:
    """Play an episode until the environment, or ``stop``, ends it.

    Args:
        env: the environment.
        act: from an observation to an action.
        seed: of the reset.
        options: of the reset.
        stop: whether to end the episode at an observation. Without a flag of the environment, such an
            end is recorded as a truncation.

    Returns:
        the episode; from its seed, options and actions the environment gives its observations again.
    """
    observation, _ = env.reset(seed=seed, options=options)
    observations, actions, rewards, terminations, truncations = [observation], [], [], [], []
    done = False
    while not done:
        action = act(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        truncated = truncated or (not terminated and stop is not None and stop(observation))
        done = terminated or truncated
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
    return EpisodeBuffer(
        seed=seed,
        options=options,
        observations=_columns(observations),
        actions=np.stack(actions),  # pyright: ignore
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={},
    )


def _columns(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: _columns([each[key] for each in observations]) for key in observations[0]}
    return np.stack(observations)
