"""From settings to the finished parts of a run: data, environments, networks and training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import gymnasium
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete, flatdim
from torchrl_iql_recipes import collect
from torchrl_iql_recipes.experiment.networks import Networks
from torchrl_iql_recipes.experiment.settings import Compute, Data, Evaluation, Learner

from torchrl_iql import Evaluator, OfflineDataset, TrainStep, load_dataset
from torchrl_iql.models import Architecture

__all__ = ["dataset_for", "environment", "evaluator_for", "set_up", "step_for"]


def set_up(compute: Compute) -> None:
    """Set PyTorch up for a run."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    torch.set_float32_matmul_precision(compute.matmul_precision)
    torch.use_deterministic_algorithms(compute.device == "cpu")


def dataset_for(data: Data, discount: float | None = None) -> OfflineDataset:
    """Load the transitions to train on, made or downloaded if they are not there.

    Args:
        data: which.
        discount: of the rewards that are summed, if ``n_steps`` are.
    """
    if data.dataset is None:
        raise ValueError("dataset=null: expected a Minari id, a folder or a D4RL file, or several")
    sources = [data.dataset] if isinstance(data.dataset, str) else data.dataset
    dataset = load_dataset(
        [collect.ensure(source) for source in sources],
        reward=data.reward,
        episodes=data.episodes,
        env=environment(data.env),
    )
    if data.n_steps > 1:
        assert discount is not None
        dataset = dataset.n_step(data.n_steps, discount)
    return dataset


def environment(env: dict | str | None) -> EnvSpec | str | None:
    """Return what is evaluated in: an id, alone or with arguments of ``gymnasium.make``."""
    if not isinstance(env, dict):
        return env
    arguments = dict(env)
    spec = copy.deepcopy(gymnasium.spec(arguments.pop("id")))
    spec.max_episode_steps = arguments.pop("max_episode_steps", spec.max_episode_steps)
    spec.kwargs |= arguments
    return spec


def evaluator_for(
    evaluation: Evaluation, data: Data, dataset: OfflineDataset
) -> Callable[..., Evaluator] | None:
    """Return what makes the environments to evaluate policies in, which the data have to fit.

    Returns:
        a function that takes ``episodes``, or none for as many as in the settings; None if there are 0.
    """
    if evaluation.eval_episodes == 0:
        return None
    if dataset.env_spec is None:
        raise ValueError(
            f"{dataset.name} does not name the environment to evaluate in: give env=<id>, or "
            "eval_episodes=0 to train without one"
        )
    # Where a task is over at its first success, its score is the success rate, as in the paper. The
    # reference returns stored with Minari's mazes count the steps that are spent on the goal.
    references = None if data.episodes == "until_success" else dataset.reference_scores
    make = partial(
        Evaluator, dataset.env_spec, episodes=evaluation.eval_episodes, reference_scores=references
    )
    with make(episodes=1) as evaluate:
        recorded = _sizes(dataset.transitions["observation"].shape[-1], dataset.action_space)
        played = _sizes(flatdim(evaluate.envs[0].observation_space), evaluate.action_space)
        if recorded != played:
            raise ValueError(
                f"{dataset.name} holds {recorded}, but {evaluate.envs[0].spec.id} has {played}: give "  # pyright: ignore
                "env=<id> of another, env=null for the one that the data set names, or eval_episodes=0"
            )
    return make


def _sizes(observation_size: int, action_space: Space) -> str:
    kind = "choices" if isinstance(action_space, Discrete) else "numbers"
    return (
        f"observations of {observation_size} numbers and actions of {flatdim(action_space)} {kind}"
    )


def step_for(
    learners: Sequence[Learner],
    architecture: Architecture,
    dataset: OfflineDataset,
    compute: Compute,
    steps: int,
) -> TrainStep:
    """Build what trains the learners.

    Args:
        learners: with their algorithms.
        architecture: of their networks.
        dataset: whose statistics normalise observations, if the architecture says so.
        compute: where and how.
        steps: of the run, for schedules.
    """
    statistics = dataset.observation_statistics() if len(dataset.transitions) else None
    losses = []
    for learner in learners:
        torch.manual_seed(learner.seed)
        loss = learner.algorithm.loss(Networks(architecture, statistics))
        losses.append(loss.to(compute.device))
    each = [learner.algorithm.optimization(steps) for learner in learners]
    return TrainStep(
        losses,
        **{**each[0], "learning_rate": [its["learning_rate"] for its in each]},
        seeds=[learner.seed for learner in learners],
        execution=compute.execution,
    )
