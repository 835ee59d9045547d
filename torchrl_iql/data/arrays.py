"""D4RL's layout, one array per key and one row per transition, as episodes.

An episode ends

- at a row of ``terminals``: it terminates there;
- at a row of ``timeouts``, and, where ``next_observations`` is stored, at a row whose next observation
  is not the observation of the following row: it is truncated there;
- at a row whose ``episode_ids`` is not that of the following row, and at the last row that has one: it is
  truncated there;
- without any of the three arrays, at the time limit of the environment: it is truncated there.

These ends are recorded, but for those where rows just do not go on; there, and at a last row without an
id, the episode stops without a record of its end.

With ``next_observations`` all rows are kept, and a row that is both terminal and a time-out
terminates. Without, the next observation is that of the following row, and a row is dropped if the
following one belongs to another episode or is missing: that of a time-out, terminal or not, and the
last one. (A terminal row is kept: its next observation belongs to the next episode too, but the value
there is never used.) These are the transitions of ``d4rl.qlearning_dataset``, from which the official
code of IQL learns. It counts time limits from 0 after a time-out and from 1 after a termination, a
step less; so does this module. With ``episode_ids`` a terminal row is also kept where it is the last one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from minari import EpisodeData
from tensordict import NestedKey

from torchrl_iql.environments import spaces_of
from torchrl_iql.spaces import (
    ActionBounds,
    actions_within,
    array,
    flags,
    numbers,
    require_finite,
    written,
)

__all__ = [
    "ENDS",
    "action_box",
    "action_space_of",
    "array_episodes",
    "observation_box",
    "require_rows",
]

ENDS = "timeouts", "next_observations", "episode_ids"
"""What tells where episodes end that do not terminate; none of it need be given."""

JUMP = 1e-6
"""A larger distance between a next observation and the following one is a jump, official code."""


def observation_box(observations: Any, key: str = "observations") -> Space:
    """Make the space of the rows of an array ``[n, D]``, or ``[n, ...]``: without bounds, or of bytes."""
    shape = _row_shape(observations, key)
    if observations.dtype == np.uint8:
        return Box(0, 255, shape, np.uint8)
    return Box(-np.inf, np.inf, shape)


def action_box(actions: Any) -> Space:
    """Make the space [-1, 1] of the rows of an array ``[n, A]``, or ``[n, ...]``, of floats."""
    if actions.dtype.kind != "f":
        raise ValueError(
            f"actions has dtype {actions.dtype}, expected floats, or a Discrete action space: give "
            "action_space=gymnasium.spaces.Discrete(n), or the environment that has it"
        )
    return Box(-1.0, 1.0, _row_shape(actions, "actions"))


def action_space_of(
    actions: Any, action_space: ActionBounds | None, env_spec: EnvSpec | None
) -> Space:
    """Return the space of the rows of an array: what is said, the environment's if it fits, or [-1, 1]."""
    if action_space is not None:
        return actions_within(action_space, _row_shape(actions, "actions"))
    if env_spec is not None:
        of_env = spaces_of(env_spec)[1]
        shapes = [(), (1,)] if isinstance(of_env, Discrete) else [of_env.shape]
        if actions.shape[1:] in shapes:
            return of_env
    return action_box(actions)


def _row_shape(values: Any, key: str) -> tuple[int, ...]:
    if len(values.shape) < 2:
        remedy = f": of one column, give {key}[:, None]" if len(values.shape) == 1 else ""
        raise ValueError(f"{key} has shape {list(values.shape)}, expected [n, size]{remedy}")
    return values.shape[1:]


def require_rows(arrays: Mapping[str, Any]) -> None:
    """Refuse arrays, or dictionaries of them, of which one has another number of rows than most.

    Raises:
        ValueError: it names that array and its shape.
    """
    leaves = {}
    for key, values in arrays.items():
        if isinstance(values, Mapping):
            leaves |= {f"{key}/{name}": its for name, its in values.items()}
        elif values is not None:
            leaves[key] = values
    rows = {key: its.shape[0] if its.shape else None for key, its in leaves.items()}
    ((most, _),) = Counter(rows.values()).most_common(1)
    for key, its in rows.items():
        if its != most or its is None:
            raise ValueError(
                f"{key} has shape {list(leaves[key].shape)}, expected {most} rows, as the others have"
            )


def array_episodes(
    *,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminals: np.ndarray,
    timeouts: np.ndarray | None = None,
    next_observations: np.ndarray | None = None,
    episode_ids: np.ndarray | None = None,
    cuts: np.ndarray | None = None,
    infos: Mapping[NestedKey, np.ndarray | None] | None = None,
    time_limit: int | None = None,
) -> Iterator[EpisodeData]:
    """Split arrays of n rows into episodes, whose ids are their numbers and rows.

    Args:
        observations: ``[n, ...]``.
        actions: ``[n, ...]``.
        rewards: ``[n]`` or ``[n, 1]``.
        terminals: ``[n]`` or ``[n, 1]``, 0 or 1 of any type.
        timeouts: the same.
        next_observations: as ``observations``.
        episode_ids: ``[n]`` or ``[n, 1]``, numbers or text, the rows of an episode one after the other.
        cuts: rows, bool ``[n]``, after which the recording does not go on, whatever the next row is.
        infos: arrays ``[n, ...]``, or None where they are not needed.
        time_limit: steps of an episode, used without ``timeouts`` and ``next_observations``.

    Raises:
        ValueError: at once, if an array has another length, shape or type, a flag is not 0 or 1, a
            next observation that is not terminal is NaN or infinite, rows of other episodes lie between
            those of one, or nothing tells where episodes are truncated.
    """
    observations = numbers(observations, "observations")
    rows = {"observations": observations, "actions": actions, "rewards": rewards}
    rows |= {"terminals": terminals, "timeouts": timeouts, "episode_ids": episode_ids}
    require_rows(
        rows | {f"infos/{written(name)}": values for name, values in (infos or {}).items()}
    )

    terminals = flags(terminals, "terminals")
    recorded = np.zeros_like(terminals) if timeouts is None else flags(timeouts, "timeouts")
    ids = None if episode_ids is None else _ids(episode_ids)
    if ids is not None:
        recorded = recorded | _lasts(ids)
    if next_observations is not None:
        next_observations = numbers(next_observations, "next_observations")
        if next_observations.shape != observations.shape:
            found, expected = list(next_observations.shape), list(observations.shape)
            raise ValueError(f"next_observations has shape {found}, expected {expected}")
        require_finite(next_observations, "next_observations", rows=~terminals)
        truncated = _jumps(observations, next_observations) | recorded
    elif timeouts is not None or ids is not None:
        truncated = recorded.copy()
    elif time_limit is not None and time_limit > 0:
        truncated = recorded = _at_time_limit(terminals, time_limit)
    else:
        raise ValueError(
            "without timeouts, next_observations and episode_ids, the environment's time limit tells where "
            "episodes end: name an environment that has one, or give timeouts, all zeros if nothing but "
            "terminals ended an episode"
        )

    def episodes() -> Iterator[EpisodeData]:
        ends = terminals | truncated if cuts is None else terminals | truncated | cuts
        ends[-1:] = True
        start = 0
        for number, end in enumerate(ends.nonzero()[0].tolist()):
            if next_observations is not None:
                stop = end + 1
                last = next_observations[end : end + 1]
            else:
                goes_on = end < len(ends) - 1 and (ids is None or ids[end] == ids[end + 1])
                is_kept = goes_on and not truncated[end] if ids is None else terminals[end]
                # What comes after a termination is never used: without it, it is what was before.
                following = end + 1 if is_kept and goes_on else end
                stop = end + 1 if is_kept else end
                last = observations[following : following + 1]
            if start < stop:
                yield EpisodeData(
                    id=f"{number if ids is None else ids[start]} (rows {start} to {stop - 1})",  # pyright: ignore[reportArgumentType]
                    observations=np.concatenate([observations[start:stop], last]),
                    actions=actions[start:stop],
                    rewards=rewards[start:stop],
                    terminations=terminals[start:stop],
                    truncations=_last(stop - start, recorded[end] and not terminals[stop - 1]),
                    infos={
                        name: None if values is None else values[start:stop]
                        for name, values in (infos or {}).items()
                    },
                )
            start = end + 1

    return episodes()


def _ids(episode_ids: Any) -> np.ndarray:
    ids = array(episode_ids, "episode_ids")
    if math.prod(ids.shape[1:]) != 1:
        raise ValueError(f"episode_ids has shape {list(ids.shape)}, expected [n]")
    if ids.dtype == object and all(isinstance(each, str) for each in ids.flat):  # of pandas
        ids = ids.astype(str)
    if ids.dtype.kind not in "biufUSM":
        raise ValueError(f"episode_ids has dtype {ids.dtype}, expected numbers or text")
    ids = ids.reshape(len(ids))
    if (none := ids != ids).any():
        raise ValueError(f"episode_ids[{none.argmax()}] is {ids[none.argmax()]}, expected an id")
    return ids


def _lasts(ids: np.ndarray) -> np.ndarray:
    """Find the last row of each episode, ``[n]`` bool; refuse rows of others between those of one."""
    is_last = np.ones(len(ids), bool)
    is_last[:-1] = ids[1:] != ids[:-1]
    ends = is_last.nonzero()[0]
    found, first = np.unique(ids[ends], return_index=True)
    if len(found) < len(ends):
        again = np.setdiff1d(np.arange(len(ends)), first)[0]
        row, name = ends[again - 1] + 1, ids[ends[again]]
        before = ends[np.flatnonzero(ids[ends] == name)[0]]
        raise ValueError(
            f"episode_ids[{row}] is {name}, an episode that ended at row {before}: the rows of one have to "
            "follow on each other, in the order of time"
        )
    return is_last


def _last(length: int, flag: bool) -> np.ndarray:
    flags = np.zeros(length, bool)
    flags[-1:] = flag
    return flags


def _jumps(observations: np.ndarray, next_observations: np.ndarray) -> np.ndarray:
    """Find where the next observation is not that of the following row, ``[n]`` bool."""
    jumps = np.zeros(len(observations), bool)
    with np.errstate(invalid="ignore"):  # what is infinite is refused later
        steps = np.subtract(next_observations[:-1], observations[1:], dtype=np.float32)
    distances = np.linalg.norm(steps.reshape(len(steps), math.prod(steps.shape[1:])), axis=1)
    jumps[:-1] = ~(distances <= JUMP)  # a NaN is one
    return jumps


def _at_time_limit(terminals: np.ndarray, time_limit: int) -> np.ndarray:
    """Find where ``d4rl.qlearning_dataset`` sees the end of the time limit, ``[n]`` bool."""
    truncated = np.zeros(len(terminals), bool)
    first = 0  # the row that is counted 0
    for terminal in [*terminals.nonzero()[0].tolist(), len(terminals) - 1]:
        while (last := first + time_limit - 1) <= terminal:
            truncated[last] = True
            first = last + 1
        # A terminal row is counted 0 again, so that the row after it is counted 1.
        first = max(first, terminal)
    return truncated
