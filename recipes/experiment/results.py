"""What a run has come to: ``scores.json``, the same for every script, and what the user reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from torchrl_iql_recipes.experiment.schema import rounded
from torchrl_iql_recipes.files import whole

if TYPE_CHECKING:
    from torchrl_iql import Evaluation, OfflineDataset
    from torchrl_iql_recipes.experiment.settings import Learner, Settings

__all__ = [
    "FEWEST",
    "VERSION",
    "diagnosis",
    "final_score",
    "half_width",
    "held_out",
    "how_to_load",
    "not_evaluated",
    "objective",
    "outcome",
    "read",
    "report",
    "rules",
    "score_kind",
    "skipped",
    "summaries",
    "write",
]

HELD_OUT = {
    "td_error": "TD error",
    "action_error": "action error",
    "log_likelihood": "log-likelihood",
    "q_bias": "Q less the return that followed",
    "q_correlation": "their rank correlation",
    "effective_sample_size": "effective sample size",
}
"""What is said of what is held out, and how."""

FEWEST = 3
"""Seeds, without which there is no interval: that of two is wider than anything it could say."""

VERSION = 2
"""Of ``scores.json``. Without one: written before there were versions."""


def outcome(
    learner: Learner,
    evaluation: Evaluation | None,
    *,
    steps: int,
    interrupted: bool,
    best: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    """Return what is said of a learner: its settings, how it scored at last, and at best.

    Args:
        learner: one of the run.
        evaluation: the last one, if there was any, and it did not fail.
        steps: gradient steps taken.
        interrupted: whether there should have been more.
        best: ``score`` and ``step`` of its best evaluation.
        **more: what a script adds.
    """
    scored = {} if evaluation is None else evaluation.summary()
    state = {"steps": steps, "interrupted": interrupted, "best": best}
    return {**learner.settings(), "title": str(learner.algorithm), **scored, **state, **more}


def rules(dataset: OfflineDataset) -> dict[str, Any]:
    """Return what is said of the data: the rules, in numbers, and how many transitions they left."""
    transform, recorded = dataset.reward_transform, dataset.recording.transitions
    return {
        "reward": dataset.reward_rule,
        "reward_scale": transform.scale,
        "reward_shift": transform.shift,
        "episodes": dataset.episode_rule,
        "transitions": len(dataset.transitions),
        "recorded_transitions": recorded,
    }


def write(
    path: Path,
    settings: Settings,
    dataset: str,
    replicas: Sequence[dict[str, Any]],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``scores.json`` in a folder, whole or not at all.

    Args:
        path: the folder.
        settings: of the run.
        dataset: the name of what was learned from.
        replicas: the outcome of each learner.
        data: its :func:`rules`.

    Returns:
        what is written: these, a ``version``, the settings that all learners share, and the ``summary``
        over seeds of what was evaluated.
    """
    axes = (*settings.algorithm.axes(), "seed")
    first = replicas[0]
    shared = [axis for axis in axes if all(each[axis] == first[axis] for each in replicas)]
    scores: dict[str, Any] = {
        "version": VERSION,
        "dataset": dataset,
        "data": dict(data),
        "algorithm": settings.values["algorithm"],
        **{axis: first[axis] for axis in shared},
        "replicas": list(replicas),
    }
    if scored := [each for each in replicas if "score" in each]:
        scores["summary"] = summaries(scored, settings.algorithm.axes())
    with whole(path / "scores.json") as new:
        new.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def read(path: Path) -> dict[str, Any] | None:
    """Read the ``scores.json`` of a folder, of any version; None if there is none.

    Raises:
        ValueError: it was written by a later version, or is damaged.
    """
    file = path / "scores.json"
    if not file.exists():
        return None
    try:
        scores = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if scores.get("version", 1) > VERSION:
        raise ValueError(f"{file} has version {scores['version']}, this reads up to {VERSION}")
    return scores if "replicas" in scores else {**scores, "replicas": [scores]}  # once of online.py


def summaries(replicas: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Compute the mean score over the seeds for each combination of the other settings.

    Args:
        replicas: the outcome of each learner.
        axes: the settings that may differ between them.

    Returns:
        for each: its ``title``, these settings, the number of ``seeds``, the mean ``score``, and
        half the width of its 95% confidence interval (Student's t), ``ci95``, None below three
        seeds.
    """
    groups: dict[tuple, list[float]] = {}
    for each in replicas:
        settings = tuple((key, each[key]) for key in ("title", *axes))
        groups.setdefault(settings, []).append(each["score"])
    rows = []
    for settings, values in groups.items():
        seeds = len(values)
        ci95 = half_width(values) if seeds >= FEWEST else None
        rows.append({**dict(settings), "seeds": seeds, "score": mean(values), "ci95": ci95})
    return rows


def objective(scores: Mapping[str, Any], settings: Settings) -> float | None:
    """Return what a sweep looks for the highest value of: the last value of what ``best_by`` names.

    Args:
        scores: what ``scores.json`` holds.
        settings: of the run.

    Returns:
        the mean over the learners, of what is lowest at best its negative; None if one of them lacks it.
    """
    best_by = settings.evaluation.best_by
    kind, _, name = best_by.removeprefix("-").partition("/")
    its = [each if kind == "eval" else each.get("held_out") or {} for each in scores["replicas"]]
    values = [each[name] for each in its if name in each]
    sign = -1 if best_by.startswith("-") else 1
    return sign * mean(values) if len(values) == len(its) else None


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95% confidence interval of a mean, Student's t; of several values."""
    from scipy.special import stdtrit  # takes a third of a second, before the first step

    quantile = stdtrit(len(values) - 1, 0.975)
    return float(quantile * stdev(values) / math.sqrt(len(values)))


def score_kind(values: Mapping[str, Any]) -> str:
    """Return what the score is of an evaluation with these figures, or of a line that was read of a file."""
    return "return" if values.get("normalized_score", "") == "" else "normalized_score"


def final_score(outcome: Mapping[str, Any]) -> float | None:
    """Return the score of a learner after its last step; None if it was not evaluated then, or that failed.

    Args:
        outcome: of ``scores.json``. Earlier versions left the score of the last evaluation that did not fail.
    """
    after, is_online = outcome.get("evaluated_after"), "frames" in outcome
    is_older = not is_online and after not in (None, outcome.get("steps"))
    return None if is_older else outcome.get("score")


def not_evaluated(
    replicas: Sequence[Mapping[str, Any]], path: Path, settings: Settings
) -> list[str]:
    """Write a line where learners that are finished have no score."""
    its = [each for each in replicas if "score" not in each and not each["interrupted"]]
    if not its:
        return []
    if settings.evaluation.eval_episodes == 0:
        return ["Not evaluated (eval_episodes=0)."]
    others = f" and {len(its) - 1} more" if len(its) > 1 else ""
    whom = f" of {its[0]['name']}{others}" if its[0]["name"] else ""
    return [
        f"The last evaluation{whom} failed: no score. {settings.command_to_resume(path)} plays it again"
    ]


def report(scores: Mapping[str, Any]) -> list[str]:
    """Write a line for each combination of settings."""
    rows = scores.get("summary", [])
    scored = next((each for each in scores["replicas"] if "score" in each), {})
    score = score_kind(scored).replace("_", " ")
    lines = []
    for row in rows:
        settings = [key for key in row if key not in ("title", "seeds", "score", "ci95")]
        varied = [key for key in settings if len({other[key] for other in rows}) > 1]
        name = ", ".join(f"{key}={row[key]:g}" for key in varied)
        title = row["title"]
        number = row["seeds"]
        seeds = "one seed" if number == 1 else f"{number} seeds"
        if row["ci95"] is not None:
            seeds = f"± {rounded(row['ci95'])}, 95% of {number} seeds"
        lines.append(
            f"{f'{title}, {name}' if name else title}: {score} {rounded(row['score'])} ({seeds})"
        )
    return lines


def held_out(replicas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a line for each learner of what it makes of the episodes that it has not learned from."""
    return [
        f"{each['name'] and each['name'] + ': '}held out: "
        + ", ".join(
            f"{word} {each['held_out'][key]:.3g}"
            for key, word in HELD_OUT.items()
            if key in each["held_out"]
        )
        for each in replicas
        if each.get("held_out")
    ]


def diagnosis(replicas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a line for everything that is wrong, and which learners it is wrong with, if not with all."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in replicas:
        for name in each.get("diagnosis", ()):
            found.setdefault(name, []).append(each)
    lines = []
    for name, its in found.items():
        others = f" and {len(its) - 1} more" if len(its) > 1 else ""
        whom = f" ({its[0]['name']}{others})" if len(replicas) > 1 else ""
        lines.append(f"Note{whom}: {its[0]['diagnosis'][name]}")
    return lines


def how_to_load(policy: Path) -> str:
    """Write the line that says how what was learned is loaded, of a path as it is shown."""
    return f"Load a policy: torchrl_iql.load_policy({str(policy)!r})"


def skipped(replicas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a line for each learner of which steps were left out, since something was not finite."""
    skips = [each for each in replicas if each.get("skipped")]
    return [
        f"{each['name'] and each['name'] + ': '}{each['skipped']} of {each['steps']} steps were skipped: "
        "they left something NaN or infinite"
        for each in skips
    ]
