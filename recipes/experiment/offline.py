"""Training on a data set, one learner or many at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchrl_iql import OfflineDataset, TrainStep, checkpoint
from torchrl_iql.data import Minibatches
from torchrl_iql_recipes.experiment import build, nonfinite, progress, results
from torchrl_iql_recipes.experiment.evaluations import Evaluations
from torchrl_iql_recipes.experiment.folder import StopSignal
from torchrl_iql_recipes.experiment.networks import architecture_for, architecture_of
from torchrl_iql_recipes.experiment.records import Records, Times
from torchrl_iql_recipes.experiment.settings import Settings

__all__ = ["report", "run", "train"]

STEPS_PER_CALL = 100
"""Gradient steps between two looks at Ctrl-C."""


def run(settings: Settings, path: Path) -> dict[str, Any]:
    """Do one run in a folder, continued if the folder holds a part of it.

    Returns:
        what ``scores.json`` holds.
    """
    build.set_up(settings.compute)
    dataset = build.dataset_for(settings.data)
    print(describe(dataset))
    learned = build.learned_from(settings, dataset)
    start = settings.training.checkpoint and Path(settings.training.checkpoint)
    lasts = [path / learner.name / "last.ckpt" for learner in settings.learners]
    if start is None:
        architecture = architecture_for(settings.networks, learned)
    else:
        architecture = architecture_of(lasts[0] if lasts[0].exists() else start, learned)
    with (
        build.evaluations_for(settings, dataset, architecture) as evaluations,
        learned.minibatches(
            settings.training.batch_size,
            seeds=[learner.seed for learner in settings.learners],
            device=settings.compute.device,
            streaming=settings.compute.streaming,
        ) as minibatches,
    ):
        training = settings.training
        step = build.step_for(
            *(settings.learners, architecture, learned, settings.compute),
            *(training.steps, training.on_nonfinite),
        )
        for last in filter(Path.exists, lasts):
            done = checkpoint.load_metadata(last)["steps"]
            build.check_not_done("steps", settings.training.steps, done)
        build.claim(path, settings)
        records = Records(path, settings, step, architecture, dataset.name)
        if records.resume() is None and start is not None:
            checkpoint.load_learner(start, step, keep=("settings", "optimizer", "random"))
        times = Times(path, step)
        with records, nonfinite.told(settings, path, records.save):
            train(settings, step, minibatches, records, evaluations)
        times.write(evaluations)
    records.draw(evaluations)
    unfinished = step.steps < settings.training.steps
    evaluated = records.latest or [None] * len(settings.learners)
    replicas = [
        results.outcome(
            learner,
            evaluation,
            steps=step.steps,
            interrupted=unfinished,
            best=folder.best_score(),
        )
        for learner, evaluation, folder in zip(
            settings.learners, evaluated, records.folders, strict=True
        )
    ]
    return results.write(path, settings, dataset.name, replicas, results.rules(dataset))


def train(
    settings: Settings,
    step: TrainStep,
    minibatches: Minibatches,
    records: Records,
    evaluations: Evaluations | None,
) -> None:
    """Take the gradient steps that are missing, evaluating and saving on the way.

    Ctrl-C saves a checkpoint and ends the training; a second one stops at once.

    Raises:
        NonFiniteError: a step is not finite. Nothing of it is logged, evaluated or saved.
    """
    end, interval = settings.training.steps, settings.evaluation.eval_interval
    log_interval = settings.training.log_interval
    with (
        StopSignal() as stop,
        progress.bar(settings.algorithm.title, step.steps, end) as bar,
    ):
        at_event = step.steps > 0 and step.steps % interval == 0
        if step.steps == end or (at_event and not records.has_evaluated()):
            # A run that is over, for its results; or that was killed while this was evaluated.
            records.evaluate(evaluations)
        while step.steps < end and not stop.requested:
            done = step.steps
            events = (STEPS_PER_CALL, log_interval, interval)
            steps = min(end - done, *(each - done % each for each in events))
            metrics = step.run(minibatches, steps)
            step.check_finite()
            bar.update(steps)
            records.evaluated(evaluations)
            if step.steps % log_interval == 0 or step.steps == end:
                bar.set_postfix_str(records.log(metrics))
            if step.steps % interval == 0 or step.steps == end:
                records.evaluate(evaluations)
                records.save()
        records.evaluated(evaluations, wait=True)
    if stop.requested:
        records.save()


def describe(dataset: OfflineDataset) -> str:
    """Write what the user reads first: the data, and what the rules make of them."""
    rows, recording = len(dataset.transitions), dataset.recording
    dropped = (recording.transitions or rows) - rows
    share = (
        f", {dropped} of {recording.transitions} recorded transitions dropped" if dropped else ""
    )
    return (
        f"{dataset.name}: {rows} transitions in "
        f"{len(dataset.episode_lengths)} episodes, mean return {dataset.episode_returns.mean():.1f}; "
        f"environment: {dataset.env_spec and dataset.env_spec.id}\n"
        f"Rules: reward {dataset.reward_rule}, r -> {dataset.reward_transform}; episodes "
        f"{dataset.episode_rule}{share}"
    )


def report(scores: dict[str, Any], path: Path) -> str:
    """Write what the user reads at the end."""
    replicas = scores["replicas"]
    shown = os.path.relpath(path)
    lines = results.report(scores)
    if replicas[0]["interrupted"]:
        lines.append(
            f"Interrupted after {replicas[0]['steps']} steps. "
            f"Continue with: python recipes/offline.py resume={shown}"
        )
    elif not lines:
        lines.append("Not evaluated (eval_episodes=0).")
    policy = Path(shown, replicas[0]["name"], "last.ckpt")
    lines += [
        f"Results: {shown} (scores.json, times.json; for each learner metrics.csv, *.png, *.ckpt)",
        f"Load a policy: torchrl_iql.load_policy({str(policy)!r})",
    ]
    return "\n".join(lines)
