"""Train on an offline data set, one learner or many at once.

With no argument: the embedded maze data, made on first use, IQL beside behaviour cloning.

    python recipes/offline.py
    python recipes/offline.py task=locomotion/hopper-medium-replay 'seeds=[0,1,2,3]'
    python recipes/offline.py algorithm=bc task=mini/hopper-medium
    python recipes/offline.py resume=runs/mini/hopper-medium/<date> steps=2e6
    python recipes/offline.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt dataset=my/logs-v0
"""

from pathlib import Path

from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE


def run(settings: Settings, path: Path) -> float | None:
    from torchrl_iql_recipes.experiment import offline, results

    scores = offline.run(settings, path)
    from torchrl_iql_recipes.report import conclude  # draws, which nothing did before

    conclude(offline.report(scores, path, settings), scores, path)
    return results.objective(scores, settings)


def main() -> None:
    OFFLINE.open(run, __doc__)


if __name__ == "__main__":
    main()
