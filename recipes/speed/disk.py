"""How fast minibatches come from a data set on disk, beside a small one in memory.

    python recipes/speed/disk.py --on-disk 20000000

It writes random transitions, 168 bytes each, into a temporary folder, where they are mapped and not read; the
page cache may keep what it likes. Measured are minibatches alone, every column of 256 transitions, and
training on them, each with the transitions as they are and streamed. Every contender has a process of its
own; they take turns, and ratios are taken within a round. The memory of a process needs Linux: its own, and
what is mapped of files, which the machine takes back when it is short of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from tensordict import TensorDict

from torchrl_iql import TrainStep
from torchrl_iql.data import Minibatches
from torchrl_iql.data.minibatches import BLOCK
from torchrl_iql.training import Execution
from torchrl_iql_recipes.speed import update
from torchrl_iql_recipes.speed.ours import loss_for
from torchrl_iql_recipes.speed.timing import Contender, Result, hardware, measure, synchronize
from torchrl_iql_recipes.speed.update import build, chosen, configure, parse, parser, work_of
from torchrl_iql_recipes.speed.work import Work

__all__ = ["Sampling", "Training", "contenders", "table", "write"]

PART = 1_000_000
"""Transitions that are made at once."""
KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
)
QUICK = {**update.QUICK, "on_disk": 20_000, "execution": "eager", "only": ()}


def write(folder: Path, work: Work, transitions: int) -> None:
    """Write random transitions, as :meth:`tensordict.TensorDict.memmap` lays them out."""
    mapped = replace(work, transitions=1).data().expand(transitions).memmap_like(folder)
    for number, first in enumerate(range(0, transitions, PART)):
        size = min(PART, transitions - first)
        part = replace(work, transitions=size, seed=work.seed + number).data()
        mapped[first : first + size].update_(part)


class Sampling:
    """Minibatches alone, column by column.

    Args:
        work: batch size and device.
        folder: of transitions; those of ``work``, in memory, if None.
        streaming: whether to stream.
        name: of the contender.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    replicas = 1

    def __init__(self, work: Work, folder: Path | None, streaming: bool, *, name: str) -> None:
        self.name = name
        self.device = work.device
        data = work.data() if folder is None else TensorDict.load_memmap(folder)
        self.minibatches = Minibatches(
            data, work.batch_size, seeds=[work.seed], device=work.device, streaming=streaming
        )
        self.steps = 0

    def run(self, steps: int) -> None:
        """Gather minibatches, and wait for them."""
        for _ in range(steps):
            block, row = divmod(self.steps, BLOCK)
            source, indices = self.minibatches(block)
            rows = indices[row, 0]
            for key in KEYS:
                source[key][rows]
            self.steps += 1
        synchronize(self.device)


class Training(Sampling):
    """Gradient steps on minibatches.

    Args:
        work: what to do in a step.
        folder: of transitions; those of ``work``, in memory, if None.
        streaming: whether to stream.
        name: of the contender.
        execution: how.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    def __init__(
        self, work: Work, folder: Path | None, streaming: bool, *, name: str, execution: Execution
    ) -> None:
        super().__init__(work, folder, streaming, name=name)
        self.step = TrainStep(
            loss_for(work, work.seed),
            learning_rate=work.learning_rate,
            target_rate=work.target_rate,
            execution=execution,
        )

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        self.step.run(self.minibatches, steps)
        synchronize(self.device)


def contenders(
    kind: Callable[..., Contender], work: Work, folder: Path, on_disk: int
) -> dict[str, Callable[[], Contender]]:
    """Return how to build each contender, by name, that of small data in memory first.

    Args:
        kind: takes work, folder, streaming and name.
        work: what to do in a step, and the data in memory.
        folder: that :func:`write` has filled.
        on_disk: how many transitions are there.
    """
    builders = {}
    for streaming in (False, True):
        for place, number, where in (
            ("in memory", work.transitions, None),
            ("on disk", on_disk, folder),
        ):
            name = f"{number:,} {place}" + (", streaming" if streaming else "")
            builders[name] = partial(kind, work, where, streaming, name=name)
    return builders


def table(
    names: Sequence[str],
    sampling: Sequence[Result],
    training: Sequence[Result],
    memory: Mapping[str, tuple[float, float]],
) -> str:
    """Write a table in Markdown, one line per contender.

    Args:
        names: of the contenders.
        sampling: what was measured of minibatches alone.
        training: what was measured of training.
        memory: in training, a process's own and what it has mapped, in GiB.
    """
    lines = [["", "minibatches/s", "times"], ["---", "---:", "---:"]]
    lines[0] += ["updates/s", "times", "memory, GiB", "mapped, GiB"]
    lines[1] += ["---:"] * 4
    for name in names:
        line = [name]
        for results in (sampling, training):
            its = [result for result in results if result.name == name]
            line += [f"{its[0].median:,.0f}", f"{its[0].ratio:.2f}"] if its else ["-", "-"]
        line += [f"{amount:.2f}" for amount in memory[name]] if name in memory else ["-", "-"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        the exit status: 1 if a contender failed.
    """
    options = parse(_parser(), QUICK, arguments)
    setting = partial(configure, options.threads, options.precision)
    setting()
    work = work_of(options)
    results: list[list[Result]] = []
    memory: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), work, options.on_disk)
        for kind in (Sampling, partial(Training, execution=options.execution)):
            builders = contenders(kind, work, Path(folder), options.on_disk)
            ready = build(builders, options.only, setting)
            times = {"rounds": options.rounds, "seconds_per_round": options.seconds}
            results.append(measure(ready, **times))
            measured = {result.name for result in results[-1]}
            for contender in ready:
                if contender.name in measured:
                    held = contender.memory("RssAnon"), contender.memory("RssFile")
                    memory[contender.name] = held
                    contender.close()
    names = [name for name in builders if chosen(name, options.only)]
    print(table(names, *results, memory))
    print()
    print(", ".join(f"{name} {value}" for name, value in hardware().items()))
    return 0 if all(len(its) == len(names) for its in results) else 1


def _parser() -> argparse.ArgumentParser:
    described = parser(__doc__)
    described.add_argument("--on-disk", type=int, default=20_000_000, help="transitions")
    described.add_argument("--folder", type=Path, help="where the temporary folder is made")
    described.add_argument("--execution", choices=get_args(Execution), default="auto")
    return described


if __name__ == "__main__":
    sys.exit(main())
