"""What a run must remember, in one file that is written whole or not at all.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` archive with the components
``policy`` (the network alone), ``learner`` (networks, targets, coefficients, optimiser, counter) and
``rng`` (every global random number generator), others that the run adds, and in its metadata a format
number, the architecture of the networks and whatever the run adds. It holds one learner, also of several
that are trained together.
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)

from torchrl_iql.models import Architecture
from torchrl_iql.training import TrainStep
from torchrl_iql.training.step import FORMAT, Own

__all__ = [
    "load_architecture",
    "load_learner",
    "load_metadata",
    "load_policy",
    "load_tensors",
    "save",
]


def save(
    path: str | Path | CheckpointRotation,
    learner: TrainStep,
    architecture: Architecture,
    *,
    replica: int = 0,
    components: Mapping[str, Any] = MappingProxyType({}),
    **metadata: Any,
) -> Path:
    """Write a checkpoint, replacing an older one of that name only when the new one is complete.

    Args:
        path: the file to write; or a :class:`~torchrl.checkpoint.CheckpointRotation`, which names it by
            the number of gradient steps and keeps the latest ones.
        learner: the training step.
        architecture: that of the networks in its losses.
        replica: which of its losses.
        components: what else to save, by name: objects with a state dict.
        **metadata: values that JSON can hold, returned by :func:`load_learner`.

    Returns:
        the path of the file.

    Raises:
        OSError: if it could not be written; an older one is still there.
    """
    # Copied, since the parameters are parts of tensors that hold all networks of all replicas.
    policy = deepcopy(learner.losses[replica].get_stateful_net("actor_network"))
    checkpoint = Checkpoint(format="archive")
    saved = {"policy": policy, "learner": _Replica(learner, replica), "rng": GlobalRNGState()}
    for name, component in {**saved, **components}.items():
        checkpoint.register(name, component, adapter=_Tensors())
    try:
        known = {"format": FORMAT, "steps": learner.steps}
        known["architecture"] = asdict(architecture)
        metadata |= known
        if isinstance(path, CheckpointRotation):
            return path.save(checkpoint, step=learner.steps, metadata=metadata)
        return checkpoint.save(path, metadata=metadata)
    except (OSError, RuntimeError) as error:  # torch says nothing of a full disk
        rotation = isinstance(path, CheckpointRotation)
        folder = path.directory if rotation else Path(path).parent  # pyright: ignore
        free = shutil.disk_usage(folder).free / 1e6
        where = folder if rotation else path
        raise OSError(
            f"could not write the checkpoint {where} ({free:.0f} MB are free there): {error}"
        ) from error


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> TensorDictModuleBase:
    """Load the policy of a checkpoint, in evaluation mode.

    It reads ``"observation"`` ``[*B, D]``, normalises it if it was trained so, and writes ``"action"``.
    Wrap calls in ``torchrl.envs.set_exploration_type("DETERMINISTIC")`` for the mean action. A Decision
    Transformer goes on with an episode by more than that:
    :class:`~torchrl_iql.decision_transformer.ReturnConditioned`.

    Args:
        path: a file written by :func:`save`, from anybody: no code in it can run.
        device: where the policy should be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, a later version's, or holds anything but tensors and plain values.
    """
    policy = load_architecture(path).policy_network()
    _restore(path, {"policy": policy}, "cpu")
    return policy.to(device).eval()


def load_learner(
    path: str | Path,
    learner: TrainStep,
    *,
    replica: int = 0,
    components: Mapping[str, Any] = MappingProxyType({}),
    keep: Collection[Own] = (),
) -> dict[str, Any]:
    """Restore a learner and the global random number generators, to continue a run.

    Args:
        path: as of :func:`load_policy`.
        learner: a training step for the same architecture, whose state is replaced, with the coefficients
            of its loss (expectile, discount) and its learning rates. Its schedule stays: it is not saved.
        replica: which of its losses.
        components: what else to restore, by the names given to :func:`save`.
        keep: what the learner keeps of its own, see :meth:`TrainStep.load_state_dict`; with ``"random"``
            the global generators stay as they are, too.

    Returns:
        the metadata given to :func:`save`.

    Raises:
        OSError: there is no such file.
        ValueError: it is no checkpoint, or not of such a learner.
    """
    metadata = load_metadata(path)
    restored = {"learner": _Replica(learner, replica, keep), **components}
    if "random" not in keep:
        restored["rng"] = GlobalRNGState()
    _restore(path, restored, learner.device)
    return metadata


def load_architecture(path: str | Path) -> Architecture:
    """Load the architecture of the networks in a checkpoint."""
    known = dict(load_metadata(path)["architecture"])
    known.pop("num_qvalue_nets", None)  # of a setting that an algorithm has now
    return Architecture(**known)


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Load the metadata given to :func:`save`, without anything else.

    Raises:
        OSError: there is no such file.
        ValueError: it is no checkpoint, or of a later format.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the file, as {Path(path, 'last.ckpt')}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
    except CheckpointError as error:
        raise ValueError(f"{path} is no checkpoint: {error}") from None
    if metadata.get("format", 1) > FORMAT:
        raise ValueError(
            f"{path} has format {metadata['format']}, this version reads up to {FORMAT}: update "
            "torchrl-iql"
        )
    return metadata


def load_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """Read what ``torch.save`` wrote, if it is made of tensors and plain values: no code in it can run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything else, which the message names.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f", {named[1]}," if named else ""
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values{what} and could run code"
        ) from error


def _restore(path: str | Path, components: Mapping[str, Any], device: Any) -> None:
    checkpoint = Checkpoint()
    for name, component in components.items():
        checkpoint.register(name, component, adapter=_Tensors())
    try:
        checkpoint.load(path, map_location=device)
    except CheckpointError as error:
        raise ValueError(f"{path}: {error}") from error


class _Tensors(StateDictCheckpointAdapter):
    """State dicts as ``torch.save`` writes them.

    Of TorchRL's other forms, some are unpickled without a check, and the default one is mapped files: the
    process that writes them dies of SIGBUS when the disk is full.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def load(self, component: Any, path: Path, *, map_location: Any, **_: Any) -> None:
        component.load_state_dict(load_tensors(path / self.state_torch, map_location))


@dataclass
class _Replica:
    """One learner of a training step, with a state of its own."""

    learner: TrainStep
    replica: int
    keep: Collection[Own] = ()

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict(self.replica)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state, self.replica, keep=self.keep)
