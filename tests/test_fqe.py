"""Fitted Q evaluation: its loss against NumPy, what it converges to against the exact values of an MDP."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_iql import OfflineDataset, TrainStep, models
from torchrl_iql.estimation import data_return, fitted_q, policy_actions, recorded_rewards
from torchrl_iql.models import Architecture
from torchrl_iql.objectives import FQELoss
from torchrl_iql.objectives.functional import return_bounds

STATES, ACTIONS, GAMMA = 4, 2, 0.8


# --- The exact values of a chain, in which one may fall ------------------------------------------------


def chain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return transition probabilities ``[S, A, S]``, rewards ``[S, A]`` and chances to end ``[S, A]``."""
    rng = np.random.default_rng(3)
    moves = rng.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    rewards = rng.normal(size=(STATES, ACTIONS))
    return moves, rewards, np.array([[0.0, 0.3]] * STATES)


def exact(policy: np.ndarray) -> np.ndarray:
    """Solve for Q of a policy, ``[S, A]``, by the linear equations of Bellman."""
    moves, rewards, ends = chain()
    n = STATES * ACTIONS
    goes = np.zeros((n, n))
    for s in range(STATES):
        for a in range(ACTIONS):
            for after in range(STATES):
                chance = GAMMA * (1 - ends[s, a]) * moves[s, a, after]
                goes[s * ACTIONS + a, after * ACTIONS + policy[after]] += chance
    return np.linalg.solve(np.eye(n) - goes, rewards.ravel()).reshape(STATES, ACTIONS)


def play(episodes: int, limit: int, seed: int = 0) -> list[dict]:
    """Play random actions; what ends by the limit is truncated."""
    moves, rewards, ends = chain()
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(episodes):
        states, taken, paid, over = [int(rng.integers(STATES))], [], [], []
        while len(taken) < limit and not (over and over[-1]):
            s, a = states[-1], int(rng.integers(ACTIONS))
            states.append(int(rng.choice(STATES, p=moves[s, a])))
            taken.append(a)
            paid.append(rewards[s, a])
            over.append(rng.random() < ends[s, a])
        found.append(
            {
                "observations": np.eye(STATES, dtype=np.float32)[states],
                "actions": taken,
                "rewards": paid,
                "terminations": over,
            }
        )
    return found


def recorded(episodes: list[dict], discrete: bool, **rules: str) -> OfflineDataset:
    """Actions are categories, or numbers -0.5 and 0.5."""
    if not discrete:
        episodes = [
            {**each, "actions": (np.array(each["actions"], np.float32)[:, None] - 0.5)}
            for each in episodes
        ]
    return OfflineDataset.from_episodes(
        "chain",
        episodes,
        observation_space=Box(0, 1, (STATES,)),
        action_space=Discrete(ACTIONS) if discrete else Box(-1, 1, (1,)),
        **rules,  # pyright: ignore
    )


class Fixed(nn.Module):
    """A policy by the number of the state."""

    def __init__(self, actions: np.ndarray, discrete: bool) -> None:
        super().__init__()
        self.actions, self.discrete = torch.as_tensor(actions), discrete

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        action = self.actions[observation.argmax(-1)]
        return action if self.discrete else (action.unsqueeze(-1) - 0.5).float()


def acting(actions: np.ndarray, discrete: bool) -> TensorDictModule:
    return TensorDictModule(Fixed(actions, discrete), ["observation"], ["action"])


class Linear(nn.Module):
    """Q of a state and an action as a table, which it reads from one-hot states and actions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(STATES, ACTIONS, dtype=torch.float64))

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return ((observation @ self.table) * action).sum(-1, keepdim=True)


def test_a_table_converges_to_the_exact_values_of_the_data() -> None:
    """In float64, on all transitions at once, weighted for one network by twice as many of some."""
    policy = np.array([1, 0, 1, 0])
    states = np.repeat(np.arange(STATES), ACTIONS)
    actions = np.tile(np.arange(ACTIONS), STATES)
    rng = np.random.default_rng(0)
    rewards, after = rng.normal(size=8), rng.integers(STATES, size=8)
    ended = np.arange(8) == 5

    def one_hot(its: np.ndarray, n: int) -> torch.Tensor:
        return torch.as_tensor(np.eye(n)[its])

    following = one_hot(after, STATES)
    following[5] = np.nan  # what follows an end is not read
    batch = TensorDict(
        {
            "observation": one_hot(states, STATES),
            "action": one_hot(actions, ACTIONS),
            "bootstrap_weight": torch.stack([torch.ones(8), 1.0 + torch.arange(8) % 2], -1),
            "next": {
                "observation": following,
                "action": one_hot(policy[after], ACTIONS),
                "reward": torch.as_tensor(rewards)[:, None],
                "terminated": torch.as_tensor(ended)[:, None],
            },
        },
        [8],
    )
    networks = [
        TensorDictModule(Linear(), ["observation", "action"], ["state_action_value"]) for _ in "ab"
    ]
    loss = FQELoss(networks, discount=GAMMA)
    step = TrainStep(loss, learning_rate=0.03, target_rate=1.0)
    for _ in range(1200):
        step(batch)
    goes = np.zeros((8, 8))
    for row in range(8):
        goes[row, after[row] * ACTIONS + policy[after[row]]] = GAMMA * (not ended[row])
    expected = np.linalg.solve(np.eye(8) - goes, rewards)
    for found in loss.values(batch):
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("discrete", "limit"),
    [pytest.param(True, 200, marks=pytest.mark.slow), (False, 3)],
    ids=["discrete, whole", "continuous, cut"],
)
def test_the_estimate_is_the_exact_value(discrete: bool, limit: int) -> None:
    """Also where every episode is cut after three steps: its value goes on."""
    policy = np.array([0, 1, 0, 0])
    dataset = recorded(play(20_000 // min(limit, 4), limit), discrete)
    found = fitted_q(
        acting(policy, discrete),
        dataset,
        discount=GAMMA,
        networks=3,
        steps=800,
        architecture=Architecture(
            observation_size=STATES,
            action_size=ACTIONS if discrete else 1,
            policy="categorical" if discrete else "gaussian",
            hidden_sizes=(32, 32),
        ),
        execution="eager",
    )
    starts = dataset.transitions["observation"][dataset.episode_starts].argmax(-1).numpy()
    expected = exact(policy)[starts, policy[starts]].mean()
    behaviour = np.mean(
        [sum(GAMMA**t * r for t, r in enumerate(e["rewards"])) for e in play(500, 99, 5)]
    )
    assert abs(expected - behaviour) > 0.3  # that of another policy would not do
    assert found.value == pytest.approx(expected, abs=0.1)
    assert found.is_converged and found.spread < 0.15
    assert not replace(found, sweeps=1.0).is_converged
    assert not replace(found, history=found.history.cumsum(0)).is_converged
    assert found.members.shape == (3,) and found.members.unique().numel() == 3


def test_clipping_keeps_an_estimate_among_the_returns_that_there_can_be() -> None:
    """Of one state that all actions lead back to, and a network that overshoots."""
    dataset = recorded(play(50, 5), discrete=True)
    reward, ended = dataset.transitions["next", "reward"], dataset.transitions["next", "terminated"]
    low, high = return_bounds(reward, ended, GAMMA)
    network = models.discrete_qvalue_network(STATES, ACTIONS, hidden_sizes=(4,))
    for value, expected, clipped in ((1e3, high, 1.0), (-1e3, low, 1.0), (0.0, None, 0.0)):
        with torch.no_grad():
            network.module.layers[-1].weight.zero_()
            network.module.layers[-1].bias.fill_(value)
        loss = FQELoss([network], discount=GAMMA, bounds=(low, high))
        batch = dataset.transitions.copy()
        batch["next", "action"] = torch.zeros(len(batch), dtype=torch.int64)
        target, _ = loss.target(batch)
        goes_on = ~ended[:, 0]
        if expected is not None:
            torch.testing.assert_close(target[:, goes_on].unique(), torch.tensor([expected]))
        torch.testing.assert_close(target[0, ~goes_on], reward[~goes_on, 0])
        share = loss(batch)["clip_fraction"] / goes_on.float().mean()
        assert float(share) == pytest.approx(clipped)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_those_of_all_that_can_happen(seed: int) -> None:
    """Against the best of all plans that go on k times and then end, or for ever."""
    rng = np.random.default_rng(seed)
    reward, ended = rng.normal(size=6), rng.random(6) < 0.5
    plans = []
    goes, ends = reward[~ended], reward[ended]
    for each in (min, max):
        its = [each(goes) / (1 - GAMMA)] if len(goes) else []
        for k in range(60 if len(goes) else 1):
            if len(ends):
                before = each(goes) * (1 - GAMMA**k) / (1 - GAMMA) if k else 0.0
                its.append(before + GAMMA**k * each(ends))
        plans.append(each(its))
    found = return_bounds(torch.as_tensor(reward), torch.as_tensor(ended), GAMMA)
    assert found == pytest.approx(tuple(plans), abs=1e-4)


@pytest.mark.parametrize(
    ("rewards", "discount", "message"),
    [
        ([1.0, float("nan")], GAMMA, "expected finite rewards, got 2"),
        ([], GAMMA, "expected finite rewards, got 0"),
        ([1.0, 2.0], 1.0, r"discount must be in \[0, 1\), got 1.0"),
        ([1.0, 2.0], "0.9", r"discount must be in \[0, 1\), got '0.9'"),
    ],
)
def test_bounds_of_returns_need_finite_rewards_and_a_discount(
    rewards: list[float], discount: float, message: str
) -> None:
    ended = torch.zeros(len(rewards), dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        return_bounds(torch.tensor(rewards), ended, discount)


# --- The loss ------------------------------------------------------------------------------------------


def batch_of(n: int, dtype: torch.dtype = torch.float64) -> TensorDict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return TensorDict(
        {
            "observation": draw(n, 3),
            "action": draw(n, 2).tanh(),
            "bootstrap_weight": draw(n, 3).abs(),
            "next": {
                "observation": draw(n, 3),
                "action": draw(n, 2).tanh(),
                "reward": draw(n, 1),
                "terminated": torch.arange(n)[:, None] % 3 == 0,
                "truncated": torch.arange(n)[:, None] % 4 == 0,
            },
        },
        [n],
    )


def built(dtype: torch.dtype = torch.float64) -> FQELoss:
    torch.manual_seed(0)
    networks = models.qvalue_ensemble(3, 2, num=3, hidden_sizes=(6, 5))
    return FQELoss([each.to(dtype) for each in networks], discount=0.9, bounds=(-1.0, 0.8))


def layers_of(params: TensorDict, member: int) -> list[np.ndarray]:
    flat = {".".join(k) if isinstance(k, tuple) else k: v for k, v in params.items(True, True)}
    names = sorted(
        (k for k in flat if "mlp" in k), key=lambda k: (int(k.split(".")[2]), k[-4:] == "bias")
    )
    return [flat[name][member].detach().numpy() for name in names]


def mlp(x: np.ndarray, layers: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    inputs = []
    for k in range(0, len(layers), 2):
        inputs.append(x if k == 0 else np.maximum(x, 0))
        x = inputs[-1] @ layers[k].T + layers[k + 1]
    return x[:, 0], inputs


def test_gradients_are_those_of_numpy() -> None:
    """Each network its own target, clipped, weighted; terminations end, time limits do not."""
    loss, batch = built(), batch_of(12)
    loss.target_qvalue_network_params.data.apply_(lambda its: its.mul_(1.1))
    out = loss(batch)
    out["loss_qvalue"].backward()
    data = {k: v.numpy() for k, v in batch.items(True, True)}
    here = np.concatenate([data["observation"], data["action"]], -1)
    after = np.concatenate([data["next", "observation"], data["next", "action"]], -1)
    total = 0.0
    for i in range(3):
        target = mlp(after, layers_of(loss.target_qvalue_network_params, i))[0]
        goes_on = 1.0 - data["next", "terminated"][:, 0]
        raw = data["next", "reward"][:, 0] + 0.9 * goes_on * target
        target = np.clip(raw, -1.0, 0.8)
        assert 0 < (target != raw).mean() < 1
        layers = layers_of(loss.qvalue_network_params, i)
        q, inputs = mlp(here, layers)
        weight = data["bootstrap_weight"][:, i]
        total += (weight * (q - target) ** 2).mean()
        delta = (2 * weight * (q - target) / len(q))[:, None]
        gradients: list[np.ndarray] = []
        for k in reversed(range(len(inputs))):
            gradients = [delta.T @ inputs[k], delta.sum(0), *gradients]
            delta = (delta @ layers[2 * k]) * (inputs[k] > 0)
        grads = loss.qvalue_network_params.apply(lambda its: its.grad)
        for found, expected in zip(layers_of(grads, i), gradients, strict=True):  # pyright: ignore
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert out["loss_qvalue"].item() == pytest.approx(total, rel=1e-10)
    assert all(its.grad is None for its in loss.target_qvalue_network_params.values(True, True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["continuous", "discrete", "of one's own"])
def test_compiled_equals_eager(kind: str) -> None:
    def make() -> FQELoss:
        torch.manual_seed(0)
        if kind == "continuous":
            return FQELoss(models.qvalue_ensemble(3, 2, num=3, hidden_sizes=(8, 8)), bounds=(-2, 2))
        if kind == "discrete":
            each = [models.discrete_qvalue_network(3, 4, hidden_sizes=(8,)) for _ in range(3)]
            return FQELoss(each)
        each = [
            TensorDictModule(nn.Linear(3, 4), ["observation"], ["state_action_value"])
            for _ in "abc"
        ]
        return FQELoss(each)

    batch = batch_of(16, torch.float32)
    if kind != "continuous":
        batch["action"] = torch.arange(16) % 4
        batch["next", "action"] = torch.arange(16) % 3
    left = []
    for execution in ("eager", "compiled"):
        step = TrainStep(make(), execution=execution, target_rate=0.1)
        for _ in range(3):
            step(batch)
        left.append(step.state_dict()["loss"])
    for key, value in left[0].items():
        torch.testing.assert_close(left[1][key], value, rtol=1e-5, atol=1e-6)


def test_one_network_is_the_first_of_several() -> None:
    batch = batch_of(9).exclude("bootstrap_weight")
    torch.manual_seed(0)
    networks = [each.double() for each in models.qvalue_ensemble(3, 2, num=3, hidden_sizes=(6, 5))]
    alone = FQELoss(networks[:1], discount=0.9, bounds=(-1, 0.8))
    torch.testing.assert_close(alone.values(batch)[0], built().values(batch)[0])
    TrainStep(alone)(batch)


def test_keywords_and_names_of_ones_own() -> None:
    loss, batch = built(), batch_of(5)
    expected = loss(batch.exclude("bootstrap_weight"))
    named = {k if isinstance(k, str) else "_".join(k): batch[k] for k in loss.in_keys}
    assert loss(**named)[0] == expected["loss_qvalue"]
    loss.set_keys(reward="cost", weight="count")
    batch["next"].rename_key_("reward", "cost")
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected["loss_qvalue"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"discount": 1.1}, r"discount must be in \[0, 1\], got 1.1"),
        ({"discount": "0.9"}, r"discount must be in \[0, 1\], got '0.9'"),
        ({"bounds": (1, 0)}, "the lowest and the highest return, got"),
        ({"qvalue_networks": []}, "one or more TensorDictModules"),
        ({"qvalue_networks": [nn.Linear(1, 1)]}, "one or more TensorDictModules"),
    ],
)
def test_arguments_that_are_refused(arguments: dict, message: str) -> None:
    given = {"qvalue_networks": models.qvalue_ensemble(3, 2), **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        FQELoss(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda td: td["next"].pop("action"), "next_action|'action'"),
        (
            lambda td: td["next"].set("terminated", td["next", "terminated"].float()),
            "expected torch.bool",
        ),
        (
            lambda td: td.set("bootstrap_weight", torch.ones(6, 2)),
            "bootstrap_weight.*expected .6, 3.",
        ),
    ],
)
def test_batches_that_are_refused(change: object, message: str) -> None:
    batch = batch_of(6)
    change(batch)  # pyright: ignore
    with pytest.raises((KeyError, ValueError), match=message):
        built()(batch)


# --- What is around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["minus_one", "return_range", "unit_rms"])
def test_rewards_are_those_that_were_recorded(rule: str) -> None:
    episodes = play(40, 6)
    plain, ruled = recorded(episodes, True), recorded(episodes, True, reward_rule=rule)
    assert not torch.allclose(
        ruled.transitions["next", "reward"], plain.transitions["next", "reward"]
    )
    undone = recorded_rewards(ruled)
    torch.testing.assert_close(
        undone.transitions["next", "reward"], plain.transitions["next", "reward"]
    )
    assert undone.reward_rule == "none" and ruled.reward_rule == rule
    options = {"steps": 20, "networks": 2, "execution": "eager", "discount": GAMMA}
    policy = acting(np.zeros(STATES, int), True)
    both = [fitted_q(policy, each, **options).members for each in (plain, ruled)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


def test_what_the_data_came_to_is_of_episodes_whose_return_is_known() -> None:
    """Of those that were cut early it is not."""
    episodes = play(300, 8)
    found = data_return(recorded(episodes, True), GAMMA)
    known, cut = (
        [
            sum(GAMMA**t * r for t, r in enumerate(each["rewards"]))
            for each in episodes
            if each["terminations"][-1] == ended
        ]
        for ended in (True, False)
    )
    assert 0 < found.episodes == len(known) < 300
    assert found.value == pytest.approx(np.mean(known), abs=1e-5)
    assert found.stderr == pytest.approx(np.std(known, ddof=1) / len(known) ** 0.5, abs=1e-5)
    assert found.best == pytest.approx(max(known), abs=1e-5)
    assert found.cut == len(cut) and found.paid_until_cut == pytest.approx(np.mean(cut), abs=1e-5)


def test_a_policy_is_what_is_deployed() -> None:
    policy = models.gaussian_policy(STATES, 1)
    policy.train()
    rows = torch.randn(7, STATES)
    found = policy_actions(policy, rows, torch.zeros(7, 1))
    torch.testing.assert_close(found, policy.get_dist(TensorDict({"observation": rows}, [7])).mean)
    assert policy.training


def test_what_is_refused() -> None:
    dataset = recorded(play(10, 5), True)
    policy = acting(np.zeros(STATES, int), True)
    for options, message in (
        ({"discount": 1.0}, r"discount must be in \[0, 1\), got 1.0"),
        ({"discount": "0.9"}, r"discount must be in \[0, 1\), got '0.9'"),
        ({"networks": 0}, "networks must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted_q(policy, dataset, **options)
    with pytest.raises(ValueError, match="expected single transitions"):
        fitted_q(policy, dataset.n_step(3, GAMMA), discount=GAMMA)
    recurrent = TensorDictModule(nn.GRUCell(4, 4), ["observation", "state"], ["action"])
    with pytest.raises(
        ValueError, match="acts by observation, state: what it does depends on more"
    ):
        fitted_q(recurrent, dataset)
    with pytest.raises(
        ValueError, match=r"the policy's actions are torch\.float32, and those of the data"
    ):
        fitted_q(acting(np.zeros(STATES, int), False), dataset)


def test_the_same_seed_is_the_same_estimate() -> None:
    dataset, policy = recorded(play(20, 5), True), acting(np.zeros(STATES, int), True)
    options = {"steps": 12, "networks": 2, "execution": "eager", "discount": GAMMA}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps: list[int] = []
        first = fitted_q(policy, dataset, seed=4, progress=steps.append, **options)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = fitted_q(policy, dataset, seed=4, **options)
    assert torch.equal(torch.rand(3), expected)  # of the user's own random numbers none is drawn
    assert torch.equal(first.history, again.history) and sum(steps) == 12
    assert not torch.equal(first.history, fitted_q(policy, dataset, seed=5, **options).history)
