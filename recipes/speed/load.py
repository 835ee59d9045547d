"""How long a Minari HDF5 data set takes to load, beside plain h5py reading the same arrays.

    python recipes/speed/load.py [transitions]

It writes a data set of the shape of Hopper's, uncompressed as Minari does and with gzip, and loads it
in turns, files in the page cache. Peak memory, which needs Linux, is that of a fresh process above
what its imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import minari
import numpy as np
import tensordict
import torch
import torchrl
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from torchrl_iql import load_dataset

ROUNDS = 7
FILE = "main_data.hdf5"
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
INFOS = (
    "x_position",
    "z_distance_from_origin",
    "x_velocity",
    "reward_forward",
    "reward_ctrl",
    "reward_survive",
)


def read_arrays(folder: Path) -> list[list[np.ndarray]]:
    with h5py.File(folder / FILE) as file:
        return [[file[f"episode_{i}"][key][()] for key in ARRAYS] for i in range(len(file))]


def load_without_cache(folder: Path) -> Any:
    return load_dataset(folder, cache=False)


CONTENDERS = {
    "h5py": read_arrays,
    "load_dataset, no cache": load_without_cache,
    "load_dataset, warm cache": load_dataset,
}


def write(folder: Path, transitions: int) -> None:
    """Write random episodes of 400 to 600 steps with Minari's own storage class."""
    folder.mkdir()
    storage = MinariStorage.new(
        folder,
        observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
        action_space=spaces.Box(-1.0, 1.0, (3,), np.float32),
        data_format="hdf5",
    )
    storage.update_metadata(
        {"dataset_id": "benchmark/hopper-v0", "minari_version": minari.__version__}
    )
    rng = np.random.default_rng(0)
    ends = rng.integers(400, 601, size=transitions // 400 + 1).cumsum().clip(max=transitions)
    lengths = np.diff(np.unique(ends), prepend=0)
    # Few at a time, to keep them out of memory; Minari opens its file for each part.
    for part in np.array_split(lengths, len(lengths) // 200 + 1):
        storage.update_episodes([episode(length, rng) for length in part])


def episode(length: int, rng: np.random.Generator) -> EpisodeBuffer:
    return EpisodeBuffer(
        observations=rng.normal(size=(length + 1, 11)),
        actions=rng.uniform(-1, 1, size=(length, 3)).astype(np.float32),
        rewards=rng.normal(size=length),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, bool),
        infos={name: rng.normal(size=length + 1) for name in INFOS},
    )


def compress(source: Path, target: Path) -> None:
    """Copy a data set with every array compressed by gzip."""

    def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            file.create_dataset(name, data=item[()], compression="gzip", shuffle=True)

    target.mkdir()
    shutil.copy(source / "metadata.json", target)
    with h5py.File(source / FILE) as original, h5py.File(target / FILE, "w") as file:
        original.visititems(copy)


def timed(name: str, folder: Path) -> tuple[float, float]:
    """Measure seconds on the clock and of the CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = CONTENDERS[name](folder)
    times = time.perf_counter() - clock, time.process_time() - cpu
    del result  # not before: this takes time as well
    return times


def peak_memory(name: str, folder: Path) -> int:
    before = memory("VmRSS")
    CONTENDERS[name](folder)
    return memory("VmHWM") - before


def memory(entry: str) -> int:
    """Read an entry of the status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


def compare(folder: Path) -> None:
    load_dataset(folder)  # to fill the cache
    times = {name: np.zeros((ROUNDS, 2)) for name in CONTENDERS}
    for turn in range(ROUNDS):
        for name in CONTENDERS:
            times[name][turn] = timed(name, folder)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        peaks = list(processes.map(peak_memory, CONTENDERS, [folder] * len(CONTENDERS)))

    print(f"\n{folder.name}, {(folder / FILE).stat().st_size / 1e6:.0f} MB")
    print(f"{'':26}{'s':>8}{'CPU s':>8}{'/ h5py':>8}{'peak MB':>9}")
    for name, peak in zip(CONTENDERS, peaks, strict=True):
        clock, cpu = np.median(times[name], axis=0)
        ratio = median(times[name][:, 0] / times["h5py"][:, 0])
        print(f"{name:26}{clock:8.3f}{cpu:8.3f}{ratio:8.2f}{peak / 1e6:9.0f}")


def main(transitions: int) -> None:
    modules = h5py, minari, np, tensordict, torch, torchrl
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(", ".join(f"{module.__name__} {module.__version__}" for module in modules))
    print(f"{transitions} transitions, medians of {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHRL_IQL_CACHE"] = str(Path(scratch, "cache"))
        plain, gzip = Path(scratch, "uncompressed"), Path(scratch, "gzip")
        write(plain, transitions)
        compress(plain, gzip)
        for folder in (plain, gzip):
            compare(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
