"""Behaviour cloning on a task of recipes/offline.py, by TorchRL's BCLoss: what suite.py compares with.

    python recipes/benchmark/cloning.py task=mini/hopper-medium steps=50000 'seeds=[0,1]'

Policy, minibatches, schedule and evaluation are those of recipes/offline.py with temperature=0, and so are the
results up to rounding. Without values to learn, it is a fifth of the work. It runs on the CPU.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tensordict.nn import TensorDictModule
from torchrl.objectives import BCLoss
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import offline

from torchrl_iql import OfflineDataset
from torchrl_iql.data.minibatches import BLOCK
from torchrl_iql.training import resolve_execution


def policies(
    cfg: DictConfig, dataset: OfflineDataset, seed: int
) -> Iterator[tuple[int, TensorDictModule]]:
    """Trains a policy.

    Yields:
        the number of gradient steps, and the policy: at every evaluation, and after the last step.
    """
    torch.manual_seed(seed)
    architecture = offline.architecture_for(cfg, dataset)
    policy, _, _ = architecture.build(dataset.observation_statistics())
    loss = BCLoss(policy)
    execution = resolve_execution(cfg.compute.execution, torch.device("cpu"))
    step = loss if execution == "eager" else torch.compile(loss)
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.learning_rate, fused=True)
    decay = 0.5 if cfg.decay_actor else 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 1 - decay + decay * math.cos(math.pi * t / cfg.steps)
    )
    minibatches = dataset.minibatches(cfg.batch_size, seeds=[seed])
    for t in tqdm(range(cfg.steps), desc=f"BC, seed {seed}", unit="step"):
        block, position = divmod(t, BLOCK)
        source, indices = minibatches(block)
        rows = indices[position, 0]
        batch = source.select("observation", "action")[rows]
        optimizer.zero_grad()
        step(batch)["loss_bc"].backward()
        optimizer.step()
        schedule.step()
        if (t + 1) % cfg.eval_interval == 0 or t + 1 == cfg.steps:
            yield t + 1, policy


def run(cfg: DictConfig, path: Path) -> None:
    """Leaves ``scores.json``, as recipes/offline.py does, with all evaluations as ``scores``."""
    offline.prepare(cfg)
    dataset = offline.dataset_for(cfg)
    replicas: list[dict[str, Any]] = []
    seeds = OmegaConf.to_object(OmegaConf.create({"seeds": cfg.seeds}))["seeds"]  # pyright: ignore
    with offline.evaluator_for(cfg, dataset) as evaluate:
        if evaluate is None:
            raise ValueError("eval_episodes=0: there would be nothing to compare")
        for seed in [seeds] if isinstance(seeds, int) else seeds:
            evaluate.seed = offline.EVALUATION_SEED + seed
            outcomes = {steps: evaluate(policy) for steps, policy in policies(cfg, dataset, seed)}
            last = outcomes[cfg.steps].summary()
            curve = {steps: outcome.score for steps, outcome in outcomes.items()}
            replicas.append({"temperature": 0.0, "seed": seed, **last, "scores": curve})
    result = {"dataset": dataset.name, "replicas": replicas}
    (path / "scores.json").write_text(json.dumps(result, indent=2) + "\n")


@hydra.main(config_path="../config", config_name="offline", version_base="1.3")
def main(cfg: DictConfig) -> None:
    run(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
