"""Learning from an environment: after an offline phase, from a checkpoint of one, or from scratch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from tqdm import tqdm

from torchrl_iql import OfflineDataset, checkpoint
from torchrl_iql.online import Experience, behavior, collecting, environment, transitions
from torchrl_iql_recipes.experiment import build, nonfinite, offline, progress, results
from torchrl_iql_recipes.experiment.evaluations import Evaluations
from torchrl_iql_recipes.experiment.folder import StopSignal
from torchrl_iql_recipes.experiment.networks import architecture_for, architecture_of
from torchrl_iql_recipes.experiment.records import Records, Times
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings

__all__ = ["FineTuning", "report", "run"]


def run(settings: Settings, path: Path) -> dict[str, Any]:
    """Do one run in a folder, continued if the folder holds a part of it.

    Returns:
        what ``scores.json`` holds.
    """
    _require_one_learner(settings)
    build.set_up(settings.compute)
    dataset = dataset_for(settings)
    if len(dataset.transitions) and not settings.has_offline_phase():
        print(offline.describe(dataset))
    start = settings.training.checkpoint and Path(settings.training.checkpoint)
    last = path / "last.ckpt"
    if last.exists():
        frames = checkpoint.load_metadata(last).get("frames", 0)  # 0: saved by an earlier version
        build.check_not_done("env_steps", settings.online.env_steps, frames)
    if settings.has_offline_phase():
        start = path / "offline/last.ckpt"
        if not last.exists():
            build.claim(path, settings)
            learned = offline.run(_offline(settings), path / "offline")
            if learned["replicas"][0]["interrupted"]:
                known = (learned[key] for key in ("dataset", "replicas", "data"))
                return results.write(path, settings, *known)
    known = last if last.exists() else start
    if known is None:
        architecture = architecture_for(settings.networks, dataset)
    else:
        architecture = architecture_of(known, dataset)
    with build.evaluations_for(settings, dataset, architecture) as evaluations:
        build.claim(path, settings)
        its = FineTuning(settings, dataset, architecture, evaluations, path, start)
        times = Times(path, its.step)
        with its.records, nonfinite.told(settings, path, its._save):
            its.train()
        times.write(evaluations)
        its.draw()
    return results.write(path, settings, dataset.name, [its.outcome()], results.rules(dataset))


def _require_one_learner(settings: Settings) -> None:
    if len(settings.learners) > 1:
        names = [learner.name for learner in settings.learners]
        raise SettingsError(f"one learner is fine-tuned, but these are {names}: give one value")


def _offline(settings: Settings) -> Settings:
    """Return the settings of the offline phase, as offline.py has them."""
    online = {*type(settings.online).model_fields, settings.collector.group}
    values = {key: value for key, value in settings.values.items() if key not in online}
    return Settings.of(values)


def dataset_for(settings: Settings) -> OfflineDataset:
    """Load the offline transitions; from scratch, none."""
    data = settings.data
    if data.n_steps > 1:
        raise SettingsError(f"n_steps={data.n_steps}: transitions are collected one by one, give 1")
    if data.columns:
        raise SettingsError(f"columns={list(data.columns)}: are not collected, give none")
    if data.dataset is not None:
        dataset = build.dataset_for(data)
        if dataset.env_spec is None:
            raise SettingsError(f"{dataset.name} does not name an environment: give env=<id>")
        learned = build.learned_from(settings, dataset)
        stored, used = (set(each.transitions.keys(True, True)) for each in (dataset, learned))
        if used != stored:
            raise SettingsError(
                f"algorithm={settings.values['algorithm']} learns from {sorted(map(str, used - stored))}, "
                "which are not collected: it is for offline.py"
            )
        return learned
    env = build.environment(data.env)
    if env is None:
        raise SettingsError("without a data set there is no environment: give env=<id>")
    if settings.networks.normalize_observation and settings.training.checkpoint is None:
        raise SettingsError(
            "normalize_observation=true needs the statistics of a data set: from scratch, give false"
        )
    return OfflineDataset.empty(env, reward_rule=data.reward, episode_rule=data.episodes)


class FineTuning:
    """One learner, the transitions it has collected so far, and how it scored before.

    Args:
        settings: of the run.
        dataset: the offline transitions.
        architecture: of the networks.
        evaluations: plays with the policy.
        path: of the run.
        start: the checkpoint to begin with; None from scratch.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: OfflineDataset,
        architecture: Any,
        evaluations: Evaluations | None,
        path: Path,
        start: Path | None,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.evaluations = evaluations
        online = settings.online
        self.experience = Experience(
            dataset,
            online.env_steps,
            settings.training.batch_size,
            offline_share=online.offline_share,
            anneal_steps=online.anneal_steps,
            device=settings.compute.device,
        )
        # Offline, the policy's learning rate may have been decayed; online, it is constant.
        learners = [
            dataclasses.replace(
                each, algorithm=each.algorithm.model_copy(update={"decay_steps": 0})
            )
            for each in settings.learners
        ]
        on_nonfinite = settings.training.on_nonfinite
        self.step = build.step_for(
            learners, architecture, dataset, settings.compute, 0, on_nonfinite
        )
        self.records = Records(path, settings, self.step, architecture, dataset.name)
        (self.folder,) = self.records.folders
        self.policy = architecture.policy_network().eval()  # acts, on the CPU
        self.before: dict[str, float] | None = None
        self.switch = 0
        self._start = start
        self._episodes: list[tuple[float, int]] = []  # return and length, since the last line
        saved = self.records.resume({"experience": self.experience})
        if saved is not None:
            self.before, self.switch = saved["before"], saved["switch"]
        elif start is not None:
            checkpoint.load_learner(start, self.step, keep=("settings", "random"))
            self.switch = self.step.steps

    @property
    def frames(self) -> int:
        """Environment steps taken so far."""
        return len(self.experience)

    def train(self) -> None:
        """Collect and learn in turns until all is done, evaluating and saving on the way.

        Ctrl-C saves a checkpoint and ends the training; a second one stops at once.

        Raises:
            RuntimeError: a worker died or the environment failed; a checkpoint is saved before.
            NonFiniteError: a gradient step is not finite. Nothing of it is logged, acts or is saved.
        """
        env_steps = self.settings.online.env_steps
        with (
            StopSignal() as stop,
            progress.bar("online", self.frames, env_steps) as bar,
        ):
            if self.evaluations is not None and self.before is None:
                self.records.evaluate(self.evaluations)
                self.records.evaluated(self.evaluations, wait=True)
                assert self.records.latest is not None
                self.before = self.records.latest[0].summary()
                self._save()
            if self.frames < env_steps:
                with self._collecting() as collector:
                    self._train_with(collector, stop, bar)
            else:
                self.records.evaluate(self.evaluations)
            self.records.evaluated(self.evaluations, wait=True)
        if stop.requested:
            self._save()

    def _train_with(self, collector: BaseCollector, stop: StopSignal, bar: tqdm) -> None:
        settings, batches = self.settings, iter(collector)
        while self.frames < settings.online.env_steps and not stop.requested:
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
            self.records.evaluated(self.evaluations)
            if metrics is not None and self._reached(settings.training.log_interval, start):
                bar.set_postfix_str(self.records.log(metrics, **self._collected()))
            if self._reached(settings.evaluation.eval_interval, start):
                self.records.evaluate(self.evaluations)
                self._save()

    def _reached(self, interval: int, start: int) -> bool:
        """Return whether the last batch of frames passed a multiple of the interval, or the end."""
        end = self.settings.online.env_steps
        return self.frames // interval > start // interval or self.frames == end

    def _collecting(self) -> AbstractContextManager[BaseCollector]:
        online, dataset = self.settings.online, self.dataset
        self._load_policy()
        return collecting(
            partial(
                environment,
                dataset.env_spec,  # pyright: ignore
                reward_transform=dataset.reward_transform,
                episode_rule=dataset.episode_rule,
            ),
            behavior(self.policy, dataset.action_space, noise=online.exploration),
            total_frames=online.env_steps - self.frames,
            explore=online.exploration > 0,
            seed=self.settings.learners[0].seed + self.frames,
            **self.settings.collector.model_dump(exclude_none=True),
        )

    def _load_policy(self) -> None:
        """Copy what was learned into the policy that acts."""
        self.policy.load_state_dict(self.records.policies()[0])

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
        """Add what was collected to the experience, and ended episodes to the statistics."""
        self.experience.extend(rows[: self.settings.online.env_steps - self.frames])
        done = collected["next", "done"]
        outcomes = (collected["next", key][done] for key in ("episode_reward", "step_count"))
        self._episodes += zip(*(each.tolist() for each in outcomes), strict=True)

    def _update(self) -> TensorDictBase | None:
        """Take the gradient steps that are due; return the metrics of the last one."""
        due = self.switch + int(self.frames * self.settings.online.updates_per_frame)
        if self.step.steps >= due:
            return None
        while self.step.steps < due:
            self.step(self.experience.sample())
        return self.step.check_finite()

    def _collected(self) -> dict[str, float]:
        """Return what is logged of the frames since the last time."""
        metrics = {"frames": self.frames, "offline_share": self.experience.offline_share}
        if self._episodes:
            returns, lengths = zip(*self._episodes, strict=True)
            metrics |= {"episode_return": mean(returns), "episode_length": mean(lengths)}
            self._episodes.clear()
        return metrics

    def _save(self) -> None:
        parts = {"experience": self.experience}
        self.records.save(parts, before=self.before, switch=self.switch, frames=self.frames)

    # --- Results -----------------------------------------------------------------------------------------

    def outcome(self) -> dict[str, Any]:
        """Return what ``scores.json`` says of the learner."""
        latest = self.records.latest and self.records.latest[0]
        return results.outcome(
            self.settings.learners[0],
            latest,
            steps=self.step.steps,
            interrupted=self.frames < self.settings.online.env_steps,
            best=self.folder.best_score(),
            frames=self.frames,
            before=self.before,
            after=latest.summary() if latest else None,
        )

    def draw(self) -> None:
        """Draw as offline, with the curves of the offline run, and a line where this one begins."""
        earlier = {}
        if self.switch and self._start is not None:
            earlier = {
                "earlier": self._start.with_name("metrics.csv"),
                "switch": self.switch,
            }
        self.records.draw(self.evaluations, **earlier)


def _continue(path: Path) -> str:
    return f"python recipes/online.py resume={os.path.relpath(path)}"


def report(scores: dict[str, Any], path: Path) -> str:
    """Write what the user reads at the end."""
    (learner,) = scores["replicas"]
    lines = []
    if learner.get("after"):
        before, after = learner["before"]["score"], learner["after"]["score"]
        name = "normalized score" if "normalized_score" in learner["after"] else "return"
        lines.append(f"{name}: {before:.1f} before, {after:.1f} after {learner['frames']} steps")
    if learner["interrupted"]:
        lines.append(f"Interrupted. Continue with: {_continue(path)}")
    shown = os.path.relpath(path)
    lines.append(f"Results: {shown} (scores.json, times.json, metrics.csv, *.png, *.ckpt)")
    return "\n".join(lines)
