"""What data need to know about the environment they are evaluated in."""

from __future__ import annotations

import gymnasium
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec

__all__ = ["spaces_of", "spec_of"]


def spec_of(env: str | EnvSpec | None) -> EnvSpec | None:
    """The specification of an environment that may be given by its id.

    Raises:
        ValueError: If gymnasium does not know the id.
    """
    if not isinstance(env, str):
        return env
    try:
        return gymnasium.spec(env)
    except gymnasium.error.Error as error:
        raise ValueError(f"unknown environment {env!r}: {error}") from error


def spaces_of(env_spec: EnvSpec) -> tuple[Space, Space]:
    """Observation and action space of an environment; compound observations are flattened.

    Raises:
        ValueError: If the environment can not be built.
    """
    try:
        env = gymnasium.make(env_spec)
    except Exception as error:  # of gymnasium, or of the package that the environment is in
        raise ValueError(f"the environment {env_spec.id!r} can not be built: {error}") from error
    with env:
        observation_space, action_space = env.observation_space, env.action_space
    if isinstance(observation_space, spaces.Dict | spaces.Tuple):
        observation_space = spaces.flatten_space(observation_space)
    return observation_space, action_space
