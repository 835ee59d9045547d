"""What runs of a comparison have come to, in one file: to be kept where the runs are not."""

from __future__ import annotations

import json
import math
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

    @property
    def names(self) -> tuple[str, str]:
        """Those of the task and of the algorithm."""
        return self.settings["task"], self.settings["algorithm"]

    def seeds_in(self, other: Known) -> set[int]:
        """Return the seeds that another has, too, with the same settings."""
        both = self.curves.keys() & other.curves.keys()
        return both if both and not self.differences(other.settings) else set()

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
        """Return what it has of runs with these settings and seeds, each seed once.

        Raises:
            SettingsError: it has other scores of a seed of them, too.
        """
        found: list[Known] = []
        curves: dict[int, Mapping[int, float]] = {}
        for each in self.known:
            if not each.curves.keys() & {*seeds} or each.differences(settings):
                continue
            its = {s: each.curves[s] for s in seeds if s in each.curves}
            for seed in its.keys() & curves.keys():
                if its[seed] != curves[seed]:
                    of = f"{settings['task']}, {settings['algorithm']}, seed {seed}"
                    raise SettingsError(f"the record has two runs of {of}, with different scores")
            if new := {seed: its[seed] for seed in its if seed not in curves}:
                found.append(replace(each, curves=new))
            curves |= its
        return found

    def beside(self, others: Record) -> Record:
        """Return it, and of others what it does not have."""
        more = []
        for each in others.known:
            same = (its for its in self.known if its.names == each.names)
            has = {seed for its in same for seed in each.seeds_in(its)}
            if left := {seed: curve for seed, curve in each.curves.items() if seed not in has}:
                more.append(replace(each, curves=left))
        return Record((*self.known, *more))

    def tells_of(self, task: str, algorithm: str) -> bool:
        """Return whether there is anything of them, with whatever other settings."""
        return (task, algorithm) in (each.names for each in self.known)

    @classmethod
    def kept_in(cls, folder: Path) -> Record:
        """Read the record of a folder; it is empty if there is none.

        Raises:
            SettingsError: it is no record.
        """
        file = folder / "record.json"
        return cls.read(file) if file.exists() else cls()

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
        if not all(math.isfinite(score) for its in curves.values() for score in its.values()):
            raise ValueError(f"a score of {settings['task']} is not finite")
        yield Known(settings, curves, each.get("normalized", True))
