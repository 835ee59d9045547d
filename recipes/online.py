r"""Fine-tune online what was learned offline, or learn online from scratch.

    python recipes/online.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt
    python recipes/online.py checkpoint=runs/pointmaze/stitch/<date>/temperature=10.0/last.ckpt
    python recipes/online.py task=mini/antmaze-umaze collector=multi_async
    python recipes/online.py dataset=null env=Pendulum-v1 reward=none episodes=as_stored \
        normalize_observation=false temperature=3
    python recipes/online.py resume=runs/online/<date>

A run has one learner, and leaves in its folder what an offline run leaves of each.
"""

from pathlib import Path

from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import ONLINE


def run(settings: Settings, path: Path) -> float | None:
    from torchrl_iql_recipes.experiment import online, results

    scores = online.run(settings, path)
    from torchrl_iql_recipes.report import conclude  # draws, which nothing did before

    conclude(online.report(scores, path, settings), scores, path)
    return results.objective(scores, settings)


def main() -> None:
    ONLINE.open(run, __doc__)


if __name__ == "__main__":
    main()
