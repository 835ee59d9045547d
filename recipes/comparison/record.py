"""What runs of a comparison have come to, in one file: to be kept where the runs are not."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.files import whole

__all__ = ["Curves", "Record", "digest"]

COLUMNS = ["task", "algorithm", "settings", "seed", "step", "score"]
INDIFFERENT = {
    *("compute", "logger", "log_interval", "checkpoint_interval"),
    *("eval_workers", "on_eval_failure", "on_nonfinite", "best_by"),
    "seeds",  # each learner is what it would be alone
}
"""Settings that the scores of a learner do not depend on, and its seed, by which they are kept."""

Curves = Mapping[int, Mapping[int, float]]
"""By seed, the scores by step."""


def digest(settings: Settings) -> str:
    """Return what tells the settings of a run, given and default, from others, but for its seeds.

    Those that are off do not count: a setting that a later version adds changes nothing as long as it is.
    """
    values = settings.values
    asked = {key: value for key, value in values.items() if value and key not in INDIFFERENT}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Record:
    """The scores of finished runs.

    Attributes:
        curves: by task, algorithm and :func:`digest` of the settings.
    """

    curves: Mapping[tuple[str, str, str], Curves] = field(default_factory=dict)

    def has(self, task: str, algorithm: str) -> bool:
        """Return whether there is anything of them, with whatever settings."""
        return any(key[:2] == (task, algorithm) for key in self.curves)

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read what :meth:`write` wrote.

        Raises:
            SettingsError: it is no such file.
        """
        found: dict[tuple[str, str, str], dict[int, dict[int, float]]] = {}
        try:
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines):
                    key = row["task"], row["algorithm"], row["settings"]
                    curve = found.setdefault(key, {}).setdefault(int(row["seed"]), {})
                    curve[int(row["step"])] = float(row["score"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"{file}: expected the columns {COLUMNS}: {error}") from None
        return cls(found)

    def write(self, file: Path) -> None:
        """Write a line for each evaluation."""
        with whole(file) as new, new.open("w", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(COLUMNS)
            for key, its in self.curves.items():
                for seed, curve in its.items():
                    writer.writerows([*key, seed, step, curve[step]] for step in sorted(curve))
