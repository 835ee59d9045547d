"""How long a gradient step of IQL takes: ``python recipes/benchmark/update.py``.

All contenders do the same work (``work.py``), in turns, on one machine: ours are in ``ours.py``, the others
in ``peers.py`` and ``jax_iql.py``, and ``timing.py`` measures. Prints one table; ``--json`` keeps the
numbers. What something costs is seen by giving it several values, one run each: ``--batch-size``,
``--hidden``, ``--num-qvalue-nets``, ``--transitions``, ``--replicas``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import ours
import peers
import torch
from timing import (
    Contender,
    Isolated,
    flops_per_step,
    gemm_rate,
    hardware,
    launch_floor,
    measure,
    physical_cores,
    table,
    write_json,
)
from work import Work

BASELINE = "TorchRL, eager"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    configure = partial(_configure, options.threads, options.precision)
    configure()
    work = Work(
        hidden_sizes=tuple(options.hidden),
        num_qvalue_nets=options.num_qvalue_nets,
        transitions=options.transitions,
        batch_size=options.batch_size,
        device=options.device,
    )
    replicas = tuple(options.replicas)
    builders = {**peers.contenders(work, replicas), **ours.contenders(work, replicas)}
    contenders = _build(builders, options.only, configure)
    names = [contender.name for contender in contenders]
    flops = flops_per_step(
        work.observation_size,
        work.action_size,
        work.hidden_sizes,
        work.num_qvalue_nets,
        work.batch_size,
    )
    rate, floor = gemm_rate(work.device), launch_floor(work.device)
    results = measure(
        contenders,
        rounds=options.rounds,
        seconds_per_round=options.seconds,
        baseline=BASELINE if BASELINE in names else None,
    )
    measured = {result.name for result in results}
    memory = {c.name: c.close() for c in contenders if c.name in measured}
    machine = hardware()
    print(table(results, limit=rate / flops))
    print()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"Matrix products: {flops / 1e6:.0f} MFLOP a step, {rate / 1e9:.0f} GFLOP/s alone, which "
        f"would be {rate / flops:,.0f} updates/s."
    )
    if floor is not None:
        print(f"A kernel in a replayed graph: {floor * 1e6:.2f} microseconds.")
    peaks = ", ".join(f"{name} {peak:.2f}" for name, peak in memory.items())
    print(f"Peak memory of each process, in GiB: {peaks}.")
    if options.json:
        context = {
            "work": asdict(work),
            "hardware": machine,
            "flops_per_step": flops,
            "gemm_rate": rate,
            "launch_floor": floor,
            "peak_memory": memory,
        }
        write_json(options.json, results, **context)


def _parser() -> argparse.ArgumentParser:
    work = Work()
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=physical_cores())
    # That of config/compute/cpu.yaml and gpu.yaml.
    precision = "highest" if cuda else "medium"
    choices = ("highest", "high", "medium")
    parser.add_argument("--precision", choices=choices, default=precision, help="of products")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--batch-size", type=int, default=work.batch_size)
    parser.add_argument("--hidden", type=int, nargs="+", default=work.hidden_sizes)
    parser.add_argument("--num-qvalue-nets", type=int, default=work.num_qvalue_nets)
    parser.add_argument("--transitions", type=int, default=work.transitions)
    several = (4, 16, 64) if cuda else (4, 16)
    parser.add_argument("--replicas", type=int, nargs="*", default=several, help="at once")
    parser.add_argument("--only", nargs="*", default=(), help="parts of the contenders' names")
    parser.add_argument("--json", help="the file to write")
    return parser


def _configure(threads: int, precision: str) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    # Read by JAX when it starts its devices: as many threads, and no more GPU memory than it needs.
    os.environ["PJRT_NPROC"] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _build(
    builders: Mapping[str, Callable[[], Contender]],
    only: Sequence[str],
    configure: Callable[[], None],
) -> list[Isolated]:
    """The contenders whose name contains one of ``only``, if any are given, and that can be built."""
    contenders = []
    for name, build in builders.items():
        if only and not any(part.lower() in name.lower() for part in only):
            continue
        try:
            contenders.append(Isolated(name, build, configure))
        except RuntimeError as error:  # no JAX, or none for this device
            print(f"{name} is left out: {error}")
    return contenders


if __name__ == "__main__":
    main()
