"""Files of others: whatever they hold, no code of theirs runs, and nothing is written outside of its folder.

Each file here carries a payload that makes a folder as soon as it runs.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from pyarrow import dataset, parquet
from tensordict import NonTensorData, TensorDict
from torchrl.checkpoint import Checkpoint, GlobalRNGState, StateDictCheckpointAdapter

from episodes import FORMATS, MARKS, walk, write
from online_envs import Diary, diary
from runs import TINY
from test_checkpoint import ARCHITECTURE, learner
from torchrl_iql import Evaluator, checkpoint, load_policy
from torchrl_iql.data import load, replay
from torchrl_iql.data.__main__ import main as inspect
from torchrl_iql.data.cache import _seal
from torchrl_iql.environments import observing, registered, spec_of
from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.behaviors.mazes import point_maze
from torchrl_iql_recipes.behaviors.policies import Stages
from torchrl_iql_recipes.behaviors.sac import run as train_sac
from torchrl_iql_recipes.collect import COLLECT
from torchrl_iql_recipes.comparison import jobs
from torchrl_iql_recipes.comparison.jobs import Job
from torchrl_iql_recipes.experiment import build, offline, online
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.door import Door
from torchrl_iql_recipes.experiment.schema import AXIS, SettingsError, Text, written
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE
from torchrl_iql_recipes.sac import SAC

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*skew")]


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path_factory: pytest.TempPathFactory):
    """Return the folder that a payload would make, and see that none did."""
    mark = tmp_path_factory.mktemp("mark") / "ran"
    pickle.loads(pickle.dumps(Payload(mark)))
    mark.rmdir()  # it would have run
    yield mark
    assert not mark.exists()


# --- Environments that data sets name -----------------------------------------------------------------------


def named(spec: EnvSpec | str, *, key: str = "env_spec", without: tuple[str, ...] = ()) -> str:
    """Store a data set of three numbers and one action, whose metadata name an environment."""
    box = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    observations = np.zeros((8, 3), np.float32)
    root = Path(os.environ["MINARI_DATASETS_PATH"])
    name = f"test/named-v{len(list(root.glob('test/*')))}"
    write(walk(7, observations=observations), dataset_id=name, observation_space=box)
    file = root / name / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata = {each: value for each, value in metadata.items() if each not in without}
    text = spec if isinstance(spec, str) else spec.to_json()
    file.write_text(json.dumps(metadata | {key: text}))
    return name


WRAPPERS = {
    "os:system": {"command": "true"},
    "online_envs:Diary": {},
    "gymnasium.wrappers:RecordVideo": {"video_folder": "there"},
    "gymnasium.wrappers.array_conversion:ArrayConversion": {"env_xp": "os", "target_xp": "os"},
    "gymnasium.wrappers.common:deepcopy": {},
    "gymnasium.wrappers:FilterObservation:x": {},
}


def foreign(mark: Path) -> dict[str, EnvSpec]:
    """Return environments of all kinds that a file may not name, by what is refused."""
    pole = gymnasium.spec("CartPole-v1").entry_point
    made = {"os:mkdir": EnvSpec("Gift-v0", entry_point="os:mkdir", kwargs={"path": str(mark)})}
    made |= {
        name: EnvSpec("Pole-v0", pole, additional_wrappers=(WrapperSpec("W", name, kwargs),))
        for name, kwargs in WRAPPERS.items()
    }
    made["evil:Env-v0"] = EnvSpec("Pole-v0", pole, kwargs={"made_of": [{"it": "evil:Env-v0"}]})
    made["os:getcwd"] = EnvSpec("CartPole-v1", pole, vector_entry_point="os:getcwd")
    made["module in its id"] = EnvSpec("evil:Pole-v0", pole)
    made["no entry point"] = EnvSpec("Pole-v0")
    return made


@pytest.mark.parametrize("what", foreign(Path()))
def test_foreign_code_of_an_environment_is_refused_by_name(what: str, mark: Path) -> None:
    spec = foreign(mark)[what]
    advice = r"import the package that registers .*env=<id>.*trust_env; to learn from it .*with_env=False"
    for key in ("env_spec", "eval_env_spec"):
        name = named(spec, key=key)
        with pytest.raises(ValueError, match=rf"^{name}: .*{spec.id}.*{what}.*{advice}"):
            load(name)
        assert load(name, env="Pendulum-v1").env_spec == gymnasium.spec("Pendulum-v1")
        assert load(name, with_env=False).env_spec is None
    with pytest.raises(ValueError, match=f"{what}.*{advice}"):
        replay(named(spec))


def test_walks_that_are_there_are_told_without_foreign_code(mark: Path, root: Path) -> None:
    stitch = collection.behavior("pointmaze/stitch")
    path = collection.build("own/walks-v0", stitch, 100, workers=1)
    assert "arrive where they are sent" in collection.summary(path, stitch)
    file = path / "data" / "metadata.json"
    spec = foreign(mark)["os:mkdir"].to_json()
    file.write_text(json.dumps({**json.loads(file.read_text()), "env_spec": spec}))
    with pytest.raises(ValueError, match="'os:mkdir'"):
        collection.summary(collection.build("own/walks-v0", stitch, 100), stitch)


def test_an_environment_is_not_made_to_tell_spaces(mark: Path) -> None:
    gift = foreign(mark)["os:mkdir"]
    for space in ("observation_space", "action_space"):
        name = named(gift, without=(space,))
        for entrance in (load, replay):
            with pytest.raises(ValueError, match=rf"metadata.json has no {space}.*trust_env if"):
                entrance(name, env="Pendulum-v1")


def test_the_recipes_and_the_command_line_refuse_it_too(
    mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = named(foreign(mark)["os:mkdir"])
    with pytest.raises(
        SettingsError, match=f"^dataset={name}: .*'os:mkdir'.*trust_env; .*eval_episodes=0"
    ):
        build.dataset_for(OFFLINE.settings([f"dataset={name}", "reward=none"]).data)
    for command in ("inspect", "replay"):
        assert inspect([command, name]) != 0
        assert "'os:mkdir'" in capsys.readouterr().err


def test_who_is_trusted_may_name_any(capsys: pytest.CaptureFixture[str]) -> None:
    name, spec = named(diary()), diary()
    with pytest.raises(ValueError, match="online_envs:Diary"):
        load(name)
    assert load(name, trust_env=True).env_spec == spec
    assert inspect(["inspect", name, "--trust-env"]) == 0
    assert "Diary-v0" in capsys.readouterr().out
    data = OFFLINE.settings([f"dataset={name}", "trust_env=true", "reward=none"]).data
    with Evaluator(build.dataset_for(data).env_spec, episodes=1) as evaluator:  # pyright: ignore
        assert isinstance(evaluator.envs[0].unwrapped, Diary)


@pytest.mark.parametrize("entry_point", ["online_envs:Diary", Diary])
def test_what_somebody_here_registered_is_known(entry_point: Any) -> None:
    """By name, or as the class itself."""
    gymnasium.register("test/Known-v0", entry_point=entry_point)
    try:
        for id in ("test/Known-v0", "test/Variant-v0"):
            spec = EnvSpec(id, "online_envs:Diary", kwargs={"success_at": 3}, max_episode_steps=5)
            found = load(named(spec)).env_spec
            assert found is not None
            with gymnasium.make(found) as env:
                assert env.unwrapped.success_at == 3  # pyright: ignore
                assert (found.id, found.max_episode_steps) == (id, 5)
    finally:
        del gymnasium.registry["test/Known-v0"]


def test_the_environments_of_this_project_and_of_gymnasium_are_known() -> None:
    specs = [point_maze(name) for name in ("stitch", "umaze", "medium", "large")]
    specs += [observing(point_maze("umaze"), ["observation"])]
    specs += [spec for spec in gymnasium.registry.values() if isinstance(spec.entry_point, str)]
    assert len(specs) > 50
    for spec in specs:
        found = registered(EnvSpec.from_json(spec.to_json()))
        assert json.loads(found.to_json()) == json.loads(spec.to_json())


@pytest.mark.parametrize(
    "id", ["PointMaze_UMaze-v3", "antmaze-medium-singletask-v0", "antmaze-medium-v0"]
)
def test_packages_that_are_used_here_need_not_be_imported_before(id: str) -> None:
    pytest.importorskip("ogbench")
    text = spec_of(id if id in gymnasium.registry else f"ogbench:{id}").to_json()  # pyright: ignore
    code = (
        "from gymnasium.envs.registration import EnvSpec\n"
        "from torchrl_iql.environments import registered\n"
        f"print(registered(EnvSpec.from_json({text!r})).id)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [id]


# --- Files that hold more than numbers ----------------------------------------------------------------------


class Hostile(torch.nn.Module):
    """A component whose state dict runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # pyright: ignore
        return {"weight": Payload(self.mark)}


def hostile_checkpoint(path: Path, name: str, form: str, mark: Path) -> Path:
    """Replace a component of a checkpoint by one that carries a payload, in one of TorchRL's forms."""
    source = learner()
    checkpoint.save(path, source, ARCHITECTURE)
    metadata = checkpoint.load_metadata(path)
    saved: dict[str, Any] = {"policy": source.losses[0], "learner": source, "rng": GlobalRNGState()}
    archive = Checkpoint(format="archive")
    for key, component in {**saved, name: Hostile(mark)}.items():
        archive.register(key, component, adapter=StateDictCheckpointAdapter("torch"))
    archive.save(path, metadata=metadata)
    if form == "torch":
        return path
    with zipfile.ZipFile(path) as old:
        members = {each: old.read(each) for each in old.namelist()}
    manifest = json.loads(members["manifest.json"])
    record = manifest["components"][name]
    folder = path.with_name("payload")
    TensorDict({"a": NonTensorData(Payload(mark)), "b": torch.zeros(1)}).save(folder / "state")
    del members[f"{record['path']}/state.pt"]
    files = [each for each in folder.rglob("*") if each.is_file()]
    record["files"] = [str(each.relative_to(folder)) for each in files]
    members |= {f"{record['path']}/{each.relative_to(folder)}": each.read_bytes() for each in files}
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as new:
        for key, content in members.items():
            new.writestr(key, content)
    return path


@pytest.mark.parametrize("form", ["torch", "directory"])
@pytest.mark.parametrize("name", ["policy", "learner", "rng"])
def test_a_checkpoint(name: str, form: str, mark: Path, tmp_path: Path) -> None:
    path = hostile_checkpoint(tmp_path / "a.ckpt", name, form, mark)
    reason = "more than tensors and plain values, posix.mkdir," if form == "torch" else "state.pt"
    with pytest.raises(ValueError, match=rf"a\.ckpt: .*{name}.*{reason}"):
        load_policy(path) if name == "policy" else checkpoint.load_learner(path, learner())


def test_an_entry_of_the_cache(mark: Path, cache_folder: Path) -> None:
    name = write(walk(3))
    expected = load(name)
    (entry,) = cache_folder.glob("*.tdz")
    hostile = TensorDict.load_memmap(entry, allow_pickle=False).clone()
    hostile["more"] = NonTensorData(Payload(mark))
    hostile.save(str(entry), archive=True)
    mark.rmdir()  # TensorDict copies what it pickles
    _seal(entry)
    with pytest.warns(UserWarning, match="is damaged and made anew: .*pickle"):
        assert load(name).transitions["action"].equal(expected.transitions["action"])


@pytest.mark.parametrize("data_format", FORMATS)
def test_arrays_of_minari(data_format: str, mark: Path, root: Path) -> None:
    """HDF5 with bytes that somebody could unpickle; Arrow with a type that old versions unpickled."""
    folder = root / write(walk(3), data_format=data_format) / "data"
    payload = pickle.dumps(Payload(mark))
    if data_format == "hdf5":
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            episode: Any = file["episode_0"]
            del episode["actions"]
            episode["actions"] = np.array([np.void(payload)] * 3)
        with pytest.raises(ValueError, match=r"test/walks-v0, episode 0: .*actions"):
            load("test/walks-v0")
        return
    (path,) = (folder / "0").glob(f"*.{data_format}")
    table = dataset.dataset(path, format=data_format).to_table()
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": payload,
    }
    at = table.schema.get_field_index("rewards")
    schema = table.schema.set(at, table.schema.field(at).with_metadata(extension))
    rewritten = table.cast(schema)
    if data_format == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_table(rewritten)
    else:
        parquet.write_table(rewritten, path)
    assert load("test/walks-v0").transitions["next", "reward"].flatten().tolist() == [0, 0.5, 1]


def test_a_file_of_d4rl(mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "gift.hdf5"
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions"):
            file[key] = np.array([[np.void(pickle.dumps(Payload(mark)))]] * 4)
        file["rewards"], file["terminals"] = np.zeros(4, np.float32), np.zeros(4, bool)
    with pytest.raises((TypeError, ValueError), match=r"gift\.hdf5: actions has dtype \|V"):
        load(path)


def test_a_file_of_ogbench(mark: Path, tmp_path: Path) -> None:
    pytest.importorskip("ogbench")
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    numbers = {"observations": np.zeros((4, 2)), "terminals": np.zeros(4), "qpos": np.zeros((4, 2))}
    objects = np.array([Payload(mark)] * 4, dtype=object)[:, None]
    np.savez(path, actions=objects, **numbers)  # pyright: ignore
    with pytest.raises((TypeError, ValueError), match=rf"{path.name}: .*(actions|allow_pickle)"):
        load(path)
    np.savez(path, actions=np.zeros((4, 2), np.float32), **{**numbers, "qpos": objects})  # pyright: ignore
    with pytest.raises(ValueError, match=rf"{path.name}: .*allow_pickle"):
        load(path)


def test_stages_of_a_policy(mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "stages.pt"
    torch.save({"sizes": Payload(mark)}, path)
    with pytest.raises(ValueError, match=r"stages\.pt is refused: .*posix\.mkdir"):
        Stages.load(path)
    torch.save({"sizes": 1}, path)
    with pytest.raises(ValueError, match=r"stages\.pt holds no stages of a policy"):
        Stages.load(path)


def test_the_buffer_of_a_training(mark: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = SAC.settings(["behavior=hopper", "frames=50", "random_frames=50", "threads=1"])
    train_sac(settings, run)
    (storage,) = run.glob("checkpoint-*/buffer/storage")
    hostile = TensorDict.load_memmap(storage, allow_pickle=False).clone()
    hostile["more"] = NonTensorData(Payload(mark))
    hostile.save(storage)
    with pytest.raises(RuntimeError, match="Refusing to load pickled non-tensor data"):
        train_sac(SAC.resumed(run, ["frames=100"]), run)


def test_the_parts_of_an_unfinished_data_set(mark: Path, root: Path) -> None:
    """They lie in the store, which may be somebody else's."""
    stitch = collection.behavior("pointmaze/stitch")

    def planted(parts: Path, *_: Any) -> None:
        torch.save([{"actions": Payload(mark)}], parts / "00000.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "_play", planted)
        with pytest.raises(ValueError, match=r"00000\.pt is refused: .*posix\.mkdir"):
            collection.build("own/walks-v0", stitch, 100)


# --- Settings of stored runs --------------------------------------------------------------------------------


def run_folder(folder: Path, door: Door = OFFLINE, **changes: Any) -> Path:
    values = {**door.settings([]).values, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return folder


def test_the_settings_of_a_run_build_no_objects(mark: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"dataset: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(SettingsError, match=r"config\.yaml can not be read: .*os\.mkdir"):
        OFFLINE.resumed(tmp_path, [])
    (tmp_path / "config.yaml").write_text("- one\n")
    with pytest.raises(SettingsError, match=r"config\.yaml holds no settings by name"):
        OFFLINE.resumed(tmp_path, [])
    target = {"_target_": "os.mkdir", "path": str(mark)}
    for changes in (target, {"hydra": {"searchpath": ["pkg://os"]}}, {"compute": target}):
        try:
            OFFLINE.resumed(run_folder(tmp_path, **changes), [])
        except SettingsError:
            continue
        assert changes == {"compute": target}  # left out, as nobody reads it
    assert not mark.exists()


def test_the_settings_of_a_run_do_not_look_into_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    settings = OFFLINE.resumed(run_folder(tmp_path, dataset="${oc.env:SECRET}"), ["steps=2e6"])
    with pytest.raises(SettingsError) as refused:
        build.dataset_for(settings.data)
    build.claim(tmp_path / "again", settings)
    assert "hunter2" not in f"{refused.value}{(tmp_path / 'again/config.yaml').read_text()}"


@pytest.mark.parametrize("env", ["evil:Env-v0", {"id": "CartPole-v1", "made_of": "evil:Env-v0"}])
def test_a_stored_environment_imports_nothing(env: Any, tmp_path: Path) -> None:
    """Neither in the folder of a run nor in a checkpoint, unless the command line trusts or gives it."""
    given, trust = f"env={written(env)}", "trust_env=true"
    folder = run_folder(tmp_path, env=env, trust_env=True)
    for more in ([], ["steps=2e6"], ["trust_env=false"]):
        with pytest.raises(SettingsError, match=r"^resume=.*: the env stored .* trust_env=true$"):
            OFFLINE.resumed(folder, [f"resume={folder}", *more])
    assert OFFLINE.resumed(folder, [f"resume={folder}", trust]).data.env == env
    assert OFFLINE.resumed(folder, [f"resume={folder}", given]).data.env == env

    values = {**OFFLINE.settings(["temperature=3"]).values, "env": env, "trust_env": True}
    path = checkpoint.save(tmp_path / "a.ckpt", learner(), ARCHITECTURE, config=values)
    for door in (OFFLINE, ONLINE):
        for more in ([], ["batch_size=8"], ["trust_env=false"]):
            with pytest.raises(SettingsError, match=r"^checkpoint=.*: the env .* trust_env=true$"):
                door.settings([f"checkpoint={path}", *more])
        assert door.settings([f"checkpoint={path}", trust]).data.env == env
        assert door.settings([f"checkpoint={path}", given]).data.env == env
        other = door.settings([f"checkpoint={path}", "env=CartPole-v1"]).data
        assert (other.env, other.trust_env) == ("CartPole-v1", False)


def test_a_stored_run_joins_no_cluster(tmp_path: Path) -> None:
    options = {"ray_init_config": {"address": "ray://somewhere:10001"}}
    values = dict(ONLINE.settings(["collector=ray", "temperature=3"]).values)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    assert ONLINE.resumed(tmp_path, []).collector.backend_options  # those of the file in config
    values["collector"] = {**values["collector"], "backend_options": options}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    given = f"collector.backend_options={written(options)}".replace("ray:", "'ray:").replace(
        "10001", "10001'"
    )
    with pytest.raises(SettingsError, match=r"the collector.backend_options stored there"):
        ONLINE.resumed(tmp_path, [])
    assert ONLINE.resumed(tmp_path, ["trust_env=true"]).collector.backend_options == options
    assert ONLINE.resumed(tmp_path, [given]).collector.backend_options == options
    path = checkpoint.save(tmp_path / "a.ckpt", learner(), ARCHITECTURE, config=values)
    with pytest.raises(SettingsError, match=r"^checkpoint=.*: the collector.backend_options"):
        ONLINE.settings([f"checkpoint={path}", "collector.num_collectors=1"])
    assert ONLINE.settings([f"checkpoint={path}", "collector=ray"]).of_code() == []


def test_a_task_of_a_file_is_one_of_those_here(tmp_path: Path) -> None:
    """A path to another file, which would be composed, is not read."""
    (tmp_path / "task.yaml").write_text("defaults: [nowhere]\nfamily: ${oc.env:SECRET}\n")
    task = os.path.relpath(tmp_path / "task", CONFIG / "task")
    settings = OFFLINE.resumed(run_folder(tmp_path, task=task), ["steps=2e6"])
    assert settings.training.steps == 2_000_000


def test_trust_is_given_and_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, started = ["offline.py", f"resume={run_folder(tmp_path, env='evil:Env-v0')}"], []
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^offline.py: resume=.*: the env stored there"):
        OFFLINE.open(lambda *given: started.append(given), None)
    assert not started
    monkeypatch.setattr(sys, "argv", [*command, "trust_env=true"])
    OFFLINE.open(lambda *given: started.append(given), None)
    ((settings, folder),) = started
    assert (settings.data.env, settings.data.trust_env, folder) == ("evil:Env-v0", True, tmp_path)
    (tmp_path / "metrics.csv").touch()  # something has come of it
    build.claim(tmp_path, settings)
    assert "trust_env" not in {**settings.values, **settings.of_learner(settings.learners[0])}
    assert "trust_env" not in (tmp_path / "config.yaml").read_text()
    build.claim(run_folder(tmp_path, env="evil:Env-v0", trust_env=True), settings)  # by hand


def test_trust_reaches_all_of_an_online_run(tmp_path: Path) -> None:
    """The phase before it, too, and both when they go on; the command that goes on says so."""
    name = named(diary())
    small = [
        *TINY,
        "eval_episodes=0",
        "temperature=1",
        "env_steps=4",
        "collector.frames_per_batch=2",
    ]
    given = [f"dataset={name}", "reward=none", *small]
    with pytest.raises(SettingsError, match="online_envs:Diary"):
        online.run(ONLINE.settings(given), tmp_path / "refused")
    settings = ONLINE.settings([*given, "trust_env=true"])
    online.run(settings, tmp_path / "run")
    with pytest.raises(SettingsError, match="online_envs:Diary"):
        online.run(ONLINE.resumed(tmp_path / "run", ["env_steps=6"]), tmp_path / "run")
    longer = ONLINE.resumed(tmp_path / "run", ["env_steps=6", "trust_env=true"])
    scores = online.run(longer, tmp_path / "run")
    assert scores["replicas"][0]["frames"] == 6
    assert not any("trust" in path.read_text() for path in tmp_path.rglob("config.yaml"))


def test_the_command_that_goes_on_says_what_it_needs(tmp_path: Path) -> None:
    its = [{"steps": 1, "frames": 1, "interrupted": True, "name": "", "score": 0.0}]
    for module, door in ((offline, OFFLINE), (online, ONLINE)):
        for given in ([], ["trust_env=true"], ["env=evil:Env-v0"]):
            settings = door.settings(["seeds=0", "temperature=3", *given])
            text = module.report({"replicas": its}, Path("a=b"), settings)
            command = next(each for each in text.split("\n") if "Continue with: " in each)
            overrides = shlex.split(command.partition("Continue with: ")[2])[2:]
            path = run_folder(tmp_path, door, **settings.values)
            assert overrides[0] == 'resume="a=b"'
            assert door.resumed(path, overrides).data.trust_env == bool(given)


def test_a_run_of_a_comparison_goes_on_with_the_trust_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "offline.py"
    script.write_text(
        "import pathlib, sys; pathlib.Path(sys.argv[0] + '.given').write_text(' '.join(sys.argv[1:]))"
    )
    monkeypatch.setattr(jobs, "RECIPES", tmp_path)
    given = ["env=mine:Env-v0", "trust_env=true", "steps=5", "seeds=0"]
    job = Job(OFFLINE, tmp_path / "run", given)
    for begun in (False, True):
        with pytest.raises(RuntimeError, match="was interrupted"):
            job.finish()
        given = script.with_name("offline.py.given").read_text()
        assert "env=mine:Env-v0 trust_env=true" in given
        assert ("steps=5" in given, "resume=" in given) == (not begun, begun)
        run_folder(tmp_path / "run", OFFLINE, **job.wanted.values)


def test_collect_takes_no_settings_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no folder that it could go on in."""
    values = {**COLLECT.compose(), "env": "evil:Env-v0", "policy": "random", "id": "own/gift-v0"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["collect.py", f"resume={tmp_path}"])
    with pytest.raises(SystemExit, match=r"^collect.py: there is no setting resume"):
        COLLECT.open(lambda *_: pytest.fail("it has begun"), None)


# --- Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["../there-v0", "a/../../there-v0", "{root}/there-v0", "a\\..\\there-v0", ""]
)
def test_an_id_stays_in_the_store(id: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id, store = id.format(root=root), root / "store"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(store))
    with pytest.raises(FileNotFoundError, match="neither as a folder nor as an id"):
        load(id)
    with pytest.raises(ValueError, match="expected a Minari id"):
        collection.build(id, collection.behavior("pointmaze/stitch"), 100)
    assert not [path for path in root.rglob("*") if "there" in path.name]


def test_a_learner_stays_in_the_folder_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_iql_recipes.algorithms import algorithms
    from torchrl_iql_recipes.algorithms.bc import BC

    class Named(BC):
        kind: Annotated[Text, AXIS] = "a"

    values = {**OFFLINE.settings(["algorithm=bc"]).values, "algorithm": "named"}
    monkeypatch.setitem(algorithms(), "named", Named)
    assert len(Settings.of({**values, "kind": ["a", "b"]}).learners) == 2
    with pytest.raises(SettingsError, match=r"kind=\.\./\.\./b would be the folder of a learner"):
        Settings.of({**values, "kind": ["a", "../../b"]})


@pytest.mark.parametrize("place", ["path", "files"])
@pytest.mark.parametrize("outside", ["../../there", "/tmp/there", "..\\..\\there"])
def test_members_of_a_checkpoint_stay_where_it_is_unpacked(
    place: str, outside: str, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path / "a.ckpt", learner(), ARCHITECTURE)
    with zipfile.ZipFile(path) as old:
        members = {each: old.read(each) for each in old.namelist()}
    manifest = json.loads(members["manifest.json"])
    record = manifest["components"]["policy"]
    record[place] = outside if place == "path" else [*record["files"], outside]
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as new:
        for key, content in {**members, outside: b"here"}.items():
            new.writestr(key, content)
    with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint: Unsafe archive member path"):
        load_policy(path)
    assert not list(tmp_path.parent.glob("there"))


@pytest.mark.parametrize("column", ["../../there", "/there", "a/b", "..", "a\\b"])
def test_a_column_stays_in_its_entry(column: str, cache_folder: Path) -> None:
    values = np.arange(3.0, dtype=np.float32)
    arrays = {"observations": np.zeros((3, 2)), "actions": np.zeros((3, 1)), column: values}
    ends = {"rewards": np.zeros(3), "terminals": np.zeros(3, bool), "timeouts": np.arange(3) == 2}
    path = cache_folder.parent / "made.hdf5"
    with h5py.File(path, "w") as file:
        for key, array in {**arrays, **ends}.items():
            file[f"infos/{key}" if key == column else key] = array
    before = {each for each in cache_folder.parent.rglob("*") if each.name != "torchrl_iql"}
    try:
        loaded = [load(path, columns=[column]) for _ in range(2)]
    except (KeyError, ValueError) as error:
        assert column in str(error)
        loaded = []
    for each in loaded:
        assert each.transitions[column].flatten().tolist() == [0, 1]  # the last has no successor
    made = set(cache_folder.parent.rglob("*")) - before - {cache_folder}
    assert all(each.suffix == ".tdz" and each.parent == cache_folder for each in made)
