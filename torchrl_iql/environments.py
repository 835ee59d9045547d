"""Environments as they are read here: specifications, spaces, flat observations, success, reference scores.

An observation that is not a vector becomes one as :class:`gymnasium.wrappers.FlattenObservation` makes it,
in data (:mod:`torchrl_iql.data.spaces`), in evaluations and online.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import gymnasium
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import FlattenObservation

from torchrl_iql.ogbench import OwnChance, is_from_ogbench, is_single_task, ogbench_package

__all__ = [
    "REFERENCE_SCORES",
    "antmaze_id",
    "flat_environment",
    "reference_scores_of",
    "register_robotics",
    "require_reference_scores",
    "spaces_of",
    "spec_of",
    "success",
]


@cache
def register_robotics() -> str:
    """Tell gymnasium of gymnasium-robotics, at the first look-up: it loads what few need.

    Returns:
        what it would print about the rewards of some hands, to be said to who asks for one of them.
    """
    from farama_notifications import notifications

    notices = notifications.get("gymnasium_robotics", {})
    of_hands = {version: text for version, text in notices.items() if "AdroitHandDoorDense" in text}
    for version in of_hands:
        del notices[version]
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    return of_hands.get(gymnasium_robotics.__version__, "")


def antmaze_id(maze: str) -> str:
    """Return the id of D4RL's AntMaze, :class:`torchrl_iql.antmaze.AntMaze`, in a maze."""
    title = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}[maze]
    return f"torchrl_iql/AntMaze_{title}-v0"


for _maze, _steps in [("umaze", 700), ("medium", 1000), ("large", 1000)]:
    gymnasium.register(
        antmaze_id(_maze),
        entry_point="torchrl_iql.antmaze:AntMaze",
        max_episode_steps=_steps,
        kwargs={"maze": _maze},
    )

REFERENCE_SCORES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "HalfCheetah": (-280.178953, 12135.0),
        "Hopper": (-20.272305, 3234.3),
        "Walker2d": (1.629008, 4592.3),
        "Ant": (-325.6, 3879.7),
        "AdroitHandPen": (96.262799, 3076.8331017826877),
        "AdroitHandHammer": (-274.856578, 12794.134825156867),
        "AdroitHandDoor": (-56.512833, 2880.5693087298737),
        "AdroitHandRelocate": (-6.425911, 4233.877797728884),
        "FrankaKitchen": (0.0, 4.0),
    }
)
"""D4RL's mean returns of a random and of an expert policy, by environment name (no version)."""


def reference_scores_of(env_spec: EnvSpec | None) -> tuple[float, float] | None:
    """Find the entry of :data:`REFERENCE_SCORES` under the exact name of an environment, if any."""
    if env_spec is None or env_spec.namespace is not None:
        return None
    return REFERENCE_SCORES.get(env_spec.name)


def require_reference_scores(scores: tuple[float, float]) -> None:
    """Raise a ValueError if these returns of a random and of an expert policy can not be used."""
    random, expert = scores
    if not -math.inf < random < expert < math.inf:
        raise ValueError(
            "reference_scores must be finite returns (random, expert) with random < expert, "
            f"got {scores}."
        )


def spec_of(env: str | EnvSpec | None) -> EnvSpec | None:
    """Return the specification of an environment that may be given by its id.

    Raises:
        ModuleNotFoundError: if it is one of OGBench's single tasks, and OGBench is not installed.
        ValueError: if gymnasium does not know the id.
    """
    if not isinstance(env, str):
        return env
    if is_single_task(env):
        ogbench_package()
    register_robotics()
    try:
        return gymnasium.spec(env)
    except gymnasium.error.Error as error:
        raise ValueError(f"unknown environment {env!r}: {error}") from error


def spaces_of(env_spec: EnvSpec) -> tuple[Space, Space]:
    """Return an environment's observation and action space, as recordings are to be read.

    Compound observations are recorded as the vectors that they are flattened to, others as they are.

    Raises:
        ValueError: it can not be built.
    """
    with _made(env_spec) as env:
        observation_space, action_space = env.observation_space, env.action_space
    if isinstance(observation_space, spaces.Dict | spaces.Tuple):
        observation_space = spaces.flatten_space(observation_space)
    return observation_space, action_space


def flat_environment(env_spec: EnvSpec | str) -> gymnasium.Env:
    """Make an environment whose observations are vectors.

    One of OGBench is in :class:`~torchrl_iql.ogbench.OwnChance`.

    Raises:
        ValueError: it can not be built.
    """
    env = _made(env_spec)
    space = env.observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    return env if is_vector else FlattenObservation(env)


def _made(env_spec: EnvSpec | str) -> gymnasium.Env:
    name = env_spec if isinstance(env_spec, str) else env_spec.id
    if name.replace("-v", "Dense-v") in (notice := register_robotics()):  # dense, if not Sparse-v
        warnings.warn(notice, stacklevel=3)
    try:
        if isinstance(env_spec, str) and is_single_task(env_spec):
            ogbench_package()
        env = gymnasium.make(env_spec)
        return OwnChance(env) if is_from_ogbench(env) else env
    except Exception as error:  # of gymnasium, or of the package that the environment is in
        raise ValueError(
            f"the environment {name!r} can not be built: {error}. Is the package that defines it "
            "installed and registered with gymnasium?"
        ) from error


def success(info: Mapping[str, Any]) -> bool | None:
    """Return whether the info of a step reports success; None if it does not say."""
    reported = info.get("success", info.get("is_success"))
    return None if reported is None else bool(reported)
