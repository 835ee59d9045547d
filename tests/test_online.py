"""Online fine-tuning: real environments, real worker processes, real kills."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import FlattenObservation
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, set_interaction_type

from online_envs import LENGTH, diary
from runs import of_maze, rows
from test_collect import PATIENCE, wait_for
from test_collect import started as process_of
from test_recipe import full_disk
from test_training import PlainLoop, assert_close
from torchrl_iql import OfflineDataset, checkpoint, load_dataset, load_policy, models
from torchrl_iql.data.minibatches import Minibatches
from torchrl_iql.data.rewards import RewardTransform
from torchrl_iql.online import Experience, behavior, collecting, environment, transitions
from torchrl_iql.spaces import action_rows, action_support
from torchrl_iql_recipes.experiment import build, offline, online
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.networks import Networks
from torchrl_iql_recipes.experiment.online import FineTuning
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Online, Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

RECIPES = CONFIG.parent
SMALL = [
    "env_steps=60",
    "steps=20",
    "eval_interval=30",
    "eval_episodes=2",
    "log_interval=20",
    "hidden_sizes=[16,16]",
    "batch_size=32",
    "temperature=3",
    "compute.threads=1",
    "compute.execution=eager",
    "collector.frames_per_batch=10",
]


def config(*overrides: str) -> Settings:
    from_scratch = "dataset=null" in overrides  # without an offline phase, which would take steps
    small = [each for each in SMALL if not (from_scratch and each.startswith("steps="))]
    return ONLINE.settings([*small, *of_maze(overrides)])


def offline_config(*overrides: str) -> Settings:
    small = [each for each in SMALL if each.split("=")[0] not in ONLINE_KEYS]
    return OFFLINE.settings([*small, *of_maze(overrides)])


ONLINE_KEYS = {*Online.model_fields, "collector.frames_per_batch"}


@pytest.fixture(scope="module")
def offline_run(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of two learners that differ in their expectiles."""
    folder = tmp_path_factory.mktemp("offline")
    cfg = offline_config(f"dataset={maze_id}", "expectile=[0.6,0.8]", "weight_clip=50")
    offline.run(cfg, folder)
    return folder


def from_checkpoint(path: Path, *overrides: str) -> Settings:
    """Return the settings that main runs with these arguments."""
    small = [each for each in SMALL if each.split("=")[0] in ONLINE_KEYS]
    return ONLINE.settings([f"checkpoint='{path}'", *small, "log_interval=20", *overrides])


# --- The environment -----------------------------------------------------------------------------------


def test_the_environment_gives_what_the_data_set_would_hold(maze_id: str) -> None:
    spec = load_dataset(maze_id).env_spec
    plain = FlattenObservation(gymnasium.make(spec))
    env = environment(spec, reward_transform=RewardTransform(scale=3.0, shift=-1.0))
    env.set_seed(5)
    steps = env.rollout(1000)
    assert steps["observation"].dtype == steps["next", "reward"].dtype == torch.float32
    plain.reset(seed=5)
    observation, _ = plain.reset()
    total = 0.0
    for t, step in enumerate(steps):
        assert step["observation"].tolist() == pytest.approx(observation.tolist(), abs=1e-6)
        observation, reward, terminated, truncated, _ = plain.step(step["action"].numpy())
        total += float(reward)
        after = step["next"]
        assert after["observation"].tolist() == pytest.approx(observation.tolist(), abs=1e-6)
        assert after["reward"].item() == pytest.approx(3 * float(reward) - 1)
        assert after["episode_reward"].item() == pytest.approx(total)
        assert after["step_count"].item() == t + 1
        assert (after["terminated"].item(), after["truncated"].item()) == (terminated, truncated)
    assert len(steps) == spec.max_episode_steps


def test_an_episode_ends_at_its_first_success_as_in_the_data() -> None:
    rule = {"episode_rule": "until_success"}
    cut = environment(diary(success_at=3), **rule).rollout(100)["next"]
    assert cut["observation"][:, 1].tolist() == [1, 2, 3]
    assert cut["terminated"].squeeze(-1).tolist() == [False, False, True]
    # At the time limit, it is a success and not a truncation.
    last = environment(diary(success_at=LENGTH), **rule).rollout(100)[-1]["next"]
    assert (last["terminated"].item(), last["truncated"].item()) == (True, False)
    whole = environment(diary(success_at=3)).rollout(100)["next"]
    assert whole["observation"][:, 1].tolist() == list(range(1, LENGTH + 1))
    assert (whole[-1]["terminated"].item(), whole[-1]["truncated"].item()) == (False, True)


class Paid(gymnasium.Env):
    """Pays as it is told, and may report success."""

    observation_space, action_space = Box(-9, 9, (1,)), Box(-1, 1, (1,))

    def __init__(self, rewards: list[float], key: str | None, success: list[bool]) -> None:
        self.rewards, self.key, self.success = rewards, key, success

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, success = self.rewards[self.t], self.success[self.t]
        self.t += 1
        info = {} if self.key is None else {self.key: success}
        return (
            np.full(1, self.t, np.float32),
            reward,
            False,
            self.t == len(self.rewards),
            info,
        )


@pytest.mark.parametrize(
    ("rewards", "key", "length"),
    [
        ([0, 0, 1, 1], None, 3),
        ([0, 0, 1, 1], "success", 2),
        ([0.5, 0, 1, 1], "is_success", 2),
        ([0, 1, 1, 1], "is_success", 2),
        ([0, 0, 0, 0], None, 4),
        ([0.5, 0, 1, 1], None, None),
    ],
)
def test_success_is_what_it_is_in_the_data(
    rewards: list[float], key: str | None, length: int | None
) -> None:
    reported = [False, True, False, False]
    episode = {
        "observations": np.arange(5.0)[:, None],
        "actions": np.zeros((4, 1)),
        "rewards": rewards,
        "terminations": np.zeros(4),
        "infos": {} if key is None else {key: reported},
    }
    make = partial(Paid, rewards, key, reported)
    played = environment(make, episode_rule="until_success").rollout(10)["next"]
    read = partial(
        OfflineDataset.from_episodes,
        "paid",
        [episode],
        observation_space=Paid.observation_space,
        action_space=Paid.action_space,
        episode_rule="until_success",
    )
    if length is None:  # which the data can not tell, either
        assert len(played) == 4
        with pytest.raises(ValueError, match="needs infos/success or rewards of 0 and 1"):
            read()
        return
    recorded = read().transitions["next"]
    assert len(played) == len(recorded) == length
    for end in ("terminated", "truncated"):
        assert played[end].equal(recorded[end])


# --- The policy that collects --------------------------------------------------------------------------


def acted(policy: TensorDictModule, exploration: str, n: int = 20_000) -> torch.Tensor:
    with torch.no_grad(), set_interaction_type(exploration):
        return policy(TensorDict({"observation": torch.zeros(n, 3)}, [n]))["action"]


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_noise_scales_the_deviation_of_the_policy(noise: float) -> None:
    torch.manual_seed(0)
    policy = models.gaussian_policy(3, 2)
    policy[0].module.log_std.data = torch.tensor([-3.0, -4.0])
    actions = acted(behavior(policy, Box(-1, 1, (2,)), noise=noise), "random")
    torch.testing.assert_close(
        actions.std(0), noise * torch.tensor([-3.0, -4.0]).exp(), rtol=0.05, atol=0
    )
    mean = acted(policy, "deterministic", 1)[0]
    torch.testing.assert_close(actions.mean(0), mean, atol=2e-3, rtol=0)
    quiet = acted(behavior(policy, Box(-1, 1, (2,)), noise=0), "deterministic", 1)[0]
    assert torch.equal(quiet, mean)


def test_actions_are_clipped_as_those_of_a_data_set() -> None:
    space = Box(np.array([-1, -2], np.float32), np.array([1, 3], np.float32))
    policy = models.gaussian_policy(3, 2)  # its deviation of 1 leaves the bounds often
    torch.manual_seed(0)
    drawn = acted(policy, "random")
    torch.manual_seed(0)
    executed = acted(behavior(policy, space), "random")
    low, high = action_support(space)
    assert executed.amin(0).tolist() == low.tolist()
    assert executed.amax(0).tolist() == high.tolist()
    assert torch.equal(executed, drawn.clamp(torch.tensor(low), torch.tensor(high)))
    assert np.array_equal(action_rows(space, executed.numpy()), executed.numpy())


def test_actions_stay_within_the_bounds_of_the_policy() -> None:
    space = Box(-1, 1, (2,))
    bounds = ([-0.25, -2.0], [0.5, 0.25])  # -2: beyond the space
    architecture = models.Architecture(observation_size=3, action_size=2, action_bounds=bounds)
    policy = architecture.policy_network()
    executed = acted(behavior(policy, space, noise=3.0), "random")
    assert executed.amin(0).tolist() == [-0.25, action_support(space)[0][1]]
    assert executed.amax(0).tolist() == [0.5, 0.25]


def test_noise_that_a_policy_does_not_have_is_refused() -> None:
    categorical = models.categorical_policy(3, 4)
    with pytest.raises(ValueError, match=r"noise must be 0 or 1, got 0.5"):
        behavior(categorical, Discrete(4), noise=0.5)
    with pytest.raises(ValueError, match=r"noise must be at least 0, got -1"):
        behavior(models.gaussian_policy(3, 2), Box(-1, 1, (2,)), noise=-1)
    assert acted(behavior(categorical, Discrete(4)), "random").unique().tolist() == [0, 1, 2, 3]


# --- What was collected --------------------------------------------------------------------------------


def test_the_rows_have_the_entries_of_the_data_set(maze_id: str) -> None:
    dataset = load_dataset(maze_id)
    env = environment(dataset.env_spec)
    collected = env.rollout(6).reshape(2, 3)
    taken = transitions(collected, dataset.transitions)
    assert taken.shape == (6,)
    assert taken["observation"].tolist() == collected["observation"].flatten(0, 1).tolist()
    for key, value in dataset.transitions.items(True, True):
        assert (taken[key].dtype, taken[key].shape[1:]) == (value.dtype, value.shape[1:]), key
    assert len(list(taken.keys(True, True))) == len(list(dataset.transitions.keys(True, True)))


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("observation", float("nan"), "observation of environment step 103 is [nan, 0.0]"),
        ("action", float("inf"), "action of environment step 103 is [inf]"),
        (("next", "reward"), float("nan"), "next/reward of environment step 103 is [nan]"),
        (("next", "observation"), float("nan"), "next/observation of environment step 103 is"),
    ],
)
def test_a_value_that_is_not_finite_is_named(key: Any, value: float, name: str) -> None:
    good = OfflineDataset.empty("MountainCarContinuous-v0").transitions.new_zeros(5)
    assert len(transitions(good, good)) == 5
    bad = good.clone()
    bad[key][3, 0] = value
    with pytest.raises(ValueError) as error:
        transitions(bad.reshape(5, 1), good, first_step=100)
    assert str(error.value).startswith(name)


def test_the_observation_after_a_termination_may_be_nan() -> None:
    row = OfflineDataset.empty("MountainCarContinuous-v0").transitions.new_zeros(1)
    row["next", "observation"].fill_(torch.nan)
    row["next", "terminated"].fill_(True)
    assert transitions(row, row)["next", "observation"].isnan().all()


# --- Offline and online data together ------------------------------------------------------------------


def numbered(first: int, n: int) -> TensorDict:
    """Make transitions whose reward is their number."""
    rows = OfflineDataset.empty("MountainCarContinuous-v0").transitions.new_zeros(n)
    rows["next", "reward"] = torch.arange(first, first + n, dtype=torch.float32).unsqueeze(-1)
    return rows


def recorded(n: int) -> OfflineDataset:
    return dataclasses.replace(
        OfflineDataset.empty("MountainCarContinuous-v0"), transitions=numbered(0, n)
    )


def numbers(batch: TensorDict) -> torch.Tensor:
    return batch["next", "reward"].squeeze(-1)


def test_appended_transitions_are_drawn_like_all_others() -> None:
    torch.manual_seed(0)
    experience = Experience(recorded(300), capacity=1000, batch_size=50_000)
    assert (len(experience), experience.offline_share) == (0, 1.0)
    assert numbers(experience.sample()).unique().tolist() == list(range(300))
    for first in (300, 400):
        experience.extend(numbered(first, 100))
    assert (len(experience), experience.offline_share) == (200, 0.6)
    counts = numbers(experience.sample()).int().bincount(minlength=500).double()
    assert len(counts) == 500
    # Each is expected 100 times; chi-squared with 499 degrees of freedom has deviation 31.6.
    assert abs(((counts - 100) ** 2 / 100).sum() - 499) < 5 * 31.6


def test_a_share_is_exact_in_every_batch_and_falls_linearly() -> None:
    experience = Experience(recorded(300), 1000, 64, offline_share=0.75, anneal_steps=200)
    shares = []
    for first in range(300, 700, 100):
        experience.extend(numbered(first, 100))
        drawn = [(numbers(experience.sample()) < 300).double().mean().item() for _ in range(5)]
        assert len(set(drawn)) == 1
        assert drawn[0] == pytest.approx(experience.offline_share, abs=0.5 / 64)
        shares.append(experience.offline_share)
    assert shares == [0.375, 0, 0, 0]
    fixed = Experience(recorded(300), 1000, 64, offline_share=0.75)
    fixed.extend(numbered(300, 100))
    assert (numbers(fixed.sample()) < 300).sum() == 48


@pytest.mark.parametrize("mix", [{}, {"offline_share": 0.5, "anneal_steps": 400}])
def test_experience_continues(mix: dict[str, Any]) -> None:
    first, second = (Experience(recorded(30), 100, 16, **mix) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert len(second) == 0
    first.extend(numbered(30, 40))
    state = first.state_dict()
    assert state["next"]["reward"].squeeze(-1).tolist() == list(range(30, 70))
    second.load_state_dict(state)
    assert (len(second), second.offline_share) == (40, first.offline_share)
    torch.manual_seed(0)
    batch = first.sample()
    torch.manual_seed(0)
    assert (second.sample() == batch).all()


def test_a_mixture_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"offline_share=0\.5 needs offline data"):
        Experience(recorded(0), 10, 4, offline_share=0.5)
    with pytest.raises(ValueError, match="anneal_steps=9 needs an offline_share"):
        Experience(recorded(5), 10, 4, anneal_steps=9)
    with pytest.raises(ValueError, match=r"offline_share must be None or in \(0, 1\), got 1"):
        Experience(recorded(5), 10, 4, offline_share=1)
    with pytest.raises(ValueError, match="anneal_steps must be at least 1, got 0"):
        Experience(recorded(5), 10, 4, offline_share=0.5, anneal_steps=0)


# --- Collectors ----------------------------------------------------------------------------------------

COLLECTORS = ["sync", "multi_sync", "multi_async"]


def arguments(collector: str) -> dict[str, Any]:
    """Return the arguments of the configuration, for small batches."""
    cfg = config(f"collector={collector}", "collector.frames_per_batch=20")
    return cfg.collector.model_dump(exclude_none=True)


def descendants(pid: int) -> set[int]:
    """Find the processes that a process has started, and those that they have started."""
    found = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        children = {int(child) for child in tasks.read_text().split()}
        found |= children.union(*map(descendants, children))
    return found


def workers(pid: int) -> set[int]:
    """Find the descendants that are not there for multiprocessing or Ray itself."""
    return {each for each in descendants(pid) if is_worker(each)}


def is_worker(pid: int) -> bool:
    command = command_of(pid)
    return "spawn_main" in command or command.startswith("ray::Collector")


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return ""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def constant_policy(value: float) -> TensorDictModule:
    """Make a policy of a parameter alone, whatever it observes."""
    policy = models.deterministic_policy(3, 1, hidden_sizes=())
    for parameter in policy.parameters():
        parameter.data.zero_()
    policy.module[0].layers[-1].bias.data.fill_(np.arctanh(value))
    return policy


def check_a_collector(settings: dict[str, Any]) -> None:
    """Check that it collects what the environment gives, by the policy it was told last."""
    before = workers(os.getpid())
    threads = torch.get_num_threads()
    policy = constant_policy(0.25)
    like = OfflineDataset.empty(diary()).transitions
    collected: list[TensorDict] = []
    acting = behavior(policy, Box(-1, 1, (1,)))
    with collecting(
        partial(environment, diary()), acting, total_frames=400, **settings
    ) as collector:
        started = workers(os.getpid()) - before
        assert len(started) == settings.get("num_collectors", 0)
        assert torch.get_num_threads() == threads  # the learner keeps those it was given
        for worker in started:
            os.kill(
                worker, signal.SIGINT
            )  # Ctrl-C in a terminal reaches them, too: it is not for them
        batches = iter(collector)
        while sum(map(len, collected)) < 400:
            collected.append(transitions(next(batches), like))
            if sum(map(len, collected)) == 200:
                policy.load_state_dict(constant_policy(-0.5).state_dict())
                collector.update_policy_weights_()
    wait_until(lambda: not started & descendants(os.getpid()))
    assert torch.get_num_threads() == threads

    assert {len(batch) for batch in collected} == {20}
    for batch in collected:
        episode, step, _ = batch["observation"].unbind(-1)
        after = batch["next"]
        next_episode, next_step, executed = after["observation"].unbind(-1)
        # The successor belongs to the same episode, also where it is the last.
        assert torch.equal(next_episode, episode)
        assert torch.equal(next_step, step + 1)
        assert torch.equal(executed.unsqueeze(-1), batch["action"])
        assert torch.equal(after["reward"].squeeze(-1), next_step)
        ends, even = next_step == LENGTH, episode % 2 == 0
        assert torch.equal(after["done"].squeeze(-1), ends)
        assert torch.equal(after["truncated"].squeeze(-1), ends & even)
        assert torch.equal(after["terminated"].squeeze(-1), ends & ~even)
        assert ends.any()
    actions = torch.cat([batch["action"] for batch in collected]).squeeze(-1)
    torch.testing.assert_close(actions[:200], torch.full((200,), 0.25))
    # What is on its way may still be by the earlier one: a batch of each of two workers, and their next.
    torch.testing.assert_close(actions[280:], torch.full((120,), -0.5))


@pytest.mark.parametrize(
    "collector",
    [
        pytest.param(each, marks=pytest.mark.slow if each.startswith("multi") else ())
        for each in COLLECTORS
    ],
)
def test_every_collector_collects_the_same_kind_of_data(collector: str) -> None:
    check_a_collector(arguments(collector))


def test_ray_collects_the_same_kind_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    # Its workers find what this process imports.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    before = descendants(os.getpid())
    check_a_collector(arguments("ray"))
    wait_until(lambda: not descendants(os.getpid()) - before)


@pytest.mark.slow
def test_each_worker_has_environments_of_its_own() -> None:
    settings = {**arguments("multi_sync"), "frames_per_batch": 40}
    policy = behavior(constant_policy(0.0), Box(-1, 1, (1,)))
    create = partial(environment, "Pendulum-v1")
    with collecting(create, policy, total_frames=40, seed=3, **settings) as collector:
        batch = next(iter(collector))
    first = batch["observation"][:, 0]
    assert len(first.unique(dim=0)) == 2
    alone = environment("Pendulum-v1")
    alone.set_seed(3)
    assert torch.equal(first[0], alone.reset()["observation"])


# --- From the checkpoint on ----------------------------------------------------------------------------


def started(cfg: Settings, folder: Path) -> FineTuning:
    start = cfg.training.checkpoint and Path(cfg.training.checkpoint)
    last = folder / "last.ckpt"
    dataset, _ = online.data_for(cfg)
    known = last if last.exists() else start
    if known is None:
        architecture = online.architecture_for(cfg.networks, dataset, cfg.algorithm)
    else:
        architecture = checkpoint.load_architecture(known)
    return FineTuning(cfg, dataset, architecture, None, folder, start)


def test_online_training_starts_from_exactly_the_checkpoint(
    offline_run: Path, tmp_path: Path
) -> None:
    path = offline_run / "expectile=0.8/last.ckpt"
    cfg = from_checkpoint(path)
    its = started(cfg, tmp_path)
    architecture = checkpoint.load_architecture(path)
    twin = build.step_for(cfg.learners, architecture, its.dataset, cfg.compute, 20)
    checkpoint.load_learner(path, twin)
    state, saved = its.step.state_dict(), twin.state_dict()
    assert state["steps"] == saved["steps"] == its.switch == 20
    assert state["loss"].keys() == saved["loss"].keys()
    for key in state["loss"]:  # policy, Q, V and targets
        assert torch.equal(state["loss"][key], saved["loss"][key]), key
    targets = [key for key in saved["loss"] if key.startswith("target_qvalue")]
    assert any(
        not torch.equal(saved["loss"][key], saved["loss"][key.removeprefix("target_")])
        for key in targets
    )
    assert state["moments"].keys() == saved["moments"].keys()
    for name, pair in state["moments"].items():
        assert all(map(torch.equal, pair, saved["moments"][name])), name
        assert all(moment.abs().max() > 0 for moment in pair), name
    policy = load_policy(path)
    assert all(
        map(
            torch.equal,
            its.step.losses[0].get_stateful_net("actor_network").parameters(),
            policy.parameters(),
        )
    )
    # The offline run has decayed the policy's learning rate to 0.
    assert its.step.learning_rates()["actor_network"] == [3e-4]
    assert its.frames == 0


def test_one_update_is_the_plain_composition_of_the_public_pieces(
    maze_id: str, tmp_path: Path
) -> None:
    """Offline and then online, beside IQLLoss, torch's Adam and SoftUpdate from the first step on."""
    cfg = offline_config(f"dataset={maze_id}", "decay_steps=0", "steps=5", "eval_episodes=0")
    offline.run(cfg, tmp_path / "offline")
    last = tmp_path / "offline/last.ckpt"
    its = started(from_checkpoint(last, "batch_size=32"), tmp_path / "online")

    torch.manual_seed(0)
    statistics = its.dataset.observation_statistics()
    networks = Networks(checkpoint.load_architecture(last), statistics)
    loss = cfg.algorithm.loss(networks)
    plain = PlainLoop(loss, target_rate=cfg.algorithm.target_rate)
    source, indices = Minibatches(its.dataset.transitions, 32, seeds=[0])(0)
    for t in range(5):
        plain(source[indices[t, 0]])
    assert_close(its.step.losses[0], loss)

    its.experience.extend(its.dataset.transitions[:1])  # one environment step
    state = torch.get_rng_state()
    batch = its.experience.sample()
    torch.set_rng_state(state)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    assert its._update()
    metrics, expected = its.step.means(), plain(batch)
    assert its.step.steps == 6
    for key in expected.keys():
        torch.testing.assert_close(metrics[key], expected[key], rtol=1e-4, atol=1e-5)
    assert_close(its.step.losses[0], loss, 1e-6)
    for name in ("actor", "value", "qvalue", "target_qvalue"):
        keys = [key for key in before if key.startswith(f"{name}_network_params")]
        assert any((loss.state_dict()[key] - before[key]).abs().max() > 1e-5 for key in keys), name


def test_settings_come_from_the_checkpoint_unless_they_are_given(offline_run: Path) -> None:
    path = offline_run / "expectile=0.8/last.ckpt"
    task = ["task=pointmaze/stitch", "temperature=3"]
    cfg = from_checkpoint(path, "learning_rate=0.001", *task, "expectile=0.7")
    iql = cfg.algorithm
    assert (iql.learning_rate, iql.expectile, iql.weight_clip) == (0.001, 0.7, 50)
    kept = from_checkpoint(path)
    assert (kept.algorithm.expectile, kept.data.dataset) == (0.8, "test/maze-v0")
    assert (kept.training.log_interval, kept.online.env_steps) == (20, 60)
    assert kept.collector.frames_per_batch == 10
    assert from_checkpoint(path, "task=antmaze/umaze").data.dataset == "D4RL/antmaze/umaze-v1"
    for given in ("hidden_sizes=[8]", "dropout=0.1", "num_qvalue_nets=3"):
        name = given.partition("=")[0]
        with pytest.raises(ValueError, match=f"{name}: the checkpoint has networks"):
            from_checkpoint(path, given)
    with pytest.raises(ValueError, match="algorithm=bc: the checkpoint is of iql"):
        from_checkpoint(path, "algorithm=bc")


# --- Runs ----------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_lists(offline_run: Path, tmp_path: Path) -> None:
    cfg = from_checkpoint(offline_run / "expectile=0.8/last.ckpt", "updates_per_frame=0.5")
    scores = online.run(cfg, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"learning_curves.png", "value_map.png"}
    assert names == {
        ".lock",
        "config.yaml",
        "scores.json",
        "times.json",
        "times.csv",
        "data.json",
        "metrics.csv",
        "checkpoints",
        "last.ckpt",
        "best.ckpt",
        *pictures,
    }
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    (its,) = scores["replicas"]
    assert (its["frames"], its["steps"], its["interrupted"]) == (60, 20 + 30, False)
    offline_scores = json.loads((offline_run / "scores.json").read_text())["replicas"][1]
    assert its["before"] == {key: offline_scores[key] for key in its["before"]}
    written = rows(tmp_path)
    # Before the first step, after 20, 30, 40 and 60.
    assert [row["step"] for row in written] == ["20", "30", "35", "40", "50"]
    assert [row["frames"] for row in written] == ["", "20", "", "40", "60"]
    assert [bool(row["eval/score"]) for row in written] == [True, False, True, False, True]
    share = load_dataset(cfg.data.dataset).transitions.shape[0]
    assert float(written[-1]["offline_share"]) == pytest.approx(share / (share + 60))
    assert {row["policy_lr"] for row in written} == {"", "0.0003"}
    told = online.report(scores, tmp_path, cfg)
    assert "before" in told
    assert f"load_policy('{tmp_path}/last.ckpt')" in told
    again = online.run(cfg, tmp_path)  # nothing is left to do
    assert again == scores


def test_offline_and_online_in_one_run(maze_id: str, tmp_path: Path) -> None:
    cfg = config(f"dataset={maze_id}", "offline_share=0.5", "anneal_steps=120", "eval_episodes=0")
    scores = online.run(cfg, tmp_path)
    (its,) = scores["replicas"]
    assert (its["steps"], its["frames"], its["before"]) == (80, 60, None)
    assert (tmp_path / "offline/last.ckpt").exists()
    written = rows(tmp_path)
    shares = [float(row["offline_share"]) for row in written]
    assert shares == pytest.approx([0.5 * (1 - frames / 120) for frames in (20, 40, 60)])


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_from_scratch(env: str, tmp_path: Path) -> None:
    overrides = ["dataset=null", f"env={env}", "reward=minus_one", "normalize_observation=false"]
    scores = online.run(config(*overrides, "env_steps=240", "eval_interval=240"), tmp_path)
    (its,) = scores["replicas"]
    assert (scores["dataset"], its["steps"], its["frames"]) == (env, 240, 240)
    ends = [row for row in rows(tmp_path) if row["episode_length"]]
    if env == "Pendulum-v1":
        assert [(row["frames"], row["episode_length"]) for row in ends] == [("200", "200")]
    else:  # which pays 1 at every step
        assert len(ends) > 3
        assert all(float(row["episode_return"]) == float(row["episode_length"]) for row in ends)
    assert load_policy(tmp_path / "last.ckpt")


def test_what_cannot_be_run_is_refused_before_anything_happens(
    maze_id: str, tmp_path: Path
) -> None:
    for overrides, message in {
        ("dataset=null",): "give env=<id>",
        (
            "dataset=null",
            "env=Pendulum-v1",
            "normalize_observation=true",
        ): "normalize_observation=true needs the statistics",
        (f"dataset={maze_id}", "seeds=[0,1]"): r"one learner .* \['seed=0', 'seed=1'\]",
        (
            f"dataset={maze_id}",
            "offline_share=1.5",
        ): "offline_share=1.5: expected a number above 0 and below 1",
        ("dataset=null", "env=Pendulum-v1", "normalize_observation=false", "offline_share=0.5"): (
            "offline_share=0.5: without a data set there is none, give null"
        ),
        (
            "dataset=null",
            "env=Pendulum-v1",
            "normalize_observation=false",
            "policy=deterministic",
            "exploration=0.5",
        ): "exploration=0.5: the deterministic policy has no deviation, expected 0 or 1",
        (f"dataset={maze_id}", "anneal_steps=9"): "anneal_steps=9 needs an offline_share",
        (f"dataset={maze_id}", "exploration=-1"): "exploration=-1: expected a number of at least 0",
        (f"dataset={maze_id}", "env_steps=0"): "env_steps=0: expected an integer of at least 1",
    }.items():
        with pytest.raises(SettingsError, match=message):
            online.run(config(*overrides), tmp_path)
        assert not list(tmp_path.glob("**/*.ckpt"))


def test_every_collector_is_tested() -> None:
    folders = [path.stem for path in (CONFIG / "collector").glob("*.yaml")]
    assert {*COLLECTORS, "ray"} == set(folders)


@pytest.mark.slow
def test_a_fine_tuned_policy_can_be_fine_tuned_again(offline_run: Path, tmp_path: Path) -> None:
    first = from_checkpoint(offline_run / "expectile=0.8/last.ckpt", "eval_episodes=0")
    online.run(first, tmp_path / "first")
    second = from_checkpoint(tmp_path / "first/last.ckpt", "env_steps=10", "eval_episodes=0")
    assert second.training.checkpoint == str(tmp_path / "first/last.ckpt")
    scores = online.run(second, tmp_path / "second")
    (its,) = scores["replicas"]
    assert (its["frames"], its["steps"], its["expectile"]) == (10, 20 + 60 + 10, 0.8)


# --- What goes wrong -----------------------------------------------------------------------------------


def of_diary(tmp_path: Path, *overrides: str, **trouble: int) -> FineTuning:
    """Make a run from scratch in an environment with troubles."""
    cfg = config(
        "dataset=null", "normalize_observation=false", "reward=none", "seeds=0", *overrides
    )
    dataset = OfflineDataset.empty(diary(**trouble))
    architecture = online.architecture_for(cfg.networks, dataset, cfg.algorithm)
    return FineTuning(cfg, dataset, architecture, None, tmp_path, None)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"fails_at": 25}, "after 20 environment steps: the simulation is unstable"),
        ({"nan_at": 25}, r"after 20 .* next/observation of environment step 24 is \[\d.0, nan, "),
    ],
)
def test_an_environment_that_fails_costs_nothing_that_was_collected(
    trouble: dict[str, int], message: str, tmp_path: Path
) -> None:
    its = of_diary(tmp_path, **trouble)
    with pytest.raises(RuntimeError, match=message) as error:
        its.train()
    assert f"python recipes/online.py resume={tmp_path}" in str(error.value)
    again = of_diary(tmp_path)
    assert (again.frames, again.step.steps) == (20, 20)
    again.train()
    assert again.frames == 60


@pytest.mark.slow
@pytest.mark.parametrize("collector", ["multi_async", "multi_sync", "ray"])
def test_a_killed_worker_is_an_error_and_not_the_end(
    collector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if collector == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr("torchrl_iql.online.ANSWER_TIMEOUT", 2.0)
    collecting_by = [f"collector={collector}", "collector.frames_per_batch=10"]
    its = of_diary(tmp_path, *collecting_by)
    before = descendants(os.getpid())
    update = FineTuning._update
    killed_at = []

    def update_and_kill(self: FineTuning) -> Any:
        metrics = update(self)
        if self.frames == 20:
            started = descendants(os.getpid()) - before
            collecting = [each for each in started if is_worker(each)]
            assert len(collecting) == 2
            os.kill(collecting[0], signal.SIGKILL)
            killed_at.append(time.monotonic())
        return metrics

    monkeypatch.setattr(FineTuning, "_update", update_and_kill)
    which = "" if collector == "ray" else r": its worker \d \(process \d+\) ended by SIGKILL"
    with pytest.raises(
        RuntimeError, match=rf"collecting failed after \d+ environment steps{which}"
    ):
        its.train()
    assert time.monotonic() - killed_at[0] < 60
    wait_until(lambda: not any(map(is_worker, descendants(os.getpid()) - before)))
    monkeypatch.undo()
    again = of_diary(tmp_path, *collecting_by)
    assert again.frames == its.frames >= 20
    again.train()
    assert again.frames == 60


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    its = of_diary(tmp_path)
    its.train()
    saved = its.folder.last.read_bytes()
    message = r"could not write the checkpoint .* MB are free"
    with full_disk(), pytest.raises(OSError, match=message):
        its.save()
    assert its.folder.last.read_bytes() == saved
    assert [path.name for path in tmp_path.glob(".*")] == []


def interrupted(signal_of: Callable[[subprocess.Popen], None], folder: Path) -> tuple[str, str]:
    """Return what a run with real workers prints that a signal ends; it leaves no worker behind."""
    overrides = [each for each in SMALL if not each.startswith(("env_steps", "steps"))]
    overrides += [
        "dataset=null",
        "env=Pendulum-v1",
        "normalize_observation=false",
        "eval_episodes=0",
    ]
    overrides += ["env_steps=100000", "collector=multi_async", f"hydra.run.dir={folder}"]
    with process_of(
        [sys.executable, str(RECIPES / "online.py"), *overrides],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal starts it
    ) as process:
        wait_for((folder / "last.ckpt").exists, process)
        its_workers = workers(process.pid)
        assert len(its_workers) == 2
        signal_of(process)
        wait_until(lambda: not any(map(command_of, its_workers)))
        return process.communicate(timeout=60)


def continued(folder: Path, settings: Settings | None = None) -> FineTuning:
    """Return the run of a folder, checked for what it knows of its past."""
    its = started(settings or ONLINE.stored(folder), folder)
    assert its.frames >= 30
    assert (its.switch, its.step.steps) == (0, its.frames)
    assert its.step.learning_rates()["actor_network"] == [3e-4]
    written = [int(row["frames"]) for row in rows(folder) if row["frames"]]
    assert written == list(range(20, its.frames + 1, 20))
    return its


@pytest.mark.slow
def test_the_killing_of_the_learner_leaves_no_worker_and_a_run_to_continue(tmp_path: Path) -> None:
    interrupted(lambda process: process.kill(), tmp_path / "run")
    its = continued(tmp_path / "run")
    assert its.frames % 30 == 0  # eval_interval
    experience = its.experience.state_dict()["observation"]
    assert experience.shape == (its.frames, 3)
    # On the circle of angles, and different from each other.
    torch.testing.assert_close(experience[:, :2].norm(dim=-1), torch.ones(its.frames))
    assert len(experience.unique(dim=0)) == its.frames
    frames = its.frames
    more = ONLINE.resumed(tmp_path / "run", [f"env_steps={frames + 20}"])
    its = continued(tmp_path / "run", more)
    its.train()
    assert its.frames == its.step.steps == frames + 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_signal_in_the_offline_phase_saves_and_says_so(
    name: str, code: int, maze_id: str, tmp_path: Path
) -> None:
    own = [*SMALL, "steps=10000000", f"dataset={maze_id}", "eval_episodes=0", "hydra.run.dir=run"]
    with process_of(
        [sys.executable, str(RECIPES / "online.py"), *of_maze(own)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for((tmp_path / "run/offline/metrics.csv").exists, process)
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert re.search(r"after \d+ steps of the offline phase\. Continue with: .* resume=run", output)
    assert "Traceback" not in errors
    assert checkpoint.load_metadata(tmp_path / "run/offline/last.ckpt")["steps"] > 0


@pytest.mark.slow
def test_ctrl_c_ends_a_run_without_noise(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # The terminal sends it to all of them.
    output, errors = interrupted(lambda process: os.killpg(process.pid, signal.SIGINT), folder)
    assert "steps. Continue with: python recipes/online.py resume=run" in output
    assert "Traceback" not in errors
    (its,) = json.loads((folder / "scores.json").read_text())["replicas"]
    frames = its["frames"]
    assert continued(folder).frames == frames


@pytest.mark.parametrize(
    ("evaluated", "said"), [(0, "2.0 before"), (500, "2.0 before, 3.0 after 500 steps")]
)
def test_what_was_evaluated_before_alone_has_no_after(
    evaluated: int, said: str, tmp_path: Path
) -> None:
    learner = {"before": {"score": 2.0, "return": 2.0}, "after": {"score": 3.0, "return": 3.0}}
    learner |= {
        "frames": 700,
        "evaluated_after": evaluated,
        "steps": 0,
        "interrupted": True,
        "name": "",
    }
    settings = ONLINE.settings(["dataset=null", "env=Pendulum-v1", "temperature=3"])
    lines = online.report({"replicas": [learner]}, tmp_path, settings).splitlines()
    assert lines[0] == f"return: {said}"
    assert any(each.startswith("Interrupted after 700 steps") for each in lines)
