"""Data with nothing to learn from, or too little: what the pages say happens, from data to policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch.testing import assert_close

from iql_losses import Sizes, iql_loss, networks
from torchrl_iql import DiscreteIQLLoss, IQLLoss, OfflineDataset, TrainStep, models
from torchrl_iql.training import NonFiniteError

ROWS, GAMMA, SMALL = 16, 0.5, (16,)


def data(rows: int = ROWS, choices: int | None = None, **changes: Any) -> OfflineDataset:
    """Make one episode that goes on from row to row and terminates, of random numbers but for changes."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(rows + 1, 2))
    actions = (
        rng.uniform(-0.9, 0.9, (rows, 1)) if choices is None else rng.integers(choices, size=rows)
    )
    given = {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": actions,
        "rewards": rng.normal(size=rows),
        "terminals": np.arange(rows) == rows - 1,
        "timeouts": np.zeros(rows, bool),
        "action_space": None if choices is None else spaces.Discrete(choices),
    }
    return OfflineDataset.from_arrays("own", **given | changes)


def trained(
    dataset: OfflineDataset, steps: int = 400, batch_size: int = 32, **kwargs: Any
) -> tuple[IQLLoss, TensorDict]:
    """Train on them, observations normalised, as a run does; return the loss and its last results."""
    torch.manual_seed(0)
    same = {"hidden_sizes": SMALL, "observation_statistics": dataset.observation_statistics()}
    if isinstance(space := dataset.action_space, spaces.Discrete):
        n = int(space.n)
        critics = [models.discrete_qvalue_network(2, n, **same) for _ in range(2)]
        policy, value = models.categorical_policy(2, n, **same), models.value_network(2, **same)
        loss = DiscreteIQLLoss(policy, critics, value, action_space="categorical", **kwargs)
    else:
        critics = models.qvalue_ensemble(2, 1, **same)
        policy, value = models.gaussian_policy(2, 1, **same), models.value_network(2, **same)
        loss = IQLLoss(policy, critics, value, **kwargs)
    loss.make_value_estimator(gamma=GAMMA)
    step = TrainStep(loss, learning_rate=1e-2, target_rate=0.1)
    results = step.run(dataset.minibatches(batch_size), steps)
    assert all(value.isfinite() for value in results.values())
    assert all(parameter.isfinite().all() for parameter in loss.parameters())
    return loss, results


@torch.no_grad()
def outputs(loss: IQLLoss, dataset: OfflineDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the policy's actions and V at the states of the data."""
    td = dataset.transitions.select("observation")
    policy, value = map(loss.get_stateful_net, ("actor_network", "value_network"))
    return policy(td.copy())["action"], value(td.copy())["state_value"]


def test_large_rewards_are_learnt_from_or_brought_to_one() -> None:
    """1e6 trains: weights are clipped or 0 then. By unit_rms it is what rewards of 1 are."""
    rewards = np.random.default_rng(1).normal(size=ROWS)
    _, results = trained(data(rewards=1e6 * rewards))
    assert results["loss_qvalue"] > 1e9
    policies = [
        outputs(trained(dataset)[0], dataset)[0]
        for dataset in (
            data(rewards=scale * rewards, reward_rule="unit_rms")
            for scale in (1, 2.0**20, 2.0**100)
        )
    ]
    assert_close(policies[1], policies[0])
    assert_close(policies[2], policies[0])


def test_rewards_whose_squares_are_infinite_end_the_training() -> None:
    """Q would not move, without a word: the second moments are infinite."""
    dataset = data(rewards=np.full(ROWS, 1e30))
    step = TrainStep(iql_loss(nets=networks(sizes=Sizes(2, 1))))
    step.run(dataset.minibatches(8), 3)
    with pytest.raises(NonFiniteError, match=r"step 1 .* next/reward 1e\+30.*'unit_rms'"):
        step.check_finite()


@pytest.mark.parametrize("value", [0.0, 7.0, -1e6])
def test_observations_that_are_all_the_same(value: float) -> None:
    """They are normalised to 0: every state is the same one, and V is the data's."""
    same = np.full((ROWS, 2), value)
    dataset = data(
        observations=same, next_observations=same, rewards=np.ones(ROWS), terminals=np.zeros(ROWS)
    )
    actions, v = outputs(trained(dataset)[0], dataset)
    assert actions.unique(dim=0).shape == (1, 1)
    assert_close(v, torch.full_like(v, 1 / (1 - GAMMA)), rtol=0.05, atol=0)


@pytest.mark.parametrize(("terminated", "expected"), [(True, 1.0), (False, 2.0)])
def test_one_transition(terminated: bool, expected: float) -> None:
    """It is learnt by heart, in minibatches that hold nothing else."""
    state = np.zeros((1, 2))
    changes = {"observations": state, "next_observations": state, "terminals": [terminated]}
    dataset = data(1, rewards=[1.0], **changes)
    actions, v = outputs(trained(dataset)[0], dataset)
    assert_close(v.item(), expected, rtol=0.05, atol=0)
    assert_close(actions, dataset.transitions["action"], rtol=0, atol=0.05)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_rewards_that_are_all_the_same_and_no_terminal(reward: float) -> None:
    """V is r / (1 - gamma) everywhere: advantages vanish, and what is left is behaviour cloning."""
    dataset = data(rewards=np.full(ROWS, reward), terminals=np.zeros(ROWS, bool))
    loss, results = trained(dataset, 1000)
    v = outputs(loss, dataset)[1]
    assert_close(v, torch.full_like(v, reward / (1 - GAMMA)), rtol=0, atol=0.15)
    assert results["advantage"].abs() < 0.1


@pytest.mark.parametrize("rule", ["return_range", "unit_rms", "minus_one"])
def test_reward_rules_of_zeros(rule: Any) -> None:
    """A range of 0 is refused; over a root mean square of 0 they stay; -1 a step is a task."""
    changes = {"rewards": np.zeros(ROWS), "reward_rule": rule}
    if rule == "return_range":
        with pytest.raises(ValueError, match="all of them are 0; 'unit_rms' needs none"):
            data(**changes)
    else:
        rewards = data(**changes).transitions["next", "reward"]
        assert rewards.unique().tolist() == [-1.0 if rule == "minus_one" else 0.0]


def test_one_action_only() -> None:
    """The policy takes it everywhere; its density is bounded, since its deviation is."""
    dataset = data(actions=np.full((ROWS, 1), 0.5))
    loss, results = trained(dataset, 1500)
    actions = outputs(loss, dataset)[0]
    assert_close(actions, torch.full_like(actions, 0.5), rtol=0, atol=0.05)
    deviation = torch.tensor(models.LOG_STD_BOUNDS[0]).exp()
    assert results["entropy"] >= -torch.distributions.Normal(0, deviation).log_prob(torch.zeros(()))


@pytest.mark.parametrize("choices", [1, 3])
def test_one_discrete_action_only(choices: int) -> None:
    dataset = data(choices=choices, actions=np.full(ROWS, choices - 1))
    actions = outputs(trained(dataset)[0], dataset)[0]
    assert (actions == choices - 1).all()


def test_a_batch_that_is_larger_than_the_data() -> None:
    """It is drawn with replacement, as any other."""
    dataset = data(3)
    indices = dataset.minibatches(64)(0)[1]
    assert indices.shape[-1] == 64
    assert indices.unique().tolist() == [0, 1, 2]
    trained(dataset, 10, batch_size=64)


def test_weights_that_are_all_clipped() -> None:
    """The gradient of the policy is that of behaviour cloning, times the clip."""
    td, clip = data().transitions, 1e-3
    gradients = []
    for settings in ({"weight_clip": clip}, {"temperature": 0.0}):
        torch.manual_seed(0)
        same = {"hidden_sizes": SMALL}
        networks = models.gaussian_policy(2, 1, **same), models.qvalue_ensemble(2, 1, **same)
        loss = IQLLoss(*networks, models.value_network(2, **same), **settings)
        results = loss(td.copy())
        gradients.append(
            torch.autograd.grad(results["loss_actor"], list(loss.actor_network_params.parameters()))
        )
        assert results["clip_fraction"] == ("weight_clip" in settings)
    for clipped, cloned in zip(*gradients, strict=True):
        assert_close(clipped, clip * cloned)
