"""D4RL files, against the preprocessing of the official code, written row by row."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from episodes import refused_bytes
from torchrl_iql.data import OfflineDataset, load

NAME = "hopper_medium-v2.hdf5"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "torchrl_iql"
    monkeypatch.setenv("TORCHRL_IQL_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def d4rl_folder(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("home") / "datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    return folder


def recorded(rows: int = 300, seed: int = 0, size: int = 11, **changes: Any) -> dict[str, Any]:
    """Make random episodes' rows: terminations, time-outs, both at once, episodes of one row."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(rows, size)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.normal(1, 2, rows).astype(np.float32),
        "terminals": rng.random(rows) < 0.06,
        "timeouts": rng.random(rows) < 0.06,
    }
    if rows == 300:
        arrays["actions"][0], arrays["actions"][1] = 1, -1
        arrays["terminals"][[40, 50]] = True
        arrays["timeouts"][[40, 41, 42]] = True
    arrays |= changes
    return {key: values for key, values in arrays.items() if values is not None}


def with_successors(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the same with next observations, which jump where an episode ends."""
    successors = np.roll(arrays["observations"], -1, axis=0)
    ends = arrays["terminals"] | arrays["timeouts"]
    successors[ends] += 100
    return arrays | {"next_observations": successors}


def write(path: Path, arrays: dict[str, Any], **infos: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
        for key, values in infos.items():
            file[f"infos/{key}"] = values
        file["metadata/algorithm"] = "SAC"
    return path


def official(arrays: dict[str, Any], time_limit: int | None = None) -> SimpleNamespace:
    """Return what IQL's official code makes of a file: d4rl.qlearning_dataset and D4RLDataset."""
    kept, counter = [], 0
    for row in range(len(arrays["rewards"]) - 1):
        last_count = None if time_limit is None else time_limit - 1
        if arrays["timeouts"][row] if "timeouts" in arrays else counter == last_count:
            counter = 0
            continue
        if arrays["terminals"][row]:
            counter = 0
        kept.append(row)
        counter += 1

    found = SimpleNamespace(
        observations=np.stack([arrays["observations"][i] for i in kept]),
        next_observations=np.stack([arrays["observations"][i + 1] for i in kept]),
        actions=np.stack([arrays["actions"][i] for i in kept]).clip(-1 + 1e-5, 1 - 1e-5),
        rewards=np.stack([arrays["rewards"][i] for i in kept]),
        masks=np.stack([1.0 - arrays["terminals"][i] for i in kept]),
        returns=[],
        lengths=[],
    )
    total, length = 0.0, 0
    for i in range(len(kept)):
        total, length = total + float(found.rewards[i]), length + 1
        jump = i + 1 == len(kept) or (
            np.linalg.norm(found.observations[i + 1] - found.next_observations[i]) > 1e-6
        )
        if jump or found.masks[i] == 0:
            found.returns.append(total)
            found.lengths.append(length)
            total, length = 0.0, 0
    return found


def limited(steps: int) -> EnvSpec:
    spec = gymnasium.make("Pendulum-v1", max_episode_steps=steps).spec
    assert spec is not None
    return spec


def assert_official(dataset: OfflineDataset, expected: SimpleNamespace, rewards: Any) -> None:
    transitions, following = dataset.transitions, dataset.transitions["next"]
    np.testing.assert_array_equal(transitions["observation"], expected.observations)
    np.testing.assert_array_equal(following["observation"], expected.next_observations)
    np.testing.assert_array_equal(transitions["action"], expected.actions)
    np.testing.assert_array_equal(1.0 - following["terminated"][:, 0].float(), expected.masks)
    np.testing.assert_allclose(following["reward"][:, 0], rewards, rtol=3e-7, atol=1e-12)
    assert dataset.episode_lengths.tolist() == expected.lengths
    np.testing.assert_allclose(dataset.episode_returns, expected.returns, rtol=1e-12)
    ends = dataset.episode_starts + dataset.episode_lengths - 1
    assert following["done"].nonzero()[:, 0].equal(ends)


class TestOfficial:
    @pytest.mark.parametrize("last", ["terminals", "timeouts", None])
    @pytest.mark.parametrize("seed", range(3))
    def test_locomotion_with_time_outs(self, tmp_path, seed, last):
        arrays = recorded(seed=seed)
        for key in ("terminals", "timeouts"):
            arrays[key][-1] = key == last
        expected = official(arrays)
        dataset = load(write(tmp_path / NAME, arrays), reward="return_range")
        span = max(expected.returns) - min(expected.returns)
        assert_official(dataset, expected, expected.rewards * (1000 / span))

    @pytest.mark.parametrize("seed", range(3))
    def test_next_observations_add_the_time_out_rows(self, tmp_path, seed):
        """As in the v2 files: the rows that the official code drops are kept, and no other differs."""
        arrays = recorded(seed=seed)
        arrays["terminals"] &= ~arrays["timeouts"]
        arrays["terminals"][-1], arrays["timeouts"][-1] = False, True
        expected = official(arrays)
        dataset = load(write(tmp_path / NAME, with_successors(arrays)))
        dropped = dataset.transitions["next", "truncated"][:, 0]
        np.testing.assert_array_equal(dropped, arrays["timeouts"])
        rest = dataset.transitions[~dropped]
        following, bootstrapped = rest["next"], expected.masks == 1
        np.testing.assert_array_equal(rest["observation"], expected.observations)
        np.testing.assert_array_equal(rest["action"], expected.actions)
        np.testing.assert_array_equal(following["reward"][:, 0], expected.rewards)
        np.testing.assert_array_equal(1.0 - following["terminated"][:, 0].float(), expected.masks)
        np.testing.assert_array_equal(
            following["observation"][bootstrapped], expected.next_observations[bootstrapped]
        )

    @pytest.mark.parametrize("limit", [2, 3, 7, 19, 299, 300, 1000])
    @pytest.mark.parametrize("seed", range(3))
    def test_locomotion_without_time_outs(self, tmp_path, seed, limit):
        arrays = recorded(seed=seed, timeouts=None)
        arrays["terminals"][limit - 1 : limit + 1] = True
        expected = official(arrays, limit)
        path = write(tmp_path / NAME, arrays)
        dataset = load(path, reward="return_range", env=limited(limit))
        span = max(expected.returns) - min(expected.returns)
        assert_official(dataset, expected, expected.rewards * (1000 / span))

    def test_ant_maze(self, tmp_path):
        rng = np.random.default_rng(0)
        rewards = (rng.random(2000) < 0.01).astype(np.float32)
        arrays = recorded(
            2000,
            size=29,
            rewards=rewards,
            terminals=rewards == 1,
            timeouts=np.arange(2000) % 101 == 100,
        )
        path = write(tmp_path / "antmaze.hdf5", arrays, goal=rng.normal(size=(2000, 2)))
        expected = official(arrays)
        stored = load(path, reward="minus_one")
        assert_official(stored, expected, expected.rewards - 1)
        assert stored.transitions["observation"].shape[1] == 29
        # Every success is a termination already.
        cut = load(path, reward="minus_one", episodes="until_success")
        assert (cut.transitions == stored.transitions).all()
        assert stored.transitions["next", "terminated"].sum() > 5

    @pytest.mark.filterwarnings("error::RuntimeWarning")
    def test_ant_maze_with_nan(self, tmp_path):
        """The maze is looked for among its positions, and nothing but the error says what is wrong."""
        arrays = recorded(200, size=29, actions=np.zeros((200, 8), np.float32))
        arrays["observations"][7:, 1] = np.nan
        with pytest.raises(ValueError, match=r"observations\[\d+, 1\] is nan"):
            load(write(tmp_path / "own.hdf5", arrays))

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_columns_and_numbers_as_flags(self, tmp_path, dtype):
        arrays = recorded()
        expected = official(arrays)
        changed = arrays | {
            key: arrays[key][:, None].astype(dtype) for key in ("rewards", "terminals", "timeouts")
        }
        changed["observations"] = arrays["observations"].astype(dtype)
        assert_official(load(write(tmp_path / NAME, changed)), expected, expected.rewards)


class TestNextObservations:
    @pytest.mark.parametrize("has_timeouts", [True, False])
    def test_every_row_is_kept(self, tmp_path, has_timeouts):
        arrays = with_successors(recorded())
        stored = arrays if has_timeouts else {k: v for k, v in arrays.items() if k != "timeouts"}
        dataset = load(write(tmp_path / NAME, stored))
        transitions, following = dataset.transitions, dataset.transitions["next"]
        np.testing.assert_array_equal(transitions["observation"], arrays["observations"])
        np.testing.assert_array_equal(following["observation"], arrays["next_observations"])
        np.testing.assert_array_equal(following["reward"][:, 0], arrays["rewards"])
        np.testing.assert_array_equal(following["terminated"][:, 0], arrays["terminals"])
        # A row that is both terminates, and the file ends where it stops.
        truncated = arrays["timeouts"] & ~arrays["terminals"]
        truncated[-1] = not arrays["terminals"][-1]
        np.testing.assert_array_equal(following["truncated"][:, 0], truncated)
        assert dataset.episode_returns.sum().item() == pytest.approx(arrays["rewards"].sum())

    def test_a_jump_ends_an_episode_among_time_outs(self, tmp_path):
        arrays = with_successors(recorded(20, terminals=np.zeros(20, bool)))
        arrays["timeouts"] = np.arange(20) == 15
        arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
        arrays["next_observations"][9] += 2e-6
        arrays["next_observations"][3] += 1e-8
        dataset = load(write(tmp_path / NAME, arrays))
        assert dataset.episode_lengths.tolist() == [10, 6, 4]
        np.testing.assert_array_equal(
            dataset.transitions["next", "observation"][9], arrays["next_observations"][9]
        )

    def test_the_time_limit_is_not_used(self, tmp_path):
        path = write(tmp_path / NAME, with_successors(recorded(20)))
        expected = load(path, cache=False).episode_lengths
        assert load(path, env=limited(2), cache=False).episode_lengths.equal(expected)


class TestFile:
    def test_spaces_and_environment(self, tmp_path):
        path = write(tmp_path / NAME, recorded())
        dataset = load(path)
        assert dataset.name == str(path)
        assert dataset.observation_space == spaces.Box(-np.inf, np.inf, (11,))
        assert dataset.action_space == spaces.Box(-1, 1, (3,))
        assert dataset.env_spec is dataset.reference_scores is None
        named = load(str(path), env="Hopper-v5")
        assert named.env_spec == gymnasium.spec("Hopper-v5")
        with pytest.raises(ValueError, match=r"^unknown environment 'Hoper-v5': .*Hopper"):
            load(path, env="Hoper-v5")

    def test_success_in_infos(self, tmp_path):
        success = np.zeros(20, bool)
        success[[4, 6]] = True
        arrays = recorded(20, terminals=np.zeros(20), timeouts=np.arange(20) == 9)
        path = write(tmp_path / NAME, arrays, success=success)
        dataset = load(path, episodes="until_success")
        assert dataset.episode_lengths.tolist() == [5, 9]
        assert dataset.transitions["next", "terminated"].nonzero()[:, 0].tolist() == [4]
        path = write(tmp_path / "other.hdf5", arrays, goal=success)
        message = r"other.hdf5, episode 0 \(rows 0 to 8\): .* found infos \['goal'\]"
        with pytest.raises(ValueError, match=message):
            load(path, episodes="until_success")

    def test_d4rls_own_folder(self, d4rl_folder, tmp_path, monkeypatch):
        d4rl_folder.mkdir()
        kept = write(d4rl_folder / "own.hdf5", recorded())
        found = load("own.hdf5")
        assert found.name == "own.hdf5"
        assert (found.transitions == load(kept).transitions).all()
        monkeypatch.delenv("D4RL_DATASET_DIR")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(FileNotFoundError, match=rf"nor {tmp_path}/.d4rl/datasets/own.hdf5"):
            load("own.hdf5")

    @pytest.mark.parametrize("as_type", [str, Path])
    def test_a_mistyped_path_is_no_other_file(self, d4rl_folder, tmp_path, as_type):
        d4rl_folder.mkdir()
        write(d4rl_folder / NAME, recorded())
        path = tmp_path / NAME
        with pytest.raises(
            FileNotFoundError, match=f"^no D4RL file {path}; a name without a folder"
        ):
            load(as_type(path))

    @pytest.mark.parametrize("name", ["mine.h5", "mine"])
    def test_any_file_is_one(self, tmp_path, name):
        path = write(tmp_path / name, recorded())
        assert len(load(path).transitions) == len(load(str(path)).transitions) > 200
        path.write_text("no data")
        with pytest.raises(ValueError, match=f"^{path}: is no intact HDF5 file"):
            load(path)

    def test_a_second_start_does_not_read_the_rows(self, tmp_path, cache_folder, monkeypatch):
        path = write(tmp_path / NAME, recorded())
        first = load(path, reward="return_range").transitions
        monkeypatch.setattr("torchrl_iql.data.d4rl._array", None)
        # The time limit of the environment is not needed.
        for env in (None, "Hopper-v5", limited(3)):
            assert (load(path, reward="return_range", env=env).transitions == first).all()
        assert len(list(cache_folder.iterdir())) == 1

    def test_the_cache_knows_the_time_limit(self, tmp_path):
        path = write(tmp_path / NAME, recorded(timeouts=None, terminals=np.zeros(300)))
        for _ in range(2):
            with pytest.warns(UserWarning, match="taken to end at terminals and after 5 steps"):
                assert load(path, env=limited(5)).episode_lengths[0].item() == 4
            with pytest.warns(UserWarning, match="taken to end at terminals and after 9 steps"):
                assert load(path, env=limited(9)).episode_lengths[0].item() == 8

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rewards": None}, "has no array rewards; found actions, metadata, observations, "),
            ({"observations": None, "actions": None}, "has no array observations, actions; found"),
            (
                {
                    "observations": None,
                    "observations/image": np.zeros(2),
                    "observations/arm": np.zeros(2),
                },
                "has no array observations; .*observations is a group of arm, image: .*from_arrays",
            ),
            (
                {"observations": np.full((20, 2), b"a")},
                r"observations has dtype \|S1, expected numbers",
            ),
            ({"actions": np.zeros((20, 1), int)}, "actions has dtype int64, expected floats, or"),
            ({"actions": ["a"] * 20}, "actions has dtype object, expected floats"),
            (
                {"rewards": ["a"] * 20},
                r"episode 0 \(rows \d.*\): rewards has dtype object, expected",
            ),
            ({"terminals": ["no"] * 20}, "terminals has dtype object, expected numbers"),
            (
                {"observations": np.zeros(20)},
                r"observations has shape \[20\], expected \[n, size\]",
            ),
            ({"actions": np.zeros(20)}, r"actions has shape \[20\], expected \[n, size\]"),
            ({"rewards": 1.0}, r"rewards has shape \[\], expected 20 rows, as the others"),
            (
                {"rewards": np.zeros((20, 2))},
                r"episode 0 \(rows \d.*\): rewards has shape \[\d+, 2\], expected \[T\]",
            ),
            (
                {"terminals": np.zeros(19)},
                r"terminals has shape \[19\], expected 20 rows",
            ),
            (
                {"timeouts": np.zeros(21)},
                r"timeouts has shape \[21\], expected 20 rows",
            ),
            (
                {"next_observations": np.zeros((20, 10))},
                r"next_observations has shape \[20, 10\], expected \[20, 11\]",
            ),
            ({"terminals": np.arange(20)}, r"terminals\[2\] is 2, expected 0 or 1"),
            ({"timeouts": np.full(20, np.nan)}, r"timeouts\[0\] is nan, expected 0 or 1"),
            ({"timeouts": None}, "without timeouts, next_observations and episode_ids, the env"),
            (
                {"actions": np.full((20, 1), 1.5)},
                r"episode 0 \(rows \d.*\): actions\[0, 0\] is 1.5, outside \[-1, 1\]",
            ),
            (
                {"rewards": np.full(20, np.inf), "timeouts": np.arange(20) == 13},
                r"episode 0 \(rows 0 to 12\): rewards\[0\] is inf",
            ),
            (
                {"rewards": np.full(20, 1e39), "timeouts": np.arange(20) == 13},
                r"episode 0 \(rows 0 to 12\): rewards\[0\] is 1e\+39, expected a finite float32",
            ),
            (
                {"next_observations": np.full((20, 11), np.nan)},
                r"next_observations\[0, 0\] is nan",
            ),
            ({"timeouts": np.ones(20)}, "the data set has no episodes"),
        ],
    )
    def test_broken(self, tmp_path, cache_folder, changes, message):
        arrays = recorded(20, **{"terminals": np.zeros(20)} | changes)
        path = write(tmp_path / NAME, arrays)
        with pytest.raises(ValueError, match=f"^{path}[:,] {message}"):
            load(path)
        assert not cache_folder.exists()

    def test_the_environment_has_no_time_limit(self, tmp_path):
        path = write(tmp_path / NAME, recorded(timeouts=None))
        spec = limited(7)
        spec.max_episode_steps = None
        with pytest.raises(ValueError, match=rf"^{path}: .* name an environment that has one"):
            load(path, env=spec)

    def test_damaged_bytes(self, tmp_path, cache_folder):
        path = write(tmp_path / NAME, recorded(20))
        contents = path.read_bytes()
        for broken in (contents[: len(contents) // 2], b"", b"<html>" * 100):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=rf"^{path}: is no intact HDF5 file: .+"):
                load(path)
        assert refused_bytes(path, contents, every=37) > 10
        assert not cache_folder.exists()

    def test_damaged_rows(self, tmp_path):
        path = tmp_path / NAME
        arrays = recorded(300)
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                file.create_dataset(key, data=values, compression="gzip")
            chunk = file["observations"].id.get_chunk_info(0)
        contents = bytearray(path.read_bytes())
        contents[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"^{path}: observations can not be read: .*filter"):
            load(path)


class Server(ThreadingHTTPServer):
    """Serves one file, wholly or in part."""

    def __init__(self, contents: bytes) -> None:
        self.contents, self.sent, self.status, self.paths = contents, len(contents), 200, []
        self.chunked = False
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(self.server.status)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(self.server.contents)))
        self.end_headers()
        if self.server.chunked:
            self.wfile.write(f"{len(self.server.contents):x}\r\n".encode())
        self.wfile.write(self.server.contents[: self.server.sent])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class TestDownload:
    @pytest.fixture
    def server(self, tmp_path, monkeypatch) -> Iterator[Server]:
        contents = write(tmp_path / "served", recorded(3000)).read_bytes()
        with Server(contents) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr("torchrl_iql.data.d4rl.URL", url)
            yield server
            server.shutdown()

    @pytest.mark.parametrize("source", [NAME, Path(NAME), "walker2d_full_replay-v2.hdf5"])
    def test_a_missing_file(self, server, d4rl_folder, tmp_path, source):
        found = load(source)
        assert (found.transitions == load(write(tmp_path / NAME, recorded(3000))).transitions).all()
        assert server.paths == [f"/gym_mujoco_v2/{source}"]
        assert [path.name for path in d4rl_folder.iterdir()] == [str(source)]
        load(source)
        assert len(server.paths) == 1

    @pytest.mark.parametrize(("end", "folder"), [("", "ant_maze_new"), ("_fixed", "ant_maze_v2")])
    def test_a_missing_file_of_antmaze(self, server, d4rl_folder, end, folder):
        name = f"Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse{end}.hdf5"
        assert len(load(name).transitions)
        assert server.paths == [f"/{folder}/{name}"]

    def test_a_path_is_not_downloaded(self, server, d4rl_folder):
        with pytest.raises(FileNotFoundError, match=f"^no D4RL file some/folder/{NAME}; a name"):
            load(f"some/folder/{NAME}")
        assert not server.paths and not d4rl_folder.exists()

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            ({"sent": 0}, "truncated file|file signature not found|file size is 0"),
            ({"sent": 30_000}, "truncated file"),
            ({"sent": -1}, "truncated file"),
            ({"chunked": True, "sent": 30_000}, "IncompleteRead"),
            ({"status": 404}, "HTTP Error 404"),
            ({"contents": b"<html>moved</html>"}, "file signature not found"),
        ],
        ids=str,
    )
    def test_that_fails_leaves_nothing(self, server, d4rl_folder, cache_folder, failure, reason):
        vars(server).update(failure)
        message = rf"^no D4RL file {NAME}, nor {d4rl_folder}/{NAME}, .* from http://\S+/{NAME} "
        with pytest.raises(FileNotFoundError, match=f"{message}failed: .*({reason})"):
            load(NAME)
        assert server.paths
        assert not list(d4rl_folder.iterdir())
        assert not cache_folder.exists()

    def test_without_a_server(self, monkeypatch, d4rl_folder):
        monkeypatch.setattr("torchrl_iql.data.d4rl.URL", "http://127.0.0.1:1")
        with pytest.raises(FileNotFoundError, match=rf"127.0.0.1:1/\S+/{NAME} failed: .*refused"):
            load(NAME)
        assert not list(d4rl_folder.iterdir())

    def test_without_room(self, server, d4rl_folder):
        d4rl_folder.touch()
        with pytest.raises(FileNotFoundError, match=rf"{NAME} failed: .*exists"):
            load(NAME)

    def test_unwanted(self, server, d4rl_folder):
        with pytest.raises(FileNotFoundError, match=f"nor {d4rl_folder}/{NAME}, and download is F"):
            load(NAME, download=False)
        assert not server.paths

    @pytest.mark.parametrize("name", ["hopper_medium-v0.hdf5", "my_hopper_medium-v2.hdf5"])
    def test_other_names_are_not_asked_for(self, server, d4rl_folder, name):
        message = rf"^no D4RL file {name}, nor {d4rl_folder}/{name}; only AntMaze and the v2 files"
        with pytest.raises(FileNotFoundError, match=message):
            load(name)
        assert not server.paths


class TestSeveral:
    def test_are_one(self, tmp_path):
        parts = [recorded(300, seed) for seed in range(2)]
        paths = [write(tmp_path / f"{i}.hdf5", part) for i, part in enumerate(parts)]
        single = [load(path) for path in paths]
        both = load(paths, reward="return_range")
        assert both.name == f"{paths[0]} + {paths[1]}"
        returns = np.concatenate([each.episode_returns for each in single])
        rewards = np.concatenate([each.transitions["next", "reward"] for each in single])
        np.testing.assert_array_equal(both.episode_returns, returns)
        np.testing.assert_allclose(
            both.transitions["next", "reward"],
            rewards * (1000 / (returns.max() - returns.min())),
            rtol=3e-7,
        )
        observations = np.concatenate([each.transitions["observation"] for each in single])
        np.testing.assert_array_equal(both.transitions["observation"], observations)
        assert load(paths[::-1]).episode_returns[0] == single[1].episode_returns[0]

    def test_are_cached_as_one(self, tmp_path, cache_folder, monkeypatch):
        paths = [write(tmp_path / f"{i}.hdf5", recorded(300, i)) for i in range(2)]
        first = load(paths)
        assert len(list(cache_folder.iterdir())) == 1
        with monkeypatch.context() as patch:
            patch.setattr("torchrl_iql.data.d4rl._array", None)
            assert (load(paths).transitions == first.transitions).all()
        for i in range(2):
            write(paths[i], recorded(200 + i, 7))
            assert len(load(paths).transitions) < len(first.transitions)
            first = load(paths)

    def test_that_differ(self, tmp_path, cache_folder):
        one = write(tmp_path / "one.hdf5", recorded(20))
        two = write(tmp_path / "two.hdf5", recorded(20, size=4))
        message = rf"^{two} can not be joined with {one}: its observation space is Box\(.*4,.*11,"
        with pytest.raises(ValueError, match=message):
            load([one, two])
        assert not cache_folder.exists()

    def test_none(self):
        with pytest.raises(ValueError, match="there is no source"):
            load([])

    def test_an_error_names_the_one(self, tmp_path):
        good = write(tmp_path / "good.hdf5", recorded(20))
        bad = write(tmp_path / "bad.hdf5", recorded(20, rewards=np.full(20, np.nan)))
        message = rf"^{good} \+ {bad}, episode 0 \(rows \d.*\) of {bad}: rewards\[0\] is nan"
        with pytest.raises(ValueError, match=message):
            load([good, bad])


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_time_outs_a_row_late_are_told(shift: int, tmp_path: Path) -> None:
    """The row before is then followed by the first of another episode: a jump that no other step makes."""
    rng = np.random.default_rng(0)
    steps = rng.normal(scale=0.1, size=(10, 30, 2)).cumsum(1) + rng.normal(scale=5, size=(10, 1, 2))
    observations = np.concatenate([steps.reshape(300, 2), rng.normal(size=(300, 3))], 1)
    arrays = {
        "observations": observations.astype(np.float32),
        "actions": rng.uniform(-1, 1, (300, 2)).astype(np.float32),
        "rewards": rng.normal(size=300).astype(np.float32),
        "terminals": np.zeros(300, bool),
        "timeouts": np.roll(np.arange(300) % 30 == 29, shift),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(write(tmp_path / "walks.hdf5", arrays))
    told = [str(each.message) for each in caught if "jumps where episodes end" in str(each.message)]
    assert len(told) == (shift == 1)
    assert all(
        ": number 0 of" in each or ": number 1 of" in each for each in told
    )  # those that walk
