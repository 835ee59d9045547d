"""The networks that an algorithm asks for, in the sizes of the data."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete, flatdim
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor

from torchrl_iql import OfflineDataset, checkpoint
from torchrl_iql.models import SMALLEST, Architecture, Statistics
from torchrl_iql.spaces import images_of, share_outside
from torchrl_iql_recipes.algorithms.base import Algorithm
from torchrl_iql_recipes.experiment import settings
from torchrl_iql_recipes.experiment.schema import SettingsError, written

__all__ = ["Networks", "architecture_for", "architecture_of", "sizes"]


class Networks:
    """Freshly initialised networks of one learner, one after the other.

    Args:
        architecture: of them.
        statistics: mean and deviation of the observations, ``[D]`` each, if they are known.
    """

    def __init__(self, architecture: Architecture, statistics: Statistics | None = None) -> None:
        self.architecture = architecture
        self.discrete = architecture.discrete
        self._statistics = statistics

    def require(self, algorithm: str, policies: Collection[str]) -> None:
        """Refuse what an algorithm can not train.

        Args:
            algorithm: its title.
            policies: the kinds that it can.

        Raises:
            SettingsError: the policy is of another kind, or actions are discrete.
        """
        if self.discrete:
            raise SettingsError(f"{algorithm} is for continuous actions, and these are discrete")
        if self.architecture.policy not in policies:
            raise SettingsError(
                f"policy={self.architecture.policy}: {algorithm} needs policy={' or '.join(policies)}"
            )

    def action_bounds(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest action, ``[A]`` each, of continuous ones."""
        assert self.architecture.action_bounds is not None
        low, high = self.architecture.action_bounds
        return torch.tensor(low), torch.tensor(high)

    def policy(self) -> TensorDictModuleBase:
        return self.architecture.policy_network(self._statistics)

    def qvalues(self, number: int) -> list[TensorDictModule]:
        return [self.architecture.qvalue_network(self._statistics) for _ in range(number)]

    def value(self) -> TensorDictModule:
        return self.architecture.value_network(self._statistics)


def architecture_for(
    networks: settings.Networks, dataset: OfflineDataset, algorithm: Algorithm
) -> Architecture:
    """Describe the networks of the settings, in the sizes of the data.

    Raises:
        SettingsError: the data have no such networks, or the algorithm is for other actions.
    """
    space = dataset.action_space
    if isinstance(space, Discrete):
        if algorithm.is_continuous:
            raise SettingsError(
                f"{algorithm.title} is for continuous actions, those of {dataset.name} are discrete: give "
                "another algorithm"
            )
        for name, only in (("policy", "gaussian"), ("action_bounds", "space")):
            if (given := getattr(networks, name)) != only:
                raise SettingsError(
                    f"{name}={given}: without effect, the actions of {dataset.name} are discrete; give "
                    f"{name}={only}"
                )
        actions: dict[str, Any] = {"action_size": int(space.n)}
    else:
        data = dataset.transitions["action"]
        bounds = {"space": (space.low.ravel().tolist(), space.high.ravel().tolist())}  # pyright: ignore
        if len(data):
            low, high = data.amin(0), data.amax(0)
            if networks.action_bounds == "data" and (constant := (low == high).nonzero()).numel():
                column = int(constant[0])
                raise SettingsError(
                    f"action_bounds=data: action {column} of {dataset.name} is always {low[column]}; "
                    "give action_bounds=space"
                )
            bounds["data"] = low.tolist(), high.tolist()
        if networks.action_bounds == "space" and (space.low == space.high).any():  # pyright: ignore
            column = int((space.low == space.high).ravel().argmax())  # pyright: ignore
            raise SettingsError(
                f"action_space: action {column} of {dataset.name} can only be {space.low.ravel()[column]:g}, "  # pyright: ignore
                f"{space}: give data without it, there is nothing to learn of it"
            )
        if networks.action_bounds == "space" and not np.isfinite(bounds["space"]).all():
            remedy = (
                "give action_bounds=data" if len(data) else "none of the networks here is for them"
            )
            raise SettingsError(
                f"action_bounds=space: the actions of {dataset.name} have no bounds, {space}; {remedy}"
            )
        if networks.action_bounds not in bounds:
            raise SettingsError(
                f"action_bounds={networks.action_bounds}: without a data set give action_bounds=space"
            )
        actions = {
            "action_size": data.shape[-1],
            "action_bounds": bounds[networks.action_bounds],
        }
    images = images_of(dataset.observation_space, SMALLEST) if networks.encoder == "cnn" else []
    if networks.encoder == "cnn" and not images:
        raise SettingsError(
            f"encoder=cnn: {dataset.name} has no images, of bytes and at least {SMALLEST} x {SMALLEST} "
            f"pixels, but {dataset.observation_space}: give encoder=mlp"
        )
    return Architecture(
        observation_size=dataset.transitions["observation"].shape[-1],
        policy="categorical" if isinstance(space, Discrete) else networks.policy,
        hidden_sizes=networks.hidden_sizes,
        dropout=networks.dropout,
        normalize_observation=networks.normalize_observation,
        images=images,
        **actions,
    )


def architecture_of(
    path: Path, dataset: OfflineDataset, networks: settings.Networks
) -> Architecture:
    """Load the description of the networks in a checkpoint.

    Args:
        path: of the checkpoint.
        dataset: what they are to learn from.
        networks: the settings that they were made with.

    Raises:
        SettingsError: they do not fit the data.
    """
    architecture = checkpoint.load_architecture(path)
    known = architecture.observation_size, architecture.action_size, architecture.discrete
    space, observation_size = dataset.action_space, dataset.transitions["observation"].shape[-1]
    if known != (observation_size, flatdim(space), isinstance(space, Discrete)):
        raise SettingsError(
            f"{dataset.name} holds {sizes(observation_size, space)}, but the networks of {path} are for "
            f"{_sizes(*known)}: give another dataset, or train without a checkpoint"
        )
    if isinstance(space, Box) and architecture.action_bounds is not None:
        _require_reach(path, architecture.action_bounds, dataset, networks.action_bounds)
    return architecture


def _require_reach(path: Path, bounds: Any, dataset: OfflineDataset, action_bounds: str) -> None:
    """Refuse actions that the policy of a checkpoint can not take, or bounds that it would not know of."""
    space: Any = dataset.action_space
    low, high = bounds
    told = f"the policy of {path} takes actions from {low} to {high}"
    theirs = [space.low.ravel(), space.high.ravel()]
    if action_bounds == "space" and not np.allclose(theirs, bounds, rtol=1e-6):
        raise SettingsError(
            f"{told}, but those of {dataset.name} lie in {space}: give "
            f"action_space={written([low, high])} if they are the same, or train without a checkpoint"
        )
    reach = Box(np.float32(low), np.float32(high))
    if len(rows := dataset.transitions["action"].numpy()) and (share := share_outside(reach, rows)):
        raise SettingsError(
            f"{told}, but {share:.2%} of those of {dataset.name} lie outside: train without a checkpoint"
        )


def sizes(observation_size: int, action_space: Space) -> str:
    """Say in words what is observed and done."""
    return _sizes(observation_size, flatdim(action_space), isinstance(action_space, Discrete))


def _sizes(observation_size: int, action_size: int, discrete: bool) -> str:
    kind = "choices" if discrete else "numbers"
    return f"observations of {observation_size} numbers and actions of {action_size} {kind}"
