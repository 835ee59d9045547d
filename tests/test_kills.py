"""Runs that are killed again and again are, in the end, those that nobody has killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import TINY, in_tensorboard, of_maze, rows
from torchrl_iql_recipes.experiment import offline, online, results
from torchrl_iql_recipes.experiment.records import Records
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

OFTEN = ["log_interval=2", "eval_interval=6", "checkpoint_interval=1e-9", "logger=tensorboard"]
"""Checkpoints at every look at the clock, and evaluations between them."""


def settings(scenario: str, maze_id: str) -> Settings:
    given = [*TINY, *of_maze([f"dataset={maze_id}", *OFTEN])]
    if scenario == "online":
        # Two cuts between evaluations, a batch that does not fit the end, and a policy that explores.
        own = ["steps=0", "temperature=3", "env_steps=75", "collector.frames_per_batch=10"]
        return ONLINE.settings([*given, *own, "eval_interval=30", "log_interval=10"])
    own = {
        "one learner": ["steps=24", "seeds=0", "temperature=3"],
        "six learners": ["steps=12", "seeds=[0,1]", "temperature=[0,3,10]"],
    }
    return OFFLINE.settings([*given, *own[scenario], "dropout=0.1"])


def in_a_process(act: Callable[[], None]) -> int:
    """Do it in a copy of this process; return its exit code, or the signal that ended it, negative."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


CHANGES = ("replace", "rename", "link", "unlink", "mkdir")
"""What changes a folder, of the functions of os."""


def counting(count: Callable[[], None]) -> None:
    """Call a function before every change of a folder that saving makes, in this process."""
    save, saving = Records.save, []

    def noted(self: Records, *arguments: Any, **more: Any) -> None:
        saving.append(self)
        try:
            save(self, *arguments, **more)
        finally:
            saving.pop()

    Records.save = noted

    def change(does: Callable, *arguments: Any, **more: Any) -> Any:
        if saving:
            count()
        return does(*arguments, **more)

    for name in CHANGES:
        setattr(os, name, partial(change, getattr(os, name)))


def run(which: Settings, folder: Path) -> None:
    (online if "env_steps" in which.values else offline).run(which, folder)


def killed_at_change(number: int) -> Callable[[], None]:
    """Return what kills this process at the n-th call."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def live(which: Settings, folder: Path, generator: random.Random, kind: str) -> bool:
    """Let a run go on until it is killed, or over; return whether it was killed."""

    def act() -> None:
        if kind == "change":
            counting(killed_at_change(generator.randint(1, 40)))
        elif kind == "time":
            seconds = generator.uniform(0.05, 1.5)
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        run(which, folder)

    code = in_a_process(act)
    generator.random()  # the copy's are not drawn here
    assert code in (0, -signal.SIGKILL)
    return code != 0


def state(folder: Path) -> Any:
    """Return what a checkpoint holds of its learner: parameters, targets, moments, streams, coefficients."""
    with zipfile.ZipFile(folder / "last.ckpt") as archive:
        return {
            name: torch.load(BytesIO(archive.read(name)), weights_only=True)
            for name in archive.namelist()
            if name.endswith((".pt", ".pth"))
            and "rng" not in name  # of generators that nobody has seeded
        }


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other or (one != one and other != other)


def assert_same_run(one: Path, other: Path, which: Settings) -> None:
    assert results.read(one) == results.read(other)
    for learner in which.learners:
        a, b = one / learner.name, other / learner.name
        assert rows(a) == rows(b)
        assert in_tensorboard(a) == in_tensorboard(b)
        assert len(state(a)) >= 2
        assert_equal(state(a), state(b))


@pytest.mark.parametrize(
    ("scenario", "kills"),
    [
        ("online", 2),
        *(
            pytest.param(scenario, 17, marks=pytest.mark.slow)
            for scenario in ("one learner", "six learners", "online")
        ),
    ],
)
def test_a_run_that_is_killed_again_and_again(
    scenario: str, kills: int, maze_id: str, tmp_path: Path
) -> None:
    """From a process of its own: one that has taken gradient steps can not be copied to take others."""
    command = [sys.executable, __file__, scenario, str(kills), maze_id, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kill_again_and_again(scenario: str, kills: int, maze_id: str, tmp_path: Path) -> None:
    """Most of the kills are between the first and the last change of a folder that saving makes."""
    online.ROUND = 20
    which = settings(scenario, maze_id)
    assert in_a_process(lambda: run(which, tmp_path / "whole")) == 0
    generator, folders, at_change = random.Random(kills), 0, 0
    done = 0
    while done < kills:
        folder, over = tmp_path / f"killed-{folders}", False
        folders += 1
        while not over:
            kind = "none" if done == kills else ("change", "change", "time")[done % 3]
            killed = live(which, folder, generator, kind)
            over, done = not killed, done + killed
            at_change += killed and kind == "change"
        assert_same_run(tmp_path / "whole", folder, which)
    assert at_change >= kills // 2


if __name__ == "__main__":
    kill_again_and_again(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
