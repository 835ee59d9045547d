"""What a run must remember, in one file that is written whole or not at all.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` archive with the components
``policy`` (the network alone), ``learner`` (networks, targets, optimiser, counter) and ``rng`` (every
global random number generator), and in its metadata the architecture of the networks and whatever the
run adds. It holds one learner, also of several that are trained together.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torchrl.checkpoint import Checkpoint, GlobalRNGState

from torchrl_iql.models import Architecture
from torchrl_iql.training import TrainStep

__all__ = ["load_architecture", "load_learner", "load_policy", "save"]


def save(
    path: str | Path,
    learner: TrainStep,
    architecture: Architecture,
    *,
    replica: int = 0,
    **metadata: Any,
) -> Path:
    """Write a checkpoint, replacing an older one of that name only when the new one is complete.

    Args:
        path: the file to write.
        learner: the training step.
        architecture: that of the networks in its losses.
        replica: which of its losses.
        **metadata: values that JSON can hold, returned by :func:`load_learner`.

    Returns:
        the path.
    """
    # Copied, since the parameters are parts of tensors that hold all networks of all replicas.
    policy = deepcopy(learner.losses[replica].get_stateful_net("actor_network"))
    components = {"policy": policy, "learner": _Replica(learner, replica), "rng": GlobalRNGState()}
    checkpoint = Checkpoint(format="archive", **components)
    return checkpoint.save(path, metadata={**metadata, "architecture": asdict(architecture)})


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> TensorDictModule:
    """The policy of a checkpoint, in evaluation mode.

    It reads ``"observation"`` ``[*B, D]``, normalises it if it was trained so, and writes ``"action"``.
    Wrap calls in ``torchrl.envs.set_exploration_type("DETERMINISTIC")`` for the mean action.

    Args:
        path: a file written by :func:`save`.
        device: where the policy should be.
    """
    policy, _, _ = load_architecture(path).build()
    Checkpoint(policy=policy).load(path, map_location="cpu")
    return policy.to(device).eval()


def load_learner(path: str | Path, learner: TrainStep, *, replica: int = 0) -> dict[str, Any]:
    """Restore a learner and the global random number generators, to continue a run.

    Args:
        path: a file written by :func:`save`.
        learner: a training step for the same architecture, whose state is replaced.
        replica: which of its losses.

    Returns:
        the metadata given to :func:`save`.
    """
    metadata = _metadata(path)
    components = {"learner": _Replica(learner, replica), "rng": GlobalRNGState()}
    Checkpoint(**components).load(path, map_location=learner.device)
    return metadata


def load_architecture(path: str | Path) -> Architecture:
    """The architecture of the networks in a checkpoint."""
    return Architecture(**_metadata(path)["architecture"])


def _metadata(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return Checkpoint.manifest(path)["metadata"]


@dataclass
class _Replica:
    """One learner of a training step, with a state of its own."""

    learner: TrainStep
    replica: int

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict(self.replica)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state, self.replica)
