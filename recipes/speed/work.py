"""What every contender of the benchmark does in one gradient step, and on which data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict

__all__ = ["Work"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One gradient step of IQL: sizes, coefficients, and the data set that minibatches come from.

    A contender draws ``batch_size`` transitions uniformly, takes the three losses from the same
    parameters, descends them in one Adam step, and moves the target networks.

    Args:
        observation_size: D.
        action_size: A.
        hidden_sizes: units of each hidden layer, in every network.
        num_qvalue_nets: the size N of the Q ensemble.
        transitions: the size of the data set.
        batch_size: transitions in a minibatch.
        expectile: of V.
        temperature: of the policy.
        discount: of rewards.
        learning_rate: of Adam, for all networks.
        target_rate: of the target networks.
        device: where the networks are, ``"cpu"`` or ``"cuda"``.
        seed: of the data and of everything that a contender draws.
    """

    observation_size: int = 17
    action_size: int = 6
    hidden_sizes: tuple[int, ...] = (256, 256)
    num_qvalue_nets: int = 2
    transitions: int = 100_000
    batch_size: int = 256
    expectile: float = 0.7
    temperature: float = 3.0
    discount: float = 0.99
    learning_rate: float = 3e-4
    target_rate: float = 0.005
    device: str = "cpu"
    seed: int = 0

    def data(self) -> TensorDict:
        """Draw random transitions ``[transitions]`` on the CPU, one in a hundred terminal."""
        generator = torch.Generator().manual_seed(self.seed)
        n = self.transitions
        normal = {"generator": generator, "dtype": torch.float32}
        terminated = torch.rand(n, 1, generator=generator) < 0.01
        return TensorDict(
            {
                "observation": torch.randn(n, self.observation_size, **normal),
                # Inside the bounds, where a squashed policy has a finite likelihood.
                "action": torch.rand(n, self.action_size, **normal) * 1.98 - 0.99,
                "next": {
                    "observation": torch.randn(n, self.observation_size, **normal),
                    "reward": torch.randn(n, 1, **normal),
                    "done": terminated.clone(),
                    "terminated": terminated,
                },
            },
            batch_size=[n],
        )
