"""What a run must remember, in one file that is written whole or not at all.

A checkpoint is a TorchRL :class:`~torchrl.checkpoint.Checkpoint` archive with the components
``policy`` (the network alone), ``learner`` (networks, targets, coefficients, optimiser, counter) and
``rng`` (every global random number generator), others that the run adds, and in its metadata a format
number, the architecture of the networks and whatever the run adds, as :func:`described` what the data were.
It holds one learner, also of several that are trained together.
"""

from __future__ import annotations

import math
import pickle
import re
import shutil
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import Space, spaces
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import Tensor, nn
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)
from torchrl.objectives.common import LossModule

from torchrl_iql.acting import Acting
from torchrl_iql.decision_transformer import ReturnConditioned
from torchrl_iql.environments import written_spec
from torchrl_iql.models import Architecture, unlike
from torchrl_iql.training import TrainStep
from torchrl_iql.training.step import FORMAT, Own

if TYPE_CHECKING:
    from torchrl_iql.data import OfflineDataset

__all__ = [
    "Networks",
    "described",
    "load_architecture",
    "load_learner",
    "load_metadata",
    "load_networks",
    "load_policy",
    "load_spaces",
    "load_tensors",
    "recorded_observations",
    "save",
]

RANGE_BYTES = 64_000_000
"""Of observations, that their range is taken of."""

RECORDED_ROWS, RECORDED_BYTES = 256, 2**18
"""Of observations that are kept, at most."""


def save(
    path: str | Path | CheckpointRotation,
    learner: TrainStep,
    architecture: Architecture,
    *,
    replica: int | None = None,
    components: Mapping[str, Any] = MappingProxyType({}),
    **metadata: Any,
) -> Path:
    """Write a checkpoint, replacing an older one of that name only when the new one is complete.

    Args:
        path: the file to write; or a :class:`~torchrl.checkpoint.CheckpointRotation`, which names it by
            the number of gradient steps and keeps the latest ones.
        learner: the training step.
        architecture: that of the networks in its losses.
        replica: which of its losses; of one it needs not be said.
        components: what else to save, by name: objects with a state dict.
        **metadata: values that JSON can hold, returned by :func:`load_learner`.

    Returns:
        the path of the file.

    Raises:
        OSError: if it could not be written; an older one is still there.
        IndexError, ValueError: a network is not of the architecture; an entry of the metadata has a name that
            is taken; there is no such loss, or several and it is not said which.
    """
    replica = learner.replica(replica)
    if taken := metadata.keys() & {"format", "steps", "architecture"}:
        raise ValueError(f"metadata has {sorted(taken)}, which the checkpoint says itself")
    _check_networks(learner.losses[replica], architecture)
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


def _check_networks(loss: LossModule, architecture: Architecture) -> None:
    """Refuse networks that :func:`load_policy` and :func:`load_networks` could not build again."""
    policy, state = loss.get_stateful_net("actor_network"), _Saved(loss.state_dict())
    with torch.random.fork_rng(devices=[]):
        made = architecture.policy_network()
        _check_shapes("the policy", policy.state_dict(), made, architecture)
        on_windows = isinstance(made, ReturnConditioned)  # as it is trained
        _check_kinds("the policy", policy, made.on_windows() if on_windows else made)
        for what, name, make in (
            ("a Q network", "qvalue_network_params", architecture.qvalue_network),
            ("V", "value_network_params", architecture.value_network),
        ):
            if found := state.parameters(name):
                _check_shapes(what, found, expected := make(), architecture)
                _check_kinds(what, getattr(loss, name.removesuffix("_params")), expected)
    for its, known in zip(_distributions(policy), _distributions(made), strict=False):
        if not _same_values(its, known):
            raise ValueError(
                "the policy is not of the architecture, and would be loaded as another: its distribution has "
                f"{its}, expected {known} of {architecture}"
            )


def _check_shapes(
    what: str, found: Mapping[str, Tensor], made: nn.Module, architecture: Architecture
) -> None:
    """Compare tensors with those of a network, which may be stacked, ``[N, ...]``."""
    expected = made.state_dict()
    for key in (*expected, *found):
        its, known = (None if key not in x else tuple(x[key].shape) for x in (found, expected))
        if its is None or known is None or its[len(its) - len(known) :] != known:
            raise ValueError(
                f"{what} is not of the architecture, and could not be loaded: {key} is {its}, "
                f"expected {known} of {architecture}"
            )


def _check_kinds(what: str, network: nn.Module, made: nn.Module) -> None:
    """Compare the modules of two networks whose tensors have the same names and shapes."""
    if other := unlike(network, made):
        raise ValueError(
            f"{what} is not of the architecture, and would be loaded as another: {other}"
        )


def _distributions(network: nn.Module) -> list[dict[str, Any]]:
    return [
        {"class": module.distribution_class, **module.distribution_kwargs}
        for module in network.modules()
        if isinstance(module, ProbabilisticTensorDictModule)
    ]


def _same_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a.cpu(), b.cpu())
        return type(a) is type(b) and a == b

    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


def described(dataset: OfflineDataset) -> dict[str, Any]:
    """Return what those who use a policy later need to know of its data, as metadata for :func:`save`.

    Returns:
        ``dataset``, its name; ``spaces``, of one observation and one action; ``observed``, the lowest and
        the highest observation, ``[D]`` each, of 64 MB at most, evenly, None of images and of no data;
        ``recorded``, some observations as text, see :func:`recorded_observations`; ``env``, the environment,
        None if none is known; and its ``reference_scores``, None where success counts.
    """
    from minari.serialization import serialize_space

    rows = dataset.transitions["observation"]
    is_known = len(rows) > 0 and rows.dtype != torch.uint8
    rows = rows[:: math.ceil(max(1, rows.nbytes) / RANGE_BYTES)]
    some = _evenly(dataset.transitions["observation"], RECORDED_ROWS, RECORDED_BYTES)
    by_success = dataset.episode_rule == "until_success"
    return {
        "dataset": dataset.name,
        # As text: of an image they hold tens of thousands of numbers.
        "spaces": [
            serialize_space(its) for its in (dataset.observation_space, dataset.action_space)
        ],
        "observed": [each.tolist() for each in (rows.amin(0), rows.amax(0))] if is_known else None,
        "recorded": b64encode(some.numpy().tobytes()).decode(),
        "env": dataset.env_spec and written_spec(dataset.env_spec),
        "reference_scores": None if by_success else dataset.reference_scores,
    }


def _evenly(rows: Tensor, most: int, size: int) -> Tensor:
    """Return at most so many rows, of at most so many bytes in all, but one if there is one."""
    most = max(1, min(most, size // max(1, rows[:1].nbytes)))
    return rows[:: math.ceil(max(1, len(rows)) / most)].cpu().contiguous()


def recorded_observations(metadata: Mapping[str, Any], dtype: np.dtype, size: int) -> np.ndarray:
    """Return the observations that :func:`described` kept of the data.

    Args:
        metadata: of a checkpoint.
        dtype: of its observations.
        size: D of them.

    Returns:
        ``[n, D]``, at most 256; none of a checkpoint that was written before they were kept.
    """
    kept = b64decode(metadata.get("recorded") or "")
    return np.frombuffer(kept, dtype).reshape(-1, size)


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> TensorDictModuleBase:
    """Load the policy of a checkpoint, in evaluation mode.

    ``policy.act(observation)`` returns the action of the environment for what it observes, without
    exploration: see :class:`~torchrl_iql.acting.Acting`.

    As a module it reads ``"observation"`` ``[*B, D]``, normalises it if it was trained so, and writes
    ``"action"``. Wrap calls in ``torchrl.envs.set_exploration_type("DETERMINISTIC")`` for the mean action. A
    Decision Transformer goes on with an episode by more than that:
    :class:`~torchrl_iql.decision_transformer.ReturnConditioned`.

    Args:
        path: a file written by :func:`save`, from anybody: no code in it can run.
        device: where the policy should be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, a later version's, or holds anything but tensors and plain values.
    """
    with torch.random.fork_rng(devices=[]):  # the weights that it begins with count for nothing
        policy = load_architecture(path).policy_network()
    _restore(path, {"policy": policy}, "cpu")
    policy.act = Acting(policy, *load_spaces(path))  # pyright: ignore
    return policy.to(device).eval()


class Networks(dict[str, TensorDictModuleBase]):
    """The networks of a checkpoint by name: ``"policy"``, and if it has them ``"qvalue"`` and ``"value"``."""

    def __init__(self, path: str | Path, networks: Mapping[str, TensorDictModuleBase]) -> None:
        super().__init__(networks)
        self.path = path

    def __missing__(self, name: str) -> TensorDictModuleBase:
        raise KeyError(f"{self.path} has no network {name!r}, but {' and '.join(self)}")


def load_networks(path: str | Path, device: torch.device | str = "cpu") -> Networks:
    """Load all networks of a checkpoint, in evaluation mode and without gradients of their parameters.

    Args:
        path: as of :func:`load_policy`.
        device: where the networks should be.

    Returns:
        ``"policy"``, as of :func:`load_policy`; if the algorithm learns them ``"qvalue"``, the N networks Q,
        which write ``"state_action_value"``, ``[*B, N, 1]`` for ``"observation"`` and ``"action"``, or of
        discrete actions ``[*B, N, A]`` for ``"observation"`` alone; and ``"value"``, V, which writes
        ``"state_value"``, ``[*B, 1]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of :func:`load_policy`, or the networks are not of the architecture that it names.
    """
    architecture, saved = load_architecture(path), _Saved()
    networks = {"policy": load_policy(path)}
    _restore(path, {"learner": saved}, "cpu")
    qvalues, value = (saved.parameters(f"{name}_network_params") for name in ("qvalue", "value"))
    with torch.random.fork_rng(devices=[]):
        if qvalues:
            networks["qvalue"] = _ensemble(path, architecture, qvalues)
        if value:
            networks["value"] = architecture.value_network()
            _load(path, networks["value"], value)
    for network in networks.values():
        network.to(device).eval().requires_grad_(False)
    return Networks(path, networks)


def _ensemble(
    path: str | Path, architecture: Architecture, parameters: Mapping[str, Tensor]
) -> TensorDictModule:
    network = architecture.qvalue_network()
    name, one = next(iter(network.state_dict().items()))
    is_stacked = name in parameters and parameters[name].ndim > one.ndim  # a single one is not
    members = []
    for i in range(len(parameters[name]) if is_stacked else 1):
        its = {key: each[i] if is_stacked else each for key, each in parameters.items()}
        members.append(architecture.qvalue_network())
        _load(path, members[-1], its)
    modules = [member.module for member in members]
    return TensorDictModule(_Ensemble(modules), network.in_keys, network.out_keys[-1:])


def _load(path: str | Path, network: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    try:
        network.load_state_dict(dict(parameters))
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its networks are not those it describes: {' '.join(str(error).split())}"
        ) from error


class _Ensemble(nn.ModuleList):
    """Networks of the same inputs; their outputs, ``[*B, F]`` each, as ``[*B, N, F]``."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([network(*inputs) for network in self], dim=-2)


class _Saved:
    """The state of a learner, without a learner."""

    def __init__(self, loss: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self._loss = loss

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss = state["loss"]

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of a network of the loss; empty if there is none of the name."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): its
            for key, its in self._loss.items()
            if key.startswith(prefix)
        }


def load_spaces(path: str | Path) -> tuple[Space, Space]:
    """Load the spaces of one observation and one action.

    Those of a checkpoint that does not hold them are those of the rows that its networks read and write.

    Raises:
        OSError: there is no such file.
        ValueError: it is no checkpoint, or they are damaged or not of its networks.
    """
    from minari.serialization import deserialize_space

    stored, architecture = load_metadata(path).get("spaces"), load_architecture(path)
    if stored is None:
        return _spaces_of(architecture)
    try:
        observation, action = map(deserialize_space, stored)
        sizes = tuple(map(spaces.flatdim, (observation, action)))
    except Exception as error:  # whatever Minari meets in damaged text
        raise ValueError(f"{path}: its spaces can not be read: {error!r}") from error
    known = architecture.observation_size, architecture.action_size
    if sizes != known or isinstance(action, spaces.Discrete) != architecture.discrete:
        raise ValueError(
            f"{path}: its spaces, {observation} and {action}, are not those of its networks, of sizes {known}"
        )
    return observation, action


def _spaces_of(architecture: Architecture) -> tuple[Space, Space]:
    observation = spaces.Box(-np.inf, np.inf, (architecture.observation_size,))
    if architecture.discrete:
        return observation, spaces.Discrete(architecture.action_size)
    ones = [1.0] * architecture.action_size
    low, high = map(np.array, architecture.action_bounds or (np.negative(ones), ones))
    return observation, spaces.Box(low.astype(np.float32), high.astype(np.float32))


def load_learner(
    path: str | Path,
    learner: TrainStep,
    *,
    replica: int | None = None,
    components: Mapping[str, Any] = MappingProxyType({}),
    keep: Collection[Own] = (),
) -> dict[str, Any]:
    """Restore a learner and the global random number generators, to continue a run.

    Args:
        path: as of :func:`load_policy`.
        learner: a training step for the same architecture, whose state is replaced, with the coefficients
            of its loss (expectile, discount) and its learning rates. Its schedule stays: it is not saved.
        replica: which of its losses; of one it needs not be said.
        components: what else to restore, by the names given to :func:`save`.
        keep: what the learner keeps of its own, see :meth:`TrainStep.load_state_dict`; with ``"random"``
            the global generators stay as they are, too.

    Returns:
        the metadata given to :func:`save`.

    Raises:
        OSError: there is no such file.
        IndexError, ValueError: it is no checkpoint, or not of such a learner; or as :func:`save`.
    """
    replica = learner.replica(replica)
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
        found = sorted(map(str, Path(path).glob("**/last.ckpt"))) or [str(Path(path, "last.ckpt"))]
        raise IsADirectoryError(f"{path} is a folder: give the file, as {' or '.join(found[:3])}")
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
