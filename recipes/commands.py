"""The commands of ``torchrl-iql``, what they are called where one is started, and how their errors are told.

Nothing here imports anything heavy: the list of commands comes at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "COMMANDS",
    "PROGRAM",
    "Command",
    "Parser",
    "as_typed",
    "errors_in_one_line",
    "label",
    "listed",
    "print_for_a_reader",
    "typed",
]

PROGRAM = "torchrl-iql"
RECIPES = "torchrl_iql_recipes"


@dataclass(frozen=True)
class Command:
    """What ``torchrl-iql <name>`` does.

    Attributes:
        module: whose ``main`` it is, without arguments: they are those of ``sys.argv``.
        help: one line.
        before: arguments that go before those that are given.
    """

    module: str
    help: str
    before: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(f"{RECIPES}.offline", "train on a data set, one learner or many at once"),
    "online": Command(f"{RECIPES}.online", "go on in an environment, or begin there"),
    "collect": Command(f"{RECIPES}.collect", "make data sets, without a network"),
    "inspect": Command("torchrl_iql.data.__main__", "say what is in a data set", ("inspect",)),
    "replay": Command(
        "torchrl_iql.data.__main__", "compare recorded transitions with a simulator's", ("replay",)
    ),
    "estimate": Command(f"{RECIPES}.estimate", "say what policies are worth, by data alone"),
    "evaluate": Command(f"{RECIPES}.evaluate", "play episodes with a policy, and film them"),
    "export": Command(f"{RECIPES}.export", "write a policy as a file that runs without this"),
    "compare": Command(f"{RECIPES}.compare", "put runs beside each other, or do those of a plan"),
    "report": Command(f"{RECIPES}.report", "one page of runs: which is better, and is it chance"),
    "tasks": Command(f"{RECIPES}.tasks", "list tasks, their data, and what a run takes here"),
}
"""In the order in which they are needed. What is added here is a command, listed and completed."""


def typed(script: str) -> str:
    """Return the command that starts a script of the recipes, as who started this process would type it.

    Processes that this one starts have its ``sys.argv``, and say the same.
    """
    return _by_console(script) or f"python recipes/{script}.py"


def as_typed(text: str) -> str:
    """Return a text in which scripts are named as :func:`typed` does."""
    return re.sub(r"python recipes/(\w+)\.py", lambda found: typed(found[1]), text)


def label(script: str) -> str:
    """Return what a line about a script begins with."""
    return _by_console(script) or f"{Path(script).name}.py"


def _by_console(script: str) -> str | None:
    if sys.argv[0].partition(" ")[0] != PROGRAM:
        return None
    found = (name for name, its in COMMANDS.items() if its.module == f"{RECIPES}.{script}")
    return next((f"{PROGRAM} {name}" for name in found), None)


OF_THE_WORLD = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of files that are nobody's fault here: no room, no permission."""


@contextmanager
def errors_in_one_line(beginning: str, *, debug: bool) -> Iterator[None]:
    """End the process with one line for what its user can mend; all else is a fault, and raised.

    Args:
        beginning: of the line.
        debug: whether to raise that, too.
    """
    from torchrl_iql_recipes.experiment.schema import RunError, SettingsError

    try:
        yield
    except (SettingsError, RunError, OSError) as error:
        if debug or (isinstance(error, OSError) and error.errno not in OF_THE_WORLD):
            raise
        sys.exit(f"{beginning}: {'; '.join(str(error).splitlines())}")


def print_for_a_reader(text: str) -> None:
    """Print a text; who reads it may have seen enough, as ``head`` has, which is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Of commands without settings: what it refuses is one line; ``--debug`` shows where errors come from."""

    def __init__(self, description: str | None, script: str) -> None:
        super().__init__(
            prog=typed(script),
            description=as_typed(description or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="errors with their traceback")

    def print_help(self, file: Any = None) -> None:
        print_for_a_reader(self.format_help()) if file is None else super().print_help(file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def listed(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Write names with what they mean, in two columns."""
    width = max(len(name) for name, _ in lines)
    return [f"  {name:{width}}  {meaning}" for name, meaning in lines]
