"""What is wrong with a run, as far as it can be told without an environment: in words, with figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_iql import OfflineDataset
from torchrl_iql.data.bins import share_at_bounds
from torchrl_iql.validation import Validator
from torchrl_iql_recipes.experiment.results import score_kind
from torchrl_iql_recipes.experiment.settings import Learner, Settings

__all__ = ["FALLEN", "Diagnosis"]

MOVED = 0.1
"""Of a value, between the last tenth of the steps and the one two before it."""

OVERFITTED = 4.0
"""Times the squared error of Q in training, on held-out episodes."""

RISEN = 1.2
"""Times the lowest TD error there was on held-out episodes."""

POORER = 0.1
"""Of a return, that another is less, beyond what chance explains."""

FALLEN = 3.0
"""Standard errors between the best of several evaluations and the last."""

FEW = 0.02
"""Effective sample size of the weights: less is noise. On AntMaze at temperature 10 it is 0.07."""

ALIKE = 0.98
"""Effective sample size of weights that make no difference."""

CLIPPED = 0.5
"""Of the weights, from which on most of the good actions count alike."""

SATURATED = 0.5
"""Of the policy's actions, at their bounds, if less than half as many of the data's are."""

EXPLAINED = 0.95
"""Of the variance of every dimension of the actions, by the policy's mean: all follow from the state."""

REACHED = 0.01
"""Of the episodes, that have a reward unlike the others."""

ROWS = 5_000
"""Transitions that a learner is looked at with."""

Found = dict[str, str]
"""By name of what is wrong, a line."""


class Diagnosis:
    """Says what is wrong with the learners of a run, at its end.

    Args:
        settings: of the run.
        dataset: what they are looked at with: what is held out, else what they have learned from.
        data_returns: of all episodes there are, as they were recorded, ``[E]``.
    """

    def __init__(
        self, settings: Settings, dataset: OfflineDataset, data_returns: np.ndarray | None = None
    ) -> None:
        self._settings = settings
        self._data_returns = data_returns
        self._look = Validator(dataset, rows=ROWS)
        asks_for_rewards = hasattr(settings.algorithm, "discount") and dataset.window is None
        rewards = dataset.transitions["next", "reward"][:, 0]
        self._has_one_reward = bool((rewards == rewards[0]).all())
        self._of_rewards = {}
        if asks_for_rewards:
            lengths = dataset.episode_lengths
            self._of_rewards = dict(_of_rewards(rewards, lengths, self._has_one_reward))
        actions, space = dataset.transitions["action"], dataset.action_space
        self._at_bounds = 0.0
        if isinstance(space, Box) and space.is_bounded():
            actions = actions[:: max(1, len(actions) // ROWS)]
            low, high = space.low.ravel(), space.high.ravel()
            self._at_bounds = share_at_bounds(actions.numpy(), low, high)

    def __call__(
        self, learner: Learner, loss: LossModule, rows: Sequence[Mapping[str, Any]]
    ) -> Found:
        """Look at one.

        Args:
            learner: of the run.
            loss: its loss.
            rows: its lines of ``metrics.csv``.

        Returns:
            a line for each thing that is wrong; none if nothing is.
        """
        metrics = self._look(loss).metrics
        found = self._of_rewards | dict(
            _of_scores(self._settings, learner, rows, self._data_returns)
        )
        if not self._has_one_reward:  # of which no values and weights are better than others
            # Where held-out episodes tell, more steps, for values that move, are no remedy.
            held_out = dict(_of_held_out(rows))
            found |= held_out or dict(_of_values(rows, learner, metrics))
            found |= dict(_of_weights(self._settings, learner, metrics))
        return found | dict(_of_actions(self._settings, metrics, self._at_bounds))


def _of_rewards(rewards: Tensor, lengths: Tensor, all_are_one: bool) -> Iterator[tuple[str, str]]:
    usual = rewards.median()
    if all_are_one:
        yield (
            "rewards",
            f"every reward is {usual:g}: nothing tells good from bad, and the policy can only imitate; look "
            "at the data with python -m torchrl_iql.data inspect",
        )
        return
    is_unlike = (rewards != usual).float()
    reached = int(torch.segment_reduce(is_unlike, "max", lengths=lengths).sum())
    if reached < REACHED * len(lengths):
        yield (
            "rewards",
            f"{reached} of {len(lengths)} episodes have a reward other than {usual:g}: V can "
            "hardly know of it; give data that reach it, or a reward that leads there",
        )


def _of_scores(
    settings: Settings,
    learner: Learner,
    rows: Sequence[Mapping[str, Any]],
    data_returns: np.ndarray | None,
) -> Iterator[tuple[str, str]]:
    """Compare the last evaluation with the data, and with the best one before."""
    scored = [row for row in rows if _has(row, "eval/score")]
    if not scored:
        return

    def figure(row: Mapping[str, Any], name: str) -> tuple[float, float]:
        error = f"eval/{name}_stderr"  # of a single episode there is none
        return float(row[f"eval/{name}"]), float(row[error]) if _has(row, error) else math.nan

    last, error = figure(scored[-1], "return")
    temperature = getattr(learner.algorithm, "temperature", None)
    # Temperature 0 is the baseline that others are to be better than.
    if data_returns is not None and temperature != 0:
        mean = float(data_returns.mean())
        # Episodes that all fail have no spread: what a policy as good as the data would have counts too.
        chance = float(data_returns.std()) / math.sqrt(
            settings.evaluation.eval_episodes or math.inf
        )
        if last + 2 * np.fmax(error, chance) < mean - POORER * abs(mean):
            advice = "; compare it with cloning (algorithm=bc)" if temperature else ""
            yield (
                "poor",
                f"the policy's return, {last:.4g} ± {error:.2g}, is below the mean of the data's episodes, "
                f"{mean:.4g}: {_first_things(settings)}{advice}",
            )
    best = max(scored, key=lambda row: float(row["eval/score"]))
    kind = score_kind({"normalized_score": best.get("eval/normalized_score", "")})
    (high, spread), (last, error) = (figure(row, kind) for row in (best, scored[-1]))
    if high - last > max(FALLEN * np.hypot(spread, error), POORER * abs(high)):
        advice = (
            "" if settings.networks.normalize_observation else "normalize_observation=true, or "
        )
        yield (
            "fallen",
            f"the score was {high:.4g} after {best['step']} steps, and is {last:.4g} at the end, which the "
            f"chance of episodes does not explain: what is learned is not stable; {advice}a smaller "
            "learning_rate may help",
        )


def _first_things(settings: Settings) -> str:
    its = [] if settings.networks.normalize_observation else ["normalize_observation=true"]
    if hasattr(settings.algorithm, "temperature"):
        its.append("a smaller temperature")
    if not its:
        return "more steps are the first thing to try"
    return f"{', '.join(its)} and more steps are the first things to try"


def _has(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a line has a value, whether it is in memory or was read from a file."""
    return row.get(name, "") != ""


def _of_values(
    rows: Sequence[Mapping[str, Any]], learner: Learner, metrics: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    if getattr(learner.algorithm, "temperature", None) == 0:  # the policy does not ask them
        return
    recorded = ({name: row[name] for name in row if _has(row, name)} for row in rows)
    found = [(each["step"], its) for each in recorded if (its := learner.algorithm.values(each))]
    name = next(iter(found[0][1])) if found else ""
    values = np.array([its[name] for _, its in found])
    tenth = max(1, len(values) // 10)
    if len(values) < 5:
        return
    end = len(values)
    before, last = values[end - 3 * tenth : end - 2 * tenth], values[end - tenth :]
    change = abs(last.mean() - before.mean())
    chance = 2 * np.hypot(before.std(), last.std()) / np.sqrt(tenth)
    # Where Q is about 0 on average, what it tells apart says what is much.
    told_apart = metrics.get("advantage_90", 0.0) - metrics.get("advantage_10", 0.0)
    if change > max(MOVED * abs(last.mean()), MOVED * told_apart, chance):
        yield (
            "values",
            f"the values are not converged: the mean of {name} went from {before.mean():.3g} after "
            f"{found[end - 2 * tenth - 1][0]} steps to {last.mean():.3g} after {found[-1][0]}; give more "
            "steps, or a larger target_rate",
        )


def _of_held_out(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    def column(name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in rows if _has(row, name)]

    trained, held_out = column("loss_qvalue"), column("validation/loss_qvalue")
    errors = column("validation/td_error")
    if not trained or not held_out or not errors:
        return
    step, lowest = min(errors, key=lambda each: each[1])
    last = errors[-1][1]
    if held_out[-1][1] > OVERFITTED * trained[-1][1] and last > RISEN * lowest:
        yield (
            "overfitted",
            f"the values are overfitted: the loss of Q is {trained[-1][1]:.3g} in training and "
            f"{held_out[-1][1]:.3g} on the held-out episodes, whose TD error was lowest after {step} steps, "
            f"{lowest:.3g}, and is {last:.3g}; give more data, or fewer steps",
        )


def _of_weights(
    settings: Settings, learner: Learner, metrics: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    temperature = getattr(learner.algorithm, "temperature", None)
    if "effective_sample_size" not in metrics or not temperature:
        return
    share, clipped = metrics["effective_sample_size"], metrics["clip_fraction"]
    if clipped > CLIPPED:
        yield (
            "clipped",
            f"{clipped:.0%} of the weights are at their largest: good and very good actions count alike; "
            f"give a smaller temperature than {temperature:g}, or the task's reward rule",
        )
    elif share < FEW:
        batch = settings.training.batch_size
        yield (
            "weights",
            f"the weights are noise: of a minibatch of {batch} {max(1.0, share * batch):.0f} count "
            f"(effective sample size {share:.1%}); give a smaller temperature than {temperature:g}, or more "
            "data",
        )
    elif share > ALIKE:
        yield (
            "weights",
            f"the weights are all alike (effective sample size {share:.1%}): this is behaviour cloning; "
            f"give more steps if the values are still young, a larger temperature than {temperature:g}, or "
            "data in which some actions are better",
        )


def _of_actions(
    settings: Settings, metrics: Mapping[str, float], datas: float
) -> Iterator[tuple[str, str]]:
    """Compare the policy's actions with the data's, of which this is the share at bounds."""
    policys = metrics.get("actions_at_bounds", 0.0)
    if policys > SATURATED and policys > 2 * datas:
        yield (
            "bounds",
            f"{policys:.0%} of the policy's actions are at their bounds, of the data's {datas:.0%}: it does "
            "what is not in the data; check the actions' bounds, or give a smaller temperature",
        )
    explained = metrics.get("actions_explained", 0.0)
    if explained > EXPLAINED:
        advice = ": cloning finds what there is"
        if hasattr(settings.algorithm, "discount"):  # it has values, and does not only clone
            advice = f". If cloning (algorithm=bc) is better, {_first_things(settings)}"
        yield (
            "narrow",
            f"the actions follow from the observations ({explained:.1%} of their variance): data of one "
            f"behaviour, between whose actions there is little to choose{advice}",
        )
