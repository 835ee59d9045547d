"""TorchRL's layout, transitions with a ``"next"`` entry, as the arrays of D4RL's."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.spaces import Discrete
from tensordict import NestedKey, TensorDictBase

from torchrl_iql.data.spaces import array, flags

__all__ = ["categories", "transition_arrays"]

ENTRIES: dict[str, NestedKey] = {
    "observations": "observation",
    "actions": "action",
    "rewards": ("next", "reward"),
    "terminals": ("next", "terminated"),
    "next_observations": ("next", "observation"),
}
ENDS = ("next", "truncated"), ("next", "done")
MASK = ("collector", "mask")


def transition_arrays(transitions: TensorDictBase) -> dict[str, Any]:
    """Make the arguments of :func:`~torchrl_iql.data.arrays.array_episodes`.

    Args:
        transitions: ``[n]`` in the order of time, or ``[B, T]``, whose rows are trajectories, with
            the entries of ``ENTRIES``. A transition may end a trajectory by one of ``ENDS``. Where
            ``MASK`` is False, there is padding, which is dropped.

    Raises:
        TypeError: if ``transitions`` is no TensorDict.
        ValueError: if the batch size is another, or an entry is missing.
    """
    if not isinstance(transitions, TensorDictBase):
        raise TypeError(f"transitions is a {type(transitions).__name__}, expected a TensorDict")
    if transitions.ndim not in (1, 2):
        raise ValueError(
            f"transitions has batch size {list(transitions.shape)}, expected [n] or [B, T]"
        )
    keys = transitions.keys(include_nested=True, leaves_only=True)
    missing = [key for key in ENTRIES.values() if key not in keys]
    if missing:
        raise ValueError(f"transitions has no {', '.join(map(str, missing))}")

    mask = np.ones(transitions.shape, bool)
    if MASK in keys:
        mask = array(transitions.get(MASK), "/".join(MASK)).reshape(mask.shape)
    continued = np.zeros_like(mask)
    continued[..., :-1] = mask[..., 1:]
    valid = mask.ravel()
    flat = transitions.reshape(-1)
    arrays = {name: array(flat.get(key), name)[valid] for name, key in ENTRIES.items()}
    ends = [flags(flat.get(key), "/".join(key))[valid] for key in ENDS if key in keys]
    return arrays | {"timeouts": np.logical_or.reduce([~continued.ravel()[valid], *ends])}


def categories(space: Space, values: np.ndarray, key: str) -> np.ndarray:
    """Return TorchRL's one-hot rows ``[n, K]`` of a ``Discrete`` space as its values ``[n]``.

    Raises:
        ValueError: if a row has not exactly one 1 among zeros.
    """
    if not isinstance(space, Discrete) or space.n == 1 or values.shape[1:] != (space.n,):
        return values
    wrong = ((values == 1).sum(1) != 1) | ((values == 0).sum(1) != space.n - 1)
    if wrong.any():
        row = wrong.argmax()
        raise ValueError(f"{key}[{row}] is {values[row]}, expected one 1 among zeros")
    return values.argmax(1) + space.start
