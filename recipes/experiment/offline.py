"""Training on a data set, one learner or many at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torchrl_iql import OfflineDataset, TrainStep, checkpoint
from torchrl_iql.data import Minibatches
from torchrl_iql_recipes.experiment import build, learned_from, nonfinite, progress, results
from torchrl_iql_recipes.experiment.diagnosis import Diagnosis
from torchrl_iql_recipes.experiment.lock import held
from torchrl_iql_recipes.experiment.networks import architecture_for, architecture_of
from torchrl_iql_recipes.experiment.records import Records
from torchrl_iql_recipes.experiment.schema import rounded
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.stopping import Stop, stoppable
from torchrl_iql_recipes.experiment.validation import HeldOut, hold_out
from torchrl_iql_recipes.files import shown

__all__ = ["report", "run", "train"]

COMPILING = "compiling; compute.execution=eager begins at once"

FEW_EPISODES = 5
"""Held out, below which what is seen of them is that of one or two."""

STEPS_PER_CALL = 100
"""Gradient steps between two looks at whether the run is to stop, if they take less than a second."""


def run(settings: Settings, path: Path) -> dict[str, Any]:
    """Do one run in a folder, continued if the folder holds a part of it.

    Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end it; a second Ctrl-C ends it at once.

    Returns:
        what ``scores.json`` holds.

    Raises:
        SettingsError: one of the settings can not be, or another process is at work in the folder.
        RuntimeError: the training failed; the message says where what was learned is.
    """
    with held(path), stoppable() as stop:
        return _run(settings, path, stop)


def _run(settings: Settings, path: Path, stop: Stop) -> dict[str, Any]:
    build.set_up(settings.compute)
    played = settings.evaluation.eval_episodes > 0
    dataset = build.dataset_for(settings.data, played=played)
    rest, held_out = hold_out(settings, dataset)
    print(describe(dataset, held_out))
    learned = build.learned_from(settings, rest)
    start = settings.training.checkpoint and Path(settings.training.checkpoint)
    lasts = [path / learner.name / "last.ckpt" for learner in settings.learners]
    if start is None:
        described = architecture_for(settings.networks, learned, settings.algorithm)
        architecture = settings.algorithm.architecture(described, learned)
    else:
        known = lasts[0] if lasts[0].exists() else start
        architecture = architecture_of(known, learned, settings.networks)
    with (
        build.evaluations_for(settings, dataset, architecture) as evaluations,
        build.over_steps(settings, learned).minibatches(
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
        build.claim(path, settings, learned_from.summary(rest, learned, held_out))
        validation = None if held_out is None else HeldOut(settings, held_out)
        records = Records(path, settings, step, architecture, dataset, evaluations, validation)
        if records.resume() is None and start is not None:
            checkpoint.load_learner(start, step, keep=("settings", "optimizer", "random"))
        with (
            records,
            stop.patient(),
            records.saved_on_failure(records.save, settings.command_to_resume(path)),
            nonfinite.told(settings, path, records.save),
        ):
            train(settings, step, minibatches, records, stop)
    unfinished = step.steps < settings.training.steps or records.are_due
    seen = learned if held_out is None else held_out
    returns = dataset.episode_returns.numpy() if _are_comparable(dataset) else None
    diagnosis = None if unfinished else Diagnosis(settings, seen, returns)
    replicas = [
        results.outcome(
            learner,
            evaluation,
            steps=step.steps,
            interrupted=unfinished,
            best=folder.best_row(),
            skipped=skipped,
            evaluated_after=folder.evaluated_after(),
            held_out=folder.latest("validation/"),
            diagnosis={} if diagnosis is None else diagnosis(learner, loss, folder.rows()),
        )
        for learner, loss, evaluation, folder, skipped in zip(
            settings.learners,
            step.losses,
            records.latest,
            records.folders,
            step.skipped,
            strict=True,
        )
    ]
    scores = results.write(path, settings, dataset.name, replicas, results.rules(dataset))
    records.draw()  # takes seconds, and may be stopped
    return scores


def train(
    settings: Settings, step: TrainStep, minibatches: Minibatches, records: Records, stop: Stop
) -> None:
    """Take the gradient steps that are missing, evaluating and saving on the way.

    Raises:
        NonFiniteError: a step is not finite. Nothing of it is logged, evaluated or saved.
    """
    end, interval = settings.training.steps, settings.evaluation.eval_interval
    log_interval, chunk = settings.training.log_interval, STEPS_PER_CALL
    with progress.bar(settings.algorithm.title, step.steps, end) as bar:
        records.make_up(stop, now=step.steps == end)
        if step.execution != "eager":  # which may take minutes, and moves no bar
            bar.set_postfix_str(COMPILING)
        while step.steps < end and not stop.requested:
            done, began = step.steps, time.monotonic()
            steps = min(
                end - done, *(each - done % each for each in (chunk, log_interval, interval))
            )
            with records.changing():
                step.run(minibatches, steps)
                step.check_finite()
            chunk = _chunk((time.monotonic() - began) / steps)
            if bar.postfix == COMPILING:
                bar.set_postfix_str("", refresh=False)
            bar.update(steps)
            records.evaluated()
            if step.steps % log_interval == 0 or step.steps == end:
                bar.set_postfix_str(records.log())
            if step.steps % interval == 0 or step.steps == end:
                records.evaluate(records.save, stop)
            elif records.is_due():
                records.save()
        stop.at_once(records.wait)
        bar.set_postfix_str(records.figures())
    if stop.requested:
        records.save()


def _chunk(seconds: float) -> int:
    """Return how many steps of so many seconds to take in one call."""
    return next((each for each in (STEPS_PER_CALL, 10) if each * seconds < 1), 1)


def describe(dataset: OfflineDataset, held_out: OfflineDataset | None = None) -> str:
    """Write what the user reads first: the data, and what the rules make of them."""
    rows, recording = len(dataset.transitions), dataset.recording
    dropped = (recording.transitions or rows) - rows
    share = (
        f", {dropped} of {recording.transitions} recorded transitions dropped" if dropped else ""
    )
    cut = _cut_off(dataset)
    ends = (
        cut and f", which ends episodes after {cut[0]} steps; the longest of the data has {cut[1]}"
    )
    return (
        f"{dataset.name}: {rows} transitions in "
        f"{len(dataset.episode_lengths)} episodes, mean return {rounded(dataset.episode_returns.mean())}; "
        f"environment: {dataset.env_spec.id if dataset.env_spec else 'not known'}"
        f"{ends or ''}\n"
        f"Rules: reward {dataset.reward_rule}, r -> {dataset.reward_transform}; episodes "
        f"{dataset.episode_rule}{share}"
        + ("" if held_out is None else f"\nHeld out: {_held_out(len(held_out.episode_lengths))}")
    )


def _cut_off(dataset: OfflineDataset) -> tuple[int, int] | None:
    """Return when its environment ends episodes, and the longest of the data, if that is longer."""
    longest = int(dataset.episode_lengths.max())
    limit = dataset.env_spec and dataset.env_spec.max_episode_steps
    return (limit, longest) if limit is not None and longest > limit else None


def _are_comparable(dataset: OfflineDataset) -> bool:
    """Return whether a policy may have the returns of the data's episodes.

    Not of what follows the environment's last step, nor of pieces of episodes: most of those of OGBench are
    single steps at the goal.
    """
    lengths, stopped = dataset.episode_lengths, dataset.recording.stopped
    are_pieces = 2 * stopped > len(lengths) or int(lengths.median()) == 1
    return not are_pieces and _cut_off(dataset) is None


def _held_out(episodes: int) -> str:
    few = f", too few to judge by, which takes {FEW_EPISODES}: give a larger share"
    return f"{episodes} episodes{few if episodes < FEW_EPISODES else ''}"


def report(scores: dict[str, Any], path: Path, settings: Settings) -> str:
    """Write what the user reads at the end."""
    replicas = scores["replicas"]
    lines = results.report(scores)
    lines += results.not_evaluated(replicas, path, settings)
    lines += results.held_out(replicas)
    lines += results.diagnosis(replicas)
    lines += results.skipped(replicas)
    if replicas[0]["interrupted"]:
        steps, of = replicas[0]["steps"], replicas[0].get("evaluated_after")
        is_older = "score" in replicas[0] and of not in (None, steps)
        scored = f"; the score is of the policy after {of}" if is_older else ""
        lines.append(
            f"Interrupted after {steps} steps{scored}. "
            f"Continue with: {settings.command_to_resume(path)}"
        )
    policy = Path(shown(path), replicas[0]["name"], "last.ckpt")
    lines += [
        f"Results: {shown(path)} (scores.json, times.json; for each learner metrics.csv, *.png, *.ckpt)",
        results.how_to_load(policy),
    ]
    return "\n".join(lines)
