"""Make Minari data sets: rollouts of trained policies, walks through mazes, episodes of your own policy.

python recipes/collect.py suite=mini
python recipes/collect.py data=hopper/medium-replay transitions=200000 id=my/hopper-replay-v0
python recipes/collect.py env=Hopper-v5 policy=runs/.../last.ckpt id=my/hopper-v0
"""

from pathlib import Path

from torchrl_iql_recipes.behaviors.settings import Collection
from torchrl_iql_recipes.experiment.door import Door

COLLECT = Door("collect", (Collection,), keeps_folder=False)


def run(settings: Collection, path: Path) -> None:
    from torchrl_iql_recipes.behaviors import collection

    collection.run(settings, path)


def main() -> None:
    COLLECT.open(run, __doc__)


if __name__ == "__main__":
    main()
