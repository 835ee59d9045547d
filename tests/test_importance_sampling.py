"""Weighted importance sampling: against sums in NumPy, exact values, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDict

from torchrl_iql import OfflineDataset, models
from torchrl_iql.estimation import importance_sampling

GAMMA, STATES, ACTIONS = 0.9, 3, 2
CHANCES = np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
"""Of the actions in each state, under who records."""


def policy(preference: float, seed: int = 0) -> models.ProbabilisticActor:
    torch.manual_seed(seed)
    its = models.categorical_policy(STATES, ACTIONS, hidden_sizes=(4,))
    with torch.no_grad():
        layer = next(m for m in its.modules() if isinstance(m, models.Torso)).layers[-1]
        layer.weight.mul_(preference)
    return its


def play(episodes: int, length: int = 4, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(episodes):
        steps = int(rng.integers(2, length + 1))
        states = rng.integers(STATES, size=steps + 1)
        taken = [int(rng.choice(ACTIONS, p=CHANCES[s])) for s in states[:-1]]
        logs = [np.log(CHANCES[s, a]) for s, a in zip(states[:-1], taken, strict=True)]
        paid = [float(s + 2 * a) for s, a in zip(states[:-1], taken, strict=True)]
        ends = [False] * (steps - 1) + [True]
        found.append(
            {
                "observations": np.eye(STATES, dtype=np.float32)[states],
                "actions": taken,
                "rewards": paid,
                "terminations": ends,
                "infos": {"log_prob": np.array(logs)},
            }
        )
    return found


def recorded(
    episodes: list[dict], columns: tuple[str, ...] = ("log_prob",), **rules: str
) -> OfflineDataset:
    return OfflineDataset.from_episodes(
        "walks",
        episodes,
        observation_space=Box(0, 1, (STATES,)),
        action_space=Discrete(ACTIONS),
        columns=columns,
        **rules,  # pyright: ignore
    )


def chances(its: models.ProbabilisticActor) -> np.ndarray:
    """Return those of the actions in each state under a policy."""
    with torch.no_grad():
        dist = its.get_dist(TensorDict({"observation": torch.eye(STATES)}, [STATES]))
    return dist.probs.double().numpy()


@pytest.mark.parametrize("rule", ["none", "minus_one"])
def test_it_is_the_sum_over_steps_of_weighted_means(rule: str) -> None:
    """Of rewards as recorded, in plain loops."""
    episodes, its = play(60), policy(0.5)
    found = importance_sampling(
        its, recorded(episodes, reward_rule=rule), log_prob="log_prob", discount=GAMMA
    )
    own = chances(its)
    value, last = 0.0, []
    for t in range(4):
        top = bottom = 0.0
        for each in episodes:
            states, weight = each["observations"].argmax(-1), 1.0
            for k in range(min(t + 1, len(each["actions"]))):
                s, a = states[k], each["actions"][k]
                weight *= own[s, a] / CHANCES[s, a]
            top += weight * (each["rewards"][t] if t < len(each["actions"]) else 0.0)
            bottom += weight
            if t == 3:
                last.append(weight)
        value += GAMMA**t * top / bottom
    assert found.value == pytest.approx(value, rel=1e-5)
    effective = sum(last) ** 2 / sum(w**2 for w in last)
    assert found.effective_episodes == pytest.approx(effective, rel=1e-5)


def test_many_episodes_give_the_exact_value_within_the_error() -> None:
    """States follow by chance alone, and so do lengths: the reward of a step has a mean."""
    its = policy(0.5)
    own = chances(its)
    of_step = np.mean([s + 2 * own[s, 1] for s in range(STATES)])
    alive = [1, 1, 2 / 3, 1 / 3]
    expected = sum(GAMMA**t * chance * of_step for t, chance in enumerate(alive))
    behaviour = np.mean([s + 2 * CHANCES[s, 1] for s in range(STATES)])
    found = importance_sampling(its, recorded(play(3000)), log_prob="log_prob", discount=GAMMA)
    assert abs(found.value - expected) < 4 * found.stderr < 0.3
    assert abs(behaviour - of_step) * 3 > 8 * found.stderr  # that of the data would not do


def test_of_the_behaviour_itself_every_episode_counts() -> None:
    episodes, its = play(40), policy(0.0)  # both actions alike
    for each in episodes:
        each["infos"] = {"log_prob": np.full(len(each["actions"]), np.log(0.5))}
    found = importance_sampling(its, recorded(episodes), log_prob="log_prob", discount=GAMMA)
    plain = [sum(GAMMA**t * r for t, r in enumerate(each["rewards"])) for each in episodes]
    assert found.effective_episodes == pytest.approx(40)
    assert found.value == pytest.approx(np.mean(plain))
    assert found.stderr == pytest.approx(np.std(plain) / 40**0.5, rel=0.15)


def test_a_density_is_that_of_the_data() -> None:
    """Of continuous actions: weights of a Gaussian, which is not its mean."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(30):
        actions = rng.uniform(-1, 1, size=(3, 1)).astype(np.float32)
        episodes.append(
            {
                "observations": rng.normal(size=(4, 2)).astype(np.float32),
                "actions": actions,
                "rewards": actions[:, 0],
                "terminations": [False, False, True],
                "infos": {"log_prob": np.full(3, np.log(0.5))},
            }
        )
    data = OfflineDataset.from_episodes(
        "uniform",
        episodes,
        observation_space=Box(-9, 9, (2,)),
        action_space=Box(-1, 1, (1,)),
        columns=["log_prob"],
    )
    torch.manual_seed(0)
    its = models.gaussian_policy(2, 1, hidden_sizes=(4,))
    found = importance_sampling(its, data, log_prob="log_prob", discount=GAMMA)
    assert 5 < found.effective_episodes < 30 and np.isfinite(found.stderr)
    for discount in (2.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"discount must be from 0 to 1, got {discount}"):
            importance_sampling(its, data, log_prob="log_prob", discount=discount)
    with pytest.raises(ValueError, match="the policy is deterministic"):
        importance_sampling(models.deterministic_policy(2, 1), data, log_prob="log_prob")


def test_few_effective_episodes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^[1-4]\.\d of 60 episodes are effective, expected at least 5"
    ):
        importance_sampling(policy(40.0), recorded(play(60)), log_prob="log_prob", discount=GAMMA)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"walks has no column 'log_prob', the log-probability of each"
    ):
        importance_sampling(policy(0.5), recorded(play(9), ()), log_prob="log_prob")
    wide = play(9)
    for each in wide:
        each["infos"] = {"log_prob": np.zeros((len(each["actions"]), 2))}
    with pytest.raises(ValueError, match="'log_prob' holds more than one finite number each"):
        importance_sampling(policy(0.5), recorded(wide), log_prob="log_prob")
