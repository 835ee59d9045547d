"""Packages whose names are imported when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["attach"]


def attach(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package.

    Its modules are found by their own names, too. A type checker has to be told the names in imports that
    only it sees.

    Args:
        package: its ``__name__``.
        names: for each name that it exports, the module of the package that has it; or
            ``"module:name"``, if it is another one there.
    """

    def __getattr__(name: str) -> Any:
        module, _, known_as = names.get(name, name).partition(":")
        path = f"{package}.{module}"
        try:
            value = import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package]
            ) from None
        if module != name:
            value = getattr(value, known_as or name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return __getattr__, __dir__
