"""Minari data sets of behaviours: who acts, what is made of it, and how it gets into the store.

The same arguments give the same data, with the same version of MuJoCo. An interrupted build goes on where
it was; a data set appears in Minari's store in one piece.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import minari
import mujoco
import numpy as np
import torch
from filelock import FileLock
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path
from tqdm import tqdm

from torchrl_iql.checkpoint import load_architecture, load_tensors
from torchrl_iql.data.minari import opened
from torchrl_iql.environments import REFERENCE_SCORES, spec_of
from torchrl_iql_recipes.behaviors.mazes import AntWalks, PointWalks, share_arrived
from torchrl_iql_recipes.behaviors.policies import Stages
from torchrl_iql_recipes.behaviors.rollouts import CheckpointRollouts, RandomRollouts, StageRollouts
from torchrl_iql_recipes.behaviors.settings import Collection
from torchrl_iql_recipes.experiment import progress
from torchrl_iql_recipes.experiment.schema import SettingsError, rounded
from torchrl_iql_recipes.files import whole

__all__ = ["MINI", "NAMES", "behavior", "build", "ensure", "requested", "run"]

PART = 5_000
"""Transitions made, seeded and kept together: what an interruption can lose."""

WEIGHTS = Path(__file__).parent / "weights"
"""Trained by sac.py. Of a locomotion policy: the stages up to the medium one, then the expert."""

ROBOTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
LEVELS = ("random", "medium", "medium-replay", "expert", "medium-expert")
POINT_WALKS = {
    "stitch": PointWalks("stitch", farthest=4, longest=150, size=60_000),
    "umaze": PointWalks("umaze", farthest=4, longest=150),
    "medium": PointWalks("medium", farthest=5, longest=200),
    "large": PointWalks("large", farthest=6, longest=250),
}
ANT_WALKS = {
    "umaze": ("umaze", "goal"),
    "umaze-diverse": ("umaze", "diverse"),
    "medium-play": ("medium", "play"),
    "medium-diverse": ("medium", "diverse"),
    "large-play": ("large", "play"),
    "large-diverse": ("large", "diverse"),
}

NAMES = (
    *(f"{robot}/{level}" for robot in ROBOTS for level in LEVELS),
    *(f"pointmaze/{maze}" for maze in POINT_WALKS),
    *(f"antmaze/{walks}" for walks in ANT_WALKS),
)
"""The data sets that can be made by name."""

MINI = (
    *(f"{r}/{level}" for r in ROBOTS for level in ("medium", "medium-replay", "medium-expert")),
    "pointmaze/medium",
    "antmaze/umaze",
    "antmaze/medium-play",
    "antmaze/medium-diverse",
)
"""The local suite: one of every kind that the paper has, in small."""


VERSIONS = {"antmaze": 2}
"""Of the data of a family, where they are not the first: it goes up whenever they change."""


class Behavior(Protocol):
    """Someone who acts in an environment."""

    @property
    def env_spec(self) -> EnvSpec: ...

    @property
    def algorithm(self) -> str:
        """What the metadata say of it."""
        ...

    @property
    def parameters(self) -> dict[str, Any]:
        """What tells it from others of the same algorithm in the same environment, for JSON."""
        ...

    @property
    def size(self) -> int:
        """Transitions that a data set of it has at least, unless told otherwise."""
        ...

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        """Play one episode.

        Args:
            env: the environment.
            rng: the one source of all that is random.
            share: of the data set, what comes before the present part: in [0, 1).
        """
        ...


def behavior(name: str, stages: Path | None = None) -> Behavior:
    """Find who makes a data set.

    Args:
        name: one of ``NAMES``.
        stages: what sac.py left of a training, instead of the shipped weights.

    Raises:
        ValueError: if there is no such name, or it is not made by a policy of such stages.
    """
    if name not in NAMES:
        raise ValueError(f"there is no data set {name!r} to make; choose from {', '.join(NAMES)}")
    family, kind = name.split("/")
    if stages is not None and (family == "pointmaze" or kind == "random"):
        raise ValueError(f"{name} is made without a trained policy, so stages are of no use")
    if family == "pointmaze":
        return POINT_WALKS[kind]
    if family == "antmaze":
        maze, walks = ANT_WALKS[kind]
        return AntWalks(maze, walks, _policy("ant", stages))
    env_spec = gymnasium.spec(ROBOTS[family])
    if kind == "random":
        return RandomRollouts(env_spec)
    policy = _policy(family, stages)
    medium, expert = policy.medium, policy.expert
    played = {
        "medium": [medium],
        "medium-replay": list(range(medium + 1)),
        "expert": [expert],
        "medium-expert": [medium, expert],
    }[kind]
    return StageRollouts(env_spec, policy, played)


def _policy(robot: str, stages: Path | None) -> Stages:
    """Load the shipped stages, or those of another training."""
    shipped = Stages.load(WEIGHTS / f"{robot}.pt")
    if stages is None:
        return shipped
    policy = Stages.load(stages)
    if policy.sizes[:2] != shipped.sizes[:2]:
        raise ValueError(
            f"{stages} is not of {robot}: sizes of observation and action are {policy.sizes[:2]}, not "
            f"{shipped.sizes[:2]}"
        )
    return policy


def dataset_id(name: str) -> str:
    """Return the id of a data set made by name."""
    return f"mini/{name}-v{VERSIONS.get(name.partition('/')[0], 0)}"


def ensure(source: str) -> str:
    """Make the data set ``mini/<name>-v0`` if Minari's store lacks it; leave other ids alone."""
    for name in NAMES:
        if source == dataset_id(name) and not get_dataset_path(source).exists():
            who = behavior(name)
            build(source, who, who.size)
    return source


def build(
    id: str, behavior: Behavior, transitions: int, *, seed: int = 0, workers: int | None = None
) -> Path:
    """Make a data set in Minari's store, unless it is there.

    Args:
        id: its Minari id.
        behavior: who acts.
        transitions: how many, at least: every part ends with a whole episode.
        seed: of everything.
        workers: processes; one per core by default. Their number does not change the data.

    Returns:
        the folder of the data set.

    Raises:
        SettingsError: there are to be no transitions, the id is none of Minari's, or the data set that is
            there was made with other arguments.
    """
    if transitions < 1:
        raise SettingsError(f"transitions must be at least 1, got {transitions}")
    recipe = _recipe(behavior, transitions, seed)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = get_dataset_path(_checked(id))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # two processes may want it at once
        unfinished = path.with_name(f".{path.name}.parts")
        if not path.exists():
            parts = unfinished / digest  # not those of another recipe
            parts.mkdir(parents=True, exist_ok=True)
            _play(parts, id, behavior, recipe, workers or os.cpu_count() or 1)
            _store(path, parts, id, behavior, recipe)
        shutil.rmtree(unfinished, ignore_errors=True)  # also what a kill at this line has left
    recorded = MinariStorage.read_raw_metadata(path / "data").get("recipe", dict.fromkeys(recipe))
    # Older data sets say less of themselves: what they say has to agree.
    theirs = {key: value for key, value in recorded.items() if value != recipe.get(key)}
    if theirs:
        ours = {key: recipe.get(key) for key in theirs}
        raise SettingsError(
            f"{path} was made with {theirs}, not with {ours}. Delete it, choose another id, or set "
            "MINARI_DATASETS_PATH to another folder."
        )
    return path


def _checked(id: str) -> str:
    """Return an id of Minari's; what is none, as ``../there``, would lie outside of the store."""
    if DATASET_ID_RE.fullmatch(id) is None:
        raise SettingsError(
            f"id={id}: expected a Minari id, as own/walks-v0, of letters, digits, - and _"
        )
    return id


def _recipe(behavior: Behavior, transitions: int, seed: int) -> dict[str, Any]:
    """Return all that the data depend on, as JSON gives it back."""
    spec = json.loads(behavior.env_spec.to_json())
    return {
        "transitions": transitions,
        "seed": seed,
        "behavior": behavior.algorithm,
        "parameters": behavior.parameters,
        "environment": {key: spec[key] for key in ("id", "max_episode_steps", "kwargs")},
        "mujoco": mujoco.__version__,
    }


def _play_part(
    behavior: Behavior, env: gymnasium.Env, seed: int, part: int, parts: int, transitions: int
) -> list[EpisodeBuffer]:
    """Play the episodes of one part of a data set: a function of its arguments alone."""
    rng = np.random.default_rng([seed, part])
    episodes, steps = [], 0
    while steps < transitions:
        episodes.append(behavior.play(env, rng, part / parts))
        steps += len(episodes[-1])
    return episodes


def _play(folder: Path, id: str, behavior: Behavior, recipe: dict[str, Any], workers: int) -> None:
    """Fill a folder with the parts that are missing there."""
    transitions, seed = recipe["transitions"], recipe["seed"]
    parts = math.ceil(transitions / PART)
    paths = [folder / f"{part:05}.pt" for part in range(parts)]
    missing = [part for part in range(parts) if not paths[part].exists()]
    sizes = [min(PART, transitions - part * PART) for part in range(parts)]
    with progress.bar(id, transitions - sum(sizes[part] for part in missing), transitions) as bar:
        jobs = [(seed, part, parts, sizes[part], paths[part]) for part in missing]
        try:
            for done in _map(behavior, jobs, min(workers, len(jobs))):
                bar.update(done)
        except KeyboardInterrupt:
            kept = transitions - sum(sizes[i] for i in missing if not paths[i].exists())
            tqdm.write(
                f"Interrupted: {kept:,} of {transitions:,} transitions are kept; the same command goes on",
                file=sys.stderr,
            )
            raise


def _map(behavior: Behavior, jobs: list[tuple], workers: int) -> Iterator[int]:
    if workers <= 1:
        _start(behavior)
        yield from map(_play_job, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (behavior,)) as executor:
        try:
            yield from executor.map(_play_job, jobs)
        finally:
            executor.shutdown(cancel_futures=True)


_player: tuple[Behavior, gymnasium.Env]


def _start(behavior: Behavior) -> None:
    """Set up what a process needs for all of its parts."""
    global _player
    torch.set_num_threads(1)
    _player = behavior, gymnasium.make(behavior.env_spec)


def _play_job(job: tuple[int, int, int, int, Path]) -> int:
    *arguments, path = job
    episodes = _play_part(*_player, *arguments)
    with whole(path) as unfinished:
        torch.save([_each(vars(its), np.ndarray, torch.from_numpy) for its in episodes], unfinished)
    return arguments[-1]


def _each(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert what is of a kind, however deep: arrays are kept as tensors, which load without code."""
    match value:
        case dict():
            return {key: _each(its, kind, convert) for key, its in value.items()}
        case list() | tuple():
            return type(value)(_each(its, kind, convert) for its in value)
        case _:
            return convert(value) if isinstance(value, kind) else value


def _store(path: Path, parts: Path, id: str, behavior: Behavior, recipe: dict[str, Any]) -> None:
    """Turn the parts into a data set, which appears in one piece."""
    unfinished = parts / "dataset"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    env_spec = behavior.env_spec
    storage = MinariStorage.new(unfinished / "data", env_spec=env_spec)
    for part in sorted(parts.glob("*.pt")):
        episodes = _each(load_tensors(part), torch.Tensor, torch.Tensor.numpy)
        storage.update_episodes(EpisodeBuffer(**its) for its in episodes)
    metadata = {
        "dataset_id": id,
        "minari_version": minari.__version__,
        "eval_env_spec": env_spec.to_json(),
        "algorithm_name": behavior.algorithm,
        "requirements": [f"mujoco=={mujoco.__version__}"],
        "recipe": recipe,
    }
    if (scores := REFERENCE_SCORES.get(env_spec.name)) is not None:
        metadata |= {"ref_min_score": scores[0], "ref_max_score": scores[1]}
    storage.update_metadata(metadata)
    unfinished.rename(path)


def summary(path: Path, behavior: Behavior) -> str:
    """Describe a data set in one line."""
    dataset = opened(path / "data")
    returns = [float(np.sum(episode.rewards)) for episode in dataset]
    line = f"{len(returns)} episodes, {dataset.total_steps} transitions, "
    line += f"mean return {rounded(np.mean(returns))}"
    metadata = dataset.storage.metadata
    if "ref_max_score" in metadata:
        low, high = metadata["ref_min_score"], metadata["ref_max_score"]
        line += f", normalized score {100 * (np.mean(returns) - low) / (high - low):.1f}"
    if isinstance(behavior, PointWalks | AntWalks):
        line += (
            f", {100 * share_arrived(dataset, behavior.ARRIVED):.1f}% arrive where they are sent"
        )
    megabytes = sum(file.stat().st_size for file in path.rglob("*")) / 1e6
    return f"{line}, {megabytes:.0f} MB"


def run(settings: Collection, path: Path) -> None:
    """Make the data sets that are asked for, and say what they are.

    Raises:
        SettingsError: there is no such environment, policy or data set to make.
    """
    try:
        requests = requested(settings)
        if settings.policy not in (None, "random"):
            _require_of_observations(Path(settings.policy))
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None
    for id, who, transitions in requests:
        began = time.monotonic()
        path = build(id, who, transitions, seed=settings.seed, workers=settings.workers)
        print(f"{id}: {summary(path, who)}, {time.monotonic() - began:.0f} s")


def _require_of_observations(policy: Path) -> None:
    if load_architecture(policy).policy == "decision_transformer":
        raise ValueError(
            f"policy={policy}: a Decision Transformer acts by its rewards and earlier steps, expected a "
            "policy that acts by the observation alone"
        )


def requested(settings: Collection) -> list[tuple[str, Behavior, int]]:
    """Return what to make: ids, behaviours and numbers of transitions."""
    id, stages = settings.id, None if settings.stages is None else Path(settings.stages)
    if id in map(dataset_id, NAMES):
        raise ValueError(f"id={id} is the suite's data; choose another")
    if settings.env is not None:
        spec = spec_of(settings.env)
        assert spec and settings.policy and id
        if settings.policy == "random":
            who = RandomRollouts(spec)
        else:
            who = CheckpointRollouts(spec, Path(settings.policy))
        behaviors: dict[str, Behavior] = {id: who}
    else:
        given = [settings.data] if isinstance(settings.data, str) else settings.data
        behaviors = {id or dataset_id(each): behavior(each, stages) for each in given or MINI}
    return [(id, who, settings.transitions or who.size) for id, who in behaviors.items()]
