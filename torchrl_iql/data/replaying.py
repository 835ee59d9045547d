"""Whether a simulator does what was recorded: one step from recorded states, beside the recorded next ones.

A state is recovered in the first of these ways that stands its test:

1. from the observation, where it carries the positions and velocities of MuJoCo. The one or two leading
   coordinates of the root may be missing, if moving along them changes nothing;
2. from recorded states, ``qpos`` and ``qvel`` among the infos, in the same row or in one beside it;
3. by playing an episode from its recorded seed and options.

The test is that the simulator, put into the state, observes what was recorded. What it observes only after
a step, as contact forces, is found by asking the simulator itself, and is compared after the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium
import numpy as np
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Discrete
from minari import EpisodeData
from tqdm import tqdm

from torchrl_iql.data.d4rl import d4rl_episodes, d4rl_source, has_next_observations, is_d4rl
from torchrl_iql.data.episodes import errors_at
from torchrl_iql.data.logs import is_logs
from torchrl_iql.data.minari import minari_source, opened, stored_env
from torchrl_iql.data.simulator import Simulator
from torchrl_iql.environments import spec_of
from torchrl_iql.spaces import (
    action_rows,
    array,
    column,
    fits,
    flags,
    listed,
    observation_rows,
    require_finite,
)

__all__ = ["Deviation", "Replay", "replay"]

# Measured, at 99% and in the median of the worst column, as shares of its typical change: float32 moves the
# next state of eight environments by 3e-5 and 3e-5; MuJoCo 3.11 and 4.0 differ in that of an ant by 2e-3 and
# 1e-5. Another friction of one foot of a walker makes 4e-1 and 1e-5; torques 1% larger, 2e-1 and 5e-3.
TOLERANCE = 1e-2
"""An error of more than this share of the typical change from step to step is a difference."""
MEDIAN_TOLERANCE = 1e-3
"""The same for the median, which rounding that contacts amplify does not reach."""
SHARE = 0.01
"""Differences in at most this share of transitions do no harm."""
FLOOR = 1e-3
"""Least typical change, as a share of 1 + the largest magnitude: of what hardly changes."""

READ_BACK = 1e-5
"""Distance, as a share of 1 + the magnitude, at which a state does not give the recorded observation."""
OWN = 1e-6
"""The same between two observations of the simulator's own."""
NOT_A_NUMBER = 1e38
"""What stands for NaN from a simulator, to be far from what was recorded."""

EPISODES = 200
"""Episodes that transitions are drawn from; more if they are too short."""
FIRST = 10
"""Transitions of an episode in which rounding has not grown yet."""
SHOWN = 15
"""Columns that the table shows."""
NAMED = 4
"""Columns that the verdict names."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far a column of the next observation, or the reward, is from the recorded one.

    Attributes:
        name: what it is: ``"reward"``, or the index of a column and, if known, what is there, as
            ``"16 qvel[1] root"``.
        compared: transitions in which it was compared.
        median: absolute error, in its own unit, as are the next two.
        high: the error that 99% do not exceed.
        worst: the largest error.
        step: its typical change from step to step, the unit of ``scaled``.
        scaled: ``high`` in this unit.
        differ: transitions with an error of more than ``TOLERANCE`` of this unit.
        matches: whether they are at most ``SHARE`` of those in which it matters: all, or for rewards
            those in which it is not the most frequent one; and whether the median error is at most
            ``MEDIAN_TOLERANCE`` of this unit.
    """

    name: str
    compared: int
    median: float
    high: float
    worst: float
    step: float
    scaled: float
    differ: int
    matches: bool


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of replaying recorded transitions; ``str()`` makes a table of it.

    Attributes:
        name: of the data set.
        environment: id of the environment that was stepped.
        verdict: ``"match"``, ``"mismatch"``, or ``"unknown"``: it can not be told.
        reason: which columns differ, or why it can not be told; empty if all is equal.
        states: how states were recovered.
        transitions: how many were replayed.
        clipped_states: transitions left out because a clipped velocity does not tell the state.
        clipped_entries: entries of next observations left out because they are clipped.
        columns: of the next observation, in their order.
        overall: of all these columns together; errors only, ``step`` is NaN.
        reward: None if it was not compared.
        terminations: transitions that terminate here or there, and how many of them do not in both;
            None if they were not compared.
        not_compared: why rewards were not, and why terminations were not; empty if they were.
    """

    name: str
    environment: str
    verdict: Literal["match", "mismatch", "unknown"]
    reason: str = ""
    states: str = ""
    transitions: int = 0
    clipped_states: int = 0
    clipped_entries: int = 0
    columns: tuple[Deviation, ...] = ()
    overall: Deviation | None = None
    reward: Deviation | None = None
    terminations: tuple[int, int] | None = None
    not_compared: tuple[str, str] = "", ""

    def __str__(self) -> str:
        verdict = "can not be told" if self.verdict == "unknown" else self.verdict
        rows = {"environment": self.environment}
        if self.overall is not None:
            rows |= {
                "states": self.states,
                "compared": f"{self.transitions:,} transitions",
                "left out": f"{self.clipped_states:,} clipped states, "
                f"{self.clipped_entries:,} clipped entries of next observations",
                "termination": f"not compared: {self.not_compared[1]}",
            }
            if self.terminations is not None:
                ends, differ = self.terminations
                rows["termination"] = f"{ends:,} transitions terminate, {differ:,} differ"
            if self.reward is None:
                rows["reward"] = f"not compared: {self.not_compared[0]}"
        rows["verdict"] = f"{verdict}: {self.reason}" if self.reason else verdict
        width = max(map(len, rows)) + 2
        lines = [f"{key:{width}}{text}" for key, text in rows.items()]
        return "\n".join([self.name, *lines[:-1], *self._table(), lines[-1]])

    def _table(self) -> Iterator[str]:
        if self.overall is None:
            return
        shown = self.columns
        if len(shown) > SHOWN:
            shown = sorted(shown, key=lambda each: each.scaled, reverse=True)[:SHOWN]
        rest = len(self.columns) - len(shown)
        shown = [*shown, self.overall, *([self.reward] if self.reward else [])]
        width = max(len(each.name) for each in shown) + 2
        yield f"{'error':{width}}{'median':>9}{'99%':>9}{'worst':>9}{'99%/step':>10}{'differ':>8}"
        for each in shown:
            scaled = "" if each is self.overall else f"{each.scaled:.1e}"
            errors = "".join(f"{x:9.1e}" for x in (each.median, each.high, each.worst))
            yield f"{each.name:{width}}{errors}{scaled:>10}{each.differ:>8,}"
        if rest:
            yield f"({rest} columns with smaller errors are not shown)"


def replay(
    source: str | Path,
    env: str | EnvSpec | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    download: bool = True,
    trust_env: bool = False,
) -> Replay:
    """Step an environment from recorded states with the recorded actions, and compare what follows.

    Transitions are drawn from up to ``EPISODES`` episodes; up to a tenth of them terminate. Actions are
    applied as they are stored.

    Args:
        source: a Minari data set or a D4RL file, as for :func:`~torchrl_iql.data.load`.
        env: the environment to step, as an id or a specification, instead of the one that a Minari data
            set was recorded in.
        samples: transitions to compare.
        seed: of the draw.
        download: whether to download what is not there locally.
        trust_env: as of :func:`~torchrl_iql.data.load`.

    Raises:
        FileNotFoundError: if there is no such data set, or its download failed.
        TypeError: if a space can not be turned into rows.
        ValueError: if the data are damaged or empty, no environment is named, it is unknown, needs
            ``trust_env`` or can not be built, or observations or actions do not fit it.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    rng = np.random.default_rng(seed)
    env_spec = spec_of(env)
    recorded_in, stored = _recorded(source, env_spec, rng, download, trust_env)
    env_spec = env_spec or recorded_in
    if env_spec is None:
        raise ValueError(f"{source}: the data name no environment; name it (--env)")
    episodes: list[_Episode] = []
    while len(episodes) < EPISODES or sum(len(each.rewards) for each in episodes) < samples:
        if (episode := next(stored, None)) is None:
            break
        episodes.append(episode)
    if not episodes:
        raise ValueError(f"{source}: there are no transitions to replay")
    known: dict[str, Any] = {"name": str(source), "environment": env_spec.id}
    simulator = Simulator(env_spec)
    with closing(simulator.env), errors_at(str(source)):
        _require_fit(episodes, simulator.env, env_spec.id)
        drawn = _drawn(episodes, samples, rng)
        reasons = []
        for way in (
            partial(_from_observations, simulator, drawn),
            partial(_from_infos, simulator, drawn),
            partial(_from_seeds, simulator, episodes, samples),
        ):
            try:
                return _judged(way(), simulator, **known)
            except _NotRecovered as error:
                reasons.append(str(error))
    return Replay(verdict="unknown", reason="; ".join(dict.fromkeys(reasons)), **known)


class _NotRecovered(Exception):
    """Why states can not be recovered in one way."""


@dataclass(frozen=True, kw_only=True)
class _Episode:
    """T transitions and T + 1 observations ``[T + 1, D]``, the last one NaN if it is not stored."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    infos: dict[str, Any]
    seed: int | None
    options: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class _Transitions:
    """n transitions and where they are from: the episode and the step."""

    origins: list[tuple[_Episode, int]]
    observations: np.ndarray
    actions: list[Any]
    rewards: np.ndarray
    terminated: np.ndarray
    following: np.ndarray

    @classmethod
    def of(cls, origins: list[tuple[_Episode, int]]) -> _Transitions:
        return cls(
            origins=origins,
            observations=np.stack([episode.observations[step] for episode, step in origins]),
            actions=[episode.actions[step] for episode, step in origins],
            rewards=np.array([episode.rewards[step] for episode, step in origins]),
            terminated=np.array([episode.terminated[step] for episode, step in origins]),
            following=np.stack([episode.observations[step + 1] for episode, step in origins]),
        )

    def __getitem__(self, rows: Any) -> _Transitions:
        return self.of([self.origins[row] for row in rows.nonzero()[0]])

    def info(self, name: str, size: int, offset: int = 0) -> np.ndarray:
        """Return an info of the row of each transition, or of one beside it: ``[n, size]``, or NaN."""
        found = np.full((len(self.origins), size), np.nan)
        for row, (episode, step) in enumerate(self.origins):
            if name not in episode.infos:
                raise _NotRecovered(f"there is no infos/{name}")
            values = np.asarray(episode.infos[name])
            if values.shape[1:] != (size,):
                raise _NotRecovered(
                    f"infos/{name} has shape {list(values.shape)}, expected [n, {size}]"
                )
            if 0 <= step + offset < len(values):
                found[row] = values[step + offset]
        return found


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What the simulator made of transitions, in their order."""

    transitions: _Transitions
    states: str
    following: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    not_compared: tuple[str, str] = "", ""
    clipped_states: int = 0
    played: bool = False


def _recorded(
    source: str | Path,
    env_spec: EnvSpec | None,
    rng: np.random.Generator,
    download: bool,
    trust_env: bool,
) -> tuple[EnvSpec | None, Iterator[_Episode]]:
    """Find the environment, if the data name it, and the episodes in a random order."""
    if is_logs(source, None):
        raise ValueError(
            f"{source}: logs are replayed as a data set of Minari's: store them by "
            "load_dataset(...).save_minari(id)"
        )
    if is_d4rl(source):
        found = d4rl_source(source, env_spec=env_spec, download=download, columns=None)
        time_limit = cast(int | None, found.made_with)
        stored = list(d4rl_episodes(found.path, time_limit, ("qpos", "qvel", "goal")))
        has_next = has_next_observations(found.path)
        order = rng.permutation(len(stored)).tolist()
        space = found.observation_space
        return found.env_spec, (_episode(stored[i], space, has_next=has_next) for i in order)
    found = minari_source(source, env_spec=env_spec, download=download, trust_env=trust_env)
    dataset = opened(found.path, trust_env=trust_env)
    if env_spec is None:
        with errors_at(str(source)):
            env_spec = stored_env(dataset.env_spec, trust_env=trust_env)

    def episodes() -> Iterator[_Episode]:
        for index in rng.permutation(dataset.episode_indices).tolist():
            try:
                (episode,) = dataset.iterate_episodes([index])
                (metadata,) = dataset.storage.get_episode_metadata([index])
            except Exception as error:  # whatever h5py, Arrow and Minari meet in damaged files
                raise ValueError(f"{source}, episode {index} can not be read: {error}") from error
            start: dict[str, Any] = {key: metadata.get(key) for key in ("seed", "options")}
            yield _episode(episode, found.observation_space, **start)

    return env_spec, episodes()


def _episode(
    episode: EpisodeData,
    space: Space,
    *,
    has_next: bool = True,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
) -> _Episode:
    with errors_at(f"episode {episode.id}"):
        rewards = column(episode.rewards, "rewards").astype(np.float64)
        rows = observation_rows(space, episode.observations, len(rewards) + 1, np.float64)
        terminated = flags(episode.terminations, "terminations")
        if terminated[-1:].any() and not has_next:
            rows[-1] = np.nan
        require_finite(rows[:-1], "observations")
        require_finite(rewards, "rewards")
        return _Episode(
            observations=rows,
            actions=array(episode.actions, "actions"),
            rewards=rewards,
            terminated=terminated,
            infos={key: value for key, value in (episode.infos or {}).items() if value is not None},
            seed=seed,
            options=options,
        )


def _require_fit(episodes: list[_Episode], env: gymnasium.Env, env_id: str) -> None:
    columns = math.prod(env.observation_space.shape or ())
    found = episodes[0].observations.shape[1]
    if found != columns:
        raise ValueError(f"observations have {found} columns, those of {env_id} {columns}")
    found, shape = episodes[0].actions.shape[1:], env.action_space.shape or ()
    if not fits(found, shape):
        raise ValueError(f"actions have shape {list(found)}, those of {env_id} {list(shape)}")
    for episode in episodes:
        if isinstance(env.action_space, Discrete):
            action_rows(env.action_space, episode.actions)
        else:
            require_finite(episode.actions, "actions")


def _drawn(episodes: list[_Episode], samples: int, rng: np.random.Generator) -> _Transitions:
    """Draw transitions, first those that terminate: up to a tenth."""
    origins = [(episode, step) for episode in episodes for step in range(len(episode.rewards))]
    terminates = np.concatenate([episode.terminated for episode in episodes])
    order = rng.permutation(len(origins))
    first = order[terminates[order]][: samples // 10]
    rest = order[~np.isin(order, first)]
    rows = np.concatenate([first, rest])[:samples]
    return _Transitions.of([origins[row] for row in rows])


def _from_observations(simulator: Simulator, drawn: _Transitions) -> _Outcome:
    positions, size = _require_body(simulator)
    lacking = np.flatnonzero(simulator.columns[:size] < 0)
    if lacking.tolist() not in ([], [0], [0, 1]):
        entries = [f"qpos[{i}]" if i < positions else f"qvel[{i - positions}]" for i in lacking]
        raise _NotRecovered(f"observations are not the state, they lack {listed(entries, NAMED)}")
    clipped = simulator.clipped(drawn.observations).any(1)
    if clipped.all():
        raise _NotRecovered("all states that were drawn are clipped")
    kept = drawn[~clipped]
    states = kept.observations[:, simulator.columns[:size]]
    states[:, lacking] = 0
    how = "from observations"
    if len(lacking):
        how += f", with {' and '.join(f'qpos[{i}]' for i in lacking)} at 0"
    return _stepped(simulator, kept, states, how, lacking, int(clipped.sum()))


def _from_infos(simulator: Simulator, drawn: _Transitions) -> _Outcome:
    positions, size = _require_body(simulator)
    reasons = []
    for offset, how in (
        (0, "infos/qpos and infos/qvel"),
        (-1, "infos/qpos and infos/qvel, shifted: row t is the state of observation t + 1"),
        (1, "infos/qpos and infos/qvel, shifted: row t + 1 is the state of observation t"),
    ):
        states = np.concatenate(
            [
                drawn.info("qpos", positions, offset),
                drawn.info("qvel", size - positions, offset),
            ],
            axis=1,
        )
        known = np.isfinite(states).all(1)
        if not known.any():
            continue
        try:
            return _stepped(simulator, drawn[known], states[known], how, np.arange(0), 0)
        except _NotRecovered as error:
            reasons.append(f"{how}: {error}")
    raise _NotRecovered(reasons[0] if reasons else "infos/qpos and infos/qvel are not finite")


def _require_body(simulator: Simulator) -> tuple[int, int]:
    """Return the numbers of positions, and of positions and velocities."""
    if simulator.body is None:
        raise _NotRecovered("the environment has no state of MuJoCo that can be set")
    return simulator.positions, simulator.positions + simulator.velocities


def _stepped(
    simulator: Simulator,
    transitions: _Transitions,
    states: np.ndarray,
    how: str,
    moved: np.ndarray,
    clipped_states: int,
) -> _Outcome:
    """Put the simulator into each state, where it has to observe what is recorded, and step."""
    no_goal = ""
    if simulator.has_goal:
        columns = simulator.columns[-2:]
        if (columns >= 0).all():
            goals = transitions.observations[:, columns]
        else:
            try:
                goals = transitions.info("goal", 2)
            except _NotRecovered as error:
                goals = np.zeros((len(states), 2))
                no_goal = f"the goal is not known, {error}"
        states = np.concatenate([states, goals], axis=1)

    first, again = simulator.own(moved)
    expected, found = (np.stack([each[0] for each in outcomes]) for outcomes in (first, again))
    unit = _unit(np.diff(expected, axis=0), expected)
    if (np.abs(found - expected) > TOLERANCE * unit).mean(0).max() > SHARE:
        raise _NotRecovered(
            "put back into the same positions and velocities, the simulator goes on otherwise"
        )
    expected, found = (np.array([each[1:] for each in outcomes]) for outcomes in (first, again))
    differs = np.abs(found - expected) > TOLERANCE * _unit(expected, expected)
    hidden = "here it depends on more than positions, velocities and the action"
    not_compared = [no_goal or (hidden if share > SHARE else "") for share in differs.mean(0)]

    put, outcomes, after = [], [], []
    for state, action in zip(_progress(states), transitions.actions, strict=True):
        put.append(simulator.put(state))
        outcomes.append(simulator.step(action))
        after.append(simulator.put(simulator.state()))
    found = _columns(outcomes)
    only_stepped = (np.abs(after - found["following"]) > OWN * (1 + np.abs(after))).any(0)
    carrying = simulator.columns[: simulator.positions + simulator.velocities]
    if only_stepped[carrying[carrying >= 0]].any():
        raise _NotRecovered("a wrapper changes how positions and velocities are observed")
    recorded = transitions.observations
    wrong = np.abs(put - recorded) > READ_BACK * (1 + np.abs(recorded))
    wrong &= ~only_stepped
    if (shares := wrong.mean(0)).max() > SHARE:
        at = int(shares.argmax())
        row = int(wrong[:, at].argmax())
        raise _NotRecovered(
            f"in these states the simulator observes something else, as in column {at} "
            f"{put[row][at]:.6g} for {recorded[row, at]:.6g}"
        )
    return _Outcome(
        transitions=transitions,
        states=how,
        **found,
        not_compared=(not_compared[0], not_compared[1]),
        clipped_states=clipped_states,
    )


def _from_seeds(simulator: Simulator, episodes: list[_Episode], samples: int) -> _Outcome:
    origins, outcomes = [], []
    total = sum(len(episode.rewards) for episode in episodes)
    with tqdm(total=min(samples, total), delay=2, leave=False, disable=None) as bar:
        for episode in episodes:
            if episode.seed is None:
                raise _NotRecovered("there are no seeds to play episodes from")
            observation, _ = simulator.env.reset(seed=episode.seed, options=episode.options)
            recorded = episode.observations[0]
            wrong = np.abs(observation - recorded) > READ_BACK * (1 + np.abs(recorded))
            if wrong.any():
                at = int(wrong.argmax())
                raise _NotRecovered(
                    f"seed {episode.seed} gives another first observation, in column {at} "
                    f"{observation[at]:.6g} for {recorded[at]:.6g}"
                )
            for step, action in enumerate(episode.actions):
                origins.append((episode, step))
                outcomes.append(simulator.step(action))
                bar.update()
                if outcomes[-1][2]:
                    break
            if len(outcomes) >= samples:
                break
    return _Outcome(
        transitions=_Transitions.of(origins),
        states="episodes played from their seeds",
        **_columns(outcomes),
        played=True,
    )


def _progress(states: np.ndarray) -> Any:
    return tqdm(states, delay=2, leave=False, disable=None)


def _columns(outcomes: list[tuple[np.ndarray, float, bool]]) -> dict[str, Any]:
    following, rewards, terminated = zip(*outcomes, strict=True)
    return {
        "following": np.stack(following),
        "rewards": np.array(rewards),
        "terminated": np.array(terminated),
    }


def _steps(transitions: _Transitions) -> np.ndarray:
    """Return the typical change of each column from step to step."""
    return _unit(transitions.following - transitions.observations, transitions.observations)


def _unit(changes: np.ndarray, values: np.ndarray) -> np.ndarray:
    known = changes[np.isfinite(changes).reshape(len(changes), -1).all(1)]
    spread = known.std(0) if len(known) else 0.0
    return spread + FLOOR * (1 + np.abs(values).max(0))


def _deviation(
    name: str, errors: np.ndarray, unit: float | np.ndarray, matters: np.ndarray | None = None
) -> Deviation:
    """Describe errors ``[n]``, NaN where nothing was compared."""
    known = np.isfinite(errors)
    differs = known & (errors > TOLERANCE * unit)
    matters = known if matters is None else matters
    values = errors[known] if known.any() else np.zeros(1)
    median, high, worst = np.quantile(values, [0.5, 0.99, 1]).tolist()
    return Deviation(
        name=name,
        compared=int(known.sum()),
        median=median,
        high=high,
        worst=worst,
        step=float(unit) if np.ndim(unit) == 0 else math.nan,
        scaled=high / float(unit) if np.ndim(unit) == 0 else math.nan,
        differ=int(differs.sum()),
        matches=bool(
            differs.sum() <= SHARE * matters.sum() and median <= np.max(MEDIAN_TOLERANCE * unit)
        ),
    )


def _judged(outcome: _Outcome, simulator: Simulator, name: str, environment: str) -> Replay:
    transitions, count = outcome.transitions, len(outcome.rewards)
    following, unit = transitions.following, _steps(transitions)
    clipped = simulator.clipped(following) & np.isfinite(following)
    errors = np.abs(np.nan_to_num(outcome.following, nan=NOT_A_NUMBER) - following)
    errors[clipped] = np.nan
    names = simulator.names()
    columns = tuple(
        _deviation(f"{i} {names.get(i, '')}".strip(), errors[:, i], unit[i])
        for i in range(len(unit))
    )
    far = errors > TOLERANCE * unit
    found = Replay(
        name=name,
        environment=environment,
        verdict="match",
        states=outcome.states,
        transitions=count,
        clipped_states=outcome.clipped_states,
        clipped_entries=int(clipped.sum()),
        columns=columns,
        overall=_deviation(f"all {len(columns)} columns", errors, unit),
        reward=None if outcome.not_compared[0] else _reward(outcome),
        terminations=None if outcome.not_compared[1] else _ends(outcome),
        not_compared=outcome.not_compared,
    )
    if not np.isfinite(errors).any():
        return replace(found, verdict="unknown", reason="no next observation can be compared")

    differing = sorted(
        (each for each in columns if each.differ), key=lambda each: each.scaled, reverse=True
    )
    wrong = [each for each in differing if not each.matches]
    reasons = [f"columns {listed([each.name for each in wrong], NAMED)}"] if wrong else []
    if found.reward is not None and not found.reward.matches:
        reasons.append("rewards")
    if found.terminations is not None:
        ends, differ = found.terminations
        if differ > SHARE * ends:
            reasons.append(f"terminations, {differ:,} of {ends:,}")
    if reasons:
        reason = "; ".join(reasons) + f"; {far.any(1).sum():,} of {count:,} observations differ"
        found = replace(found, verdict="mismatch", reason=reason)
        if outcome.played and wrong and _begins_alike(outcome, simulator):
            reason = (
                f"episodes agree in their first {FIRST} transitions and differ later, as they also do "
                f"when rounding grows, with another version of MuJoCo: {reason}"
            )
            return replace(found, verdict="unknown", reason=reason)
    elif differing:
        few = listed([each.name for each in differing], NAMED)
        reason = f"but for {far.any(1).sum():,} of {count:,} observations, in columns {few}"
        found = replace(found, reason=reason)
    return found


def _reward(outcome: _Outcome) -> Deviation:
    """Compare rewards; where they are as always, agreement is no evidence."""
    recorded = outcome.transitions.rewards
    errors, unit = np.abs(outcome.rewards - recorded), _unit(recorded, recorded)
    values, counts = np.unique(recorded, return_counts=True)
    rare = recorded != values[counts.argmax()]
    return _deviation("reward", errors, unit, rare | (errors > TOLERANCE * unit))


def _ends(outcome: _Outcome) -> tuple[int, int]:
    here, there = outcome.terminated, outcome.transitions.terminated
    return int((here | there).sum()), int((here != there).sum())


def _begins_alike(outcome: _Outcome, simulator: Simulator) -> bool:
    """Return whether episodes begin as recorded, so that what follows may be rounding that grows."""
    early = np.array([step < FIRST for _, step in outcome.transitions.origins])
    first = replace(
        outcome,
        transitions=outcome.transitions[early],
        following=outcome.following[early],
        rewards=outcome.rewards[early],
        terminated=outcome.terminated[early],
        played=False,
    )
    return _judged(first, simulator, "", "").verdict == "match"
