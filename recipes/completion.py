"""Completion of ``torchrl-iql``: Hydra's for the shell, with this project's commands, settings and choices.

Hydra's own answers are those of its groups, which does not know what a setting may be, nor tasks in folders.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchrl_iql_recipes.commands import COMMANDS, PROGRAM

__all__ = ["candidates", "complete"]


def complete(arguments: Sequence[str]) -> int:
    """Print what a shell evaluates, or what it completes a line with; return the exit status.

    Args:
        arguments: ``install=bash``, ``uninstall=bash`` or ``query=bash``; bash's is zsh's too.
    """
    what = arguments[0] if arguments else ""
    if what.startswith("query="):
        print("\n".join(candidates(os.environ.get("COMP_LINE", ""))))
        return 0
    from torchrl_iql_recipes import offline

    sys.argv = [PROGRAM, "-sc", what]
    offline.main()
    return 0


def candidates(line: str) -> list[str]:
    """Return how the last word of a line may go on; none where it is for the shell, which knows files."""
    words = line.split()[1:]
    word = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        return [name for name in COMMANDS if name.startswith(word)]
    from torchrl_iql_recipes.experiment.door import Door

    name, *given = words
    module = import_module(COMMANDS[name].module) if name in COMMANDS else None
    doors = [each for each in vars(module).values() if isinstance(each, Door)] if module else []
    return doors[0].words(given, word) if doors else []
