"""One recorded episode, checked, as columns of transitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import Space
from minari import EpisodeData
from tensordict import unravel_key

from torchrl_iql.data.rules import EpisodeRule
from torchrl_iql.environments import SUCCESS, success_paid
from torchrl_iql.spaces import (
    ActionsOutside,
    Extents,
    action_rows,
    array,
    column,
    extend,
    flags,
    numbers,
    observation_dtype,
    observation_rows,
    require_finite,
    written,
)

if TYPE_CHECKING:
    from tensordict import NestedKey

__all__ = [
    "TAKEN",
    "EpisodeRule",
    "episode_data",
    "errors_at",
    "is_episode",
    "require_names",
    "transition_columns",
]


TAKEN = (
    "observation",
    "action",
    "next",
    *(f"next/{name}" for name in ("observation", "reward", "done", "terminated", "truncated")),
)
"""Entries of transitions that no other column can have the name of."""

REQUIRED = "observations", "actions", "rewards", "terminations"
OPTIONAL = "id", "truncations", "infos"


def is_episode(value: Any) -> bool:
    """Return whether this is one episode: Minari's, or a mapping."""
    return isinstance(value, Mapping) or hasattr(value, "rewards")


def episode_data(episode: Mapping[str, Any]) -> EpisodeData:
    """Make an episode of its entries; ``"id"``, ``"truncations"`` and ``"infos"`` may be missing.

    Without truncations, what is given is whole: it is truncated at its end if it does not terminate.

    Raises:
        ValueError: if another one is missing, or there is one that an episode does not have.
    """
    missing = [key for key in REQUIRED if key not in episode]
    unknown = [key for key in episode if key not in REQUIRED + OPTIONAL]
    if missing or unknown:
        raise ValueError(
            f"found entries {sorted(episode)}, expected {', '.join(REQUIRED)} and, optionally, "
            f"{', '.join(OPTIONAL)}; others belong into infos, and are kept by columns="
        )
    length = len(column(episode["rewards"], "rewards"))
    truncations = np.zeros(length, bool)
    truncations[-1:] = not np.any(np.ravel(array(episode["terminations"], "terminations"))[-1:])
    defaults = {"id": 0, "truncations": truncations, "infos": {}}
    return EpisodeData(**defaults | dict(episode))


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Put a place before the message of a TypeError or a ValueError."""
    try:
        yield
    except ActionsOutside as error:
        raise ActionsOutside(f"{place}: {error}", error.outside, error.actions) from error
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def transition_columns(
    episode: EpisodeData,
    observation_space: Space,
    action_space: Space,
    episode_rule: EpisodeRule,
    columns: Sequence[NestedKey] = (),
    extents: Extents | None = None,
) -> tuple[dict[NestedKey, np.ndarray], bool]:
    """Turn an episode of T transitions into one array per entry of a TensorDict.

    Args:
        episode: T + 1 observations; T actions, rewards, terminations and truncations.
        observation_space: space of one observation.
        action_space: space of one action.
        episode_rule: ``"as_stored"``, or ``"until_success"`` to terminate the episode at its first
            success and drop the rest.
        columns: infos that are kept, under their names.
        extents: of observations and infos of earlier episodes, to which these are added.

    Returns:
        the entries described in :class:`~torchrl_iql.data.OfflineDataset`, rewards in float64; and
        whether a flag of the recording tells that the episode ended.

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
    dtype = observation_dtype(observation_space)
    observations = observation_rows(
        observation_space, episode.observations, length + 1, dtype, extents=extents
    )[: stop + 1]
    actions = action_rows(action_space, episode.actions[:stop])
    rewards = rewards[:stop].astype(np.float64)
    terminated = flags(episode.terminations[:stop], "terminations")
    truncated = flags(episode.truncations[:stop], "truncations")
    for key, ended in (("terminations", terminated), ("truncations", truncated)):
        if ended[:-1].any():
            raise ValueError(
                f"{key}[{ended.argmax()}] ends the episode before its last transition, {stop - 1}"
            )
    ended = success is not None or bool(terminated[-1] or truncated[-1])
    if success is not None:
        terminated[-1], truncated[-1] = True, False
    elif not terminated[-1]:
        # A recording that just stops: unmarked, the next episode would seem to continue it.
        truncated[-1] = True
    require_finite(observations[:-1] if terminated[-1] else observations, "observations")
    require_finite(rewards, "rewards")

    rows: dict[NestedKey, np.ndarray] = {
        "observation": observations[:-1],
        "action": actions,
        ("next", "observation"): observations[1:],
        ("next", "reward"): rewards.reshape(-1, 1),
        ("next", "done"): (terminated | truncated).reshape(-1, 1),
        ("next", "terminated"): terminated.reshape(-1, 1),
        ("next", "truncated"): truncated.reshape(-1, 1),
    }
    for key in columns:
        rows |= _column(episode, key, length, stop, extents)
    return rows, ended


def _column(
    episode: EpisodeData, key: NestedKey, length: int, stop: int, extents: Extents | None
) -> dict[NestedKey, np.ndarray]:
    """Return an info under its name; where it tells of T + 1 states, also under ``"next"``."""
    infos, name = episode.infos or {}, written(key)
    if (found := _info(infos, key)) is None:
        raise ValueError(f"columns: there is no infos/{name}, found {sorted(map(written, infos))}")
    values = numbers(found, f"infos/{name}")
    if len(values) not in (length, length + 1):
        raise ValueError(
            f"infos/{name} has {len(values)} entries, expected {length} or {length + 1}"
        )
    if values.dtype.kind == "f":
        extend(extents, f"infos/{name}", values)
        values = values.astype(np.float32)
        require_finite(values, f"infos/{name}")
    if len(values) == length:
        return {key: values[:stop]}
    return {key: values[:stop], unravel_key(("next", key)): values[1 : stop + 1]}


def _info(infos: Mapping[NestedKey, Any], key: NestedKey) -> Any:
    """Return an entry, ``a/b`` also of nested ones; None if there is none."""
    if key in infos:
        return infos[key]
    found: Any = infos
    for name in written(key).split("/"):
        if isinstance(found, np.ndarray) and found.dtype == object:  # of Arrow, one for each row
            has_all = all(isinstance(each, Mapping) and name in each for each in found)
            found = np.array([each[name] for each in found]) if has_all else None
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def require_names(columns: Sequence[NestedKey]) -> None:
    """Refuse columns that would take the place of other entries, or are there twice."""
    if isinstance(columns, str):
        raise ValueError(f"columns must be a sequence of names, as [{columns!r}], got {columns!r}")
    names = [written(key) for key in columns]
    for name in names:
        if name in TAKEN or names.count(name) > 1:
            raise ValueError(f"columns: {name!r} is taken; expected further names, each once")


def _first_success(episode: EpisodeData, rewards: np.ndarray) -> int | None:
    """Find the index of the first transition that ends in success, None without one.

    Success is ``infos["success"]``, else ``infos["is_success"]``, else a reward of 1 among rewards of 0
    and 1: :func:`~torchrl_iql.environments.success` and ``success_paid`` of all steps. Minari stores the
    info of the reset before those of the steps: a success there belongs to no transition.
    """
    length, infos = len(rewards), episode.infos or {}
    if name := next((name for name in SUCCESS if name in infos), None):
        recorded = flags(infos[name], f"infos/{name}")
        if len(recorded) not in (length, length + 1):
            raise ValueError(
                f"infos/{name} has {len(recorded)} entries, expected {length} or {length + 1}"
            )
        success = recorded[-length:]
    elif (success := success_paid(rewards)) is None:
        raise ValueError(
            "episode rule 'until_success' needs infos/success or rewards of 0 and 1, "
            f"found infos {sorted(infos)} and other rewards"
        )
    return int(success.argmax()) if success.any() else None
