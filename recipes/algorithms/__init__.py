"""The algorithms of the recipes: one file each.

A file holds a subclass of :class:`~torchrl_iql_recipes.algorithms.base.Algorithm`, and
``config/algorithm/<name>.yaml`` what its settings are in each family of tasks. Nothing else names an
algorithm: this folder is the registry.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torchrl_iql_recipes.algorithms.base import Algorithm

__all__ = ["Algorithm", "algorithms"]


@cache
def algorithms() -> dict[str, type[Algorithm]]:
    """Return every algorithm, by the name of its file."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name != "base")
    return {name: _the_algorithm_of(name) for name in names}


def _the_algorithm_of(name: str) -> type[Algorithm]:
    module = import_module(f"{__name__}.{name}")
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, Algorithm)
        and each.__module__ == module.__name__
    )
    return found
