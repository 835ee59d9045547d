"""Online fine-tuning of what suite.py has trained offline with IQL: the table and the picture of the README.

    python recipes/comparison/finetuning.py --data pointmaze/medium antmaze/umaze halfcheetah/medium-replay

The offline phase is suite.py's, in the same folder; finished runs are kept, interrupted ones continued.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import mean

from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.comparison import suite
from torchrl_iql_recipes.comparison.jobs import Job, finish
from torchrl_iql_recipes.experiment import plots


def offline_folder(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of one learner; that of the run, if there is no other."""
    folder = suite.runs(name, args)["iql"].folder
    return folder if len(args.seeds) == 1 else folder / f"seed={seed}"


def online_run(name: str, seed: int, args: argparse.Namespace) -> Job:
    settings = [
        f"checkpoint='{offline_folder(name, seed, args) / 'last.ckpt'}'",
        f"env_steps={args.env_steps}",
        f"eval_interval={args.env_steps // args.evaluations}",
        *args.online,
    ]
    folder = args.folder / name.replace("/", "-") / "online" / f"seed={seed}"
    return Job(suite.RECIPES / "online.py", folder, settings)


def evaluations(metrics: Path) -> list[float]:
    """Read the scores, in order."""
    with metrics.open(newline="") as file:
        return [float(row["eval/score"]) for row in csv.DictReader(file) if row["eval/score"]]


def table(args: argparse.Namespace) -> str:
    """Make a table of the mean over the seeds, and each of them.

    A single evaluation of 50 episodes is uncertain by several points, the mean of the second half is less so.
    """
    first, half = args.env_steps // args.evaluations, (args.evaluations + 1) // 2
    lines = [
        "| data set (`mini/...`) | offline, last | online, before the first step | "
        f"after {first:,} steps | after {args.env_steps:,} steps | mean of the last {half} evaluations |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in args.data:
        columns = []
        for seed in args.seeds:
            offline = evaluations(offline_folder(name, seed, args) / "metrics.csv")
            online = evaluations(online_run(name, seed, args).folder / "metrics.csv")
            columns.append((offline[-1], online[0], online[1], online[-1], mean(online[-half:])))
        cells = [
            f"{mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"
            for scores in zip(*columns, strict=True)
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = suite.parser(__doc__.partition("\n")[0])
    parser.add_argument("--env-steps", type=int, default=100_000)
    parser.add_argument("--evaluations", type=int, default=10, help="while online")
    parser.add_argument("--online", nargs="*", default=[], help="settings of recipes/online.py")
    args = parser.parse_args()
    args.algorithms = ["iql"]
    for name in args.data:
        collection.ensure(collection.dataset_id(name))
    finish([suite.runs(name, args)["iql"] for name in args.data], args.jobs)
    finish([online_run(name, seed, args) for name in args.data for seed in args.seeds], args.jobs)
    print(table(args))

    panels = {
        name: [
            (offline_folder(name, seed, args) / "metrics.csv", run.folder / "metrics.csv")
            for seed in args.seeds
            for run in [online_run(name, seed, args)]
        ]
        for name in args.data
    }
    picture = args.folder / "finetuning.png"
    plots.fine_tuning(panels, picture)
    print(picture)


if __name__ == "__main__":
    main()
