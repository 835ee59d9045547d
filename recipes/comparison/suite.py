"""Algorithms side by side on the whole mini suite: the table of the README.

    python recipes/comparison/suite.py --algorithms bc iql --steps 200000 --seeds 0 1 --jobs 2

Runs that are finished are kept, those of IQL continued where they were, so the same command goes on after an
interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from torchrl_iql import load_dataset
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.comparison.jobs import Job, finish

RECIPES = Path(__file__).parents[1]

EVALUATIONS = 4
"""On the way, the last one included."""


def runs(name: str, args: argparse.Namespace) -> dict[str, Job]:
    """Return the runs of a data set, by algorithm; the learners of all seeds are one run."""
    settings = [
        f"task=mini/{name.replace('/', '-')}",
        f"steps={args.steps}",
        f"eval_interval={args.steps // EVALUATIONS}",
        f"eval_episodes={args.episodes}",
        f"seeds=[{','.join(map(str, args.seeds))}]",
        *args.overrides,
    ]
    folder = args.folder / name.replace("/", "-")
    return {
        algorithm: Job(
            RECIPES / "offline.py", folder / algorithm, [f"algorithm={algorithm}", *settings]
        )
        for algorithm in args.algorithms
    }


def behaviour_score(name: str) -> float:
    """Return the mean normalized score of the data."""
    dataset = load_dataset(collection.dataset_id(name))
    mean_return = float(dataset.episode_returns.mean())
    if dataset.reference_scores is None:  # a maze, with reward 1 at the goal
        return 100 * mean_return
    low, high = dataset.reference_scores
    return 100 * (mean_return - low) / (high - low)


def cell(run: Job) -> str:
    """Write mean and range over the seeds, of the scores after the last step."""
    result = run.result()
    if result is None:
        return "-"
    values = [each["score"] for each in result["replicas"]]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def table(args: argparse.Namespace) -> str:
    titles = [algorithms()[name].title for name in args.algorithms]
    lines = [
        f"| data set (`mini/...`) | behaviour, mean | {' | '.join(titles)} |",
        f"| --- | ---: |{' ---: |' * len(titles)}",
    ]
    for name in args.data:
        cells = [cell(run) for run in runs(name, args).values()]
        lines.append(f"| {' | '.join([name, f'{behaviour_score(name):.1f}', *cells])} |")
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--algorithms", nargs="+", default=["bc", "iql"], choices=list(algorithms())
    )
    parser.add_argument("--steps", type=int, default=200_000, help="gradient steps of each learner")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--episodes", type=int, default=50, help="of an evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--data", nargs="+", default=list(collection.MINI), choices=collection.MINI)
    parser.add_argument("--folder", type=Path, default=Path("runs/suite"))
    parser.add_argument("overrides", nargs="*", help="further settings of recipes/offline.py")
    return parser


def main() -> None:
    args = parser(__doc__.partition("\n")[0]).parse_args()
    for name in args.data:
        collection.ensure(collection.dataset_id(name))
    finish([run for name in args.data for run in runs(name, args).values()], args.jobs)
    print(table(args))


if __name__ == "__main__":
    main()
