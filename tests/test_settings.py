"""Settings: every one of every schema is refused where it should be, at once and by name."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.behaviors.settings import SoftActorCritic
from torchrl_iql_recipes.collect import COLLECT
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.door import Door
from torchrl_iql_recipes.experiment.overrides import last, parsed, readable
from torchrl_iql_recipes.experiment.schema import Part, SettingsError, allowed, written
from torchrl_iql_recipes.experiment.settings import PARTS, Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE
from torchrl_iql_recipes.export import EXPORT
from torchrl_iql_recipes.sac import SAC

DOORS = {
    "collection": COLLECT,
    "sac": SAC,
}
SCHEMAS = {**PARTS, **algorithms(), **{name: door.parts[0] for name, door in DOORS.items()}}
FIELDS = [(part, name) for part in SCHEMAS for name in SCHEMAS[part].model_fields]
EVERY = pytest.mark.parametrize(("part", "name"), FIELDS)
EASILY_MISTYPED = {"env": "evn"}


def leaves(annotation: Any, metadata: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Yield the simple types that a setting may have, each with its bounds; None is left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        flat = (m.metadata if isinstance(m, FieldInfo) else [m] for m in arguments[1:])
        yield from leaves(arguments[0], (*metadata, *(each for some in flat for each in some)))
    elif origin in (Literal, tuple, dict) or not arguments:
        if annotation is not type(None):
            yield annotation, metadata
    else:
        for each in arguments:
            yield from leaves(each, metadata)


def of_another_type(annotation: Any) -> Iterator[Any]:
    kinds = {get_origin(kind) or kind for kind, _ in leaves(annotation)}
    yield from [[], ["x", {}]] if tuple not in kinds else [{"a": 1}]
    if not kinds & {int, float}:
        yield 2.5
    if bool not in kinds:
        yield True
    if str not in kinds:
        yield "something"
    if int in kinds:
        yield 1.5
        yield "3"


def out_of_range(field: FieldInfo) -> Iterator[Any]:
    for kind, metadata in leaves(field.annotation, tuple(field.metadata)):
        if kind is float:
            yield from (float("nan"), float("inf"))
        for bound in metadata:
            if isinstance(bound, Ge):
                yield bound.ge - 1
            elif isinstance(bound, Gt):
                yield bound.gt
            elif isinstance(bound, Le):
                yield bound.le + 1
            elif isinstance(bound, Lt):
                yield bound.lt


def door_of(part: str) -> tuple[Door, list[str]]:
    if part in DOORS:
        return DOORS[part], []
    return ONLINE, [f"algorithm={part}"] if part in algorithms() else []


def refused(part: str, name: str, value: Any) -> str:
    """Return what is said of a value, as it was composed and as it is in a file."""
    schema = SCHEMAS[part]
    with pytest.raises(SettingsError) as error:
        schema.of({name: value})
    with pytest.raises(SettingsError):
        schema.check(name, value, several=True)
    return str(error.value)


@EVERY
def test_a_wrong_type_is_refused_with_what_is_allowed(part: str, name: str) -> None:
    schema = SCHEMAS[part]
    field = schema.model_fields[name]
    shown = f"{schema.group}.{name}" if schema.group else name
    for value in of_another_type(field.annotation):
        message = refused(part, name, value)
        assert message == f"{shown}={written(value)}: expected {allowed(field)}"
        assert "\n" not in message


@EVERY
def test_a_value_out_of_range_is_refused(part: str, name: str) -> None:
    field = SCHEMAS[part].model_fields[name]
    values = [v for v in out_of_range(field) if (name, v) != ("weight_clip", math.inf)]
    for value in values:
        assert f"{name}={written(value)}: expected " in refused(part, name, value)
    numeric = {kind for kind, _ in leaves(field.annotation)} & {int, float}
    assert values or not numeric, "a number without a range"


@EVERY
def test_a_near_name_is_answered_by_the_right_one(part: str, name: str) -> None:
    door, overrides = door_of(part)
    schema = SCHEMAS[part]
    shown = f"{schema.group}.{name}" if schema.group else name
    near = EASILY_MISTYPED.get(name, shown[:-1])
    with pytest.raises(SettingsError, match=f"there is no setting {near}: did you mean {shown}\\?"):
        door.check([*overrides, f"{near}=1"])


@EVERY
def test_the_default_is_allowed_and_explained(part: str, name: str) -> None:
    schema = SCHEMAS[part]
    field = schema.model_fields[name]
    schema.check(name, field.get_default())
    assert field.description
    door, overrides = door_of(part)
    assert f"      {field.description}" in door.help("", overrides)


@pytest.mark.parametrize("axis", ["learning_rate", "discount", "expectile", "temperature"])
def test_of_an_axis_several_different_values_may_be_given(axis: str) -> None:
    settings = OFFLINE.settings(["task=antmaze/umaze", f"{axis}=[0.5,0.25]"])
    assert [getattr(each.algorithm, axis) for each in settings.learners] == [0.5, 0.25]
    for wrong in ("[]", "[0.5,0.5]", "[0.5,no]"):
        with pytest.raises(SettingsError, match=f"{axis}=.*, or several"):
            OFFLINE.settings([f"{axis}={wrong}"])


def test_integral_numbers_may_be_written_with_an_exponent() -> None:
    settings = ONLINE.settings(["steps=1e6", "env_steps=2e5", "temperature=3"])
    assert (settings.training.steps, settings.online.env_steps) == (1_000_000, 200_000)
    assert isinstance(settings.values["steps"], int)  # what is recorded is what ran


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("eval_interval=0", "eval_interval=0: expected an integer of at least 1"),
        ("seeds=a", "seeds=a: expected an integer of at least 0 or "),
        ("seeds=[1,1]", "seeds=[1, 1]: expected one or several different integers"),
        ("hidden_sizes=256", "hidden_sizes=256: expected [a, b, ...]"),
        ("steps=ten", "steps=ten: expected an integer of at least 0"),
        ("expectil=0.8", "there is no setting expectil: did you mean expectile?"),
        ("decay_actor=true", "decay_actor is now decay_steps"),
        ("share=0.2", "share is a setting of percent_bc: give algorithm=percent_bc"),
        ("algorithm=bcc", "algorithm=bcc: did you mean bc?"),
        ("task=antmaze/umase", "task=antmaze/umase: did you mean antmaze/umaze?"),
        ("compute.thread=1", "there is no setting compute.thread: did you mean compute.threads?"),
        ("+new=1", "there is no setting new"),
        ("temperature=3,-1", "temperature=-1: expected a number of at least 0"),
        ("env={frame_skip:2}", "env={'frame_skip': 2}: expected an id beside"),
        ("steps=[", "steps=[: can not be read, expected a number, text, [a,b] or {key: value}"),
        ("steps", "steps: expected a setting and its value, steps=..."),
        (__file__, f"{__file__}: expected a setting and its value, dataset={__file__}"),
        ("action_space=[-1]", "action_space=[-1]: expected [a, b], each a number or [a, b, ...]"),
    ],
)
def test_what_people_mistype_is_answered_in_one_line(given: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        OFFLINE.settings([given])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["last.ckpt", "config.yaml"])
def test_a_checkpoint_or_a_run_alone_is_taken_for_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    given = tmp_path / name if name == "last.ckpt" else tmp_path
    with pytest.raises(
        SettingsError, match=f"expected a setting and its value, checkpoint={given}"
    ):
        OFFLINE.settings([str(given)])


@pytest.mark.parametrize("name", ["seed=0", "temperature=3.0,seed=0", "it's (1)", "a#b"])
def test_a_path_needs_no_quotes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell completes it, of the folder of a learner; alone, and in a list."""
    monkeypatch.chdir(tmp_path)
    path = f"{name}/last.ckpt"
    Path(name).mkdir()
    Path(path).touch()
    assert last(parsed([readable(f"checkpoint={path}")]), "checkpoint") == path
    if "'" not in name:
        given = f"checkpoint=[{path},other.ckpt,{path},away/seed=1/last.ckpt]"
        expected = [path, "other.ckpt", path, "away/seed=1/last.ckpt"]
        assert last(parsed([readable(given)]), "checkpoint") == expected
    monkeypatch.setattr(sys, "argv", ["export.py", f"checkpoint={path}", "output=it.npz"])
    opened: list[Any] = []
    EXPORT.open(lambda settings, _: opened.append(settings), "")
    assert opened[0].checkpoint == path


@pytest.mark.parametrize("given", ["steps=1e5", "a=[1,2]", "a='b=c'", "a={b: [c]}", "a=[", "a=1,2"])
def test_what_is_no_text_is_left_as_it_is(given: str) -> None:
    assert readable(given) == given


def test_n_steps_need_rewards_and_one_discount() -> None:
    assert OFFLINE.settings(["n_steps=3"]).data.n_steps == 3
    with pytest.raises(SettingsError, match="n_steps=3: BC has no rewards to sum"):
        OFFLINE.settings(["n_steps=3", "algorithm=bc"])
    with pytest.raises(SettingsError, match=r"n_steps=3: give one discount, not \[0.9, 0.99\]"):
        OFFLINE.settings(["n_steps=3", "discount=[0.99,0.9]"])


def test_what_is_recorded_gives_the_same_settings_again() -> None:
    for door, overrides in ((OFFLINE, ["task=kitchen/mixed", "seeds=[0,1]"]), (ONLINE, [])):
        settings = door.settings(overrides)
        assert Settings.of(settings.values) == settings


def test_every_family_of_a_task_is_one_that_an_algorithm_may_name() -> None:
    families = {
        str(OFFLINE.compose([f"task={name}"])["task"]): name
        for name in ("antmaze/umaze", "mini/hopper-medium", "pointmaze/stitch")
    }
    assert len(families) == 3
    known = set()
    for path in (CONFIG / "task").rglob("*.yaml"):
        lines = path.read_text().splitlines()
        known |= {line.partition(": ")[2] for line in lines if line.startswith("family: ")}
    import yaml

    for name, schema in algorithms().items():
        content = yaml.safe_load((CONFIG / "algorithm" / f"{name}.yaml").read_text())
        assert content["families"].keys() <= known
        parts: list[type[Part]] = [schema, *(p for p in PARTS.values() if not p.group)]
        for settings in [content.get("otherwise", {}), *content["families"].values()]:
            for key, value in settings.items():
                (part,) = (each for each in parts if key in each.model_fields)
                part.check(key, value, several=True)


# --- From the command line -----------------------------------------------------------------------------


def started(
    folder: Path, *arguments: str, without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a script, in a Python that fails as soon as PyTorch or TorchRL is imported, and lacks others."""
    missing = ["torch", "torchrl", "tensordict", *without]
    program = (
        f"import sys, runpy; sys.modules |= dict.fromkeys({missing}); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", program, str(CONFIG.parent / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["offline.py", "online.py"])
def test_a_refusal_comes_before_pytorch_and_before_a_folder(script: str, tmp_path: Path) -> None:
    done = started(tmp_path, script, "expectil=0.8")
    assert done.returncode == 1
    assert done.stderr == f"{script}: there is no setting expectil: did you mean expectile?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_with_what_to_do(
    logger: str, tmp_path: Path
) -> None:
    (tmp_path / logger).mkdir()  # not the package: what it leaves
    done = started(tmp_path, "offline.py", f"logger={logger}", without=[logger])
    assert done.returncode == 1
    assert done.stderr == (
        f"offline.py: logger={logger}: that package is not installed; "
        f"pip install 'torchrl-iql[{logger}]', or give logger=csv\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [logger]


def test_an_algorithm_whose_package_is_not_installed_is_refused_with_what_to_do(
    tmp_path: Path,
) -> None:
    done = started(tmp_path, "offline.py", "algorithm=dt", without=["transformers"])
    assert done.returncode == 1
    assert done.stderr == (
        "offline.py: algorithm=dt: the package transformers is not installed; "
        "pip install 'torchrl-iql[dt]', or give another algorithm\n"
    )
    assert list(tmp_path.iterdir()) == []
    helped = started(tmp_path, "offline.py", "--help", "algorithm=dt", without=["transformers"])
    assert "target_return  (a number or null; default: null)" in helped.stdout


def test_an_algorithm_has_settings_of_its_own_where_neither_family_nor_task_has_any() -> None:
    for task in ("own", "locomotion/hopper-medium", "ogbench/antmaze-large-navigate"):
        settings = OFFLINE.settings(["algorithm=dt", f"task={task}"])
        assert settings.networks.hidden_sizes == (128, 128, 128)
        assert (settings.networks.dropout, settings.training.batch_size) == (0.1, 64)
    stitch = OFFLINE.settings(["algorithm=dt", "task=pointmaze/stitch"])
    assert stitch.training.steps == 20_000  # the task's
    helped = OFFLINE.help("", ["algorithm=dt"]).splitlines()
    for name, default in {"hidden_sizes": "[128,128,128]", "batch_size": "64"}.items():
        (line,) = (each for each in helped if each.startswith(f"  {name}  ("))
        assert f"; default: {default}" in line
    given = OFFLINE.settings(["algorithm=dt", "hidden_sizes=[8,8]"])
    assert given.networks.hidden_sizes == (8, 8)


@pytest.mark.parametrize("script", ["offline.py", "online.py"])
def test_help_needs_no_pytorch(script: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = started(tmp_path, script, "--help", "algorithm=percent_bc")
    assert done.returncode == 0, done.stderr
    assert "share  (a number above 0 and at most 1; default: 0.1)" in done.stdout
    assert "algorithm=awac | bc | cql | dt | iql | onestep | percent_bc | td3bc" in done.stdout
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_to_go_on_comes_before_pytorch(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "there").mkdir()
    text = yaml.safe_dump(dict(OFFLINE.settings([]).values))
    (tmp_path / "there/config.yaml").write_text(text)
    done = started(tmp_path, "offline.py", "resume=there", "discount=0.5")
    expected = (
        "offline.py: there holds a run with discount=0.99, not discount=0.5: begin a new run, of "
        "another name=\n"
    )
    assert (done.returncode, done.stderr) == (1, expected)


def test_a_run_of_another_script_is_not_resumed(tmp_path: Path) -> None:
    import yaml

    for door, other in ((OFFLINE, ONLINE), (ONLINE, OFFLINE)):
        text = yaml.safe_dump(dict(door.settings([]).values))
        (tmp_path / "config.yaml").write_text(text)
        assert door.stored(tmp_path) == door.settings([])
        with pytest.raises(SettingsError, match=f"that run is not one of {other.name}.py"):
            other.stored(tmp_path)


@pytest.mark.parametrize("missing", ["maze", "n_steps", "decay_steps", "eval_workers"])
def test_a_run_of_an_earlier_version_with_fewer_settings_is_resumed(
    missing: str, tmp_path: Path
) -> None:
    import yaml

    for door in (OFFLINE, ONLINE):
        values = dict(door.settings([]).values)
        del values[missing]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        stored = door.stored(tmp_path)
        assert stored.learners == door.settings([]).learners
        assert (stored.data, stored.evaluation) == (
            door.settings([]).data,
            door.settings([]).evaluation,
        )


def test_a_training_of_a_behaviour_is_no_run(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SoftActorCritic().model_dump(mode="json")))
    assert DOORS["sac"].stored(tmp_path) == SoftActorCritic()
    with pytest.raises(SettingsError, match=r"that run is not one of offline\.py"):
        OFFLINE.stored(tmp_path)


def test_a_device_or_an_environment_that_does_not_exist_is_refused_in_one_line() -> None:
    from torchrl_iql_recipes.experiment import build

    with pytest.raises(SettingsError, match=r"compute.device=gpu .*give compute=cpu"):
        build.set_up(OFFLINE.settings(["compute.device=gpu"]).compute)
    with pytest.raises(SettingsError, match=r"env=Hoper-v5: .*"):
        build.environment(OFFLINE.settings(["env={id:Hoper-v5}"]).data.env)
    with pytest.raises(SettingsError, match=r"checkpoint=nowhere.ckpt: there is no checkpoint"):
        ONLINE.settings(["checkpoint=nowhere.ckpt"])
    with pytest.raises(SettingsError, match="steps=0: expected an integer of at least 1"):
        OFFLINE.settings(["steps=0"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dataset=no/such-v0"], "dataset=no/such-v0: no Minari data set 'no/such-v0'"),
        (["dataset=no.hdf5"], "dataset=no.hdf5: no D4RL file no.hdf5"),
        (["env=Hoper-v5"], "env=Hoper-v5: unknown environment 'Hoper-v5': Environment `Hoper`"),
    ],
)
def test_data_that_can_not_be_had_are_refused_in_one_line(
    given: list[str], message: str, root: Path
) -> None:
    from torchrl_iql_recipes.experiment import build

    with pytest.raises(SettingsError) as error:
        build.dataset_for(OFFLINE.settings(given).data)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_several_runs_may_be_asked_for_anywhere_in_the_command(tmp_path: Path) -> None:
    arguments = ("dataset=no.hdf5", "--multirun", "steps=10,20")
    done = started(tmp_path, "offline.py", *arguments, f"hydra.sweep.dir={tmp_path / 'runs'}")
    assert "import of torch halted" in done.stderr, done.stderr  # it began to run


def test_an_entry_of_a_dictionary_can_be_given_alone() -> None:
    """As README does to join a cluster of Ray."""
    address = "collector.backend_options.ray_init_config.address"
    given = ["collector=ray", f"{address}=auto"]
    options = ONLINE.settings(["task=mini/antmaze-umaze", *given]).collector.backend_options
    assert options["ray_init_config"]["address"] == "auto"
    assert options["ray_init_config"]["include_dashboard"] is False  # the others stay
    with pytest.raises(SettingsError, match=r"Could not override .*ray_init_config\.addres'"):
        ONLINE.settings(["collector=ray", f"{address[:-1]}=auto"])
