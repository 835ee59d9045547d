"""Which entries of compound observations are observed, and the rows that arrays of them become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Dict, Tuple, flatdim
from tensordict import TensorDictBase

from torchrl_iql.data.arrays import action_box, observation_box
from torchrl_iql.data.tensordicts import categories
from torchrl_iql.environments import observing, spaces_of
from torchrl_iql.spaces import (
    ActionBounds,
    Extents,
    actions_within,
    array,
    named_leaves,
    observation_dtype,
    observation_row_space,
    observation_rows,
    selected,
    sorted_space,
)

__all__ = ["chosen", "flattened", "given_arrays", "shown"]


def given_arrays(values: Any, key: str) -> Any:
    """Turn values, or each of a dictionary of them, into an array; raise a ValueError otherwise."""
    if isinstance(values, Mapping):
        return {name: array(its, f"{key}/{name}") for name, its in values.items()}
    return array(values, key)


def shown(
    space: Space | None, env_spec: EnvSpec | None, transitions: TensorDictBase
) -> list[str] | None:
    """Return the entries of a ``Dict`` of observations, if all of them are there."""
    if space is None and env_spec is not None:
        space = spaces_of(env_spec)[0]
    names = list(space.spaces) if isinstance(space, Dict) else []
    return names if names and all(name in transitions.keys() for name in names) else None


def flattened(
    arrays: dict[str, Any],
    observation_space: Space | None,
    action_space: ActionBounds | None,
    env_spec: EnvSpec | None,
    observation_keys: Sequence[str] | None,
    extents: Extents,
) -> tuple[EnvSpec | None, tuple[Space, Space], Space]:
    """Turn compound observations into rows, and categories that are one-hot into numbers.

    Returns:
        the environment, which shows what is observed; the spaces: those that are given, else those
        of the environment, else those of the arrays, that of observations flattened; and the latter as
        it was, of a dictionary of arrays. Those of its arrays are added to the extents.
    """
    if env_spec is not None and observation_keys is not None:
        env_spec = observing(env_spec, observation_keys)
    if env_spec is not None and (observation_space is None or action_space is None):
        of_env = spaces_of(env_spec)
        observation_space = of_env[0] if observation_space is None else observation_space
        action_space = of_env[1] if action_space is None else action_space
    observations = arrays["observations"]
    if observation_space is None and isinstance(observations, Mapping):
        observation_space = Dict(
            {
                name: observation_box(its, f"observations/{name}")
                for name, its in observations.items()
            }
        )
    elif observation_space is None:
        observation_space = observation_box(observations)
    if action_space is None:
        action_space = action_box(arrays["actions"])
    action_space = actions_within(action_space, arrays["actions"].shape[1:])
    arrays["actions"] = categories(action_space, arrays["actions"], "actions")
    if observation_keys is not None and (isinstance(observations, Mapping) or env_spec is None):
        observation_space = selected(observation_space, observation_keys)
    given_space, observation_space = observation_space, sorted_space(observation_space)
    for key in arrays.keys() & {"observations", "next_observations"}:
        values = categories(observation_space, arrays[key], key)
        if isinstance(values, Mapping):
            values = chosen(values, observation_keys, key)
            dtype = observation_dtype(observation_space)
            length = len(array(arrays["rewards"], "rewards"))
            seen = extents if key == "observations" else None
            values = observation_rows(observation_space, values, length, dtype, key, seen)
        elif isinstance(observation_space, Dict):
            _require_columns(observation_space, values, key)
            _require_sorted(given_space, key)
        arrays[key] = values
    flat = observation_space
    if isinstance(observation_space, Dict | Tuple):
        flat = observation_row_space(observation_space)
    shown = observation_space if isinstance(observations, Mapping) else flat
    return env_spec, (flat, action_space), shown


def chosen(values: Any, keys: Sequence[str] | None, key: str) -> Any:
    """Return these entries of compound values; a ValueError if one is missing."""
    if keys is None:
        return values
    if missing := [name for name in keys if name not in values]:
        raise ValueError(f"observation_keys: {key} has no {missing}, found {list(values)}")
    return {name: values[name] for name in keys}


def _require_columns(space: Dict, values: np.ndarray, key: str) -> None:
    """Refuse vectors that are not what a compound space is flattened to, with what that is."""
    if values.shape[1:] != (flatdim(space),):
        sizes = ", ".join(f"{name} ({flatdim(sub)})" for name, sub in space.spaces.items())
        raise ValueError(
            f"{key} has shape {list(values.shape)}, expected [n, {flatdim(space)}], which are {sizes}; "
            "give a dictionary of them, or name those that there are in observation_keys="
        )


def _require_sorted(space: Space, key: str) -> None:
    """Refuse vectors of a space that others flatten in its own order, and rows are in the sorted one."""
    names = [name for name, _ in named_leaves(space)]
    if names != [name for name, _ in named_leaves(sorted_space(space))]:
        raise ValueError(
            f"{key} are vectors, of which nothing tells whether {', '.join(names)} are in this order or in "
            "that of sorted names: give a dictionary of them"
        )
