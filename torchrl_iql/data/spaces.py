"""Observations and actions of a whole episode as the rows a network takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import DTypeLike

__all__ = [
    "action_rows",
    "action_support",
    "array",
    "column",
    "flags",
    "numbers",
    "observation_rows",
    "require_finite",
]

KINDS = {"numbers": "biuf", "integers": "biu"}
"""Letters of numpy's ``dtype.kind``."""

CLIP_MARGIN = 1e-5
"""Actions stay this share of half the range inside their bounds: +-(1 - 1e-5), official code."""

RANGE_TOLERANCE = 1e-3
"""Actions farther outside than this share of the range are an error, not rounding."""


def observation_rows(
    space: Space, observations: Any, length: int, dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Flatten the observations of an episode, without a loop over its steps.

    Row t is ``gymnasium.spaces.flatten(space, observation t)``, what an environment gives in
    ``gymnasium.wrappers.FlattenObservation``: ``Box`` and ``MultiBinary`` are raveled, ``Discrete``
    and ``MultiDiscrete`` one-hot encoded, ``Tuple`` and ``Dict`` (keys in the order of the space:
    sorted) concatenated.

    Args:
        space: space of one observation, of flattened size D.
        observations: as Minari stores them: one array of shape ``[length, ...]`` per leaf.
        length: number of observations, for the check.
        dtype: type of the rows.

    Returns:
        array ``[length, D]``.

    Raises:
        TypeError: if a leaf of the space has no fixed size.
        ValueError: if a leaf is missing, has another length, shape or type, or a category outside
            its space.
    """
    leaves = []
    for key, rows in _leaves(space, observations, "observations"):
        if len(rows) != length:
            raise ValueError(
                f"{key} has {len(rows)} entries, expected {length}, one more than rewards"
            )
        leaves.append(rows)
    with np.errstate(over="ignore"):  # what becomes infinite is refused later
        return np.concatenate(leaves, axis=1, dtype=dtype)


def _leaves(space: Space, values: Any, key: str) -> Iterator[tuple[str, np.ndarray]]:
    match space:
        case spaces.Dict():
            for name, subspace in space.spaces.items():
                yield from _leaves(subspace, _entry(values, name, key), f"{key}/{name}")
        case spaces.Tuple():
            for i, subspace in enumerate(space.spaces):
                yield from _leaves(subspace, _entry(values, i, key), f"{key}/{i}")
        case spaces.Box() | spaces.MultiBinary():
            yield key, _rows(values, space.shape, key)
        case spaces.Discrete():
            yield key, np.eye(int(space.n))[_categories(values, space.n, space.start, key)]
        case spaces.MultiDiscrete():
            columns = _rows(values, space.shape, key).T
            for column, n, start in zip(columns, space.nvec.flat, space.start.flat, strict=True):
                yield key, np.eye(int(n))[_categories(column, n, start, key)]
        case _:
            raise TypeError(f"{key}: can not flatten {space} to a vector of fixed size")


def _entry(values: Any, name: str | int, key: str) -> Any:
    try:
        return values[name]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{key} has no entry {name!r}, which the space has") from None


def _rows(values: Any, shape: tuple[int, ...], key: str, kind: str = "numbers") -> np.ndarray:
    """Turn entries of this shape, or of as many elements, into ``[T, number of elements]``."""
    values = numbers(values, key, kind)
    if values.ndim == 0 or math.prod(values.shape[1:]) != math.prod(shape):
        expected = ", ".join(map(str, ("T", *shape)))
        raise ValueError(f"{key} has shape {list(values.shape)}, expected [{expected}]")
    return values.reshape(len(values), math.prod(shape))


def _categories(values: Any, n: Any, start: Any, key: str) -> np.ndarray:
    """Return categories ``[T]``, int64, counted from 0."""
    values = _rows(values, (), key, "integers")[:, 0].astype(np.int64)
    outside = (values < start) | (values >= start + n)
    if outside.any():
        step = outside.argmax()
        raise ValueError(f"{key}[{step}] is {values[step]}, outside {start}..{start + n - 1}")
    return values - start


def action_rows(space: Space, actions: Any) -> np.ndarray:
    """Turn the actions of an episode into rows inside the support of a policy.

    A ``Box`` is raveled and, in the dimensions bounded on both sides, clipped to ``CLIP_MARGIN``
    of half the range inside the bounds. ``Discrete`` gives categories counted from 0, wherever the
    space starts.

    Args:
        space: ``Box`` of A elements, or ``Discrete``.
        actions: array ``[T, ...]`` of actions.

    Returns:
        array ``[T, A]``, float32, for ``Box``; ``[T]``, int64, for ``Discrete``.

    Raises:
        TypeError: if the space is of another kind.
        ValueError: if an action is NaN, infinite, of another shape or type, or outside a bounded
            dimension by more than ``RANGE_TOLERANCE`` of the range.
    """
    match space:
        case spaces.Discrete():
            return _categories(actions, space.n, space.start, "actions")
        case spaces.Box():
            rows = _rows(actions, space.shape, "actions")
            require_finite(rows, "actions")
            return _clip(rows, space)
        case _:
            raise TypeError(f"the action space must be Box or Discrete, found {space}")


def action_support(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest action of a data set, ``[A]`` float32 each.

    They are ``CLIP_MARGIN`` of half the range inside the bounds, and infinite in dimensions that are not
    bounded on both sides.
    """
    low, high, span = _bounds(space)
    margin = CLIP_MARGIN * span / 2
    return (low + margin).astype(np.float32), (high - margin).astype(np.float32)


def _bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bounded = (space.bounded_below & space.bounded_above).ravel()
    low = np.where(bounded, space.low.ravel().astype(np.float64), -np.inf)
    high = np.where(bounded, space.high.ravel().astype(np.float64), np.inf)
    return low, high, np.where(bounded, high - low, 0)


def _clip(rows: np.ndarray, space: spaces.Box) -> np.ndarray:
    low, high, span = _bounds(space)
    margin = CLIP_MARGIN * span / 2
    clipped = rows.clip(*action_support(space))
    outside = np.abs(rows - clipped) > margin + RANGE_TOLERANCE * span
    if outside.any():
        step, dim = np.argwhere(outside)[0]
        raise ValueError(
            f"actions[{step}, {dim}] is {rows[step, dim]:g}, outside [{low[dim]:g}, {high[dim]:g}] "
            f"by more than {RANGE_TOLERANCE:g} of this range"
        )
    return clipped.astype(np.float32, copy=False)


def array(values: Any, key: str) -> np.ndarray:
    """Turn a tensor on any device, or what numpy can, into an array; else raise a ValueError."""
    if values is None:
        raise ValueError(f"{key} is None, expected an array")
    try:
        is_tensor = hasattr(values, "detach")
        return values.detach().cpu().numpy() if is_tensor else np.asarray(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key} can not be made an array: {error}") from error


def numbers(values: Any, key: str, kind: str = "numbers") -> np.ndarray:
    """Turn values into an array; raise a ValueError if not of this kind, one of :data:`KINDS`."""
    found = array(values, key)
    # Without an entry there is no telling: numpy takes an empty list for floats.
    if found.size and found.dtype.kind not in KINDS[kind]:
        raise ValueError(f"{key} has dtype {found.dtype}, expected {kind}")
    return found


def column(values: Any, key: str) -> np.ndarray:
    """Return values ``[T]`` or ``[T, 1]`` as ``[T]``; raise a ValueError if they are others."""
    return _rows(values, (), key)[:, 0]


def flags(values: Any, key: str) -> np.ndarray:
    """Return flags ``[T]`` or ``[T, 1]`` of any type as bool ``[T]``; a ValueError if not 0 or 1."""
    values = column(values, key)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        step = wrong.argmax()
        raise ValueError(f"{key}[{step}] is {values[step]}, expected 0 or 1")
    return values.astype(bool)


def require_finite(values: np.ndarray, key: str, rows: np.ndarray | None = None) -> None:
    """Raise a ValueError that locates the first entry that is not finite as float32, if any.

    Args:
        values: numbers ``[n, ...]``.
        key: what the message calls them.
        rows: which rows are checked, bool ``[n]``; all by default.
    """
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(values.astype(np.float32, copy=False))
    if rows is not None:
        wrong[~rows] = False
    if wrong.any():
        index = np.argwhere(wrong)[0].tolist()
        raise ValueError(f"{key}{index} is {values[tuple(index)]}, expected a finite float32")
