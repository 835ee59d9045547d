"""OGBench's single tasks, against OGBench's own loader and in its own environments.

The files are written here, small, as OGBench's scripts do: the state before each action of a walk, of which
the last has no successor. Some states are put at the goal.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from episodes import refused_bytes
from runs import TINY
from test_d4rl import Server
from torchrl_iql import Evaluator, OfflineDataset, load_dataset, load_policy
from torchrl_iql.data.__main__ import main as inspect
from torchrl_iql.environments import flat_environment, spec_of
from torchrl_iql_recipes.experiment import build, offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE

ogbench = pytest.importorskip("ogbench")  # not for Python 3.13

# The worlds of the tasks, and which of their data sets they are.
KINDS = {
    "antmaze-medium": "navigate",
    "antmaze-large": "navigate",
    "pointmaze-medium": "navigate",
    "pointmaze-large": "navigate",
    "cube-single": "play",
    "scene": "play",
}
FAMILIES = ["antmaze-medium", "pointmaze-medium", "cube-single", "scene"]
EVERY = pytest.mark.parametrize("world", FAMILIES)

ROWS = 30
AT_GOAL = {0: (10, 11, 12, 20), 1: (0, ROWS - 2), 2: (ROWS - 1,)}
"""Rows of each walk that are at the goal."""


def name_of(world: str, task: str = "") -> str:
    return f"{world}-{KINDS[world]}-singletask{task}-v0"


def file_of(folder: Path, world: str) -> Path:
    return folder / f"{world}-{KINDS[world]}-v0.npz"


def place(env: Any, positions: np.ndarray, buttons: np.ndarray | None) -> None:
    env.data.qpos[:] = positions
    if buttons is not None:
        env._cur_button_states = buttons.copy()
        env._apply_button_states()
    mujoco.mj_forward(env.model, env.data)


def put_at_goal(env: Any) -> None:
    """Move the body, or the things that the arm moves, to where the task wants them."""
    positions, buttons = env.data.qpos.copy(), None
    if hasattr(env, "cur_goal_xy"):
        positions[:2] = env.cur_goal_xy
    else:
        positions[14:17] = env.data.mocap_pos[0]
    if hasattr(env, "_target_drawer_pos"):
        positions[-2:] = env._target_drawer_pos, env._target_window_pos
        buttons = env._target_button_states
    place(env, positions, buttons)


def observed(env: Any) -> np.ndarray:
    return env.get_ob() if hasattr(env, "get_ob") else env.compute_observation()


@cache
def env_of(world: str, task: str = "") -> gymnasium.Env:
    return flat_environment(f"{world}-singletask{task}-v0")


def write_walks(path: Path, world: str, at_goal: dict[int, tuple[int, ...]], task: str) -> None:
    made = env_of(world, task)
    env: Any = made.unwrapped
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {}
    for number, rows in at_goal.items():
        made.reset(seed=number)
        positions = env.data.qpos.copy()
        buttons = env._cur_button_states.copy() if world == "scene" else None
        for row in range(ROWS):
            if row in rows:
                put_at_goal(env)
            elif row - 1 in rows:
                place(env, positions, buttons)
            action = rng.uniform(-1, 1, made.action_space.shape)
            entries = {"observations": observed(env), "actions": action.round(number)}
            entries |= {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy()}
            if world == "scene":
                entries["button_states"] = env._cur_button_states.copy()
            entries["terminals"] = row == ROWS - 1
            made.step(action)
            for key, value in entries.items():
                columns.setdefault(key, []).append(value)
    kinds = {"terminals": bool, "button_states": np.int64}
    np.savez_compressed(
        path, **{key: np.array(c, kinds.get(key, np.float32)) for key, c in columns.items()}
    )


def written(folder: Path, world: str, task: str = "") -> Path:
    path = file_of(folder, world)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_walks(path, world, AT_GOAL, task)
        write_walks(path.with_stem(f"{path.stem}-val"), world, {0: (3,)}, task)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return OGBench's folder in a home of the tests' own; files are written there on first use."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        yield home / ".ogbench/data"


@cache
def packages(name: str, path: Path) -> dict[str, np.ndarray]:
    _, transitions, _ = ogbench.make_env_and_datasets(name, dataset_path=str(path))
    return transitions


def assert_packages(dataset: OfflineDataset, expected: dict[str, np.ndarray]) -> None:
    found, following = dataset.transitions, dataset.transitions["next"]
    goal = expected["masks"] == 0
    columns = {
        "observations": found["observation"],
        "next_observations": following["observation"],
        "rewards": following["reward"][:, 0],
    }
    for key, column in columns.items():
        np.testing.assert_array_equal(column, expected[key])
    bound = np.float32(1 - 1e-5)
    np.testing.assert_array_equal(found["action"], expected["actions"].clip(-bound, bound))
    np.testing.assert_array_equal(following["terminated"][:, 0], goal)
    np.testing.assert_array_equal(
        following["truncated"][:, 0], (expected["terminals"] == 1) & ~goal
    )
    assert following["done"].equal(following["terminated"] | following["truncated"])


class TestData:
    @EVERY
    def test_are_the_packages_transitions_rewards_and_masks(self, home: Path, world: str) -> None:
        expected = packages(name_of(world), written(home, world))
        dataset = load_dataset(name_of(world))
        assert_packages(dataset, expected)
        assert len(dataset.transitions) == 3 * (ROWS - 1)
        assert expected["terminals"].sum() == 3
        goal = np.flatnonzero(expected["masks"] == 0)
        assert goal.tolist() == [10, 11, 12, 20, 29, 57]
        assert dataset.env_spec is not None
        assert dataset.env_spec.id == f"{world}-singletask-v0"
        assert dataset.episode_lengths.tolist() == [11, 1, 1, 8, 8, 1, 28, 29]

    def test_rewards_of_scenes_count_what_is_not_done(self, home: Path) -> None:
        written(home, "scene")
        rewards = load_dataset(name_of("scene")).transitions["next", "reward"]
        assert (rewards.min(), rewards.max()) == (-2, 0)

    def test_another_task_has_other_rewards(self, home: Path, tmp_path: Path) -> None:
        """Also from the cache, though the file is the same."""
        path = written(home, "pointmaze-medium")
        for task in ("-task3", "", "-task3", "-task1"):
            name = name_of("pointmaze-medium", task)
            dataset = load_dataset(name)
            assert_packages(dataset, packages(name, path))
            assert dataset.transitions["next", "terminated"].any() == (task != "-task3")
        elsewhere = written(tmp_path, "pointmaze-large", "-task5")
        dataset = load_dataset(elsewhere, env="pointmaze-large-singletask-task5-v0")
        assert_packages(dataset, packages(name_of("pointmaze-large", "-task5"), elsewhere))
        assert dataset.transitions["next", "terminated"].sum() == 6

    def test_of_a_path_with_the_name_of_a_file_are_of_the_default_task(self, home: Path) -> None:
        path = written(home, "pointmaze-medium")
        named = load_dataset(name_of("pointmaze-medium"))
        for source in (path, str(path)):
            dataset = load_dataset(source)
            assert dataset.env_spec == named.env_spec
            assert (dataset.transitions == named.transitions).all()

    def test_a_second_start_reads_no_rows(
        self, home: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(home, "pointmaze-medium")
        first = load_dataset(name_of("pointmaze-medium"))
        monkeypatch.setattr(ogbench, "load_dataset", None)
        assert (load_dataset(name_of("pointmaze-medium")).transitions == first.transitions).all()
        assert len(list(cache_folder.iterdir())) == 1

    def test_the_generator_of_numpy_is_left_alone(self, home: Path) -> None:
        written(home, "pointmaze-medium")
        before = np.random.get_state()[1].copy()
        load_dataset(name_of("pointmaze-medium"), cache=False)
        np.testing.assert_array_equal(np.random.get_state()[1], before)

    def test_sums_over_steps_end_at_the_goal(self, home: Path) -> None:
        written(home, "pointmaze-medium")
        summed = load_dataset(name_of("pointmaze-medium")).n_step(3, 0.5).transitions
        rewards = summed["next", "reward"][6:14, 0].tolist()
        assert rewards == [-1.75, -1.75, -1.5, -1.0, 0.0, 0.0, 0.0, -1.75]
        assert summed["next", "terminated"][6:14, 0].tolist() == [False, False, *[True] * 5, False]

    def test_are_inspected(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        written(home, "pointmaze-medium")
        assert inspect(["inspect", name_of("pointmaze-medium")]) == 0
        assert "87" in capsys.readouterr().out


class TestNames:
    def test_and_an_environment_of_another_task_are_refused(self, home: Path) -> None:
        written(home, "pointmaze-medium")
        name, other = name_of("pointmaze-medium"), "pointmaze-medium-singletask-task3-v0"
        with pytest.raises(ValueError, match=f"^{name} has the rewards of .*, but env={other}: "):
            load_dataset(name, env=other)

    def test_of_environments_that_do_not_exist(self) -> None:
        with pytest.raises(ValueError, match=r"^antmaze-tiny-navigate-singletask-v0: unknown env"):
            load_dataset("antmaze-tiny-navigate-singletask-v0")
        with pytest.raises(ValueError, match=r"task7-v0: unknown environment '.*-task7-v0'"):
            load_dataset("antmaze-medium-navigate-singletask-task7-v0")
        with pytest.raises(ValueError, match="unknown environment 'ant-singletask-v0'"):
            spec_of("ant-singletask-v0")

    def test_of_pixels_are_refused(self) -> None:
        with pytest.raises(ValueError, match="visual-cube-single-singletask-v0 is no single task"):
            load_dataset("visual-cube-single-play-singletask-v0")

    @pytest.mark.parametrize("env", ["Hopper-v5", "pointmaze-medium-v0"])
    def test_of_environments_without_a_task_are_refused(self, home: Path, env: str) -> None:
        path = written(home, "pointmaze-medium")
        with pytest.raises(ValueError, match=f"^{path} gets its rewards from .* {env} is no sing"):
            load_dataset(path, env=env)


class TestFile:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Return OGBench's folder in a home without files."""
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path / ".ogbench/data"

    @pytest.fixture
    def server(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        with Server(written(home, "pointmaze-medium").read_bytes()) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(
                "ogbench.utils.DATASET_URL", f"http://127.0.0.1:{server.server_port}"
            )
            yield server
            server.shutdown()

    def test_is_downloaded_without_the_one_for_validation(
        self, server: Server, folder: Path, home: Path
    ) -> None:
        name = name_of("pointmaze-medium", "-task2")
        for _ in range(2):
            assert_packages(load_dataset(name), packages(name, file_of(home, "pointmaze-medium")))
        assert server.paths == ["/pointmaze-medium-navigate-v0.npz"]
        assert [path.name for path in folder.iterdir()] == ["pointmaze-medium-navigate-v0.npz"]

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            ({"sent": 0}, "not a zip file"),
            ({"sent": 1_000}, "not a zip file"),
            ({"sent": -1}, "not a zip file"),
            ({"status": 404}, "HTTP Error 404"),
            ({"contents": b"<html>moved</html>"}, "not a zip file"),
        ],
        ids=str,
    )
    def test_whose_download_fails_leaves_nothing(
        self, server: Server, folder: Path, failure: dict, reason: str
    ) -> None:
        vars(server).update(failure)
        message = rf"^no OGBench file {folder}/point\S+z, and the download from http\S+npz failed"
        with pytest.raises(FileNotFoundError, match=f"{message}: .*{reason}"):
            load_dataset(name_of("pointmaze-medium"))
        assert server.paths
        assert not list(folder.iterdir())

    def test_is_missing(self, folder: Path, tmp_path: Path) -> None:
        expected = rf"^no OGBench file {file_of(folder, 'scene')}, and download is False"
        with pytest.raises(FileNotFoundError, match=expected):
            load_dataset(name_of("scene"), download=False)
        for path in (tmp_path / "scene-play-v0.npz", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"^no .*{path}"):
                load_dataset(path, env="scene-singletask-v0")

    def test_whose_name_tells_no_environment_needs_one(self, home: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.npz"
        path.write_bytes(written(home, "pointmaze-medium").read_bytes())
        with pytest.raises(ValueError, match=f"^{path} has no rewards, .* give that of a task as"):
            load_dataset(path)
        named = load_dataset(name_of("pointmaze-medium"))
        dataset = load_dataset(path, env="pointmaze-medium-singletask-v0")
        assert (dataset.transitions == named.transitions).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"qpos": None}, "has no array qpos; found actions, button_states, observations, qvel"),
            ({"button_states": None}, "has no array button_states; found"),
            ({"observations": None, "actions": None}, "has no array observations, actions; found"),
            ({"qpos": np.zeros((90, 2))}, r"qpos has shape \[87, 2\], expected \[n, 25\], the sta"),
            ({"actions": np.zeros((90, 5), int)}, "actions has dtype int64, expected floats"),
            ({"observations": np.zeros(90)}, r"observations has shape \[90\], expected \[n, size"),
            ({"terminals": np.arange(90) % 30 == 5}, "next_observations has shape"),
        ],
    )
    def test_is_incomplete(
        self, home: Path, tmp_path: Path, cache_folder: Path, changes: dict, message: str
    ) -> None:
        with np.load(written(home, "scene")) as file:
            arrays = {**file, **changes}
        path = file_of(tmp_path, "scene")
        np.savez(path, **{key: values for key, values in arrays.items() if values is not None})
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            load_dataset(path)
        assert not cache_folder.exists()

    def test_is_damaged(self, home: Path, tmp_path: Path, cache_folder: Path) -> None:
        contents = written(home, "pointmaze-medium").read_bytes()
        path = file_of(tmp_path, "pointmaze-medium")
        for broken in (contents[: len(contents) // 2], b"", b"no data"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=f"^{path}: is no intact NPZ file: .+"):
                load_dataset(path)
        assert refused_bytes(path, contents, every=97) > 10
        assert not cache_folder.exists()


class TestEpisodes:
    @EVERY
    def test_are_those_of_their_seed_whatever_was_drawn_before(self, world: str) -> None:
        spec = build.environment({"id": f"{world}-singletask-v0", "max_episode_steps": 20})
        played = []
        with Evaluator(spec, episodes=2) as evaluate:
            size = evaluate.action_space.shape[0]
            act = TensorDictModule(
                lambda seen: (7 * seen.sum(1, keepdim=True) + torch.arange(size)).sin(),
                in_keys=["observation"],
                out_keys=["action"],
            )
            for generator, seed in ((0, 3), (1, 3), (1, 4)):
                np.random.seed(generator)
                before = np.random.get_state()[1].copy()
                evaluate.seed = seed
                played.append(evaluate(act, keep_trajectories=True))
                np.testing.assert_array_equal(np.random.get_state()[1], before)
        first, second, other = (np.array(each.trajectories) for each in played)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first[1], other[0])  # in an environment that has played more
        assert not np.array_equal(first[0], first[1])
        assert played[0].score == 100 * played[0].successes.mean() == 0

    def test_teleports_are_of_the_seed(self) -> None:
        env = flat_environment("pointmaze-teleport-singletask-v0")
        arrived = []
        for seed in (0, 1, 2, 3, 0, 1, 2, 3):
            np.random.seed(5)
            env.reset(seed=seed)
            env.unwrapped.set_xy(np.array(env.unwrapped._teleport_info["teleport_in_xys"][0]))
            env.step(np.zeros(2))
            arrived.append(env.unwrapped.get_xy().tolist())
        assert arrived[:4] == arrived[4:]
        assert len({tuple(each) for each in arrived}) > 1

    def test_differ_without_a_seed(self) -> None:
        env = flat_environment("pointmaze-medium-singletask-v0")
        starts = []
        for _ in range(2):
            np.random.seed(0)
            starts.append(env.reset()[0])
        assert not np.array_equal(*starts)

    @EVERY
    def test_end_at_the_goal_with_success(self, world: str) -> None:
        env = env_of(world)
        env.reset(seed=0)
        put_at_goal(env.unwrapped)
        if not world.startswith(("ant", "point")):
            env.unwrapped.post_step()  # looks at what was moved
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape))
        assert (reward, terminated, truncated, bool(info["success"])) == (0, True, False, True)


# hidden units, expectile, temperature: of "Flow Q-Learning", appendix E.2 and table 6
PUBLISHED = {
    **dict.fromkeys([world for world in KINDS if "maze" in world], (512, 0.9, 10.0)),
    "cube-single": (256, 0.9, 1.0),
    "scene": (256, 0.9, 10.0),
}


@pytest.mark.parametrize("world", KINDS)
def test_settings_are_the_published_ones(world: str) -> None:
    task = f"task=ogbench/{world}-{KINDS[world]}"
    settings = OFFLINE.settings([task])
    units, expectile, temperature = PUBLISHED[world]
    iql = settings.algorithm
    assert settings.data.dataset == name_of(world)
    assert (settings.data.reward, settings.data.episodes, settings.data.env) == (
        "none",
        "as_stored",
        None,
    )
    assert settings.networks.hidden_sizes == (units,) * 4
    assert (iql.expectile, iql.temperature, iql.decay_steps) == (expectile, temperature, 0)
    assert (iql.learning_rate, iql.discount, iql.target_rate) == (3e-4, 0.99, 0.005)
    assert (iql.weight_clip, iql.num_qvalue_nets) == (100, 2)
    assert (settings.training.steps, settings.training.batch_size) == (1_000_000, 256)
    assert (settings.evaluation.eval_interval, settings.evaluation.eval_episodes) == (100_000, 50)


def test_cloning_has_its_own_networks() -> None:
    settings = OFFLINE.settings(["task=ogbench/cube-single-play", "algorithm=bc"])
    assert settings.networks.hidden_sizes == (512,) * 4
    assert settings.algorithm.decay_steps == 0


@pytest.mark.parametrize(
    ("world", "algorithm"),
    [
        ("antmaze-medium", "iql"),
        pytest.param("cube-single", "iql", marks=pytest.mark.slow),
        pytest.param("scene", "iql", marks=pytest.mark.slow),
        ("pointmaze-medium", "bc"),
        ("pointmaze-medium", "onestep"),
    ],
)
def test_a_task_is_trained_and_scored(
    home: Path, tmp_path: Path, world: str, algorithm: str
) -> None:
    written(home, world)
    short = f"env={{id: {world}-singletask-v0, max_episode_steps: 15}}"
    task = f"task=ogbench/{world}-{KINDS[world]}"
    settings = OFFLINE.settings([task, f"algorithm={algorithm}", short, *TINY])
    scores = offline.run(settings, tmp_path)
    (replica,) = scores["replicas"]
    assert replica["score"] == replica["normalized_score"] == 100 * replica["success"]
    assert replica["length"] == 15
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    load_policy(tmp_path / "last.ckpt")


def test_without_the_package_a_message_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(home, "pointmaze-medium")
    monkeypatch.setitem(sys.modules, "ogbench", None)
    message = r"pip install 'torchrl-iql\[ogbench\]'"
    for source, env in ((name_of("scene"), None), (path, None), (path, "scene-singletask-v0")):
        with pytest.raises(ModuleNotFoundError, match=f"^OGBench's tasks need .*{message}"):
            load_dataset(source, env=env)
    with pytest.raises(ValueError, match=f"'scene-singletask-v0' can not be built: .*{message}"):
        Evaluator("scene-singletask-v0")
    with pytest.raises(SettingsError, match=f"^env=scene-singletask-v0: .*{message}"):
        build.environment({"id": "scene-singletask-v0"})
    assert inspect(["inspect", str(path)]) == 1
    assert "pip install" in capsys.readouterr().err
