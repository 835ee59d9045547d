"""Behaviour cloning on a task of recipes/offline.py, by TorchRL's BCLoss: what suite.py compares with.

    python recipes/benchmark/cloning.py task=mini/hopper-medium steps=50000 'seeds=[0,1]'

Policy, minibatches, schedule and evaluation are those of recipes/offline.py with temperature=0, and so are the
results up to rounding. Without values to learn, it is a fifth of the work. It runs on the CPU.
"""

from __future__ import annotations

import json
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

from torchrl_iql import OfflineDataset, TrainStep
from torchrl_iql.data.minibatches import BLOCK
from torchrl_iql.training import cosine_decay


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
    step = TrainStep(
        BCLoss(policy),
        learning_rate=cfg.learning_rate,
        schedule={"actor_network": cosine_decay(cfg.steps)} if cfg.decay_actor else {},
        seeds=seed,
        execution=cfg.compute.execution,
    )
    minibatches = dataset.minibatches(cfg.batch_size, seeds=[seed])
    with tqdm(total=cfg.steps, desc=f"BC, seed {seed}", unit="step") as bar:
        while step.steps < cfg.steps:
            done = step.steps
            left = min(cfg.eval_interval - done % cfg.eval_interval, cfg.steps - done)
            step.run(minibatches, min(left, BLOCK))
            bar.update(step.steps - done)
            if step.steps % cfg.eval_interval == 0 or step.steps == cfg.steps:
                yield step.steps, policy


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
