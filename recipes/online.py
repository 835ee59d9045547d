r"""Fine-tune online what was learned offline, or learn online from scratch.

    python recipes/online.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt
    python recipes/online.py 'checkpoint="runs/pointmaze/stitch/<date>/temperature=10.0/last.ckpt"'
    python recipes/online.py task=mini/antmaze-umaze collector=multi_async
    python recipes/online.py dataset=null env=Pendulum-v1 reward=none episodes=as_stored \
        normalize_observation=false temperature=3
    python recipes/online.py resume=runs/online/<date>

A run has one learner, and leaves in its folder what an offline run leaves of each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
import offline
import plots
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from run_folder import StopSignal, resumed
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from tqdm import tqdm

from torchrl_iql import Evaluator, OfflineDataset, checkpoint
from torchrl_iql.models import Architecture
from torchrl_iql.online import (
    Experience,
    behavior,
    check_mixture,
    collecting,
    environment,
    transitions,
)

ONLINE = (
    "checkpoint",
    "env_steps",
    "updates_per_frame",
    "exploration",
    "offline_share",
    "anneal_steps",
    "collector",
)
"""The settings that offline runs do not have."""

NOT_FROM_CHECKPOINT = {*ONLINE, "task", "compute", "logger", "resume"}
"""The others say what was learned, and how."""


def with_settings_of_checkpoint(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """The configuration, with every setting of the offline run that is not overridden.

    Args:
        cfg: As composed by Hydra, with a checkpoint.
        overrides: What the user gave on the command line, as ``"expectile=0.8"``.

    Raises:
        ValueError: If the checkpoint has no settings, or an override contradicts its networks.
    """
    saved = checkpoint.load_metadata(cfg.checkpoint)
    if "config" not in saved:
        raise ValueError(f"{cfg.checkpoint} does not hold the settings of its run: train it anew")
    given = {each.partition("=")[0].lstrip("+").partition(".")[0] for each in overrides}
    networks = {field.name for field in fields(Architecture)}
    if fixed := sorted(given & networks):
        raise ValueError(f"{', '.join(fixed)}: the checkpoint has networks of its own")
    if "task" in given:
        given |= set(cfg.task) - networks
    left = given | NOT_FROM_CHECKPOINT
    taken = {key: value for key, value in saved["config"].items() if key not in left}
    taken["checkpoint"] = str(Path(cfg.checkpoint).resolve())  # the run may be resumed elsewhere
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    return OmegaConf.merge(resolved, taken)  # pyright: ignore


def dataset_for(cfg: DictConfig) -> OfflineDataset:
    """The offline transitions; from scratch, none."""
    if cfg.dataset is not None:
        dataset = offline.dataset_for(cfg)
        if dataset.env_spec is None:
            raise ValueError(f"{dataset.name} does not name an environment: give env=<id>")
        return dataset
    env = offline.environment(cfg.env)
    if env is None:
        raise ValueError("without a data set there is no environment: give env=<id>")
    if cfg.normalize_observation and cfg.checkpoint is None:
        raise ValueError(
            "normalize_observation=true needs the statistics of a data set: from scratch, give false"
        )
    return OfflineDataset.empty(env, reward_rule=cfg.reward, episode_rule=cfg.episodes)


class Run(offline.Run):
    """One learner, the transitions it has collected so far, and how it scored before."""

    def __init__(
        self, cfg: DictConfig, dataset: OfflineDataset, evaluate: Evaluator | None, path: Path
    ) -> None:
        # What a checkpoint of this run restores.
        self.experience = Experience(
            dataset,
            cfg.env_steps,
            cfg.batch_size,
            offline_share=cfg.offline_share,
            anneal_steps=cfg.anneal_steps,
            device=cfg.compute.device,
        )
        self.before: dict[str, float] | None = None
        self.switch = 0
        # Offline, the policy's learning rate may have been decayed; online, it is constant.
        constant = OmegaConf.merge(cfg, {"decay_actor": False})
        last = path / "last.ckpt"
        known = last if last.exists() else cfg.checkpoint
        if known is None:
            architecture = offline.architecture_for(cfg, dataset)
        else:
            architecture = checkpoint.load_architecture(known)
        super().__init__(constant, dataset, architecture, evaluate, path)  # pyright: ignore
        (self.folder,) = self.folders
        if cfg.checkpoint is not None and known is not last:
            checkpoint.load_learner(cfg.checkpoint, self.learner)
            self.switch = self.learner.steps
        self.policy.eval()
        self.episodes: list[tuple[float, int]] = []  # return and length, since the last line

    @property
    def frames(self) -> int:
        """Environment steps taken so far."""
        return len(self.experience)

    def train(self) -> None:
        """Collects and learns in turns until all is done, evaluating and saving on the way.

        Ctrl-C saves a checkpoint and ends the training; a second one stops at once.

        Raises:
            RuntimeError: If a worker died or the environment failed; a checkpoint is saved before.
        """
        with (
            StopSignal() as stop,
            tqdm(total=self.cfg.env_steps, initial=self.frames, desc="online", unit="step") as bar,
        ):
            if self.evaluate is not None and self.before is None:
                self._evaluate(self.evaluate)
                assert self.evaluations is not None
                self.before = self.evaluations[0].summary()
            if self.frames < self.cfg.env_steps:
                with self._collecting() as collector:
                    self._train_with(collector, stop, bar)
            elif self.evaluate is not None:
                self._evaluate(self.evaluate)
        if stop.requested:
            self._save()

    def _train_with(self, collector: BaseCollector, stop: StopSignal, bar: tqdm) -> None:
        cfg, batches = self.cfg, iter(collector)
        while self.frames < cfg.env_steps and not stop.requested:
            start = self.frames
            with self._saved_on_failure():
                collected = next(batches)
                rows = transitions(collected, self.dataset.transitions, first_step=start)
            self._add(collected, rows)
            metrics = self._update()
            self._load_policy()
            with self._saved_on_failure():
                collector.update_policy_weights_()  # pyright: ignore
            bar.update(self.frames - start)
            if metrics is not None and self._reached(cfg.log_interval, start):
                self._log(metrics, bar, **self._collected())
            if self._reached(cfg.eval_interval, start):
                if self.evaluate is not None:
                    self._evaluate(self.evaluate)
                self._save()

    def _reached(self, interval: int, start: int) -> bool:
        """Whether a multiple of the interval, or the end, lies behind the last batch of frames."""
        return self.frames // interval > start // interval or self.frames == self.cfg.env_steps

    def _collecting(self) -> AbstractContextManager[BaseCollector]:
        cfg, dataset = self.cfg, self.dataset
        self._load_policy()
        return collecting(
            partial(
                environment,
                dataset.env_spec,  # pyright: ignore
                reward_transform=dataset.reward_transform,
                episode_rule=dataset.episode_rule,
            ),
            behavior(self.policy, dataset.action_space, noise=cfg.exploration),
            total_frames=cfg.env_steps - self.frames,
            explore=cfg.exploration > 0,
            seed=self.settings[0]["seed"] + self.frames,
            **OmegaConf.to_container(cfg.collector),  # pyright: ignore
        )

    def _load_policy(self) -> None:
        """Copies what was learned into the policy that acts, which is on the CPU."""
        self.policy.load_state_dict(self._network(0, "actor").state_dict())

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the environment, of a worker that died, of Ray
            self._save()
            raise RuntimeError(
                f"collecting failed after {self.frames} environment steps: {error}\n"
                f"All of them are saved; continue with: {_continue(self.folder.path)}"
            ) from error

    def _add(self, collected: TensorDictBase, rows: TensorDictBase) -> None:
        """Adds what was collected to the experience, and the episodes that ended to the statistics."""
        self.experience.extend(rows[: self.cfg.env_steps - self.frames])
        done = collected["next", "done"]
        outcomes = (collected["next", key][done] for key in ("episode_reward", "step_count"))
        self.episodes += zip(*(each.tolist() for each in outcomes), strict=True)

    def _update(self) -> TensorDictBase | None:
        """Takes the gradient steps that are due; the metrics of the last one."""
        metrics = None
        due = self.switch + int(self.frames * self.cfg.updates_per_frame)
        while self.learner.steps < due:
            metrics = self.learner(self.experience.sample())
        return metrics

    def _collected(self) -> dict[str, float]:
        """What is logged of the frames since the last time."""
        metrics = {"frames": self.frames, "offline_share": self.experience.offline_share}
        if self.episodes:
            returns, lengths = zip(*self.episodes, strict=True)
            metrics |= {"episode_return": mean(returns), "episode_length": mean(lengths)}
            self.episodes.clear()
        return metrics

    # --- Checkpoints ---------------------------------------------------------------------------------

    def _save(self) -> None:
        self._save_replica(
            0,
            self.folder.last,
            components={"experience": self.experience},
            before=self.before,
            switch=self.switch,
        )

    def _resume(self) -> None:
        (folder,) = self.folders
        parts = {"experience": self.experience}
        saved = checkpoint.load_learner(folder.last, self.learner, components=parts)
        self.best, self.before, self.switch = [saved["best"]], saved["before"], saved["switch"]
        folder.forget_after(self.learner.steps)

    # --- Results -------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """What ``scores.json`` says."""
        return {
            "dataset": self.dataset.name,
            **{key: self.settings[0][key] for key in offline.VARIABLE},
            "before": self.before,
            "after": self.evaluations[0].summary() if self.evaluations else None,
            "best": self.best[0],
            "steps": self.learner.steps,
            "frames": self.frames,
            "interrupted": self.frames < self.cfg.env_steps,
        }

    def draw(self) -> None:
        """As offline, with the curves of the offline run, and a line where this one begins."""
        super().draw()
        if self.switch and self.folder.metrics.exists():
            plots.learning_curves(
                self.folder.metrics,
                self.folder.path / "learning_curves.png",
                earlier=Path(self.cfg.checkpoint).with_name("metrics.csv"),
                switch=self.switch,
            )


def _continue(path: Path) -> str:
    return f"python recipes/online.py resume={os.path.relpath(path)}"


def run(cfg: DictConfig, path: Path) -> dict[str, Any]:
    """One run in a folder, continued if the folder holds a part of it.

    Returns:
        what ``scores.json`` holds.
    """
    learners = [each["name"] for each in offline.replicas(cfg)]
    if len(learners) > 1:
        raise ValueError(f"one learner is fine-tuned, but these are {learners}: give one value")
    check_mixture(cfg.offline_share, cfg.anneal_steps)
    for key, least in (("env_steps", 1), ("updates_per_frame", 0), ("exploration", 0)):
        if cfg[key] < least:
            raise ValueError(f"{key}={cfg[key]}: expected at least {least}")
    path.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, path / "config.yaml", resolve=True)
    if cfg.checkpoint is None and cfg.dataset is not None and cfg.steps > 0:
        cfg = OmegaConf.merge(cfg, {"checkpoint": str(path / "offline/last.ckpt")})  # pyright: ignore
        if not (path / "last.ckpt").exists():
            (learned,) = offline.run(cfg, path / "offline")["replicas"]
            if learned["interrupted"]:
                return {"interrupted": True, "frames": 0}
    offline.prepare(cfg)
    dataset = dataset_for(cfg)
    with offline.evaluator_for(cfg, dataset) as evaluate:
        its = Run(cfg, dataset, evaluate, path)
        its.train()
        its.draw()
    scores = its.result()
    (path / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def report(scores: dict[str, Any], path: Path) -> str:
    """What the user reads at the end."""
    lines = []
    if scores.get("after"):
        before, after = scores["before"]["score"], scores["after"]["score"]
        name = "normalized score" if "normalized_score" in scores["after"] else "return"
        lines.append(f"{name}: {before:.1f} before, {after:.1f} after {scores['frames']} steps")
    if scores["interrupted"]:
        lines.append(f"Interrupted. Continue with: {_continue(path)}")
    lines.append(f"Results: {os.path.relpath(path)} (scores.json, metrics.csv, *.png, *.ckpt)")
    return "\n".join(lines)


@hydra.main(config_path="config", config_name="online", version_base="1.3")
def main(cfg: DictConfig) -> None:
    path = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is not None:
        path, cfg = resumed(cfg.resume, path)
    elif cfg.checkpoint is not None:
        cfg = with_settings_of_checkpoint(cfg, HydraConfig.get().overrides.task)
    print(report(run(cfg, path), path))


if __name__ == "__main__":
    main()
