"""Evaluate a policy in complete episodes, where its data are from or in any environment, and film it.

python recipes/evaluate.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt
python recipes/evaluate.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt env=Hopper-v4 episodes=20
python recipes/evaluate.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt video=hopper.mp4
"""

from pathlib import Path

from torchrl_iql_recipes.deployment import offscreen
from torchrl_iql_recipes.deployment.settings import Play
from torchrl_iql_recipes.experiment.door import Door

EVALUATE = Door("evaluate", (Play,), keeps_folder=False)


def run(settings: Play, path: Path) -> None:
    if settings.video is not None:
        offscreen.choose()
    from torchrl_iql_recipes.deployment import playing

    playing.run(settings)


def main() -> None:
    EVALUATE.open(run, __doc__)


if __name__ == "__main__":
    main()
