"""One run of a comparison, for launchers of Hydra: see table.py, which starts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from torchrl_iql_recipes.comparison.plan import Plan
from torchrl_iql_recipes.comparison.record import Record


@dataclass
class Asked:
    """Which one.

    Attributes:
        plan: the file of the plan.
        folder: of all runs.
        record: the file of those that are not done again, if there is one.
        job: its place in the plan.
    """

    plan: str = MISSING
    folder: str = MISSING
    record: str | None = None
    job: int = MISSING


ConfigStore.instance().store("job", Asked)


def main(asked: Asked) -> None:
    record = Record.read(Path(asked.record)) if asked.record else None
    Plan.load(Path(asked.plan), Path(asked.folder), record).jobs[asked.job].finish()


if __name__ == "__main__":
    hydra.main(config_path=None, config_name="job", version_base="1.3")(main)()
