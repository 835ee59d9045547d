"""Policies as they are deployed: observations of an environment in, its actions out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector.utils import concatenate, create_empty_array
from torchrl.envs import GymEnv

from iql_losses import built
from runs import SMALL, TINY, of_maze
from torchrl_iql import (
    DiscreteIQLLoss,
    Evaluator,
    IQLLoss,
    OfflineDataset,
    TrainStep,
    checkpoint,
    load_networks,
    load_policy,
)
from torchrl_iql.environments import written_spec
from torchrl_iql.models import Architecture, Torso
from torchrl_iql.objectives import DTLoss
from torchrl_iql.spaces import observation_dtype, observed_rows
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.training import OFFLINE

KINDS = ["gaussian", "squashed", "heteroscedastic", "deterministic"]

COMPOUND = Dict(
    {
        "hand": Dict({"position": Box(-2, 2, (2, 3)), "gear": Discrete(4, start=-1)}),
        "lights": MultiBinary(3),
        "dials": MultiDiscrete([2, 3], start=[5, -1]),
        "pair": Tuple([Box(0, 1, (2,), np.float64), Discrete(2)]),
    }
)
SPACES = {
    "vector": Box(-3, 3, (4,), np.float64),
    "matrix": Box(-1, 1, (2, 3)),
    "image": Box(0, 255, (4, 3, 3), np.uint8),
    "category": Discrete(5, start=2),
    "compound": COMPOUND,
}


def batch_of(space: gymnasium.Space, several: list[Any]) -> Any:
    """Make a batch as Gymnasium's vector environments make theirs."""
    return concatenate(space, several, create_empty_array(space, len(several)))


def dataset(observation: gymnasium.Space, action: gymnasium.Space, seed: int = 0) -> OfflineDataset:
    observation.seed(seed)
    action.seed(seed)
    observed = [observation.sample() for _ in range(21)]
    episode = {
        "observations": batch_of(observation, observed),
        "actions": np.stack([action.sample() for _ in range(20)]),
        "rewards": np.arange(20.0),
        "terminations": np.arange(20) == 19,
    }
    return OfflineDataset.from_episodes(
        "numbers", [episode], observation_space=observation, action_space=action
    )


def saved(
    path: Path, data: OfflineDataset, policy: str = "gaussian", *, known: bool = True, **more: Any
) -> Path:
    """Save freshly initialised networks for a data set."""
    torch.manual_seed(0)
    space = data.action_space
    discrete = isinstance(space, Discrete)
    bounds = None if discrete else (space.low.ravel().tolist(), space.high.ravel().tolist())
    architecture = Architecture(
        observation_size=data.transitions["observation"].shape[-1],
        action_size=spaces.flatdim(space),
        policy="categorical" if discrete else policy,  # pyright: ignore
        hidden_sizes=(16, 16),
        **{"normalize_observation": True, "action_bounds": bounds, **more},
    )
    networks = built(architecture, data.observation_statistics())
    loss = (
        DiscreteIQLLoss(*networks, action_space="categorical") if discrete else IQLLoss(*networks)
    )
    described = checkpoint.described(data) if known else {}
    return checkpoint.save(path / f"{policy}.ckpt", TrainStep(loss), architecture, **described)


def saved_transformer(path: Path) -> Path:
    """Save a freshly initialised Decision Transformer."""
    architecture = Architecture(
        observation_size=3,
        action_size=2,
        policy="decision_transformer",
        hidden_sizes=(8,),
        policy_options={"context": 2, "episode_length": 5, "target_return": 1.0},
    )
    step = TrainStep(DTLoss(architecture.policy_network().on_windows()))  # pyright: ignore
    return checkpoint.save(path / "a.ckpt", step, architecture)


def by_hand(torso: Torso, inputs: np.ndarray) -> np.ndarray:
    """Compute the outputs of a torso in float64, from its numbers alone."""
    state = {key: value.double().numpy() for key, value in torso.state_dict().items()}
    x = inputs.astype(np.float64)
    if "normalize.mean" in state:
        size = len(state["normalize.mean"])
        x[:, :size] = (x[:, :size] - state["normalize.mean"]) / state["normalize.std"]
    for i in range(0, 2 * len(torso.layers), 2):
        x = (np.maximum(x, 0) if i else x) @ state[f"mlp.{i}.weight"].T + state[f"mlp.{i}.bias"]
    return x


def torso_of(module: torch.nn.Module) -> Torso:
    return next(each for each in module.modules() if isinstance(each, Torso))


# --- Observations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_rows_are_what_gymnasium_flattens(name: str) -> None:
    space = SPACES[name]
    space.seed(1)
    several = [space.sample() for _ in range(4)]
    expected = np.stack([spaces.flatten(space, each) for each in several])
    rows, is_batch = observed_rows(space, batch_of(space, several))
    assert is_batch and rows.dtype == observation_dtype(space)
    np.testing.assert_array_equal(rows, expected.astype(rows.dtype))
    for one, row in zip(several, expected, strict=True):
        rows, is_batch = observed_rows(space, one)
        assert not is_batch
        np.testing.assert_array_equal(rows, row[None].astype(rows.dtype))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(
    "action",
    [
        Box(np.float32([[-1, -2]]), np.float32([[3, 0.5]])),
        Box(-4, 5, (3,), np.int16),
        Discrete(3, start=7),
    ],
    ids=["shaped", "whole", "categories"],
)
def test_an_action_is_one_of_the_environment(
    name: str, action: gymnasium.Space, tmp_path: Path
) -> None:
    """Whatever is observed; from numbers alone, one by one and as a batch."""
    space = SPACES[name]
    path = saved(tmp_path, dataset(space, action))
    policy, several = load_policy(path), [space.sample() for _ in range(50)]
    flat = np.stack([spaces.flatten(space, each) for each in several])
    outputs = by_hand(torso_of(policy), flat)
    if isinstance(action, Discrete):
        expected = 7 + outputs.argmax(1)
    else:
        low, high = (bound.ravel().astype(np.float64) for bound in (action.low, action.high))  # pyright: ignore
        expected = (low + high) / 2 + (high - low) / 2 * np.tanh(outputs)
        expected = (expected.round() if name_of(action) == "int16" else expected).reshape(
            -1, *action.shape
        )  # pyright: ignore
        assert len(np.unique(expected.round(2), axis=0)) > 2
    found = [policy.act(each) for each in several]
    assert all(action.contains(each) for each in found)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    together = policy.act(batch_of(space, several))
    assert together.dtype == action.dtype
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)


def name_of(space: gymnasium.Space) -> str:
    return str(space.dtype)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_acts_by_its_mean(kind: str, normalize: bool, tmp_path: Path) -> None:
    action = Box(np.float32([-1, 2]), np.float32([3, 2.5]))
    data = dataset(SPACES["vector"], action)
    policy = load_policy(saved(tmp_path, data, kind, normalize_observation=normalize))
    observations = np.random.default_rng(0).normal(size=(30, 4))
    outputs = by_hand(torso_of(policy), observations)[:, :2]
    expected = [1, 2.25] + np.array([2, 0.25]) * np.tanh(outputs)
    np.testing.assert_allclose(policy.act(observations), expected, rtol=0, atol=2e-6)
    # A policy of float32 is one for what environments give, also where it is a module.
    mean = policy(observation=torch.from_numpy(observations))[0]
    assert mean.dtype == torch.float32


def test_others_entries_of_a_dictionary_are_left_alone(tmp_path: Path) -> None:
    space = Dict({"goal": Box(-1, 1, (2,)), "seen": Box(-1, 1, (3,))})
    policy = load_policy(saved(tmp_path, dataset(space, Discrete(2))))
    observation = {"seen": [0.1, 0.2, 0.3], "unread": "text", "goal": torch.zeros(2)}
    assert policy.act(observation) == policy.act({**observation, "unread": [np.nan]})


@pytest.mark.parametrize(
    ("name", "observation", "message"),
    [
        ("vector", [1.0, np.nan, 0, 0], r"observation\[0, 1\] is nan, expected a finite float32"),
        (
            "vector",
            [1.0, 2.0],
            r"observation has shape \[2\], expected \[4\] or a batch of them, \[B, 4\]",
        ),
        (
            "vector",
            {"a": 1},
            r"observation is a dictionary of \['a'\], expected \[4\] numbers, as gymn",
        ),
        ("vector", ["a"] * 4, "observation has dtype <U1, expected numbers"),
        ("image", np.zeros((3, 4, 3)), r"shape \[3, 4, 3\], expected \[4, 3, 3\] or a batch"),
        ("image", np.full((4, 3, 3), 300), r"is 300, expected 0, 1, ... or 255"),
        ("category", 7, r"observation\[0\] is 7, outside 2..6"),
        (
            "compound",
            np.zeros(4),
            r"observation is no dictionary, expected one of \['dials', 'hand'",
        ),
        ("compound", {"hand": 1}, "observation has no entry 'dials', which the space has"),
    ],
)
def test_what_is_no_observation_is_refused(
    name: str, observation: Any, message: str, tmp_path: Path
) -> None:
    policy = load_policy(saved(tmp_path, dataset(SPACES[name], Discrete(2))))
    with pytest.raises(ValueError, match=message):
        policy.act(observation)


def test_entries_of_a_batch_are_as_many(tmp_path: Path) -> None:
    space = Dict({"goal": Box(-1, 1, (2,)), "seen": Box(-1, 1, (3,))})
    policy = load_policy(saved(tmp_path, dataset(space, Discrete(2))))
    with pytest.raises(
        ValueError, match=r"observation has entries of \[2, 5\] observations, expected as"
    ):
        policy.act({"goal": np.zeros((5, 2)), "seen": np.zeros((2, 3))})
    with pytest.raises(
        ValueError, match=r"seen has shape \[3\], expected \[B, 3\], as the entries"
    ):
        policy.act({"goal": np.zeros((5, 2)), "seen": np.zeros(3)})


def test_a_checkpoint_without_spaces_acts_on_rows(tmp_path: Path) -> None:
    """As those of earlier versions, and of loops of one's own."""
    data = dataset(COMPOUND, Discrete(3, start=7))
    old, new = (
        load_policy(saved(tmp_path, data, name, known=known))
        for name, known in (("old", False), ("new", True))
    )
    several = [COMPOUND.sample() for _ in range(20)]
    rows = np.stack([spaces.flatten(COMPOUND, each) for each in several])
    np.testing.assert_array_equal(old.act(rows) + 7, new.act(batch_of(COMPOUND, several)))
    with pytest.raises(
        ValueError, match=r"observation is a dictionary of .* gymnasium\.spaces\.flat"
    ):
        old.act(several[0])


@pytest.mark.parametrize("stored", [["{}", "{}"], ["nothing", "{}"], [1], "text"])
def test_damaged_spaces_are_refused(stored: Any, tmp_path: Path) -> None:
    architecture = Architecture(observation_size=3, action_size=2, hidden_sizes=(8,))
    step = TrainStep(IQLLoss(*built(architecture)))
    path = checkpoint.save(tmp_path / "a.ckpt", step, architecture, spaces=stored)
    with pytest.raises(ValueError, match=r"a\.ckpt: its spaces can not be read"):
        load_policy(path)


def test_spaces_of_other_networks_are_refused(tmp_path: Path) -> None:
    architecture = Architecture(observation_size=3, action_size=2, hidden_sizes=(8,))
    step = TrainStep(IQLLoss(*built(architecture)))
    known = checkpoint.described(dataset(SPACES["vector"], Discrete(2)))
    path = checkpoint.save(tmp_path / "a.ckpt", step, architecture, **known)
    with pytest.raises(ValueError, match=r"Discrete\(2\), are not those of its networks, of sizes"):
        load_policy(path)


def test_a_policy_acts_in_environments_of_torchrl(tmp_path: Path) -> None:
    """Which observe float64."""
    spec = gymnasium.spec("Hopper-v5")
    data = OfflineDataset.empty(spec)
    architecture = Architecture(observation_size=11, action_size=3, hidden_sizes=(8,))
    step = TrainStep(IQLLoss(*built(architecture)))
    path = checkpoint.save(tmp_path / "a.ckpt", step, architecture, **checkpoint.described(data))
    env = GymEnv("Hopper-v5")
    assert env.observation_spec["observation"].dtype == torch.float64
    assert env.rollout(3, load_policy(path))["action"].shape == (3, 3)


def test_what_is_described_is_what_the_data_are() -> None:
    data = dataset(SPACES["vector"], Discrete(2))
    rows = data.transitions["observation"]
    known = checkpoint.described(data)
    assert known["observed"] == [rows.amin(0).tolist(), rows.amax(0).tolist()]
    assert (known["dataset"], known["env"], known["reference_scores"]) == ("numbers", None, None)
    for nothing in (dataset(SPACES["image"], Discrete(2)), OfflineDataset.empty("Hopper-v5")):
        assert checkpoint.described(nothing)["observed"] is None
    made = gymnasium.envs.registration.EnvSpec("Made-v0", entry_point=lambda: None)  # pyright: ignore
    assert "<lambda>" in (written_spec(made) or "")
    made.kwargs["noise"] = object()
    assert written_spec(made) is None


def test_in_its_environment_it_plays_what_was_evaluated(maze_id: str, tmp_path: Path) -> None:
    """From the command line: dictionaries of float64, normalised."""
    overrides = [*TINY, "temperature=3", f"dataset={maze_id}"]
    offline.run(OFFLINE.settings(of_maze(overrides)), tmp_path)
    policy = load_policy(tmp_path / "last.ckpt")
    spec = gymnasium.envs.registration.EnvSpec.from_json(
        checkpoint.load_metadata(tmp_path / "last.ckpt")["env"]
    )
    with Evaluator(spec, episodes=1, seed=3) as evaluate:
        expected = evaluate(policy, keep_trajectories=True)
    env = gymnasium.make(spec)
    observation, _ = env.reset(seed=3)
    assert isinstance(observation, dict) and observation["observation"].dtype == np.float64
    trajectory, over = [observation], False
    while not over:
        observation, _, terminated, truncated, _ = env.step(policy.act(observation))
        trajectory.append(observation)
        over = terminated or truncated
    flat = np.stack([spaces.flatten(env.observation_space, each) for each in trajectory])
    np.testing.assert_allclose(flat, expected.trajectories[0], rtol=1e-6, atol=1e-6)  # pyright: ignore


# --- Networks -------------------------------------------------------------------------------------------

VALUES = {"iql": {"qvalue", "value"}, "onestep": {"qvalue", "value"}}
VALUES |= {name: {"qvalue"} for name in ("awac", "td3bc", "cql")}


@pytest.mark.parametrize("name", algorithms())
def test_networks_are_those_that_were_trained(name: str, maze_id: str, tmp_path: Path) -> None:
    axes = algorithms()[name].axes()
    given = [f"algorithm={name}", f"dataset={maze_id}", *SMALL, "steps=5", "eval_episodes=0"]
    given += ["temperature=3"] if "temperature" in axes else []
    offline.run(OFFLINE.settings(given), tmp_path)
    path = tmp_path / "last.ckpt"
    networks = load_networks(path)
    assert networks.keys() == {"policy"} | VALUES.get(name, set())
    assert not any(p.requires_grad for each in networks.values() for p in each.parameters())
    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(7, 8)), rng.uniform(-1, 1, (7, 2))
    if name != "dt":
        policy = load_policy(path)
        rows = policy.act.rows(observations.astype(np.float32))
        np.testing.assert_array_equal(
            networks["policy"].act.rows(observations.astype(np.float32)), rows
        )
    if "value" in networks:
        found = networks["value"](observation=torch.from_numpy(observations))
        expected = by_hand(torso_of(networks["value"]), observations)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if "qvalue" in networks:
        found = networks["qvalue"](
            observation=torch.from_numpy(observations), action=torch.from_numpy(actions)
        )
        critics = [each for each in networks["qvalue"].modules() if isinstance(each, Torso)]
        number = 1 if name == "onestep" else 2
        assert found.shape == (7, number, 1) and len(critics) == number
        stored = _Loss()
        checkpoint._restore(path, {"learner": stored}, "cpu")
        last = max(key for key in stored.loss if key.startswith("qvalue_network_params.module.mlp"))
        weights = stored.loss[last.replace("bias", "weight")].reshape(number, 1, -1)
        for i, critic in enumerate(critics):
            assert torch.equal(critic.layers[-1].weight, weights[i])
            expected = by_hand(critic, np.concatenate([observations, actions], 1))
            np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        KeyError, match=r"last\.ckpt has no network 'critic', but policy( and qvalue)?"
    ):
        _ = networks["critic"]


class _Loss:
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss: dict[str, torch.Tensor] = state["loss"]


def test_q_of_discrete_actions_has_a_value_for_each(tmp_path: Path) -> None:
    path = saved(tmp_path, dataset(SPACES["image"], Discrete(3)))
    networks = load_networks(path)
    images = np.random.default_rng(0).integers(0, 256, (5, 36), dtype=np.uint8)
    q = networks["qvalue"](observation=torch.from_numpy(images))
    assert q.shape == (5, 2, 3)
    critics = [each for each in networks["qvalue"].modules() if isinstance(each, Torso)]
    for i, critic in enumerate(critics):
        np.testing.assert_allclose(q[:, i], by_hand(critic, images), rtol=1e-4, atol=1e-4)


def test_a_decision_transformer_does_not_act_by_an_observation(tmp_path: Path) -> None:
    policy = load_policy(saved_transformer(tmp_path))
    with pytest.raises(
        ValueError, match=r"ReturnConditioned acts by observation, context, .* torchrl_iql.Eval"
    ):
        policy.act(np.zeros(3))
