"""What is given on the command line, in Hydra's grammar."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf

from torchrl_iql_recipes.experiment.schema import SettingsError, written

__all__ = ["as_given", "last", "over", "parsed", "readable", "values_of"]


def readable(override: str) -> str:
    """Put text that Hydra's grammar can not read, as a path with an equals sign, in the quotes it asks for.

    Args:
        override: a setting and its value. Of a list, whose items may have commas, these are paths that are
            there, as ``[runs/a/temperature=3,seed=0/last.ckpt,runs/b/last.ckpt]``.
    """
    name, _, value = override.partition("=")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        if value.startswith("[") and value.endswith("]") and not {*"{}'\"[]"} & {*value[1:-1]}:
            return as_given(name, list(_items(value[1:-1])))
        if not {*"[]{}'\"\\"} & {*value} or os.path.exists(value):
            return as_given(name, value)
    return override


def as_given(key: str, value: Any) -> str:
    """Write a setting as Hydra reads it."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    match value:
        case str() if re.fullmatch(r"[\w./-]+", value) and written(value) == value:
            return value
        case str():
            escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
            escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", r"\${")
            return f'"{escaped}"'
        case list() | tuple():
            return f"[{','.join(map(_literal, value))}]"
        case Mapping():
            return f"{{{','.join(f'{key}:{_literal(each)}' for key, each in value.items())}}}"
        case _:
            return written(value)


def _items(text: str) -> Iterator[str]:
    """Yield what stands between commas, and where that is no path but more of it is one, that."""
    pieces = text.split(",")
    while pieces:
        joined = (",".join(pieces[:i]) for i in range(1, len(pieces) + 1))
        item = next((each for each in joined if os.path.exists(each)), pieces[0])
        del pieces[: item.count(",") + 1]
        yield item


def _setting_of(path: str) -> str:
    """Return what is most likely to be set by a file or folder."""
    its = path.endswith(".ckpt") or os.path.exists(os.path.join(path, "config.yaml"))
    return "checkpoint" if its else "dataset"


def parsed(overrides: Sequence[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for each in overrides:
        try:
            parsed.append(parser.parse_override(each))
        except HydraException as error:
            if "=" not in each:
                likely = f"{_setting_of(each)}={each}" if os.path.exists(each) else f"{each}=..."
                raise SettingsError(f"{each}: expected a setting and its value, {likely}") from None
            reason = " ".join(str(error).partition("See http")[0].split())
            raise SettingsError(
                f"{each}: can not be read, expected a number, text, [a,b] or {{key: value}}, in quotes where "
                f"the shell or Hydra reads more into it ({reason})"
            ) from None
    return parsed


def last(overrides: Iterable[Override], key: str) -> Any:
    """Return the value that is given last for a name; None if none is."""
    given = [each.value() for each in overrides if each.key_or_group == key]
    return given[-1] if given else None


def values_of(override: Override) -> Iterator[Any]:
    """Yield the value that is given, or each of several runs'."""
    if override.is_interval_sweep():
        yield from (override.value().start, override.value().end)
    elif override.is_sweep_override():
        for each in override.sweep_iterator(Transformer.identity):
            yield OmegaConf.to_object(OmegaConf.create({"value": each}))["value"]  # pyright: ignore
    else:
        yield override.value()


def over(
    base: Mapping[str, Any], composed: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return values, with those that are given put over them, and where there are none, the composed ones.

    Args:
        base: the values.
        composed: all values that the overrides lead to.
        overrides: what is given.
    """
    values = {**composed, **{key: value for key, value in base.items() if key in composed}}
    for each in parsed(overrides):
        group, *names = each.key_or_group.split(".")
        name = names[0] if names else ""
        if group not in composed:  # no setting, but where the run is
            continue
        if not name:
            values[group] = composed[group]
        else:
            values[group] = {**values[group], name: composed[group][name]}
    return values
