"""The networks of the official IQL code as TorchRL modules.

Every function takes sizes or TorchRL specs, reads the entry ``"observation"`` ``[*B, D]`` and returns
an ordinary TensorDict module: two hidden layers of 256 ReLU units, orthogonal initialisation with
gain sqrt 2 and zero biases. Pass ``observation_statistics`` (mean and standard deviation, ``[D]`` each)
to normalise the observation inside the network: as buffers of the network the statistics go wherever
it goes, so training, evaluation, checkpoints and online use cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec
from torchrl.modules import (
    MLP,
    Actor,
    ConvNet,
    IndependentNormal,
    ProbabilisticActor,
    SafeProbabilisticModule,
    TanhNormal,
    ValueOperator,
)
from torchrl.modules.distributions import OneHotCategorical

from torchrl_iql.decision_transformer import ReturnConditioned, TimedDTActor

__all__ = [
    "Architecture",
    "categorical_policy",
    "decision_transformer",
    "deterministic_policy",
    "discrete_qvalue_network",
    "gaussian_policy",
    "heteroscedastic_policy",
    "qvalue_ensemble",
    "qvalue_network",
    "squashed_policy",
    "value_network",
]

Statistics = tuple[Tensor, Tensor]
Images = Sequence[tuple[int, Sequence[int]]]
"""Images within observations ``[*B, D]``: the column that each begins at, and its shape, ``[H, W, C]``,
``[C, H, W]`` or ``[H, W]``, channels being on the shorter side."""
PolicyKind = Literal[
    "gaussian",
    "squashed",
    "heteroscedastic",
    "deterministic",
    "categorical",
    "decision_transformer",
]
HIDDEN_SIZES = (256, 256)
SMALLEST = 36
"""Pixels that the convolutions need, of each side."""
LOG_STD_BOUNDS = (-5.0, 2.0)
SAC_LOG_STD_BOUNDS = (-20.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What it takes to build the networks of a run again, in plain values that JSON can hold.

    Args:
        observation_size: D.
        action_size: the number of action dimensions, or of discrete actions.
        action_bounds: the lowest and the highest action, one number per dimension each; None for
            discrete actions, and for -1 and 1.
        policy: ``"gaussian"``, ``"squashed"``, ``"heteroscedastic"``, ``"deterministic"``,
            ``"decision_transformer"``, or ``"categorical"`` for discrete actions.
        hidden_sizes: units of each hidden layer, in every network.
        dropout: of the policy.
        normalize_observation: whether the networks hold observation statistics.
        policy_options: further arguments of the function that makes the policy.
        images: what of an observation are images: the column that each begins at, and its shape.

    Raises:
        ValueError: if ``policy`` is not one of those.
    """

    observation_size: int
    action_size: int
    action_bounds: tuple[Sequence[float], Sequence[float]] | None = None
    policy: PolicyKind = "gaussian"
    hidden_sizes: Sequence[int] = HIDDEN_SIZES
    dropout: float = 0.0
    normalize_observation: bool = False
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    images: Images = ()

    def __post_init__(self) -> None:
        if self.policy not in get_args(PolicyKind):
            raise ValueError(f"policy must be one of {get_args(PolicyKind)}, got {self.policy!r}")

    @property
    def discrete(self) -> bool:
        return self.policy == "categorical"

    def policy_network(self, statistics: Statistics | None = None) -> TensorDictModuleBase:
        """Make a policy, freshly initialised.

        Args:
            statistics: mean and standard deviation of the observations, ``[D]`` each, used if
                ``normalize_observation``; without them the network waits for those of a checkpoint.
        """
        make = _POLICIES[self.policy]
        options = {"dropout": self.dropout, **self.policy_options, **self._common(statistics)}
        return make(self.observation_size, self._action, **options)

    def qvalue_network(self, statistics: Statistics | None = None) -> TensorDictModule:
        """Make Q(s, a), or for discrete actions Q(s, .); ``statistics`` as for the policy."""
        make = discrete_qvalue_network if self.discrete else qvalue_network
        return make(self.observation_size, self._action, **self._common(statistics))

    def value_network(self, statistics: Statistics | None = None) -> TensorDictModule:
        """Make V(s); ``statistics`` as for the policy."""
        return value_network(self.observation_size, **self._common(statistics))

    def build(
        self, statistics: Statistics | None = None
    ) -> tuple[TensorDictModuleBase, TensorDictModule, TensorDictModule]:
        """Make the networks of IQL, in the order of its losses' arguments.

        Args:
            statistics: of the observations, as for the policy.

        Returns:
            the policy, Q, and V, freshly initialised.
        """
        return (
            self.policy_network(statistics),
            self.qvalue_network(statistics),
            self.value_network(statistics),
        )

    @property
    def _action(self) -> int | Bounded:
        if self.action_bounds is None:
            return self.action_size
        low, high = torch.tensor(self.action_bounds, dtype=torch.float32)
        return Bounded(low=low, high=high)

    def _common(self, statistics: Statistics | None) -> dict[str, Any]:
        if not self.normalize_observation:
            statistics = None
        elif statistics is None:
            size = self.observation_size
            statistics = torch.zeros(size), torch.ones(size)
        seen = {"images": self.images} if self.images else {}
        return {"hidden_sizes": self.hidden_sizes, "observation_statistics": statistics, **seen}


def gaussian_policy(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ProbabilisticActor:
    """Make the paper's policy: a Gaussian whose mean is squashed by tanh and whose actions are not.

    The log standard deviation is a parameter of its own, independent of the state, initially 0 and
    clipped to [-5, 2]. Evaluated deterministically, the policy returns its mean.

    Args:
        observation: D, or a spec of shape ``[*B, D]``.
        action: the number of action dimensions A, bounded by -1 and 1, or a bounded spec.
        hidden_sizes: units of each hidden layer.
        dropout: probability of dropping a hidden unit in training; the paper has 0.1 on Kitchen and
            Adroit.
        observation_statistics: mean and standard deviation of the observations, ``[D]`` each.
        images: what of an observation are images, which are seen through convolutions.

    Returns:
        a module that writes ``loc``, ``scale`` and ``action``, ``[*B, A]``.
    """
    low, high = _bounds(action)
    torso = _torso(
        _size(observation),
        len(low),
        hidden_sizes,
        dropout=dropout,
        statistics=observation_statistics,
        images=images,
    )
    return _continuous_actor(
        GaussianParameters(torso, low, high, squash_mean=True), action, IndependentNormal
    )


def squashed_policy(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ProbabilisticActor:
    """Make a Gaussian squashed by tanh into the action bounds, with a state-independent deviation.

    Known to score lower than :func:`gaussian_policy`: actions of the data near a bound have extreme
    log-likelihoods. Arguments and returns as there.
    """
    low, high = _bounds(action)
    torso = _torso(
        _size(observation),
        len(low),
        hidden_sizes,
        dropout=dropout,
        statistics=observation_statistics,
        images=images,
    )
    bounds = {"low": low, "high": high}
    return _continuous_actor(
        GaussianParameters(torso, low, high, squash_mean=False), action, TanhNormal, bounds
    )


def heteroscedastic_policy(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ProbabilisticActor:
    """Make SAC's policy: a Gaussian squashed by tanh into the action bounds, its deviation one of the state.

    The log standard deviation is clipped to [-20, 2]. Arguments and returns as :func:`gaussian_policy`.
    """
    low, high = _bounds(action)
    torso = _torso(
        _size(observation),
        2 * len(low),
        hidden_sizes,
        dropout=dropout,
        statistics=observation_statistics,
        images=images,
    )
    bounds = {"low": low, "high": high, "tanh_loc": False}
    return _continuous_actor(_LocAndScale(torso), action, TanhNormal, bounds)


def deterministic_policy(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> Actor:
    """Make a policy without a distribution, within bounds; arguments as :func:`gaussian_policy`."""
    low, high = _bounds(action)
    torso = _torso(
        _size(observation),
        len(low),
        hidden_sizes,
        dropout=dropout,
        statistics=observation_statistics,
        images=images,
    )
    spec = action if isinstance(action, TensorSpec) else None
    return Actor(nn.Sequential(torso, TanhTo(low, high)), spec=spec)


def categorical_policy(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ProbabilisticActor:
    """Make a policy over discrete actions.

    Args:
        observation: D, or a spec of shape ``[*B, D]``.
        action: the number of actions A, or a spec: integers ``[*B]`` are written for a number or a
            :class:`~torchrl.data.Categorical` spec, one-hot vectors ``[*B, A]`` for the others.
        hidden_sizes: units of each hidden layer.
        dropout: probability of dropping a hidden unit in training.
        observation_statistics: mean and standard deviation of the observations, ``[D]`` each.
        images: what of an observation are images, which are seen through convolutions.

    Returns:
        a module that writes ``logits`` and ``action``.
    """
    torso = _torso(
        _size(observation),
        _choices(action),
        hidden_sizes,
        dropout=dropout,
        statistics=observation_statistics,
        images=images,
    )
    integers = isinstance(action, (int, Categorical))
    return ProbabilisticActor(
        TensorDictModule(torso, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=action if isinstance(action, TensorSpec) else Categorical(action),
        distribution_class=torch.distributions.Categorical if integers else OneHotCategorical,
        distribution_kwargs={"validate_args": False} if integers else None,
    )


def decision_transformer(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    context: int,
    episode_length: int,
    target_return: float,
    return_scale: float = 1.0,
    hidden_sizes: Sequence[int] = (128, 128, 128),
    heads: int = 1,
    dropout: float = 0.1,
    observation_statistics: Statistics | None = None,
) -> ReturnConditioned:
    """Make a Decision Transformer, in the sizes of its paper; actions are bounded by tanh.

    Args:
        observation: D, or a spec of shape ``[*B, D]``.
        action: the number of action dimensions A, bounded by -1 and 1, or a bounded spec.
        context: the number of steps that it sees.
        episode_length: of the longest episode in steps, at least 1: later times look like its last one.
        target_return: to aim at, a sum of rewards as the environment pays them.
        return_scale: what returns are divided by.
        hidden_sizes: the width, once for each layer.
        heads: of each layer, a divisor of the width.
        dropout: probability of dropping in training, of tokens, attention and residuals.
        observation_statistics: mean and standard deviation of the observations, ``[D]`` each.

    Returns:
        a module that writes ``action``, ``[*B, A]``, and its context.

    Raises:
        ImportError: the package ``transformers`` is not installed.
        ValueError: ``hidden_sizes`` differ, or another argument is out of range.
    """
    if len(set(hidden_sizes)) != 1:
        raise ValueError(f"hidden_sizes must all be the same width, got {list(hidden_sizes)}")
    for name, number in {"context": context, "episode_length": episode_length}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number!r}")
    if not 0 < return_scale < math.inf:
        raise ValueError(f"return_scale must be in (0, inf), got {return_scale!r}")
    low, high = _bounds(action)
    statistics = observation_statistics
    actor = TimedDTActor(
        _size(observation),
        len(low),
        window=context,
        episode_length=episode_length,
        return_scale=return_scale,
        width=hidden_sizes[0],
        layers=len(hidden_sizes),
        heads=heads,
        dropout=dropout,
        normalize=nn.Identity() if statistics is None else _Normalize(*statistics),
        scale_action=_Normalize((high + low) / 2, (high - low) / 2),
        squash=TanhTo(low, high),
    )
    return ReturnConditioned(actor, context, target_return)


def value_network(
    observation: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ValueOperator:
    """Make V(s): reads ``observation`` ``[*B, D]`` and writes ``state_value`` ``[*B, 1]``."""
    torso = _torso(
        _size(observation), 1, hidden_sizes, statistics=observation_statistics, images=images
    )
    return ValueOperator(torso, in_keys=["observation"])


def qvalue_network(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> ValueOperator:
    """Make Q(s, a): reads ``observation``, ``action``; writes ``state_action_value`` ``[*B, 1]``.

    With an action spec, the network sees actions in units of its bounds, from -1 to 1.
    """
    torso = _torso(
        _size(observation),
        1,
        hidden_sizes,
        statistics=observation_statistics,
        images=images,
        action_bounds=_bounds(action),
    )
    return ValueOperator(torso, in_keys=["observation", "action"])


def qvalue_ensemble(
    observation: int | TensorSpec, action: int | TensorSpec, *, num: int = 2, **kwargs
) -> list[ValueOperator]:
    """Make ``num`` independent :func:`qvalue_network`, a list for :class:`~torchrl_iql.IQLLoss`."""
    return [qvalue_network(observation, action, **kwargs) for _ in range(num)]


def discrete_qvalue_network(
    observation: int | TensorSpec,
    action: int | TensorSpec,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    observation_statistics: Statistics | None = None,
    images: Images = (),
) -> TensorDictModule:
    """Make Q(s, .): ``observation`` to ``state_action_value`` ``[*B, A]``, one per action."""
    torso = _torso(
        _size(observation),
        _choices(action),
        hidden_sizes,
        statistics=observation_statistics,
        images=images,
    )
    return TensorDictModule(torso, in_keys=["observation"], out_keys=["state_action_value"])


_POLICIES: dict[str, Callable[..., TensorDictModuleBase]] = {
    "gaussian": gaussian_policy,
    "squashed": squashed_policy,
    "heteroscedastic": heteroscedastic_policy,
    "deterministic": deterministic_policy,
    "categorical": categorical_policy,
    "decision_transformer": decision_transformer,
}


def unlike_made(network: nn.Module) -> str | None:
    """Say what of a network is not as the functions above make it, but for its sizes; None if nothing is."""
    for module in network.modules():
        kind = type(module)
        if kind not in _MADE_OF:
            return f"has a {kind.__name__}"
        if _has_hook(module):
            return f"has a hook of its {kind.__name__}"
        if isinstance(module, Torso) and not module.has_plain_layers:
            return "has other layers in its Torso"
    return None


def unlike(network: nn.Module, made: nn.Module) -> str | None:
    """Say what of a network is not as in another one that was made the same way; None if nothing is."""
    pairs = zip_longest(network.named_modules(), made.named_modules(), fillvalue=("", None))
    for (name, its), (place, known) in pairs:
        kinds = ["nothing" if x is None else type(x).__name__ for x in (its, known)]
        if type(its) is not type(known):
            return f"it has {kinds[0]} at {name or place}, expected {kinds[1]}"
        if its is not None and _has_hook(its):
            return f"it has a hook of its {kinds[0]} at {name}"
    return None


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _has_hook(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


class _Linear(nn.Linear):
    """A linear layer that also takes parameters stacked in front, ``[N, out, in]`` and ``[N, out]``."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return super().forward(input)
        stacked = input.expand(*self.weight.shape[:-2], *input.shape[-2:])
        return torch.baddbmm(self.bias.unsqueeze(-2), stacked, self.weight.mT)


def _per_batch(vector: Tensor) -> Tensor:
    """Return a vector per feature; if N of them are stacked, ``[N, 1, features]``."""
    return vector if vector.ndim == 1 else vector.unsqueeze(-2)


class _Normalize(nn.Module):
    """Zero mean and unit deviation, by fixed statistics."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if mean.shape != std.shape or not bool((std > 0).all()):
            raise ValueError(
                "observation_statistics must be a mean and a positive standard deviation of the same "
                f"shape, got shapes {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, observation: Tensor) -> Tensor:
        mean, std = (_per_batch(x).to(observation.dtype) for x in (self.mean, self.std))
        return (observation - mean) / std


class Torso(nn.Module):
    """Normalisation of the observation, and of the action if there is one, and an MLP.

    ``takes_stacked_parameters`` tells the losses that parameters with N in front give outputs
    ``[N, *B, out]`` in one call: a batched product is far cheaper than a vmap over small networks.
    """

    takes_stacked_parameters = True

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden_sizes: Sequence[int],
        *,
        dropout: float = 0.0,
        statistics: Statistics | None = None,
        action_bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        if statistics is not None and statistics[0].shape != (inputs,):
            raise ValueError(
                f"observation_statistics have shape {tuple(statistics[0].shape)}, expected {(inputs,)}"
            )
        self.dropout = dropout
        self.normalize = nn.Identity() if statistics is None else _Normalize(*statistics)
        self.scale_action = nn.Identity()
        if action_bounds is not None:
            low, high = action_bounds
            inputs += len(low)
            if not bool((low == -1).all() and (high == 1).all()):
                self.scale_action = _Normalize((high + low) / 2, (high - low) / 2)
        self.mlp = MLP(
            in_features=inputs,
            out_features=outputs,
            num_cells=list(hidden_sizes),
            activation_class=nn.ReLU,
            dropout=dropout or None,
            layer_class=_Linear,
        )
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)

    @property
    def layers(self) -> list[nn.Linear]:
        """The linear layers, from the inputs to the outputs."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    @property
    def has_plain_layers(self) -> bool:
        """Whether the layers are as they were made: linear, with ReLU between them, and dropout before it."""
        between: list[type] = [_Linear, nn.Dropout, nn.ReLU] if self.dropout else [_Linear, nn.ReLU]
        dropped = {layer.p for layer in self.mlp if isinstance(layer, nn.Dropout)}
        kinds = [type(layer) for layer in self.mlp]
        return dropped <= {self.dropout} and kinds == between * (len(self.layers) - 1) + [_Linear]

    def forward(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        batch = observation.shape[:-1]
        weight: Tensor = self.mlp[0].weight  # pyright: ignore
        # Images are kept in bytes until here, and environments give float64.
        observation = observation.to(weight.dtype)
        stacked = weight.shape[:-2]
        if stacked:
            observation = observation.reshape(-1, observation.shape[-1])
        inputs = self.normalize(observation)
        if action is not None:
            flat = action.reshape(*observation.shape[:-1], action.shape[-1]).to(weight.dtype)
            actions: Tensor = self.scale_action(flat)
            lead = torch.broadcast_shapes(inputs.shape[:-1], actions.shape[:-1])
            inputs = torch.cat([inputs.expand(*lead, -1), actions.expand(*lead, -1)], dim=-1)
        outputs = self.mlp(inputs)
        return outputs.reshape(*stacked, *batch, outputs.shape[-1]) if stacked else outputs


class Vision(nn.Module):
    """The convolutions of the DQN (Mnih et al., 2015) over each image of an observation, and the rest of it.

    Observations are ``[*B, D]``, as everywhere; images lie in their columns, from 0 to 255.

    Attributes:
        features: the width of what comes out.
    """

    def __init__(self, inputs: int, images: Images, statistics: Statistics | None = None) -> None:
        super().__init__()
        self.images = [(start, tuple(shape)) for start, shape in images]
        is_rest = torch.ones(inputs, dtype=torch.bool)
        self.convolutions = nn.ModuleList()
        self.features = 0
        for start, shape in self.images:
            is_rest[start : start + math.prod(shape)] = False
            sample = _channels_first(torch.zeros(1, *shape))
            if min(sample.shape[-2:]) < SMALLEST:
                raise ValueError(
                    f"an image has shape {list(shape)}, expected at least {SMALLEST} x {SMALLEST} pixels"
                )
            convolutions = ConvNet(
                in_features=sample.shape[1],
                num_cells=[32, 64, 64],
                kernel_sizes=[8, 4, 3],
                strides=[4, 2, 1],
                activation_class=nn.ReLU,
            )
            for layer in convolutions:
                if isinstance(layer, nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
                    nn.init.zeros_(layer.bias)  # pyright: ignore
            self.convolutions.append(convolutions)
            self.features += convolutions(sample).shape[-1]
        rest = is_rest.nonzero()[:, 0]
        self.rest = _runs(rest.tolist())
        self.features += len(rest)
        self.normalize = nn.Identity()
        if statistics is not None and len(rest):
            self.normalize = _Normalize(*(each[rest] for each in statistics))

    def forward(self, observation: Tensor) -> Tensor:
        first: Any = self.convolutions[0]
        batch, kind = observation.shape[:-1], first[0].weight.dtype
        rest = [observation[..., start:stop] for start, stop in self.rest]
        seen = [self.normalize(torch.cat(rest, dim=-1).to(kind))] if rest else []
        for (start, shape), convolutions in zip(self.images, self.convolutions, strict=True):
            pixels = observation[..., start : start + math.prod(shape)].reshape(-1, *shape)
            features = convolutions(_channels_first(pixels.to(kind)) / 255)
            seen.append(features.reshape(*batch, features.shape[-1]))
        return torch.cat(seen, dim=-1)


def _runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges, from the first to behind the last of each."""
    starts = [c for i, c in enumerate(columns) if i == 0 or columns[i - 1] != c - 1]
    stops = [
        c + 1 for i, c in enumerate(columns) if i == len(columns) - 1 or columns[i + 1] != c + 1
    ]
    return list(zip(starts, stops, strict=True))


def _channels_first(images: Tensor) -> Tensor:
    """Return images ``[n, H, W, C]``, ``[n, C, H, W]`` or ``[n, H, W]`` as ``[n, C, H, W]``."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    return images.movedim(-1, 1) if images.shape[-1] <= images.shape[1] else images


class SeeingTorso(nn.Module):
    """A :class:`Torso` behind :class:`Vision`."""

    def __init__(self, vision: Vision, torso: Torso) -> None:
        super().__init__()
        self.vision = vision
        self.torso = torso

    def forward(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        return self.torso(self.vision(observation), action)


def _torso(
    inputs: int,
    outputs: int,
    hidden_sizes: Sequence[int],
    *,
    statistics: Statistics | None = None,
    images: Images = (),
    **options: Any,
) -> nn.Module:
    if not images:
        return Torso(inputs, outputs, hidden_sizes, statistics=statistics, **options)
    vision = Vision(inputs, images, statistics)
    return SeeingTorso(vision, Torso(vision.features, outputs, hidden_sizes, **options))


class TanhTo(nn.Module):
    """tanh, scaled and shifted into [low, high]."""

    middle: Tensor
    half_range: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle + self.half_range * torch.tanh(x)


class GaussianParameters(nn.Module):
    """Mean from the state and a state-independent standard deviation, in units of the half range."""

    unit: Tensor

    def __init__(self, torso: nn.Module, low: Tensor, high: Tensor, squash_mean: bool) -> None:
        super().__init__()
        self.torso = torso
        self.log_std = nn.Parameter(torch.zeros(len(low)))
        self.squash = TanhTo(low, high) if squash_mean else nn.Identity()
        self.register_buffer("unit", (high - low) / 2 if squash_mean else torch.ones_like(low))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.moments(self.torso(observation), self.log_std)

    def moments(self, output: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, ``[*B, A]``, of what the torso puts out and the log deviation."""
        mean = self.squash(output)
        std = log_std.clamp(*LOG_STD_BOUNDS).exp() * self.unit
        return mean, _per_batch(std).expand_as(mean)


class _LocAndScale(nn.Module):
    """Mean and standard deviation, both from the state."""

    def __init__(self, torso: nn.Module) -> None:
        super().__init__()
        self.torso = torso

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_std = self.torso(observation).chunk(2, dim=-1)
        return loc, log_std.clamp(*SAC_LOG_STD_BOUNDS).exp()


_MADE_OF = {
    Torso,
    MLP,
    _Linear,
    nn.ReLU,
    nn.Dropout,
    nn.Identity,
    _Normalize,
    TanhTo,
    GaussianParameters,
    TensorDictModule,
    ValueOperator,
    Actor,
    ProbabilisticActor,
    SafeProbabilisticModule,
    nn.Sequential,
    nn.ModuleList,
}


def _continuous_actor(
    parameters: nn.Module,
    action: int | TensorSpec,
    distribution: type,
    distribution_kwargs: dict | None = None,
) -> ProbabilisticActor:
    # Argument checks of torch.distributions would wait for the device at every step.
    checks = {"validate_args": False} if distribution is IndependentNormal else {}
    return ProbabilisticActor(
        TensorDictModule(parameters, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=action if isinstance(action, TensorSpec) else None,
        distribution_class=distribution,
        distribution_kwargs={**checks, **(distribution_kwargs or {})},
    )


def _size(observation: int | TensorSpec) -> int:
    return observation if isinstance(observation, int) else observation.shape[-1]


def _choices(action: int | TensorSpec) -> int:
    if isinstance(action, int):
        return action
    if type(action) not in (Categorical, OneHot):  # their subclasses hold several choices
        raise ValueError(f"the action spec must be Categorical or OneHot, got {action}")
    return action.n  # pyright: ignore


def _bounds(action: int | TensorSpec) -> tuple[Tensor, Tensor]:
    if isinstance(action, int):
        return -torch.ones(action), torch.ones(action)
    if not isinstance(action, Bounded):
        raise ValueError(f"the action spec must be Bounded, got {action}")
    low, high = (b.reshape(-1, action.shape[-1])[0].float() for b in (action.low, action.high))
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
        raise ValueError(f"the action bounds must be finite and low < high, got {low} and {high}")
    return low, high
