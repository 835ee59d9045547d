"""Whether a simulator matches data, told on small files of simulators that are known to match or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

from episodes import stacked
from torchrl_iql.antmaze import AntMaze
from torchrl_iql.data import Replay, replay
from torchrl_iql.data.__main__ import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*out of date", "ignore:.*is set to None"),
    pytest.mark.usefixtures("root"),
]

UMAZE = "torchrl_iql/AntMaze_UMaze-v0"


class Other(AntMaze):
    """The ant of gymnasium in one respect."""

    def __init__(self, change: str, **options: Any) -> None:
        super().__init__(**options)
        if change == "gear":
            self.model.actuator_gear[:, 0] = 150
        elif change == "1% of the gear":
            self.model.actuator_gear[:, 0] *= 1.01
        elif change == "contacts":
            self.model.geom_solimp[:, :3] = [0.9, 0.95, 0.001]
        elif change == "timestep":
            self.model.opt.timestep = 0.01


gymnasium.register("test/AntMaze-v0", entry_point=Other, max_episode_steps=700)


def rolled(
    env: gymnasium.Env, episodes: int = 6, steps: int = 80, kick: float = 0.0, **options: Any
) -> dict[str, np.ndarray]:
    """Step an environment at random, kicked now and then: rows in D4RL's layout, float32, and infos."""
    rng = np.random.default_rng(0)
    env.action_space.seed(0)
    rows: dict[str, list] = {}
    body = env.unwrapped
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed, **options)
        for step in range(steps):
            if kick and step % 10 == 0:
                velocities = body.data.qvel + kick * rng.normal(size=body.model.nv)
                body.set_state(body.data.qpos.copy(), velocities)
                observation = body._get_obs()
            action = env.action_space.sample()
            row = {"observations": observation, "actions": action}
            row |= {"infos/qpos": body.data.qpos.copy(), "infos/qvel": body.data.qvel.copy()}
            if isinstance(body, AntMaze):
                row["infos/goal"] = body.goal
            observation, reward, terminated, *_ = env.step(action)
            end = terminated or step == steps - 1
            row |= {"rewards": reward, "terminals": terminated, "timeouts": end and not terminated}
            row["next_observations"] = observation
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
            if end:
                break
    arrays = {key: np.stack(values) for key, values in rows.items()}
    return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()}


def write(path: Path, arrays: dict[str, np.ndarray], *without: str) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            if key not in without:
                file[key] = values
    return path


def spec(env_id: str, **options: Any) -> Any:
    return gymnasium.make(env_id, **options).spec


def test_its_own_ant_maze(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), options={"goal": [0.5, 0.5]})
    path = write(tmp_path / "ant.hdf5", ant, "infos/qpos", "infos/qvel")
    found = replay(path, UMAZE)
    assert (found.verdict, found.states, found.reason) == ("match", "from observations", "")
    assert found.transitions == len(ant["rewards"])
    assert found.overall.median < 1e-6 and found.overall.worst < 1e-3
    assert found.reward.worst == 0
    ends, differ = found.terminations
    assert ends == ant["terminals"].sum() > 0 and differ == 0
    assert [each.name for each in found.columns][::14] == [
        "0 qpos[0] root",
        "14 qpos[14] ankle_4",
        "28 qvel[13] ankle_4",
    ]


@pytest.mark.parametrize("change", ["gear", "1% of the gear", "contacts", "timestep"])
def test_another_ant(tmp_path, change):
    ant = rolled(gymnasium.make(UMAZE), episodes=3)
    path = write(tmp_path / "ant.hdf5", ant, "infos/qpos", "infos/qvel")
    found = replay(path, spec("test/AntMaze-v0", change=change))
    assert found.verdict == "mismatch"
    assert sum(not each.matches for each in found.columns) > 10


def test_the_ant_of_gymnasium(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), episodes=3)
    path = write(tmp_path / "ant.hdf5", ant, "infos/qpos", "infos/qvel")
    options = {"exclude_current_positions_from_observation": False}
    env = spec("Ant-v5", include_cfrc_ext_in_observation=False, **options)
    assert replay(path, env).verdict == "mismatch"


def test_another_scale_of_actions(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), episodes=3)
    ant["actions"] *= 5
    path = write(tmp_path / "ant.hdf5", ant, "infos/qpos", "infos/qvel")
    found = replay(path, UMAZE)
    assert found.verdict == "mismatch"
    assert found.reason.startswith("columns ") and "qvel[" in found.reason
    assert "rewards" not in found.reason


def test_an_unknown_goal(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), episodes=2)
    found = replay(write(tmp_path / "ant.hdf5", ant, "infos/goal"), UMAZE)
    assert found.verdict == "match"
    assert found.reward is None and found.terminations is None
    assert "reward       not compared: the goal is not known, there is no infos/goal" in str(found)


def test_rewards_and_terminations_of_another_goal(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), options={"goal": [0.5, 0.5]})
    ant["infos/goal"] += 4
    found = replay(write(tmp_path / "ant.hdf5", ant), UMAZE)
    ends = ant["terminals"].sum()
    assert found.verdict == "mismatch"
    assert found.reason.startswith(f"rewards; terminations, {ends} of {ends}; 0 of ")


def test_rows_without_next_observations(tmp_path):
    ant = rolled(gymnasium.make(UMAZE), options={"goal": [0.5, 0.5]})
    found = replay(write(tmp_path / "ant.hdf5", ant, "next_observations"), UMAZE)
    ends, time_outs = ant["terminals"].sum(), ant["timeouts"].sum()
    assert found.verdict == "match"
    # The row at a time-out has no successor; at a termination, there is no observation after it.
    last = 1 - int(ant["timeouts"][-1])
    assert found.transitions == len(ant["rewards"]) - time_outs - last
    assert found.columns[0].compared == found.transitions - found.terminations[0]
    assert found.terminations == (ends - int(ant["terminals"][-1]), 0)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Swimmer-v5", "Walker2d-v5"])
def test_environments_of_gymnasium(tmp_path, env_id):
    rows = rolled(gymnasium.make(env_id), episodes=10)
    path = write(tmp_path / "rows.hdf5", rows, "infos/qpos", "infos/qvel")
    found = replay(path, env_id)
    assert found.verdict == "match"
    missing = "qpos[0] and qpos[1]" if env_id == "Swimmer-v5" else "qpos[0]"
    assert found.states == f"from observations, with {missing} at 0"
    kept = rows["terminals"] & ~(np.abs(rows["observations"]) == 10).any(1)
    assert found.reward.matches and found.terminations == (kept.sum(), 0)


def test_the_version_of_a_walker(tmp_path):
    """One foot has another friction."""
    rows = rolled(gymnasium.make("Walker2d-v4"), episodes=20)
    path = write(tmp_path / "rows.hdf5", rows)
    assert replay(path, "Walker2d-v4").verdict == "match"
    assert replay(path, "Walker2d-v5").verdict == "mismatch"


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5"])
def test_clipped_velocities(tmp_path, env_id):
    rows = rolled(gymnasium.make(env_id), episodes=20, kick=4)
    found = replay(write(tmp_path / "rows.hdf5", rows), env_id)
    states, following = (np.abs(rows[key]) == 10 for key in ("observations", "next_observations"))
    clipped = states.any(1)
    assert found.verdict == "match"
    assert found.clipped_states == clipped.sum() > 0
    assert found.transitions == (~clipped).sum() > 50
    assert found.clipped_entries == following[~clipped].sum() > 0


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v5"])
def test_contact_forces_are_compared_after_the_step(tmp_path, env_id):
    rows = rolled(gymnasium.make(env_id), episodes=3, steps=40)
    found = replay(write(tmp_path / "rows.hdf5", rows, "infos/qpos", "infos/qvel"), env_id)
    assert found.verdict == "match"
    assert len(found.columns) == rows["observations"].shape[1] > 100
    rows["next_observations"][:, -10:] += 1
    found = replay(write(tmp_path / "rows.hdf5", rows), env_id)
    assert found.verdict == "mismatch"
    assert sum(not each.matches for each in found.columns) == 10


def test_a_reward_that_depends_on_more_than_the_state(tmp_path):
    """The ant's velocity in its reward lags behind by a substep of the step before."""
    rows = rolled(gymnasium.make("Ant-v5"), episodes=3, steps=40)
    found = replay(write(tmp_path / "rows.hdf5", rows), "Ant-v5")
    assert found.reward is None
    assert found.not_compared == (
        "here it depends on more than positions, velocities and the action",
        "",
    )
    assert found.terminations == (rows["terminals"].sum(), 0)


def test_a_pendulum(tmp_path):
    rows = rolled(gymnasium.make("InvertedPendulum-v5"))
    found = replay(write(tmp_path / "rows.hdf5", rows), "InvertedPendulum-v5")
    assert found.verdict == "match" and found.terminations == (6, 0)


class TestRecordedStates:
    def test_are_used_where_observations_are_not_the_state(self, tmp_path):
        rows = rolled(gymnasium.make("Reacher-v5"), steps=40)
        found = replay(write(tmp_path / "rows.hdf5", rows), "Reacher-v5")
        assert found.verdict == "match"
        assert found.states == "infos/qpos and infos/qvel"
        rows["actions"] *= 2
        assert replay(write(tmp_path / "rows.hdf5", rows), "Reacher-v5").verdict == "mismatch"

    @pytest.mark.parametrize(("shift", "says"), [(-1, "row t is"), (1, "row t + 1 is")])
    def test_that_are_shifted(self, tmp_path, shift, says):
        rows = rolled(gymnasium.make("Reacher-v5"), steps=40)
        for key in ("infos/qpos", "infos/qvel"):
            rows[key] = np.roll(rows[key], shift, axis=0)
        found = replay(write(tmp_path / "rows.hdf5", rows), "Reacher-v5")
        assert found.verdict == "match"
        assert found.states.startswith(f"infos/qpos and infos/qvel, shifted: {says}")
        assert found.transitions == 6 * 39

    def test_of_something_else(self, tmp_path):
        rows = rolled(gymnasium.make("Reacher-v5"), steps=40)
        rows["infos/qpos"] += 0.1
        found = replay(write(tmp_path / "rows.hdf5", rows), "Reacher-v5")
        assert found.verdict == "unknown"
        assert "observations are not the state, they lack qpos[0], qpos[1], " in found.reason
        assert (
            "in these states the simulator observes something else, as in column " in found.reason
        )
        assert found.reason.endswith("there are no seeds to play episodes from")

    def test_of_another_size(self, tmp_path):
        rows = rolled(gymnasium.make("Reacher-v5"), steps=40)
        rows["infos/qpos"] = rows["infos/qpos"][:, 1:]
        found = replay(write(tmp_path / "rows.hdf5", rows), "Reacher-v5")
        assert "infos/qpos has shape [40, 3], expected [n, 4]" in found.reason

    def test_behind_a_wrapper(self, tmp_path):
        """Of a half-cheetah's observation, every second column."""

        def wrap(env: gymnasium.Env) -> gymnasium.Env:
            return gymnasium.wrappers.TransformObservation(
                env, lambda seen: seen[::2], Box(-np.inf, np.inf, (9,), np.float64)
            )

        gymnasium.register(
            "test/Half-v0", entry_point=lambda **_: wrap(gymnasium.make("HalfCheetah-v5"))
        )
        rows = rolled(gymnasium.make("test/Half-v0"))
        found = replay(write(tmp_path / "rows.hdf5", rows), "test/Half-v0")
        assert (found.verdict, found.states) == ("match", "infos/qpos and infos/qvel")
        assert len(found.columns) == 9


class Scaled(gymnasium.Wrapper):
    """Scales observations, but is no ObservationWrapper."""

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return 2 * observation, *rest


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        (gymnasium.wrappers.NormalizeObservation, "the simulator goes on otherwise"),
        (Scaled, "a wrapper changes how positions and velocities are observed"),
    ],
)
def test_wrappers_that_do_not_observe_the_state_alone(tmp_path, wrapper, reason):
    def wrapped(**_: Any) -> gymnasium.Env:
        return wrapper(gymnasium.make("HalfCheetah-v5"))

    gymnasium.register(f"test/{wrapper.__name__}-v0", entry_point=wrapped)
    rows = rolled(gymnasium.make("HalfCheetah-v5"), episodes=2)
    found = replay(write(tmp_path / "rows.hdf5", rows), f"test/{wrapper.__name__}-v0")
    assert found.verdict == "unknown" and reason in found.reason


class Recorded(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Puts the state into the infos."""

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)

    def reset(self, **options: Any) -> Any:
        observation, _ = self.env.reset(**options)
        return observation, self.infos()

    def step(self, action: Any) -> Any:
        return *self.env.step(action)[:4], self.infos()

    def infos(self) -> dict[str, np.ndarray]:
        data = self.unwrapped.data
        return {"qpos": data.qpos.copy(), "qvel": data.qvel.copy()}


def collect(
    env: gymnasium.Env,
    name: str = "test/set-v0",
    episodes: int = 3,
    steps: int = 40,
    infos: bool = False,
    **options: Any,
) -> str:
    """Record random episodes as Minari does, each with a seed."""
    env.action_space.seed(0)
    buffers = []
    for seed in range(episodes):
        start = {"options": options} if options else {"seed": seed}
        observation, info = env.reset(**start)
        seen, told, taken = [observation], [info], []
        for _ in range(steps):
            action = env.action_space.sample()
            observation, *outcome, info = env.step(action)
            seen.append(observation)
            told.append(info)
            taken.append((action, *outcome))
            if outcome[1] or outcome[2]:
                break
        actions, rewards, terminations, truncations = map(list, zip(*taken, strict=True))
        buffers.append(
            EpisodeBuffer(
                seed=start.get("seed"),
                options=start.get("options"),
                observations=stacked(seen),
                actions=np.stack(actions),
                rewards=rewards,
                terminations=terminations,
                truncations=[*truncations[:-1], not terminations[-1]],
                infos={key: np.stack([each[key] for each in told]) for key in told[0]}
                if infos
                else {},
            )
        )
    minari.create_dataset_from_buffers(name, buffers, env=env)
    env.close()
    return name


class TestMinari:
    @pytest.mark.parametrize(
        "env_id", ["PointMaze_UMaze-v3", "AntMaze_UMaze-v5", "AntMaze_UMaze-v4"]
    )
    def test_mazes_of_gymnasium_robotics(self, env_id):
        found = replay(collect(gymnasium.make(env_id)))
        assert (found.verdict, found.states) == ("match", "from observations")
        assert found.reward.worst == 0
        assert {"0 qpos[0]", "2 goal[0]"} <= {each.name[:9] for each in found.columns}

    def test_its_own_maze_with_goals(self):
        found = replay(collect(gymnasium.make(UMAZE, goal_observation=True)))
        assert (found.verdict, found.environment) == ("match", UMAZE)
        assert found.reward.worst == 0

    def test_against_another_maze(self):
        name = collect(gymnasium.make("PointMaze_UMaze-v3"), steps=200)
        found = replay(name, "PointMaze_Medium-v3")
        assert found.verdict == "mismatch" and "rewards" not in found.reason

    def test_infos(self):
        found = replay(collect(Recorded(gymnasium.make("Reacher-v5")), infos=True), trust_env=True)
        assert (found.verdict, found.states) == ("match", "infos/qpos and infos/qvel")

    def test_cart_pole_by_seeds(self):
        found = replay(collect(gymnasium.make("CartPole-v1")))
        assert found.verdict == "match"
        assert found.states == "episodes played from their seeds"
        assert found.overall.worst == 0
        assert found.terminations == (3, 0)

    def test_other_physics_by_seeds(self):
        name = collect(gymnasium.make("CartPole-v1"))

        class Heavy(gymnasium.envs.classic_control.CartPoleEnv):
            def __init__(self, **options: Any) -> None:
                super().__init__(**options)
                self.force_mag = 11.0

        gymnasium.register("test/CartPole-v0", entry_point=Heavy)
        assert replay(name, "test/CartPole-v0").verdict == "mismatch"

    def test_another_start(self):
        name = collect(gymnasium.make("CartPole-v1"))

        class Elsewhere(gymnasium.envs.classic_control.CartPoleEnv):
            def reset(self, **options: Any) -> Any:
                super().reset(seed=99)
                return np.array(self.state, np.float32), {}

        gymnasium.register("test/CartPole-v1", entry_point=Elsewhere)
        found = replay(name, "test/CartPole-v1")
        assert found.verdict == "unknown"
        assert "gives another first observation, in column 0 " in found.reason

    def test_rounding_that_grows_is_not_told_from_another_simulator(self):
        class Drifting(CartPoleEnv):
            steps = 0

            def step(self, action: Any) -> Any:
                self.steps += 1
                self.gravity = 9.8 if self.steps < 11 else 50
                return super().step(action)

            def reset(self, **options: Any) -> Any:
                self.steps = 0
                return super().reset(**options)

        gymnasium.register("test/CartPole-v2", entry_point=Drifting)
        found = replay(collect(gymnasium.make("CartPole-v1"), episodes=10), "test/CartPole-v2")
        assert found.verdict == "unknown"
        assert found.reason.startswith("episodes agree in their first 10 transitions and differ")

    def test_a_door_by_seeds(self):
        found = replay(collect(gymnasium.make("AdroitHandDoor-v1"), episodes=2, steps=10))
        assert found.verdict == "match", found.reason
        assert found.states == "episodes played from their seeds"

    def test_no_seeds(self, capsys):
        name = collect(gymnasium.make("CartPole-v1"), minari_autoseed=False)
        assert main(["replay", name]) == 3
        assert capsys.readouterr().out == (
            "test/set-v0\nenvironment  CartPole-v1\nverdict      can not be told: the environment has "
            "no state of MuJoCo that can be set; there are no seeds to play episodes from\n"
        )


class TestCommand:
    def test_status(self, tmp_path, capsys):
        rows = rolled(gymnasium.make("Hopper-v5"))
        path = write(tmp_path / "rows.hdf5", rows, "infos/qpos", "infos/qvel")
        arguments = ["replay", str(path), "--env", "Hopper-v5"]
        assert main([*arguments, "--samples", "50", "--seed", "1"]) == 0
        out, _ = capsys.readouterr()
        assert "compared     50 transitions\n" in out
        assert out.endswith("\nverdict      match\n")
        rows["actions"] *= 0.5
        write(path, rows)
        assert main(arguments) == 1
        assert "\nverdict      mismatch: columns " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the data name no environment; name it (--env)"),
            (["--env", "Nothing-v0"], "unknown environment 'Nothing-v0'"),
            (
                ["--env", "HalfCheetah-v5"],
                "observations have 11 columns, those of HalfCheetah-v5 17",
            ),
            (["--env", "test/Legs-v0"], "actions have shape [3], those of test/Legs-v0 [2]"),
            (["--env", "Hopper-v5", "--samples", "0"], "samples is 0, expected at least 1"),
        ],
    )
    def test_errors(self, tmp_path, capsys, arguments, message):
        def legs(**_: Any) -> gymnasium.Env:
            return gymnasium.wrappers.TransformAction(
                gymnasium.make("Hopper-v5"), lambda a: np.append(a, 0), Box(-1, 1, (2,))
            )

        gymnasium.register("test/Legs-v0", entry_point=legs)
        path = write(tmp_path / "rows.hdf5", rolled(gymnasium.make("Hopper-v5"), episodes=1))
        assert main(["replay", str(path), *arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert (
            error.count("\n") == 1
            and error.startswith("python -m torchrl_iql.data replay: ")
            and message in error
        )

    def test_no_rows(self, tmp_path, capsys):
        rows = {key: values[:0] for key, values in rolled(gymnasium.make("Hopper-v5"), 1).items()}
        path = write(tmp_path / "rows.hdf5", rows)
        assert main(["replay", str(path), "--env", "Hopper-v5"]) == 2
        assert (
            capsys.readouterr().err
            == f"python -m torchrl_iql.data replay: {path}: there are no transitions to replay\n"
        )

    def test_no_file(self, tmp_path, capsys):
        assert main(["replay", str(tmp_path / "no.hdf5"), "--env", "Hopper-v5"]) == 2
        assert "no D4RL file" in capsys.readouterr().err

    def test_all_states_clipped(self, tmp_path, capsys):
        rows = rolled(gymnasium.make("Hopper-v5"))
        rows["observations"][:, -1] = 10
        path = write(tmp_path / "rows.hdf5", rows, "infos/qpos", "infos/qvel")
        assert main(["replay", str(path), "--env", "Hopper-v5"]) == 3
        assert (
            "can not be told: all states that were drawn are clipped; " in capsys.readouterr().out
        )

    def test_the_table_of_many_columns(self, tmp_path):
        rows = rolled(gymnasium.make("Ant-v5"), episodes=1)
        table = str(replay(write(tmp_path / "rows.hdf5", rows), "Ant-v5")).splitlines()
        head = next(i for i, line in enumerate(table) if line.startswith("error "))
        assert table[head + 16].startswith("all 105 columns")
        assert table[head + 17] == "(90 columns with smaller errors are not shown)"
        assert {len(line) for line in table[head : head + 17]} == {len(table[head])}


def test_the_seed_decides_what_is_drawn(tmp_path):
    path = write(tmp_path / "rows.hdf5", rolled(gymnasium.make("Hopper-v5"), episodes=10))
    first, again, other = (replay(path, "Hopper-v5", samples=20, seed=s) for s in (0, 0, 1))
    assert isinstance(first, Replay)
    assert first == again != other
