"""Data of one's own, without a task: neutral rules, which are printed and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from minari.data_collector import EpisodeBuffer
from omegaconf import OmegaConf

from episodes import MARKS, walk, write
from runs import TINY, rows
from torchrl_iql import load_policy
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

pytestmark = MARKS

RECIPES = Path(__file__).parents[1] / "recipes"


def pendulum(episodes: int = 6, *, scale: float = 1.0) -> list[EpisodeBuffer]:
    env, made = gymnasium.make("Pendulum-v1", max_episode_steps=30), []
    env.action_space.seed(0)
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        observations, taken = [observation], []
        for _ in range(30):
            action = env.action_space.sample()
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            taken.append((action, float(reward) * scale))  # pyright: ignore
        actions, rewards = zip(*taken, strict=True)
        ends = [False] * 29 + [True]
        made.append(
            EpisodeBuffer(
                observations=observations,
                actions=list(actions),
                rewards=list(rewards),
                terminations=[False] * 30,
                truncations=ends,
            )
        )
    return made


def stored(name: str, **options: Any) -> str:
    return write(*pendulum(**options), dataset_id=name, env=gymnasium.make("Pendulum-v1"))


def train(folder: Path, *arguments: str) -> str:
    """Start offline.py in a folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(RECIPES / "offline.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(RECIPES.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("door", [OFFLINE, ONLINE])
def test_data_without_a_task_are_ones_own(door: Any) -> None:
    settings = door.settings(["dataset=test/own-v0"])
    assert settings.values["task"] == "own"
    assert (settings.data.reward, settings.data.episodes) == ("unit_rms", "as_stored")
    assert settings.networks.normalize_observation
    (learner,) = settings.learners
    assert learner.algorithm.temperature == 3.0
    several = door.settings(["dataset=[test/own-v0,test/other-v0]", "reward=none"])
    assert (several.values["task"], several.data.reward) == ("own", "none")


def test_without_data_of_ones_own_it_is_the_embedded_task() -> None:
    assert OFFLINE.settings([]).values["task"] == "pointmaze/stitch"
    for given in (["task=own"], ["dataset=null"], ["eval_episodes=3"]):
        assert OFFLINE.settings(given).values["task"] == (
            "own" if "task=own" in given else "pointmaze/stitch"
        )
    chosen = OFFLINE.settings(["task=pointmaze/umaze", "dataset=test/own-v0"])
    assert (chosen.values["task"], chosen.data.reward) == ("pointmaze/umaze", "minus_one")


def test_an_environment_without_data_is_ones_own_online() -> None:
    settings = ONLINE.settings(["env=Pendulum-v1"])
    assert settings.values["task"] == "own"
    assert settings.data.dataset is None
    assert (settings.data.reward, settings.data.episodes) == ("none", "as_stored")
    assert not settings.networks.normalize_observation


def test_the_rules_are_printed_and_recorded(tmp_path: Path, capsys: Any) -> None:
    first = walk(
        8,
        rewards=np.eye(8)[2],
        infos={"success": [False] * 3 + [True] + [False] * 5},
    )
    write(first, walk(4, rewards=np.zeros(4), infos={"success": [False] * 5}))
    settings = ["dataset=test/walks-v0", "eval_episodes=0", *TINY]
    settings.remove("eval_episodes=1")
    scores = offline.run(OFFLINE.settings(settings), tmp_path / "one")
    shown = capsys.readouterr().out
    assert "Rules: reward unit_rms, r -> 3.464 r; episodes as_stored\n" in shown
    assert scores["data"] == {
        "reward": "unit_rms",
        "reward_scale": pytest.approx(np.sqrt(12)),
        "reward_shift": 0.0,
        "episodes": "as_stored",
        "transitions": 12,
        "recorded_transitions": 12,
    }
    rules = ["reward=minus_one", "episodes=until_success"]
    scores = offline.run(OFFLINE.settings([*settings, *rules]), tmp_path / "two")
    shown = capsys.readouterr().out
    assert "reward minus_one, r -> r - 1; episodes until_success, 5 of 12 recorded" in shown
    assert scores == json.loads((tmp_path / "two/scores.json").read_text())
    assert scores["data"]["reward_shift"] == -1
    assert (scores["data"]["transitions"], scores["data"]["recorded_transitions"]) == (7, 12)


def test_the_scale_of_rewards_does_not_matter(tmp_path: Path) -> None:
    """Of rewards a thousand times as large, a temperature of 3 would clip every weight."""
    policies, clipped = [], []
    for scale in (1.0, 1000.0):
        name = stored(f"test/own-{scale:g}-v0", scale=scale)
        settings = OFFLINE.settings([f"dataset={name}", *TINY])
        offline.run(settings, tmp_path / name)
        policies.append(load_policy(tmp_path / name / "last.ckpt"))
        clipped.append(float(rows(tmp_path / name)[0]["clip_fraction"]))
    for one, other in zip(*(policy.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert clipped == [0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["dataset=test/walks-v0"], "own/test-walks-v0"),
        (["dataset={tmp}/my logs.hdf5"], "own/my-logs"),
        (["dataset=[test/walks-v0,test/more-v0]"], "own/test-walks-v0+test-more-v0"),
        (["task=locomotion/hopper-medium", "dataset=test/walks-v0"], "locomotion/hopper-medium"),
    ],
)
def test_the_folder_is_named_after_the_data(given: list[str], folder: str, tmp_path: Path) -> None:
    given = [f'dataset="{each[8:]}"' if " " in each else each for each in given]
    overrides = [each.replace("{tmp}", str(tmp_path)) for each in given]
    shown = train(tmp_path, *overrides, "--cfg", "hydra", "-p", "hydra.run.dir")
    assert shown.startswith(f"runs/{folder}/2"), shown


def test_a_new_user_trains(tmp_path: Path) -> None:
    """The whole way: own Minari data of discrete actions, no environment, no task."""
    episodes = [
        EpisodeBuffer(
            observations=list(np.random.default_rng(i).normal(size=(21, 3))),
            actions=list(np.random.default_rng(i).integers(2, 6, 20)),
            rewards=[float(j % 3 == 0) for j in range(20)],
            terminations=[False] * 20,
            truncations=[False] * 19 + [True],
        )
        for i in range(5)
    ]
    box = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    write(
        *episodes,
        dataset_id="test/clicks-v0",
        observation_space=box,
        action_space=Discrete(4, start=2),
    )
    settings = [each for each in TINY if not each.startswith("eval_episodes")]
    (home := tmp_path / "home").mkdir()
    shown = train(home, "dataset=test/clicks-v0", "eval_episodes=0", *settings)
    assert "Rules: reward unit_rms" in shown
    (folder,) = (home / "runs/own/test-clicks-v0").iterdir()
    config: Any = OmegaConf.load(folder / "config.yaml")
    assert (config.task, config.reward, config.episodes) == ("own", "unit_rms", "as_stored")


def test_actions_that_the_environment_can_not_take_are_refused(tmp_path: Path) -> None:
    """The data declare a wider space than that of the environment in which they are evaluated."""
    wide = pendulum()
    for each in wide:
        each.actions[3] = np.array([5.0], np.float32)
    box = gymnasium.spaces.Box(-8.0, 8.0, (1,))
    observations = gymnasium.make("Pendulum-v1").observation_space
    name = write(*wide, dataset_id="test/wide-v0", action_space=box, observation_space=observations)
    settings = OFFLINE.settings([f"dataset={name}", "env=Pendulum-v1", *TINY])
    message = r"3.33% of the actions of test/wide-v0 lie outside those of Pendulum-v1, \[-2.0\] to \[2.0\]"
    with pytest.raises(SettingsError, match=message):
        offline.run(settings, tmp_path / "run")


def test_unbounded_actions_need_the_bounds_of_the_data(tmp_path: Path) -> None:
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    write(
        walk(30), walk(20), action_space=box, observation_space=gymnasium.spaces.Box(-99, 99, (2,))
    )
    settings = ["dataset=test/walks-v0", "eval_episodes=0", *TINY]
    settings.remove("eval_episodes=1")
    with pytest.raises(SettingsError, match=r"action_bounds=space: .*give action_bounds=data"):
        offline.run(OFFLINE.settings(settings), tmp_path / "one")
    offline.run(OFFLINE.settings([*settings, "action_bounds=data"]), tmp_path / "two")
