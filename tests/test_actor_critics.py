"""AWAC, TD3+BC and CQL against float64 NumPy, on networks that NumPy can evaluate: linear ones."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import objectives
from torchrl.data import Bounded
from torchrl.modules import Actor, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator

from torchrl_iql import AWACLoss, TrainStep, models
from torchrl_iql.models import Architecture
from torchrl_iql.objectives import CQLLoss, TD3BCLoss
from torchrl_iql_recipes.algorithms.cql import CQL
from torchrl_iql_recipes.algorithms.td3bc import TD3BC
from torchrl_iql_recipes.experiment.networks import Networks

B, D, A, K, GAMMA = 6, 3, 2, 4, 0.9
LOW, HIGH = np.array([-1.0, -2.0]), np.array([1.0, 3.0])
BOUNDS = torch.tensor(LOW), torch.tensor(HIGH)

pytestmark = pytest.mark.filterwarnings("ignore:The name .* wasn't part of the annotations")


class Linear(nn.Module):
    """A linear function of all its inputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, dtype=torch.float64)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat(inputs, dim=-1))


class LocAndScale(Linear):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, log_scale = super().forward(*inputs).chunk(2, dim=-1)
        return loc, log_scale.exp()


def stochastic(distribution: Any) -> ProbabilisticActor:
    squashed = distribution is TanhNormal
    return ProbabilisticActor(
        TensorDictModule(LocAndScale(D, 2 * A), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(*BOUNDS, (A,), dtype=torch.float64),
        distribution_class=distribution,
        distribution_kwargs={"low": BOUNDS[0], "high": BOUNDS[1], "tanh_loc": False}
        if squashed
        else {},
    )


def qvalues() -> list[ValueOperator]:
    return [ValueOperator(Linear(D + A, 1), in_keys=["observation", "action"]) for _ in range(2)]


def batch(seed: int = 0) -> TensorDict:
    rng = np.random.default_rng(seed)
    entries = {
        "observation": rng.normal(size=(B, D)),
        "action": rng.uniform(0.9 * LOW, 0.9 * HIGH, (B, A)),
        "next": {
            "observation": rng.normal(size=(B, D)),
            "reward": rng.normal(size=(B, 1)),
            "terminated": np.arange(B)[:, None] == 1,
            "truncated": np.arange(B)[:, None] == 2,
            "done": (np.arange(B)[:, None] == 1) | (np.arange(B)[:, None] == 2),
        },
    }
    return TensorDict(entries, [B])


def moved_targets(loss: Any) -> Any:
    """Return a loss whose targets are not its networks."""
    with torch.no_grad():
        for name in ("target_qvalue_network_params", "target_actor_network_params"):
            for parameter in getattr(loss, name).values(True, True):
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss.make_value_estimator(gamma=GAMMA)
    return loss


# --- NumPy -------------------------------------------------------------------------------------------------


def layers(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of linear networks, ``[(N,) out, in]`` and ``[(N,) out]``."""
    found = {key[-1]: value.detach().numpy() for key, value in params.items(True, True)}
    return found["weight"], found["bias"]


def q_of(params: Any, state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Compute Q, ``[N, ...]``."""
    weight, bias = layers(params)
    inputs = np.concatenate([np.broadcast_to(state, (*action.shape[:-1], D)), action], -1)
    return np.stack([inputs @ w[0] + b[0] for w, b in zip(weight, bias, strict=True)])


def loc_and_scale(params: Any, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = layers(params)
    loc, log_scale = np.split(state @ weight.T + bias, 2, axis=-1)
    return loc, np.exp(log_scale)


def normal_log_prob(x: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (-0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(-1)


def squash(x: np.ndarray) -> np.ndarray:
    return LOW + (HIGH - LOW) * (np.tanh(x) + 1) / 2


def squashed_log_prob(action: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    y = 2 * (action - LOW) / (HIGH - LOW) - 1
    jacobian = np.log((1 - y**2) * (HIGH - LOW) / 2).sum(-1)
    return normal_log_prob(np.arctanh(y), loc, scale) - jacobian


def parts(td: TensorDict) -> tuple[np.ndarray, ...]:
    keys = ("observation", "action", ("next", "observation"))
    arrays = [td[key].numpy() for key in keys]
    flags = (td["next", name].numpy()[:, 0] for name in ("reward", "terminated"))
    return *arrays, *flags


# --- AWAC --------------------------------------------------------------------------------------------------


def awac(**settings: Any) -> AWACLoss:
    torch.manual_seed(3)
    settings = {"bounds": BOUNDS, "temperature": 2.0, "weight_clip": 1.5, **settings}
    return moved_targets(AWACLoss(stochastic(IndependentNormal), qvalues(), **settings))


def test_awac_is_numpy() -> None:
    loss, td = awac(reduction="none", scalar_output_mode="exclude"), batch()
    s, a, next_s, r, terminated = parts(td)
    torch.manual_seed(5)
    out = loss(td)
    torch.manual_seed(5)
    loc, scale = loc_and_scale(loss.actor_network_params, s)
    drawn = torch.normal(torch.tensor(loc), torch.tensor(scale)).numpy().clip(LOW, HIGH)
    next_loc, next_scale = loc_and_scale(loss.actor_network_params, next_s)
    after = torch.normal(torch.tensor(next_loc), torch.tensor(next_scale)).numpy().clip(LOW, HIGH)
    assert (drawn == HIGH).any() or (drawn == LOW).any()  # the bounds matter
    q = q_of(loss.qvalue_network_params, s, a)
    advantage = q.min(0) - q_of(loss.qvalue_network_params, s, drawn).min(0)
    weight = np.minimum(np.exp(2.0 * advantage), 1.5)
    assert 0 < (weight == 1.5).sum() < B
    next_q = q_of(loss.target_qvalue_network_params, next_s, after).min(0)
    target = r + GAMMA * ~terminated * next_q
    log_prob = normal_log_prob(a, loc, scale)
    np.testing.assert_allclose(out["loss_actor"].detach(), -weight * log_prob, rtol=1e-6)
    np.testing.assert_allclose(out["loss_qvalue"].detach(), ((q - target) ** 2).sum(0), rtol=1e-6)
    np.testing.assert_allclose(td["td_error"], ((q - target) ** 2).max(0), rtol=1e-6)
    # The policy's gradient is that of the weighted likelihood, of which the weight is no part.
    out["loss_actor"].sum().backward()
    of_loc = -(weight[:, None] * (a - loc) / scale**2).T @ s
    gradient = next(g.grad for k, g in loss.actor_network_params.items(True, True) if "weight" in k)
    np.testing.assert_allclose(gradient[:A], of_loc, rtol=1e-6)
    assert all(p.grad is None for p in loss.qvalue_network_params.values(True, True))
    assert all(p.grad is None for p in loss.target_qvalue_network_params.values(True, True))


def test_awac_reduces_masks_and_weighs() -> None:
    td = batch().set("priority_weight", torch.arange(1.0, B + 1, dtype=torch.float64)[:, None])
    mask = torch.arange(B) % 2 == 0
    each, mean = awac(reduction="none", scalar_output_mode="exclude"), awac()
    torch.manual_seed(5)
    expected = each(td.clone().exclude("priority_weight"))
    for entries, weights in (
        (td, td["priority_weight"][:, 0]),
        (td.clone().exclude("priority_weight").set(("collector", "mask"), mask), mask.double()),
    ):
        torch.manual_seed(5)
        out = mean(entries.clone())
        for key in ("loss_actor", "loss_qvalue"):
            average = (expected[key] * weights).sum() / weights.sum()
            torch.testing.assert_close(out[key], average)


def test_at_temperature_0_awac_clones() -> None:
    loss, td = awac(temperature=0.0), batch()
    out = loss(td)
    torch.testing.assert_close(out["loss_actor"], out["entropy"])


def test_awac_is_a_loss_module() -> None:
    loss, td = awac(), batch()
    assert loss.out_keys == ["loss_actor", "loss_qvalue", "entropy"]
    assert "state_value" not in str(loss.in_keys)
    torch.manual_seed(5)
    expected = loss(td)
    one_by_one = awac(deactivate_vmap=True)
    torch.manual_seed(5)
    looped = one_by_one(td)
    copied = pickle.loads(pickle.dumps(loss))
    torch.manual_seed(5)
    again = copied(td)
    for key in ("loss_actor", "loss_qvalue", "advantage"):
        torch.testing.assert_close(looped[key], expected[key])
        torch.testing.assert_close(again[key], expected[key])
    torch.manual_seed(5)
    by_names = loss(**{"_".join(k) if isinstance(k, tuple) else k: td[k] for k in loss.in_keys})
    torch.testing.assert_close(by_names[0], expected["loss_actor"])
    loss.set_keys(action="torque")
    renamed = td.clone().rename_key_("action", "torque")
    with pytest.raises(KeyError, match="'action'"):
        loss(renamed)  # its Q networks still read it
    with pytest.raises(KeyError, match="'reward'"):
        awac()(td.exclude(("next", "reward")))
    nan = td.clone()
    nan["next", "observation"][1] = torch.nan  # after a termination
    assert awac()(nan)["loss_qvalue"].isfinite()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"weight_clip": 0.0}, ValueError, "weight_clip"),
        ({"loss_function": "l3"}, ValueError, "loss_function"),
        ({"num_qvalue_nets": 3}, ValueError, "num_qvalue_nets=3"),
        ({"bounds": (1.0, -1.0)}, ValueError, r"bounds must be .*, got \(1.0, -1.0\)"),
        ({"bounds": (LOW, LOW)}, ValueError, "bounds must be the lowest and the highest action"),
    ],
)
def test_awac_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWACLoss(stochastic(IndependentNormal), qvalues(), **change)


def test_awac_leaves_given_bounds_alone() -> None:
    bounds = tuple(each.clone() for each in BOUNDS)
    loss = AWACLoss(stochastic(IndependentNormal), qvalues(), bounds=bounds)
    loss.low.fill_(0.0)
    assert torch.equal(bounds[0], BOUNDS[0])


def test_awac_needs_a_distribution() -> None:
    with pytest.raises(
        TypeError, match="actor_network is deterministic, expected one with get_dist"
    ):
        AWACLoss(models.deterministic_policy(D, A), models.qvalue_ensemble(D, A))  # pyright: ignore


# --- TD3+BC ------------------------------------------------------------------------------------------------


def td3bc(make: Callable[..., Any] = TD3BCLoss, **settings: Any) -> Any:
    torch.manual_seed(3)
    actor = Actor(
        Linear(D, A), in_keys=["observation"], spec=Bounded(*BOUNDS, (A,), dtype=torch.float64)
    )
    own = {} if make is TD3BCLoss else {"loss_function": "l2"}
    return moved_targets(make(actor, qvalues(), bounds=BOUNDS, **own, **settings))


@pytest.mark.parametrize("alpha", [2.5, 0.0])
@pytest.mark.parametrize(
    ("make", "half"), [(TD3BCLoss, (HIGH - LOW) / 2), (objectives.TD3BCLoss, np.ones(A))]
)
def test_td3bc_is_numpy(make: Callable[..., Any], half: np.ndarray, alpha: float) -> None:
    """In units of half the range, and TorchRL's in those of actions."""
    loss, td = td3bc(make, alpha=alpha), batch()
    s, a, next_s, r, terminated = parts(td)
    torch.manual_seed(5)
    out = loss(td)
    torch.manual_seed(5)
    noise = half * (0.2 * torch.randn(B, A, dtype=torch.float64)).clamp(-0.5, 0.5).numpy()
    weight, bias = layers(loss.actor_network_params)
    target_weight, target_bias = layers(loss.target_actor_network_params)
    taken = s @ weight.T + bias
    after = (next_s @ target_weight.T + target_bias + noise).clip(LOW, HIGH)
    q = q_of(loss.qvalue_network_params, s, a)
    next_q = q_of(loss.target_qvalue_network_params, next_s, after).min(0)
    target = r + GAMMA * ~terminated * next_q
    first = q_of(loss.qvalue_network_params, s, taken)[0]
    factor = alpha / np.abs(first).mean()
    actor_loss = -factor * first.mean() + (((taken - a) / half) ** 2).mean()
    np.testing.assert_allclose(
        out["loss_qvalue"].item(), ((q - target) ** 2).sum(0).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(out["loss_actor"].item(), actor_loss, rtol=1e-6)
    out["loss_actor"].backward()
    slope = layers(loss.qvalue_network_params)[0][0, 0, D:]
    of_output = -factor * slope / B + 2 * (taken - a) / half**2 / (B * A)
    gradient = next(g.grad for k, g in loss.actor_network_params.items(True, True) if "weight" in k)
    np.testing.assert_allclose(gradient, of_output.T @ s, rtol=1e-6)
    assert all(p.grad is None for p in loss.qvalue_network_params.values(True, True))


def test_the_scale_of_q_does_not_change_td3bcs_policy() -> None:
    gradients = []
    for scale in (1.0, 100.0):
        loss = td3bc()
        with torch.no_grad():
            for parameter in loss.qvalue_network_params.values(True, True):
                parameter.data.mul_(scale)
        loss(batch())["loss_actor"].backward()
        gradients.append([p.grad for p in loss.actor_network_params.values(True, True)])
    torch.testing.assert_close(gradients[0], gradients[1])


def in_units(unit: float, algorithm: Any, policy: Any) -> TensorDict:
    """Return the losses of an algorithm whose actions are a number of units, with bounds of one."""
    torch.manual_seed(0)
    architecture = Architecture(
        observation_size=D,
        action_size=A,
        action_bounds=([-unit] * A, [unit] * A),
        policy=policy,
        hidden_sizes=(8,),
    )
    loss = algorithm.loss(Networks(architecture))
    td = batch().apply(lambda x: x.float() if x.is_floating_point() else x)
    td["action"] = unit * td["action"].clamp(-0.9, 0.9)
    torch.manual_seed(1)
    return loss(td)


@pytest.mark.parametrize("units", [0.05, 20.0])
def test_td3bc_is_the_same_in_all_units_of_actions(units: float) -> None:
    """Bounds of 0.05 with actions of 0.05 a learn what bounds of 1 learn with a."""
    outputs = [in_units(unit, TD3BC(), "deterministic") for unit in (1.0, units)]
    for name in ("loss_qvalue", "loss_actor", "lmbd", "bc_loss"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-5)


def test_td3bc_reduces_masks_and_weighs() -> None:
    each, mean = td3bc(reduction="none"), td3bc()
    rows = torch.arange(B) % 2 == 0
    for kept in (rows, torch.ones(B, dtype=torch.bool)):
        td = batch()
        torch.manual_seed(5)
        expected = each(td[kept])  # with the lambda of what is kept
        weights = torch.arange(1.0, B + 1, dtype=torch.float64)
        for entries, weight in (
            (td.clone().set(("collector", "mask"), kept), torch.ones(B)),
            (td.clone().set(("collector", "mask"), kept).set("priority_weight", weights), weights),
        ):
            got, _ = mean.actor_loss(entries)
            average = (expected["loss_actor"] * weight[kept]).sum() / weight[kept].sum()
            torch.testing.assert_close(got, average)


def test_what_torchrls_td3bc_does_otherwise() -> None:
    """Weights do not reach its cloning term; fails when TorchRL has mended it."""
    losses = {}
    for make in (TD3BCLoss, objectives.TD3BCLoss):
        loss = td3bc(make, alpha=0.0)
        weighted = batch().set("priority_weight", torch.eye(B, dtype=torch.float64)[0])
        losses[make] = [loss.actor_loss(td)[0] for td in (batch(), weighted)]
    assert losses[objectives.TD3BCLoss][0] == losses[objectives.TD3BCLoss][1]
    assert (losses[TD3BCLoss][0] - losses[TD3BCLoss][1]).abs() > 1e-3


@pytest.mark.parametrize("make", [TD3BCLoss, CQLLoss])
@pytest.mark.parametrize("bounds", [(1.0, -1.0), (LOW, LOW), (-np.inf, np.inf)])
def test_bounds_that_are_none_are_refused(make: Callable[..., Any], bounds: Any) -> None:
    policy = Actor(Linear(D, A), in_keys=["observation"]) if make is TD3BCLoss else None
    with pytest.raises(ValueError, match="bounds must be the lowest and the highest action, fin"):
        make(policy or stochastic(TanhNormal), qvalues(), bounds=bounds)


# --- CQL ---------------------------------------------------------------------------------------------------


def cql(make: Callable[..., Any] = CQLLoss, **settings: Any) -> Any:
    torch.manual_seed(3)
    own = {"bounds": BOUNDS} if make is CQLLoss else {"loss_function": "l2"}
    settings = {"target_entropy": -2.0, "num_random": K, **own, **settings}
    return moved_targets(make(stochastic(TanhNormal), qvalues(), **settings))


def drawn_by(loss: CQLLoss, td: TensorDict, seed: int) -> np.ndarray:
    """Return what the loss draws after a seed: actions ``[3 K, B, A]``."""
    torch.manual_seed(seed)
    return loss._actions(td)[0].numpy()


def test_the_penalty_of_cql_is_numpy() -> None:
    loss, td = cql(min_q_weight=5.0), batch()
    s, a, next_s, *_ = parts(td)
    loss.q_loss(td)
    actions = drawn_by(loss, td, 7)
    torch.manual_seed(7)
    penalty, _ = loss.cql_loss(td)
    assert actions.shape == (3 * K, B, A)
    assert ((actions > LOW) & (actions < HIGH)).all()
    _, here, after = np.split(actions, 3)
    density = np.concatenate(
        [
            np.full((K, B), -np.log(HIGH - LOW).sum()),
            squashed_log_prob(here, *loc_and_scale(loss.actor_network_params, s)),
            squashed_log_prob(after, *loc_and_scale(loss.actor_network_params, next_s)),
        ]
    )
    q = q_of(loss.qvalue_network_params, s, actions)
    gaps = logsumexp(q - density, axis=1) - q_of(loss.qvalue_network_params, s, a)
    np.testing.assert_allclose(penalty.item(), 5.0 * gaps.sum(0).mean(), rtol=1e-6)
    # Of the uniform distribution, every part of the range.
    many = drawn_by(cql(num_random=4000), td, 0)[:4000]
    np.testing.assert_allclose(many.mean((0, 1)), (LOW + HIGH) / 2, atol=0.05)
    np.testing.assert_allclose(many.std((0, 1)), (HIGH - LOW) / np.sqrt(12), rtol=0.03)


def test_the_sum_over_actions_is_an_integral() -> None:
    """Of e^Q over all actions, known for a linear Q, within five standard errors of the estimate."""
    loss, td = cql(num_random=20_000), batch()
    s, a, *_ = parts(td)
    torch.manual_seed(7)
    actions, log_density = (drawn.numpy() for drawn in loss._actions(td))
    loss.q_loss(td)
    torch.manual_seed(7)
    loss.cql_loss(td)
    (weight, *_), (bias, *_) = layers(loss.qvalue_network_params)
    slopes = weight[0, D:]
    integral = np.log((np.exp(slopes * HIGH) - np.exp(slopes * LOW)) / slopes).sum()
    exact = s @ weight[0, :D] + bias[0] + integral
    terms = np.exp(q_of(loss.qvalue_network_params, s, actions)[0] - log_density)
    error = terms.std(0) / terms.mean(0) / np.sqrt(len(terms))
    found = (
        td["cql_q1_loss"].numpy() + q_of(loss.qvalue_network_params, s, a)[0] - np.log(len(terms))
    )
    assert (np.abs(found - exact) < 5 * error).all()
    assert error.max() < 0.1


def test_the_rest_of_cql_is_numpy() -> None:
    loss, td = cql(alpha_init=0.7), batch()
    s, a, next_s, r, terminated = parts(td)
    torch.manual_seed(5)
    out = loss(td)
    torch.manual_seed(5)
    next_loc, next_scale = loc_and_scale(loss.actor_network_params, next_s)
    after = squash(next_loc + next_scale * torch.randn(B, A, dtype=torch.float64).numpy())
    next_q = q_of(loss.target_qvalue_network_params, next_s, after).min(0)
    target = r + GAMMA * ~terminated * next_q
    q = q_of(loss.qvalue_network_params, s, a)
    np.testing.assert_allclose(
        out["loss_qvalue"].item(), ((q - target) ** 2).sum(0).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(out["qvalue"].item(), q.mean(), rtol=1e-6)
    torch.manual_seed(5)
    actor_loss, metadata = loss.actor_loss(td)
    torch.manual_seed(5)
    loc, scale = loc_and_scale(loss.actor_network_params, s)
    taken = squash(loc + scale * torch.randn(B, A, dtype=torch.float64).numpy())
    log_prob = squashed_log_prob(taken, loc, scale)
    lowest = q_of(loss.qvalue_network_params, s, taken).min(0)
    np.testing.assert_allclose(actor_loss.item(), (0.7 * log_prob - lowest).mean(), rtol=1e-5)
    alpha_loss, _ = loss.alpha_loss(metadata, mask_tensordict=td)
    expected = -np.log(0.7) * (log_prob - 2.0).mean()
    np.testing.assert_allclose(alpha_loss.item(), expected, rtol=1e-5)


@pytest.mark.parametrize("gap", [None, 5.0])
def test_cql_is_the_same_in_all_units_of_actions(gap: float | None) -> None:
    """Bounds of 0.05 with actions of 0.05 a learn what bounds of 1 learn with a."""
    outputs = [in_units(unit, CQL(gap=gap), "heteroscedastic") for unit in (1.0, 0.05)]
    compared = ["loss_cql", "loss_alpha_prime"] if gap else []  # without it, a constant apart
    for name in ("loss_qvalue", "loss_alpha", *compared):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-4)


def test_cql_has_its_mean_of_q_in_every_form() -> None:
    td = batch()
    losses = {}
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(5)
        losses[reduction] = cql(reduction=reduction)(td.clone())["qvalue"]
    assert losses["none"].shape == (B,)
    torch.testing.assert_close(losses["none"].mean(), losses["mean"])
    assert losses["sum"] == losses["mean"]
    loss = cql()
    assert loss.out_keys.count("qvalue") == 1
    torch.manual_seed(5)
    by_names = loss(**{"_".join(k) if isinstance(k, tuple) else k: td[k] for k in loss.in_keys})
    assert by_names[loss.out_keys.index("qvalue")] == losses["mean"]


def test_cql_takes_its_target_entropy_from_the_bounds() -> None:
    its = {"hidden_sizes": (8,)}
    networks = models.heteroscedastic_policy(D, A, **its), models.qvalue_ensemble(D, A, **its)
    assert CQLLoss(*networks, bounds=(LOW, HIGH)).target_entropy == -A
    assert CQLLoss(*networks, bounds=(LOW, HIGH), target_entropy=-7.0).target_entropy == -7


def test_bounds_are_of_the_type_of_the_networks() -> None:
    its = {"hidden_sizes": (8,)}
    networks = models.deterministic_policy(D, A, **its), models.qvalue_ensemble(D, A, **its)
    loss = TD3BCLoss(*networks, bounds=(LOW, HIGH))  # float64, as of some environments
    loss.make_value_estimator(gamma=GAMMA)
    td = batch().apply(lambda x: x.float() if x.is_floating_point() else x)
    assert loss(td)["loss_actor"].dtype == loss(td)["loss_qvalue"].dtype == torch.float32


def test_who_moves_what_in_cql() -> None:
    loss, td = cql(with_lagrange=True, lagrange_thresh=1.0, min_q_weight=2.0), batch()
    with torch.no_grad():
        loss.log_alpha_prime.fill_(np.log(3.0))
    torch.manual_seed(5)
    out = loss(td)
    gaps = torch.stack([td["cql_q1_loss"], td["cql_q2_loss"]])
    torch.testing.assert_close(out["loss_cql"], 3.0 * (gaps - 1.0).sum(0).mean())
    torch.testing.assert_close(out["loss_alpha_prime"], -1.5 * (gaps - 1.0).sum(0).mean())
    moved = {
        "loss_actor": "actor_network",
        "loss_qvalue": "qvalue_network",
        "loss_cql": "qvalue_network",
        "loss_alpha": "log_alpha",
        "loss_alpha_prime": "log_alpha_prime",
    }
    for entry, network in moved.items():
        loss.zero_grad(set_to_none=True)
        out[entry].backward(retain_graph=True)
        found = {name for name, p in loss.named_parameters() if p.grad is not None}
        assert {name.partition("_params")[0] for name in found} == {network}, entry


@pytest.mark.parametrize("fault", ["three at a time", "in s'", "factor", "gradient"])
def test_what_torchrls_cql_does_otherwise(fault: str) -> None:
    """Each fails when TorchRL has mended it: then the subclass can go."""
    loss, td = cql(objectives.CQLLoss, with_lagrange=True, lagrange_thresh=1.0), batch()
    with torch.no_grad():
        if fault == "factor":
            loss.log_alpha_prime.fill_(np.log(3.0))
    torch.manual_seed(5)
    out = loss(td)
    if fault == "three at a time":
        assert td["cql_q1_loss"].shape == (B, K * B)
    elif fault == "in s'":
        changed = batch()
        with torch.no_grad():  # a policy that knows no state draws the same there: only Q sees s'
            for parameter in loss.actor_network_params.values(True, True):
                parameter.data.mul_(0)
        torch.manual_seed(5)
        before = loss(batch())["loss_cql"]
        changed["next", "observation"] += 1
        torch.manual_seed(5)
        assert (loss(changed)["loss_cql"] - before).abs() > 1e-3
    elif fault == "factor":
        torch.manual_seed(5)
        with torch.no_grad():
            loss.log_alpha_prime.fill_(0.0)
        torch.testing.assert_close(loss(batch())["loss_cql"], out["loss_cql"])
    else:
        out["loss_alpha_prime"].backward()
        assert any(p.grad is not None for p in loss.qvalue_network_params.values(True, True))


def test_without_penalty_cql_is_sac() -> None:
    loss, td = cql(min_q_weight=0.0), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        sac = objectives.SACLoss(
            stochastic(TanhNormal),
            qvalues(),
            num_qvalue_nets=2,
            target_entropy=-2.0,
            loss_function="l2",
        )
    sac.qvalue_network_params.data.update_(loss.qvalue_network_params.data)
    sac.actor_network_params.data.update_(loss.actor_network_params.data)
    torch.manual_seed(5)
    ours, _ = loss.actor_loss(td)
    torch.manual_seed(5)
    theirs, _ = sac.actor_loss(td)
    torch.testing.assert_close(ours, theirs)
    assert loss(td)["loss_cql"] == 0


def test_the_penalty_of_cql_lowers_what_is_not_in_the_data() -> None:
    gaps = []
    for alpha in (0.0, 1.0, 10.0):
        loss = cql(min_q_weight=alpha)
        step = TrainStep(loss, learning_rate=1e-2)
        for i in range(100):
            step(batch(i % 5))
        with torch.no_grad():
            td = batch()
            s, a, *_ = parts(td)
            random = np.random.default_rng(0).uniform(LOW, HIGH, (200, B, A))
            params = loss.qvalue_network_params
            gaps.append(q_of(params, s, a).mean() - q_of(params, s, random).mean())
    assert gaps[0] < gaps[1] < gaps[2]
