"""Minibatches, against numpy's own draws and the transitions themselves."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari import EpisodeData
from tensordict import TensorDict, TensorDictBase

from torchrl_iql.data import Minibatches, OfflineDataset
from torchrl_iql.data.minibatches import BLOCK

N, B = 500, 16


def transitions(n: int = N) -> TensorDict:
    """Make transitions: observation i is (i, -i), action and reward of transition i are i."""
    numbers = torch.arange(n)
    observations = torch.stack([numbers, -numbers], dim=1).float()
    return TensorDict(
        {
            "observation": observations,
            "action": numbers,
            "next": {
                "observation": observations + 1,
                "reward": numbers[:, None].float(),
                "terminated": numbers[:, None] % 3 == 0,
            },
        },
        batch_size=[n],
    )


def batches(minibatches: Minibatches, block: int) -> TensorDictBase:
    """Return what a learner sees in a block, ``[BLOCK, R, B]``."""
    source, indices = minibatches(block)
    return source[indices].clone()


def drawn(minibatches: Minibatches, block: int) -> torch.Tensor:
    return batches(minibatches, block)["action"]


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("minibatches")]


@pytest.fixture(params=[False, True], ids=["resident", "streaming"])
def streaming(request) -> bool:
    return request.param


@pytest.fixture
def build(streaming):
    """Build Minibatches that end with the test."""
    built = []

    def build(data: TensorDictBase | None = None, batch_size: int = B, **options: Any):
        data = transitions() if data is None else data
        built.append(Minibatches(data, batch_size, **{"streaming": streaming} | options))
        return built[-1]

    yield build
    for minibatches in built:
        minibatches.close()
    assert not threads()


class TestDraws:
    def test_layout(self, build):
        minibatches = build(seeds=(3, 1, 2), device="cpu")
        source, indices = minibatches(0)
        assert (indices.dtype, indices.shape) == (torch.int64, (BLOCK, 3, B))
        assert (minibatches.batch_size, minibatches.seeds) == (B, (3, 1, 2))
        assert minibatches.device == torch.device("cpu")
        assert source.ndim == 1

    def test_transitions_stay_whole(self, build):
        batch = batches(build(seeds=[0, 1]), 4)
        assert (batch == transitions()[batch["action"]]).all()
        assert batch["action"].dtype == torch.int64
        assert batch["next", "terminated"].dtype == torch.bool

    def test_are_those_of_spawned_generators(self, build):
        found = drawn(build(seeds=[7, 0]), 2)
        for replica, seed in enumerate([7, 0]):
            child = np.random.SeedSequence(seed).spawn(3)[2]
            expected = np.random.default_rng(child).integers(N, size=(BLOCK, B))
            np.testing.assert_array_equal(found[:, replica], expected)

    def test_depend_on_the_seed_and_the_block_alone(self, build):
        together = build(seeds=[5, 0, 5])
        alone = build(transitions(), seeds=[5])
        for block in (3, 0):
            torch.manual_seed(block)
            np.random.seed(block)
            found = drawn(together, block)
            assert found[:, [0]].equal(drawn(alone, block))
            assert found[:, 0].equal(found[:, 2])
            assert not found[:, 0].equal(found[:, 1])
        assert not drawn(alone, 0).equal(drawn(alone, 1))

    def test_blocks_come_in_any_order(self, build):
        expected = {block: drawn(build(), block) for block in range(6)}
        minibatches = build()
        for block in (0, 1, 1, 2, 5, 0, 4, 3, 3, 4):
            assert drawn(minibatches, block).equal(expected[block])

    def test_large_seeds_do_not_meet_other_blocks(self, build):
        # As entropy, numpy can not tell the words [3 + 2**32, 0] from [3, 1].
        assert not drawn(build(seeds=[3 + 2**32]), 0).equal(drawn(build(seeds=[3]), 1))

    def test_are_uniform(self, build):
        minibatches = build(transitions(50), 64)
        counts = sum(drawn(minibatches, block).flatten().bincount() for block in range(5))
        expected = 5 * BLOCK * 64 / 50
        statistic = ((counts - expected).square() / expected).sum()
        # 49 degrees of freedom: the 0.1 and the 99.9 percentile.
        assert 23.98 < statistic < 85.35

    def test_more_than_there_are_transitions(self, build):
        assert drawn(build(transitions(1)), 0).eq(0).all()


class TestSource:
    def test_is_always_the_same(self, build):
        minibatches = build(seeds=[0, 1])
        source, _ = minibatches(0)
        addresses = {key: value.data_ptr() for key, value in source.flatten_keys().items()}
        for block in (1, 5, 0):
            again, _ = minibatches(block)
            assert again is source
            assert addresses == {k: value.data_ptr() for k, value in again.flatten_keys().items()}

    def test_shares_the_memory_of_the_cpu(self):
        data = transitions()
        source, _ = Minibatches(data, B)(0)
        for key, value in data.flatten_keys().items():
            assert source.flatten_keys()[key].data_ptr() == value.data_ptr()

    def test_is_a_block_when_streamed(self):
        with Minibatches(transitions(), B, seeds=[0, 1], streaming=True) as minibatches:
            source, indices = minibatches(1)
            assert len(source) == indices.numel() == BLOCK * 2 * B
            assert indices.flatten().equal(torch.arange(len(source)))

    def test_streamed_or_not_gives_the_same(self):
        resident = Minibatches(transitions(), B, seeds=[4, 2])
        with Minibatches(transitions(), B, seeds=[4, 2], streaming=True) as streamed:
            for block in (0, 1, 2, 7, 0):
                assert (batches(resident, block) == batches(streamed, block)).all()

    def test_memory_mapped(self, build, tmp_path):
        mapped = transitions().memmap(tmp_path / "folder")
        transitions().save(str(tmp_path / "file.tdz"))
        archived = TensorDict.load_memmap(tmp_path / "file.tdz")
        expected = batches(build(), 3)
        for data in (mapped, TensorDict.load_memmap(tmp_path / "folder"), archived):
            assert (batches(build(data), 3) == expected).all()

    def test_of_a_data_set(self, streaming):
        no = np.zeros(20, bool)
        episode = EpisodeData(
            0, np.arange(21.0)[:, None], np.arange(20) % 3, np.ones(20), no, no, {}
        )
        dataset = OfflineDataset.from_episodes(
            "walk",
            [episode],
            observation_space=spaces.Box(-np.inf, np.inf, (1,)),
            action_space=spaces.Discrete(3),
        )
        with dataset.minibatches(B, seeds=[8, 9], device="cpu", streaming=streaming) as found:
            expected = Minibatches(dataset.transitions, B, seeds=[8, 9])
            assert (batches(found, 1) == batches(expected, 1)).all()
            assert drawn(found, 0).shape == (BLOCK, 2, B)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_device(self, build):
        expected = Minibatches(transitions(), B, seeds=[0, 1])
        minibatches = build(seeds=[0, 1], device="cuda")
        for block in (0, 1, 2, 9):
            source, indices = minibatches(block)
            assert {value.device.type for value in source.flatten_keys().values()} == {"cuda"}
            # Work that reads the block while the next one is requested.
            torch.cuda._sleep(20_000_000)
            found = source[indices]
            minibatches(block + 1)
            assert (found.cpu() == batches(expected, block)).all()


class TestThread:
    def test_a_repeated_block_is_not_gathered_again(self, monkeypatch):
        blocks = []
        gather = np.take

        def recorded(column: np.ndarray, *args: Any, **kwargs: Any) -> None:
            if column.dtype == np.int64:
                blocks.append(column)
            gather(column, *args, **kwargs)

        monkeypatch.setattr(np, "take", recorded)
        with Minibatches(transitions(), B, streaming=True) as minibatches:
            for block in (0, 0, 1, 1, 2):
                minibatches(block)
        assert len(blocks) in (3, 4)

    def test_its_errors_are_raised_where_the_block_is_needed(self, monkeypatch):
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("the disk is gone")

        with Minibatches(transitions(), B, streaming=True) as minibatches:
            expected = drawn(minibatches, 0)
            with monkeypatch.context() as patch:
                patch.setattr(np, "take", fail)
                for _ in range(2):
                    with pytest.raises(OSError, match=r"^the disk is gone$"):
                        minibatches(5)
            assert drawn(minibatches, 0).equal(expected)
            assert drawn(minibatches, 5).equal(drawn(Minibatches(transitions(), B), 5))

    def test_ends_with_the_object(self):
        minibatches = Minibatches(transitions(), B, streaming=True)
        minibatches(0)
        assert threads()
        gc.disable()
        try:
            del minibatches
            deadline = time.monotonic() + 10
            while threads() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            gc.enable()
        assert not threads()

    def test_closed(self, build, streaming):
        with build() as minibatches:
            expected = drawn(minibatches, 0)
        minibatches.close()
        assert drawn(minibatches, 0).equal(expected)
        if streaming:
            for block in (1, 2):
                with pytest.raises(RuntimeError, match="after shutdown"):
                    minibatches(block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seeds": ()}, r"seeds must be a list of one or more integers of at least 0, got \(\)"),
        ({"seeds": 0}, r"seeds must be a list .* got 0"),
        ({"seeds": [0, -1]}, r"seeds must be .* got \[0, -1\]"),
        ({"seeds": [0.5]}, r"seeds must be .* got \[0.5\]"),
        ({"transitions": transitions(0)}, r"transitions must be \[n\], n >= 1, got \[0\]"),
        ({"transitions": transitions()[None]}, r"transitions must be .* got \[1, 500\]"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Minibatches(**{"transitions": transitions(), "batch_size": B} | arguments)
