"""A policy as it is deployed: what an environment observes in, an action of that environment out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_iql.spaces import environment_actions, observed_rows

__all__ = ["Acting"]


@dataclass(frozen=True, eq=False)
class Acting:
    """The actions of a policy in the spaces of an environment, without exploration.

    Args:
        policy: reads ``"observation"`` ``[B, D]`` and writes ``"action"``, as rows of data sets.
        observation_space: of one observation, of flattened size D.
        action_space: of one action, ``Box`` or ``Discrete``.

    Example:
        >>> from torchrl_iql.models import Architecture
        >>> from gymnasium.spaces import Box, Discrete
        >>> architecture = Architecture(observation_size=3, action_size=2, policy="categorical")
        >>> act = Acting(architecture.policy_network(), Box(-1, 1, (3,)), Discrete(2, start=5))
        >>> bool(act([0.1, 0.2, 0.3]) in (5, 6)), act(np.zeros((4, 3))).shape
        (True, (4,))
    """

    policy: TensorDictModuleBase
    observation_space: Space
    action_space: Space

    def __call__(self, observation: Any) -> Any:
        """Return the action for an observation, or those for a batch.

        Args:
            observation: as the environment gives it; of a batch every leaf has B in front.

        Returns:
            an action of the environment: array ``[*shape]`` in the type and the bounds of a ``Box``, or
            the number of a category; of a batch an array ``[B, *shape]`` or ``[B]``.

        Raises:
            ValueError: the observation is not finite or not one of the space, or the policy needs more than
                that, as a Decision Transformer.
        """
        rows, is_batch = observed_rows(self.observation_space, observation)
        actions = environment_actions(self.action_space, self.rows(rows))
        return actions if is_batch else actions[0]

    def rows(self, observations: np.ndarray) -> np.ndarray:
        """Return the rows of actions, ``[B, A]`` or ``[B]``, for rows of observations, ``[B, D]``."""
        keys = list(self.policy.in_keys)
        if keys != ["observation"]:
            raise ValueError(
                f"{type(self.policy).__name__} acts by {', '.join(map(str, keys))}, not by an observation: "
                "play it with torchrl_iql.Evaluator, or call it with what it wrote under 'next' a step before"
            )
        device = next((parameter.device for parameter in self.policy.parameters()), None)
        batch = TensorDict(
            {"observation": torch.as_tensor(observations, device=device)}, [len(observations)]
        )
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            return self.policy(batch)["action"].cpu().numpy()
