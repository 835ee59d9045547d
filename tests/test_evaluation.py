"""What Evaluator and Evaluation promise, checked against loops and formulas written out by hand."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Space
from gymnasium.wrappers import TimeLimit
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torch.distributions import Normal
from torchrl.envs import Compose, GymWrapper, InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    Delta,
    GRUModule,
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    set_recurrent_mode,
)

from torchrl_iql.environments import REFERENCE_SCORES
from torchrl_iql.evaluation import Evaluation, Evaluator


class Countdown(gymnasium.Env):
    """Lasts ``seed % 5 + 1`` steps, pays the sum of the action, records its actions, tells on cue."""

    observation_space = Box(-10.0, 10.0, (2,))

    def __init__(
        self, action_space: Space, reports: dict[str, list[bool]], truncates: bool
    ) -> None:
        self.action_space = action_space
        self.reports = reports
        self.truncates = truncates
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        assert seed is not None, "every episode of an evaluation is seeded"
        self.left = seed % 5 + 1
        self.actions = []
        return self._observation(), {}

    def step(self, action: Any):
        assert self.left > 0, "stepped after the end of the episode"
        self.actions.append(action)
        self.left -= 1
        done = self.left == 0
        info = {key: values[len(self.actions) - 1] for key, values in self.reports.items()}
        reward = float(np.sum(action))
        return (
            self._observation(),
            reward,
            done and not self.truncates,
            done and self.truncates,
            info,
        )

    def _observation(self) -> np.ndarray:
        return np.array([self.left, len(self.actions)], dtype=np.float32)


def countdown(
    *,
    id: str = "Countdown-v0",
    env: type[Countdown] = Countdown,
    action_space: Space | None = None,
    reports: dict[str, list[bool]] | None = None,
    truncates: bool = False,
) -> EnvSpec:
    return EnvSpec(
        id,
        entry_point=lambda **kwargs: env(**kwargs),
        disable_env_checker=True,
        kwargs={
            "action_space": action_space or Box(-1.0, 1.0, (2,)),
            "reports": reports or {},
            "truncates": truncates,
        },
    )


def policy_from(function: Any) -> TensorDictModule:
    return TensorDictModule(function, in_keys=["observation"], out_keys=["action"])


def constant(action: Any) -> TensorDictModule:
    """Make a policy that always writes the same action."""
    action = torch.as_tensor(action)
    return policy_from(lambda observation: action.expand(len(observation), *action.shape))


def forgetting(policy: TensorDictModuleBase) -> Any:
    """Let a recurrent policy begin anew at every step."""

    def act(observation: torch.Tensor) -> torch.Tensor:
        is_init = torch.ones(len(observation), 1, dtype=torch.bool)
        td = TensorDict({"observation": observation, "is_init": is_init}, [len(observation)])
        return policy(td)["action"]

    return act


class Seeded(gymnasium.Wrapper):
    """Begins all episodes from the same seed."""

    def __init__(self, env: gymnasium.Env, seed: int) -> None:
        super().__init__(env)
        self.seed = seed

    def reset(self, **_: Any) -> tuple[Any, dict]:
        return self.env.reset(seed=self.seed)


def by_hand(env: gymnasium.Env, seed: int, act: Any) -> tuple[float, list[np.ndarray]]:
    """Play one episode as the gymnasium documentation does; give its return and observations."""
    observation, _ = env.reset(seed=seed)
    total, observations, over = 0.0, [observation], False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        total += float(reward)
        observations.append(observation)
        over = terminated or truncated
    return total, observations


class TestEpisodes:
    def test_equal_a_loop_by_hand_with_discrete_actions(self):
        def act(observation: torch.Tensor) -> torch.Tensor:
            return (observation[..., 2] > 0).long()

        with Evaluator("CartPole-v1", episodes=4, seed=7) as evaluate:
            evaluation = evaluate(policy_from(act), keep_trajectories=True)
        env = gymnasium.make("CartPole-v1")
        for i in range(4):
            expected, observations = by_hand(env, 7 + i, lambda o: int(act(torch.as_tensor(o))))
            assert evaluation.returns[i] == expected == evaluation.lengths[i]
            assert evaluation.trajectories is not None
            np.testing.assert_array_equal(evaluation.trajectories[i], observations)
        assert len(set(evaluation.lengths.tolist())) > 1

    def test_equal_a_loop_by_hand_with_continuous_actions(self):
        def act(observation: torch.Tensor) -> torch.Tensor:
            return 3.0 * observation[..., 1:2]  # Leaves the space, which ends at 2.

        with Evaluator("Pendulum-v1", episodes=2, seed=3) as evaluate:
            evaluation = evaluate(policy_from(act))
        env = gymnasium.make("Pendulum-v1")
        expected = [
            by_hand(env, seed, lambda o: np.clip(act(torch.as_tensor(o)).numpy(), -2, 2))[0]
            for seed in (3, 4)
        ]
        np.testing.assert_allclose(evaluation.returns, expected, rtol=1e-6)
        assert evaluation.lengths.tolist() == [200, 200]

    @pytest.mark.parametrize("truncates", [False, True])
    def test_each_environment_plays_one_to_its_end(self, truncates: bool):
        with Evaluator(countdown(truncates=truncates), episodes=7) as evaluate:
            evaluation = evaluate(constant([0.5, 0.25]))
        assert evaluation.lengths.tolist() == [1, 2, 3, 4, 5, 1, 2]
        assert evaluation.returns.tolist() == [0.75 * n for n in (1, 2, 3, 4, 5, 1, 2)]

    def test_are_the_same_at_every_call_and_others_with_another_seed(self):
        policy = policy_from(lambda observation: (observation[:, 2] > 0).long())
        with Evaluator("CartPole-v1", seed=1) as evaluate:
            first, second = evaluate(policy), evaluate(policy)
        with Evaluator("CartPole-v1", seed=100) as evaluate:
            other = evaluate(policy)
        np.testing.assert_array_equal(first.returns, second.returns)
        assert first.returns.tolist() != other.returns.tolist()

    def test_keep_observations_only_when_asked(self):
        with Evaluator(countdown(), episodes=3) as evaluate:
            assert evaluate(constant([0.0, 0.0])).trajectories is None
            trajectories = evaluate(constant([0.0, 0.0]), keep_trajectories=True).trajectories
        assert trajectories is not None
        assert trajectories[2].tolist() == [[3, 0], [2, 1], [1, 2], [0, 3]]
        assert trajectories[2].dtype == np.float32

    @pytest.mark.parametrize("kind", [dict, OrderedDict])  # gymnasium sorts the first alone
    def test_flatten_dictionaries_in_the_sorted_order_of_their_keys(self, kind: type):
        class Nested(Countdown):
            observation_space = Dict(kind(z=Box(-1, 1, (1,)), a=Box(-1, 1, (2,))))

            def _observation(self) -> Any:
                return {"z": np.full(1, 0.5, np.float32), "a": np.full(2, -0.5, np.float32)}

        with Evaluator(countdown(env=Nested), episodes=1) as evaluate:
            trajectories = evaluate(constant([0.0, 0.0]), keep_trajectories=True).trajectories
        assert trajectories is not None
        assert trajectories[0].tolist() == [[-0.5, -0.5, 0.5]] * 2


class TestPolicy:
    def test_acts_without_exploration_gradients_or_dropout(self):
        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(2, 2)
                self.seen: list[tuple[bool, bool]] = []

            def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                self.seen.append((self.training, torch.is_grad_enabled()))
                mean = self.linear(observation)
                return mean, torch.full_like(mean, 5.0)

        body = Body()
        actor = ProbabilisticActor(
            TensorDictModule(body, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=Normal,
        )
        with Evaluator(countdown(), episodes=5) as evaluate:
            evaluation = evaluate(actor)
            expected = evaluate(policy_from(body.linear))
        np.testing.assert_array_equal(evaluation.returns, expected.returns)
        assert set(body.seen) == {(False, False)}

    @pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
    @pytest.mark.parametrize("module", [LSTMModule, GRUModule])
    def test_remembers_as_in_a_rollout_of_torchrl(self, env_id: str, module: type):
        torch.manual_seed(0)
        env = gymnasium.make(env_id, max_episode_steps=60)
        discrete = isinstance(env.action_space, Discrete)
        states = ["h", "c"] if module is LSTMModule else ["h"]
        memory = module(
            input_size=env.observation_space.shape[0],  # pyright: ignore
            hidden_size=8,
            num_layers=2,
            in_keys=["observation", *states],
            out_keys=["embedding", *(("next", key) for key in states)],
            default_recurrent_mode=True,
        )
        head = nn.Sequential(nn.Linear(8, 2 if discrete else 1), nn.Tanh())
        kind = (OneHotCategorical, ["logits"]) if discrete else (Delta, ["param"])
        body = TensorDictSequential(memory, TensorDictModule(head, ["embedding"], kind[1]))
        policy = ProbabilisticActor(body, in_keys=kind[1], distribution_class=kind[0])
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(4)
        with Evaluator(env.spec, episodes=3, seed=5) as evaluate:
            evaluate(policy)  # of whose episodes nothing is left
            trajectories = evaluate(policy, keep_trajectories=True).trajectories
            without = evaluate(policy_from(forgetting(policy)), keep_trajectories=True).trajectories
        assert trajectories is not None and without is not None
        if not discrete:  # two choices may be the same without a memory
            assert not np.allclose(trajectories, without, rtol=1e-2)
        for i, trajectory in enumerate(trajectories):
            transforms = Compose(InitTracker(), memory.make_tensordict_primer())
            rolled = TransformedEnv(GymWrapper(Seeded(gymnasium.make(env.spec), 5 + i)), transforms)
            with (
                torch.no_grad(),
                set_recurrent_mode(False),
                set_exploration_type(ExplorationType.DETERMINISTIC),
            ):
                expected = rolled.rollout(100, policy)["next", "observation"]
            np.testing.assert_allclose(trajectory[1:], expected, rtol=1e-4, atol=1e-4)

    def test_remembers_by_torchrls_keys_alone(self):
        torch.manual_seed(0)
        cell = nn.GRUCell(2, 2)
        memory = TensorDictModule(cell, ["observation", "state"], [("next", "state")])
        copies = TensorDictModule(lambda state: state, [("next", "state")], ["action"])
        with Evaluator(countdown(), episodes=5) as evaluate:
            evaluation = evaluate(TensorDictSequential(memory, copies), keep_trajectories=True)
        assert evaluation.trajectories is not None
        for i, trajectory in enumerate(evaluation.trajectories):
            state, total = None, 0.0
            for observation in torch.from_numpy(trajectory[:-1]):
                state = cell(observation, state)
                total += state.sum().item()
            assert evaluation.returns[i] == pytest.approx(total, rel=1e-5)

    @pytest.mark.parametrize("written", ["goal", ("next", "goal")])
    def test_an_input_that_nothing_provides_is_named(self, written: Any):
        def act(observation: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return goal - observation, goal

        policy = TensorDictModule(act, ["observation", "goal"], ["action", written])
        with (
            Evaluator(countdown(), episodes=2) as evaluate,
            pytest.raises(ValueError, match=r"reads \['goal'\], which nothing provides"),
        ):
            evaluate(policy)

    def test_gets_the_mode_of_every_submodule_back(self):
        frozen, trained = nn.Linear(2, 2).eval(), nn.Linear(2, 2)
        policy = policy_from(nn.Sequential(frozen, trained))
        with Evaluator(countdown(), episodes=1) as evaluate:
            evaluate(policy)
            assert (frozen.training, trained.training) == (False, True)
            with pytest.raises(ValueError), torch.no_grad():
                trained.weight.fill_(math.nan)
                evaluate(policy)
        assert (frozen.training, trained.training) == (False, True)

    def test_actions_are_clipped_to_the_space(self):
        with Evaluator(countdown(), episodes=1) as evaluate:
            evaluate(constant([7.0, -0.5]))
            actions = evaluate.envs[0].get_wrapper_attr("actions")
        assert [action.tolist() for action in actions] == [[1.0, -0.5]]
        assert actions[0].dtype == np.float32

    @pytest.mark.parametrize(
        "action",
        [torch.tensor(2), torch.tensor([2]), torch.tensor([0, 0, 1, 0]), torch.eye(4)[2].bool()],
        ids=["index", "column", "one-hot", "one-hot-bool"],
    )
    def test_discrete_actions_come_as_index_or_one_hot(self, action: torch.Tensor):
        with Evaluator(countdown(action_space=Discrete(4)), episodes=3) as evaluate:
            evaluation = evaluate(constant(action))
        assert evaluation.returns.tolist() == [2.0, 4.0, 6.0]

    @pytest.mark.parametrize(
        ("action_space", "message"),
        [
            (Box(-1.0, 1.0, (2,)), r"shape \[3, 5\].*needs \[3, 2\]"),
            (Discrete(4), r"shape \[3, 5\].*needs \[3\] or \[3, 1\] or \[3, 4\]"),
        ],
    )
    def test_wrong_shape_is_named(self, action_space: Space, message: str):
        with (
            Evaluator(countdown(action_space=action_space), episodes=3) as evaluate,
            pytest.raises(ValueError, match=message),
        ):
            evaluate(constant([0, 0, 1, 0, 0]))

    def test_nan_is_named_by_episode_unless_that_has_ended(self):
        def act(observation: torch.Tensor) -> torch.Tensor:
            nan = (observation[:, 1:] == 1) & (torch.arange(len(observation)) == episode)[:, None]
            return torch.where(nan, math.nan, 0.0).expand(-1, 2)

        with Evaluator(countdown(), episodes=4) as evaluate:
            episode = 2
            with pytest.raises(ValueError, match="action of episode 2 is NaN"):
                evaluate(policy_from(act))
            episode = 0  # It ends after its first step.
            assert evaluate(policy_from(act)).lengths.tolist() == [1, 2, 3, 4]

    def test_what_is_observed_is_not_blamed_on_the_policy(self):
        class Broken(gymnasium.ObservationWrapper):
            def observation(self, observation: np.ndarray) -> np.ndarray:
                return np.full_like(observation, np.nan)

        broken = Evaluator(lambda: Broken(gymnasium.make("Pendulum-v1")), episodes=2)
        with (
            broken as evaluate,
            pytest.raises(ValueError, match=r"observed \[nan, nan, nan\] in epis"),
        ):
            evaluate(constant([0.0]))


class TestScores:
    @pytest.mark.parametrize("key", ["success", "is_success"])
    def test_success_at_any_step_counts(self, key: str):
        reports = {key: [False, False, True, False, False]}
        with Evaluator(countdown(reports=reports), episodes=5) as evaluate:
            evaluation = evaluate(constant([0.0, 0.0]))
        assert evaluation.successes is not None
        assert evaluation.successes.tolist() == [False, False, True, True, True]
        assert (evaluation.score_name, evaluation.score) == ("normalized_score", 60.0)

    def test_without_references_and_reports_the_return_is_the_score(self):
        with Evaluator(countdown(), episodes=2) as evaluate:
            evaluation = evaluate(constant([0.5, 0.5]))
        assert evaluation.successes is None
        assert evaluation.normalized_scores is None
        assert (evaluation.score_name, evaluation.score) == ("return", 1.5)

    def test_given_references_come_first(self):
        spec = countdown(id="Hopper-v5", reports={"success": [True] * 5})
        with Evaluator(spec, episodes=2, reference_scores=(-1.0, 3.0)) as evaluate:
            evaluation = evaluate(constant([0.5, 0.5]))
        assert evaluation.normalized_scores is not None
        assert evaluation.normalized_scores.tolist() == [50.0, 75.0]

    @pytest.mark.parametrize(
        ("id", "random", "expert"),
        [
            ("Hopper-v5", -20.272305, 3234.3),
            ("Hopper-v2", -20.272305, 3234.3),
            ("AdroitHandPen-v1", 96.262799, 3076.8331017826877),
            ("FrankaKitchen-v1", 0.0, 4.0),
        ],
    )
    def test_d4rl_references_are_known(self, id: str, random: float, expert: float):
        with Evaluator(countdown(id=id), episodes=1) as evaluate:
            score = evaluate(constant([0.5, 0.5])).score
        assert score == pytest.approx(100 * (1.0 - random) / (expert - random))

    @pytest.mark.parametrize("id", ["SlowHopper-v0", "HopperHop-v0", "mine/Hopper-v5", "hopper-v5"])
    def test_d4rl_references_need_the_exact_name(self, id: str):
        with Evaluator(countdown(id=id), episodes=1) as evaluate:
            assert evaluate.reference_scores is None

    @pytest.mark.parametrize("name", REFERENCE_SCORES)
    def test_d4rl_references_name_registered_environments(self, name: str):
        assert name in {spec.name for spec in gymnasium.registry.values()}

    def test_summary_is_json_of_means_and_standard_errors(self):
        evaluation = Evaluation(
            returns=np.array([1.0, 2.0, 6.0]),
            lengths=np.array([4, 4, 4]),
            successes=np.array([True, False, True]),
        )
        summary = json.loads(json.dumps(evaluation.summary()))
        expected = {
            "score": 3.0,
            "return": 3.0,
            "return_stderr": math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3),
            "length": 4.0,
            "length_stderr": 0.0,
            "success": 2 / 3,
            "success_stderr": math.sqrt((1 + 4 + 1) / 9 / 2) / math.sqrt(3),
        }
        assert summary == pytest.approx(expected)

    def test_one_episode_has_no_standard_error(self):
        evaluation = Evaluation(returns=np.array([2.0]), lengths=np.array([3]))
        assert evaluation.summary() == {"score": 2.0, "return": 2.0, "length": 3.0}


class Endless(Countdown):
    """Ends neither by itself, nor by a limit of its specification, of which it may have one in name."""

    def __init__(self, named: bool = False) -> None:
        super().__init__(Box(-1.0, 1.0, (2,)), {}, truncates=False)
        if named:
            self._max_episode_steps = 3

    def step(self, action: Any):
        self.left += 1
        observation, *_ = super().step(action)
        return observation, 1.0, False, False, {}


def test_an_environment_without_a_limit_gets_one() -> None:
    policy = TensorDictModule(torch.zeros_like, in_keys=["observation"], out_keys=["action"])
    for named in (False, True):
        with (
            Evaluator(partial(Endless, named), episodes=2, step_limit=7) as evaluate,
            pytest.warns(UserWarning, match="2 of 2 episodes .* were cut after 7 steps"),
        ):
            assert evaluate(policy).returns.tolist() == [7.0, 7.0]
    with Evaluator(lambda: TimeLimit(Endless(), 5), episodes=1, step_limit=7) as evaluate:
        assert evaluate(policy).returns.tolist() == [5.0]
    with Evaluator("Pendulum-v1", episodes=1, step_limit=7) as evaluate:  # has one of its own
        torques = TensorDictModule(
            lambda observation: observation[:, :1] * 0, in_keys=["observation"], out_keys=["action"]
        )
        assert evaluate(torques).lengths.tolist() == [200]
    with pytest.raises(ValueError, match="step_limit must be at least 1, got 0"):
        Evaluator("Pendulum-v1", step_limit=0)


class TestErrors:
    def test_a_function_that_returns_one_environment(self):
        env = gymnasium.make("CartPole-v1")
        with Evaluator(lambda: env, episodes=1) as evaluate:
            assert len(evaluate.envs) == 1
        with pytest.raises(ValueError, match="has to make one anew at each call"):
            Evaluator(lambda: TimeLimit(env, 5), episodes=2)

    def test_no_episodes(self):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            Evaluator("CartPole-v1", episodes=0)

    @pytest.mark.parametrize("scores", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
    def test_references_that_cannot_normalize(self, scores: tuple[float, float]):
        with pytest.raises(ValueError, match="random < expert"):
            Evaluator("CartPole-v1", reference_scores=scores)

    @pytest.mark.parametrize(
        "spec", ["NoSuchEnvironment-v0", EnvSpec("Lost-v0", entry_point="no_such_package:Env")]
    )
    def test_environment_that_cannot_be_built(self, spec: EnvSpec | str):
        with pytest.raises(ValueError, match=r"(NoSuchEnvironment|Lost)-v0.*can not be built"):
            Evaluator(spec)

    def test_action_space_that_cannot_be_served(self):
        with pytest.raises(TypeError, match="MultiBinary"):
            Evaluator(countdown(action_space=MultiBinary(3)))
