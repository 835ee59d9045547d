"""The cache of finished transitions."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from episodes import FORMATS, MARKS, assert_same, leaves, walk, with_value, write
from torchrl_iql.data import OfflineDataset, load

pytestmark = MARKS


def load_again_and_again(source: str, cache_folder: Path) -> bytes:
    """Load and remove the entry in turns; in a process of its own."""
    warnings.simplefilter("error")
    for _ in range(20):
        contents = str(leaves(load(source).transitions)).encode()
        for entry in cache_folder.glob("*.tdz"):
            entry.unlink(missing_ok=True)
    return contents


class TestCache:
    @pytest.fixture
    def parsed(self, monkeypatch) -> list[str]:
        """List the names of the data sets that were parsed."""
        names = []
        from_episodes = OfflineDataset.from_episodes

        def recorded(name: str, *args: Any, **kwargs: Any) -> OfflineDataset:
            names.append(name)
            return from_episodes(name, *args, **kwargs)

        monkeypatch.setattr(OfflineDataset, "from_episodes", recorded)
        return names

    @pytest.mark.parametrize("data_format", FORMATS)
    def test_a_second_start_gives_the_same_without_parsing(self, root, parsed, data_format):
        observations = with_value(np.nan, (3, 0), (4, 3)).astype(np.float32)
        end = np.array([False, False, True])
        changes = {"actions": np.zeros((3, 1), np.float32), "rewards": np.array([0.0, 1.0, 0.0])}
        source = write(
            walk(3, observations=observations, terminations=end, **changes),
            walk(3, observations=observations[:, ::-1].copy() + 1, terminations=end, **changes),
            env=gymnasium.make("Pendulum-v1", max_episode_steps=70).spec,
            ref_min_score=-5.0,
            ref_max_score=20.0,
            data_format=data_format,
        )
        rules = {"reward": "minus_one", "episodes": "as_stored"}
        expected = load(source, cache=False, **rules)
        assert_same(load(source, **rules), expected)
        assert_same(load(source, **rules), expected)
        assert_same(load(root / source, **rules), replace(expected, name=str(root / source)))
        assert parsed == [source, source]

    def test_is_not_touched_if_unwanted(self, cache_folder):
        load(write(walk(3)), cache=False)
        assert not cache_folder.exists()

    def test_another_source_is_parsed_and_replaces_the_entry(self, cache_folder, parsed):
        source = write(walk(3))
        other = write(walk(3, start=2), dataset_id="test/others-v0")
        for name in (source, other):
            load(name)
        minari.delete_dataset(source)
        write(walk(3, start=1))
        assert load(source).transitions["observation"][:, 0].tolist() == [1, 2, 3]
        assert load(other).transitions["observation"][:, 0].tolist() == [2, 3, 4]
        assert parsed == [source, other, source]
        assert len(list(cache_folder.iterdir())) == 2

    @pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
    def test_a_touched_source_is_parsed(self, root, parsed, file):
        source = write(walk(3))
        load(source)
        path = root / source / "data" / file
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        load(source)
        assert parsed == [source, source]

    def test_other_rules_are_parsed(self, parsed):
        source = write(walk(3, rewards=[0.0, 1.0, 0.0]))
        rules = [{}, {"reward": "minus_one"}, {"episodes": "until_success"}]
        for _ in range(2):
            assert [
                load(source, **rule).transitions["next", "reward"].flatten().tolist()
                for rule in rules
            ] == [[0, 1, 0], [-1, 0, -1], [0, 1]]
        assert len(parsed) == 3

    def test_what_can_not_be_loaded_is_not_kept(self, cache_folder):
        source = write(walk(3, rewards=np.array([0.0, np.nan, 0.0])))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
                load(source)
        assert not cache_folder.exists()

    def test_changes_in_memory_stay_there(self, cache_folder):
        source = write(walk(3))
        load(source)
        (entry,) = cache_folder.iterdir()
        contents = entry.read_bytes()
        load(source).transitions["observation"].zero_()
        assert entry.read_bytes() == contents

    @pytest.mark.parametrize("at", np.linspace(0, 1, 30, endpoint=False))
    def test_damaged_bytes_do_no_harm(self, cache_folder, at):
        source = write(walk(3))
        expected = load(source)
        (entry,) = cache_folder.iterdir()
        contents = bytearray(entry.read_bytes())
        contents[int(at * len(contents))] ^= 0xFF
        entry.write_bytes(contents)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(load(source), expected)
        # Some bytes, such as padding, do not matter.
        assert all(str(entry) in str(warning.message) for warning in caught)

    @pytest.mark.parametrize("damage", ["an array", "cut off", "empty"])
    def test_damage_is_reported_once(self, cache_folder, parsed, damage):
        source = write(walk(3))
        expected = load(source)
        (entry,) = cache_folder.iterdir()
        contents = entry.read_bytes()
        observations = expected.transitions["observation"].numpy().tobytes()
        entry.write_bytes(
            {
                "an array": contents.replace(observations, bytes(len(observations))),
                "cut off": contents[: len(contents) // 2],
                "empty": b"",
            }[damage]
        )
        with pytest.warns(UserWarning, match=rf"^the cache entry {entry} is damaged") as caught:
            assert_same(load(source), expected)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(load(source), expected)
        assert parsed == [source, source]

    def test_an_interrupted_write_leaves_nothing(self, cache_folder, monkeypatch):
        def interrupted(content: TensorDict, path: str, **options: Any) -> None:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt

        source = write(walk(3))
        with monkeypatch.context() as patch:
            patch.setattr(TensorDict, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(source)
        assert not list(cache_folder.iterdir())
        load(source)
        assert [path.suffix for path in cache_folder.iterdir()] == [".tdz"]

    def test_what_a_killed_process_left_is_removed_a_day_later(self, cache_folder):
        for name, age in (("old", 86_401), ("new", 0)):
            folder = cache_folder / f".unfinished-{name}"
            folder.mkdir(parents=True)
            os.utime(folder, (0, time.time() - age))
        load(write(walk(3)))
        assert [path.name for path in cache_folder.glob(".*")] == [".unfinished-new"]

    @pytest.mark.parametrize("obstacle", ["not a folder", "read-only", "full"])
    def test_without_room_the_data_are_loaded(self, cache_folder, monkeypatch, obstacle):
        def full(content: TensorDict, path: str, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", path)

        if obstacle == "not a folder":
            cache_folder.touch()
        elif obstacle == "read-only":
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere")
            cache_folder.mkdir(mode=0o500)
        else:
            monkeypatch.setattr(TensorDict, "save", full)
        source = write(walk(3))
        message = f"^could not write the cache entry {cache_folder}/"
        with pytest.warns(UserWarning, match=message) as caught:
            assert_same(load(source), load(source, cache=False))
        assert caught[0].filename == __file__

    @pytest.mark.slow
    def test_two_processes(self, cache_folder):
        source = write(walk(3), walk(200))
        expected = str(leaves(load(source).transitions)).encode()
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
            found = [processes.submit(load_again_and_again, source, cache_folder) for _ in range(2)]
            assert [future.result() for future in found] == [expected] * 2
        assert not list(cache_folder.iterdir())

    def test_an_entry_that_another_process_removes_while_it_is_read_is_not_damaged(
        self, cache_folder, monkeypatch, parsed
    ):
        source = write(walk(3))
        load(source)
        (entry,) = cache_folder.glob("*.tdz")
        real = zipfile.is_zipfile

        def removed_first(path: Path) -> bool:
            entry.unlink(missing_ok=True)
            return real(path)

        monkeypatch.setattr(zipfile, "is_zipfile", removed_first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(source)
        assert len(parsed) == 2 and entry.exists()

    def test_transitions_can_be_sent_to_a_process(self):
        source = write(walk(3))
        load(source)
        transitions = load(source).transitions
        assert not transitions["observation"].is_shared()
        assert transitions.share_memory_()["observation"].is_shared()

    @pytest.mark.parametrize("kept_by", ["cache", "tensordict"])
    def test_a_buffer_on_the_cpu_does_not_copy(self, tmp_path, kept_by):
        source = write(walk(3))
        dataset = load(source)
        if kept_by == "cache":
            dataset = load(source)
        else:
            dataset = replace(dataset, transitions=dataset.transitions.memmap(tmp_path / "mapped"))
        storage = dataset.replay_buffer(2).storage[:]
        for key, value in dataset.transitions.items(include_nested=True, leaves_only=True):
            assert storage[key].data_ptr() == value.data_ptr()
        batch = dataset.replay_buffer(2, generator=torch.Generator().manual_seed(0)).sample()
        assert batch["observation"][:, 0].equal(-batch["observation"][:, 1])
