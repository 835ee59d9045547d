"""Train IQL on an offline data set, one learner or many at once.

With no argument: the embedded maze data, made on first use, IQL beside behaviour cloning.

    python recipes/offline.py
    python recipes/offline.py task=locomotion/hopper-medium-replay 'seeds=[0,1,2,3]'
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import collect
import gymnasium
import hydra
import numpy as np
import plots
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete, flatdim
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from run_folder import RunFolder, StopSignal, resumed
from scipy.stats import t as student_t
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tqdm import tqdm

from torchrl_iql import (
    DiscreteIQLLoss,
    Evaluation,
    Evaluator,
    IQLLoss,
    OfflineDataset,
    TrainStep,
    checkpoint,
    load_dataset,
)
from torchrl_iql.models import Architecture
from torchrl_iql.training import cosine_decay

VARIABLE = ("expectile", "temperature", "learning_rate", "discount", "seed")
"""What may differ between the learners of a run."""

EVALUATION_SEED = 10_000
"""Plus the seed of the learner: away from the seeds that data are made with."""

STEPS_PER_CALL = 100
"""Gradient steps between two looks at Ctrl-C."""


def dataset_for(cfg: DictConfig) -> OfflineDataset:
    """The transitions to train on, made or downloaded if they are not there."""
    if cfg.dataset is None:
        raise ValueError("dataset=null: expected a Minari id, a folder or a D4RL file, or several")
    sources = list(cfg.dataset) if isinstance(cfg.dataset, ListConfig) else [cfg.dataset]
    return load_dataset(
        [collect.ensure(source) for source in sources],
        reward=cfg.reward,
        episodes=cfg.episodes,
        env=environment(cfg.env),
    )


def environment(env: DictConfig | str | None) -> EnvSpec | str | None:
    """What the configuration evaluates in: an id, alone or with arguments of ``gymnasium.make``."""
    if not isinstance(env, DictConfig):
        return env
    arguments = OmegaConf.to_container(env, resolve=True)
    if "id" not in arguments:
        raise ValueError(f"env={arguments}: expected an id beside the arguments of gymnasium.make")
    spec = copy.deepcopy(gymnasium.spec(arguments.pop("id")))
    spec.max_episode_steps = arguments.pop("max_episode_steps", spec.max_episode_steps)
    spec.kwargs |= arguments
    return spec


def evaluator_for(
    cfg: DictConfig, dataset: OfflineDataset
) -> AbstractContextManager[Evaluator | None]:
    """The environments that the policies are evaluated in, which the data have to fit.

    Returns:
        an Evaluator, or a context without one for ``eval_episodes`` 0.
    """
    if cfg.eval_episodes == 0:
        return nullcontext()
    if dataset.env_spec is None:
        raise ValueError(
            f"{dataset.name} does not name the environment to evaluate in: give env=<id>, or "
            "eval_episodes=0 to train without one"
        )
    # Where a task is over at its first success, its score is the success rate, as in the paper. The
    # reference returns stored with Minari's mazes count the steps that are spent on the goal.
    references = None if cfg.episodes == "until_success" else dataset.reference_scores
    evaluate = Evaluator(dataset.env_spec, episodes=cfg.eval_episodes, reference_scores=references)
    recorded = _sizes(dataset.transitions["observation"].shape[-1], dataset.action_space)
    played = _sizes(flatdim(evaluate.envs[0].observation_space), evaluate.action_space)
    if recorded != played:
        evaluate.close()
        raise ValueError(
            f"{dataset.name} holds {recorded}, but {evaluate.envs[0].spec.id} has {played}: give "
            "env=<id> of another, env=null for the one that the data set names, or eval_episodes=0"
        )
    return evaluate


def _sizes(observation_size: int, action_space: Space) -> str:
    kind = "choices" if isinstance(action_space, Discrete) else "numbers"
    return (
        f"observations of {observation_size} numbers and actions of {flatdim(action_space)} {kind}"
    )


def architecture_for(cfg: DictConfig, dataset: OfflineDataset) -> Architecture:
    """The networks of the configuration, in the sizes of the data."""
    observation_size = dataset.transitions["observation"].shape[-1]
    space = dataset.action_space
    if isinstance(space, Discrete):
        actions: dict[str, Any] = {"action_size": int(space.n)}
    else:
        data = dataset.transitions["action"]
        bounds = {"space": (space.low.ravel().tolist(), space.high.ravel().tolist())}
        if len(data):
            low, high = data.amin(0), data.amax(0)
            if cfg.action_bounds == "data" and (constant := (low == high).nonzero()).numel():
                column = int(constant[0])
                raise ValueError(
                    f"action_bounds=data: action {column} of {dataset.name} is always {low[column]}; "
                    "give action_bounds=space"
                )
            bounds["data"] = low.tolist(), high.tolist()
        if cfg.action_bounds not in bounds:
            raise ValueError(
                f"action_bounds must be one of {list(bounds)}, got {cfg.action_bounds!r}; 'data' needs "
                "a data set"
            )
        actions = {"action_size": data.shape[-1], "action_bounds": bounds[cfg.action_bounds]}
    return Architecture(
        observation_size=observation_size,
        policy="categorical" if isinstance(space, Discrete) else cfg.policy,
        hidden_sizes=tuple(cfg.hidden_sizes),
        dropout=cfg.dropout,
        num_qvalue_nets=cfg.num_qvalue_nets,
        normalize_observation=cfg.normalize_observation,
        **actions,
    )


def replicas(cfg: DictConfig) -> list[dict[str, Any]]:
    """The learners to train at once: every combination of the seeds and of settings with several values.

    Returns:
        for each its settings, those in ``VARIABLE``, and its ``name``: what distinguishes it.
    """
    given = {
        "expectile": cfg.expectile,
        "temperature": cfg.temperature,
        "learning_rate": cfg.learning_rate,
        "discount": cfg.discount,
        "seed": cfg.seeds,
    }
    grid = {key: list(v) if isinstance(v, ListConfig) else [v] for key, v in given.items()}
    for key, values in grid.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key}: give one value or several different ones, got {values}")
    varied = [key for key, values in grid.items() if len(values) > 1]
    combinations = (dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values()))
    return [
        {"name": ",".join(f"{key}={combination[key]}" for key in varied), **combination}
        for combination in combinations
    ]


def learner_for(
    cfg: DictConfig,
    dataset: OfflineDataset,
    architecture: Architecture,
    settings: list[dict[str, Any]],
) -> TrainStep:
    statistics = dataset.observation_statistics() if len(dataset.transitions) else None
    losses = []
    for each in settings:
        torch.manual_seed(each["seed"])
        networks = architecture.build(statistics)
        kwargs: dict[str, Any] = {
            "num_qvalue_nets": architecture.num_qvalue_nets,
            "expectile": each["expectile"],
            "temperature": each["temperature"],
            "weight_clip": cfg.weight_clip,
        }
        if architecture.discrete:
            loss = DiscreteIQLLoss(*networks, action_space="categorical", **kwargs)
        else:
            loss = IQLLoss(*networks, **kwargs)
        loss.make_value_estimator(gamma=each["discount"])
        losses.append(loss.to(cfg.compute.device))
    return TrainStep(
        losses,
        learning_rate=[each["learning_rate"] for each in settings],
        target_rate=cfg.target_rate,
        schedule={"actor_network": cosine_decay(cfg.steps)} if cfg.decay_actor else {},
        seeds=[each["seed"] for each in settings],
        execution=cfg.compute.execution,
    )


class Run:
    """The replicas of a run, each with a folder of its own, and what they have scored so far."""

    def __init__(
        self,
        cfg: DictConfig,
        dataset: OfflineDataset,
        architecture: Architecture,
        evaluate: Evaluator | None,
        path: Path,
    ) -> None:
        self.cfg = cfg
        self.dataset = dataset
        self.evaluate = evaluate
        self.settings = replicas(cfg)
        self.folders = [
            RunFolder(path / each["name"], cfg.logger.backend) for each in self.settings
        ]
        self.architecture = architecture
        self.policy, _, _ = architecture.build()  # as load_policy will build it
        self.learner = learner_for(cfg, dataset, architecture, self.settings)
        self.best: list[dict[str, Any] | None] = [None] * len(self.settings)
        self.evaluations: list[Evaluation] | None = None
        self.maze = evaluate and getattr(evaluate.envs[0].unwrapped, "maze", None)
        if all(folder.last.exists() for folder in self.folders):
            self._resume()
        else:  # perhaps where another was killed before its first checkpoint
            for folder in self.folders:
                folder.forget_after(-1)

    def train(self) -> None:
        """Takes the gradient steps that are missing, evaluating and saving on the way.

        Ctrl-C saves a checkpoint and ends the training; a second one stops at once.
        """
        cfg, learner = self.cfg, self.learner
        seeds = [each["seed"] for each in self.settings]
        streaming = cfg.compute.streaming
        with (
            self.dataset.minibatches(
                cfg.batch_size, seeds=seeds, device=cfg.compute.device, streaming=streaming
            ) as minibatches,
            StopSignal() as stop,
            tqdm(total=cfg.steps, initial=learner.steps, desc="IQL", unit="step") as bar,
        ):
            while not stop.requested and not self._finished():
                if learner.steps < cfg.steps:
                    steps = self._until_next_event()
                    metrics = learner.run(minibatches, steps)
                    bar.update(steps)
                    if learner.steps % cfg.log_interval == 0:
                        self._log(metrics, bar)
                if learner.steps % cfg.eval_interval == 0 or learner.steps == cfg.steps:
                    if self.evaluate is not None:
                        self._evaluate(self.evaluate)
                    self._save()
        if stop.requested:
            self._save()

    def _finished(self) -> bool:
        evaluated = self.evaluate is None or self.evaluations is not None
        return self.learner.steps >= self.cfg.steps and evaluated

    def _until_next_event(self) -> int:
        done, cfg = self.learner.steps, self.cfg
        intervals = (STEPS_PER_CALL, cfg.log_interval, cfg.eval_interval)
        return min(cfg.steps - done, *(interval - done % interval for interval in intervals))

    def _log(self, metrics: TensorDictBase, bar: tqdm, **common: float) -> None:
        values = {key: value.reshape(-1).tolist() for key, value in metrics.items()}
        values["policy_lr"] = self.learner.learning_rates()["actor_network"]
        for r, folder in enumerate(self.folders):
            own = {key: value[r] for key, value in values.items()}
            folder.log(self.learner.steps, common | own)
        shown = {key[5:]: mean(v) for key, v in values.items() if key.startswith("loss_")}
        if self.evaluations is not None:
            shown["score"] = mean(evaluation.score for evaluation in self.evaluations)
        bar.set_postfix(shown)

    def _evaluate(self, evaluate: Evaluator) -> None:
        self.evaluations = []
        for r, (each, folder) in enumerate(zip(self.settings, self.folders, strict=True)):
            evaluate.seed = EVALUATION_SEED + each["seed"]
            self.policy.load_state_dict(self._network(r, "actor").state_dict())
            evaluation = evaluate(self.policy, keep_trajectories=self.maze is not None)
            self.evaluations.append(evaluation)
            folder.log(
                self.learner.steps, {f"eval/{k}": v for k, v in evaluation.summary().items()}
            )
            best = self.best[r]
            if best is None or evaluation.score > best["score"]:
                self.best[r] = {"score": evaluation.score, "step": self.learner.steps}
                self._save_replica(r, folder.best)

    def _network(self, replica: int, name: str) -> TensorDictModule:
        return self.learner.losses[replica].get_stateful_net(f"{name}_network")

    # --- Checkpoints ---------------------------------------------------------------------------------

    def _save_replica(self, replica: int, path: Path, **more: Any) -> Path:
        config = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(config, dict)
        settings = {key: self.settings[replica][key] for key in VARIABLE}
        # As of a run with this learner alone.
        config |= {"seeds" if key == "seed" else key: value for key, value in settings.items()}
        metadata = {
            "best": self.best[replica],
            "dataset": self.dataset.name,
            "config": config,
        }
        return checkpoint.save(
            path, self.learner, self.architecture, replica=replica, **metadata, **more
        )

    def _save(self) -> None:
        """Replaces the last checkpoints of all replicas together."""
        new = [
            self._save_replica(r, folder.last.with_suffix(".new"))
            for r, folder in enumerate(self.folders)
        ]
        for path, folder in zip(new, self.folders, strict=True):
            path.replace(folder.last)

    def _resume(self) -> None:
        steps = set()
        for r, folder in enumerate(self.folders):
            saved = checkpoint.load_learner(folder.last, self.learner, replica=r)
            self.best[r] = saved["best"]
            steps.add(self.learner.steps)
        if len(steps) > 1:
            raise ValueError(
                f"the checkpoints of the replicas are from different steps, {sorted(steps)}: the run "
                "was killed while it replaced them, and cannot be continued"
            )
        for folder in self.folders:
            folder.forget_after(self.learner.steps)

    # --- Results -------------------------------------------------------------------------------------

    def scores(self) -> list[dict[str, Any]]:
        """What ``scores.json`` says of each replica."""
        state = {"steps": self.learner.steps, "interrupted": self.learner.steps < self.cfg.steps}
        results = [each.summary() for each in self.evaluations or []] or [{} for _ in self.settings]
        return [
            {**each, **result, **state, "best": best}
            for each, result, best in zip(self.settings, results, self.best, strict=True)
        ]

    def draw(self) -> None:
        """Learning curves, and in a maze the learned V with a few evaluation trajectories."""
        for r, folder in enumerate(self.folders):
            if folder.metrics.exists():
                plots.learning_curves(folder.metrics, folder.path / "learning_curves.png")
            if self.maze is not None and self.evaluations is not None:
                trajectories = self.evaluations[r].trajectories or []
                picture = folder.path / "value_map.png"
                plots.value_map(self._value_function(r), self.maze, trajectories[:5], picture)

    def _value_function(self, replica: int) -> Callable[[np.ndarray], np.ndarray]:
        value = self._network(replica, "value").eval()

        @torch.no_grad()
        def v(observations: np.ndarray) -> np.ndarray:
            batch = torch.as_tensor(observations, device=self.learner.device)
            return value(batch).squeeze(-1).cpu().numpy()

        return v


def summaries(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean score over the seeds for each combination of the other settings.

    Returns:
        for each: the settings, the number of ``seeds``, the mean ``score``, and half the width of its
        95% confidence interval (Student's t), ``ci95``, None for a single seed.
    """
    groups: dict[tuple, list[float]] = {}
    for each in scores:
        settings = tuple((key, each[key]) for key in VARIABLE if key != "seed")
        groups.setdefault(settings, []).append(each["score"])
    rows = []
    for settings, values in groups.items():
        seeds = len(values)
        quantile = student_t.ppf(0.975, seeds - 1) if seeds > 1 else None
        ci95 = None if quantile is None else float(quantile * stdev(values) / math.sqrt(seeds))
        rows.append({**dict(settings), "seeds": seeds, "score": mean(values), "ci95": ci95})
    return rows


def prepare(cfg: DictConfig) -> None:
    """Sets PyTorch up for a run."""
    if cfg.compute.threads is not None:
        torch.set_num_threads(cfg.compute.threads)
    torch.set_float32_matmul_precision(cfg.compute.matmul_precision)
    torch.use_deterministic_algorithms(cfg.compute.device == "cpu")


def run(cfg: DictConfig, path: Path) -> dict[str, Any]:
    """One run in a folder, continued if the folder holds a part of it.

    Returns:
        what ``scores.json`` holds: the data set, the scores of each of the ``replicas``, and the
        ``summary`` over seeds.
    """
    prepare(cfg)
    dataset = dataset_for(cfg)
    print(
        f"{dataset.name}: {len(dataset.transitions)} transitions in "
        f"{len(dataset.episode_lengths)} episodes, mean return {dataset.episode_returns.mean():.1f}; "
        f"environment: {dataset.env_spec and dataset.env_spec.id}"
    )
    with evaluator_for(cfg, dataset) as evaluate:
        its = Run(cfg, dataset, architecture_for(cfg, dataset), evaluate, path)
        OmegaConf.save(cfg, path / "config.yaml", resolve=True)
        its.train()
        its.draw()
    scores: dict[str, Any] = {"dataset": dataset.name, "replicas": its.scores()}
    if its.evaluations is not None:
        scores["summary"] = summaries(scores["replicas"])
    (path / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def report(scores: dict[str, Any], path: str) -> str:
    """What the user reads at the end."""
    replicas, rows = scores["replicas"], scores.get("summary", [])
    score = "normalized score" if "normalized_score" in replicas[0] else "return"
    lines = []
    for row in rows:
        varied = [k for k in VARIABLE if k in row and len({other[k] for other in rows}) > 1]
        name = ", ".join(f"{key}={row[key]:g}" for key in varied) or "IQL"
        name += " (behaviour cloning)" if row["temperature"] == 0 else ""
        seeds = (
            "one seed" if row["seeds"] == 1 else f"± {row['ci95']:.1f}, 95% of {row['seeds']} seeds"
        )
        lines.append(f"{name}: {score} {row['score']:.1f} ({seeds})")
    if replicas[0]["interrupted"]:
        lines.append(
            f"Interrupted after {replicas[0]['steps']} steps. "
            f"Continue with: python recipes/offline.py resume={path}"
        )
    elif not rows:
        lines.append("Not evaluated (eval_episodes=0).")
    policy = Path(path, replicas[0]["name"], "last.ckpt")
    lines += [
        f"Results: {path} (scores.json, and for each learner metrics.csv, *.png, *.ckpt)",
        f"Load a policy: torchrl_iql.load_policy({str(policy)!r})",
    ]
    return "\n".join(lines)


@hydra.main(config_path="config", config_name="offline", version_base="1.3")
def main(cfg: DictConfig) -> None:
    path = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is not None:
        path, cfg = resumed(cfg.resume, path)
    scores = run(cfg, path)
    print(report(scores, os.path.relpath(path)))


if __name__ == "__main__":
    main()
