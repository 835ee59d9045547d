"""The benchmark of starts: every part of one, cold and warm."""

from __future__ import annotations

import re

import pytest

from torchrl_iql_recipes.speed import start


def test_a_start_is_the_sum_of_its_parts() -> None:
    laps = start.once(2, "eager")
    assert list(laps)[-1] == "first step" and min(laps.values()) >= 0
    lines = start.table([("cold", {"import": 3.0, "step": 1.25, "rest": 1.0})]).splitlines()
    assert lines[-1] == "| cold | 3.0 | 1.2 | 1.0 | 2.2 |"
    assert {each.count("|") for each in lines} == {6}


@pytest.mark.slow
def test_the_first_start_is_cold_and_the_others_warm(capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--rounds", "1"])
    cold, warm = capsys.readouterr().out.splitlines()[2:]
    step = [float(re.split(r" *\| *", line)[5]) for line in (cold, warm)]
    assert cold.startswith("| 1 learner, cold") and warm.startswith("| 1 learner, warm")
    assert step[0] > 1 > step[1]  # TrainStep, whose kernels have to be compiled, or not
