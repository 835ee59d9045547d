"""What IQL converges to, on MDPs small enough to be solved exactly.

Each data set is the whole of a random MDP under its behaviour policy: every transition (s, a, s') once,
with its probability as importance weight. The losses of the package are minimised over tables, and the
result is compared with fixed points computed in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_iql import DiscreteIQLLoss, IQLLoss
from torchrl_iql.objectives.functional import expectile_loss

Array = NDArray[np.float64]

STATES, ACTIONS, SUCCESSORS = 8, 4, 3
GAMMA = 0.9
TEMPERATURE, WEIGHT_CLIP = 2.0, 1.5
EXPECTILES = (0.5, 0.7, 0.9, 0.99)
SEEDS = (0, 1, 2)
TOLERANCE = 1e-3
GARBAGE = 1e6

# Each seed trains another loss: the claims hold for all of them.
LOSSES = {0: "categorical", 1: "one-hot", 2: "joint"}


# --- The MDPs and their solutions ----------------------------------------------------------------------


@dataclass(frozen=True)
class MDP:
    """A finite MDP with the policy that collected the data.

    Attributes:
        transition: P(s' | s, a), ``[S, A, S]``.
        reward: of each transition, ``[S, A, S]``.
        terminated: the transitions that end the episode, ``[S, A, S]``.
        behaviour: probability of each action in the data, ``[S, A]``; one per state is 0.
    """

    transition: Array
    reward: Array
    terminated: NDArray[np.bool_]
    behaviour: Array

    @property
    def seen(self) -> NDArray[np.bool_]:
        return self.behaviour > 0

    def q(self, v: Array) -> Array:
        """Compute Q(s, a) = E[r + gamma (1 - terminated) V(s')], ``[S, A]``."""
        return (self.transition * (self.reward + GAMMA * ~self.terminated * v)).sum(axis=2)


def random_mdp(seed: int, successors: int = SUCCESSORS) -> MDP:
    """Draw an MDP. One action per state is never taken, though it earns the most."""
    rng = np.random.default_rng(seed)
    transition = np.zeros((STATES, ACTIONS, STATES))
    for s, a in np.ndindex(STATES, ACTIONS):
        reachable = rng.choice(STATES, successors, replace=False)
        transition[s, a, reachable] = rng.dirichlet(np.full(successors, 2.0))
    reward = rng.normal(size=transition.shape)
    terminated = rng.random(transition.shape) < 0.2
    behaviour = rng.uniform(0.2, 1.0, size=(STATES, ACTIONS))
    unseen = np.arange(STATES), rng.integers(ACTIONS, size=STATES)
    behaviour[unseen] = 0.0
    reward[unseen] += 3.0
    return MDP(transition, reward, terminated, behaviour / behaviour.sum(axis=1, keepdims=True))


def expectile_of(x: Array, weight: Array, expectile: float) -> Array:
    """Compute each row's expectile: the mean of x, counting x above it tau and below it 1 - tau."""
    mean = (weight * x).sum(axis=-1) / weight.sum(axis=-1)
    for _ in range(100):
        w = weight * np.where(x > mean[..., None], expectile, 1 - expectile)
        previous, mean = mean, (w * x).sum(axis=-1) / w.sum(axis=-1)
        if np.array_equal(mean, previous):
            break
    return mean


def fixed_point(backup: Callable[[Array], Array], start: Array) -> Array:
    """Apply a contraction until nothing changes by 1e-13."""
    x = start
    for _ in range(2000):
        previous, x = x, backup(x)
        if np.abs(x - previous).max() < 1e-13:
            return x
    raise AssertionError("no fixed point found")


@cache
def iql_value(seed: int, expectile: float) -> Array:
    """Compute V(s) = expectile over a ~ behaviour of Q(s, a), ``[S]``: IQL should converge to it."""
    mdp = random_mdp(seed)
    return fixed_point(lambda v: expectile_of(mdp.q(v), mdp.behaviour, expectile), np.zeros(STATES))


def behaviour_value(mdp: MDP) -> Array:
    """Solve the linear (I - gamma P_b) V = r_b for the value of the behaviour policy."""
    p = mdp.behaviour[:, :, None] * mdp.transition
    return np.linalg.solve(
        np.eye(STATES) - GAMMA * (p * ~mdp.terminated).sum(axis=1),
        (p * mdp.reward).sum(axis=(1, 2)),
    )


def optimal_value(mdp: MDP, allowed: NDArray[np.bool_]) -> Array:
    """Run value iteration over the allowed actions, ``[S]``."""
    return fixed_point(lambda v: np.where(allowed, mdp.q(v), -np.inf).max(axis=1), np.zeros(STATES))


# --- The package on tables -----------------------------------------------------------------------------


class JointTable(nn.Module):
    """Q(s, a) that takes a one-hot action as an input, as networks for continuous actions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table(ACTIONS)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (self.table(observation) * action).sum(dim=-1, keepdim=True)


def table(columns: int) -> nn.Linear:
    """Make one free entry for each state and column: linear in the one-hot state."""
    return nn.Linear(STATES, columns, bias=False, dtype=torch.float64)


def entries(params: TensorDict) -> Tensor:
    """Return the table in the parameters of a network: ``[..., columns, S]``, writable."""
    (weight,) = params.values(True, True)
    return weight.data


def tabular_loss(kind: str, expectile: float) -> IQLLoss:
    one_hot = kind != "categorical"
    actor = ProbabilisticActor(
        TensorDictModule(table(ACTIONS), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical if one_hot else torch.distributions.Categorical,
    )
    value = ValueOperator(table(1), in_keys=["observation"])
    settings = {
        "expectile": expectile,
        "temperature": TEMPERATURE,
        "weight_clip": WEIGHT_CLIP,
    }
    if kind == "joint":
        joint = [ValueOperator(JointTable(), in_keys=["observation", "action"]) for _ in range(2)]
        loss = IQLLoss(actor, joint, value, **settings)
    else:
        keys = {"in_keys": ["observation"], "out_keys": ["state_action_value"]}
        q = [TensorDictModule(table(ACTIONS), **keys) for _ in range(2)]
        loss = DiscreteIQLLoss(actor, q, value, action_space=kind, **settings)
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def data_set(mdp: MDP, kind: str) -> TensorDict:
    """List every transition that the behaviour policy can make, weighted by its probability."""
    probability = mdp.behaviour[:, :, None] * mdp.transition
    where = np.nonzero(probability)
    s, a, next_s = map(torch.as_tensor, where)
    states, actions = torch.eye(STATES, dtype=torch.float64), torch.eye(ACTIONS, dtype=torch.int64)
    terminated = torch.as_tensor(mdp.terminated[where])[:, None]
    return TensorDict(
        {
            "observation": states[s],
            "action": a if kind == "categorical" else actions[a],
            "priority_weight": torch.as_tensor(probability[where]),
            "next": {
                "observation": states[next_s],
                "reward": torch.as_tensor(mdp.reward[where])[:, None],
                "done": terminated,
                "terminated": terminated,
            },
        },
        batch_size=[len(s)],
    )


@dataclass(frozen=True)
class Learned:
    """The tables after training.

    Attributes:
        v: ``[S]``.
        q: of both networks, ``[2, S, A]``.
        target_q: of both target networks, ``[2, S, A]``.
        policy: probabilities, ``[S, A]``.
    """

    v: Array
    q: Array
    target_q: Array
    policy: Array


@cache
def train(seed: int, expectile: float, garbage: bool = False) -> Learned:
    """Run full-batch gradient descent on the sum of the three losses, from targets of their own.

    A state has 1 / S of the weight, so steps of almost S contract every entry of the tables; slowly
    if hardly any action pulls V down.
    """
    mdp, kind = random_mdp(seed), LOSSES[seed]
    torch.manual_seed(seed)
    loss = tabular_loss(kind, expectile)
    batch = data_set(mdp, kind)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.9 * STATES)
    target_updater = SoftUpdate(loss, tau=0.5)
    q, target_q = entries(loss.qvalue_network_params), entries(loss.target_qvalue_network_params)
    target_q += torch.randn_like(target_q)
    if garbage:
        unseen = torch.as_tensor(~mdp.seen.T).expand_as(q)
        q[unseen] = target_q[unseen] = GARBAGE * torch.randn_like(q[unseen]).sign()

    for _ in range(300 if expectile <= 0.9 else 600):
        losses = loss(batch)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        target_updater.step()
    return Learned(
        v=entries(loss.value_network_params)[0].numpy(),
        q=q.mT.numpy(),
        target_q=target_q.mT.numpy(),
        policy=entries(loss.actor_network_params).mT.softmax(dim=-1).numpy(),
    )


# --- Expectiles of the value ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("expectile", [*EXPECTILES, 0.9999])
def test_reference_is_an_expectile(seed: int, expectile: float) -> None:
    """At the reference V(s), actions above weigh tau and actions below 1 - tau, and balance."""
    mdp, v = random_mdp(seed), iql_value(seed, expectile)
    u = mdp.q(v) - v[:, None]
    pull = expectile * np.maximum(u, 0) - (1 - expectile) * np.maximum(-u, 0)
    np.testing.assert_allclose((mdp.behaviour * pull).sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("expectile", EXPECTILES)
@pytest.mark.parametrize("seed", SEEDS)
def test_v_and_q_converge_to_the_fixed_point(seed: int, expectile: float) -> None:
    """Minimising the losses finds V and Q of the expectile fixed point, within 1e-3."""
    mdp, learned = random_mdp(seed), train(seed, expectile)
    v = iql_value(seed, expectile)
    q = mdp.q(v)[mdp.seen]
    np.testing.assert_allclose(learned.v, v, rtol=0, atol=TOLERANCE)
    for network in (*learned.q, *learned.target_q):
        np.testing.assert_allclose(network[mdp.seen], q, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_expectile_one_half_is_the_behaviour_value(seed: int) -> None:
    """With expectile 0.5, V is the exact value of the policy that collected the data."""
    v = behaviour_value(random_mdp(seed))
    np.testing.assert_allclose(iql_value(seed, 0.5), v, rtol=0, atol=1e-10)
    np.testing.assert_allclose(train(seed, 0.5).v, v, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_approaches_the_in_support_maximum(seed: int) -> None:
    """V grows with the expectile, towards the best policy among the seen actions and not beyond."""
    mdp = random_mdp(seed)
    best_seen = optimal_value(mdp, mdp.seen)
    best_of_all = optimal_value(mdp, np.ones_like(mdp.seen))

    exact = [best_seen - iql_value(seed, e) for e in (*EXPECTILES, 0.999, 0.9999)]
    gaps = [best_seen - train(seed, e).v for e in EXPECTILES]
    for sequence in (exact, gaps):
        assert (np.diff(sequence, axis=0) < 0).all()
        assert (sequence[-1] > 0).all()
    np.testing.assert_array_less(exact[-1], 0.01 * exact[0])
    np.testing.assert_array_less(gaps[-1], 0.3 * gaps[0])
    # In every state an action that the data never takes would have been worth far more.
    np.testing.assert_array_less(train(seed, EXPECTILES[-1]).v + 4.0, best_of_all)


@pytest.mark.parametrize("seed", SEEDS)
def test_values_of_unseen_actions_do_not_matter(seed: int) -> None:
    """With +-1e6 as Q of the unseen actions, V, the policy and Q of the seen ones are the same bits."""
    seen = random_mdp(seed).seen
    expected, actual = train(seed, 0.9), train(seed, 0.9, garbage=True)
    assert (np.abs(actual.q[:, ~seen]) == GARBAGE).all()
    assert (np.abs(actual.target_q[:, ~seen]) == GARBAGE).all()
    np.testing.assert_array_equal(actual.v, expected.v)
    np.testing.assert_array_equal(actual.policy, expected.policy)
    np.testing.assert_array_equal(actual.q[:, seen], expected.q[:, seen])


@pytest.mark.parametrize("expectile", EXPECTILES)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_reweights_the_behaviour(seed: int, expectile: float) -> None:
    """The policy is the behaviour times min(exp(beta A), clip); unseen actions lose their mass."""
    mdp, learned = random_mdp(seed), train(seed, expectile)
    v = iql_value(seed, expectile)
    weight = np.minimum(np.exp(TEMPERATURE * (mdp.q(v) - v[:, None])), WEIGHT_CLIP)
    policy = mdp.behaviour * weight
    policy /= policy.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(learned.policy, policy, rtol=0, atol=0.01)
    assert np.abs(policy - mdp.behaviour).max() > 0.1


# --- The expectile of the TD error instead -------------------------------------------------------------


def td_expectile_reference(mdp: MDP, expectile: float) -> Array:
    """Solve Q(s, a) = expectile over s', a' of r + gamma (1 - terminated) Q(s', a'), ``[S, A]``."""
    weight = mdp.transition[..., None] * mdp.behaviour

    def backup(q: Array) -> Array:
        target = mdp.reward[..., None] + GAMMA * ~mdp.terminated[..., None] * q
        flat = (STATES, ACTIONS, STATES * ACTIONS)
        return expectile_of(target.reshape(flat), weight.reshape(flat), expectile)

    return fixed_point(backup, np.zeros((STATES, ACTIONS)))


def train_td_expectile(mdp: MDP, expectile: float, steps: int = 3000) -> Array:
    """Run gradient descent on L2^tau(r + gamma Q(s', a') - Q(s, a)) over the data, ``[S, A]``."""
    probability = mdp.behaviour[:, :, None, None] * mdp.transition[..., None] * mdp.behaviour
    where = np.nonzero(probability)
    s, a, next_s, next_a = map(torch.as_tensor, where)
    weight = torch.as_tensor(probability[where])
    reward = torch.as_tensor(mdp.reward[where[:3]])
    discount = GAMMA * ~torch.as_tensor(mdp.terminated[where[:3]])
    q = torch.zeros(STATES, ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([q], lr=0.9)
    for _ in range(steps):
        td_error = reward + discount * q.detach()[next_s, next_a] - q[s, a]
        optimizer.zero_grad()
        (weight * expectile_loss(td_error, expectile)).sum().backward()
        optimizer.step()
    return q.detach().numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_expectile_of_the_td_error_is_biased(seed: int) -> None:
    """It takes lucky transitions for good actions and exceeds the optimum; IQL's V and Q do not."""
    mdp, expectile = random_mdp(seed), EXPECTILES[-1]
    q = train_td_expectile(mdp, expectile)
    reference = td_expectile_reference(mdp, expectile)
    np.testing.assert_allclose(q[mdp.seen], reference[mdp.seen], rtol=0, atol=TOLERANCE)

    best_v = optimal_value(mdp, mdp.seen)
    best_q = mdp.q(best_v)
    assert (q > best_q + 5.0)[mdp.seen].all()
    assert (train(seed, expectile).v < best_v).all()
    assert (train(seed, expectile).q < best_q)[:, mdp.seen].all()


@pytest.mark.parametrize("seed", SEEDS)
def test_expectile_of_the_td_error_needs_deterministic_transitions(seed: int) -> None:
    """Where each action has one successor, it stays within the in-support optimum: luck was the bias."""
    mdp = random_mdp(seed, successors=1)
    q = train_td_expectile(mdp, EXPECTILES[-1])
    best_q = mdp.q(optimal_value(mdp, mdp.seen))
    assert (q < best_q + TOLERANCE)[mdp.seen].all()
