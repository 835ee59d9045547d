"""The report on a data set, and the command that prints it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from torchrl_iql.data import OfflineDataset
from torchrl_iql.data.__main__ import main
from torchrl_iql.data.picture import DIMENSIONS, page

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None")

PLANE = spaces.Box(-np.inf, np.inf, (2,))


def walks(rewards: list[list[float]], ends: str, **changes: Any) -> OfflineDataset:
    """Make episodes with these rewards; each ends by a "t"ermination or by a time limit, "|"."""
    lengths = [len(each) for each in rewards]
    rows = sum(lengths)
    is_end = np.zeros(rows, bool)
    is_end[np.cumsum(lengths) - 1] = True
    terminates = np.repeat([end == "t" for end in ends], lengths)
    steps = np.arange(rows, dtype=np.float32)
    given = {
        "observations": np.stack([steps, np.full(rows, 7.0)], axis=1),
        "next_observations": np.stack([steps + 1, np.full(rows, 7.0)], axis=1),
        "actions": np.stack([steps / rows, -steps / rows], axis=1),
        "rewards": np.concatenate(rewards),
        "terminals": is_end & terminates,
        "timeouts": is_end & ~terminates,
    }
    return OfflineDataset.from_arrays("walks", **given | changes)


class TestValues:
    def test_of_a_box(self):
        dataset = walks(
            [[1.0, 2.0, 3.0], [0.5], [-4.0, 4.0]],
            "t|t",
            env_spec="Pendulum-v1",
            observation_space=PLANE,
            action_space=spaces.Box(-1, 1, (2,)),
            reference_scores=(-10.0, 10.0),
            reward_rule="minus_one",
        )
        report = dataset.report()
        assert (report.name, report.environment) == ("walks", "Pendulum-v1")
        assert (report.reward_rule, report.episode_rule) == ("minus_one", "as_stored")
        assert (report.episodes, report.transitions) == (3, 6)
        assert report.lengths == (1, 2.0, 3)
        assert report.returns == pytest.approx((0, 6.5 / 3, 6))
        assert report.normalized == pytest.approx(100 * (6.5 / 3 + 10) / 20)
        assert report.success_rate is None
        assert report.rewards == pytest.approx((-5, 6.5 / 6 - 1, 3))
        assert (report.terminations, report.time_outs) == (2, 1)
        assert (report.observation_size, report.constant_columns) == (2, (1,))
        assert report.nan_rows == 0
        expected = ((0, np.float32(5 / 6)), (-np.float32(5 / 6), 0))
        np.testing.assert_array_equal(report.action_ranges, expected)
        assert report.action_counts == ()

    def test_of_discrete_actions(self):
        dataset = walks(
            [[1.0, 2.0, 3.0]], "|", actions=[5, 6, 5], action_space=spaces.Discrete(3, start=5)
        )
        report = dataset.report()
        assert report.action_ranges == ()
        assert report.action_counts == (2, 1, 0)
        assert "3 categories, taken 2, 1, 0 times" in str(report)

    def test_of_nan_after_a_termination(self):
        after = np.zeros((4, 2))
        after[1] = np.nan
        arrays = {"observations": np.zeros((4, 2)), "next_observations": after}
        report = walks([[1.0, 2.0], [3.0, 4.0]], "t|", **arrays).report()
        assert report.nan_rows == 1
        assert report.constant_columns == (0, 1)
        assert "1 observations after a termination" in str(report)

    def test_of_an_end_that_is_both(self):
        both = np.array([False, True])
        episode = {
            "observations": np.zeros((3, 2)),
            "actions": np.zeros((2, 1)),
            "rewards": np.zeros(2),
            "terminations": both,
            "truncations": both,
        }
        report = OfflineDataset.from_episodes(
            "walk", [episode], observation_space=PLANE, action_space=spaces.Box(-1, 1, (1,))
        ).report()
        assert (report.terminations, report.time_outs) == (1, 0)

    @pytest.mark.parametrize(
        ("rewards", "rules", "expected"),
        [
            ([[0, 0], [0, 1], [1, 1]], {}, 2 / 3),
            ([[0, 0], [0, 1], [1, 1]], {"reward_rule": "minus_one"}, 2 / 3),
            ([[0, 0], [1, 1, 0]], {"episode_rule": "until_success"}, 1 / 2),
            ([[0, 0], [0, 1]], {"reward_rule": "return_range"}, 1 / 2),
            ([[0, 0], [0, 1], [1, 1]], {"reward_rule": "unit_rms"}, 2 / 3),
            ([[0, 0], [0, 2]], {"reward_rule": "unit_rms"}, None),
            ([[0, 0], [0, 2]], {}, None),
            ([[-1, 0], [-1, -1]], {}, None),
            ([[0, 0], [0, 0]], {}, 0),
            ([[1, 1], [1, 1]], {}, None),  # alive, as in CartPole
        ],
    )
    def test_success(self, rewards, rules, expected):
        assert walks(rewards, "|" * len(rewards), **rules).report().success_rate == expected

    def test_a_score_needs_whole_episodes(self):
        rules = {"reference_scores": (0.0, 2.0), "episode_rule": "until_success"}
        assert walks([[0.0, 1.0, 1.0]], "|", **rules).report().normalized is None

    def test_a_score_by_the_name_of_the_environment(self):
        given = {"action_space": spaces.Box(-1, 1, (2,)), "observation_space": PLANE}
        rewards = [[3234.3], [-20.272305]]  # D4RL's expert and random policy
        assert walks(rewards, "||", env_spec="Hopper-v5", **given).report().normalized == (
            pytest.approx(50)
        )
        given["reference_scores"] = (0.0, 1000.0)
        report = walks([[500.0]], "|", env_spec="Hopper-v5", **given).report()
        assert report.normalized == pytest.approx(50)

    def test_as_a_table(self):
        steps = [[0.0] * 1200, [1.0] * 34]
        assert str(walks(steps, "|t", env_spec=None).report()) == "\n".join(
            [
                "walks",
                "environment  not known",
                "rules        reward none, episodes as_stored",
                "episodes     2",
                "transitions  1,234",
                "length       min 34, median 617, max 1,200",
                "return       min 0, mean 17, max 34",
                "normalized   not known, needs reference scores and whole episodes",
                "success      50.0%",
                "reward       min 0, mean 0.02755, max 1",
                "ends         1 terminations, 1 time-outs",
                "observation  2 columns",
                "constant     columns 1",
                "NaN          0 observations after a termination",
                "action       2 dimensions, 0 to 0.999, -0.999 to 0",
            ]
        )

    def test_of_many_columns(self):
        table = str(
            walks(
                [[1.0, 2.0]],
                "|",
                observations=np.zeros((2, 30)),
                next_observations=np.zeros((2, 30)),
                actions=np.zeros((2, 10)),
            ).report()
        )
        assert "constant     columns 0, 1, 2, 3, 4, 5, 6, 7 and 22 more\n" in table
        assert table.endswith("0 to 0 and 2 more")


def inspect(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {"TORCHRL_IQL_CACHE": str(folder / "cache"), "MINARI_DATASETS_PATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "torchrl_iql.data", "inspect", *arguments],
        env=os.environ | variables | {"D4RL_DATASET_DIR": str(folder)},
        capture_output=True,
        text=True,
    )


class TestCommand:
    def test_on_a_minari_data_set(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        episode = EpisodeBuffer(
            observations=np.zeros((4, 3), np.float32),
            actions=np.zeros((3, 1), np.float32),
            rewards=[0.0, 1.0, 0.0],
            terminations=[False] * 3,
            truncations=[False] * 3,
        )
        env = gymnasium.make("Pendulum-v1")
        minari.create_dataset_from_buffers("test/swing-v0", [episode] * 2, env=env)
        done = inspect(
            tmp_path, "test/swing-v0", "--episodes", "until_success", "--reward", "minus_one"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(
            "test/swing-v0\nenvironment  Pendulum-v1\n"
            "rules        reward minus_one, episodes until_success\nepisodes     2\n"
            "transitions  4\n"
        )
        assert "success      100.0%\n" in done.stdout

    def test_on_d4rl_files(self, tmp_path):
        for name in ("one.hdf5", "two.hdf5"):
            with h5py.File(tmp_path / name, "w") as file:
                file["observations"] = np.random.default_rng(0).normal(size=(9, 4))
                file["actions"] = np.zeros((9, 2))
                file["rewards"] = np.ones(9)
                file["terminals"] = np.arange(9) == 3
        # No time limit tells where episodes end.
        sources = [str(tmp_path / name) for name in ("one.hdf5", "two.hdf5")]
        done = inspect(tmp_path, *sources, "--env", "Hopper-v5")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(
            f"{sources[0]} + {sources[1]}\nenvironment  Hopper-v5\n"
            "rules        reward none, episodes as_stored\nepisodes     4\ntransitions  16\n"
        )
        assert "ends         2 terminations, 2 time-outs\n" in done.stdout
        score = 100 * (4 + 20.272305) / (3234.3 + 20.272305)
        assert f"normalized   {score:.1f}\n" in done.stdout

    def test_on_a_broken_file(self, tmp_path):
        path = tmp_path / "broken.hdf5"
        path.write_bytes(b"\x89HDF\r\n\x1a\n and no more")
        done = inspect(tmp_path, str(path))
        assert done.returncode == 1
        assert done.stdout == ""
        assert (
            f"python -m torchrl_iql.data inspect: {path}: is no intact HDF5 file: " in done.stderr
        )
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "cache").exists()


class TestPicture:
    def test_bars_count_what_is_there(self):
        dataset = walks([[1.0, 2.0, 3.0], [0.5], [-4.0, 4.0]], "t|t", action_space=(-2, 3))
        figure = page(dataset)
        panels = {axes.get_title(loc="left").split(":")[0]: axes for axes in figure.axes}
        for name, values in (
            ("return of an episode", [6.0, 0.5, 0.0]),
            ("steps of an episode", [3, 1, 2]),
            ("reward of a step", [1, 2, 3, 0.5, -4, 4]),
        ):
            bars: Any = panels[name].patches
            counts, edges = np.histogram(values, len(bars))
            assert [bar.get_height() for bar in bars] == counts.tolist()
            np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1], atol=1e-5)
        for i in range(2):
            bars = panels[f"action {i}"].patches
            assert sum(bar.get_height() for bar in bars) == 6
            lines: Any = panels[f"action {i}"].lines
            assert [line.get_xdata()[0] for line in lines] == [-2, 3]
        assert "1 of 2 columns are constant" in panels["observations"].get_title(loc="left")
        assert (
            figure._suptitle.get_text() == "walks: 6 transitions, 3 episodes, of which 2 terminate"
        )  # pyright: ignore

    def test_of_any_data(self, tmp_path: Path):
        many = spaces.Box(-np.inf, np.inf, (30,))
        for name, changes in {
            "discrete": {"actions": [5, 6, 5], "action_space": spaces.Discrete(3, start=5)},
            "unbounded": {"actions": np.zeros((3, 30)), "action_space": many},
            "bytes": {"observations": np.zeros((3, 500), np.uint8), "next_observations": None},
            "wide": {"reward_rule": "minus_one", "actions": [[1.0, 0], [0, 0], [0, -1]]},
        }.items():
            figure = page(walks([[1e9, -1e-9, 0.0]], "|", **changes))
            figure.savefig(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
            drawn = [axes for axes in figure.axes if axes.get_visible()]
            assert len(drawn) == 4 + {"unbounded": DIMENSIONS, "discrete": 1}.get(name, 2)
        with pytest.raises(ValueError, match="there are no transitions to draw"):
            page(OfflineDataset.empty("CartPole-v1"))

    def test_the_command_draws(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        source, png = tmp_path / "log.csv", tmp_path / "log.png"
        source.write_text("observations,actions,rewards,terminals\n" + "0.5,0.1,1,0\n" * 9)
        assert main(["inspect", str(source), "--plot", str(png)]) == 0
        assert png.read_bytes().startswith(b"\x89PNG")
        assert main(["inspect", str(source), "--plot", str(tmp_path / "log.xyz")]) == 1
        assert "inspect: Format 'xyz' is not supported" in capsys.readouterr().err
        assert main(["inspect", str(source), "--plot", str(tmp_path / "none/log.png")]) == 1
