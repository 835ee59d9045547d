"""Who the data sets are made by: an ant that is symmetric, walkers that know the way, stages of SAC."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics.envs.maze import maps
from scipy.spatial.transform import Rotation
from torchrl.envs import ExplorationType, set_exploration_type

from runs import rows
from test_collect import PATIENCE, started, wait_for
from torchrl_iql.antmaze import MAZES, AntMaze, ant_model
from torchrl_iql.environments import antmaze_id
from torchrl_iql_recipes.behaviors import ant
from torchrl_iql_recipes.behaviors.collection import POINT_WALKS, ROBOTS, WEIGHTS
from torchrl_iql_recipes.behaviors.mazes import (
    MAPS,
    AntWalks,
    Plan,
    PointWalks,
    point_maze,
)
from torchrl_iql_recipes.behaviors.policies import Stages, actor
from torchrl_iql_recipes.behaviors.recording import record
from torchrl_iql_recipes.behaviors.rollouts import StageRollouts
from torchrl_iql_recipes.behaviors.sac import run as train_sac
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.sac import SAC

RECIPES = Path(ant.__file__).parents[1]


class PlainAnt(AntMaze):
    """D4RL's ant without a maze."""

    def _initialize_simulation(self):
        model = ant_model().compile()
        return model, mujoco.MjData(model)

    def reset_model(self):
        self.goal = np.full(2, 1e6)
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(self.init_qpos + noise, 0.1 * self.np_random.standard_normal(14))
        return self._get_obs()


class TestAnt:
    @pytest.mark.parametrize("turns", range(4))
    def test_turned_and_renamed_it_moves_the_same(self, turns: int):
        """MuJoCo itself: the world turned by quarters, and leg i where leg i + turns was, turned back."""
        one, other = PlainAnt(), PlainAnt()
        one.reset(seed=5)
        other.reset(seed=0)
        position, velocity = one.data.qpos.copy(), one.data.qvel.copy()
        leg = np.arange(4)
        hips, ankles = 2 * leg, 2 * leg + 1
        bend = np.array([1, -1, -1, 1])  # the sides of zero that the ranges of the ankles lie on
        assert (np.sign(one.model.jnt_range[2::2].sum(axis=1)) == bend).all()

        def renamed(joints: np.ndarray) -> np.ndarray:
            result = np.empty(8)
            for i in leg:
                j = (i + turns) % 4
                result[hips[j]] = joints[hips[i]]
                result[ankles[j]] = joints[ankles[i]] * bend[i] * bend[j]
            return result

        # SciPy has the scalar of a quaternion last.
        torso = Rotation.from_quat(np.roll(position[3:7], -1))
        whole = Rotation.from_euler("z", turns * np.pi / 2)
        body = Rotation.from_euler("z", -turns * np.pi / 2)
        position[3:7] = np.roll((whole * torso * body).as_quat(), 1)
        position[:3] = whole.apply(position[:3])
        velocity[:3] = whole.apply(velocity[:3])
        velocity[3:6] = body.inv().apply(velocity[3:6])  # given in the frame of the body
        position[7:], velocity[6:] = renamed(position[7:]), renamed(velocity[6:])
        other.set_state(position, velocity)

        goal, rng = np.array([0.3, 1.0, 0.0]), np.random.default_rng(0)
        for _ in range(40):
            states = one._get_obs(), other._get_obs()
            views = (
                ant.to_canonical(states[0][2:], goal[:2]),
                ant.to_canonical(states[1][2:], whole.apply(goal)[:2]),
            )
            np.testing.assert_allclose(views[0][0], views[1][0], atol=1e-8)
            action = rng.uniform(-1, 1, 8)
            for env, (_, its_turns) in zip((one, other), views, strict=True):
                env.step(ant.from_canonical(action, its_turns))

    def test_the_goal_lies_ahead(self):
        env, rng = PlainAnt(), np.random.default_rng(0)
        for seed in range(30):
            env.reset(seed=seed)
            position = env.data.qpos.copy()
            position[3:7] = np.roll(Rotation.from_euler("z", rng.uniform(-4, 4)).as_quat(), 1)
            env.set_state(position, env.data.qvel + rng.normal(size=14))
            state, direction = env._get_obs(), rng.normal(size=2)
            view, turns = ant.to_canonical(state[2:], direction)
            assert 0 <= turns < 4
            towards = state[15:17] @ direction / np.linalg.norm(direction)
            assert view[13:15] @ view[27:29] == pytest.approx(towards)
            assert np.linalg.norm(view[27:29]) == pytest.approx(1)
            assert view[27] >= np.cos(np.pi / 4) - 1e-9
            assert np.cos(ant.heading(view) - ant.heading(state[2:])) == pytest.approx(1)

    def test_heading_is_the_turn_about_the_vertical_whatever_the_tilt(self):
        rng = np.random.default_rng(0)
        for heading, tilt, towards in rng.uniform(-np.pi, np.pi, (20, 3)) * [1, 0.4, 1]:
            axis = [np.cos(towards), np.sin(towards), 0]
            lean = Rotation.from_rotvec(tilt * np.array(axis))
            orientation = (lean * Rotation.from_euler("z", heading)).as_quat()
            found = ant.heading(np.array([0.5, *(1.05 * np.roll(orientation, 1))]))
            assert np.cos(found - heading) == pytest.approx(1)

    def test_falls_where_it_lies_on_its_side(self):
        env = PlainAnt()
        env.reset(seed=0)
        for degrees in (0, 60, 75, 85, 120, 180, 300):
            position = env.data.qpos.copy()
            position[3:7] = np.roll(Rotation.from_euler("x", degrees, degrees=True).as_quat(), 1)
            env.set_state(position, env.data.qvel)
            expected = np.cos(np.radians(degrees)) < ant.UPRIGHT
            assert ant.fallen(env._get_obs()[2:]) == expected

    def test_reward_is_the_speed_towards_the_goal(self):
        env = ant.AntToGoal()
        check_env(env, skip_render_check=True)
        env.reset(seed=3)
        for _ in range(20):
            before, goal = env._state[:2].copy(), env._goal.copy()
            action = env.action_space.sample()
            _, reward, _, _, info = env.step(action)
            progress = np.linalg.norm(goal - before) - np.linalg.norm(goal - env._state[:2])
            effort = ant.EFFORT * np.square(action).mean()
            quaternion = np.roll(env._state[3:7], -1)
            turned = 2 * np.arctan2(quaternion[2], quaternion[3])
            twist = ant.TWIST * abs((turned + np.pi) % (2 * np.pi) - np.pi)
            assert reward == pytest.approx(progress / 0.1 + ant.ALIVE - effort - twist)
            assert info["goals"] == 0
        env._goal = env._state[:2] + 0.1
        *_, info = env.step(np.zeros(8, np.float32))
        assert info["goals"] == 1
        assert np.linalg.norm(env._goal - env._state[:2]) >= ant.NEAREST - 1e-9
        env.data.qpos[3:7] = [0, 1, 0, 0]  # on its back
        assert env.step(np.zeros(8, np.float32))[2]


class TestMazes:
    @pytest.mark.parametrize(
        ("name", "theirs"),
        [("umaze", maps.U_MAZE), ("medium", maps.MEDIUM_MAZE), ("large", maps.LARGE_MAZE)],
    )
    def test_are_those_of_d4rl(self, name: str, theirs: list[list[int]]):
        walls = [[int(cell == "#") for cell in row] for row in MAPS[name]]
        assert walls == theirs

    @pytest.mark.parametrize("name", MAPS)
    def test_plans_are_shortest_paths(self, name: str):
        plan = Plan(gymnasium.make(point_maze(name)))
        cells = plan.free
        near = np.array([[abs(a - c) + abs(b - d) == 1 for c, d in cells] for a, b in cells])
        expected = np.where(near, 1.0, np.inf)
        np.fill_diagonal(expected, 0)
        for via in range(len(cells)):  # Floyd and Warshall
            expected = np.minimum(expected, expected[:, [via]] + expected[[via]])
        for (i, start), (j, end) in itertools.product(enumerate(cells), repeat=2):
            assert plan.distances[end][start] == expected[i, j]
            if start != end:
                step = cells.index(plan.next_cell(start, end))
                assert near[i, step]
                assert expected[step, j] == expected[i, j] - 1
        assert plan.next_cell(cells[0], cells[0]) == cells[0]

    @pytest.mark.parametrize(
        "spec",
        [*(gymnasium.spec(antmaze_id(name)) for name in MAZES), point_maze("medium")],
    )
    def test_start_and_goal_are_those_of_the_map(self, spec):
        env = gymnasium.make(spec)
        plan = Plan(env)
        observation, _ = env.reset(seed=0)
        told = isinstance(observation, dict)
        position = observation["achieved_goal"] if told else observation[:2]
        assert plan.cell(position) == plan.start
        assert plan.cell(env.unwrapped.goal) == plan.goal
        assert (
            spec.max_episode_steps
            == gymnasium.spec(spec.id.replace("Umaze", "UMaze")).max_episode_steps
        )

    @pytest.mark.parametrize("name", POINT_WALKS)
    def test_the_point_arrives(self, name: str):
        walks = POINT_WALKS[name]
        env = gymnasium.make(walks.env_spec)
        plan = Plan(env)
        for i in range(10):
            episode = walks.play(env, np.random.default_rng(i), 0.0)
            start, end = (tuple(episode.options[key]) for key in ("reset_cell", "end_cell"))
            assert 1 <= plan.distances[end][start] <= walks.farthest
            position = episode.observations["achieved_goal"][-1]
            near = np.linalg.norm(position - plan.centre(end)) < PointWalks.ARRIVED
            assert near or (end == plan.goal and episode.terminations[-1])

    def test_from_where_the_ant_is_sent(self):
        """D4RL's meaning of its names."""
        plan = Plan(gymnasium.make(antmaze_id("medium")))
        policy = Stages.load(WEIGHTS / "ant.pt")
        rng = np.random.default_rng(0)
        commands = {
            kind: {AntWalks("medium", kind, policy)._command(plan, rng) for _ in range(12_000)}
            for kind in ("goal", "play", "diverse")
        }
        assert commands["goal"] == {(plan.start, plan.goal)}
        for kind, ends in {"play": AntWalks.PLAY["medium"], "diverse": plan.free}.items():
            pairs = [(s, e) for s in plan.free for e in ends if s not in (plan.goal, e)]
            assert commands[kind] == set(pairs)
        for maze, ends in AntWalks.PLAY.items():
            assert set(ends) <= set(Plan(gymnasium.make(antmaze_id(maze))).free)

    @pytest.mark.slow
    @pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
    def test_the_ant_passes_its_waypoints(self, maze: str):
        """At least 80% of the waypoints are reached without falling."""
        walks = AntWalks(maze, "diverse", Stages.load(WEIGHTS / "ant.pt"))
        env = gymnasium.make(walks.env_spec)
        plan = Plan(env)
        passed = waypoints = 0
        for i in range(20):
            episode = walks.play(env, np.random.default_rng([7, i]), 0.0)
            start, end = (tuple(episode.options[key]) for key in ("reset_cell", "end_cell"))
            left = plan.distances[end][plan.cell(episode.observations[-1, :2])]
            waypoints += plan.distances[end][start]
            fell = ant.fallen(episode.observations[-1, 2:])
            passed += 0 if fell else plan.distances[end][start] - left
        assert passed >= 0.8 * waypoints


class TestStages:
    @pytest.fixture
    def stages(self) -> Stages:
        torch.manual_seed(0)
        policies = [actor(5, 2, [8, 8]) for _ in range(3)]
        states = [policy.state_dict() for policy in policies]
        return Stages(
            sizes=(5, 2, [8, 8]),
            frames=torch.tensor([10, 20, 30]),
            returns=torch.tensor([1.0, 2.0, 3.0]),
            weights={key: torch.stack([state[key] for state in states]) for key in states[0]},
        )

    def test_come_back_from_a_file(self, stages: Stages, tmp_path: Path):
        stages.save(tmp_path / "stages.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["stages.pt"]
        again = Stages.load(tmp_path / "stages.pt")
        assert again.sizes == stages.sizes
        assert again.frames.tolist() == [10, 20, 30]
        for key, value in stages.weights.items():
            assert again.weights[key].equal(value)
            assert again.policy(-1).state_dict()[key].equal(value[2])

    def test_digests_tell_the_weights(self, stages: Stages, tmp_path: Path):
        digests = {stages.digest(which) for which in ([0], [1], [2], [0, 1], [1, 0])}
        assert len(digests) == 5
        assert stages.digest([-1]) == stages.digest([2])
        stages.save(tmp_path / "stages.pt")
        assert Stages.load(tmp_path / "stages.pt").digest([1]) == stages.digest([1])

    def test_levels_are_told_by_the_returns(self, stages: Stages):
        returns = torch.tensor([-50.0, 299.0, 301.0, 900.0, 100.0])
        several = dataclasses.replace(stages, returns=returns)
        assert (several.medium, several.expert) == (2, 3)

    def test_no_level_is_medium_below_zero(self, stages: Stages):
        bad = dataclasses.replace(stages, returns=torch.tensor([-300.0, -90.0, -100.0]))
        with pytest.raises(ValueError, match=r"best return is negative, -90\.0"):
            _ = bad.medium

    @pytest.mark.parametrize("stage", [0, -1])
    def test_sample_what_the_policy_would(self, stages: Stages, stage: int):
        observation = np.linspace(-1, 1, 5)
        policy, sample = stages.policy(stage), stages.sampler(stage)
        batch = torch.tensor(observation, dtype=torch.float32).expand(100_000, 5)
        torch.manual_seed(0)
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            theirs = policy(observation=batch)[-1]
        rng = np.random.default_rng(0)
        ours = torch.tensor(np.stack([sample(observation, rng) for _ in range(4000)]))
        assert ours.dtype == torch.float32
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            torch.testing.assert_close(
                ours.quantile(q, 0), theirs.quantile(q, 0), atol=0.04, rtol=0
            )
        again = np.random.default_rng(0)
        assert np.array_equal(ours[0], sample(observation, again))

    def test_each_gives_an_equal_share(self, stages: Stages):
        rollouts = StageRollouts(gymnasium.spec("Hopper-v5"), stages, [0, 2])
        assert rollouts.algorithm == "SAC, stochastic, after 10 and 30 steps"
        played = []
        object.__setattr__(
            stages,
            "sampler",
            lambda stage: played.append(stage) or (lambda *_: np.zeros(3, np.float32)),
        )
        env = gymnasium.make("Hopper-v5", max_episode_steps=2)
        for share in (0.0, 0.49, 0.5, 0.99):
            rollouts.play(env, np.random.default_rng(0), share)
        assert played == [0, 0, 2, 2]

    @pytest.mark.parametrize("robot", ROBOTS)
    def test_shipped(self, robot: str):
        stages = Stages.load(WEIGHTS / f"{robot}.pt")
        assert (WEIGHTS / f"{robot}.pt").stat().st_size < 2e6
        assert all(value.dtype == torch.float32 for value in stages.weights.values())
        assert (stages.frames.diff() > 0).all()
        last = len(stages.frames) - 1
        assert (stages.medium, stages.expert) == (last - 1, last)

    @pytest.mark.slow
    @pytest.mark.parametrize("robot", ROBOTS)
    def test_medium_is_medium(self, robot: str):
        """Between 25% and 60% of the expert."""
        stages = Stages.load(WEIGHTS / f"{robot}.pt")
        env = gymnasium.make(ROBOTS[robot])
        returns = []
        for stage in (stages.medium, stages.expert):
            sample = stages.sampler(stage)
            rng = np.random.default_rng(11)
            episodes = [
                record(env, lambda s, sample=sample, rng=rng: sample(s, rng), seed=900 + i)
                for i in range(15)
            ]
            returns.append(np.mean([sum(episode.rewards) for episode in episodes]))
        medium, expert = returns
        assert 0.25 * expert < medium < 0.6 * expert


SMALL = [
    "behavior=hopper",
    "frames=1600",
    "random_frames=200",
    "stage_interval=100",
    "updates_per_frame=0.2",
    "eval_episodes=1",
    "critic_sizes=[16,16]",
    "threads=1",
    "execution=eager",
]


def sac(*overrides: str, cwd: Path | None = None) -> AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, str(RECIPES / "sac.py"), *overrides]
    return started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)


class TestSAC:
    @pytest.mark.slow
    def test_goes_on_after_it_was_killed_for_longer(self, tmp_path: Path):
        run = tmp_path / "run"
        with sac(*SMALL, f"hydra.run.dir={run}") as process:
            wait_for(lambda: list(run.glob("checkpoint-*[0-9]")), process)
        kept = Stages.load(run / "stages.pt")
        with sac(f"resume={run}", "frames=1800") as resumed:
            output, _ = resumed.communicate(timeout=PATIENCE)
        assert resumed.returncode == 0, output
        assert f"1800 steps, stages: {run / 'stages.pt'}" in output
        stages = Stages.load(run / "stages.pt")
        assert stages.frames.tolist() == list(range(100, 1900, 100))
        assert [int(row["step"]) for row in rows(run)] == stages.frames.tolist()
        (checkpoint,) = run.glob("checkpoint-*")
        assert checkpoint.name == "checkpoint-000001800"
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        assert (state["frames"], state["step"]["steps"]) == (1800, 320)
        for key, value in stages.weights.items():  # what was saved before is kept, all else is new
            assert value[:4].equal(kept.weights[key][:4])
            assert not value[-1].equal(value[0])
        stored = SAC.stored(run)
        assert stored.frames == 1800
        with pytest.raises(SettingsError, match=r"with discount=0\.99, not discount=0\.5: begin a"):
            SAC.resumed(run, ["discount=0.5"])
        for settings, message in {
            SAC.resumed(run, ["frames=1700"]): "frames=1700: 1800 are done",
            SAC.settings([*SMALL, "frames=1800", "learning_rate=0.1"]): r"not learning_rate=0\.1",
        }.items():
            with pytest.raises(SettingsError, match=message):
                train_sac(settings, run)
        assert SAC.stored(run) == stored

    @pytest.mark.slow
    def test_ctrl_c_saves(self, tmp_path: Path):
        run = tmp_path / "run"
        with sac(*SMALL, "frames=1000000", f"hydra.run.dir={run}") as process:
            wait_for((run / "stages.pt").exists, process)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130, output
        assert f"resume={run}" in output
        assert len(list(run.glob("checkpoint-*[0-9]"))) == 1

    @pytest.mark.slow
    def test_what_is_not_finite_is_no_stage(self, tmp_path: Path):
        run = tmp_path / "run"
        # MuJoCo's log of what is not finite is written where it runs.
        with sac(*SMALL, "learning_rate=1e30", f"hydra.run.dir={run}", cwd=tmp_path) as process:
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1, output
        assert "is not finite" in output or "is nan" in output
        (reproduction,) = run.glob("nonfinite-step-*.pt")
        assert reproduction.name in output
        stages = Stages.load(run / "stages.pt")
        assert stages.frames.tolist() == [100, 200]
        assert all(bool(value.isfinite().all()) for value in stages.weights.values())

    @pytest.mark.slow
    def test_stages_that_do_not_exist_are_not_promised(self, tmp_path: Path):
        with sac(
            *SMALL, "frames=100", "stage_interval=500", f"hydra.run.dir={tmp_path}"
        ) as process:
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert "100 steps, stages: none yet" in output

    def test_stages_are_whole_batches(self, tmp_path: Path):
        with sac("frames_per_batch=64", f"hydra.run.dir={tmp_path / 'run'}") as process:
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert output == (
            "sac.py: stage_interval=5000: expected a multiple of frames_per_batch, 64\n"
        )
        assert list(tmp_path.iterdir()) == []
