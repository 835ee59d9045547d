"""The page of runs: what it says is what the runs have recorded, whatever they have recorded."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from omegaconf import OmegaConf
from scipy import stats

from runs import TINY, of_maze
from torchrl_iql import load_dataset
from torchrl_iql_recipes import report
from torchrl_iql_recipes.deployment import estimating
from torchrl_iql_recipes.deployment.settings import Estimation
from torchrl_iql_recipes.experiment import learned_from, offline, online
from torchrl_iql_recipes.experiment.choices import CONFIG
from torchrl_iql_recipes.experiment.lock import held
from torchrl_iql_recipes.experiment.settings import Compute, Settings, flat
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE
from torchrl_iql_recipes.reporting import commands, compare, figures, gather, page, pictures, text

VOID = {"meta", "img", "br", "hr", "input", "link"}
RECIPES = CONFIG.parent


class Page(HTMLParser):
    """A page as a browser reads it: its tags, which have to close, its text, and its tables."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> dict[str, list[str]]:
        """Return the rows of all tables whose first heading is this, by their first cell."""
        its = [table for table in self.tables if table[0][0] == first]
        return {row[0]: row[1:] for table in its for row in table[1:]}


def settings(maze_id: str, *overrides: str) -> Settings:
    return OFFLINE.settings([*TINY, *of_maze([f"dataset={maze_id}", *overrides])])


@pytest.fixture(scope="module")
def made(maze_id: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of real runs: two algorithms of three seeds, one without an environment, one online."""
    folder = tmp_path_factory.mktemp("runs")
    more = ("seeds=[0,1,2]", "validation=0.1")
    offline.run(settings(maze_id, *more, "temperature=3"), folder / "iql")
    offline.run(settings(maze_id, *more, "algorithm=bc"), folder / "bc")
    alone = ("temperature=[1,3]", "eval_episodes=0", "validation=0.1", "seeds=7")
    offline.run(settings(maze_id, *alone), folder / "no env")
    its = [*TINY, "temperature=3", "env_steps=20", "eval_interval=10", f"dataset={maze_id}"]
    online.run(ONLINE.settings(of_maze(its)), folder / "online")
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """Return a copy, to be changed."""
    return shutil.copytree(
        made, tmp_path / "runs", ignore=shutil.ignore_patterns("*.torchrl", "*.ckpt")
    )


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no room for figures, which take longest."""
    monkeypatch.setattr(page, "OF_TEXT", 0.0)


def shown(*paths: Path, **more: Any) -> Page:
    out = paths[0].parent / "page.html"
    report.write(paths, out, **more)
    return Page(out.read_text(encoding="utf-8"))


def change(folder: Path, make: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Change what scores.json says of each learner."""
    file = folder / "scores.json"
    scores = json.loads(file.read_text())
    scores["replicas"] = [{**each, **make(i, each)} for i, each in enumerate(scores["replicas"])]
    file.write_text(json.dumps(scores))


def score(folder: Path, *values: float) -> None:
    change(folder, lambda i, _: {"score": values[i]})


# --- The page --------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_else(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report.write([made], out) is False
    html = out.read_text(encoding="utf-8")
    its = Page(html)
    assert len(html.encode()) < 5_000_000
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in its.tags}
    named = [
        value or "" for _, each in its.tags for key, value in each.items() if key in ("src", "href")
    ]
    named += [
        value or "" for _, each in its.tags for key, value in each.items() if key == "xlink:href"
    ]
    assert {each.partition(":")[0] if each[0] != "#" else "#" for each in named} == {"#", "data"}
    assert not re.findall(r"url\((?!#)|@import|https?://", html)
    ids = [each["id"] for _, each in its.tags if "id" in each]
    assert len(ids) == len(set(ids))
    assert {each[1:] for each in named if each[0] == "#"} <= set(ids)
    assert not [
        each for tag, each in its.tags if tag == "meta" and each.get("http-equiv") == "refresh"
    ]
    for part in (
        "Scores",
        "Settings",
        "What was it learned from?",
        "What is held out",
        "Speed",
        "Do it again",
    ):
        assert part in its.text
    for name in ("iql", "bc", "no env", "online"):
        assert name in its.text
    assert any(each.get("alt") == "value map of iql, seed=0" for _, each in its.tags)


def test_figures_are_text_in_the_colours_of_the_page(made: Path) -> None:
    html = page.page([gather.run(made / "iql"), gather.run(made / "bc")], made_by="")
    figures = re.findall(r"<svg (?!class).*?</svg>", html, flags=re.DOTALL)
    assert len(figures) > 20
    for each in figures:
        tree = ElementTree.fromstring(each.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        words = [text for node in tree.iter("text") for text in node.itertext()]
        assert any(re.search(r"\d", word) for word in words)
        assert not re.search(r"#0000[0f]\d|mathdefault", each)
    assert "var(--series-2)" in html and "var(--ink)" in html
    assert {"--series-2:", "prefers-color-scheme: dark", "@media print"} <= set(
        re.findall(r"--series-2:|prefers-color-scheme: dark|@media print", html)
    )


@pytest.mark.usefixtures("words")
def test_scores_and_differences_are_numpys(runs: Path) -> None:
    iql, bc = [61.5, 70.25, 66.0], [40.0, 58.5, 49.25]
    score(runs / "iql", *iql)
    score(runs / "bc", *bc)
    its = shown(runs / "bc", runs / "iql")
    rows = its.table("settings")
    assert list(rows) == ["IQL", "BC"]  # the best first
    for name, values in (("IQL", iql), ("BC", bc)):
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert rows[name] == [
            "3",
            f"{np.mean(values):.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{np.std(values, ddof=1):.1f}",
            ", ".join(f"{each:.1f}" for each in values),
        ]
    ((name, row),) = its.table("difference").items()
    low, high = stats.ttest_ind(iql, bc, equal_var=False).confidence_interval()
    assert name == "IQL \N{MINUS SIGN} BC"
    assert row[:3] == [f"{np.mean(iql) - np.mean(bc):.1f}", f"{low:.1f} to {high:.1f}", "3, 3"]
    assert row[3] == ("yes" if low > 0 else "not told apart")


def test_welchs_interval_is_scipys() -> None:
    draw = np.random.default_rng(0)
    for sizes in ((3, 3), (3, 10), (20, 4)):
        a, b = (draw.normal(i, 1 + 3 * i, size).tolist() for i, size in enumerate(sizes))
        theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        assert compare.welch(a, b) == pytest.approx(tuple(theirs))
    assert compare.welch([1.0, 1.0], [2.0, 2.0]) is None


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("iql", "bc", "told"),
    [
        ([80, 82, 81], [40, 42, 41], "IQL is better than BC by 40.0 (95% interval"),
        (
            [80, 10, 50],
            [40, 45, 41],
            "IQL can not be told apart from BC: the difference is 4.7 (95%",
        ),
        ([50, 50, 50], [40, 40, 40], "there is no spread, and no interval"),
    ],
)
def test_the_first_lines_say_what_is_better(
    runs: Path, iql: list[float], bc: list[float], told: str
) -> None:
    score(runs / "iql", *iql)
    score(runs / "bc", *bc)
    its = shown(runs / "iql", runs / "bc")
    assert told in its.text
    assert its.text.index(told) < its.text.index("Scores")
    assert "fewer than three seeds" not in its.text


@pytest.mark.usefixtures("words")
def test_of_few_seeds_nothing_is_claimed(runs: Path) -> None:
    change(runs / "online", lambda i, _: {"score": 90.0})
    score(runs / "bc", 10, 20, 30)
    its = shown(runs / "bc", runs / "online")
    assert "is better" not in its.text
    assert "Of fewer than three seeds there is no interval" in its.text
    assert its.table("difference")["IQL \N{MINUS SIGN} BC"][1:] == [
        "\N{EN DASH}",
        "1, 3",
        "too few seeds",
    ]


@pytest.mark.usefixtures("words")
def test_a_best_checkpoint_is_never_the_score(runs: Path) -> None:
    change(runs / "iql", lambda i, _: {"score": 10.0 + i, "best": {"score": 99.0, "step": 3}})
    its = shown(runs / "iql")
    assert its.table("settings")["IQL"][1] == "11.0"
    assert "99.0" not in its.text


@pytest.mark.usefixtures("words")
def test_tasks_are_taken_together_by_their_interquartile_mean(runs: Path) -> None:
    scores = {"iql": ([60, 70, 66], [10, 90, 80]), "bc": ([40, 58, 49], [11, 12, 13])}
    for name, (here, there) in scores.items():
        score(runs / name, *here)
        other = shutil.copytree(runs / name, runs / f"{name} there")
        cfg = OmegaConf.load(other / "config.yaml")
        cfg.task = "pointmaze/umaze"
        OmegaConf.save(cfg, other / "config.yaml")
        score(other, *there)
    its = shown(*(runs / name for name in ("iql", "bc", "iql there", "bc there")))
    (table,) = (each for each in its.tables if each[0][1] == "interquartile mean")
    rows = {row[0]: row[1:] for row in table[1:]}
    for name, title in (("iql", "IQL"), ("bc", "BC")):
        middle = stats.trim_mean(np.ravel(scores[name]), 0.25)
        assert rows[title][0].startswith(f"{middle:.1f} (")
    wins = [
        np.mean([[a > b for b in bc] for a in iql])
        for iql, bc in zip(*scores.values(), strict=True)
    ]
    assert rows["BC"][1].startswith(f"{np.mean(wins):.2f} (")


# --- Who is compared with whom ---------------------------------------------------------------------------


@pytest.mark.usefixtures("words")
def test_seeds_of_several_runs_are_one_group(runs: Path) -> None:
    score(runs / "bc", 1, 2, 3)
    shutil.copytree(runs / "bc", runs / "more")
    change(runs / "more", lambda i, its: {"seed": its["seed"] + 3, "score": its["score"] + 3})
    config = OmegaConf.load(runs / "more/config.yaml")
    OmegaConf.save(
        {**config, "eval_interval": 17}, runs / "more/config.yaml"
    )  # the last step is the last
    its = shown(runs / "bc", runs / "more", runs / "bc")
    assert its.table("settings")["BC"][:2] == ["6", "3.5"]


def test_names_that_are_cut_stay_apart() -> None:
    assert figures.short(["IQL", "IQL, expectile=0.7, temperature=3"]) == [
        "IQL",
        "IQL, expectile=0.7, t…",
    ]
    alike = [f"IQL, batch_size=256, expectile=0.{digit}" for digit in "67"]
    assert figures.short(alike) == ["IQL, batch…pectile=0.6", "IQL, batch…pectile=0.7"]
    hopeless = [f"IQL, learning_rate=0.000{digit}, temperature=3.0" for digit in "67"]
    assert figures.short(hopeless) == hopeless


@pytest.mark.usefixtures("words")
def test_a_seed_counts_once(runs: Path) -> None:
    score(runs / "bc", 1, 2, 3)
    shutil.copytree(runs / "bc", runs / "again")
    its = shown(runs / "bc", runs / "again")
    assert its.table("settings")["BC"][:2] == ["3", "2.0"]
    assert (
        "seed 0, 1, 2 of BC was trained more than once, and counts once, not in again" in its.text
    )
    assert "scores differ" not in its.text
    score(runs / "again", 1, 9, 3)
    lines = text.table([runs / "bc", runs / "again"])
    assert lines[4].startswith("| BC | 2.0 ± 2.5 | 3 |")
    (told,) = (line for line in lines if line.startswith("Left out"))
    assert told.endswith("counts once, not in again; their scores differ: of seed 1 2, 9.")


@pytest.mark.usefixtures("words")
def test_runs_that_are_not_finished_are_not_compared(runs: Path) -> None:
    change(runs / "iql", lambda i, _: {"interrupted": True, "score": 99.0})
    (runs / "bc" / "scores.json").unlink()
    for folder in (runs / "iql", runs / "bc"):
        its = shown(folder)
        assert f"{folder.name} is interrupted" in its.text
        assert "No run is finished" in its.text
        assert "Go on with it" in its.text and f"resume={folder}" in its.text
    assert gather.run(runs / "bc").learners[2].seed == 2


def test_the_page_that_a_run_ends_with_is_of_a_finished_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process is at work in the folder, still."""
    for name in ("bc", "online"):
        scores = json.loads((runs / name / "scores.json").read_text())
        with held(runs / name):
            report.conclude("That is all.", scores, runs / name)
        told = capsys.readouterr().out
        assert told.startswith("That is all.\nPage: ")
        text = Page((runs / name / "report.html").read_text(encoding="utf-8")).text
        assert "is running" not in text and "No run is finished" not in text


def extend(run: Path) -> None:
    """Ask for more steps than are done."""
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.steps = 12
    OmegaConf.save(cfg, run / "config.yaml")


def test_a_run_that_was_extended_is_not_finished(runs: Path) -> None:
    extend(runs / "bc")
    assert gather.run(runs / "bc").state == "interrupted"
    with held(runs / "bc"):
        assert gather.run(runs / "bc").state == "running"


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("what", ["steps", "transitions"])
def test_other_settings_and_other_data_are_other_groups(runs: Path, what: str) -> None:
    other = shutil.copytree(runs / "bc", runs / "other")
    score(runs / "bc", 1, 2, 3)
    if what == "steps":
        cfg = OmegaConf.load(other / "config.yaml")
        cfg.steps = 5
        OmegaConf.save(cfg, other / "config.yaml")
    else:
        scores = json.loads((other / "scores.json").read_text())
        scores["data"]["transitions"] = 1234
        (other / "scores.json").write_text(json.dumps(scores))
    rows = shown(runs / "bc", other).table("settings")
    assert set(rows) >= {"BC, steps=5" if what == "steps" else "BC, 1,234 transitions"}
    assert len(rows) == 2


@pytest.mark.usefixtures("words")
def test_a_setting_that_changes_no_score_makes_no_group(runs: Path) -> None:
    other = shutil.copytree(runs / "bc", runs / "other")
    cfg = OmegaConf.load(other / "config.yaml")
    cfg.compute.threads, cfg.log_interval = 2, 6
    OmegaConf.save(cfg, other / "config.yaml")
    change(other, lambda i, its: {"seed": its["seed"] + 3})
    its = shown(runs / "bc", other)
    assert its.table("settings")["BC"][0] == "6"
    assert its.table("setting")["log_interval"] == ["3", "6"]


@pytest.mark.usefixtures("words")
def test_learners_of_a_run_are_told_apart_by_what_differs(runs: Path) -> None:
    its = shown(runs / "no env")
    assert set(its.table("settings")) == {"IQL, temperature=1", "IQL, temperature=3"}
    assert "No policy was evaluated" in its.text


# --- What is missing, or is somebody else's ----------------------------------------------------------------


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.yaml", "a: [", "config.yaml can not be read"),
        ("config.yaml", "- 1", "config.yaml holds no settings by name"),
        ("scores.json", "{", "scores.json can not be read"),
        ("scores.json", '{"version": 99}', "scores.json has version 99, this reads up to 2"),
        ("scores.json", '{"replicas": [{"score": "high"}]}', "something else than expected"),
        ("times.json", "{}", "no times.json that can be read"),
        ("times.json", None, "no times.json that can be read"),
        ("data.json", "[", "data.json can not be read"),
        ("data.json", '{"transitions": 3}', "No histograms"),
        ("data.json", None, "No histograms"),
        ("seed=0/metrics.csv", None, "Scores"),
        ("seed=0/metrics.csv", "step,loss\x00\n1,", "Scores"),
        ("seed=0/value_map.png", "no picture", "value_map.png can not be read"),
    ],
)
def test_what_is_missing_or_damaged_is_said(
    runs: Path, name: str, content: str | None, told: str
) -> None:
    file = runs / "iql" / name
    file.unlink() if content is None else file.write_text(content)
    assert told in shown(runs / "iql", runs / "bc").text


def test_what_a_file_says_is_text(runs: Path) -> None:
    evil = '<script>alert("1")</script> & $x_1$ </svg>'
    folder = (runs / "bc").rename(runs / "<b>& $5$ 'of' \"mine\"")
    change(folder, lambda i, _: {"title": evil, "diagnosis": {"rewards": evil}})
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.dataset, cfg.task = evil, None
    OmegaConf.save(cfg, folder / "config.yaml")
    its = shown(folder)
    assert "script" not in {tag for tag, _ in its.tags}
    assert its.text.count(evil) >= 3
    assert folder.name in its.text


def test_words_of_a_file_stay_words_in_commands(runs: Path) -> None:
    mine = 'my data/it\'s "v0" \\ = $HOME `id` {a: b}, [1] ${oc.env:HOME}'
    values = flat(OmegaConf.to_container(OmegaConf.load(runs / "bc" / "config.yaml")))  # pyright: ignore
    its = commands.command("offline", {**values, "dataset": mine, "task": "own"})
    assert not its.is_checked  # nothing is looked up to check it
    given = shlex.split(its.text)[2:]
    assert OFFLINE.settings(given).values["dataset"] == mine


def test_only_pictures_below_a_learner_are_read(runs: Path, tmp_path: Path) -> None:
    change(runs / "bc", lambda i, its: {"name": "../iql/seed=0" if i == 0 else its["name"]})
    assert [each.name for each in gather.run(runs / "bc").learners] == ["seed=1", "seed=2"]


def test_a_smaller_picture_keeps_what_is_small(tmp_path: Path) -> None:
    """As the goal on a value map, which has a colour of its own."""
    across, down = np.meshgrid(np.linspace(0, 1, 900), np.linspace(0, 1, 600))
    picture = np.stack([0.2 + 0 * across, across, down], axis=-1)
    picture[300:320, 400:420] = (0.9, 0.22, 0.27)
    imsave(tmp_path / "map.png", picture)
    found = pictures.embedded(tmp_path / "map.png", 450)
    assert found is not None and found[1:] == (450, 300)
    file = io.BytesIO(base64.b64decode(found[0].partition(",")[2]))
    np.testing.assert_allclose(imread(file)[155, 205, :3], (0.9, 0.22, 0.27), atol=0.04)
    assert len(found[0]) < 60_000


@pytest.mark.usefixtures("words")
def test_a_film_is_shown(runs: Path) -> None:
    picture = np.zeros((30, 2400, 3))
    picture[:, :, 0] = 1.0
    imsave(runs / "iql/seed=0/film.png", picture)
    its = shown(runs / "iql")
    (film,) = (each for _, each in its.tags if each.get("alt") == "film of iql, seed=0")
    assert (film["width"], film["height"]) == ("1200", "15")
    assert "film.png" in its.text


def test_what_policies_are_worth_by_data_alone_is_shown(made: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(made, tmp_path / "runs")
    files = [runs / "iql/seed=0/last.ckpt", runs / "bc/seed=1/best.ckpt"]
    few = {"steps": 20, "networks": 2, "hidden_sizes": [8], "discount": 0.9975}
    few |= {"checkpoint": [*map(str, files)], "output": str(runs / "iql/estimate.json")}
    estimating.run(Estimation.of(few), Compute.of({"execution": "eager", "threads": 1}))
    its = shown(runs / "iql", runs / "bc")
    rows = its.table("policy")
    known = json.loads((runs / "iql/estimate.json").read_text())
    best, other = (each["value"] for each in known["policies"])
    assert best > other and len(rows) == 3
    for name, file in zip(("iql, seed=0", "bc, seed=1, best.ckpt"), files, strict=True):
        (estimate,) = (each for each in known["policies"] if each["checkpoint"] == str(file))
        value, spread, distance, verdict = rows[name]
        assert float(value) == pytest.approx(estimate["value"], rel=0.01)
        assert float(spread.removeprefix("± ")) == pytest.approx(estimate["spread"], rel=0.01)
        assert float(distance) == pytest.approx(estimate["distance"], rel=0.01)
        assert verdict == estimate["verdict"]
    assert float(rows["the data themselves"][0]) == pytest.approx(known["data"]["value"], rel=0.01)
    assert f"By all episodes of {known['dataset']}, discounted by 0.9975." in its.text
    assert shown(runs / "bc").table("policy") == {}
    # Where nothing was played, that is what there is to say first.
    shutil.copy(runs / "iql/estimate.json", runs / "no env/estimate.json")
    its = shown(runs / "no env")
    first = known["policies"][0]["checkpoint"]
    assert f"By data alone: {first}: {best:.4g} ±" in " ".join(its.text.split())

    (runs / "iql/estimate.json").write_text('{"policies": [{"value": "much"}], "data": {}}')
    its = shown(runs / "iql")
    assert "estimate.json holds something else than expected" in its.text
    assert its.table("policy") == {}


def test_what_is_too_large_is_left_out_and_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LIMIT", 250_000)
    its = shown(runs)
    assert (runs.parent / "page.html").stat().st_size <= 250_000
    assert "left out: the page would be larger than" in its.text
    assert its.table("settings")
    monkeypatch.setattr(page, "LIMIT", 1_000)
    with pytest.raises(page.TooLargeError, match=r"the page of 4 runs would have 0\.\d MB"):
        shown(runs)


@pytest.mark.usefixtures("words")
def test_what_is_no_run_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sac").mkdir()
    (tmp_path / "sac/config.yaml").write_text("behavior: ant\n")
    (tmp_path / "sac/metrics.csv").write_text("step\n")
    for path, told in {
        "none": "none is not there",
        "empty": "empty holds no run: expected config.yaml beside",
        "sac": "sac is no run of offline.py or online.py",
        "runs/bc/config.yaml": "config.yaml is a file, expected the folder of a run",
    }.items():
        with pytest.raises(gather.NoRunError, match=told):
            gather.folders([runs / "bc", tmp_path / path])
    shutil.copytree(tmp_path / "sac", runs / "sac")
    assert "sac is of another script" in shown(runs).text


# --- Doing it again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iql", "bc", "no env", "online"])
def test_the_command_leads_to_the_settings_of_the_run(made: Path, name: str) -> None:
    its = gather.run(made / name)
    assert its.command is not None and its.command.is_checked
    python, script, *given = shlex.split(its.command.text)
    door = {"recipes/offline.py": OFFLINE, "recipes/online.py": ONLINE}[script]
    assert python == "python"
    assert door.settings(given).values == door.stored(made / name).values
    assert len(given) < len(flat(door.stored(made / name).values)) / 2  # defaults are left out


# --- While runs go on ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("words")
def test_a_run_that_goes_on_is_shown_as_such(runs: Path) -> None:
    extend(runs / "bc")
    with held(runs / "bc"):
        its = shown(runs / "bc", watching=True)
        assert "bc is running" in its.text
        (refresh,) = (each for _, each in its.tags if each.get("http-equiv") == "refresh")
        assert int(refresh["content"] or 0) > 0
    its = shown(runs / "bc", watching=True)  # over: nothing is to be loaded anew
    assert "is running" not in its.text
    assert "refresh" not in [each.get("http-equiv") for _, each in its.tags]


@pytest.mark.usefixtures("words")
def test_watching_ends_with_the_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "INTERVAL", 0.05)
    out = runs / "watched.html"
    watching = Thread(target=report.watch, args=([runs / "bc"], out))
    with held(runs / "bc"):
        watching.start()
        deadline = time.monotonic() + 60
        while not out.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first = out.stat().st_mtime_ns
        score(runs / "bc", 5, 6, 7)
        while out.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert watching.is_alive()
    watching.join(60)
    assert not watching.is_alive()
    assert "6.0" in out.read_text() and 'http-equiv="refresh"' not in out.read_text()
    assert capsys.readouterr().out.count("watched.html") >= 2


@pytest.mark.slow
def test_the_script_says_where_the_page_is_and_loads_no_pytorch(runs: Path) -> None:
    def do(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", str(RECIPES / "report.py"), *arguments]
        return subprocess.run(command, cwd=runs, capture_output=True, text=True, timeout=300)

    done = do("no env", "bc")
    assert done.stdout.startswith(f"Report: {Path('no env/report.html')} (0.")
    assert (runs / "no env/report.html").stat().st_size > 100_000
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
    refused = do("nothing")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "report.py: nothing is not there"


# --- What runs record ------------------------------------------------------------------------------------


def test_the_summary_of_the_data_is_numpys(made: Path, maze_id: str) -> None:
    dataset = load_dataset(maze_id, reward="minus_one")
    rest, held_out = dataset.split(0.1, seed=0)
    its = json.loads((made / "iql/data.json").read_text())
    assert its == learned_from.summary(rest, rest, held_out)
    assert its["transitions"] + its["held_out_transitions"] == len(dataset.transitions)
    assert its["episodes"] == len(rest.episode_lengths)
    for key, values in {
        "returns": rest.episode_returns,
        "lengths": rest.episode_lengths,
        "rewards": rest.transitions["next", "reward"],
    }.items():
        values = values.double().numpy().ravel()
        counts, edges = np.histogram(values, 40)
        assert its[key]["counts"] == counts.tolist()
        assert its[key]["edges"] == pytest.approx([edges[0], edges[-1]])
        assert its[key]["mean"] == pytest.approx(values.mean())
    actions = rest.transitions["action"].numpy()
    for i, each in enumerate(its["actions"]["columns"]):
        assert sum(each["counts"]) == len(actions)
        at = np.abs(actions[:, i]) >= 0.98
        assert each["at_bounds"] == pytest.approx(at.mean(), abs=1e-6)
    assert (made / "online/data.json").exists()


def test_times_say_how_and_with_what(made: Path) -> None:
    (its,) = json.loads((made / "bc/times.json").read_text())
    assert its["device"] == "cpu" and its["threads"] >= 1
    assert "eager" in its["execution"]
    assert {"torchrl_iql", "torch", "torchrl", "python"} <= its["versions"].keys()


def test_a_run_of_several_learners_has_a_picture_of_all(made: Path) -> None:
    one, all_ = (
        imread(made / "iql" / name)
        for name in ("seed=0/learning_curves.png", "learning_curves.png")
    )
    assert all_.shape[1] == one.shape[1]
    pale = np.abs(all_[..., :3] - np.array([0.83, 0.886, 0.918])).max(axis=-1) < 0.02
    assert pale.sum() > 1000  # the band, of three seeds
