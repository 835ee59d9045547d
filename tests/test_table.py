"""The comparison of algorithms: real runs, their table, and statistics against NumPy's."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from scipy.stats import trim_mean

from test_collect import started as process_of
from test_collect import wait_for
from torchrl_iql_recipes.comparison import aggregates, ranking, sensitivity, table
from torchrl_iql_recipes.comparison.jobs import Job
from torchrl_iql_recipes.comparison.plan import Plan
from torchrl_iql_recipes.comparison.record import Known, Record, curves_of
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE

SETTINGS = ["hidden_sizes=[8,8]", "batch_size=32", "compute.execution=eager"]


def plan_of(folder: Path, dataset: str, text: str = "") -> Path:
    quick = [*SETTINGS, f"dataset={dataset}"]
    file = folder / "plan.yaml"
    file.write_text(
        text
        or f"""
algorithms: [bc, iql]
seeds: [0, 1, 2]
steps: 20
evaluations: 2
episodes: 2
beside:
  percent_bc: {{steps: 10, seeds: [0]}}
tasks:
  mini/pointmaze-medium: {{published: {{iql: 71.2}}, settings: {json.dumps(quick)}}}
"""
    )
    return file


def started(
    folder: Path, plan: Path, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(table.__file__)), "--plan", str(plan)]
    command += ["--folder", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [
        ["--jobs", "1"],
        ["--launcher", "joblib", "hydra.launcher.n_jobs=2"],
        ["--launcher", "submitit_local", "hydra.launcher.cpus_per_task=1"],
    ],
)
def test_the_table_is_that_of_the_runs(by: list[str], maze_id: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, maze_id)
    done = started(tmp_path / "runs", plan, *by)
    assert done.returncode == 0, done.stderr
    of = tmp_path / "runs/mini-pointmaze-medium"
    scores = {
        name: [
            each["score"]
            for each in json.loads((of / name / "scores.json").read_text())["replicas"]
        ]
        for name in ("bc", "iql", "percent_bc")
    }
    with (tmp_path / "runs/table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    last = {"bc": "20", "iql": "20", "percent_bc": "10"}
    assert {line["step"] for line in lines} == {"5", "10", "20"}
    read = {
        name: [float(r["score"]) for r in lines if (r["algorithm"], r["step"]) == (name, step)]
        for name, step in last.items()
    }
    assert read == scores
    told = (tmp_path / "runs/table.md").read_text()
    assert f"| {np.mean(scores['iql']):.1f} ± " in told
    assert f"{scores['percent_bc'][0]:.1f} (1)\\*" in told
    assert "*71.2*" in told
    for picture in ("curves.png", "aggregates.png"):
        assert (tmp_path / "runs" / picture).stat().st_size > 1000

    again = started(tmp_path / "runs", plan, *by)
    assert again.returncode == 0, again.stderr
    assert (of / "iql/log.txt").read_text().count("Results:") == 1  # what is finished is kept

    record = str(tmp_path / "runs/record.json")
    elsewhere = started(tmp_path / "elsewhere", plan, *by, "--record", record)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert {each.name for each in (tmp_path / "elsewhere").iterdir()} == {
        *("table.md", "table.csv", "record.json", "curves.png", "aggregates.png")
    }  # nothing was done again
    for name in ("table.md", "table.csv", "record.json"):
        its, their = ((tmp_path / of / name).read_text() for of in ("elsewhere", "runs"))
        if name == "table.md":  # its last line is the command
            assert f" --record {record} --folder {tmp_path / 'elsewhere'}`" in its
            its, their = (each.rpartition("Made by")[0] for each in (its, their))
        assert its == their


def test_what_is_not_finished_is_left_open(maze_id: str, tmp_path: Path) -> None:
    plan = Plan.load(plan_of(tmp_path, maze_id), tmp_path / "runs")
    lines = table.report(plan, tmp_path / "runs")
    assert lines[2] == "| `mini/pointmaze-medium` | 20 | - | - | - |"
    assert aggregates.of(plan) is None
    assert not (tmp_path / "runs/aggregates.png").exists()


@pytest.mark.slow
def test_online_what_is_gained_is_that_of_the_runs(maze_id: str, tmp_path: Path) -> None:
    quick = [*SETTINGS, f"dataset={maze_id}", "collector.frames_per_batch=5"]
    text = f"""
algorithms: [iql]
seeds: [0, 1]
steps: 20
env_steps: 10
evaluations: 2
episodes: 2
tasks:
  mini/pointmaze-medium: {{published: {{iql: [86.7, 96.0]}}, settings: {json.dumps(quick)}}}
"""
    plan = plan_of(tmp_path, maze_id, text)
    done = started(tmp_path / "runs", plan)
    assert done.returncode == 0, done.stderr
    of = tmp_path / "runs/mini-pointmaze-medium/iql"
    (first, second) = (
        json.loads((of / f"seed={seed}/scores.json").read_text())["replicas"][0] for seed in (0, 1)
    )
    assert (first["steps"], first["frames"]) == (30, 10)
    (cell,) = Plan.load(plan, tmp_path / "runs").cells
    assert cell.before() == [each["before"]["score"] for each in (first, second)]
    assert cell.scores() == [each["after"]["score"] for each in (first, second)]
    assert set(cell.curves()[0]) == {5, 10, 15, 20, 25, 30}
    lines = (tmp_path / "runs/table.md").read_text().splitlines()
    before, after = (np.mean(its()) for its in (cell.before, cell.scores))
    assert (
        lines[2] == f"| `mini/pointmaze-medium` | 20 + 10 online | {before:.1f} → {after:.1f} (2) |"
    )
    assert lines[3] == "| *published, other data* | | *86.7* → *96.0* |"

    # Of a record, one seed is known: the other one is done again.
    record = Record.read(tmp_path / "runs/record.json")
    first, second = record.known  # each seed is a run of its own
    assert (first.curves.keys(), second.curves.keys()) == ({0}, {1})
    Record((second,)).write(tmp_path / "one.json")
    again = started(tmp_path / "again", plan, "--record", str(tmp_path / "one.json"))
    assert again.returncode == 0, again.stderr
    folders = (tmp_path / "again/mini-pointmaze-medium/iql").iterdir()
    assert [each.name for each in folders] == ["seed=0"]
    known = Record.read(tmp_path / "again/record.json").known
    assert curves_of(known) == curves_of(record.known)


@pytest.mark.slow
@pytest.mark.parametrize("known", [[0, 2], [1]])
def test_seeds_that_a_record_lacks_are_done(known: list[int], maze_id: str, tmp_path: Path) -> None:
    text = plan_of(tmp_path, maze_id).read_text().replace("[bc, iql]", "[iql]")
    text = "\n".join(
        line for line in text.splitlines() if "bc:" not in line and "beside" not in line
    )
    plan = plan_of(tmp_path, maze_id, text)
    assert started(tmp_path / "runs", plan).returncode == 0
    record = Record.read(tmp_path / "runs/record.json")
    (its,) = record.known
    some = Known(its.settings, {seed: its.curves[seed] for seed in known})
    Record((some,)).write(tmp_path / "some.json")
    again = started(tmp_path / "again", plan, "--record", str(tmp_path / "some.json"))
    assert again.returncode == 0, again.stderr
    (folder,) = (tmp_path / "again/mini-pointmaze-medium").iterdir()
    done = json.loads((folder / "scores.json").read_text())["replicas"]
    assert [each["seed"] for each in done] == [seed for seed in (0, 1, 2) if seed not in known]
    known = Record.read(tmp_path / "again/record.json").known
    assert curves_of(known) == its.curves  # each as it would be alone


def begun(job: Job, **other: object) -> Job:
    """Leave what a run leaves when it begins, with some settings otherwise."""
    job.folder.mkdir(parents=True, exist_ok=True)
    its = {name: each for name, each in {**job.wanted.values, **other}.items() if each != "gone"}
    (job.folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(its))))
    return job


def finished(job: Job, scores: float = 3.0, steps: int = 20) -> Job:
    """Leave what a run leaves that is finished."""
    replicas = []
    for seed in {each.seed for each in begun(job).wanted.learners}:
        own = job.folder / f"seed={seed}"
        own.mkdir(exist_ok=True)
        (own / "metrics.csv").write_text(f"step,eval/score\n{steps},{scores + seed}\n")
        its = {"score": scores + seed, "normalized_score": scores + seed}
        replicas.append({"seed": seed, "interrupted": False, "steps": steps, **its})
    (job.folder / "scores.json").write_text(json.dumps({"version": 2, "replicas": replicas}))
    return job


def test_a_folder_that_something_else_has_filled_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("expectile: 0.5")
    with pytest.raises(SettingsError, match=r"no task|holds no settings|not one of"):
        Job(OFFLINE, tmp_path, ["expectile=0.9"]).finish()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_of_a_finished_run_nothing_is_done(tmp_path: Path) -> None:
    """However its settings are written."""
    finished(Job(OFFLINE, tmp_path, ["expectile=0.9", "seeds=[0,1]"]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for same in (
        ["seeds=[1,0]", "expectile=0.90"],
        ["expectile=0.9", "seeds=[0,1]", "log_interval=7"],
    ):
        Job(OFFLINE, tmp_path, same).finish()
    for other in ("expectile=0.8", "batch_size=3"):
        with pytest.raises(SettingsError, match=other.replace("=", "=.*, not ")):
            Job(OFFLINE, tmp_path, ["expectile=0.9", "seeds=[0,1]", other]).finish()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_runs_of_other_settings_are_not_taken_for_those_of_the_plan(
    maze_id: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(plan, tmp_path / "runs").cells
    (job,) = cell.runs.values()

    def load(**other: object) -> Plan:
        begun(job, **other)
        return Plan.load(plan, tmp_path / "runs")

    assert load()
    assert load(encoder="gone")  # before there was one
    assert load(log_interval=7)
    with pytest.raises(SettingsError, match=r"iql holds a run .*: batch_size=7, not 32: remove it"):
        load(batch_size=7)
    load(seeds=[2, 0, 1])


@pytest.mark.parametrize(
    ("there", "taken", "others"),
    [
        ([0], (0,), (1, 2)),
        ([0, 1], (0, 1), (2,)),
        ([0, 2, 5], (0, 2), (1,)),
        ([5, 6], (), (0, 1, 2)),
        ([2, 1, 0], (0, 1, 2), ()),
    ],
)
def test_where_a_plan_has_got_more_seeds_the_others_are_not_done_again(
    there: list[int], taken: tuple[int, ...], others: tuple[int, ...], maze_id: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(plan, tmp_path / "runs").cells
    (job,) = cell.runs.values()
    settings = [*job.settings[:-1], f"seeds={json.dumps(there)}".replace(" ", "")]
    finished(Job(job.door, job.folder, settings))
    for _ in range(2):  # the second time, that of the others has begun
        (_, cell, _) = Plan.load(plan, tmp_path / "runs").cells
        assert list(cell.runs) == [each for each in (taken, others) if each]
        for seeds, run in cell.runs.items():
            name = "iql" if seeds == taken else "-".join(["iql", *map(str, others)])
            assert run.folder.name == name
            if seeds == others:
                assert {each.seed for each in run.wanted.learners} == {*others}
                begun(run)
        assert cell.finished() == {seed: {20: 3.0 + seed} for seed in taken}
    if others:
        finished(cell.runs[others])
        (_, cell, _) = Plan.load(plan, tmp_path / "runs").cells
    assert cell.scores() == [3.0, 4.0, 5.0]


def test_a_seed_without_a_score_of_the_last_step_is_not_finished(
    maze_id: str, tmp_path: Path
) -> None:
    file = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(file, tmp_path / "runs").cells
    ((seeds, job),) = cell.runs.items()
    outcomes = []
    for seed, logged in zip(seeds, ("", "10,3.0\n", "10,3.0\n20,4.0\n"), strict=True):
        folder = job.folder / f"seed={seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,eval/score\n{logged}")
        last = {"": None, "10,3.0\n": 10}.get(logged, 20)
        outcome = {"seed": seed, "interrupted": False, "steps": 20, "evaluated_after": last}
        outcomes.append(outcome | ({"score": 4.0 if last == 20 else 3.0} if last else {}))
    begun(job)
    (job.folder / "scores.json").write_text(json.dumps({"version": 2, "replicas": outcomes}))
    plan = Plan.load(file, tmp_path / "runs")
    (_, cell, _) = plan.cells
    assert (cell.finished(), cell.scores(), cell.kept()) == ({2: {10: 3.0, 20: 4.0}}, None, [])
    assert "| 20 | - | - | - |" in table.report(plan, tmp_path)[2]


def test_the_last_score_is_that_of_the_last_step(maze_id: str, tmp_path: Path) -> None:
    """Also where a metric's last line is lost; and a record that lacks it is not believed."""
    file = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(file, tmp_path / "runs").cells
    (job,) = cell.runs.values()
    metrics = finished(job).folder / "seed=1/metrics.csv"
    metrics.write_text("step,eval/score\n10,77.0\n")
    (_, cell, _) = Plan.load(file, tmp_path / "runs").cells
    assert cell.scores() == [3.0, 4.0, 5.0]
    assert cell.curves()[1] == {10: 77.0} and cell.finished()[1] == {10: 77.0, 20: 4.0}
    cut = Known(job.wanted.values, {0: {10: 1.0, 20: 2.0}, 1: {10: 1.0}})
    (_, cell, _) = Plan.load(file, tmp_path / "other", Record((cut,))).cells
    assert (set(cell.known), list(cell.runs)) == ({0}, [(1, 2)])


RUN = """
import signal, sys, time
from pathlib import Path
def end(number, frame):
    Path("ended").write_text(signal.Signals(number).name)
    sys.exit(1)
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), end)
Path("begun").touch()
time.sleep(60)
"""
PLAN = """
import sys
from pathlib import Path
from torchrl_iql_recipes.comparison import jobs
from torchrl_iql_recipes.experiment.training import OFFLINE
jobs.RECIPES = Path()
with jobs.told_if_stopped():
    jobs.finish([jobs.Job(OFFLINE, Path(name), []) for name in "abc"], 1)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 75)])
def test_a_signal_is_passed_on_to_the_runs(name: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "offline.py").write_text(RUN)
    command = [sys.executable, "-c", PLAN]
    with process_of(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "begun").exists, process)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert (tmp_path / "ended").read_text() == name
    assert "Interrupted; the same command goes on." in errors
    assert not (tmp_path / "b").exists()  # no other has begun


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, maze_id: str) -> None:
    data = {"mini/hopper-medium": "no/such-v0", "mini/pointmaze-medium": maze_id}
    tasks = {task: {"settings": [*SETTINGS, f"dataset={its}"]} for task, its in data.items()}
    plan = {"algorithms": ["iql"], "seeds": [0], "steps": 20, "evaluations": 1, "episodes": 1}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({**plan, "tasks": tasks}, sort_keys=False))
    done = started(tmp_path / "runs", file, "--jobs", "1")
    assert done.returncode == 1
    log = tmp_path / "runs/mini-hopper-medium/iql/log.txt"
    why = log.read_text().splitlines()[-1].strip()
    assert "no Minari data set 'no/such-v0'" in why
    assert f"offline.py failed, see {log}: {why[:300]}; the others go on" in done.stderr
    last = f"1 of 2 runs: offline.py failed, see {log}: {why[:300]}"
    assert done.stderr.splitlines()[-1].endswith(last)
    assert (tmp_path / "runs/mini-pointmaze-medium/iql/scores.json").exists()
    assert "| `mini/pointmaze-medium` | 20 |" in (tmp_path / "runs/table.md").read_text()


@pytest.mark.parametrize(
    "name", [pytest.param("table", marks=pytest.mark.slow), "suite", "finetuning", "adroit"]
)
def test_our_plans_can_be_run(name: str, tmp_path: Path) -> None:
    plan = Plan.load(Path(table.__file__).with_name(f"{name}.yaml"), tmp_path)
    assert all(cell.settings.training.steps == cell.steps for cell in plan.cells)


def test_of_a_record_counts_what_had_the_same_settings(maze_id: str, tmp_path: Path) -> None:
    file = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(file, tmp_path).cells
    assert cell.algorithm == "iql"
    settings = dict(cell.settings.values)
    curves = {seed: {10: 1.5, 20: 2.0 + seed} for seed in cell.seeds}
    Record((Known(settings, curves),)).write(tmp_path / "record.json")
    record = Record.read(tmp_path / "record.json")

    def scores(text: str, record: Record) -> list[float] | None:
        (of, *_) = Plan.load(plan_of(tmp_path, "", text), tmp_path, record).cells[1:]
        assert (of.scores() is None) == bool(of.runs)
        return of.scores()

    text = file.read_text()
    assert scores(text, record) == [2.0, 3.0, 4.0]
    assert scores(text.replace("[0, 1, 2]", "[0, 1]"), record) == [2.0, 3.0]
    assert scores(text.replace("[0, 1, 2]", "[0, 3]"), record) is None
    for old, new in (("batch_size=32", "batch_size=64"), ("steps: 20", "steps: 40")):
        assert scores(text.replace(old, new), record) is None
    assert scores(text.replace("=eager", "=auto"), record) == [2.0, 3.0, 4.0]
    assert scores(text, Record((Known(settings, {0: curves[0], 1: curves[1]}),))) is None
    # A setting that came later is, in what was recorded before, as its default now.
    for later in ("encoder", "validation", "action_bounds", "loss", "best_by"):
        before = {name: value for name, value in settings.items() if name != later}
        assert scores(text, Record((Known(before, curves),))) == [2.0, 3.0, 4.0], later
        other = before | {later: "another"}
        found = scores(text, Record((Known(other, curves),)))
        assert found == ([2.0, 3.0, 4.0] if later == "best_by" else None), later
    # A setting that is no more is unknown.
    gone = settings | {"target_noise": 0.1}
    assert scores(text, Record((Known(gone, curves),))) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,step\na,b\n", "expected the record.json of a comparison"),
        ('[{"settings": {"task": "a"}, "scores": {}}]', "algorithm"),
        ('[{"settings": {}}]', "scores"),
        ("[3]", "expected the record.json"),
        ('[{"settings": {"task": "a", "algorithm": "iql"}, "scores": {"0": 3}}]', "expected"),
    ],
)
def test_another_file_is_no_record(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(SettingsError, match=message):
        Record.read(tmp_path / "record.json")


def test_a_record_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.json: No such file"):
        Record.read(tmp_path / "none.json")


TASK = "tasks: {mini/hopper-medium: {algorithms: [bc]"
ONE = f"{TASK}, seeds: [0], steps: 5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {mini/nowhere: {}}", "there is no task mini/nowhere"),
        (
            "tasks: {mini/hopper-medium: {}}\nalgorithms: [sac]",
            "there is no algorithm sac, expected",
        ),
        (
            "tasks: {mini/hopper-medium: {}}\nalgorithms: [bc]",
            "mini/hopper-medium has no seeds and no",
        ),
        (
            "tasks: {mini/hopper-medium: {step: 3}}",
            r"mini/hopper-medium has \['step'\], expected some",
        ),
        ("algorithm: [bc]", r"the plan has \['algorithm'\], expected some of"),
        ("tasks: {", "while parsing a flow node"),
        ("tasks: {}", "there is nothing to compare"),
        ("- 1", r"the plan has \[1\]"),
        ("tasks: [mini/hopper-medium]", r"tasks=\[mini/hopper-medium\]: expected names"),
        (f"{TASK}, steps: 5, seeds: 0}}}}", "hopper-medium: seeds=0: expected .*, each an integer"),
        (f"{TASK}, steps: 5, seeds: []}}}}", r"hopper-medium: seeds=\[\]: expected at least one"),
        (f"{TASK}, steps: 5, seeds: [0, 0]}}}}", r"seeds=\[0,0\]: expected different ones"),
        (f"{TASK}, steps: 5, seeds: [-1]}}}}", r"seeds=\[-1\]: expected .* at least 0"),
        (f"{TASK}, steps: 5, seeds: [true, 0]}}}}", r"seeds=\[true,0\]: expected"),
        *(
            (
                f"{TASK}, seeds: [0], steps: {steps}}}}}",
                rf"steps={said}: expected an integer of at least 1",
            )
            for steps, said in {
                "many": "many",
                ".inf": "inf",
                ".nan": "nan",
                "true": "true",
                0: 0,
            }.items()
        ),
        (f"{ONE}, steps: 6}}}}", "found duplicate key steps"),
        (f"{ONE}, evaluations: 0}}}}", "evaluations=0: expected an integer of at least 1"),
        (f"{ONE}, episodes: 0}}}}", "episodes=0: expected an integer of at least 1"),
        (f"{ONE}, settings: batch_size=3}}}}", "settings=batch_size=3: expected .*, each text"),
        *(
            (
                f"{ONE}, settings: [{given}]}}}}",
                f"settings has {given}: leave it out, .* said by {by}",
            )
            for given, by in {
                "steps=3": "steps",
                "task=own": "task",
                "seeds=3": "seeds",
                "eval_episodes=3": "episodes",
                "hydra.run.dir=a": "--folder",
                "compute.threads=2": "one thread",
            }.items()
        ),
        ("algorithms: 5\ntasks: {}", "algorithms=5: expected .*, each text"),
        ("algorithms: bc\ntasks: {}", "algorithms=bc: expected .*, each text"),
        ("algorithms: [[bc], iql]\ntasks: {}", r"algorithms=\[\[bc\],iql\]: expected"),
        ("algorithms: [bc, bc]\ntasks: {}", r"algorithms=\[bc,bc\]: expected different"),
        ("algorithms: [bc]\nbeside: {bc: {}}\ntasks: {}", "bc is in algorithms and beside"),
        (f"{ONE}}}}}\nbeside: {{sac: {{}}}}", "beside: there is no algorithm sac"),
        (
            f"{ONE}}}}}\nbeside: {{cql: {{stepz: 3}}}}",
            r"cql beside has \['stepz'\], expected some of",
        ),
        (f"{ONE}, published: 3}}}}", "published of mini/hopper-medium has 3, expected some of"),
        *(
            (f"{ONE}, published: {{bc: {its}}}}}}}", rf"published\.bc={said}: expected a number$")
            for its, said in {
                "": "null",
                "high": "high",
                "'94.7'": "'94.7'",
                "{a: 1}": "{a:1}",
                ".nan": "nan",
                "[1.0, 2.0]": r"\[1,2\]",
            }.items()
        ),
        (
            f"{ONE}, env_steps: 5, published: {{bc: [1, 2, 3]}}}}}}",
            r"expected a number, or \[before",
        ),
    ],
)
def test_a_plan_that_can_not_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        Plan.load(plan_of(tmp_path, "", text), tmp_path)


def test_settings_that_a_run_can_not_have_are_refused_before_any_begins(tmp_path: Path) -> None:
    text = "tasks: {mini/hopper-medium: {seeds: [0], steps: 5, algorithms: [bc], settings: [expectil=1]}}"
    with pytest.raises(SettingsError, match="there is no setting expectil"):
        table.prepare(Plan.load(plan_of(tmp_path, "", text), tmp_path))


def test_one_seed_is_one_learner(maze_id: str, tmp_path: Path) -> None:
    text = (
        plan_of(tmp_path, maze_id)
        .read_text()
        .replace('"batch_size=32"', '"dropout=0.1", "expectile=[0.7,0.9]"')
    )
    text = text.replace("[bc, iql]", "[iql]").replace("percent_bc: {steps: 10, seeds: [0]}", "")
    with pytest.raises(
        SettingsError, match=r"iql: expected one learner for each seed, .*expectile=0\.7"
    ):
        table.prepare(Plan.load(plan_of(tmp_path, "", text), tmp_path))


def test_what_a_task_says_stays_where_an_algorithm_says_more(tmp_path: Path) -> None:
    text = """
algorithms: [bc, iql]
seeds: [0]
steps: 50
settings: [log_interval=7]
beside: {td3bc: {settings: [batch_size=64], steps: 5}}
tasks: {mini/hopper-medium: {settings: [reward=none], steps: 300}}
"""
    bc, _, td3bc = Plan.load(plan_of(tmp_path, "", text), tmp_path).cells
    assert bc.asked[-2:] == ("log_interval=7", "reward=none") and bc.steps == 300
    assert td3bc.asked[-3:] == ("log_interval=7", "reward=none", "batch_size=64")
    assert td3bc.steps == 5


def test_the_last_algorithm_of_the_plan_is_compared_whatever_tasks_have(tmp_path: Path) -> None:
    text = """
algorithms: [bc, awac, iql]
seeds: [0]
steps: 50
tasks:
  mini/hopper-medium: {algorithms: [bc, iql, td3bc]}
  mini/pointmaze-medium: {}
"""
    plan = Plan.load(plan_of(tmp_path, "", text), tmp_path / "runs")
    for cell in plan.cells:
        for job in cell.runs.values():
            finished(job, len(cell.algorithm), steps=50)
    plan = Plan.load(plan.file, tmp_path / "runs")
    assert plan.compared == ("bc", "awac", "iql")
    assert plan.algorithms == ["bc", "awac", "iql", "td3bc"]
    its = aggregates.of(plan)
    assert its is not None and its.tasks == ["mini/pointmaze-medium"]
    assert list(its.means) == ["bc", "awac", "iql"]
    lines = table.report(plan, tmp_path)
    assert "| probability that IQL is better | | " in "\n".join(lines)
    assert "TD3+BC: of some tasks only, outside of the aggregates." in lines


def test_all_algorithms_have_a_colour_and_the_same_in_both_pictures() -> None:
    names = ["bc", "percent_bc", "onestep", "awac", "td3bc", "cql", "dt", "iql"]
    colours = aggregates._colours(names)
    assert len({*colours.values()}) == len(names)
    assert colours["iql"] == aggregates._colours(["bc", "iql"])["iql"]
    assert len(aggregates._colours([*names, *map(str, range(20))])) == 28


def test_a_record_keeps_what_is_of_other_plans(maze_id: str, tmp_path: Path) -> None:
    file, folder = plan_of(tmp_path, maze_id), tmp_path / "runs"
    for cell in Plan.load(file, folder).cells:
        for job in cell.runs.values():
            finished(job, steps=cell.steps)
    table.report(Plan.load(file, folder), folder)
    before = Record.read(folder / "record.json")
    assert len(before.known) == 3
    shutil.rmtree(folder / "mini-pointmaze-medium")
    more = {"steps: 20": "steps: 40", "episodes: 2": "episodes: 3", "[bc, iql]": "[iql]"}
    for old, new in more.items():
        plan = Plan.load(plan_of(tmp_path, "", file.read_text().replace(old, new)), folder)
        assert all(cell.scores() is None for cell in plan.cells)
        table.report(plan, folder)
        assert Record.read(folder / "record.json") == before
        assert (folder / "table.csv").read_text().count("\n") == 1  # of this plan nothing
    other = before.known[0].settings | {"batch_size": 7}
    more_of_one = Known(other, {0: {20: 1.0}})
    joined = Record((more_of_one,)).beside(before)
    assert joined.known == (more_of_one, *before.known)
    assert before.beside(joined) == Record((*before.known, more_of_one))


def test_of_two_scores_of_one_run_none_is_taken(maze_id: str, tmp_path: Path) -> None:
    file = plan_of(tmp_path, maze_id)
    (_, cell, _) = Plan.load(file, tmp_path).cells
    one, same = (Known(cell.settings.values, {0: {20: 1.0}, 1: {20: 2.0}}) for _ in range(2))
    (_, twice, _) = Plan.load(file, tmp_path, Record((one, same))).cells
    assert twice.known == one.curves and len(twice.kept()) == 1
    other = Known(cell.settings.values, {1: {20: 3.0}})
    with pytest.raises(SettingsError, match="two runs of mini/pointmaze-medium, iql, seed 1, with"):
        Plan.load(file, tmp_path, Record((one, other)))


@pytest.mark.parametrize("script", [table, sensitivity, ranking])
def test_a_folder_that_can_not_be_made_is_one_line(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [
        sys.executable,
        str(script.__file__),
        "--folder",
        str(tmp_path / "file"),
        "--jobs",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    name = Path(str(script.__file__)).name
    assert done.stderr == f"{name}: --folder {tmp_path / 'file'}: File exists\n"


def test_returns_and_normalized_scores_are_not_taken_together(tmp_path: Path) -> None:
    file = plan_of(
        tmp_path,
        "",
        """
algorithms: [bc, iql]
seeds: [0, 1, 2]
steps: 20
evaluations: 1
tasks:
  mini/hopper-medium: {}
  mini/antmaze-umaze: {seeds: [0]}
  own: {settings: [dataset=me/logs-v0, env=Pendulum-v1]}
""",
    )
    score = {"mini/hopper-medium": 30.0, "mini/antmaze-umaze": 90.0, "own": -1200.0}
    for cell in Plan.load(file, tmp_path / "runs").cells:
        ((seeds, job),) = cell.runs.items()
        outcomes = []
        for seed in seeds:
            folder = job.folder / f"seed={seed}" if len(seeds) > 1 else job.folder
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text(f"step,eval/score\n20,{score[cell.task]}\n")
            kind = "return" if cell.task == "own" else "normalized_score"
            its = {"score": score[cell.task], kind: score[cell.task]}
            outcomes.append({"seed": seed, "interrupted": False, **its})
        values = dict(cell.door.settings(job.settings).values)
        (job.folder / "config.yaml").write_text(yaml.safe_dump(values))
        (job.folder / "scores.json").write_text(json.dumps({"version": 2, "replicas": outcomes}))
    plan = Plan.load(file, tmp_path / "runs")
    its = aggregates.of(plan)
    assert its is not None
    assert (its.tasks, its.seeds) == (["mini/hopper-medium", "mini/antmaze-umaze"], 1)
    assert its.means["iql"][0] == 60  # the mean of both
    lines = table.report(plan, tmp_path)
    assert "| interquartile mean of 2 tasks, 1 seed of each | |" in "\n".join(lines)
    assert "`own`: returns, not normalized, outside of the aggregates." in lines
    # A record knows it, too.
    again = Plan.load(file, tmp_path / "elsewhere", Record.read(tmp_path / "record.json"))
    assert table.report(again, tmp_path / "elsewhere") == lines


def test_statistics_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "SAMPLES", 200)
    rng = np.random.default_rng(0)
    scores = {
        "bc": rng.normal(40, 10, (4, 3)),
        "awac": rng.normal(50, 10, (4, 3)),
        "iql": rng.normal(60, 10, (4, 3)),
    }
    its = aggregates.Aggregates(["a", "b", "c"], scores)
    for name, values in scores.items():
        mean, low, high = its.means[name]
        assert mean == pytest.approx(trim_mean(values, 0.25, axis=None))
        assert low < mean < high
        share = (values.ravel()[:, None] >= its.thresholds).mean(0)
        np.testing.assert_allclose(its.profiles[name][0], share, atol=0.1)
    for name in ("bc", "awac"):
        ours, theirs = scores["iql"], scores[name]
        above = [(ours[:, None, k] > theirs[None, :, k]).mean() for k in range(3)]
        assert its.improvement[name][0] == pytest.approx(np.mean(above))
    few = aggregates.Aggregates(["a"], {name: values[:2, :1] for name, values in scores.items()})
    assert np.isnan(few.means["iql"][1:]).all()  # no interval of two seeds


@pytest.mark.parametrize("script", [sensitivity, ranking])
def test_nothing_is_made_of_runs_that_had_other_settings(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--tasks", "mini/hopper-medium", "--folder", str(tmp_path), "--seeds", "0", "1"]
    given += ["--expectiles", "0.5", "0.9", "--steps", "20", "--jobs", "0"]

    def made(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *given, *more])
        script.main()

    jobs: list[Job] = []
    monkeypatch.setattr(script, "Job", lambda *its: jobs.append(Job(*its)) or jobs[-1])
    with pytest.raises(SystemExit):
        made()
    finished(next(job for job in jobs if "algorithm=iql" in job.settings))
    for other, differs in {
        ("--steps", "30"): "steps=20, not 30",
        ("--episodes", "7"): "eval_episodes=.*, not 7",
        ("--expectiles", "0.5"): r"expectile=\[0.5,0.9\], not ",
        ("--", "batch_size=7"): "batch_size=256, not 7",
    }.items():
        with pytest.raises(SystemExit, match=rf"holds a run with other settings .*{differs}"):
            made(*other)
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "record.json").exists()
