"""How long a gradient step of each algorithm takes, as recipes/offline.py trains it: the runtime of each.

    python recipes/speed/algorithms.py --rounds 5 --only cql iql

Settings are those of locomotion, ``task=locomotion/halfcheetah-medium``; data are random, in its sizes.
Beside it stands TorchRL's loss, where it has one, on networks like those, in the loop of TorchRL's recipes:
a buffer that prefetches minibatches, the loss, Adam and the targets, eagerly and by ``torch.compile`` of all
but the buffer; and with ``--unifloral <checkout>`` that code in JAX (``unifloral.py``), where it has the
algorithm. Every contender has a process of its own; those of an algorithm take turns, and ratios are taken
within a round. The exit status is 1 if an algorithm fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl import objectives
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    SamplerWithoutReplacement,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_iql import OfflineDataset
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment import build
from torchrl_iql_recipes.experiment.networks import Networks, architecture_for
from torchrl_iql_recipes.experiment.training import OFFLINE
from torchrl_iql_recipes.speed import unifloral, update
from torchrl_iql_recipes.speed.timing import Contender, Result, synchronize
from torchrl_iql_recipes.speed.update import (
    chosen,
    conclude,
    configure,
    measuring,
    parse,
    race,
)

__all__ = ["LOSSES", "Recipe", "Torchrl", "contenders", "row"]

TASK = "locomotion/halfcheetah-medium"
Way = Literal["eager", "compiled"]
WAYS: tuple[Way, ...] = ("eager", "compiled")

LOSSES: dict[str, tuple[str, ...]] = {
    "bc": ("loss_bc",),
    "cql": ("loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"),
    "dt": ("loss_actor",),  # TorchRL's, masked here
    "iql": ("loss_actor", "loss_qvalue", "loss_value"),
    "td3bc": ("loss_actor", "loss_qvalue"),
}
"""The algorithms for which TorchRL has a loss, and what its recipe descends."""

QUICK = {
    **{key: value for key, value in update.QUICK.items() if key in ("rounds", "seconds")},
    "only": ("bc", "iql"),
    "ways": ("eager",),
    "settings": ("hidden_sizes=[16,16]", "batch_size=16"),
}


class _Parts:
    """What a run of recipes/offline.py would have."""

    def __init__(self, algorithm: str, device: str, settings: Sequence[str]) -> None:
        self.device = device
        asked = [f"task={TASK}", f"algorithm={algorithm}", f"compute.device={device}", *settings]
        self.settings = OFFLINE.settings(asked)
        build.set_up(self.settings.compute)
        learned = build.learned_from(self.settings, random_data())
        self.dataset = build.over_steps(self.settings, learned)

    @cached_property
    def architecture(self) -> Any:
        described = architecture_for(self.settings.networks, self.dataset, self.settings.algorithm)
        return self.settings.algorithm.architecture(described, self.dataset)


def random_data(episodes: int = 100, length: int = 1000) -> OfflineDataset:
    """Draw random walks in the sizes of HalfCheetah."""
    rng, n = np.random.default_rng(0), episodes * length
    walks = 0.1 * rng.normal(size=(episodes, length, 17)).cumsum(axis=1)
    return OfflineDataset.from_arrays(
        "random",
        observations=walks.reshape(n, 17).astype(np.float32),
        actions=rng.uniform(-0.99, 0.99, size=(n, 6)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=np.zeros(n, dtype=bool),
        timeouts=np.arange(1, n + 1) % length == 0,
        env_spec="HalfCheetah-v5",
    )


class Recipe:
    """An algorithm as recipes/offline.py trains it.

    Args:
        algorithm: its name.
        device: of its networks.
        settings: further ones.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    name = "recipe"
    replicas = 1

    def __init__(self, algorithm: str, device: str, settings: Sequence[str]) -> None:
        its = _Parts(algorithm, device, settings)
        compute, training = its.settings.compute, its.settings.training
        self._step = build.step_for(
            its.settings.learners, its.architecture, its.dataset, compute, training.steps
        )
        self._minibatches = its.dataset.minibatches(training.batch_size, seeds=[0], device=device)

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        self._step.run(self._minibatches, steps)
        synchronize(self._step.device.type)


class Torchrl:
    """TorchRL's loss in the loop of its recipes.

    Args:
        algorithm: its name, of :data:`LOSSES`.
        device: of its networks.
        settings: further ones of the recipe here.
        way: ``"compiled"``, everything but the buffer is.

    Attributes:
        name: of the contender.
        replicas: 1.
        loss: in training.
    """

    replicas = 1

    def __init__(self, algorithm: str, device: str, settings: Sequence[str], way: Way) -> None:
        self.name = torchrl_name(way)
        its = _Parts(algorithm, device, settings)
        torch.manual_seed(0)
        self.loss = torchrl_loss(its, algorithm).to(device)
        self._optimizer = torch.optim.Adam(self.loss.parameters(), lr=3e-4)
        followed = any(name.startswith("target_") for name in self.loss.state_dict())
        self._target = SoftUpdate(self.loss, tau=0.005) if followed else None
        self._buffer = _buffer(its)
        context = its.settings.values.get("context")
        self._shape = (-1, context) if context else (-1,)
        self._device = device
        every = 2 if algorithm == "td3bc" else 1
        last = partial(self._update, LOSSES[algorithm])
        others = partial(self._update, ("loss_qvalue",), followed=False)
        self._updates = [*[others] * (every - 1), last]
        if way == "compiled":
            options = {"dynamic": False, "isolate_recompiles": True}
            self._updates = [torch.compile(each, **options) for each in self._updates]
        self._steps = 0

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them."""
        for _ in range(steps):
            batch = self._buffer.sample().to(self._device).reshape(*self._shape)
            self._updates[self._steps % len(self._updates)](batch)
            self._steps += 1
        synchronize(self._device)

    def _update(self, entries: Sequence[str], batch: TensorDictBase, followed: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if entries == ("loss_qvalue",):  # the policy's turn is another
            loss = self.loss.qvalue_loss(batch)[0]  # pyright: ignore
        else:
            losses = self.loss(batch)
            loss = sum(losses[entry] for entry in entries)
        loss.backward()  # pyright: ignore
        self._optimizer.step()
        if followed and self._target is not None:
            self._target.step()


def torchrl_loss(its: _Parts, algorithm: str) -> LossModule:
    """Make TorchRL's loss on networks as the algorithm has them here."""
    networks = Networks(its.architecture, its.dataset.observation_statistics())
    if algorithm in ("bc", "dt"):
        return its.settings.algorithm.loss(networks)  # TorchRL's
    policy, qvalues = networks.policy(), networks.qvalues(2)
    loss: Any
    if algorithm == "iql":
        loss = objectives.IQLLoss(policy, qvalues, networks.value())  # pyright: ignore
    elif algorithm == "cql":
        loss = objectives.CQLLoss(policy, qvalues, min_q_weight=5.0)  # pyright: ignore
    else:
        loss = objectives.TD3BCLoss(policy, qvalues, bounds=networks.action_bounds())  # pyright: ignore
    loss.make_value_estimator(gamma=its.settings.algorithm.discount)  # pyright: ignore
    return loss


def _buffer(its: _Parts) -> TensorDictReplayBuffer:
    """Return what gives minibatches; of windows, one after the other."""
    data, batch_size = its.dataset.transitions, its.settings.training.batch_size
    context = its.settings.values.get("context", 0)
    if context:
        data = data.set("episode", (data["time"] == 0).cumsum(0))
        sampler = SliceSampler(slice_len=context, traj_key="episode", cache_values=True)
    else:
        sampler = SamplerWithoutReplacement(drop_last=True)
    gpu = its.device == "cuda"
    storage = LazyTensorStorage(len(data), device="cuda") if gpu else LazyMemmapStorage(len(data))
    buffer = TensorDictReplayBuffer(
        storage=storage,
        sampler=sampler,
        batch_size=batch_size * (context or 1),
        prefetch=None if gpu else 4,
    )
    buffer.extend(data)
    return buffer


def torchrl_name(way: Way) -> str:
    return f"TorchRL's loss, {way}"


def contenders(
    algorithm: str,
    device: str,
    settings: Sequence[str],
    ways: Sequence[Way],
    checkout: Path | None = None,
) -> dict[str, Callable[[], Contender]]:
    """Return how to build each contender of an algorithm, by name.

    Args:
        algorithm: its name.
        device: of its networks.
        settings: further ones of the recipe.
        ways: of TorchRL's loss.
        checkout: of unifloral.
    """
    builders: dict[str, Callable[[], Contender]] = {}
    if algorithm in LOSSES:
        builders = {
            torchrl_name(way): partial(Torchrl, algorithm, device, settings, way) for way in ways
        }
    if checkout is not None and algorithm in unifloral.FILES:
        builders[unifloral.NAME] = partial(_unifloral, algorithm, device, checkout)
    return {**builders, Recipe.name: partial(Recipe, algorithm, device, settings)}


def _unifloral(algorithm: str, device: str, checkout: Path) -> Contender:
    return unifloral.Unifloral(algorithm, checkout, random_data().transitions, device)


def row(algorithm: str, results: Sequence[Result], others: Sequence[str]) -> str:
    """Write the line of an algorithm: medians, ratios being taken within a round.

    Args:
        algorithm: its name.
        results: of its contenders.
        others: the names of those that are not ours, a pair of columns for each.
    """
    rates = {result.name: np.array(result.rates) for result in results}
    own = rates.get(Recipe.name)
    cells = [algorithms()[algorithm].title, "-" if own is None else f"{np.median(own):,.0f}"]
    for name in others:
        theirs = rates.get(name)
        cells += [
            "-" if theirs is None else f"{np.median(theirs):,.0f}",
            "-" if theirs is None or own is None else f"{np.median(own / theirs):.2f}",
        ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        the exit status: 1 if an algorithm failed.
    """
    options = parse(_parser(), QUICK, arguments)
    checkout = options.unifloral
    others = [torchrl_name(way) for way in options.ways] + ([unifloral.NAME] if checkout else [])
    setting = partial(configure, options.threads, options.precision)
    setting()
    columns = ["algorithm", "recipe, updates/s"]
    columns += [each for name in others for each in (name, "times")]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}", flush=True)
    results: dict[str, list[Result]] = {}
    failed = []
    for algorithm in algorithms():
        if not chosen(algorithm, options.only):
            continue
        builders = contenders(algorithm, options.device, options.settings, options.ways, checkout)
        results[algorithm] = race(builders, options, setting)
        measured = {result.name for result in results[algorithm]}
        failed += [] if Recipe.name in measured else [algorithm]
        print(row(algorithm, results[algorithm], others), flush=True)
    return conclude(options, failed, {"algorithms": results}, settings=options.settings)


def _parser() -> argparse.ArgumentParser:
    described = measuring(__doc__)
    described.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="of TorchRL's")
    described.add_argument(
        "--unifloral", type=unifloral.checkout, help="a checkout of that repository"
    )
    described.add_argument(
        "--settings", nargs="*", default=(), help="further ones of recipes/offline.py"
    )
    return described


if __name__ == "__main__":
    sys.exit(main())
