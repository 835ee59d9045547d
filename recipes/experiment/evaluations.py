"""Evaluations of all learners of a run: while training waits, or in worker processes while it goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from torchrl_iql import Evaluation, Evaluator
from torchrl_iql.models import Architecture

__all__ = ["Evaluations", "Round"]

SEED = 10_000
"""Plus the seed of the learner: away from the seeds that data are made with."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Round:
    """What all learners scored after so many gradient steps, or why that is not known."""

    step: int
    outcomes: Sequence[Evaluation | Exception]


class Evaluations:
    """Rounds of evaluations, at most one of them under way.

    Every learner plays the same seeded episodes in each round, on one thread and with an environment per
    episode, so that the numbers do not depend on where they are played. Where playing fails, the next round
    has fresh environments.

    Args:
        make: an :class:`~torchrl_iql.Evaluator`.
        architecture: of the policies.
        seeds: of the learners.
        workers: processes to play in; 0 for this one.
        maze: that is played in, if it is one: evaluations then hold trajectories to be drawn.

    Attributes:
        maze: the same.
        waited: the seconds that the caller has waited for evaluations.
        under_way: after how many gradient steps the policies of the present round were taken; None between
            rounds.
    """

    def __init__(
        self,
        make: Callable[[], Evaluator],
        architecture: Architecture,
        seeds: Sequence[int],
        workers: int = 0,
        *,
        maze: Any = None,
    ) -> None:
        self.maze = maze
        self.waited = 0.0
        self.under_way: int | None = None
        self._seeds = [SEED + seed for seed in seeds]
        self._workers = min(workers, len(seeds))
        self._start_worker = partial(_start, make, architecture)
        self._pending: list[Future] = []
        self._pool: ProcessPoolExecutor | None = None
        self._player = _Player(make, architecture)

    def start(self, step: int, policies: Sequence[Mapping[str, Tensor]]) -> None:
        """Start a round. The one before has to be over: see :meth:`finished`.

        Args:
            step: the number of gradient steps taken.
            policies: the state of each learner's policy; it may change afterwards.
        """
        assert self.under_way is None
        self.under_way = step
        jobs = [
            ({k: v.detach().cpu().clone() for k, v in weights.items()}, seed, self.maze is not None)
            for weights, seed in zip(policies, self._seeds, strict=True)
        ]
        if self._workers and self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers, get_context("spawn"), self._start_worker
            )
        with self._waiting():
            for job in jobs:
                self._pending.append(self._submitted(*job))

    def _submitted(self, *job: Any) -> Future:
        if self._pool is None:
            play = self._player
        else:
            try:
                return self._pool.submit(_play, *job)
            except BrokenExecutor as error:  # a worker has died since the last round
                play = partial(_raise, error)
        future = Future()
        try:
            future.set_result(play(*job))
        except Exception as error:
            future.set_exception(error)
        return future

    def finished(self, *, wait: bool = False) -> Iterator[Round]:
        """Yield the round under way if it is over, once; or, with ``wait``, when it is over."""
        if len(self._pending) < len(
            self._seeds
        ):  # none is, or it was stopped while it was played here
            return
        if not wait and not all(each.done() for each in self._pending):
            return
        with self._waiting():
            outcomes = [each.exception() or each.result() for each in self._pending]
        step, self.under_way, self._pending = self.under_way, None, []
        assert step is not None
        if any(isinstance(each, BrokenExecutor) for each in outcomes):
            self._end_workers()
        yield Round(step, outcomes)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    def _end_workers(self) -> None:
        """End the workers, and what they are doing."""
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            self._pool = None

    def close(self) -> None:
        """End what is under way, close the environments and end the workers."""
        self._player.close()
        self._end_workers()

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Player:
    """Plays with the policies of one architecture, in environments that are made when they are needed."""

    def __init__(self, make: Callable[[], Evaluator], architecture: Architecture) -> None:
        self._make = make
        self._evaluator: Evaluator | None = None
        self.policy = architecture.policy_network()  # as load_policy builds it

    def __call__(self, weights: Weights, seed: int, keep_trajectories: bool) -> Evaluation:
        self.policy.load_state_dict(dict(weights))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # enough for so few observations, and then the same everywhere
        try:
            self._evaluator = self._evaluator or self._make()
            self._evaluator.seed = seed
            return self._evaluator(self.policy, keep_trajectories=keep_trajectories)
        except BaseException:  # also when it is stopped: an environment in the midst of a step
            with suppress(Exception):
                self.close()
            raise
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        evaluator, self._evaluator = self._evaluator, None
        if evaluator is not None:
            evaluator.close()


_player: _Player


def _start(make: Callable[[], Evaluator], architecture: Architecture) -> None:
    """Set up a worker. Ctrl-C is for the process that trains."""
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _player = _Player(make, architecture)


def _play(*job: Any) -> Evaluation:
    return _player(*job)


def _raise(error: Exception, *_: object) -> Evaluation:
    raise error
