"""Minari's data sets of every format, whole, damaged and missing, and what is done with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces

from episodes import FORMATS, MARKS, PLANE, UNIT, assert_same, joined, walk, write
from torchrl_iql.data import OfflineDataset, load
from torchrl_iql.data.rewards import RewardTransform

pytestmark = MARKS


class TestSource:
    @pytest.mark.parametrize("data_format", FORMATS)
    def test_folders_hold_what_the_id_names(self, root, data_format):
        source = write(walk(3), walk(2, start=5), data_format=data_format)
        expected = load(source).transitions
        for folder in (root / source, root / source / "data", str(root / source)):
            assert (load(folder).transitions == expected).all()
        assert load(source).name == source
        assert load(root / source).name == str(root / source)

    def test_metadata(self):
        specs = [gymnasium.make("Pendulum-v1", max_episode_steps=n).spec for n in (70, 90)]
        scores = {"ref_min_score": -5.0, "ref_max_score": 20.0}
        pendulum = walk(3, observations=np.zeros((4, 3), np.float32))
        for i, (options, limit, expected) in enumerate(
            [
                ({"env": specs[0], "eval_env": specs[1]} | scores, 90, (-5.0, 20.0)),
                ({"env": specs[0]}, 70, None),
            ]
        ):
            dataset = load(write(pendulum, dataset_id=f"test/pendulum-v{i}", **options))
            assert dataset.env_spec is not None
            assert dataset.env_spec.max_episode_steps == limit
            assert dataset.reference_scores == expected
        assert load(write(walk(3))).env_spec is None

    def test_rules_are_recorded(self):
        dataset = load(
            write(walk(2, rewards=[0.0, 1.0])), reward="minus_one", episodes="until_success"
        )
        assert (dataset.reward_rule, dataset.episode_rule) == ("minus_one", "until_success")

    @pytest.mark.parametrize(
        ("of_load", "of_episodes", "allowed"),
        [
            ("reward", "reward_rule", "none, minus_one, return_range, unit_rms"),
            ("episodes", "episode_rule", "as_stored, until_success"),
        ],
    )
    def test_unknown_rules_come_before_reading(self, of_load, of_episodes, allowed):
        message = f"^unknown (reward|episode) rule 'best', choose from {allowed}$"
        with pytest.raises(ValueError, match=message):
            load("there/is/none-v0", **{of_load: "best"})
        with pytest.raises(ValueError, match=message):
            joined(**{of_episodes: "best"})

    def test_missing(self, root):
        with pytest.raises(FileNotFoundError) as failed:
            load("there/is/none-v0")
        for part in (
            "'there/is/none-v0'",
            str(root),
            "minari list local",
            "no route to there/is/none",
        ):
            assert part in str(failed.value)
        with pytest.raises(FileNotFoundError, match=r"'there/is/none-v0'.* download is False"):
            load("there/is/none-v0", download=False)
        with pytest.raises(FileNotFoundError, match=rf"'{root}/none'.* in {root}$"):
            load(root / "none")
        message = "are made, not downloaded: torchrl-iql collect data=hopper/medium "
        with pytest.raises(FileNotFoundError, match=message):
            load("mini/hopper/medium-v0")
        (root / "test" / "half-v0" / "data").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=r"half-v0/data has no metadata\.json"):
            load("test/half-v0")

    def test_what_is_near_to_a_name_that_is_none_is_told(self, root):
        ids = [write(walk(2), dataset_id=f"near/{each}-v1") for each in ("a/one", "b", "c")]
        for source, found in [("near", ids), ("near/a", ids[:1]), ("near/b", ids[1:2])]:
            with pytest.raises(
                FileNotFoundError, match=f"{source}.*; there are {', '.join(found)}:"
            ):
                load(source)
        with pytest.raises(FileNotFoundError, match=rf"there are {root}/near/a/one-v1: give one"):
            load(root / "near" / "a")
        with pytest.raises(FileNotFoundError, match=r"ends with its version, as near/d-v0$"):
            load("near/d")

    def test_what_is_stored_is_loaded_whatever_lies_near_it(self, tmp_path, monkeypatch):
        source = write(walk(2), dataset_id="near/stored-v1")
        (tmp_path / "here" / source / "other" / "data").mkdir(parents=True)
        (tmp_path / "here" / source / "other" / "data" / "metadata.json").touch()
        monkeypatch.chdir(tmp_path / "here")
        assert len(load(source).episode_lengths) == 1

    def test_several_are_one(self, cache_folder):
        options = {"ref_min_score": -5.0, "ref_max_score": 20.0}
        env = gymnasium.make("Pendulum-v1").spec
        one = write(walk(3), walk(2, start=4), dataset_id="test/one-v0")
        pendulum = walk(4, start=7)
        two = write(
            pendulum,
            dataset_id="test/two-v0",
            env=env,
            observation_space=PLANE,
            action_space=UNIT,
            **options,
        )
        dataset = load([one, two], reward="return_range")
        expected = joined(walk(3), walk(2, start=4), walk(4, start=7), reward_rule="return_range")
        found = replace(dataset, name="walks", env_spec=None, reference_scores=None)
        assert_same(found, expected)
        assert dataset.name == "test/one-v0 + test/two-v0"
        assert dataset.env_spec == env
        assert dataset.reference_scores == (-5.0, 20.0)
        assert load([one]).name == one
        assert load([one, two], env="Hopper-v5").env_spec == gymnasium.spec("Hopper-v5")
        minari.delete_dataset(two)
        write(walk(4), dataset_id=two)
        assert load([one, two]).episode_returns.tolist() == [1.5, 8.5, 3.0]
        assert len(list(cache_folder.iterdir())) == 3

    def test_an_error_names_the_one_of_several(self):
        one = write(walk(3), dataset_id="test/one-v0")
        two = write(walk(3), walk(3, rewards=[0.0, np.nan, 0.0]), dataset_id="test/two-v0")
        message = rf"^{one} \+ {two}, episode 1 of {two}: rewards\[1\] is nan"
        with pytest.raises(ValueError, match=message):
            load([one, two])

    @pytest.mark.parametrize(
        ("file", "contents", "message"),
        [
            ("main_data.hdf5", b"", ", episode 0: its files are damaged or incomplete: .*file"),
            ("main_data.hdf5", None, ", episode 0: its files are damaged .*truncated file"),
            ("metadata.json", b"{", ": Minari can not open .*/data: JSONDecodeError"),
            ("metadata.json", b"{}", ": Minari can not open .*/data: AssertionError"),
            ("metadata.json", b"[]", ": Minari can not open .*/data: AttributeError"),
            ("metadata.json", b"null", ": Minari can not open .*/data: AttributeError"),
        ],
    )
    def test_damaged_files(self, root, cache_folder, file, contents, message):
        source = write(walk(3))
        path = root / source / "data" / file
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if contents is None else contents)
        advice = f"if its download was interrupted, delete {root / source} and load it again$"
        with pytest.raises(ValueError, match=f"^{source}{message}.*; {advice}"):
            load(source)
        assert not cache_folder.exists()

    def test_damaged_files_elsewhere_are_not_to_be_deleted(self, root, tmp_path_factory):
        folder = tmp_path_factory.mktemp("mine") / "data"
        shutil.copytree(root / write(walk(3)) / "data", folder)
        (folder / "metadata.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"can not open {folder}: AssertionError\(\)$"):
            load(folder)

    @pytest.mark.parametrize("data_format", FORMATS)
    @pytest.mark.parametrize(
        ("entry", "value", "message"),
        [
            (
                "total_steps",
                "a",
                r": Minari can not open .*total_steps is 'a', expected an integer",
            ),
            ("total_steps", 5, ": read 6 of 5 transitions"),
            ("total_episodes", "a", ": Minari can not open .*TypeError"),
            ("total_episodes", 1, ": read 3 of 6 transitions"),
            ("total_episodes", 3, ", episode 2: its files are damaged or incomplete: .*2"),
        ],
    )
    def test_damaged_metadata(self, root, data_format, entry, value, message):
        source = write(walk(3), walk(3), data_format=data_format)
        path = root / source / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
        with pytest.raises(ValueError, match=f"^{source}{message}"):
            load(source)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("", None, "its files are damaged or incomplete: .* 'episode_1' doesn't exist"),
            ("/rewards", None, "its files are damaged .*rewards can not be read: .* doesn't exist"),
            ("/observations", None, "its files are damaged .*observations can not be read: "),
            ("/rewards", h5py.Empty("f"), "its files are damaged .*rewards can not be read: "),
            ("/rewards", 1.0, r"rewards has shape \[\], expected \[T\]"),
            ("/rewards", np.zeros(0), "rewards has no entries"),
            ("/terminations", np.zeros(2), "terminations has 2 entries, expected 3"),
        ],
    )
    def test_damaged_episodes(self, root, key, value, message):
        source = write(walk(3), walk(3))
        with h5py.File(root / source / "data" / "main_data.hdf5", "a") as file:
            del file[f"episode_1{key}"]
            if value is not None:
                file[f"episode_1{key}"] = value
        with pytest.raises(ValueError, match=f"^{source}, episode 1: {message}"):
            load(source)

    @pytest.mark.parametrize("damage", ["half", "empty", "html", "missing"])
    @pytest.mark.parametrize("data_format", ["arrow", "parquet"])
    def test_damaged_episode_files(self, root, data_format, damage):
        source = write(walk(3), walk(3), walk(3), data_format=data_format)
        (path,) = (root / source / "data" / "1").glob("part*")
        whole = path.read_bytes()
        contents = {"half": whole[: len(whole) // 2], "empty": b"", "html": b"<html>" * 50}
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(contents[damage])
        with pytest.raises(ValueError, match=f"^{source}, episode 1: its files are damaged"):
            load(source)

    def test_missing_is_downloaded(self, monkeypatch):
        monkeypatch.setattr(minari, "download_dataset", lambda id: write(walk(3), dataset_id=id))
        assert load("far/away-v0").episode_lengths.tolist() == [3]

    @pytest.mark.parametrize("failure", [ConnectionError("cut off"), KeyboardInterrupt()])
    def test_half_a_download_is_removed(self, root, monkeypatch, failure):
        whole = write(walk(3))

        def broken(dataset_id: str) -> None:
            data = root / dataset_id / "data"
            data.mkdir(parents=True)
            shutil.copy(root / whole / "data" / "metadata.json", data)
            raise failure

        expected = KeyboardInterrupt if failure.args == () else FileNotFoundError
        with monkeypatch.context() as patch:
            patch.setattr(minari, "download_dataset", broken)
            with pytest.raises(expected):
                load("far/away-v0")
        assert not (root / "far/away-v0").exists()
        self.test_missing_is_downloaded(monkeypatch)

    def test_what_was_there_is_not_removed(self, root):
        (root / "far/away-v0/notes").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="no route to far/away-v0"):
            load("far/away-v0")
        assert (root / "far/away-v0/notes").exists()

    @pytest.mark.parametrize("scores", [(1.0, 1.0), ("a", 2.0)])
    def test_reference_scores_that_can_not_be_used(self, root, scores):
        source = write(walk(3))
        path = root / source / "data" / "metadata.json"
        given = dict(zip(("ref_min_score", "ref_max_score"), scores, strict=True))
        path.write_text(json.dumps(json.loads(path.read_text()) | given))
        with pytest.warns(UserWarning, match=f"^{source}: its reference scores are not used: "):
            assert load(source).reference_scores is None


class TestUse:
    def test_statistics(self):
        rng = np.random.default_rng(0)
        observations = rng.normal([3.0, -1000.0], [0.5, 20.0], (50, 2))
        dataset = joined(walk(49, observations=observations))
        mean, std = dataset.observation_statistics()
        np.testing.assert_allclose(mean, observations[:-1].mean(0), rtol=1e-6)
        np.testing.assert_allclose(std, observations[:-1].std(0), rtol=1e-6)
        assert mean.dtype == std.dtype == torch.float32

    def test_statistics_are_taken_in_parts(self, monkeypatch):
        dataset = joined(walk(49, observations=np.random.default_rng(0).normal(3, 2, (50, 2))))
        whole = dataset.observation_statistics()
        monkeypatch.setattr("torchrl_iql.data.dataset.PART", 10)
        for found, expected in zip(dataset.observation_statistics(), whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-7)

    def test_without_transitions(self):
        empty = OfflineDataset.empty("CartPole-v1")
        for use in (empty.report, empty.observation_statistics, empty.reward_statistics):
            with pytest.raises(ValueError, match=r"^CartPole-v1: there are no transitions to "):
                use()

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-9])
    def test_constant_columns_have_deviation_one(self, value):
        steps = np.arange(8)
        columns = np.full(8, value), value * (1 + 1e-7 * (steps % 2)), 1e-9 * steps
        dataset = joined(
            walk(7, observations=np.stack(columns, axis=1)),
            observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float64),
        )
        mean, std = dataset.observation_statistics()
        np.testing.assert_allclose(mean, [value, value, 3e-9], rtol=1e-6)
        np.testing.assert_allclose(std, [1, 1, 2e-9], rtol=1e-6)

    def test_reward_statistics(self):
        rewards = np.random.default_rng(0).normal(3.0, 2.0, 49)
        mean, std = joined(walk(49, rewards=rewards), reward_rule="minus_one").reward_statistics()
        np.testing.assert_allclose(mean, [rewards.mean() - 1], rtol=1e-6)
        np.testing.assert_allclose(std, [rewards.std()], rtol=1e-6)
        assert joined(walk(3, rewards=[2.0] * 3)).reward_statistics()[1].tolist() == [1]

    def test_episode_starts(self):
        starts = joined(walk(3), walk(1), walk(4)).episode_starts
        assert starts.tolist() == [0, 3, 4]
        assert starts.dtype == torch.int64

    @pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
    def test_returns_to_go(self, discount):
        rng = np.random.default_rng(0)
        lengths = [1, 2, 3, 8, 9, 100, 1, 333]
        episodes = [walk(n, rewards=rng.normal(size=n)) for n in lengths]
        dataset = joined(*episodes, reward_rule="minus_one")
        expected = []
        for episode in episodes:
            rewards = np.asarray(episode.rewards) - 1
            for t in range(len(rewards)):
                powers = discount ** np.arange(len(rewards) - t)
                expected.append((powers * rewards[t:]).sum())
        found = dataset.returns_to_go(discount)
        assert found.shape == (sum(lengths), 1)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found[:, 0], expected, rtol=3e-6, atol=1e-6)

    def test_returns_to_go_are_summed_in_float64(self):
        steps = 100_001
        dataset = joined(walk(steps, rewards=np.full(steps, 0.1)))
        expected = np.float32(0.1).astype(np.float64) * np.arange(steps, 0, -1)
        assert dataset.returns_to_go()[:, 0].equal(torch.from_numpy(expected.astype(np.float32)))
        assert (dataset.transitions["next", "reward"] == np.float32(0.1)).all()

    @pytest.mark.parametrize("share", [1e-9, 0.1, 0.29, 0.5, 0.96, 1.0])
    def test_best_episodes(self, share):
        rng = np.random.default_rng(1)
        returns = rng.integers(0, 20, 100)
        episodes = [
            walk(n, start=1000 * i, rewards=np.eye(n)[0] * returns[i])
            for i, n in enumerate(rng.integers(1, 6, 100))
        ]
        whole = joined(*episodes, reward_rule="return_range")
        best = whole.best_episodes(share)
        number = {1e-9: 1, 0.1: 10, 0.29: 29, 0.5: 50, 0.96: 96, 1.0: 100}[share]
        chosen = np.sort(np.lexsort((np.arange(100), -returns))[:number])
        rewards = whole.transitions["next", "reward"]
        owner = np.repeat(np.arange(100), whole.episode_lengths)
        rows = torch.from_numpy(np.isin(owner, chosen).nonzero()[0])
        assert best.episode_returns.tolist() == returns[chosen].tolist()
        assert best.episode_lengths.tolist() == [len(episodes[i]) for i in chosen]
        assert (best.transitions == whole.transitions[rows]).all()
        assert best.transitions["next", "reward"].equal(rewards[rows])
        assert (best.name, best.reward_rule) == ("walks", "return_range")

    @pytest.mark.parametrize("share", [1e-9, 0.1, 0.29, 0.5, 0.999])
    def test_split(self, share):
        lengths = np.random.default_rng(1).integers(1, 6, 100)
        whole = joined(
            *(walk(n, 1000.0 * i) for i, n in enumerate(lengths)), reward_rule="unit_rms"
        )
        rest, held_out = whole.split(share, seed=3)
        number = {1e-9: 1, 0.1: 10, 0.29: 29, 0.5: 50, 0.999: 99}[share]
        drawn = np.sort(np.random.default_rng(3).permutation(100)[:number])
        owner = np.repeat(np.arange(100), lengths)
        for part, chosen in ((rest, np.setdiff1d(np.arange(100), drawn)), (held_out, drawn)):
            rows = torch.from_numpy(np.isin(owner, chosen).nonzero()[0])
            assert (part.transitions == whole.transitions[rows]).all()
            assert part.episode_lengths.tolist() == lengths[chosen].tolist()
            assert part.episode_returns.equal(whole.episode_returns[torch.from_numpy(chosen)])
            assert part.reward_transform == whole.reward_transform != RewardTransform()
            assert (part.name, part.reward_rule) == ("walks", "unit_rms")
            assert (
                part.transitions["observation"].data_ptr()
                != whole.transitions["observation"].data_ptr()
            )

    def test_a_seed_decides_what_is_held_out(self):
        whole = joined(*(walk(2, 10.0 * i) for i in range(50)))
        first, again, other = (
            [part.transitions["observation"] for part in whole.split(0.2, seed=seed)]
            for seed in (0, 0, 1)
        )
        assert all(one.equal(two) for one, two in zip(first, again, strict=True))
        assert not first[1].equal(other[1])
        more = whole.split(0.4)[1].transitions["observation"]
        assert torch.isin(first[1], more).all()  # a larger share holds a smaller one

    def test_parts_of_two_episodes_and_of_fragments(self):
        for share in (0.001, 0.999):
            parts = joined(walk(3), walk(4, 10.0)).split(share)
            assert sorted(len(part.episode_lengths) for part in parts) == [1, 1]
        cut = [walk(3, 10.0 * i, truncations=np.zeros(3, bool)) for i in range(10)]
        for part in joined(*cut).split(0.3):
            with pytest.raises(ValueError, match="a statistic of whole episodes"):
                part.best_episodes(0.5)
        windows = joined(walk(3), walk(4, 10.0)).windows(2).split(0.5)
        assert [part.window for part in windows] == [2, 2]
        assert sorted(len(part.transitions["time"]) for part in windows) == [3, 4]

    @pytest.mark.parametrize(
        ("share", "seed", "message"),
        [
            (0, 0, "share must be above 0 and below 1, got 0"),
            (1.0, 0, "share must be above 0 and below 1, got 1.0"),
            (float("nan"), 0, "share must be above 0 and below 1, got nan"),
            (0.5, -1, "seed must be an integer of at least 0, got -1"),
            (0.5, 0.5, "seed must be an integer of at least 0, got 0.5"),
            (0.5, 0, "walks: 1 episodes can not be split, expected at least 2"),
        ],
    )
    def test_splits_that_can_not_be(self, share, seed, message):
        with pytest.raises(ValueError, match=message):
            joined(walk(3)).split(share, seed=seed)

    @pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
    def test_shares_and_discounts_out_of_range(self, share):
        with pytest.raises(ValueError, match=f"share must be above 0 and at most 1, got {share}"):
            joined(walk(3)).best_episodes(share)
        if share != 0:
            with pytest.raises(ValueError, match=f"discount must be from 0 to 1, got {share}"):
                joined(walk(3)).returns_to_go(share)

    def test_samples_are_transitions(self):
        transitions = joined(walk(3), walk(4, start=10)).transitions
        buffer = joined(walk(3), walk(4, start=10)).replay_buffer(
            700, generator=torch.Generator().manual_seed(0)
        )
        batch = buffer.sample()
        assert len(buffer) == 7
        assert batch.batch_size == (700,)
        rows = (batch["observation"][:, None, 0] == transitions["observation"][:, 0]).nonzero()[
            :, 1
        ]
        assert (batch == transitions[rows]).all()
        counts = rows.bincount(minlength=7)
        # Uniform: 100 of each, give or take four standard deviations.
        assert ((counts - 100).abs() < 4 * np.sqrt(700 / 7 * 6 / 7)).all()

    def test_sampling_depends_on_the_generator_alone(self):
        def draws(seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            buffer = joined(walk(500)).replay_buffer(64, generator=generator)
            torch.rand(3)
            return torch.stack([buffer.sample()["observation"] for _ in range(3)])

        assert draws(0).equal(draws(0))
        assert not draws(0).equal(draws(1))

    def test_the_buffer_is_read_only(self):
        dataset = joined(walk(3))
        with pytest.raises(RuntimeError, match="doesn't allow writing"):
            dataset.replay_buffer(2).extend(dataset.transitions)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_device(self):
        dataset = joined(walk(500))
        generator = torch.Generator("cuda").manual_seed(0)
        batch = dataset.replay_buffer(64, device="cuda", generator=generator).sample()
        assert {
            value.device.type for value in batch.values(include_nested=True, leaves_only=True)
        } == {"cuda"}
