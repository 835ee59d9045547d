"""A step that is not finite is found, named, kept, and can be taken again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import BCLoss

from episodes import walk, write
from iql_losses import iql_loss, transitions
from runs import TINY
from torchrl_iql import TrainStep, models
from torchrl_iql.data import Minibatches
from torchrl_iql.training import NonFiniteError, Watch, reproduce
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.door import OFFLINE

ROWS, STEPS, BATCH = 60, 130, 2  # more than a block of minibatches
BAD = 17
EXECUTIONS = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]


def poisoned(key: Any, value: float) -> TensorDict:
    """Make transitions of which one is not to be learnt from."""
    torch.manual_seed(0)
    td = transitions(batch=(ROWS,))
    td.get(key)[BAD] = value
    return td


def made(stacked: bool = True) -> Any:
    torch.manual_seed(0)
    return (
        iql_loss()
        if stacked
        else BCLoss(models.gaussian_policy(3, 2, hidden_sizes=(8,), dropout=0.2))
    )


def first_use(minibatches: Minibatches) -> tuple[int, int]:
    """Return the first step that reads the row, counted from 1, and its learner: by looking, step by step."""
    for t in range(10**6):
        _, indices = minibatches(t // 100)
        for learner, rows in enumerate(indices[t % 100]):
            if BAD in rows:
                return t + 1, learner
    raise AssertionError


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("key", "value", "stacked", "found"),
    [
        (("next", "reward"), 1e30, True, "loss_qvalue is inf, moments of qvalue_network"),
        (
            ("next", "reward"),
            float("nan"),
            True,
            "loss_qvalue is nan, parameters of qvalue_network",
        ),
        (
            "observation",
            float("nan"),
            True,
            "loss_actor is nan, loss_qvalue is nan, loss_value is nan",
        ),
        ("observation", float("nan"), False, "loss_bc is nan, parameters of actor_network"),
    ],
)
def test_the_first_such_step_is_named_and_can_be_taken_again(
    key: Any, value: float, stacked: bool, found: str, execution: Any, tmp_path: Path
) -> None:
    td = poisoned(key, value)
    minibatches = Minibatches(td, BATCH, seeds=[3, 5])
    step = TrainStep([made(stacked), made(stacked)], seeds=[0, 1], execution=execution)
    watch = Watch(step, minibatches, tmp_path)
    with pytest.raises(NonFiniteError, match=re.escape(found)) as raised:
        watch(step.run(minibatches, STEPS))
    error = raised.value
    assert (error.step, error.learner) == first_use(minibatches)
    assert f"step {error.step} of learner {error.learner}" in str(error)
    assert str(BAD) in str(error)

    # Everything is as before that step, as in a run that was ended there.
    plain = TrainStep([made(stacked), made(stacked)], seeds=[0, 1], execution=execution)
    if error.step > 1:
        plain.run(minibatches, error.step - 1)
    for r in range(2):
        found_, expected = step.state_dict(r), plain.state_dict(r)
        assert found_["steps"] == error.step - 1
        for name, tensor in expected["loss"].items():
            torch.testing.assert_close(found_["loss"][name], tensor, rtol=1e-5, atol=1e-6)

    alone = TrainStep(made(stacked), seeds=0, execution=execution)
    assert found in ", ".join(reproduce(error.path, alone))
    assert alone.steps == error.step
    kept = torch.load(error.path, weights_only=True)
    assert BAD in kept["rows"]
    assert torch.equal(kept["batch"]["action"], td["action"][kept["rows"]])


def test_later_looks_do_not_go_back_to_the_start(tmp_path: Path) -> None:
    td = poisoned(("next", "reward"), 0.0)
    minibatches = Minibatches(td, BATCH, seeds=[3])
    step = TrainStep(made())
    watch = Watch(step, minibatches, tmp_path)
    watch(step.run(minibatches, 40))
    before = step.state_dict()
    with torch.no_grad():
        next(step.losses[0].value_network_params.parameters()).fill_(float("nan"))
    results = step.run(minibatches, 5)
    # What was done to the parameters was no step: taken again, there is nothing.
    with pytest.raises(NonFiniteError, match=r"steps 41 to 45 of learner 0: .* all are finite"):
        watch(results)
    assert step.steps == 45
    assert before["steps"] == 40
    assert all(parameter.isfinite().all() for parameter in step.losses[0].parameters())


def test_watching_changes_nothing(tmp_path: Path) -> None:
    td = poisoned(("next", "reward"), 0.0)
    states = []
    for watched in (True, False):
        step, minibatches = TrainStep(made(False)), Minibatches(td, BATCH, seeds=[3])
        watch = Watch(step, minibatches, tmp_path)
        for _ in range(3):
            results = step.run(minibatches, 20)
            if watched:
                watch(results)
        states.append(step.state_dict()["loss"])
    for name, tensor in states[0].items():
        assert tensor.equal(states[1][name])
    assert not list(tmp_path.iterdir())


def test_a_step_of_several_learners_does_not_take_one_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step is for 2 losses, expected one"):
        reproduce(tmp_path / "none.pt", TrainStep([made(), made()]))


@pytest.mark.usefixtures("cache_folder", "root")
@pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")
def test_a_run_ends_there_and_saves_nothing_of_it(tmp_path: Path) -> None:
    dataset = write(walk(20, rewards=np.full(20, 1e30)))
    given = [*TINY, f"dataset={dataset}", "reward=none", "eval_episodes=0"]
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"step 1 of learner 0: loss_qvalue is inf.*unit_rms"):
        offline.run(OFFLINE.settings(given), folder)
    assert [path.name for path in folder.glob("*.pt")] == ["nonfinite-step-1.pt"]
    assert not list(folder.rglob("*.ckpt"))
