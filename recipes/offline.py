"""Train IQL on an offline data set.

With no argument: the embedded maze data, made on first use, IQL beside behaviour cloning.

    python recipes/offline.py
    python recipes/offline.py task=locomotion dataset=mujoco/hopper/medium-v0 compute=gpu seed=1
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import plots
import pointmaze
import torch
from gymnasium.spaces import Discrete
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from run_folder import RunFolder, StopSignal
from tqdm import tqdm

from torchrl_iql import (
    DiscreteIQLLoss,
    Evaluator,
    IQLLoss,
    OfflineDataset,
    TrainStep,
    checkpoint,
    load_dataset,
)
from torchrl_iql.models import Architecture


def architecture_for(cfg: DictConfig, dataset: OfflineDataset) -> Architecture:
    """The networks of the configuration, in the sizes of the data."""
    observation_size = dataset.transitions["observation"].shape[-1]
    space = dataset.action_space
    if isinstance(space, Discrete):
        actions: dict[str, Any] = {"action_size": int(space.n)}
    else:
        data = dataset.transitions["action"]
        bounds = {
            "space": (space.low.ravel().tolist(), space.high.ravel().tolist()),
            "data": (data.amin(0).tolist(), data.amax(0).tolist()),
        }[cfg.action_bounds]
        actions = {"action_size": data.shape[-1], "action_bounds": bounds}
    return Architecture(
        observation_size=observation_size,
        policy="categorical" if isinstance(space, Discrete) else cfg.policy,
        hidden_sizes=tuple(cfg.hidden_sizes),
        dropout=cfg.dropout,
        num_qvalue_nets=cfg.num_qvalue_nets,
        normalize_observation=cfg.normalize_observation,
        **actions,
    )


def learner_for(
    cfg: DictConfig, dataset: OfflineDataset, architecture: Architecture, temperature: float
) -> TrainStep:
    networks = architecture.build(dataset.observation_statistics())
    settings = {
        "num_qvalue_nets": architecture.num_qvalue_nets,
        "expectile": cfg.expectile,
        "temperature": temperature,
        "weight_clip": cfg.weight_clip,
    }
    if architecture.discrete:
        loss = DiscreteIQLLoss(*networks, action_space="categorical", **settings)
    else:
        loss = IQLLoss(*networks, **settings)
    loss.make_value_estimator(gamma=cfg.discount)
    return TrainStep(
        loss.to(cfg.compute.device),
        learning_rate=cfg.learning_rate,
        target_rate=cfg.target_rate,
        actor_decay_steps=cfg.steps if cfg.decay_actor else None,
    )


def train(
    cfg: DictConfig,
    dataset: OfflineDataset,
    evaluate: Evaluator,
    folder: RunFolder,
    *,
    name: str,
    temperature: float,
) -> tuple[TrainStep, dict[str, Any]]:
    """Take the gradient steps that the folder's last checkpoint lacks, evaluating on the way.

    Ctrl-C saves a checkpoint and ends the training; a second one stops at once.

    Returns:
        the learner, and its final scores: those of :meth:`torchrl_iql.Evaluation.summary`, the number
        of steps, the best evaluation on the way, and whether the run was interrupted.
    """
    torch.manual_seed(cfg.seed)
    architecture = architecture_for(cfg, dataset)
    learner = learner_for(cfg, dataset, architecture, temperature)
    policy = learner.loss.get_stateful_net("actor_network")
    buffer = dataset.replay_buffer(cfg.batch_size, device=cfg.compute.device)
    best: dict[str, Any] | None = None
    if folder.last.exists():
        best = checkpoint.load_learner(folder.last, learner, cfg.compute.device)["best"]
        folder.forget_after(learner.steps)

    def save(path: Path) -> None:
        checkpoint.save(path, learner, architecture, best=best, dataset=dataset.name)

    scores: dict[str, float] = {}
    bar = tqdm(total=cfg.steps, initial=learner.steps, desc=name, unit="step")
    with StopSignal() as stop:
        while not stop.requested and (learner.steps < cfg.steps or not scores):
            if learner.steps < cfg.steps:
                metrics = learner(buffer.sample())
                bar.update()
                if learner.steps % cfg.log_interval == 0:
                    values = {key: float(value) for key, value in metrics.items()}
                    folder.log(learner.steps, values | {"policy_lr": learner.policy_lr})
                    losses = {k[5:]: v for k, v in values.items() if k.startswith("loss_")}
                    bar.set_postfix(losses | ({"score": scores["score"]} if scores else {}))
            if learner.steps % cfg.eval_interval == 0 or learner.steps == cfg.steps:
                scores = evaluate(policy).summary()
                folder.log(learner.steps, {f"eval/{k}": v for k, v in scores.items()})
                if best is None or scores["score"] > best["score"]:
                    best = {"score": scores["score"], "step": learner.steps}
                    save(folder.best)
                save(folder.last)
    if stop.requested:
        save(folder.last)
    bar.close()
    return learner, scores | {
        "steps": learner.steps,
        "best": best,
        "interrupted": learner.steps < cfg.steps,
    }


def draw(cfg: DictConfig, learner: TrainStep, evaluate: Evaluator, folder: RunFolder) -> None:
    """Learning curves, and in a maze the learned V with a few evaluation trajectories."""
    if folder.metrics.exists():
        plots.learning_curves(folder.metrics, folder.path / "learning_curves.png")
    maze = getattr(evaluate.envs[0].unwrapped, "maze", None)
    if maze is None or learner.steps < cfg.steps:
        return
    value = learner.loss.get_stateful_net("value_network").eval()
    policy = learner.loss.get_stateful_net("actor_network")

    @torch.no_grad()
    def v(observations: np.ndarray) -> np.ndarray:
        batch = torch.as_tensor(observations, device=cfg.compute.device)
        return value(batch).squeeze(-1).cpu().numpy()

    trajectories = evaluate(policy, keep_trajectories=True).trajectories
    plots.value_map(v, maze, trajectories[:5], folder.path / "value_map.png")


def run(cfg: DictConfig, path: Path) -> dict[str, Any]:
    """One run in a folder, continued if the folder holds a part of it.

    Returns:
        what ``scores.json`` holds: the data set, the seed, and the scores of ``iql`` and ``cloning``.
    """
    if cfg.compute.threads is not None:
        torch.set_num_threads(cfg.compute.threads)
    torch.set_float32_matmul_precision(cfg.compute.matmul_precision)
    torch.use_deterministic_algorithms(cfg.compute.device == "cpu")
    source = pointmaze.ensure_dataset() if cfg.dataset == "pointmaze" else cfg.dataset
    dataset = load_dataset(source, reward=cfg.reward, episodes=cfg.episodes)
    print(
        f"{dataset.name}: {len(dataset.transitions)} transitions in "
        f"{len(dataset.episode_lengths)} episodes, mean return {dataset.episode_returns.mean():.1f}"
    )
    if dataset.env_spec is None:
        raise ValueError(f"{dataset.name} does not name the environment to evaluate in")
    folder = RunFolder(path, cfg.logger.backend)
    OmegaConf.save(cfg, path / "config.yaml", resolve=True)
    scores: dict[str, Any] = {"dataset": dataset.name, "seed": cfg.seed}
    with Evaluator(
        dataset.env_spec,
        episodes=cfg.eval_episodes,
        seed=10_000 + cfg.seed,  # away from the seeds that data sets are made with
        reference_scores=dataset.reference_scores,
    ) as evaluate:
        learner, scores["iql"] = train(
            cfg, dataset, evaluate, folder, name="IQL", temperature=cfg.temperature
        )
        if cfg.compare_with_cloning and not scores["iql"]["interrupted"]:
            _, scores["cloning"] = train(
                cfg, dataset, evaluate, RunFolder(path / "cloning"), name="BC", temperature=0.0
            )
        draw(cfg, learner, evaluate, folder)
    folder.write_json("scores.json", scores)
    return scores


def report(scores: dict[str, Any], path: str) -> str:
    """What the user reads at the end."""
    lines = []
    for key, name in (("iql", "IQL"), ("cloning", "behaviour cloning")):
        if "score" in scores.get(key, {}):
            result = scores[key]
            kind = "normalized score" if "normalized_score" in result else "return"
            lines.append(
                f"{name}: {kind} {result['score']:.1f} after {result['steps']} steps "
                f"(best {result['best']['score']:.1f} at step {result['best']['step']})"
            )
    if any(scores.get(key, {}).get("interrupted") for key in ("iql", "cloning")):
        lines.append(f"Interrupted. Continue with: python recipes/offline.py resume={path}")
    lines += [
        f"Results: {path} (scores.json, metrics.csv, *.png, last.ckpt, best.ckpt)",
        f"Load the policy: torchrl_iql.load_policy({path + '/last.ckpt'!r})",
    ]
    return "\n".join(lines)


@hydra.main(config_path="config", config_name="offline", version_base="1.3")
def main(cfg: DictConfig) -> None:
    path = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is not None:
        path.rmdir()  # Hydra's, empty
        path = Path(cfg.resume)
        if not (path / "config.yaml").exists():
            raise FileNotFoundError(f"resume={cfg.resume!r}: that folder has no config.yaml")
        cfg = OmegaConf.load(path / "config.yaml")
    scores = run(cfg, path)
    print(report(scores, os.path.relpath(path)))


if __name__ == "__main__":
    main()
