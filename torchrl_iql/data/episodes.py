"""One recorded episode, checked, as columns of transitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium import Space
from minari import EpisodeData

from torchrl_iql.data.spaces import (
    action_rows,
    array,
    column,
    flags,
    observation_rows,
    require_finite,
)

if TYPE_CHECKING:
    from tensordict import NestedKey

__all__ = ["EpisodeRule", "episode_data", "errors_at", "is_episode", "transition_columns"]

EpisodeRule = Literal["as_stored", "until_success"]

REQUIRED = "observations", "actions", "rewards", "terminations"
OPTIONAL = "id", "truncations", "infos"


def is_episode(value: Any) -> bool:
    """Return whether this is one episode: Minari's, or a mapping."""
    return isinstance(value, Mapping) or hasattr(value, "rewards")


def episode_data(episode: Mapping[str, Any]) -> EpisodeData:
    """Make an episode of its entries; ``"id"``, ``"truncations"`` and ``"infos"`` may be missing.

    Raises:
        ValueError: if another one is missing, or there is one that an episode does not have.
    """
    missing = [key for key in REQUIRED if key not in episode]
    unknown = [key for key in episode if key not in REQUIRED + OPTIONAL]
    if missing or unknown:
        raise ValueError(
            f"found entries {sorted(episode)}, expected {', '.join(REQUIRED)} and, optionally, "
            f"{', '.join(OPTIONAL)}"
        )
    length = len(column(episode["rewards"], "rewards"))
    defaults = {"id": 0, "truncations": np.zeros(length, bool), "infos": {}}
    return EpisodeData(**defaults | dict(episode))


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Put a place before the message of a TypeError or a ValueError."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def transition_columns(
    episode: EpisodeData,
    observation_space: Space,
    action_space: Space,
    episode_rule: EpisodeRule,
) -> dict[NestedKey, np.ndarray]:
    """Turn an episode of T transitions into one array per entry of a TensorDict.

    Args:
        episode: T + 1 observations; T actions, rewards, terminations and truncations.
        observation_space: space of one observation.
        action_space: space of one action.
        episode_rule: ``"as_stored"``, or ``"until_success"`` to terminate the episode at its first
            success and drop the rest.

    Returns:
        the entries described in :class:`~torchrl_iql.data.OfflineDataset`, rewards in float64.

    Raises:
        TypeError: if a space can not be turned into rows.
        ValueError: if lengths disagree, an array has the wrong shape or type, a value does not fit
            its space, is NaN or infinite as float32, the episode ends before its last transition, or
            ``"until_success"`` finds no record of success. What follows the success is not checked.
            The last observation before a termination may be NaN, since its value is never used; it
            is kept.
    """
    rewards = column(episode.rewards, "rewards")
    length = len(rewards)
    if length == 0:
        raise ValueError("rewards has no entries")
    for key in ("actions", "terminations", "truncations"):
        shape = array(getattr(episode, key), key).shape
        if shape[:1] != (length,):
            found = shape[0] if shape else "no"
            raise ValueError(f"{key} has {found} entries, expected {length}, as many as rewards")

    success = _first_success(episode, rewards) if episode_rule == "until_success" else None
    stop = length if success is None else success + 1
    observations = observation_rows(observation_space, episode.observations, length + 1)[: stop + 1]
    actions = action_rows(action_space, episode.actions[:stop])
    rewards = rewards[:stop].astype(np.float64)
    terminated = flags(episode.terminations[:stop], "terminations")
    truncated = flags(episode.truncations[:stop], "truncations")
    for key, ended in (("terminations", terminated), ("truncations", truncated)):
        if ended[:-1].any():
            raise ValueError(
                f"{key}[{ended.argmax()}] ends the episode before its last transition, {stop - 1}"
            )
    if success is not None:
        terminated[-1], truncated[-1] = True, False
    elif not terminated[-1]:
        # A recording that just stops: unmarked, the next episode would seem to continue it.
        truncated[-1] = True
    require_finite(observations[:-1] if terminated[-1] else observations, "observations")
    require_finite(rewards, "rewards")

    return {
        "observation": observations[:-1],
        "action": actions,
        ("next", "observation"): observations[1:],
        ("next", "reward"): rewards.reshape(-1, 1),
        ("next", "done"): (terminated | truncated).reshape(-1, 1),
        ("next", "terminated"): terminated.reshape(-1, 1),
        ("next", "truncated"): truncated.reshape(-1, 1),
    }


def _first_success(episode: EpisodeData, rewards: np.ndarray) -> int | None:
    """Find the index of the first transition that ends in success, None without one.

    Success is ``infos["success"]``, else a reward of 1 among rewards of 0 and 1. Minari stores the
    info of the reset before those of the steps: a success there belongs to no transition.
    """
    length, infos = len(rewards), episode.infos or {}
    if "success" in infos:
        recorded = flags(infos["success"], "infos/success")
        if len(recorded) not in (length, length + 1):
            raise ValueError(
                f"infos/success has {len(recorded)} entries, expected {length} or {length + 1}"
            )
        success = recorded[-length:]
    elif np.isin(rewards, (0, 1)).all():
        success = rewards.astype(bool)
    else:
        raise ValueError(
            "episode rule 'until_success' needs infos/success or rewards of 0 and 1, "
            f"found infos {sorted(infos)} and other rewards"
        )
    return int(success.argmax()) if success.any() else None
