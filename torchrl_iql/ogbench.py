"""OGBench's environments, as they are played here: from a seed, without touching NumPy's global generator.

OGBench is optional (``pip install 'torchrl-iql[ogbench]'``), and imported when one of its environments is
asked for by the id of a single task, as ``"antmaze-medium-singletask-v0"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

__all__ = ["OwnChance", "is_from_ogbench", "is_single_task", "ogbench_package"]


def ogbench_package() -> ModuleType:
    """Import OGBench, which tells gymnasium its environments.

    Raises:
        ModuleNotFoundError: if it is not installed; the message says how to.
    """
    try:
        import ogbench
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"OGBench's tasks need its package: pip install 'torchrl-iql[ogbench]', with Python before "
            f"3.13 ({error})",
            name=error.name,
        ) from error
    return ogbench


def is_single_task(env: str) -> bool:
    """Return whether this is the id of an environment of OGBench that pays for one task."""
    return "-singletask-" in env


def is_from_ogbench(env: gymnasium.Env) -> bool:
    return type(env.unwrapped).__module__.startswith("ogbench.")


class OwnChance(gymnasium.Wrapper):
    """Makes the episodes of an environment of OGBench a function of the seed of ``reset``.

    Mazes draw starts and teleports from NumPy's global generator, and all environments begin with a few
    steps of actions drawn from their action space, which leave traces in the state; arms make a new
    space, without a seed, for each. Here the global generator is lent to the environment in a state of
    its own, and is put back, and the action space is one, with the seed.

    Args:
        env: an environment of OGBench, wrapped or not.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._state: Any = np.random.RandomState().get_state()
        inner, space = env.unwrapped, env.unwrapped.action_space
        if inner.action_space is not space:
            kind = type(inner)
            own = {"action_space": space, "__module__": kind.__module__}
            inner.__class__ = type(kind.__name__, (kind,), own)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._state = np.random.RandomState(np.random.MT19937(seed)).get_state()
            self.unwrapped.action_space.seed(seed)
        with self._lent():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        with self._lent():
            return self.env.step(action)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        state = np.random.get_state()
        np.random.set_state(self._state)
        try:
            yield
        finally:
            self._state = np.random.get_state()
            np.random.set_state(state)
