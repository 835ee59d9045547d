"""The way of actions from an environment into a data set, through a policy, and back into it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from tensordict.nn import TensorDictModule

from episodes import MARKS
from torchrl_iql import Evaluator, OfflineDataset, TrainStep, load_dataset, models
from torchrl_iql.acting import Acting
from torchrl_iql.environments import data_environment, spec_of
from torchrl_iql.objectives import IQLLoss
from torchrl_iql.online import Experience, environment, transitions
from torchrl_iql.spaces import named_leaves
from torchrl_iql_recipes.behaviors.rollouts import CheckpointRollouts

pytestmark = MARKS

STEPS = 6

SPACES = {
    "interval": Box(-1, 1, (2,), np.float32),
    "wide": Box(np.array([-2, 0.5], np.float32), np.array([3, 40], np.float32)),
    "float64": Box(-1, 1, (3,), np.float64),
    "matrix": Box(-2, 2, (2, 3), np.float32),
    "scalar": Box(-1, 1, (), np.float64),
    "integers": Box(0, 10, (2,), np.int64),
    "bytes": Box(0, 255, (2, 2), np.uint8),
    "negative integers": Box(-5, -1, (1,), np.int32),
    "choices": Discrete(4),
    "choices from 1": Discrete(3, start=1),
    "choices from -2": Discrete(5, start=-2),
}


class Player(gymnasium.Env):
    """Takes note of the actions that it is given, checked by their space; it observes the step."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, space: str = "interval") -> None:
        self.action_space = SPACES[space]
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.taken.append(action)
        self.t += 1
        return np.full(1, self.t, np.float32), 0.0, False, self.t == STEPS, {}


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> str:
    return request.param


def maker(players: list[Player], space: str) -> Callable[[], gymnasium.Env]:
    def make() -> gymnasium.Env:
        players.append(Player(space))
        return players[-1]

    return make


def played(space: str) -> tuple[OfflineDataset, list[Any]]:
    """Return a data set of an episode of random actions, and these."""
    SPACES[space].seed(0)
    actions = [SPACES[space].sample() for _ in range(STEPS)]
    episode = {
        "observations": np.arange(STEPS + 1.0)[:, None],
        "actions": np.stack(actions),
        "rewards": np.zeros(STEPS),
        "terminations": np.zeros(STEPS),
    }
    dataset = OfflineDataset.from_episodes(
        "played",
        [episode],
        observation_space=Player.observation_space,
        action_space=SPACES[space],
        env_spec=lambda: Player(space),
    )
    return dataset, actions


class Memory(torch.nn.Module):
    """Does what was recorded at the step that it observes, as the rows of a data set have it."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.rows[observation[..., 0].long()]  # pyright: ignore


def memory(rows: torch.Tensor) -> TensorDictModule:
    return TensorDictModule(Memory(rows), in_keys=["observation"], out_keys=["action"])


def assert_same_actions(found: list[Any], expected: list[Any], space: str) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.shape(one) == np.shape(other)
        # Of floats, those at a bound are kept a little inside.
        margin = 0.0
        if np.asarray(other).dtype.kind == "f":
            margin = 1e-5 * np.max(np.subtract(SPACES[space].high, SPACES[space].low))  # pyright: ignore
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=margin)


def test_evaluation_plays_what_was_recorded(space: str) -> None:
    dataset, actions = played(space)
    players: list[Player] = []
    with Evaluator(maker(players, space), episodes=1) as evaluate:
        evaluate(memory(dataset.transitions["action"]))
    assert_same_actions(players[-1].taken, actions, space)


def test_what_is_collected_is_what_was_recorded(space: str) -> None:
    dataset, actions = played(space)
    players: list[Player] = []
    env = environment(maker(players, space))
    with torch.no_grad():
        collected = env.rollout(STEPS, memory(dataset.transitions["action"]))
    assert_same_actions(players[-1].taken, actions, space)
    rows = transitions(collected, dataset.transitions)
    assert rows["action"].dtype is dataset.transitions["action"].dtype
    assert rows["action"].equal(dataset.transitions["action"])
    buffer = Experience(dataset, STEPS, 4)
    buffer.extend(rows)
    assert buffer.sample()["action"].shape[1:] == dataset.transitions["action"].shape[1:]


def test_random_actions_online_are_of_the_space(space: str) -> None:
    players: list[Player] = []
    env = environment(maker(players, space))
    env.set_seed(0)
    env.rollout(40, break_when_any_done=False)  # the player checks them
    assert len(players[-1].taken) == 40


@pytest.mark.parametrize("policy", ["gaussian", "squashed", "deterministic"])
def test_actions_of_networks(space: str, policy: str) -> None:
    of_rows = data_environment(lambda: Player(space)).action_space
    if isinstance(of_rows, Discrete):
        network = models.categorical_policy(1, int(of_rows.n))
    else:
        kinds = {
            "gaussian": models.gaussian_policy,
            "squashed": models.squashed_policy,
            "deterministic": models.deterministic_policy,
        }
        network = kinds[policy](1, environment(lambda: Player(space)).action_spec)
    players: list[Player] = []
    with Evaluator(maker(players, space), episodes=2) as evaluate:
        evaluate(network)  # the player checks them
    assert all(len(player.taken) == STEPS for player in players[-2:])


def test_a_policy_collects_into_a_data_set(space: str, tmp_path: Path) -> None:
    """collect.py plays the policy of a checkpoint: its actions are those of the environment, too."""
    dataset, actions = played(space)
    behavior = CheckpointRollouts(spec_of(lambda: Player(space)), tmp_path)  # pyright: ignore
    policy: Any = memory(dataset.transitions["action"])  # which writes an action alone
    policy.act = Acting(policy, Player.observation_space, SPACES[space])
    vars(behavior)["policy"] = policy
    env = gymnasium.make(behavior.env_spec)
    episode = behavior.play(env, np.random.default_rng(0), 0.0)
    assert_same_actions(list(episode.actions), actions, space)
    again = OfflineDataset.from_episodes(
        "again",
        [
            {
                "observations": np.stack(episode.observations),
                "actions": np.stack(episode.actions),
                "rewards": episode.rewards,
                "terminations": episode.terminations,
            }
        ],
        observation_space=Player.observation_space,
        action_space=SPACES[space],
    )
    assert again.transitions["action"].equal(dataset.transitions["action"])


# --- Where an environment is looked up --------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a module that registers an environment when it is imported."""
    name = f"plants_{tmp_path.name.replace('-', '_')}"
    lines = "import gymnasium", "from gymnasium.envs.classic_control import PendulumEnv"
    register = "gymnasium.register('Plant-v3', PendulumEnv, max_episode_steps=5)"
    (tmp_path / f"{name}.py").write_text("\n".join([*lines, register]))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    gymnasium.registry.pop("Plant-v3", None)


def arrays() -> dict[str, Any]:
    columns = {"observations": 3, "actions": 1}
    rows = {key: np.zeros((4, size)) for key, size in columns.items()}
    return rows | {"rewards": np.ones(4), "terminals": np.zeros(4), "timeouts": [0, 0, 0, 1]}


PLACES: dict[str, Callable[[Any], str]] = {
    "empty": lambda env: OfflineDataset.empty(env).env_spec.id,  # pyright: ignore
    "arrays": lambda env: OfflineDataset.from_arrays("x", **arrays(), env_spec=env).env_spec.id,  # pyright: ignore
    "evaluation": lambda env: Evaluator(env, episodes=1).envs[0].spec.id,  # pyright: ignore
    "online": lambda env: _unwrapped(environment(env)).spec.id,  # pyright: ignore
}


def _unwrapped(env: Any) -> gymnasium.Env:
    return env.base_env._env


@pytest.mark.parametrize("place", PLACES)
def test_an_id_may_name_its_module(place: str, module: str) -> None:
    assert PLACES[place](f"{module}:Plant-v3") == "Plant-v3"


def test_an_id_of_a_recipe_may_name_its_module(module: str) -> None:
    from torchrl_iql_recipes.experiment import build

    for env in (f"{module}:Plant-v3", {"id": f"{module}:Plant-v3", "max_episode_steps": 3}):
        spec = build.environment(env)
        assert spec is not None
        assert spec.id == "Plant-v3"
        assert spec.max_episode_steps == (5 if isinstance(env, str) else 3)


def test_a_function_makes_the_environment() -> None:
    def make() -> gymnasium.Env:
        return gymnasium.make("Pendulum-v1", g=3.0)

    dataset = OfflineDataset.from_arrays("x", **arrays(), env_spec=make)
    assert dataset.action_space == make().action_space
    with Evaluator(dataset.env_spec, episodes=1) as evaluate:  # pyright: ignore
        assert evaluate.envs[0].unwrapped.g == 3.0  # pyright: ignore
    assert environment(make).rollout(3).shape == (3,)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("no_such_module_here:Plant-v3", "no_such_module_here:Plant-v3.*No module named"),
        ("Plantt-v3", "unknown environment 'Plantt-v3'"),
    ],
)
def test_an_environment_that_is_not_there(env: str, message: str) -> None:
    for place in (OfflineDataset.empty, Evaluator, environment):
        with pytest.raises(ValueError, match=message):
            place(env)


# --- Bytes stay bytes --------------------------------------------------------------------------------------


class Arm(gymnasium.Env):
    """Observes the step, with entries that are not sorted, of which one has bytes that are no image."""

    hand = Dict([("y", Box(-9, 9, (2,), np.float64)), ("x", Box(-9, 9, (1,)))])
    observation_space = Dict(
        [("z", hand), ("b", Tuple([hand])), ("c", MultiDiscrete([2, 9], dtype=np.uint8))]
    )
    action_space = Box(-1, 1, (1,), np.float32)

    def observation(self) -> dict[str, Any]:
        hand = {"x": np.full(1, self.t, np.float32), "y": np.array([-self.t, 0.5])}
        return {"z": hand, "b": (hand,), "c": np.array([self.t % 2, self.t], np.uint8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return self.observation(), 1.0, False, self.t == STEPS, {}


def arm_row(t: int) -> list[float]:
    hand = [t, -t, 0.5]  # x and y
    return [*hand, *np.eye(2)[t % 2], *np.eye(9)[t], *hand]


def test_entries_are_sorted_in_data_and_in_the_environment() -> None:
    columns = torch.tensor([arm_row(t) for t in range(STEPS + 1)])
    with Evaluator(Arm, episodes=1) as evaluate:
        played = evaluate(models.deterministic_policy(17, 1), keep_trajectories=True)
    assert played.trajectories is not None
    assert torch.from_numpy(played.trajectories[0]).equal(columns)
    online = environment(Arm).rollout(STEPS)
    assert online["observation"].equal(columns[:-1])
    steps = range(STEPS + 1)
    hand = {
        "x": np.array([[t] for t in steps], np.float32),
        "y": np.array([[-t, 0.5] for t in steps]),
    }
    observed = {"z": hand, "b": (hand,), "c": np.array([[t % 2, t] for t in steps], np.uint8)}
    done = {"actions": np.zeros((STEPS, 1), np.float32), "rewards": np.ones(STEPS)}
    dataset = OfflineDataset.from_episodes(
        "arm",
        [{"observations": observed, "terminations": np.zeros(STEPS), **done}],
        observation_space=Arm.observation_space,
        action_space=Arm.action_space,
    )
    assert transitions(online, dataset.transitions)["observation"].equal(columns[:-1])
    dataset.save_minari("own/arm-v0")
    for found in (dataset, load_dataset("own/arm-v0"), load_dataset("own/arm-v0")):
        assert found.transitions["observation"].equal(columns[:-1])
        names = [name for name, _ in named_leaves(found.observation_space)]
        assert names == ["b/0/x", "b/0/y", "c", "z/x", "z/y"]
    (again,) = minari.load_dataset("own/arm-v0").iterate_episodes()
    np.testing.assert_array_equal(again.observations["z"]["y"], hand["y"])
    assert [name for name, _ in named_leaves(OfflineDataset.empty(Arm).observation_space)] == names


def test_vectors_of_entries_that_are_not_sorted_are_refused() -> None:
    message = "^arm: observations are vectors, of which .* whether y, x are in this order or"
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(
            "arm",
            observations=np.zeros((4, 3)),
            actions=np.zeros((4, 1)),
            rewards=np.zeros(4),
            terminals=np.zeros(4),
            timeouts=np.zeros(4),
            observation_space=Arm.hand,
        )


IMAGE = Box(0, 255, (4, 4, 1), np.uint8)


class Camera(gymnasium.Env):
    observation_space, action_space = IMAGE, Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return IMAGE.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return IMAGE.sample(), 1.0, False, self.t == 3, {}


def images(n: int = 40) -> OfflineDataset:
    rng = np.random.default_rng(0)
    return OfflineDataset.from_arrays(
        "camera",
        observations=rng.integers(0, 256, (n, 4, 4, 1), np.uint8),
        actions=rng.uniform(-1, 1, (n, 1)),
        rewards=rng.normal(size=n),
        terminals=np.zeros(n),
        timeouts=np.arange(n) % 10 == 9,
        env_spec=Camera,
    )


def test_bytes_stay_until_a_network_reads_them(tmp_path: Path) -> None:
    dataset = images()
    assert dataset.transitions["observation"].dtype is torch.uint8
    assert dataset.transitions["next", "observation"].dtype is torch.uint8
    spec = dataset.env_spec
    minari.create_dataset_from_buffers(
        "test/camera-v0",
        [
            minari.data_collector.EpisodeBuffer(
                observations=list(images().transitions["observation"].numpy().reshape(-1, 4, 4, 1)),
                actions=list(np.zeros((len(dataset.transitions) - 1, 1), np.float32)),
                rewards=[0.0] * (len(dataset.transitions) - 1),
                terminations=[False] * (len(dataset.transitions) - 1),
                truncations=[False] * (len(dataset.transitions) - 2) + [True],
            )
        ],
        observation_space=IMAGE,
        action_space=Camera.action_space,
    )
    for _ in range(2):  # the second is from the cache
        stored = load_dataset("test/camera-v0")
        assert stored.transitions["observation"].dtype is torch.uint8
    with dataset.minibatches(8) as minibatches:
        assert minibatches(0)[0]["observation"].dtype is torch.uint8
    collected = environment(spec).rollout(3)  # pyright: ignore
    assert transitions(collected, dataset.transitions)["observation"].dtype is torch.uint8
    seen = []

    def policy(observation: torch.Tensor) -> torch.Tensor:
        seen.append(observation.dtype)
        return torch.zeros(len(observation), 1)

    with Evaluator(spec, episodes=1) as evaluate:  # pyright: ignore
        evaluate(TensorDictModule(policy, in_keys=["observation"], out_keys=["action"]))
    assert set(seen) == {torch.uint8}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_training_on_bytes_is_training_on_their_numbers(normalize: bool, execution: Any) -> None:
    dataset = images()
    numbers = dataset.transitions.clone()
    numbers["observation"] = numbers["observation"].float()
    numbers["next", "observation"] = numbers["next", "observation"].float()
    trained = []
    for rows in (dataset.transitions, numbers):
        torch.manual_seed(0)
        statistics = dataset.observation_statistics() if normalize else None
        networks: dict[str, Any] = {"hidden_sizes": (8,), "observation_statistics": statistics}
        loss = IQLLoss(
            models.gaussian_policy(16, 1, **networks),
            models.qvalue_ensemble(16, 1, **networks),
            models.value_network(16, **networks),
        )
        step = TrainStep(loss, execution=execution)
        for first in range(0, 40, 8):
            step(rows[first : first + 8])
        trained.append([parameter.detach().clone() for parameter in loss.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_no_bytes() -> None:
    episode = {
        "observations": np.full((3, 4, 4, 1), 0.5),
        "actions": np.zeros((2, 1)),
        "rewards": np.zeros(2),
        "terminations": np.zeros(2),
    }
    spaces = {"observation_space": IMAGE, "action_space": Camera.action_space}
    with pytest.raises(ValueError, match=r"observations\[0, 0\] is 0.5, expected 0, 1, ... or 255"):
        OfflineDataset.from_episodes("x", [episode], **spaces)
    mixed = Dict(image=IMAGE, speed=Box(-1, 1, (1,)))
    episode["observations"] = {"image": np.full((3, 4, 4, 1), 7), "speed": np.full((3, 1), 0.5)}
    spaces["observation_space"] = mixed
    rows = OfflineDataset.from_episodes("x", [episode], **spaces).transitions["observation"]
    assert rows.dtype is torch.float32
    assert rows[0, -2:].tolist() == [7, 0.5]


@pytest.mark.slow
def test_statistics_take_little_memory() -> None:
    """Of 2,000 frames of 28,224 bytes, 56 MB, they took 450 MB and more."""
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
import numpy as np, torch
from torchrl_iql import OfflineDataset
rng = np.random.default_rng(0)
frames = rng.integers(0, 256, (2000, 28224), np.uint8)
dataset = OfflineDataset.from_arrays("frames", observations=frames, actions=np.zeros((2000, 1)),
    rewards=np.zeros(2000), terminals=np.zeros(2000), timeouts=np.zeros(2000))
assert dataset.transitions["observation"].dtype is torch.uint8
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mean, std = dataset.observation_statistics()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
np.testing.assert_allclose(mean, frames[:-1].mean(0), rtol=1e-6)
np.testing.assert_allclose(std, frames[:-1].std(0), rtol=1e-5)
print((after - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MiB
