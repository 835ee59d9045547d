"""Environments as they are read here: specifications, spaces, flat observations, success, reference scores.

An observation that is not a vector becomes one as :class:`gymnasium.wrappers.FlattenObservation` makes it of
sorted dictionaries, in data (:mod:`torchrl_iql.spaces`), in evaluations and online. Actions are those of data
sets there, and become the environment's in one place, :func:`data_environment`.

An environment is given in all places in the same ways: as an id, ``"module:Id-v0"`` after which Gymnasium
imports the module, a specification, or a function without arguments that makes it. A file that describes one
names code, too, and may be anybody's: it is taken as far as :func:`registered` goes.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial, update_wrapper
from types import MappingProxyType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.wrappers import FilterObservation, TimeLimit, TransformObservation

from torchrl_iql.nested import texts
from torchrl_iql.ogbench import OwnChance, is_from_ogbench, is_single_task, ogbench_package
from torchrl_iql.spaces import (
    action_row_space,
    environment_action,
    observation_row_space,
    selected,
    sorted_space,
)

__all__ = [
    "REFERENCE_SCORES",
    "SUCCESS",
    "Env",
    "antmaze_id",
    "data_environment",
    "flat_environment",
    "observing",
    "reference_scores_of",
    "register_robotics",
    "registered",
    "require_reference_scores",
    "spaces_of",
    "spec_of",
    "success",
    "success_paid",
    "time_limit",
    "time_limit_of",
    "written_spec",
]

Env = str | EnvSpec | Callable[[], gymnasium.Env]
"""What an environment is given by."""


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


def spec_of(env: Env | None) -> EnvSpec | None:
    """Return the specification of an environment that may be given otherwise.

    Raises:
        ModuleNotFoundError: if it is one of OGBench's single tasks, and OGBench is not installed.
        ValueError: if gymnasium does not know the id, or there is no module of that name.
    """
    if env is None or isinstance(env, EnvSpec):
        return env
    if not isinstance(env, str):
        return _spec_of_maker(env)
    if is_single_task(env):
        ogbench_package()
    register_robotics()
    module, _, name = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        where = "; it has to be installed, or in a folder of PYTHONPATH" * isinstance(
            error, ModuleNotFoundError
        )
        raise ValueError(f"unknown environment {env!r}: {error}{where}") from error


def _spec_of_maker(make: Callable[[], gymnasium.Env]) -> EnvSpec:
    name = getattr(make, "__qualname__", type(make).__qualname__)
    return EnvSpec(id=re.sub(r"[^\w.-]+", "_", name), entry_point=make)  # pyright: ignore


PACKAGES = {"gymnasium_robotics": register_robotics, "ogbench": ogbench_package}
"""Who tells gymnasium the environments of a package, of those that are used here."""

HARMLESS_WRAPPERS = frozenset(
    [
        "AddRenderObservation",
        "AtariPreprocessing",
        "Autoreset",
        "ClipAction",
        "ClipReward",
        "DelayObservation",
        "DiscretizeAction",
        "DiscretizeObservation",
        "DtypeObservation",
        "FilterObservation",
        "FlattenObservation",
        "FrameStackObservation",
        "GrayscaleObservation",
        "MaxAndSkipObservation",
        "NormalizeObservation",
        "NormalizeReward",
        "OrderEnforcing",
        "PassiveEnvChecker",
        "RecordEpisodeStatistics",
        "RepeatAction",
        "RescaleAction",
        "RescaleObservation",
        "ReshapeObservation",
        "ResizeObservation",
        "StickyAction",
        "TimeAwareObservation",
        "TimeLimit",
    ]
)
"""Of Gymnasium's: others call functions, import modules by name, write files or open windows."""

GYMNASIUM_WRAPPER = re.compile(r"gymnasium\.wrappers(?:\.\w+)*:(\w+)")
CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w./-]*")
"""``module:name``, as an argument or an id names what is to be imported."""


def registered(env_spec: EnvSpec) -> EnvSpec:
    """Return the environment that a file describes, if all of its code is known on this machine.

    Its entry point is one that Gymnasium's registry names, under this id or another. So are its wrappers, or
    they are of :data:`HARMLESS_WRAPPERS`. Arguments and time limit are the file's own, and name no code.
    Nothing is made, and nothing imported but :data:`PACKAGES`.

    Raises:
        ModuleNotFoundError: it is one of OGBench's, and OGBench is not installed.
        ValueError: it names other code, which the message tells, and what can be done.
    """
    package = str(env_spec.entry_point).partition(".")[0]
    if package in PACKAGES:
        PACKAGES[package]()
    known = {_entry_name(its): its for its in _entry_points(gymnasium.registry.values())}
    if (foreign := next(_foreign(env_spec, known), None)) is not None:
        raise ValueError(
            f"the stored environment {env_spec.id!r} names foreign code, {foreign}, and a file does not "
            "decide what runs: import the package that registers the environment, give env=<id> "
            "(package:id imports the package), or, if you trust who made the file, trust_env; to learn from "
            "it without any, with_env=False in code, eval_episodes=0 in a recipe"
        )
    entry_points = {
        name: known.get(getattr(env_spec, name)) for name in ("entry_point", "vector_entry_point")
    }
    return replace(env_spec, **entry_points)


def _entry_points(specs: Iterable[EnvSpec]) -> Iterator[Any]:
    for spec in specs:
        yield from (spec.entry_point, spec.vector_entry_point)
        yield from (wrapper.entry_point for wrapper in spec.additional_wrappers)


def _entry_name(entry_point: Any) -> str | None:
    """Return how a file names an entry point, which may be registered as the object itself."""
    if entry_point is None or isinstance(entry_point, str):
        return entry_point
    parts = (getattr(entry_point, name, "") for name in ("__module__", "__qualname__"))
    return ":".join(map(str, parts))


def _foreign(env_spec: EnvSpec, known: Collection[str | None]) -> Iterator[str]:
    """Say what code a specification names beside that which is known."""
    if env_spec.entry_point is None:
        yield "no entry point"
    for name in (env_spec.entry_point, env_spec.vector_entry_point):
        if not isinstance(name, str | None) or name not in known:
            yield f"the entry point {name!r}"
    if ":" in env_spec.id:
        yield "the module in its id"
    for name in (wrapper.entry_point for wrapper in env_spec.additional_wrappers):
        of_gymnasium = GYMNASIUM_WRAPPER.fullmatch(str(name))
        is_harmless = of_gymnasium is not None and of_gymnasium[1] in HARMLESS_WRAPPERS
        if not (is_harmless or (isinstance(name, str) and name in known)):
            yield f"the wrapper {name!r}"
    arguments = [env_spec.kwargs, *(wrapper.kwargs for wrapper in env_spec.additional_wrappers)]
    yield from (f"the argument {text!r}" for text in texts(arguments) if CODE.fullmatch(text))


def written_spec(env_spec: EnvSpec) -> str | None:
    """Write an environment down for ``EnvSpec.from_json``, with code by its name; None if that can not be."""
    entry_points = {
        name: _entry_name(getattr(env_spec, name)) for name in ("entry_point", "vector_entry_point")
    }
    try:
        return replace(env_spec, **entry_points).to_json()
    except (TypeError, ValueError):  # an argument that JSON can not hold
        return None


def observing(env_spec: EnvSpec, keys: Sequence[str]) -> EnvSpec:
    """Return an environment that shows these entries of its observations alone.

    Raises:
        ValueError: if it can not be built, or its observations have no such entries.
    """
    with _made(env_spec) as env:
        kept = selected(env.observation_space, keys)
        assert env.spec is not None
        wraps = len(env.spec.additional_wrappers) > len(env_spec.additional_wrappers)
    assert isinstance(kept, spaces.Dict)
    make = env_spec.entry_point
    if wraps and callable(make):  # gymnasium would take its wrappers for those of the specification
        return replace(
            env_spec, entry_point=update_wrapper(partial(_filtered, make, [*kept]), make)
        )
    wrapper = WrapperSpec(
        "FilterObservation", "gymnasium.wrappers:FilterObservation", {"filter_keys": list(kept)}
    )
    return replace(env_spec, additional_wrappers=(*env_spec.additional_wrappers, wrapper))


def _filtered(make: Callable[..., gymnasium.Env], keys: list[str], **kwargs: Any) -> gymnasium.Env:
    return FilterObservation(make(**kwargs), keys)


def spaces_of(env_spec: EnvSpec) -> tuple[Space, Space]:
    """Return an environment's observation and action space.

    Raises:
        ValueError: it can not be built.
    """
    with _made(env_spec) as env:
        spaces_ = env.observation_space, env.action_space
    return spaces_


def time_limit(env: gymnasium.Env) -> int | None:
    """Return the steps after which a wrapper ends an episode; None if no wrapper does."""
    limits = []
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            limits.append(env._max_episode_steps)
        env = env.env
    return min(limits, default=None)


def time_limit_of(env_spec: EnvSpec | None) -> int | None:
    """Return :func:`time_limit` of an environment, which is made only if its specification names none.

    Raises:
        ValueError: it can not be built.
    """
    if env_spec is None or env_spec.max_episode_steps is not None:
        return env_spec and env_spec.max_episode_steps
    with _made(env_spec) as env:
        return time_limit(env)


def flat_environment(env: Env) -> gymnasium.Env:
    """Make an environment whose observations are vectors, of dictionaries in the order of their sorted keys.

    One of OGBench is in :class:`~torchrl_iql.ogbench.OwnChance`.

    Raises:
        ValueError: it can not be built.
    """
    made = _made(env)
    space = made.observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    if is_vector:
        return made
    space = sorted_space(space)
    rows = observation_row_space(space)
    return TransformObservation(made, partial(_flattened, space, rows.dtype), rows)


def _flattened(space: Space, dtype: Any, observation: Any) -> Any:
    return spaces.flatten(space, observation).astype(dtype, copy=False)  # pyright: ignore


def data_environment(env: Env) -> gymnasium.Env:
    """Make an environment that shows and takes what the rows of a data set hold.

    Observations are vectors. Actions are vectors of float32, or categories counted from 0.

    Raises:
        TypeError: if the action space is neither ``Box`` nor ``Discrete``.
        ValueError: it can not be built.
    """
    flat = flat_environment(env)
    try:
        return _DataActions(flat)
    except TypeError:
        flat.close()
        raise


class _DataActions(gymnasium.ActionWrapper):
    """Takes the rows of :func:`~torchrl_iql.spaces.action_rows` for actions."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.action_space = action_row_space(env.action_space)

    def action(self, action: Any) -> Any:
        return environment_action(self.env.action_space, action)


def _made(env: Env) -> gymnasium.Env:
    try:
        spec = spec_of(env)
        assert spec is not None
        notice = register_robotics()
        if spec.id.replace("-v", "Dense-v") in notice:  # dense, if not Sparse-v
            warnings.warn(notice, stacklevel=3)
        if is_single_task(spec.id):
            ogbench_package()
        made = gymnasium.make(spec)
        return OwnChance(made) if is_from_ogbench(made) else made
    except Exception as error:  # of gymnasium, or of the package that the environment is in
        name = getattr(env, "id", env)
        raise ValueError(
            f"the environment {name!r} can not be built: {error}. Is the package that defines it "
            "installed and registered with gymnasium?"
        ) from error


SUCCESS = "success", "is_success"
"""Where the info of a step reports success, the first that is there."""


def success(info: Mapping[str, Any]) -> bool | None:
    """Return whether the info of a step reports success; None if it does not say."""
    reported = next((info[name] for name in SUCCESS if name in info), None)
    return None if reported is None else bool(reported)


def success_paid(rewards: Any) -> np.ndarray | None:
    """Return which rewards are paid for success where nothing reports it; None of others than 0 and 1."""
    return np.equal(rewards, 1) if np.isin(rewards, (0, 1)).all() else None
