"""Algorithms beside each other on tasks, over seeds: the table, its statistics and its pictures.

    python recipes/comparison/table.py
    python recipes/comparison/table.py --plan my.yaml --folder runs/mine --jobs 8
    python recipes/comparison/table.py --launcher joblib hydra.launcher.n_jobs=4
    python recipes/comparison/table.py --record runs/table/record.json --folder runs/again

What is compared is in ``table.yaml``. The seeds of each cell are one run of recipes/offline.py; or, with
``env_steps`` in the plan, one run each of recipes/online.py. A run has one thread, several go at a time;
what is finished is kept, what was interrupted goes on: the same command goes on after anything. It leaves
``table.md``, ``table.csv``, ``curves.png`` and ``aggregates.png`` in the folder, made anew at each call from
what is there, and from the ``record.json`` of earlier runs that ``--record`` names: those are not done again,
if their settings are still the plan's. Statistics are rliable's, over the tasks that all algorithms of the
aggregates have finished: interquartile mean, performance profiles, and the probability that the last
algorithm is better.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from torchrl_iql.spaces import listed
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.comparison import aggregates
from torchrl_iql_recipes.comparison.jobs import (
    ensure_data,
    finish,
    new_folder,
    told_if_stopped,
)
from torchrl_iql_recipes.comparison.plan import Cell, Plan
from torchrl_iql_recipes.comparison.record import Record
from torchrl_iql_recipes.experiment.overrides import as_given
from torchrl_iql_recipes.experiment.results import half_width
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.files import shown, whole

HERE = Path(__file__).parent
SHOWN = 3
"""Names of many that an error shows."""
BOOTSTRAP = (
    "Below, 95% intervals of a bootstrap stratified by task: of few seeds too narrow, and without width "
    "where all runs of one are above all of another."
)


def written(cell: Cell | None) -> str:
    """Write mean, half the width of the 95% interval, and the number of seeds, of what is finished."""
    scores = None if cell is None else cell.scores()
    if cell is None or scores is None:
        return "" if cell is None else "-"
    mark = "\\*" if cell.is_beside else ""
    before = cell.before() if cell.env_steps else None
    figures = [_mean(its) for its in (before, scores) if its is not None]
    return f"{' → '.join(figures)} ({len(scores)}){mark}"


def _mean(scores: Sequence[float]) -> str:
    interval = f" ± {half_width(scores):.1f}" if len(scores) >= aggregates.FEWEST else ""
    return f"{mean(scores):.1f}{interval}"


def table(plan: Plan, its: aggregates.Aggregates | None, more: str = "") -> list[str]:
    """Write the lines of the table, and below what its signs mean.

    Args:
        plan: of it.
        its: aggregates, if any.
        more: options, beside the plan, of the command that makes it.
    """
    names = plan.algorithms
    titles = [algorithms()[name].title for name in names]
    lines = [f"| task | steps | {' | '.join(titles)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for task in plan.tasks:
        cells = [plan.cell(task, name) for name in names]
        steps = dict.fromkeys(_steps(each) for each in cells if each and not each.is_beside)
        head = f"| `{task}` | {', '.join(steps)} "
        lines.append(f"{head}| {' | '.join(map(written, cells))} |")
        known = [cell.published if cell else () for cell in cells]
        if any(known):
            figures = (" → ".join(f"*{its:.1f}*" for its in each) for each in known)
            lines.append(f"| *published, other data* | | {' | '.join(figures)} |")
    if its is not None:
        tasks, seeds = len(its.tasks), its.seeds
        number = f"{tasks} task{'s' * (tasks > 1)}, {seeds} seed{'s' * (seeds > 1)} of each"
        figures = [_with_interval(its.means.get(name)) for name in names]
        lines.append(f"| interquartile mean of {number} | | {' | '.join(figures)} |")
        if its.improvement:
            chances = [_with_interval(its.improvement.get(name), digits=2) for name in names]
            last = algorithms()[list(its.means)[-1]].title
            lines.append(f"| probability that {last} is better | | {' | '.join(chances)} |")
    beside = sorted({(c.algorithm, _steps(c)) for c in plan.cells if c.is_beside})
    online = any(cell.env_steps for cell in plan.cells)
    returns = dict.fromkeys(cell.task for cell in plan.cells if not cell.is_normalized)
    apart = [name for name in names if name not in plan.compared and (name not in dict(beside))]
    episodes = dict.fromkeys(cell.episodes for cell in plan.cells)
    notes = [
        f"Normalized score {'after the steps offline, and then online' if online else 'of the last step'}: "
        f"of {' or '.join(map(str, episodes))} episodes, mean over seeds, half the width of its 95% interval "
        f"(Student's t, from {aggregates.FEWEST} seeds on), number of seeds; - where not all seeds are "
        "finished.",
        *([BOOTSTRAP] if its is not None else []),
        *(
            f"\\* {algorithms()[name].title}: {steps} steps, outside of the aggregates."
            for name, steps in beside
        ),
        *(
            f"{algorithms()[name].title}: of some tasks only, outside of the aggregates."
            for name in apart
        ),
        *(f"`{task}`: returns, not normalized, outside of the aggregates." for task in returns),
        f"Made by `python recipes/comparison/table.py --plan {shown(plan.file)}{more}`, "
        f"{datetime.date.today().isoformat()}.",
    ]
    return [*lines, "", *notes]


def _steps(cell: Cell) -> str:
    return f"{cell.steps:,}" + (f" + {cell.env_steps:,} online" if cell.env_steps else "")


def _with_interval(value: tuple[float, float, float] | None, digits: int = 1) -> str:
    if value is None:
        return ""
    middle, low, high = value
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if low == low else ""
    return f"{middle:.{digits}f}{interval}"


def launch(args: argparse.Namespace, plan: Plan) -> None:
    """Finish all runs, so many, by a launcher of Hydra, each as a job of its own."""
    record = [as_given("record", str(args.record.resolve()))] if args.record else []
    command = [
        *(sys.executable, str(HERE / "job.py"), "-m", f"hydra/launcher={args.launcher}"),
        as_given("plan", str(args.plan.resolve())),
        as_given("folder", str(args.folder.resolve())),
        *record,
        *(
            f"job={','.join(map(str, range(len(plan.jobs))))}",
            as_given("hydra.sweep.dir", str(args.folder.resolve() / "launcher")),
        ),
        *args.given,
    ]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        open_ = [str(each.folder / "log.txt") for each in plan.jobs if each.result() is None]
        logs = f", not finished: {listed(open_, SHOWN)}" if open_ else ""
        raise RuntimeError(
            f"the launcher ended with {done.returncode}{logs}; the same command goes on"
        )


def prepare(plan: Plan) -> None:
    """Check what every run is to be started with, and make the data that are not there.

    Raises:
        SettingsError: a run can not have its settings.
    """
    for cell in plan.cells:
        for run in cell.runs.values():
            names = [each.name for each in run.wanted.learners]
            if len(names) > len({each.seed for each in run.wanted.learners}):
                raise SettingsError(
                    f"{plan.file}: {cell.task}, {cell.algorithm}: expected one learner for each seed, "
                    f"one value of each of the settings; they are {listed(names, SHOWN)}"
                )
    ensure_data([run.wanted for run in plan.jobs])


def report(plan: Plan, folder: Path, more: str = "") -> list[str]:
    """Write table and pictures of what is finished; return the lines of the table.

    What the record of the folder has of other runs, it keeps.

    Args:
        plan: of it.
        folder: of all runs.
        more: options, beside the plan, of the command that makes it.
    """
    titles = {name: algorithms()[name].title for name in plan.algorithms}
    its = aggregates.of(plan)
    lines = table(plan, its, more)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "table.md") as new:
        new.write_text("\n".join(lines) + "\n")
    record = plan.finished()
    record.beside(Record.kept_in(folder)).write(folder / "record.json")
    write_scores(record, folder / "table.csv")
    aggregates.curves(plan, titles, folder / "curves.png")
    if its is not None:
        aggregates.draw_aggregates(its, titles, folder / "aggregates.png")
    return lines


def write_scores(record: Record, file: Path) -> None:
    """Write a line for each evaluation."""
    with whole(file) as new, new.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["task", "algorithm", "seed", "step", "score"])
        for each in record.known:
            of = each.settings["task"], each.settings["algorithm"]
            for seed, curve in each.curves.items():
                writer.writerows([*of, seed, step, curve[step]] for step in sorted(curve))


def run(args: argparse.Namespace) -> None:
    """Do what the plan lacks, and write its table.

    Args:
        args: of compare.py.

    Raises:
        RuntimeError: runs have failed; the table is that of the others.
        SettingsError: a run can not have its settings.
        ValueError: there is no such plan or record.
    """
    given = {"record": args.record, "folder": args.folder}
    more = "".join(f" --{name} {shown(its)}" for name, its in given.items() if its is not None)
    args.folder = args.folder or Path("runs") / args.plan.stem
    Record.kept_in(args.folder)  # to be added to, after days
    record = Record.read(args.record) if args.record else Record()
    plan = Plan.load(args.plan, args.folder, record)
    new_folder(args.folder)
    failure = None
    with told_if_stopped():
        if args.launcher or args.jobs:
            prepare(plan)
        try:
            if args.launcher and plan.jobs:
                launch(args, plan)
            elif args.jobs and plan.jobs:
                finish(plan.jobs, args.jobs)
        except RuntimeError as error:
            failure = error
    print("\n".join(report(plan, args.folder, more)))
    print(f"Table, CSV and pictures: {shown(args.folder)}")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    from torchrl_iql_recipes.compare import PLAN, main

    main(PLAN)
