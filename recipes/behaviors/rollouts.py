"""Episodes of a policy in any environment."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_iql import load_policy
from torchrl_iql.spaces import environment_action, observed_rows
from torchrl_iql_recipes.behaviors.policies import Stages
from torchrl_iql_recipes.behaviors.recording import record

__all__ = ["CheckpointRollouts", "RandomRollouts", "StageRollouts"]


@dataclass(frozen=True)
class RandomRollouts:
    """Episodes of uniformly random actions."""

    env_spec: EnvSpec

    algorithm = "uniformly random actions"
    size = 100_000

    @property
    def parameters(self) -> dict[str, Any]:
        return {}

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        env.action_space.seed(int(rng.integers(2**31)))
        seed = int(rng.integers(2**31))
        return record(env, lambda observation: env.action_space.sample(), seed=seed)


@dataclass(frozen=True)
class StageRollouts:
    """Episodes of a policy at one stage of its training after the other.

    Attributes:
        env_spec: the environment.
        policy: the stages.
        stages: those to play, in order: each gives an equal share of the data.
    """

    env_spec: EnvSpec
    policy: Stages
    stages: Sequence[int]

    size = 100_000

    @property
    def algorithm(self) -> str:
        frames = [int(self.policy.frames[stage]) for stage in self.stages]
        names = (
            " and ".join(map(str, frames)) if len(frames) < 3 else f"{frames[0]} to {frames[-1]}"
        )
        return f"SAC, stochastic, after {names} steps"

    @property
    def parameters(self) -> dict[str, Any]:
        return {"weights": self.policy.digest(self.stages)}

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        sample = self.policy.sampler(self.stages[int(share * len(self.stages))])
        seed = int(rng.integers(2**31))
        return record(env, lambda observation: sample(observation, rng), seed=seed)


@dataclass(frozen=True)
class CheckpointRollouts:
    """Episodes of a policy that this project trained, in any environment that it fits.

    Attributes:
        env_spec: the environment.
        checkpoint: a file that :func:`torchrl_iql.load_policy` reads.
    """

    env_spec: EnvSpec
    checkpoint: Path

    size = 100_000

    @property
    def algorithm(self) -> str:
        return f"the stochastic policy of {self.checkpoint.name}"

    @property
    def parameters(self) -> dict[str, Any]:
        with self.checkpoint.open("rb") as file:
            return {"checkpoint": hashlib.file_digest(file, "sha256").hexdigest()[:16]}

    @cached_property
    def policy(self) -> TensorDictModuleBase:
        return load_policy(self.checkpoint)

    def play(self, env: gymnasium.Env, rng: np.random.Generator, share: float) -> EpisodeBuffer:
        torch.manual_seed(int(rng.integers(2**31)))
        observed = self.policy.act.observation_space  # pyright: ignore

        @torch.no_grad()
        def act(observation: object) -> np.ndarray:
            rows, _ = observed_rows(observed, observation)
            with set_exploration_type(ExplorationType.RANDOM):
                td = self.policy(TensorDict({"observation": torch.from_numpy(rows)}, [1]))
            return environment_action(env.action_space, td["action"][0].numpy())

        return record(env, act, seed=int(rng.integers(2**31)))
