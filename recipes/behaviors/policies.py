"""The policies that data are made with: one network, at every stage of its training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from torchrl_iql.checkpoint import load_tensors
from torchrl_iql_recipes.files import whole

__all__ = ["Stages", "actor"]

MEDIUM = 1 / 3
"""Of the expert's return."""


def actor(
    observation_size: int, action_size: int, hidden_sizes: Sequence[int]
) -> ProbabilisticActor:
    """Make a Gaussian squashed into [-1, 1], mean and deviation from the state: SAC's policy."""
    network = nn.Sequential(
        MLP(
            in_features=observation_size,
            out_features=2 * action_size,
            num_cells=list(hidden_sizes),
            activation_class=nn.ReLU,
        ),
        NormalParamExtractor(),
    )
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0, "tanh_loc": False},
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages:
    """A policy at ``S`` stages of its training.

    Attributes:
        sizes: of the observation, the action and the hidden layers.
        frames: environment steps trained on at each stage, ``[S]`` int64.
        returns: mean return of the stochastic policy at each stage, ``[S]`` float32.
        weights: the state dict of :func:`actor`, every entry with ``S`` in front, float32.
    """

    sizes: tuple[int, int, list[int]]
    frames: Tensor
    returns: Tensor
    weights: dict[str, Tensor]

    def policy(self, stage: int) -> ProbabilisticActor:
        """Return the policy at a stage; negative ones count from the end."""
        policy = actor(*self.sizes)
        policy.load_state_dict({key: value[stage] for key, value in self.weights.items()})
        return policy.eval().requires_grad_(False)

    def sampler(self, stage: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
        """Return the policy at a stage as a function: observation ``[D]`` to random action ``[A]``.

        In float64, and with NumPy's noise: an episode then depends on its generator alone, and little
        on the machine.
        """
        network = self.policy(stage)[0].double()

        @torch.no_grad()
        def sample(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            loc, scale = network(torch.as_tensor(observation, dtype=torch.float64))
            noise = rng.standard_normal(len(loc))
            return np.tanh(loc.numpy() + scale.numpy() * noise).astype(np.float32)

        return sample

    @property
    def expert(self) -> int:
        """The stage with the highest return."""
        return int(self.returns.argmax())

    @property
    def medium(self) -> int:
        """The first stage with a third of the expert's return, as in D4RL.

        Raises:
            ValueError: if the expert's return is negative.
        """
        best = float(self.returns[self.expert])
        if best < 0:
            raise ValueError(f"no stage is medium where the best return is negative, {best:.1f}")
        return int((self.returns >= MEDIUM * best).nonzero()[0])

    def digest(self, stages: Sequence[int]) -> str:
        """Return what tells the weights of some stages from others."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        for _, value in sorted(self.weights.items()):
            digest.update(value[list(stages)].numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Replace the file in one piece."""
        with whole(path) as unfinished:
            torch.save(dict(vars(self)), unfinished)

    @classmethod
    def load(cls, path: Path) -> Stages:
        """Read tensors and plain values only: the file can not run code.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds anything else.
        """
        try:
            return cls(**load_tensors(path))
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} holds no stages of a policy, as sac.py leaves them: {error}"
            ) from error
