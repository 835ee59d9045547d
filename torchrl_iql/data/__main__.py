"""Prints what is in a data set, and whether a simulator does what was recorded.

``python -m torchrl_iql.data inspect mujoco/hopper/medium-v0`` and the same with ``replay``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from torchrl_iql.data.rules import EpisodeRule, RewardRule

STATUS = {"match": 0, "mismatch": 1, "unknown": 3}
"""Exit status of a replay; 2 is an error."""


def _role(text: str) -> tuple[str, str | list[str] | None]:
    """Read ``rewards=reward``, ``observations=x,y`` or ``terminals=null``."""
    role, _, names = text.partition("=")
    return role, None if names == "null" else names.split(",") if "," in names else names


def _bounds(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text}: expected [low,high], or a number") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    started = Path(sys.argv[0]).name
    prog = started if started == "torchrl-iql" else "python -m torchrl_iql.data"
    parser = _Parser(prog=prog, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    debug = "errors with their traceback"
    inspect = commands.add_parser("inspect", allow_abbrev=False, help="print what is in a data set")
    inspect.add_argument("--debug", action="store_true", help=debug)
    inspect.add_argument(
        "source",
        nargs="+",
        help="Minari id or folder, D4RL file, OGBench task, or logs: CSV, Parquet, NPZ or HDF5 files, "
        "folders of these, or a data set of LeRobot",
    )
    layout = "of logs, which columns are what, as observations=x,y actions=force rewards=null"
    inspect.add_argument("--layout", nargs="+", metavar="ROLE=COLUMNS", type=_role, help=layout)
    bounds = "[LOW,HIGH], each a number or one per dimension, or how many discrete ones there are"
    inspect.add_argument("--action-space", type=_bounds, metavar="BOUNDS", help=bounds)
    inspect.add_argument("--reward", choices=get_args(RewardRule), default="none")
    inspect.add_argument("--episodes", choices=get_args(EpisodeRule), default="as_stored")
    inspect.add_argument("--env", help="id of the environment to evaluate in")
    trust = "let the environment that a Minari data set names run code that nobody has registered"
    inspect.add_argument("--trust-env", action="store_true", help=trust)
    keys, columns = "entries of compound observations that are observed", "further columns to keep"
    inspect.add_argument("--observation-keys", nargs="+", metavar="KEY", help=keys)
    inspect.add_argument("--columns", nargs="+", metavar="NAME", default=(), help=columns)
    picture = (
        "also draw it: returns, lengths, rewards, actions and their bounds, ranges of observations"
    )
    inspect.add_argument("--plot", metavar="FILE.png", help=picture)
    compare = commands.add_parser(
        "replay",
        allow_abbrev=False,
        help="compare recorded transitions with a simulator's",
        epilog="Exit status: 0 match, 1 mismatch, 2 error, 3 can not be told.",
    )
    compare.add_argument("--debug", action="store_true", help=debug)
    compare.add_argument("source", help="Minari id or folder, or D4RL file")
    compare.add_argument("--env", help="id of the environment, if not the one that was recorded")
    compare.add_argument("--trust-env", action="store_true", help=trust)
    compare.add_argument("--samples", type=int, default=1000, help="transitions (default: 1000)")
    compare.add_argument("--seed", type=int, default=0, help="of their draw (default: 0)")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[given.command].error(f"unrecognized arguments: {' '.join(unknown)}")

    from torchrl_iql.data import load, replay  # not for --help: they load PyTorch

    try:
        if given.command == "replay":
            found = replay(
                given.source,
                given.env,
                samples=given.samples,
                seed=given.seed,
                trust_env=given.trust_env,
            )
            print(found)
            return STATUS[found.verdict]
        dataset = load(
            given.source,
            layout=dict(given.layout) if given.layout else None,
            action_space=given.action_space,
            reward=given.reward,
            episodes=given.episodes,
            env=given.env,
            trust_env=given.trust_env,
            observation_keys=given.observation_keys,
            columns=given.columns,
        )
        if given.plot is not None:
            from torchrl_iql.data.picture import page  # it loads matplotlib

            page(dataset).savefig(given.plot)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if given.debug:
            raise
        told = " ".join(str(error).split())
        print(f"{prog} {given.command}: {told}", file=sys.stderr)
        return 2 if given.command == "replay" else 1
    print(dataset.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
