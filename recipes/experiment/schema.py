"""What a setting is: a name with a meaning, a range and a default, checked before anything is done with it.

Settings are grouped into parts, each a :class:`Part`. Nothing here, and nothing that only declares
settings, imports PyTorch: help appears and a wrong setting is refused at once.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

__all__ = [
    "AXIS",
    "LATER",
    "Count",
    "Flag",
    "Fraction",
    "Natural",
    "NotNegative",
    "Number",
    "Part",
    "Positive",
    "Rate",
    "RunError",
    "SettingsError",
    "Text",
    "allowed",
    "combinations",
    "is_installed",
    "number",
    "options",
    "rounded",
    "written",
]


class SettingsError(ValueError):
    """A setting that is refused, in one line."""


class RunError(RuntimeError):
    """A run that had to end, told in one line."""


def number(value: Any) -> Any:
    """Return a value, unless it is text or a truth value."""
    # Python takes true for 1, and pydantic "1"; who writes so means something else.
    if isinstance(value, bool | str):
        raise ValueError("not a number")
    return value


Natural = Annotated[int, BeforeValidator(number), Field(ge=0)]
Count = Annotated[int, BeforeValidator(number), Field(ge=1)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)]
Rate = Annotated[float, BeforeValidator(number), Field(gt=0, le=1)]
Flag = StrictBool
Text = StrictStr

AXIS = Field(json_schema_extra={"axis": True})
"""Marks a setting of which several values may be given, one learner for each."""

LATER = Field(json_schema_extra={"later": True})
"""Marks a setting that may be another when a run goes on: it extends the run, or its numbers do not depend
on it."""


class Part(BaseModel):
    """Settings that belong together, immutable.

    Attributes:
        group: the name that stands before theirs, as in ``compute.threads``; empty for those that are
            given without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    group: ClassVar[str] = ""

    @classmethod
    def axes(cls) -> tuple[str, ...]:
        """Return the settings of which several values may be given."""
        return cls._marked("axis")

    @classmethod
    def _marked(cls, mark: str) -> tuple[str, ...]:
        fields = cls.model_fields.items()
        return tuple(name for name, field in fields if mark in (field.json_schema_extra or {}))

    def along_axes(self) -> dict[str, Any]:
        """Return the value of each axis."""
        return {axis: getattr(self, axis) for axis in self.axes()}

    @property
    def values(self) -> dict[str, Any]:
        """What is recorded."""
        return self.model_dump(mode="json")

    def later(self, folder: Path) -> set[str]:
        """Return the settings that may be others when what was begun in a folder goes on there."""
        marked = self._marked("later")
        return {given for given, name in self.names().items() if name in marked}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {name: field.get_default() for name, field in cls.model_fields.items()}

    @classmethod
    def names(cls) -> dict[str, str]:
        """Return the settings, by the names that they are given by."""
        prefix = f"{cls.group}." if cls.group else ""
        return {f"{prefix}{name}": name for name in cls.model_fields}

    @classmethod
    def is_open(cls, name: str) -> bool:
        """Return whether a setting is a dictionary, whose entries may be given one by one."""
        return cls.model_fields[name].annotation in (dict, dict | None)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make the part with these values; those of other parts are left alone.

        Raises:
            SettingsError: one of them is refused, in one line that names it, the value and what is allowed.
        """
        own = {name: values[name] for name in cls.model_fields if name in values}
        for name, value in own.items():
            cls.check(name, value)
        try:
            return cls(**own)
        except ValidationError as error:  # of several settings together
            raise SettingsError(str(error.errors()[0]["ctx"]["error"])) from None

    @classmethod
    def check(cls, name: str, value: Any, *, several: bool = False) -> None:
        """Raise a SettingsError if a setting can not have this value, whatever the others are.

        Args:
            name: of a setting of this part.
            value: of it.
            several: whether it may be a list of values, if the setting is an axis.
        """
        field, values = cls.model_fields[name], [value]
        shown = f"{cls.group}.{name}" if cls.group else name
        expected = f"expected {allowed(field)}"
        if several and name in cls.axes():
            expected += ", or several"
            values = list(value) if isinstance(value, list | tuple) else [value]
            if not values or len(set(map(written, values))) < len(values):
                raise SettingsError(f"{shown}={written(value)}: {expected} different ones")
        for each in values:
            try:
                _adapter(cls, name).validate_python(each)
            except ValidationError:
                raise SettingsError(f"{shown}={written(value)}: {expected}") from None


@cache
def _adapter(part: type[Part], name: str) -> TypeAdapter:
    field = part.model_fields[name]
    return TypeAdapter(
        Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    )


def rounded(score: float) -> str:
    """Write a score: with one decimal, as is usual of normalized ones; one below 1 with two digits."""
    return f"{score:.2g}" if 0 < abs(score) < 0.995 else f"{score:.1f}"


def written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{','.join(map(written, value))}]"
        case Mapping():
            return f"{{{','.join(f'{key}:{written(each)}' for key, each in value.items())}}}"
        case str() if value in ("null", "true", "false") or _is_number(value):
            return f"'{value}'"
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case _:
            return str(value)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def allowed(field: FieldInfo) -> str:
    """Say in words what a setting may be."""
    return _words(field.annotation, field.metadata)


def options(field: FieldInfo) -> list[str]:
    """Return the values that a setting may have, as they are written, if they are few."""
    return list(dict.fromkeys(written(each) for each in _options(field.annotation)))


def _options(annotation: Any) -> Iterator[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from arguments
    elif annotation is bool:
        yield from (True, False)
    elif origin in (Union, types.UnionType, Annotated):
        for each in arguments if origin is not Annotated else arguments[:1]:
            yield from _options(each)


def _words(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*metadata, *_flat(arguments[1:])])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each, metadata) for each in arguments))
    if origin is Literal:
        return " or ".join(written(option) or "''" for option in arguments)
    if origin is tuple:
        entries = "a, b, ..." if arguments[-1] is Ellipsis else ", ".join("abcd"[: len(arguments)])
        return f"[{entries}], each {_words(arguments[0], [])}"
    kind = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "{key: value, ...}",
    }
    return kind.get(annotation, "null") + _interval(metadata)


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]


def _interval(metadata: Sequence[Any]) -> str:
    bounds = [m for m in metadata if isinstance(m, BaseMetadata)]
    words = [
        *(f"above {m.gt:g}" for m in bounds if isinstance(m, Gt)),
        *(f"of at least {m.ge:g}" for m in bounds if isinstance(m, Ge)),
        *(f"below {m.lt:g}" for m in bounds if isinstance(m, Lt)),
        *(f"at most {m.le:g}" for m in bounds if isinstance(m, Le)),
    ]
    return f" {' and '.join(words)}" if words else ""


def is_installed(package: str) -> bool:
    """Return whether a package is there, without importing it."""
    # A folder of that name, as wandb leaves one, is found too, but has no origin.
    try:
        return getattr(find_spec(package), "origin", None) is not None
    except ModuleNotFoundError:  # what it is in
        return False


def combinations(values: Mapping[str, Any], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Return every combination of the values of the axes, the last one changing fastest.

    Args:
        values: of each axis, one or a list of several.
        axes: their names, in order.
    """
    several = [
        list(values[axis]) if isinstance(values[axis], list | tuple) else [values[axis]]
        for axis in axes
    ]
    return [dict(zip(axes, each, strict=True)) for each in itertools.product(*several)]
