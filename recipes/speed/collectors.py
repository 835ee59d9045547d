"""How fast environment steps are collected and learned from, by collector.

    python recipes/speed/collectors.py --env Hopper-v5 --frames 5000 --rounds 5
    python recipes/speed/collectors.py --collectors sync ray --workers 8 --device cuda

Every collector of recipes/config/collector (Ray's, if it is installed) is measured alone, and with one
gradient step per environment step, the updates of recipes/online.py. They take turns; ratios to the first
are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from torchrl_iql import IQLLoss, OfflineDataset, TrainStep
from torchrl_iql.models import Architecture
from torchrl_iql.online import Experience, behavior, collecting, environment, transitions
from torchrl_iql_recipes.experiment.build import exact_products
from torchrl_iql_recipes.speed.timing import hardware, synchronize

CONFIGURATIONS = Path(__file__).parents[1] / "config" / "collector"
WARM_UP_BATCHES = 5
"""In which workers start to run and the gradient step is compiled."""


def arguments(collector: str, workers: int) -> dict[str, Any]:
    """Read the arguments of a configuration, with another number of workers where it has some."""
    given: dict[str, Any] = OmegaConf.to_container(
        OmegaConf.load(CONFIGURATIONS / f"{collector}.yaml")
    )  # pyright: ignore
    return given | ({"num_collectors": workers} if "num_collectors" in given else {})


def learner_for(dataset: OfflineDataset, device: str) -> tuple[TrainStep, Architecture]:
    """Make a training step with the networks of the paper."""
    space = dataset.action_space
    architecture = Architecture(
        observation_size=dataset.transitions["observation"].shape[-1],
        action_size=dataset.transitions["action"].shape[-1],
        action_bounds=(space.low.tolist(), space.high.tolist()),  # pyright: ignore
    )
    qvalues = [architecture.qvalue_network() for _ in range(2)]
    loss = IQLLoss(architecture.policy_network(), qvalues, architecture.value_network())
    return TrainStep(loss.to(device), execution="auto"), architecture


def rate(
    dataset: OfflineDataset, collector: dict[str, Any], frames: int, *, learn: bool, device: str
) -> float:
    """Measure environment steps per second; learning, also gradient steps per second."""
    learner, architecture = learner_for(dataset, device)
    policy = architecture.policy_network()
    experience = Experience(dataset, 10 * frames, 256, device=device)
    create = partial(environment, dataset.env_spec)
    acting = behavior(policy, dataset.action_space)
    taken, start = 0, 0.0
    with collecting(create, acting, total_frames=10 * frames, **collector) as workers:
        for number, batch in enumerate(workers):
            rows = transitions(batch, dataset.transitions)
            experience.extend(rows)
            taken += len(rows)
            if learn:
                for _ in range(len(rows)):
                    learner(experience.sample())
                actor = learner.losses[0].get_stateful_net("actor_network")
                policy.load_state_dict(actor.state_dict())
                workers.update_policy_weights_()
            if number + 1 == WARM_UP_BATCHES:
                synchronize(device)
                taken, start = 0, time.perf_counter()
            elif number >= WARM_UP_BATCHES and taken >= frames:
                synchronize(device)
                return taken / (time.perf_counter() - start)
    raise RuntimeError(f"the collector ended after {taken} of {frames} steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--frames", type=int, default=5000, help="measured in every round")
    parser.add_argument("--rounds", type=int, default=5)
    ray = ["ray"] if find_spec("ray") else []
    parser.add_argument(
        "--collectors", nargs="+", default=["sync", "multi_sync", "multi_async", *ray]
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the learner; by default, PyTorch's")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision(exact_products(given.device))
    print(", ".join(f"{key} {value}" for key, value in hardware().items()))
    print(f"{given.env}, {given.workers} workers, medians of {given.rounds} rounds\n")

    dataset = OfflineDataset.empty(given.env)
    rates = np.zeros((given.rounds, len(given.collectors), 2))
    for turn in range(given.rounds):
        for row, name in enumerate(given.collectors):
            collector = arguments(name, given.workers)
            for column, learn in enumerate((False, True)):
                rates[turn, row, column] = rate(
                    dataset,
                    copy.deepcopy(collector),
                    given.frames,
                    learn=learn,
                    device=given.device,
                )
    medians, ratios = np.median(rates, axis=0), np.median(rates / rates[:, :1], axis=0)
    first = given.collectors[0]
    print(
        f"| collector | frames/s, collecting alone | times {first} | frames/s and updates/s | times {first} |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (alone, both), (faster_alone, faster) in zip(
        given.collectors, medians, ratios, strict=True
    ):
        print(f"| {name} | {alone:,.0f} | {faster_alone:.2f} | {both:,.0f} | {faster:.2f} |")


if __name__ == "__main__":
    main()
