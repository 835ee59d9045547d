"""How long a gradient step of IQL takes: ``python recipes/speed/update.py``.

All contenders do the same work (``work.py``), in turns, on one machine: ours are in ``ours.py``, the others
in ``peers.py`` and ``jax_iql.py``, and ``timing.py`` measures. Prints one table; ``--json`` keeps the
numbers. What something costs is seen by giving it several values, one run each: ``--batch-size``,
``--hidden``, ``--num-qvalue-nets``, ``--transitions``, ``--replicas``. ``--quick`` takes seconds and shows
that the eager contenders work. The exit status is 1 if a contender of this project fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchrl_iql_recipes.experiment.build import exact_products
from torchrl_iql_recipes.speed import ours, peers
from torchrl_iql_recipes.speed.timing import (
    Contender,
    Isolated,
    Result,
    flops_per_step,
    gemm_rate,
    hardware,
    launch_floor,
    measure,
    physical_cores,
    table,
    write_json,
)
from torchrl_iql_recipes.speed.work import Work

BASELINE = "TorchRL, eager"
QUICK = {
    "hidden": (32, 32),
    "batch_size": 64,
    "transitions": 1000,
    "replicas": (),
    "rounds": 2,
    "seconds": 0.1,
    "only": ("eager",),
}
"""What ``--quick`` stands for: that everything runs, not how fast."""


@dataclass(frozen=True)
class Comparison:
    """What was measured, and on what.

    Attributes:
        work: that all contenders did.
        results: of :func:`timing.measure`.
        left_out: the other contenders that were asked for: not built, or failed in their first steps.
        failed: those of them that are of this project.
        memory: the peak of each process, in GiB.
        rate: the floating-point operations per second of matrix products alone.
        floor: seconds of :func:`timing.launch_floor`, None on a CPU.
        machine: :func:`timing.hardware`.
    """

    work: Work
    results: list[Result]
    left_out: list[str]
    failed: list[str]
    memory: dict[str, float]
    rate: float
    floor: float | None
    machine: dict[str, str | int]

    @property
    def flops(self) -> int:
        """Those of the matrix products of a step."""
        work = self.work
        sizes = work.observation_size, work.action_size, work.hidden_sizes
        return flops_per_step(*sizes, work.num_qvalue_nets, work.batch_size)

    def markdown(self) -> str:
        """Write the table, and a paragraph on limits and memory."""
        flops, rate = self.flops, self.rate
        lines = [
            table(self.results, limit=rate / flops),
            "",
            f"Matrix products: {flops / 1e6:.0f} MFLOP a step, {rate / 1e9:.0f} GFLOP/s alone, which "
            f"would be {rate / flops:,.0f} updates/s.",
        ]
        if self.floor is not None:
            lines.append(f"A kernel in a replayed graph: {self.floor * 1e6:.2f} microseconds.")
        peaks = ", ".join(f"{name} {peak:.2f}" for name, peak in self.memory.items())
        lines.append(f"Peak memory of each process, in GiB: {peaks}.")
        if self.left_out:
            lines.append(f"Left out: {'; '.join(self.left_out)}.")
        return "\n".join(lines)

    def write_json(self, path: str) -> None:
        context = {
            "work": asdict(self.work),
            "hardware": self.machine,
            "flops_per_step": self.flops,
            "gemm_rate": self.rate,
            "launch_floor": self.floor,
            "peak_memory": self.memory,
        }
        write_json(path, self.results, **context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        the exit status: 1 if a contender of this project failed.
    """
    options = parse(with_replicas(parser(__doc__)), QUICK, arguments)
    comparison = compare(work_of(options), options)
    print(f"{comparison.markdown()}\n")
    print(", ".join(f"{name} {value}" for name, value in comparison.machine.items()))
    if options.json:
        comparison.write_json(options.json)
    if comparison.failed:
        print(f"Failed: {', '.join(comparison.failed)}.")
    return 1 if comparison.failed else 0


def compare(work: Work, options: argparse.Namespace) -> Comparison:
    """Measure all contenders that ``options`` leave.

    Args:
        work: what to do in a step.
        options: of :func:`parser`.
    """
    setting = partial(configure, options.threads, options.precision)
    setting()
    replicas = tuple(options.replicas)
    own = ours.contenders(work, replicas)
    builders = {**peers.contenders(work, replicas), **own}
    contenders = build(builders, options.only, setting)
    names = [contender.name for contender in contenders]
    rate, floor = gemm_rate(work.device), launch_floor(work.device)
    results = measure(
        contenders,
        rounds=options.rounds,
        seconds_per_round=options.seconds,
        baseline=BASELINE if BASELINE in names else None,
    )
    measured = {result.name for result in results}
    wanted = [name for name in builders if chosen(name, options.only)]
    left_out = [name for name in wanted if name not in measured]
    failed = [name for name in left_out if name in own]
    memory = {c.name: c.close() for c in contenders if c.name in measured}
    return Comparison(work, results, left_out, failed, memory, rate, floor, hardware())


def work_of(options: argparse.Namespace) -> Work:
    return Work(
        hidden_sizes=tuple(options.hidden),
        num_qvalue_nets=options.num_qvalue_nets,
        transitions=options.transitions,
        batch_size=options.batch_size,
        device=options.device,
    )


def parse(
    parser: argparse.ArgumentParser,
    quick: Mapping[str, Any],
    arguments: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse arguments; with ``--quick``, those that are not given are as in ``quick``."""
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of what scripts are asked that compare gradient steps of :class:`Work`."""
    work, parser = Work(), measuring(description)
    parser.add_argument("--batch-size", type=int, default=work.batch_size)
    parser.add_argument("--hidden", type=int, nargs="+", default=work.hidden_sizes)
    parser.add_argument("--num-qvalue-nets", type=int, default=work.num_qvalue_nets)
    parser.add_argument("--transitions", type=int, default=work.transitions)
    return parser


def measuring(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of what all scripts that compare gradient steps are asked."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small networks, few rounds, what is not compiled: seconds, to see that it works",
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=physical_cores())
    precision = exact_products("cuda" if cuda else "cpu")  # as in the recipes
    choices = ("highest", "high", "medium")
    parser.add_argument("--precision", choices=choices, default=precision, help="of products")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--only", nargs="*", default=(), help="parts of names")
    parser.add_argument("--json", help="the file to write")
    return parser


def with_replicas(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    several = (4, 16, 64) if torch.cuda.is_available() else (4, 16)
    parser.add_argument("--replicas", type=int, nargs="*", default=several, help="at once")
    return parser


def configure(threads: int, precision: str) -> None:
    """Set up a process that measures."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    # Read by JAX when it starts its devices: as many threads, and no more GPU memory than it needs.
    os.environ["PJRT_NPROC"] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def build(
    builders: Mapping[str, Callable[[], Contender]],
    only: Sequence[str],
    configure: Callable[[], None],
) -> list[Isolated]:
    """Build the contenders with one of ``only``, if given, in their names, as far as possible.

    As many at once as there are cores.
    """

    def isolated(name: str) -> Isolated | None:
        try:
            return Isolated(name, builders[name], configure)
        except RuntimeError as error:  # no JAX, or none for this device
            print(f"{name} is left out: {error}")
            return None

    names = [name for name in builders if chosen(name, only)]
    with ThreadPoolExecutor(physical_cores()) as pool:
        return [contender for contender in pool.map(isolated, names) if contender is not None]


def race(
    builders: Mapping[str, Callable[[], Contender]],
    options: argparse.Namespace,
    configure: Callable[[], None],
) -> list[Result]:
    """Build the contenders as far as possible, measure those that are, and end them."""
    ready = build(builders, (), configure)
    if not ready:
        return []
    results = measure(ready, rounds=options.rounds, seconds_per_round=options.seconds)
    measured = {result.name for result in results}
    for contender in ready:
        if contender.name in measured:
            contender.close()
    return results


def conclude(
    options: argparse.Namespace,
    failed: Sequence[str],
    measured: Mapping[str, Mapping[str, Sequence[Result]]],
    **context: Any,
) -> int:
    """Print the machine and what failed, and write what was measured where it was asked for.

    Args:
        options: of :func:`measuring`.
        failed: what did.
        measured: by one name of all, the results of each.
        **context: what else it takes to understand them.

    Returns:
        the exit status: 1 if something failed.
    """
    machine = hardware()
    print()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json:
        written = {
            kind: {name: [asdict(result) for result in its] for name, its in results.items()}
            for kind, results in measured.items()
        }
        text = json.dumps({**context, "hardware": machine, **written}, indent=2)
        Path(options.json).write_text(text + "\n")
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


def chosen(name: str, only: Sequence[str]) -> bool:
    """Return whether a name contains one of ``only``, if any are given."""
    return not only or any(part.lower() in name.lower() for part in only)


if __name__ == "__main__":
    sys.exit(main())
