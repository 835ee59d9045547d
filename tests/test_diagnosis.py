"""What is said at the end of a run: on data made to show each, and nothing where nothing is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from torchrl_iql import OfflineDataset
from torchrl_iql_recipes.experiment import build, results
from torchrl_iql_recipes.experiment.diagnosis import Diagnosis
from torchrl_iql_recipes.experiment.door import OFFLINE
from torchrl_iql_recipes.experiment.networks import architecture_for

EPISODES, LENGTH = 150, 20
N = EPISODES * LENGTH


def states(rng: np.random.Generator) -> np.ndarray:
    return 0.3 * rng.normal(size=(EPISODES, LENGTH, 3)).cumsum(axis=1).reshape(N, 3)


def made(reward: Any, action: Any = None) -> OfflineDataset:
    """Make walks with rewards, and actions, that are functions of states, actions and chance."""
    rng = np.random.default_rng(0)
    s = states(rng)
    a = rng.uniform(-0.9, 0.9, size=(N, 2)) if action is None else action(s, rng)
    return OfflineDataset.from_arrays(
        "made",
        observations=s,
        actions=a,
        rewards=reward(s, a, rng),
        terminals=np.zeros(N, dtype=bool),
        timeouts=np.arange(1, N + 1) % LENGTH == 0,
    )


def found(dataset: OfflineDataset, *given: str, steps: int = 300) -> dict[str, str]:
    """Train on it, and return what is said."""
    settings = OFFLINE.settings(
        [
            *("dataset=made", "task=own", "normalize_observation=false", "hidden_sizes=[32,32]"),
            *("batch_size=64", "reward=none", "compute.execution=eager", "learning_rate=3e-3"),
            *(f"steps={steps}", "eval_episodes=0", *given),
        ]
    )
    (learner,) = settings.learners
    learned = build.learned_from(settings, dataset)
    architecture = architecture_for(settings.networks, learned)
    step = build.step_for([learner], architecture, learned, settings.compute, steps)
    minibatches, rows = learned.minibatches(64), []
    for _ in range(20):
        metrics = step.run(minibatches, steps // 20)
        rows.append({key: value.item() for key, value in metrics.items()})
    return Diagnosis(settings, learned)(learner, step.losses[0], rows)


def of_the_action(s: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return a[:, 0] + 0.1 * rng.normal(size=len(a))


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    assert found(made(of_the_action), "discount=0.5") == {}


def test_rewards_that_are_all_the_same() -> None:
    got = found(made(lambda s, a, rng: np.full(N, -1.0)), "discount=0.5")["rewards"]
    assert got.startswith("every reward is -1: ")


def test_rewards_that_are_never_reached() -> None:
    def one(s: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return (np.arange(N) == 7).astype(float)

    got = found(made(one), "discount=0.5")["rewards"]
    assert got.startswith("1 of 150 episodes have a reward other than 0: ")
    assert "rewards" not in found(made(one), "algorithm=bc")  # which does not ask


def test_values_that_are_not_converged() -> None:
    always = made(lambda s, a, rng: 1 + 0.1 * a[:, 0])
    got = found(always, "discount=0.99", "learning_rate=3e-4")["values"]
    assert "the mean of Q went from " in got
    assert "values" not in found(always, "discount=0.5", steps=600)


def test_weights_of_which_few_count() -> None:
    def seldom(s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.where(rng.random((N, 2)) < 0.01, 0.8, rng.uniform(-0.9, 0.0, size=(N, 2)))

    dataset = made(lambda s, a, rng: 10.0 * (a[:, 0] > 0.5), seldom)
    got = found(dataset, "discount=0.01", "expectile=0.5", "temperature=20", steps=1000)
    assert got["weights"].startswith("the weights are noise: of a minibatch of 64 1 count")


def test_weights_that_are_all_alike() -> None:
    got = found(made(of_the_action), "discount=0.5", "temperature=1e-3")
    assert got["weights"].startswith("the weights are all alike (effective sample size 100.0%)")
    assert "weights" not in found(made(of_the_action), "discount=0.5", "temperature=0")


def test_weights_that_are_clipped() -> None:
    def mostly(s: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.where(a[:, 0] > -0.4, 1.0, -3.0)

    got = found(made(mostly), "discount=0.01", "expectile=0.5", "temperature=20", steps=1000)
    assert "% of the weights are at their largest" in got["clipped"]
    assert "weights" not in got


def test_actions_at_their_bounds() -> None:
    larger = made(lambda s, a, rng: a.sum(1))
    got = found(larger, "algorithm=td3bc", "alpha=100", "discount=0.01", steps=600)
    assert "of the policy's actions are at their bounds, of the data's 0%" in got["bounds"]


def test_data_of_one_behaviour() -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3, 2))
    one = made(of_the_action, lambda s, _: np.tanh(s @ weights))
    got = found(one, "algorithm=bc", "decay_steps=0", steps=600)
    assert got["narrow"].startswith("the actions follow from the observations (100.0%")
    many = made(of_the_action, lambda s, rng: np.tanh(s @ weights + rng.normal(size=(N, 2))))
    assert "narrow" not in found(many, "algorithm=bc", "decay_steps=0", steps=600)


@pytest.mark.parametrize("names", [[""], ["seed=0", "seed=1", "seed=2"]])
def test_a_line_says_with_whom_it_is_wrong(names: list[str]) -> None:
    replicas = [{"name": name, "diagnosis": {"values": f"of {name}"}} for name in names]
    whom = " (seed=0 and 2 more)" if len(names) > 1 else ""
    assert results.diagnosis(replicas) == [f"Note{whom}: of {names[0]}"]
    assert results.diagnosis([{"name": ""}]) == []
