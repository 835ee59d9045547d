"""How IQL depends on expectile and temperature: a grid of both, as a heat map for each task.

    python recipes/comparison/sensitivity.py
    python recipes/comparison/sensitivity.py --tasks mini/hopper-medium --expectiles 0.5 0.9 --seeds 0 1 2

All combinations of a task are the learners of one run of recipes/offline.py; runs go several at a time, with
one thread each. What is finished is kept, what was interrupted goes on: the same command goes on after
anything. It leaves ``sensitivity.csv``, a line for each learner, and ``sensitivity.png`` in the folder. With
``--record`` such a file says what is not done again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from torchrl_iql_recipes.comparison.jobs import Job, ensure_data, finish
from torchrl_iql_recipes.comparison.plan import RECIPES
from torchrl_iql_recipes.experiment.door import OFFLINE
from torchrl_iql_recipes.experiment.plots import DPI, SLATE
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.files import shown, whole

TASKS = ["mini/pointmaze-medium", "mini/hopper-medium-replay", "mini/antmaze-umaze"]
COLUMNS = ["task", "steps", "episodes", "expectile", "temperature", "seed", "score"]

Row = dict[str, str]
"""A learner, by column, as the file has it."""


def job(task: str, args: argparse.Namespace) -> Job:
    """Return the run of all combinations."""
    settings = [
        *(f"task={task}", "algorithm=iql", f"steps={args.steps}", f"eval_interval={args.steps}"),
        f"eval_episodes={args.episodes}",
        *(f"{name}=[{','.join(map(str, its))}]" for name, its in axes(args).items()),
        *args.settings,
    ]
    return Job(RECIPES / "offline.py", args.folder / task.replace("/", "-"), settings)


def axes(args: argparse.Namespace) -> dict[str, list[float]]:
    return {"expectile": args.expectiles, "temperature": args.temperatures, "seeds": args.seeds}


def learners(task: str, args: argparse.Namespace) -> list[Row] | None:
    """Return the learners of a run, None before it is finished."""
    result = job(task, args).result()
    if result is None:
        return None
    its = {"task": task, "steps": args.steps, "episodes": args.episodes}
    return [
        {column: str({**its, **each}[column]) for column in COLUMNS} for each in result["replicas"]
    ]


def recorded(file: Path, args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the learners of each task of a file that is complete in it.

    Raises:
        SettingsError: it is no such file.
    """
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    if any(set(row) != set(COLUMNS) for row in rows):
        raise SettingsError(f"{file}: expected the columns {COLUMNS}")
    asked = len(args.expectiles) * len(args.temperatures) * len(args.seeds)
    found: dict[str, list[Row]] = {}
    for row in rows:
        place = (float(row["expectile"]), float(row["temperature"]), int(row["seed"]))
        of = all(value in its for value, its in zip(place, axes(args).values(), strict=True))
        if of and (row["steps"], row["episodes"]) == (str(args.steps), str(args.episodes)):
            found.setdefault(row["task"], []).append(row)
    return {task: its for task, its in found.items() if len(its) == asked}


def scores(rows: Sequence[Row], args: argparse.Namespace) -> np.ndarray:
    """Return the mean score over the seeds, ``[temperatures, expectiles]``."""

    def of(temperature: float, expectile: float) -> float:
        return mean(
            float(row["score"])
            for row in rows
            if (float(row["temperature"]), float(row["expectile"])) == (temperature, expectile)
        )

    return np.array([[of(b, t) for t in args.expectiles] for b in args.temperatures])


def draw(found: Mapping[str, Sequence[Row]], args: argparse.Namespace, png: Path) -> None:
    """Draw a heat map for each task, with the scores in it."""
    width, height = len(args.expectiles), len(args.temperatures)
    size = ((1 + 0.62 * width) * len(found) + 0.4, 1.1 + 0.5 * height)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    for panel, (task, rows) in zip(
        np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True
    ):
        values = scores(rows, args)
        panel.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value <= middle else SLATE
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
        panel.set_xticks(range(width), [f"{each:g}" for each in args.expectiles])
        panel.set_yticks(range(height), [f"{each:g}" for each in args.temperatures])
        panel.set(xlabel="expectile", ylabel="temperature")
        panel.set_title(task, fontsize=9)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--expectiles", type=float, nargs="+", default=[0.5, 0.7, 0.9, 0.95])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 3.0, 10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30_000, help="gradient steps of each learner")
    parser.add_argument("--episodes", type=int, default=50, help="of the evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 0 draws what there is")
    parser.add_argument("--folder", type=Path, default=Path("runs/sensitivity"), help="of all runs")
    parser.add_argument("--record", type=Path, help="the sensitivity.csv of what is not done again")
    parser.add_argument("settings", nargs="*", help="further ones of recipes/offline.py")
    args = parser.parse_args()
    try:
        found = recorded(args.record, args) if args.record else {}
        missing = [task for task in args.tasks if task not in found]
        if args.jobs:
            jobs = [job(task, args) for task in missing]
            ensure_data([OFFLINE.settings(each.settings) for each in jobs])
            finish(jobs, args.jobs)
    except (SettingsError, ValueError, RuntimeError) as error:
        sys.exit(f"sensitivity.py: {error}")
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
    its = {task: found.get(task) or learners(task, args) for task in args.tasks}
    done = {task: rows for task, rows in its.items() if rows}
    if not done:
        sys.exit(f"sensitivity.py: nothing is finished in {args.folder}")
    args.folder.mkdir(parents=True, exist_ok=True)
    with whole(args.folder / "sensitivity.csv") as new, new.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for rows in done.values() for row in rows)
    draw(done, args, args.folder / "sensitivity.png")
    for task, rows in done.items():
        values = scores(rows, args)
        row, column = np.unravel_index(values.argmax(), values.shape)
        print(
            f"{task}: {values.min():.1f} to {values.max():.1f}, highest at expectile "
            f"{args.expectiles[column]:g} and temperature {args.temperatures[row]:g}"
        )
    print(f"Scores and picture: {shown(args.folder)}")


if __name__ == "__main__":
    main()
