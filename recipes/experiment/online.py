"""Learning from an environment: after an offline phase, from a checkpoint of one, or from scratch."""

from __future__ import annotations

import dataclasses
import math
import signal
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from tqdm import tqdm

from torchrl_iql import OfflineDataset, checkpoint
from torchrl_iql.environments import time_limit_of
from torchrl_iql.models import Architecture
from torchrl_iql.online import Experience, behavior, collecting, environment, transitions
from torchrl_iql_recipes.commands import label
from torchrl_iql_recipes.experiment import (
    build,
    learned_from,
    nonfinite,
    offline,
    progress,
    results,
)
from torchrl_iql_recipes.experiment.diagnosis import FALLEN
from torchrl_iql_recipes.experiment.evaluations import Evaluations
from torchrl_iql_recipes.experiment.lock import held
from torchrl_iql_recipes.experiment.networks import architecture_for, architecture_of
from torchrl_iql_recipes.experiment.records import Records
from torchrl_iql_recipes.experiment.schema import SettingsError, rounded
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.stopping import Stop, stoppable
from torchrl_iql_recipes.experiment.validation import HeldOut, hold_out
from torchrl_iql_recipes.files import shown

__all__ = ["FineTuning", "report", "run"]

ROUND = 5_000
"""Environment steps between two times that the environments begin anew, where checkpoints can be."""


def run(settings: Settings, path: Path) -> dict[str, Any]:
    """Do one run in a folder, continued if the folder holds a part of it.

    Returns, raises and is ended as :func:`torchrl_iql_recipes.experiment.offline.run`.
    """
    with held(path), stoppable():
        return _run(settings, path)


def _run(settings: Settings, path: Path) -> dict[str, Any]:
    _require_one_learner(settings)
    build.set_up(settings.compute)
    dataset, held_out = data_for(settings)
    if len(dataset.transitions) and not settings.has_offline_phase():
        print(offline.describe(dataset, held_out))
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
        architecture = architecture_for(settings.networks, dataset, settings.algorithm)
    else:
        architecture = architecture_of(known, dataset, settings.networks)
    _require_noise(settings.online.exploration, architecture)
    with build.evaluations_for(settings, dataset, architecture) as evaluations:
        is_from_scratch = not len(dataset.transitions)
        data = None if is_from_scratch else learned_from.summary(dataset, dataset, held_out)
        build.claim(path, settings, data)
        its = FineTuning(settings, dataset, architecture, evaluations, path, start, held_out)
        its.train()
        outcome, rules = its.outcome(), results.rules(dataset)
        scores = results.write(path, settings, dataset.name, [outcome], rules)
        its.draw()
    return scores


def _require_one_learner(settings: Settings) -> None:
    if len(settings.learners) > 1:
        names = [learner.name for learner in settings.learners]
        raise SettingsError(f"one learner is fine-tuned, but these are {names}: give one value")


def _require_noise(exploration: float, architecture: Architecture) -> None:
    """Refuse a factor on the deviation of a policy that has none."""
    if exploration not in (0, 1) and architecture.policy in ("categorical", "deterministic"):
        raise SettingsError(
            f"exploration={exploration:g}: the {architecture.policy} policy has no deviation, expected 0 or 1"
        )


def _offline(settings: Settings) -> Settings:
    """Return the settings of the offline phase, as offline.py has them."""
    online = {*type(settings.online).model_fields, settings.collector.group}
    values = {key: value for key, value in settings.values.items() if key not in online}
    return Settings.of({**values, "trust_env": settings.data.trust_env})


def data_for(settings: Settings) -> tuple[OfflineDataset, OfflineDataset | None]:
    """Load the offline transitions, from scratch none; and those that are held out, if any."""
    data = settings.data
    if data.n_steps > 1:
        raise SettingsError(f"n_steps={data.n_steps}: transitions are collected one by one, give 1")
    if data.columns:
        raise SettingsError(f"columns={list(data.columns)}: are not collected, give none")
    if data.dataset is not None:
        dataset = build.dataset_for(data)
        if dataset.env_spec is None:
            raise SettingsError(f"{dataset.name} does not name an environment: give env=<id>")
        dataset, held_out = hold_out(settings, dataset)
        learned = build.learned_from(settings, dataset)
        stored, used = (set(each.transitions.keys(True, True)) for each in (dataset, learned))
        if used != stored:
            raise SettingsError(
                f"algorithm={settings.values['algorithm']} learns from {sorted(map(str, used - stored))}, "
                f"which are not collected: it is for {label('offline')}"
            )
        return learned, held_out
    if settings.evaluation.validation:
        raise SettingsError(
            f"validation={settings.evaluation.validation:g}: without a data set there is nothing to hold out"
        )
    env = build.environment(data.env)
    if env is None:
        raise SettingsError("without a data set there is no environment: give env=<id>")
    if settings.networks.normalize_observation and settings.training.checkpoint is None:
        raise SettingsError(
            "normalize_observation=true needs the statistics of a data set: from scratch, give false"
        )
    return OfflineDataset.empty(env, reward_rule=data.reward, episode_rule=data.episodes), None


class FineTuning:
    """One learner, the transitions it has collected so far, and how it scored before.

    Args:
        settings: of the run.
        dataset: the offline transitions.
        architecture: of the networks.
        evaluations: plays with the policy.
        path: of the run.
        start: the checkpoint to begin with; None from scratch.
        held_out: of the offline transitions, if there are any.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: OfflineDataset,
        architecture: Any,
        evaluations: Evaluations | None,
        path: Path,
        start: Path | None,
        held_out: OfflineDataset | None = None,
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
        looks = None if held_out is None else HeldOut(settings, held_out)
        self.records = Records(path, settings, self.step, architecture, dataset, evaluations, looks)
        (self.folder,) = self.records.folders
        self.policy = architecture.policy_network().eval()  # acts, on the CPU
        self.before: dict[str, float] | None = None
        self.switch = 0
        self._start = start
        self._episodes: list[tuple[float, int]] = []  # return and length, since the last line
        saved = self.records.resume({"experience": self.experience})
        if saved is not None:
            self.before, self.switch = saved["before"], saved["switch"]
            self._episodes = [tuple(each) for each in saved.get("episodes", [])]
        elif start is not None:
            checkpoint.load_learner(start, self.step, keep=("settings", "random"))
            self.switch = self.step.steps

    @property
    def frames(self) -> int:
        """Environment steps taken so far."""
        return len(self.experience)

    def train(self) -> None:
        """Collect and learn in turns until all is done, evaluating and saving on the way.

        Raises:
            RuntimeError: something failed, or a step is not finite; what is whole is saved before.
        """
        path = self.folder.path
        with (
            stoppable() as stop,
            stop.patient(),
            self.records,
            self.records.saved_on_failure(self.save, self.settings.command_to_resume(path)),
            nonfinite.told(self.settings, path, self.save),
        ):
            self._train(stop)
            if stop.requested:
                self.save()

    def _train(self, stop: Stop) -> None:
        env_steps = self.settings.online.env_steps
        with progress.bar("online", self.frames, env_steps) as bar:
            self.records.make_up(stop, now=self.frames == env_steps)
            if self.frames == 0 and self.before is None and self.evaluations is not None:
                self.records.evaluate(self.save, stop)
                stop.at_once(self.records.wait)
                (evaluation,) = self.records.latest
                self.before = evaluation and evaluation.summary()
            if self.frames < env_steps and not stop.requested:
                with self._collecting() as collector:
                    self._train_with(collector, stop, bar)
            stop.at_once(self.records.wait)
            bar.set_postfix_str(self.records.figures())

    def _train_with(self, collector: BaseCollector, stop: Stop, bar: tqdm) -> None:
        evaluation, log_interval = self.settings.evaluation, self.settings.training.log_interval
        batches, limit = iter(collector), time_limit_of(self.dataset.env_spec)
        if self._exact and limit is not None and evaluation.eval_interval < limit:
            tqdm.write(
                f"eval_interval={evaluation.eval_interval}: environments begin anew there, before the end of "
                f"their episodes of {limit} steps"
            )
        self._begin_anew(collector)
        while self.frames < self.settings.online.env_steps and not stop.requested:
            start = self.frames
            try:
                collected = next(batches)
                rows = transitions(collected, self.dataset.transitions, first_step=start)
            except Exception as error:  # of the environment, of a worker that died, of Ray
                if stop.requested:  # a cluster's signal, of which the workers have died, too
                    return
                dead = _dead_worker(collector)
                raise RuntimeError(
                    f"collecting failed after {start} environment steps: {dead or error}"
                ) from (None if dead else error)  # else the collector's failures to clean up
            self._add(collected, rows)
            with self.records.changing():
                updated = self._update()
            self._load_policy()
            collector.update_policy_weights_()  # pyright: ignore
            bar.update(self.frames - start)
            self.records.evaluated()
            if updated and self._reached(log_interval, start):
                bar.set_postfix_str(self.records.log(**self._collected()))
            if self._reached(evaluation.eval_interval, start):
                self.records.evaluate(self.save, stop)
            elif self.records.is_due() and (not self._exact or self._reached(ROUND, start)):
                self.save()
            if any(self._reached(each, start) for each in (ROUND, evaluation.eval_interval)):
                self._begin_anew(collector)

    @property
    def _exact(self) -> bool:
        """Whether a run that goes on at a checkpoint is to be the one that was not interrupted."""
        return self.settings.collector.backend == "direct"

    def _begin_anew(self, collector: BaseCollector) -> None:
        """Reset environments and random numbers, seeded by the frames so far, as a resumed run does."""
        if self._exact:
            self.experience.truncate()
            torch.manual_seed(self._seed())
            collector.set_seed(self._seed())
            collector.reset()  # pyright: ignore

    def _seed(self) -> int:
        """Return that of what is collected from here on."""
        state = np.random.SeedSequence([self.settings.learners[0].seed, self.frames])
        return int(state.generate_state(1)[0])

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
            seed=self._seed(),
            **self.settings.collector.model_dump(exclude_none=True),
        )

    def _load_policy(self) -> None:
        """Copy what was learned into the policy that acts."""
        self.policy.load_state_dict(self.records.policies()[0])

    def _add(self, collected: TensorDictBase, rows: TensorDictBase) -> None:
        """Add what was collected to the experience, and ended episodes to the statistics."""
        self.experience.extend(rows[: self.settings.online.env_steps - self.frames])
        done = collected["next", "done"]
        outcomes = (collected["next", key][done] for key in ("episode_reward", "step_count"))
        self._episodes += zip(*(each.tolist() for each in outcomes), strict=True)

    def _update(self) -> bool:
        """Take the gradient steps that are due; return whether there were any."""
        due = self.switch + int(self.frames * self.settings.online.updates_per_frame)
        if self.step.steps >= due:
            return False
        while self.step.steps < due:
            self.step(self.experience.sample())
        self.step.check_finite()
        return True

    def _collected(self) -> dict[str, float]:
        """Return what is logged of the frames since the last time."""
        metrics = {"frames": self.frames, "offline_share": self.experience.offline_share}
        if self._episodes:
            returns, lengths = zip(*self._episodes, strict=True)
            metrics |= {"episode_return": mean(returns), "episode_length": mean(lengths)}
            self._episodes.clear()
        return metrics

    def save(self) -> None:
        """Write a checkpoint. The environments of a run that goes on at it begin anew."""
        if self._exact:
            self.experience.truncate()
        self.records.save(
            {"experience": self.experience},
            before=self.before,
            switch=self.switch,
            frames=self.frames,
            episodes=self._episodes,
        )

    # --- Results -----------------------------------------------------------------------------------------

    def outcome(self) -> dict[str, Any]:
        """Return what ``scores.json`` says of the learner."""
        (latest,) = self.records.latest
        return results.outcome(
            self.settings.learners[0],
            latest,
            steps=self.step.steps,
            interrupted=self.frames < self.settings.online.env_steps or self.records.are_due,
            best=self.folder.best_row(),
            skipped=self.step.skipped[0],
            held_out=self.folder.latest("validation/"),
            frames=self.frames,
            evaluated_after=self._evaluated_after(),
            before=self.before,
            after=latest.summary() if latest else None,
        )

    def _evaluated_after(self) -> int | None:
        """Return the frames of the last evaluation; None if there is none."""
        at, rate = self.folder.evaluated_after(), self.settings.online.updates_per_frame
        if at is None or not rate:
            return None if at is None else self.frames
        return min(self.frames, math.ceil((at - self.switch) / rate))

    def draw(self) -> None:
        """Draw as offline, with the curves of the offline run, and a line where this one begins."""
        earlier = {}
        if self.switch and self._start is not None:
            earlier = {
                "earlier": self._start.with_name("metrics.csv"),
                "switch": self.switch,
            }
        self.records.draw(**earlier)


def _dead_worker(collector: BaseCollector) -> str | None:
    """Say which process of a collector was killed, or ended by itself, if one has."""
    for number, process in enumerate(getattr(collector, "procs", ())):
        with suppress(ValueError):  # it is closed
            code = process.exitcode
            if code is None or code in (0, -signal.SIGTERM):  # the last is how the others end then
                continue
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return f"its worker {number} (process {process.pid}) ended {how}"
    return None


def report(scores: dict[str, Any], path: Path, settings: Settings) -> str:
    """Write what the user reads at the end."""
    (learner,) = scores["replicas"]
    lines = []
    if learner.get("before") and learner.get("after"):
        before, after = learner["before"], learner["after"]
        kind = results.score_kind(after)
        frames = learner.get("evaluated_after", learner["frames"])
        values = f"{rounded(before['score'])} before"
        if frames:
            values += f", {rounded(after['score'])} after {frames} steps"
        lines.append(f"{kind.replace('_', ' ')}: {values}")
        error = math.hypot(*(each.get(f"{kind}_stderr", math.nan) for each in (before, after)))
        if before["score"] - after["score"] > FALLEN * error:
            lines.append(
                "Note: it has got worse, by more than the chance of episodes: more offline steps before, a "
                "smaller learning_rate, or more offline data in the batches may help"
            )
    lines += results.not_evaluated([learner], path, settings)
    lines += results.skipped([learner])
    if learner["interrupted"]:
        is_offline = "frames" not in learner
        done = f"{learner['steps'] if is_offline else learner['frames']} steps"
        phase = " of the offline phase" * is_offline
        lines.append(
            f"Interrupted after {done}{phase}. Continue with: {settings.command_to_resume(path)}"
        )
    lines.append(f"Results: {shown(path)} (scores.json, times.json, metrics.csv, *.png, *.ckpt)")
    if (path / "last.ckpt").exists():
        lines.append(results.how_to_load(shown(path / "last.ckpt")))
    return "\n".join(lines)
