"""The files of ``config`` that settings are chosen from: tasks, families, machines and collectors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from torchrl_iql_recipes.commands import typed
from torchrl_iql_recipes.experiment.overrides import values_of
from torchrl_iql_recipes.experiment.schema import SettingsError

__all__ = [
    "CONFIG",
    "by_task",
    "check_choice",
    "files",
    "of_algorithm",
    "of_task",
    "similar",
    "tasks",
]

CONFIG = Path(__file__).resolve().parents[1] / "config"

MOST = 6
"""Names that are suggested together."""


def tasks() -> list[str]:
    """Return the names of all tasks."""
    return files("task")


def of_task(name: str, algorithm: str = "iql") -> dict[str, Any]:
    """Return what a task has of settings, in a hundredth of the time that Hydra takes to compose all."""
    own = _task(f"{name}.yaml")
    theirs = of_algorithm(algorithm)
    return {**theirs.get("otherwise", {}), **own, **theirs["families"].get(own["family"], {})}


def _task(file: str) -> dict[str, Any]:
    own: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "task" / file))
    values: dict[str, Any] = {}
    for each in own.pop("defaults", []):
        values |= own if each == "_self_" else _task(f"{each.partition('@')[0]}.yaml")
    return {**values, **own}


def by_task(algorithm: str) -> set[str]:
    """Find the settings that differ between tasks."""
    found: set[str] = set()
    for path in (CONFIG / "task").rglob("*.yaml"):
        found |= set(map(str, OmegaConf.load(path))) - {"defaults", "family"}
    return found.union(*of_algorithm(algorithm)["families"].values())


@cache
def of_algorithm(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONFIG / "algorithm" / f"{name}.yaml"))


def files(group: str) -> list[str]:
    folder = CONFIG / group
    paths = [path for path in folder.rglob("*.yaml") if path.stem != "base"]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def check_choice(override: Override) -> None:
    """Refuse what is no file of a group."""
    for value in values_of(override):
        _check_file(override.key_or_group, str(value))


def _check_file(group: str, name: str) -> None:
    if (CONFIG / group / f"{name}.yaml").exists():
        return
    known = files(group)
    if near := similar(name, known):
        raise SettingsError(f"{group}={name}: did you mean {' or '.join(near)}?")
    expected = f"one of {typed('tasks')}" if group == "task" else " or ".join(known)
    raise SettingsError(f"{group}={name}: expected {expected}")


def similar(name: str, known: Sequence[str]) -> list[str]:
    """Return the one that is almost called so, or those of whose name it is most of a part, as ``hoper``."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return near
    words = [word for word in re.split(r"\W", name.lower()) if word]
    agree = {
        each: sum(
            bool(difflib.get_close_matches(word, re.split(r"\W", each), cutoff=0.7))
            for word in words
        )
        for each in known
    }
    most = max(agree.values(), default=0)
    found = [each for each in known if most and agree[each] == most]
    return found if len(found) <= MOST else difflib.get_close_matches(name, found, n=3, cutoff=0)
