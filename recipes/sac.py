"""Train the policies that data sets are made with: Soft Actor-Critic, by TorchRL's loss and collector.

    python recipes/sac.py behavior=hopper
    python recipes/sac.py resume=runs/sac/hopper/<date>

It leaves ``stages.pt``: the policy at every stage of the training, for collect.py to make data with.
"""

from pathlib import Path

from torchrl_iql_recipes.behaviors.settings import SoftActorCritic
from torchrl_iql_recipes.experiment.door import Door

SAC = Door("sac", (SoftActorCritic,))


def run(settings: SoftActorCritic, path: Path) -> None:
    from torchrl_iql_recipes.behaviors import sac

    sac.run(settings, path)


def main() -> None:
    SAC.open(run, __doc__)


if __name__ == "__main__":
    main()
