"""Evaluations of all learners of a run: while training waits, or in worker processes while it goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from torchrl_iql import Evaluation, Evaluator
from torchrl_iql.models import Architecture

__all__ = ["Evaluations", "Round"]

SEED = 10_000
"""Plus the seed of the learner: away from the seeds that data are made with."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Round:
    """What all learners scored after so many gradient steps."""

    step: int
    evaluations: Sequence[Evaluation]


class Evaluations:
    """Rounds of evaluations, at most one of them under way.

    Every learner plays the same seeded episodes in each round, on one thread and with an environment per
    episode, so that the numbers do not depend on where they are played.

    Args:
        make: an :class:`~torchrl_iql.Evaluator`.
        architecture: of the policies.
        seeds: of the learners.
        workers: processes to play in; 0 for this one.
        maze: that is played in, if it is one: evaluations then hold trajectories to be drawn.

    Attributes:
        maze: the same.
        waited: the seconds that the caller has waited for evaluations.
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
        self._seeds = [SEED + seed for seed in seeds]
        self._step = 0
        self._pending: list[Future] = []
        self._pool: ProcessPoolExecutor | None = None
        self._player: _Player | None = None
        if workers:
            start = partial(_start, make, architecture)
            workers = min(workers, len(seeds))
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), start)
        else:
            self._player = _Player(make(), architecture)

    def start(self, step: int, policies: Sequence[Mapping[str, Tensor]]) -> None:
        """Start a round. The one before has to be over: see :meth:`finished`.

        Args:
            step: the number of gradient steps taken.
            policies: the state of each learner's policy; it may change afterwards.
        """
        assert not self._pending
        self._step = step
        jobs = [
            ({k: v.detach().cpu().clone() for k, v in weights.items()}, seed, self.maze is not None)
            for weights, seed in zip(policies, self._seeds, strict=True)
        ]
        if self._pool is not None:
            self._pending = [self._pool.submit(_play, *job) for job in jobs]
            return
        assert self._player is not None
        with self._waiting():
            for job in jobs:
                self._pending.append(Future())
                self._pending[-1].set_result(self._player(*job))

    def finished(self, *, wait: bool = False) -> Iterator[Round]:
        """Yield the round under way if it is over, once; or, with ``wait``, when it is over.

        Raises:
            RuntimeError: a worker has died.
        """
        if not self._pending or not (wait or all(each.done() for each in self._pending)):
            return
        with self._waiting():
            evaluations = [each.result() for each in self._pending]
        self._pending = []
        yield Round(self._step, evaluations)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def close(self) -> None:
        """End the workers, and what they are doing."""
        if self._player is not None:
            self._player.evaluate.close()
        if self._pool is not None:
            workers = list(self._pool._processes.values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Player:
    """Plays with the policies of one architecture."""

    def __init__(self, evaluate: Evaluator, architecture: Architecture) -> None:
        self.evaluate = evaluate
        self.policy: TensorDictModule = architecture.policy_network()  # as load_policy builds it

    def __call__(self, weights: Weights, seed: int, keep_trajectories: bool) -> Evaluation:
        self.policy.load_state_dict(dict(weights))
        self.evaluate.seed = seed
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # enough for so few observations, and then the same everywhere
        try:
            return self.evaluate(self.policy, keep_trajectories=keep_trajectories)
        finally:
            torch.set_num_threads(threads)


_player: _Player


def _start(make: Callable[[], Evaluator], architecture: Architecture) -> None:
    """Set up a worker. Ctrl-C is for the process that trains."""
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _player = _Player(make(), architecture)


def _play(*job: Any) -> Evaluation:
    return _player(*job)
