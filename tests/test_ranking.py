"""How well measures rank policies: statistics against a count, and the whole on tiny runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from torchrl_iql_recipes.comparison import ranking
from torchrl_iql_recipes.comparison.ranking import Fit, Policy


def test_a_measure_that_knows_the_scores_is_perfect() -> None:
    scores = [3.0, 1.0, 5.0, 2.0, 8.0, 4.0, 9.0, 7.0]
    its = ranking.ranking(scores, [2 * each + 1 for each in scores])
    assert (its.policies, its.regret) == (8, 0.0)
    assert (its.correlation, its.low, its.high) == pytest.approx((1, 1, 1))
    its = ranking.ranking(scores, [-each for each in scores])
    assert (its.correlation, its.high) == pytest.approx((-1, -1)) and its.regret == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_correlation_and_regret_are_those_of_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=10), rng.integers(5, size=10).astype(float)
    its = ranking.ranking(scores.tolist(), values.tolist())
    expected = np.corrcoef(rankdata(scores), rankdata(values))[0, 1]
    assert its.correlation == pytest.approx(expected)
    assert its.low < its.correlation < its.high
    chosen = np.mean([s for s, v in zip(scores, values, strict=True) if v == values.max()])
    assert its.regret == pytest.approx((scores.max() - chosen) / np.ptp(scores))
    blind = np.mean([(scores.max() - s) / np.ptp(scores) for s in scores])
    assert ranking.by_chance(scores.tolist()) == pytest.approx(blind)


def test_what_does_not_tell_is_no_number() -> None:
    its = ranking.ranking([1.0] * 8, list(range(8)))
    assert np.isnan(its.correlation) and its.regret == 0.0
    its = ranking.ranking(list(range(8)), [0.0] * 8)
    assert np.isnan(its.correlation) and its.regret == pytest.approx(0.5)


def policy(i: int) -> Policy:
    return Policy("data", "IQL", f"seed={i}", Path("nowhere"), float(i), 0.1, {})


def test_a_low_error_is_good_and_few_policies_are_not_ranked() -> None:
    its = [
        (policy(i), {"td_error": -float(i), "fitted_q": float(i), "distance": 1.0})
        for i in range(9)
    ]
    its += [(policy(9), {"fitted_q": 9.0})]
    found = ranking.rankings(its)
    assert found["td_error"].correlation == pytest.approx(1) and found["td_error"].policies == 9
    assert found["fitted_q"].policies == 10
    assert ranking.rankings(its[:7]) == {}


@pytest.mark.slow
def test_a_fit_is_not_done_twice_nor_taken_for_another(tmp_path: Path) -> None:
    fit = Fit(tmp_path / "none.ckpt", "all", tmp_path / "estimates/a.json", ["steps=3"])
    with pytest.raises(RuntimeError, match=r"estimate\.py failed, see .*a\.txt"):
        fit.finish()
    assert "there is no checkpoint at" in (tmp_path / "estimates/a.txt").read_text()
    fit.output.write_text(json.dumps({"policies": []}))
    fit.finish()
    assert fit.result() == {"policies": []}
    other = Fit(fit.checkpoint, "all", fit.output, ["steps=4"])
    with pytest.raises(ValueError, match=r"a\.json is of other settings, see a\.settings\.json"):
        other.finish()


def test_an_estimate_is_of_the_checkpoint_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "estimate.py").write_text(
        "import sys, pathlib\n"
        "its = dict(each.split('=', 1) for each in sys.argv[1:])\n"
        "file, output = (pathlib.Path(its[key].strip(\"'\")) for key in ('checkpoint', 'output'))\n"
        "output.write_text('{\"policies\": [' + file.read_text() + ']}')\n"
    )
    monkeypatch.setattr(ranking, "RECIPES", tmp_path)
    fit = Fit(tmp_path / "last.ckpt", "all", tmp_path / "estimates/a.json", ["steps=3"])
    for steps in (1, 1, 2):  # the run goes on
        fit.checkpoint.write_text(str(steps))
        assert (fit.result() is None) == (steps == 2 or not fit.output.exists())
        fit.finish()
        assert fit.result() == {"policies": [steps]}
    # An earlier version said less, and what it left is finished.
    known = fit.output.with_suffix(".settings.json")
    known.write_text(json.dumps(["fit_on=all", "steps=3"]))
    fit.checkpoint.write_text("3")
    fit.finish()
    assert fit.result() == {"policies": [2]}
    known.write_text("")  # it was killed there
    fit.finish()
    assert fit.result() == {"policies": [2]}
    with pytest.raises(ValueError, match="of other settings"):
        known.write_text(json.dumps(["fit_on=all", "steps=4"]))
        fit.finish()


@pytest.mark.slow
def test_from_nothing_to_the_page(maze_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    command = [sys.executable, str(Path(ranking.__file__)), "--folder", str(folder)]
    command += ["--tasks", "mini/pointmaze-medium", "--algorithms", "iql", "bc", "td3bc"]
    command += ["--expectiles", "0.5", "0.9", "--steps", "20", "--episodes", "2", "--jobs", "2"]
    command += ["--fit-on", "all", "--fit-steps", "20", "--fit-settings", "networks=2"]
    command += ["hidden_sizes=[8,8]", "compute.execution=eager", "--"]
    command += [
        f"dataset={maze_id}",
        "hidden_sizes=[8,8]",
        "batch_size=32",
        "compute.execution=eager",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with (folder / "ranking.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["algorithm"] for row in rows] == ["IQL"] * 4 + ["BC"] * 2 + ["TD3+BC"] * 2
    for row in rows:
        (file,) = (folder / "estimates").glob(
            {"IQL": "*-iql-", "BC": "*-bc-", "TD3+BC": "*-td3bc-"}[row["algorithm"]]
            + f"{row['name']}-all.json"
        )
        (its,) = json.loads(file.read_text())["policies"]
        assert float(row["fitted_q"]) == its["value"] and float(row["distance"]) == its["distance"]
        assert bool(row["td_error"]) == (row["algorithm"] != "BC")
    page = (folder / "ranking.md").read_text()
    assert f"`{maze_id}`: 8 policies of IQL, BC, TD3+BC, scores " in page
    assert "| fitted Q | " in page and "| TD error | " not in page  # 6 have it
    assert (folder / "ranking.png").stat().st_size > 5000
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
