"""``torchrl-iql <command>``: the scripts of the recipes from wherever they are installed."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

from torchrl_iql_recipes.commands import COMMANDS, PROGRAM, listed

__all__ = ["main"]

USAGE = f"""Implicit Q-Learning: train on recorded transitions, go on online, and use what was learned.

    {PROGRAM} train                              # the embedded maze: a picture and scores, in minutes
    {PROGRAM} train task=mini/hopper-medium 'seeds=[0,1]'
    {PROGRAM} <command> --help                   # every setting with its meaning, range and default

Commands:
"""

END = f"""
An error of yours is one line; --debug after a command shows where it comes from.
Completion in bash and zsh: eval "$({PROGRAM} -sc install=bash)"
"""


def main() -> int | str | None:
    """Run the command that is asked for; return its exit status, or what is wrong."""
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:  # before there was a run that saves itself
        return 130
    except BrokenPipeError:  # who reads, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(given: list[str]) -> int | str | None:
    name, *rest = given or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = listed([(each, its.help) for each, its in COMMANDS.items()])
        print("\n".join([USAGE, *lines, END]))
        return 0
    if name == "--version":
        from torchrl_iql import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if name in ("-sc", "--shell-completion"):
        from torchrl_iql_recipes.completion import complete

        return complete(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(COMMANDS)}"
        return f"{PROGRAM}: there is no command {name}: {hint}"
    command = COMMANDS[name]
    # The scripts read this, and so do the processes that they start.
    sys.argv = [PROGRAM if command.before else f"{PROGRAM} {name}", *command.before, *rest]
    return import_module(command.module).main()


if __name__ == "__main__":
    sys.exit(main())
