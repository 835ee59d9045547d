"""The training step takes any LossModule, and does what the plain loop around it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl import objectives
from torchrl.data import Bounded, Categorical
from torchrl.modules import (
    Actor,
    IndependentNormal,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule

from iql_losses import built
from test_training import make_loss
from test_training import transitions as float_transitions
from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep
from torchrl_iql.data import Minibatches
from torchrl_iql.models import Architecture
from torchrl_iql.training import NonFiniteError, cosine_decay, warm_up
from torchrl_iql.training.coefficients import coefficients, learned, set_coefficients
from torchrl_iql.training.stacked import StackedProgram

SPEC = Bounded(-1, 1, (2,))
IQL = ("loss_actor", "loss_qvalue", "loss_value")


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)
    )


class StateAction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(5, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([observation, action], dim=-1))


def stochastic(distribution: type = TanhNormal) -> ProbabilisticActor:
    parameters = nn.Sequential(mlp(3, 4), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(parameters, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=distribution,
    )


def categorical() -> ProbabilisticActor:
    return ProbabilisticActor(
        TensorDictModule(mlp(3, 2), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=Categorical(2),
        distribution_class=torch.distributions.Categorical,
    )


def deterministic() -> Actor:
    return Actor(nn.Sequential(mlp(3, 2), nn.Tanh()), in_keys=["observation"], spec=SPEC)


def qvalue() -> ValueOperator:
    return ValueOperator(StateAction(), in_keys=["observation", "action"])


def qvalues() -> TensorDictModule:
    return TensorDictModule(mlp(3, 2), in_keys=["observation"], out_keys=["state_action_value"])


def value() -> ValueOperator:
    return ValueOperator(mlp(3, 1), in_keys=["observation"])


def dqn() -> objectives.DQNLoss:
    network = QValueActor(mlp(3, 2), in_keys=["observation"], spec=Categorical(2))
    return objectives.DQNLoss(network, action_space="categorical", delay_value=True)


# Each loss, and what its recipe in TorchRL descends.
LOSSES: dict[str, tuple[Callable[[], LossModule], tuple[str, ...]]] = {
    "bc": (lambda: objectives.BCLoss(stochastic(IndependentNormal)), ("loss_bc",)),
    "dqn": (dqn, ("loss",)),
    "torchrl's iql": (lambda: objectives.IQLLoss(stochastic(), qvalue(), value()), IQL),
    "sac": (
        lambda: objectives.SACLoss(stochastic(), qvalue(), action_spec=SPEC),
        ("loss_actor", "loss_qvalue", "loss_alpha"),
    ),
    "td3+bc": (
        lambda: objectives.TD3BCLoss(deterministic(), qvalue(), action_spec=SPEC),
        ("loss_actor", "loss_qvalue"),
    ),
    "cql": (
        lambda: objectives.CQLLoss(stochastic(), qvalue(), action_spec=SPEC),
        ("loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"),
    ),
    "dt": (lambda: objectives.DTLoss(deterministic()), ("loss",)),
    "iql": (lambda: IQLLoss(stochastic(IndependentNormal), [qvalue(), qvalue()], value()), IQL),
    "discrete iql": (
        lambda: DiscreteIQLLoss(
            categorical(), [qvalues(), qvalues()], value(), action_space="categorical"
        ),
        IQL,
    ),
}
DISCRETE = ("dqn", "discrete iql")
NAMES = pytest.mark.parametrize("name", LOSSES)


def build(name: str, seed: int = 0) -> LossModule:
    torch.manual_seed(seed)
    return LOSSES[name][0]().double()


def transitions(name: str, n: int = 64) -> TensorDict:
    data = float_transitions(n).apply(lambda x: x.double() if x.is_floating_point() else x)
    if name in DISCRETE:
        data["action"] = torch.randint(2, (n,))
    return data


class PlainLoop:
    """The loss, Adam and SoftUpdate, as the README writes them."""

    def __init__(self, name: str, seed: int = 0, **adam: Any) -> None:
        self.entries = LOSSES[name][1]
        self.loss = build(name, seed)
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), weight_decay=0.0, **adam)
        has_targets = any(key.startswith("target_") for key in self.loss.state_dict())
        self.target = SoftUpdate(self.loss, tau=0.01) if has_targets else None

    def __call__(self, batch: TensorDict) -> TensorDict:
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        sum(losses[entry] for entry in self.entries).backward()
        self.optimizer.step()
        if self.target is not None:
            self.target.step()
        return losses


def assert_equal(loss: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for key, tensor in other.state_dict().items():
        torch.testing.assert_close(
            loss.state_dict()[key], tensor, rtol=tolerance, atol=tolerance, msg=key
        )


def moved(loss: nn.Module, since: dict[str, torch.Tensor]) -> set[str]:
    """Find the networks and targets of which something has changed."""
    return {
        key.partition("_params")[0]
        for key, tensor in loss.state_dict().items()
        if not torch.equal(tensor, since[key])
    }


def snapshot(loss: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in loss.state_dict().items()}


# --- The same numbers ----------------------------------------------------------------------------------


@NAMES
def test_a_hundred_steps_are_those_of_the_plain_loop(name: str) -> None:
    assert_a_hundred_steps_alike(name, "eager")


@pytest.mark.slow
@NAMES
def test_a_hundred_compiled_steps_are_those_of_the_plain_loop(name: str) -> None:
    # Compiled code has random numbers of its own, unless told to draw those of eager code.
    with torch._inductor.config.patch(fallback_random=True):
        assert_a_hundred_steps_alike(name, "compiled")


def assert_a_hundred_steps_alike(name: str, execution: Any) -> None:
    plain, loss = PlainLoop(name, lr=1e-3), build(name)
    step = TrainStep(loss, learning_rate=1e-3, target_rate=0.01, seeds=3, execution=execution)
    assert step.path.startswith("general"), step.path
    batches = [transitions(name) for _ in range(100)]
    torch.manual_seed(3)  # the same noise
    expected = [plain(batch.clone()) for batch in batches]
    for batch, its in zip(batches, expected, strict=True):
        metrics = step(batch.clone())
        for key in metrics.keys():
            torch.testing.assert_close(metrics[key], its[key].detach(), rtol=1e-9, atol=1e-9)
    assert set(plain.entries) <= set(metrics.keys())
    assert_equal(loss, plain.loss)
    assert step.execution == execution


@pytest.mark.slow
def test_compiled_steps_of_a_loss_that_is_not_stacked() -> None:
    """The fastest of the slow test above, in every run of the suite."""
    assert_a_hundred_steps_alike("bc", "compiled")


def test_the_stack_is_the_general_path_with_the_same_numbers() -> None:
    data, steps = transitions("iql", 500), []
    for _ in range(2):
        loss = make_loss(0, discount=0.9).double()
        steps.append(TrainStep(loss, schedule={"actor_network": cosine_decay(100)}))
    stacked, general = steps
    general._programs = [(general_program(general), slice(0, 1))]
    minibatches = Minibatches(data, 32)
    first, second = stacked.run(minibatches, 100), general.run(minibatches, 100)
    assert isinstance(stacked._programs[0][0], StackedProgram)
    assert set(first.keys()) == set(second.keys())
    for key in first.keys():
        torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-9)
    assert_equal(stacked.losses[0], general.losses[0])


def general_program(step: TrainStep) -> Any:
    from torchrl_iql.training.program import LossProgram

    return LossProgram(step.losses[0], step._optimizations[0])


# --- How it is descended -------------------------------------------------------------------------------


def test_networks_learn_at_rates_of_their_own_and_decay() -> None:
    loss, plain = build("sac"), build("sac")
    rates = {"actor_network": 1e-3, "qvalue_network": 1e-2, "log_alpha": 1e-4}
    step = TrainStep(
        loss,
        learning_rate=rates,
        weight_decay={"qvalue_network": 0.1},
        schedule={"actor_network": cosine_decay(10), "qvalue_network": warm_up(4)},
        target_rate=0.01,
    )
    groups = [
        {
            "params": [p for n, p in plain.named_parameters() if n.startswith(network)],
            "lr": rate,
            "weight_decay": 0.1 if network == "qvalue_network" else 0.0,
        }
        for network, rate in rates.items()
    ]
    optimizer, target = torch.optim.AdamW(groups), SoftUpdate(plain, tau=0.01)
    batches = [transitions("sac") for _ in range(12)]
    torch.manual_seed(0)
    for t, batch in enumerate(batches):
        groups = optimizer.param_groups
        groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * min(t / 10, 1)))
        groups[1]["lr"] = 1e-2 * min((t + 1) / 4, 1)
        losses = plain(batch.clone())
        optimizer.zero_grad()
        sum(losses[entry] for entry in LOSSES["sac"][1]).backward()
        optimizer.step()
        target.step()
    for batch in batches:
        step(batch)
    assert_equal(loss, plain)
    assert step.learning_rates() == {
        "actor_network": [0.0], "qvalue_network": [1e-2], "log_alpha": [1e-4]
    }  # fmt: skip


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    for max_norm in (0.05, {"actor_network": 0.01}):
        loss, plain = build("td3+bc"), PlainLoop("td3+bc", lr=1e-3)
        step = TrainStep(loss, learning_rate=1e-3, target_rate=0.01, max_grad_norm=max_norm)
        batches = [transitions("td3+bc") for _ in range(10)]
        torch.manual_seed(0)
        for batch in batches:
            losses = plain.loss(batch.clone())
            plain.optimizer.zero_grad()
            sum(losses[entry] for entry in plain.entries).backward()
            if isinstance(max_norm, dict):
                named = plain.loss.named_parameters()
                nn.utils.clip_grad_norm_([p for n, p in named if n.startswith("actor")], 0.01)
            else:
                nn.utils.clip_grad_norm_(plain.loss.parameters(), max_norm)
            plain.optimizer.step()
            plain.target.step()
        for batch in batches:
            step(batch)
        assert_equal(loss, plain.loss)


@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_delayed_policy_rests_with_its_moments_and_so_do_the_targets(execution: Any) -> None:
    loss, plain = build("td3+bc"), build("td3+bc")
    step = TrainStep(
        loss,
        learning_rate=1e-3,
        every={"actor_network": 2},
        target_rate={"qvalue_network": 0.01},
        target_every=3,
        execution=execution,
    )
    actor, critic = (
        torch.optim.Adam([p for n, p in plain.named_parameters() if n.startswith(name)], lr=1e-3)
        for name in ("actor", "qvalue")
    )
    batches = [transitions("td3+bc") for _ in range(12)]
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        for t, batch in enumerate(batches):
            before, state = snapshot(loss), torch.get_rng_state()
            losses = plain(batch.clone())
            plain.zero_grad()
            (losses["loss_actor"] + losses["loss_qvalue"]).backward()
            critic.step()
            if t % 2 == 1:
                actor.step()
            if t % 3 == 2:
                for key, tensor in plain.state_dict().items():
                    if key.startswith("target_qvalue"):
                        tensor.lerp_(plain.state_dict()[key.removeprefix("target_")], 0.01)
            after = torch.get_rng_state()
            step._streams[0].state = [state]
            step(batch.clone())
            torch.set_rng_state(after)
            expected = {"qvalue_network"} | ({"actor_network"} if t % 2 else set())
            assert moved(loss, before) == expected | (
                {"target_qvalue_network"} if t % 3 == 2 else set()
            )
    assert_equal(loss, plain)


def test_a_hard_update_of_the_targets() -> None:
    loss = build("dqn")
    step = TrainStep(loss, target_rate=1.0, target_every=5)
    for t in range(10):
        before = snapshot(loss)
        step(transitions("dqn"))
        assert ("target_value_network" in moved(loss, before)) == (t % 5 == 4)
    state = loss.state_dict()
    for key in state:
        if key.startswith("target_"):
            assert torch.equal(state[key], state[key.removeprefix("target_")])


def test_networks_that_are_not_named_are_not_trained() -> None:
    loss = build("iql")
    before = snapshot(loss)
    TrainStep(loss, learning_rate={"qvalue_network": 1e-3})(transitions("iql"))
    assert moved(loss, before) == {"qvalue_network", "target_qvalue_network"}


# --- What it refuses -----------------------------------------------------------------------------------


class OwnLoss(objectives.BCLoss):
    """A loss that is unknown."""


def test_an_unknown_loss_says_what_could_be_descended() -> None:
    loss = OwnLoss(stochastic(IndependentNormal))
    with pytest.raises(ValueError, match=r"entries of OwnLoss .*\['loss_bc'\]: give entries="):
        TrainStep(loss)
    metrics = TrainStep(loss, entries=["loss_bc"])(float_transitions(8))
    assert list(metrics.keys()) == ["loss_bc"]


def test_entries_that_are_not_there_or_train_nothing_are_named() -> None:
    batch = transitions("iql")
    with pytest.raises(KeyError, match="'loss_vlaue'"):
        TrainStep(build("iql"), entries=["loss_vlaue"])(batch)
    loss = build("iql")
    before = snapshot(loss)
    with pytest.raises(ValueError, match=r"actor_network gets no gradient from \['loss_value'\]"):
        TrainStep(loss, entries=["loss_value"])(batch)
    assert not moved(loss, before)
    torch.manual_seed(0)
    unreduced = IQLLoss(
        stochastic(), qvalue(), value(), reduction="none", scalar_output_mode="exclude"
    )
    with pytest.raises(ValueError, match=r"'loss_actor' has shape \(64,\)"):
        TrainStep(unreduced)(float_transitions(64))


def test_what_can_not_be_compiled_is_executed_eagerly_and_says_so() -> None:
    class Printing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    def loss() -> objectives.BCLoss:
        torch.manual_seed(0)
        policy = TensorDictModule(
            nn.Sequential(mlp(3, 2), Printing()), in_keys=["observation"], out_keys=["action"]
        )
        return objectives.BCLoss(policy, loss_function="l2")

    broken, eager = loss(), loss()
    step = TrainStep(broken, execution="auto")
    with pytest.warns(UserWarning, match="training is not compiled"):
        step(float_transitions(8))
    assert step.execution == "eager" and "compiling failed" in step.reason
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        TrainStep(eager, execution="compiled")(float_transitions(8))
    assert_equal(eager, loss())  # and nothing has changed


# --- Masks, importance weights, priorities ---------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_masks_weights_and_priorities_are_those_of_the_loss(
    stacked: bool, weighted: bool, masked: bool
) -> None:
    loss = make_loss(0).double() if stacked else build("iql")
    plain = deepcopy(loss)
    step = TrainStep(loss, learning_rate=1e-2)
    assert step.path.startswith("stacked") == stacked
    optimizer, target = torch.optim.Adam(plain.parameters(), lr=1e-2), SoftUpdate(plain, tau=0.005)
    for _ in range(5):
        batch = transitions("iql", 32)
        if weighted:
            batch["priority_weight"] = torch.rand(32)
        if masked:
            batch["collector", "mask"] = torch.rand(32) < 0.5
            batch["shifted_valid"] = torch.rand(32, 1) < 0.9
        ours, theirs = batch.clone(), batch.clone()
        losses = plain(theirs)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        target.step()
        metrics = step(ours)
        for key in metrics.keys():
            torch.testing.assert_close(metrics[key], losses[key].detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours["td_error"], theirs["td_error"], rtol=1e-9, atol=1e-9)
        assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    assert_equal(loss, plain)


def test_a_locked_batch_receives_no_priority() -> None:
    batch = transitions("iql").lock_()
    TrainStep(build("iql"))(batch)
    assert "td_error" not in batch.keys()


# --- Losses that lose their networks ---------------------------------------------------------------------


def cast_and_back(loss: LossModule) -> None:
    loss.to(torch.float32).to(torch.float64)


def assign(loss: LossModule) -> None:
    state = {key: tensor.clone() * 1.01 for key, tensor in loss.state_dict().items()}
    loss.load_state_dict(state, assign=True)


def copy_step(loss: LossModule) -> None:
    deepcopy(loss)


@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [cast_and_back, assign, copy_step])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_loss_that_parted_from_its_networks_is_adopted_again(
    change: Callable[[LossModule], None], stacked: bool, execution: Any
) -> None:
    loss = make_loss(0).double() if stacked else build("iql")
    step, twin = TrainStep(loss, execution=execution), TrainStep(deepcopy(loss))
    batches = [transitions("iql") for _ in range(3)]
    for t, batch in enumerate(batches):
        if t == 1:
            change(loss)
            twin.losses[0].load_state_dict(loss.state_dict())
        before = snapshot(loss)
        step(batch.clone())
        twin(batch.clone())
        networks = {"actor_network", "value_network", "qvalue_network", "target_qvalue_network"}
        assert moved(loss, before) == networks
    assert_equal(loss, twin.losses[0])


@pytest.mark.parametrize("stacked", [True, False])
def test_a_loss_of_another_dtype_is_refused(stacked: bool) -> None:
    loss = make_loss(0).double() if stacked else build("iql")
    step = TrainStep(loss)
    step(transitions("iql"))
    loss.to(torch.float32)
    with pytest.raises(ValueError, match=r"was torch.float64 .* and is now torch.float32"):
        step(float_transitions(8))


@pytest.mark.parametrize("stacked", [True, False])
def test_one_loss_in_two_steps_is_trained_by_both(stacked: bool) -> None:
    loss = make_loss(0).double() if stacked else build("iql")
    plain = deepcopy(loss)
    steps, optimizers = [], []
    for _ in range(2):
        steps.append(TrainStep(loss, learning_rate=1e-3))
        optimizers.append(torch.optim.Adam(plain.parameters(), lr=1e-3))
    target = SoftUpdate(plain, tau=0.005)
    for t in range(6):
        batch = transitions("iql")
        losses = plain(batch.clone())
        plain.zero_grad()
        sum(losses[key] for key in IQL).backward()
        optimizers[t % 2].step()
        target.step()
        steps[t % 2](batch)
    assert_equal(loss, plain)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_copy_of_a_step_trains_its_own_losses(stacked: bool, execution: Any) -> None:
    loss = make_loss(0).double() if stacked else build("iql")
    step = TrainStep(loss, execution=execution)
    step(transitions("iql"))
    copy = deepcopy(step)
    batch, before = transitions("iql"), snapshot(loss)
    copy(batch.clone())
    assert not moved(loss, before)
    step(batch.clone())
    assert_equal(loss, copy.losses[0], 0.0 if execution == "eager" else 1e-12)


# --- Many learners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac", "td3+bc", "cql", "bc"])
def test_many_learners_are_single_runs_with_random_numbers_of_their_own(name: str) -> None:
    data = transitions(name, 300)
    losses = [build(name, seed) for seed in (0, 1)]
    together = TrainStep(losses, learning_rate=[1e-3, 1e-2], seeds=[4, 5])
    metrics = together.run(Minibatches(data, 32, seeds=[7, 8]), 20)
    for r in range(2):
        alone = TrainStep(build(name, r), learning_rate=[1e-3, 1e-2][r], seeds=4 + r)
        expected = alone.run(Minibatches(data, 32, seeds=[7 + r]), 20)
        assert all(torch.equal(metrics[key][r], expected[key]) for key in expected.keys())
        assert_equal(together.losses[r], alone.losses[0], 0.0)


@pytest.mark.parametrize("name", ["sac", "iql"])
def test_random_numbers_and_moments_are_saved(name: str) -> None:
    data = transitions(name, 300)
    minibatches = Minibatches(data, 32)
    whole, first, second = (TrainStep(build(name), seeds=3) for _ in range(3))
    whole.run(minibatches, 20)
    first.run(minibatches, 11)
    torch.rand(7)  # whatever else draws numbers meanwhile
    second.load_state_dict(first.state_dict())
    second.run(minibatches, 9)
    assert_equal(second.losses[0], whole.losses[0], 0.0)


@NAMES
def test_a_step_that_is_not_finite_is_found_and_undone(name: str) -> None:
    """Of a loss that makes a buffer at its first step (SAC's and CQL's target entropy), too."""
    step, plain = (TrainStep(build(name), learning_rate=1e-3, seeds=3) for _ in range(2))
    batches = [transitions(name) for _ in range(3)]
    for batch in batches[:2]:
        plain(batch.clone())
        step(batch)
    step(batches[2].set("observation", torch.full_like(batches[2]["observation"], math.nan)))
    with pytest.raises(NonFiniteError, match="step 3 of learner 0: "):
        step.check_finite()
    assert_equal(step.losses[0], plain.losses[0])
    assert step.state_dict()["random"][0].equal(plain.state_dict()["random"][0])


def numbers(loss: LossModule) -> dict[str, Any]:
    found = coefficients(loss).items()
    return {key: its.tolist() if isinstance(its, torch.Tensor) else its for key, its in found}


@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@NAMES
def test_a_learner_goes_on_as_it_was_set(name: str, execution: Any) -> None:
    """With every coefficient of the loss and every number of the optimisation changed before."""
    loss = build(name)
    for key, value in coefficients(loss).items():
        if isinstance(value, float | torch.Tensor):
            set_coefficients(loss, {key: value * 0.9})
    if isinstance(vars(loss).get("loss_function"), str):
        loss.loss_function = "l1"
    (network, *_) = TrainStep(build(name)).learning_rates()
    own = {"execution": execution, "seeds": 3}
    trained = {
        "learning_rate": 1e-2,
        "target_rate": 0.1,
        "every": {network: 2},
        "max_grad_norm": 0.5,
    }
    first, second = TrainStep(loss, **own, **trained), TrainStep(build(name), **own)
    kept = TrainStep(build(name), **own)
    minibatches = Minibatches(transitions(name, 300), 32)
    first.run(minibatches, 5)
    for other in (second, kept):  # they were something else before
        other.run(minibatches, 2)
    fresh = numbers(kept.losses[0])
    state = first.state_dict()
    second.load_state_dict(state)
    kept.load_state_dict(state, keep=("settings",))
    assert numbers(second.losses[0]) == numbers(loss)
    assert numbers(loss) != fresh or name == "bc"  # which has none
    assert numbers(kept.losses[0]) == fresh
    for its in (second.losses[0], kept.losses[0]):
        one, other = (learned(each, each.state_dict()) for each in (its, loss))
        assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    for step in (first, second, kept):
        step.run(minibatches, 4)
    assert_equal(second.losses[0], loss, 0.0)
    assert second.learning_rates() == first.learning_rates() != kept.learning_rates()


def test_what_a_schedule_has_set_is_what_a_learner_goes_on_with() -> None:
    def run(step: TrainStep, batches: list[TensorDict]) -> TrainStep:
        for batch in batches:
            if step.steps == 3:
                step.losses[0].temperature, step.losses[0].weight_clip = 5.0, 0.5
            step(batch)
        return step

    batches = [transitions("iql") for _ in range(8)]
    whole, first, second = (TrainStep(make_loss(0).double()) for _ in range(3))
    run(whole, batches)
    second.load_state_dict(run(first, batches[:5]).state_dict())
    run(second, batches[5:])
    assert (second.losses[0].temperature, second.losses[0].weight_clip) == (5, 0.5)
    assert_equal(second.losses[0], whole.losses[0], 0.0)


def test_the_value_estimator_is_that_of_the_state() -> None:
    first, second = (TrainStep(make_loss(0).double()) for _ in range(2))
    first.losses[0].make_value_estimator("td1", gamma=0.7)
    for step in (first, second):
        step(transitions("iql"))
    second.load_state_dict(first.state_dict())
    assert coefficients(second.losses[0])["value_type"] == "TD1"
    assert second.losses[0].value_estimator.gamma == 0.7
    batch = transitions("iql")
    for step in (first, second):
        step(batch.clone())
    assert_equal(second.losses[0], first.losses[0], 0.0)


def test_a_new_learner_may_begin_with_what_was_learned() -> None:
    batches = [transitions("iql") for _ in range(4)]
    first, second = TrainStep(make_loss(0).double()), TrainStep(make_loss(1).double(), seeds=7)
    for batch in batches:
        first(batch)
    second.load_state_dict(first.state_dict(), keep=("settings", "optimizer", "random"))
    assert second.steps == 0
    assert all(
        not moment.any() for pair in second.state_dict()["moments"].values() for moment in pair
    )
    again = TrainStep(deepcopy(first.losses[0]))
    for batch in batches:
        second(batch.clone())
        again(batch.clone())
    assert_equal(second.losses[0], again.losses[0], 1e-12)
    with pytest.raises(ValueError, match=r"keep must hold some of \('settings', .* got 'setting'"):
        second.load_state_dict(first.state_dict(), keep=["setting"])  # pyright: ignore
    with pytest.raises(TypeError, match=r"keep must be .*, as \('settings',\), got 'settings'"):
        second.load_state_dict(first.state_dict(), keep="settings")


def test_moments_that_a_state_has_not_are_missed_before_anything_changes() -> None:
    few = TrainStep(make_loss(0).double(), learning_rate={"value_network": 1e-3})
    few(transitions("iql"))
    step = TrainStep(make_loss(1).double())
    before = snapshot(step.losses[0])
    with pytest.raises(ValueError, match="the state has no moments of actor_network_params"):
        step.load_state_dict(few.state_dict(), keep=("settings",))
    assert not moved(step.losses[0], before)
    step.load_state_dict(few.state_dict())
    assert step.learning_rates() == few.learning_rates()


def test_a_state_of_another_loss_is_refused_by_name() -> None:
    step = TrainStep(make_loss(0).double())
    state = step.state_dict()
    state["coefficients"]["margin"] = 0.5
    before = snapshot(step.losses[0])
    with pytest.raises(ValueError, match="the state has margin, and this IQLLoss has not"):
        step.load_state_dict(state)
    assert not moved(step.losses[0], before)


def test_a_state_of_other_parameters_is_refused_by_what_differs() -> None:
    step = TrainStep(make_loss(0))
    state = step.state_dict()
    wider = {f"{name}_network_params.wide": torch.zeros(2) for name in ("actor", "value")}
    key, *rest = [key for key in state["loss"] if key.startswith("value_network")]
    for loss, message in (
        ({**state["loss"], key: torch.zeros(16, 9)}, rf"{key} is \(16, 9\), expected \(16, 3\)$"),
        (
            {k: x for k, x in state["loss"].items() if k != key},
            f"{key} is missing, expected .*16, 3.$",
        ),
        ({**state["loss"], **wider}, r"value_network_params.wide is \(2,\), expected nothing of"),
        (
            {"x": torch.zeros(1)},
            r"^the state is of other parameters: (\S+ is missing, .*){3} and \d+ more$",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            step.load_state_dict({**state, "loss": loss})
        assert len(str(error.value)) < 400 and rest[0] not in str(error.value)


@pytest.mark.parametrize("name", ["iql", "bc"])
def test_a_state_of_a_loss_is_none_of_a_step(name: str) -> None:
    step = TrainStep(build(name))
    with pytest.raises(
        ValueError, match=r"none of TrainStep.* no loss, moments, steps, .* more\."
    ) as error:
        step.load_state_dict(step.losses[0].state_dict())
    assert "loss's own state_dict() returned goes into its load_state_dict" in str(error.value)


@pytest.mark.parametrize("name", ["iql", "sac"])
@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_entries_of_another_width_are_named(name: str, execution: Any) -> None:
    """Of a loss that says what its networks read, and of TorchRL's."""
    step = TrainStep(build(name), execution=execution)
    batch = transitions(name)
    batch["observation"] = torch.zeros(64, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError) as error:
        step(batch)
    (note,) = [note for note in error.value.__notes__ if "was given" in note]
    assert "'observation': (64, 4) of torch.float64" in note
    assert note.startswith("qvalue_network" if name == "iql" else "SACLoss")


def test_a_state_is_the_same_stacked_or_not() -> None:
    stacked, general = TrainStep(make_loss(0).double()), TrainStep(make_loss(1).double())
    general._programs = [(general_program(general), slice(0, 1))]
    for _ in range(3):
        stacked(transitions("iql"))
    general.load_state_dict(stacked.state_dict())
    batch = transitions("iql")
    for step in (stacked, general):
        step(batch.clone())
    assert_equal(general.losses[0], stacked.losses[0])
    one, other = stacked.state_dict()["moments"], general.state_dict()["moments"]
    parameters = dict(stacked.losses[0].named_parameters())
    assert {key: pair[0].shape for key, pair in one.items()} == {
        key: parameter.shape for key, parameter in parameters.items()
    }
    for key, pair in other.items():
        torch.testing.assert_close(one[key], pair, rtol=1e-9, atol=1e-9)


def test_windows_of_time_reach_a_loss_that_reads_them() -> None:
    loss, plain = build("dt"), PlainLoop("dt", lr=1e-3)
    step = TrainStep(loss, learning_rate=1e-3)
    batch = transitions("dt", 40).reshape(8, 5)
    step(batch.clone())
    plain(batch.clone())
    assert_equal(loss, plain.loss)


def test_a_later_format_is_refused() -> None:
    step = TrainStep(build("bc"))
    state = {**step.state_dict(), "format": 99}
    with pytest.raises(ValueError, match="format 99, this version reads up to 3"):
        step.load_state_dict(state)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_a_state_of_format_1_continues(kind: str) -> None:
    """Written by the version that stored the moments of padded stacks, which then took two more steps."""
    saved = torch.load(Path(__file__).with_name("format-1.pt"), weights_only=True)[kind]
    architecture = Architecture(observation_size=3, action_size=2, hidden_sizes=(4, 5), policy=kind)
    torch.manual_seed(1)
    networks = built(architecture)
    loss = IQLLoss(*networks)
    if architecture.discrete:
        loss = DiscreteIQLLoss(*networks, action_space="categorical")
    schedule = {"actor_network": cosine_decay(10)}
    step = TrainStep(loss.double(), learning_rate=1e-2, schedule=schedule)
    step.load_state_dict(saved["state"])
    assert step.steps == 3
    for batch in saved["batches"]:
        step(TensorDict(batch, [16]))
    for key, tensor in saved["after"].items():
        torch.testing.assert_close(loss.state_dict()[key], tensor, rtol=1e-9, atol=1e-9, msg=key)
