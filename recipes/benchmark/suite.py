"""IQL beside behaviour cloning on the whole mini suite: the table of the README.

    python recipes/benchmark/suite.py --steps 200000 --seeds 0 1 --jobs 2

A data set is one run of recipes/offline.py with one thread, --jobs of them at a time. Runs that are finished
are kept, interrupted ones continued, so the same command goes on after an interruption; it ends by printing
the table of what is there.
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

EVALUATIONS = 4
"""On the way, the last one included."""


def temperature(name: str) -> float:
    """Of the paper, for the family of a data set."""
    return 10.0 if "maze" in name else 3.0


def command(name: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """What trains on a data set, or goes on with it."""
    offline = [sys.executable, str(RECIPES / "offline.py")]
    if list(folder.glob("*/last.ckpt")):
        return [*offline, f"resume={folder}"]
    seeds = ",".join(map(str, args.seeds))
    return [
        *offline,
        f"task=mini/{name.replace('/', '-')}",
        f"steps={args.steps}",
        f"eval_interval={args.steps // EVALUATIONS}",
        f"eval_episodes={args.episodes}",
        f"seeds=[{seeds}]",
        f"temperature=[{temperature(name)},0.0]",
        "compute.threads=1",
        f"hydra.run.dir={folder}",
        *args.overrides,
    ]


def train(name: str, args: argparse.Namespace) -> None:
    """Runs one data set to its end.

    Raises:
        RuntimeError: if the run fails; its output is in ``log.txt`` of its folder.
    """
    folder = run_folder(name, args)
    if finished(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("a") as file:
        done = subprocess.run(
            command(name, folder, args), stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"training on {name} failed, see {log}")


def run_folder(name: str, args: argparse.Namespace) -> Path:
    return args.folder / name.replace("/", "-")


def finished(folder: Path) -> bool:
    scores = folder / "scores.json"
    if not scores.exists():
        return False
    return not any(each["interrupted"] for each in json.loads(scores.read_text())["replicas"])


def row(name: str, folder: Path) -> str:
    """A line of the table."""
    dataset = load_dataset(collect.dataset_id(name))
    behaviour = float(dataset.episode_returns.mean())
    if dataset.reference_scores is None:  # a maze, with reward 1 at the goal
        behaviour *= 100
    else:
        low, high = dataset.reference_scores
        behaviour = 100 * (behaviour - low) / (high - low)
    replicas = json.loads((folder / "scores.json").read_text())["replicas"]
    cells = [name, f"{behaviour:.1f}"]
    cells += [cell(replicas, t) for t in (0.0, temperature(name))]
    return f"| {' | '.join(cells)} |"


def cell(replicas: list[dict[str, Any]], temperature: float) -> str:
    """Mean and range over the seeds, of the scores after the last step."""
    scores = [each["score"] for each in replicas if each["temperature"] == temperature]
    spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
    return f"{mean(scores):.1f}{spread}"


def table(args: argparse.Namespace) -> str:
    """The table of what is finished."""
    lines = [
        "| data set (`mini/...`) | behaviour, mean | BC | IQL |",
        "| --- | ---: | ---: | ---: |",
    ]
    folders = {name: run_folder(name, args) for name in args.data}
    lines += [row(name, folder) for name, folder in folders.items() if finished(folder)]
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
