"""Show runs beside each other: one HTML page, that needs no network and no other file.

    python recipes/report.py runs/mini/hopper-medium/iql runs/mini/hopper-medium/bc
    python recipes/report.py runs/table --out table.html
    python recipes/report.py runs/mini/hopper-medium/iql --watch

A folder that holds runs, however deep, stands for all of them. The page is written into the first folder,
unless --out names another file, and is replaced whole. It compares the scores of the last step of runs that
are finished, over seeds; nothing is loaded but text, numbers and pictures, so it needs neither the data nor
PyTorch, and can be made while runs go on. With --watch it is made anew when a file of the runs changes, until
no run is going on any more.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_iql_recipes.commands import Parser, errors_in_one_line, label, typed
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.files import shown, whole
from torchrl_iql_recipes.reporting import gather
from torchrl_iql_recipes.reporting.page import TooLargeError, page

INTERVAL = 5.0
"""Seconds between two looks at the files of runs."""

WATCHED = ("*.csv", "*.json", "*.yaml", "*.png", ".holder")


def write(paths: Sequence[Path], out: Path, *, watching: bool = False) -> bool:
    """Write the page of runs.

    Args:
        paths: folders.
        out: the page.
        watching: whether it loads itself anew as long as runs go on.

    Returns:
        whether a process is at work in a run.

    Raises:
        NoRunError: one of the folders holds no run.
        TooLargeError: there are too many.
    """
    runs, left = gather.runs(paths)
    goes_on = any(gather.is_going_on(path) for path in paths)
    made_by = f"{typed('report')} {shlex.join([*map(str, paths), '--out', str(out)])}"
    html = page(runs, made_by=made_by, left=left, watching=watching and goes_on)
    with whole(out) as new:
        new.write_text(html, encoding="utf-8")
    return goes_on


def watch(paths: Sequence[Path], out: Path) -> None:
    """Write the page anew when a file changes, until no run is going on."""
    before = None
    while True:
        state = _state(paths)
        if state != before:
            goes_on = write(paths, out, watching=True)
            print(f"{time.strftime('%H:%M:%S')} {shown(out)}", flush=True)
            if not goes_on:
                return
            before = state
        elif not any(gather.is_going_on(path) for path in paths):
            write(paths, out)
            return
        time.sleep(INTERVAL)


def _state(paths: Sequence[Path]) -> set[tuple[str, int]]:
    """Return the files of runs and when they were changed; a heartbeat is no change."""
    found = set()
    for file in (file for path in paths for name in WATCHED for file in path.rglob(name)):
        try:
            found.add((str(file), 0 if file.name == ".holder" else file.stat().st_mtime_ns))
        except OSError:  # replaced meanwhile
            continue
    return found


def conclude(told: str, scores: Mapping[str, Any], path: Path) -> None:
    """Print what a run has come to, and write its page if it is over: the last things that its script does.

    Args:
        told: what its user reads.
        scores: what ``scores.json`` holds.
        path: its folder.
    """
    print(told)
    if not any(each["interrupted"] for each in scores["replicas"]):
        print(_page_of(path))


def _page_of(path: Path) -> str:
    """Write the page of a run into its folder, and return the line that says so, or why there is none."""
    out = path / "report.html"
    try:
        write([path], out)
    except (gather.NoRunError, TooLargeError, OSError) as error:
        return f"No page: {error}"
    return f"Page: {shown(out)}"


def main() -> None:
    parser = Parser(__doc__, "report")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders of such")
    parser.add_argument("--out", type=Path, help="(default: report.html in the first folder)")
    parser.add_argument("--watch", action="store_true", help="make it anew while runs go on")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "report.html"
    with errors_in_one_line(label("report"), debug=args.debug):
        try:
            if args.out and not out.parent.is_dir():
                raise SettingsError(f"--out {out}: there is no folder {out.parent}")
            if args.watch:
                watch(args.runs, out)
            else:
                write(args.runs, out)
        except (gather.NoRunError, TooLargeError) as error:
            raise SettingsError(str(error)) from error
        except KeyboardInterrupt:
            sys.exit(130)
    print(f"Report: {shown(out)} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
