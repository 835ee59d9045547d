"""IQL beside behaviour cloning on the whole mini suite: the table of the README.

    python recipes/benchmark/suite.py --steps 200000 --seeds 0 1 --jobs 2

A run has one thread, and --jobs data sets are trained on at a time. Runs that are finished are kept, those of
IQL continued where they were, so the same command goes on after an interruption; it ends by printing the table
of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

RECIPES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(RECIPES))

import collect  # noqa: E402

from torchrl_iql import load_dataset  # noqa: E402

SCRIPTS = {"BC": RECIPES / "benchmark" / "cloning.py", "IQL": RECIPES / "offline.py"}
"""What trains, of every algorithm."""

EVALUATIONS = 4
"""On the way, the last one included."""


def command(name: str, algorithm: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """What trains on a data set, or goes on with it."""
    if list(folder.rglob("last.ckpt")):
        return [sys.executable, str(SCRIPTS[algorithm]), f"resume={folder}"]
    seeds = ",".join(map(str, args.seeds))
    return [
        sys.executable,
        str(SCRIPTS[algorithm]),
        f"task=mini/{name.replace('/', '-')}",
        f"steps={args.steps}",
        f"eval_interval={args.steps // EVALUATIONS}",
        f"eval_episodes={args.episodes}",
        f"seeds=[{seeds}]",
        "compute.threads=1",
        f"hydra.run.dir={folder}",
        *args.overrides,
    ]


def train(name: str, args: argparse.Namespace) -> None:
    """Runs both algorithms on one data set to their ends.

    Raises:
        RuntimeError: if a run fails; its output is in ``log.txt`` of its folder.
    """
    for algorithm in SCRIPTS:
        folder = run_folder(name, algorithm, args)
        if finished(folder):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("a") as file:
            done = subprocess.run(
                command(name, algorithm, folder, args),
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise RuntimeError(f"{algorithm} on {name} failed, see {log}")


def run_folder(name: str, algorithm: str, args: argparse.Namespace) -> Path:
    return args.folder / name.replace("/", "-") / algorithm


def scores(folder: Path) -> list[dict[str, Any]]:
    """Of the learners of a run."""
    return json.loads((folder / "scores.json").read_text())["replicas"]


def finished(folder: Path) -> bool:
    return (folder / "scores.json").exists() and not any(
        each.get("interrupted", False) for each in scores(folder)
    )


def row(name: str, args: argparse.Namespace) -> str:
    """A line of the table."""
    dataset = load_dataset(collect.dataset_id(name))
    behaviour = float(dataset.episode_returns.mean())
    if dataset.reference_scores is None:  # a maze, with reward 1 at the goal
        behaviour *= 100
    else:
        low, high = dataset.reference_scores
        behaviour = 100 * (behaviour - low) / (high - low)
    cells = [name, f"{behaviour:.1f}"]
    cells += [cell(run_folder(name, algorithm, args)) for algorithm in SCRIPTS]
    return f"| {' | '.join(cells)} |"


def cell(folder: Path) -> str:
    """Mean and range over the seeds, of the scores after the last step."""
    values = [each["score"] for each in scores(folder)]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def table(args: argparse.Namespace) -> str:
    """The table of what is finished."""
    lines = [
        f"| data set (`mini/...`) | behaviour, mean | {' | '.join(SCRIPTS)} |",
        f"| --- | ---: |{' ---: |' * len(SCRIPTS)}",
    ]
    for name in args.data:
        if all(finished(run_folder(name, algorithm, args)) for algorithm in SCRIPTS):
            lines.append(row(name, args))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000, help="gradient steps of each learner")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--episodes", type=int, default=50, help="of an evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="data sets trained on at a time")
    parser.add_argument("--data", nargs="+", default=list(collect.MINI), choices=collect.MINI)
    parser.add_argument("--folder", type=Path, default=Path("runs/suite"))
    parser.add_argument("overrides", nargs="*", help="further settings of recipes/offline.py")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    for name in args.data:
        collect.ensure(collect.dataset_id(name))
    with ThreadPoolExecutor(args.jobs) as executor:
        runs = [executor.submit(train, name, args) for name in args.data]
        try:
            for run in tqdm(runs, desc=f"{args.folder}", unit="data set"):
                run.result()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    print(table(args))


if __name__ == "__main__":
    main()
