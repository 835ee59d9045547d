"""Evaluations beside training: the same numbers wherever they are played, and at most one round at a time."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from multiprocessing.connection import wait
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from torchrl_iql import Evaluation, Evaluator
from torchrl_iql.models import Architecture
from torchrl_iql_recipes.experiment.evaluations import SEED, Evaluations, Round

ARCHITECTURE = Architecture(
    observation_size=3, action_size=1, action_bounds=([-2.0], [2.0]), hidden_sizes=(8,)
)
MAKE = partial(Evaluator, "Pendulum-v1", episodes=2)


def policies(number: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [ARCHITECTURE.policy_network().state_dict() for _ in range(number)]


def played(workers: int) -> Round:
    with Evaluations(MAKE, ARCHITECTURE, [5, 6, 7], workers, maze=object()) as evaluations:
        evaluations.start(40, policies())
        (its,) = evaluations.finished(wait=True)
        assert list(evaluations.finished(wait=True)) == []
        return its


def test_in_workers_the_numbers_are_those_in_sequence() -> None:
    here, there = played(0), played(2)
    assert here.step == there.step == 40
    for one, other in zip(here.outcomes, there.outcomes, strict=True):
        assert one.summary() == other.summary()
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            np.testing.assert_array_equal(a, b)
    starts = [its.trajectories[0][0].tolist() for its in here.outcomes]
    assert len(set(map(tuple, starts))) == 3  # each learner has seeds of its own


def test_they_are_those_of_the_weights_when_the_round_began() -> None:
    weights = policies()
    with Evaluations(MAKE, ARCHITECTURE, [5, 6, 7], 1) as evaluations:
        evaluations.start(40, weights)
        for each in weights:
            for tensor in each.values():
                tensor.fill_(float("nan"))
        (its,) = evaluations.finished(wait=True)
    expected = [each.summary() for each in played(0).outcomes]
    assert [each.summary() for each in its.outcomes] == expected


@pytest.mark.slow
def test_training_goes_on_meanwhile_and_waits_only_for_what_is_left() -> None:
    with Evaluations(MAKE, ARCHITECTURE, [5], 1) as evaluations:
        evaluations.start(0, policies(1))
        assert list(evaluations.finished()) == []  # the worker has not even started
        deadline = time.monotonic() + 120
        rounds: list[Round] = []
        while not rounds and time.monotonic() < deadline:
            rounds += evaluations.finished()
        assert len(rounds) == 1
        assert evaluations.waited < 0.1
        evaluations.start(1, policies(1))
        with pytest.raises(AssertionError):
            evaluations.start(2, policies(1))


def test_after_a_worker_has_died_the_next_round_has_others() -> None:
    expected = [each.summary() for each in played(0).outcomes]
    with Evaluations(MAKE, ARCHITECTURE, [5, 6, 7], 1, maze=object()) as evaluations:
        evaluations.start(0, policies())
        (worker,) = evaluations._pool._processes  # pyright: ignore
        os.kill(worker, signal.SIGKILL)
        (its,) = evaluations.finished(wait=True)
        assert all(isinstance(each, RuntimeError) for each in its.outcomes)
        evaluations.start(40, policies())
        (its,) = evaluations.finished(wait=True)
        assert [each.summary() for each in its.outcomes] == expected


class Failing(Evaluator):
    """Fails in the second of all rounds that it plays."""

    made: ClassVar[list[Evaluator]] = []

    def __init__(self) -> None:
        super().__init__("Pendulum-v1", episodes=2)
        self.made.append(self)

    def __call__(self, *arguments: Any, **more: Any) -> Evaluation:
        if self is self.made[0] and self.seed == SEED + 6:
            raise OSError("the simulator is lost")
        return super().__call__(*arguments, **more)


def test_a_failure_is_one_learners_and_others_play_in_fresh_environments() -> None:
    expected = [each.summary() for each in played(0).outcomes]
    with Evaluations(Failing, ARCHITECTURE, [5, 6, 7]) as evaluations:
        evaluations.start(40, policies())
        (its,) = evaluations.finished()
    first, failed, last = its.outcomes
    assert (first.summary(), last.summary()) == (expected[0], expected[2])
    assert isinstance(failed, OSError)
    assert len(Failing.made) == 2


def test_nothing_is_left_behind() -> None:
    with Evaluations(MAKE, ARCHITECTURE, [5], 1) as evaluations:
        evaluations.start(0, policies(1))
        (worker,) = evaluations._pool._processes.values()  # pyright: ignore
    # Not is_alive: the pool's own thread may just have taken the process's exit code.
    assert wait([worker.sentinel], timeout=20)
