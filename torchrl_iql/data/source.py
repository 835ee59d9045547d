"""What a reader knows of a data set before it reads the episodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from minari import EpisodeData

__all__ = ["Source"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set, found and opened.

    Attributes:
        name: what error messages call it: the id or path that was asked for.
        path: the file, or the folder of files, with all that determines the episodes, besides
            ``made_with``.
        transitions: how many are recorded.
        observation_space: space of one observation.
        action_space: space of one action.
        env_spec: the environment to evaluate in, if the data set names one.
        reference_scores: the returns that score 0 and 100 when normalized, if it names them.
        made_with: what else determines the episodes, as JSON can write it: of D4RL's files that do
            not tell, the steps after which an episode ends; of OGBench's, the task that is paid for.
        episodes: reads the episodes, with these infos; a reader may leave out the values of others.
    """

    name: str
    path: Path
    transitions: int
    observation_space: Space
    action_space: Space
    env_spec: EnvSpec | None = None
    reference_scores: tuple[float, float] | None = None
    made_with: int | str | None = None
    episodes: Callable[[Collection[str]], Iterator[EpisodeData]]
