"""What runs of a comparison have come to, in one file: to be kept where the runs are not."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment.schema import SettingsError, written
from torchrl_iql_recipes.experiment.settings import PARTS, flat, has_effect
from torchrl_iql_recipes.files import whole

__all__ = ["Curves", "Known", "Record", "curves_of"]

Curves = Mapping[int, Mapping[int, float]]
"""By seed, the scores by step."""


@dataclass(frozen=True)
class Known:
    """The scores of learners that differ in their seeds only.

    Attributes:
        settings: of a run, as ``config.yaml`` has them.
        curves: of its learners.
        is_normalized: whether the scores are normalized, else they are returns.
    """

    settings: Mapping[str, Any]
    curves: Curves
    is_normalized: bool = True

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Return the settings, but for seeds, that a run with these would have otherwise, with both values.

        A setting that only one of the two has, because a version of this project came between, is as its
        default in the other: what is added changes no record.
        """
        its, asked = flat(self.settings), flat(settings)
        otherwise = _defaults(settings["algorithm"])

        def of(values: Mapping[str, Any], name: str) -> Any:
            """Return a value as it is after it was written and read."""
            return json.loads(json.dumps(values.get(name, otherwise.get(name))))

        return [
            f"{name}={written(of(its, name))}, not {written(of(asked, name))}"
            for name in sorted({*its, *asked})
            if has_effect(name) and of(its, name) != of(asked, name)
        ]


def _defaults(algorithm: str) -> dict[str, Any]:
    parts = (*PARTS.values(), algorithms()[algorithm])
    return {given: part.defaults()[name] for part in parts for given, name in part.names().items()}


def curves_of(known: Iterable[Known]) -> dict[int, Mapping[int, float]]:
    """Return the scores of several together."""
    return {seed: curve for each in known for seed, curve in each.curves.items()}


@dataclass(frozen=True)
class Record:
    """The scores of finished runs.

    Attributes:
        known: those of each settings.
    """

    known: tuple[Known, ...] = ()

    def of(self, settings: Mapping[str, Any], seeds: Collection[int]) -> list[Known]:
        """Return what it has of runs with these settings and seeds."""
        return [
            replace(each, curves={s: each.curves[s] for s in seeds if s in each.curves})
            for each in self.known
            if each.curves.keys() & {*seeds} and not each.differences(settings)
        ]

    def tells_of(self, task: str, algorithm: str) -> bool:
        """Return whether there is anything of them, with whatever other settings."""
        its = ((each.settings["task"], each.settings["algorithm"]) for each in self.known)
        return (task, algorithm) in its

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read what :meth:`write` wrote.

        Raises:
            SettingsError: it is no such file.
        """
        try:
            return cls(tuple(_known(json.loads(file.read_text()))))
        except OSError as error:
            raise SettingsError(f"{file}: {error.strerror}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SettingsError(
                f"{file}: expected the record.json of a comparison: {error}"
            ) from None

    def write(self, file: Path) -> None:
        """Write them, so that two files can be compared line by line."""
        its = [
            {"settings": each.settings, "scores": each.curves}
            | ({} if each.is_normalized else {"normalized": False})
            for each in self.known
        ]
        with whole(file) as new:
            new.write_text(json.dumps(its, indent=1) + "\n")


def _known(read: Any) -> Iterator[Known]:
    for each in read:
        settings, scores = each["settings"], each["scores"]
        if missing := {"task", "algorithm"} - settings.keys():
            raise KeyError(*missing)
        curves = {
            int(seed): {int(step): float(score) for step, score in curve.items()}
            for seed, curve in scores.items()
        }
        yield Known(settings, curves, each.get("normalized", True))
