"""From settings to the finished parts of a run: data, environments, networks and training step."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, flatdim
from omegaconf import OmegaConf

from torchrl_iql import Evaluator, OfflineDataset, TrainStep, load_dataset
from torchrl_iql.data.stored import DownloadError
from torchrl_iql.environments import antmaze_id, spaces_of, spec_of
from torchrl_iql.models import Architecture
from torchrl_iql.spaces import matrices, observation_dtype, share_outside, sorted_space
from torchrl_iql.training import OnNonfinite
from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.commands import typed
from torchrl_iql_recipes.experiment import learned_from as summaries
from torchrl_iql_recipes.experiment.choices import similar, tasks
from torchrl_iql_recipes.experiment.evaluations import Evaluations
from torchrl_iql_recipes.experiment.networks import Networks, sizes
from torchrl_iql_recipes.experiment.schema import Part, SettingsError, written
from torchrl_iql_recipes.experiment.settings import (
    Compute,
    Data,
    Evaluation,
    Learner,
    Settings,
    check_continued,
)
from torchrl_iql_recipes.files import whole

__all__ = [
    "check_not_done",
    "claim",
    "dataset_for",
    "environment",
    "evaluations_for",
    "evaluator_for",
    "exact_products",
    "learned_from",
    "over_steps",
    "set_up",
    "step_for",
]


SAMPLES = 1000
"""Observations that tell whether they are bytes, or fewer."""


def set_up(compute: Compute) -> None:
    """Set PyTorch up for a run.

    Raises:
        SettingsError: it can not compute on that device.
    """
    try:
        torch.empty(0, device=compute.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(
            f"compute.device={compute.device} can not be used, give compute=cpu: {reason}"
        ) from None
    # A line of tensordict's, when a loss is compiled.
    warnings.filterwarnings("ignore", ".*inline_inbuilt_nn_modules is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"Using lock_\(\) inside a compiled graph", UserWarning)
    if compute.device == "cpu":  # where nobody misses what PyTorch looks for when it compiles
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_of_cuda)
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    precision = compute.matmul_precision
    if precision == "auto":
        precision = exact_products(compute.device)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(compute.device == "cpu")


def exact_products(device: str) -> str:
    """Return PyTorch's name of the fastest products on a device that are as exact as float32.

    On a CPU "medium" are oneDNN's, on AMD up to twice as fast as MKL's; with AMX they would be of bfloat16.
    """
    return "medium" if device == "cpu" and not torch.cpu._is_amx_tile_supported() else "highest"


def _is_not_of_cuda(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def claim(path: Path, settings: Settings | Part, data: Mapping[str, Any] | None = None) -> None:
    """Write the settings of a run into its folder, which may hold a part of it, but not of another.

    Args:
        path: the folder.
        settings: of the run.
        data: the summary of what it learns from, written there too, if there is anything yet.

    Raises:
        SettingsError: it holds a run with other settings, of those that may not be others when it goes on, or
            on other data; or another config.yaml.
    """
    file = path / "config.yaml"
    if file.exists():
        stored: Any = OmegaConf.to_container(OmegaConf.load(file))
        if other := sorted({*map(str, stored)} - {*settings.values, "trust_env"}):
            raise SettingsError(
                f"{path} holds another kind of run, with {', '.join(other)}: give another hydra.run.dir"
            )
        if any(path.rglob("metrics.csv")):  # something has come of it
            known = type(settings).of({**stored, "task": settings.values.get("task")})
            check_continued(path, known.values, settings.values, settings.later(path))
    if data is not None:
        summaries.check(path, data)
    path.mkdir(parents=True, exist_ok=True)
    with whole(file) as new:
        OmegaConf.save(OmegaConf.create(dict(settings.values)), new)
    if data is not None:
        summaries.write(path, data)


def check_not_done(name: str, asked: int, done: int) -> None:
    """Refuse a run that is to end before where it is."""
    if asked < done:
        raise SettingsError(f"{name}={asked}: {done} are done, expected at least as many")


def dataset_for(data: Data, *, played: bool = True) -> OfflineDataset:
    """Load the transitions to train on, made or downloaded if they are not there.

    Args:
        data: which.
        played: whether anything is done in their environment, which has to be known then.

    Raises:
        SettingsError: there are none, or they can not be read as the settings say.
    """
    if data.dataset is None:
        raise SettingsError(
            "dataset=null: expected a Minari id, a folder, a file or an OGBench task, or several"
        )
    sources = [data.dataset] if isinstance(data.dataset, str) else data.dataset
    env = environment(data.env)
    try:
        load = partial(
            load_dataset,
            [collection.ensure(source) for source in sources],
            layout=data.layout,
            reward=data.reward,
            episodes=data.episodes,
            observation_keys=data.observation_keys,
            columns=data.columns,
            trust_env=data.trust_env,
            with_env=played,
            action_space=data.action_space,
        )
        dataset = load(env=env)
        if env is None and data.maze is not None:
            dataset = _in_maze(dataset, data.maze, load)
    except (ImportError, OSError, TypeError, ValueError) as error:
        advice = _made_here(sources) if isinstance(error, DownloadError) else ""
        raise SettingsError(f"dataset={written(data.dataset)}: {error}{advice}") from error
    return dataset


def _made_here(sources: Sequence[str]) -> str:
    """Say which task like that of these data has its data without a network."""
    known = [name for name in tasks() if name.startswith("mini/")]
    name = re.sub(r"[\W_]+", "-", Path(sources[0].removeprefix("D4RL/")).with_suffix("").as_posix())
    near = similar(f"mini/{re.sub('-v[0-9]+$', '', name)}", known)
    example = near[0] if near else known[0]
    return f"; without a network, task={example} makes its data here, see {typed('tasks')} mini"


def _in_maze(
    dataset: OfflineDataset, maze: str, load: Callable[..., OfflineDataset]
) -> OfflineDataset:
    """Take the task's word for the maze of D4RL's ant where the data do not tell, or contradict it."""
    if dataset.env_spec is None and dataset.transitions["observation"].shape[-1:] == (29,):
        return load(env=antmaze_id(maze))
    told = dataset.env_spec.kwargs.get("maze", maze) if dataset.env_spec else maze
    if told != maze:
        raise ValueError(f"it is of the maze {told}, not {maze}: give another task, or maze={told}")
    return dataset


def learned_from(settings: Settings, dataset: OfflineDataset) -> OfflineDataset:
    """Return what the algorithm learns from of a data set."""
    # All learners share the data: what differs between them can not be asked for there.
    algorithm = settings.algorithm.model_copy(update=dict.fromkeys(settings.varied()))
    learned = algorithm.data(dataset)
    if learned is not dataset:
        print(f"{algorithm.title} learns from {len(learned.transitions)} transitions of them")
    return learned


def over_steps(settings: Settings, learned: OfflineDataset) -> OfflineDataset:
    """Return what is learned from over as many steps as the settings say."""
    if settings.data.n_steps == 1:
        return learned
    return learned.n_step(settings.data.n_steps, settings.algorithm.discount)  # pyright: ignore


def environment(env: dict | str | None) -> EnvSpec | None:
    """Return what is evaluated in, given by its id, alone or with arguments of ``gymnasium.make``."""
    if env is None:
        return None
    arguments = {"id": env} if isinstance(env, str) else dict(env)
    spec = copy.deepcopy(_spec(arguments.pop("id")))
    spec.max_episode_steps = arguments.pop("max_episode_steps", spec.max_episode_steps)
    spec.kwargs |= arguments
    return spec


def _spec(env: str) -> EnvSpec:
    try:
        spec = spec_of(env)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"env={env}: {error}") from None
    assert spec is not None
    return spec


def evaluations_for(
    settings: Settings, dataset: OfflineDataset, architecture: Architecture
) -> AbstractContextManager[Evaluations | None]:
    """Return what evaluates the learners' policies; a context without one for ``eval_episodes`` 0."""
    evaluation = settings.evaluation
    if evaluation.eval_episodes == 0:
        return nullcontext()
    make, maze = evaluator_for(evaluation, settings.data, dataset)
    seeds = [learner.seed for learner in settings.learners]
    return Evaluations(make, architecture, seeds, evaluation.eval_workers, maze=maze)


def evaluator_for(
    evaluation: Evaluation, data: Data, dataset: OfflineDataset
) -> tuple[Callable[[], Evaluator], Any]:
    """Return what makes the environments to evaluate policies in, which the data have to fit.

    Returns:
        a function that makes them, and the maze that is played in, None if it is another world.
    """
    if dataset.env_spec is None:
        raise SettingsError(
            f"{dataset.name} does not name the environment to evaluate in: give env=<id>, or "
            "eval_episodes=0 to train without one"
        )
    # Where a task is over at its first success, its score is the success rate, as in the paper. The
    # reference returns stored with Minari's mazes count the steps that are spent on the goal.
    references = None if data.episodes == "until_success" else dataset.reference_scores
    make = partial(
        Evaluator, dataset.env_spec, episodes=evaluation.eval_episodes, reference_scores=references
    )
    with _one(make) as evaluate:
        maze = getattr(evaluate.envs[0].unwrapped, "maze", None)
        recorded = sizes(dataset.transitions["observation"].shape[-1], dataset.action_space)
        played = sizes(flatdim(evaluate.envs[0].observation_space), evaluate.action_space)
        if recorded != played:
            raise SettingsError(
                f"{dataset.name} holds {recorded}, but {evaluate.envs[0].spec.id} has {played}: give "  # pyright: ignore
                "env=<id> of another, env=null for the one that the data set names, or eval_episodes=0"
            )
        _require_alike(dataset, evaluate)
        _require_playable(dataset, evaluate)
    return make, maze


@contextmanager
def _one(make: Callable[..., Evaluator]) -> Iterator[Evaluator]:
    try:
        evaluator = make(episodes=1)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{error}; give env=<id> of another, or eval_episodes=0 to train without one"
        ) from error
    with evaluator:
        yield evaluator


def _require_alike(dataset: OfflineDataset, evaluate: Evaluator) -> None:
    """Refuse as many numbers that are others: no bytes where these are shown, or in another order."""
    spec = dataset.env_spec
    assert spec is not None
    rows = dataset.transitions["observation"]
    found, shown = rows.numpy().dtype, observation_dtype(evaluate.envs[0].observation_space)
    some = rows[:: max(1, len(rows) // SAMPLES)]
    if found == np.uint8 if shown is not np.uint8 else not some.equal(some.byte().to(some.dtype)):
        raise SettingsError(
            f"{dataset.name} holds observations of {found}, but {spec.id} shows {np.dtype(shown)}: give "
            "env=<id> of another, data as it shows them, or eval_episodes=0"
        )
    recorded = dataset.observation_space, dataset.action_space
    if not any(map(matrices, recorded)):
        return
    for kind, mine, its in zip(("observations", "actions"), recorded, spaces_of(spec), strict=True):
        have, plays = matrices(mine), matrices(sorted_space(its))
        if have and plays and have != plays:
            raise SettingsError(
                f"{dataset.name} holds {kind} of shape {_shapes(have)}, but those of {spec.id} are of "
                f"{_shapes(plays)}: give env=<id> of another, or eval_episodes=0"
            )


def _shapes(found: Sequence[tuple[int, list[int]]]) -> str:
    return " and ".join(str(shape) for _, shape in found)


def _require_playable(dataset: OfflineDataset, evaluate: Evaluator) -> None:
    """Refuse actions that the environment would clip: what they led to was not recorded there."""
    space = evaluate.action_space
    if not isinstance(space, Box) or not len(dataset.transitions):
        return
    share = share_outside(space, dataset.transitions["action"].numpy())
    if share:
        raise SettingsError(
            f"{share:.2%} of the actions of {dataset.name} lie outside those of "
            f"{evaluate.envs[0].spec.id}, {space.low.tolist()} to {space.high.tolist()}: give env=<id> of "  # pyright: ignore
            "the one that they were taken in, or eval_episodes=0"
        )


def step_for(
    learners: Sequence[Learner],
    architecture: Architecture,
    dataset: OfflineDataset,
    compute: Compute,
    steps: int,
    on_nonfinite: OnNonfinite = "stop",
) -> TrainStep:
    """Build what trains the learners.

    Args:
        learners: with their algorithms.
        architecture: of their networks.
        dataset: whose statistics normalise observations, if the architecture says so.
        compute: where and how.
        steps: of the run, for schedules.
        on_nonfinite: what to do at a step that is not finite.
    """
    normalize = architecture.normalize_observation and len(dataset.transitions) > 0
    statistics = dataset.observation_statistics() if normalize else None
    losses = []
    for learner in learners:
        torch.manual_seed(learner.seed)
        loss = learner.algorithm.loss(Networks(architecture, statistics))
        losses.append(loss.to(compute.device))
    each = [learner.algorithm.optimization(steps) for learner in learners]
    for name in each[0].keys() - {"learning_rate", "schedule"}:
        if any(its[name] != each[0][name] for its in each):
            raise SettingsError(
                f"{name} of the optimisation differs between the learners: of several learners only "
                "learning_rate may, so it can not depend on an axis"
            )
    return TrainStep(
        losses,
        **{**each[0], "learning_rate": [its["learning_rate"] for its in each]},
        seeds=[learner.seed for learner in learners],
        execution=compute.execution,
        on_nonfinite=on_nonfinite,
    )
