"""Estimate what policies are worth from data alone, without an environment: off-policy evaluation.

python recipes/estimate.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt
python recipes/estimate.py checkpoint=runs/own/logs/<date>/last.ckpt dataset=other/logs-v0
python recipes/estimate.py 'checkpoint=[runs/a/last.ckpt,runs/b/last.ckpt]' output=runs/a/estimate.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_iql_recipes.deployment.settings import Estimation
from torchrl_iql_recipes.experiment.door import Door
from torchrl_iql_recipes.experiment.settings import Compute


class _Estimate(Door):
    def _of(self, values: Mapping[str, Any]) -> tuple[Estimation, Compute]:
        return Estimation.of(values), Compute.of(values["compute"])


ESTIMATE = _Estimate("estimate", (Estimation, Compute), keeps_folder=False)


def run(settings: tuple[Estimation, Compute], path: Path) -> None:
    from torchrl_iql_recipes.deployment import estimating

    estimating.run(*settings)


def main() -> None:
    ESTIMATE.open(run, __doc__)


if __name__ == "__main__":
    main()
