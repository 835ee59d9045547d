"""Train on an offline data set, one learner or many at once.

With no argument: the embedded maze data, made on first use, IQL beside behaviour cloning.

    python recipes/offline.py
    python recipes/offline.py task=locomotion/hopper-medium-replay 'seeds=[0,1,2,3]'
    python recipes/offline.py algorithm=bc task=mini/hopper-medium
    python recipes/offline.py resume=runs/mini/hopper-medium/<date> steps=2e6
    python recipes/offline.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt dataset=my/logs-v0
"""

from pathlib import Path

from torchrl_iql_recipes.experiment.door import OFFLINE
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.files import shown


def run(settings: Settings, path: Path) -> None:
    # PyTorch, which comes with the rest, takes seconds to load.
    print(f"{settings.algorithm.title}, in {shown(path)}", flush=True)
    from torchrl_iql_recipes.experiment import offline

    print(offline.report(offline.run(settings, path), path, settings))


if __name__ == "__main__":
    OFFLINE.open(run, __doc__)
