"""Evaluations beside training: the same numbers wherever they are played, and at most one round at a time."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from torchrl_iql import Evaluator
from torchrl_iql.models import Architecture
from torchrl_iql_recipes.experiment.evaluations import Evaluations, Round

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
    for one, other in zip(here.evaluations, there.evaluations, strict=True):
        assert one.summary() == other.summary()
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            np.testing.assert_array_equal(a, b)
    starts = [its.trajectories[0][0].tolist() for its in here.evaluations]
    assert len(set(map(tuple, starts))) == 3  # each learner has seeds of its own


def test_they_are_those_of_the_weights_when_the_round_began() -> None:
    weights = policies()
    with Evaluations(MAKE, ARCHITECTURE, [5, 6, 7], 1) as evaluations:
        evaluations.start(40, weights)
        for each in weights:
            for tensor in each.values():
                tensor.fill_(float("nan"))
        (its,) = evaluations.finished(wait=True)
    expected = [each.summary() for each in played(0).evaluations]
    assert [each.summary() for each in its.evaluations] == expected


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


def test_a_worker_that_dies_is_an_error() -> None:
    with Evaluations(MAKE, ARCHITECTURE, [5], 1) as evaluations:
        evaluations.start(0, policies(1))
        (worker,) = evaluations._pool._processes  # pyright: ignore
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError):
            list(evaluations.finished(wait=True))


def test_nothing_is_left_behind() -> None:
    with Evaluations(MAKE, ARCHITECTURE, [5], 1) as evaluations:
        evaluations.start(0, policies(1))
        (worker,) = evaluations._pool._processes.values()  # pyright: ignore
    worker.join(20)
    assert not worker.is_alive()
