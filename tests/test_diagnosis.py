"""What is said at the end of a run: on data made to show each, and nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box

from torchrl_iql import OfflineDataset
from torchrl_iql_recipes.experiment import build, offline, results
from torchrl_iql_recipes.experiment.diagnosis import Diagnosis
from torchrl_iql_recipes.experiment.networks import architecture_for
from torchrl_iql_recipes.experiment.training import OFFLINE
from torchrl_iql_recipes.experiment.validation import HeldOut

EPISODES, LENGTH = 150, 20
N = EPISODES * LENGTH


def states(rng: np.random.Generator) -> np.ndarray:
    return 0.3 * rng.normal(size=(EPISODES, LENGTH, 3)).cumsum(axis=1).reshape(N, 3)


def made(reward: Any, action: Any = None, **options: Any) -> OfflineDataset:
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
        **options,
    )


def found(
    dataset: OfflineDataset,
    *given: str,
    steps: int = 300,
    held_out: float = 0.0,
    returns: Sequence[tuple[float, float]] = (),
    data_returns: Sequence[float] = (100.0,),
) -> dict[str, str]:
    """Train on it, but for the share that is held out, and return what is said.

    Args:
        dataset: all there is.
        given: settings.
        steps: of gradient.
        held_out: the share.
        returns: of evaluations, with their standard errors.
        data_returns: what the episodes of the data are taken to have had.
    """
    settings = OFFLINE.settings(
        [
            *("dataset=made", "task=own", "normalize_observation=false", "hidden_sizes=[32,32]"),
            *("batch_size=64", "reward=none", "compute.execution=eager", "learning_rate=3e-3"),
            *(f"steps={steps}", "eval_episodes=0", *given),
        ]
    )
    (learner,) = settings.learners
    learned, rest = dataset.split(held_out, seed=0) if held_out else (dataset, None)
    learned = build.learned_from(settings, learned)
    architecture = architecture_for(settings.networks, learned, settings.algorithm)
    step = build.step_for([learner], architecture, learned, settings.compute, steps)
    minibatches, rows = build.over_steps(settings, learned).minibatches(64), []
    look = None if rest is None else HeldOut(settings, rest)
    for _ in range(20):
        step.run(minibatches, steps // 20)
        row = {"step": step.steps, **{key: value.item() for key, value in step.means().items()}}
        rows.append(row | (look(step.losses)[0] if look is not None else {}))
    for row, (mean, error) in zip(rows[-len(returns) :], returns, strict=False):
        row |= {"eval/score": mean, "eval/return": mean, "eval/return_stderr": error}
    look = Diagnosis(settings, learned if rest is None else rest, np.array(data_returns))
    return look(learner, step.losses[0], rows)


def of_the_action(s: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return a[:, 0] + 0.1 * rng.normal(size=len(a))


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    assert found(made(of_the_action), "discount=0.5") == {}


def test_where_nothing_is_wrong_with_what_is_held_out_nothing_is_said() -> None:
    assert found(made(of_the_action), "discount=0.5", "validation=0.1", held_out=0.1) == {}


def test_values_that_are_overfitted() -> None:
    """Rewards of chance, and seven short episodes to remember them by."""

    def chance(s: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=len(a))

    settings = ("discount=0.5", "validation=0.95", "hidden_sizes=[64,64]")
    told = found(made(chance), *settings, steps=1500, held_out=0.95)
    assert "values" not in told  # that they need more steps
    got = told["overfitted"]
    assert got.startswith("the values are overfitted: the loss of Q is ")
    assert "whose TD error was lowest after" in got


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ([(97, 2)], {}),
        ([(80, 15)], {}),
        ([(80, 4)], {"poor": "the policy's return, 80 ± 4, is below the mean of the data's episodes, 100: "}),
        ([(140, 5), (120, 5)], {}),
        ([(140, 1), (110, 2)], {"fallen": "the score was 140 after 285 steps, and is 110 at the end"}),
        ([(110, 2), (140, 1)], {}),
    ],
)  # fmt: skip
def test_scores_below_the_data_and_below_those_before(
    returns: list[tuple[float, float]], said: dict[str, str]
) -> None:
    got = found(made(of_the_action), "discount=0.5", returns=returns)
    assert got.keys() == said.keys()
    baseline = found(made(of_the_action), "discount=0.5", "temperature=0", returns=returns)
    assert "poor" not in baseline
    assert all(got[name].startswith(its) for name, its in said.items())


@pytest.mark.parametrize(("episodes", "is_said"), [(5, False), (200, True)])
def test_few_episodes_that_all_fail_are_not_below_the_data(episodes: int, is_said: bool) -> None:
    """Of five none arrives in 44% of the cases if 15 in 100 do."""
    data = [1.0] * 15 + [0.0] * 85
    settings = "discount=0.5", f"eval_episodes={episodes}", "env=Pendulum-v1"
    got = found(made(of_the_action), *settings, returns=[(0.0, 0.0)], data_returns=data)
    assert ("poor" in got) is is_said


def test_nothing_is_advised_that_is_done() -> None:
    its = "discount=0.5", "normalize_observation=true"
    said = found(made(of_the_action), *its, returns=[(140, 1), (80, 2)])
    assert said.keys() == {"poor", "fallen"}
    assert not any("normalize_observation" in note for note in said.values())
    assert "a smaller temperature and more steps are the first things to try" in said["poor"]
    its = "algorithm=bc", "normalize_observation=true"
    said = found(made(of_the_action), *its, returns=[(140, 1), (80, 2)])
    assert said["poor"].endswith("more steps are the first thing to try")


def test_episodes_longer_than_the_environments_are_not_compared() -> None:
    """What is paid after the environment's last step, no policy can have there."""
    walks = made(of_the_action)
    longest = int(walks.episode_lengths.max())
    for limit, cut in ((longest - 1, (longest - 1, longest)), (longest, None)):
        spec = EnvSpec("Pendulum-v1", max_episode_steps=limit)
        assert offline._cut_off(replace(walks, env_spec=spec)) == cut
        assert offline._are_comparable(replace(walks, env_spec=spec)) == (cut is None)
    assert offline._cut_off(walks) is None


def test_pieces_of_episodes_are_not_compared() -> None:
    """As those that end without a record of it, and steps at a goal that are episodes of their own."""
    walks = made(of_the_action)
    assert offline._are_comparable(walks)
    stopped = replace(walks.recording, stopped=len(walks.episode_lengths))
    assert not offline._are_comparable(replace(walks, recording=stopped))
    ones, whole = torch.ones(100, dtype=torch.int64), walks.episode_lengths[:60]
    assert not offline._are_comparable(replace(walks, episode_lengths=torch.cat([ones, whole])))


def test_rewards_that_are_all_the_same() -> None:
    got = found(made(lambda s, a, rng: np.full(N, -1.0)), "discount=0.5", steps=30)
    assert got.keys() <= {"rewards", "bounds", "narrow"}  # nothing of values and weights beside it
    got = got["rewards"]
    assert got.startswith("every reward is -1: ")
    several = found(made(lambda s, a, rng: np.full(N, -1.0)), "discount=0.5", "n_steps=3", steps=20)
    assert several["rewards"] == got


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
    # TD3+BC has no mean of Q, but lambda.
    its = ("algorithm=td3bc", "normalize_observation=false", "policy_noise=0.1")
    got = found(always, *its, "discount=0.99", "learning_rate=3e-4")["values"]
    assert "the mean of |Q| went from " in got
    assert "values" not in found(always, *its, "discount=0.5", steps=600)
    its = ("algorithm=cql", "alpha=0", "num_random=1", "discount=0.99", "learning_rate=3e-4")
    assert "the mean of Q went from " in found(always, *its, steps=100)["values"]


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
    assert got["narrow"].endswith("little to choose: cloning finds what there is")
    got = found(one, "algorithm=td3bc", "alpha=0", "decay_steps=0", steps=600)
    assert ". If cloning (algorithm=bc) is better, normalize" in got["narrow"]
    many = made(of_the_action, lambda s, rng: np.tanh(s @ weights + rng.normal(size=(N, 2))))
    assert "narrow" not in found(many, "algorithm=bc", "decay_steps=0", steps=600)


@pytest.mark.parametrize("names", [[""], ["seed=0", "seed=1", "seed=2"]])
def test_a_line_says_with_whom_it_is_wrong(names: list[str]) -> None:
    replicas = [{"name": name, "diagnosis": {"values": f"of {name}"}} for name in names]
    whom = " (seed=0 and 2 more)" if len(names) > 1 else ""
    assert results.diagnosis(replicas) == [f"Note{whom}: of {names[0]}"]
    assert results.diagnosis([{"name": ""}]) == []


def test_a_wide_action_that_follows_does_not_hide_one_that_does_not() -> None:
    """A throttle of chance between -0.9 and 0.9, and a steering angle in tens of degrees."""
    weights = np.random.default_rng(1).normal(size=3)

    def action(s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.stack([rng.uniform(-0.9, 0.9, N), 30 * np.tanh(s @ weights)], axis=1)

    wide = made(of_the_action, action, action_space=Box(-30, 30, (2,)))
    assert "narrow" not in found(wide, "algorithm=bc", "decay_steps=0", steps=600)
