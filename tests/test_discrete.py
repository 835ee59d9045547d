"""Discrete IQL end to end: CartPole, from recording the data to a better policy."""

from __future__ import annotations

import gymnasium
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from torchrl_iql import DiscreteIQLLoss, Evaluator, TrainStep, load_dataset, models


def mediocre(observation: np.ndarray, rng: np.random.Generator) -> int:
    """Push towards the side the pole leans to, but act at random every other time."""
    return int(observation[2] > 0) if rng.random() < 0.5 else int(rng.integers(2))


def record(env: gymnasium.Env, seed: int, rng: np.random.Generator) -> EpisodeBuffer:
    observation, _ = env.reset(seed=seed)
    observations, steps = [observation], []
    while not (steps and (steps[-1][2] or steps[-1][3])):
        action = mediocre(observation, rng)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated))
    actions, rewards, terminations, truncations = map(list, zip(*steps, strict=True))
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


@pytest.fixture(scope="module")
def cartpole_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        rng = np.random.default_rng(0)
        env = gymnasium.make("CartPole-v1")
        buffers = [record(env, seed, rng) for seed in range(150)]
        minari.create_dataset_from_buffers("tests/cartpole-v0", buffers, env=env)
        yield "tests/cartpole-v0"


@pytest.mark.slow
def test_iql_beats_the_behaviour_on_cartpole(cartpole_id: str) -> None:
    dataset = load_dataset(cartpole_id)
    behaviour = dataset.episode_returns.mean().item()
    torch.manual_seed(0)
    loss = DiscreteIQLLoss(
        models.categorical_policy(4, 2, hidden_sizes=(64, 64)),
        models.discrete_qvalue_network(4, 2, hidden_sizes=(64, 64)),
        models.value_network(4, hidden_sizes=(64, 64)),
        action_space="categorical",
        expectile=0.8,
        temperature=10.0,
    )
    step = TrainStep(loss, learning_rate=1e-3, target_rate=0.02)
    buffer = dataset.replay_buffer(256)
    for _ in range(3000):
        step(buffer.sample())
    with Evaluator(dataset.env_spec, episodes=20, seed=1000) as evaluate:
        result = evaluate(loss.get_stateful_net("actor_network"))
    assert 20 < behaviour < 80
    assert result.returns.mean() > 2 * behaviour
