"""Prints what is in a data set: ``python -m torchrl_iql.data inspect mujoco/hopper/medium-v0``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from torchrl_iql.data import EpisodeRule, RewardRule, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m torchrl_iql.data")
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="print what is in a data set")
    inspect.add_argument("source", nargs="+", help="Minari id or folder, or D4RL file")
    inspect.add_argument("--reward", choices=get_args(RewardRule), default="none")
    inspect.add_argument("--episodes", choices=get_args(EpisodeRule), default="as_stored")
    inspect.add_argument("--env", help="id of the environment to evaluate in")
    given = parser.parse_args(arguments)
    try:
        dataset = load(given.source, reward=given.reward, episodes=given.episodes, env=given.env)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(dataset.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
