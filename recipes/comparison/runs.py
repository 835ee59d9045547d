"""What runs that are there have come to, in one table: those of a sweep, or of an afternoon.

Runs whose settings differ in their seeds alone are one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.schema import SettingsError, written
from torchrl_iql_recipes.experiment.settings import flat
from torchrl_iql_recipes.files import shown

__all__ = ["table"]

ASIDE = ("seeds", "checkpoint_interval", "log_interval")
"""Settings that tell no runs apart."""


def table(folders: Sequence[Path]) -> list[str]:
    """Write a line for each combination of settings, the best first, and what was left out.

    Args:
        folders: of runs, or with such at any depth.

    Raises:
        SettingsError: there is no such folder, it holds no finished run, or a file can not be read.
    """
    found = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))
    scored = [each for run in found for each in _learners(run)]
    several = {
        key: None
        for settings, _, _ in scored
        for key, value in settings.items()
        if any(other.get(key) != value for other, _, _ in scored)
    }
    cells: dict[tuple[str, ...], list[str]] = {}
    rows: dict[tuple[str, ...], list[tuple[float, Path]]] = {}
    for settings, score, run in scored:
        if score is not None:
            values = tuple(written(settings.get(key)) for key in several)
            rows.setdefault(values, []).append((score, run))
            cells[values] = [_cell(settings.get(key)) for key in several]
    if not rows:
        raise SettingsError(f"{shown(folders[0])}: none of these runs was evaluated")
    lines = [
        f"| {' | '.join([*several, 'score', 'learners', 'run'])} |",
        f"| {' | '.join([*['---'] * len(several), '---:', '---:', '---'])} |",
    ]
    for values, its in sorted(rows.items(), key=lambda row: -mean(score for score, _ in row[1])):
        scores, runs = [score for score, _ in its], list(dict.fromkeys(run for _, run in its))
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        figures = [_mean(scores), str(len(scores)), f"`{shown(runs[0])}`{more}"]
        lines.append(f"| {' | '.join([*cells[values], *figures])} |")
    lines += ["", "Score: of the last evaluation, mean over learners, half its 95% interval."]
    if idle := sum(score is None for _, score, _ in scored):
        lines.append(f"Not evaluated, and left out: {idle} of {len(scored)} learners.")
    return lines


def _runs_in(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        what = "is a file, give its folder" if folder.exists() else "there is no such folder"
        raise SettingsError(f"{folder}: {what}")
    own = folder / "scores.json"
    files = [own] if own.exists() else sorted(folder.rglob("scores.json"))
    if not files:
        raise SettingsError(f"{folder}: no scores.json, so no run that has come to its end")
    for file in files:
        # The offline phase of an online run is a folder of its own in it.
        if file.parent.name != "offline" or not (file.parents[1] / "config.yaml").exists():
            yield file.parent.resolve()


def _learners(run: Path) -> Iterator[tuple[dict[str, Any], float | None, Path]]:
    """Yield of each learner of a run its settings, flat, and its score, None if it has none."""
    try:
        stored: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        scores = results.read(run)
        assert scores is not None
        for each in scores["replicas"]:
            settings = {k: v for k, v in flat(stored).items() if k not in ASIDE}
            own = {key: each[key] for key in settings.keys() & each.keys()}
            yield {**settings, **own}, each.get("score"), run
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingsError(f"{shown(run)}: can not be read as a run: {reason}") from error


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else written(value)).replace("|", "\\|")


def _mean(scores: Sequence[float]) -> str:
    return f"{mean(scores):.1f}" + (
        f" ± {results.half_width(scores):.1f}" if len(scores) > 1 else ""
    )
