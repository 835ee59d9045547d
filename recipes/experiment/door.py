"""How a command line becomes checked settings: Hydra composes them, their schemas check them.

Nothing here imports PyTorch: ``--help`` and a refusal come at once, and before Hydra makes a folder.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from torchrl_iql_recipes.commands import (
    as_typed,
    errors_in_one_line,
    label,
    print_for_a_reader,
    typed,
)
from torchrl_iql_recipes.experiment.choices import CONFIG, check_choice, files
from torchrl_iql_recipes.experiment.lock import is_begun, new_folder
from torchrl_iql_recipes.experiment.overrides import last, over, parsed, readable, values_of
from torchrl_iql_recipes.experiment.schema import (
    Part,
    SettingsError,
    allowed,
    is_installed,
    options,
    written,
)
from torchrl_iql_recipes.experiment.settings import (
    argument,
    check_continued,
    command_to_resume,
    differences,
)
from torchrl_iql_recipes.experiment.stopping import Stopped, exit_code
from torchrl_iql_recipes.files import shown

__all__ = ["Door"]

_OF_SCRIPTS = {"env_steps": "online", "behavior": "sac", "algorithm": "offline"}
"""Which one a run is of that has a setting, the first of these."""

_NOT_OF_A_RUN = ("hydra", "task", "algorithm", "name", "resume")

_LENGTHS = ("steps", "env_steps")

_SPINS = "1000"
"""How often a thread of OpenMP looks whether there is work before it sleeps: some microseconds.

By default it looks for milliseconds, in which others may want its core, the thread it waits for too.
"""

_OPTIONS = {
    *(
        "-h",
        "--help",
        "--debug",
        "--hydra-help",
        "--version",
        "-c",
        "--cfg",
        "--resolve",
        "-p",
        "--package",
    ),
    *("-r", "--run", "-m", "--multirun", "-sc", "--shell-completion", "-i", "--info"),
    *(
        "-cp",
        "--config-path",
        "-cn",
        "--config-name",
        "-cd",
        "--config-dir",
        "--experimental-rerun",
    ),
}
"""Ours, and those of Hydra."""

PLUGINS = {
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "optuna"),
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "sweeps"),
    "hydra/launcher=submitit": ("hydra_submitit_launcher", "sweeps"),
    "hydra/launcher=ray": ("hydra_ray_launcher", "ray"),
}
"""Of Hydra, by what asks for them: the package, and the extra that brings it."""

RENAMED = {"decay_actor": "decay_steps, with 0 for false and null, its default, for true"}
"""What to say of settings that had another name."""


@dataclass(frozen=True)
class Door:
    """A script that is started with the settings of a part; :class:`Experiment` has several.

    Args:
        name: of the script, and of its primary configuration in ``config``.
        parts: whose settings it has.
        keeps_folder: whether its runs have folders, in which they go on.
    """

    name: str
    parts: tuple[type[Part], ...]
    keeps_folder: bool = True

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of ``config`` of which it takes one file each."""
        return tuple(part.group for part in self.parts if part.group)

    def parts_of(self, overrides: Sequence[Override]) -> tuple[type[Part], ...]:
        """Return the parts whose settings may be given beside these."""
        return self.parts

    # --- The command line --------------------------------------------------------------------------------

    def open(self, run: Callable[[Any, Path], float | None], description: str | None) -> None:
        """Do what the command line asks for: all that a script's ``main`` has to do.

        What its user can mend is told in one line, with ``--debug`` by the traceback.

        Args:
            run: given the settings, and the folder of the run: a new one, or that of the run to resume.
                What it returns is what a sweeper of Hydra looks for the highest value of.
            description: what ``--help`` begins with.
        """
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = _SPINS  # read when PyTorch is loaded
        debug = "--debug" in sys.argv
        arguments = [
            readable(each) if "=" in each and each[0] != "-" else each
            for each in sys.argv[1:]
            if each != "--debug"
        ]
        told = partial(errors_in_one_line, label(self.name), debug=debug)
        # Hydra wants this one before all else.
        sys.argv[1:] = sorted(arguments, key=lambda each: each not in ("-m", "--multirun"))
        options = [each for each in arguments if each.startswith("-")]
        # With options of Hydra, what has no equals sign may be their value.
        overrides = [
            each for each in arguments if each not in options and ("=" in each or not options)
        ]
        if {"-sc", "--shell-completion"} & set(options):  # install=bash is no setting
            overrides = []
        with told():
            self._check_options(options)
            if {"-h", "--help"} & set(options):
                print_for_a_reader(self.help(description, overrides) + "\n")
                return
            if self.keeps_folder and (folder := _folder(overrides)) is not None:
                if options:
                    raise SettingsError(
                        f"{options[0]}: {argument('resume', folder)} goes on with a run, without options; "
                        "its settings are in its config.yaml"
                    )
                settings = self.resumed(folder, overrides)
                self._announce(settings, folder)
                with exit_code(), self._told_if_stopped(folder, settings):
                    run(settings, folder)
                return
            self._read_first(overrides)
            implied = self._implied(overrides)
            self.check([*implied, *overrides])
            first = next((i for i, each in enumerate(sys.argv) if "=" in each), len(sys.argv))
            sys.argv[first:first] = implied
            if not options:
                self.settings(overrides)

        def job(cfg: DictConfig) -> float | None:
            context = HydraConfig.get()
            path = Path(context.runtime.output_dir)
            with told():
                own = [each for each in context.overrides.task if each not in implied]
                settings = self._made(_values(cfg, context.runtime.choices), own)
                given = parsed(context.overrides.hydra)
                named = cfg.get("name") is not None or last(given, "hydra.run.dir") is not None
                again = context.mode is RunMode.MULTIRUN  # the same sweep once more goes on
                with (
                    self._folder(path, settings, named=named, again=again) as folder,
                    exit_code(),
                    self._told_if_stopped(folder, settings),
                ):
                    if self.keeps_folder:
                        self._announce(settings, folder)
                    return run(settings, folder)

        self._register()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # what Hydra refuses is told here, too
        logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna's store
        with told():
            try:
                hydra.main(config_path=str(CONFIG), config_name=self.name, version_base="1.3")(
                    job
                )()
            except (HydraException, OmegaConfBaseException) as error:
                raise SettingsError(" ".join(str(error).split())) from error

    def _check_options(self, options: Sequence[str]) -> None:
        """Refuse settings that are written as options, and options that do not exist."""
        known = [name for part in self.parts_of([]) for name in part.names()]
        for each in options:
            name, _, value = each.lstrip("-").replace("-", "_").partition("=")
            if name in [*known, *self.groups]:
                raise SettingsError(f"{each}: settings are written {name}={value or '<value>'}")
            if each.partition("=")[0] not in _OPTIONS:
                near = difflib.get_close_matches(each, sorted(_OPTIONS), n=1)
                hint = f": did you mean {near[0]}?" if near else f", see {typed(self.name)} --help"
                raise SettingsError(f"there is no option {each}{hint}")

    def _announce(self, settings: Any, folder: Path) -> None:
        """Print what will run, before PyTorch is loaded, which takes seconds."""
        print(f"{self._first_line(settings)}; results: {shown(folder)}", flush=True)

    def _first_line(self, settings: Any) -> str:
        (part,) = self.parts
        values, defaults = settings.values, part.defaults()
        given = [
            f"{k}={written(v)}" for k, v in values.items() if written(v) != written(defaults[k])
        ]
        return f"{self.name}: {' '.join(given) or 'as by default'}"

    def _read_first(self, overrides: Sequence[str]) -> None:
        """Say what takes seconds to read before there are settings."""

    @contextmanager
    def _told_if_stopped(self, folder: Path, settings: Any) -> Iterator[None]:
        """Say how to go on with a run that is ended at once."""
        try:
            yield
        except Stopped:
            if self.keeps_folder and is_begun(folder):
                go_on = self._command_to_resume(folder, settings)
                print(f"Ended at once. From the last checkpoint: {go_on}", file=sys.stderr)
            raise

    @contextmanager
    def _folder(self, path: Path, settings: Any, *, named: bool, again: bool) -> Iterator[Path]:
        """Hold the folder of a new run, or of one that goes on if it is the same ``again``.

        Raises:
            SettingsError: it has to be this one, and there is a run in it, or another process is.
        """
        if not self.keeps_folder:
            yield path
            return
        with new_folder(path, named=named) as folder:
            if is_begun(folder):
                if not (folder / "config.yaml").exists():
                    raise SettingsError(
                        f"{folder} holds what a run has left that is not known: give another name"
                    )
                known, values = self.stored(folder).values, settings.values
                check_continued(folder, known, values, settings.later(folder))
                others = "".join(f" {each}" for each in differences(known, values))
                if again and not others:
                    yield folder
                    return
                longer = [name for name in _LENGTHS if known.get(name, 0) > values.get(name, 0)]
                if longer:
                    its = ", ".join(f"{name}={written(known[name])}" for name in longer)
                    raise SettingsError(
                        f"{folder} holds this run already, with {its}: give another name"
                    )
                raise SettingsError(
                    f"{folder} holds this run already: {argument('resume', folder)}{others} goes on with it, "
                    "or give another name"
                )
            yield folder

    def _command_to_resume(self, folder: Path, settings: Any) -> str:
        return command_to_resume(self.name, folder)

    def settings(self, overrides: Sequence[str] = ()) -> Any:
        """Compose the settings of a new run.

        Args:
            overrides: as on the command line.

        Raises:
            SettingsError: one of them is refused.
        """
        all_ = [*self._implied(overrides), *overrides]
        self.check(all_)
        return self._made(self.compose(all_), overrides)

    def stored(self, folder: Path) -> Any:
        """Return the settings of a run.

        Raises:
            SettingsError: the folder is not that of a run.
        """
        return self._of(self._stored(folder))

    def resumed(self, folder: Path, overrides: Sequence[str]) -> Any:
        """Return the settings of a run that goes on: its own, and over them what extends it.

        Args:
            folder: of the run.
            overrides: as on the command line.

        Raises:
            SettingsError: the folder is not that of a run, or one of them is refused.
        """
        stored = self.stored(folder)
        given = [each for each in overrides if parsed([each])[0].key_or_group != "resume"]
        if not given:
            return stored
        self.check([*self._implied_by(stored.values), *given])
        for each in parsed(given):
            if each.is_sweep_override() or each.key_or_group.partition(".")[0] in ("hydra", "name"):
                raise SettingsError(
                    f"{each.input_line}: resume={folder} goes on with one run, in its folder; leave it out"
                )
        composed = self.compose([*self._implied_by(stored.values), *given])
        resumed = self._of(over(stored.values, composed, given))
        check_continued(folder, stored.values, resumed.values, resumed.later(folder))
        return self._extended(stored, resumed, {each.key_or_group for each in parsed(given)})

    def _implied_by(self, values: Mapping[str, Any]) -> list[str]:
        """Return the choices of these values, as on the command line, of which others depend."""
        return []

    def _implied(self, overrides: Sequence[str]) -> list[str]:
        """Return the choices that follow from what is given, as on the command line."""
        return []

    def _extended(self, stored: Any, resumed: Any, given: set[str]) -> Any:
        return resumed

    def _stored(self, folder: Path) -> dict[str, Any]:
        if not folder.is_dir():
            what = "is a file, give its folder" if folder.exists() else "there is no such folder"
            raise SettingsError(f"resume={folder}: {what}")
        if not (folder / "config.yaml").exists():
            raise SettingsError(f"resume={folder}: that folder has no config.yaml")
        try:  # as it stands: what it would look up, as ${oc.env:...}, stays text
            values: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        except (OmegaConfBaseException, OSError, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"resume={folder}: config.yaml can not be read: {reason}") from None
        if not isinstance(values, dict):
            raise SettingsError(f"resume={folder}: config.yaml holds no settings by name")
        own = [part.model_fields.keys() for part in self.parts if not part.group]
        # An earlier version may have had fewer settings of a part, but another script has other parts.
        if values.keys() - self._recorded(values) or not all(each & values.keys() for each in own):
            other = next((script for key, script in _OF_SCRIPTS.items() if key in values), None)
            of = "" if other in (None, self.name) else f", but of {label(other)}"
            raise SettingsError(f"resume={folder}: that run is not one of {label(self.name)}{of}")
        return values

    def _recorded(self, values: Mapping[str, Any]) -> set[str]:
        """Return the names that are in the file of a run with these values."""
        return {
            name for part in self.parts for name in ([part.group] if part.group else part.names())
        }

    def _made(self, values: dict[str, Any], overrides: Sequence[str]) -> Any:
        return self._of(values)

    def _of(self, values: Mapping[str, Any]) -> Any:
        (part,) = self.parts
        return part.of(values)

    # --- Checks --------------------------------------------------------------------------------------------

    def check(self, overrides: Sequence[str]) -> None:
        """Refuse names and values that no run could have.

        Raises:
            SettingsError: with one line that says which, and what is allowed.
        """
        asked = parsed(overrides)
        known = {
            given: (part, name)
            for part in self.parts_of(asked)
            for given, name in part.names().items()
        }
        for each in asked:
            key = each.key_or_group
            if key in self.groups:
                check_choice(each)
                continue
            if (key == "resume" and self.keeps_folder) or re.split("[./]", key)[0] == "hydra":
                if not each.is_sweep_override():
                    _require_plugin(key, each.value())
                continue
            if key == "name" and self.keeps_folder:
                _check_name(each)
                continue
            if any(
                part.is_open(name) and key.startswith(f"{of}.")
                for of, (part, name) in known.items()
            ):
                continue  # an entry of a dictionary
            if key not in known or each.is_delete() or each.is_add():
                own = ["name", "resume"] if self.keeps_folder else []
                raise SettingsError(self._unknown(key, [*known, *self.groups, *own]))
            part, name = known[key]
            for value in values_of(each):
                part.check(name, value, several=True)

    def _unknown(self, key: str, known: Sequence[str]) -> str:
        if key in RENAMED:
            return f"{key} is now {RENAMED[key]}"
        near = difflib.get_close_matches(key, known, n=1)
        hint = f": did you mean {near[0]}?" if near else f", see {typed(self.name)} --help"
        return f"there is no setting {key}{hint}"

    # --- Values --------------------------------------------------------------------------------------------

    def compose(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Return all settings as plain values, by name, those of groups in dictionaries."""
        self._register()
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIG), version_base="1.3"):
                cfg = compose(self.name, list(overrides), return_hydra_config=True)
            return _values(cfg, cfg.hydra.runtime.choices)
        except (HydraException, OmegaConfBaseException) as error:
            raise SettingsError(" ".join(str(error).split())) from None

    def _register(self) -> None:
        """Tell Hydra the settings, each with where its value comes from if nobody gives one."""
        for resolver in (if_given, named):
            OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
        own: dict[str, Any] = {part.group: part.defaults() for part in self.parts if part.group}
        for part in (part for part in self.parts if not part.group):
            own |= self._node(part)
        ConfigStore.instance().store(self.name, own, group="settings", package="_global_")

    def _node(self, part: type[Part]) -> dict[str, Any]:
        return part.defaults()

    # --- Help ----------------------------------------------------------------------------------------------

    def help(self, description: str | None, overrides: Sequence[str] = ()) -> str:
        """Describe every setting with its default, its meaning and its range."""
        asked = parsed(overrides)
        for each in asked:
            if each.key_or_group in self.groups:
                check_choice(each)
        lines = [as_typed(description or "").strip()]
        by_task, otherwise = self._by_task(asked), self._otherwise(asked)
        for part in self.parts_of(asked):
            lines += ["", f"{part.__name__}: {(part.__doc__ or '').splitlines()[0]}"]
            for given, name in part.names().items():
                field = part.model_fields[name]
                default = written(otherwise.get(given, field.get_default())) or "''"
                default += ", or by task" if given in by_task else ""
                default += f", or by config/{part.group}" if part.group else ""
                several = ", or several" if name in part.axes() else ""
                lines += [
                    f"  {given}  ({allowed(field)}{several}; default: {default})",
                    f"      {field.description}",
                ]
        if self.groups:
            lines += ["", "Choices, each a file in recipes/config:", ""]
            lines += [f"  {group}={' | '.join(files(group))}" for group in self.groups]
        if self.keeps_folder:
            lines += [
                "",
                "The folder of a run:",
                "  name  (the name of a folder; default: the date)",
                "      instead of the date",
                "  resume  (a folder; default: null: a new run)",
                "      of a run that goes on, with its settings and those that extend it",
            ]
        lines += [
            "",
            "Options: --debug for errors with their traceback; Hydra's, as -m for several runs:",
        ]
        return "\n".join([*lines, "  --hydra-help"])

    def words(self, overrides: Sequence[str], word: str) -> list[str]:
        """Return how the last word of a command line may go on, for the completion of a shell.

        Args:
            overrides: what is there before it.
            word: the beginning, which may be empty.
        """
        try:
            parts = self.parts_of(parsed([each for each in overrides if "=" in each]))
        except SettingsError:
            parts = self.parts_of([])
        name, equals, value = word.partition("=")
        fields = {
            given: part.model_fields[its] for part in parts for given, its in part.names().items()
        }
        if not equals:
            own = ["name", "resume"] if self.keeps_folder else []
            found = [*sorted(_OPTIONS), *(f"{each}=" for each in (*fields, *self.groups, *own))]
        else:
            values = (
                files(name)
                if name in self.groups
                else options(fields[name])
                if name in fields
                else []
            )
            found = [f"{name}={each}" for each in values or _paths(value)]
        return [each for each in found if each.startswith(word)]

    def _by_task(self, overrides: Sequence[Override]) -> set[str]:
        return set()

    def _otherwise(self, overrides: Sequence[Override]) -> Mapping[str, Any]:
        return {}


def if_given(setting: Any, value: Any, otherwise: Any) -> Any:
    """Choose by whether a setting is given."""
    return otherwise if setting is None else value


def named(overrides: Sequence[str], otherwise: str) -> str:
    """Name the folder of a run in that of its task."""
    name = last(parsed(list(overrides)), "name")
    return otherwise if name is None else str(name)


def _folder(overrides: Sequence[str]) -> Path | None:
    """Return that of the run to resume, if one is."""
    given = last(parsed(overrides), "resume")
    return None if given is None else Path(str(given))


def _values(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Return the choices of task and algorithm, and every setting, resolved."""
    values = {str(key): cfg[key] for key in cfg if key not in _NOT_OF_A_RUN}
    plain = {
        key: OmegaConf.to_container(value, resolve=True)
        if isinstance(value, DictConfig | ListConfig)
        else value
        for key, value in values.items()
    }
    return {**{key: choices[key] for key in ("task", "algorithm") if key in choices}, **plain}


def _require_plugin(group: str, name: Any) -> None:
    """Refuse launchers and sweepers of Hydra that are not installed, and say how they are."""
    package, extra = PLUGINS.get(f"{group}={name}".partition("_")[0], (None, None))
    if package is not None and not is_installed(f"hydra_plugins.{package}"):
        raise SettingsError(f"{group}={name}: not installed; pip install 'torchrl-iql[{extra}]'")


def _check_name(override: Override) -> None:
    given = override.input_line if override.is_sweep_override() else override.value()
    if given is not None and not re.fullmatch(r"\w[\w.=,+-]*", str(given)):
        raise SettingsError(
            f"name={written(given)}: expected the name of a folder, of letters, digits and _.=,+-"
        )


def _paths(beginning: str) -> list[str]:
    folder = (
        Path(beginning).parent if beginning and not beginning.endswith("/") else Path(beginning)
    )
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(
        f"{path}/" if path.is_dir() else str(path) for path in found if path.name[0] != "."
    )
