"""What runs have come to, as a table of text: those of a sweep, or of an afternoon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrl_iql_recipes.commands import typed
from torchrl_iql_recipes.experiment.schema import rounded, written
from torchrl_iql_recipes.files import shown
from torchrl_iql_recipes.reporting import gather
from torchrl_iql_recipes.reporting.compare import Group, groups, repeated, varied, worlds

__all__ = ["table"]


def table(folders: Sequence[Path]) -> list[str]:
    """Write a line for each combination of settings, the best first, of each task; and what was left out.

    Args:
        folders: of runs, or with such at any depth.

    Raises:
        NoRunError: one of them holds none.
    """
    runs, left = gather.runs(folders)
    lines: list[str] = []
    for world, its in worlds(groups(runs)).items():
        scored = [each for each in its if each.scores]
        if scored:
            lines += [f"{world}:", "", *_rows(scored), ""]
        if idle := [member for each in its for member in each.unscored]:
            are = "learner is" if len(idle) == 1 else "learners are"
            where = ", ".join(dict.fromkeys(str(shown(run.path)) for run, _ in idle))
            left.append(f"{world}: {len(idle)} {are} not finished, or not evaluated, in {where}")
        left += [f"{world}: {note}" for each in its for note in repeated(each)]
    if not lines:
        raise gather.NoRunError(
            f"{shown(folders[0])}: none of these runs is finished and evaluated in an environment; "
            f"without one, {typed('estimate')} 'checkpoint=[...,...]' ranks policies by data"
        )
    lines.append(
        "Score: of the last step, mean over seeds, half its 95% interval from three seeds on."
    )
    return lines + [f"Left out: {each}." for each in left]


def _rows(its: Sequence[Group]) -> list[str]:
    all_ = [each.settings for each in its]
    # What only some algorithms have, all of them with one value, tells nothing apart.
    keys = [
        key
        for key in varied(all_)
        if len({repr(settings[key]) for settings in all_ if key in settings}) > 1
    ]
    lines = [
        f"| {' | '.join(['algorithm', 'score', 'seeds', *keys, 'run'])} |",
        f"| {' | '.join(['---', '---:', '---:', *['---'] * len(keys), '---'])} |",
    ]
    for each in its:
        runs = list(dict.fromkeys(run.path for run, _ in each.members))
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        half = "" if each.half is None else f" ± {rounded(each.half)}"
        settings = [_cell(each.settings[key]) if key in each.settings else "" for key in keys]
        figures = [f"{rounded(each.mean)}{half}", str(len(each.scores))]
        lines.append(
            f"| {' | '.join([each.title, *figures, *settings, f'`{shown(runs[0])}`{more}'])} |"
        )
    return lines


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else written(value)).replace("|", "\\|")
