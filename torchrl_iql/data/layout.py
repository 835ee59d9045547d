"""Which columns of a file are observations, actions and the rest: names alone, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ROLES", "WIDE", "Layout", "columns_of", "require_layout"]

Layout = Mapping[str, str | Sequence[str] | None]
"""Columns by what they are in :meth:`~torchrl_iql.data.OfflineDataset.from_arrays`."""

REQUIRED = "observations", "actions", "rewards", "terminals"
OPTIONAL = "timeouts", "next_observations", "episode_ids", "success"
ROLES = REQUIRED + OPTIONAL
WIDE = "observations", "actions", "next_observations"
"""Those that may be of several columns, side by side."""
ABSENT = "rewards", "terminals"
"""Those of which null says that none were recorded."""


def require_layout(layout: Any) -> None:
    """Raise a ValueError if a layout names what data do not have, or names a column as none can be."""
    if not isinstance(layout, Mapping):
        raise ValueError(f"layout={layout!r}: expected {{{ROLES[0]}: column or columns, ...}}")
    for role, names in layout.items():
        if role not in ROLES:
            raise ValueError(f"layout: there is no {role!r}, expected some of {', '.join(ROLES)}")
        several = not isinstance(names, str) and isinstance(names, Sequence)
        if names is None and role not in WIDE[:2]:
            continue
        given = list(names) if several else [names]  # pyright: ignore[reportArgumentType]
        wide = role in WIDE or not several
        if not given or not wide or not all(isinstance(each, str) and each for each in given):
            expected = "the name of a column" + (", or a list of several" if role in WIDE else "")
            told = " or null" if role not in WIDE[:2] else ""
            raise ValueError(f"layout: {role}={names!r}, expected {expected}{told}")


def columns_of(
    found: Sequence[str], layout: Layout | None, usual: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return the columns of each role, one or several; a role that is not recorded is not there.

    Args:
        found: the columns that a file has.
        layout: which of them are what, as :func:`require_layout` wants it.
        usual: what columns are called where the layout says nothing.

    Raises:
        ValueError: it names the columns that are missing, and those that there are.
    """
    layout = layout or {}
    names: dict[str, tuple[str, ...]] = {}
    missing: dict[str, list[str]] = {}
    for role in ROLES:
        if role not in layout and usual.get(role) not in found:
            if role in REQUIRED and role in usual:
                missing[role] = [usual[role]]
            continue
        given = layout[role] if role in layout else usual[role]
        if given is None:
            continue
        names[role] = (given,) if isinstance(given, str) else tuple(given)
        if absent := [each for each in names[role] if each not in found]:
            missing[role] = absent
    if missing:
        lacks = ", ".join(each for role in missing for each in missing[role])
        columns = ", ".join(list(found)[:20]) or "none"
        more = f" and {len(found) - 20} more" if len(found) > 20 else ""
        untold = [role for role in missing if role not in layout]
        remedy = f"; name in layout= what its {' and '.join(untold)} are called" if untold else ""
        if nothing := [role for role in untold if role in ABSENT]:
            remedy += f", null for {' and '.join(nothing)} that were not recorded"
        raise ValueError(f"has no column {lacks}; found {columns}{more}{remedy}")
    return names
