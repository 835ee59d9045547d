"""Values within values, as settings and specifications hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["texts"]


def texts(value: Any) -> Iterator[str]:
    """Yield all text in a value of dictionaries and lists, but for their keys."""
    match value:
        case str():
            yield value
        case Mapping():
            yield from texts(list(value.values()))
        case list() | tuple():
            for each in value:
                yield from texts(each)
