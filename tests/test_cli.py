"""The commands of ``torchrl-iql``, each as its user starts it: what it lists, refuses and is quick with."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runs import TINY
from torchrl_iql_recipes.commands import COMMANDS
from torchrl_iql_recipes.completion import candidates
from torchrl_iql_recipes.experiment import results
from torchrl_iql_recipes.experiment.choices import tasks
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE
from torchrl_iql_recipes.reporting import gather, text
from torchrl_iql_recipes.tasks import paces, table, values_of

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "torchrl", "tensordict"]


def started(
    folder: Path, *arguments: str, without: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Start the console script's function, in a Python where some imports fail."""
    missing = HEAVY if without is None else without
    program = (
        f"import sys; sys.modules |= dict.fromkeys({missing}); sys.argv[0] = 'torchrl-iql'; "
        "from torchrl_iql_recipes.cli import main; sys.exit(main())"
    )
    env = {**os.environ, "TORCHRL_IQL_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a user is told."""
    assert done.returncode in (1, 2), (done.stdout, done.stderr)
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    return done.stderr


def test_the_console_script_is_the_one_that_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"torchrl-iql": "torchrl_iql_recipes.cli:main"}


def test_the_list_of_commands_needs_nothing(tmp_path: Path) -> None:
    light = ["hydra", "pydantic", "numpy", "gymnasium", "yaml", *HEAVY]
    for arguments in ([], ["--help"]):
        done = started(tmp_path, *arguments, without=light)
        assert done.returncode == 0, done.stderr
        for name, command in COMMANDS.items():
            assert f"  {name}" in done.stdout and command.help in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_needs_no_pytorch(name: str, tmp_path: Path) -> None:
    done = started(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "python recipes/" not in done.stdout
    assert f"torchrl-iql {name}" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("tran", "torchrl-iql: there is no command tran: did you mean train?"),
        ("fly", "torchrl-iql: there is no command fly: expected train, online, "),
        ("train expectil=0.8", "torchrl-iql train: there is no setting expectil: did you mean exp"),
        ("train expectile=2", "torchrl-iql train: expectile=2: expected a number above 0"),
        ("train --expectile=0.8", "--expectile=0.8: settings are written expectile=0.8"),
        ("train --hlp", "torchrl-iql train: there is no option --hlp: did you mean --help?"),
        ("train task=hoper", "task=hoper: did you mean locomotion/hopper-medium or "),
        ("train task=nowhere", "task=nowhere: expected one of torchrl-iql tasks"),
        ("train algorithm=sql", "torchrl-iql train: algorithm=sql: "),
        ("train resume=nowhere", "torchrl-iql train: resume=nowhere: there is no such folder"),
        ("train -m hydra/sweeper=none", "Could not find 'hydra/sweeper/none'"),
        ("train -m steps=ten,20", "torchrl-iql train: steps=ten: expected an integer"),
        (
            "online envsteps=3",
            "torchrl-iql online: there is no setting envsteps: did you mean env_s",
        ),
        ("collect", "torchrl-iql collect: give one of suite, data and env, got none of them"),
        ("evaluate", "torchrl-iql evaluate: give checkpoint=<file>"),
        ("export checkpoint=a output=b.txt", "output=b.txt: expected a file that ends in .pt2 or"),
        ("compare nowhere", "torchrl-iql compare: nowhere is not there"),
        (
            "report out=a.html",
            "torchrl-iql report: out=a.html is not there; options are written --",
        ),
        ("compare", "torchrl-iql compare: nothing to compare: give folders of runs, or --plan"),
        ("compare .", "torchrl-iql compare: . holds no run: expected config.yaml"),
        ("compare --job 1", "torchrl-iql compare: unrecognized arguments: --job"),
        ("inspect", "torchrl-iql inspect: the following arguments are required: source; see"),
        ("replay --sample 1 x", "torchrl-iql replay: unrecognized arguments: --sample"),
        ("tasks mimi", "torchrl-iql tasks: there is no task with mimi: did you mean mini/"),
    ],
)
def test_what_is_wrong_is_one_line_before_pytorch(
    arguments: str, line: str, tmp_path: Path
) -> None:
    done = started(tmp_path, *arguments.split())
    assert line in refused(done)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train dataset=no.csv", "torchrl-iql train: dataset=no.csv: no file no.csv"),
        ("train dataset=junk.csv", "torchrl-iql train: dataset=junk.csv: junk.csv: "),
        (
            "train dataset={maze} env=Hoper-v5",
            "torchrl-iql train: env=Hoper-v5: unknown environment",
        ),
        ("train dataset={maze} env=Hopper-v5", "but Hopper-v5 has observations of 11"),
        ("train dataset={maze} compute.device=gpu", "compute.device=gpu can not be used"),
        ("train checkpoint=no.ckpt", "checkpoint=no.ckpt: there is no checkpoint"),
        ("train checkpoint=junk.csv", "checkpoint=junk.csv: junk.csv is no checkpoint"),
        ("online checkpoint=junk.csv", "checkpoint=junk.csv: junk.csv is no checkpoint"),
        ("evaluate checkpoint=junk.csv", "torchrl-iql evaluate: junk.csv is no checkpoint"),
        (
            "export checkpoint=junk.csv output=a.npz",
            "torchrl-iql export: junk.csv is no checkpoint",
        ),
        ("collect data=hopper/med", "torchrl-iql collect: there is no data set 'hopper/med'"),
        ("collect env=Hoper-v5 policy=random id=a/b-v0", "unknown environment 'Hoper-v5'"),
        ("compare --plan no.yaml", "torchrl-iql compare: "),
        ("inspect junk.csv", "torchrl-iql inspect: junk.csv"),
        ("replay junk.csv", "torchrl-iql replay: "),
    ],
)
def test_what_is_wrong_with_files_is_one_line(
    arguments: str, line: str, maze_id: str, tmp_path: Path
) -> None:
    (tmp_path / "junk.csv").write_text("a,b\n1,x\n")
    given = arguments.replace("{maze}", maze_id).split()
    done = started(tmp_path, *given, without=[])
    assert line in refused(done)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mini"),
    [
        ("locomotion/hopper-medium-replay", "mini/hopper-medium-replay"),
        ("antmaze/medium-play", "mini/antmaze-medium-play"),
        ("kitchen/mixed", "mini/"),
    ],
)
def test_data_that_are_not_there_are_answered_by_data_that_are_made_here(
    task: str, mini: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, whose network ends at the fixture; D4RL's server is none."""
    from torchrl_iql.data import d4rl
    from torchrl_iql_recipes.experiment import build

    monkeypatch.setattr(d4rl, "URL", "http://127.0.0.1:9")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(root / "d4rl"))
    with pytest.raises(SettingsError) as error:
        build.dataset_for(OFFLINE.settings([f"task={task}"]).data)
    assert f"without a network, task={mini}" in str(error.value)
    assert "\n" not in str(error.value)


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    done = started(tmp_path, "train", "expectil=0.8", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith(
        "SettingsError: there is no setting expectil: did you mean expectile?\n"
    )


def test_a_fault_of_the_code_keeps_its_traceback(tmp_path: Path) -> None:
    done = started(tmp_path, "train", "dataset=a/b-v0")  # without PyTorch, which was to be loaded
    assert "Traceback" in done.stderr and "import of torch halted" in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(started(tmp_path, "train", "steps=5"))


def test_the_first_line_comes_before_pytorch(tmp_path: Path) -> None:
    done = started(tmp_path, "train", "task=mini/hopper-medium", "steps=5", "name=x", "seeds=[0,1]")
    assert "import of torch halted" in done.stderr
    assert done.stdout.splitlines()[0] == (
        "IQL, 2 learners, on mini/hopper/medium-v0: 5 gradient steps; results: runs/mini/hopper-medium/x"
    )
    done = started(tmp_path, "online", "dataset=null", "env=Pendulum-v1", "temperature=3", "name=y")
    assert done.stdout.splitlines()[0] == (
        "IQL from scratch: 1,000,000 steps in the environment; results: runs/online/y"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_sleep_soon_where_nobody_said_otherwise(
    given: dict[str, str], expected: str
) -> None:
    """Known to OpenMP when PyTorch loads it, and to processes that are started."""
    code = (
        "import os, sys; from torchrl_iql_recipes.experiment.training import OFFLINE\n"
        "sys.argv[1:] = ['--help']; OFFLINE.open(print, None)\n"
        "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | given, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == f"False {expected}", done.stderr


def test_commands_are_written_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OFFLINE.settings([])
    assert settings.command_to_resume(Path("runs/x")) == "python recipes/offline.py resume=runs/x"
    monkeypatch.setattr(sys, "argv", ["torchrl-iql train", "steps=5"])
    assert settings.command_to_resume(Path("runs/x")) == "torchrl-iql train resume=runs/x"
    monkeypatch.setattr(sys, "argv", ["torchrl-iql"])  # as inspect and replay
    assert settings.command_to_resume(Path("runs/x")) == "torchrl-iql train resume=runs/x"


def test_a_child_says_the_same(tmp_path: Path) -> None:
    """One of a sweep's workers, or an evaluation's, is spawned."""
    program = (
        "import sys, multiprocessing as m; from torchrl_iql_recipes.commands import typed\n"
        "sys.argv[0] = 'torchrl-iql train'\n"
        "if __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(1) as pool: print(pool.map(typed, ['offline']))\n"
    )
    (tmp_path / "parent.py").write_text(program)
    command = [sys.executable, "parent.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['torchrl-iql train']\n", done.stderr


# --- Tasks -----------------------------------------------------------------------------------------------


def test_what_is_listed_of_a_task_is_what_hydra_composes() -> None:
    keys = "steps", "dataset", "hidden_sizes", "batch_size", "encoder", "seeds"
    families = {values_of(name)["family"]: name for name in tasks()}
    for name in families.values():
        values = OFFLINE.settings([f"task={name}"]).values
        assert {key: values_of(name)[key] for key in keys} == {key: values[key] for key in keys}


def test_tasks_say_what_is_here_and_what_the_last_run_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "minari/mini/hopper/medium-v0/data").mkdir(parents=True)
    (tmp_path / "hopper_medium-v2.hdf5").touch()
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    values = OFFLINE.settings(["task=mini/hopper-medium"]).values
    OmegaConf.save(OmegaConf.create(dict(values)), run / "config.yaml")
    session = {"started": "2026-01-01", "seconds": 60.0, "from_step": 0, "to_step": 10_000}
    (run / "times.json").write_text(json.dumps([session]))
    (tmp_path / "runs/times.json").write_text("[")  # of nobody
    short = tmp_path / "runs/short"  # of which the time is that of its beginning
    shutil.copytree(run, short)
    begun = {**session, "started": "2026-02-01", "to_step": 100}
    (short / "times.json").write_text(json.dumps([begun]))
    names = [
        "mini/hopper-medium",
        "locomotion/hopper-medium",
        "mini/walker2d-medium",
        "pointmaze/stitch",
    ]
    lines = table(names, paces(tmp_path / "runs"))[1:]
    own, d4rl, other, two = (" ".join(line.split()) for line in lines)
    hundred = f"1,000,000 steps, 1.7 h, as {run}"  # 6 s per 1,000
    assert own == f"mini/hopper-medium mini/hopper/medium-v0 here {hundred}"
    about = hundred.replace("1.7 h", "about 1.7 h")
    assert d4rl == f"locomotion/hopper-medium hopper_medium-v2.hdf5 here {about}"
    assert other == f"mini/walker2d-medium mini/walker2d/medium-v0 to be made {about}"
    assert two.endswith("20,000 steps")  # two learners: nothing is known of them


# --- Completion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torchrl-iql tr", ["train"]),
        ("torchrl-iql ", list(COMMANDS)),
        ("torchrl-iql train expec", ["expectile="]),
        ("torchrl-iql train algorithm=awac weight_c", ["weight_clip="]),
        ("torchrl-iql train task=mini/antmaze-u", ["task=mini/antmaze-umaze"]),
        ("torchrl-iql train compute.execution=e", ["compute.execution=eager"]),
        (
            "torchrl-iql train normalize_observation=",
            ["normalize_observation=true", "normalize_observation=false"],
        ),
        ("torchrl-iql train --hel", ["--help"]),
        ("torchrl-iql evaluate checkpoint=runs/", ["checkpoint=runs/a.ckpt", "checkpoint=runs/b/"]),
        ("torchrl-iql inspect some", []),
        ("torchrl-iql fly ", []),
    ],
)
def test_a_shell_completes_what_there_is(
    line: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/b").mkdir(parents=True)
    (tmp_path / "runs/a.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates(line) == words


def test_bash_completes(tmp_path: Path) -> None:
    """A real one, with the script that Hydra writes."""
    script = (
        f'torchrl-iql() {{ {sys.executable} -m torchrl_iql_recipes.cli "$@"; }}\n'
        "export -f torchrl-iql; mkdir bin; printf '#!/bin/bash\\n"
        f'exec {sys.executable} -m torchrl_iql_recipes.cli "$@"\\n\' > bin/torchrl-iql\n'
        "unset -f torchrl-iql; chmod +x bin/torchrl-iql; PATH=$PWD/bin:$PATH\n"
        'eval "$(torchrl-iql -sc install=bash)"\n'
        "COMP_LINE='torchrl-iql train task=mini/pointm'; COMP_POINT=${#COMP_LINE}\n"
        "COMP_WORDS=(torchrl-iql train task=mini/pointm); COMP_CWORD=2\n"
        "hydra_bash_completion; echo ${COMPREPLY[@]}\n"
    )
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "task=mini/pointmaze-medium", done.stderr


# --- Sweeps and what comes of them -------------------------------------------------------------------------


def scores(**replica: float) -> dict[str, list[dict]]:
    return {
        "replicas": [{"held_out": {"td_error": 2.0}, **replica}, {"held_out": {}, "score": 5.0}]
    }


def test_what_a_sweep_looks_for_is_what_best_by_names() -> None:
    default = OFFLINE.settings([])
    assert results.objective(scores(score=1.0), default) == 3.0
    assert results.objective(scores(), default) is None  # one of them was not evaluated
    lowest = OFFLINE.settings(["validation=0.1", "best_by=-validation/td_error"])
    one = {"replicas": scores()["replicas"][:1]}
    assert results.objective(one, lowest) == -2.0


@pytest.mark.slow
def test_a_sweep_returns_scores_and_is_joined(maze_id: str, tmp_path: Path) -> None:
    given = [
        "train",
        "-m",
        "task=pointmaze/stitch",
        f"dataset={maze_id}",
        *TINY,
        "temperature=1,10",
    ]
    done = started(tmp_path, *given, "seeds=0,1", "name=sweep", without=[])
    assert done.returncode == 0, done.stderr
    lines = text.table([tmp_path / "multirun/sweep"])
    rows = [line.split(" | ") for line in lines if line.startswith("| IQL")]
    assert lines[2] == "| algorithm | score | seeds | temperature | run |"
    assert sorted(row[3] for row in rows) == ["1", "10"]
    assert {row[2] for row in rows} == {"2"}  # seeds are joined
    again = started(tmp_path, "compare", "multirun/sweep/0", "multirun/sweep/1", "multirun")
    assert (again.returncode, again.stdout.count("and 1 more")) == (0, 2), again.stderr
    # One that was interrupted goes on with the same command.
    shutil.rmtree(tmp_path / "multirun/sweep/3")
    done = started(tmp_path, *given, "seeds=0,1", "name=sweep", without=[])
    assert done.returncode == 0, done.stderr
    assert text.table([tmp_path / "multirun/sweep"]) == lines


def write_run(folder: Path, score: float | None, *given: str) -> None:
    """Leave what a finished run of these settings leaves."""
    folder.mkdir()
    values = OFFLINE.settings(list(given)).values
    OmegaConf.save(OmegaConf.create(dict(values)), folder / "config.yaml")
    title = "BC" if "algorithm=bc" in given else "IQL"
    replica = {"title": title} | ({} if score is None else {"score": score})
    (folder / "scores.json").write_text(json.dumps({"version": 2, "replicas": [replica]}))


def test_columns_are_what_tells_runs_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 3.0, "algorithm=bc")
    write_run(tmp_path / "b", 2.0, "expectile=0.7")
    assert text.table([tmp_path])[2] == "| algorithm | score | seeds | run |"
    write_run(tmp_path / "c", 1.0, "expectile=0.8", "steps=500")
    lines = text.table([tmp_path])
    assert lines[2] == "| algorithm | score | seeds | steps | expectile | run |"
    assert lines[4].startswith("| BC | 3.0 | 1 | ")
    assert lines[4].split(" | ")[4] == ""  # it has none
    assert lines[6].startswith("| IQL | 1.0 | 1 | 500 | 0.8 | ")


def test_runs_that_were_not_evaluated_are_said_to_be_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1.0, "expectile=0.7")
    write_run(tmp_path / "b", None, "expectile=0.8")
    lines = text.table([tmp_path])
    assert lines[4].startswith("| IQL | 1.0 | 1 | ")
    assert "1 learner is not finished, or not evaluated, in " in lines[-1]
    (tmp_path / "a/scores.json").write_text("{")
    with pytest.raises(gather.NoRunError, match="none of these runs is finished and evaluated"):
        text.table([tmp_path])


def test_folders_are_not_given_beside_a_plan(tmp_path: Path) -> None:
    given = ["runD", "--plan", "nothere.yaml", "--record", "x", "--jobs", "0"]
    done = started(tmp_path, "compare", *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert "runD beside --plan and --jobs and --record: give folders of runs, or" in done.stderr


# --- What is shipped ---------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere() -> None:
    from torchrl_iql import __version__

    for file in ("README.md", "CITATION.cff"):
        text = (ROOT / file).read_text()
        assert re.findall(r"^ *version(?:: | = {)([0-9.]+)", text, re.M) == [__version__], file


@pytest.mark.slow
def test_a_wheel_holds_all_that_is_in_the_rooms(tmp_path: Path) -> None:
    """Built from a copy, without a network, and outside of it everything is found."""
    copy = tmp_path / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "is absent from" not in done.stdout + done.stderr  # a folder taken for a package
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    rooms = {"torchrl_iql": "torchrl_iql", "recipes": "torchrl_iql_recipes"}
    expected = {
        name.replace(room, package, 1)
        for name in names
        for room, package in rooms.items()
        if name.startswith(f"{room}/")
    }
    assert expected - held == set()
    assert {name for name in held if ".dist-info/" not in name} == expected


def test_the_package_imports_nothing_of_the_recipes() -> None:
    for path in (ROOT / "torchrl_iql").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("torchrl_iql_recipes")], path


@pytest.mark.parametrize(
    "script", ["offline", "online", "estimate", "export", "evaluate", "compare", "report", "tasks"]
)
def test_who_reads_the_help_may_have_seen_enough(script: str) -> None:
    """As head has: here nobody reads at all."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "recipes" / f"{script}.py"), "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.stderr == "" and done.returncode == 0
