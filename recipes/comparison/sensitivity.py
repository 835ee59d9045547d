"""How IQL depends on expectile and temperature: a grid of both, as a heat map for each task.

    python recipes/comparison/sensitivity.py
    python recipes/comparison/sensitivity.py --tasks mini/hopper-medium --expectiles 0.5 0.9 --seeds 0 1 2

All combinations of a task are the learners of one run of recipes/offline.py; runs go several at a time, with
one thread each. What is finished is kept, what was interrupted goes on: the same command goes on after
anything. It leaves ``sensitivity.csv``, a line for each learner, ``sensitivity.png`` and ``record.json`` in
the folder. With ``--record`` such a record says which tasks are not done again, if their settings are those.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from torchrl_iql_recipes.comparison.jobs import (
    Job,
    ensure_data,
    finish,
    new_folder,
    told_if_stopped,
)
from torchrl_iql_recipes.comparison.record import Known, Record, curves_of
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.plots import DPI, SLATE
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE
from torchrl_iql_recipes.files import shown, whole

TASKS = ["mini/pointmaze-medium", "mini/hopper-medium-replay", "mini/antmaze-umaze"]

Scores = Mapping[tuple[float, float], Mapping[int, float]]
"""Of a task: by expectile and temperature, and by seed."""


def job(task: str, args: argparse.Namespace) -> Job:
    """Return the run of all combinations."""
    settings = [
        *(f"task={task}", "algorithm=iql", f"steps={args.steps}", f"eval_interval={args.steps}"),
        f"eval_episodes={args.episodes}",
        *(f"{name}=[{','.join(map(str, its))}]" for name, its in axes(args).items()),
        *args.settings,
    ]
    return Job(OFFLINE, args.folder / task.replace("/", "-"), settings)


def axes(args: argparse.Namespace) -> dict[str, list[float]]:
    return {"expectile": args.expectiles, "temperature": args.temperatures, "seeds": args.seeds}


def settings_by_place(
    task: str, args: argparse.Namespace
) -> dict[tuple[float, float], dict[str, Any]]:
    """Return the settings of the learners of a run, by expectile and temperature, whatever their seeds."""
    settings = job(task, args).wanted
    return {
        (its.algorithm.expectile, its.algorithm.temperature): settings.of_learner(its)  # pyright: ignore
        for its in settings.learners
    }


def of_run(task: str, args: argparse.Namespace) -> Scores | None:
    """Return the scores of a run, None before it is finished, or if an evaluation failed."""
    result = job(task, args).result()
    if result is None or any(results.final_score(each) is None for each in result["replicas"]):
        return None
    found: dict[tuple[float, float], dict[int, float]] = {}
    for each in result["replicas"]:
        place = each["expectile"], each["temperature"]
        found.setdefault(place, {})[each["seed"]] = each["score"]
    return found


def of_record(record: Record, task: str, args: argparse.Namespace) -> Scores | None:
    """Return the scores that a record has, None if it lacks some."""
    if not record.tells_of(task, "iql"):
        return None
    found = {}
    for place, settings in settings_by_place(task, args).items():
        curves = curves_of(record.of(settings, args.seeds))
        if not set(args.seeds) <= curves.keys():
            return None
        found[place] = {seed: curves[seed][args.steps] for seed in args.seeds}
    return found


def kept(found: Mapping[str, Scores], args: argparse.Namespace) -> Record:
    """Return what is to be kept of some tasks."""
    return Record(
        tuple(
            Known(settings, {seed: {args.steps: s} for seed, s in its[place].items()})
            for task, its in found.items()
            for place, settings in settings_by_place(task, args).items()
        )
    )


def grid(its: Scores, args: argparse.Namespace) -> np.ndarray:
    """Return the mean score over the seeds, ``[temperatures, expectiles]``."""
    return np.array(
        [[mean(its[t, b].values()) for t in args.expectiles] for b in args.temperatures]
    )


def draw(found: Mapping[str, Scores], args: argparse.Namespace, png: Path) -> None:
    """Draw a heat map for each task, with the scores in it."""
    width, height = len(args.expectiles), len(args.temperatures)
    size = ((1 + 0.62 * width) * len(found) + 0.4, 1.1 + 0.5 * height)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found)))
    for panel, (task, its) in zip(panels, found.items(), strict=True):
        values = grid(its, args)
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
    parser.add_argument("--record", type=Path, help="the record.json of what is not done again")
    parser.add_argument("settings", nargs="*", help="further ones of recipes/offline.py")
    args = parser.parse_args()
    try:
        with told_if_stopped():
            record = Record.read(args.record) if args.record else Record()
            before = Record.kept_in(new_folder(args.folder))
            known = {task: of_record(record, task, args) for task in args.tasks}
            jobs = [job(task, args) for task, its in known.items() if its is None]
            for each in jobs:
                each.check()
            if args.jobs:
                ensure_data([each.wanted for each in jobs])
                finish(jobs, args.jobs)
    except (SettingsError, ValueError, RuntimeError) as error:
        sys.exit(f"sensitivity.py: {error}")
    its = {task: known[task] or of_run(task, args) for task in args.tasks}
    done = {task: scores for task, scores in its.items() if scores}
    if not done:
        sys.exit(f"sensitivity.py: nothing is finished in {args.folder}")
    kept(done, args).beside(before).write(args.folder / "record.json")
    with whole(args.folder / "sensitivity.csv") as new, new.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["task", "steps", "episodes", "expectile", "temperature", "seed", "score"])
        for task, scores in done.items():
            for place, by_seed in scores.items():
                for seed, score in by_seed.items():
                    writer.writerow([task, args.steps, args.episodes, *place, seed, score])
    draw(done, args, args.folder / "sensitivity.png")
    for task, scores in done.items():
        values = grid(scores, args)
        row, column = np.unravel_index(values.argmax(), values.shape)
        equal = int((values == values.max()).sum()) - 1
        print(
            f"{task}: {values.min():.1f} to {values.max():.1f}, highest at expectile "
            f"{args.expectiles[column]:g} and temperature {args.temperatures[row]:g}"
            f"{f' and {equal} others' if equal else ''}"
        )
    print(f"Scores and picture: {shown(args.folder)}")


if __name__ == "__main__":
    main()
