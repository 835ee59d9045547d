"""The command that makes a run anew: what differs from the defaults, as a shell takes it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchrl_iql.nested import texts
from torchrl_iql_recipes.commands import typed
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.overrides import as_given
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import (
    OFFLINE_PHASE,
    Settings,
    command_to_resume,
    flat,
    networks_of,
)
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

__all__ = ["Command", "command", "command_to_go_on", "completed"]


_DAMAGED = (AttributeError, KeyError, TypeError, ValueError)
"""What values of other types than a setting has lead to."""


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        text: as a shell takes it.
        is_checked: whether its settings were found to be those of the run; else all of them are in it.
    """

    text: str
    is_checked: bool


def command(script: str, values: Mapping[str, Any]) -> Command:
    """Write the command that begins a run with these settings.

    Args:
        script: ``offline`` or ``online``.
        values: the settings, by the names that they are given by.
    """
    values = {key: each for key, each in values.items() if key != "trust_env"}
    overrides = _checked(script, json.dumps(values, default=str))
    is_checked = overrides is not None
    if overrides is None:
        left_out = _not_given(script, values)
        overrides = [as_given(key, each) for key, each in values.items() if key not in left_out]
    return Command(f"{typed(script)} {shlex.join(overrides)}", is_checked)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of settings that there were not yet when a run was begun; leave all else."""
    try:
        return flat(Settings.of(_grouped(values)).values) | dict(values)
    except (SettingsError, *_DAMAGED):
        return dict(values)


def command_to_go_on(script: str, path: Path, values: Mapping[str, Any]) -> str:
    """Write the command that goes on with a run in its folder."""
    env, options = values.get("env"), values.get("collector.backend_options")
    needs_trust = any(":" in each for each in texts(env)) or any(texts(options))
    return command_to_resume(script, path) + " trust_env=true" * needs_trust


@lru_cache(maxsize=1024)  # it takes long, and a page that is watched is made often
def _checked(script: str, values: str) -> list[str] | None:
    try:
        return _overrides(script, json.loads(values))
    except (SettingsError, *_DAMAGED):  # of another version, or of a package that is not here
        return None


def _overrides(script: str, values: Mapping[str, Any]) -> list[str] | None:
    """Return what differs from the defaults of task and algorithm; None if that can not be checked here."""
    task, algorithm = values.get("task"), values.get("algorithm")
    is_known = isinstance(task, str) and re.fullmatch(r"[\w-]+(/[\w-]+)*", task)
    if not is_known or not (CONFIG / "task" / f"{task}.yaml").is_file():
        return None
    # With a checkpoint what is not given comes from there, and text may be looked up elsewhere.
    if values.get("checkpoint") is not None or any("${" in each for each in texts(dict(values))):
        return None
    door = ONLINE if script == "online" else OFFLINE
    chosen = (f"task={task}", f"algorithm={algorithm}")
    wanted = flat(Settings.of(_grouped(values)).values)
    known = _defaults(script, *chosen)
    left_out = _not_given(script, values)
    overrides = [
        *chosen,
        *(as_given(k, v) for k, v in wanted.items() if known.get(k) != v and k not in left_out),
    ]
    found = flat(door.settings(overrides).values)
    differ = {key for key, each in wanted.items() if found.get(key) != each}
    return None if differ - left_out else overrides


def _not_given(script: str, values: Mapping[str, Any]) -> set[str]:
    """Return the settings that would be refused beside others."""
    left_out: set[str] = set()
    if values.get("checkpoint") is not None:
        left_out |= networks_of(str(values.get("algorithm")))
    has_offline_phase = values.get("checkpoint") is None and values.get("dataset") is not None
    if script == "online" and not (has_offline_phase and values.get("steps")):
        left_out |= {*OFFLINE_PHASE} - ({"steps"} if values.get("steps") == 0 else set())
    return left_out


@lru_cache(maxsize=64)
def _defaults(script: str, *chosen: str) -> dict[str, Any]:
    # Of one's own data no default is known.
    own = ["dataset=some/data-v0"] if "task=own" in chosen else []
    door = ONLINE if script == "online" else OFFLINE
    found = flat(door.settings([*chosen, *own]).values)
    return {key: each for key, each in found.items() if not own or key != "dataset"}


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the settings of groups back into dictionaries."""
    found: dict[str, Any] = {}
    for key, each in values.items():
        group, _, name = key.partition(".")
        if name:
            found.setdefault(group, {})[name] = each
        else:
            found[key] = each
    return found
