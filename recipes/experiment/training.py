"""The doors of the scripts that train: settings by task and algorithm, and those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment.choices import by_task, files, of_algorithm
from torchrl_iql_recipes.experiment.door import Door
from torchrl_iql_recipes.experiment.overrides import last, over, parsed
from torchrl_iql_recipes.experiment.schema import Part, SettingsError, written
from torchrl_iql_recipes.experiment.settings import OFFLINE_PHASE, PARTS, Settings, networks_of

__all__ = ["OFFLINE", "ONLINE", "Experiment"]

LONGEST = 100
"""Letters of the name of a folder after data."""


class Experiment(Door):
    """A script that trains an algorithm on a task: what is not given is as the task's family has it."""

    @property
    def groups(self) -> tuple[str, ...]:
        return ("task", "algorithm", *super().groups)

    def parts_of(self, overrides: Sequence[Override]) -> tuple[type[Part], ...]:
        return (*self.parts, algorithms()[self._algorithm(overrides)])

    def _algorithm(self, overrides: Iterable[Override]) -> str:
        given = last(overrides, "algorithm")
        name = "iql" if given is None or isinstance(given, list) else str(given)
        return name if name in algorithms() else "iql"  # check has more to say of it

    def _unknown(self, key: str, known: Sequence[str]) -> str:
        theirs = [name for name, each in algorithms().items() if key in each.model_fields]
        if theirs:
            likely = "iql" if "iql" in theirs else theirs[0]
            return f"{key} is a setting of {' and '.join(theirs)}: give algorithm={likely}"
        return super()._unknown(key, known)

    def _recorded(self, values: Mapping[str, Any]) -> set[str]:
        algorithm = algorithms().get(values.get("algorithm", ""))
        names = algorithm.names() if algorithm else {}
        return {*super()._recorded(values), "task", "algorithm", *names}

    def _of(self, values: Mapping[str, Any]) -> Settings:
        return Settings.of(values)

    def _command_to_resume(self, folder: Path, settings: Settings) -> str:
        return settings.command_to_resume(folder)

    def _first_line(self, settings: Settings) -> str:
        dataset, number = settings.data.dataset, len(settings.learners)
        several = f", {number} learners," if number > 1 else ""
        on = f" on {_short(written(dataset))}" if dataset is not None else " from scratch"
        steps = []
        if "env_steps" not in settings.values or settings.has_offline_phase():
            steps.append(f"{settings.training.steps:,} gradient steps")
        if "env_steps" in settings.values:
            steps.append(f"{settings.online.env_steps:,} steps in the environment")
        return f"{settings.algorithm.title}{several}{on}: {', then '.join(steps)}"

    def _read_first(self, overrides: Sequence[str]) -> None:
        path = last(parsed(overrides), "checkpoint")
        if isinstance(path, str) and Path(path).exists():
            print(f"Reading the settings in {path}", flush=True)

    def _stored(self, folder: Path) -> dict[str, Any]:
        return super()._stored(folder) | {"trust_env": False}  # whatever the file says

    def resumed(self, folder: Path, overrides: Sequence[str]) -> Settings:
        settings = super().resumed(folder, overrides)
        _require_trust(settings, overrides, f"resume={folder}")
        return settings

    def _implied_by(self, values: Mapping[str, Any]) -> list[str]:
        task = values.get("task")
        known = [f"task={task}"] if task in files("task") else []
        return [f"algorithm={values['algorithm']}", *known]

    def _implied(self, overrides: Sequence[str]) -> list[str]:
        asked = parsed(overrides)
        path = last(asked, "checkpoint")
        implied = ["task=own"] if self._is_own(asked) else []
        if isinstance(path, str):
            implied = self._implied_by(_settings_in(path))
        given = {each.key_or_group for each in asked}
        return [each for each in implied if each.partition("=")[0] not in given]

    def _is_own(self, overrides: Sequence[Override]) -> bool:
        """Return whether data are given, or an environment to collect some in, of which no task knows."""
        names = ("dataset", "env") if PARTS["online"] in self.parts else ("dataset",)
        return any(last(overrides, name) is not None for name in names)

    def _extended(self, stored: Settings, resumed: Settings, given: set[str]) -> Settings:
        """Keep the length of the policy's decay, which null makes that of the run."""
        before, after = stored.training.steps, resumed.training.steps
        if before == after or resumed.values["decay_steps"] is not None:
            return resumed
        length = after if "decay_steps" in given else before
        if "decay_steps" not in given:
            print(
                f"decay_steps={length}: the policy's learning rate falls as it did before, and is 0 after "
                f"{length} steps; decay_steps={after} lets it fall until the end"
            )
        return Settings.of({**resumed.values, "decay_steps": length})

    def _made(self, values: dict[str, Any], overrides: Sequence[str]) -> Settings:
        """Take what is not given from the run of the checkpoint, if any; what was learned says how.

        Raises:
            SettingsError: the checkpoint has no settings, or one that is given contradicts its networks,
                or has no effect.
        """
        given = {each.key_or_group for each in parsed(overrides)}
        path = values["checkpoint"]
        if path is None:
            settings = Settings.of(values)
        else:
            saved = _settings_in(path)
            if "algorithm" in given and values["algorithm"] != saved["algorithm"]:
                raise SettingsError(
                    f"algorithm={values['algorithm']}: the checkpoint is of {saved['algorithm']}"
                )
            dropped = {"compute", "logger"}
            if "task" in given:
                dropped |= by_task(saved["algorithm"]) - networks_of(saved["algorithm"])
            base = {key: value for key, value in saved.items() if key not in dropped}
            implied = self._implied(overrides)
            if any(values[key] != choice for key, choice in (each.split("=") for each in implied)):
                values = self.compose([*overrides, *implied])
            values = over(base, values, overrides)
            # The run may be resumed elsewhere.
            settings = Settings.of({**values, "checkpoint": str(Path(path).resolve())})
            networks = sorted(given & networks_of(saved["algorithm"]))
            fixed = [name for name in networks if settings.values[name] != saved[name]]
            if fixed:
                theirs = ", ".join(f"{name}={written(saved[name])}" for name in fixed)
                raise SettingsError(
                    f"{', '.join(fixed)}: the checkpoint has networks of its own, with {theirs}"
                )
            if len(settings.learners) > 1:
                names = [learner.name for learner in settings.learners]
                raise SettingsError(
                    f"one learner begins with a checkpoint, but these are {names}: give one value"
                )
            _require_trust(settings, overrides, f"checkpoint={path}")
        if "env_steps" in settings.values and not settings.has_offline_phase():
            idle = given & {*OFFLINE_PHASE} - ({"steps"} if settings.training.steps == 0 else set())
            if idle:
                raise SettingsError(
                    f"{', '.join(sorted(idle))}: without effect, there is no offline phase"
                )
        return settings

    def _register(self) -> None:
        super()._register()
        OmegaConf.register_new_resolver("folder_of", folder_of, replace=True)
        for name, algorithm in algorithms().items():
            ConfigStore.instance().store(
                name, self._node(algorithm), group="settings_of", package="_global_"
            )

    def _node(self, part: type[Part]) -> dict[str, Any]:
        """Give each setting the algorithm's value in the family, else the task's, else a default.

        That is the algorithm's in any family, if it has one, else that of the part.
        """
        return {
            name: f"${{oc.select:algorithm.families.${{task.family}}.{name},"
            f"${{oc.select:task.{name},${{oc.select:algorithm.otherwise.{name},{_literal(default)}}}}}}}"
            for name, default in part.defaults().items()
        }

    def _by_task(self, overrides: Sequence[Override]) -> set[str]:
        return by_task(self._algorithm(overrides))

    def _otherwise(self, overrides: Sequence[Override]) -> Mapping[str, Any]:
        return of_algorithm(self._algorithm(overrides)).get("otherwise", {})


OFFLINE = Experiment(
    "offline", tuple(part for name, part in PARTS.items() if name not in ("online", "collector"))
)

ONLINE = Experiment("online", tuple(PARTS.values()))


def folder_of(task: str, overrides: Sequence[str]) -> str:
    """Name the folder of the runs of a task: of data of one's own, after them."""
    given = parsed(list(overrides))
    dataset, checkpoint = last(given, "dataset"), last(given, "checkpoint")
    if task == "own" and dataset is None and checkpoint is not None:
        dataset = _settings_in(str(checkpoint)).get("dataset")
    if task != "own" or not isinstance(dataset, str | list):
        return task
    names = [dataset] if isinstance(dataset, str) else list(map(str, dataset))
    stems = [
        Path(name).stem if Path(name).exists() or Path(name).suffix else name for name in names
    ]
    slugs = [re.sub(r"[^\w.]+", "-", stem).strip("-.") for stem in stems]
    return f"own/{'+'.join(slugs)[:LONGEST]}"


def _settings_in(path: str) -> dict[str, Any]:
    """Return the settings of the run that a checkpoint is of, all that there are.

    Raises:
        SettingsError: there is no such checkpoint, or it has none.
    """
    from torchrl_iql import checkpoint

    try:
        saved = checkpoint.load_metadata(path).get("config")
    except (OSError, ValueError) as error:
        raise SettingsError(f"checkpoint={path}: {error}") from None
    if saved is None or saved.get("algorithm") not in algorithms():
        raise SettingsError(
            f"checkpoint={path} does not hold the settings of a run of these scripts: train it anew"
        )
    return dict(Settings.of(saved).values)


def _require_trust(settings: Settings, overrides: Sequence[str], where: str) -> None:
    """Refuse settings of a file, which may be anybody's, that decide what code runs.

    Args:
        settings: of a run, from the file and the command line.
        overrides: the command line, which is trusted.
        where: what named the file.
    """
    given = {each.key_or_group for each in parsed(overrides)}
    found = [key for key in settings.of_code() if not {key, key.partition(".")[0]} & given]
    if found and not settings.data.trust_env:
        raise SettingsError(
            f"{where}: the {' and the '.join(found)} stored there may bring in code: if you trust who "
            "made it, add trust_env=true"
        )


def _literal(value: Any) -> str:
    """Write a default in OmegaConf's grammar."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_literal, value))}]"
    return f"'{value}'" if isinstance(value, str) else written(value)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
