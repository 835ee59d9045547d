"""The settings of a run, part by part; those of an algorithm are in its file of ``algorithms``.

Whatever differs between families of tasks is in ``config/task`` and ``config/algorithm``; what stands here
is the meaning of a setting, its range, and its default where a family says nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from torchrl_iql.data.layout import require_layout
from torchrl_iql.nested import texts
from torchrl_iql_recipes.algorithms import Algorithm, algorithms
from torchrl_iql_recipes.commands import label, typed
from torchrl_iql_recipes.experiment.overrides import as_given
from torchrl_iql_recipes.experiment.schema import (
    LATER,
    Count,
    Flag,
    Fraction,
    Natural,
    NotNegative,
    Number,
    Part,
    Positive,
    SettingsError,
    Text,
    combinations,
    is_installed,
    written,
)
from torchrl_iql_recipes.files import shown

__all__ = [
    "OFFLINE_PHASE",
    "PARTS",
    "Collector",
    "Compute",
    "Data",
    "Evaluation",
    "Learner",
    "Logger",
    "Networks",
    "Online",
    "Settings",
    "Training",
    "argument",
    "check_continued",
    "command_to_resume",
    "differences",
    "flat",
    "has_effect",
    "networks_of",
]


Share = Annotated[float, Field(ge=0, lt=1)]
Entries = Annotated[dict, "given as a whole"]
Bound = Number | tuple[Number, ...]
ActionRange = tuple[Bound, Bound] | Count | None


class Data(Part):
    """What is learned from."""

    dataset: Text | tuple[Text, ...] | None = Field(
        None,
        description="Minari id, OGBench single task, or path to a Minari data set, a D4RL or an OGBench "
        "file, a CSV, Parquet, NPZ or HDF5 file, a folder of these, or a data set of LeRobot; several are "
        "joined; null, online only: none",
    )
    layout: Entries | None = Field(
        None,
        description="of CSV, Parquet, NPZ and HDF5 files, which columns are what: {observations: [x,y], "
        "actions: force, rewards: reward, terminals: done, episode_ids: run}, also timeouts, "
        "next_observations and success; null for what was not recorded",
    )
    env: Text | dict | None = Field(
        None,
        description="to evaluate in: an id, {id: ..., arguments of gymnasium.make}, or null for what "
        "the data set names",
    )
    trust_env: Flag = Field(
        False,
        exclude=True,
        description="the environment that a data set names may run code that nobody has registered here, and "
        "the settings of a run or a checkpoint may name code; counts where it is given, and is not recorded",
    )
    action_space: ActionRange = Field(
        None,
        description="the lowest and the highest, [low,high], each a number or one per dimension, or how many "
        "discrete ones there are; null: what the data declare, for files that do not that of env, or [-1,1]",
    )
    maze: Literal["umaze", "medium", "large"] | None = Field(
        None,
        description="that files of D4RL's AntMaze have to be of; null: the one that fits their positions",
    )
    observation_keys: tuple[Text, ...] | None = Field(
        None, description="the entries of compound observations that are observed; null: all"
    )
    columns: tuple[Text, ...] = Field(
        (),
        description="infos or arrays that batches hold beside what is read, for losses of one's own",
    )
    reward: Literal["none", "minus_one", "return_range", "unit_rms"] = Field(
        "none",
        description="minus_one: less 1, for mazes; return_range: over the range of returns, times 1000; "
        "unit_rms: over their root mean square, on any scale",
    )
    episodes: Literal["as_stored", "until_success"] = Field(
        "as_stored", description="until_success: they end at the first success"
    )
    n_steps: Count = Field(
        1, description="rewards that are summed before V is asked; 1 is the paper's"
    )

    @model_validator(mode="after")
    def _layout_is_one(self) -> Data:
        if self.layout is not None:
            require_layout(self.layout)
        return self

    @model_validator(mode="after")
    def _env_has_an_id(self) -> Data:
        if isinstance(self.env, dict) and "id" not in self.env:
            raise ValueError(
                f"env={self.env}: expected an id beside the arguments of gymnasium.make"
            )
        return self


class Networks(Part):
    """What is trained."""

    policy: Literal["gaussian", "squashed", "heteroscedastic", "deterministic"] = Field(
        "gaussian",
        description="of continuous actions: heteroscedastic is SAC's, the others have one deviation in all "
        "states; discrete ones have a categorical",
    )
    action_bounds: Literal["space", "data"] = Field(
        "space", description="data: the policy keeps within the actions that the data hold"
    )
    hidden_sizes: tuple[Count, ...] = Field((256, 256), description="units of every hidden layer")
    dropout: Share = Field(0.0, description="of the policy")
    encoder: Literal["mlp", "cnn"] = Field(
        "mlp",
        description="cnn: convolutions over the images of observations, bytes of 36x36 pixels or more",
    )
    normalize_observation: Flag = Field(
        False, description="to mean 0 and deviation 1, within the networks"
    )


class Training(Part):
    """What training begins with, how long it lasts, who is trained, and what is recorded."""

    checkpoint: Text | None = Field(
        None,
        description="of an earlier run: its networks, and every setting that is not on the command line; "
        "null: begin anew",
    )
    steps: Annotated[Natural, LATER] = Field(
        1_000_000, description="gradient steps; 0, online only: none offline"
    )
    seeds: Natural | tuple[Natural, ...] = Field(
        0, description="of one learner, or of several different ones, [0,1,2,3]"
    )
    batch_size: Count = Field(256, description="transitions")
    log_interval: Annotated[Count, LATER] = Field(
        500, description="steps between lines of metrics.csv"
    )
    checkpoint_interval: Annotated[Positive, LATER] = Field(
        10.0,
        description="minutes between checkpoints, of which there is one before each evaluation too",
    )
    on_nonfinite: Annotated[Literal["stop", "skip"], LATER] = Field(
        "stop",
        description="at a step that leaves something NaN or infinite: the run ends, or goes on without it",
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> Training:
        given = self.seeds
        if isinstance(given, tuple) and (not given or len(set(given)) < len(given)):
            raise ValueError(f"seeds={list(given)}: expected one or several different integers")
        return self


OF_EVALUATIONS = ("score", "return", "length", "success", "normalized_score")
"""What an evaluation may come to, the last two as far as the environment tells."""


class Evaluation(Part):
    """How what is learned is tried out."""

    eval_interval: Annotated[Count, LATER] = Field(
        50_000, description="steps from one evaluation to the next"
    )
    eval_episodes: Annotated[Natural, LATER] = Field(
        10, description="0 trains without an environment"
    )
    validation: Share = Field(
        0.0,
        description="share of the episodes that is not learned from, but looked at with every evaluation",
    )
    best_by: Text = Field(  # not another later: the checkpoint of what was best by that is gone
        "eval/score",
        description="the column of metrics.csv of which best.ckpt has the highest value, as "
        "validation/log_likelihood; with a minus the lowest, as -validation/td_error",
    )
    eval_workers: Annotated[Natural, LATER] = Field(
        0, description="processes that evaluate while training goes on; 0: it waits"
    )
    on_eval_failure: Annotated[Literal["continue", "stop"], LATER] = Field(
        "continue", description="what training does when an evaluation fails; it is saved before"
    )

    @model_validator(mode="after")
    def _best_is_by_what_there_is(self) -> Evaluation:
        kind, _, name = self.best_by.removeprefix("-").partition("/")
        if kind not in ("eval", "validation") or not name:
            raise ValueError(
                f"best_by={self.best_by}: expected eval/... or validation/..., with a minus for the lowest"
            )
        if kind == "eval" and name not in OF_EVALUATIONS:
            raise ValueError(
                f"best_by={self.best_by}: expected eval/ and one of {', '.join(OF_EVALUATIONS)}"
            )
        if kind == "validation" and not self.validation:
            raise ValueError(
                f"best_by={self.best_by}: nothing is held out, give validation=0.1 too"
            )
        return self


class Online(Part):
    """Learning from an environment.

    An offline phase comes before, unless there is a checkpoint or no data set, or steps are 0.
    """

    env_steps: Annotated[Count, LATER] = Field(1_000_000, description="of the environment")
    updates_per_frame: NotNegative = Field(1.0, description="gradient steps per environment step")
    exploration: NotNegative = Field(
        1.0, description="factor on the deviation of the policy that collects; 0: its mean"
    )
    offline_share: Fraction | None = Field(
        None,
        description="of each batch, from the data set; null: all transitions alike, as in the paper",
    )
    anneal_steps: Count | None = Field(
        None, description="environment steps over which the share falls to 0; null: it stays"
    )

    @model_validator(mode="after")
    def _only_a_share_falls(self) -> Online:
        if self.anneal_steps is not None and self.offline_share is None:
            raise ValueError(
                f"anneal_steps={self.anneal_steps} needs an offline_share that can fall"
            )
        return self


class Compute(Part):
    """Where and how it is computed."""

    group: ClassVar[str] = "compute"
    device: Annotated[Text, LATER] = Field("cpu", description="of PyTorch, as cpu or cuda:1")
    execution: Annotated[Literal["auto", "eager", "compiled", "cudagraph"], LATER] = Field(
        "auto", description="auto: the fastest that the machine allows"
    )
    streaming: Annotated[Flag, LATER] = Field(
        False, description="the data stay in main memory or on disk, minibatches go to the device"
    )
    threads: Annotated[Count | None, LATER] = Field(
        None, description="of PyTorch; null: one per core"
    )
    matmul_precision: Annotated[Literal["auto", "highest", "high", "medium"], LATER] = Field(
        "auto",
        description="of float32 products, see torch.set_float32_matmul_precision; auto: as exact as float32, "
        "by the fastest library",
    )


class Logger(Part):
    """Who is told the metrics beside metrics.csv."""

    group: ClassVar[str] = "logger"
    backend: Annotated[Literal["", "tensorboard", "wandb"], LATER] = Field(
        "", description="a logger of TorchRL, in which every learner is a run of its own"
    )

    @model_validator(mode="after")
    def _is_installed(self) -> Logger:
        if self.backend and not is_installed(self.backend):
            raise ValueError(
                f"logger={self.backend}: that package is not installed; "
                f"pip install 'torchrl-iql[{self.backend}]', or give logger=csv"
            )
        return self


class Collector(Part):
    """Where transitions are collected."""

    group: ClassVar[str] = "collector"
    backend: Literal["direct", "process", "ray"] = Field(
        "direct", description="this process, others on this machine, or Ray"
    )
    sync: Flag | None = Field(None, description="the learner waits for all of a batch")
    num_collectors: Count | None = Field(None, description="processes, with another backend")
    frames_per_batch: Count = Field(100, description="environment steps between rounds of updates")
    backend_options: dict | None = Field(
        None, description="of the backend, see TorchRL's Collector"
    )


@dataclass(frozen=True)
class Learner:
    """One of those that are trained together.

    Attributes:
        name: what tells it from the others, as ``"temperature=3.0,seed=1"``; empty if it is alone.
        seed: of its networks, minibatches and random numbers.
        algorithm: with its settings.
    """

    name: str
    seed: int
    algorithm: Algorithm

    def settings(self) -> dict[str, Any]:
        """Return what results say of it."""
        return {"name": self.name, **self.algorithm.along_axes(), "seed": self.seed}


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked.

    Attributes:
        values: as they are recorded, by name, those of groups in dictionaries; with the names of the
            ``task`` and of the ``algorithm``.
        learners: one for each seed and for each combination of the settings with several values.
    """

    values: Mapping[str, Any]
    data: Data
    networks: Networks
    training: Training
    evaluation: Evaluation
    compute: Compute
    logger: Logger
    online: Online
    collector: Collector
    learners: tuple[Learner, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Make the settings with these values.

        Raises:
            SettingsError: one of them is refused.
        """
        parts = {
            name: part.of(values.get(part.group) or {} if part.group else values)
            for name, part in PARTS.items()
        }
        training = parts["training"]
        assert isinstance(training, Training)
        if training.steps == 0 and "env_steps" not in values:
            raise SettingsError(
                "steps=0: expected an integer of at least 1, without an online phase"
            )
        if algorithms()[values["algorithm"]].is_offline and "env_steps" in values:
            raise SettingsError(
                f"algorithm={values['algorithm']}: it learns from whole episodes, and is for "
                f"{label('offline')}"
            )
        data, online = parts["data"], parts["online"]
        assert isinstance(data, Data) and isinstance(online, Online)
        if "env_steps" in values and data.dataset is None and online.offline_share is not None:
            raise SettingsError(
                f"offline_share={online.offline_share:g}: without a data set there is none, give null"
            )
        learners = _learners(values, training)
        _n_steps(parts["data"], learners)
        recorded = _recorded(values, parts, learners)
        return cls(values=recorded, learners=learners, **parts)  # pyright: ignore

    @property
    def algorithm(self) -> Algorithm:
        """That of the first learner: what is not in its axes, all of them have."""
        return self.learners[0].algorithm

    def of_learner(self, learner: Learner) -> dict[str, Any]:
        """Return the values of a run with this learner alone."""
        return {**self.values, **learner.algorithm.along_axes(), "seeds": learner.seed}

    def later(self, folder: Path) -> set[str]:
        """Return the settings that may be others when what was begun in a folder goes on there.

        Of an online run, those of the offline phase are not among them if there is none, or if it is over.
        """
        parts = [*(getattr(self, name) for name in PARTS), self.algorithm]
        names = {name for part in parts for name in part.later(folder)}
        over = (folder / "last.ckpt").exists() or not self.has_offline_phase()
        return names - {*OFFLINE_PHASE} if "env_steps" in self.values and over else names

    def has_offline_phase(self) -> bool:
        """Return whether an online run begins with one."""
        return (
            self.training.checkpoint is None
            and self.data.dataset is not None
            and self.training.steps > 0
        )

    def of_code(self) -> list[str]:
        """Return the names of the settings by which code may come in that this project does not choose.

        A module before an environment's id is imported, as may be one among its arguments; the options of a
        collector say which cluster of Ray is joined, and how its processes are started.
        """
        named = {
            "env": any(":" in text for text in texts(self.data.env)),
            "collector.backend_options": any(texts(self.collector.backend_options)),
        }
        return [name for name, brings in named.items() if brings]

    def command_to_resume(self, folder: Path) -> str:
        """Return the command that goes on with a run of these settings in a folder."""
        script = "online" if "env_steps" in self.values else "offline"
        needs_trust = self.data.trust_env or self.of_code()
        return command_to_resume(script, folder) + " trust_env=true" * bool(needs_trust)

    def varied(self) -> dict[str, list[Any]]:
        """Return the different values of each axis that has several."""
        return _varied(self.learners)


WITHOUT_EFFECT = {
    *("seeds", "log_interval", "checkpoint_interval", "on_nonfinite"),
    *("eval_workers", "on_eval_failure", "best_by", "trust_env"),
}


def has_effect(name: str) -> bool:
    """Return whether the score of a learner depends on a setting, named as on the command line.

    Not where and how it is computed; and not the seeds of its run: each learner is what it would be alone.
    """
    return name not in WITHOUT_EFFECT and name.partition(".")[0] not in ("compute", "logger")


OFFLINE_PHASE = ("steps", "decay_steps")
"""What only the offline phase of an online run depends on."""

PARTS: dict[str, type[Part]] = {
    "data": Data,
    "networks": Networks,
    "training": Training,
    "evaluation": Evaluation,
    "compute": Compute,
    "logger": Logger,
    "online": Online,
    "collector": Collector,
}


def _learners(values: Mapping[str, Any], training: Training) -> tuple[Learner, ...]:
    algorithm = algorithms()[values["algorithm"]]
    axes = (*algorithm.axes(), "seed")
    for axis in algorithm.axes():
        if axis in values:
            algorithm.check(axis, values[axis], several=True)
    grid = combinations({**algorithm.defaults(), **values, "seed": training.seeds}, axes)
    learners = [(each["seed"], algorithm.of({**values, **each})) for each in grid]
    axis_values = {axis: {each[axis] for each in grid} for axis in axes}
    varied = [axis for axis in axes if len(axis_values[axis]) > 1]
    named = [
        (",".join(f"{k}={seed if k == 'seed' else getattr(its, k)}" for k in varied), seed, its)
        for seed, its in learners
    ]
    for name, *_ in named:
        if "/" in name or "\\" in name:
            raise SettingsError(
                f"{name} would be the folder of a learner: give values without slashes"
            )
    return tuple(Learner(*each) for each in named)


def _recorded(
    values: Mapping[str, Any], parts: Mapping[str, Part], learners: tuple[Learner, ...]
) -> dict[str, Any]:
    """Return all settings of the parts of which some are given, as they were understood."""
    own: dict[str, Any] = {"task": values.get("task"), "algorithm": values["algorithm"]}
    for part in (*parts.values(), learners[0].algorithm):
        dump = part.model_dump(mode="json")
        if part.group:
            own |= {part.group: dump} if part.group in values else {}
        elif dump.keys() & values.keys() or part is learners[0].algorithm:
            own |= dump
    return own | _varied(learners)


def _varied(learners: tuple[Learner, ...]) -> dict[str, list[Any]]:
    along = [learner.algorithm.along_axes() for learner in learners]
    found = {axis: list(dict.fromkeys(each[axis] for each in along)) for axis in along[0]}
    return {axis: values for axis, values in found.items() if len(values) > 1}


def check_continued(
    folder: Path, known: Mapping[str, Any], values: Mapping[str, Any], later: set[str]
) -> None:
    """Refuse to go on with a run under other settings.

    Args:
        folder: of the run.
        known: the values that it has.
        values: those that it is to have.
        later: the names of those that may differ.

    Raises:
        SettingsError: it names those that differ, both values of each, and how to begin anew with the
            given ones.
    """
    before, after = flat(known), flat(values)
    differ = {key for key in {*before, *after} if before.get(key) != after.get(key)} - later
    if not differ:
        return
    theirs, given = (
        ", ".join(f"{key}={written(its.get(key))}" for key in sorted(differ))
        for its in (before, after)
    )
    last = next(
        (p for p in (folder / "last.ckpt", *folder.glob("*/last.ckpt")) if p.exists()), None
    )
    remedy = "begin a new run, of another name="
    axes = (*algorithms()[values["algorithm"]].axes(), "seeds")
    several = any(isinstance(values.get(axis), list) for axis in axes)
    if last is not None and not several and not differ & _not_with_a_checkpoint(values):
        settings = given.replace(", ", " ")
        remedy += (
            f"; {argument('checkpoint', last)} {settings} begins it with the networks of this one"
        )
    raise SettingsError(f"{folder} holds a run with {theirs}, not {given}: {remedy}")


def differences(known: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return what of some values is other than it is known, as it is given on the command line."""
    before, after = flat(known), flat(values)
    return [f"{key}={written(its)}" for key, its in after.items() if before.get(key) != its]


def networks_of(algorithm: str) -> set[str]:
    """Return the settings of the networks that are in a checkpoint."""
    return {*Networks.model_fields, *algorithms()[algorithm].of_networks}


def _not_with_a_checkpoint(values: Mapping[str, Any]) -> set[str]:
    online = OFFLINE_PHASE if "env_steps" in values else ()
    return {*networks_of(values["algorithm"]), "task", "algorithm", "checkpoint", *online}


def argument(name: str, path: Path | str) -> str:
    """Write a path as a shell takes it to Hydra."""
    return shlex.quote(as_given(name, str(path)))


def command_to_resume(script: str, folder: Path) -> str:
    """Return the command that goes on with a run of a script in a folder."""
    return f"{typed(script)} {argument('resume', shown(folder))}"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names that they are given by: of groups, ``compute.threads``."""
    groups = {part.group for part in PARTS.values() if part.group}
    flat = {key: value for key, value in values.items() if key not in groups}
    for group in groups & values.keys():
        flat |= {f"{group}.{name}": value for name, value in values[group].items()}
    return flat


def _n_steps(data: Part, learners: tuple[Learner, ...]) -> None:
    """Check that rewards can be summed once for all learners, with their discount."""
    assert isinstance(data, Data)
    if data.n_steps == 1:
        return
    discounts = {getattr(learner.algorithm, "discount", None) for learner in learners}
    if discounts == {None}:
        raise SettingsError(
            f"n_steps={data.n_steps}: {learners[0].algorithm.title} has no rewards to sum"
        )
    if len(discounts) > 1:
        raise SettingsError(f"n_steps={data.n_steps}: give one discount, not {sorted(discounts)}")  # pyright: ignore
