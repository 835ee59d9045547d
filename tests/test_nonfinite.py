"""A step that is not finite is skipped; or found, named, kept, and can be taken again."""

from __future__ import annotations

import csv
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import BCLoss

from episodes import walk, write
from iql_losses import iql_loss, transitions
from runs import TINY
from torchrl_iql import TrainStep, checkpoint, models
from torchrl_iql.data import Minibatches
from torchrl_iql.training import NonFiniteError, reproduce
from torchrl_iql.training.stacked import StackedProgram
from torchrl_iql_recipes import offline as recipes_offline
from torchrl_iql_recipes import online as recipes_online
from torchrl_iql_recipes.experiment import offline, online
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

ROWS, STEPS, BATCH = 60, 130, 2  # more than a block of minibatches
BAD = 17
NAN = float("nan")
EXECUTIONS = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]


def poisoned(key: Any, value: float) -> TensorDict:
    """Make transitions of which one is not to be learnt from."""
    torch.manual_seed(0)
    td = transitions(batch=(ROWS,))
    td.get(key)[BAD] = value
    return td


def made(stacked: bool = True, dropout: float = 0.2) -> Any:
    torch.manual_seed(0)
    if stacked:
        return iql_loss()
    return BCLoss(models.gaussian_policy(3, 2, hidden_sizes=(8,), dropout=dropout))


def taken(
    step: TrainStep, minibatches: Minibatches, steps: int, by_batch: bool = False
) -> TensorDictBase:
    """Take steps, by ``run`` or each on a batch that holds its rows, as a replay buffer gives it."""
    if not by_batch:
        return step.run(minibatches, steps)
    for t in range(step.steps, step.steps + steps):
        source, indices = minibatches(t // 100)
        batch = source[indices[t % 100]].set("index", indices[t % 100])
        step(batch if len(step.losses) > 1 else batch[0])
    results = step.check_finite()
    assert results is not None
    return results


def first_use(minibatches: Minibatches) -> tuple[int, int]:
    """Return the first step that reads the row, counted from 1, and its learner: by looking, step by step."""
    for t in range(10**6):
        _, indices = minibatches(t // 100)
        for learner, rows in enumerate(indices[t % 100]):
            if BAD in rows:
                return t + 1, learner
    raise AssertionError


# --- Stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("key", "value", "stacked", "found"),
    [
        (("next", "reward"), 1e30, True, "loss_qvalue is inf, moments of qvalue_network"),
        (("next", "reward"), NAN, True, "loss_qvalue is nan, parameters of qvalue_network"),
        ("observation", NAN, True, "loss_actor is nan, loss_qvalue is nan, loss_value is nan"),
        ("observation", NAN, False, "loss_bc is nan, parameters of actor_network"),
    ],
)
def test_the_first_such_step_is_named_and_can_be_taken_again(
    key: Any,
    value: float,
    stacked: bool,
    found: str,
    execution: Any,
    by_batch: bool,
    tmp_path: Path,
) -> None:
    td = poisoned(key, value)
    minibatches = Minibatches(td, BATCH, seeds=[3, 5])
    step = TrainStep([made(stacked), made(stacked)], seeds=[0, 1], execution=execution)
    with pytest.raises(NonFiniteError, match=re.escape(found)) as raised:
        taken(step, minibatches, STEPS, by_batch)
    error = raised.value
    assert (error.step, error.learner) == first_use(minibatches)
    assert f"step {error.step} of learner {error.learner}" in str(error)
    assert str(BAD) in str(error)

    # Everything is as before that step, as in a run that was ended there.
    plain = TrainStep([made(stacked), made(stacked)], seeds=[0, 1], execution=execution)
    if error.step > 1:
        taken(plain, minibatches, error.step - 1, by_batch)
    for r in range(2):
        found_, expected = step.state_dict(r), plain.state_dict(r)
        assert found_["steps"] == error.step - 1
        for name, tensor in expected["loss"].items():
            torch.testing.assert_close(found_["loss"][name], tensor, rtol=1e-5, atol=1e-6)

    path = error.save(tmp_path / "run")
    assert path == tmp_path / f"run/nonfinite-step-{error.step}.pt"
    alone = TrainStep(made(stacked), seeds=0, execution=execution)
    assert found in ", ".join(reproduce(path, alone))
    assert alone.steps == error.step
    kept = torch.load(path, weights_only=True)
    assert BAD in kept["rows"]
    assert torch.equal(kept["batch"]["action"], td["action"][kept["rows"]])


@pytest.mark.parametrize("calls", [(30, 170), (30, 50, 120), (130, 130), (1,) * 101])
def test_there_are_at_most_100_steps_between_two_looks(
    calls: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, looks = TrainStep(iql_loss()), [0]
    look = step._watch.look
    monkeypatch.setattr(step._watch, "look", lambda: (looks.append(step.steps), look())[1])
    for steps in calls:
        step.run(Minibatches(transitions(batch=(ROWS,)), BATCH, seeds=[0]), steps)
    assert max(np.diff([*looks, step.steps])) <= 100


def test_a_state_that_is_not_finite_is_not_saved() -> None:
    step = TrainStep(made())
    minibatches = Minibatches(poisoned("observation", NAN), ROWS, seeds=[3])
    step.run(minibatches, 5)  # nobody looks: that would be waiting
    with pytest.raises(NonFiniteError, match="step 1 of learner 0: "):
        step.state_dict()
    assert step.state_dict()["steps"] == 0  # as it was before
    assert all(parameter.isfinite().all() for parameter in step.losses[0].parameters())


def test_what_was_no_step_is_not_found_again(tmp_path: Path) -> None:
    minibatches = Minibatches(poisoned(("next", "reward"), 0.0), BATCH, seeds=[3])
    step = TrainStep(made())
    step.run(minibatches, 40)
    step.check_finite()
    step.run(minibatches, 1)
    with torch.no_grad():
        next(step.losses[0].value_network_params.parameters()).fill_(NAN)
    with pytest.raises(
        NonFiniteError, match=r"steps 41 to 41 of learner \[0\] were not finite, and"
    ) as e:
        step.run(minibatches, 4)
    assert e.value.save(tmp_path) is None
    assert step.steps == 41
    assert all(parameter.isfinite().all() for parameter in step.losses[0].parameters())


def test_few_large_batches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrl_iql.training.nonfinite.BYTES", 4000)
    step, batch = TrainStep(made()), poisoned("observation", NAN)
    most = 4000 // sum(column.nbytes for column in batch.values(True, True))
    assert 0 < most < 10
    with pytest.raises(NonFiniteError, match="step 1 of learner 0: "):
        for t in range(most):
            assert step.steps == t
            step(batch)


def test_what_takes_a_step_again_is_a_step_of_one_learner_that_does_not_skip() -> None:
    with pytest.raises(ValueError, match="step is for 2 losses, expected one"):
        reproduce("none.pt", TrainStep([made(), made()]))
    with pytest.raises(ValueError, match="on_nonfinite='skip' undoes the step: give 'stop'"):
        reproduce("none.pt", TrainStep(made(), on_nonfinite="skip"))
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .*, got 'ignore'"):
        TrainStep(made(), on_nonfinite="ignore")


# --- Skip ----------------------------------------------------------------------------------------------


def is_finite(step: TrainStep, results: TensorDictBase) -> bool:
    moments = (m for pair in step._moments(0).values() for m in pair)
    losses = (results[entry] for entry in step.entries)
    return all(x.isfinite().all() for x in (*step.losses[0].parameters(), *moments, *losses))


def to_skip(stacked: bool) -> TensorDict:
    td = poisoned(("next", "reward") if stacked else "observation", NAN)
    if stacked:
        td["observation"][BAD + 1] = NAN
        td["next", "reward"][BAD + 2] = 1e30  # finite losses but one, infinite moments
    return td


@cache
def with_returns(stacked: bool, dropout: float, learner: int) -> tuple[dict[str, Any], int]:
    """Take steps in a loop, and go back after each that is not finite by loading the state before it."""
    minibatches = Minibatches(to_skip(stacked), BATCH, seeds=[3, 5])
    step, skipped = TrainStep(made(stacked, dropout), seeds=learner), 0
    for t in range(STEPS):
        source, indices = minibatches(t // 100)
        rows = indices[t % 100, learner]
        before = step.state_dict() if any(BAD <= row <= BAD + 2 for row in rows) else None
        if not is_finite(step, step(source[rows])):
            assert before is not None
            skipped += 1
            random = step._streams[0].state
            step.load_state_dict({**before, "steps": t + 1, "random": random})
    return step.state_dict(), skipped


@pytest.mark.parametrize("by_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stacked", "dropout", "joint", "execution"),
    [
        (True, 0.0, False, "eager"),
        (True, 0.0, True, "eager"),
        (False, 0.2, False, "eager"),
        (True, 0.0, False, "compiled"),  # by kernels, where there is a compiler
        pytest.param(True, 0.0, True, "compiled", marks=pytest.mark.slow),
        pytest.param(False, 0.0, False, "compiled", marks=pytest.mark.slow),
    ],
)
def test_skipped_steps_leave_a_learner_as_it_was_and_the_others_go_on(
    stacked: bool, dropout: float, joint: bool, execution: Any, by_batch: bool
) -> None:
    minibatches = Minibatches(to_skip(stacked), BATCH, seeds=[3, 5])
    step = TrainStep(
        [made(stacked, dropout) for _ in range(2)],
        seeds=[0, 1],
        execution=execution,
        on_nonfinite="skip",
    )
    if joint:  # what a GPU does with all learners at once
        program = StackedProgram(step.losses, step._optimizations)
        step._programs = [(program, slice(0, 2))]
    results = taken(step, minibatches, STEPS, by_batch)
    counts = []
    for r in range(2):
        state, skipped = with_returns(stacked, dropout, r)
        counts.append(skipped)
        found = step.state_dict(r)
        assert found["steps"] == state["steps"] == STEPS
        assert found["skipped"] == skipped
        assert found["counted"] == state["counted"] == STEPS - skipped
        for name, total in state["totals"].items():
            assert found["totals"][name] == pytest.approx(total, rel=1e-4, abs=1e-3)
        for name, tensor in state["loss"].items():
            torch.testing.assert_close(found["loss"][name], tensor, rtol=1e-4, atol=1e-5)
        for name, pair in state["moments"].items():
            for moment, its in zip(found["moments"][name], pair, strict=True):
                torch.testing.assert_close(moment, its, rtol=1e-3, atol=1e-6)
    assert results["skipped"].tolist() == counts
    assert 0 < min(counts) <= max(counts) < STEPS
    assert counts[0] != counts[1]
    step.check_finite()  # finds nothing to end


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_where_all_is_finite_both_do_the_same(stacked: bool, execution: Any) -> None:
    minibatches = Minibatches(poisoned(("next", "reward"), 0.0), BATCH, seeds=[3])
    states = []
    for on_nonfinite in ("stop", "skip"):
        step = TrainStep(made(stacked), execution=execution, on_nonfinite=on_nonfinite)
        for _ in range(3):
            results = step.run(minibatches, 40)
            step.check_finite()
        assert results.get("skipped", torch.tensor(0)) == 0
        states.append(step.state_dict())
    for name, tensor in states[0]["loss"].items():
        assert tensor.equal(states[1]["loss"][name])
    for name, pair in states[0]["moments"].items():
        assert all(a.equal(b) for a, b in zip(pair, states[1]["moments"][name], strict=True))


def test_the_count_is_saved_and_goes_on_when_settings_change() -> None:
    minibatches = Minibatches(poisoned("observation", NAN), BATCH, seeds=[3])
    step, other = (TrainStep(made(), on_nonfinite="skip") for _ in range(2))
    first = step.run(minibatches, 60)["skipped"]
    assert first > 0
    other.load_state_dict(step.state_dict())
    for each in (step, other):
        each.losses[0].weight_clip = 50.0  # a new program
    assert step.run(minibatches, 60)["skipped"] > first
    assert other.run(minibatches, 60)["skipped"] == step.state_dict()["skipped"]


def test_what_is_skipped_has_no_priority() -> None:
    batch = poisoned("observation", NAN)
    TrainStep(made(), on_nonfinite="skip")(batch)
    assert batch["td_error"][BAD] == 0
    assert batch["td_error"].isfinite().all()
    assert (batch["td_error"] > 0).sum() == ROWS - 1


# --- What is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_state_that_is_loaded_heals_a_learner(stacked: bool, execution: Any) -> None:
    good = Minibatches(poisoned("observation", 0.0), BATCH, seeds=[3])
    fresh = TrainStep(made(stacked, 0.0), execution=execution)
    fresh.run(good, 5)
    state = fresh.state_dict()
    step = TrainStep(made(stacked, 0.0), execution=execution)
    step.run(Minibatches(poisoned("observation", NAN), ROWS, seeds=[3]), 5)
    step.load_state_dict(state)
    results, expected = step.run(good, 30), fresh.run(good, 30)
    for key, value in expected.items():
        assert value.equal(results[key])
    for name, tensor in fresh.state_dict()["loss"].items():
        assert tensor.equal(step.state_dict()["loss"][name])


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize(
    "change",
    [
        lambda loss, state: loss.load_state_dict(state),
        lambda loss, state: loss.load_state_dict(state, assign=True),
        lambda loss, state: (
            [p.data.fill_(0.25) for p in loss.parameters()]
            and next(loss.parameters()).detach().fill_(0.25)
        ),
    ],
)
def test_what_is_changed_before_a_bad_step_stays(on_nonfinite: Any, change: Any) -> None:
    step, good = TrainStep(made(False), on_nonfinite=on_nonfinite), transitions(batch=(8,))
    for _ in range(3):
        step(good)
    loss = step.losses[0]
    change(loss, {name: torch.full_like(x, 0.25) for name, x in loss.state_dict().items()})
    step(good)
    expected = {name: x.clone() for name, x in loss.named_parameters()}
    assert all(abs(x - 0.25).max() < 0.1 for x in expected.values())
    bad = good.clone()
    bad["observation"][0] = NAN
    step(bad)
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteError, match="step 5 of"):
            step.check_finite()
    step.check_finite()
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


# --- Runs ----------------------------------------------------------------------------------------------


def ended(door: Any, main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run a script, and return the line it ends with."""
    monkeypatch.setattr(sys, "argv", [f"{door.name}.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        door.open(main, "")
    line = raised.value.code  # printed, with exit code 1, since it is no number
    assert isinstance(line, str)
    assert "\n" not in line
    return line


def column(folder: Path, key: str) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row[key] for row in csv.DictReader(file)]


runs = pytest.mark.usefixtures("cache_folder", "root")
quiet = pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")


@runs
@quiet
def test_an_offline_run_ends_with_one_line_and_goes_on_without_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewards = np.full(40, 1.0)
    rewards[7] = 1e30
    data = write(walk(40, rewards=rewards))
    folder = Path("run")
    given = [*TINY, f"dataset={data}", "reward=none", "eval_episodes=0", "seeds=[0,1]"]
    given += ["steps=40", "batch_size=2", "eval_interval=10", f"hydra.run.dir={folder}"]
    line = ended(OFFLINE, recipes_offline.run, monkeypatch, *given)
    step = int(re.search(r"step (\d+) of learner", line)[1])  # pyright: ignore
    learner = re.match(r"offline\.py: seed=(\d): step", line)[1]  # pyright: ignore
    for part in (
        "loss_qvalue is inf",
        ", 7" if "rows 7" not in line else "rows 7",
        "unit_rms",
        f"; run/nonfinite-step-{step}.pt takes it again, by torchrl_iql.training.reproduce; ",
        f"run/seed={learner}/last.ckpt",
    ):
        assert part in line
    for seed in (0, 1):
        its = folder / f"seed={seed}"
        assert checkpoint.load_metadata(its / "last.ckpt")["steps"] == step - 1
        if (its / "metrics.csv").exists():
            assert max(map(int, column(its, "step"))) < step
    # It is where it was, and ends there again; or goes on.
    assert f"step {step} of " in ended(
        OFFLINE, recipes_offline.run, monkeypatch, f"resume={folder}"
    )
    offline.run(OFFLINE.resumed(folder, ["on_nonfinite=skip"]), folder)
    counts = [int(column(folder / f"seed={seed}", "skipped")[-1]) for seed in (0, 1)]
    minibatches = Minibatches(TensorDict({}, [40]), 2, seeds=[0, 1])
    its = [(minibatches.rows(t) == 7).any(-1).tolist() for t in range(40)]
    assert counts == [sum(each) for each in zip(*its, strict=True)]
    assert checkpoint.load_metadata(folder / "seed=0/last.ckpt")["steps"] == 40


@runs
@quiet
def test_an_online_run_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [each for each in TINY if not each.startswith("steps=")]
    given = [*small, "dataset=null", "env=Pendulum-v1", "reward=none", "episodes=as_stored"]
    given += ["normalize_observation=false", "env_steps=40", "collector.frames_per_batch=10"]
    given += ["eval_episodes=0", "hydra.run.dir=run"]

    # A learning rate that overflows, as it happens to people.
    line = ended(ONLINE, recipes_online.run, monkeypatch, *given, "learning_rate=1e12")
    step = int(re.match(r"online\.py: step (\d+) of learner 0: ", line)[1])  # pyright: ignore
    assert f"; run/nonfinite-step-{step}.pt takes it again" in line
    assert "; what was learned before is in run/last.ckpt, and" in line
    saved = checkpoint.load_metadata("run/last.ckpt")
    assert saved["steps"] == step - 1
    assert saved["frames"] % 10 == 0
    assert f"step {step} of " in ended(ONLINE, recipes_online.run, monkeypatch, "resume=run")
    online.run(ONLINE.resumed(Path("run"), ["on_nonfinite=skip"]), Path("run"))
    assert int(column(Path("run"), "skipped")[-1]) > 0
