"""How long it takes from the start of a process to the first gradient step.

    python recipes/speed/start.py --learners 1 64

Every start has a process of its own. The first for each number of learners finds empty folders in the place
of what this project and `torch.compile` keep (cold); the others find what it left there (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

__all__ = ["main", "once", "table"]

CACHES = ("TORCHRL_IQL_CACHE", "TORCHINDUCTOR_CACHE_DIR")


def once(learners: int, execution: str) -> dict[str, float]:
    """Return the seconds of each part of a start, of this process."""
    began, laps = time.perf_counter(), {}

    def lap(name: str) -> None:
        laps[name] = time.perf_counter() - began - sum(laps.values())

    import torchrl.objectives  # noqa: F401

    lap("`import torchrl.objectives`")
    from torchrl_iql import TrainStep
    from torchrl_iql.data import Minibatches
    from torchrl_iql_recipes.speed.ours import loss_for
    from torchrl_iql_recipes.speed.work import Work

    lap("the other imports")
    work = Work(transitions=1000)
    data, losses = work.data(), [loss_for(work, seed) for seed in range(learners)]
    lap("losses")
    step = TrainStep(losses, execution=execution)  # pyright: ignore
    lap("`TrainStep`")
    step.run(Minibatches(data, work.batch_size, seeds=range(learners)), 1)
    lap("first step")
    return laps


def table(starts: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Write starts as a table of Markdown, with the sum of all but the first part."""
    parts = list(starts[0][1])
    lines = [f"| seconds | {' | '.join(parts)} | after the import |"]
    lines.append("| --- |" + " ---: |" * (len(parts) + 1))
    for name, laps in starts:
        after = sum(laps.values()) - laps[parts[0]]
        cells = " | ".join(f"{seconds:.1f}" for seconds in (*laps.values(), after))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start processes in turn, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--learners", type=int, nargs="+", default=[1])
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="warm starts")
    parser.add_argument("--once", action="store_true", help="of this process alone, as JSON")
    asked = parser.parse_args(arguments)
    if asked.once:
        print(json.dumps(once(asked.learners[0], asked.execution)))
        return
    starts = []
    for learners in asked.learners:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--once", "--learners", str(learners)]
            command += ["--execution", asked.execution]
            environment = {**os.environ, **dict.fromkeys(CACHES, folder)}
            cold, *warm = (
                json.loads(subprocess.check_output(command, env=environment))
                for _ in range(1 + asked.rounds)
            )
        name = "1 learner" if learners == 1 else f"{learners} learners"
        starts.append((f"{name}, cold", cold))
        if warm:
            medians = {part: median(each[part] for each in warm) for part in cold}
            starts.append((f"{name}, warm", medians))
    print(table(starts))


if __name__ == "__main__":
    main()
