"""Episodes of a policy from the command line, and films of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete
from matplotlib.image import imread

from runs import TINY, of_maze
from test_acting import dataset, saved
from torchrl_iql import Evaluator, OfflineDataset, checkpoint, load_policy
from torchrl_iql_recipes.deployment import film, playing
from torchrl_iql_recipes.deployment.settings import Play
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE

SCRIPT = Path(__file__).parents[1] / "recipes/evaluate.py"


class Walker(gymnasium.Env):
    """Moves along a line, which it draws; of a seed, and without anything foreign to render."""

    observation_space = Dict({"place": Box(-9, 9, (1,)), "noise": Box(-1, 1, (2,), np.float64)})
    action_space = Discrete(3, start=-1)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, length: int = 20) -> None:
        self.render_mode, self.length = render_mode, length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.normal(), 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.place, self.steps = float(np.clip(self.place + action, -9, 9)), self.steps + 1
        return self._observation(), -abs(self.place), False, self.steps == self.length, {}

    def render(self) -> np.ndarray:
        image = np.zeros((33, 47, 3), np.uint8)
        image[:, 23 + 2 * round(self.place)] = [255, 200, 0]
        image[: self.steps, :, 2] = 255
        return image

    def _observation(self) -> dict[str, np.ndarray]:
        return {"place": np.float32([self.place]), "noise": self.np_random.uniform(-1, 1, 2)}


@pytest.fixture
def walker(monkeypatch: pytest.MonkeyPatch) -> str:
    name = "test/Walker-v0"
    monkeypatch.setitem(gymnasium.registry, name, EnvSpec(name, entry_point="test_evaluate:Walker"))
    return name


def of_walker(folder: Path, keys: list[str] | None = None, env: str | None = None) -> Path:
    observed = Walker.observation_space
    if keys is not None:
        observed = Dict({key: observed[key] for key in keys})
    data = dataset(observed, Walker.action_space)
    if env is not None:
        data = OfflineDataset(**{**vars(data), "env_spec": gymnasium.spec(env)})
    return saved(folder, data)


def play(path: Path, **settings: Any) -> Any:
    return playing.run(Play.of({"checkpoint": str(path), "episodes": 5, **settings}))


def test_what_is_printed_is_what_was_played(
    walker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = of_walker(tmp_path, env=walker)
    play(path, seed=7)
    policy, returns = load_policy(path), []
    for seed in range(7, 12):
        env, paid = Walker(), 0.0
        observation, _ = env.reset(seed=seed)
        for _ in range(20):
            observation, reward, *_ = env.step(policy.act(observation))
            paid += reward
        returns.append(paid)
    error = np.std(returns, ddof=1) / np.sqrt(5)
    assert capsys.readouterr().out.splitlines() == [
        "test/Walker-v0, 5 episodes, seeds 7 to 11",
        f"return            {np.mean(returns):>10.1f} ± {error:.1f}",
        "length                  20.0 ± 0.0",
    ]


@pytest.mark.parametrize(
    "env", ["test_evaluate:test/Walker-v0", {"id": "test/Walker-v0", "length": 3}]
)
def test_any_environment_is_played_in(env: Any, walker: str, tmp_path: Path) -> None:
    """By its module, or with arguments; and shows what the policy reads alone."""
    path = of_walker(tmp_path, ["noise"])
    lengths = play(path, env=env).lengths
    assert lengths.tolist() == [20 if isinstance(env, str) else 3] * 5


def test_the_checkpoint_of_a_run_names_its_environment(
    maze_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the score of the data: here the success, in percent; also of a run that was not evaluated."""
    overrides = [*TINY, "temperature=3", f"dataset={maze_id}", "seeds=4", "eval_episodes=0"]
    offline.run(OFFLINE.settings(of_maze(overrides)), tmp_path)
    its = play(tmp_path / "last.ckpt", episodes=2, seed=3)
    spec = EnvSpec.from_json(checkpoint.load_metadata(tmp_path / "last.ckpt")["env"])
    with Evaluator(spec, episodes=2, seed=3) as evaluate:
        expected = evaluate(load_policy(tmp_path / "last.ckpt"))
    np.testing.assert_array_equal(its.returns, expected.returns)
    np.testing.assert_array_equal(its.normalized_scores, 100 * its.successes)
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == [
        "PointMaze_Stitch-v3,",
        "normalized",
        "success",
        "return",
        "length",
    ]


def test_reference_scores_are_those_of_the_data_in_their_environment(
    walker: str, tmp_path: Path
) -> None:
    data = dataset(Walker.observation_space, Walker.action_space)
    its = {**vars(data), "env_spec": gymnasium.spec(walker), "reference_scores": (-100.0, -50.0)}
    path = saved(tmp_path, OfflineDataset(**its))
    evaluation = play(path)
    np.testing.assert_allclose(evaluation.normalized_scores, 2 * (evaluation.returns + 100))
    assert play(path, env=walker).normalized_scores is None


# --- Refusals -------------------------------------------------------------------------------------------


def test_a_policy_of_other_sizes_or_bounds_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, dataset(Box(-1, 1, (3,)), Box(-3, 3, (1,))))
    with pytest.raises(
        SettingsError,
        match=r"is for observations of 3 .* 1 numbers, but CartPole-v1 has obs.* 2 ch",
    ):
        play(path, env="CartPole-v1")
    with pytest.raises(
        SettingsError, match=r"but Pendulum-v1 has some in Box\(-2.* takes .*-3.*: give env=<id>"
    ):
        play(path, env="Pendulum-v1")


class Board(Walker):
    observation_space = Box(-1, 1, (3, 2))


def test_a_policy_for_as_many_numbers_in_another_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    board = EnvSpec("test/Board-v0", entry_point="test_evaluate:Board")
    monkeypatch.setitem(gymnasium.registry, board.id, board)
    path = saved(tmp_path, dataset(Box(-1, 1, (2, 3)), Walker.action_space))
    with pytest.raises(
        SettingsError, match=r"has observations of Box.*\(3, 2\).* not of Box.*\(2, 3\)"
    ):
        play(path, env="test/Board-v0")


def test_an_environment_that_there_is_not_is_refused(walker: str, tmp_path: Path) -> None:
    path = of_walker(tmp_path)
    with pytest.raises(SettingsError, match="does not name an environment: give env=<id>"):
        play(path)
    with pytest.raises(SettingsError, match="env=Nowhere-v0: unknown environment"):
        play(path, env="Nowhere-v0")
    with pytest.raises(SettingsError, match=r"there is no checkpoint at .*none\.ckpt"):
        play(tmp_path / "none.ckpt")


def test_a_checkpoint_does_not_decide_what_runs(
    walker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_walker(tmp_path, env=walker)
    monkeypatch.delitem(gymnasium.registry, walker)
    with pytest.raises(
        SettingsError,
        match=r"foreign code, the entry point 'test_evaluate:Walker', and a file does",
    ):
        play(path)
    assert play(path, trust_env=True).lengths.tolist() == [20] * 5


# --- Films ----------------------------------------------------------------------------------------------


def test_a_strip_shows_the_first_episode(walker: str, tmp_path: Path) -> None:
    path = of_walker(tmp_path, env=walker)
    play(path, video=str(tmp_path / "film.png"), seed=7)
    image = imread(tmp_path / "film.png")
    blue = (image[..., :3] == [0, 0, 1]).all(-1).mean()
    assert image.shape[1] > 1000 and 0.1 < blue < 0.5
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "film.png"}


def test_a_video_has_every_frame_of_the_first_episode(walker: str, tmp_path: Path) -> None:
    import imageio.v2 as imageio

    path = of_walker(tmp_path, env=walker)
    play(path, video=str(tmp_path / "film.mp4"), seed=7)
    with imageio.get_reader(tmp_path / "film.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 10
        frames = [frame for frame in reader]  # noqa: C416, its length is infinite
    assert len(frames) == 21 and frames[0].shape == (32, 46, 3)
    policy, env = load_policy(path), Walker()
    observation, _ = env.reset(seed=7)
    for frame in frames:
        expected = env.render()[:32, :46].astype(float)
        assert abs(frame - expected).mean() < 20  # compressed
        observation, *_ = env.step(policy.act(observation))
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "film.mp4"}


def test_what_can_not_be_filmed_is_told_before_it_is_played(
    walker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = of_walker(tmp_path, env=walker)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(
            SettingsError, match=r"film\.mp4: \.mp4 needs imageio-ffmpeg, pip install"
        ):
            play(path, video=str(tmp_path / "film.mp4"))
    for render, message in [
        (lambda self: None, "has no pictures, its render"),
        (lambda self: 1 / 0, r"can not be rendered on this machine: division by zero \(MuJoCo ren"),
    ]:
        monkeypatch.setattr(Walker, "render", render)
        with pytest.raises(SettingsError, match=message):
            play(path, video=str(tmp_path / "film.png"))
    assert capsys.readouterr().out == ""
    assert {file.name for file in tmp_path.iterdir()} == {path.name}


@pytest.mark.slow
def test_mujoco_is_filmed_without_a_screen(maze_id: str, tmp_path: Path) -> None:
    """By the script: one line, or a strip."""
    overrides = [*TINY, "temperature=3", f"dataset={maze_id}"]
    offline.run(OFFLINE.settings(of_maze(overrides)), tmp_path)
    command = [sys.executable, str(SCRIPT), "checkpoint=last.ckpt", "episodes=1", "video=film.png"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if ended.returncode:
        assert re.fullmatch(
            r"evaluate\.py: video=film\.png: PointMaze_Stitch-v3 can not be rendered on this .*\n",
            ended.stderr,
        )
        pytest.skip("this machine does not render")
    assert ended.stderr == "" and ended.stdout.endswith("The first episode: film.png\n")
    image = imread(tmp_path / "film.png")[..., :3]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000


def test_the_first_frame_is_of_the_environment(walker: str, tmp_path: Path) -> None:
    spec = gymnasium.spec(walker)
    film.require(tmp_path / "film.png", spec)
    assert "render_mode" not in spec.kwargs


def test_whoever_walks_is_followed() -> None:
    """From where Gymnasium's camera stands, a hopper leaves the picture after a second."""
    env = film._rendered(gymnasium.spec("Hopper-v5"))
    renderer: Any = env.unwrapped.mujoco_renderer  # pyright: ignore
    assert renderer.model.camera(renderer.camera_id).name == "track"
    theirs = gymnasium.spec("Hopper-v5")
    theirs = dataclasses.replace(theirs, kwargs={"camera_id": 0})  # that of the registry stays
    assert film._rendered(theirs).unwrapped.mujoco_renderer.camera_id == 0  # pyright: ignore
    assert film._rendered(gymnasium.spec("Reacher-v5")).unwrapped.mujoco_renderer.camera_id == -1  # pyright: ignore


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(
        SettingsError, match=r"on this machine: pygame is not installed, run `[^`]*`$"
    ):
        film.require(tmp_path / "film.png", gymnasium.spec("CartPole-v1"))
