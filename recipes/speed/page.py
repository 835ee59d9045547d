"""Everything there is to say of the speed on a GPU, as one page of Markdown.

    python recipes/speed/page.py --output gpu.md

The tests marked ``gpu``; a gradient step of all contenders of ``update.py``, also with several learners and
``step(batch)``, TorchRL with compilation and CUDA graphs, and JAX where it is installed, with the memory of
each; and how long a million updates of one learner take. The page grows part by part: what is measured
stays, whatever comes next. ``--device cpu --quick`` shows in minutes that it works. The exit status is 1 if
a test or a contender of this project fails.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchrl_iql_recipes.speed import ours, update
from torchrl_iql_recipes.speed.timing import Isolated, hardware
from torchrl_iql_recipes.speed.update import (
    compare,
    configure,
    parse,
    parser,
    with_replicas,
    work_of,
)
from torchrl_iql_recipes.speed.work import Work

ROOT = Path(__file__).resolve().parents[2]
MILLION = 1_000_000
WARM_UP_STEPS = 200
PARTS = ("tests", "steps", "million")
QUICK = {**update.QUICK, "replicas": (2,), "updates": 300, "only": ("eager", "torchrl-iql")}


class Part(NamedTuple):
    """Of the page.

    Attributes:
        text: in Markdown.
        failed: whether a test or a contender of this project did.
    """

    text: str
    failed: bool = False


def heading(arguments: Sequence[str]) -> Part:
    machine = hardware()
    command = shlex.join(["python", "recipes/speed/page.py", *arguments])
    lines = [
        f"# Speed on {machine.get('GPU', machine['CPU'])}",
        "",
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, revision {revision()}.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()),
    ]
    return Part("\n".join(lines))


def revision() -> str:
    """Return the revision of the working tree, marked with a plus if it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def tests() -> Part:
    """The last line of ``pytest -m gpu``, and what failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.strip()] or [run.stderr.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report = "\n".join([*failures, lines[-1]])
    return Part(f"## Tests\n\n`pytest -m gpu`:\n\n```\n{report}\n```", run.returncode != 0)


def steps(options: argparse.Namespace) -> Part:
    """Make the table of ``update.py``."""
    comparison = compare(work_of(options), options)
    if options.json:
        comparison.write_json(options.json)
    text = f"## A gradient step\n\n{described(comparison.work)}\n\n{comparison.markdown()}"
    return Part(text, bool(comparison.failed))


def described(work: Work) -> str:
    hidden = " x ".join(map(str, work.hidden_sizes))
    return (
        f"{work.batch_size} transitions sampled from {work.transitions:,} (observation "
        f"{work.observation_size}, action {work.action_size}), hidden layers {hidden}, "
        f"{work.num_qvalue_nets} Q networks, losses, gradients, Adam, targets; float32."
    )


def million(options: argparse.Namespace) -> Part:
    """Say what a million updates of one learner take, timed or from a stretch of them."""
    work = work_of(options)
    execution = "cudagraph" if work.device == "cuda" else "compiled"
    learner = Isolated(
        ours.step_name(execution, 1, streaming=False),
        partial(ours.Step, work, execution),
        partial(configure, options.threads, options.precision),
    )
    start = time.perf_counter()
    learner.run(WARM_UP_STEPS)
    ready = time.perf_counter() - start
    start = time.perf_counter()
    learner.run(options.updates)
    seconds = time.perf_counter() - start
    rate = options.updates / seconds
    if options.updates == MILLION:
        took = f"{MILLION:,} updates took {seconds:,.0f} s"
    else:
        took = (
            f"{MILLION:,} updates would take {MILLION / rate:,.0f} s, extrapolated from "
            f"{options.updates:,} in {seconds:,.1f} s"
        )
    text = (
        f"{learner.name}: {took}, {rate:,.0f} updates/s. Before that, {ready:.0f} s for the first "
        f"{WARM_UP_STEPS} with compilation. Peak memory: {learner.close():.2f} GiB."
    )
    return Part(f"## A million updates of one learner\n\n{text}")


def parts(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[Part]:
    """Yield the heading, and the parts that were asked for, in their order."""
    setting = partial(configure, options.threads, options.precision)
    setting()
    yield heading(arguments)
    makers = {
        "tests": tests,
        "steps": partial(steps, options),
        "million": partial(million, options),
    }
    for name in PARTS:
        if name in options.parts:
            yield makers[name]()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page.

    Returns:
        the exit status: 1 if a test or a contender of this project failed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(_parser(), QUICK, given)
    failed = False
    options.output.write_text("")
    for part in parts(options, given):
        failed = failed or part.failed
        with options.output.open("a") as page:
            page.write(f"{part.text}\n\n")
        print(f"{part.text}\n", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    described = with_replicas(parser(__doc__))
    described.add_argument("--output", type=Path, default=Path("speed.md"), help="the page")
    described.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    described.add_argument("--updates", type=int, default=MILLION, help="to time of the million")
    return described


if __name__ == "__main__":
    sys.exit(main())
