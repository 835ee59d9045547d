"""What is said of transitions without an environment: against NumPy, and of every algorithm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from test_algorithms import EVERY, config
from torchrl_iql import IQLLoss, OfflineDataset, load_dataset, models
from torchrl_iql.objectives import FQELoss
from torchrl_iql.validation import Validator
from torchrl_iql_recipes.experiment import build
from torchrl_iql_recipes.experiment.networks import Networks, architecture_for

GAMMA = 0.9


def walks(seed: int = 0, timeouts: bool = True) -> OfflineDataset:
    rng, n = np.random.default_rng(seed), 200
    ends = np.arange(1, n + 1) % 20 == 0
    stops = ends & (np.arange(n) < 100 if timeouts else np.zeros(n, dtype=bool))
    path = rng.normal(size=(n + 1, 3)).cumsum(0)
    return OfflineDataset.from_arrays(
        "walks",
        observations=path[:-1],
        next_observations=path[1:],
        actions=rng.uniform(-1, 1, size=(n, 2)),
        rewards=rng.normal(size=n),
        terminals=ends & ~stops,
        timeouts=stops,
    )


def iql(**settings: Any) -> IQLLoss:
    torch.manual_seed(0)
    small = {"hidden_sizes": (16, 16)}
    loss = IQLLoss(
        models.gaussian_policy(3, 2, dropout=0.5, **small),
        models.qvalue_ensemble(3, 2, **small),
        models.value_network(3, **small),
        **settings,
    )
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def mlp(state: dict[str, np.ndarray], network: str, x: np.ndarray, which: int | None) -> np.ndarray:
    """Evaluate a network of the loss in float64."""
    of = {key: value for key, value in state.items() if key.startswith(f"{network}_params.")}
    weights = [value for key, value in of.items() if key.endswith("weight")]
    biases = [value for key, value in of.items() if key.endswith("bias")]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if which is not None:
            weight, bias = weight[which], bias[which]
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if k < len(weights) - 1 else x
    return x


def test_of_iql_it_is_what_numpy_says() -> None:
    dataset, loss = walks(), iql(temperature=3.0, weight_clip=1.5)
    got = Validator(dataset, GAMMA)(loss)
    state = {key: value.double().numpy() for key, value in loss.state_dict().items()}
    rows = dataset.transitions
    s, a = rows["observation"].double().numpy(), rows["action"].double().numpy()
    r = rows["next", "reward"][:, 0].double().numpy()
    following = rows["next", "observation"].double().numpy()
    terminated = rows["next", "terminated"][:, 0].numpy()
    v = mlp(state, "value_network", s, None)[:, 0]
    next_v = mlp(state, "value_network", following, None)[:, 0]
    sa = np.concatenate([s, a], axis=1)
    q, target_q = (
        np.stack([mlp(state, name, sa, i)[:, 0] for i in range(2)])
        for name in ("qvalue_network", "target_qvalue_network")
    )
    advantage = target_q.min(0) - v
    weight = np.minimum(np.exp(3 * advantage), 1.5)
    mean = np.tanh(mlp(state, "actor_network", s, None))
    target = r + GAMMA * ~terminated * next_v

    returns, known = np.zeros(200), np.zeros(200, dtype=bool)
    for t in reversed(range(200)):
        last = t % 20 == 19
        returns[t] = r[t] + (0 if last else GAMMA * returns[t + 1])
        ended_so = t >= 100  # these episodes terminate, the others are stopped
        known[t] = ended_so or GAMMA ** (20 - t % 20) < 0.05
    assert 0 < known.sum() < 200
    expected = {
        "td_error": np.sqrt(((q - target) ** 2).max(0).mean()),
        "action_error": np.sqrt((((mean - a) / a.std(0)) ** 2).mean()),
        "actions_explained": 1 - (((mean - a) / a.std(0)) ** 2).mean(0).max(),
        "actions_at_bounds": (np.abs(mean) > 0.98).mean(),
        "advantage": advantage.mean(),
        "value": v.mean(),
        "qvalue": q.mean(),
        "clip_fraction": (weight == 1.5).mean(),
        "initial_value": v[::20].mean(),
        "q_bias": (q.mean(0) - returns)[known].mean(),
        "q_correlation": spearmanr(q.mean(0)[known], returns[known]).statistic,
        "effective_sample_size": weight.sum() ** 2 / (200 * (weight**2).sum()),
        "loss_qvalue": ((q - target) ** 2).sum(0).mean(),
        "advantage_10": np.quantile(advantage, 0.1),
        "advantage_50": np.quantile(advantage, 0.5),
        "advantage_90": np.quantile(advantage, 0.9),
    }
    assert set(got.metrics) == {*expected, "loss_actor", "loss_value", "log_likelihood"}
    for name, value in expected.items():
        assert got.metrics[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    np.testing.assert_allclose(got.returns, returns[known], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.q, q.mean(0)[known], rtol=1e-4, atol=1e-5)


def test_a_return_is_known_where_an_episode_ends_or_the_end_is_far() -> None:
    dataset = walks(timeouts=False)
    assert len(Validator(dataset, 1.0)(iql()).q) == 200
    stopped = walks()
    assert len(Validator(stopped, 1.0)(iql()).q) == 100
    assert len(Validator(stopped, 0.0)(iql()).q) == 200
    none = Validator(stopped, None)(iql())
    assert "q_bias" not in none.metrics
    assert len(none.q) == 0


def test_over_several_steps_the_loss_is_of_their_sums_and_the_returns_of_single_ones() -> None:
    dataset, loss = walks(), iql()
    got = Validator(dataset, GAMMA, n_steps=3)(loss).metrics
    summed = Validator(dataset.n_step(3, GAMMA), GAMMA)(loss).metrics
    single = Validator(dataset, GAMMA)(loss).metrics
    assert got["loss_qvalue"] == summed["loss_qvalue"] != single["loss_qvalue"]
    assert got["q_bias"] == single["q_bias"]
    assert got.keys() == single.keys()
    for given in ({"n_steps": 3}, {"n_steps": 0, "discount": GAMMA}):
        with pytest.raises(ValueError, match=f"n_steps={given['n_steps']} must be at least 1"):
            Validator(dataset, **given)  # pyright: ignore
    with pytest.raises(ValueError, match="discount must be from 0 to 1"):
        Validator(dataset, 2.0)


def test_a_loss_without_a_policy_is_looked_at() -> None:
    dataset = walks()
    transitions = dataset.transitions.copy()
    transitions["next"] = transitions["next"].copy().set("action", transitions["action"])
    loss = FQELoss(models.qvalue_ensemble(3, 2, num=2, hidden_sizes=(8,)), discount=GAMMA)
    metrics = Validator(replace(dataset, transitions=transitions), GAMMA)(loss).metrics
    assert {"loss_qvalue", "td_error", "q_bias"} <= metrics.keys()
    assert not {"action_error", "initial_value"} & metrics.keys()


@EVERY
def test_of_every_algorithm_there_is_what_it_has(name: str, maze_id: str) -> None:
    settings = config(name, maze_id)
    dataset = build.learned_from(settings, load_dataset(maze_id))
    described = architecture_for(settings.networks, dataset, settings.algorithm)
    architecture = settings.algorithm.architecture(described, dataset)
    torch.manual_seed(0)
    loss = settings.algorithm.loss(Networks(architecture))
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.train()
    look = Validator(dataset, getattr(settings.algorithm, "discount", None))
    generator = torch.get_rng_state()
    found = look(loss)
    assert torch.equal(generator, torch.get_rng_state())
    assert loss.training
    after = loss.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert look(loss).metrics == found.metrics
    assert not [key for key, value in found.metrics.items() if not np.isfinite(value)]
    has = {
        "action_error": name != "dt",
        "td_error": name not in ("bc", "percent_bc", "dt"),
        "q_bias": name not in ("bc", "percent_bc", "dt"),
        "initial_value": name not in ("bc", "percent_bc", "dt"),
        "log_likelihood": name not in ("td3bc", "dt"),
        "effective_sample_size": name in ("iql", "onestep", "awac"),
    }
    assert {key: key in found.metrics for key in has} == has
    assert any(key.startswith("loss_") for key in found.metrics)


def test_a_policy_that_is_the_datas_makes_no_error() -> None:
    dataset = walks()
    loss = iql()
    with torch.no_grad():
        batch = dataset.transitions.select("observation")
        policy = loss.get_stateful_net("actor_network").eval()
        dataset.transitions["action"] = policy.get_dist(batch).mean
    assert Validator(dataset, GAMMA)(loss).metrics["action_error"] == pytest.approx(0, abs=1e-6)


def test_many_transitions_are_looked_at_evenly() -> None:
    rng, n = np.random.default_rng(0), 50_000
    dataset = OfflineDataset.from_arrays(
        "many",
        observations=rng.normal(size=(n, 3)),
        next_observations=rng.normal(size=(n, 3)),
        actions=rng.uniform(-1, 1, size=(n, 2)),
        rewards=np.linspace(0, 1, n),
        terminals=np.ones(n, dtype=bool),
    )
    found = Validator(dataset, GAMMA)(iql())
    assert len(found.returns) == 20_000
    assert found.returns.mean().item() == pytest.approx(0.5, abs=1e-3)


def test_without_transitions_there_is_nothing_to_look_at() -> None:
    empty = OfflineDataset.empty(build.environment("Hopper-v5"))  # pyright: ignore
    with pytest.raises(ValueError, match="no transitions to look at"):
        Validator(empty)
