"""Measuring: gradient steps per second of several contenders, side by side, and what the machine can do.

``update.py`` passes its contenders to :func:`measure` and prints the :func:`table`. A rate alone says
little: the clock of a machine and its other users change from minute to minute. So contenders take
turns, and the ratio of two is taken within each turn; and :func:`gemm_rate` with :func:`flops_per_step`
tells how far the matrix products alone would let anyone go.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

__all__ = [
    "Contender",
    "Isolated",
    "Result",
    "cpu_model",
    "flops_per_step",
    "gemm_rate",
    "hardware",
    "launch_floor",
    "measure",
    "physical_cores",
    "synchronize",
    "table",
    "write_json",
]

WARM_UP_STEPS = 101
"""TorchRL's recipe records its CUDA graph after 50 steps; JAX compiles 100 steps, and 1, apart."""
DISTRIBUTIONS = ("torch", "torchrl", "tensordict", "jax", "optax")


Elapsed = Callable[["Contender", int], float]
"""The seconds that a contender takes for so many steps."""


class Contender(Protocol):
    """What is measured.

    Attributes:
        name: in the table.
        replicas: the number of learners that a step updates.
    """

    name: str
    replicas: int

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for the device."""
        ...


class Isolated:
    """A contender in a process of its own.

    In one process they would slow each other down: once two Python threads have OpenMP threads, which
    a replay buffer that prefetches sees to, idle ones no longer spin, at half the speed for everybody.

    Args:
        name: of the contender.
        build: makes it, in its process; can be pickled.
        configure: called there first; can be pickled.

    Attributes:
        name: of the contender.
        replicas: the number of learners that a step updates.

    Raises:
        RuntimeError: it can not be built.
    """

    def __init__(
        self, name: str, build: Callable[[], Contender], configure: Callable[[], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, configure), daemon=True)
        self._process.start()
        theirs.close()
        self.name = name
        self.replicas: int = self._answer()

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for the device."""
        self._connection.send(steps)
        self._answer()

    def close(self) -> float:
        """End the process, and return the peak of its memory, on a GPU that of the GPU, in GiB."""
        self._connection.send(None)
        peak = self._answer()
        self._process.join()
        return peak

    def memory(self, entry: str) -> float:
        """Return what the status of its process says, as ``"RssAnon"``, in GiB. Needs Linux."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 2**20

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"its process ended, exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(
    connection: Connection, build: Callable[[], Contender], configure: Callable[[], None]
) -> None:
    """Answer numbers of steps with None when they are taken, failures with their description."""
    try:
        configure()
        contender = build()
        connection.send(contender.replicas)
        while (steps := connection.recv()) is not None:
            contender.run(steps)
            connection.send(None)
        connection.send(_peak_memory(contender))
    except Exception as error:  # whatever it is, the others can still be measured
        connection.send(f"{type(error).__name__}: {error}")


def _peak_memory(contender: Contender) -> float:
    own = getattr(contender, "peak_memory", None)  # of a library with memory of its own on a GPU
    if own is not None and (peak := own()) is not None:
        return peak / 2**30
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class Result:
    """The measurements of one contender.

    Attributes:
        name: of the contender.
        baseline: the name of the one that ``ratios`` refer to.
        replicas: the number of learners that a step updates.
        steps: in each round.
        rates: updates per second, summed over the learners, in each round.
        ratios: its rate divided by that of the baseline, in each round.
        compile_seconds: what the first steps took beyond their share at the median rate.
    """

    name: str
    baseline: str
    replicas: int
    steps: int
    rates: list[float]
    ratios: list[float]
    compile_seconds: float

    @property
    def median(self) -> float:
        return float(np.median(self.rates))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.rates, [0.25, 0.75])
        return float(low), float(high)

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return float(np.median(self.ratios))


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds_per_round: float,
    baseline: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Time the contenders in turns, A B C A B C and so on.

    Each first takes :data:`WARM_UP_STEPS`, in which it compiles, then some to find how many steps fill
    a round. A contender that fails in its first steps is reported and left out.

    Args:
        contenders: with different names.
        rounds: turns of each contender.
        seconds_per_round: about how long a turn takes.
        baseline: the name of the contender that ratios refer to; the first one if None.
        clock: seconds.

    Returns:
        one result per contender, in their order.

    Raises:
        ValueError: names repeat, no contender works, or the baseline is not among those that do.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have different names, got {names}")

    def elapsed(contender: Contender, steps: int) -> float:
        start = clock()
        contender.run(steps)
        return clock() - start

    warm_up = _warm_up(contenders, elapsed)
    ready = [contender for contender in contenders if contender.name in warm_up]
    if not ready:
        raise ValueError(f"no contender works, of {names}")
    baseline = ready[0].name if baseline is None else baseline
    if baseline not in warm_up:
        raise ValueError(f"the baseline must be one of {list(warm_up)}, got {baseline!r}")
    steps = {c.name: _steps_per_round(c, elapsed, seconds_per_round) for c in ready}
    rates: dict[str, list[float]] = {contender.name: [] for contender in ready}
    for _ in range(rounds):
        for contender in ready:
            number = steps[contender.name]
            rate = number * contender.replicas / elapsed(contender, number)
            rates[contender.name].append(rate)

    def result(name: str, replicas: int) -> Result:
        ratios = (np.array(rates[name]) / rates[baseline]).tolist()
        at_speed = WARM_UP_STEPS * replicas / float(np.median(rates[name]))
        compiling = max(0.0, warm_up[name] - at_speed)
        return Result(name, baseline, replicas, steps[name], rates[name], ratios, compiling)

    return [result(contender.name, contender.replicas) for contender in ready]


def _warm_up(contenders: Sequence[Contender], elapsed: Elapsed) -> dict[str, float]:
    """Return the seconds of the first steps of each contender that works, by name."""
    seconds = {}
    for contender in contenders:
        try:
            seconds[contender.name] = elapsed(contender, WARM_UP_STEPS)
        except Exception as error:  # whatever it is, the others can still be measured
            print(f"{contender.name} is left out: {type(error).__name__}: {error}")
    return seconds


def _steps_per_round(contender: Contender, elapsed: Elapsed, seconds: float) -> int:
    """Find about how many steps fill a round: many in whole hundreds, run in one call in JAX."""
    steps = 1
    while (taken := elapsed(contender, steps)) < seconds / 5:
        steps *= 10
    fitting = max(1, round(steps * seconds / taken))
    return fitting if fitting < 100 else round(fitting, -2)


def table(results: Sequence[Result], limit: float | None = None) -> str:
    """Write the results in Markdown, one line per contender.

    Args:
        results: of :func:`measure`.
        limit: the updates per second at which matrix products alone would take all the time.
    """
    columns = ["", "updates/s, median", "min to max", "quartiles"]
    columns += [f"times {results[0].baseline}", "compiling, s"]
    columns += [] if limit is None else ["of the matmul rate"]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for result in results:
        low, high = result.quartiles
        cells = [
            result.name,
            f"{result.median:,.0f}",
            f"{min(result.rates):,.0f} to {max(result.rates):,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{result.ratio:.2f}",
            f"{result.compile_seconds:.1f}",
        ]
        lines.append(cells if limit is None else [*cells, f"{result.median / limit:.0%}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_json(path: Path | str, results: Sequence[Result], **context: Any) -> None:
    """Write every measurement, and what else it takes to understand them, to a JSON file."""
    summary = [
        {**asdict(result), "median": result.median, "ratio": result.ratio} for result in results
    ]
    Path(path).write_text(json.dumps({**context, "results": summary}, indent=2) + "\n")


# --- What the machine can do -------------------------------------------------------------------------


def flops_per_step(
    observation: int, action: int, hidden: Sequence[int], num_q: int, batch: int
) -> int:
    """Count the floating-point operations of all matrix products in a gradient step of IQL.

    Forward: the policy, V(s), V(s'), the Q networks and their targets. Backward: the gradients of the
    weights of policy, V and Q, and of the inputs of their layers but the first.

    Args:
        observation: its size.
        action: its size.
        hidden: units of each hidden layer, the same in every network.
        num_q: the number of Q networks.
        batch: transitions in a minibatch.
    """

    def products(inputs: int, outputs: int) -> tuple[int, int]:
        """Count the products of all layers, and of all but the first."""
        layers = [into * out for into, out in pairwise([inputs, *hidden, outputs])]
        return sum(layers), sum(layers[1:])

    policy, value, qvalue = (
        products(observation, action),
        products(observation, 1),
        products(observation + action, 1),
    )
    forward = policy[0] + 2 * value[0] + 2 * num_q * qvalue[0]
    backward = sum(policy) + sum(value) + num_q * sum(qvalue)
    return 2 * batch * (forward + backward)


def gemm_rate(device: str, *, size: int = 256, seconds: float = 0.5) -> float:
    """Measure the operations per second of float32 products of ``size`` x ``size`` matrices.

    In the present precision and with the present number of threads, the best of one product at a time
    and of 4, 8 and 16 at once. On a GPU they are replayed from a graph, which costs no launches.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        size: of the matrices.
        seconds: to spend on each way.
    """

    def rate(number: int) -> float:
        shape = (number, size, size) if number > 1 else (size, size)
        left, right = torch.randn(shape, device=device), torch.randn(shape, device=device)
        out = torch.empty_like(left)
        product = torch.bmm if number > 1 else torch.mm
        taken = _seconds_per_call(lambda: product(left, right, out=out), device, 50, seconds)
        return number * 2 * size**3 / taken

    return max(rate(number) for number in (1, 4, 8, 16))


def launch_floor(device: str) -> float | None:
    """Measure the seconds of a GPU for a kernel with next to no work in a replayed graph.

    A step of k kernels that depend on each other can not take less than k times that.

    Returns:
        None on a CPU.
    """
    if device != "cuda":
        return None
    number = torch.zeros(1, device=device)
    return _seconds_per_call(lambda: number.add_(1), device, 1000, 0.5)


def _seconds_per_call(call: Callable[[], object], device: str, calls: int, seconds: float) -> float:
    """Return the least that one of ``calls`` in a row took, repeated for so many seconds."""

    def repeat() -> None:
        for _ in range(calls):
            call()

    repeat()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat()
        repeat = graph.replay
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        repeat()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best / calls


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def physical_cores() -> int:
    """Count the cores that this process may use, without their hyper-threads."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return len(cores)


def hardware() -> dict[str, str | int]:
    """Describe what the measurement ran on: machine, settings and versions."""
    facts: dict[str, str | int] = {
        "CPU": cpu_model(),
        "physical cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["CUDA"] = str(torch.version.cuda)
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts


def cpu_model(information: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor; of x86 also what tells its generations apart, and its widest vectors.

    Virtual machines often say no more than "AMD EPYC": family 25, model 1 of that is Zen 3, with AVX2.

    Args:
        information: of Linux.
    """
    lines = information.read_text().splitlines() if information.exists() else []
    entries = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in entries:
        return platform.processor() or platform.machine()
    details = [
        f"{name} {entries[key]}"
        for name, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        if key in entries
    ]
    flags = entries.get("flags", "").split()
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    details += [name for flag, name in vectors.items() if flag in flags][:1]
    return entries["model name"] + (f" ({', '.join(details)})" if details else "")
