"""Observations and actions as the rows a network takes, and such rows as an environment's actions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import DTypeLike

if TYPE_CHECKING:
    from tensordict import NestedKey

__all__ = [
    "ActionBounds",
    "ActionsOutside",
    "Extents",
    "action_row_space",
    "action_rows",
    "action_support",
    "actions_within",
    "array",
    "column",
    "differ_in_type_alone",
    "environment_action",
    "environment_actions",
    "extend",
    "fits",
    "flags",
    "hardly_told_apart",
    "images_of",
    "in_float32",
    "leaf_spaces",
    "listed",
    "matrices",
    "named_leaves",
    "numbers",
    "observation_dtype",
    "observation_row_space",
    "observation_rows",
    "observations_of",
    "observed_rows",
    "require_finite",
    "selected",
    "share_outside",
    "sorted_space",
    "written",
]

ActionBounds = Space | tuple[Any, Any] | int
"""A space of actions; or the lowest and the highest, of all their dimensions or of each; or how many there
are, numbered from 0."""

KINDS = {"numbers": "biuf", "integers": "biu"}
"""Letters of numpy's ``dtype.kind``."""

CLIP_MARGIN = 1e-5
"""Actions stay this share of half the range inside their bounds: +-(1 - 1e-5), official code."""

RANGE_TOLERANCE = 1e-3
"""Actions farther outside than this share of the range are an error, not rounding."""


LEVELS = 256
"""Values that float32 has at least over the range of a column, as many as a byte."""

Extents = dict[str, tuple[np.ndarray, np.ndarray]]
"""Lowest and highest values of columns of which rows, in float32, may not hold all digits."""


class ActionsOutside(ValueError):
    """Actions that no policy in the bounds of their space can take.

    Attributes:
        outside: how many of them.
        actions: of how many.
    """

    def __init__(self, message: str, outside: int, actions: int) -> None:
        super().__init__(message)
        self.outside = outside
        self.actions = actions


def selected(space: Space, keys: Sequence[str] | None) -> Space:
    """Return a ``Dict`` space with these entries alone, in its own order; the space itself for None.

    Raises:
        ValueError: if it has no entries to choose from, or not one of these, or ``keys`` is a string.
    """
    if keys is None:
        return space
    if isinstance(keys, str):
        raise ValueError(
            f"observation_keys must be a sequence of names, as [{keys!r}], got {keys!r}"
        )
    if not isinstance(space, spaces.Dict):
        raise ValueError(f"observation_keys={list(keys)}: observations are {space}, without keys")
    unknown = [key for key in keys if key not in space.spaces]
    if unknown or not keys:
        raise ValueError(
            f"observation_keys={list(keys)}: expected some of the observation's {list(space.spaces)}"
        )
    return spaces.Dict({key: sub for key, sub in space.spaces.items() if key in keys})


def sorted_space(space: Space) -> Space:
    """Return a space whose dictionaries are sorted by their keys, as those that Minari reads."""
    match space:
        case spaces.Dict():
            return spaces.Dict({key: sorted_space(sub) for key, sub in space.spaces.items()})
        case spaces.Tuple():
            return spaces.Tuple([sorted_space(sub) for sub in space.spaces])
        case _:
            return space


def actions_within(bounds: ActionBounds, shape: Sequence[int]) -> Space:
    """Return the space of actions of a shape that is given by its bounds, or itself.

    Raises:
        ValueError: if it is neither a space, nor a number of actions, nor two bounds, the lower first, as
            wide as the actions.
    """
    if isinstance(bounds, Space):
        return bounds
    told = (
        f"action_space={bounds!r}: expected a space, the number of discrete actions, or (low, high), each a "
        "number or one per dimension"
    )
    if isinstance(bounds, int | np.integer) and not isinstance(bounds, bool):
        if bounds < 1:
            raise ValueError(told)
        return spaces.Discrete(int(bounds))
    try:
        low, high = (np.broadcast_to(np.asarray(each, np.float32), shape) for each in bounds)  # pyright: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(f"{told} of {list(shape)}") from error
    if not (low < high).all() or not np.isfinite([low, high]).all():
        raise ValueError(f"{told}, finite, the lower first")
    return spaces.Box(low, high, dtype=np.float32)


def observation_dtype(space: Space) -> type[np.generic]:
    """Return the type of the rows: that of images, uint8, stays, all else is float32."""
    leaves = list(leaf_spaces(space))
    is_bytes = all(isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8 for leaf in leaves)
    return np.uint8 if leaves and is_bytes else np.float32


def observation_row_space(space: Space) -> spaces.Box:
    """Return the space of the rows ``[D]`` of a sorted one, in its own precision, or of bytes alone."""
    flat: Any = spaces.flatten_space(space)
    dtype: Any = observation_dtype(space)
    if dtype is observation_dtype(flat):
        return flat
    return spaces.Box(flat.low.astype(dtype), flat.high.astype(dtype), dtype=dtype)


def leaf_spaces(space: Space) -> Iterator[Space]:
    """Yield the spaces that a compound one is made of, itself if it is not compound."""
    yield from (leaf for _, leaf in named_leaves(space))


def matrices(space: Space) -> list[tuple[int, list[int]]]:
    """Return where in the rows that is which has several dimensions, and its shape but for those of 1."""
    found, start = [], 0
    for leaf in leaf_spaces(space):
        shape = [size for size in leaf.shape or () if size != 1]
        if len(shape) > 1:
            found.append((start, shape))
        start += spaces.flatdim(leaf)
    return found


def named_leaves(space: Space, *keys: str) -> Iterator[tuple[str, Space]]:
    """Yield the spaces that a compound one is made of, each with its name, as ``"hand/position"``.

    Args:
        space: one that is not compound yields itself.
        *keys: what stands before the names.
    """
    match space:
        case spaces.Dict():
            for name, subspace in space.spaces.items():
                yield from named_leaves(subspace, *keys, name)
        case spaces.Tuple():
            for i, subspace in enumerate(space.spaces):
                yield from named_leaves(subspace, *keys, str(i))
        case _:
            yield "/".join(keys), space


def images_of(space: Space, smallest: int) -> list[tuple[int, list[int]]]:
    """Return where images of bytes lie in the rows of observations, and their shapes, as the space has them.

    Args:
        space: of one observation.
        smallest: pixels of the shorter side of an image; what is smaller, as a grid of symbols, is none.
    """
    found, start = [], 0
    for leaf in leaf_spaces(space):
        is_picture = (
            isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8 and len(leaf.shape) in (2, 3)
        )
        if is_picture and sorted(leaf.shape)[-2] >= smallest:  # pyright: ignore
            found.append((start, list(leaf.shape)))  # pyright: ignore
        start += spaces.flatdim(leaf)
    return found


def observation_rows(
    space: Space,
    observations: Any,
    length: int,
    dtype: DTypeLike = np.float32,
    key: str = "observations",
    extents: Extents | None = None,
) -> np.ndarray:
    """Flatten the observations of an episode, without a loop over its steps.

    Row t is ``gymnasium.spaces.flatten(space, observation t)``, what an environment gives in
    ``gymnasium.wrappers.FlattenObservation``: ``Box`` and ``MultiBinary`` are raveled, ``Discrete``
    and ``MultiDiscrete`` one-hot encoded, ``Tuple`` and ``Dict`` concatenated, keys in the order of
    the space, that of :func:`sorted_space`.

    Args:
        space: space of one observation, of flattened size D.
        observations: as Minari stores them: one array of shape ``[length, ...]`` per leaf.
        length: number of observations, for the check.
        dtype: type of the rows.
        key: what messages call them.
        extents: those of earlier episodes, to which these are added.

    Returns:
        array ``[length, D]``.

    Raises:
        TypeError: if a leaf of the space has no fixed size.
        ValueError: if a leaf is missing, has another length, shape or type, a category outside its
            space, or there is one that the space does not have.
    """
    _require_flat(space, key)
    leaves = []
    for name, rows in _leaves(space, observations, key):
        if len(rows) != length:
            raise ValueError(
                f"{name} has {len(rows)} entries, expected {length}, one more than rewards"
            )
        extend(extents, name, rows)
        leaves.append(_bytes(rows, name) if dtype is np.uint8 else rows)
    return _joined(leaves, dtype)


def extend(extents: Extents | None, name: str, rows: np.ndarray) -> None:
    """Add rows ``[n, ...]``, if there are any, of numbers that float32 may not hold."""
    if extents is None or not rows.size or np.can_cast(rows.dtype, np.float32):
        return
    low, high = np.fmin.reduce(rows), np.fmax.reduce(rows)
    known = extents.get(name, (low, high))
    if known[0].shape != low.shape:  # which is refused when they are joined
        return
    extents[name] = np.fmin(low, known[0]), np.fmax(high, known[1])


def hardly_told_apart(extents: Extents) -> list[str]:
    """Name the columns that vary, but over fewer than ``LEVELS`` values of float32."""
    found = []
    for name, each in extents.items():
        low, high = (its.ravel().astype(np.float64) for its in each)
        with np.errstate(all="ignore"):  # what is infinite is refused elsewhere
            step = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))
            few = (high > low) & (high - low < LEVELS * step.astype(np.float64))
        found += [f"{name}[:, {column}]" for column in few.nonzero()[0]]
    return found


def observed_rows(
    space: Space, observation: Any, key: str = "observation"
) -> tuple[np.ndarray, bool]:
    """Flatten what an environment gives, one observation or a batch, as :func:`observation_rows`.

    Of a dictionary the entries of the space are read, and others left alone.

    Args:
        space: space of one observation, of flattened size D.
        observation: of the space, of any number type; or with a dimension B in front of every leaf.
        key: what messages call it.

    Returns:
        array ``[B, D]``, uint8 of images and else float32, and whether it is of a batch; B is 1 if not.

    Raises:
        TypeError: if a leaf of the space has no fixed size.
        ValueError: if a leaf is missing, is not finite, has another shape, type or number of entries than
            the others, or a category outside its space.
    """
    dtype, leaves = observation_dtype(space), []
    several: bool | None = None
    for name, leaf, given in _observed(space, observation, key):
        if isinstance(given, Mapping):
            raise ValueError(
                f"{name} is a dictionary of {sorted(given)}, expected {_shape_of(leaf)} numbers, as "
                "gymnasium.spaces.flatten makes them"
            )
        values, shape = array(given, name), leaf.shape or ()
        is_batch = values.ndim == len(shape) + 1
        found = f"{name} has shape {list(values.shape)}, expected"
        if values.shape[is_batch:] != shape:
            raise ValueError(
                f"{found} {_shape_of(leaf)} or a batch of them, {_shape_of(leaf, 'B')}"
            )
        if several not in (None, is_batch):
            raise ValueError(f"{found} {_shape_of(leaf, *'B' * several)}, as the entries before it")
        several = is_batch
        for _, rows in _leaves(leaf, values if is_batch else values[None], name):
            require_finite(rows, name)
            # Also beside numbers: a camera that somebody has scaled is another one.
            leaves.append(_bytes(rows, name) if leaf.dtype == np.uint8 else rows)
    lengths = {len(rows) for rows in leaves}
    if len(lengths) != 1:
        raise ValueError(
            f"{key} has entries of {sorted(lengths)} observations, expected as many of each"
        )
    return _joined(leaves, dtype), bool(several)


def _observed(space: Space, observation: Any, key: str) -> Iterator[tuple[str, Space, Any]]:
    """Yield name, space and value of every leaf."""
    match space:
        case spaces.Dict():
            if not hasattr(observation, "keys"):
                raise ValueError(f"{key} is no dictionary, expected one of {list(space.spaces)}")
            for name, subspace in space.spaces.items():
                yield from _observed(subspace, _entry(observation, name, key), f"{key}/{name}")
        case spaces.Tuple():
            for i, subspace in enumerate(space.spaces):
                yield from _observed(subspace, _entry(observation, i, key), f"{key}/{i}")
        case _:
            yield key, space, observation


def _shape_of(space: Space, *batch: str) -> str:
    return f"[{', '.join(map(str, (*batch, *(space.shape or ()))))}]"


def _joined(leaves: Sequence[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused later
        return np.concatenate(leaves, axis=1, dtype=dtype)


def observations_of(space: Space, rows: np.ndarray) -> Any:
    """Return what :func:`observation_rows` made rows ``[T, D]`` of: one array ``[T, ...]`` per leaf."""
    match space:
        case spaces.Dict():
            parts = _split(list(space.spaces.values()), rows)
            return dict(zip(space.spaces, parts, strict=True))
        case spaces.Tuple():
            return tuple(_split(space.spaces, rows))
        case spaces.Discrete():
            return rows.argmax(1) + space.start
        case spaces.MultiDiscrete():
            ends = np.cumsum(space.nvec.ravel())[:-1]
            chosen = [part.argmax(1) for part in np.split(rows, ends, axis=1)]
            return np.stack(chosen, axis=1).reshape(len(rows), *space.shape) + space.start
        case _:
            return rows.reshape(len(rows), *space.shape).astype(space.dtype)  # pyright: ignore


def _split(subspaces: Sequence[Space], rows: np.ndarray) -> list[Any]:
    ends = np.cumsum([spaces.flatdim(each) for each in subspaces])[:-1]
    parts = np.split(rows, ends, axis=1)
    return [observations_of(each, part) for each, part in zip(subspaces, parts, strict=True)]


def differ_in_type_alone(space: Space, other: Space) -> bool:
    """Return whether two spaces are equal, or would be, were their real numbers of one type."""
    match space, other:
        case spaces.Dict(), spaces.Dict():
            return space.spaces.keys() == other.spaces.keys() and all(
                differ_in_type_alone(each, other.spaces[key]) for key, each in space.spaces.items()
            )
        case spaces.Tuple(), spaces.Tuple():
            return len(space.spaces) == len(other.spaces) and all(
                map(differ_in_type_alone, space.spaces, other.spaces)
            )
        case spaces.Box(), spaces.Box() if {space.dtype.kind, other.dtype.kind} == {"f"}:  # pyright: ignore
            one, two = (spaces.Box(*in_float32(its)) for its in (space, other))
            return one == two
        case _:
            return space == other


def _bytes(rows: np.ndarray, key: str) -> np.ndarray:
    whole = rows.astype(np.uint8)
    if (wrong := whole != rows).any():
        index = np.argwhere(wrong)[0]
        raise ValueError(
            f"{key}{index.tolist()} is {rows[tuple(index)]}, expected 0, 1, ... or 255"
        )
    return whole


def _leaves(space: Space, values: Any, key: str) -> Iterator[tuple[str, np.ndarray]]:
    match space:
        case spaces.Dict():
            for name, subspace in space.spaces.items():
                yield from _leaves(subspace, _entry(values, name, key), f"{key}/{name}")
            if unread := [name for name in _names(values) if name not in space.spaces]:
                raise ValueError(
                    f"{key} has entries that are not read, {unread}: the space has "
                    f"{list(space.spaces)}; name those to use in observation_keys="
                )
        case spaces.Tuple():
            for i, subspace in enumerate(space.spaces):
                yield from _leaves(subspace, _entry(values, i, key), f"{key}/{i}")
        case spaces.Box() | spaces.MultiBinary():
            yield key, _rows(values, space.shape, key)
        case spaces.Discrete():
            yield key, _one_hot(values, space.n, space.start, key)
        case spaces.MultiDiscrete():
            columns = _rows(values, space.shape, key).T
            for column, n, start in zip(columns, space.nvec.flat, space.start.flat, strict=True):
                yield key, _one_hot(column, n, start, key)
        case _:
            raise TypeError(
                f"{key}: can not flatten {space} to a vector of fixed size; give numbers in its place"
            )


def _require_flat(space: Space, key: str) -> None:
    """Refuse entries that have no fixed size, with what to do about it: none within another can be chosen."""
    entries = space.spaces if isinstance(space, spaces.Dict) else {}
    flat = [name for name, sub in entries.items() if all(map(_is_flat, leaf_spaces(sub)))]
    for name, leaf in named_leaves(space):
        if _is_flat(leaf):
            continue
        told = (
            f"{key}/{name}".removesuffix("/")
            + f": can not flatten {leaf} to a vector of fixed size"
        )
        remedy = "give numbers in its place"
        if flat and name in entries:
            remedy = f"leave it out by observation_keys={flat}"
        elif flat:
            entry = name.split("/")[0]
            remedy += f", or leave out all of {entry} by observation_keys={flat}"
        raise TypeError(f"{told}; {remedy}")


def _is_flat(leaf: Space) -> bool:
    kinds = spaces.Box | spaces.MultiBinary | spaces.Discrete | spaces.MultiDiscrete
    return isinstance(leaf, kinds)


def _names(values: Any) -> list[str]:
    return list(values.keys()) if hasattr(values, "keys") else []


def _entry(values: Any, name: str | int, key: str) -> Any:
    try:
        return values[name]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{key} has no entry {name!r}, which the space has") from None


def _rows(values: Any, shape: tuple[int, ...], key: str, kind: str = "numbers") -> np.ndarray:
    """Turn entries of this shape, or of one that :func:`fits` it, into ``[T, number of elements]``."""
    values = numbers(values, key, kind)
    if values.ndim == 0 or not fits(values.shape[1:], shape):
        expected = ", ".join(map(str, ("T", *shape)))
        raise ValueError(f"{key} has shape {list(values.shape)}, expected [{expected}]")
    return values.reshape(len(values), math.prod(shape))


def fits(found: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether entries are of a shape, but for dimensions of 1, or its elements in a row."""
    found, shape = ([size for size in each if size != 1] for each in (found, shape))
    return found in (shape, [math.prod(shape)])


def _one_hot(values: Any, n: Any, start: Any, key: str) -> np.ndarray:
    return np.eye(int(n), dtype=np.float32)[_categories(values, n, start, key)]


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
            raise _of_no_policy(space)


def _of_no_policy(space: Space) -> TypeError:
    remedy = ""
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        sizes = (
            space.nvec.ravel()
            if isinstance(space, spaces.MultiDiscrete)
            else np.full(math.prod(space.shape), 2)
        )
        remedy = f": number its combinations, as one Discrete({math.prod(map(int, sizes))})"
    return TypeError(f"the action space must be Box or Discrete, found {space}{remedy}")


def action_row_space(space: Space) -> Space:
    """Return the space of the rows of :func:`action_rows`: ``Box [A]`` float32, or ``Discrete`` from 0.

    Raises:
        TypeError: if the space is of another kind.
    """
    match space:
        case spaces.Discrete():
            return spaces.Discrete(int(space.n))
        case spaces.Box():
            low, high = in_float32(space)
            return spaces.Box(low.ravel(), high.ravel(), dtype=np.float32)
        case _:
            raise _of_no_policy(space)


def in_float32(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds, infinite where float32 has no such numbers."""
    with np.errstate(over="ignore"):
        return space.low.astype(np.float32), space.high.astype(np.float32)


def environment_action(space: Space, row: Any) -> Any:
    """Return the action of an environment that a row of :func:`action_rows` stands for.

    It is clipped to its bounds, and rounded to whole numbers where the space holds these.

    Args:
        space: ``Box`` of A elements, or ``Discrete``.
        row: ``[A]``, or a category counted from 0.
    """
    if isinstance(space, spaces.Discrete):
        row = np.asarray(row).reshape(())
    return environment_actions(space, np.asarray(row)[None])[0]


def environment_actions(space: Space, rows: np.ndarray) -> np.ndarray:
    """Return :func:`environment_action` of rows ``[B, A]``, or ``[B]`` if discrete: ``[B, *shape]``."""
    if isinstance(space, spaces.Discrete):
        return (space.start + rows.astype(np.int64)).astype(space.dtype)
    assert isinstance(space, spaces.Box)
    actions = rows.reshape(len(rows), *space.shape)
    if space.dtype.kind != "f":  # pyright: ignore
        actions = np.rint(actions.astype(np.float64))
    return np.clip(actions, space.low, space.high).astype(space.dtype)


def action_support(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest action of a data set, ``[A]`` float32 each.

    They are ``CLIP_MARGIN`` of half the range inside the bounds, and infinite in dimensions that are not
    bounded on both sides, by numbers that float32 has.
    """
    low, high, span = _bounds(space)
    margin = CLIP_MARGIN * span / 2
    return (low + margin).astype(np.float32), (high - margin).astype(np.float32)


def _bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bounded = np.isfinite(in_float32(space)).all(axis=0).ravel()
    low = np.where(bounded, space.low.ravel().astype(np.float64), -np.inf)
    high = np.where(bounded, space.high.ravel().astype(np.float64), np.inf)
    return low, high, np.where(bounded, high - low, 0)


def share_outside(space: spaces.Box, rows: np.ndarray) -> float:
    """Return the share of actions, ``[T, A]``, that :func:`action_rows` would refuse."""
    _, outside = _clipped(rows, space)
    return float(outside.any(axis=1).mean())


def _clipped(rows: np.ndarray, space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Return rows inside the bounds, and which entries were farther outside than rounding explains."""
    _, _, span = _bounds(space)
    clipped = rows.clip(*action_support(space))
    tolerance = CLIP_MARGIN * span / 2 + RANGE_TOLERANCE * span
    return clipped, np.abs(rows - clipped) > tolerance


def _clip(rows: np.ndarray, space: spaces.Box) -> np.ndarray:
    clipped, outside = _clipped(rows, space)
    if outside.any():
        low, high, _ = _bounds(space)
        step, dim = np.argwhere(outside)[0]
        raise ActionsOutside(
            f"actions[{step}, {dim}] is {rows[step, dim]:g}, outside [{low[dim]:g}, {high[dim]:g}] "
            f"by more than {RANGE_TOLERANCE:g} of this range",
            outside=int(outside.any(axis=1).sum()),
            actions=len(rows),
        )
    return clipped.astype(np.float32, copy=False)


def array(values: Any, key: str) -> np.ndarray:
    """Turn a tensor on any device, or what numpy can, into an array; else raise a ValueError."""
    if values is None:
        raise ValueError(f"{key} is None, expected an array")
    try:
        is_tensor = hasattr(values, "detach")
        found = values.detach().cpu().numpy() if is_tensor else np.asarray(values)
        if found.dtype == object and found.size and isinstance(found.flat[0], Mapping):
            raise ValueError(
                f"dictionaries, expected a dictionary of arrays: {sorted(found.flat[0])}"
            )
        return found
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key} can not be made an array: {error}") from error


def numbers(values: Any, key: str, kind: str = "numbers") -> np.ndarray:
    """Turn values into an array; raise a ValueError if not of this kind, one of :data:`KINDS`."""
    found = array(values, key)
    # Without an entry there is no telling: numpy takes an empty list for floats.
    if found.size and found.dtype.kind not in KINDS[kind]:
        whole = (
            kind == "integers" and found.dtype.kind == "f" and bool((found == np.rint(found)).all())
        )
        remedy = f": they are whole numbers, give {key}.astype(int)" if whole else ""
        raise ValueError(f"{key} has dtype {found.dtype}, expected {kind}{remedy}")
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


def listed(those: Sequence[Any], most: int, separator: str = ", ") -> str:
    """Name the first of them, and say how many more there are."""
    shown = separator.join(map(str, those[:most]))
    return shown if len(those) <= most else f"{shown} and {len(those) - most} more"


def written(key: NestedKey) -> str:
    """Return the key of an entry as messages and the command line write it, ``next/reward``."""
    return key if isinstance(key, str) else "/".join(key)  # pyright: ignore


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
