"""TorchRL's layout, transitions with a ``"next"`` entry, as the arrays of D4RL's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from tensordict import NestedKey, TensorDictBase, unravel_key

from torchrl_iql.spaces import array, flags, written

__all__ = ["categories", "transition_arrays"]

OBSERVATION = "observation"

ENTRIES: dict[str, NestedKey] = {
    "actions": "action",
    "rewards": ("next", "reward"),
    "terminals": ("next", "terminated"),
}
ENDS = ("next", "truncated"), ("next", "done")
MASK = ("collector", "mask")

FLAGS = "done", "terminated", "truncated", "is_init"
COUNTERS = "step_count", "episode_reward", "reset_reward", "traj_ids", "index"
PRIORITIES = "priority_weight", "td_error"
PARAMETERS = "loc", "scale", "logits", "probs"
LIKELIHOODS = "log_prob", "sample_log_prob", "action_log_prob"
VALUES = "state_value", "state_action_value", "action_value", "chosen_action_value"
PASSED_OVER = {*FLAGS, *COUNTERS, *PRIORITIES, *PARAMETERS, *LIKELIHOODS, *VALUES}
"""Entries of collectors, buffers, policies and values of TorchRL, which tell nothing of a state."""


def transition_arrays(
    transitions: TensorDictBase,
    observation_keys: Sequence[NestedKey] | None = None,
    columns: Sequence[NestedKey] = (),
) -> dict[str, Any]:
    """Make the arguments of :func:`~torchrl_iql.data.arrays.array_episodes`.

    Args:
        transitions: ``[n]`` in the order of time, or ``[B, T]``, whose rows are trajectories, with
            the entries of ``ENTRIES`` and observations. A transition may end a trajectory by one of
            ``ENDS``. Where ``MASK`` is False, there is padding, which is dropped.
        observation_keys: the entries that are observations, of those both here and under ``"next"``;
            their arrays are then in a dictionary. By default ``"observation"``.
        columns: further entries to keep, as infos.

    Raises:
        TypeError: if ``transitions`` is no TensorDict.
        ValueError: if the batch size is another, an entry is missing, or there is one that is neither
            read nor ``PASSED_OVER``.
    """
    if not isinstance(transitions, TensorDictBase):
        raise TypeError(f"transitions is a {type(transitions).__name__}, expected a TensorDict")
    if transitions.ndim not in (1, 2):
        raise ValueError(
            f"transitions has batch size {list(transitions.shape)}, expected [n] or [B, T]"
        )
    keys = set(transitions.keys(include_nested=True, leaves_only=True))
    observed = [OBSERVATION] if observation_keys is None else list(observation_keys)
    needed = [*ENTRIES.values(), *observed, *map(_next, observed)]
    if missing := [
        key for key in [*needed, *columns] if key not in keys and _next(key) not in keys
    ]:
        raise ValueError(f"transitions has no {', '.join(map(str, missing))}")
    kept = [key for column in columns for key in (column, _next(column)) if key in keys]
    others = keys - {*needed, *kept}
    if (
        observation_keys is not None
    ):  # what is beside them at both ends of a transition was not chosen
        others -= {each for key in others if _next(key) in others for each in (key, _next(key))}
    _require_read(others, observed)

    mask = np.ones(transitions.shape, bool)
    if MASK in keys:
        mask = array(transitions.get(MASK), written(MASK)).reshape(mask.shape)
    continued = np.zeros_like(mask)
    continued[..., :-1] = mask[..., 1:]
    valid = mask.ravel()
    flat = transitions.reshape(-1)

    def rows(key: NestedKey, name: str) -> np.ndarray:
        return array(flat.get(key), name)[valid]

    arrays: dict[str, Any] = {name: rows(key, name) for name, key in ENTRIES.items()}
    for name, follow in (("observations", False), ("next_observations", True)):
        found = {
            written(key): rows(_next(key) if follow else key, f"{name}/{written(key)}")
            for key in observed
        }
        arrays[name] = found if observation_keys is not None else found[OBSERVATION]
    ends = [flags(flat.get(key), written(key))[valid] for key in ENDS if key in keys]
    return arrays | {
        "timeouts": np.logical_or.reduce(ends) if ends else None,
        "cuts": ~continued.ravel()[valid],
        "infos": {key: rows(key, f"infos/{written(key)}") for key in kept},
    }


def _next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))


def _require_read(keys: Iterable[NestedKey], observed: Sequence[NestedKey]) -> None:
    """Refuse entries that would be left out without a word."""
    unread = set()
    for key in keys:
        path = written(key).removeprefix("next/").split("/")
        if path[0] != "collector" and path[-1] not in PASSED_OVER and not path[0].startswith("_"):
            unread.add("/".join(path))
    if unread:
        raise ValueError(
            f"transitions has entries that are not read, {sorted(unread)}: name those to observe, with "
            f"{', '.join(map(repr, map(written, observed)))}, in observation_keys=, those to keep beside "
            "in columns=, and leave out the others by transitions.exclude(...)"
        )


def categories(space: Space | None, values: Any, key: str) -> Any:
    """Return TorchRL's one-hot rows ``[n, K]`` of a ``Discrete`` space as its values ``[n]``.

    Raises:
        ValueError: if a row has not exactly one 1 among zeros.
    """
    if isinstance(values, Mapping):
        subspaces = space.spaces if isinstance(space, spaces.Dict) else {}
        return {
            name: categories(subspaces.get(name), its, f"{key}/{name}")
            for name, its in values.items()
        }
    if not isinstance(space, spaces.Discrete) or space.n == 1 or values.shape[1:] != (space.n,):
        return values
    wrong = ((values == 1).sum(1) != 1) | ((values == 0).sum(1) != space.n - 1)
    if wrong.any():
        row = wrong.argmax()
        raise ValueError(f"{key}[{row}] is {values[row]}, expected one 1 among zeros")
    return values.argmax(1) + space.start
