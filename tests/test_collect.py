"""Data sets made here: genuine, deterministic, built in one piece, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import minari
import mujoco
import numpy as np
import pytest
import torch
from minari import EpisodeData, MinariDataset

from iql_losses import built
from torchrl_iql import IQLLoss, TrainStep, checkpoint, load_dataset, load_policy
from torchrl_iql.models import Architecture
from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.behaviors.mazes import Plan, PointWalks, share_arrived
from torchrl_iql_recipes.behaviors.recording import record
from torchrl_iql_recipes.behaviors.rollouts import CheckpointRollouts
from torchrl_iql_recipes.collect import COLLECT
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.schema import SettingsError

RECIPES = CONFIG.parent
STITCH = collection.behavior("pointmaze/stitch")
PATIENCE = 300
"""Seconds that a process may take on a busy machine."""


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a process that does not outlive the test."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(found: Callable[[], Any], process: subprocess.Popen) -> None:
    """Wait until something is there that a process makes while it runs."""
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty Minari store."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MinariDataset:
    """Make a small data set of several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        collection.build("walks-v0", STITCH, 12_000, workers=1)
        return minari.load_dataset("walks-v0")


def same(a: EpisodeData, b: EpisodeData) -> bool:
    return (
        np.array_equal(a.actions, b.actions)
        and np.array_equal(a.rewards, b.rewards)
        and np.array_equal(a.terminations, b.terminations)
        and all(np.array_equal(a.observations[key], b.observations[key]) for key in a.observations)
    )


def equal(a: MinariDataset, b: MinariDataset) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def leaves(observations: Any) -> list[np.ndarray]:
    if isinstance(observations, dict):
        return [leaf for key in sorted(observations) for leaf in leaves(observations[key])]
    return [np.asarray(observations)]


class TestEpisodes:
    @pytest.mark.parametrize(
        "name",
        ["hopper/random", "halfcheetah/medium-expert", "walker2d/medium-replay", "pointmaze/large"]
        + ["antmaze/umaze", "antmaze/large-diverse"],
    )
    def test_seeds_options_and_actions_give_them_back(self, name: str):
        who = collection.behavior(name)
        env = gymnasium.make(who.env_spec)
        for share in (0.0, 0.9):
            episode = who.play(env, np.random.default_rng(4), share)
            observation, _ = env.reset(seed=episode.seed, options=episode.options)
            observations, rewards, terminations = [observation], [], []
            for action in episode.actions:
                observation, reward, terminated, truncated, _ = env.step(action)
                observations.append(observation)
                rewards.append(reward)
                terminations.append(terminated)
                assert not (terminated or truncated) or len(rewards) == len(episode)
            for column, values in zip(
                leaves(episode.observations),
                zip(*map(leaves, observations), strict=True),
                strict=True,
            ):
                np.testing.assert_array_equal(column, np.stack(values))
            assert episode.rewards == rewards
            assert episode.terminations == terminations
            assert episode.terminations[-1] != episode.truncations[-1]
            assert not any(episode.truncations[:-1])

    def test_a_stop_is_a_truncation(self):
        env = gymnasium.make("Pendulum-v1")
        rest = np.zeros(1, np.float32)
        episode = record(env, lambda s: rest, seed=0, stop=lambda s: abs(s[2]) > 3)
        assert episode.truncations == [False] * (len(episode) - 1) + [True]
        assert [abs(s[2]) > 3 for s in episode.observations[1:]] == episode.truncations
        assert len(record(env, lambda s: rest, seed=0)) == 200

    @pytest.mark.skipif(mujoco.__version__ != "3.11.0", reason="checksums are of mujoco 3.11.0")
    def test_the_same_seed_gives_the_same_data(self):
        """The beginning of every data set, to a ten-thousandth, as it was when it was last changed."""
        expected = json.loads(Path(__file__).with_name("checksums.json").read_text())
        assert checksums() == expected


def checksums() -> dict[str, str]:
    """Hash the first steps of each data set of the mini suite and of the default one."""
    found = {}
    for name in (*collection.MINI, "pointmaze/stitch"):
        who = collection.behavior(name)
        env = gymnasium.make(who.env_spec, max_episode_steps=40)
        digest = hashlib.sha256()
        for part in (0, 19):
            episode = who.play(env, np.random.default_rng([0, part]), part / 20)
            for column in [*leaves(episode.observations), np.stack(episode.actions)]:
                # What is added makes -0 and 0 the same.
                digest.update((np.round(column.astype(np.float64), 4) + 0.0).tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


class TestStitching:
    def test_has_the_size_asked_for(self, dataset: MinariDataset):
        assert 12_000 <= dataset.total_steps < 12_000 + 3 * STITCH.longest
        assert dataset.total_steps == sum(len(episode) for episode in dataset)

    def test_ends_where_the_walk_ends(self, dataset: MinariDataset):
        plan = Plan(dataset.recover_environment(eval_env=True))
        for episode in dataset:
            assert len(episode) <= STITCH.longest
            assert not (episode.terminations | episode.truncations)[:-1].any()
            assert episode.terminations[-1] != episode.truncations[-1]
            if len(episode) < STITCH.longest and episode.truncations[-1]:
                position = episode.observations["achieved_goal"][-1]
                centre = plan.centre(plan.cell(position))
                assert np.linalg.norm(position - centre) < PointWalks.ARRIVED

    def test_must_be_stitched(self, dataset: MinariDataset):
        """Every walk is short; all know the one evaluation goal, which few reach and none from afar."""
        plan = Plan(dataset.recover_environment(eval_env=True))
        start, goal = plan.centre(plan.start), plan.centre(plan.goal)
        reached = 0
        for episode in dataset:
            positions = episode.observations["achieved_goal"]
            desired = episode.observations["desired_goal"]
            assert np.abs(desired - goal).max() <= 0.25
            assert np.ptp(desired, axis=0).max() == 0
            assert np.abs(np.diff(positions, axis=0)).max() < 0.06  # m, at most 5.24 m/s for 0.01 s
            at_start = np.abs(positions - start).max(axis=1) < 0.5
            assert not (at_start.any() and episode.terminations.any())
            reached += episode.terminations[-1]
        assert 0 < reached < len(dataset) / 5

    def test_visits_every_free_cell(self, dataset: MinariDataset):
        plan = Plan(dataset.recover_environment(eval_env=True))
        positions = np.concatenate([episode.observations["achieved_goal"] for episode in dataset])
        assert {plan.cell(position) for position in positions} == set(plan.free)


class TestBuilding:
    def test_the_seed_decides_and_the_number_of_workers_does_not(
        self, dataset: MinariDataset, store: Path
    ):
        collection.build("again-v0", STITCH, 12_000, seed=0, workers=2)
        assert equal(dataset, minari.load_dataset("again-v0"))
        collection.build("other-v0", STITCH, 200, seed=1, workers=1)
        assert not same(dataset[0], minari.load_dataset("other-v0")[0])

    def test_what_is_there_is_reused(self, store: Path):
        path = collection.build("walks-v0", STITCH, 200, workers=1)
        before = (path / "data" / "main_data.hdf5").stat()
        assert collection.build("walks-v0", STITCH, 200) == path
        assert (path / "data" / "main_data.hdf5").stat() == before
        assert list(minari.list_local_datasets()) == ["walks-v0"]

    @pytest.mark.parametrize("other", [{"transitions": 300}, {"seed": 1}, {"behavior": None}])
    def test_another_recipe_is_not_mistaken_for_it(self, store: Path, other: dict[str, Any]):
        collection.build("walks-v0", STITCH, 200, workers=1)
        given = {"behavior": STITCH, "transitions": 200, "seed": 0} | other
        given["behavior"] = given["behavior"] or collection.behavior("hopper/random")
        with pytest.raises(
            SettingsError, match=f"was made with {{'{next(iter(other))}': .*Delete it"
        ):
            collection.build("walks-v0", **given)

    def test_another_maze_is_not_mistaken_for_it(self, store: Path):
        collection.build("walks-v0", STITCH, 200, workers=1)
        with pytest.raises(ValueError, match=r"PointMaze_Stitch-v3.*not with.*PointMaze_Umaze-v3"):
            collection.build("walks-v0", collection.behavior("pointmaze/umaze"), 200)

    def test_what_makes_other_data_has_another_recipe(self, tmp_path: Path, monkeypatch):
        """Though the behaviours are called the same."""
        hopper = collection.behavior("hopper/medium")
        weights = {key: value + 1e-6 for key, value in hopper.policy.weights.items()}
        checkpoints = [tmp_path / str(i) / "last.ckpt" for i in range(2)]
        for i, path in enumerate(checkpoints):
            path.parent.mkdir()
            path.write_text(f"policy {i}")
        behaviors = [
            *(collection.behavior(f"pointmaze/{maze}") for maze in ("stitch", "umaze", "medium")),
            dataclasses.replace(STITCH, farthest=3),
            dataclasses.replace(STITCH, longest=99),
            *(collection.behavior(f"antmaze/medium-{kind}") for kind in ("play", "diverse")),
            hopper,
            dataclasses.replace(hopper, policy=dataclasses.replace(hopper.policy, weights=weights)),
            *(CheckpointRollouts(hopper.env_spec, path) for path in checkpoints),
        ]
        recipes = [collection._recipe(who, 200, 0) for who in behaviors]
        monkeypatch.setattr(mujoco, "__version__", "3.0.0")
        recipes.append(collection._recipe(STITCH, 200, 0))
        for recipe in recipes:
            assert json.loads(json.dumps(recipe)) == recipe
            assert recipes.count(recipe) == 1

    def test_an_older_recipe_that_says_less_is_enough(self, store: Path):
        path = collection.build("walks-v0", STITCH, 200, workers=1)
        metadata = path / "data" / "metadata.json"
        older = {"transitions": 200, "seed": 0, "behavior": "waypoint controller"}
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"recipe": older}))
        assert collection.build("walks-v0", STITCH, 200) == path
        with pytest.raises(ValueError, match=r"with {'seed': 0}, not with {'seed': 1}"):
            collection.build("walks-v0", STITCH, 200, seed=1)

    @pytest.mark.parametrize("transitions", [0, -5])
    def test_an_empty_data_set_is_refused(self, store: Path, transitions: int):
        with pytest.raises(
            SettingsError, match=f"transitions must be at least 1, got {transitions}"
        ):
            collection.build("walks-v0", STITCH, transitions)
        assert list(store.iterdir()) == []

    def test_goes_on_after_it_was_killed(self, dataset: MinariDataset, store: Path):
        build = (
            "from torchrl_iql_recipes.behaviors import collection; "
            "collection.build('walks-v0', collection.behavior('pointmaze/stitch'), 12_000, workers=1)"
        )
        with started([sys.executable, "-c", build], cwd=RECIPES) as process:
            wait_for(lambda: list(store.glob(".*/*/*.pt")), process)
        assert not minari.list_local_datasets()
        kept = {int(path.stem) for path in store.glob(".*/*/*.pt")}
        played = []
        with pytest.MonkeyPatch.context() as patch:
            play = collection._play_job
            patch.setattr(collection, "_play_job", lambda job: played.append(job[1]) or play(job))
            collection.build("walks-v0", STITCH, 12_000, workers=1)
        assert 0 in kept
        assert played == [part for part in range(3) if part not in kept]
        assert equal(dataset, minari.load_dataset("walks-v0"))
        left = {path.name for path in store.iterdir()}
        assert left == {"walks-v0", ".walks-v0.lock"}

    def test_who_interrupts_it_is_told_what_is_kept(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        play = collection._play_job

        def stopped(job: tuple) -> int:
            if job[1] == 1:
                raise KeyboardInterrupt
            return play(job)

        monkeypatch.setattr(collection, "_play_job", stopped)
        with pytest.raises(KeyboardInterrupt):
            collection.build("walks-v0", STITCH, collection.PART + 100, workers=1)
        told = (
            f"Interrupted: {collection.PART:,} of {collection.PART + 100:,} transitions are kept; "
        )
        assert told in capsys.readouterr().err

    def test_an_environment_that_fails_leaves_what_was_made(self, store: Path):
        """The error of a worker arrives, and what is complete is kept; not for another behaviour."""

        class Broken(PointWalks):
            def play(self, env, rng, share):
                if share > 0.5:
                    raise RuntimeError("the simulation is unstable")
                return super().play(env, rng, share)

        broken = Broken("stitch", 4, 150)
        with pytest.raises(RuntimeError, match="unstable"):
            collection.build("walks-v0", broken, 12_000, workers=1)
        assert len(list(store.glob(".*/*/*.pt"))) == 2
        assert not minari.list_local_datasets()
        collection.build("walks-v0", collection.behavior("pointmaze/umaze"), 12_000, workers=1)
        plan = Plan(minari.load_dataset("walks-v0").recover_environment())
        for episode in minari.load_dataset("walks-v0"):
            assert {plan.cell(xy) for xy in episode.observations["achieved_goal"]} <= set(plan.free)
        assert not list(store.glob(".*.parts"))

    def test_what_a_kill_left_of_a_complete_build_goes(self, store: Path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collection.shutil, "rmtree", lambda *_, **__: None)
            collection.build("walks-v0", STITCH, 200, workers=1)
        assert list(store.glob(".*/*/*.pt"))
        collection.build("walks-v0", STITCH, 200)
        assert {path.name for path in store.iterdir()} == {"walks-v0", ".walks-v0.lock"}

    @pytest.mark.slow
    def test_two_at_once(self, store: Path):
        build = (
            "from torchrl_iql_recipes.behaviors import collection; "
            "collection.build('walks-v0', collection.behavior('pointmaze/stitch'), 3000, workers=1)"
        )
        command = [sys.executable, "-c", build]
        with ExitStack() as stack:
            processes = [stack.enter_context(started(command, cwd=RECIPES)) for _ in range(2)]
            assert [process.wait(timeout=PATIENCE) for process in processes] == [0, 0]
        assert minari.load_dataset("walks-v0").total_steps >= 3000

    def test_a_source_of_its_own_is_made_when_needed(self, store: Path, monkeypatch):
        small = dataclasses.replace(collection.POINT_WALKS["umaze"], size=200)
        monkeypatch.setitem(collection.POINT_WALKS, "umaze", small)
        assert collection.ensure("mini/pointmaze/umaze-v0") == "mini/pointmaze/umaze-v0"
        loaded = load_dataset("mini/pointmaze/umaze-v0", reward="minus_one")
        assert len(loaded.transitions) >= 200
        assert loaded.env_spec is not None and loaded.env_spec.max_episode_steps == 300
        assert collection.ensure("mujoco/hopper/medium-v0") == "mujoco/hopper/medium-v0"

    def test_sizes(self):
        sizes = {name: collection.behavior(name).size for name in collection.NAMES}
        assert sizes.pop("pointmaze/stitch") == 60_000
        for name, size in sizes.items():
            assert size == (500_000 if name.startswith("antmaze/") else 100_000)

    @pytest.mark.parametrize("end", [(6, 6), (5, 6)])
    def test_who_runs_into_the_goal_on_its_way_has_not_arrived(
        self, store: Path, end: tuple[int, int]
    ):
        """The goal is in cell (6, 6), between (6, 5) and (5, 6)."""

        class Sent(PointWalks):
            def _command(self, plan, rng):
                return (6, 5), end

        collection.build("walks-v0", Sent("medium", 2, 200), 200, workers=1)
        dataset = minari.load_dataset("walks-v0")
        at_goal = np.mean([episode.terminations[-1] for episode in dataset])
        assert at_goal > 0.5
        arrived = share_arrived(dataset, PointWalks.ARRIVED)
        assert arrived == pytest.approx(1 if end == (6, 6) else 1 - at_goal)

    def test_locomotion_knows_its_reference_scores(self, store: Path):
        collection.build("hopper-v0", collection.behavior("hopper/random"), 100, workers=1)
        assert load_dataset("hopper-v0").reference_scores == (-20.272305, 3234.3)


ANT = f"stages={collection.WEIGHTS / 'ant.pt'}"


def requests(*overrides: str) -> list[tuple[str, collection.Behavior, int]]:
    """Return what the command line asks for."""
    return collection.requested(COLLECT.settings(overrides))


class TestCheckpoint:
    """A policy of this project, in an environment of the user's choice."""

    @pytest.fixture
    def policy(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        architecture = Architecture(
            observation_size=3, action_size=1, hidden_sizes=(8,), action_bounds=([-2.0], [2.0])
        )
        learner = TrainStep(IQLLoss(*built(architecture)), execution="eager")
        return checkpoint.save(tmp_path / "last.ckpt", learner, architecture)

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(RECIPES / "collect.py"), "workers=1", *overrides]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ, timeout=PATIENCE
        )

    def test_acts(self, policy: Path, store: Path):
        done = self.run(
            "env=Pendulum-v1", f"policy={policy}", "id=my/pendulum-v0", "transitions=600"
        )
        assert done.returncode == 0, done.stderr
        assert "my/pendulum-v0: 3 episodes, 600 transitions, mean return" in done.stdout
        actions = np.concatenate([each.actions for each in minari.load_dataset("my/pendulum-v0")])
        with torch.no_grad():
            distribution = load_policy(policy).get_dist(load_dataset("my/pendulum-v0").transitions)
        for level in (-1.5, 0.0, 1.5):  # four standard errors, at least, of the share below
            expected = float(distribution.base_dist.cdf(torch.tensor(level)).mean())
            assert (actions < level).mean() == pytest.approx(expected, abs=0.08)

    @pytest.mark.slow
    def test_random(self, store: Path):
        done = self.run("env=CartPole-v1", "policy=random", "id=my/cartpole-v0", "transitions=300")
        assert done.returncode == 0, done.stderr
        actions = np.concatenate([each.actions for each in minari.load_dataset("my/cartpole-v0")])
        assert 0.4 < actions.mean() < 0.6

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ([], "give one of suite, data and env, got none of them"),
            (["suite=mini", "data=hopper/medium"], "got suite and data"),
            (["data=hopper/best"], "no data set 'hopper/best' to make; choose from hopper/random"),
            (["suite=maxi"], "suite=maxi: expected mini or null"),
            (["env=CartPole-v1"], "env needs a policy, a checkpoint or random, and an id"),
            (
                ["data=[hopper/medium,hopper/random]", "id=a-v0"],
                "id=a-v0 names one data set, but several",
            ),
            (
                ["suite=mini", "transitions=1000", "seed=1"],
                "with transitions and seed give id=: mini/<name>-v0 is the suite's data",
            ),
            (
                ["data=hopper/random", "transitions=5"],
                "with transitions give id=: mini/<name>-v0",
            ),
            (["data=hopper/medium", ANT], "with stages give id=: mini/<name>-v0"),
            (["data=hopper/medium", ANT, "id=a-v0"], "is not of hopper: sizes of observation and"),
            (["data=pointmaze/umaze", ANT, "id=a-v0"], "pointmaze/umaze is made without a trained"),
            (["data=hopper/random", ANT, "id=a-v0"], "hopper/random is made without a trained"),
            (
                ["data=hopper/medium", "id=mini/hopper/expert-v0"],
                "id=mini/hopper/expert-v0 is the suite's data; choose another",
            ),
            (
                ["env=CartPole-v1", "policy=random", "id=a-v0", ANT],
                "stages are for data; what plays in env is policy",
            ),
            (["data=hopper/medium", "policy=random"], "policy plays in env"),
        ],
    )
    def test_what_can_not_be_made(self, overrides: list[str], message: str, store: Path):
        with pytest.raises(ValueError, match=re.escape(message)):
            requests(*overrides)

    def test_is_told_on_the_command_line(self, store: Path):
        done = self.run("data=hopper/best")
        assert done.returncode == 1
        assert "collect.py: there is no data set 'hopper/best' to make" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(store.iterdir()) == []

    def test_an_id_that_can_not_be_is_one_line(self, store: Path):
        done = self.run("env=CartPole-v1", "policy=random", "id=../x", "transitions=5")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "collect.py: id=../x: expected a Minari id" in done.stderr

    def test_stages_of_another_training_play(self, tmp_path: Path):
        trained = collection.behavior("hopper/medium").policy
        trained.save(tmp_path / "stages.pt")
        ((id, who, transitions),) = requests(
            "data=hopper/medium", f"stages={tmp_path / 'stages.pt'}", "id=my/hopper-v0"
        )
        assert (id, transitions) == ("my/hopper-v0", 100_000)
        assert who.parameters == collection.behavior("hopper/medium").parameters
        better = dataclasses.replace(trained, returns=trained.returns.flip(0))
        better.save(tmp_path / "stages.pt")
        ((_, who, _),) = requests(
            "data=hopper/medium", f"stages={tmp_path / 'stages.pt'}", "id=my/hopper-v0"
        )
        assert who.stages == [0]

    def test_the_commands_that_are_shown_make_different_data_sets(self):
        texts = RECIPES / "collect.py", CONFIG / "collect.yaml", RECIPES / "behaviors/README.md"
        for text in (path.read_text() for path in texts):
            commands = re.findall(r"python recipes/collect\.py ([^-].+)", text)
            assert len(commands) == 3
            made = [id for command in commands for id, *_ in requests(*command.split())]
            assert len(made) == len(set(made)) == len(collection.MINI) + 2

    def test_the_suite_has_its_own_sizes(self):
        assert [(id, size) for id, _, size in requests("suite=mini")] == [
            (collection.dataset_id(name), 500_000 if name.startswith("antmaze/") else 100_000)
            for name in collection.MINI
        ]
