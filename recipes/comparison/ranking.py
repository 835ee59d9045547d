"""How well policies are ranked without an environment: every measure, against the scores in it.

    python recipes/comparison/ranking.py
    python recipes/comparison/ranking.py --tasks mini/hopper-medium --steps 20000 --jobs 4
    python recipes/comparison/ranking.py --tasks --runs runs/table runs/own/logs

On each task IQL at several expectiles and the other algorithms are trained over the seeds, with a tenth of
the episodes held out, by recipes/offline.py, and played at the end; ``--runs`` adds finished runs, wherever
they are. recipes/estimate.py then judges every last.ckpt by the data alone. Runs go several at a time, with
one thread each; what is finished is kept, what was interrupted goes on: the same command goes on after
anything.

It leaves ``ranking.md``, ``ranking.csv`` (a line for each policy) and ``ranking.png`` in the folder: for each
data set and measure Spearman's rank correlation with the scores, with the 95% interval of a bootstrap over
the policies, and the regret, which is the best score less that of the policy that the measure would choose,
in shares of the range of the scores. ``--jobs 0`` makes them of what there is.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from torchrl_iql_recipes.comparison.jobs import (
    RECIPES,
    Job,
    ensure_data,
    finish,
    new_folder,
    run,
    told_if_stopped,
)
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.curves import in_file
from torchrl_iql_recipes.experiment.overrides import as_given
from torchrl_iql_recipes.experiment.plots import DPI
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE
from torchrl_iql_recipes.files import shown, whole

TASKS = ["mini/pointmaze-medium", "mini/hopper-medium-replay", "mini/halfcheetah-medium"]
FEWEST = 8
"""Policies of a data set, below which nothing is said of it."""
RESAMPLES = 2000

MEASURES = {
    "fitted_q": ("fitted Q", +1),
    "fitted_q_low": ("fitted Q less its spread", +1),
    "distance": ("actions near to the data's", -1),
    "fitted_q_held_out": ("fitted Q on held-out episodes", +1),
    "initial_value": ("initial value", +1),
    "q_correlation": ("correlation of Q and return", +1),
    "td_error": ("TD error", -1),
    "log_likelihood": ("log-likelihood", +1),
    "action_error": ("action error", -1),
    "loss_actor": ("the policy's loss in training", -1),
}
"""What may rank policies, by its column: what it is called, and whether high or low is good."""


@dataclass(frozen=True)
class Policy:
    """One that was trained, and played.

    Attributes:
        dataset: that it was learned from.
        title: of its algorithm.
        name: of it among those of its run.
        folder: its own.
        score: in the environment, the mean over episodes.
        stderr: its standard error, NaN if that is not known.
        held_out: what was found on the episodes that it has not learned from, empty if there are none.
    """

    dataset: str
    title: str
    name: str
    folder: Path
    score: float
    stderr: float
    held_out: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """One run of recipes/estimate.py.

    Attributes:
        checkpoint: that is judged.
        fit_on: which episodes.
        output: where it leaves its results.
        settings: what else it is started with.
    """

    checkpoint: Path
    fit_on: str
    output: Path
    settings: Sequence[str]

    def result(self) -> dict[str, Any] | None:
        """Return what was found, once it was, of the checkpoint as it is now.

        Raises:
            SettingsError: it was done with other settings.
        """
        if not self.output.exists():
            return None
        known, asked = self._known(), self._asked()
        if known and [each for each in known if not _is_digest(each)] != asked:
            raise SettingsError(
                f"{self.output} is of other settings, see {self._settings.name}: remove both"
            )
        # Earlier versions did not record it: theirs is taken for the same.
        judged = [each for each in known if _is_digest(each)]
        return json.loads(self.output.read_text()) if judged in ([], [self._digest()]) else None

    @property
    def _settings(self) -> Path:
        return self.output.with_suffix(".settings.json")

    def _asked(self) -> list[str]:
        return [f"fit_on={self.fit_on}", *self.settings]

    def _known(self) -> list[str]:
        """Return what it was done with; nothing if that is not known, or a kill cut the file."""
        try:
            return json.loads(self._settings.read_text())
        except (OSError, ValueError):
            return []

    def _digest(self) -> str:
        """Return what tells a checkpoint from what a run that goes on leaves in its place."""
        its = self.checkpoint.read_bytes() if self.checkpoint.exists() else b""
        return f"sha256={hashlib.sha256(its).hexdigest()}"

    def finish(self) -> None:
        """Do it, unless it is done.

        Raises:
            RuntimeError: it fails; its output is beside its results.
            SettingsError: it was done with other settings.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.result() is not None:
            return
        self.output.unlink(missing_ok=True)  # of the checkpoint that was there before
        with whole(self._settings) as new:
            new.write_text(json.dumps([*self._asked(), self._digest()], indent=2) + "\n")
        files = as_given("checkpoint", str(self.checkpoint)), as_given("output", str(self.output))
        log = self.output.with_suffix(".txt")
        code = run(RECIPES / "estimate.py", [*files, "compute.threads=1", *self._asked()], log)
        if code != 0 or not self.output.exists():
            raise RuntimeError(f"estimate.py failed, see {log}")


def _is_digest(setting: str) -> bool:
    return setting.startswith("sha256=")


# --- Runs ----------------------------------------------------------------------------------------------


def trainings(args: argparse.Namespace) -> list[Job]:
    """Return the runs of all tasks, one of each algorithm."""
    found = []
    for task in args.tasks:
        for algorithm in args.algorithms:
            axes = [f"seeds=[{','.join(map(str, args.seeds))}]"]
            if algorithm == "iql":
                axes.append(f"expectile=[{','.join(map(str, args.expectiles))}]")
            settings = [
                *(f"task={task}", f"algorithm={algorithm}", f"steps={args.steps}", *axes),
                *(f"eval_interval={args.steps}", f"eval_episodes={args.episodes}"),
                *("validation=0.1", *args.settings),
            ]
            folder = args.folder / task.replace("/", "-") / algorithm
            found.append(Job(OFFLINE, folder, settings))
    return found


def policies_in(folders: Iterable[Path]) -> list[Policy]:
    """Return the policies of finished runs that were played and have a checkpoint."""
    found = []
    for folder in folders:
        its = results.read(folder)
        for each in its["replicas"] if its else ():
            own = folder / each["name"] if each.get("name") else folder
            is_scored = results.final_score(each) is not None
            if is_scored and not each.get("interrupted") and (own / "last.ckpt").exists():
                kind = results.score_kind(each)
                found.append(
                    Policy(
                        its["dataset"],  # pyright: ignore
                        each["title"],
                        each.get("name") or "",
                        own,
                        each["score"],
                        each.get(f"{kind}_stderr", math.nan),
                        each.get("held_out") or {},
                    )
                )
    return found


def fits(policy: Policy, args: argparse.Namespace) -> dict[str, Fit]:
    """Return how a policy is judged, by the episodes that are fitted on."""
    slug = re.sub(r"[^\w.=,+-]+", "-", str(shown(policy.folder))).strip("-")
    own = [f"steps={args.fit_steps}", f"discount={args.discount:g}", *args.fit_settings]
    parts = [part for part in args.fit_on if part == "all" or policy.held_out]
    folder = args.folder.resolve() / "estimates"
    return {
        part: Fit(policy.folder / "last.ckpt", part, folder / f"{slug}-{part}.json", own)
        for part in parts
    }


def measured(policy: Policy, args: argparse.Namespace) -> dict[str, float]:
    """Return what there is of the measures of a policy, by its column."""
    found = {key: float(policy.held_out[key]) for key in MEASURES if key in policy.held_out}
    found.pop("loss_actor", None)
    for part, fit in fits(policy, args).items():
        if (its := fit.result()) is not None:
            (of,) = its["policies"]
            end = "" if part == "all" else f"_{part}"
            found[f"fitted_q{end}"] = of["value"]
            if part == "all":
                found["fitted_q_low"] = of["value"] - (of["spread"] or 0.0)
                found["distance"] = of["distance"]
    metrics = policy.folder / "metrics.csv"
    if metrics.exists():
        _, losses = in_file(metrics).get("loss_actor", ((), ()))
        if len(losses):
            found["loss_actor"] = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    return found


# --- Statistics ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """How well a measure ranks the policies of a data set.

    Attributes:
        policies: how many have it.
        correlation: Spearman's, of measure and score, positive if good is told from bad.
        low: of its 95% interval.
        high: of it.
        regret: of choosing by the measure, in shares of the range of the scores.
    """

    policies: int
    correlation: float
    low: float
    high: float
    regret: float


def ranking(scores: Sequence[float], values: Sequence[float], seed: int = 0) -> Ranking:
    """Rank by values, of which high is good.

    Args:
        scores: of each policy.
        values: of the measure, of each.
        seed: of the bootstrap over policies.
    """
    true, its = np.asarray(scores, float), np.asarray(values, float)
    rng, drawn = np.random.default_rng(seed), []
    for rows in rng.integers(len(true), size=(RESAMPLES, len(true))):
        drawn.append(_correlation(true[rows], its[rows]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (np.nan,) * 2
    spread = true.max() - true.min()
    chosen = true[its == its.max()].mean()  # of equal ones any may be chosen
    regret = (true.max() - chosen) / spread if spread else 0.0
    return Ranking(len(true), _correlation(true, its), float(low), float(high), float(regret))


def _correlation(true: np.ndarray, its: np.ndarray) -> float:
    if len(set(true)) < 2 or len(set(its)) < 2:
        return math.nan
    return float(spearmanr(true, its)[0])  # pyright: ignore


def by_chance(scores: Sequence[float]) -> float:
    """Return the mean regret of choosing blindly."""
    true = np.asarray(scores, float)
    spread = true.max() - true.min()
    return float((true.max() - true.mean()) / spread) if spread else 0.0


Table = Mapping[str, Sequence[tuple[Policy, Mapping[str, float]]]]
"""By data set, the policies and their measures."""


def rankings(of_data: Sequence[tuple[Policy, Mapping[str, float]]]) -> dict[str, Ranking]:
    """Return how well each measure ranks the policies that have it, if there are enough of them."""
    found = {}
    for key, (_, sign) in MEASURES.items():
        has = [(policy.score, sign * its[key]) for policy, its in of_data if key in its]
        has = [(score, value) for score, value in has if math.isfinite(value)]
        if len(has) >= FEWEST:
            found[key] = ranking(*zip(*has, strict=True))
    return found


# --- What it leaves ------------------------------------------------------------------------------------


def page(table: Table, args: argparse.Namespace) -> list[str]:
    """Write the table: a row for each measure, two columns for each data set."""
    its = {name: rankings(each) for name, each in table.items()}
    told = {name: each for name, each in its.items() if each}
    heads = [f"`{name}`, correlation | regret" for name in told]
    lines = [
        f"| measure | {' | '.join(heads)} | mean correlation | mean regret |",
        f"| --- |{' ---: | ---: |' * (len(told) + 1)}",
    ]
    for key, (title, _) in MEASURES.items():
        found = [each.get(key) for each in told.values()]
        if any(found):
            cells = [_cells(each, table[name]) for name, each in zip(told, found, strict=True)]
            means = ["", ""]
            if all(found):
                means = [
                    _plain(float(np.mean([each.correlation for each in found if each]))),
                    f"{np.mean([each.regret for each in found if each]):.2f}",
                ]
            lines.append(f"| {title} | {' | '.join(cells)} | {' | '.join(means)} |")
    trained = f"{args.steps:,} steps of training, " if args.tasks else ""
    blind = [by_chance([policy.score for policy, _ in table[name]]) for name in told]
    mean = f"{np.mean(blind):.2f}" if blind else ""
    lines.append(f"| blindly | {' | '.join(f'0 | {each:.2f}' for each in blind)} | 0 | {mean} |")
    notes = [
        "Correlation: Spearman's, of measure and score, positive where good policies are told from bad "
        "ones, with the 95% interval of a bootstrap over the policies; in parentheses the number of "
        "policies that have the measure, if not all do. Regret: the best score less that of the policy "
        "that the measure puts first, over the range of the scores: 0 is the best choice, 1 the worst.",
        *(_of_data(name, table[name]) for name in table),
        f"Made by `python recipes/comparison/ranking.py`, {trained}"
        f"{args.fit_steps:,} steps of fitted Q, discount {args.discount:g}, "
        f"{datetime.date.today().isoformat()}.",
    ]
    return [*lines, "", *(f"- {each}" for each in notes)]


def _cells(its: Ranking | None, of_data: Sequence[Any]) -> str:
    if its is None:
        return " | "
    few = f" ({its.policies})" if its.policies < len(of_data) else ""
    interval = f" ({_plain(its.low)} to {_plain(its.high)})" if its.low == its.low else ""
    return f"{_plain(its.correlation)}{interval}{few} | {its.regret:.2f}"


def _plain(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"


def _of_data(name: str, of_data: Sequence[tuple[Policy, Any]]) -> str:
    scores = [policy.score for policy, _ in of_data]
    errors = [policy.stderr for policy, _ in of_data if policy.stderr == policy.stderr]
    error = f", standard error of one {np.median(errors):.1f}" if errors else ""
    few = "" if len(scores) >= FEWEST else f": too few to rank, expected {FEWEST}"
    titles = ", ".join(dict.fromkeys(policy.title for policy, _ in of_data))
    low, high = min(scores), max(scores)
    return (
        f"`{name}`: {len(scores)} policies of {titles}, scores {low:.1f} to {high:.1f}{error}{few}."
    )


def write_policies(table: Table, file: Path) -> None:
    """Write a line for each policy."""
    with whole(file) as new, new.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["dataset", "algorithm", "name", "score", "stderr", *MEASURES])
        for name, each in table.items():
            for policy, its in each:
                row = [name, policy.title, policy.name, policy.score, policy.stderr]
                writer.writerow([*row, *(its.get(key, "") for key in MEASURES)])


def draw(table: Table, png: Path) -> None:
    """Draw the score over fitted Q and over the initial value, a row for each data set."""
    drawn = ["fitted_q", "initial_value"]
    size = (3.4 * len(drawn), 2.6 * len(table) + 0.3)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = np.atleast_2d(figure.subplots(len(table), len(drawn), squeeze=False))
    titles = dict.fromkeys(policy.title for each in table.values() for policy, _ in each)
    colors = {title: f"C{i}" for i, title in enumerate(titles)}
    for row, (name, each) in zip(panels, table.items(), strict=True):
        for panel, key in zip(row, drawn, strict=True):
            for title, color in colors.items():
                has = [(its[key], p.score) for p, its in each if p.title == title and key in its]
                if has:
                    panel.scatter(*zip(*has, strict=True), s=18, color=color, label=title)
            panel.set(xlabel=MEASURES[key][0], ylabel="score")
            panel.set_title(name, fontsize=8)
        if row[0].get_legend_handles_labels()[1]:
            row[0].legend(fontsize=7)
    figure.savefig(png)


def tabled(policies: Iterable[Policy], args: argparse.Namespace) -> Table:
    """Return all policies and their measures, by data set."""
    found: dict[str, list[tuple[Policy, Mapping[str, float]]]] = {}
    for policy in policies:
        found.setdefault(policy.dataset, []).append((policy, measured(policy, args)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=TASKS, help="to train on")
    parser.add_argument("--algorithms", nargs="+", default=["iql", "bc", "awac", "td3bc"])
    parser.add_argument("--expectiles", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=30_000, help="gradient steps of each learner")
    parser.add_argument("--episodes", type=int, default=100, help="that it is played")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of finished runs")
    parser.add_argument("--fit-on", nargs="+", default=["all", "held_out"], help="of estimate.py")
    parser.add_argument("--fit-steps", type=int, default=10_000, help="of estimate.py")
    parser.add_argument("--fit-settings", nargs="*", default=[], help="others of estimate.py")
    parser.add_argument("--discount", type=float, default=0.99, help="of estimate.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 0 ranks what there is")
    parser.add_argument("--folder", type=Path, default=Path("runs/ranking"), help="of all this")
    parser.add_argument("settings", nargs="*", help="further ones of recipes/offline.py")
    args = parser.parse_args()
    try:
        with told_if_stopped():
            new_folder(args.folder)
            jobs = trainings(args)
            for each in jobs:
                each.check()
            if args.jobs:
                ensure_data([each.wanted for each in jobs])
                finish(jobs, args.jobs)
            folders = [each.folder for each in jobs if each.result() is not None]
            for given in args.runs:
                if not (scored := sorted(given.rglob("scores.json"))):
                    raise SettingsError(f"--runs {given}: there is no scores.json in it")
                folders += [file.parent for file in scored]
            # Given twice, or as a part of another, a run counts once.
            policies = policies_in({each.resolve(): each for each in folders}.values())
            if not policies:
                raise SettingsError(
                    f"there are no finished runs with scores in {args.folder} or --runs"
                )
            if args.jobs:
                finish([fit for each in policies for fit in fits(each, args).values()], args.jobs)
            table = tabled(policies, args)
    except (SettingsError, ValueError, RuntimeError) as error:
        sys.exit(f"ranking.py: {error}")
    lines = page(table, args)
    with whole(args.folder / "ranking.md") as new:
        new.write_text("\n".join(lines) + "\n")
    write_policies(table, args.folder / "ranking.csv")
    draw(table, args.folder / "ranking.png")
    print("\n".join(lines))
    print(f"Table, CSV and picture: {shown(args.folder)}")


if __name__ == "__main__":
    main()
