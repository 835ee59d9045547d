"""Minibatches for several learners at once, from transitions on the device or streamed to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from numbers import Integral

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["BLOCK", "Minibatches"]

BLOCK = 100
"""Steps whose indices are drawn at once."""


class Minibatches:
    """Uniform minibatches, with replacement, for R independent learners, block by block.

    What replica r sees at step t depends on ``seeds[r]`` and t alone: not on the other replicas, the
    device or streaming, nor on where a run was interrupted. The indices of block b come from the
    b-th generator that ``np.random.SeedSequence(seeds[r])`` spawns, on the CPU.

    Resident, all transitions lie on the device. Streamed, the device holds those of one block, while a
    thread gathers those of the next: for data larger than the memory of the device or, mapped from a
    file, of the machine. The thread ends with a ``with`` statement, with :meth:`close`, or when the
    object is no longer used.

    Args:
        transitions: TensorDict ``[n]``, n at least 1; on the CPU for streaming.
        batch_size: B, transitions in the minibatch of one replica, at least 1.
        seeds: one per replica, at least 0. Equal seeds give equal minibatches.
        device: where to train. Resident on the ``"cpu"``, the memory of ``transitions`` is shared.
        streaming: whether to stream.
        window: K, to draw windows: for each transition, it and those that follow, K in all, and where
            there are none left the last one again.

    Attributes:
        batch_size: B.
        seeds: the seeds, R of them.
        device: the device.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from tensordict import TensorDict
        >>> transitions = TensorDict({"action": torch.arange(50)}, batch_size=[50])
        >>> minibatches = Minibatches(transitions, 256, seeds=[0, 1])
        >>> source, indices = minibatches(block=3)
        >>> indices.shape
        torch.Size([100, 2, 256])
        >>> source[indices[42, 1]].batch_size  # step 342 of replica 1
        torch.Size([256])
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        batch_size: int,
        *,
        seeds: Sequence[int] = (0,),
        device: torch.device | str = "cpu",
        streaming: bool = False,
        window: int | None = None,
    ) -> None:
        if transitions.ndim != 1 or not len(transitions):
            raise ValueError(f"transitions must be [n], n >= 1, got {list(transitions.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        several = hasattr(seeds, "__len__") and len(seeds) > 0
        if not several or not all(isinstance(seed, Integral) and seed >= 0 for seed in seeds):
            raise ValueError(
                f"seeds must be a list of one or more integers of at least 0, got {seeds!r}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window!r}")
        self.batch_size = batch_size
        self.seeds = tuple(int(seed) for seed in seeds)
        self.device = torch.device(device)
        self._draw = partial(_draw, len(transitions), batch_size, window, self.seeds)
        self._block: int | None = None
        if streaming:
            shape = BLOCK, len(self.seeds), batch_size, *([] if window is None else [window])
            size = math.prod(shape)
            self._stream = _Stream(transitions, self._draw, size, self.device)
            self._source = self._stream.buffer
            self._indices = torch.arange(size, device=self.device).view(shape)
        else:
            self._stream = None
            self._source = transitions.to(self.device)

    def __call__(self, block: int) -> tuple[TensorDictBase, Tensor]:
        """Return the minibatches of the steps ``block * BLOCK`` to ``block * BLOCK + BLOCK - 1``.

        Blocks may come in any order and repeatedly; streaming is fastest in ascending order. Nothing
        waits for the device.

        Args:
            block: number of the block, from 0.

        Returns:
            transitions on the device, and indices into them, ``[BLOCK, R, B]`` int64, of windows
            ``[BLOCK, R, B, K]``. The transitions are the same tensors at the same addresses every
            time; streamed, the next call for another block overwrites them.

        Raises:
            Exception: whatever went wrong in the thread that gathered this block.
        """
        if block != self._block:
            self._block = None  # until all of it is there
            if self._stream is None:
                self._indices = _to_device(self._draw(block), self.device)
            else:
                self._stream.fill(block)
            self._block = block
        return self._source, self._indices

    def rows(self, step: int) -> Tensor:
        """Return which transitions the minibatches of a step are, ``[R, B]`` or ``[R, B, K]``, on the CPU."""
        block, place = divmod(step, BLOCK)
        return self._draw(block)[place]

    def close(self) -> None:
        """End the thread that streams: afterwards no other block can be had."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Minibatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream:
    """A buffer on the device, filled with one block while the next is gathered on the CPU."""

    def __init__(
        self,
        transitions: TensorDictBase,
        draw: Callable[[int], Tensor],
        size: int,
        device: torch.device,
    ) -> None:
        self.buffer = _empty(transitions, size, device)
        self._next = _empty(transitions, size, torch.device("cpu"), device.type == "cuda")
        self._transitions = transitions
        self._draw = draw
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="minibatches")
        self._ahead: tuple[int, Future[None]] | None = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, block: int) -> None:
        """Fill the buffer with a block."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != block:
            if ahead is not None:
                ahead[1].cancel()
            ahead = block, self._executor.submit(self._gather, block)
        ahead[1].result()
        for column, values in zip(_columns(self.buffer), _columns(self._next), strict=True):
            column.copy_(values, non_blocking=values.is_pinned())
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.buffer.device))
        self._ahead = block + 1, self._executor.submit(self._gather, block + 1)

    def _gather(self, block: int) -> None:
        rows = self._draw(block).flatten().numpy()
        if self._copied is not None:
            # The device may not have read the block before yet.
            self._copied.synchronize()
        # By numpy: torch would use OpenMP, whose threads no longer spin, here and in the training, once
        # two Python threads have some. That costs a training step half of its speed.
        for column, values in zip(_columns(self._transitions), _columns(self._next), strict=True):
            np.take(column.numpy(), rows, axis=0, out=values.numpy(), mode="clip")

    def close(self) -> None:
        self._ahead = None
        self._executor.shutdown(cancel_futures=True)


def _draw(
    transitions: int, batch_size: int, window: int | None, seeds: Sequence[int], block: int
) -> Tensor:
    """Draw indices ``[BLOCK, R, B]``, int64, below ``transitions``; of windows, ``[BLOCK, R, B, K]``."""
    sequences = [np.random.SeedSequence(seed, spawn_key=(block,)) for seed in seeds]
    shape = BLOCK, batch_size
    draws = [np.random.default_rng(each).integers(transitions, size=shape) for each in sequences]
    drawn = torch.from_numpy(np.stack(draws, axis=1))
    if window is None:
        return drawn
    return (drawn.unsqueeze(-1) + torch.arange(window)).clamp_max(transitions - 1)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # From pinned memory, the copy does not wait for what the device has yet to do.
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _empty(
    transitions: TensorDictBase, size: int, device: torch.device, pin_memory: bool = False
) -> TensorDictBase:
    def column(values: Tensor) -> Tensor:
        options = {"dtype": values.dtype, "device": device, "pin_memory": pin_memory}
        return torch.empty(size, *values.shape[1:], **options)

    return transitions.apply(column, batch_size=[size], device=device)


def _columns(transitions: TensorDictBase) -> list[Tensor]:
    return list(transitions.values(include_nested=True, leaves_only=True))
