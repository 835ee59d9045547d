"""One cell of a comparison, for launchers of Hydra: see table.py, which starts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from torchrl_iql_recipes.comparison.plan import Plan


@dataclass
class Asked:
    """Which one.

    Attributes:
        plan: the file of the plan.
        folder: of all runs.
        cell: its place in the plan.
    """

    plan: str = MISSING
    folder: str = MISSING
    cell: int = MISSING


ConfigStore.instance().store("job", Asked)


def main(asked: Asked) -> None:
    Plan.load(Path(asked.plan), Path(asked.folder)).cells[asked.cell].job.finish()


if __name__ == "__main__":
    hydra.main(config_path=None, config_name="job", version_base="1.3")(main)()
